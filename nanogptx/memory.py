"""Memory and arithmetic, predicted from a config alone: will it fit, how long will it take, what will it cost?

Training holds every weight four times (itself, its gradient, two moments of Adam: 16 bytes in float32; Rajbhandari et
al. 2019, arXiv:1910.02054, section 3.1) and, until the backward pass has used them, the *activations*: whatever an
operation of the forward pass needs again for its gradient. These are counted here operation by operation, as torch
saves them, and the tests compare the sum with what torch really saves. Korthikanti et al. 2022 (arXiv:2205.05198,
section 4) count the same for another implementation. Generating holds the weights and the keys and values of every
earlier token.

    python nanogptx/memory.py gpt2-small --batch-size 4
    python nanogptx/memory.py out/tales/config.json --tokens 1e9 --tokens-per-second 25000 --price 0.526

Left out: what an allocator wastes between the tensors, buffers of matrix products, and communication. The counts were
checked on a CPU; on a GPU dropout and softmax save other number formats, which nobody has measured here yet.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import tyro

from nanogptx import program
from nanogptx.checkpoint import read_shape
from nanogptx.device import DTYPES
from nanogptx.gpt2 import GPT2Config, rows_at_once
from nanogptx.tinyllama import ARCHITECTURES, MODELS

# ----------------------------------------------------------------------------------------------------------------------
# What depends on the model only


@lru_cache
def parameter_shapes(config) -> dict[str, torch.Size]:
    """The shape of every parameter, by name; no memory is taken for them."""
    model = next(model for kind, model in ARCHITECTURES.values() if isinstance(config, kind))
    with torch.device("meta"):
        return {name: p.shape for name, p in model(config).named_parameters()}


def parameters(config) -> int:
    """How many weights a model has."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def is_block_matrix(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is a matrix of a block: Muon, if chosen, updates these, and AdamW the rest."""
    return name.startswith("blocks.") and len(shape) == 2


def optimizer_bytes(trained: dict[str, torch.Size], optimizer: str = "adamw") -> int:
    """The optimizer's state: two float32 moments a weight and a step count a tensor for AdamW, one moment for Muon."""
    muon = {name for name, shape in trained.items() if optimizer == "muon" and is_block_matrix(name, shape)}
    return sum(4 * s.numel() if name in muon else 8 * s.numel() + 4 for name, s in trained.items())


def multiplied(config) -> int:
    """How many weights a token is multiplied with: all matrices; the embedding only as the head that it may also be."""
    matrices = sum(s.numel() for n, s in parameter_shapes(config).items() if is_block_matrix(n, s))
    return matrices + config.vocab_size * config.n_embd


def flops_per_token(config, context: int) -> int:
    """Floating-point operations of training on one token: 6 N + 12 L C T, with N from `multiplied`.

    A product of a weight and an activation is 2, and the backward pass makes two such products for each of the forward
    pass: 6 N. Scores and their use are 4 C T a layer and pass, as if no key were masked. Chowdhery et al. 2022 (PaLM),
    arXiv:2204.02311, appendix B.
    """
    return 6 * multiplied(config) + 12 * config.n_layer * config.n_embd * context


def kv_cache_bytes(config, rows: int, length: int, size: int) -> int:
    """Keys and values of `length` tokens in every layer, for so many rows, at `size` bytes a number."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * length * rows * size


# ----------------------------------------------------------------------------------------------------------------------
# What a training step saves for its backward pass


@dataclass(frozen=True)
class Step:
    """How a forward and backward pass is done: on so many rows of so many tokens, and in which way."""

    rows: int
    length: int
    dtype: torch.dtype = torch.float32  # of the matrix products; weights are in float32
    fused: bool = True  # attention by a kernel that holds no scores
    recompute: bool = False
    chunked_loss: bool = False


def norm_bytes(config, tokens: int) -> int:
    """A norm's input and statistics; RMSNorm is written out, so it saves the normalised input, too."""
    return 4 * tokens * (config.n_embd + 2 if isinstance(config, GPT2Config) else 2 * config.n_embd + 1)


def score_bytes(config, step: Step) -> int:
    """Attention weights of a layer, B H T^2 (with dropout three times: before, the mask, and after)."""
    count = 0 if step.fused else 3 if config.dropout else 1
    return count * step.rows * config.n_head * step.length**2 * step.dtype.itemsize


def block_bytes(config, step: Step) -> int:
    """All that one block saves, attention weights included."""
    C, K, hidden = config.n_embd, config.n_kv_head * config.head_dim, config.hidden_dim
    tokens, size = step.rows * step.length, step.dtype.itemsize
    # subtle: autocast makes a copy of an input for each matrix that reads it, and each copy is saved
    copies = (3, 2) if step.dtype != torch.float32 else (1, 1)
    numbers = copies[0] * C  # what q, k and v read
    # q, k, v and the output; the formula holds k and v once per query head. Rotated q makes the kernel's output one
    # that has to be copied before it can be read as (B, T, C).
    numbers += 2 * C + 2 * K + (C if config.position == "rope" else 0) if step.fused else 4 * C
    numbers += C + 2 * hidden if isinstance(config, GPT2Config) else copies[1] * C + 4 * hidden
    numbers += 2 * C if config.dropout else 0  # masks
    logsumexp = 4 * tokens * config.n_head if step.fused else 0
    return numbers * tokens * size + 2 * norm_bytes(config, tokens) + logsumexp + score_bytes(config, step)


def saved_bytes(config, step: Step) -> dict[str, int]:
    """Bytes that the forward pass of a step leaves for the backward pass, by kind."""
    C, H, T, size = config.n_embd, config.n_head, step.length, step.dtype.itemsize
    tokens, head = step.rows * T, config.vocab_size * C
    block = 4 * tokens * C if step.recompute else block_bytes(config, step)
    scores = 0 if step.recompute else config.n_layer * score_bytes(config, step)
    # Outside the blocks: the table of positions, the last norm, the embedding's mask, and what the head reads. ALiBi's
    # table is needed again by the kernel, or by a block that is computed again.
    table = {"learned": 8, "rope": 4 * config.head_dim, "alibi": (step.fused or step.recompute) * H * T * size}
    ends = table.get(config.position, 0) * T + norm_bytes(config, tokens)
    ends += tokens * C * ((4 if config.dropout else 0) + (4 if step.chunked_loss else size))
    # Autocast copies each weight once a step.
    copied = (0 if step.recompute else multiplied(config) - head) + (0 if step.chunked_loss else head)
    return {
        "weight copies": 0 if step.dtype == torch.float32 else size * copied,
        "activations": config.n_layer * block - scores + ends,
        "attention scores": scores,
        "logits": 0 if step.chunked_loss else 4 * tokens * config.vocab_size,  # their log-softmax
    }


def loss_bytes(config, step: Step) -> int:
    """Around the logits when the backward pass begins: their log-softmax, their gradient, and two temporary tensors.

    Chunks have these for some rows only, and the head's gradient twice: that of a chunk, and the sum so far.
    """
    tokens, size = step.rows * step.length, step.dtype.itemsize
    rows = min(tokens, rows_at_once(config.vocab_size))  # what the loss takes at a time
    held, several = (rows, 2 * config.n_embd) if step.chunked_loss else (tokens, tokens)
    return config.vocab_size * (4 * held + size * several * (rows < tokens) + 8 * rows)


def training_bytes(config, step: Step, optimizer: str = "adamw", adapters: dict | None = None) -> dict[str, int]:
    """Bytes of the tensors of a training step when they are most, by kind; temporary ones in the blocks left out.

    `adapters`: the shapes, by name, of LoRA's matrices, if only these are trained; for activations as without them.
    """
    trained = adapters or parameter_shapes(config)
    size, state = 4 * sum(shape.numel() for shape in trained.values()), optimizer_bytes(trained, optimizer)
    need = {"weights": 4 * parameters(config) + size * bool(adapters), "gradients": size, "optimizer": state}
    need |= saved_bytes(config, step) | {"logits": loss_bytes(config, step)}
    if step.recompute and (block := block_bytes(config, step)) > need["logits"]:
        scores = score_bytes(config, step)  # the logits are gone when the first block is computed again
        need |= {"activations": need["activations"] + block - scores, "attention scores": scores, "logits": 0}
    return need


# ----------------------------------------------------------------------------------------------------------------------
# What generating needs, and how fast it can be


def generating_bytes(config, rows: int, length: int, size: int) -> int:
    """Weights and the keys and values of so many rows, at `size` bytes a number."""
    return parameters(config) * size + kv_cache_bytes(config, rows, length, size)


def decoding_bound(config, rows: int, length: int, size: int, bandwidth: float, peak: float) -> float:
    """The most tokens per second that generating can reach, with bytes per second and operations per second given.

    A step reads all weights and the whole cache once and makes one token a row: the slower of the two limits it, the
    roofline of Williams, Waterman & Patterson 2009 (Communications of the ACM 52(4)).
    """
    operations = rows * (2 * multiplied(config) + 4 * config.n_layer * config.n_embd * length)
    return rows / max(generating_bytes(config, rows, length, size) / bandwidth, operations / peak)


def largest(need: Callable[[int], int], room: int) -> int:
    """The largest number of rows whose need fits into the room; 0 if not even one does."""
    return bisect.bisect_right(range(1, 1 << 24), room, key=need)


# ----------------------------------------------------------------------------------------------------------------------
# The program

MACHINES = {"1 GiB": 2**30, "T4, 16 GB": 16 * 10**9, "24 GB": 24 * 10**9, "80 GB": 80 * 10**9}
RESERVED = 400 * 2**20  # what Python, torch and its libraries take themselves: 300 to 400 MiB on a CPU


@dataclass(frozen=True)
class Options:
    """Predict memory, time and price of training a model and of generating with it."""

    model: tyro.conf.Positional[str]
    """A model's name (say gpt2-small), a run directory, or a config.json of ours or of Hugging Face."""
    batch_size: int = 1
    """Rows (windows or documents) that are computed at a time."""
    context: int | None = None
    """Tokens in a row; the model's whole context if not given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the matrix products; in training, weights stay in float32."""
    attention: Literal["fused", "naive"] = "fused"
    """Whether a kernel is used that never holds the attention scores (on a CPU: float32 or long contexts only)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As in train.py."""
    recompute: bool = False
    """As in train.py."""
    chunked_loss: bool = False
    """As in train.py."""
    tokens: float = 1e9
    """Tokens to train on."""
    tokens_per_second: float | None = None
    """How fast training is; train.py prints it."""
    price: float = 0.0
    """Of the machine, in dollars an hour."""
    bandwidth: float | None = None
    """Of the memory, in GB/s: gives the most tokens per second that generating can reach."""
    peak: float = float("inf")
    """Of the arithmetic, in TFLOP/s."""


def find_model(spec: str):
    """The config that a name, a run directory or a config file stands for; ValueError if none."""
    if spec in MODELS:
        return MODELS[spec][1]
    path = Path(spec).parent if Path(spec).name == "config.json" else Path(spec)
    if not path.is_dir():
        raise ValueError(f"{program.nearest('model', spec, MODELS)}; and no folder {path.absolute()}")
    architecture, shape = read_shape(path)
    return ARCHITECTURES[architecture][0](**shape)


def show(title: str, need: dict[str, int]) -> None:
    """Print bytes by kind, and their sum."""
    print(f"\n{title}")
    for name, size in [*filter(lambda item: item[1], need.items()), ("together", sum(need.values()))]:
        print(f"  {name:18} {size:18,} bytes  {size / 2**30:8.3f} GiB")


def main(args: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=args)
    for name in ("batch_size", "context", "tokens", "tokens_per_second", "bandwidth", "peak"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    config = find_model(options.model)
    rows, length, dtype = options.batch_size, options.context or config.block_size, DTYPES[options.dtype]
    if length > config.block_size:
        raise ValueError(f"--context {length} is more than the {config.block_size} tokens that {options.model} takes")
    how = (dtype, options.attention == "fused", options.recompute, options.chunked_loss)
    train = lambda rows: training_bytes(config, Step(rows, length, *how), options.optimizer)
    generate = lambda rows: generating_bytes(config, rows, length, dtype.itemsize)
    print(f"{options.model}: {parameters(config):,} parameters; {rows} x {length} tokens in {options.dtype}")
    show(f"a training step ({options.optimizer}, {options.attention} attention)", train(rows))
    show("generating", {"weights": generate(0), "keys and values": generate(rows) - generate(0)})
    print("\nthe most rows that fit         training   generating")
    for name, room in MACHINES.items():
        most = [largest(need, room - RESERVED) for need in (lambda rows: sum(train(rows).values()), generate)]
        print(f"  {name:24} {most[0]:12,} {most[1]:12,}")
    flops = flops_per_token(config, length)
    print(f"\ncompute      {flops / 1e9:,.3f} GFLOP to train on a token; {flops * options.tokens:.3g} FLOP in all")
    if speed := options.tokens_per_second:
        hours, rate = options.tokens / speed / 3600, speed * flops / 1e12
        price = f", {hours * options.price:,.2f} dollars" if options.price else ""
        print(f"training     {options.tokens:.3g} tokens in {hours:,.1f} hours{price}, at {rate:,.3f} TFLOP/s")
    if options.bandwidth:
        bound = decoding_bound(config, rows, length, dtype.itemsize, options.bandwidth * 1e9, options.peak * 1e12)
        print(f"generating   {bound:,.1f} tokens/s at most, {rows} rows at a time")


if __name__ == "__main__":
    program.run(main)
