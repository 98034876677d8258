"""DINO and whole CLIPs against transformers', on the same pseudo-random weights, float32 on the CPU."""

from functools import partial

import torch
import transformers
from torch import Tensor, nn

from models.clip import CLIP, CLIPConfig
from models.clip import PRESETS as CLIPS
from models.dino import DINO, DINOConfig
from models.dino import PRESETS as DINOS
from models.weights.keymaps import CLIP_WHOLE, DINO_HF_NEW, convert
from tests.parity_case import Case
from tests.parity_language import build, public_text, public_vision, text_ids
from tests.recipe import normal


def public_dino(cfg: DINOConfig) -> transformers.ViTConfig:
    return transformers.ViTConfig(
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        layer_norm_eps=cfg.eps,
        image_size=cfg.image_size,
        patch_size=cfg.patch,
        attn_implementation="eager",
    )


def public_clip(cfg: CLIPConfig) -> transformers.CLIPConfig:
    text, vision = public_text(cfg.text).to_dict(), public_vision(cfg.vision).to_dict()
    sizes = {"vocab_size": cfg.text.vocab, "max_position_embeddings": cfg.text.positions}
    return transformers.CLIPConfig(
        text_config=text | sizes,
        vision_config=vision,
        projection_dim=cfg.text.projection,
        attn_implementation="eager",
    )


def separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """attn.qkv as attn.q, .k and .v."""
    parts = {}
    for name, tensor in state.items():
        values = zip("qkv", tensor.chunk(3), strict=True) if ".attn.qkv." in name else [("qkv", tensor)]
        parts |= {name.replace(".qkv.", f".{letters}."): value for letters, value in values}
    return parts


def dino_pair(cfg: DINOConfig) -> tuple[DINO, nn.Module]:
    """Ours and transformers' with the same weights."""
    ours = build(lambda: DINO(cfg))
    theirs = transformers.ViTModel(public_dino(cfg), add_pooling_layer=False).eval()
    state = separate(ours.state_dict())
    names = convert(DINO_HF_NEW, state, "out").names
    theirs.load_state_dict({name: state[old] for name, (old, _) in names.items()}, strict=True)
    return ours, theirs


def clip_pair(cfg: CLIPConfig) -> tuple[CLIP, nn.Module]:
    """Ours and transformers' with the same weights."""
    ours = build(lambda: CLIP(cfg))
    theirs = transformers.CLIPModel(public_clip(cfg)).eval()
    state = ours.state_dict()
    names = convert(CLIP_WHOLE, state, "out").names
    weights = {name: state[old] for name, (old, _) in names.items()}
    theirs.load_state_dict(weights | {"logit_scale": torch.ones(())}, strict=True)
    return ours, theirs


@torch.no_grad()
def dino_feature(cfg: DINOConfig) -> tuple[Tensor, Tensor]:
    """The class token, (2, C)."""
    ours, theirs = dino_pair(cfg)
    pixels = torch.from_numpy(normal("parity/pixels", (2, 3, cfg.image_size, cfg.image_size)))
    return ours(pixels), theirs(pixels).last_hidden_state[:, 0]


@torch.no_grad()
def clip_features(cfg: CLIPConfig) -> tuple[Tensor, Tensor]:
    """Two images' and two texts' features, each over their standard deviation, (4, P)."""
    ours, theirs = clip_pair(cfg)
    ids = text_ids(cfg.text)
    pixels = torch.from_numpy(normal("parity/pixels", (2, 3, cfg.vision.image_size, cfg.vision.image_size)))
    images = theirs.get_image_features(pixels).pooler_output  # (2, P)
    texts = theirs.get_text_features(ids).pooler_output  # (2, P)
    pairs = (ours.image_features(pixels), images), (ours.text_features(ids), texts)
    mine, reference = (torch.cat([pair[i] / pair[1].std() for pair in pairs]) for i in (0, 1))
    return mine, reference


CASES = [
    Case("DINO ViT-S/16, class token", partial(dino_feature, DINOS["s16"])),
    Case("DINO ViT-B/16, class token", partial(dino_feature, DINOS["b16"])),
    Case("CLIP B/32, images and texts", partial(clip_features, CLIPS["b32"])),
    Case("CLIP L/14 224, images and texts", partial(clip_features, CLIPS["l14"])),
]
