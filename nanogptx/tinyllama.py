# Built by lessons/src/06_tinyllama.md: change it there, then run python lessons/build.py build 06
"""TinyLLaMA (Zhang, Zeng, Wang, Lu 2024, arXiv:2401.02385): the LLaMA block at 1.1 billion parameters, exact, and less.

LLaMA (Touvron et al. 2023, arXiv:2302.13971) changes GPT-2 in five places, of which its section 2.2 names three. The
norm loses its mean and its shift (RMSNorm), the MLP gains a gate (SwiGLU), positions are rotations (chapter 03), no
layer has a bias, and the head is a matrix of its own. From the large models of Llama 2 (arXiv:2307.09288) comes a
sixth: fewer key and value heads.

Left out: reading published weights (chapter 08); the cache comes in from outside (09).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogptx.gpt2 import CONFIGS as GPT2_CONFIGS
from nanogptx.gpt2 import GPT2, GPT2Config, Transformer, check_config, check_sizes
from nanogptx.rope import UNSCALED, Scaling


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x (..., C) divided by its root mean square over the channels, times gain (C,); x's dtype.

    Zhang & Sennrich 2019, arXiv:1910.07467, equation 4. LayerNorm without the mean: the length is what matters.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow float16 from 256 on
    # eps keeps a row of zeros finite
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    # subtle: back to x's dtype *before* the gain, as in LLaMA's own code. In bfloat16 the order shows.
    return gain * wide.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a gain of its own that starts at 1: (..., C) -> (..., C)."""

    def __init__(self, n_embd: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def hidden_size(n_embd: int, multiple_of: int = 256) -> int:
    """The inner width of LLaMA's MLP: 8/3 n_embd, rounded up to a multiple of `multiple_of` (2048 -> 5632).

    Two thirds of GPT-2's 4 n_embd, since SwiGLU has three matrices where GPT-2 has two: the parameter count stays.
    Shazeer 2020, arXiv:2002.05202, section 2.
    """
    return -(-(8 * n_embd // 3) // multiple_of) * multiple_of  # -(-a // b) rounds up


class SwiGLU(nn.Module):
    """LLaMA's feed-forward layer, down(silu(gate(x)) * up(x)): one projection decides how much of the other passes.

    silu(x) = x * sigmoid(x). (..., C) -> (..., C). Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    def __init__(self, n_embd: int, hidden_dim: int):
        super().__init__()
        self.gate = nn.Linear(n_embd, hidden_dim, bias=False)
        self.up = nn.Linear(n_embd, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # gate and up see the same x. Where gate(x) is far below 0, silu is near 0 and nothing passes.
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, C) -> (B, T, hidden) -> (B, T, C)


@dataclass(frozen=True)
class TinyLlamaConfig:
    """The shape of a LLaMA-style model; the defaults are TinyLLaMA-1.1B, with 1,100,048,384 parameters.

    Raises ValueError for sizes from which no model can be built.
    """

    n_layer: int = 22
    n_head: int = 32
    n_kv_head: int = 4  # key and value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 2048  # C, the width
    n_hidden: int | None = None  # inner width of the MLP; None: LLaMA's rule, see `hidden_size`
    multiple_of: int = 256  # for the rule; small models need a smaller one
    block_size: int = 2048  # the longest context that it is meant for, in tokens; with learned positions a limit
    vocab_size: int = 32000
    dropout: float = 0.0
    position: str = "rope"  # or another of alibi.py's POSITIONS
    rope_base: float = 10000.0
    rope_scaling: Scaling = UNSCALED  # see gpt2.py
    tied: bool = False  # let the head be the embedding, as in GPT-2; LLaMA has two matrices
    embed_std: float = 0.02  # what embeddings start at, see gpt2.py

    def __post_init__(self):
        check_config(self)
        check_sizes(self, "multiple_of" if self.n_hidden is None else "n_hidden")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_dim(self) -> int:
        return hidden_size(self.n_embd, self.multiple_of) if self.n_hidden is None else self.n_hidden


CONFIGS = {
    "tinyllama-1.1b": TinyLlamaConfig(),  # 4.4 GB of float32 weights; training wants about four times that
    # GPT-2 small's depth, width and size (124.7 million parameters), with LLaMA's blocks.
    "tinyllama-120m": TinyLlamaConfig(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, block_size=1024),
    # 853,632 parameters with the vocabulary of 900 that the trainer's default has. Tied: a head of its own would be
    # 115,200 more.
    "tinyllama-1m": TinyLlamaConfig(
        n_layer=4,
        n_head=4,
        n_kv_head=2,
        n_embd=128,
        multiple_of=32,
        block_size=256,
        vocab_size=900,
        tied=True,
        embed_std=0.4,
    ),
    "tinyllama-shakespeare": TinyLlamaConfig(
        n_layer=2, n_head=4, n_kv_head=4, n_embd=96, multiple_of=32, block_size=64, vocab_size=67, tied=True
    ),
    # For tests: grouped heads, and an MLP that is not 4 n_embd wide.
    "tinyllama-tiny": TinyLlamaConfig(
        n_layer=2, n_head=4, n_kv_head=2, n_embd=64, multiple_of=16, block_size=64, vocab_size=256
    ),
}


class TinyLlama(Transformer):
    """TinyLLaMA: `model(idx, targets=None) -> (logits, loss)`; see `Transformer.forward` for shapes.

    1,100,048,384 parameters as `CONFIGS["tinyllama-1.1b"]`. Zhang et al. 2024, section 2.2.
    """

    def __init__(self, config: TinyLlamaConfig):
        super().__init__(
            config,
            norm=lambda: RMSNorm(config.n_embd),
            mlp=lambda: SwiGLU(config.n_embd, config.hidden_dim),
            bias=False,
            tied=config.tied,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's rule but for the gates and ups, N(0, 1/sqrt(n_embd)), and a head of its own, N(0, 1/n_embd).

        The second number is the standard deviation. With such a head the untrained model finds every token about
        equally likely, at any width: a loss of ln(vocab_size). TinyLLaMA itself drew N(0, sqrt(0.4/n)) for a matrix
        with n inputs, and N(0, 1/(n_layer sqrt(n))) for an MLP's last one: a loss 0.2 higher.
        """
        super().init_weights()
        # SwiGLU's output is a product, which two small factors would make nearly zero: let each start at variance 1.
        for block in self.blocks:
            nn.init.normal_(block.mlp.gate.weight, std=self.config.n_embd**-0.5)
            nn.init.normal_(block.mlp.up.weight, std=self.config.n_embd**-0.5)
        # At 0.02 the scores' variance would be 0.0004 n_embd, and half of it extra loss: 0.4 nats at n_embd = 2048.
        if not self.tied:
            nn.init.normal_(self.head.weight, std=1 / self.config.n_embd)


# ----------------------------------------------------------------------------------------------------------------------
# Both models by name

ARCHITECTURES = {"gpt2": (GPT2Config, GPT2), "tinyllama": (TinyLlamaConfig, TinyLlama)}
MODELS = {name: ("gpt2", config) for name, config in GPT2_CONFIGS.items()}  # shapes that have a name
MODELS |= {name: ("tinyllama", config) for name, config in CONFIGS.items()}


def build_model(architecture: str, shape: dict) -> Transformer:
    """A model with fresh weights from its settings as a dict; ValueError for settings that it does not have."""
    config, model = ARCHITECTURES[architecture]
    try:
        return model(config(**shape))
    except TypeError as error:
        raise ValueError(f"the {architecture} model has no such setting ({error})") from error
