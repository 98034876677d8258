"""Trainings by Eq. 1 on a frozen base: a `DenoisingTraining` as the loop's task.

What the frozen networks make of the data was computed before (`moma.training.cache`).

Letters: B samples, Z latent channels, h w latents, S side of the images, E embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from moma.app.sheets import Cell, contact_sheet
from moma.data.stream import Position
from moma.data.triplets import Source, open_source
from moma.sampling.base import Base
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import add_noise, alphas_cumprod
from moma.sampling.interface import Batch, DenoisingTraining, Export, Job, Runtime
from moma.sampling.pipeline import Pipeline, to_images
from moma.training.cache import Cache, CacheConfig, Encoder, build_cache, identity
from moma.training.common import (
    VALIDATION_SEED,
    Prepare,
    decayed_names,
    train_only,
    unpack,
    with_checkpointing,
    write_export,
)
from moma.training.config import Choices, DenoisingConfig
from moma.training.order import generator_for, numbered

# Noises of x_t, of the target's posterior, of the reference's x_t (t = 0) and of its posterior.
NOISES = ("noise", "posterior_noise", "ref_noise", "ref_posterior_noise")


class Denoising(nn.Module):
    """Batch -> loss of each sample. A sample's random numbers are in the batch."""

    def __init__(self, trainable: DenoisingTraining, options: DenoisingConfig) -> None:
        super().__init__()
        self.unet, self.trainable, self.options = trainable.base.unet, trainable, options
        self.scaling, self.image_size = trainable.base.vae.cfg.scaling, trainable.base.image_size
        self.register_buffer("alphas", alphas_cumprod(trainable.base.schedule), persistent=False)
        self.register_buffer("weights", timestep_weights(self.alphas, options.snr_gamma), persistent=False)

    def export(self) -> Export:
        return self.trainable.export()

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 1: the mean of (eps(x_t, t, ...) - noise)², float32 (B,).

        batch: of `Cache.batch` and `draw`.
        """
        x0 = (batch["mean"].float() + batch["std"].float() * batch["posterior_noise"]) * self.scaling
        t, noise, batch = batch["t"], batch["noise"], self.unpacked(batch)
        x_t = add_noise(x0, noise, self.alphas[t][:, None, None, None])  # (B, Z, h, w)

        inputs = self.trainable.inputs(batch)
        x_t = x_t.to(batch["text"].dtype)
        eps, _ = self.unet(x_t, t, inputs.text, inputs.hook, inputs.added)  # (B, Z, h, w)

        error = (eps.float() - noise).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        inside = F.adaptive_avg_pool2d(batch["m_gen"], error.shape[-2:])  # (B, 1, h, w) in [0, 1]
        weight = 1 + (self.options.subject_weight - 1) * inside
        loss = (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))  # (B,)
        return loss * self.weights[t]  # (B,)

    def unpacked(self, batch: Batch) -> Batch:
        """The batch as trainings get it: masks (B, 1, S, S), the dropped embeddings zeroed."""
        masks = {name: unpack(batch[name], self.image_size) for name in ("m_gen", "m_ref")}
        if "embedding" in batch:
            masks["embedding"] = batch["embedding"].masked_fill(batch["drop"][:, None], 0)  # (B, E)
        return batch | masks


def timestep_weights(alphas: Tensor, gamma: float | None) -> Tensor:
    """Weight of a sample's loss at each timestep, with a mean of 1: alphas (T,) -> float32 (T,)."""
    snr = alphas / (1 - alphas)  # (T,)
    weights = torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / snr  # (T,)
    return weights / weights.mean()


def draw(numbers: Tensor, seed: int, shape: torch.Size, drop: float, trainable: DenoisingTraining) -> Batch:
    """Every random number of some samples, each from its own generator.

    Args:
        numbers: of the samples, (B,).
        seed: the run's.
        shape: of latents, (Z, h, w).
        drop: share of samples whose embedding is zeroed.
        trainable: the training, which adds its own.

    Returns:
        The numbers; t (B,) uniform over the schedule; drop (B,) bool; `NOISES`, float32 (B, Z, h, w) each;
        what `trainable.draw` gives.
    """
    rows = []
    for number in numbers.tolist():
        generator = generator_for(seed, number)
        noises = torch.randn(len(NOISES), *shape, generator=generator)  # (4, Z, h, w)
        rows.append(
            dict(zip(NOISES, noises, strict=True))
            | {
                "t": torch.randint(trainable.base.schedule.train_steps, (), generator=generator),
                "drop": torch.rand((), generator=generator) < drop,
            }
            | trainable.draw(generator)
        )
    return {"number": numbers} | {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True, eq=False)
class DenoisingTask:
    """A training as the loop sees it (`moma.training.task.Task`)."""

    model: Denoising
    data: Cache
    held_out: Cache | None  # None: the first samples of `data` are not trained on
    seed: int

    @property
    def shards(self) -> Sequence[nn.Module]:
        return self.model.trainable.shards

    @property
    def decayed(self) -> Sequence[str]:
        return decayed_names(self.model, [f"trainable.{name}" for name in self.model.trainable.decayed])

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        kept = self.model.options.validation_samples if self.held_out is None else 0
        items = len(self.data) - kept
        for index, numbers, position in numbered(items, batch_size, rank, world, start, self.seed):
            yield self._batch(self.data, index + kept, numbers, self.seed), position

    def validation(self) -> list[Batch]:
        options = self.model.options
        return list(self._validation(options.validation_samples, options.validation_batch))

    def _validation(self, count: int, size: int) -> Iterator[Batch]:
        """The first `count` held-out samples, the same in every run, nothing dropped."""
        data = self.held_out or self.data
        for start in range(0, min(count, len(data)), size):
            index = torch.arange(start, min(start + size, count, len(data)))
            batch = self._batch(data, index, index, VALIDATION_SEED)
            yield batch | {"drop": torch.zeros_like(batch["drop"])}

    def _batch(self, data: Cache, index: Tensor, numbers: Tensor, seed: int) -> Batch:
        samples, model = data.batch(index), self.model
        drop = model.options.drop_context
        return samples | draw(numbers, seed, samples["mean"].shape[1:], drop, model.trainable)

    @torch.no_grad()
    def sample_grid(self) -> Image.Image | None:
        """Rows of reference, target, and what the method draws of the reference for the target's text."""
        trainable, options = self.model.trainable, self.model.options
        names = (self.held_out or self.data).names[: options.grid_samples]
        if not names:
            return None
        base = trainable.base
        (batch,) = self._validation(len(names), len(names))
        batch = {name: value.to(base.device) for name, value in batch.items()}
        keys, words, captions = zip(*names, strict=True)
        # Trained weights are float32, the frozen networks' may not be.
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
            subjects = trainable.subjects(self.model.unpacked(batch), words, captions)
            pairs = zip(subjects, captions, strict=True)
            jobs = [Job(subject, text, seed=i) for i, (subject, text) in enumerate(pairs)]
            drawn = list(Pipeline(trainable.drawing()).run(jobs, SampleConfig(options.grid_steps)))
        reference, target = (to_images(base.vae.decode(batch[name])) for name in ("ref_mean", "mean"))
        return contact_sheet(
            [
                (Cell(a, ("reference", key)), Cell(b, ("target",)), Cell(c.image, (text,)))
                for a, b, c, key, text in zip(reference, target, drawn, keys, captions, strict=True)
            ]
        )

    def export(self, folder: Path) -> None:
        write_export(folder, self.model.export())


def build(choices: Choices, runtime: Runtime, data: str | Path) -> DenoisingTask:
    """The task of a `DenoisingTraining`; the cache is built first if it is missing.

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
    held_out = None
    if options.validation is not None:
        place, folder = open_source(options.validation), f"{options.cache}-validation"
        held_out = _cached(choices, runtime, place, folder)
    cache = _cached(choices, runtime, open_source(data), options.cache)
    if held_out is None and len(cache) <= options.validation_samples:
        raise ValueError(
            f"training data {str(data)!r}: of {len(cache)} samples, validation_samples keeps back "
            f"{options.validation_samples}: lower it, or give validation data"
        )
    if options.gradient_checkpointing:
        runtime = replace(runtime, weights=with_checkpointing(bundle))
    return DenoisingTask(model_of(choices, runtime), cache, held_out, seed)


def model_of(choices: Choices, runtime: Runtime) -> Denoising:
    """The training's model as it starts."""
    kind, train, options, stage, method = choices
    trainable = kind(Base.load(runtime), runtime.weights, stage, method, train.seed)
    train_only(trainable, tuple(trainable.trained))
    return Denoising(trainable, options or DenoisingConfig()).to(runtime.device)


def _cached(choices: Choices, runtime: Runtime, source: Source, folder: str) -> Cache:
    """The cache of some data, completed by all ranks together if need be."""
    kind, _, options, _, method = choices
    bundle, caching = runtime.weights, CacheConfig(batch=options.cache_batch, workers=options.cache_workers)
    expected = identity(kind, bundle, source.fingerprint(), method, runtime.dtype, caching)
    several = dist.is_initialized()
    build_cache(
        Path(folder),
        expected,
        source,
        Prepare(bundle.image_size, bundle.config("vision").image_size if kind.embedding else None, method),
        encoder=lambda: Encoder(kind, runtime, method),
        cfg=caching,
        rank=dist.get_rank() if several else 0,
        world=dist.get_world_size() if several else 1,
        wait=dist.barrier if several else lambda: None,
    )
    return Cache(Path(folder), expected, caching)
