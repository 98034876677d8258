"""The order of samples and the seeds of their random numbers, the same for any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moma.data.stream import Position

# Two odd constants (splitmix's and a prime) spread (seed, number) over the 32 bits that torch's CPU generator
# uses, so that neighbouring seeds and numbers do not collide.
_MIX_SEED, _MIX_NUMBER = 0x9E3779B1, 0x85EBCA77


def generator_for(seed: int, number: int) -> torch.Generator:
    """The generator of one sample of the run."""
    mixed = (seed * _MIX_SEED + number * _MIX_NUMBER) % 2**32
    mixed = ((mixed ^ mixed >> 16) * _MIX_NUMBER) % 2**32
    return torch.Generator().manual_seed(mixed ^ mixed >> 13)


def generators_for(seed: int, numbers: Tensor) -> list[torch.Generator]:
    """The generators of the samples with these numbers (B,)."""
    return [generator_for(seed, number) for number in numbers.tolist()]


def numbered(
    items: int, batch_size: int, rank: int, world: int, start: Position, seed: int
) -> Iterator[tuple[Tensor, Tensor, Position]]:
    """Endless batches of one rank.

    Sample n of the run is item permutation_epoch[n % items]; rank r takes the n with n % world == r, so the
    ranks' i-th batches together are those of one process.

    Args:
        items: how many there are.
        batch_size: B, of this rank.
        rank: of `world`.
        world: number of ranks.
        start: position to continue from, {} = the beginning.
        seed: of the order.

    Yields:
        Items (B,) int64 of 0..items-1, their numbers (B,) in the run, and the position after them.
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
