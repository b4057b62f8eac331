"""The same run on one process and on several: tokens per second, peak memory of rank 0, and the last loss.

    python tests/bench/bench_parallel.py [--processes 2] [--rounds 3] [--steps 40] [--preset tales] [--more="--batch-size 8"]

All use the same cores: one process has as many threads as there are cores, several share them. The layouts take turns;
medians are printed, and the ratio to one process.
"""

import json
import os
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
    """Compare layouts."""

    processes: int = 2
    rounds: int = 3
    steps: int = 40
    preset: str = "tales"
    more: str = ""  # options for train.py


def run(options: Options, layout: str, folder: Path) -> dict:
    out = folder / layout
    args = [
        str(TRAIN),
        options.preset,
        "--steps",
        str(options.steps),
        "--samples",
        "0",
        "--eval-tokens",
        "3000",
        "--out",
        str(out),
    ]
    args += options.more.split()
    threads, launch = os.cpu_count(), [sys.executable]
    if layout != "one":
        threads = max(1, threads // options.processes)
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
        args += ["--parallel", layout]
    subprocess.run(launch + args, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return json.loads((out / "result.json").read_text()) | {"loss": last["loss"]}


def main() -> None:
    options = tyro.cli(Options)
    results = {layout: [] for layout in ("one", "ddp", "fsdp")}
    for _ in range(options.rounds):
        for layout, found in results.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(run(options, layout, Path(folder)))
    speed = {layout: [r["tokens"] / r["seconds"] for r in found] for layout, found in results.items()}
    for layout, found in results.items():
        ratio = statistics.median(a / b for a, b in zip(speed[layout], speed["one"]))
        name = "1 process" if layout == "one" else f"{options.processes} with {layout}"
        print(f"{name:12} {statistics.median(speed[layout]):10,.0f} tokens/s  {ratio:5.2f} x  "
              f"{statistics.median(r['peak_bytes'] for r in found) / 2**20:8,.0f} MiB  loss {found[0]['loss']:.6f}")  # fmt: skip


if __name__ == "__main__":
    main()
