"""Trainings with a loss of their own on images that workers decode: a `FeatureTraining` as the loop's task.

Letters: B samples.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.data.stream import Item, Position, StreamConfig, once, stream
from moma.data.stream import batches as group
from moma.data.triplets import SkipLog, Source, Triplet, open_source
from moma.inputs.preprocess import ReferenceConfig
from moma.sampling.interface import Batch, FeatureTraining, Runtime
from moma.training.common import decayed_names, squares, train_only, with_checkpointing, write_export
from moma.training.config import Choices

HELD_OUT = "kept back for validation"


@dataclass(frozen=True)
class Read:
    """Triplet -> what the training reads of it, in the data's workers; ValueError for samples kept back."""

    reader: Callable[..., dict[str, Any]]  # of `FeatureTraining.reader`
    image_size: int  # pixels
    method: ReferenceConfig
    kept: frozenset[str] = frozenset()  # keys

    def __call__(self, triplet: Triplet) -> dict[str, Any]:
        if triplet.key in self.kept:
            raise ValueError(HELD_OUT)
        pair = squares(triplet, self.image_size, self.method)
        return self.reader(*pair, triplet.label, triplet.caption)


def collate(items: Sequence[Item]) -> Batch:
    """Tensors stacked, anything else as lists."""
    batch: Batch = {"number": torch.tensor([item.number for item in items])}  # (B,)
    for name, first in items[0].sample.items():
        values = [item.sample[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    return batch


@dataclass(frozen=True, eq=False)
class FeatureTask:
    """A training as the loop sees it (`moma.training.task.Task`)."""

    model: FeatureTraining
    source: Source
    read: Read
    held_out: Sequence[Batch]
    order: StreamConfig
    workers: int

    @property
    def shards(self) -> Sequence[Any]:
        return self.model.shards

    @property
    def decayed(self) -> Sequence[str]:
        return decayed_names(self.model, self.model.decayed)

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        skips = SkipLog(
            report=lambda text: None if text.endswith(HELD_OUT) else warnings.warn(text, stacklevel=2)
        )
        items = stream(self.source, self.order, rank, world, self.workers, start, self.read, skips)
        for some, position in group(items, batch_size, start):
            yield collate(some), position

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
    read = Read(kind.reader(bundle, choices.stage, method), bundle.image_size, method)
    validation = source if options.validation is None else open_source(options.validation)
    held = list(islice(once(validation, transform=read), options.validation_samples))
    if options.validation is None:
        read = replace(read, kept=frozenset(item.key for item in held))
    if options.gradient_checkpointing:
        runtime = replace(runtime, weights=with_checkpointing(bundle))
    model = model_of(choices, runtime)
    size = options.validation_batch
    groups = [collate(held[i : i + size]) for i in range(0, len(held), size)]
    return FeatureTask(model, source, read, groups, StreamConfig(seed, options.lanes), options.workers)


def model_of(choices: Choices, runtime: Runtime) -> FeatureTraining:
    """The training's model as it starts."""
    model = choices.training(runtime, choices.stage, choices.method, choices.train.seed)
    train_only(model, tuple(model.trained))
    return model
