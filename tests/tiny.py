"""A complete MoMA bundle that builds in seconds: real networks, small, with pseudo-random weights.

Its images are noise.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from models.dino import DINOConfig
from models.llama import LlamaConfig
from models.llava import LlavaConfig
from models.unet import UNetConfig
from models.vae import SDXL as VAE_SDXL
from models.vae import VAEConfig
from models.weights.loading import in_memory
from moma.methods.moma.adapter import AdapterConfig
from moma.sampling.base import SIZES
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER, BundleWriter, expected_shapes
from moma.weights.tiny import SOURCE, build_tokenizers, draw, with_vocabularies


def _networks() -> dict[str, Any]:
    """Sizes as small as the real structure allows; `with_vocabularies` sets the vocabularies."""
    vision = CLIPVisionConfig(width=32, layers=3, heads=4, mlp=64, image_size=56, patch=14)
    llama = LlamaConfig(width=64, layers=2, heads=4, mlp=128, lm_head=False)
    unet = UNetConfig(
        channels=(32, 64, 64), depth=(1, 1, 0), heads=(4, 4, 4), context_dim=(32, 32, 32), norm_groups=8
    )
    return {
        "unet": unet,
        "vae": VAEConfig(channels=(16, 16, 32, 32), resnets=1, norm_groups=8),
        "text": CLIPTextConfig(width=32, layers=2, heads=4, mlp=64),
        "vision": vision,
        "llava": LlavaConfig(llama=llama, vision=vision),
        "adapter": AdapterConfig(mllm_dim=llama.width, embed_dim=32, learnable_token=True),
    }


def tiny_sdxl() -> dict[str, Any]:
    """Networks for `TinyConfig.networks` on a base like SDXL: two text encoders, pooled text and sizes."""
    networks = _networks()
    text, second = (
        networks["text"],
        CLIPTextConfig(width=48, layers=3, heads=4, mlp=64, act="gelu", projection=40, pad="!"),
    )
    unet = replace(
        networks["unet"],
        depth=(0, 1, 2),
        mid_depth=2,
        context_dim=(text.width + second.width,) * 3,
        linear_projection=True,
        added_cond_dim=second.projection + SIZES * 16,
    )
    vae = replace(networks["vae"], scaling=VAE_SDXL.scaling)
    return networks | {"unet": unet, "vae": vae, "text_2": second}


def tiny_scorers() -> dict[str, Any]:
    """Sizes of scorers to add to `TinyConfig.networks`."""
    sizes = {"width": 32, "layers": 2, "heads": 4, "mlp": 64}
    return {
        "dino_s16": DINOConfig(**sizes, image_size=32, patch=16),
        "clip_b32": CLIPConfig(
            CLIPTextConfig(**sizes, projection=16),
            CLIPVisionConfig(**sizes, projection=16, image_size=32, patch=16),
        ),
    }


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the tiny bundle."""

    image_size: int = 128  # pixels: 16x16 latents
    networks: dict[str, Any] = field(default_factory=_networks)


def build_tiny_bundle(folder: str | Path, seed: int = 0, cfg: TinyConfig | None = None) -> None:
    """Write a bundle of real networks with pseudo-random weights; it appears only when it is complete.

    Args:
        folder: new or empty, else ValueError.
        seed: of the weights.
        cfg: sizes.
    """
    cfg, generator = cfg or TinyConfig(), torch.Generator().manual_seed(seed)
    with BundleWriter(folder, cfg.image_size) as writer, tempfile.TemporaryDirectory() as drafts:
        build_tokenizers(drafts)
        for name in (*CLIP_TOKENIZER, *LLAMA_TOKENIZER):
            writer.add_tokenizer(name, Path(drafts, name))
        networks = with_vocabularies(cfg.networks, Path(drafts))
        for name, config in networks.items():
            shapes = expected_shapes(name, config, networks["unet"])
            tensors = {key: draw(key, shape, generator) for key, shape in shapes.items()}
            lazy = {key: in_memory(value, writer.part) for key, value in tensors.items()}
            writer.add(name, config, lazy, SOURCE)
