# Built by lessons/src/02_attention.md: change it there, then run python lessons/build.py build 02
"""Causal self-attention: every token looks back at the tokens before it and mixes what it finds.

Attention (Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2) twice, as a formula to read
and as a fused kernel to use, and the layer around it. Multi-head, grouped-query (Ainslie et al. 2023, arXiv:2305.13245)
and multi-query attention (Shazeer 2019, arXiv:1911.02150) are one piece of code: they differ in one number, n_kv_head.

Shapes: B batch, T new tokens (queries), S tokens to look at (keys; S = T unless some came earlier), H heads,
H_kv key/value heads (H is a multiple of it), D width of a head, C = H * D channels.

Left out: padding masks (rows are packed or right-padded, and nothing before a token is ever padding), sliding windows,
cross-attention. Where a token stands is not known here: lessons 03 and 04 pass it in as `rotate` and `bias`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_mask(T: int, S: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S) booleans: True where query t may look at key s, which is the past and itself.

    The T queries are the *last* T of the S tokens, so the diagonal ends in the lower right corner.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0, causal: bool = True
) -> Tensor:
    """Causal attention as the paper writes it: softmax(q k^T / sqrt(D) + bias) v.

    q (B, H, T, D); k, v (B, H_kv, S, D) with S >= T; bias, broadcast to (B, H, T, S), is added to the scaled scores;
    dropout is the probability that a weight is set to zero. Without `causal` nothing is hidden but where the bias is
    -inf. Returns (B, H, T, D).
    Vaswani et al. 2017, section 3.2.1; grouped heads: Ainslie et al. 2023, section 2.2.
    """
    (H, T, D), (H_kv, S) = q.shape[1:], k.shape[1:3]
    assert T <= S or not causal, f"{T} queries cannot be the last of {S} keys"
    # Each key head serves H / H_kv neighbouring query heads: k0 k0 k1 k1, not k0 k1 k0 k1.
    k = k.repeat_interleave(H // H_kv, dim=1)  # (B, H, S, D)
    v = v.repeat_interleave(H // H_kv, dim=1)  # (B, H, S, D)
    # A dot product of D independent terms has variance D: the divisor keeps softmax away from its flat ends.
    scores = (q / math.sqrt(D)) @ k.transpose(-2, -1)  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if causal:
        future = torch.zeros(T, S, dtype=scores.dtype, device=q.device)
        scores = scores + future.masked_fill(~causal_mask(T, S, q.device), -torch.inf)  # adding is faster than filling
    weights = scores.softmax(dim=-1)  # (B, H, T, S); torch sums in float32 also where these are narrower
    return F.dropout(weights, dropout).to(v.dtype) @ v  # (B, H, T, D)


def holds_scores(device: str, dtype: torch.dtype, S: int, dropout: float = 0.0) -> bool:
    """Whether `fused_attention` uses the formula, and its memory, after all: on a CPU that is sometimes the better way.

    The CPU's kernel has no dropout, and in bfloat16 it is slow: the formula takes 1/3 of its time at T = 64 and 3/4 at
    T = 1024.
    """
    return device == "cpu" and (dropout > 0 or (dtype == torch.bfloat16 and S <= 1024))


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0, causal: bool = True
) -> Tensor:
    """The same as `attention`, by one fused kernel that never holds the (T, S) scores of a head (FlashAttention).

    Arguments, shapes and result are those of `attention`; without a bias, a head's memory grows with T + S, not T * S.
    Dao et al. 2022, arXiv:2205.14135; torch.nn.functional.scaled_dot_product_attention.
    """
    (H, T), (H_kv, S), device = q.shape[1:3], k.shape[1:3], q.device.type
    assert T <= S or not causal, f"{T} queries cannot be the last of {S} keys"
    if holds_scores(device, q.dtype, S, dropout):
        return attention(q, k, v, bias, dropout, causal)
    mask, is_causal = None, False
    if bias is not None:
        mask = bias.masked_fill(~causal_mask(T, S, q.device), -torch.inf) if causal else bias  # (..., T, S)
        # subtle: given three axes, (H, T, S), torch 2.13 takes no kernel on a CPU, but a formula that holds all scores.
        mask = mask.to(q.dtype)[(None,) * (4 - mask.dim())]  # (B or 1, H or 1, T, S)
    elif not causal:
        pass  # everything is visible
    elif T == S:
        # subtle: is_causal aligns the triangle to the upper left, so with S > T it would hide every key after the T-th.
        is_causal = True
    elif T > 1:  # a single query is the last token and sees everything: no mask, and a faster kernel
        mask = causal_mask(T, S, q.device)  # (T, S)
    if device != "cpu":
        # The CUDA kernel that GPUs older than 2020 use (a T4, say) takes no grouped heads.
        k, v = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=k.size(1) != H)  # (B, H, T, D)


def check_heads(n_embd: int, n_head: int, n_kv_head: int) -> None:
    """Refuse head counts that do not divide what they share out: ValueError, with the counts that would do."""
    for name, count, of, whole in (("n_head", n_head, "n_embd", n_embd), ("n_kv_head", n_kv_head, "n_head", n_head)):
        if count < 1 or whole % count:
            fits = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise ValueError(f"{of} = {whole} is not divisible by {name} = {count}: choose {name} from {fits}")


class SelfAttention(nn.Module):
    """Project to queries, keys and values; attend in every head at once; project back.

    n_kv_head = n_head is multi-head, 1 is multi-query, anything between is grouped-query attention. `bias` gives the
    four linear layers a bias (GPT-2 has it, LLaMA does not). Set `fused = False` to run the readable `attention`.
    Raises ValueError when the head counts do not divide. Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        check_heads(n_embd, n_head, n_kv_head)
        self.head_dim = n_embd // n_head
        self.q = nn.Linear(n_embd, n_embd, bias=bias)
        self.k = nn.Linear(n_embd, n_kv_head * self.head_dim, bias=bias)
        self.v = nn.Linear(n_embd, n_kv_head * self.head_dim, bias=bias)
        self.o = nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = dropout
        self.fused = True

    def forward(
        self,
        x: Tensor,
        rotate: Callable | None = None,
        bias: Tensor | None = None,
        causal: bool = True,
        update: Callable | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        `rotate` maps (q, k) to (q, k); for `bias` and `causal` see `attention`. `update`, a cache's, keeps the new
        (k, v) and gives those of all tokens so far.
        """
        # Channels 0..D-1 are head 0, the next D are head 1: -1 stands for H in q and for H_kv in k and v.
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(heads).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v(x).view(heads).transpose(1, 2)  # (B, H_kv, T, D)
        if rotate is not None:
            q, k = rotate(q, k)  # v carries content, not position: it is never rotated
        if update is not None:
            k, v = update(k, v)  # (B, H_kv, S, D) each
        attend = fused_attention if self.fused else attention
        dropout = self.dropout if self.training else 0.0
        y = attend(q.to(k.dtype), k, v, bias, dropout, causal).to(q.dtype)  # (B, H, T, D); a cache keeps its own dtype
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, C)
