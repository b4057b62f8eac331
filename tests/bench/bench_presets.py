"""Train presets to their end, several seeds of each, and print what they reached.

python tests/bench/bench_presets.py tales tales-gpt2 --seeds 0 1 2
python tests/bench/bench_presets.py shakespeare --data PATH/tinyshakespeare.txt
python tests/bench/bench_presets.py shakespeare --data FILE --variants="; --optimizer adamw --lr 0.004; --dtype float32"
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

TRAIN = Path(__file__).parents[2] / "nanogptx/train.py"


@dataclass
class Options:
    presets: tyro.conf.Positional[tuple[str, ...]] = ("tales",)
    """Which presets."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each."""
    data: str = ""
    """Another text than the preset's."""
    variants: str = ""
    """Further options of train.py, a row for each, with ; between them."""


def one_run(preset: str, data: str, seed: int, variant: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, TRAIN, preset, "--seed", seed, "--out", out, "--samples", 0, *shlex.split(variant)]
        command += ["--data", data] if data else []
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        return json.loads((out / "result.json").read_text())


def main() -> None:
    options = tyro.cli(Options)
    print("medians over seeds (lowest to highest); seconds are of training alone")
    for preset in options.presets:
        for variant in options.variants.split(";"):
            runs = [one_run(preset, options.data, seed, variant) for seed in options.seeds]

            def figure(pick, digits: int, runs=runs) -> str:
                values = sorted(pick(r) for r in runs)
                return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"

            print(f"{preset} {variant}\n  {figure(lambda r: r['seconds'], 1)} s, "
                  f"{figure(lambda r: r['tokens'] / r['seconds'], 0)} tokens/s, "
                  f"peak {figure(lambda r: r['peak_bytes'] / 2**20, 0)} MiB\n"
                  f"  validation {figure(lambda r: r['validation']['nats_per_char'], 4)} nats per character")  # fmt: skip
            if runs[0]["floor"]:
                print(f"  above the floor {figure(lambda r: r['validation']['nats_per_char'] - r['floor']['nats_per_char'], 4)} "
                      f"nats per character (the floor is {runs[0]['floor']['nats_per_char']:.4f})\n"
                      f"  of 100 samples {figure(lambda r: r['referee']['grammatical'], 0)} grammatical, "
                      f"{figure(lambda r: r['referee']['true'], 0)} true")  # fmt: skip


if __name__ == "__main__":
    main()
