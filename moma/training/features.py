"""Trainings with a loss of their own on images that workers decode: a `FeatureTraining` as the loop's task.

Letters: B samples.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.data.stream import Item, KeptBack, Position, StreamConfig, once, skipped_so_far, stream
from moma.data.stream import batches as group
from moma.data.triplets import SkipLog, Source, Triplet, open_source
from moma.inputs.preprocess import ReferenceConfig
from moma.sampling.interface import Batch, FeatureTraining, Runtime
from moma.training.common import (
    decayed_names,
    target_and_reference,
    train_only,
    with_checkpointing,
    write_export,
)
from moma.training.config import Choices
from moma.training.order import generators_for


@dataclass(frozen=True)
class Read:
    """Triplet -> what the training reads of it, in the data's workers; KeptBack for those of validation."""

    reader: Callable[..., dict[str, Any]]  # of `FeatureTraining.reader`
    image_size: int  # pixels
    method: ReferenceConfig
    kept: frozenset[str] = frozenset()  # keys

    def __call__(self, triplet: Triplet) -> dict[str, Any]:
        if triplet.key in self.kept:
            raise KeptBack("kept back for validation")
        pair = target_and_reference(triplet, self.image_size, self.method)
        return self.reader(*pair, triplet.label, triplet.caption)


def collate(items: Sequence[Item]) -> Batch:
    """Tensors stacked, anything else as lists."""
    batch: Batch = {"number": torch.tensor([item.number for item in items])}  # (B,)
    for name, first in items[0].sample.items():
        values = [item.sample[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    return batch


def mirrored_at_random(batch: Batch, seed: int) -> Batch:
    """The batch with the images (B, C, h, w) of every second sample or so mirrored, all of a sample together.

    Args:
        batch: of `collate`.
        seed: of the run.
    """
    coins = [torch.randint(2, (), generator=g) for g in generators_for(seed, batch["number"])]
    chosen = torch.stack(coins).bool()[:, None, None, None]  # (B, 1, 1, 1)
    images = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim == 4}
    return batch | {name: torch.where(chosen, x.flip(-1), x) for name, x in images.items()}


@dataclass(frozen=True, eq=False)
class FeatureTask:
    """A training as the loop sees it (`moma.training.task.Task`)."""

    model: FeatureTraining
    source: Source
    read: Read
    held_out: Sequence[Batch]
    order: StreamConfig
    workers: int
    max_skipped: float
    flip: bool

    @property
    def shards(self) -> Sequence[Any]:
        return self.model.shards

    @property
    def decayed(self) -> Sequence[str]:
        return decayed_names(self.model, self.model.decayed)

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        lost, read = skipped_so_far(start)
        if lost and rank == 0:
            print(f"training data: {lost:,} of {read:,} samples so far ({lost / read:.1%}) could not be used")
        skips = SkipLog(partial(warnings.warn, stacklevel=2), self.max_skipped)
        items = stream(self.source, self.order, rank, world, self.workers, start, self.read, skips)
        for some, position in group(items, batch_size, start):
            batch = collate(some)
            yield mirrored_at_random(batch, self.order.seed) if self.flip else batch, position

    def validation(self) -> list[Batch]:
        return list(self.held_out)

    def sample_grid(self) -> None:
        """Features are no images."""

    def export(self, folder: Path) -> None:
        write_export(folder, self.model.export())


def build(choices: Choices, runtime: Runtime, data: str | Path) -> FeatureTask:
    """The task of a `FeatureTraining`.

    Args:
        choices: the configs.
        runtime: weights and machine; its dtype is that of frozen networks.
        data: folder or pattern (`moma.data.triplets.open_source`).

    Raises:
        ValueError: before the first weight is read, for what does not fit.
    """
    kind, options, seed, method = choices.training, choices.data, choices.train.seed, choices.method
    bundle = runtime.weights
    kind.check(bundle, choices.stage, method)
    source = open_source(data)
    shape = replace(method, geometry=options.geometry)
    read = Read(kind.reader(bundle, choices.stage, method), bundle.image_size, shape)
    kept = options.kept(source, data)
    validation = source if options.validation is None else open_source(options.validation, "--validation")
    held = list(islice(once(validation, transform=read), options.wanted if options.validation else kept))
    if options.validation is None:
        read = replace(read, kept=frozenset(item.key for item in held))
    if options.gradient_checkpointing:
        runtime = replace(runtime, weights=with_checkpointing(bundle))
    model = model_of(choices, runtime)
    size = options.validation_batch
    groups = [collate(held[i : i + size]) for i in range(0, len(held), size)]
    order, given = StreamConfig(seed, options.lanes), (options.workers, options.max_skipped, options.flip)
    return FeatureTask(model, source, read, groups, order, *given)


def model_of(choices: Choices, runtime: Runtime) -> FeatureTraining:
    """The training's model as it starts."""
    model = choices.training(runtime, choices.stage, choices.method, choices.train.seed)
    train_only(model, tuple(model.trained))
    return model
