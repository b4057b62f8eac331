"""Predicted and real memory of a training step, and what recomputing and a chunked loss save, and cost in time.

    python tests/bench/bench_memory.py [--models gpt2-small tinyllama-1m] [--rows 1] [--rounds 3]

Each variant is a process of its own, and they take their timed steps in turn. A step has two parts, so that gradients are
there while the second one is computed. "tensors" is the most that torch's allocator
has handed out at a time in a step (its profiler counts); "resident" is by how much the process grew beyond what it was
before the model was made: it holds also what kernels take for themselves and what the C library cannot use again.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import tyro

from nanogptx import device, memory, train
from nanogptx.attention import holds_scores
from nanogptx.tinyllama import MODELS, build_model

VARIANTS = {"as it is": (False, False), "chunked loss": (False, True), "recompute": (True, False), "both": (True, True)}


@dataclass
class Options:
    """Compare predicted with real memory."""

    models: tuple[str, ...] = ("gpt2-small", "tinyllama-120m", "tinyllama-1m")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rows: int = 1  # of the model's context; 64 for models of less than 10 million parameters
    rounds: int = 3  # timed steps of each variant


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def peak_of(step) -> int:
    """The most bytes that torch's allocator has handed out at a time during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def worker(name: str, dtype_name: str, rows: int, variant: str) -> None:
    """Print what is predicted and measured; then a step's seconds for every line of input."""
    device.keep_memory()
    architecture, config = MODELS[name]
    dtype, where, (recompute, chunked) = device.DTYPES[dtype_name], torch.device("cpu"), VARIANTS[variant]
    fused = not holds_scores("cpu", dtype, config.block_size, config.dropout)
    how = memory.Step(rows, config.block_size, dtype, fused, recompute, chunked)
    need = memory.training_bytes(config, how)
    before = resident()
    model = build_model(architecture, vars(config))
    model.recompute, model.chunked_loss = recompute, chunked
    optimizers = train.make_optimizers(model, train.PRESETS["gpt2-small"])
    x = torch.randint(config.vocab_size, (rows, config.block_size))

    off = torch.amp.GradScaler("cpu", enabled=False)

    def step() -> None:
        train.train_step(
            model, optimizers, [train.Part(x, x, 0.5)] * 2, 1.0, lambda: device.autocast(where, dtype), off
        )
        model.zero_grad()

    step()
    grown = device.peak_memory(where) - before
    fixed = need["weights"] + need["optimizer"]  # they are there before the step
    facts = {"predicted": sum(need.values()), "tensors": peak_of(step) + fixed, "resident": grown}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def main() -> None:
    options = tyro.cli(Options)
    for name, dtype in itertools.product(options.models, options.dtypes):
        rows = options.rows if memory.multiplied(MODELS[name][1]) > 1e7 else 64
        print(f"\n{name}, {rows} x {MODELS[name][1].block_size} tokens in {dtype}")
        print(f"{'':14}{'predicted':>12}{'tensors':>12}{'resident':>12}   step")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        workers, facts = {}, {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, "worker", name, dtype, str(rows), variant]
            workers[variant] = subprocess.Popen(command, **pipes)
            facts[variant] = json.loads(workers[variant].stdout.readline())
        seconds = {variant: [] for variant in VARIANTS}
        for _ in range(options.rounds):
            for variant, process in workers.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                seconds[variant].append(float(process.stdout.readline()))
        for variant, process in workers.items():
            process.stdin.close()
            process.wait()
            sizes = "".join(
                f"{facts[variant][kind] / 2**20:8,.0f} MiB" for kind in ("predicted", "tensors", "resident")
            )
            ratio = statistics.median(seconds[variant]) / statistics.median(seconds["as it is"])
            print(f"{variant:14}{sizes}   {ratio:.2f} x {statistics.median(seconds['as it is']):.2f} s")


if __name__ == "__main__":
    worker(*sys.argv[2:4], int(sys.argv[4]), sys.argv[5]) if sys.argv[1:2] == ["worker"] else main()
