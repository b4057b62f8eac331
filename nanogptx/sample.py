"""Sampling: from a model's logits to text.

A language model gives a distribution over the next token. Temperature flattens or sharpens it, top-k (Fan et al. 2018,
arXiv:1805.04833) and top-p (Holtzman et al. 2019, arXiv:1904.09751) cut its tail off, and a draw from what is left is
appended; then the model is asked again. This version reads the whole text anew for every token; a cache comes later.

    python nanogptx/sample.py out/tales --prompt "One"
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanogptx import checkpoint, device, program

# ----------------------------------------------------------------------------------------------------------------------
# From logits to a distribution


def top_k_filter(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest logits of each row (and what ties with the last of them), set the others to -inf."""
    if k >= logits.size(-1):
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def top_p_filter(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of largest logits whose probabilities sum to at least `p`, set the others to -inf."""
    values, order = logits.sort(dim=-1, descending=True)  # (B, V)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens that come first: 0 for the first one
    drop = before >= p
    drop[..., 0] = False  # subtle: with p = 0 one token must stay
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def distribution(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Probabilities (B, V) to draw from; temperature first, then top-k, then top-p (0 and 1.0 switch those two off).

    Temperature 0 is the limit: all mass on the largest logit.
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if top_k:
        logits = top_k_filter(logits, top_k)
    if top_p < 1:
        logits = top_p_filter(logits, top_p)
    return logits.softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Token by token


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: list[list[int]],
    max_tokens: int,
    generator: torch.Generator,
    eos_id: int | None = None,
    n_vocab: int | None = None,
    **options,
) -> list[list[int]]:
    """Continue every prompt by up to `max_tokens` ids; `options` are those of `distribution`.

    A row ends after `eos_id` (not returned). Of a padded vocabulary only the first `n_vocab` ids are drawn. When the
    context is full the oldest ids drop out. Prompts must be of one length; draws are made on the CPU, row by row in
    order, from `generator`.
    """
    if not prompts:
        return []
    idx = torch.tensor(prompts, device=next(model.parameters()).device)  # (B, T)
    rows = list(range(len(prompts)))  # which prompt each row of idx continues; finished ones leave the batch
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        logits, _ = model(idx[:, -model.config.block_size :])
        last = logits[:, -1, :n_vocab].float().cpu()  # (B, V)
        drawn = torch.multinomial(distribution(last, **options), 1, generator=generator)  # (B, 1)
        alive = [n for n, token in enumerate(drawn[:, 0].tolist()) if token != eos_id]
        for n in alive:
            out[rows[n]].append(int(drawn[n]))
        if not alive:
            break
        rows = [rows[n] for n in alive]
        idx = torch.cat((idx, drawn.to(idx)), dim=1)[alive]
    return out


def generate_text(model, tokenizer, prompt: str, n: int, max_tokens: int, seed: int, **options) -> list[str]:
    """`n` continuations of a prompt, the prompt included."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    generator = torch.Generator().manual_seed(seed)
    special = {"eos_id": tokenizer.eos_id, "n_vocab": tokenizer.vocab_size}
    more = generate(model, [ids] * n, max_tokens, generator, **special, **options)
    return [tokenizer.decode(ids[1:] + row) for row in more]


# ----------------------------------------------------------------------------------------------------------------------
# The program


@dataclass(frozen=True)
class Options:
    """Write text with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run directory, as train.py makes it (say out/tales)."""
    prompt: str = ""
    """What the text begins with; empty: the model begins by itself."""
    n: int = 3
    """How many texts."""
    max_tokens: int = 300
    """Stop after this many tokens, if the text has not ended before."""
    temperature: float = 1.0
    """Below 1 the likely tokens get likelier; 0 always takes the likeliest (greedy)."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1: from all."""
    seed: int = 0
    """Another seed gives other texts; the same seed the same texts."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of the matrix products."""

    def check(self) -> None:
        """Raise ValueError for a value that no run can have."""
        checks = {
            "n": (self.n >= 1, "at least 1"),
            "max-tokens": (self.max_tokens >= 0, "at least 0"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top-k": (self.top_k >= 0, "0 (off) or more"),
            "top-p": (0 <= self.top_p <= 1, "between 0 and 1"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"--{name} is {getattr(self, name.replace('-', '_'))}, expected {expected}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):  # how Python reads other bytes
            raise ValueError(f"--prompt {self.prompt!r} is not valid UTF-8 text")


def main(args: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=args)
    options.check()
    where = device.choose_device(options.device)
    model, tokenizer, _ = checkpoint.load_run(options.run, where, warn=lambda text: print(text, file=sys.stderr))
    choice = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    with device.autocast(where, device.choose_dtype(where, options.dtype)):
        texts = generate_text(model, tokenizer, options.prompt, options.n, options.max_tokens, options.seed, **choice)
    print("\n\n".join(texts))


if __name__ == "__main__":
    program.run(main)
