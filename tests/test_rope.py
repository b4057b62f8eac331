"""rope: by hand, against transformers, and the properties that make it a position embedding."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanogptx.rope import (
    KINDS,
    UNSCALED,
    Scaling,
    as_scaling,
    attention_factor,
    cos_sin,
    inverse_frequencies,
    parse_scaling,
    rotary,
    rotate,
    to_half_split,
    to_interleaved,
)


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


def interleaved(y, angles):
    """Meta's pairing, as a product of complex numbers (2i, 2i + 1)."""
    pairs = torch.view_as_complex(y.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize("bias", [False, True])
def test_interleaved_pairing_is_the_same_after_permuting_the_weights(bias):
    """Grouped heads, so k is permuted with a head count of its own; D = 6, since at 4 the way there is the way back."""
    H, H_kv, D, C, T = 6, 2, 6, 10, 9
    weights = [randn(heads * D, C, seed=heads) for heads in (H, H_kv)]
    biases = [randn(heads * D, seed=10 + heads) if bias else torch.zeros(heads * D).double() for heads in (H, H_kv)]
    x, angles = randn(T, C, seed=2), torch.arange(T)[:, None] * inverse_frequencies(D).double()

    def scores(turn, reorder=lambda w, n_head: w):
        q, k = (
            turn((x @ reorder(w, n).T + reorder(b, n)).view(1, T, n, D).transpose(1, 2))
            for w, b, n in zip(weights, biases, (H, H_kv))
        )
        return q @ k.repeat_interleave(H // H_kv, dim=1).transpose(-2, -1)

    theirs = lambda y: interleaved(y, angles)
    ours = lambda y: rotate(y, angles.cos(), angles.sin())
    want = scores(theirs)
    torch.testing.assert_close(scores(ours, to_half_split), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(scores(theirs, to_interleaved), scores(ours), atol=1e-10, rtol=0)
    for wrong in (lambda w, n: w, to_interleaved, lambda w, n: to_half_split(w, H)):
        assert (scores(ours, wrong) - want).abs().max() > 0.1
    for w, n in zip((*weights, *biases), (H, H_kv, H, H_kv)):
        assert torch.equal(to_interleaved(to_half_split(w, n), n), w) and to_half_split(w, n).shape == w.shape
        assert torch.equal(to_half_split(to_interleaved(w, n), n), w)


def test_the_order_of_rows_by_hand():
    meta = torch.arange(12)  # two heads of six channels
    assert to_half_split(meta, 2).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert to_interleaved(meta, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


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


# ---- longer contexts ----------------------------------------------------------------------------------------------------


def their_frequencies(D, base, scaling: dict, block_size=8192, length=None):
    """transformers' inverse frequencies and attention factor, of its module, after a text of `length` tokens."""
    config = LlamaConfig(
        hidden_size=3 * D, num_attention_heads=3, head_dim=D, max_position_embeddings=block_size,
        rope_parameters={"rope_theta": base, **scaling},
    )  # fmt: skip
    module = LlamaRotaryEmbedding(config)
    if length is not None:
        module(torch.zeros(1), torch.arange(length)[None])
    return module.inv_freq, module.attention_scaling


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# kind, what differs from the kind's defaults. TinyLLaMA's and Llama 3's sizes, and such that a ramp is cut at an end.
OPTIONS = [
    ("linear", {"factor": 4.0}),
    ("linear", {"factor": 1.5}),
    ("yarn", {"factor": 4.0, "original": 2048}),
    ("yarn", {"factor": 2.5, "original": 4096}),
    ("yarn", {"factor": 1.0, "original": 2048}),
    ("yarn", {"factor": 8.0, "original": 64}),
    ("yarn", {"factor": 40.0, "original": 4096, "mscale": 0.707, "mscale_all_dim": 1.3}),
    ("yarn", {"factor": 40.0, "original": 4096, "mscale": 0.707, "mscale_all_dim": 0.0}),
    ("yarn", {"factor": 40.0, "original": 4096, "mscale": 0.707}),
    ("yarn", {"factor": 4.0, "original": 2048, "attention_factor": 1.25, "mscale": 0.707, "mscale_all_dim": 1.3}),
    ("yarn", {"factor": 4.0, "original": 2048, "beta_fast": 20.0, "beta_slow": 2.0}),
    ("yarn", {"factor": 4.0, "original": 2048, "beta_fast": 20, "beta_slow": 2.5, "truncate": False}),
    ("yarn", {"factor": 4.0, "original": 2048, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False}),
    ("yarn", {"factor": 4.0, "original": 2048, "beta_fast": 1e6, "beta_slow": 1e-6}),
    ("yarn", {"factor": 4.0, "original": 4, "beta_fast": 2.0, "truncate": False}),
    ("yarn", {"factor": 4.0, "original": 6}),  # a ramp without length
    ("llama3", {"factor": 8.0, "original": 8192}),
    ("llama3", {"factor": 32.0, "original": 2048, "low_freq_factor": 2.0, "high_freq_factor": 5.0}),
]


@pytest.mark.parametrize(("D", "base"), [(8, 10000.0), (64, 10000.0), (10, 500000.0), (128, 500000.0), (2, 100.0)])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_scaled_frequencies_equal_transformers(kind, options, D, base):
    theirs = (LLAMA3 if kind == "llama3" else {}) | options | {"rope_type": kind}
    if "original" in theirs:
        theirs["original_max_position_embeddings"] = theirs.pop("original")
    want, factor = their_frequencies(D, base, theirs)
    scaling = Scaling(kind, **options)
    torch.testing.assert_close(inverse_frequencies(D, base, scaling), want, rtol=1e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    assert inverse_frequencies(D, base, scaling).dtype == torch.float32


@pytest.mark.parametrize("length", [None, 1, 63, 64, 65, 100, 256, 1000])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("D", [4, 10, 64])
def test_dynamic_frequencies_equal_transformers(D, factor, length):
    """For a text read in one piece; the factor is how fast the stretch grows, and there is none up to `original`."""
    want, one = their_frequencies(D, 500.0, {"rope_type": "dynamic", "factor": factor}, 64, length)
    ours = inverse_frequencies(D, 500.0, Scaling("dynamic", factor, 64), length)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=0)
    assert one == attention_factor(Scaling("dynamic", factor, 64)) == 1
    assert torch.equal(ours, inverse_frequencies(D, 500.0)) == (length is None or length <= 64)


@pytest.mark.parametrize(("D", "s"), [(64, 4.0), (10, 3.0), (4, 8.0)])
def test_ntk_is_rope_with_another_base(D, s):
    """transformers has no name for it, and none is needed."""
    want, _ = their_frequencies(D, 10000.0 * s ** (D / (D - 2)), {"rope_type": "default"})
    ours, plain = inverse_frequencies(D, 10000.0, Scaling("ntk", s)), inverse_frequencies(D, 10000.0)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=0)
    ratio = plain / ours  # 1 for the fastest pair, s for the slowest, and the same step from pair to pair between
    torch.testing.assert_close(ratio, s ** (torch.arange(D // 2) / (D // 2 - 1)), rtol=1e-5, atol=0)
    # The stretch of dynamic scaling by 1 is that of a text s times as long.
    assert torch.equal(inverse_frequencies(D, 10000.0, Scaling("dynamic", 1.0, 50), int(50 * s)), ours)


def test_yarn_by_hand():
    """D = 8, base 10^4: pairs turn every 2 pi 10^i tokens, so in 2 pi 1000 tokens they make 1000, 100, 10 and 1 turns."""
    scaling = Scaling("yarn", 4.0, 6283, beta_fast=101.0, beta_slow=0.99)
    ratio = inverse_frequencies(8) / inverse_frequencies(8, scaling=scaling)
    # The ramp begins in pair 0 (1000 turns; a little more than 101 is a little before pair 1) and ends in pair 4, which
    # is there in the formula, though there are four pairs only: pair i is divided by 4 to the share i/4.
    shares = torch.arange(4) / 4
    torch.testing.assert_close(1 / ratio, shares / 4 + (1 - shares), rtol=1e-5, atol=0)
    assert attention_factor(scaling) == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    kept = inverse_frequencies(8, scaling=dataclasses.replace(scaling, beta_fast=9.0, beta_slow=2.0))  # pairs 2 to 3
    torch.testing.assert_close(inverse_frequencies(8) / kept, torch.tensor([1.0, 1.0, 1.0, 4.0]), rtol=1e-5, atol=0)


def test_the_paper_s_ramp_is_another_curve():
    """Equation 13 of YaRN has the ramp over the turns, as llama3 does: same ends, and up to 2.2 times slower between."""
    yarn = inverse_frequencies(64, scaling=Scaling("yarn", 4.0, 2048))
    paper = inverse_frequencies(64, scaling=Scaling("llama3", 4.0, 2048, low_freq_factor=1.0, high_freq_factor=32.0))
    ratio = yarn / paper
    torch.testing.assert_close(ratio[:8], torch.ones(8)), torch.testing.assert_close(ratio[-8:], torch.ones(8))
    assert 1.3 < ratio.max() < 2.5


def test_every_scaling_slows_pairs_down_and_none_beyond_its_factor():
    plain = inverse_frequencies(32)
    for kind in KINDS:
        scaling = parse_scaling(f"{kind}:4" if kind != "none" else kind, 512)
        ratio = plain / inverse_frequencies(32, scaling=scaling, length=2048)
        most = {"none": 1, "dynamic": 4 * 4 - 3}.get(kind, 4)
        assert ratio.min() >= 1 - 1e-6 and ratio.max() == pytest.approx(most, rel=1e-5)
        assert ratio[0] == pytest.approx(4 if kind == "linear" else 1) and (ratio.diff() > -1e-5).all()
        assert (attention_factor(scaling) > 1) == (kind == "yarn")


def test_a_factor_multiplies_queries_and_keys():
    """So the scores are multiplied with its square, at every distance, 0 included."""
    q, k, inv_freq = randn(1, 3, 5, 8), randn(1, 3, 5, 8, seed=1), inverse_frequencies(8)
    plain, sharper = rotary(torch.arange(5), inv_freq)(q, k), rotary(torch.arange(5), inv_freq, 1.25)(q, k)
    for a, b in zip(plain, sharper):
        torch.testing.assert_close(b, 1.25 * a, atol=1e-6, rtol=1e-6)
    a, b = (q @ k.transpose(-2, -1) for q, k in (plain, sharper))
    torch.testing.assert_close(b, 1.5625 * a, atol=1e-5, rtol=1e-5)


def test_parse_scaling():
    assert parse_scaling("none", 64) == UNSCALED == Scaling()
    assert parse_scaling("yarn:4", 64) == Scaling("yarn", 4.0, 64)
    assert parse_scaling("llama3:8", 64) == Scaling("llama3", 8.0, 64)
    assert parse_scaling("dynamic:1.5", 64) == Scaling("dynamic", 1.5, 64)
    assert parse_scaling("linear:2", 64) == Scaling("linear", 2.0)  # which works the same for any training length
    assert parse_scaling("ntk:2e1", 64) == Scaling("ntk", 20.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarm:4", "unknown scaling 'yarm': did you mean yarn"),
        ("longrope:4", "there are none, linear, ntk, dynamic, yarn, llama3"),
        ("", "unknown scaling ''"),
        ("yarn", "'yarn' is not how a scaling is written: none, or a kind and a factor, say yarn:4"),
        ("none:2", "'none:2' is not how a scaling is written"),
        ("yarn:", "the factor of 'yarn:' is no number: write, say, yarn:4"),
        ("yarn:x4", "the factor of 'yarn:x4' is no number"),
        ("linear:0.5", "factor = 0.5 cannot be used to scale positions: choose a number of at least 1"),
        ("linear:nan", "factor = nan cannot"),
        ("linear:inf", "factor = inf cannot"),
    ],
)
def test_what_is_no_scaling_on_a_command_line(text, message):
    with pytest.raises(ValueError) as error:
        parse_scaling(text, 64)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yarn", "factor": 4.0}, "original = 0 cannot be used to scale positions: choose a whole number of at"),
        ({"kind": "dynamic", "factor": 4.0, "original": 64.0}, "original = 64.0 cannot"),
        ({"kind": "linear", "factor": "4"}, "factor = '4' cannot"),
        ({"kind": "linear", "factor": True}, "factor = True cannot"),
        ({"kind": "linear", "factor": None}, "factor = None cannot"),
        ({"kind": "linear", "factor": 4.0, "original": 64}, "original = 64 means nothing to linear scaling: leave it out"),
        ({"factor": 4.0}, "factor = 4.0 means nothing to none scaling"),
        ({"kind": "llama3", "factor": 4.0, "original": 64, "beta_fast": 8.0}, "beta_fast = 8.0 means nothing to llama3"),
        ({"kind": "yarn", "factor": 4.0, "original": 64, "beta_slow": 0.0}, "beta_slow = 0.0 cannot"),
        ({"kind": "yarn", "factor": 4.0, "original": 64, "beta_slow": 33.0}, "beta_fast = 32.0 is not above beta_slow = 33.0"),
        ({"kind": "yarn", "factor": 4.0, "original": 64, "mscale": -1}, "mscale = -1 cannot"),
        ({"kind": "yarn", "factor": 4.0, "original": 64, "attention_factor": 0.0}, "attention_factor = 0.0 cannot"),
        ({"kind": "yarn", "factor": 4.0, "original": 64, "truncate": 1}, "truncate = 1 is neither True nor False"),
        ({"kind": "llama3", "factor": 4.0, "original": 64, "low_freq_factor": 4.0}, "high_freq_factor = 4.0 is not above low"),
        ({"kind": "llama3", "factor": 4.0, "original": 64, "low_freq_factor": 5.0}, "high_freq_factor = 4.0 is not above low"),
        ({"kind": None}, "unknown scaling 'None'"),
        ({"kind": ["yarn"]}, "describes no scaling"),
        ({"kind": "linear", "faktor": 2.0}, "describes no scaling"),
    ],
)  # fmt: skip
def test_what_is_no_scaling(options, message):
    with pytest.raises(ValueError) as error:
        as_scaling(options)
    assert message in str(error.value)


def test_a_scaling_survives_json():
    for kind, options in OPTIONS:
        scaling = Scaling(kind, **options)
        assert as_scaling(json.loads(json.dumps(dataclasses.asdict(scaling)))) == scaling == as_scaling(scaling)
        assert hash(scaling) == hash(Scaling(kind, **options))
        assert eval(repr(scaling)) == scaling
    assert repr(UNSCALED) == "Scaling(kind='none')" and repr(Scaling("ntk", 2.0)) == "Scaling(kind='ntk', factor=2.0)"
    for value in (None, 4.0, "yarn:4", [1]):
        with pytest.raises(ValueError, match="describes no scaling"):
            as_scaling(value)


def test_frequencies_that_do_not_exist():
    for kind in ("ntk", "dynamic"):
        with pytest.raises(ValueError, match=f"head_dim = 2 has one pair, which {kind} keeps as it is"):
            inverse_frequencies(2, 10000.0, parse_scaling(f"{kind}:4", 64))
    for base in (1.0, 0.5, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"rope_base = {base} gives no falling frequencies"):
            inverse_frequencies(8, base)
