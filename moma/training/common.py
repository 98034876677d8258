"""What both stages do alike: images and texts of a sample, the adapter they start from, the export.

Letters: S side of the square images, s side of the image tower's, E embedding.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.clip_image import clip_image
from models.weights.loading import save_tensors
from moma.app.files import write_text
from moma.data.triplets import Triplet
from moma.inputs.preprocess import Reference, make_reference
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.config import DEFAULT, MethodConfig
from moma.weights.bundle import Bundle
from moma.weights.sources import EXPORT, EXPORT_FORMAT

# Draws for validation come from this seed whatever the run's, so that the losses of runs can be compared.
VALIDATION_SEED = 0x56414C


@dataclass(frozen=True, eq=False)
class Sample:
    """A triplet as the networks of stage 2 see it, on the CPU."""

    key: str
    label: str
    caption: str
    image: Tensor  # uint8 (3, S, S): the target, with its background
    m_gen: Tensor  # uint8 (S * S / 8,): the target's mask, `pack`ed
    reference: Tensor  # uint8 (3, S, S): what the UNet sees of the reference
    m_ref: Tensor  # uint8 (S * S / 8,)
    white: Tensor  # (3, s, s): the reference on white as the image tower takes it


@dataclass(frozen=True)
class Prepare:
    """Triplet -> Sample; runs in the data's workers. ValueError for a mask without subject or background."""

    image_size: int  # S
    tower_size: int  # s
    method: MethodConfig

    def __call__(self, triplet: Triplet) -> Sample:
        target, reference = self.squares(triplet)
        seen = reference.white if self.method.reference_background == "white" else reference.photo
        return Sample(
            triplet.key,
            triplet.label,
            triplet.caption,
            image=_bytes(target.photo),
            m_gen=pack(target.mask),
            reference=_bytes(seen),
            m_ref=pack(reference.mask),
            white=clip_image(reference.white, self.tower_size),
        )

    def squares(self, triplet: Triplet) -> tuple[Reference, Reference]:
        """Target and reference; an image without another one is its own."""
        target = make_reference(triplet.image, triplet.mask, self.image_size, self.method)
        if triplet.reference is None:
            return target, target
        return target, make_reference(*triplet.reference, self.image_size, self.method)


def _bytes(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, S, S)


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images (B, 3, S, S) -> what the VAE encodes, [-1, 1]."""
    return (images.float() / 127.5 - 1).to(dtype)


def pack(mask: Tensor) -> Tensor:
    """A mask of 0 and 1, any shape of a multiple of 8 cells -> uint8 (cells / 8,)."""
    return torch.from_numpy(np.packbits(mask.numpy().astype(bool)))


def unpack(bits: Tensor, side: int) -> Tensor:
    """The masks of `pack`, uint8 (B, side² / 8) -> float32 (B, 1, side, side)."""
    shifts = torch.arange(7, -1, -1, device=bits.device)  # (8,)
    return (bits[..., None] >> shifts & 1).float().reshape(-1, 1, side, side)


def start_adapter(bundle: Bundle, keep: tuple[str, ...], token: bool, seed: int) -> Adapter:
    """An adapter in float32 on the CPU: from the bundle's what starts with one of `keep`, the rest new.

    token: whether it must have a learnable token. New weights are PyTorch's own start, drawn from `seed`.
    """
    cfg = bundle.configs.get("adapter")
    state = {} if cfg is None else bundle.state("adapter")
    if cfg is None:
        mllm, vision = bundle.config("llava").llama, bundle.config("vision")
        cfg = AdapterConfig(mllm_dim=mllm.width, embed_dim=vision.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(replace(cfg, learnable_token=cfg.learnable_token or token), bundle.config("unet"))
    kept = {name: tensor.float() for name, tensor in state.items() if name.startswith(keep)}
    adapter.load_state_dict(adapter.state_dict() | kept)
    return adapter


def train_only(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Exactly the parameters whose names start with one of `prefixes` require gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


def refuse_quantised(bundle: Bundle) -> None:
    """ValueError for a LLaVA in few bits: training moves weights by less than their steps."""
    llava = bundle.configs.get("llava")
    if llava is not None and (quant := llava.llama.quant):
        raise ValueError(
            f"{bundle.folder}: its LLaVA is stored in {quant.bits} bits, which cannot be trained; start from "
            "the bundle that it was made of"
        )


def with_config(bundle: Bundle, name: str, config: Any) -> Bundle:
    """The bundle with other settings of a network (not other sizes)."""
    return replace(bundle, configs={**bundle.configs, name: config})


def export_networks(
    folder: Path, networks: Mapping[str, tuple[Any, Mapping[str, Tensor]]], method: MethodConfig
) -> None:
    """Write networks (name -> its config dataclass, its tensors) as a source of convert_weights.py.

    `python convert_weights.py FOLDER --base-bundle BUNDLE --out NEW` puts them into a bundle, whose "method"
    takes over what these weights need otherwise than the default. A folder is valid once its list is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPORT).unlink(missing_ok=True)
    changed = {name: value for name, value in asdict(method).items() if value != getattr(DEFAULT, name)}
    changed.pop("attention", None)  # how it was computed, not what
    entries = {}
    for name, (config, tensors) in networks.items():
        entries[name] = {
            "config": asdict(config),
            "files": list(save_tensors(folder, name, tensors)),
        }
    found = {"format": EXPORT_FORMAT, "method": changed, "networks": entries}
    write_text(folder / EXPORT, json.dumps(found, indent=1))
