"""Gradients after clipping, and weights after one step of AdamW, of a batch whose rows have different numbers of targets.

gradients.py FOLDER PARTS      writes FOLDER/ddp.safetensors and FOLDER/fsdp.safetensors, whoever computed them
"""

import contextlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanogptx import data, parallel, program, train
from nanogptx.tinyllama import TinyLlama, TinyLlamaConfig

SHAPE = TinyLlamaConfig(n_layer=2, n_head=6, n_kv_head=2, n_embd=36, n_hidden=50, block_size=24, vocab_size=31)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows with 3, 6, ... 21 targets, and one with none."""
    x, y = torch.randint(31, (2, 8, 24), generator=torch.Generator().manual_seed(1))
    for row in range(8):
        y[row, row * 3 :] = data.IGNORE
    return x, y


def results(parts: int, kind: str, world: parallel.World) -> dict[str, torch.Tensor]:
    """Gradients and new weights by name, whole, in rank 0."""
    torch.manual_seed(0)
    model = TinyLlama(SHAPE)
    for parameter in model.parameters():
        parameter.data *= 3
    forward = parallel.wrap(model, kind, world)
    optimizers = train.make_optimizers(model, train.Options(optimizer="adamw", lr=0.01))
    x, y = batch()
    mine = []
    for rows in parallel.share_of(8, parts, world):
        weight = (y[rows] != data.IGNORE).sum().item() * world.size / (y != data.IGNORE).sum().item()
        mine.append(train.Part(x[rows], y[rows], weight))
    off = torch.amp.GradScaler("cpu", enabled=False)
    _, norm = train.train_step(forward, optimizers, mine, 0.1, contextlib.nullcontext, off)
    tensors = {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    tensors |= {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    facts = {"norm": torch.tensor(norm, dtype=torch.float64), "processes": torch.tensor(len(world.gather(0)))}
    return parallel.whole_tensors(tensors, world) | facts


def main() -> None:
    with parallel.open_world("cpu") as world:
        for kind in ("ddp", "fsdp"):
            tensors = results(int(sys.argv[2]), kind, world)
            if world.main:
                save_file({name: t.clone() for name, t in tensors.items()}, Path(sys.argv[1], f"{kind}.safetensors"))


if __name__ == "__main__":
    program.run(main)
