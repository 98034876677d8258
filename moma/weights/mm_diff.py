"""The released folder of MM-Diff: three files in a folder, whose image encoders a public CLIP completes."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from models.clip import CLIPConfig
from models.unet import SDXL, UNetConfig, attention_layers
from models.weights.keymaps import CLIP_VISION, convert
from models.weights.loading import LazyTensor, below, read_checkpoint, some_names
from moma.methods.mm_diff.adapter import MMDiffSizes, TextLoRA
from moma.methods.mm_diff.keymap import official
from moma.methods.mm_diff.method import PATCHES, WORDS

Tensors = Mapping[str, LazyTensor]

FILES = {  # -> what its names begin with
    "custom_weights.bin": "",
    "unet_adapter_weights.bin": "unet_adapter.",
    "text_encoder_adapter_weights.bin": "text.",
}
ENCODER = "image_encoder."  # of the first file
PUBLIC, TOWER = "clip_l14", "vision_model."  # the network with the public encoder, and where it is there


def is_mm_diff(path: Path) -> bool:
    """Whether a folder is a released one, whole or not."""
    return any((path / file).is_file() for file in FILES)


def read_mm_diff(path: Path, unet: UNetConfig) -> tuple[MMDiffSizes, Tensors, Tensors]:
    """Sizes and tensors of the adapter in our names, and what is there of the trained image encoder.

    Args:
        path: the folder.
        unet: of the base, or SDXL's where the files have as many layers as that.

    Raises:
        ValueError: for a file that is missing, or one with other tensors.
    """
    if missing := [file for file in FILES if not (path / file).is_file()]:
        raise ValueError(f"{path}: has no {missing[0]}, which belongs to MM-Diff's released weights")
    tensors = {
        start + key: tensor
        for file, start in FILES.items()
        for key, tensor in read_checkpoint(path / file).items()
    }
    vision = below(ENCODER, tensors)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(ENCODER)}
    layers = len({key.split(".")[1] for key in rest if key.startswith("unet_adapter.")}) // 2
    fitting = [cfg for cfg in (unet, SDXL) if len(attention_layers(cfg)) == layers]
    if not fitting:
        raise ValueError(f"{path}: made for a UNet of {layers} attention layers, not SDXL nor the base's")
    found, seen = convert(official(fitting[0]), rest), convert(CLIP_VISION, vision)
    if unknown := found.unknown + seen.unknown:
        raise ValueError(f"{path}: has {some_names(unknown)}, expected the released MM-Diff's tensors")
    named = _scaled({name: rest[key] for name, (key, _) in found.names.items()})
    try:
        sizes = _sizes(named)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: a tensor is missing or misshapen ({error})") from error
    return sizes, named, {name: vision[key] for name, (key, _) in seen.names.items()}


def _scaled(tensors: Tensors) -> dict[str, LazyTensor]:
    """LoRAs with their α / r, where a file has one, in B."""
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    named = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    for key, alpha in alphas.items():
        stem = key.removesuffix("alpha")
        if f"{stem}up" in named:
            scale = float(alpha.read()) / named[f"{stem}up"].shape[1]
            named[f"{stem}up"] = named[f"{stem}up"].map(lambda x, scale=scale: x * scale)
    return named


def _sizes(named: Tensors) -> MMDiffSizes:
    """Read from the shapes."""
    shape = {key: tensor.shape for key, tensor in named.items()}
    widths = [key for key in shape if re.fullmatch(r"images\.proj\.\d+\.weight", key)]
    hidden, subject = shape["head.proj.0.weight"]
    dim, patch = shape["head.refiner.proj_in.weight"]
    inner = shape["head.refiner.layers.0.0.to_q.weight"][0]
    sizes = MMDiffSizes()
    return replace(
        sizes,
        face_dim=subject,
        embed_dim=shape["images.fc.weight"][0],
        patch_dim=patch,
        text_dims=tuple(shape[key][0] for key in sorted(widths)),
        tokens=shape["head.proj.2.weight"][0] // dim,
        hidden=hidden,
        depth=sum(bool(re.fullmatch(r"head\.refiner\.layers\.\d+\.0\.to_q\.weight", key)) for key in shape),
        heads=inner // sizes.head_dim,
        ff_mult=shape["head.refiner.layers.0.1.1.weight"][0] // dim,
        rank=shape["unet.0.attn1.q.down"][0],
        text_1=_text_lora(named, 0),
        text_2=_text_lora(named, 1),
    )


def _text_lora(named: Tensors, encoder: int) -> TextLoRA | None:
    layers = [key for key in named if re.fullmatch(rf"text\.{encoder}\.\d+\.q_proj\.down", key)]
    if not layers:
        return None
    rank, width = named[layers[0]].shape
    mlp = named.get(f"text.{encoder}.0.fc1.up")
    return TextLoRA(len(layers), width, rank, None if mlp is None else mlp.shape[0])


def encoders(trained: Tensors, public: tuple[CLIPConfig, Tensors] | None) -> dict[str, Tensors]:
    """Both image encoders: the public CLIP's, and the same with the tensors that were trained.

    Args:
        trained: of the release, all or some.
        public: config and tensors of CLIP ViT-L/14 (the network "clip_l14").

    Raises:
        ValueError: without it.
    """
    if public is None:
        raise ValueError(
            "mm_diff: needs CLIP ViT-L/14, whose image encoder it uses as it is and, in part, trained; give"
            " the folder of openai/clip-vit-large-patch14 as a source too"
        )
    tower = below(TOWER, public[1])
    return {PATCHES: tower, WORDS: {**tower, **trained}}
