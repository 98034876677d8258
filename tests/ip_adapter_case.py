"""A tiny bundle with an IP-Adapter, and the same weights in the public file's layout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.unet import UNetConfig
from models.weights.loading import in_memory
from moma.methods.moma.adapter import AdapterConfig
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER, Bundle, BundleWriter, expected_shapes
from moma.weights.export import public_tensors
from moma.weights.tiny import draw

WIDTH = 24  # of the public image encoder's embeddings; the MoMA adapter's differ


def build_ip_bundle(base: str, target: Path, keep: Sequence[str], trained: bool = False) -> None:
    """A tiny bundle with an IP-Adapter.

    Args:
        base: a tiny bundle.
        target: the new one.
        keep: networks of `base` to keep.
        trained: the adapter is one of train.py's, for LLaVA's image tower; else a public one, beside its
            encoder.
    """
    bundle, generator = Bundle.open(base), torch.Generator().manual_seed(1)
    unet, vision = bundle.config("unet"), bundle.config("vision")
    sizes: dict[str, Any] = {"ip_adapter": AdapterConfig(embed_dim=vision.width if trained else WIDTH)}
    if not trained:
        sizes["ip_vision"] = replace(vision, act="gelu", projection=WIDTH)
    with BundleWriter(target, bundle.image_size) as writer:
        if trained:
            writer.methods = {"ip-adapter": {"image": "white", "encoder": "vision"}}
        for name in keep:
            writer.take(bundle, name)
        for name in (*CLIP_TOKENIZER, *(LLAMA_TOKENIZER if "llava" in keep else ())):
            writer.add_tokenizer(name, bundle.tokenizer(name))
        for name, config in sizes.items():
            shapes = expected_shapes(name, config, unet)
            tensors = {key: draw(key, shape, generator) for key, shape in shapes.items()}
            lazy = {key: in_memory(value, target) for key, value in tensors.items()}
            writer.add(name, config, lazy, "pseudo-random")


def public_layout(state: dict[str, Tensor], unet: UNetConfig) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's tensors as ip-adapter_sd15.bin holds them."""
    found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in public_tensors(state, unet).items():
        group, _, rest = name.partition(".")
        found[group][rest] = tensor
    return found
