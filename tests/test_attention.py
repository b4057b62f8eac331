"""attention: by hand, against torch's own layers, and the readable function against the fused one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogptx.attention import SelfAttention, attention, causal_mask, check_heads, fused_attention, holds_scores

BOTH = pytest.mark.parametrize("attend", [attention, fused_attention])
# (B, H, H_kv, T, S, D): multi-head, grouped with H_kv neither 1 nor H, multi-query, chunks (S > T), one query, T > 256.
SHAPES = [
    (2, 4, 4, 7, 7, 8),
    (2, 4, 2, 7, 7, 8),
    (1, 6, 2, 9, 9, 10),
    (1, 6, 3, 5, 12, 8),
    (2, 6, 1, 4, 11, 8),
    (2, 4, 2, 1, 9, 8),
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 300, 300, 8),
]


def make(shape, dtype=torch.float64, scale=2.0, seed=0):
    """Random q, k, v, laid out as the layer makes them: heads next to channels, transposed."""
    B, H, H_kv, T, S, D = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D))
    return [(scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype).transpose(1, 2) for s in sizes]


def by_torch(q, k, v, bias=None):
    """torch's plain (MATH) kernel, with heads shared and the mask built by counting."""
    B, H, T, D = q.shape
    S, group = k.size(2), H // k.size(1)
    k = torch.stack([k[:, h // group] for h in range(H)], 1)
    v = torch.stack([v[:, h // group] for h in range(H)], 1)
    mask = torch.zeros(1, 1, T, S, dtype=q.dtype) if bias is None else bias.expand(B, H, T, S).to(q.dtype).clone()
    for t in range(T):
        mask[:, :, t, S - T + t + 1 :] = -torch.inf  # query t is token S - T + t: later keys are its future
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@BOTH
def test_by_hand(attend):
    # Two tokens, D = 4. The second scores 0 with the first and 4 / sqrt(4) = 2 with itself: weights 1 and e^2, shared.
    q = k = torch.tensor([[0.0] * 4, [1.0] * 4]).view(1, 1, 2, 4)
    v = torch.tensor([[10.0, 0, 0, 0], [20.0, 0, 0, 1]]).view(1, 1, 2, 4)
    w = math.exp(2) / (1 + math.exp(2))
    want = torch.tensor([[10.0, 0, 0, 0], [10 * (1 - w) + 20 * w, 0, 0, w]])
    torch.testing.assert_close(attend(q, k, v)[0, 0], want, atol=1e-5, rtol=1e-6)


def test_causal_mask():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert torch.equal(causal_mask(5, 5), torch.ones(5, 5).tril().bool())


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_torch(attend, shape, biased):
    B, H, H_kv, T, S, D = shape
    bias = torch.randn(H, T, S, generator=torch.Generator().manual_seed(1)) if biased else None
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        q, k, v = make(shape, dtype, scale=1.0)
        got, want = attend(q, k, v, bias), by_torch(q, k, v, bias)
        assert got.dtype == dtype and got.shape == (B, H, T, D)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance * 10)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_agree(shape):
    grads = []
    for attend in (attention, fused_attention, by_torch):
        leaves = [x.requires_grad_() for x in make(shape)]
        attend(*leaves).sin().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, c, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(b, c, atol=1e-12, rtol=1e-10)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in make((1, 4, 2, 3, 5, 2)))
    bias = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (q, k, v, bias))


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_without_causal_the_bias_alone_hides(attend, shape):
    """A bias that hides the future is the causal one; no bias hides nothing; one for every row may hide anything."""
    (B, H, _, T, S, _), (q, k, v) = shape, make(shape)
    future = torch.zeros(T, S).masked_fill(~causal_mask(T, S), -torch.inf)
    bias = torch.randn(H, T, S, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attend(q, k, v, bias + future, causal=False), attend(q, k, v, bias))
    torch.testing.assert_close(attend(q, k, v, future, causal=False), attend(q, k, v))
    all_of_it = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, causal=False), all_of_it, atol=1e-6, rtol=1e-6)
    ragged = torch.zeros(B, 1, T, S)
    ragged[-1, :, :, S // 2 + 1 :] = -torch.inf  # the last row has fewer tokens
    got = attend(q, k, v, ragged, causal=False)
    few = F.scaled_dot_product_attention(q, k[:, :, : S // 2 + 1], v[:, :, : S // 2 + 1], enable_gqa=True)
    torch.testing.assert_close(got[-1], few[-1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[:-1], all_of_it[:-1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # on a CPU the second goes by the formula
@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_without_causal_sees_the_future(dtype, fused):
    torch.manual_seed(0)
    layer = SelfAttention(48, 6, 2, bias=True).to(dtype)
    layer.fused = fused
    x = torch.randn(2, 9, 48, dtype=dtype)
    past, all_of_it = layer(x), layer(x, causal=False)
    assert (past[:, 0] - all_of_it[:, 0]).abs().max() > 0.01
    torch.testing.assert_close(past[:, -1], all_of_it[:, -1], atol=1e-2, rtol=1e-2)  # the last one sees all anyway
    hidden = torch.ones(9, 9).tril().log().to(dtype)
    torch.testing.assert_close(layer(x, None, hidden, False), past, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_a_bias_of_any_number_of_axes_gets_the_kernel(axes):
    """Given (H, T, S), torch would silently hold all scores: nothing of that size may be kept for the backward pass."""
    q, k, v = (x.requires_grad_() for x in make((3, 6, 2, 40, 40, 8), torch.float32))
    bias, saved = torch.zeros((1, 6, 40, 40)[4 - axes :]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        fused_attention(q, k, v, bias, causal=False)
    assert max(saved) < 3 * 6 * 40 * 40


@BOTH
def test_neighbouring_heads_share_keys_and_values(attend):
    q, k, v = make((1, 6, 2, 5, 5, 8))
    for h in range(6):
        alone = attend(q[:, h : h + 1], k[:, h // 3 : h // 3 + 1], v[:, h // 3 : h // 3 + 1])
        torch.testing.assert_close(attend(q, k, v)[:, h : h + 1], alone, atol=1e-12, rtol=0)


@BOTH
def test_nothing_comes_from_the_future(attend):
    q, k, v = make((1, 4, 2, 6, 9, 8))
    before = attend(q, k, v)
    k[:, :, 7:] += 1
    v[:, :, 7:] -= 1
    changed = (attend(q, k, v) != before).any(-1).any(1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 2  # the queries are tokens 3..8


@BOTH
def test_a_chunk_gives_the_last_rows_of_the_whole(attend):
    q, k, v = make((2, 4, 2, 8, 8, 8))
    for T in (1, 2, 3, 8):
        torch.testing.assert_close(attend(q[:, :, -T:], k, v), attend(q, k, v)[:, :, -T:], atol=1e-12, rtol=0)


@BOTH
def test_large_scores_stay_finite(attend):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make((1, 2, 2, 5, 5, 8), dtype, scale=100.0)
        assert attend(q, k, v).isfinite().all()


@BOTH
def test_more_queries_than_keys_is_a_bug(attend):
    q, k, v = make((1, 2, 2, 5, 4, 8))
    with pytest.raises(AssertionError, match="5 queries"):
        attend(q, k, v)


@BOTH
@pytest.mark.parametrize("shape", [(2, 4, 2, 16, 16, 8), (1, 4, 2, 300, 300, 8), (1, 4, 2, 3, 16, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16(attend, shape, biased):
    """Short sequences go by the formula on a CPU; the result is bfloat16 all the same."""
    q, k, v = make(shape, torch.bfloat16, scale=1.0)
    bias = torch.randn(4, shape[3], shape[4]) if biased else None
    want = by_torch(q.double(), k.double(), v.double(), bias)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = attend(q, k, v, bias)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=2e-2)


def test_where_a_cpu_goes_by_the_formula():
    """Short contexts in bfloat16, and dropout; a GPU never does. The prediction of memory asks this, too."""
    narrow, wide = torch.bfloat16, torch.float32
    assert holds_scores("cpu", narrow, 1024) and not holds_scores("cpu", narrow, 1025)
    assert not holds_scores("cpu", wide, 64) and holds_scores("cpu", wide, 5000, dropout=0.1)
    assert not holds_scores("cuda", narrow, 64, dropout=0.1)


def test_short_bfloat16_goes_by_the_formula():
    q, k, v = make((1, 4, 2, 64, 64, 8), torch.bfloat16)
    assert torch.equal(fused_attention(q, k, v), attention(q, k, v))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fused_kernel_runs(dtype):
    """With every other kernel forbidden, torch raises when flash attention cannot take the call."""
    for shape in ((2, 4, 4, 1100, 1100, 8), (2, 4, 2, 1100, 1100, 8), (2, 4, 2, 5, 1100, 8), (2, 4, 2, 1, 1100, 8)):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            fused_attention(*make(shape, dtype))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        F.scaled_dot_product_attention(*make((2, 4, 4, 1100, 1100, 8), dtype), dropout_p=0.5)  # so the test can fail


@BOTH
def test_dropout(attend):
    """With equal keys and v = 1 the output counts surviving weights: 1 on average, and not all of them 1."""
    torch.manual_seed(0)
    q, v = torch.zeros(1, 8, 256, 4), torch.ones(1, 4, 256, 4)
    assert torch.equal(attend(q, v, v, None, 0.0), attend(q, v, v, None, 0.0))
    y = attend(q, v, v, None, 0.25)[0, :, 128:, 0]  # (8, 128): rows of at least 129 weights
    assert abs(y.mean() - 1) < 0.01
    # The sum of n weights of 1/n, each kept with 3/4 and scaled by 4/3, has variance (1/3)/n.
    assert 0.8 < ((y - 1) ** 2 * 3 * torch.arange(129, 257)).mean() < 1.2


# ------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_torch_multihead(fused, bias):
    torch.manual_seed(0)
    C, H, T = 24, 3, 7
    ours = SelfAttention(C, H, H, bias).double()
    theirs = torch.nn.MultiheadAttention(C, H, bias=bias, batch_first=True).double()
    ours.fused = fused
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.out_proj.weight.copy_(ours.o.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
            theirs.out_proj.bias.copy_(ours.o.bias)
    x = torch.randn(2, T, C, dtype=torch.float64)
    want = theirs(x, x, x, attn_mask=~causal_mask(T, T), need_weights=False)[0]
    torch.testing.assert_close(ours(x), want, atol=1e-10, rtol=1e-12)


def test_grouped_layer_equals_multihead_with_repeated_projections():
    torch.manual_seed(0)
    C, H, H_kv, D = 48, 6, 2, 8
    grouped, full = SelfAttention(C, H, H_kv), SelfAttention(C, H, H)
    assert [tuple(p.shape) for p in grouped.parameters()] == [(48, 48), (16, 48), (16, 48), (48, 48)]
    assert sum(p.numel() for p in grouped.parameters()) == 2 * C * C + 2 * C * H_kv * D
    with torch.no_grad():
        for name in ("q", "o"):
            getattr(full, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k", "v"):
            heads = getattr(grouped, name).weight.view(H_kv, D, C)
            getattr(full, name).weight.copy_(torch.cat([heads[h // 3] for h in range(H)]))
    x = torch.randn(2, 5, C)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
def test_fused_switch_changes_nothing_but_the_path(n_kv_head):
    torch.manual_seed(0)
    layer = SelfAttention(48, 6, n_kv_head, bias=True).double()
    x, bias = torch.randn(2, 9, 48, dtype=torch.float64), torch.randn(6, 9, 9, dtype=torch.float64)
    assert layer.fused
    fused = layer(x, bias=bias)
    layer.fused = False
    torch.testing.assert_close(layer(x, bias=bias), fused, atol=1e-12, rtol=1e-12)


def test_rotate_gets_queries_and_keys_and_never_values():
    torch.manual_seed(0)
    layer, x, seen = SelfAttention(24, 3, 1), torch.randn(2, 5, 24), []

    def rotate(q, k):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return 0 * q, k  # all scores 0: every token takes the mean of the values so far

    y = layer(x, rotate)
    assert seen == [((2, 3, 5, 8), (2, 1, 5, 8))]
    mean = layer.v(x).cumsum(1) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(y, layer.o(mean.repeat(1, 1, 3)), atol=1e-6, rtol=1e-5)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    layer, x = SelfAttention(24, 3, 3, dropout=0.5), torch.randn(1, 9, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_only_plain_tensors_in_the_state():
    assert list(SelfAttention(24, 3, 1).state_dict()) == ["q.weight", "k.weight", "v.weight", "o.weight"]


def test_errors_name_value_expectation_and_remedy():
    with pytest.raises(ValueError, match=r"n_embd = 10 is not divisible by n_head = 3: choose n_head from 1, 2, 5, 10"):
        SelfAttention(10, 3, 3)
    with pytest.raises(ValueError, match=r"n_head = 6 is not divisible by n_kv_head = 4: choose .* 1, 2, 3, 6"):
        check_heads(12, 6, 4)
    with pytest.raises(ValueError, match="n_kv_head = 0"):
        check_heads(12, 6, 0)
