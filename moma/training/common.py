"""What both kinds of training share: samples, the trained parameters, the export.

Letters: S side of the square references, H W the targets' sides, s side of the image tower's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor, nn

from models.clip_image import MEAN, STD, clip_image, normalised
from models.weights.loading import save_tensors
from moma.app.files import write_text
from moma.data.triplets import Triplet
from moma.inputs.faces import aligned
from moma.inputs.preprocess import Reference, ReferenceConfig, make_reference, on_noise
from moma.sampling.interface import Export
from moma.weights.bundle import Bundle
from moma.weights.sources import EXPORT, EXPORT_FORMAT

# Random numbers of validation come from this seed whatever the run's, so that losses of runs are comparable.
VALIDATION_SEED = 0x56414C


@dataclass(frozen=True, eq=False)
class Sample:
    """A triplet as the frozen networks see it, on the CPU."""

    key: str
    label: str
    caption: str
    image: Tensor  # uint8 (3, H, W): the target, with its background
    m_gen: Tensor  # uint8 (H * W / 8,): the target's mask, `pack`ed
    reference: Tensor  # uint8 (3, S, S): what the UNet sees of the reference
    m_ref: Tensor  # uint8 (S * S / 8,)
    white: Tensor | None  # (3, s, s): the reference on white (or noise) as the image tower takes it
    end: int | None = None  # of the label's word in the caption
    face: tuple[Tensor, Tensor] | None = None  # embedding (512,) and (3, s, s): aligned, for the image tower
    others: tuple["Sample", ...] = ()  # the image's further subjects


@dataclass(frozen=True)
class Prepare:
    """Triplet -> samples; ValueError for a mask without subject or background."""

    image_size: int  # S
    tower_size: int | None  # s; None = no image tower sees it
    method: ReferenceConfig
    flip: bool = False  # a mirrored one, too
    several: bool = False  # all subjects of a triplet; those that the target cuts off are left out
    background: Literal["white", "noise"] = "white"  # of what the image tower sees
    faces: bool = False  # a subject without a face is left out
    target: tuple[int, int] | None = None  # its width and height; None: those of the references

    @property
    def apart(self) -> bool:
        """Whether targets and references differ in number or shape."""
        return self.several or self.target is not None

    def __call__(self, triplet: Triplet) -> list[Sample]:
        return [self._sample(one) for one in ([triplet, mirrored(triplet)] if self.flip else [triplet])]

    def _sample(self, triplet: Triplet) -> Sample:
        if not (self.several and triplet.others):
            return self._subject(triplet)
        every = (triplet, *triplet.others)
        together, found, faults = reduce(ImageChops.lighter, [one.mask for one in every]), [], []
        for one in every:
            try:
                found.append(self._subject(one, together))
            except ValueError as error:
                faults.append(error)
        if not found:
            raise faults[0]
        return replace(found[0], others=tuple(found[1:]))

    def _subject(self, triplet: Triplet, together: Image.Image | None = None) -> Sample:
        """One subject; together: a mask of all that the target shows."""
        face = None
        if self.faces:
            if triplet.face is None:
                raise ValueError(f"its {triplet.label} has no face: expected embedding and landmarks of one")
            photo = (triplet.reference or (triplet.image,))[0]
            crop = aligned(photo, triplet.face.landmarks, self.tower_size)
            face = triplet.face.embedding, normalised(crop, MEAN, STD)
        target, reference = target_and_reference(triplet, self.image_size, self.method, together, self.target)
        seen = reference.white if self.method.reference_background == "white" else reference.photo
        shown = reference.white
        if self.background == "noise":
            shown = on_noise(reference, crc32(f"{triplet.key} {triplet.label} {triplet.end}".encode()))
        return Sample(
            triplet.key,
            triplet.label,
            triplet.caption,
            image=_bytes(target.photo),
            m_gen=pack(target.mask),
            reference=_bytes(seen),
            m_ref=pack(reference.mask),
            white=None if self.tower_size is None else clip_image(shown, self.tower_size),
            end=triplet.end,
            face=face,
        )


def mirrored(triplet: Triplet) -> Triplet:
    """Left and right exchanged; the texts stay."""
    image, mask = ImageOps.mirror(triplet.image), ImageOps.mirror(triplet.mask)
    reference = triplet.reference and tuple(map(ImageOps.mirror, triplet.reference))
    parts = {"image": image, "mask": mask, "reference": reference}
    parts["face"] = triplet.face and triplet.face.mirrored((triplet.reference or [image])[0].width)
    return replace(
        triplet, key=f"{triplet.key} (mirrored)", **parts, others=tuple(map(mirrored, triplet.others))
    )


def target_and_reference(
    triplet: Triplet,
    size: int,
    method: ReferenceConfig,
    together: Image.Image | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Reference, Reference]:
    """Target and reference; an image without another one is its own reference.

    Args:
        triplet: the sample.
        size: of the reference's square in pixels.
        method: how a square is made.
        together: a mask of all subjects, which the target's part of the image is chosen by.
        shape: width and height of the target, None = the reference's.
    """
    target = make_reference(triplet.image, triplet.mask, shape or size, method, chosen_by=together)
    if triplet.reference is None and together is None and shape is None:
        return target, target
    return target, make_reference(*(triplet.reference or (triplet.image, triplet.mask)), size, method)


def _bytes(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> what the VAE encodes, float32 in [-1, 1]."""
    return images / 127.5 - 1


def subject_weighted(error: Tensor, inside: Tensor, weight: float) -> Tensor:
    """The mean (B,) of an error that counts more on the subject.

    Args:
        error: (B, 1, h, w).
        inside: share of each latent that shows a subject, (B, 1, h, w) in 0..1.
        weight: of the error there, against 1 elsewhere.
    """
    weights = 1 + (weight - 1) * inside  # (B, 1, h, w)
    return (error * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))


def pack(mask: Tensor) -> Tensor:
    """A mask of 0 and 1, any shape of a multiple of 8 cells -> uint8 (cells / 8,)."""
    return torch.from_numpy(np.packbits(mask.numpy().astype(bool)))


def unpack(bits: Tensor, height: int, width: int) -> Tensor:
    """The masks of `pack`, uint8 (B, H * W / 8) or (B, n, H * W / 8) -> float32 (B, n, H, W), n = 1."""
    shifts = torch.arange(7, -1, -1, device=bits.device)  # (8,)
    return (bits[..., None] >> shifts & 1).float().reshape(len(bits), -1, height, width)


def train_only(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Exactly the parameters whose names start with one of `prefixes` require gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


def decayed_names(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """The matrices among the trained parameters whose names start with one of `prefixes`.

    Vectors (biases, scales, λ, a token) never decay.
    """
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and p.ndim > 1 and name.startswith(tuple(prefixes))]


def with_checkpointing(bundle: Bundle) -> Bundle:
    """The bundle, its UNet and LLaVA recomputing their blocks in the backward pass."""
    configs = dict(bundle.configs)
    configs["unet"] = replace(configs["unet"], gradient_checkpointing=True)
    if llava := configs.get("llava"):
        configs["llava"] = replace(llava, llama=replace(llava.llama, gradient_checkpointing=True))
    return replace(bundle, configs=configs)


def write_export(folder: Path, export: Export) -> None:
    """Write trained networks as a source of `convert_weights.py`, which puts them into a bundle.

    A folder is valid once its list of files is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPORT).unlink(missing_ok=True)
    networks = {
        name: {"config": asdict(config), "files": list(save_tensors(folder, name, tensors))}
        for name, (config, tensors) in export.networks.items()
    }
    methods = {"methods": {name: dict(own) for name, own in export.methods.items()}} if export.methods else {}
    data = {"format": EXPORT_FORMAT, "method": dict(export.method), **methods, "networks": networks}
    write_text(folder / EXPORT, json.dumps(data, indent=1))
