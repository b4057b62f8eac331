"""rope: by hand, against transformers, and the properties that make it a position embedding."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanogptx.rope import cos_sin, inverse_frequencies, rotary, rotate


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotated(x, positions, base=10000.0):
    return rotate(x, *cos_sin(positions, inverse_frequencies(x.size(-1), base)))


def test_by_hand():
    # D = 4, base 100: frequencies 1 and 1/10; channels 0 and 2 turn by m, channels 1 and 3 by m/10.
    inv_freq = inverse_frequencies(4, 100.0)
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.1]))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    want = torch.tensor([[math.cos(m), math.cos(m / 10), math.sin(m), math.sin(m / 10)] for m in range(3)])
    torch.testing.assert_close(rotated(x, torch.arange(3), 100.0)[0, 0], want)
    # A quarter turn takes (1, 0) to (0, 1): counter-clockwise.
    quarter = rotate(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    assert quarter.tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize(("D", "base"), [(8, 10000.0), (64, 10000.0), (10, 500000.0)])
def test_equals_transformers(D, base):
    L, H, H_kv = 2048, 3, 1
    config = LlamaConfig(
        hidden_size=H * D, num_attention_heads=H, max_position_embeddings=L,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    q, k = randn(2, H, L, D, dtype=torch.float32), randn(2, H_kv, L, D, dtype=torch.float32, seed=1)
    positions = torch.arange(L)
    inv_freq = inverse_frequencies(D, base)
    torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=1e-7, atol=0)
    cos, sin = cos_sin(positions, inv_freq)
    their_cos, their_sin = theirs(q, positions[None])
    torch.testing.assert_close(torch.cat((cos, cos), -1), their_cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat((sin, sin), -1), their_sin[0], atol=1e-6, rtol=0)
    for ours, want in zip(rotary(positions, inv_freq)(q, k), apply_rotary_pos_emb(q, k, their_cos, their_sin)):
        torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)


def test_scores_depend_on_the_distance_only():
    D, T = 16, 12
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        q, k = randn(1, 2, T, D, dtype=dtype), randn(1, 2, T, D, dtype=dtype, seed=1)
        # float64 angles: the property is the rotation's; float32 tables are tested against transformers
        inv_freq = inverse_frequencies(D).to(dtype)
        scores = []
        for shift in (0, 1, 1000):
            angles = (torch.arange(T) + shift)[:, None].to(dtype) * inv_freq
            turned = [rotate(x, angles.cos(), angles.sin()) for x in (q, k)]
            scores.append(turned[0] @ turned[1].transpose(-2, -1))
        torch.testing.assert_close(scores[1], scores[0], atol=tolerance, rtol=0)
        torch.testing.assert_close(scores[2], scores[0], atol=10 * tolerance, rtol=0)
        assert (scores[0] - q @ k.transpose(-2, -1)).abs().max() > 1  # and it does depend on it


def test_float32_tables_keep_the_distance_far_out():
    q, k = randn(1, 2, 8, 16, dtype=torch.float32), randn(1, 2, 8, 16, dtype=torch.float32, seed=1)
    inv_freq = inverse_frequencies(16)
    near, far = (rotary(torch.arange(8) + shift, inv_freq)(q, k) for shift in (0, 2000))
    near, far = (a @ b.transpose(-2, -1) for a, b in (near, far))
    torch.testing.assert_close(near, far, atol=5e-3, rtol=0)  # an angle of 2000 has a resolution of 1e-4


def test_norms_are_kept():
    x = randn(2, 3, 50, 16)
    y = rotated(x, torch.arange(50))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-6)
    a, b = y.chunk(2, -1)
    torch.testing.assert_close(a**2 + b**2, x[..., :8] ** 2 + x[..., 8:] ** 2, atol=1e-5, rtol=1e-5)  # pair by pair


def test_position_zero_is_the_identity_and_no_other_is():
    x = randn(1, 2, 4, 8, dtype=torch.float32)
    y = rotated(x, torch.arange(4))
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    assert ((y - x).abs().amax(dim=(0, 1, 3)) > 0.1).tolist() == [False, True, True, True]


def test_interleaved_pairing_is_the_same_after_permuting_the_weights():
    """Meta's pairing, as a product of complex numbers (2i, 2i + 1), gives these scores once the rows are reordered."""
    H, D, C, T = 2, 8, 12, 9
    wq, wk, x = randn(H * D, C), randn(H * D, C, seed=1), randn(T, C, seed=2)
    inv_freq = inverse_frequencies(D).double()
    angles = torch.arange(T)[:, None] * inv_freq

    def heads(w):
        return (x @ w.T).view(1, T, H, D).transpose(1, 2)

    def interleaved(y):
        pairs = torch.view_as_complex(y.contiguous().view(1, H, T, D // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def permute(w):  # rows 0 2 4 6 1 3 5 7 of every head
        return w.view(H, D // 2, 2, C).transpose(1, 2).reshape(H * D, C)

    def ours(w):
        return rotate(heads(w), angles.cos(), angles.sin())

    want = interleaved(heads(wq)) @ interleaved(heads(wk)).transpose(-2, -1)
    got = ours(permute(wq)) @ ours(permute(wk)).transpose(-2, -1)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    assert (ours(wq) @ ours(wk).transpose(-2, -1) - want).abs().max() > 1


def test_positions_per_row():
    q, k, inv_freq = randn(2, 3, 4, 8), randn(2, 1, 4, 8, seed=1), inverse_frequencies(8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 9, 2]])
    both = rotary(positions, inv_freq)(q, k)
    for row in range(2):
        alone = rotary(positions[row], inv_freq)(q[row : row + 1], k[row : row + 1])
        assert all(torch.equal(b[row : row + 1], a) for a, b in zip(alone, both))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_angles(dtype):
    """The dtype of x is kept, and the result is the float32 one rounded once: no angle is ever rounded to `dtype`."""
    x, positions = randn(1, 2, 4, 16, dtype=dtype), torch.tensor([4093, 4094, 4095, 4096])
    cos, sin = cos_sin(positions, inverse_frequencies(16))
    assert cos.dtype == sin.dtype == torch.float32
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = rotated(x, positions)
        assert y.dtype == dtype and torch.equal(y, rotate(x.float(), cos, sin).to(dtype))
    exact = positions.double()[:, None] * inverse_frequencies(16).double()
    torch.testing.assert_close(cos.double(), exact.cos(), atol=3e-4, rtol=0)
    # Even frequencies and positions handed over in half precision are widened before they are multiplied.
    assert cos_sin(positions.to(dtype), inverse_frequencies(16).to(dtype))[0].dtype == torch.float32


def test_odd_head_dim_is_refused():
    for D in (7, 1, 0):
        with pytest.raises(ValueError, match=f"head_dim = {D} cannot be rotated in pairs: choose n_embd / n_head even"):
            inverse_frequencies(D)
