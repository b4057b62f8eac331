# Built by lessons/src/04_alibi.md: change it there, then run python lessons/build.py build 04
"""ALiBi: attention that falls off with the distance, at another rate in every head, and needs no position embedding.

Press, Smith, Lewis 2021, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation"
(arXiv:2108.12409). A head with slope m adds -m * (i - j) to the score of query i and key j, after the division by
sqrt(D). Nothing is learned and nothing is tied to a length: a model trained on 64 tokens can be given 512.

Some implementations (the authors', BLOOM) add m * j instead. A row's scores then all differ by the same m * i, which
softmax takes out; but m * j grows with the text and loses its last bits in half precision, where a distance does not.

This is the last of the position schemes, so the choice between them stands here, too.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanogptx.rope import UNSCALED, as_scaling, attention_factor, inverse_frequencies, parse_scaling, rotary


def slopes(n_head: int, device: torch.device | str | None = None) -> Tensor:
    """(H,) float32: how fast attention falls off with the distance in each head.

    For H a power of two a geometric series that ends in 2^-8, and begins with its own ratio: 2^(-8h/H), h = 1..H.
    For others the authors fill up the series of the next lower power of two with every second slope of the next
    higher one; 2^(-8h/H) would be another model. ValueError for less than one head. Section 3, and the authors' code.
    """
    if n_head < 1:
        raise ValueError(f"n_head = {n_head} is not a number of heads: choose at least 1")
    lower = 1 << (n_head.bit_length() - 1)  # the largest power of two that is at most n_head
    exponents = [8 * h / lower for h in range(1, lower + 1)]
    exponents += [4 * h / lower for h in range(1, 2 * (n_head - lower), 2)]
    return torch.tensor([2**-x for x in exponents], dtype=torch.float32, device=device)


def bias(slopes: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """What is added to the scores: -slope * (i - j) for a query at i and a key at j, -inf for keys of the future.

    slopes (H,); q_positions (T,) or (B, T) and k_positions (S,) or (B, S) are places in the whole text, so that the
    rows for new tokens are the same whether or not earlier ones come from a cache. Returns float32 (H, T, S), or
    (B, H, T, S). Section 3.
    """
    distance = (q_positions[..., :, None] - k_positions[..., None, :]).float()  # (T, S) or (B, T, S)
    distance = distance.masked_fill(distance < 0, torch.inf)
    return -slopes[:, None, None] * distance.unsqueeze(-3)  # (H, 1, 1) * (B, 1, T, S) -> (B, H, T, S)


POSITIONS = ("learned", "rope", "alibi", "none")  # how a model can know where a token stands


def check_position(config) -> None:
    """Raise ValueError unless a model can tell positions apart as `config` says; a scaling may be a dict, from JSON."""
    if config.position not in POSITIONS:
        raise ValueError(f"position = {config.position!r} is unknown: choose one of {', '.join(POSITIONS)}")
    object.__setattr__(config, "rope_scaling", as_scaling(config.rope_scaling))  # the config is frozen
    if config.position == "rope":
        inverse_frequencies(config.head_dim, config.rope_base, config.rope_scaling)  # refuses what does not fit
    elif config.rope_scaling != UNSCALED:
        kind = config.rope_scaling.kind
        raise ValueError(f"{kind} scaling stretches rope, and position = {config.position!r}: choose one of the two")


def stretched(config, scaling: str):
    """The config with its rotary positions scaled, say by "yarn:4", and a context that is longer by that factor.

    Raises ValueError for a model without rotary positions, and for one that was trained with a scaling.
    """
    if config.rope_scaling != UNSCALED:
        old = config.rope_scaling
        raise ValueError(f"the model has {old.kind}:{old.factor:g} scaling already: {scaling} cannot be added to it")
    new = parse_scaling(scaling, config.block_size)
    return replace(config, rope_scaling=new, block_size=round(config.block_size * new.factor))


def position_tables(
    config, q_positions: Tensor, k_positions: Tensor, length: int, dtype: torch.dtype
) -> tuple[Callable | None, Tensor | None]:
    """The `rotate` and `bias` that SelfAttention takes, for a config's `position`: once for all layers.

    For positions (see `bias`) in a text of `length` tokens; a bias is of `dtype`, and it hides the future. Learned
    positions are the model's affair: both are None.
    """
    if config.position == "rope":
        device, scaling = q_positions.device, config.rope_scaling
        inv_freq = inverse_frequencies(config.head_dim, config.rope_base, scaling, length, device)  # (D/2,)
        return rotary(q_positions, inv_freq, attention_factor(scaling)), None
    if config.position == "alibi":
        return None, bias(slopes(config.n_head, q_positions.device), q_positions, k_positions).to(dtype)
    return None, None
