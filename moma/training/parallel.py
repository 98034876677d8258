"""One process or many: who we are, how a model is spread, and what ranks tell each other.

Started by `torchrun`, each process is a rank (NCCL on GPUs, Gloo on CPUs); started plainly, there is one.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moma.sampling.device import choose_device

# Ranks wait for rank 0 while it writes a checkpoint; 84 GB to a slow disk take longer than NCCL's 10 minutes.
PATIENCE = timedelta(hours=2)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def once(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, known to all, who wait for it; what keeps it from that is raised on all."""
        made: tuple[Any, Exception | None] = None, None
        if self.main:
            try:
                made = make(), None
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                made = None, error
        value, error = self.share(made)
        if error is not None:
            raise error
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, everywhere."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The ranks' average of a tensor."""
        if self.world > 1:
            dist.all_reduce(value)
        return value / self.world

    def place(self, values: Tensor, like: Tensor) -> Tensor:
        """Rank 0's whole `values` in the form of `like`: on its device, this rank's part if it is cut up."""
        values = values.to(like.device)
        if isinstance(like, DTensor):
            return distribute_tensor(values, like.device_mesh, like.placements)
        if self.world > 1:
            dist.broadcast(values, src=0)
        return values


@contextmanager
def start_ranks(device: str) -> Iterator[Ranks]:
    """Join the run that torchrun has started, if it has; again, if this process has joined it already.

    ValueError for a device that is not there.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        gc.collect()  # a DDP model in a reference cycle would keep the group and its threads alive
        dist.destroy_process_group()


def spread(model: nn.Module, shards: Sequence[nn.Module], ranks: Ranks) -> nn.Module:
    """The model over the ranks: each shard and the rest cut up by FSDP2, or without shards whole under DDP.

    FSDP2 keeps and gathers the weights in their own dtype, so that the losses are those of one process.
    """
    if ranks.world == 1:
        return model
    if not shards:
        # A draw may leave a part unused in a whole batch: the subject term acts at some timesteps only.
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for shard in shards:
        fully_shard(shard, mesh=mesh)
    # The root, too, gives its weights back after each call: between calls all of them are the shards.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def synced(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Ranks average gradients in a step's last call, under FSDP2 in each: unaveraged ones are not cut up."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def gather_weights(model: nn.Module) -> list[FSDPModule]:
    """Make weights under FSDP2 whole on every rank, to be read only, until `reshard` of what is returned."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    return parts


def local(tensor: Tensor) -> Tensor:
    """This rank's part, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts; on all ranks."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
