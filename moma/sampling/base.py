"""A base model: UNet, autoencoder, one or two text encoders with their tokenizers, and the noise schedule.

Letters: B prompts, T text tokens, C text width, P pooled width, A added conditioning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer, Encoding
from models.unet import UNet, sinusoids
from models.vae import VAE
from models.weights.packed import optimize_layout
from models.weights.widen import widen
from moma.sampling.diffusion import ScheduleConfig
from moma.sampling.finite import Autoencoder, check_finite
from moma.sampling.interface import Runtime, TextStates, text_networks
from moma.sampling.memory import choose_saving, free_memory
from moma.sampling.turns import Turn, Turns

NETWORKS = ("unet", "vae", "text")  # of a bundle
CLEAN = ScheduleConfig(end="clean")  # SDXL's: its sampler, Euler's, ends without noise
SIZES = 6  # numbers in SDXL's size conditioning: height, width, top, left, target height, target width

Change = Callable[[int, Tensor], Tensor]  # see `Base.encode_ids`
Encodings = tuple[Encoding, ...]  # a text as each of the tokenizers reads it


@dataclass(frozen=True, eq=False)
class Base:
    """The networks of Stable Diffusion 1.5 or XL, all on one device and in one dtype."""

    unet: UNet
    vae: VAE
    text_encoders: tuple[CLIPText, ...]
    tokenizers: tuple[ClipTokenizer, ...]  # one per text encoder
    image_size: int  # pixels a side that the model was trained at
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @classmethod
    def load(cls, runtime: Runtime) -> Self:
        """The base of a bundle, in evaluation mode."""
        weights = runtime.weights
        names = ("unet", "vae", *text_networks(weights.config("unet")))
        free = free_memory(runtime.device)
        if runtime.pack and choose_saving(runtime.turns, weights.nbytes(names, runtime.dtype), free)[0]:
            unet, vae, *encoders = taking_turns(runtime, names)
        else:
            unet, vae, *encoders = (load_network(runtime, name) for name in names)
        schedule = CLEAN if unet.cfg.added_cond_dim else ScheduleConfig()
        return cls(unet, vae, tuple(encoders), weights.clip_tokenizers(), weights.image_size, schedule)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode_text(
        self,
        texts: Sequence[str | Encodings],
        absent: Sequence[bool] | None = None,
        change: Change | None = None,
    ) -> TextStates:
        """What the UNet reads of B texts.

        Args:
            texts: to read.
            absent: which of them were not given, see `encode_ids`.
            change: see there.
        """
        read = [self.tokenize(text) if isinstance(text, str) else text for text in texts]
        rows = [[token for encoding in encodings for token in encoding.ids] for encodings in read]
        dropped = None if absent is None else torch.tensor(absent, device=self.device)  # (B,)
        found = self.encode_ids(torch.tensor(rows, device=self.device), dropped, change)
        check_finite("text encoder", *(x for x in found if x is not None))
        return found

    def encode_ids(
        self, ids: Tensor, absent: Tensor | None = None, change: Change | None = None
    ) -> TextStates:
        """What the UNet reads of B texts.

        One text encoder gives its last states (SD1.5). Two give their penultimate states side by side, and
        the pooled state is the last one's; where there is no text, all of it is zero (SDXL, arXiv
        2307.01952).

        Args:
            ids: of each tokenizer, side by side, (B, K*T).
            absent: bool (B,), texts that were not given; their ids are those of "".
            change: number of a text encoder and its token embeddings (B, T, C_i) -> those it reads instead.
        """
        parts = ids.chunk(len(self.text_encoders), dim=1)  # of each text encoder (B, T)
        outputs = [
            encoder.states(own, change and partial(change, i))  # (B, T, C_i) twice, (B, P_i)
            for i, (encoder, own) in enumerate(zip(self.text_encoders, parts, strict=True))
        ]
        pooled = outputs[-1][2]  # (B, P)
        if len(outputs) == 1:
            states = outputs[0][1]  # (B, T, C)
        else:
            states = torch.cat([before for before, *_ in outputs], dim=-1)  # (B, T, C)
            if absent is not None:
                states = states.masked_fill(absent[:, None, None], 0)
                pooled = pooled.masked_fill(absent[:, None], 0)
        return TextStates(states, pooled if self.unet.cfg.added_cond_dim else None)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of latents, (B, Z, h, w) each."""
        encode = Autoencoder(self.vae)
        both = encode(lambda vae: torch.stack(vae.encode(image.to(self.device, vae.dtype))))
        mean, std = both.to(self.dtype)  # of (2, B, Z, h, w)
        return mean, std

    def tokenize(self, text: str) -> Encodings:
        """A text as each tokenizer reads it."""
        return tuple(tokenizer.encode(text) for tokenizer in self.tokenizers)

    def added_conditioning(self, pooled: Tensor | None, height: int, width: int) -> Tensor | None:
        """SDXL's pooled text and sizes (arXiv 2307.01952, Sec. 2.2), for images that are not cropped.

        Args:
            pooled: (B, P) of `encode_text`, None for a base without added conditioning.
            height: of the images in pixels.
            width: likewise.

        Returns:
            (B, A), or None.
        """
        if pooled is None:
            return None
        size_dim = (self.unet.cfg.added_cond_dim - pooled.shape[1]) // SIZES
        numbers = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)  # (6,)
        sizes = sinusoids(numbers, size_dim, self.unet.cfg.time_period).flatten()  # (A - P,)
        return torch.cat([pooled, sizes.to(pooled.dtype).expand(len(pooled), -1)], dim=-1)  # (B, A)


def load_network(runtime: Runtime, name: str, keep: bool = False) -> nn.Module:
    """One network of a bundle, in evaluation mode; the UNet laid out for speed, where `pack` says so.

    Not the VAE: with channels last torch's GroupNorm is less exact on images with flat parts.

    Args:
        runtime: weights and machine.
        name: of the network.
        keep: leave the weights as stored where that is fewer bits than it computes in.
    """
    weights, device, dtype = runtime.weights, runtime.device, runtime.dtype
    pack = runtime.pack and name == "unet"
    if keep and weights.nbytes([name], None) < weights.nbytes([name], dtype):
        return widen(weights.build(name, device).eval().requires_grad_(False), dtype)
    network = weights.build(name, device, dtype, mapped=not pack).eval().requires_grad_(False)
    return optimize_layout(network, device, dtype) if pack else network


def taking_turns(runtime: Runtime, names: Sequence[str]) -> list[Turn]:
    """Networks of which one at a time is in memory; ValueError for files that do not fit them."""
    turns, weights = Turns(), runtime.weights
    for name in names:
        weights.build(name, "meta")
    return [
        Turn(
            turns, partial(load_network, runtime, name, True), weights.config(name),
            runtime.device, runtime.dtype,
        )
        for name in names
    ]  # fmt: skip
