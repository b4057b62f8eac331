"""Writing text with GPT-2 small (random weights): against transformers' `generate`, and against the memory's speed.

    python tests/bench/bench_sample.py [--dtypes float32 bfloat16] [--batches 1 8 32] [--prompts 32 256] [--rounds 3]

Both continue the same prompts greedily, in the same number format, in turns. Each token needs every weight once, so no
program can be faster than weight bytes over the rate at which this machine reads memory: the *bound*. The rate is that
of summing an array much larger than every cache, measured in every round. Printed are medians: the rate of writing once
the prompts are read, what share of the bound that is (at batch 1; with more rows arithmetic counts, too), and how many
times as fast as transformers.
Last, whether a token costs the same wherever it stands, and what the cache and the packed weights give.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from nanogptx import device, huggingface, sample
from nanogptx.gpt2 import CONFIGS, GPT2

SHAPE = CONFIGS["gpt2-small"]


class Words:
    """A tokenizer of GPT-2's size without an end: what is compared is the models."""

    vocab_size, bos_id, eos_id = SHAPE.vocab_size, 0, -1

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@dataclass
class Options:
    """Measure sampling."""

    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    batches: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[int, ...] = (32, 256)
    """Lengths of prompts, in tokens."""
    tokens: int = 48
    """How many are written."""
    rounds: int = 3
    peer: bool = True
    """--no-peer: without transformers."""


def read_rate(large: torch.Tensor) -> float:
    """Bytes a second of a sum over an array."""
    began = time.perf_counter()
    large.sum()
    return large.nbytes / (time.perf_counter() - began)


def steps_of(model, prompts: list[list[int]], tokens: int, **how) -> list[float]:
    """Seconds of each step of our `generate`; the first one reads the prompts."""
    settings, times = sample.Settings(max_tokens=tokens, temperature=0), []
    writers = [sample.Writer(Words(), list(ids), settings, n) for n, ids in enumerate(prompts)]
    began = time.perf_counter()
    for _ in sample.generate(model, writers, **how):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    assert all(len(writer.ids) == tokens for writer in writers)
    return times


def their_seconds(model, prompts: list[list[int]], tokens: int) -> float:
    idx = torch.tensor(prompts)
    began = time.perf_counter()
    out = model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=tokens,
                         min_new_tokens=tokens, pad_token_id=0)  # fmt: skip
    assert out.size(1) == len(prompts[0]) + tokens
    return time.perf_counter() - began


def make(dtype: torch.dtype, peer: bool):
    torch.manual_seed(0)
    plain = GPT2(SHAPE).to(dtype).eval()
    theirs = None
    if peer:
        from transformers import GPT2Config, GPT2LMHeadModel

        theirs = GPT2LMHeadModel(GPT2Config()).to(dtype).eval()
        theirs.load_state_dict(huggingface.to_hf("gpt2", plain.state_dict()), strict=False)
        theirs.tie_weights()
    return plain, sample.prepare(copy.deepcopy(plain), dtype), theirs


def compare(name: str, options: Options, large: torch.Tensor) -> None:
    dtype = device.DTYPES[name]
    plain, fast, theirs = make(dtype, options.peer)
    size = sum(p.nbytes for p in plain.parameters()) - plain.position.weight.nbytes
    for length, batch in itertools.product(options.prompts, options.batches):
        prompts = torch.randint(SHAPE.vocab_size, (batch, length)).tolist()
        contests: dict[str, Callable[[int], float]] = {"ours": lambda n, p=prompts: sum(steps_of(fast, p, n))}
        if theirs:
            contests["transformers"] = lambda n, p=prompts: their_seconds(theirs, p, n)
        for run in contests.values():
            run(8)  # warm up
        rounds = []
        for _ in tqdm(range(options.rounds), desc=f"{name}, {batch} x {length}", leave=False, file=sys.stderr):
            rate = max(read_rate(large) for _ in range(3))  # right before and after our steps: the machine's wanders
            first, step = {}, {}  # seconds of reading the prompts and choosing a token; of each token after that
            for kind, run in contests.items():
                first[kind] = min(run(1), run(1))
                step[kind] = (run(options.tokens) - first[kind]) / (options.tokens - 1)
                rate = rate if kind != "ours" else (rate + max(read_rate(large) for _ in range(3))) / 2
            against = (first["transformers"] / first["ours"], step["transformers"] / step["ours"]) if theirs else (0, 0)
            rounds.append((step["ours"], rate, size / rate / step["ours"], *against))
        step, rate, share, prompt, token = (statistics.median(column) for column in zip(*rounds, strict=True))
        line = f"{name:9} {batch:2} x {length:3}: {batch / step:7,.1f} tokens/s, {1e3 * step:.1f} ms a step, "
        line += f"{100 * share:.0f} % of the bound ({size / 1e6:,.0f} MB of weights, read at {rate / 1e9:.1f} GB/s)"
        if theirs:
            line += f"; {token:.2f} x transformers (reading the prompts {prompt:.2f} x)"
        print(line, flush=True)
    prompts = torch.randint(SHAPE.vocab_size, (1, 16)).tolist()
    times = steps_of(fast, prompts, 1008)
    early, late = statistics.median(times[1:101]), statistics.median(times[-100:])
    print(f"{name:9} a token at position 950 takes {late / early:.2f} times as long as one at position 50", flush=True)
    bare, naive = steps_of(plain, prompts, 100), steps_of(plain, prompts, 100, cached=False)
    packed = statistics.median(times[1:100])
    print(f"{name:9} packed weights: {statistics.median(bare[1:]) / packed:.2f} times as fast as torch's layout; the "
          f"100th token with the cache {naive[-1] / bare[-1]:.1f} times as fast as without", flush=True)  # fmt: skip


def main() -> None:
    options = tyro.cli(Options)
    device.keep_memory()
    large = torch.ones(1 << 28)  # 1 GiB
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; texts x tokens of their prompts")
    for name in options.dtypes:
        compare(name, options, large)


if __name__ == "__main__":
    main()
