"""The parts of the trainer: schedule, optimizers, accumulation, divergence, float16, scores."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from nanogptx import checkpoint, data, device, files, parallel, train
from nanogptx.gpt2 import GPT2, GPT2Config
from nanogptx.rope import UNSCALED, Scaling
from nanogptx.tinyllama import ARCHITECTURES, TinyLlama, TinyLlamaConfig, build_model
from nanogptx.tokenizer import CharTokenizer
from nanogptx.train import Options

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
OFF = torch.amp.GradScaler("cpu", enabled=False)


def tiny_gpt2(**more) -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 31} | more))


def tiny_llama() -> TinyLlama:
    torch.manual_seed(0)
    return TinyLlama(
        TinyLlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_hidden=24, block_size=24, vocab_size=31)
    )


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> train.Trainer:
    """A trainer on a small text, as open_trainer makes it."""
    monkeypatch.setenv("NANOGPTX_DATA", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TEXT)
    return make_trainer(tmp_path)


def make_trainer(folder, **more) -> train.Trainer:
    options = Options(**{"data": str(folder / "text.txt"), "out": folder / "run", "tokenizer": "char", "n_layer": 1,
                         "n_embd": 16, "n_head": 2, "n_kv_head": 1, "block_size": 16, "steps": 12, "batch_size": 4,
                         "dropout": 0.1, "device": "cpu", "dtype": "float32", "lr": 0.01} | more)  # fmt: skip
    return train.open_trainer(options)


# ---- schedule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_learning_rate(schedule, final):
    def factor(step):
        return train.lr_factor(step, steps=101, warmup=20, schedule=schedule, final=final)

    assert factor(0) == pytest.approx(1 / 21) and factor(1) == pytest.approx(2 / 21)
    assert factor(19) == pytest.approx(20 / 21) and factor(20) == 1
    assert factor(60) == pytest.approx((1 + final) / 2)  # half-way down both ways
    quarter = {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2}[schedule]
    assert factor(40) == pytest.approx(final + (1 - final) * quarter)
    assert factor(100) == factor(101) == factor(10_000) == pytest.approx(final)
    values = [factor(n) for n in range(101)]
    assert values[:21] == sorted(values[:21]) and values[20:] == sorted(values[20:], reverse=True)
    assert train.lr_factor(0, 1, 0, schedule, final) == 1  # a run of one step


# ---- optimizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny_gpt2(), tiny_llama()], ids=["gpt2", "tinyllama"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_who_optimizes_what(model, kind):
    optimizers = train.make_optimizers(model, Options(optimizer=kind, weight_decay=0.1, lr=0.02))
    seen = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(model.parameters())), "each parameter exactly once"
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == 0.02
            for p in group["params"]:
                assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0), names[id(p)]
                is_block_matrix = names[id(p)].startswith("blocks.") and p.dim() == 2
                assert isinstance(optimizer, torch.optim.Muon) == (kind == "muon" and is_block_matrix), names[id(p)]


# ---- one step -----------------------------------------------------------------------------------------------------------


def ragged(rows: int, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch in which each row counts another number of targets, one of them none."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(31, (2, rows, 20), generator=g)
    for row in range(rows):
        y[row, row * 3 :] = data.IGNORE
    return x, y


def in_parts(x, y, parts: int) -> list[train.Part]:
    rows, total = len(x) // parts, (y != data.IGNORE).sum().item()
    return [train.Part(a, b, (b != data.IGNORE).sum().item() / total) for a, b in zip(x.split(rows), y.split(rows))]


def gradients_after_a_step(parts: int, clip: float = 1e9) -> tuple[float, float, dict]:
    model = tiny_gpt2()
    grads, optimizer = {}, torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = ragged(6)
    split = in_parts(x, y, parts)
    loss, norm = train.train_step(
        model, [optimizer], split, clip, lambda: device.autocast(torch.device("cpu"), torch.float32), OFF
    )
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss, norm, grads


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_batch_count_by_their_targets(parts):
    """A8: one batch, or its rows in parts with 0 to 15 targets each: the same loss, norm and clipped gradients."""
    loss, norm, grads = gradients_after_a_step(1, clip=0.1)
    split_loss, split_norm, split_grads = gradients_after_a_step(parts, clip=0.1)
    assert split_loss == pytest.approx(loss, rel=1e-6) and split_norm == pytest.approx(norm, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-5, atol=1e-7)
    model = tiny_gpt2()
    x, y = ragged(6)
    assert loss == pytest.approx(model(x, y)[1].item(), rel=1e-6)


def test_clipping_scales_to_the_norm():
    _, norm, free = gradients_after_a_step(1)
    _, same, clipped = gradients_after_a_step(1, clip=norm / 2)
    assert same == norm
    total = math.sqrt(sum(g.square().sum().item() for g in clipped.values()))
    assert total == pytest.approx(norm / 2, rel=1e-4)
    for name, grad in free.items():
        torch.testing.assert_close(clipped[name] * 2, grad, rtol=1e-4, atol=1e-8)


def test_float16_overflow_skips_every_optimizer_and_halves_the_scale():
    model = tiny_llama()
    optimizers = train.make_optimizers(model, Options(optimizer="muon"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, enabled=True)  # the embedding's gradient overflows
    parts = in_parts(*ragged(6), 1)
    _, norm = train.train_step(
        model, optimizers, parts, 1.0, lambda: device.autocast(torch.device("cpu"), torch.float16), scaler
    )
    assert not math.isfinite(norm) and scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "none may step when one overflows"


def test_a_float16_run_finds_its_scale_and_keeps_it(trainer, tmp_path):
    options = dataclasses.replace(trainer.options, dtype="float16")
    trainer = train.Trainer(tmp_path / "run", options, trainer.model, trainer.tokenizer, trainer.task)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**30})
    lines = [trainer.step() for _ in range(3)]
    assert [line["step"] for line in lines] == [0, 1, 2] and all(math.isfinite(line["grad_norm"]) for line in lines)
    assert trainer.scaler.get_scale() < 2.0**30
    trainer.save()
    again = train.Trainer(tmp_path / "run", options, tiny_like(trainer), trainer.tokenizer, trainer.task)
    again.load(checkpoint.latest(tmp_path / "run"))
    assert again.scaler.state_dict() == trainer.scaler.state_dict()


def tiny_like(trainer) -> torch.nn.Module:
    return type(trainer.model)(trainer.model.config)


def test_every_part_with_a_state_is_saved(trainer, tmp_path):
    """A6: whatever in the trainer has a state_dict must come back from a checkpoint; a new such part fails here."""
    stateful = {name for name, value in vars(trainer).items()
                if any(hasattr(v, "state_dict") for v in (value if isinstance(value, list) else [value]))}  # fmt: skip
    assert stateful == {"model", "forward", "optimizers", "scaler"}  # forward is the model, compiled or not
    for _ in range(3):
        trainer.step()
    trainer.state |= {"seconds": 1.25}
    trainer.save()
    again = train.Trainer(tmp_path / "run", trainer.options, tiny_like(trainer), trainer.tokenizer, trainer.task)
    again.load(checkpoint.latest(tmp_path / "run"))
    assert again.state == trainer.state and again.state.keys() >= {"step", "steps", "seconds", "tokens"}
    for one, other in zip(trainer.optimizers, again.optimizers, strict=True):
        a, b = one.state_dict()["state"], other.state_dict()["state"]
        assert a.keys() == b.keys() and a
        assert all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])
    assert trainer.step() == again.step()


# ---- divergence ---------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_the_run(trainer, monkeypatch):
    """A10: the step, the parameter and the learning rate are named, and the last good checkpoint stays."""
    for _ in range(4):
        trainer.step()
    trainer.save()
    real = train.train_step

    def poisoned(model, optimizers, *args):
        handle = trainer.model.blocks[0].attention.q.weight.register_hook(lambda g: g * math.inf)
        try:
            return real(model, optimizers, *args)
        finally:
            handle.remove()

    weights = {n: p.clone() for n, p in trainer.model.named_parameters()}
    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(train.Diverged, match=r"step 4: the gradient of blocks\.0\.attention\.q\.weight .*learning rate 0\.\d+"
                                             r"\); the checkpoint of step 4 is kept; try a lower --lr"):  # fmt: skip
        trainer.step()
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters())
    assert checkpoint.step_of(checkpoint.latest(trainer.run, pytest.fail)) == 4


def test_an_exploding_loss_stops_the_run(trainer):
    trainer.step()
    with torch.no_grad():
        trainer.model.embed.weight.normal_(std=100)
    with pytest.raises(train.Diverged, match="is beyond .*; there was no checkpoint yet"):
        trainer.step()


def test_a_strange_first_loss_is_explained(trainer, capsys):
    v = trainer.model.config.vocab_size
    trainer.explain_first(math.log(v) + 0.05)
    assert "differs" not in capsys.readouterr().out
    trainer.explain_first(math.log(v) + 1)
    assert "it differs" in capsys.readouterr().out


# ---- scores -------------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_all_targets_and_draws_nothing(trainer):
    state = torch.get_rng_state()
    model = trainer.model
    batches = list(trainer.task.validation(10_000))
    assert len(batches) >= 1
    mean, error = train.evaluate(model, iter(batches), trainer.context, trainer.world)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    model.eval()
    nats, targets = 0.0, 0
    for x, y in batches:
        logits = model(torch.from_numpy(x))[0].log_softmax(-1)
        for place in np.argwhere(y != data.IGNORE):
            nats -= logits[tuple(place)][y[tuple(place)]].item()
            targets += 1
    assert mean == pytest.approx(nats / targets, rel=1e-5)
    assert targets == trainer.task.targets(trainer.task.dataset.validation)
    # One document: its text and its end; nats per character and bits per byte follow from the text's length.
    text = TEXT[int(0.9 * len(TEXT)) :]
    score = trainer.task.score(mean, error)
    assert targets == len(text) + 1
    assert score.nats_per_char == pytest.approx(nats / len(text), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_documents_when_they_fit_windows_when_not(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPTX_DATA", str(tmp_path))
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(20):
        (folder / f"{n}.txt").write_text("abc" * (n + 1))  # up to 60 characters: 61 inputs with bos
    dataset = data.prepare(folder, CharTokenizer.train("abc"))
    assert train.Task(dataset, 61).whole and not train.Task(dataset, 60).whole
    assert train.style_of("tales") and train.style_of("tales-letters")
    assert train.style_of("shakespeare") is None and train.style_of("letters") is None
    assert train.Task(dataset, 61).floor("shakespeare", 5) is None


def test_metrics_of_steps_to_be_repeated_are_dropped(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": n, "loss": n / 7}) + "\n" for n in range(6)) + '{"step": 6, "lo')
    train.keep_metrics(log, 4)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    train.keep_metrics(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


# ---- runs and presets ---------------------------------------------------------------------------------------------------


def test_where_runs_go(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "OUT", tmp_path)
    options = train.parse([])
    assert train.new_run(options) == tmp_path / "tales"
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales/config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an unfinished run: .*--resume"):
        train.new_run(options)
    (tmp_path / "tales/result.json").write_text("{}")
    assert train.new_run(options) == tmp_path / "tales-2"
    (tmp_path / "tales-2").mkdir()
    (tmp_path / "tales-2/result.json").write_text("{}")
    assert train.new_run(options) == tmp_path / "tales-3"
    assert train.new_run(train.parse(["tales-gpt2"])) == tmp_path / "tales-gpt2"


def test_an_imported_run_cannot_be_resumed(tmp_path):
    config = {"format": "nanogptx-run", "architecture": "gpt2", "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was imported, not trained here"):
        train.parse(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("preset, least, most", [("tales", 0.8e6, 1.1e6), ("tales-gpt2", 0.9e6, 1.1e6),
                                                 ("shakespeare", 0.1e6, 0.85e6), ("gpt2-small", 124_439_808, 124_439_808),
                                                 ("tinyllama-120m", 110e6, 130e6), ("tinyllama-1.1b", 1_100_048_384, 1_100_048_384)])  # fmt: skip
def test_presets_have_their_size(preset, least, most):
    options = train.parse([preset])
    assert options.preset == preset
    with torch.device("meta"):
        model = build_model(*train.make_shape(options, vocab_size=67 if preset == "shakespeare" else 1024))
    assert least <= sum(p.numel() for p in model.parameters()) <= most


def test_memory_is_checked_before_anything_is_built(monkeypatch):
    options = train.parse(["tinyllama-1.1b"])
    architecture, shape = train.make_shape(options, 1024)
    facts = (ARCHITECTURES[architecture][0](**shape), options, parallel.World(torch.device("cpu")))
    monkeypatch.setattr(device, "free_memory", lambda _: 16 * 2**30)
    with pytest.raises(ValueError, match=r"1,100,048,384 parameters: training needs 16\.4 GiB .* 16\.0 GiB are free"):
        train.check_memory(*facts)
    monkeypatch.setattr(device, "free_memory", lambda _: 17 * 2**30)
    train.check_memory(*facts)


def test_rope_scaling_stretches_the_context_of_a_named_model():
    def shape_of(*args):
        architecture, shape = train.make_shape(train.parse([*args]), 1024)
        return ARCHITECTURES[architecture][0](**shape)

    assert shape_of().rope_scaling == UNSCALED and shape_of().block_size == 256
    for kind in ("yarn", "dynamic", "llama3"):
        stretched = shape_of("--rope-scaling", f"{kind}:2.5")
        assert stretched.rope_scaling == Scaling(kind, 2.5, 256) and stretched.block_size == 640
    shorter = shape_of("--rope-scaling", "linear:4", "--block-size", "100")
    assert shorter.rope_scaling == Scaling("linear", 4.0) and shorter.block_size == 100
    assert shape_of("tales-gpt2", "--position", "rope", "--rope-scaling", "ntk:2").block_size == 512
    for args, message in (
        (["--rope-scaling", "yarm:4"], "did you mean yarn"),
        (["--rope-scaling", "yarn"], "say yarn:4"),
        (["tales-gpt2", "--rope-scaling", "yarn:4"], "yarn scaling stretches rope, and position = 'learned'"),
        (["--position", "alibi", "--rope-scaling", "yarn:4"], "yarn scaling stretches rope, and position = 'alibi'"),
    ):
        with pytest.raises(ValueError, match=message):
            shape_of(*args)


@pytest.mark.parametrize("how", [{"position": "alibi"}, {"rope_scaling": "yarn:2"}, {"rope_scaling": "dynamic:2"}])
def test_a_run_keeps_its_positions(tmp_path, monkeypatch, how):
    """Trained, saved, loaded: the same function; and a run that says nothing of scaling, made before, loads too."""
    monkeypatch.setenv("NANOGPTX_DATA", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TEXT)
    trainer, run = make_trainer(tmp_path, **how), tmp_path / "run"
    trainer.step()
    trainer.save()
    model, _, _ = checkpoint.load_run(run)
    assert model.config == trainer.model.config
    idx = torch.randint(model.config.vocab_size, (1, 40))
    assert torch.equal(model(idx)[0], trainer.model.eval()(idx)[0])
    if "rope_scaling" not in how:
        config = files.read_json(run / "config.json")
        del config["model"]["rope_scaling"], config["options"]["rope_scaling"]
        files.write_json(run / "config.json", config)
        assert checkpoint.load_run(run)[0].config == model.config
        assert train.parse(["--resume", "--out", str(run)]).rope_scaling == "none"


def test_compiled_weights_are_saved_under_their_own_names(trainer, tmp_path, monkeypatch):
    """torch.compile wraps a model and prefixes its names; a checkpoint must not show it."""
    compiled = []

    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model
            compiled.append(self)

        def forward(self, *args):
            return self._orig_mod(*args)

    monkeypatch.setattr(torch, "compile", Wrapped)
    options = dataclasses.replace(trainer.options, compile=True)
    other = train.Trainer(tmp_path / "run", options, tiny_like(trainer), trainer.tokenizer, trainer.task)
    other.step()
    other.save()
    saved = checkpoint.read_safetensors(checkpoint.latest(other.run) / "model.safetensors")
    assert compiled and set(saved) == set(trainer.model.state_dict())
