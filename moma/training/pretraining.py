"""Pretraining of public networks: endless shuffled batches over items that are numbered."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from models.weights.loading import save_tensors
from moma.data.stream import Position
from moma.training.order import numbered
from moma.training.task import Batch
from moma.weights.bundle import TOWER


class PretrainingTask(ABC):
    """A `moma.training.task.Task` over N items, the last few held out for validation."""

    model: nn.Module
    shards: Sequence[nn.Module] = ()  # the networks are small
    decayed: Sequence[str] = ("",)  # all: they start at random

    def __init__(self, items: int, held_out: int, batch: int, seed: int) -> None:
        self.items, self.held_out, self.batch, self.seed = items - held_out, held_out, batch, seed

    @abstractmethod
    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        """The batch of items (B,), whose random numbers are seeded by `numbers` (B,)."""

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        order = numbered(self.items, batch_size, rank, world, start, self.seed)
        for items, numbers, position in order:
            yield self.assemble(items, numbers), position

    def validation(self) -> list[Batch]:
        held = torch.arange(self.items, self.items + self.held_out)
        return [self.assemble(part, part) for part in held.split(self.batch)]

    def sample_grid(self) -> Image.Image | None:
        return None

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What the task has trained, by name."""

    def export(self, folder: Path) -> None:
        """One file per network; of LLaVA without its frozen tower, as in a bundle."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, network in self.networks().items():
            state = network.state_dict()
            save_tensors(folder, name, {k: v for k, v in state.items() if not k.startswith(TOWER)})
