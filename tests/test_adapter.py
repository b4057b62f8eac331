"""Adapters in files: peft is the oracle in both directions, and a file that is not quite right is refused."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: what needs a connection is an error
import peft  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from nanogptx import adapter, checkpoint, huggingface, lora  # noqa: E402
from nanogptx.huggingface import Saved  # noqa: E402
from nanogptx.tinyllama import build_model  # noqa: E402
from nanogptx.tokenizer import CharTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LORA = str(ROOT / "nanogptx/lora.py")
TOKENIZER = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz .,")
N = TOKENIZER.vocab_size
# No two sizes are equal where that could hide a mistake; head counts are no powers of two.
SHAPES = {
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 40, "vocab_size": N}),
    "llama": ("tinyllama", {"n_layer": 2, "n_head": 6, "n_kv_head": 2, "n_embd": 48, "n_hidden": 56, "block_size": 40,
                            "vocab_size": N}),
}  # fmt: skip
SHAPES["llama-tied"] = ("tinyllama", SHAPES["llama"][1] | {"tied": True})
ALL = "attention.*,mlp.*"


def draw(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def make(name: str, padding: int = 0, dtype=torch.float32, seed: int = 0) -> Saved:
    """A model with every weight far from its first value."""
    architecture, shape = SHAPES[name]
    shape = shape | {"vocab_size": N + padding}
    tensors = build_model(architecture, shape).state_dict()
    tensors = {key: (draw(*t.shape, seed=seed + n, std=0.2) + ("norm" in key)).to(dtype)
               for n, (key, t) in enumerate(tensors.items())}  # fmt: skip
    return Saved(architecture, shape, tensors, TOKENIZER)


def model_of(saved: Saved) -> torch.nn.Module:
    model = build_model(saved.architecture, saved.shape)
    checkpoint.load_weights(model, saved.tensors, Path("-"))
    return model.eval()


def adapted(saved: Saved, targets: str = ALL, rank: int = 3, alpha: float = 6.0, **more) -> torch.nn.Module:
    """A model whose adapters have been trained, that is, with a B that is not zero."""
    model = model_of(saved)
    lora.inject(model, rank, alpha, targets, **more)
    with torch.no_grad():
        for n, (key, t) in enumerate(lora.adapter_of(model).tensors.items()):
            t.copy_(draw(*t.shape, seed=100 + n, std=0.2 if key.endswith("B") else 0.4))
    return model


def theirs(saved: Saved, folder: Path) -> torch.nn.Module:
    """The same model in transformers."""
    if not folder.exists():
        huggingface.write(saved, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(model: torch.nn.Module, saved: Saved, folder: Path) -> Path:
    adapter.write(folder, saved.architecture, lora.adapter_of(model), "base", adapter.fingerprint(saved))
    return folder


IDS = torch.randint(N, (2, 30), generator=torch.Generator().manual_seed(7))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The root mean square of a - b, as a fraction of that of b."""
    return ((a - b).double().square().mean() / b.double().square().mean()).sqrt().item()


def check_logits(ours: torch.nn.Module, other: torch.nn.Module, base: torch.nn.Module, bound: float = 2e-6) -> None:
    """Equal within float32's rounding, and the adapter makes a difference that nobody could overlook."""
    with torch.no_grad():
        a, b, without = ours(IDS)[0], other(IDS).logits, base(IDS)[0]
    assert distance(a, without) > 0.1, "such an adapter would show nothing"
    assert distance(a, b) < bound


# ----------------------------------------------------------------------------------------------------------------------
# To PEFT

TO_PEFT = [("llama", "q,v", {}), ("llama", ALL, {}), ("llama-tied", ALL, dict(stabilized=True)), ("llama", "1.mlp.up,o", {}),
           ("gpt2", "q,k,v", {}), ("gpt2", "q,v", {}), ("gpt2", "k", {}), ("gpt2", ALL, {}), ("gpt2", "0.attention.v,mlp.up", {}),
           ("gpt2", ALL, dict(stabilized=True)), ("gpt2", "v,o,q", dict(alpha=5.0, rank=7))]  # fmt: skip


@pytest.mark.parametrize("name, targets, how", TO_PEFT)
def test_peft_computes_the_same_with_ours(tmp_path, name, targets, how):
    saved = make(name)
    model = adapted(saved, targets, **how)
    other = peft.PeftModel.from_pretrained(
        theirs(saved, tmp_path / "hf"), write(model, saved, tmp_path / "adapter")
    ).eval()
    check_logits(model, other, model_of(saved))
    tensors = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    used = {key.replace(".default", "") for key in other.state_dict() if ".lora_" in key}
    assert tensors.keys() == used, "every tensor is used, and none was drawn"
    mine = adapter.read(tmp_path / "adapter", saved)
    again = model_of(saved)
    lora.load(again, mine)
    check_logits(again, other, model_of(saved))


@pytest.mark.parametrize("name", SHAPES)
def test_merged_and_exported_it_is_what_peft_merges(tmp_path, name):
    saved = make(name)
    model = adapted(saved)
    other = peft.PeftModel.from_pretrained(theirs(saved, tmp_path / "hf"), write(model, saved, tmp_path / "adapter"))
    huggingface.write(
        saved._replace(tensors=lora.merged_tensors(saved.tensors, lora.adapter_of(model))), tmp_path / "merged"
    )
    merged, mine = other.merge_and_unload().state_dict(), theirs(saved, tmp_path / "merged").state_dict()
    assert merged.keys() == mine.keys() and len(mine) > 10
    for key, t in merged.items():
        torch.testing.assert_close(mine[key], t, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_file_that_is_written_again_is_replaced_whole(tmp_path, name, monkeypatch):
    saved = make(name)
    model = adapted(saved, "o")
    folder = write(model, saved, tmp_path / "adapter")
    names = {f.name for f in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    before = {f: f.read_bytes() for f in folder.iterdir()}
    with torch.no_grad():
        model.blocks[0].attention.o.lora_B.mul_(2)
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: real(a, b) if str(b).endswith("json") else 1 / 0)  # a crash
    with pytest.raises(ZeroDivisionError):
        write(model, saved, folder)
    assert {f: f.read_bytes() for f in folder.iterdir()} == before
    monkeypatch.undo()
    write(model, saved, folder)
    changed = {f.name for f in folder.iterdir() if f.read_bytes() != before[f]}
    assert changed == {"adapter_model.safetensors"}


# ----------------------------------------------------------------------------------------------------------------------
# From PEFT


def by_peft(saved: Saved, folder: Path, dtype=torch.float32, **config) -> torch.nn.Module:
    """Their model with an adapter of theirs, B not zero, saved in `folder`."""
    model = peft.get_peft_model(
        theirs(saved, folder.with_name("hf")), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    ).eval()
    with torch.no_grad():
        for n, (key, p) in enumerate(model.named_parameters()):
            if ".lora_" in key:
                p.copy_(draw(*p.shape, seed=300 + n, std=0.2 if "lora_B" in key else 0.4))
                p.data = p.data.to(dtype).float()
    if dtype != torch.float32:
        model.to(dtype)
    model.save_pretrained(folder)
    return model.float()


FROM_PEFT = [
    ("llama", dict(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])),
    ("llama", dict(r=3, lora_alpha=7, target_modules="all-linear")),
    ("llama-tied", dict(r=4, lora_alpha=9, target_modules=r".*\.1\.(self_attn|mlp)\.(q|k|up|down)_proj", use_rslora=True)),
    ("llama", dict(r=3, lora_alpha=7, target_modules=["model.layers.1.self_attn.o_proj", "gate_proj"], lora_dropout=0.3)),
    ("llama", dict(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj", "up_proj"], rank_pattern={"q_proj": 5, r"layers\.1\.mlp.*": 2},
                   alpha_pattern={"1.self_attn.k_proj": 11}, use_rslora=True)),
    ("gpt2", dict(r=3, lora_alpha=7, target_modules=["c_attn"])),
    ("gpt2", dict(r=3, lora_alpha=7, target_modules=["c_attn"], init_lora_weights="gaussian", fan_in_fan_out=True)),
    ("gpt2", dict(r=5, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"], use_rslora=True)),
    ("gpt2", dict(r=3, lora_alpha=7, target_modules=["c_attn", "attn.c_proj"], rank_pattern={"c_attn": 6}, alpha_pattern={"c_proj": 2})),
    ("gpt2", dict(r=2, lora_alpha=3, target_modules="all-linear")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name, config", FROM_PEFT)
def test_ours_computes_the_same_with_peft_s(tmp_path, name, config):
    saved = make(name)
    other, base = by_peft(saved, tmp_path / "adapter", **config), model_of(saved)
    mine = adapter.read(tmp_path / "adapter", saved)
    model = model_of(saved)
    lora.load(model, mine)
    check_logits(model, other, base)
    merged = model_of(saved._replace(tensors=lora.merged_tensors(saved.tensors, mine)))
    check_logits(merged, other, base, 1e-5)
    back = peft.PeftModel.from_pretrained(
        theirs(saved, tmp_path / "hf"), write(model, saved, tmp_path / "again")
    ).eval()
    check_logits(model, back, base)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_peft_s(tmp_path, name):
    saved = make(name)
    targets = ["c_proj", "c_fc"] if name == "gpt2" else ["q_proj", "k_proj", "down_proj"]
    other = by_peft(saved, tmp_path / "adapter", r=3, lora_alpha=7, target_modules=targets)
    model = model_of(saved)
    lora.load(model, adapter.read(tmp_path / "adapter", saved))
    model(IDS[:, :-1], IDS[:, 1:])[1].backward()
    for p in other.parameters():
        p.requires_grad_(True)
    other(IDS, labels=IDS).loss.backward()
    grads = {key.replace(".default", ""): p.grad for key, p in other.named_parameters()}
    seen = 0
    for key, p in model.named_parameters():
        if p.requires_grad:
            layer, which = key.rsplit(".lora_", 1)
            their = grads[adapter.peft_names(saved.architecture, layer)["AB".index(which) + 1]]
            assert distance(p.grad, their) < 2e-6
            assert p.grad.abs().max() > 1e-3
            seen += 1
    assert seen == 2 * 2 * 3


def test_a_bfloat16_adapter_and_a_bfloat16_base(tmp_path):
    """The merged weights are the base's format: the sum in float32, rounded once."""
    saved = make("llama", dtype=torch.bfloat16)
    by_peft(saved, tmp_path / "adapter", torch.bfloat16, r=3, lora_alpha=6, target_modules=["q_proj"])
    mine = adapter.read(tmp_path / "adapter", saved)
    a, b = mine.pair("blocks.1.attention.q")
    assert a.dtype == torch.bfloat16
    w = saved.tensors["blocks.1.attention.q.weight"]
    got = lora.merged_tensors(saved.tensors, mine)["blocks.1.attention.q.weight"]
    assert got.dtype == torch.bfloat16 and torch.equal(got, (w.float() + 2.0 * (b.float() @ a.float())).bfloat16())


def test_thirds_of_c_attn_are_q_k_and_v_in_this_order(tmp_path):
    saved = make("gpt2")
    by_peft(saved, tmp_path / "adapter", r=3, lora_alpha=7, target_modules=["c_attn"])
    tensors = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    mine = adapter.read(tmp_path / "adapter", saved)
    b = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    assert b.shape == (72, 3)
    for n, third in enumerate("qkv"):
        assert torch.equal(mine.tensors[f"blocks.1.attention.{third}.lora_B"], b[24 * n : 24 * n + 24])


# ----------------------------------------------------------------------------------------------------------------------
# For this base, or for another


def test_the_fingerprint_is_of_the_numbers(tmp_path):
    saved = make("llama", padding=5)
    own = adapter.fingerprint(saved)
    assert len(own) == 64
    huggingface.write(saved, tmp_path / "cut")
    huggingface.write(saved, tmp_path / "whole", keep_padding=True)
    checkpoint.write_run(saved, tmp_path / "run")
    for folder in ("cut", "whole", "run"):
        assert adapter.fingerprint(checkpoint.read(tmp_path / folder)) == own, "however it is stored"
    narrow = make("llama", 5, torch.bfloat16)
    wide = narrow._replace(tensors={k: t.float() for k, t in narrow.tensors.items()})
    assert adapter.fingerprint(narrow) == adapter.fingerprint(wide) != own
    for key, t in saved.tensors.items():
        other = t.clone()
        other.view(-1)[0] += 1e-3
        assert adapter.fingerprint(saved._replace(tensors=saved.tensors | {key: other})) != own, key
    renamed = {key.replace("gate", "gape"): t for key, t in saved.tensors.items()}  # in the same order
    assert adapter.fingerprint(saved._replace(tensors=renamed)) != own
    turned = saved.tensors | {key: t.view(t.shape[::-1]) for key, t in saved.tensors.items() if "mlp.down" in key}
    assert adapter.fingerprint(saved._replace(tensors=turned)) != own
    swapped = saved.tensors | {"blocks.0.attention.k.weight": saved.tensors["blocks.0.attention.v.weight"],
                               "blocks.0.attention.v.weight": saved.tensors["blocks.0.attention.k.weight"]}  # fmt: skip
    assert adapter.fingerprint(saved._replace(tensors=swapped)) != own


def test_another_base_is_refused(tmp_path):
    saved, other = make("llama"), make("llama", seed=50)
    folder = write(adapted(saved), saved, tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"adapter was made for another base than this one \(.*name the one in adapter_config"
    ):
        adapter.read(folder, other)
    by_peft(saved, tmp_path / "theirs", r=3, target_modules=["q_proj"])
    assert adapter.read(tmp_path / "theirs", other).scales, "PEFT notes no fingerprint: names and shapes decide"
    with pytest.raises(ValueError, match="describes no LoRA of a layer of this gpt2 model"):
        adapter.read(tmp_path / "theirs", make("gpt2"))


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not quite right


def edit_json(path: Path, **changes) -> None:
    """Change a JSON object in place; `...` removes."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}), encoding="utf-8")


def edit_tensors(path: Path, change) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(
        {k: t.contiguous().clone() for k, t in tensors.items()}, path, metadata={"format": "pt"}
    )


OPTIONS = [
    dict(use_dora=True), dict(bias="all"), dict(bias="lora_only"), dict(modules_to_save=["lm_head"]), dict(layers_to_transform=[0]),
    dict(layers_pattern="layers"), dict(layer_replication=[[0, 2]]), dict(lora_bias=True), dict(exclude_modules=["v_proj"]),
    dict(target_parameters=["x"]), dict(trainable_token_indices=[1]), dict(alora_invocation_tokens=[1]), dict(use_qalora=True),
    dict(use_bdlora={"a": 1}), dict(arrow_config={"a": 1}), dict(kasa_config={"a": 1}), dict(ensure_weight_tying=True),
    dict(init_lora_weights="pissa"), dict(init_lora_weights="olora"), dict(init_lora_weights="loftq"), dict(loftq_config={"a": 1}),
    dict(something_new=3), dict(megatron_config={"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_options_that_change_the_result_are_refused_by_name(places, option):
    base, folder = places
    edit_json(folder / "adapter_config.json", **option)
    with pytest.raises(
        ValueError, match=rf"adapter: nanogptx does not know what PEFT's option {next(iter(option))} = "
    ):
        adapter.read(folder, base)


@pytest.fixture
def places(tmp_path) -> tuple[Saved, Path]:
    """A base, and a folder as PEFT writes it."""
    saved = make("llama")
    by_peft(saved, tmp_path / "adapter", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    adapter.read(tmp_path / "adapter", saved)
    return saved, tmp_path / "adapter"


CONFIGS = [
    (dict(peft_type="LOHA"), "describes no LoRA"), (dict(peft_type=...), "describes no LoRA"), (dict(r="3"), "rank of '3'"),
    (dict(r=10**9), "rank of 1000000000"), (dict(r=10**400), "rank of 1000"), (dict(r=0), "rank of 0"), (dict(r=-3), "rank of -3"),
    (dict(r=True), "rank of True"), (dict(r=3.0), "rank of 3.0"), (dict(r=...), "describes no adapter"), (dict(r=4), r"lora_A.weight is \(3, 48\)"),
    (dict(lora_alpha=float("nan")), "alpha of nan"), (dict(lora_alpha=float("inf")), "alpha of inf"), (dict(lora_alpha="6"), "alpha of '6'"),
    (dict(lora_alpha=-1), "alpha of -1"), (dict(lora_alpha=0), "alpha of 0"), (dict(lora_alpha=10**400), "alpha of 1000"),
    (dict(lora_alpha=...), "describes no adapter"), (dict(target_modules=...), "target_modules"), (dict(target_modules=None), "describes no adapter"),
    (dict(target_modules=3), "describes no adapter"), (dict(target_modules=[3]), "describes no adapter"), (dict(target_modules=[]), "no LoRA of a layer"),
    (dict(target_modules=["lm_head"]), "no LoRA of a layer"), (dict(target_modules="(q"), "is no pattern"),
    (dict(target_modules=r"(.|..|...|....)*[0-9]"), "is no pattern .*timed out"),  # would take minutes
    (dict(target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj.lora_A.weight is missing"),
    (dict(target_modules=["q_proj"]), "v_proj.lora_A.weight is not part of the model"),
    (dict(rank_pattern=[3]), "describes no adapter"), (dict(rank_pattern={"q_proj": 10**9}), "rank of 1000000000"),
    (dict(alpha_pattern={"q_proj": float("nan")}), "alpha of nan"), (dict(rank_pattern={"(": 3}), "is no pattern"),
]  # fmt: skip


@pytest.mark.parametrize("change, said", CONFIGS, ids=lambda x: str(x)[:40])
def test_a_config_that_makes_no_sense_is_refused(places, change, said):
    base, folder = places
    edit_json(folder / "adapter_config.json", **change)
    with pytest.raises(ValueError, match=said):
        adapter.read(folder, base)


Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
TENSORS = [
    (lambda t: t.pop(f"{Q1}A.weight"), "q_proj.lora_A.weight is missing"), (lambda t: t.pop(f"{Q1}B.weight"), "q_proj.lora_B.weight is missing"),
    (lambda t: t.update({f"{Q1}C.weight": torch.ones(3)}), "lora_C.weight is not part"),
    (lambda t: t[f"{Q1}B.weight"][3, 1].fill_(float("nan")), "blocks.1.attention.q has numbers that are not finite"),
    (lambda t: t[f"{Q1}A.weight"][1, 2].fill_(float("inf")), "blocks.1.attention.q has numbers that are not finite"),
    (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)}), "lm_head.lora_A.weight is not part"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(N, 48)}), "embed_tokens.weight is not part"),
    (lambda t: t.update({f"{Q1}A.weight": t[f"{Q1}A.weight"].T}), r"\(48, 3\), the model has \(3, 48\)"),
    (lambda t: t.update({f"{Q1}A.weight": torch.ones(3, 47)}), r"\(3, 47\)"), (lambda t: t.update({f"{Q1}B.weight": torch.ones(48, 4)}), r"\(48, 4\)"),
    (lambda t: t.update({f"{Q1}B.weight": torch.ones(48, 3, dtype=torch.int64)}), "of torch.int64"),
    (lambda t: t.update({f"{Q1}B.weight": torch.ones(48, 3, dtype=torch.float64)}), "of torch.float64"),
    (lambda t: t.clear(), "is missing"),
    (lambda t: [t.update({k.removeprefix("base_model.model."): t.pop(k)}) for k in list(t)], "is missing|is not part"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TENSORS)))
def test_tensors_that_do_not_fit_are_refused(places, number):
    (base, folder), (change, said) = places, TENSORS[number]
    edit_tensors(folder / "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=said):
        adapter.read(folder, base)


# ----------------------------------------------------------------------------------------------------------------------
# The program, and files that mean harm


class Toucher:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def merge(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, LORA, "merge", *map(str, args)], capture_output=True, text=True)


def spoil(how: str, folder: Path, marker: Path) -> None:
    tensors, config, rng = folder / "adapter_model.safetensors", folder / "adapter_config.json", random.Random(0)
    whole = tensors.read_bytes()
    if how == "pickle":
        tensors.write_bytes(pickle.dumps(Toucher(marker)))
    elif how == "torch.save":
        torch.save({"x": Toucher(marker)}, tensors)
    elif how == "adapter_model.bin":
        tensors.unlink()
        torch.save({"x": Toucher(marker)}, folder / "adapter_model.bin")
    elif how == "random":
        tensors.write_bytes(rng.randbytes(5000))
    elif how == "cut":
        tensors.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        tensors.write_bytes(b"")
    elif how == "length of the header":
        tensors.write_bytes((10**15).to_bytes(8, "little") + whole[8:])
    elif how == "duplicate tensor":
        n = int.from_bytes(whole[:8], "little")
        header = whole[8 : 8 + n].rstrip()
        key = next(k for k in json.loads(header) if k != "__metadata__")
        header = header[:-1] + f',"{key}":{json.dumps(json.loads(header)[key])}}}'.encode()
        tensors.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + n :])
    elif how == "a folder":
        tensors.unlink()
        tensors.mkdir()
    elif how == "config: duplicate key":
        config.write_text(config.read_text().replace('"r":', '"r": 4, "r":'))
    elif how == "config: cut":
        config.write_text(config.read_text()[:100])
    elif how == "config: a list":
        config.write_text("[1]")
    elif how == "config: deep":
        config.write_text("[" * 100_000)
    elif how == "config: binary":
        config.write_bytes(rng.randbytes(500))
    else:
        assert how == "config: none"
        config.unlink()


HARM = ["pickle", "torch.save", "adapter_model.bin", "random", "cut", "empty", "length of the header", "duplicate tensor", "a folder",
        "config: duplicate key", "config: cut", "config: a list", "config: deep", "config: binary", "config: none"]  # fmt: skip


@pytest.mark.parametrize("how", HARM)
def test_a_file_that_means_harm_is_refused(places, tmp_path, how):
    """A7: nothing is unpickled, and each gets one sentence (the program's is seen below)."""
    (base, folder), marker = places, tmp_path / "marker"
    spoil(how, folder, marker)
    with pytest.raises(ValueError) as caught:
        adapter.read(folder, base)
    assert str(folder) in str(caught.value) and not marker.exists()
    pickle.loads(pickle.dumps(Toucher(marker)))
    assert marker.exists(), "the marker would have been there"


def test_damaged_anywhere_it_is_refused_or_the_same(places):
    """Any byte of the header or the config changed: a ValueError, or an adapter that is whole, never another error."""
    base, folder = places
    rng = random.Random(1)
    for name in adapter.FILES:
        whole = (folder / name).read_bytes()
        limit = 8 + int.from_bytes(whole[:8], "little") if name.endswith("tensors") else len(whole)
        for _ in range(150):
            at = rng.randrange(limit)
            (folder / name).write_bytes(whole[:at] + rng.randbytes(1) + whole[at + 1 :])
            try:
                got = adapter.read(folder, base)
            except ValueError:
                continue
            assert got.scales.keys() <= {f"blocks.{n}.attention.{x}" for n in range(2) for x in "qv"} and got.scales
        (folder / name).write_bytes(whole)


@pytest.mark.slow
def test_the_program(places, tmp_path):
    """A base as a run and as a folder of Hugging Face's, an adapter of PEFT's: a run that others can read."""
    base, folder = places
    checkpoint.write_run(base, tmp_path / "base")
    expected = lora.merged_tensors(base.tensors, adapter.read(folder, base))
    for source in (tmp_path / "base", tmp_path / "hf"):
        out = tmp_path / f"out-{source.name}"
        done = merge(source, folder, "--out", out)
        assert (done.returncode, done.stderr) == (0, "")
        assert "tinyllama" in done.stdout and "4 layers changed by 960 parameters" in done.stdout
        saved = checkpoint.read(out)
        assert saved.step == 0 and saved.tokenizer.fingerprint == base.tokenizer.fingerprint
        assert all(torch.equal(t, expected[key]) for key, t in saved.tensors.items())
        assert adapter.fingerprint(saved) != adapter.fingerprint(base)


@pytest.mark.slow
def test_mistakes_get_one_sentence(places, tmp_path):
    base, folder = places
    checkpoint.write_run(base, tmp_path / "base")
    other = make("llama", seed=9)
    write(adapted(other), other, tmp_path / "of another base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    spoil_at = tmp_path / "harm"
    spoil_at.mkdir()
    for name in adapter.FILES:
        (spoil_at / name).write_bytes((folder / name).read_bytes())
    spoil("torch.save", spoil_at, tmp_path / "marker")
    new = tmp_path / "new"
    for args, said in [
        ([tmp_path / "none", folder, "--out", new], "no run at"),
        ([tmp_path / "base", tmp_path / "none", "--out", new], "there is no folder"),
        ([folder, tmp_path / "base", "--out", new], "holds no config.json"),
        ([tmp_path / "base", tmp_path / "base", "--out", new], "has no adapter_config.json"),
        ([tmp_path / "base", folder, "--out", tmp_path / "full"], "holds something already"),
        ([tmp_path / "base", tmp_path / "of another base", "--out", new], "another base"),
        ([tmp_path / "base", spoil_at, "--out", new], "cannot be read as safetensors"),
    ]:
        done = merge(*args)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr and not new.exists()
    assert not (tmp_path / "marker").exists()
    assert merge(tmp_path / "base", folder).returncode == 2  # no --out: tyro says it
