"""One process or many: this process's rank, how a model is distributed, and communication between ranks.

Under `torchrun` each process is a rank (NCCL on GPUs, Gloo on CPUs); otherwise there is one.
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

# Ranks wait while rank 0 writes a checkpoint; 84 GB on a slow disk take longer than NCCL's 10 minutes.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def once(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 while the others wait; all get its result, or raise its error."""
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
        """Every rank's value, on all ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The average of a tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(value)
        return value / self.world

    def distribute(self, values: Tensor, like: Tensor) -> Tensor:
        """Rank 0's whole `values` in the form of `like`: on its device, this rank's shard if sharded."""
        values = values.to(like.device)
        if isinstance(like, DTensor):
            return distribute_tensor(values, like.device_mesh, like.placements)
        if self.world > 1:
            dist.broadcast(values, src=0)
        return values


@contextmanager
def start_ranks(device: str) -> Iterator[Ranks]:
    """Join the run of torchrun, if there is one; may be entered again inside.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        ValueError: for a device that is not there.
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        gc.collect()  # a DDP model in a reference cycle would keep the group and its threads alive
        dist.destroy_process_group()


def wrap_parallel(model: nn.Module, shards: Sequence[nn.Module], ranks: Ranks) -> nn.Module:
    """Distribute a model.

    FSDP2 keeps and gathers the weights in their own dtype, so that the losses are those of one process.

    Args:
        model: the whole model.
        shards: submodules that FSDP2 shards one by one, and then the rest; () = DDP.
        ranks: that share it.
    """
    if ranks.world == 1:
        return model
    if not shards:
        # A whole batch may leave a part unused: the subject term acts at some timesteps only.
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for shard in shards:
        fully_shard(shard, mesh=mesh)
    # The root, too, frees its gathered weights after each call: between calls all weights are sharded.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def synced(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Average gradients only in a step's last call; FSDP2 does in each, as others are not sharded."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def gather_weights(model: nn.Module) -> list[FSDPModule]:
    """Gather the weights under FSDP2 on every rank, for reading, until `reshard` of the returned modules."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    return parts


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all ranks' shards; called on all ranks."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
