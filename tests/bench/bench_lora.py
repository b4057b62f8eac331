"""Fine-tune the `tales` model to the second style of its world, letters: all weights, and adapters of several ranks.

python tests/bench/bench_lora.py
python tests/bench/bench_lora.py --folder out/bench --seeds 0 --ranks 8 --variants "--lora-targets q,v; --lora-stabilized"

All runs of a seed start from the same model (train.py tales) and see the same batches. The floor is the entropy of the
letters: no model can get below it.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanogptx import checkpoint, sample, tales, train

TRAIN = Path(__file__).parents[2] / "nanogptx/train.py"


@dataclass
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    """One base, and one run of each kind, for each."""
    ranks: tuple[int, ...] = (1, 2, 8)
    """Ranks of adapters."""
    variants: str = ""
    """Further options of train.py for the runs with adapters, a row for each, with ; between them."""
    steps: int = 200
    """Of each fine-tuning."""
    folder: Path | None = None
    """Where to keep the runs; those that are there are not done again."""


def run(out: Path, *args) -> dict:
    if not (out / "result.json").exists():
        command = [sys.executable, TRAIN, *args, "--samples", 0, "--resume", "--out", out]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text()) | {"cool": cool(out) if "base" not in out.name else 0}


def cool(out: Path) -> int:
    """How many of 100 samples are grammatical when unlikely tokens are made less likely: at a temperature of 0.5."""
    model, tokenizer, _ = checkpoint.load_run(out)
    texts = sample.generate_text(model, tokenizer, "", 100, sample.Settings(temperature=0.5))
    return sum(tales.judge(text, tales.STYLES["letters"]).grammatical for text in texts)


def before(base: Path, out: Path) -> dict:
    """The base's own score on the letters."""
    options = train.Options(data="tales-letters", init_from=str(base), out=out, resume=True)
    return {"validation": train.open_trainer(options).validate(options.eval_tokens)._asdict()}


def all_runs(options: Options, seed: int, folder: Path) -> dict[str, dict]:
    run(base := folder / f"base-{seed}", "tales", "--seed", seed)
    common = ["--init-from", base, "--data", "tales-letters", "--seed", seed, "--steps", options.steps]
    results = {"before": before(base, folder / f"before-{seed}")}
    results["all weights"] = run(folder / f"full-{seed}", "finetune", *common)
    for rank in options.ranks:
        for variant in options.variants.split(";"):
            out = folder / f"lora-{seed}-{rank}-{variant.strip()}"
            result = run(out, "lora", *common, "--lora-rank", rank, *shlex.split(variant))
            result["bytes"] = (out / "adapter/adapter_model.safetensors").stat().st_size
            results[f"rank {rank} {variant.strip()}"] = result
    return results


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        seeds = [all_runs(options, seed, options.folder or Path(folder)) for seed in options.seeds]

    def figure(name: str, pick, digits: int) -> str:
        values = sorted(pick(runs[name], runs) for runs in seeds)
        return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"

    def nats(result: dict) -> float:
        return result["validation"]["nats_per_char"]

    def gain(result: dict, runs: dict) -> float:
        return 100 * (nats(runs["before"]) - nats(result)) / (nats(runs["before"]) - nats(runs["all weights"]))

    floor = seeds[0]["all weights"]["floor"]["nats_per_char"]
    print(
        f"medians over seeds (lowest-highest) after {options.steps} steps; the floor is {floor:.4f} nats per character"
    )
    for name, result in seeds[0].items():
        print(f"{name:24} {figure(name, lambda r, _: nats(r), 4)} nats per character, "
              f"{figure(name, gain, 1)} % of the gain")  # fmt: skip
        if "referee" in result:
            print(f"{'':24} of 100 samples {figure(name, lambda r, _: r['referee']['grammatical'], 0)} grammatical, "
                  f"{figure(name, lambda r, _: r['referee']['true'], 0)} true, "
                  f"at temperature 0.5 {figure(name, lambda r, _: r['cool'], 0)} grammatical; "
                  f"{figure(name, lambda r, _: r['seconds'], 0)} s, "
                  f"peak {figure(name, lambda r, _: r['peak_bytes'] / 2**20, 0)} MiB"
                  + (f"; adapter of {result['bytes']:,} bytes" if "bytes" in result else ""))  # fmt: skip


if __name__ == "__main__":
    main()
