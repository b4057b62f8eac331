"""Adapters in files: the format of PEFT, Hugging Face's library, translated both ways.

An adapter is what LoRA (lora.py) trains: for each layer that it changes, two matrices and a factor. PEFT keeps it in a
folder with adapter_model.safetensors, under the names that the layers have in transformers, and adapter_config.json. To
the first we add which base the adapter was made for. Like a model's config.json, an adapter_config.json can say more
than is computed here: what is not exactly ours is refused by name.

Source: the configuration and the LoRA layers of peft 0.21.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import regex
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nanogptx import files
from nanogptx.huggingface import Saved, Tensors, check_tensors, hf_name, read_safetensors, third_of
from nanogptx.tinyllama import build_model


class Adapter(NamedTuple):
    """What is trained, by names like blocks.3.attention.q."""

    tensors: Tensors  # NAME.lora_A (r, in) and NAME.lora_B (out, r)
    scales: dict[str, float]  # NAME: what B A is multiplied by

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can have an adapter: those of the blocks."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")}


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression describes a module's name, or the end of it that follows a dot.

    So "q" and "3.attention.q" and "attention.[qv]" fit blocks.3.attention.q. ValueError for what is no expression, and
    for one that takes a second: it may come from a file.
    """
    try:
        return regex.fullmatch(rf"(.*\.)?({pattern})", name, timeout=1) is not None
    except (regex.error, TimeoutError, RecursionError) as error:
        raise ValueError(f"{pattern[:99]!r} is no pattern for the names of modules ({error})") from error


# Options of adapter_config.json that do not change what a trained adapter computes, and those that are read here.
HARMLESS = set("task_type peft_version auto_mapping base_model_name_or_path revision inference_mode lora_dropout "
               "fan_in_fan_out megatron_core qalora_group_size".split())  # fmt: skip
READ = set("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules init_lora_weights".split())
FILES = "adapter_config.json", "adapter_model.safetensors"


def fingerprint(saved: Saved) -> str:
    """A SHA-256 of a model's numbers, but for rows of a padded vocabulary: they are cut off when it is exported."""
    sha = hashlib.sha256()
    for name, tensor in sorted(saved.tensors.items()):
        tensor = tensor[: saved.tokenizer.vocab_size] if name in ("embed.weight", "head.weight") else tensor
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def peft_names(architecture: str, name: str) -> tuple[str, str, str]:
    """Their names of a layer of ours and of its A and B: blocks.3.mlp.up -> transformer.h.3.mlp.c_fc, ..."""
    layer = hf_name(architecture, f"{name}.weight").removesuffix(".weight")
    return layer, f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def to_peft(architecture: str, adapter: Adapter) -> tuple[Tensors, dict]:
    """An adapter under their names, and its adapter_config.json.

    Where GPT-2 keeps q, k and v as one layer, so do adapters, with one A: ours are stacked in it, and B has a block for
    each, so the rank is the sum of theirs. Written as alpha is scale times rank, from which they compute the scale.
    """
    tensors, ranks, alphas = {}, {}, {}
    for name, scale in adapter.scales.items():
        (a, b), (layer, *keys) = adapter.pair(name), peft_names(architecture, name)
        if third := third_of(architecture, f"{name}.weight"):
            none = a[:0], b[:, :0]  # of no rank, with as many inputs and outputs
            three = [name.removesuffix(third) + x for x in "qkv"]
            assert {adapter.scales.get(x, scale) for x in three} == {scale}
            pairs = [adapter.pair(x) if x in adapter.scales else none for x in three]
            a, b = torch.cat([a for a, _ in pairs]), torch.block_diag(*[b for _, b in pairs])  # (3r, in), (3 out, 3r)
        tensors |= dict(zip(keys, (a, b), strict=True))
        ranks[layer], alphas[layer] = len(a), scale * len(a)
    r, alpha = (next(iter(x.values())) for x in (ranks, alphas))
    return tensors, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "use_rslora": False, "bias": "none",
        "rank_pattern": {layer: x for layer, x in ranks.items() if x != r},
        "alpha_pattern": {layer: x for layer, x in alphas.items() if x != alpha},
        "target_modules": sorted(ranks), "fan_in_fan_out": architecture == "gpt2",
    }  # fmt: skip


def write(folder: Path, architecture: str, adapter: Adapter, base: str, made_for: str) -> None:
    """Write a folder that PEFT loads; `base` is where the base lies, and `made_for` its fingerprint.

    What is there of an earlier step is replaced, and at any moment whole: between two steps only the numbers differ.
    """
    tensors, config = to_peft(architecture, adapter)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*.tmp"):
        left.unlink()  # by a process that was killed
    files.write_json(folder / FILES[0], config | {"base_model_name_or_path": base})
    files.write(folder / FILES[1], safetensors.torch.save(plain, {"format": "pt", "nanogptx_base": made_for}))


def size_of(config: dict, layer: str) -> tuple[int, float] | None:
    """Rank and scale that an adapter_config.json gives one of their layers, or None if that has no adapter."""
    targets = config["target_modules"]
    patterns = [targets.replace("all-linear", ".*")] if isinstance(targets, str) else map(regex.escape, targets)
    if not any(fits(pattern, layer) for pattern in patterns):
        return None
    own = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    rank, alpha = ([*(x for pattern, x in own[key].items() if fits(pattern, layer)), config[general]][0]
                   for key, general in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))  # fmt: skip
    if type(rank) is not int or not 1 <= rank < 1 << 24 or type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise ValueError(f"a rank of {rank!r} and an alpha of {alpha!r} make no adapter of {layer}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def from_peft(saved: Saved, tensors: Tensors, config: dict, source: Path) -> Adapter:
    """PEFT's adapter for the model `saved`, under our names; ValueError unless it is one, and exactly for such a model.

    Of GPT-2's q, k and v each gets the one A, and its third of B.
    """
    for name, value in config.items():
        known = value in (True, False, "gaussian", "orthogonal") if name == "init_lora_weights" else name in READ
        if not (known or name in HARMLESS or value in (None, False, "none", {}, [])):
            raise ValueError(f"{source}: nanogptx does not know what PEFT's option {name} = {value!r} does")
    with torch.device("meta"):
        layers = linear_layers(build_model(saved.architecture, saved.shape))
    wanted, scales, out = {}, {}, {}
    try:
        sizes = {name: size_of(config, peft_names(saved.architecture, name)[0]) for name in layers}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} describes no adapter for a {saved.architecture} model ({error})") from error
    for name, (rank, scales[name]) in {name: size for name, size in sizes.items() if size}.items():
        thirds = 3 if third_of(saved.architecture, f"{name}.weight") else 1
        n_in, n_out = layers[name].in_features, layers[name].out_features * thirds
        shapes = torch.empty(rank, n_in, device="meta"), torch.empty(n_out, rank, device="meta")
        wanted |= dict(zip(peft_names(saved.architecture, name)[1:], shapes, strict=True))
    if config.get("peft_type") != "LORA" or not wanted:
        raise ValueError(f"{source} describes no LoRA of a layer of this {saved.architecture} model's blocks")
    check_tensors(tensors, wanted, source)
    for name in scales:
        a, b = (tensors[key] for key in peft_names(saved.architecture, name)[1:])
        third = third_of(saved.architecture, f"{name}.weight")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{source}: the adapter of {name} has numbers that are not finite")
        out |= {f"{name}.lora_A": a, f"{name}.lora_B": b.chunk(3)["qkv".index(third)] if third else b}
    return Adapter(out, scales)


def read(folder: Path, base: Saved) -> Adapter:
    """The adapter in a folder of PEFT's, or in a run that trained one; ValueError unless it is one for this base."""
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, as PEFT writes it (other formats can run code when opened)")
    tensors, config = read_safetensors(folder / FILES[1]), files.read_json(folder / FILES[0])
    with safetensors.safe_open(folder / FILES[1], "pt") as file:
        made_for = (file.metadata() or {}).get("nanogptx_base")
    if made_for not in (None, own := fingerprint(base)):
        raise ValueError(f"{folder} was made for another base than this one (their fingerprints are {made_for[:8]} and "
                         f"{own[:8]}): name the one in {FILES[0]}")  # fmt: skip
    return from_peft(base, tensors, config, folder)
