"""Reference attention: the training-free baseline, and the smallest method that looks at a subject.

The reference, with the label as its text and at t = 0, passes once through the UNet; every self-attention
then attends to its own keys and values and to the reference's. No weights beside the base's. More references,
of one subject or of several, have their keys side by side.

Letters: R rows of a UNet call, H heads, N tokens of a layer, M reference keys, D channels per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from models.attention import attention
from models.unet import Grid, KeysValues
from moma.inputs.preprocess import Reference
from moma.methods.text import Prepared, Subject, TextConditioning, TextToImage, half
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import SolverStep
from moma.sampling.interface import State, StepInputs


class RecordHook:
    """Plain attention that also returns the keys and values of each self-attention."""

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, KeysValues]:
        return attention(q, k, v), (k, v)

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v), None


@dataclass(frozen=True, eq=False)
class ReferenceSubject(Subject):
    layers: list[KeysValues]  # of each self-attention, (1, H, M, D) each


class ReferenceAttention(TextToImage):
    """Text to image that attends to references beside its own image."""

    images = range(1, 65)

    @torch.no_grad()
    def encode_reference(self, reference: Reference, word: str, **options: Any) -> ReferenceSubject:
        base = self.base
        mean, _ = base.encode_image(reference.image)  # (1, Z, h, w)
        label, pooled = base.encode_text([word])  # (1, T, C)
        added = base.added_conditioning(pooled, base.image_size, base.image_size)  # (1, A)
        t = torch.zeros(1, device=base.device, dtype=torch.long)  # (1,)
        _, layers = base.unet(mean * base.vae.cfg.scaling, t, label, RecordHook(), added)
        return ReferenceSubject(word, reference, layers)

    def join_images(self, images: Sequence[ReferenceSubject]) -> ReferenceSubject:
        """The images' keys and values side by side."""
        layers = [
            (torch.cat([k for k, _ in rows], dim=2), torch.cat([v for _, v in rows], dim=2))  # (1, H, M, D)
            for rows in zip(*(one.layers for one in images), strict=True)
        ]
        return replace(images[0], layers=layers)

    def condition(self, prepared: Sequence[Prepared], config: SampleConfig) -> "ReferenceConditioning":
        subjects = [[subject.layers for subject in one.job.subjects] for one in prepared]
        return ReferenceConditioning(*self.encode_texts(prepared, config), subjects + subjects)


@dataclass(frozen=True, eq=False)
class ReferenceConditioning(TextConditioning):
    """The conditioning of a batch and its own attention hook."""

    subjects: list[list[list[KeysValues]]] = field(default_factory=list)  # of R rows, each one's subjects

    def at(self, step: SolverStep, state: State) -> StepInputs:
        return StepInputs(self.text, self.added, self)

    def conditional(self) -> Self:
        return replace(super().conditional(), subjects=half(self.subjects))

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        rows = []
        for i, subjects in enumerate(self.subjects):
            keys, values = zip((k[i : i + 1], v[i : i + 1]), *(one[layer] for one in subjects), strict=True)
            rows.append(attention(q[i : i + 1], torch.cat(keys, dim=2), torch.cat(values, dim=2)))
        return torch.cat(rows), None  # (R, H, N, D)

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v), None
