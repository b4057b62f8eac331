"""One run on several processes, started by torchrun: each computes a share of every batch, and gradients are averaged.

    torchrun --nproc-per-node 2 nanogptx/train.py gpt2-small
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 nanogptx/train.py ...

torchrun starts the processes, tells each its number (its *rank*) and, with --max-restarts, starts all of them again
when one dies. There are two ways to hold the model:

    ddp     every process holds all of it; gradients are averaged while the backward pass still computes others
            (Li et al. 2020, arXiv:2006.15704)
    fsdp    every process holds 1/k of each weight, gradient and moment, and gets a block's weights from the others when
            the block is computed (Rajbhandari et al. 2019, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277)

All communication is torch's: NCCL between GPUs, gloo between CPUs. Only rank 0 writes files and speaks; the others
read the run's folder, so it must be on a disk that all machines see.

Left out: cutting a single matrix (tensor parallelism) or the stack of blocks (pipelines).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogptx.device import choose_device

# What needs torch.distributed.tensor is imported where it is used: that takes half a second, which only FSDP needs.


@dataclass(frozen=True)
class World:
    """Who takes part: `size` processes, of which this is number `rank`, and number `local_rank` on its machine."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums of these numbers over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, work: Callable):
        """What `work()` returns in rank 0, which alone does it, in every process; what it raises, in every process."""
        if self.size == 1:
            return work()
        box: list = [None, None]
        if self.main:
            try:
                box[0] = work()
            except (ValueError, OSError) as error:
                box[1] = error
        dist.broadcast_object_list(box, device=self.device)
        if box[1]:
            raise box[1]
        return box[0]

    def gather(self, value) -> list:
        """Every process's value, in the order of ranks, in every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def one_of_node_first(self) -> Iterator[None]:
        """Run the block on one process of each machine, and only then on the others, who find its work done."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            dist.barrier()


def may_be_restarted() -> bool:
    """Whether torchrun starts this process again when one dies (--max-restarts), so that it has to go on with its run.

    Its count of restarts does not tell: where only the other machine's process died, it stays as it was.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def fresh_store() -> dist.Store:
    """Through what processes find each other; ValueError if addresses of processes that died may be in it.

    torchrun gives its own store to every start. On one machine the count of restarts tells starts apart; on several
    machines their counts may differ, but there torchrun can be made to use a new store each time.
    """
    one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    if may_be_restarted() and not one_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "--max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of each "
            "torchrun, and --rdzv-backend c10d: else processes look for the addresses of those that died"
        )
    store, *_ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if one_machine else store


@contextmanager
def open_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started, until the block ends; without torchrun, a world of one.

    Raises ValueError when there is no such device for this process.
    """
    size, rank, local_rank = (int(os.environ.get(name, default)) for name, default in
                              (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    where = choose_device(device)
    if size == 1:
        yield World(where)
        return
    if where.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"each process needs a GPU, and this machine has {gpus}: use --nproc-per-node {gpus}")
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    # The others wait while rank 0 prepares a large text, which may take longer than the default of half an hour.
    backend, patience = "nccl" if where.type == "cuda" else "gloo", timedelta(hours=6)
    dist.init_process_group(backend, store=fresh_store(), rank=rank, world_size=size, timeout=patience)
    try:
        yield World(where, rank, local_rank, size)
    finally:
        dist.destroy_process_group()


def share_of(count: int, parts: int, world: World) -> list[slice]:
    """Which rows of a batch of `count` this process computes, part by part.

    The batch is cut into `parts` equal parts, or, if the processes are more, into one for each; each process takes as
    many of them. So the parts of all processes are those of a single one. ValueError if they cannot be equal.
    """
    each = -(-parts // world.size)
    if count % (each * world.size):
        raise ValueError(
            f"--batch-size {count} cannot be cut into {each * world.size} equal parts (--accumulate {parts}, processes "
            f"{world.size}): choose a multiple of {each * world.size}"
        )
    rows = count // (each * world.size)
    first = world.rank * each
    return [slice(part * rows, (part + 1) * rows) for part in range(first, first + each)]


# ----------------------------------------------------------------------------------------------------------------------
# The model


def wrap(model: nn.Module, kind: str, world: World) -> nn.Module:
    """The model to train with: `model` itself, or one that shares its parameters and averages their gradients.

    After "fsdp" the model's own parameters are shards, so make optimizers afterwards.
    """
    if world.size == 1:
        return model.to(world.device)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model.to(world.device), gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # what is outside the blocks


def averaging(model: nn.Module, now: bool) -> AbstractContextManager:
    """A context for the forward and backward pass of one part: gradients are averaged `now`, or only added up here."""
    if hasattr(model, "no_sync"):  # ddp, compiled or not
        return nullcontext() if now else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # fsdp
        model.set_requires_gradient_sync(now)
    return nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_tensors(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole, plain tensors on the CPU, in rank 0; nothing in the others, who must ask, too."""
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())  # one at a time: all might not fit
    return {name: tensor.detach().cpu() for name, tensor in gathered if world.main}


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is sharded and as large; every process has the whole one."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
