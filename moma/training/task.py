"""What the training loop asks of a stage. `loop.fit` knows nothing else about it.

Letters: B samples of one rank's batch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch import nn

from moma.data.stream import Position

# Tensors with a leading B (on the CPU), or lists of B things. "number" (B,) int64 counts the samples of the
# whole run: every random draw for a sample comes from a generator seeded by (run's seed, number), so that
# nothing depends on ranks, workers, accumulation or a restart.
Batch = dict[str, Any]


class Delivery(NamedTuple):
    """One rank's batch, and the position after it."""

    batch: Batch
    position: Position


class Task(Protocol):
    """One stage of the training.

    model: its parameters with `requires_grad` are trained, everything else is frozen. `model(batch)` gives
    the loss of each sample, float32 (B,); DDP or FSDP wrap it whole. The loop moves a batch's tensors to the
    device and averages the losses; it calls `model` and `sample_grid` under autocast.

    shards: submodules of `model` (blocks of a language model) that FSDP2 cuts up over the ranks, or ()
    to keep the model whole on every rank under DDP. Under FSDP2 each call must use every trained parameter.
    """

    model: nn.Module
    shards: Sequence[nn.Module]

    def deliveries(self, batch_size: int, rank: int, world: int, start: Position) -> Iterator[Delivery]:
        """Endless batches of `batch_size` samples for this rank, from a position ({} = the beginning).

        The samples of all ranks' i-th batches together are those of one process with world * batch_size.
        """

    def validation(self) -> list[Batch]:
        """A few fixed batches, the same on every call and for every rank; may be empty."""

    def sample_grid(self) -> Image.Image | None:
        """Images of fixed validation pairs with the model as it is; None where a stage draws none."""

    def export(self, folder: Path) -> None:
        """Write the trained tensors as files that `convert_weights.py` and a bundle take; atomically."""
