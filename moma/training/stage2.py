"""Stage 2 (Sec. 3.4, Eq. 1): the adapter learns to denoise images of a subject that it is shown.

UNet, VAE, text encoder and MLLM are frozen; trained are the projector, the context K, V, the subject's K', V'
and λ. What the frozen networks make of the data was computed before (`moma.training.cache`).

Letters: B samples, Z latent channels, h w latents, S side of the images, T text tokens, E embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer
from models.unet import UNet
from models.vae import VAE
from moma.app.sheets import Cell, contact_sheet
from moma.data.stream import Position
from moma.data.triplets import Source, open_source
from moma.methods.moma.adapter import Adapter, MoMAHook, condition_rows, reference_features
from moma.methods.moma.attention import ReferenceLayer
from moma.methods.moma.config import MethodConfig
from moma.sampling.config import SampleConfig, check_types
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod
from moma.sampling.pipeline import Job, MoMA, Subject, check_method, reference_latent, to_images
from moma.training.cache import Cache, CacheConfig, Encoder, build_cache, identity
from moma.training.common import (
    VALIDATION_SEED,
    Prepare,
    export_networks,
    start_adapter,
    train_only,
    unpack,
    with_config,
)
from moma.training.config import TrainConfig
from moma.training.order import generator_for, numbered
from moma.training.task import Batch, Delivery
from moma.weights.bundle import Bundle

# Which parameters of the adapter are trained; the mapping and the token are stage 1's.
PARTS = {"moma": ("projector.", "context.", "subject."), "ip_adapter": ("projector.", "context.")}


@dataclass(frozen=True)
class Stage2Config:
    """What stage 2 does beyond the loop's own choices."""

    # "base": a new projector, context K, V and subject K', V', λ as `MethodConfig` starts them, on top of the
    # bundle's mapping and token; "adapter": go on with the bundle's adapter.
    init: Literal["base", "adapter"] = "base"
    # "ip_adapter" is the ablation without Eq. 3: projector and context K, V only, no masks, no reference
    # pass. It is sampled with strength 0 and context_masked off.
    parts: Literal["moma", "ip_adapter"] = "moma"
    # What the context tokens are made of: the decoder's output, or the CLIP embedding of the reference on
    # white (with parts "ip_adapter" the IP-Adapter baseline; `Job.embedding` when sampling).
    embedding: Literal["decoder", "clip"] = "decoder"
    # Share of samples whose embedding is zero, so that guidance has an unconditional row to start from. The
    # paper gives none; 0.05 is IP-Adapter's. The text stays: the frozen UNet knows the empty text already.
    drop_context: float = 0.05
    # The subject term acts at timesteps below this while training: at all of the 1000. The sampler's own
    # limit (MethodConfig) can then be chosen afterwards, and λ sees every timestep.
    subject_below_t: int = 1000
    # Weight of the error inside the subject's mask against 1 outside, before each sample's weights are scaled
    # to a mean of 1; 1 = Eq. 1.
    subject_weight: float = 1.0
    # A sample's loss is weighted by min(SNR, this) / SNR of its timestep (Hang et al. 2023, who take 5),
    # scaled to a mean of 1, so that the fine detail of nearly clean images, where errors are largest, does
    # not outweigh colours and shapes, which are decided in the noise; None = Eq. 1.
    snr_gamma: float | None = None
    # The reference is moved by up to this many latents each way against the target, so that K', V' are found
    # by what is there, not by where it is; 0 = the paper's text, which says nothing of it.
    reference_shift: int = 0
    cache: str = "out/cache"  # folder of what the frozen networks compute, built if it is not there
    cache_batch: int = 16  # samples per call of a network while building it
    cache_workers: int = 4  # threads that decode images while building it
    gradient_checkpointing: bool = False  # recompute the UNet's blocks in the backward: slower, less memory
    validation: str | None = None  # held-out data; None = the training data's first samples are kept back
    validation_samples: int = 64  # enough to tell runs apart, since their draws are fixed
    validation_batch: int = 8
    grid_samples: int = 4  # images of `sample_grid`
    grid_steps: int = 20  # of the sampler; fewer than for a final image, to look at progress

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        check_types(self)
        for name in ("cache_batch", "cache_workers", "validation_batch", "grid_steps", "subject_below_t"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        for name in ("validation_samples", "grid_samples", "reference_shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.drop_context < 1:
            raise ValueError(f"drop_context {self.drop_context}: expected 0 or more, below 1")
        if not 0 < self.subject_weight < float("inf"):
            raise ValueError(f"subject_weight {self.subject_weight}: expected a number above 0")
        if self.snr_gamma is not None and not 0 < self.snr_gamma < float("inf"):
            raise ValueError(f"snr_gamma {self.snr_gamma}: expected a number above 0, or none for Eq. 1")


class Stage2(nn.Module):
    """Batch -> loss of each sample. A sample's draws are in the batch: nothing here is random."""

    def __init__(
        self,
        unet: UNet,
        adapter: Adapter,
        scaling: float,
        image_size: int,
        method: MethodConfig,
        cfg: Stage2Config,
    ) -> None:
        """scaling: the VAE's; image_size: S."""
        super().__init__()
        self.unet, self.adapter = unet, adapter
        self.scaling, self.image_size, self.method, self.cfg = scaling, image_size, method, cfg
        self.schedule = ScheduleConfig()
        self.register_buffer("alphas", alphas_cumprod(self.schedule), persistent=False)
        self.register_buffer("weights", timestep_weights(self.alphas, cfg.snr_gamma), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 1: the mean of (eps(x_t, t, text, context, subject) - noise)², float32 (B,).

        batch: what `Cache.batch` and `draw` give.
        """
        x0 = (batch["mean"].float() + batch["std"].float() * batch["posterior_noise"]) * self.scaling
        t, noise, m_gen = batch["t"], batch["noise"], unpack(batch["m_gen"], self.image_size)
        x_t = add_noise(x0, noise, self.alphas[t][:, None, None, None])  # (B, Z, h, w)

        text, moma = batch["text"], self.cfg.parts == "moma"
        cond = condition_rows(
            self.adapter,
            batch["embedding"].masked_fill(batch["drop"][:, None], 0),  # (B, E)
            text,
            text.new_zeros(text.shape[:2]),  # (B, T); no label: M_gen is given, not made
            self.reference(batch) if moma else [],
            (t < self.cfg.subject_below_t).float(),  # (B,) β is 1 where the subject term acts
            self.method,
        )
        hook = MoMAHook(cond, subject_on=moma, m_gen=m_gen.to(text.dtype) if moma else None)
        eps, _ = self.unet(x_t.to(text.dtype), t, text, hook)  # (B, Z, h, w)

        error = (eps.float() - noise).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        inside = F.adaptive_avg_pool2d(m_gen, error.shape[-2:])  # (B, 1, h, w) in [0, 1]
        weight = 1 + (self.cfg.subject_weight - 1) * inside
        loss = (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))  # (B,)
        return loss * self.weights[t]  # (B,)

    def reference(self, batch: Batch) -> list[ReferenceLayer]:
        """The reference pass (Sec. 3.3): K', V' and M_ref of every self-attention layer, B rows."""
        noises = (batch["ref_posterior_noise"], batch["ref_noise"])
        noises = None if self.method.reference_noise == "none" else noises
        mean, std = batch["ref_mean"], batch["ref_std"]  # (B, Z, h, w)
        label, m_ref = batch["label"], unpack(batch["m_ref"], self.image_size)  # (B, T, ·), (B, 1, S, S)
        if self.cfg.reference_shift:
            mean, std = (moved(x, batch["shift"]) for x in (mean, std))  # (B, Z, h, w)
            m_ref = moved(m_ref, batch["shift"] * (self.image_size // mean.shape[-1]))
        latent = reference_latent(mean, std, noises, self.scaling, self.schedule)
        return reference_features(self.unet, self.adapter, latent.to(label.dtype), label, m_ref, self.method)


def timestep_weights(alphas: Tensor, gamma: float | None) -> Tensor:
    """What a sample's loss counts at each timestep, with a mean of 1: alphas (T,) -> float32 (T,)."""
    snr = alphas / (1 - alphas)  # (T,)
    weights = torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / snr  # (T,)
    return weights / weights.mean()


def moved(x: Tensor, shift: Tensor) -> Tensor:
    """x (B, C, h, w), each moved down and right by shift (B, 2) cells; its edges repeat."""
    b, _, h, w = x.shape
    down, right = shift.unbind(1)  # 2 x (B,)
    rows = (torch.arange(h, device=x.device) - down[:, None]).clamp(0, h - 1)  # (B, h)
    columns = (torch.arange(w, device=x.device) - right[:, None]).clamp(0, w - 1)  # (B, w)
    place = torch.arange(b, device=x.device)[:, None, None]  # (B, 1, 1)
    found = x.movedim(1, -1)[place, rows[:, :, None], columns[:, None, :]]  # (B, h, w, C)
    return found.movedim(-1, 1).contiguous()  # (B, C, h, w)


def draw(numbers: Tensor, seed: int, shape: torch.Size, cfg: Stage2Config, train_steps: int) -> Batch:
    """All that is random about samples `numbers` (B,), each from its own generator; shape (Z, h, w).

    t (B,) uniform over the schedule; drop (B,) bool, whether the embedding is zeroed; shift (B, 2) of the
    reference, in latents; noise (of x_t), posterior_noise, ref_noise (of x_0 of the reference) and
    ref_posterior_noise, float32 (B, Z, h, w).
    """
    generators, far = [generator_for(seed, number) for number in numbers.tolist()], cfg.reference_shift
    each = torch.stack([torch.randn(4, *shape, generator=g) for g in generators], dim=1)  # (4, B, Z, h, w)
    names = ("noise", "posterior_noise", "ref_noise", "ref_posterior_noise")
    return dict(zip(names, each, strict=True)) | {
        "number": numbers,
        "t": torch.stack([torch.randint(train_steps, (), generator=g) for g in generators]),
        "drop": torch.stack([torch.rand((), generator=g) < cfg.drop_context for g in generators]),
        "shift": torch.stack([torch.randint(-far, far + 1, (2,), generator=g) for g in generators]),
    }


@dataclass(frozen=True, eq=False)
class Stage2Task:
    """Stage 2 as the loop sees it (`moma.training.task.Task`)."""

    model: Stage2
    data: Cache
    held_out: Cache | None  # None: the first samples of `data` are not trained on
    seed: int
    vae: VAE
    text: CLIPText
    clip_tokenizer: ClipTokenizer
    shards: tuple[nn.Module, ...] = ()  # the trained part is small: DDP, nothing to cut up

    def deliveries(self, batch_size: int, rank: int, world: int, start: Position) -> Iterator[Delivery]:
        kept = self.model.cfg.validation_samples if self.held_out is None else 0
        items = len(self.data) - kept
        for index, numbers, position in numbered(items, batch_size, rank, world, start, self.seed):
            yield Delivery(self._batch(self.data, index + kept, numbers, self.seed), position)

    def validation(self) -> list[Batch]:
        return list(self._validation(self.model.cfg.validation_samples, self.model.cfg.validation_batch))

    def _validation(self, count: int, size: int) -> Iterator[Batch]:
        """The first `count` held-out samples, with the same draws in every run and no context dropped."""
        data = self.held_out or self.data
        for start in range(0, min(count, len(data)), size):
            index = torch.arange(start, min(start + size, count, len(data)))
            batch = self._batch(data, index, index, VALIDATION_SEED)
            yield batch | {"drop": torch.zeros_like(batch["drop"])}

    def _batch(self, data: Cache, index: Tensor, numbers: Tensor, seed: int) -> Batch:
        samples, model = data.batch(index), self.model
        steps = model.schedule.train_steps
        return samples | draw(numbers, seed, samples["mean"].shape[1:], model.cfg, steps)

    @torch.no_grad()
    def sample_grid(self) -> Image.Image | None:
        """Rows of reference, target, and what the adapter makes of the reference for the target's text."""
        weight = self.model.unet.conv_in.weight
        names = (self.held_out or self.data).names[: self.model.cfg.grid_samples]
        if not names:
            return None
        (batch,) = self._validation(len(names), len(names))
        batch["shift"] = torch.zeros_like(batch["shift"])  # the sheet shows the reference where it is
        batch = {name: value.to(weight.device) for name, value in batch.items()}
        # The adapter's weights are float32, the frozen networks' may not be.
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            drawn = self._draw(batch, names)
        reference, target = (to_images(self.vae.decode(batch[name])) for name in ("ref_mean", "mean"))
        rows = zip(reference, target, drawn, names, strict=True)
        return contact_sheet(
            [
                (Cell(a, ("reference", key)), Cell(b, ("target",)), Cell(c, (text,)))
                for a, b, c, (key, _, text) in rows
            ]
        )

    def _draw(self, batch: Batch, names: Sequence[tuple[str, ...]]) -> list[Image.Image]:
        """One image for each sample of a batch with these (key, label, caption), by the usual sampler."""
        model, cfg = self.model, self.model.cfg
        layers, jobs = model.reference(batch), []
        for i, (_, label, caption) in enumerate(names):
            own = [ReferenceLayer(*(x[i : i + 1] for x in (f.k, f.v, f.keep))) for f in layers]
            subject = Subject(label, reference=None, layers=own)
            jobs.append(Job(subject, caption, seed=i, embedding=batch["embedding"][i : i + 1]))
        pipe = MoMA(
            unet=model.unet, vae=self.vae, text=self.text, llava=None, adapter=model.adapter,
            clip_tokenizer=self.clip_tokenizer, llama_tokenizer=None, image_size=model.image_size,
            method=sampling_method(model),
        )  # fmt: skip
        config = SampleConfig(steps=cfg.grid_steps, strength=float(cfg.parts == "moma"))
        return [result.image for result in pipe.run(jobs, config)]

    def export(self, folder: Path) -> None:
        adapter = self.model.adapter
        tensors = dict(adapter.named_parameters())
        export_networks(folder, {"adapter": (adapter.cfg, tensors)}, sampling_method(self.model))


def sampling_method(model: Stage2) -> MethodConfig:
    """The method that images are drawn with after a training: it never saw masks without Eq. 3."""
    return model.method if model.cfg.parts == "moma" else replace(model.method, context_masked=False)


def build(
    bundle: Bundle,
    data: str | Path,
    config: Stage2Config,
    train: TrainConfig,
    method: MethodConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Stage2Task:
    """Stage 2 on a bundle and training data; the cache is made first where there is none.

    dtype: of the frozen networks. ValueError, before the first weight is read, for what does not fit.
    """
    if config.embedding == "decoder" or config.init == "adapter":
        bundle.config("adapter")  # ValueError where it is missing
    if config.embedding == "decoder":
        check_method(method, bundle)
    if config.init == "base" and method.context_init == "ip_adapter":
        bundle.config("ip_adapter")
    side = bundle.image_size // bundle.config("vae").factor
    if config.reference_shift >= side // 2:
        raise ValueError(f"reference_shift {config.reference_shift}: expected below half of {side} latents")
    held_out = None
    if config.validation is not None:
        place = open_source(config.validation)
        held_out = _cached(bundle, place, f"{config.cache}-validation", config, method, device, dtype)
    cache = _cached(bundle, open_source(data), config.cache, config, method, device, dtype)
    if held_out is None and len(cache) <= config.validation_samples:
        raise ValueError(
            f"training data {str(data)!r}: of {len(cache)} samples, validation_samples keeps back "
            f"{config.validation_samples}: lower it, or give validation data"
        )
    sizes = replace(bundle.config("unet"), gradient_checkpointing=config.gradient_checkpointing)
    unet, vae, text = (
        with_config(bundle, "unet", sizes).build(name, device, dtype).eval().requires_grad_(False)
        for name in ("unet", "vae", "text")
    )
    keep = ("",) if config.init == "adapter" else ("mapping.", "token")
    adapter = start_adapter(bundle, keep, token=False, seed=train.seed).to(device)
    if config.init == "base":
        ip_adapter = bundle.state("ip_adapter") if method.context_init == "ip_adapter" else None
        adapter.init_from_base(unet, method, ip_adapter)
    train_only(adapter, PARTS[config.parts])
    model = Stage2(unet, adapter, vae.cfg.scaling, bundle.image_size, method, config).to(device)
    return Stage2Task(model, cache, held_out, train.seed, vae, text, bundle.clip_tokenizer())


def _cached(
    bundle: Bundle,
    source: Source,
    folder: str,
    config: Stage2Config,
    method: MethodConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Cache:
    """The cache of some data, completed by all ranks together if need be."""
    caching = CacheConfig(batch=config.cache_batch, workers=config.cache_workers)
    expected = identity(bundle, source.fingerprint(), method, config.embedding, dtype, caching)
    several = dist.is_initialized()
    build_cache(
        Path(folder),
        expected,
        source,
        Prepare(bundle.image_size, bundle.config("vision").image_size, method),
        encoder=lambda: Encoder(bundle, method, config.embedding, device, dtype),
        cfg=caching,
        rank=dist.get_rank() if several else 0,
        world=dist.get_world_size() if several else 1,
        wait=dist.barrier if several else lambda: None,
    )
    return Cache(Path(folder), expected, caching)
