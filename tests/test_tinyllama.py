"""tinyllama: equal to transformers' Llama with copied weights, grouped heads and all, and its parts one by one."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from nanogptx.alibi import POSITIONS
from nanogptx.rope import inverse_frequencies, rotary
from nanogptx.tinyllama import CONFIGS, RMSNorm, SwiGLU, TinyLlama, TinyLlamaConfig, hidden_size, rms_norm

TINY = CONFIGS["tinyllama-tiny"]
# (n_layer, n_head, n_kv_head, n_embd, n_hidden, block_size, vocab_size, B, T): n_hidden is never 4C, T > block_size / 2
SHAPES = [
    (2, 4, 2, 64, 176, 32, 101, 2, 29),
    (3, 6, 2, 48, 80, 32, 67, 2, 20),
    (2, 6, 3, 96, 100, 48, 131, 1, 48),
    (1, 4, 1, 40, 60, 16, 37, 3, 9),
    (2, 3, 3, 24, 64, 16, 41, 2, 13),
]


def tokens(B, T, vocab_size, seed=0):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def scramble(model, scale=5.0, embed_scale=None):
    """Weights large enough for a wrong activation, epsilon or pairing to show, and gains that are not 1."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.data.mul_(embed_scale if embed_scale and "embed" in name else scale)
        else:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


def theirs_as_ours(theirs: dict, n_layer: int) -> dict:
    """Llama's names in ours; the layout is the same."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    ours = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    ours["head.weight"] = "lm_head.weight"
    for i in range(n_layer):
        ours |= {f"blocks.{i}.{our}.weight": f"model.layers.{i}.{name}.weight" for our, name in names.items()}
    assert set(ours.values()) == set(theirs)
    return {our: theirs[name] for our, name in ours.items()}


def pair(shape, dtype, scale=5.0, embed_scale=None):
    L, H, H_kv, C, hidden, block_size, V, B, T = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=hidden, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=H_kv, max_position_embeddings=block_size, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        attn_implementation="eager" if dtype == torch.float32 else "sdpa",
    )  # fmt: skip
    theirs = scramble(LlamaForCausalLM(config).to(dtype), scale, embed_scale)
    ours = TinyLlama(
        TinyLlamaConfig(
            n_layer=L, n_head=H, n_kv_head=H_kv, n_embd=C, n_hidden=hidden, block_size=block_size, vocab_size=V
        )
    ).to(dtype)
    ours.load_state_dict(theirs_as_ours(theirs.state_dict(), L))
    return ours, theirs, tokens(B, T, V)


@pytest.fixture
def wide_norm(monkeypatch):
    """transformers rounds to float32 inside its norm (and its eager softmax), float64 models too; here it does not."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def set_fused(model, fused):
    for block in model.blocks:
        block.attention.fused = fused


def test_parameter_count():
    for name, count in (("tinyllama-1.1b", 1_100_048_384), ("tinyllama-120m", 124_668_672)):
        with torch.device("meta"):
            model = TinyLlama(CONFIGS[name])
            logits, _ = model(torch.zeros(1, 4, dtype=torch.long))
        assert sum(p.numel() for p in model.parameters()) == count
        assert logits.shape == (1, 4, 32000)
    assert len(TinyLlama(TINY).state_dict()) == 3 + 9 * TINY.n_layer  # 201 at 22 layers, as in the published file


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("embed_scale", [None, 0.1])  # small embeddings: the first norm sees epsilon
def test_logits_equal_transformers(shape, embed_scale):
    ours, theirs, idx = pair(shape, torch.float32, embed_scale=embed_scale)
    for fused in (True, False):
        set_fused(ours, fused)
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_logits_equal_transformers(shape, wide_norm):
    ours, theirs, idx = pair(shape, torch.float64)
    for fused in (True, False):
        set_fused(ours, fused)
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_transformers(shape, wide_norm):
    for dtype in (torch.float32, torch.float64):
        ours, theirs, idx = pair(shape, dtype)
        labels = idx.clone()
        labels[0, 3:6] = -100
        loss = ours(idx[:, :-1], labels[:, 1:])[1]
        # transformers shifts inside, and computes this in float32 for float64 models too
        torch.testing.assert_close(loss, theirs(idx, labels=labels).loss.to(dtype), atol=1e-6, rtol=1e-6)
    their_loss = F.cross_entropy(theirs(idx).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, their_loss, atol=1e-10, rtol=1e-10)
    loss.backward()
    their_loss.backward()
    want = theirs_as_ours({n: p.grad for n, p in theirs.named_parameters()}, ours.config.n_layer)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, want[name], atol=1e-10, rtol=1e-8, msg=name)


# ------------------------------------------------------------------------------------------------------- the parts


def test_rms_norm_by_hand():
    # The mean square of (3, -1, 1, -1) is 3.
    x = torch.tensor([3.0, -1.0, 1.0, -1.0])
    want = torch.tensor([3.0, -1.0, 2.0, 0.0]) / math.sqrt(3 + 1e-5)
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 1.0, 2.0, 0.0]), 1e-5), want)
    assert RMSNorm(4).eps == 1e-5 and (RMSNorm(4).weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])  # where epsilon matters; usual; where float16 squares overflow
def test_rms_norm_equals_transformers_bit_for_bit(dtype, scale):
    g = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(4, 64, 128, generator=g)).to(dtype)
    ours, theirs = RMSNorm(128).to(dtype), LlamaRMSNorm(128, eps=1e-5).to(dtype)
    ours.weight.data = theirs.weight.data = (1 + 0.3 * torch.randn(128, generator=g)).to(dtype)
    assert ours(x).dtype == dtype and torch.equal(ours(x), theirs(x))
    if dtype == torch.bfloat16:  # the gain before the rounding would not be the same
        assert not torch.equal(ours(x), (ours.weight.float() * rms_norm(x.float(), torch.ones(128), 1e-5)).to(dtype))


def test_rms_norm_equals_torch():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(8, 32, generator=g, dtype=dtype, requires_grad=True)
        gain = torch.randn(32, generator=g, dtype=dtype, requires_grad=True)
        ours, theirs = rms_norm(x, gain, 1e-5), F.rms_norm(x, (32,), gain, 1e-5)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), (x, gain)) for y in (ours, theirs))):
            torch.testing.assert_close(a, b)
    assert ours.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm(x, gain, 1e-5), (x, gain))


def test_swiglu():
    torch.manual_seed(0)
    mlp = SwiGLU(1, 1)
    for p, value in zip((mlp.gate.weight, mlp.up.weight, mlp.down.weight), (1.0, 2.0, 3.0)):
        p.data.fill_(value)
    x = torch.tensor([-2.7])  # gate -2.7, up -5.4
    assert mlp(x).item() == pytest.approx(3 * (-2.7 / (1 + math.exp(2.7))) * -5.4, rel=1e-5)
    mlp, theirs = SwiGLU(24, 40), LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2))
    for name in ("gate", "up", "down"):
        getattr(theirs, f"{name}_proj").weight = getattr(mlp, name).weight
    x = 3 * torch.randn(2, 5, 24)
    assert torch.equal(mlp(x), theirs(x))


def test_hidden_size():
    """LLaMA's own arithmetic, as its code has it: int() truncates, then rounding goes up."""

    def llama(dim, multiple_of):
        hidden_dim = int(2 * (4 * dim) / 3)
        return multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)

    assert (hidden_size(2048), hidden_size(4096), hidden_size(768)) == (5632, 11008, 2048)
    for dim in (1, 24, 64, 100, 128, 768, 2048, 5120):
        for multiple_of in (1, 16, 32, 256):
            assert hidden_size(dim, multiple_of) == llama(dim, multiple_of)
    config = TinyLlamaConfig(n_embd=96, n_head=6, n_kv_head=2, multiple_of=32)
    assert config.hidden_dim == 256 and dataclasses.replace(config, n_embd=192).hidden_dim == 512
    assert dataclasses.replace(config, n_hidden=100).hidden_dim == 100
    assert TinyLlama(dataclasses.replace(TINY, n_hidden=100)).blocks[0].mlp.up.weight.shape == (100, 64)


# ------------------------------------------------------------------------------------------------------- the model


def test_state_is_plain_and_unshared():
    model = TinyLlama(dataclasses.replace(TINY, n_layer=1))
    state = model.state_dict()
    parts = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
    parts += ["attention_norm", "mlp_norm"]
    assert set(state) == {"embed.weight", "norm.weight", "head.weight"} | {f"blocks.0.{p}.weight" for p in parts}
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in state.values())
    with torch.device("meta"):
        copy = TinyLlama(model.config)
    copy.load_state_dict(load(save(state)), assign=True)
    idx = tokens(2, 9, TINY.vocab_size)
    assert torch.equal(copy(idx)[0], model(idx)[0])


def test_initial_weights():
    torch.manual_seed(0)
    model = TinyLlama(dataclasses.replace(TINY, n_layer=8, n_embd=128, vocab_size=512))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.02  # sqrt(2 * 8) = 4
            std = 1 / 128 if name == "head.weight" else std
            std = 128**-0.5 if name.endswith(("gate.weight", "up.weight")) else std  # an input of length 1 stays so
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.05 * std, name


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_embd", [64, 1024])
def test_initial_loss_is_that_of_a_guess(position, n_embd):
    torch.manual_seed(0)
    model = TinyLlama(dataclasses.replace(TINY, position=position, n_embd=n_embd, n_layer=1, vocab_size=5000))
    x, y = tokens(2, 64, 5000), tokens(2, 64, 5000, seed=1)
    assert abs(model(x, y)[1].item() - math.log(5000)) < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_initial_loss_with_larger_embeddings(tied):
    torch.manual_seed(0)
    model = TinyLlama(dataclasses.replace(TINY, n_embd=128, vocab_size=5000, embed_std=0.4, tied=tied))
    assert abs(model.embed.weight.std() / 0.4 - 1) < 0.05
    x, y = tokens(2, 64, 5000), tokens(2, 64, 5000, seed=1)
    assert abs(model(x, y)[1].item() - math.log(5000)) < 0.1


def test_a_tied_head_is_the_embedding():
    model = TinyLlama(dataclasses.replace(TINY, tied=True))
    assert not any(name.startswith("head") for name in model.state_dict())
    idx = tokens(1, 5, TINY.vocab_size)
    torch.testing.assert_close(model(idx)[0], model.features(idx) @ model.embed.weight.T)


def test_head_is_not_the_embedding():
    model = TinyLlama(TINY)
    model(tokens(1, 5, TINY.vocab_size))[0].sum().backward()
    assert model.embed.weight.grad.any(1).sum() <= 5 and model.head.weight.grad.any(1).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16(position):
    torch.manual_seed(0)
    model = TinyLlama(dataclasses.replace(TINY, position=position))
    x, y = tokens(2, 64, TINY.vocab_size), tokens(2, 64, TINY.vocab_size, seed=1)
    want = model(x, y)[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, y)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = model.to(torch.bfloat16)(x, y)[1]
    for got in (loss, half):
        assert got.dtype == torch.float32 and abs(got - want) < 5e-3


def test_bfloat16_model_keeps_its_angles():
    """A bfloat16 model far out in its context is as close to float32 as near the start: no angle was rounded."""
    torch.manual_seed(0)
    model = scramble(TinyLlama(dataclasses.replace(TINY, block_size=2048, n_layer=1)).to(torch.bfloat16), 3.0)
    idx = tokens(1, 1500, TINY.vocab_size)
    got = model(idx)[0].float()
    want = model.float()(idx)[0]
    error = ((got - want).norm(dim=-1) / want.norm(dim=-1))[0]
    assert error[:100].mean() < 0.02 and error[-500:].mean() < 0.02


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_later_token_never_changes_an_earlier_logit(position, fused):
    model = TinyLlama(dataclasses.replace(TINY, position=position)).double()
    set_fused(model, fused)
    idx = tokens(2, 20, TINY.vocab_size)
    before = model(idx)[0]
    for t in (19, 10, 1):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        difference = (model(changed)[0] - before).abs().amax(dim=(0, 2))
        assert difference[:t].max() < 1e-12 and difference[t:].min() > 1e-7
        torch.testing.assert_close(model(idx[:, :t])[0], before[:, :t], atol=1e-12, rtol=0)


def test_block_sees_distances_only():
    torch.manual_seed(0)
    model = scramble(TinyLlama(dataclasses.replace(TINY, n_layer=1))).double()
    x, inv_freq = model.embed(tokens(1, 12, TINY.vocab_size)), inverse_frequencies(TINY.head_dim)
    near, far, stretched = (
        model.blocks[0](x, rotary(p, inv_freq)) for p in (torch.arange(12), torch.arange(12) + 40, 2 * torch.arange(12))
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)  # the tables are float32
    assert (near - stretched).abs().max() > 0.1


@pytest.mark.parametrize("where", ["embedding", "attention", "residual"])
def test_dropout_in_three_places(where):
    torch.manual_seed(0)
    model = TinyLlama(dataclasses.replace(TINY, dropout=0.5))
    model.drop.p = 0.5 * (where == "embedding")
    for block in model.blocks:
        assert block.drop.p == block.attention.dropout == 0.5
        block.attention.dropout = 0.5 * (where == "attention")
        block.drop.p = 0.5 * (where == "residual")
    idx = tokens(1, 9, TINY.vocab_size)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = TinyLlama(TINY)
    data = tokens(4, 17, TINY.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(60):
        loss = model(data[:, :-1], data[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_head": 3}, "n_head = 4 is not divisible by n_kv_head = 3: choose n_kv_head from 1, 2, 4"),
        ({"n_kv_head": 8}, "n_head = 4 is not divisible by n_kv_head = 8"),
        ({"n_kv_head": 0}, "n_kv_head = 0 is not a size: choose a whole number of at least 1"),
        ({"n_head": 5}, "n_embd = 64 is not divisible by n_head = 5: choose n_head from 1, 2, 4, 8, 16, 32, 64"),
        ({"n_hidden": 0}, "n_hidden = 0 is not a size"),
        ({"multiple_of": 0}, "multiple_of = 0 is not a size"),
        ({"n_embd": 4}, "head_dim = 1 cannot be rotated in pairs"),
        ({"n_embd": "64"}, "n_embd = '64' is not a size"),
        ({"dropout": 1.5}, "dropout = 1.5 is not a probability below 1"),
        ({"position": "alibi!"}, "position = 'alibi!' is unknown: choose one of learned, rope, alibi, none"),
        ({"rope_base": -1.0}, "rope_base = -1.0 gives no falling frequencies"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, **change)
    assert message in str(error.value)


def test_config():
    assert TinyLlamaConfig(**dataclasses.asdict(TINY)) == TINY and TinyLlama(TINY).config is TINY
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.n_kv_head = 4


def test_input_errors():
    model = TinyLlama(TINY)
    with pytest.raises(ValueError, match="0 tokens, but 1 to"):
        model(tokens(1, 0, TINY.vocab_size))
    with pytest.raises(ValueError, match="token ids from 0 to 256 do not fit vocab_size = 256"):
        model(torch.tensor([[0, 256]]))
