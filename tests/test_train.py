"""The parts of the trainer: schedule, optimizers, accumulation, divergence, float16, scores."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from nanogptx import adapter, checkpoint, data, device, files, huggingface, lora, parallel, train
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
    checkpoint.keep_metrics(log, 4)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    checkpoint.keep_metrics(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


# ---- runs and presets ---------------------------------------------------------------------------------------------------


def test_where_runs_go(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "OUT", tmp_path)
    options = train.parse([])
    assert checkpoint.new_run(options.out, options.preset) == tmp_path / "tales"
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales/config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an unfinished run: .*--resume"):
        checkpoint.new_run(options.out, options.preset)
    (tmp_path / "tales/result.json").write_text("{}")
    assert checkpoint.new_run(options.out, options.preset) == tmp_path / "tales-2"
    (tmp_path / "tales-2").mkdir()
    (tmp_path / "tales-2/result.json").write_text("{}")
    assert checkpoint.new_run(options.out, options.preset) == tmp_path / "tales-3"
    assert checkpoint.new_run(None, "tales-gpt2") == tmp_path / "tales-gpt2"


def test_an_imported_run_cannot_be_resumed(tmp_path):
    config = {"format": "nanogptx-run", "architecture": "gpt2", "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was imported, not trained here: .* start from it with --init-from"):
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


def test_presets_of_fine_tuning_ask_what_to_start_from():
    assert train.parse(["lora"]).lora_rank > 0 == train.parse(["finetune"]).lora_rank
    for preset in ("finetune", "lora"):
        with pytest.raises(ValueError, match="what is to be fine-tuned.*--init-from"):
            train.parse([preset]).check()
        train.parse([preset, "--init-from", "somewhere"]).check()


def test_memory_is_checked_before_anything_is_built(monkeypatch):
    options = train.parse(["tinyllama-1.1b"])
    architecture, shape = train.make_shape(options, 1024)
    facts = (architecture, shape, options, parallel.World(torch.device("cpu")))
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


# ---- fine-tuning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(trainer):
    """A run of three steps to fine-tune, on the same text."""
    for _ in range(3):
        trainer.step()
    trainer.save()
    return trainer.run


TUNED = {"lora_rank": 3, "lora_dropout": 0.1, "optimizer": "adamw", "warmup": 2}


def fine_tune(folder, name: str, **more) -> train.Trainer:
    """A trainer of a run that starts from `base`, as open_trainer makes it; no shape is asked for."""
    options = Options(**{"data": str(folder / "text.txt"), "out": folder / name, "init_from": str(folder / "run"), "steps": 12,
                         "batch_size": 4, "dropout": 0.1, "device": "cpu", "dtype": "float32", "lr": 0.01} | more)  # fmt: skip
    options.check()
    return train.open_trainer(options)


def weights(trainer) -> dict:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


@pytest.mark.parametrize("lora", [{}, TUNED], ids=["all weights", "adapters"])
def test_it_starts_where_the_base_is(base, tmp_path, trainer, lora):
    tuned = fine_tune(tmp_path, "tuned", **lora)
    assert tuned.tokenizer.fingerprint == trainer.tokenizer.fingerprint and tuned.model.config == trainer.model.config
    assert all(torch.equal(tuned.model.state_dict()[name], t) for name, t in weights(trainer).items())
    assert tuned.validate(10_000) == trainer.validate(10_000)
    before = weights(tuned)
    tuned.step(), tuned.step()
    changed = {name for name, t in weights(tuned).items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if ".lora_" in name or not lora}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_lora_run_holds_what_is_needed(base, tmp_path, trainer, kind):
    """Merged weights that load like any other, the adapter, its optimizer's state, and a folder for PEFT; no copy of the base."""
    tuned = fine_tune(tmp_path, "tuned", **TUNED | {"optimizer": kind})
    for _ in range(3):
        tuned.step()
    tuned.save()
    folder = checkpoint.latest(tuned.run, pytest.fail)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "adapter.safetensors", "optimizer.safetensors",
                                                  "state.json", "manifest.json"}  # fmt: skip
    groups = {
        name: checkpoint.read_safetensors(folder / f"{name}.safetensors") for name in ("model", "adapter", "optimizer")
    }
    own = {name for name in tuned.model.state_dict() if ".lora_" in name}
    assert set(groups["adapter"]) == own == {key.partition("/")[0] for key in groups["optimizer"]} and len(own) == 14
    model, _, step = checkpoint.load_run(tuned.run, warn=pytest.fail)
    assert step == 3 and set(groups["model"]) == set(trainer.model.state_dict())
    x = torch.arange(16)[None]
    tuned.model.eval()
    torch.testing.assert_close(model(x)[0], tuned.model(x)[0], atol=1e-5, rtol=1e-5)
    assert (model(x)[0] - trainer.model.eval()(x)[0]).abs().max() > 1e-3
    # The folder for others holds the same adapter, for this base and for no other.
    saved, facts = checkpoint.read(base), json.loads((tuned.run / "adapter/adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(base) and facts["r"] == 3
    merged = lora.merged_tensors(saved.tensors, adapter.read(tuned.run, saved))
    assert all(torch.equal(t, groups["model"][name]) for name, t in merged.items())
    with pytest.raises(ValueError, match="another base"):
        adapter.read(tuned.run, checkpoint.read(tuned.run))


@pytest.mark.parametrize("how", [{}, TUNED, TUNED | {"optimizer": "muon", "lora_targets": "q,down", "lora_stabilized": True}],
                         ids=["all weights", "adapters", "muon"])  # fmt: skip
def test_a_resumed_fine_tuning_has_the_same_bits(base, tmp_path, how):
    straight = fine_tune(tmp_path, "straight", **how)
    lines = [straight.step() for _ in range(7)]
    stopped = fine_tune(tmp_path, "stopped", **how)  # nothing is saved yet when it is stopped for the first time
    again = fine_tune(tmp_path, "stopped", resume=True, **how)
    assert [again.step() for _ in range(4)] == lines[:4]
    again.save()
    third = fine_tune(tmp_path, "stopped", resume=True, **how)
    assert [third.step() for _ in range(3)] == lines[4:]
    assert all(torch.equal(t, third.model.state_dict()[name]) for name, t in weights(straight).items())
    assert not torch.equal(weights(stopped)["embed.weight"], weights(third)["embed.weight"]) or how


def test_a_base_that_has_gone_or_changed_or_moved(base, tmp_path, trainer):
    for name, how in (("all", {}), ("adapters", TUNED), ("fresh", TUNED)):
        tuned = fine_tune(tmp_path, name, **how)
        if name != "fresh":
            tuned.step()
            tuned.save()
    moved = tmp_path / "moved"
    base.rename(moved)
    for name in ("adapters", "fresh"):
        with pytest.raises(
            ValueError, match=r"begun with cannot be read \(there is no run at .*bring it back.*--init-from"
        ):
            fine_tune(tmp_path, name, resume=True, **TUNED)
    assert fine_tune(tmp_path, "all", resume=True).state["step"] == 1, "all weights are in its checkpoint"
    assert fine_tune(tmp_path, "adapters", resume=True, init_from=str(moved), **TUNED).state["step"] == 1
    assert json.loads((tmp_path / "adapters/config.json").read_text())["options"]["init_from"] == str(moved)
    merged = fine_tune(tmp_path, "adapters", eval_only=True, **TUNED)  # needs no base
    assert not lora.shapes(merged.model)
    moved.rename(base)
    trainer.step()
    trainer.save()
    for name in ("adapters", "fresh"):
        with pytest.raises(ValueError, match=r"run has changed since this run was begun with it: bring it back"):
            fine_tune(tmp_path, name, resume=True, **TUNED)


def test_a_base_is_found_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = fine_tune(tmp_path, "tuned", init_from="run", **TUNED)
    tuned.save()
    monkeypatch.chdir("/")
    options = dataclasses.replace(train.parse(["--resume", "--out", str(tuned.run)]), device="cpu")
    assert options.init_from == str(base) and train.open_trainer(options).step() == tuned.step()


def test_what_a_resumed_run_was_made_with_stays(base, tmp_path):
    tuned = fine_tune(tmp_path, "tuned", **TUNED)
    tuned.save()
    flags = ["--resume", "--out", str(tuned.run)]
    assert (
        train.parse(flags).init_from == str(base) and train.parse([*flags, "--init-from", "/else"]).init_from == "/else"
    )
    for flag, value in (
        ("--lora-rank", "4"),
        ("--lora-alpha", "3"),
        ("--lora-targets", "q"),
        ("--lora-dropout", "0.5"),
    ):
        with pytest.raises(ValueError, match=f"was made with {flag} .*, not {value}"):
            train.parse([*flags, flag, value])
    with pytest.raises(ValueError, match="was made with --init-from None"):
        train.parse(["--resume", "--out", str(base), "--init-from", str(tuned.run)])


def test_evaluating_a_lora_run_gives_its_figures(base, tmp_path):
    tuned = fine_tune(tmp_path, "tuned", **TUNED)
    for _ in range(5):
        tuned.step()
    tuned.save()
    again = fine_tune(tmp_path, "tuned", eval_only=True, **TUNED)
    assert again.validate(10_000) == pytest.approx(tuned.validate(10_000), rel=1e-5) and again.state["step"] == 5


@pytest.mark.parametrize("more, said", [
    ({"n_layer": 3}, "--n-layer 3 does not fit the weights of the base: those are for 1"),
    ({"n_embd": 32}, "--n-embd 32 does not fit"), ({"position": "learned"}, "--position learned does not fit"),
    ({"tokenizer": "bpe-2"}, "--tokenizer bpe-2 cannot be with --init-from"), ({"vocab_size": 700}, "--vocab-size 700 cannot be"),
    ({"model": "gpt2-tiny"}, "--model gpt2-tiny cannot be"), ({"pad_vocab": 4000}, "--pad-vocab 4000 cannot be"),
    ({"init_from": None, "lora_rank": 2}, "with --init-from"), ({"lora_rank": -1}, "--lora-rank is -1"),
    ({"lora_rank": 10**9}, "rank of 1000000000"), ({"lora_rank": 2, "lora_targets": "c_attn"}, "no layer is called 'c_attn'"),
    ({"lora_rank": 2, "lora_alpha": math.nan}, "alpha = nan"), ({"lora_rank": 2, "lora_dropout": 1.5}, "dropout = 1.5"),
    ({"init_from": "{}/none"}, "no run at"), ({"init_from": "{}/text.txt"}, "is not a run directory"),
    ({"init_from": "{}"}, "holds no config.json"),
])  # fmt: skip
def test_what_does_not_fit_the_base_is_refused(base, tmp_path, more, said):
    if more.get("init_from"):
        more = {"init_from": more["init_from"].format(tmp_path)}
    with pytest.raises(ValueError, match=said):
        fine_tune(tmp_path, "tuned", **more)
    assert not (tmp_path / "tuned").exists()


def test_a_base_in_hugging_face_s_format(base, tmp_path, trainer):
    """The same weights, so the same run, and its base may lie here or there."""
    huggingface.write(checkpoint.read(base), tmp_path / "hf")
    one, other = (
        fine_tune(tmp_path, "one", **TUNED),
        fine_tune(tmp_path, "other", init_from=str(tmp_path / "hf"), **TUNED),
    )
    assert one.step() == other.step() and one.step() == other.step()
    other.save()
    assert fine_tune(tmp_path, "other", resume=True, init_from=str(base), **TUNED).step() == one.step()


def test_what_may_change(base, tmp_path):
    """Dropout and, since rotary positions are not learned, the context."""
    config = fine_tune(tmp_path, "tuned", n_layer=1, dropout=0.4, block_size=40).model.config
    assert (config.n_layer, config.dropout, config.block_size) == (1, 0.4, 40)
    gpt2 = make_trainer(tmp_path, model="gpt2-tiny", n_kv_head=None, out=tmp_path / "gpt2")
    gpt2.save()
    assert fine_tune(tmp_path, "tuned-gpt2", init_from=str(gpt2.run), **TUNED).step()["step"] == 0
    with pytest.raises(ValueError, match="--block-size 40 does not fit the weights of the base: those are for 16"):
        fine_tune(tmp_path, "other", init_from=str(gpt2.run), block_size=40)


def test_a_first_loss_beyond_chance_is_no_divergence(base, tmp_path, capsys):
    tuned = fine_tune(tmp_path, "tuned", **TUNED)
    tuned.check(3 * math.log(28) + 2, 1.0, 0.1)
    tuned.explain_first(9.0)
    assert capsys.readouterr().out == "step 0: loss 9.000, that of the model to start from\n"


def test_memory_of_a_lora_run(base, tmp_path, trainer):
    """Weights, gradients and optimizer exactly; activations are said to be at most about those of a full run."""
    tuned, full = fine_tune(tmp_path, "tuned", **TUNED), fine_tune(tmp_path, "full", optimizer="adamw")
    tuned.step()
    need, other = train.predicted_memory(tuned), train.predicted_memory(full)
    parameters = list(tuned.model.parameters())
    assert need["weights"] == sum(p.nbytes for p in parameters) > other["weights"]
    assert need["gradients"] == sum(p.nbytes for p in parameters if p.requires_grad) < other["gradients"] / 2
    assert need["optimizer"] == sum(t.nbytes for o in tuned.optimizers for s in o.state.values() for t in s.values())
    assert need["activations"] == other["activations"]
    assert "in adapters, which are trained" in train.describe(tuned) and "adapters" not in train.describe(full)


# ---- longer texts -------------------------------------------------------------------------------------------------------


def test_a_base_is_stretched_and_tuned(base, tmp_path):
    tuned = fine_tune(tmp_path, "longer", rope_scaling="yarn:4")
    assert (tuned.model.config.block_size, tuned.model.config.rope_scaling) == (64, Scaling("yarn", 4.0, 16))
    tuned.step()
    tuned.save()
    again = fine_tune(tmp_path, "longer", rope_scaling="yarn:4", resume=True)
    assert again.model.config == tuned.model.config and again.step() == tuned.step()
    with pytest.raises(ValueError, match=r"the model has yarn:\S+ scaling already: linear:2 cannot be added"):
        fine_tune(tmp_path, "more", init_from=str(tuned.run), rope_scaling="linear:2")


def test_a_run_is_evaluated_on_longer_texts(base, tmp_path, trainer):
    """The same weights, windows of the length asked for, and the scaling: as the model computes it."""
    run = ["--eval-only", "--out", str(base)]
    model = checkpoint.load_run(base)[0]
    for flags, scaling in (
        ([], UNSCALED),
        (["--block-size", "64"], UNSCALED),
        (["--rope-scaling", "ntk:4"], Scaling("ntk", 4.0)),
    ):
        longer = train.open_trainer(train.parse([*run, *flags]))
        size = 64 if flags else 16
        assert (longer.task.length, longer.model.config.rope_scaling) == (size, scaling)
        model.config = dataclasses.replace(model.config, block_size=size, rope_scaling=scaling)
        task = train.Task(trainer.task.dataset, size)
        want, _ = train.evaluate(model, task.validation(task.rows(1000)), trainer.context, trainer.world)
        assert longer.validate(1000).nats_per_token == pytest.approx(want, rel=1e-6)
    assert checkpoint.read_config(base)["model"]["block_size"] == 16  # nothing was written
    with pytest.raises(ValueError, match="was made with --block-size 16, not 64: leave --block-size out"):
        train.parse(["--resume", "--out", str(base), "--block-size", "64"])
    learned = make_trainer(tmp_path, out=tmp_path / "learned", position="learned")
    learned.save()
    for flags, said in (
        (["--block-size", "64"], "--block-size 64 does not fit the weights of the base: those are for 16"),
        (["--rope-scaling", "yarn:2"], "yarn scaling stretches rope, and position = 'learned'"),
    ):
        with pytest.raises(ValueError, match=said):
            train.open_trainer(train.parse(["--eval-only", "--out", str(tmp_path / "learned"), *flags]))


def test_samples_of_a_model_whose_scaling_keeps_nothing(base, tmp_path, capsys):
    tuned = fine_tune(tmp_path, "dynamic", rope_scaling="dynamic:2", samples=1)
    assert train.show_samples(tuned) is None
    assert "--- sample 1" in capsys.readouterr().out


# ---- mistakes -----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_none(tmp_path):
    for name in ("weight_decay", "lr", "clip", "final_lr"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
            Options(**{name: math.nan}).check()
    with pytest.raises(ValueError, match="--lr inf"):
        Options(lr=math.inf).check()


@pytest.mark.parametrize("name, value", [("alpha", 3.0), ("targets", "q"), ("dropout", 0.1), ("stabilized", True)])
def test_options_of_adapters_without_adapters(name, value):
    with pytest.raises(ValueError, match=f"--lora-{name} is for adapters, which --lora-rank asks for"):
        Options(**{f"lora_{name}": value}).check()
    Options(**{f"lora_{name}": value}, lora_rank=2, init_from="x").check()


def test_a_run_without_a_checkpoint_is_not_evaluated(trainer):
    with pytest.raises(ValueError, match="run holds no complete checkpoint yet: there is nothing to evaluate"):
        train.open_trainer(train.parse(["--eval-only", "--out", str(trainer.run)]))


def test_when_nobody_reads_what_is_printed_it_is_saved(trainer, monkeypatch):
    """As in `train.py | head`: the next line that is printed ends the program."""

    def closed(*args):
        raise BrokenPipeError

    monkeypatch.setattr(trainer, "explain_first", closed)
    with pytest.raises(BrokenPipeError):
        trainer.fit()
    assert [folder.name for folder in checkpoint.steps(trainer.run)] == ["step-1"]
