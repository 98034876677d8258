"""A training step of stage 2: forward, loss and backward of the full-size UNet.

Letters: B samples, Z latent channels, h w latents, S side of the images, T text tokens, E embedding.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.unet import UNet
from models.vae import SD15 as VAE_SD15
from models.vae import VAE
from moma.bench.measure import Bench, Found, Part, in_turn, median_of, memory_of, relative_error
from moma.bench.step import pseudo_random, square
from moma.bench.training_memory import kept_for_backward
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.config import DEFAULT, MethodConfig
from moma.methods.moma.training import AdapterTraining, AdapterTrainingConfig
from moma.sampling.base import Base
from moma.sampling.interface import Batch, DenoisingTraining
from moma.sampling.memory import free_memory
from moma.training.common import pack, train_only
from moma.training.config import DenoisingConfig
from moma.training.denoising import Denoising, draw

STEP = "stage 2, forward and backward, batch 1"  # the optimizer's step is short


class PseudoTraining(AdapterTraining):
    """Stage 2 with a given adapter."""

    def __init__(self, base: Base, adapter: Adapter, method: MethodConfig = DEFAULT) -> None:
        DenoisingTraining.__init__(self, base, None, AdapterTrainingConfig(), method, seed=0)
        self.adapter = adapter


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
        trained = [p for p in self.model.trainable.parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten() for p in trained])


def make_training(bench: Bench, batch: int = 1) -> Training:
    """A step of `batch` samples with pseudo-random weights and inputs."""
    cfg, runtime, generator = bench.cfg, bench.runtime, torch.Generator().manual_seed(bench.cfg.seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(runtime.device)

    unet = pseudo_random(lambda: UNet(cfg.unet), bench)
    trained = replace(bench, runtime=replace(runtime, dtype=torch.float32))
    adapter = pseudo_random(lambda: Adapter(AdapterConfig(), cfg.unet), trained)
    with torch.device("meta"):
        vae = VAE(VAE_SD15)  # batches hold latents
    trainable, options = PseudoTraining(Base(unet, vae, (), (), cfg.size), adapter), DenoisingConfig()
    train_only(trainable, trainable.trained)
    latents = (batch, VAE_SD15.latent_channels, *cfg.grid)
    mask = F.interpolate(square(cfg), size=cfg.size)  # (1, 1, S, S)
    masks = torch.stack([pack(mask[0, 0])] * batch).to(runtime.device)  # (B, S * S / 8)
    states = (batch, cfg.text_tokens, cfg.unet.context_dim[0])
    samples = {
        "embedding": rand(batch, adapter.cfg.embed_dim), "mean": rand(*latents), "std": rand(*latents).abs(),
        "ref_mean": rand(*latents), "ref_std": rand(*latents).abs(), "m_gen": masks, "m_ref": masks,
        "text": rand(*states).to(runtime.dtype), "label": rand(*states).to(runtime.dtype),
    }  # fmt: skip
    drawn = draw(torch.arange(batch), cfg.seed, (latents[1:],) * 2, options, trainable)
    samples |= {name: value.to(runtime.device) for name, value in drawn.items()}
    return Training(Denoising(trainable, options).to(runtime.device), samples, runtime.dtype)


def training(bench: Bench) -> Iterator[Found]:
    """The lines of a training step."""
    ours, baseline, repeats = make_training(bench), bench.baseline, bench.cfg.repeats
    if baseline is None:
        yield Part(STEP, bench.kind, median_of(ours, repeats), memory=memory_of(ours, bench.device))
        return
    theirs = baseline.training(ours)
    error = relative_error(ours.gradient(), theirs.gradient())
    slow, fast = in_turn(theirs, ours, repeats)
    yield Part(STEP, bench.kind, fast, memory=memory_of(ours, bench.device))
    what = "stage 2, forward and backward, diffusers with explicit processors / ours"
    yield bench.ratio(what, "training", slow, fast, error)
    # The largest batch depends on what each further sample keeps.
    kept, free = kept_for_backward(theirs.loss), free_memory(bench.device)
    if free is not None and free < bench.cfg.room * kept:
        print(f"{bench.kind}: too little memory for two samples of the baseline, skipped", file=sys.stderr)
        return
    pair = make_training(bench, batch=2)
    slow = (kept_for_backward(baseline.training(pair).loss) - kept) / 1e9
    fast = (kept_for_backward(pair.loss) - kept_for_backward(ours.loss)) / 1e9
    what = "stage 2, kept for the backward by a sample, diffusers with explicit processors / ours"
    yield bench.ratio(what, "batch", slow, fast, unit="GB")
