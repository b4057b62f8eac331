"""Rotary position embeddings: a position turns queries and keys by angles, and attention sees only the difference.

Su, Lu, Pan, Murtadha, Wen, Liu 2021, "RoFormer" (arXiv:2104.09864). A head's D channels are D/2 points in the plane;
pair i of the token at position m is turned by the angle m * f_i, with frequencies f_i from 1 down to almost 1/base.
Turning both q and k leaves their dot product a function of the distance alone, and adds no parameters.

Pairing: channel i goes with channel i + D/2 ("half-split", as in GPT-NeoX, Hugging Face and here). The paper and Meta
pair 2i with 2i + 1. These are different functions of the same weights, equal only after the rows of the query and key
projections have been permuted.

Left out for now: stretching the frequencies for contexts longer than the training ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """(D/2,) float32 radians per position: f_i = base^(-2i/D), the first pair fast, the last one slow.

    Raises ValueError when head_dim is odd: channels are rotated in pairs. RoFormer, section 3.2.2.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} cannot be rotated in pairs: choose n_embd / n_head even")
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)  # (D/2,)


def cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: positions (..., T) and inv_freq (D/2,) -> two float32 tables (..., T, D/2)."""
    # subtle: float32, whatever the model's dtype. Of the positions 0..4095, bfloat16 can tell only 769 apart.
    angles = positions[..., None].float() * inv_freq.float()  # (..., T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x_i, x_{i + D/2}) of x (B, H, T, D) by its angle; same shape and dtype.

    cos, sin: (T, D/2), or (B, T, D/2) when every row has its own positions. RoFormer, section 3.4.2.
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (1, T, D/2) or (B, 1, T, D/2): the same for every head
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    # The complex product (a + ib)(cos + i sin), in the wider of x's dtype and float32, rounded once at the end.
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (B, H, T, D)


def rotary(positions: Tensor, inv_freq: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function (q, k) -> (q, k) that attention takes as `rotate`, for tokens standing at `positions`.

    Make it once per forward pass and give it to every layer: the tables are the same in all of them. They live only
    that long, so `model.to(torch.bfloat16)` finds no buffer to round.
    """
    cos, sin = cos_sin(positions, inv_freq)  # (T, D/2) each
    return lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin))
