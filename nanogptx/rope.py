# Built by lessons/src/03_rope.md: change it there, then run python lessons/build.py build 03
"""Rotary position embeddings: a position turns queries and keys by angles, and attention sees only the difference.

Su, Lu, Pan, Murtadha, Wen, Liu 2021, "RoFormer" (arXiv:2104.09864). A head's D channels are D/2 points in the plane;
pair i of the token at position m is turned by the angle m * f_i, with frequencies f_i from 1 down to almost 1/base.
Turning both q and k leaves their dot product a function of the distance alone, and adds no parameters.

Pairing: channel i goes with channel i + D/2 ("half-split", as in GPT-NeoX, Hugging Face and here). The paper and Meta
pair 2i with 2i + 1. These are different functions of the same weights, equal only after the rows of the query and key
projections have been permuted (`to_half_split`).

A model that was trained on L tokens has seen its slow pairs make less than one turn: further out come angles that are
new to it. `Scaling` slows some or all frequencies down, so that a longer text has angles that are known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanogptx.program import nearest


def frequencies(head_dim: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """(D/2,) float32 radians per position: f_i = base^(-2i/D), the first pair fast, the last one slow.

    Raises ValueError when head_dim is odd (channels are rotated in pairs) or the base is not above 1. RoFormer, section
    3.2.2.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} cannot be rotated in pairs: choose n_embd / n_head even")
    if not 1 < base < math.inf:
        raise ValueError(f"rope_base = {base} gives no falling frequencies: choose a number above 1")
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


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


def to_half_split(weight: Tensor, n_head: int) -> Tensor:
    """Rows of a q or k projection, from Meta's order to ours: channels 0 2 4 .. 1 3 5 .. of every head.

    weight (out, in), or a bias (out,); n_head is that of this projection: n_kv_head for k. The scores stay the same.
    """
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)  # (H, D/2, 2, in) -> (H, 2, D/2, in)


def to_interleaved(weight: Tensor, n_head: int) -> Tensor:
    """The way back from `to_half_split`."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)  # (H, 2, D/2, in) -> (H, D/2, 2, in)


# The ways to stretch a context, and what each of them reads.
KINDS = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original"),
    "yarn": tuple("factor original beta_fast beta_slow attention_factor mscale mscale_all_dim truncate".split()),
    "llama3": ("factor", "original", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Scaling:
    """How frequencies change for a context longer than the training one; a kind's options have Hugging Face's names.

    linear: position interpolation, all frequencies divided by the factor (Chen et al. 2023, arXiv:2306.15595).
    ntk: "NTK-aware", a larger base: the fastest pair is kept, the slowest divided by the factor, the others lie between
    (bloc97 2023; equation 16 of YaRN). dynamic: ntk with a factor that grows with the text, from 1 at `original`
    tokens. yarn: fast pairs kept, slow ones divided, and scores sharpened (Peng et al. 2023, arXiv:2309.00071). llama3:
    the same without sharpening, as in Llama 3.1. ValueError for what makes no sense.
    """

    kind: str = "none"
    factor: float = 1.0  # how many times longer; of dynamic: how fast the stretch grows with the text
    original: int = 0  # tokens that the model was trained with
    beta_fast: float = 32.0  # yarn keeps the pairs that make more turns than this in `original` tokens
    beta_slow: float = 1.0  # ... and divides those that make fewer than this
    attention_factor: float | None = None  # yarn: for q and k; None: from the factor
    mscale: float | None = None  # yarn, DeepSeek's: both together change how that follows from the factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whether the ramp begins and ends at whole pairs
    low_freq_factor: float = 1.0  # llama3's beta_slow
    high_freq_factor: float = 4.0  # llama3's beta_fast

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(nearest("scaling", str(self.kind), KINDS))
        for field in fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            if name not in KINDS[self.kind]:
                if value != field.default:
                    raise ValueError(f"{name} = {value!r} means nothing to {self.kind} scaling: leave it out")
            elif name == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"truncate = {value!r} is neither True nor False")
            elif value is not None or field.default is not None:
                check_number(name, value)
        for fast, slow in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
            a, b = getattr(self, fast), getattr(self, slow)
            if a < b or (a == b and self.kind == "llama3"):
                raise ValueError(f"{fast} = {a} is not above {slow} = {b}: fast pairs are those that make more turns")

    def __repr__(self):
        return f"Scaling({', '.join(f'{name}={getattr(self, name)!r}' for name in ('kind', *KINDS[self.kind]))})"


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless `value` can be this option of a scaling."""
    least = {"factor": 1, "original": 1, "mscale": 0, "mscale_all_dim": 0}.get(name, 1e-6)
    kind, types = ("whole number", int) if name == "original" else ("number", (int, float))
    if not isinstance(value, types) or isinstance(value, bool) or not least <= value < 1e9:
        raise ValueError(f"{name} = {value!r} cannot be used to scale positions: choose a {kind} of at least {least}")


UNSCALED = Scaling()


def as_scaling(value: object) -> Scaling:
    """A `Scaling`, or what `dataclasses.asdict` and JSON made of one; ValueError for anything else."""
    try:
        return value if isinstance(value, Scaling) else Scaling(**value)
    except TypeError as error:
        raise ValueError(f"rope_scaling = {value!r} describes no scaling ({error})") from error


def parse_scaling(text: str, original: int) -> Scaling:
    """The scaling that "none" or "KIND:FACTOR", say "yarn:4", means for a model trained with `original` tokens.

    Raises ValueError for an unknown kind, or a factor below 1.
    """
    kind, colon, factor = text.partition(":")
    try:
        options = {"factor": float(factor)} if colon else {}
    except ValueError:
        raise ValueError(f"the factor of {text!r} is no number: write, say, {kind}:4") from None
    if kind in KINDS and bool(colon) != (kind != "none"):
        raise ValueError(f"{text!r} is not how a scaling is written: none, or a kind and a factor, say yarn:4")
    return Scaling(kind, **options, **({"original": original} if "original" in KINDS.get(kind, ()) else {}))


def divided(scaling: Scaling, frequencies: Tensor, base: float) -> Tensor:
    """(D/2,) from 0 to 1: how far each pair goes from its own frequency (0) to that divided by the factor (1).

    yarn: a ramp over the *index* of a pair, from the pair that makes about `beta_fast` turns to the one that makes
    about `beta_slow`, both rounded outwards to whole pairs: the authors' code and Hugging Face. The paper (version 2,
    equation 18) has the ramp over the turns, as llama3 does; between the same ends that is another curve.
    """
    if scaling.kind == "llama3":
        turns = scaling.original * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return 1 - ((turns - low) / (high - low)).clamp(0, 1)
    D = 2 * len(frequencies)
    pair = lambda turns: D * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)  # subtle: not D/2 - 1, the last pair; the ramp may end beyond it
    high += 0.001 * (low == high)
    return ((torch.arange(D // 2, device=frequencies.device) - low) / (high - low)).clamp(0, 1)


def stretched_base(head_dim: int, base: float, scaling: Scaling, length: int | None = None) -> float:
    """The base that ntk and dynamic scaling put in place of `base`, for a text of `length` tokens; others leave it."""
    if scaling.kind not in ("ntk", "dynamic"):
        return base
    if head_dim == 2:
        raise ValueError(f"head_dim = 2 has one pair, which {scaling.kind} keeps as it is: choose another scaling")
    stretch = scaling.factor
    if scaling.kind == "dynamic":
        stretch = stretch * max(length or 0, scaling.original) / scaling.original - (stretch - 1)
    # The exponent makes the last pair's f = base^(-(D-2)/D) exactly 1/stretch of what it was.
    return base * stretch ** (head_dim / (head_dim - 2))


def inverse_frequencies(
    head_dim: int,
    base: float = 10000.0,
    scaling: Scaling = UNSCALED,
    length: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(D/2,) float32 radians per position: `frequencies`, scaled; ValueError for what that refuses.

    `length` is that of the whole text, in tokens; only dynamic scaling reads it. For the rest see `Scaling`.
    """
    f = frequencies(head_dim, base, device)  # (D/2,)
    if scaling.kind == "linear":
        return f / scaling.factor
    if scaling.kind in ("yarn", "llama3"):
        share = divided(scaling, f, base)  # (D/2,)
        return f / scaling.factor * share + f * (1 - share)
    return frequencies(head_dim, stretched_base(head_dim, base, scaling, length), device)


def attention_factor(scaling: Scaling) -> float:
    """What q and k are multiplied with, each, so scores by its square: 1 but for yarn, 0.1 ln(factor) + 1 there.

    It sharpens softmax; the formula was fitted to LLaMA's losses. YaRN, version 2, equation 22; mscale and
    mscale_all_dim: DeepSeek.
    """
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    log = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (scaling.mscale * log + 1) / (scaling.mscale_all_dim * log + 1)
    return log + 1


def rotary(
    positions: Tensor, inv_freq: Tensor, factor: float = 1.0
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function (q, k) -> (q, k) that attention takes as `rotate`, for tokens standing at `positions`.

    positions (T,), or (B, T); q and k are also multiplied by `factor` (see `attention_factor`). Make it once per
    forward pass and give it to every layer: the tables are the same in all of them. They live only that long, so
    `model.to(torch.bfloat16)` finds no buffer to round.
    """
    cos, sin = (table * factor for table in cos_sin(positions, inv_freq))  # (T, D/2) each
    return lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin))
