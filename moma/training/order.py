"""The order of samples and the seeds of their draws, the same for any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moma.data.stream import Position

# Two odd constants spread (seed, number) over the 32 bits that torch's CPU generator uses (splitmix's and a
# prime), so that neighbouring numbers and seeds do not meet.
_MIX_SEED, _MIX_NUMBER = 0x9E3779B1, 0x85EBCA77


def generator_for(seed: int, number: int) -> torch.Generator:
    """The generator of one sample of the run: its draws depend on nothing but these two."""
    mixed = (seed * _MIX_SEED + number * _MIX_NUMBER) % 2**32
    mixed = ((mixed ^ mixed >> 16) * _MIX_NUMBER) % 2**32
    return torch.Generator().manual_seed(mixed ^ mixed >> 13)


def numbered(
    items: int, batch_size: int, rank: int, world: int, start: Position, seed: int
) -> Iterator[tuple[Tensor, Tensor, Position]]:
    """Endless batches of this rank: items (B,) int64 of 0..items-1, their numbers (B,), the position after.

    Sample n of the run is item permutation_epoch[n % items]; rank r takes the n with n % world == r, so the
    ranks' i-th batches together are those of one process.
    """
    number, epoch, order = start.get("samples", 0), -1, torch.empty(0)
    while True:
        numbers = torch.arange(number + rank, number + world * batch_size, world)  # (B,)
        chosen = []
        for n in numbers.tolist():
            if n // items != epoch:
                epoch = n // items
                order = torch.randperm(items, generator=generator_for(seed, -1 - epoch))
            chosen.append(int(order[n % items]))
        number += world * batch_size
        yield torch.tensor(chosen), numbers, {"samples": number}
