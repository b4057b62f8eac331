"""What the lessons' experiments share: a training loop, a model small enough for it, recorded results, and timing.

A lesson has a minute. What takes longer is run once by `python lessons/build.py record NN`, which writes its results to
nanogptx/assets/; the lesson shows them, and runs a part of it again.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanogptx.attention import SelfAttention

ASSETS = Path(__file__).parent / "assets"


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, warmup: int = 20) -> list[float]:
    """Train by AdamW; `loss` draws a batch and gives the model's loss on it. Returns the losses.

    The learning rate rises to `lr` in `warmup` steps, and all the while it is cut in a straight line to 0 at the end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup) * (1 - step / steps))
    losses = []
    for _ in range(steps):
        now = loss()
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
        rate.step()
        losses.append(now.item())
    return losses


class Tiny(nn.Module):
    """A decoder of two layers and 64 channels: ids (B, T) below `n_in` -> scores (B, T, n_out).

    Where a token stands is told from outside, by `rotate` or `bias` (see SelfAttention) or by vectors (T, 64) to add.
    """

    def __init__(self, n_in: int, n_out: int, n_head: int = 2, width: int = 64):
        super().__init__()
        self.embed = nn.Embedding(n_in, width)
        self.attention = nn.ModuleList(SelfAttention(width, n_head, n_head) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_out))

    def forward(self, idx: Tensor, rotate=None, bias: Tensor | None = None, vectors: Tensor | float = 0.0) -> Tensor:
        x = self.embed(idx) + vectors  # (B, T, C)
        for layer in range(2):
            x = x + self.attention[layer](self.norms[2 * layer](x), rotate, bias)
            x = x + self.mlp[layer](self.norms[2 * layer + 1](x))
        return self.head(x)


SYMBOLS, BACK = 16, 5


def two_tasks(n: int, T: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Texts that ask for something near and something far: ids, and what is to be said, each (n, T).

    A text is random symbols, 0 to 15. Its first token, 16 to 31, is a fact; a quarter of the others are questions, 32.
    At a symbol the model is to say (`near`) the token that stood 5 places before, at a question (`far`) the fact less
    16. Elsewhere, and where a question or the fact stood there, they are -100, which cross_entropy leaves out.
    """
    symbols = torch.randint(SYMBOLS, (n, T), generator=random)
    asked = torch.rand(n, T, generator=random) < 0.25
    asked[:, 0] = False
    idx = symbols.masked_fill(asked, 2 * SYMBOLS)
    idx[:, 0] += SYMBOLS
    near = torch.full((n, T), -100)
    near[:, BACK:] = idx[:, :-BACK]
    near = near.masked_fill(asked | (near >= SYMBOLS), -100)
    far = symbols[:, :1].expand(n, T).masked_fill(~asked, -100)
    return idx, near, far


def errorbars(ax, x: Iterable[float], runs: Iterable[Iterable[float]], **style) -> None:
    """Draw the mean of several runs (rows: runs, columns: places x), with bars from the lowest run to the highest."""
    runs = np.asarray(runs)
    mean = runs.mean(0)
    ax.errorbar(x, mean, [mean - runs.min(0), runs.max(0) - mean], capsize=2, **style)


def recorded(name: str) -> dict:
    """The results that `python lessons/build.py record NN` wrote for the chapter of this name."""
    return json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def in_parallel(function: Callable, jobs: Iterable[tuple]) -> list:
    """[function(*job) for job in jobs], in a process for each core."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return [running.result() for running in [pool.submit(function, *job) for job in jobs]]


RACE = """
import json, statistics, sys, timeit
setup, statements, rounds = json.load(sys.stdin)
names = {}
exec(compile(setup, "<setup>", "exec"), names)
timers = {name: timeit.Timer(statement, globals=names) for name, statement in statements.items()}
number = {}
for name, timer in timers.items():
    timer.timeit(1)
    number[name] = 1 + int(0.005 / timer.timeit(1))  # clocks tick: what takes microseconds is repeated
times = {name: [] for name in timers}
for _ in range(rounds):
    for name, timer in timers.items():
        times[name].append(timer.timeit(number[name]) / number[name])
print(json.dumps({name: statistics.median(seconds) for name, seconds in times.items()}))
"""


def race(setup: str, rounds: int = 7, **statements: str) -> dict[str, float]:
    """Seconds that each statement takes, {name: median}, on all cores and with this machine's best kernels.

    In a process of its own: a lesson runs on one thread and without modern vector instructions, so that it prints the
    same digits on every CPU, and what is measured should be what the machine can do.

    `setup` and the statements are source code; the setup runs once, then the statements in turns, so that whatever else
    the machine does slows all of them alike. Compare the results with each other: only ratios hold elsewhere.
    RuntimeError with the last line of a setup or statement that fails.
    """
    pinned = os.environ.get("NANOGPTX_PINNED", "").split()  # set by the build of the lessons
    native = {name: value for name, value in os.environ.items() if name not in pinned}
    command, task = [sys.executable, "-c", RACE], json.dumps((textwrap.dedent(setup), statements, rounds))
    result = subprocess.run(command, input=task, capture_output=True, text=True, env=native)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])
