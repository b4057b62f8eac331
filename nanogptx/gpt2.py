# Built by lessons/src/05_gpt2.md: change it there, then run python lessons/build.py build 05
"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", OpenAI), exact at its small size.

A decoder in its plainest form: embed the tokens, pass them through n_layer equal blocks, read off a score for every
possible next token. `Transformer` is that frame, and `GPT2` fills it with GPT-2's parts: LayerNorm, a GELU MLP, biases
everywhere, learned positions, and a head that is the embedding matrix again. Chapter 06 fills it with LLaMA's.

Two switches of the frame trade time for memory: `recompute` keeps of each block only its input for the backward pass,
and `chunked_loss` never holds the (B * T, V) logits, often the largest tensor of a step (memory.py predicts it).

Left out: reading OpenAI's weights (chapter 08); the cache that makes generation fast comes in from outside (09).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogptx.alibi import check_position, position_tables
from nanogptx.attention import SelfAttention, check_heads
from nanogptx.device import compute_dtype
from nanogptx.rope import UNSCALED, Scaling


class MLP(nn.Module):
    """GPT-2's feed-forward layer, down(gelu(up(x))): each token by itself, four times wider inside.

    gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the approximation of Hendrycks & Gimpel 2016
    (arXiv:1606.08415, section 2). GPT-2's weights were trained with it; the exact form differs by up to 5e-4.
    """

    def __init__(self, n_embd: int, hidden_dim: int):
        super().__init__()
        self.up = nn.Linear(n_embd, hidden_dim)
        self.down = nn.Linear(hidden_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Pre-norm: the norm stands before each part and not on the sum, so x runs from the embedding to the head as one
    straight line to which every part only adds. Its parts come from outside, already built.
    """

    def __init__(self, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module, dropout):
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, *where) -> Tensor:
        # Tokens talk to each other in the first line only (`where` tells how far apart they are: `rotate`, `bias` and
        # `causal` of SelfAttention, and a cache's `update`); in the second each thinks about what it heard.
        x = x + self.drop(self.attention(self.attention_norm(x), *where))  # (B, T, C)
        return x + self.drop(self.mlp(self.mlp_norm(x)))  # (B, T, C)


def check_sizes(config, *names: str) -> None:
    """Raise ValueError unless each of these fields of `config` is a whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} is not a size: choose a whole number of at least 1")


def check_config(config) -> None:
    """Raise ValueError unless a model can be built from `config`, naming the value, what is expected and the remedy."""
    check_sizes(config, "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size")
    # What would otherwise surface much later, as a shape error inside a layer:
    check_heads(config.n_embd, config.n_head, config.n_kv_head)
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout = {config.dropout} is not a probability below 1: choose 0 (none) to 0.5")
    check_position(config)


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are the small one, with 124,439,808 parameters.

    Raises ValueError for sizes from which no model can be built.
    """

    n_layer: int = 12
    n_head: int = 12  # so 64 channels each
    n_embd: int = 768  # C, the width
    block_size: int = 1024  # the longest context that it is meant for, in tokens; with learned positions a limit
    vocab_size: int = 50257
    dropout: float = 0.0  # Hugging Face's GPT-2 has 0.1; 0 is right when little text is seen twice
    position: str = "learned"  # or another of alibi.py's POSITIONS
    rope_base: float = 10000.0  # only with rope
    rope_scaling: Scaling = UNSCALED  # only with rope: the stretch to block_size from the length of training
    embed_std: float = 0.02  # what embeddings start at; larger, and a small model learns sooner to copy a token it saw

    def __post_init__(self):
        check_config(self)

    @property
    def n_kv_head(self) -> int:
        return self.n_head  # one key and value head per query head: GPT-2 is older than grouped queries

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_dim(self) -> int:
        return 4 * self.n_embd


CONFIGS = {
    "gpt2-small": GPT2Config(),
    # As deep and as wide as chapter 06's "tinyllama-1m"; why 0.4: see `embed_std`, and chapter 14.
    "gpt2-1m": GPT2Config(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=900, embed_std=0.4),
    # For tests and first experiments; 256 tokens are the bytes.
    "gpt2-tiny": GPT2Config(n_layer=2, n_head=4, n_embd=64, block_size=64, vocab_size=256),
}


class Transformer(nn.Module):
    """The frame of a decoder-only language model: embed, blocks, norm, head.

    norm() and mlp() make the parts of a block, `bias` is for attention's linear layers; `tied` heads are the embedding.
    model(idx, targets) -> (logits, loss), whatever the parts. Raises ValueError for input that the model cannot take.
    """

    def __init__(self, config, norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module], bias: bool, tied: bool):
        super().__init__()
        self.config = c = config
        # These names are what files and LoRA patterns see: embed, position, blocks.3.attention.q, norm, head.
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        if c.position == "learned":
            self.position = nn.Embedding(c.block_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList()
        for _ in range(c.n_layer):
            attention = SelfAttention(c.n_embd, c.n_head, c.n_kv_head, bias, c.dropout)
            self.blocks.append(Block(norm(), attention, norm(), mlp(), c.dropout))
        self.norm = norm()
        if not tied:
            self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.tied = tied
        self.recompute = self.chunked_loss = False  # see the top of the file

    def init_weights(self) -> None:
        """Draw fresh weights, from torch's global generator: N(0, 0.02), and less for what adds to the straight line.

        The second number is the standard deviation. Each of the 2 n_layer residual projections adds its variance to x:
        1/sqrt(2 n_layer) makes the sum equal at every depth. Biases are 0, gains 1. Radford et al. 2019, section 2.3.
        `embed_std` is ours: GPT-2's is 0.02, too.
        """
        # With a tied head, 0.02 gives the scores a variance of 0.0004 n_embd, and the untrained loss half of that above
        # ln V. The last gain takes back what another `embed_std` makes of it.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        nn.init.normal_(self.embed.weight, std=self.config.embed_std)
        if self.tied:
            nn.init.constant_(self.norm.weight, 0.02 / self.config.embed_std)

    def features(self, idx: Tensor, cache=None) -> Tensor:
        """What the head reads: idx (B, T) token ids -> (B, T, C), already normalised."""
        (B, T), c = idx.shape, self.config
        if T < 1 or (T > c.block_size and c.position == "learned"):
            raise ValueError(f"{T} tokens, but 1 to block_size = {c.block_size} fit: cut them, or train a longer model")
        try:
            x = self.embed(idx)  # (B, T, C)
        except IndexError as error:  # raised on a CPU; CUDA stops with an assertion of its own
            ids, what = f"ids from {int(idx.min())} to {int(idx.max())}", f"vocab_size = {c.vocab_size}"
            raise ValueError(f"token {ids} do not fit {what}: use the tokenizer that the model was made for") from error
        # Attention by itself sees the past as a set: without a position "dog bites man" is "man bites dog". Learned
        # positions are added here, once; the others act in every layer, from one table.
        keys, hidden = torch.arange(T, device=idx.device), None  # (T,)
        positions = keys
        if cache is not None:  # then these tokens are not the first ones
            positions, keys, hidden = cache.begin(B, T)  # (T,) or (B, T); (S,) or (B, S)
        if c.position == "learned":
            x = x + self.position(positions)  # (B, T, C) + (T, C)
        rotate, bias = position_tables(c, positions, keys, T, compute_dtype(x))
        bias = hidden if bias is None else bias
        where = (rotate, bias, bias is None)  # rotate, bias, causal: a bias (or a cache's mask) hides the future itself
        x = self.drop(x)  # the first of three dropouts, as in Hugging Face's; then on attention weights and each part
        # Chen et al. 2016, arXiv:1604.06174: the backward pass runs each block again, with the same dropout. Not with a
        # cache, which the second run would write to again.
        again = self.recompute and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            update = None if cache is None else partial(cache.update, layer)
            x = checkpoint(block, x, *where, use_reentrant=False) if again else block(x, *where, update)  # (B, T, C)
        if cache is not None:
            cache.advance()
        return self.norm(x)

    def scores(self, x: Tensor) -> Tensor:
        """A score for every token of the vocabulary: (..., C) -> (..., V).

        Tied: the dot product of x with that token's embedding. One matrix with two uses, which appears once in
        parameters() and in the saved file. Press & Wolf 2016, arXiv:1608.05859.
        """
        return F.linear(x, self.embed.weight) if self.tied else self.head(x)  # (B, T, C) @ (C, V) -> (B, T, V)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """`cross_entropy` of features (N, C) a few rows at a time: the backward pass computes their logits again."""
        part = lambda x, targets: summed_cross_entropy(self.scores(x), targets)
        rows = rows_at_once(self.config.vocab_size)
        parts = zip(x.split(rows), targets.split(rows), strict=True)
        total = torch.stack([checkpoint(part, a, b, use_reentrant=False) for a, b in parts]).sum()
        return total / (targets != -100).sum().clamp(min=1)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache=None) -> tuple[Tensor | None, Tensor | None]:
        """idx (B, T) -> logits (B, T, V), scores for the token that follows each; and the loss when there are targets.

        targets (B, T) are those next tokens, -100 where none is to be predicted; the loss is `cross_entropy`'s.
        With `chunked_loss` there are no logits beside a loss. With a `cache` (chapter 09) idx continues its texts.
        """
        x = self.features(idx, cache)  # (B, T, C)
        if targets is not None and self.chunked_loss:
            return None, self.loss(x.flatten(0, 1), targets.flatten())  # of (B * T, C) and (B * T,)
        logits = self.scores(x)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())  # of (B * T, V) and (B * T,)


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits to take at a time: 2^22 floats, few enough for a CPU's allocator to reuse."""
    return max(1, 2**22 // vocab_size)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over the targets of -log softmax(logits)[target], in nats; arguments as in `cross_entropy`."""
    # subtle: in bfloat16 a loss near 11 has a resolution of 0.06, so each row is widened first. A few rows at a time,
    # which keeps the widened copy small.
    rows, dtype = rows_at_once(logits.size(-1)), torch.promote_types(logits.dtype, torch.float32)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([F.cross_entropy(a.to(dtype), b, reduction="sum", ignore_index=-100) for a, b in parts]).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets of -log softmax(logits)[target], in nats: the loss of a language model.

    logits (N, V) of any dtype, targets (N,); a target of -100 is not counted (0 when none is). Returns a float32 scalar
    (float64 for float64 logits).
    """
    return summed_cross_entropy(logits, targets) / (targets != -100).sum().clamp(min=1)


class GPT2(Transformer):
    """GPT-2: `model(idx, targets=None) -> (logits, loss)`; see `Transformer.forward` for shapes.

    124,439,808 parameters as `CONFIGS["gpt2-small"]`. Radford et al. 2019, section 2.3.
    """

    def __init__(self, config: GPT2Config):
        norm = lambda: nn.LayerNorm(config.n_embd, eps=1e-5)
        mlp = lambda: MLP(config.n_embd, config.hidden_dim)
        super().__init__(config, norm, mlp, bias=True, tied=True)
        self.init_weights()
