"""A training step of stage 2: forward, loss and backward of the full-size UNet.

Letters: B samples, Z latent channels, h w latents, S side of the images, T text tokens, E embedding.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.unet import UNet
from models.vae import SD15 as VAE_SD15
from moma.bench.measure import (
    BenchConfig,
    Found,
    Part,
    Ratio,
    in_turn,
    median_of,
    memory_of,
    relative_error,
)
from moma.bench.step import pseudo_random, square
from moma.bench.training_memory import kept_for_backward
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.training import AdapterTraining, AdapterTrainingConfig
from moma.sampling.base import Base
from moma.sampling.device import dtype_name
from moma.sampling.interface import Batch
from moma.sampling.memory import free_memory
from moma.training.common import pack, train_only
from moma.training.config import DenoisingConfig
from moma.training.denoising import Denoising, draw

STEP = "stage 2, forward and backward, batch 1"  # the optimizer's step is short


@dataclass(frozen=True, eq=False)
class Training:
    """One training step: a model with frozen weights in `dtype`, trained ones in float32, and a batch."""

    model: Denoising
    batch: Batch
    dtype: torch.dtype

    def loss(self) -> Tensor:
        """The mean loss of the batch."""
        device = self.batch["mean"].device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(self.batch).mean()

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()

    def gradient(self) -> Tensor:
        """The gradients of all trained parameters, concatenated."""
        self()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten() for p in trained])


def make_training(cfg: BenchConfig, device: torch.device, dtype: torch.dtype, batch: int = 1) -> Training:
    """A step with pseudo-random weights and inputs.

    Args:
        cfg: what is measured.
        device: where.
        dtype: of frozen weights and activations.
        batch: B.
    """
    generator = torch.Generator().manual_seed(cfg.seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    unet = pseudo_random(lambda: UNet(cfg.unet), cfg.seed, device, dtype)
    adapter = pseudo_random(lambda: Adapter(AdapterConfig(), cfg.unet), cfg.seed, device, torch.float32)
    base = Base(unet, SimpleNamespace(cfg=VAE_SD15), (), (), cfg.size)
    weights = SimpleNamespace(
        configs={"adapter": adapter.cfg},
        config=lambda name: cfg.unet,
        state=lambda name: adapter.state_dict(),
    )
    method = AdapterTraining(base, weights, AdapterTrainingConfig(init="adapter"), DEFAULT, cfg.seed)
    train_only(method, method.trained)
    model = Denoising(method, DenoisingConfig()).to(device)
    latents = (batch, VAE_SD15.latent_channels, *cfg.grid)
    mask = F.interpolate(square(cfg), size=cfg.size)  # (1, 1, S, S)
    masks = torch.stack([pack(mask[0, 0])] * batch).to(device)  # (B, S * S / 8)
    states = (batch, cfg.text_tokens, cfg.unet.context_dim[0])
    samples = {
        "embedding": rand(batch, adapter.cfg.embed_dim), "mean": rand(*latents), "std": rand(*latents).abs(),
        "ref_mean": rand(*latents), "ref_std": rand(*latents).abs(), "m_gen": masks, "m_ref": masks,
        "text": rand(*states).to(dtype), "label": rand(*states).to(dtype),
    }  # fmt: skip
    drawn = draw(torch.arange(batch), cfg.seed, latents[1:], model.options.drop_context, method)
    return Training(model, samples | {name: value.to(device) for name, value in drawn.items()}, dtype)


def training(cfg: BenchConfig, device: torch.device, dtype: torch.dtype, baseline: Any) -> Iterator[Found]:
    """The lines of a training step.

    Args:
        cfg: what is measured.
        device: where.
        dtype: of frozen weights and activations.
        baseline: the module tests.baseline, or None.
    """
    kind = dtype_name(dtype)
    ours = make_training(cfg, device, dtype)
    if baseline is None:
        yield Part(STEP, kind, median_of(ours, cfg.repeats), memory=memory_of(ours, device))
        return
    theirs = baseline.training(ours)
    error = relative_error(ours.gradient(), theirs.gradient())
    slow, fast = in_turn(theirs, ours, cfg.repeats)
    yield Part(STEP, kind, fast, memory=memory_of(ours, device))
    what = "stage 2, forward and backward, diffusers with explicit processors / ours"
    yield Ratio(what, kind, cfg.wanted["training"], slow, fast, error)
    # The largest batch depends on what each further sample keeps.
    kept, free = kept_for_backward(theirs.loss), free_memory(device)
    if free is not None and free < cfg.room * kept:
        print(f"{kind}: too little memory for two samples of the baseline, skipped", file=sys.stderr)
        return
    pair = make_training(cfg, device, dtype, batch=2)
    slow = (kept_for_backward(baseline.training(pair).loss) - kept) / 1e9
    fast = (kept_for_backward(pair.loss) - kept_for_backward(ours.loss)) / 1e9
    what = "stage 2, kept for the backward by a sample, diffusers with explicit processors / ours"
    yield Ratio(what, kind, cfg.wanted["batch"], slow, fast, unit="GB")
