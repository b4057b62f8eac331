"""LoRA: fine-tune a model by training a correction of low rank beside each matrix, and leave the matrices alone.

A linear layer computes x W^T; with an adapter, x W^T + scale * (x A^T) B^T, where A is (r, in) and B (out, r) with r
small: r (in + out) numbers are trained instead of in * out. B starts at zero, so training begins exactly at the base.
Afterwards W + scale * B A is a matrix like any other, and the model as fast as before. Hu et al. 2021,
arXiv:2106.09685, section 4.1.

    python nanogptx/lora.py merge out/tales out/lora --out out/letters     base and adapter to a model without adapters

Training is in train.py (its preset `lora`), the files are in adapter.py. Left out: adapters on embeddings and the head,
whose matrix may be the embedding again; quantized bases; DoRA and other relatives.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tyro.conf import Positional

from nanogptx import adapter, checkpoint, files, program
from nanogptx.adapter import Adapter, fits, linear_layers
from nanogptx.huggingface import Saved, Tensors
from nanogptx.tinyllama import ARCHITECTURES

BACK = "bring it back as it was, or say with --init-from where it is now"


class LoRALinear(nn.Linear):
    """A linear layer with a correction beside it: x (..., in) -> x W^T + b + scale * dropout(x) A^T B^T (..., out).

    It has the weight and bias of `base` (the same tensors, which keep their names) and A and B of its own. Hu et al.
    2021, section 4.1; A as in the authors' code, uniform within 1/sqrt(in), where the paper says Gaussian.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        nn.Module.__init__(self)  # nn.Linear's own would make a new weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))  # (r, in)
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)  # what W reads is not dropped
        return super().forward(x) + self.scale * F.linear(F.linear(dropped, self.lora_A), self.lora_B)


# ----------------------------------------------------------------------------------------------------------------------
# Into a model, and out of it


def attach(model: nn.Module, ranks: dict[str, int], scales: dict[str, float], dropout: float = 0.0) -> None:
    """Freeze a model and give the named layers adapters, the only parameters that are trained from now on."""
    if any(isinstance(layer, LoRALinear) for layer in model.modules()):
        raise ValueError("this model has adapters already: merge them first")
    model.requires_grad_(False)
    for name, rank in ranks.items():
        layer = LoRALinear(model.get_submodule(name), rank, scales[name], dropout)
        model.set_submodule(name, layer.train(model.training))


def inject(model: nn.Module, rank: int, alpha: float, targets: str, dropout: float = 0.0, stabilized=False) -> None:
    """Give every layer that `targets` names a new adapter, which changes nothing yet.

    `targets` are patterns with commas between them, see `fits`. The correction is multiplied by alpha / rank or, if
    `stabilized`, by alpha / sqrt(rank), with which it does not fade as the rank grows (Kalajdzievski 2023,
    arXiv:2312.03732). ValueError for a pattern that no layer has, and for sizes that make no sense.
    """
    layers, chosen = linear_layers(model), set()
    for pattern in targets.split(","):
        found = {name for name in layers if fits(pattern.strip(), name)}
        if not found:
            there = ", ".join(sorted({name.split(".", 2)[2] for name in layers}))
            raise ValueError(f"no layer is called {pattern!r}: there are {there}, in blocks.0 and on")
        chosen |= found
    most = min(min(layers[name].weight.shape) for name in chosen)
    if not 1 <= rank <= most:
        raise ValueError(f"a rank of {rank} is none for these layers: choose 1 to {most}, the width of the narrowest")
    if not (0 < alpha < math.inf and 0 <= dropout < 1):
        raise ValueError(f"alpha = {alpha} must be above 0, and dropout = {dropout} a probability below 1")
    scale = alpha / (math.sqrt(rank) if stabilized else rank)
    attach(model, *({name: x for name in layers if name in chosen} for x in (rank, scale)), dropout)


def adapter_of(model: nn.Module, tensors: Tensors | None = None) -> Adapter:
    """A model's adapter: its own tensors, not copies, or those among `tensors`; without scales if it has none."""
    scales = {name: m.scale for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    return Adapter({name: t for name, t in (tensors or model.state_dict()).items() if ".lora_" in name}, scales)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a model's adapter, by name."""
    return {name: t.shape for name, t in adapter_of(model).tensors.items()}


def load(model: nn.Module, change: Adapter, dropout: float = 0.0) -> None:
    """Give a model an adapter that was read or taken from another: it is used, and can be trained on."""
    attach(model, {name: len(change.pair(name)[0]) for name in change.scales}, change.scales, dropout)
    model.load_state_dict(model.state_dict() | change.tensors)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, computed in float32 and rounded once, to W's dtype: (out, in)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)


def merged_tensors(tensors: Tensors, change: Adapter) -> Tensors:
    """The tensors of a model without adapters that computes what base and adapter do."""
    new = {f"{n}.weight": merged(tensors[f"{n}.weight"], *change.pair(n), s) for n, s in change.scales.items()}
    return {name: new.get(name, t) for name, t in tensors.items() if ".lora_" not in name}


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, LoRALinear]:
    """Make plain layers of those with adapters; returns what was taken out, for `unmerge`.

    ValueError if there are none, for instance since they are merged already.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError("this model has no adapters to merge: it never had any, or they are merged already")
    for name, layer in layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(merged(layer.weight, layer.lora_A, layer.lora_B, layer.scale), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    return layers


def unmerge(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Put back what `merge` took out. Nothing is subtracted, which would not give W's bits again."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))


def write_beside(run: Path, change: Adapter, base: str) -> None:
    """Keep the adapter that a run has trained in its folder, in PEFT's format: it is all that others need."""
    config = checkpoint.read_config(run)
    adapter.write(run / "adapter", config["architecture"], change, base, config["base"])


def shape_of(base: Saved, asked: dict) -> dict:
    """The shape of a base with the settings asked for; ValueError for one that its weights do not allow."""
    shape = dataclasses.asdict(ARCHITECTURES[base.architecture][0](**base.shape))
    free = {"dropout", "rope_scaling", *(["block_size"] if shape["position"] != "learned" else [])}
    for name, value in asked.items():
        if name not in free and value != shape.get(name):
            raise ValueError(f"--{name.replace('_', '-')} {value} does not fit the weights of the base: those are for "
                             f"{shape.get(name)}")  # fmt: skip
    return shape | {name: value for name, value in asked.items() if name in free}


def load_base(model: nn.Module, path: str, made_from: str) -> None:
    """Give a model the weights that its run began with; ValueError if they are gone, or others by now."""
    try:
        base = checkpoint.read(Path(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"the model that this run was begun with cannot be read ({error}): {BACK}") from error
    if adapter.fingerprint(base) != made_from:
        raise ValueError(f"the model in {path} has changed since this run was begun with it: {BACK}")
    model.load_state_dict(base.tensors, strict=False)  # adapters are not among them


# ----------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Merge:
    """Make a run directory of a base and an adapter: a model without adapters that computes the same."""

    command: Positional[Literal["merge"]]
    base: Positional[Path]
    """The run directory, or directory of Hugging Face, that the adapter was trained on."""
    adapter: Positional[Path]
    """A folder that PEFT wrote, or the run directory of a training with --lora-rank."""
    out: Path
    """The run directory to make."""

    def __call__(self) -> None:
        files.check_free(self.out)
        base = checkpoint.read(self.base)
        change = adapter.read(self.adapter, base)
        saved = base._replace(tensors=merged_tensors(base.tensors, change), step=0)
        checkpoint.write_run(saved, self.out)
        count = sum(t.numel() for t in change.tensors.values())
        print(f"{self.out}: {checkpoint.summary(saved)}; {len(change.scales)} layers changed by {count:,} parameters")


def main(args: list[str] | None = None) -> None:
    tyro.cli(Merge, args=args)()


if __name__ == "__main__":
    program.run(main)
