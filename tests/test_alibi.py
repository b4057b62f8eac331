"""alibi: by hand, against BLOOM's and MPT's in transformers, with a cache, and in whole models."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from nanogptx.alibi import POSITIONS, bias, position_tables, slopes
from nanogptx.attention import attention, fused_attention
from nanogptx.gpt2 import GPT2, GPT2Config
from nanogptx.rope import Scaling, attention_factor, inverse_frequencies, rotary
from nanogptx.tinyllama import TinyLlama, TinyLlamaConfig


def test_slopes_by_hand():
    assert slopes(1).tolist() == [2**-8] and slopes(2).tolist() == [2**-4, 2**-8]
    assert slopes(8).tolist() == [2**-h for h in range(1, 9)]
    # Six heads: the four of 2^-2 .. 2^-8, then the first and third of eight.
    assert slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    torch.testing.assert_close(slopes(12)[8:], torch.tensor([0.70711, 0.35355, 0.17678, 0.08839]), atol=5e-6, rtol=0)
    for n_head in (0, -4):
        with pytest.raises(ValueError, match=f"n_head = {n_head} is not a number of heads: choose at least 1"):
            slopes(n_head)


@pytest.mark.parametrize("n_head", range(1, 65))
def test_slopes_equal_transformers(n_head):
    ours = slopes(n_head)
    bloom = build_alibi_tensor(torch.ones(1, 2), n_head, torch.float32)[:, 0, 1]  # m * j
    mpt = -build_mpt_alibi_tensor(n_head, 2)[:, 0, 0]  # m * (j - T + 1)
    torch.testing.assert_close(ours, bloom, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, mpt, rtol=1e-6, atol=0)
    assert ours.dtype == torch.float32 and len(set(ours.tolist())) == n_head


def test_bias_by_hand():
    got = bias(torch.tensor([0.5, 0.25]), torch.arange(3), torch.arange(3))
    inf = float("inf")
    want = [[[0, -inf, -inf], [-0.5, 0, -inf], [-1, -0.5, 0]], [[0, -inf, -inf], [-0.25, 0, -inf], [-0.5, -0.25, 0]]]
    assert got.tolist() == want and got.dtype == torch.float32


@pytest.mark.parametrize("n_head", [3, 8, 12])
def test_rows_for_a_cache_are_rows_of_the_whole(n_head):
    """Positions are those of the text, so it does not matter how many of the tokens are new; rows may differ."""
    S, m = 23, slopes(n_head)
    whole = bias(m, torch.arange(S), torch.arange(S))
    for T in (1, 5, 22):
        assert torch.equal(bias(m, torch.arange(S - T, S), torch.arange(S)), whole[:, S - T :])
    starts, T = torch.tensor([0, 4, 17]), 6
    ragged = bias(m, starts[:, None] + torch.arange(T), torch.arange(S))  # three rows with caches of other lengths
    assert ragged.shape == (3, n_head, T, S)
    for row, start in zip(ragged, starts):
        assert torch.equal(row, whole[:, start : start + T])
    # Keys may have places of their own in every row, too: a text that does not begin at 0 is the same text.
    moved = bias(m, starts[:, None] + torch.arange(S), starts[:, None] + torch.arange(S))
    assert all(torch.equal(row, whole) for row in moved)


def make(H, H_kv, T, S, D=10):
    g = torch.Generator().manual_seed(H + T)
    return [2 * torch.randn(2, heads, n, D, generator=g).double() for heads, n in ((H, T), (H_kv, S), (H_kv, S))]


@pytest.mark.parametrize("attend", [attention, fused_attention])
@pytest.mark.parametrize(("H", "H_kv", "T", "S"), [(6, 6, 9, 9), (6, 2, 5, 12), (3, 1, 1, 7), (12, 4, 60, 60)])
def test_attention_equals_torch_s_with_theirs(attend, H, H_kv, T, S):
    """BLOOM's bias is m * j and MPT's m * (j - S + 1): other numbers, and the same attention as ours."""
    q, k, v = make(H, H_kv, T, S)
    got = attend(q, k, v, bias(slopes(H), torch.arange(S - T, S), torch.arange(S)).double(), causal=False)
    hidden = torch.ones(T, S).tril(S - T).log().double()  # 0 and -inf
    bloom = build_alibi_tensor(torch.ones(1, S), H, torch.float64)  # (H, 1, S)
    for theirs in (bloom, build_mpt_alibi_tensor(H, S).double()):
        want = F.scaled_dot_product_attention(q, k, v, (theirs + hidden)[None], enable_gqa=True)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - attend(q, k, v)).abs().max() > 0.1


# ---- in a model ---------------------------------------------------------------------------------------------------------

CONFIGS = {
    "gpt2": (GPT2, GPT2Config(n_layer=2, n_head=6, n_embd=48, block_size=16, vocab_size=50)),
    "tinyllama": (
        TinyLlama, TinyLlamaConfig(n_layer=2, n_head=6, n_kv_head=2, n_embd=48, n_hidden=70, block_size=16, vocab_size=50)
    ),
}  # fmt: skip
# Every way to tell positions apart, with the block of 16 made four times longer where it can be.
SCALINGS = {
    "linear": Scaling("linear", 4.0),
    "ntk": Scaling("ntk", 4.0),
    "dynamic": Scaling("dynamic", 2.0, 16),
    "yarn": Scaling("yarn", 4.0, 16, beta_fast=2.0, beta_slow=0.5),
    "llama3": Scaling("llama3", 4.0, 16, low_freq_factor=0.5, high_freq_factor=2.0),
}
SCHEMES = {name: {"position": name} for name in POSITIONS}
SCHEMES |= {name: {"position": "rope", "rope_scaling": scaling} for name, scaling in SCALINGS.items()}
both_blocks = pytest.mark.parametrize("architecture", CONFIGS)


def build(architecture, scheme, **more):
    model, config = CONFIGS[architecture]
    torch.manual_seed(0)
    return model(dataclasses.replace(config, **SCHEMES[scheme], **more))


def ids(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@both_blocks
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_scheme_trains_and_reads_beyond_its_training_length(architecture, scheme):
    """Loss falls on a text that has to be read by position; then 70 tokens are read with a block of 16."""
    model = build(architecture, scheme)
    text = ids(1, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss = model(text[:, :-1], text[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    if scheme == "learned":
        with pytest.raises(ValueError, match="17 tokens, but 1 to block_size = 16 fit: cut them"):
            model(text)
        return
    far = ids(2, 70, seed=1)
    logits, loss = model(far, ids(2, 70, seed=2))
    assert logits.isfinite().all() and loss < 20
    # What comes later is still not seen; dynamic scaling alone reads the length of the text.
    alike = (model(far[:, :40])[0] - logits[:, :40]).abs().max() < 1e-4
    assert alike == (scheme != "dynamic")


@both_blocks
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_another_function(architecture, scheme):
    """The same weights give other logits under every other scheme: no setting is ignored."""
    model = build(architecture, scheme).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.2)
    length = 16 if scheme == "learned" else 36  # at 40, dynamic is ntk
    x = ids(1, length)
    for other in SCHEMES.keys() - {scheme, "learned"}:
        twin = build(architecture, other).double()
        twin.load_state_dict(model.state_dict(), strict=False)
        assert (twin(x)[0] - model(x)[0]).abs().max() > 1e-3, other


@both_blocks
@pytest.mark.parametrize("fused", [True, False])
def test_a_model_with_alibi_by_hand(architecture, fused):
    """Its blocks, one after the other, with torch's attention and BLOOM's bias."""
    model = build(architecture, "alibi").double()
    x, T = ids(2, 33), 33
    for block in model.blocks:
        block.attention.fused = fused
    mask = build_alibi_tensor(torch.ones(1, T), 6, torch.float64)[None, :, 0, None] + torch.ones(T, T).tril().log()
    y = model.embed(x)
    for block in model.blocks:
        h, a = block.attention_norm(y), block.attention
        q, k, v = (part(h).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (a.q, a.k, a.v))
        out = F.scaled_dot_product_attention(q, k, v, mask.double(), enable_gqa=True)
        y = y + a.o(out.transpose(1, 2).flatten(2))
        y = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(model(x)[0], model.scores(model.norm(y)), atol=1e-10, rtol=0)


@both_blocks
def test_yarn_and_dynamic_in_a_model(architecture):
    """The sharpening and the length of the text reach the blocks."""
    for scheme, T in (("yarn", 30), ("dynamic", 30), ("dynamic", 10)):
        model, scaling = build(architecture, scheme).double(), SCALINGS[scheme]
        x = ids(1, T)
        rotate = rotary(torch.arange(T), inverse_frequencies(8, 10000.0, scaling, T), attention_factor(scaling))
        y = model.embed(x)
        for block in model.blocks:
            y = block(y, rotate)
        torch.testing.assert_close(model(x)[0], model.scores(model.norm(y)), atol=1e-12, rtol=0)


@both_blocks
@pytest.mark.parametrize("half", [False, True])
def test_bfloat16(architecture, half):
    """The bias is of the format that attention computes in, so that no kernel is refused and nothing is widened."""
    model, x, y = build(architecture, "alibi"), ids(2, 40), ids(2, 40, seed=1)
    want = model(x, y)[1]
    seen = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[2].dtype))
    if half:
        loss = model.to(torch.bfloat16)(x, y)[1]
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y)[1]
    assert seen == [torch.bfloat16] * 2 and abs(loss - want) < 5e-3


@both_blocks
def test_a_step_that_recomputes_has_the_same_gradients(architecture):
    x, y = ids(2, 30), ids(2, 30, seed=1)
    grads = []
    for recompute in (False, True):
        model = build(architecture, "alibi", dropout=0.1)
        model.recompute = recompute
        torch.manual_seed(1)
        model(x, y)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@both_blocks
def test_tables_for_new_tokens_are_those_of_the_whole(architecture):
    """With positions of the whole text: what a cache asks for."""
    for scheme in SCHEMES:
        config = build(architecture, scheme).config
        q, k, v = make(6, 2, 20, 20, D=8)
        rotate, whole = position_tables(config, torch.arange(20), torch.arange(20), 20, torch.float64)
        late, part = position_tables(config, torch.arange(15, 20), torch.arange(20), 20, torch.float64)
        assert (rotate is None, whole is None) == (late is None, part is None)
        if whole is not None:
            assert whole.dtype == torch.float64 and torch.equal(whole[:, 15:], part)
        if rotate is not None:
            ends = zip(rotate(q, k), late(q[:, :, 15:], k[:, :, 15:]))
            assert all(torch.equal(a[:, :, 15:], b) for a, b in ends)


@pytest.mark.parametrize("scheme", ["yarn", "dynamic"])
def test_scaled_models_compile_as_one_graph(scheme):
    """Also when the length changes: dynamic scaling does not ask for a graph for every length."""
    model, graphs = build("tinyllama", scheme), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    for T in (9, 17, 33, 40, 50):
        torch.testing.assert_close(compiled(ids(2, T))[0], model(ids(2, T))[0])
    assert len(graphs) <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "alibi", "rope_scaling": Scaling("ntk", 2.0)}, "ntk scaling stretches rope, and position = 'alibi'"),
        ({"position": "rope", "rope_scaling": None}, "describes no scaling"),
        ({"position": "rope", "rope_scaling": {"kind": "yarn", "factor": 2.0}}, "original = 0 cannot be used"),
        ({"position": "rope", "rope_scaling": {"kind": "yarn", "faktor": 2.0}}, "describes no scaling"),
        ({"position": "rope", "n_embd": 12, "rope_scaling": Scaling("ntk", 2.0)}, "head_dim = 2 has one pair, which ntk"),
    ],
)  # fmt: skip
@both_blocks
def test_what_no_config_can_have(architecture, change, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(CONFIGS[architecture][1], **change)
    assert message in str(error.value)


@both_blocks
def test_configs_are_hashable_and_survive_json(architecture):
    for scheme in SCHEMES:
        config = build(architecture, scheme).config
        again = type(config)(**dataclasses.asdict(config))
        assert again == config and hash(again) == hash(config) and isinstance(again.rope_scaling, Scaling)
    older = dataclasses.asdict(CONFIGS[architecture][1])
    del older["rope_scaling"]  # a run that was made before there was any
    assert type(config)(**older) == CONFIGS[architecture][1]
