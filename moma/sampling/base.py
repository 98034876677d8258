"""A base model: UNet, autoencoder, one or two text encoders with their tokenizers, and the noise schedule.

Letters: B prompts, T text tokens, C text width, P pooled width, A added conditioning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer, Encoding
from models.unet import UNet, sinusoids
from models.vae import VAE
from models.weights.packed import optimize_layout
from moma.sampling.diffusion import ScheduleConfig
from moma.sampling.finite import Autoencoder, check_finite
from moma.sampling.interface import Runtime, TextStates

NETWORKS = ("unet", "vae", "text")  # of a bundle
SIZES = 6  # numbers in SDXL's size conditioning: height, width, top, left, target height, target width

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
        unet, vae, text = (
            weights.build(name, runtime.device, runtime.dtype).eval().requires_grad_(False)
            for name in NETWORKS
        )
        # Not the VAE: with channels last torch's GroupNorm is less exact on images with flat parts.
        if runtime.pack:
            optimize_layout(unet, runtime.device, runtime.dtype)
        return cls(unet, vae, (text,), (weights.clip_tokenizer(),), weights.image_size)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def encode_text(self, texts: Sequence[str | Encodings]) -> TextStates:
        """What the UNet reads of B texts.

        One text encoder gives its last states (SD1.5). Two give their penultimate states side by side, and
        the pooled state is the last one's (SDXL, arXiv 2307.01952).
        """
        read = [self.tokenize(text) if isinstance(text, str) else text for text in texts]
        ids = [
            torch.tensor([encodings[i].ids for encodings in read], device=self.device)
            for i in range(len(self.tokenizers))
        ]  # of each text encoder (B, T)
        if len(self.text_encoders) == 1:
            states, pooled = self.text_encoders[0](ids[0])  # (B, T, C), (B, P)
        else:
            states = torch.cat(
                [
                    encoder.encoder(encoder.embeddings(own), encoder.cfg.layers - 1)  # (B, T, C_i)
                    for encoder, own in zip(self.text_encoders, ids, strict=True)
                ],
                dim=-1,
            )  # (B, T, C)
            pooled = self.text_encoders[-1](ids[-1])[1]  # (B, P)
        check_finite("text encoder", states, pooled)
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
