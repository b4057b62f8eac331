"""The engine of serve.py with GPT-2 small (random weights): tokens/s, waiting, and against transformers' `generate`.

    python tests/bench/serve.py [--dtypes float32 bfloat16] [--batches 1 2 4 8 16] [--rounds 3] [--no-peer]

Only the engine: one process, no HTTP. Each text has its own prompt, of random ids, is continued greedily and ends after
a given number of tokens. *First token* is the time from a request's arrival to its first piece, waiting included;
*between tokens* that from one piece of a text to its next. Rates and ratios are medians over rounds, in which all that
is compared takes turns; percentiles are of all rounds' texts together, and of few texts the 99th is the slowest one.

Closed loop: so many clients, and rows, and each client sends its next request when its last one is done. A slow server
gets fewer requests, so nobody waits for long: this shows what can be written, not how long users wait. The peer,
transformers, writes the same requests one after another.
Open loop: requests come at random times (Poisson), whether or not the others are done, at given fractions of the closed
loop's rate with the most rows. They may pile up, and the first token's percentiles show it.
Static against continuous batching: all requests, of unlike lengths (lognormal), are there at the start. A static batch
lasts as long as its longest text; *padded* is one whose other rows are computed on until then, as by `generate`, while
ours gives them up and so gets faster. If steps of few and of many texts took the same time, prompts none, and nothing
were left over at the end, continuous batching would write max / mean length times as many tokens/s: printed, too.
Last, the most memory that a fresh process has while it serves in bfloat16.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from bench_sample import SHAPE, Words, make
from tqdm import tqdm

from nanogptx import device, program, sample
from nanogptx.gpt2 import GPT2
from nanogptx.serve import Engine, Job, Piece

PROMPT, TOKENS = 32, 48  # of a prompt; to be written
KV_BYTES = 2**30  # room for 32 of the longest texts at once


@dataclass
class Options:
    """Measure the serving engine."""

    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Clients and rows of the closed loop; everything else has as many rows as the largest."""
    each: int = 4
    """Requests of each client in a round of the closed loop."""
    loads: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Rates of the open loop's requests, as fractions of what the closed loop has done."""
    requests: int = 96
    """How many in a round of the open loop."""
    backlog: int = 256
    """How many in a round of static against continuous batching."""
    rounds: int = 3
    peer: bool = True
    """--no-peer: without transformers."""

    def check(self) -> None:
        for name in ("batches", "each", "loads", "requests", "backlog", "rounds"):
            values = np.atleast_1d(getattr(self, name)).tolist()
            top = {"batches": 32, "loads": 10}.get(name, 100_000)
            if not values or not all(0 < value <= top for value in values):
                raise ValueError(f"--{name} is {' '.join(map(str, values)) or 'empty'}, expected above 0, up to {top}")


class Text:
    """A request for so many tokens, and when its pieces came."""

    def __init__(self, tokens: int, done: Callable[[float], None]):
        prompt = torch.randint(SHAPE.vocab_size, (PROMPT,)).tolist()
        writer = sample.Writer(Words(), prompt, sample.Settings(max_tokens=tokens, temperature=0))
        self.job, self.tokens, self.done = Job(writer, self.hear), tokens, done
        self.times, self.finish = [], ""

    def hear(self, piece: Piece) -> None:
        self.times.append(piece.at)
        self.finish = piece.finish
        if piece.finish:
            self.done(piece.at)

    def check(self) -> None:
        got = (self.finish, len(self.job.writer.ids), len(self.times))
        assert got == ("length", self.tokens, self.tokens), f"of {self.tokens} tokens came {got}"


@dataclass
class Result:
    """Of a run: tokens a second, and seconds of every text's first token and of each token after that."""

    rate: float
    first: list[float]
    gaps: list[float]


def serve(engine: Engine, lengths: list[int], arrivals: list[float], closed: bool = False) -> Result:
    """Let the engine write texts of these lengths, which arrive so many seconds after the start.

    In a closed loop there are as many clients as arrivals, and a client's next text arrives when its last one is done.
    """
    began = time.perf_counter()
    due = deque(began + seconds for seconds in arrivals)
    texts = [Text(tokens, due.append if closed else lambda at: None) for tokens in lengths]
    waiting = deque(texts)
    while True:
        while waiting and due and due[0] <= time.perf_counter():
            waiting[0].job.arrived = due.popleft()
            engine.submit(waiting.popleft().job)
        if not engine.step():
            if not waiting:
                break
            time.sleep(max(0, due[0] - time.perf_counter()))
    for text in texts:
        text.check()
    took = max(text.times[-1] for text in texts) - min(text.job.arrived for text in texts)
    first = [text.times[0] - text.job.arrived for text in texts]
    return Result(sum(lengths) / took, first, [gap for text in texts for gap in np.diff(text.times)])


def warm_engine(model, rows: int, queue: int = 64, continuous: bool = True) -> Engine:
    engine = Engine(model, Words(), KV_BYTES, max_batch=rows, max_queue=queue, continuous=continuous)
    serve(engine, [8] * rows, [0] * rows)
    return engine


def their_rate(model, requests: int) -> Result:
    began = time.perf_counter()
    for _ in range(requests):
        idx = torch.randint(SHAPE.vocab_size, (1, PROMPT))
        how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        assert model.generate(idx, attention_mask=torch.ones_like(idx), **how).size(1) == PROMPT + TOKENS
    return Result(requests * TOKENS / (time.perf_counter() - began), [], [])


def in_turns(what: str, rounds: int, contests: dict[object, Callable[[int], Result]]) -> dict[object, list[Result]]:
    """Each contest once a round; it is told the number of the round."""
    results = {kind: [] for kind in contests}
    for number in tqdm(range(rounds), desc=what, leave=False, file=sys.stderr):
        for kind, run in contests.items():
            results[kind].append(run(number))
    return results


def ratio(some: list[Result], others: list[Result]) -> float:
    return statistics.median(a.rate / b.rate for a, b in zip(some, others, strict=True))


def words(results: list[Result]) -> str:
    line = f"{statistics.median(r.rate for r in results):6,.1f} tokens/s"
    for name, part in (("first token", "first"), ("between tokens", "gaps")):
        marks = np.percentile([seconds for r in results for seconds in getattr(r, part)], (50, 95, 99))
        line += f", {name} {' / '.join(f'{1e3 * mark:,.0f}' for mark in marks)} ms"
    return line


def closed_loop(name: str, options: Options, model, theirs) -> float:
    """Returns the tokens a second with the most rows."""
    batches, contests = sorted({1, *options.batches}), {}
    for clients in batches:
        engine, lengths = warm_engine(model, clients), [TOKENS] * (clients * options.each)
        contests[clients] = lambda _, e=engine, some=lengths, n=clients: serve(e, some, [0] * n, closed=True)
    if theirs:
        their_rate(theirs, 1)  # warm up
        contests["theirs"] = lambda _: their_rate(theirs, options.each)
    results = in_turns(f"{name}, closed loop", options.rounds, contests)
    for clients in batches:
        line = f"{name:9} {clients:2} clients: {ratio(results[clients], results[1]):5.2f} x one at a time, "
        line += f"{ratio(results[clients], results['theirs']):5.2f} x transformers, " if theirs else ""
        print(line + words(results[clients]), flush=True)
    return statistics.median(r.rate for r in results[batches[-1]])


def open_loop(name: str, options: Options, model, most: float) -> None:
    """`most` tokens a second can be written."""
    engine, lengths = warm_engine(model, max(options.batches), options.requests), [TOKENS] * options.requests

    def run(number: int, load: float) -> Result:
        gaps = np.random.default_rng(number).exponential(TOKENS / (load * most), options.requests)
        return serve(engine, lengths, gaps.cumsum().tolist())

    contests = {load: lambda number, load=load: run(number, load) for load in options.loads}
    for load, results in in_turns(f"{name}, open loop", options.rounds, contests).items():
        rate = f"{load * most / TOKENS:.2f} requests/s ({load:g} of the most)"
        print(f"{name:9} {rate}: {words(results)}", flush=True)


def padded(engine: Engine, batches: list[list[int]]) -> Result:
    """One batch after the other, in each of which all rows go on until the longest text has ended."""
    began = time.perf_counter()
    for lengths in batches:
        serve(engine, [max(lengths)] * len(lengths), [0] * len(lengths))
    return Result(sum(map(sum, batches)) / (time.perf_counter() - began), [], [])


def static_or_continuous(name: str, options: Options, model) -> None:
    rows, total, contests = max(options.batches), options.backlog, {}
    lengths = [np.random.default_rng(n).lognormal(math.log(24), 1, total) for n in range(options.rounds)]
    lengths = [some.round().clip(1, 400).astype(int).tolist() for some in lengths]
    batches = [[some[i : i + rows] for i in range(0, total, rows)] for some in lengths]
    for kind in ("static", "continuous"):
        engine = warm_engine(model, rows, total, kind == "continuous")
        contests[kind] = lambda number, e=engine: serve(e, lengths[number], [0] * total)
    contests["padded"] = lambda number: padded(engine, batches[number])
    results = in_turns(f"{name}, batching", options.rounds, contests)
    for kind in ("static", "continuous"):
        print(f"{name:9} {kind} batching, {rows} rows: {words(results[kind])}")
    formula = statistics.median(sum(map(max, some)) / sum(map(statistics.mean, some)) for some in batches)
    gains = [ratio(results["continuous"], results[kind]) for kind in ("static", "padded")]
    print(f"{name:9} continuous batching: {gains[0]:.2f} x the tokens/s of static, {gains[1]:.2f} x of padded static "
          f"batches; max / mean length {formula:.2f}", flush=True)  # fmt: skip


def worker() -> None:
    """Serve 16 requests in bfloat16, of which no float32 copy is ever there; print bytes, the peak first."""
    where = torch.device("cpu")
    facts = {"peak": 0, "for Python and libraries": device.peak_memory(where)}
    torch.set_default_dtype(torch.bfloat16)
    model = GPT2(SHAPE)
    torch.set_default_dtype(torch.float32)
    facts["weights"] = sum(p.nbytes for p in model.parameters())
    model = sample.prepare(model, torch.bfloat16)
    facts["the head's packed copy"] = 0 if model.tied else model.embed.weight.nbytes
    engine = Engine(model, Words(), int(0.3 * 2**30), max_batch=16)
    serve(engine, [TOKENS] * 16, [0] * 16)
    facts |= {"keys and values": engine.cache.nbytes, "peak": device.peak_memory(where)}
    assert "transformers" not in sys.modules
    print(json.dumps(facts | {"the rest": 2 * facts["peak"] - sum(facts.values())}))


def main() -> None:
    options = tyro.cli(Options)
    options.check()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; prompts of {PROMPT} tokens; p50 / p95 / p99")
    for name in options.dtypes:
        _, model, theirs = make(device.DTYPES[name], options.peer)
        most = closed_loop(name, options, model, theirs)
        del theirs
        open_loop(name, options, model, most)
        static_or_continuous(name, options, model)
    done = subprocess.run([sys.executable, __file__, "worker"], stdout=subprocess.PIPE, text=True, check=True)
    peak, *parts = (f"{size / 2**20:,.0f} MiB {what}" for what, size in json.loads(done.stdout).items())
    print(f"bfloat16  16 requests at once: resident {peak}, that is {', '.join(parts)}")


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["worker"] else program.run(main)
