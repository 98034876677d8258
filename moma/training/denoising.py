"""Trainings by Eq. 1 on a frozen base: a `DenoisingTraining` as the loop's task.

What the frozen networks make of the data was computed before (`moma.training.cache`).

Letters: B samples, Z latent channels, h w latents, H W sides of the targets, S side of the references,
E embedding.
"""

import math
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
from moma.sampling.diffusion import add_noise, alphas_cumprod
from moma.sampling.interface import Batch, DenoisingTraining, Export, Runtime
from moma.sampling.pipeline import Pipeline, to_images
from moma.training.cache import Cache, CacheConfig, Encoder, build_cache, identity
from moma.training.common import (
    VALIDATION_SEED,
    Prepare,
    decayed_names,
    subject_weighted,
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
        self.sample = options.sample(self.image_size)  # of the targets' height and width
        self.register_buffer("alphas", alphas_cumprod(trainable.base.schedule), persistent=False)
        self.register_buffer("weights", timestep_weights(self.alphas, options.snr_gamma), persistent=False)
        empty = [tokenizer.ids([""]) for tokenizer in trainable.base.tokenizers]  # (1, T) each
        self.register_buffer("empty", torch.cat(empty, dim=1) if empty else None, persistent=False)

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
        x_t = x_t.to(self.trainable.base.dtype)
        eps, maps = self.unet(x_t, t, inputs.text, inputs.hook, inputs.added)  # (B, Z, h, w)

        error = (eps.float() - noise).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        subjects = batch["m_gen"].amax(dim=1, keepdim=True)  # (B, 1, H, W)
        inside = F.adaptive_avg_pool2d(subjects, error.shape[-2:])  # (B, 1, h, w) in [0, 1]
        loss = subject_weighted(error, inside, self.options.subject_weight)  # (B,)
        return loss * self.weights[t] + self.trainable.constraint(maps, batch)  # (B,)

    def unpacked(self, batch: Batch) -> Batch:
        """The batch as trainings get it: masks, text states, what is dropped zeroed or empty."""
        side, target = (self.image_size, self.image_size), (self.sample.height, self.sample.width)
        made = {"m_gen": unpack(batch["m_gen"], *target)}  # (B, n, H, W)
        made["m_ref"] = unpack(batch["m_ref"], *side)  # (B, n, S, S)
        if self.trainable.several:
            made["m_gen"] = made["m_gen"] * batch["present"][:, :, None, None]
            drop = batch["drop_text"]
            made["text_ids"] = torch.where(drop[:, None], self.empty, batch["text_ids"])  # (B, K*T)
            made["places"] = batch["places"].masked_fill(drop[:, None, None], 0)
            return batch | made
        if "embedding" in batch:
            made["embedding"] = batch["embedding"].masked_fill(batch["drop"][:, None], 0)  # (B, E)
        if "text_ids" in batch:
            base, drop, label = self.trainable.base, batch["drop_text"], batch["label_ids"]
            text = torch.where(drop[:, None], self.empty, batch["text_ids"])  # (B, K*T)
            absent = torch.cat([drop, torch.zeros_like(drop)])  # (2B,)
            with torch.no_grad(), torch.autocast(text.device.type, enabled=False):  # as drawing computes them
                states, pooled = base.encode_ids(torch.cat([text, label]), absent)
            made["text_ids"] = text
            made["text"], made["label"] = states.chunk(2)  # (B, T, context_dim) each
            if pooled is not None:
                own, label = pooled.chunk(2)  # (B, P) each
                made["added"] = base.added_conditioning(own, *target)  # (B, A)
                made["label_added"] = base.added_conditioning(label, *side)  # (B, A)
        return batch | made


def timestep_weights(alphas: Tensor, gamma: float | None) -> Tensor:
    """Weight of a sample's loss at each timestep, with a mean of 1: alphas (T,) -> float32 (T,)."""
    snr = alphas / (1 - alphas)  # (T,)
    weights = torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / snr  # (T,)
    return weights / weights.mean()


def draw(
    numbers: Tensor,
    seed: int,
    shapes: tuple[torch.Size, torch.Size],
    options: DenoisingConfig,
    trainable: DenoisingTraining,
) -> Batch:
    """Every random number of some samples, each from its own generator.

    Args:
        numbers: of the samples, (B,).
        seed: the run's.
        shapes: of latents of target and reference, (Z, h, w) each.
        options: with the shares of samples that lack embedding or text.
        trainable: the training, which adds its own.

    Returns:
        The numbers; t (B,) uniform over the schedule; drop and drop_text (B,) bool; `NOISES`, float32
        (B, Z, h, w) each; what `trainable.draw` gives.
    """
    rows = []
    sizes = [math.prod(shape) for shape in shapes for _ in range(2)]  # of the `NOISES`
    shares = torch.tensor([options.drop_context, options.drop_both, options.drop_text])
    image, both, text = shares.double().cumsum(0)
    for number in numbers.tolist():
        generator = generator_for(seed, number)
        noises = torch.randn(sum(sizes), generator=generator).split(sizes)
        noises = (x.view(shapes[i // 2]) for i, x in enumerate(noises))  # (Z, h, w) each
        rows.append(
            dict(zip(NOISES, noises, strict=True))
            | {
                "t": torch.randint(trainable.base.schedule.train_steps, (), generator=generator),
                "drop": (chosen := torch.rand((), generator=generator)) < both,
                "drop_text": (image <= chosen) & (chosen < text),
            }
            | trainable.draw(generator)
        )
    return {"number": numbers} | {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True, eq=False)
class DenoisingTask:
    """A training as the loop sees it (`moma.training.task.Task`)."""

    model: Denoising
    data: Cache
    held_out: Cache | None  # None: the first `kept` samples of `data` are not trained on
    seed: int
    kept: int = 0

    @property
    def shards(self) -> Sequence[nn.Module]:
        return self.model.trainable.shards

    @property
    def decayed(self) -> Sequence[str]:
        """By the names of the whole model, where a LoRA may be found in the network that it changes."""
        trainable = self.model.trainable
        chosen = set(decayed_names(trainable, trainable.decayed))
        own = {id(p) for name, p in trainable.named_parameters() if name in chosen}
        return [name for name, p in self.model.named_parameters() if id(p) in own]

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        items = len(self.data) - self.kept
        if start.get("items", items) != items:
            raise ValueError(
                f"the data has {items} usable samples to train on, and had {start['items']} before: bring it"
                " back to what it was, or go on with --change data"
            )
        for index, numbers, position in numbered(items, batch_size, rank, world, start, self.seed):
            batch = self._batch(self.data, index + self.kept, numbers, self.seed)
            yield batch, position | {"items": items}

    def validation(self) -> list[Batch]:
        count = (self.kept if self.held_out is None else len(self.held_out)) // self._views
        if self.held_out is not None:
            count = min(count, self.model.options.wanted)
        return list(self._validation(count, self.model.options.validation_batch))

    @property
    def _views(self) -> int:
        """Rows of one sample, of which the first is not mirrored."""
        return 1 + self.model.options.flip

    def _validation(self, count: int, size: int) -> Iterator[Batch]:
        """The first `count` held-out samples, the same in every run, nothing dropped."""
        for start in range(0, count, size):
            numbers = torch.arange(start, min(start + size, count))  # (B,)
            batch = self._batch(self.held_out or self.data, numbers * self._views, numbers, VALIDATION_SEED)
            dropped = (name for name in ("drop", "drop_text", "absent") if name in batch)
            yield batch | {name: torch.zeros_like(batch[name]) for name in dropped}

    def _batch(self, data: Cache, index: Tensor, numbers: Tensor, seed: int) -> Batch:
        samples, model = data.batch(index), self.model
        shapes = tuple(samples[name].shape[-3:] for name in ("mean", "ref_mean"))
        return samples | draw(numbers, seed, shapes, model.options, model.trainable)

    @torch.no_grad()
    def sample_grid(self) -> Image.Image | None:
        """Rows of reference, target, and what the method draws of the reference for the target's text."""
        trainable, options = self.model.trainable, self.model.options
        names = (self.held_out or self.data).names[:: self._views][: options.grid_samples]
        if not names:
            return None
        base = trainable.base
        (batch,) = self._validation(len(names), len(names))
        batch = {name: value.to(base.device) for name, value in batch.items()}
        keys, words, captions = zip(*names, strict=True)
        # Trained weights are float32, the frozen networks' may not be.
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
            jobs = trainable.jobs(self.model.unpacked(batch), words, captions)
            drawn = list(Pipeline(trainable.drawing()).run(jobs, self.model.sample))
        first = batch["ref_mean"][:, 0] if trainable.several else batch["ref_mean"]  # (B, Z, h, w)
        reference, target = (to_images(base.vae.decode(mean)) for mean in (first, batch["mean"]))
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
    options.sample(bundle.image_size).check(bundle.config("vae").factor)
    source, held_out = open_source(data), None
    kept = options.kept(source, data)  # before the cache takes its hours
    if options.validation is not None:
        place, folder = open_source(options.validation, "--validation"), f"{options.cache}-validation"
        held_out = _cached(choices, runtime, place, folder)
    cache = _cached(choices, runtime, source, options.cache)
    views = 1 + options.flip
    options.check_kept(kept, len(cache) // views, data)
    if options.gradient_checkpointing:
        runtime = replace(runtime, weights=with_checkpointing(bundle))
    return DenoisingTask(model_of(choices, runtime), cache, held_out, seed, kept * views)


def model_of(choices: Choices, runtime: Runtime) -> Denoising:
    """The training's model as it starts."""
    kind, train, options, stage, method = choices
    trainable = kind(Base.load(runtime), runtime.weights, stage, method, train.seed)
    train_only(trainable, tuple(trainable.trained))
    return Denoising(trainable, options or DenoisingConfig()).to(runtime.device)


def _cached(choices: Choices, runtime: Runtime, source: Source, folder: str) -> Cache:
    """The cache of some data, completed by all ranks together if need be."""
    kind, _, options, stage, method = choices
    bundle, method = runtime.weights, replace(method, geometry=options.geometry)
    behind, faces, sample = kind.background(stage), kind.faces(stage), options.sample(bundle.image_size)
    size = (sample.width, sample.height)
    size = None if size == (bundle.image_size, bundle.image_size) else size
    caching = CacheConfig(
        batch=options.cache_batch, workers=options.cache_workers, max_skipped=options.max_skipped
    )
    expected = identity(
        kind, bundle, source.names(), method, runtime.dtype, caching, options.flip, behind, faces, size
    )
    tower = bundle.config("vision").image_size if kind.embedding else None
    several = dist.is_initialized()
    build_cache(
        Path(folder),
        expected,
        source,
        Prepare(bundle.image_size, tower, method, options.flip, kind.several, behind, faces, size),
        encoder=lambda: Encoder(kind, runtime, method),
        cfg=caching,
        rank=dist.get_rank() if several else 0,
        world=dist.get_world_size() if several else 1,
        wait=dist.barrier if several else lambda: None,
    )
    return Cache(Path(folder), expected, caching)
