"""Sampling: from a model's logits to text.

A language model gives a distribution over the next token. Temperature flattens or sharpens it; top-k (Fan et al. 2018,
arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p (Nguyen et al. 2024, arXiv:2407.01082) cut
its tail off; a draw from what is left is appended, and the model is asked again. The order of these steps matters, and
it is that of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p.

    python nanogptx/sample.py out/tales --prompt "One"
    python nanogptx/sample.py out/tales --n 20 --temperature 0.8 --top-p 0.95

A text is a function of (seed, its number, prompt, options): what else is written in the same batch does not matter, but
for rounding. Left out: beam search, speculative decoding, penalties on frequency and presence.
"""

import dataclasses
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from nanogptx import checkpoint, device, program
from nanogptx.alibi import stretched
from nanogptx.kv_cache import KVCache
from nanogptx.tokenizer import Tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# From logits to a token


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and when a text ends."""

    max_tokens: int = 300
    """Stop after this many tokens, if the text has not ended before."""
    temperature: float = 1.0
    """Below 1 the likely tokens get likelier; 0 always takes the likeliest (greedy)."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1: from all."""
    min_p: float = 0.0
    """Draw from tokens that have at least this fraction of the likeliest one's probability; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the text already has less likely; 1: does not."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End a text before this string; may be given several times."""
    seed: int = 0
    """Another seed gives other texts; the same seed the same texts."""

    def check(self) -> None:
        """Raise ValueError for a value that means nothing."""
        checks = {
            "max-tokens": (self.max_tokens >= 0, "at least 0"),
            "temperature": (self.temperature == 0 or 1e-6 <= self.temperature < float("inf"), "0, or 1e-6 or more"),
            "top-k": (self.top_k >= 0, "0 (off) or more"),
            "top-p": (0 <= self.top_p <= 1, "between 0 and 1"),
            "min-p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition-penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"--{name} is {getattr(self, name.replace('-', '_'))}, expected {expected}")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that a text has less likely: logits (B, V) over `penalty` where positive, times it where not.

    seen (B, V) booleans; a token counts once, however often it was there. Keskar et al. 2019, arXiv:1909.05858, 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` largest logits of each row (and what ties with the last of them), set the others to -inf."""
    if k >= logits.size(-1):
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of largest logits whose probabilities sum to at least `p`, set the others to -inf."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens that come first: 0 for the first one
    drop = before >= p
    drop[..., 0] = False  # subtle: with p = 0 one token must stay
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep what has at least `p` times the probability of the likeliest token, set the others to -inf."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def adjust(logits: Tensor, settings: Settings, seen: Tensor | None = None) -> Tensor:
    """All of the above in order: logits (B, V), -inf where a token must not be drawn; their softmax is drawn from.

    seen (B, V) are the tokens that each text has, for the penalty. With temperature 0 the largest is to be taken, and
    nothing behind the penalty changes which one that is.
    """
    if settings.repetition_penalty != 1:
        logits = penalize(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits
    # subtle: the largest is made 0 first, so that a tiny temperature cannot overflow; probabilities do not change
    logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature
    if settings.top_k:
        logits = top_k_filter(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p_filter(logits, settings.top_p)
    if settings.min_p:
        logits = min_p_filter(logits, settings.min_p)
    return logits


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """A token for each row of (B, V): the first at which the running sum exceeds the random number u (B,) in [0, 1)."""
    sums = probabilities.double().cumsum(-1)
    total = sums[:, -1:].contiguous()
    found = torch.searchsorted(sums, u[:, None] * total, right=True)  # (B, 1)
    # subtle: u * total may round up to total; the last token that has any probability is where the sum reaches it
    return found.minimum(torch.searchsorted(sums, total))[:, 0]


def pick(logits: Tensor, settings: Settings, seen: Tensor | None, u: Tensor) -> Tensor:
    """A token for each row of logits (B, V), drawn by u (B,) in [0, 1); ValueError when the scores are no numbers."""
    if not logits.amax(-1).isfinite().all():
        raise ValueError("the model's scores are not finite numbers: its weights are damaged, or its training diverged")
    logits = adjust(logits, settings, seen)
    return draw(logits.softmax(-1), u) if settings.temperature else logits.max(-1).indices  # argmax is slower


# ----------------------------------------------------------------------------------------------------------------------
# Token by token


class Writer:
    """A text while it is written: its tokens, its own random numbers, and what of its characters is certain.

    `finish` is "" until the text has ended: then "stop" (by its eos, or a stop string), "length" (max_tokens) or
    "context" (there is no room for more).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], settings: Settings, number: int = 0):
        self.tokenizer, self.prompt, self.settings = tokenizer, prompt, settings
        self.random = random.Random(f"{settings.seed} {number}")
        self.ids: list[int] = []  # what was written, without prompt and eos
        self.logprobs: list[float] = []  # of each, in nats: as the model says, before any of the settings
        self.text, self.finish = "", "" if settings.max_tokens else "length"
        # decoded are the tokens from `window` on; certain up to here; and so many characters have been given
        self.window, self.certain, self.given = 0, len(prompt), 0

    def add(self, token: int, logprob: float) -> None:
        """Append a token; eos ends the text."""
        if token == self.tokenizer.eos_id:
            return self.end("stop")
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.decode()
        if not self.finish and len(self.ids) == self.settings.max_tokens:
            self.end("length")

    def end(self, reason: str) -> None:
        self.finish = reason
        self.decode()

    def decode(self) -> None:
        """Turn new tokens into text, and end it before a stop string."""
        ids = (self.prompt + self.ids)[self.window :]
        old = self.tokenizer.decode(ids[: self.certain - self.window])
        new = self.tokenizer.decode(ids)
        old = old if new.startswith(old) else old.rstrip("\ufffd")  # a prompt may end inside of a character
        if new.endswith("\ufffd") and not self.finish:
            return  # perhaps a part of a character, whose other bytes come with the next tokens
        if len(new) > len(old):
            # A tokenizer may drop the space in front of a text, so what comes is decoded behind something else.
            self.window, self.certain = self.certain, len(self.prompt) + len(self.ids)
        start = len(self.text) - max(map(len, self.settings.stop), default=0) + 1
        self.text += new[len(old) :]
        found = [at for stop in self.settings.stop if (at := self.text.find(stop, max(0, start))) >= 0]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"

    def take(self) -> str:
        """What has become certain since this was last asked: whole characters, and no beginning of a stop string."""
        beginnings = (stop[:n] for stop in self.settings.stop for n in range(1, len(stop)))
        held = 0 if self.finish else max((len(part) for part in beginnings if self.text.endswith(part)), default=0)
        piece = self.text[self.given : len(self.text) - held]
        self.given += len(piece)
        return piece


def choose(logits: Tensor, writers: list[Writer]) -> None:
    """Append to each text a token by its own settings and random numbers: logits (B, V), one row each."""
    groups = defaultdict(list)  # texts with equal settings are drawn at once
    for row, writer in enumerate(writers):
        groups[dataclasses.replace(writer.settings, seed=0, stop=(), max_tokens=0)].append(row)
    for settings, rows in groups.items():
        seen = torch.zeros(len(rows), logits.size(-1), dtype=torch.bool)
        for n, row in enumerate(rows if settings.repetition_penalty != 1 else ()):
            seen[n, writers[row].prompt + writers[row].ids] = True
        u = torch.tensor([writers[row].random.random() for row in rows], dtype=torch.float64)
        some = logits if len(groups) == 1 else logits[rows]
        tokens = pick(some, settings, seen, u)
        logprobs = some.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            writers[row].add(token, logprob)


def read(model: nn.Module, cache: KVCache, todo: list[list[int]], most: int = 8192) -> tuple[Tensor, Tensor]:
    """Let the model read the next tokens of each text, `most` at a time in all; what was read is taken out of `todo`.

    Returns what the head reads, (B, T, C), and the index of each row's last token (B,). That one is enough for a new
    token: the scores behind all tokens of a prompt would be most of the work.
    """
    T = min(max(map(len, todo)), max(1, most // len(todo)))
    counts = [min(T, len(ids)) for ids in todo]
    cache.expect(counts)
    idx = torch.tensor([ids[:T] + [0] * (T - len(ids)) for ids in todo], device=cache.keys.device)  # (B, T)
    x = model.features(idx, cache)  # (B, T, C)
    for ids in todo:
        del ids[:T]
    return x, torch.tensor(counts) - 1


@torch.inference_mode()
def generate(model: nn.Module, writers: list[Writer], slide=False, cached=True) -> Iterator[list[Writer]]:
    """Go on with all texts, a token at a time, until each has ended; yields, after each step, those that got a token.

    A text ends when the model's context is full, unless it may `slide` on (see `KVCache`). Without the cache every text
    is read anew for every token: the naive way, to compare with. ValueError for a prompt that is empty, or too long.
    """
    context, live = model.config.block_size, [w for w in writers if not w.finish]
    for writer in live:
        if not 0 < len(writer.prompt) <= context:
            raise ValueError(f"a prompt of {len(writer.prompt)} tokens: 1 to {context} fit into the model's context")
    if slide and not cached:
        raise ValueError("a window slides over what a cache keeps: give up one, sliding or doing without the cache")
    room = context if slide else min(context, max((len(w.prompt) + w.settings.max_tokens for w in live), default=1))
    weight, todo = model.embed.weight, [list(w.prompt) for w in live]
    # On a CPU attention's products are faster in float32, and in bfloat16 every length would compile a kernel anew.
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype
    cache = KVCache(model.config, len(live), room, dtype, weight.device, slide) if cached and live else None
    while live:
        if cache:
            x, last = read(model, cache, todo)
            x = x[torch.arange(len(live)), last]  # (B, C)
        else:
            texts = (torch.tensor([w.prompt + w.ids], device=weight.device) for w in live)
            x, todo = torch.stack([model.features(idx)[0, -1] for idx in texts]), [[] for _ in live]
        ready = [row for row, ids in enumerate(todo) if not ids]  # the others are still reading their prompts
        vocab = live[0].tokenizer.vocab_size  # a model may have more ids, for padding: they are never drawn
        x = x if len(ready) == len(live) else x[ready]
        logits = model.scores(x)[:, :vocab].to("cpu", torch.promote_types(weight.dtype, torch.float32))
        choose(logits, [live[row] for row in ready])
        yield [live[row] for row in ready]
        for row in reversed(ready):
            writer = live[row]
            if not writer.finish and not slide and len(writer.prompt) + len(writer.ids) > context:
                writer.end("context")
            if not writer.finish:
                todo[row] = writer.ids[-1:]
                continue
            if cache and row < len(live) - 1:
                cache.move(len(live) - 1, row)
            live[row], todo[row] = live[-1], todo[-1]
            live.pop(), todo.pop()


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """What a text begins with: bos, and the prompt's tokens."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def stream(model: nn.Module, tokenizer: Tokenizer, prompt: str, settings: Settings, **how) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it becomes certain; `how` is as for `generate`."""
    writer = Writer(tokenizer, prompt_ids(tokenizer, prompt), settings)
    for _ in generate(model, [writer], **how):
        yield writer.take()
    yield writer.take()  # what a full context cut off


def generate_text(model: nn.Module, tokenizer: Tokenizer, prompt: str, n: int, settings: Settings, **how) -> list[str]:
    """`n` continuations of a prompt, the prompt included."""
    writers = [Writer(tokenizer, prompt_ids(tokenizer, prompt), settings, number) for number in range(n)]
    for _ in generate(model, writers, **how):
        pass
    return [prompt + writer.text for writer in writers]


# ----------------------------------------------------------------------------------------------------------------------
# The program


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from, and how it computes."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run directory, as train.py makes it (say out/tales), or one of Hugging Face."""
    rope_scaling: str = "none"
    """Stretch the context of a model with rotary positions: KIND:FACTOR, say yarn:4 (see rope.py)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and of what is computed; auto: what this hardware is fast at."""

    def load(self) -> tuple[nn.Module, Tokenizer]:
        """The model, ready to be asked, and its tokenizer."""
        where = device.choose_device(self.device)
        dtype = device.choose_dtype(where, self.dtype)
        warn = lambda text: print(text, file=sys.stderr)
        model, tokenizer, _ = checkpoint.load_run(self.run, where, warn, dtype)
        if self.rope_scaling != "none":
            model.config = stretched(model.config, self.rope_scaling)
        return prepare(model, dtype), tokenizer


@dataclass(frozen=True, kw_only=True)
class Options(Source, Settings):
    """Write text with a trained model."""

    prompt: str = ""
    """What the text begins with; empty: the model begins by itself."""
    n: int = 3
    """How many texts; the first appears while it is written."""
    slide: bool = False
    """When the context is full, go on and look back at its last tokens only (not with learned positions)."""
    cache: bool = True
    """Keep keys and values; without (--no-cache) the whole text is read anew for every token."""

    def check(self) -> None:
        super().check()
        if not 1 <= self.n <= 10_000:
            raise ValueError(f"--n is {self.n}, expected 1 to 10000")
        for text in (self.prompt, *self.stop):
            if any("\ud800" <= character <= "\udfff" for character in text):  # how Python reads other bytes
                raise ValueError(f"{text!r} is not valid UTF-8 text")


def prepare(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make a model fast to ask and unable to learn: weights in `dtype`, in the order that this machine reads best."""
    model = model.to(dtype).eval()
    if model.tied and device.can_pack(model.embed.weight):  # the head gets a copy of its own, to be packed
        model.head, model.tied = nn.Linear(1, 1, bias=False), False
        model.head.weight = model.embed.weight
    device.pack_linears(model)
    return model


def main(args: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=args)
    options.check()
    model, tokenizer = options.load()
    ids = prompt_ids(tokenizer, options.prompt)
    writers = [Writer(tokenizer, ids, options, number) for number in range(options.n)]
    began, steps, first = time.perf_counter(), generate(model, writers, options.slide, options.cache), 0.0
    if next(steps, None):
        first = time.perf_counter() - began
    early, shown = sum(len(writer.ids) for writer in writers), options.prompt + writers[0].take()
    print(shown, end="", flush=True)
    for _ in steps:
        print(writers[0].take(), end="", flush=True)
    took, count = time.perf_counter() - began, sum(len(writer.ids) for writer in writers)
    print(writers[0].take())
    for writer in writers[1:]:
        print(f"\n{options.prompt}{writer.text}")
    rate = f", then {(count - early) / (took - first):,.0f} tokens/s" if count > early else ""
    print(f"\n{count} tokens, the first after {first:.2f} s{rate}", file=sys.stderr)
    if cut := sum(writer.finish == "context" for writer in writers):
        context = f"the context of {model.config.block_size} tokens was full"
        print(f"{cut} of {options.n} texts ended where {context}", file=sys.stderr)


if __name__ == "__main__":
    program.run(main)
