"""gpt2: equal to transformers' with copied weights, and everything else that a wrong copy would not show."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from nanogptx.alibi import POSITIONS
from nanogptx.gpt2 import CONFIGS, GPT2, MLP, GPT2Config, cross_entropy

TINY = CONFIGS["gpt2-tiny"]
# (n_layer, n_head, n_embd, block_size, vocab_size, B, T): no square matrices by accident, T > block_size / 2
SHAPES = [(3, 4, 48, 32, 101, 2, 29), (1, 1, 24, 16, 37, 1, 16), (2, 6, 36, 24, 300, 3, 13)]


def tokens(B, T, vocab_size, seed=0):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def scramble(model, scale=5.0, embed_scale=None):
    """Weights large enough for a wrong GELU, epsilon or scale to show; biases and gains that are not 0 and 1."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(("wte.weight", "wpe.weight")):
            p.data.mul_(embed_scale or scale)
        elif p.dim() == 2:
            p.data.mul_(scale)
        else:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


def theirs_as_ours(theirs: dict, n_layer: int) -> dict:
    """GPT-2's names and layout in ours. Conv1D keeps (in, out): transposed; c_attn is q, k and v side by side."""
    ours = {"embed.weight": theirs["transformer.wte.weight"], "position.weight": theirs["transformer.wpe.weight"]}
    names = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc",
             "mlp.down": "mlp.c_proj"}  # fmt: skip
    for i in range(n_layer):
        block = f"transformer.h.{i}."
        for our_name, name in names.items():
            w = theirs[f"{block}{name}.weight"]
            ours[f"blocks.{i}.{our_name}.weight"] = w.T if w.dim() == 2 else w
            ours[f"blocks.{i}.{our_name}.bias"] = theirs[f"{block}{name}.bias"]
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", theirs[f"{block}attn.c_attn.{kind}"].chunk(3, dim=-1)):
                ours[f"blocks.{i}.attention.{name}.{kind}"] = part.T if part.dim() == 2 else part
    return ours | {f"norm.{kind}": theirs[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")}


def pair(shape, dtype, scale=5.0, embed_scale=None):
    L, H, C, block_size, V, B, T = shape
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=V, n_positions=block_size, n_embd=C, n_layer=L, n_head=H, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = scramble(GPT2LMHeadModel(config).to(dtype), scale, embed_scale)
    ours = GPT2(GPT2Config(n_layer=L, n_head=H, n_embd=C, block_size=block_size, vocab_size=V)).to(dtype)
    ours.load_state_dict(theirs_as_ours(theirs.state_dict(), L))  # strict: nothing missing, nothing left over
    return ours, theirs, tokens(B, T, V)


def set_fused(model, fused):
    for block in model.blocks:
        block.attention.fused = fused


def test_parameter_count():
    with torch.device("meta"):
        model = GPT2(CONFIGS["gpt2-small"])
        logits, _ = model(torch.zeros(1, 4, dtype=torch.long))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert logits.shape == (1, 4, 50257)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("embed_scale", [None, 0.1])  # small embeddings: the first norm sees epsilon
def test_logits_equal_transformers(shape, embed_scale):
    for dtype, atol, rtol in ((torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-10)):
        ours, theirs, idx = pair(shape, dtype, embed_scale=embed_scale)
        for fused in (True, False):
            set_fused(ours, fused)
            torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=atol, rtol=rtol)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_transformers(shape):
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
    their_grads = {n: p.grad for n, p in theirs.named_parameters()}
    want = theirs_as_ours(their_grads, ours.config.n_layer)
    for name, p in ours.named_parameters():  # the embedding among them, with both its uses summed
        torch.testing.assert_close(p.grad, want[name], atol=1e-10, rtol=1e-8, msg=name)


def test_gelu_is_the_tanh_form():
    mlp = MLP(1, 1)
    for p in mlp.parameters():
        p.data.fill_(float(p.dim() == 2))  # weights 1, biases 0: the MLP is its activation
    for x in (-2.7, -1.0, 0.0, 0.5, 2.7):
        formula = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        assert abs(mlp(torch.tensor([x])).item() - formula) < 1e-6
    exact = F.gelu(torch.tensor([-2.7, 2.7]))
    assert (mlp(torch.tensor([[-2.7], [2.7]]))[:, 0] - exact).abs().min() > 4e-4  # and the test can tell


def test_state_is_plain_and_unshared():
    model = GPT2(dataclasses.replace(TINY, n_layer=1))
    state = model.state_dict()
    linear = [f"{part}.{kind}" for part in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up",
              "mlp.down", "attention_norm", "mlp_norm") for kind in ("weight", "bias")]  # fmt: skip
    want = {"embed.weight", "position.weight", "norm.weight", "norm.bias"} | {f"blocks.0.{name}" for name in linear}
    assert set(state) == want
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in state.values())
    # Built without memory, filled from a file: nothing is left behind on the meta device.
    with torch.device("meta"):
        copy = GPT2(model.config)
    copy.load_state_dict(load(save(state)), assign=True)
    idx = tokens(2, 9, TINY.vocab_size)
    assert torch.equal(copy(idx)[0], model(idx)[0])


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=512))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.02  # sqrt(2 * 8) = 4
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 1e-3, name


@pytest.mark.parametrize("position", POSITIONS)
def test_initial_loss_is_that_of_a_guess(position):
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(TINY, position=position, vocab_size=5000))
    x, y = tokens(4, 64, 5000), tokens(4, 64, 5000, seed=1)
    assert abs(model(x, y)[1].item() - math.log(5000)) < 0.1


def test_larger_embeddings_leave_the_first_scores_as_they_are():
    """Only the input gets louder: the last gain makes up for it, or the loss would start far above ln V."""
    shape = dataclasses.replace(TINY, n_embd=128, vocab_size=5000)
    x = tokens(4, 64, 5000)
    spread = {}
    for std in (0.02, 0.4):
        torch.manual_seed(0)
        model = GPT2(dataclasses.replace(shape, embed_std=std))
        assert abs(model.embed.weight.std() / std - 1) < 0.05
        spread[std] = model(x)[0].std()
    assert abs(spread[0.4] / spread[0.02] - 1) < 0.1


def test_head_is_the_embedding():
    model = GPT2(TINY)
    idx = tokens(1, 9, TINY.vocab_size)
    torch.testing.assert_close(model(idx)[0], model.features(idx) @ model.embed.weight.T)
    with torch.no_grad():
        unused = next(i for i in range(TINY.vocab_size) if i not in idx)
        model.embed.weight[unused] = model.embed.weight[idx[0, 0]]
    logits = model(idx)[0]
    torch.testing.assert_close(logits[..., unused], logits[..., idx[0, 0]])


# -------------------------------------------------------------------------------------------------------- the loss


def test_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, -5.0]])
    assert cross_entropy(logits[:2], torch.tensor([0, 1])).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert cross_entropy(logits, torch.tensor([0, 1, -100])).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_loss_ignores_masked_targets_and_averages_the_others():
    model = GPT2(TINY)
    x, y = tokens(3, 10, TINY.vocab_size), tokens(3, 10, TINY.vocab_size, seed=1)
    y[0, 2:] = -100
    y[2] = -100
    logits, loss = model(x, y)
    keep = y != -100
    torch.testing.assert_close(loss, F.cross_entropy(logits[keep], y[keep]), atol=1e-6, rtol=0)
    loss.backward()
    assert model(x)[1] is None


def test_loss_of_nothing_is_zero_and_teaches_nothing():
    model = GPT2(TINY)
    loss = model(tokens(1, 5, TINY.vocab_size), torch.full((1, 5), -100))[1]
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_a_few_rows_at_a_time(dtype):
    """10 rows of 2^20 logits are three pieces; value, dtype and gradient are those of one piece in float32."""
    logits = (3 * torch.randn(10, 2**20, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    targets = torch.randint(2**20, (10,), generator=torch.Generator().manual_seed(1))
    targets[[0, 9]] = -100
    want = F.cross_entropy(logits.float(), targets)
    (grad,) = torch.autograd.grad(want, logits)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16(position):
    """Under autocast and after .to(bfloat16) the model runs, and the loss is float32 and close."""
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(TINY, position=position))
    x, y = tokens(2, 64, TINY.vocab_size), tokens(2, 64, TINY.vocab_size, seed=1)
    want = model(x, y)[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, y)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = model.to(torch.bfloat16)(x, y)[1]
    for got in (loss, half):
        assert got.dtype == torch.float32 and abs(got - want) < 5e-3


# ------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_later_token_never_changes_an_earlier_logit(position, fused):
    model = GPT2(dataclasses.replace(TINY, position=position)).double()
    set_fused(model, fused)
    idx = tokens(2, 20, TINY.vocab_size)
    before = model(idx)[0]
    for t in (19, 10, 1):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        difference = (model(changed)[0] - before).abs().amax(dim=(0, 2))
        assert difference[:t].max() < 1e-12 and difference[t:].min() > 1e-6
        torch.testing.assert_close(model(idx[:, :t])[0], before[:, :t], atol=1e-12, rtol=0)


def test_position_schemes():
    """One layer without positions cannot tell the order of the past; all others can."""
    idx = tokens(1, 12, TINY.vocab_size)
    swapped = idx[:, [3, 1, 2, 0, *range(4, 12)]]
    for position in POSITIONS:
        torch.manual_seed(0)
        model = scramble(GPT2(dataclasses.replace(TINY, n_layer=1, position=position))).double()
        assert ("position.weight" in model.state_dict()) == (position == "learned")
        moved = (model(idx)[0] - model(swapped)[0])[0, -1].abs().max().item()
        assert (moved < 1e-12) == (position == "none")
    # The base is the config's: with another one, the same weights give other logits.
    config = dataclasses.replace(TINY, position="rope", rope_base=100.0)
    other = GPT2(config).double()
    model = GPT2(dataclasses.replace(config, rope_base=10000.0)).double()
    model.load_state_dict(scramble(other).state_dict())
    assert (model(idx)[0] - other(idx)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["embedding", "attention", "residual"])
def test_dropout_in_three_places(where):
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(TINY, dropout=0.5))
    assert model.drop.p == 0.5 and all(b.drop.p == 0.5 and b.attention.dropout == 0.5 for b in model.blocks)
    model.drop.p = 0.5 * (where == "embedding")
    for block in model.blocks:
        block.attention.dropout = 0.5 * (where == "attention")
        block.drop.p = 0.5 * (where == "residual")
    idx = tokens(1, 9, TINY.vocab_size)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_residual_dropout_falls_on_both_parts_and_not_on_the_sum():
    torch.manual_seed(0)
    block = GPT2(dataclasses.replace(TINY, dropout=0.5)).blocks[0]
    block.attention.dropout, block.drop.p = 0.0, 1 - 1e-7  # as good as certain: nothing is added
    x = torch.randn(1, 5, TINY.n_embd)
    assert torch.equal(block(x), x)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPT2(TINY)
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
        ({"n_head": 5}, "n_embd = 64 is not divisible by n_head = 5: choose n_head from 1, 2, 4, 8, 16, 32, 64"),
        ({"n_layer": 0}, "n_layer = 0 is not a size: choose a whole number of at least 1"),
        ({"n_embd": -64}, "n_embd = -64 is not a size"),
        ({"n_head": 2.0}, "n_head = 2.0 is not a size"),
        ({"block_size": 0}, "block_size = 0 is not a size"),
        ({"vocab_size": None}, "vocab_size = None is not a size"),
        ({"dropout": 1.0}, "dropout = 1.0 is not a probability below 1: choose 0"),
        ({"dropout": -0.1}, "dropout = -0.1 is not a probability"),
        ({"dropout": float("nan")}, "dropout = nan is not a probability"),
        ({"position": "rotary"}, "position = 'rotary' is unknown: choose one of learned, rope, alibi, none"),
        ({"position": "rope", "n_embd": 12, "n_head": 4}, "head_dim = 3 cannot be rotated in pairs"),
        (
            {"position": "rope", "rope_base": 1.0},
            "rope_base = 1.0 gives no falling frequencies: choose a number above 1",
        ),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, **change)
    assert message in str(error.value)


def test_config():
    assert (TINY.n_kv_head, TINY.head_dim, TINY.hidden_dim) == (4, 16, 256)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.n_layer = 3
    assert GPT2Config(**dataclasses.asdict(TINY)) == TINY
    assert GPT2(TINY).config is TINY


def test_input_errors():
    model = GPT2(TINY)
    with pytest.raises(ValueError, match="65 tokens, but 1 to block_size = 64 fit: cut them"):
        model(tokens(1, 65, TINY.vocab_size))
    with pytest.raises(ValueError, match="0 tokens, but 1 to"):
        model(tokens(1, 0, TINY.vocab_size))
    for bad in (-1, 256):
        with pytest.raises(ValueError, match=rf"ids from {min(bad, 0)} to {max(bad, 0)} do not fit vocab_size = 256"):
            model(torch.tensor([[0, bad]]))


@pytest.mark.parametrize("position", POSITIONS)
def test_compiles_as_one_graph(position):
    """Also when the length changes, which makes T a symbol: nothing in the forward pass may ask for its value."""
    model = GPT2(dataclasses.replace(TINY, position=position))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for T in (9, 17, 33):
        x, y = tokens(2, T, TINY.vocab_size), tokens(2, T, TINY.vocab_size, seed=1)
        torch.testing.assert_close(compiled(x, y)[1], model(x, y)[1])
