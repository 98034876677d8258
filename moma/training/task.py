"""What the training loop asks of a task; `loop.fit` knows nothing else about it.

Letters: B samples of one rank's batch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import nn

from moma.data.stream import Position
from moma.sampling.interface import Batch


class Task(Protocol):
    """A model and its data.

    model: its parameters with `requires_grad` are trained, everything else is frozen. `model(batch)` gives
    the loss of each sample, float32 (B,); DDP or FSDP wrap it whole. The loop moves a batch's tensors to the
    device and averages the losses; it calls `model` and `sample_grid` under autocast.

    shards: submodules of `model` that FSDP2 shards over the ranks, or () to keep the model whole on every
    rank under DDP. Under FSDP2 each call must use every trained parameter.

    decayed: beginnings of the names of the parameters that weight decay acts on. It pulls towards 0, so that
    what starts elsewhere (copies of trained weights, identities) must not be among them.
    """

    model: nn.Module
    shards: Sequence[nn.Module]
    decayed: Sequence[str]

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        """Endless batches of one rank, on the CPU, each with the position after it.

        The i-th batches of all ranks together are those of one process. "number" (B,) int64 counts the
        samples of the whole run: every random number of a sample comes from a generator seeded by (the run's
        seed, number), so that nothing depends on ranks, workers, accumulation or a restart.

        Args:
            batch_size: samples of this rank.
            rank: of `world`.
            world: number of ranks.
            start: position to continue from, {} = the beginning.
        """

    def validation(self) -> list[Batch]:
        """A few fixed batches, the same on every call and for every rank; may be empty."""

    def sample_grid(self) -> Image.Image | None:
        """Images of fixed validation pairs with the model as it is; None if the task draws none."""

    def export(self, folder: Path) -> None:
        """Write the trained tensors atomically, as files that `convert_weights.py` and a bundle take."""
