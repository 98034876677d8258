"""The recorded MM-Diff: its networks with the recipe's weights, sized as the recordings."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.weights.keymaps import convert
from moma.methods.mm_diff.adapter import MMDiffAdapter, MMDiffSizes, TextLoRA, frozen_context, merge
from moma.methods.mm_diff.keymap import official
from moma.methods.mm_diff.method import MMDiff
from moma.sampling.base import Base
from moma.sampling.diffusion import ScheduleConfig
from tests.recipe import fill, normal

UNET = UNetConfig(
    channels=(64, 128, 256), depth=(0, 1, 2), mid_depth=2, heads=(1, 2, 4), context_dim=(512, 512, 512),
    linear_projection=True, added_cond_dim=512,
)  # fmt: skip
TEXTS = (
    CLIPTextConfig(width=192, layers=3, heads=3, mlp=768),
    CLIPTextConfig(width=320, layers=3, heads=5, mlp=1280, act="gelu", projection=320),
)
VISION = CLIPVisionConfig(width=128, layers=4, heads=2, mlp=512, image_size=224, patch=28, projection=96)
SIZES = MMDiffSizes(
    embed_dim=96, patch_dim=128, text_dims=(192, 320), heads=2,
    text_1=TextLoRA.of(TEXTS[0], 8), text_2=TextLoRA.of(TEXTS[1], 8),
)  # fmt: skip


def tensor(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(normal(f"input/{key}", shape))


def unit(key: str, *shape: int) -> Tensor:
    return nn.functional.normalize(tensor(key, *shape), dim=-1)


def filled(network: nn.Module, rename: Callable[[str], str] = lambda key: key) -> nn.Module:
    fill(network, rename)
    return network.eval().requires_grad_(False)


def official_names(sizes: MMDiffSizes, unet: UNetConfig) -> dict[str, str]:
    """Our parameter -> the key of the released files that its seed is taken from."""
    ours = MMDiffAdapter(sizes, unet).state_dict()
    names = convert(official(unet), ours, "out")
    assert not names.unknown
    found = {old: name for name, (old, _) in names.names.items()}
    return {name: key.removeprefix("unet_adapter.").removeprefix("text.") for name, key in found.items()}


def adapter(sizes: MMDiffSizes = SIZES, unet: UNetConfig = UNET) -> MMDiffAdapter:
    names = official_names(sizes, unet)
    return filled(MMDiffAdapter(sizes, unet), names.__getitem__)


def recorded_method() -> MMDiff:
    """Encoder 2's LoRA is not applied, as in the release."""
    unet, own = filled(UNet(UNET)), adapter()
    encoders = tuple(filled(CLIPText(cfg), _text_key) for cfg in TEXTS)
    vae = VAE(VAEConfig(channels=(16, 16, 32, 32), resnets=1, norm_groups=8))
    base = Base(unet, vae, encoders, (), 256, ScheduleConfig(end="clean"))
    frozen = [(k.clone(), v.clone()) for k, v in frozen_context(unet)]
    merge(own, unet, encoders[:1])
    vision = filled(CLIPVision(VISION), lambda key: f"image_encoder.{_vision_key(key)}")
    return MMDiff(
        base, own, frozen, vision, filled(CLIPVision(VISION), _vision_key), MMDiff.Presets["release"]
    )


def _text_key(name: str) -> str:
    return name if name.startswith("text_projection.") else f"text_model.{name}"


def _vision_key(name: str) -> str:
    return name if name.startswith("visual_projection.") else f"vision_model.{name}"
