"""One training step of GPT-2 small, 1 x 1024 tokens, against transformers: the same work, interleaved, in one run.

    python tests/bench/bench_gpt2_step.py [--rounds 7]

Prints tokens/s, the share of the matrix-multiply rate measured in the same rounds (6 N + 12 L C T FLOPs a token), and
peak memory. Each variant is a process of its own, and they take their steps in turn. On a CPU with bfloat16 "tuned" is bfloat16 autocast and fused AdamW
on both sides; as shipped, transformers is float32 with torch's default AdamW.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from nanogptx import device, train
from nanogptx.gpt2 import CONFIGS, GPT2

T = 1024
SHAPE = CONFIGS["gpt2-small"]
FLOPS = 6 * 124_439_808 + 12 * SHAPE.n_layer * SHAPE.n_embd * T  # per token
WHERE = device.choose_device()


def ours(dtype: torch.dtype) -> Callable[[], float]:
    """A step as the trainer does it."""
    model = GPT2(SHAPE).to(WHERE)
    optimizers = train.make_optimizers(model, train.PRESETS["gpt2-small"])
    scaler = torch.amp.GradScaler(WHERE.type, enabled=False)
    x, y = (torch.randint(50257, (1, T), device=WHERE) for _ in range(2))

    def step() -> float:
        loss, _ = train.train_step(
            model, optimizers, [train.Part(x, y, 1.0)], 1.0, lambda: device.autocast(WHERE, dtype), scaler
        )
        model.zero_grad()
        return loss

    return step


def theirs(dtype: torch.dtype, fused: bool | None) -> Callable[[], float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).to(WHERE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    x = torch.randint(50257, (1, T + 1), device=WHERE)[:, :T]

    def step() -> float:
        with device.autocast(WHERE, dtype):
            loss = model(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def gemm_rate(dtype: torch.dtype) -> float:
    """Multiply-adds counted as two, per second, of one large matrix product."""
    a, b = (torch.randn(2048, 2048, device=WHERE, dtype=dtype) for _ in range(2))
    began = time.perf_counter()
    for _ in range(4):
        c = F.linear(a, b)
    c[0, 0].item()  # on a GPU: wait
    return 4 * 2 * 2048**3 / (time.perf_counter() - began)


FAST = device.choose_dtype(WHERE)
VARIANTS = {
    "nanogptx": (FAST, lambda: ours(FAST)),
    "nanogptx float32": (torch.float32, lambda: ours(torch.float32)),
    "transformers as shipped": (torch.float32, lambda: theirs(torch.float32, None)),
    "transformers tuned": (FAST, lambda: theirs(FAST, True)),
}


@dataclass
class Options:
    rounds: int = 7
    """Counted rounds, after two that are not."""
    variant: str = ""
    """(For the program itself.) Be one variant: a step for each line of input, its seconds for each step."""


def be(name: str) -> None:
    if name.startswith("nanogptx"):
        device.keep_memory()  # as the trainer does
    step = VARIANTS[name][1]()
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)
    print(device.peak_memory(WHERE))


def main() -> None:
    options = tyro.cli(Options)
    if options.variant:
        return be(options.variant)
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--variant", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in VARIANTS
    }
    times = {name: [] for name in VARIANTS}
    rates = {dtype: [] for dtype, _ in VARIANTS.values()}
    for number in range(options.rounds + 2):
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            times[name].append(float(worker.stdout.readline()))
        for dtype in rates:
            rates[dtype].append(gemm_rate(dtype))
        print(f"round {number - 1}" if number >= 2 else "warming up", file=sys.stderr)
    peaks = {name: int(worker.communicate()[0]) for name, worker in workers.items()}
    print(
        f"GPT-2 small, one step of 1 x {T} tokens on {WHERE}, {torch.get_num_threads()} threads, median of {options.rounds}"
    )
    base = statistics.median(times["nanogptx"][2:])
    for name, (dtype, _) in VARIANTS.items():
        seconds = statistics.median(times[name][2:])
        rate = statistics.median(rates[dtype][2:])
        print(
            f"{name:24} {str(dtype).removeprefix('torch.'):9} {T / seconds:8,.0f} tokens/s  {T * FLOPS / seconds / rate:6.1%} of "
            f"{rate / 1e9:,.0f} GFLOP/s  peak {peaks[name] / 2**20:7,.0f} MiB  nanogptx is {seconds / base:.2f} x as fast"
        )


if __name__ == "__main__":
    main()
