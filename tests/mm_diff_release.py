"""The released folder of MM-Diff in small, with pseudo-random weights."""

from pathlib import Path

import torch

from models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from models.weights.keymaps import convert
from moma import Bundle
from moma.methods.mm_diff.adapter import MMDiffAdapter, MMDiffSizes, TextLoRA
from moma.methods.mm_diff.keymap import official
from moma.weights.bundle import expected_shapes
from moma.weights.tiny import fill
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl

Files = dict[str, dict]
VISION = CLIPVisionConfig(width=32, layers=3, heads=4, mlp=64, image_size=56, patch=14, projection=24)


def base_bundle(folder: Path) -> Bundle:
    """A tiny SDXL with a whole CLIP beside it."""
    text = CLIPTextConfig(width=32, layers=2, heads=4, mlp=64, projection=24)
    networks = tiny_sdxl() | {"clip_l14": CLIPConfig(text, VISION)}
    build_tiny_bundle(folder, 0, TinyConfig(64, networks=networks))
    return Bundle.open(folder)


def small_adapter(base: Bundle) -> MMDiffAdapter:
    one, two = base.config("text"), base.config("text_2")
    sizes = MMDiffSizes(
        embed_dim=24, patch_dim=32, text_dims=(one.width, two.width), hidden=16, depth=2, heads=1, rank=4,
        text_1=TextLoRA.of(one, 3, mlp=True), text_2=TextLoRA.of(two, 5),
    )  # fmt: skip
    adapter = MMDiffAdapter(sizes, base.config("unet"))
    fill(adapter, torch.Generator().manual_seed(0))
    return adapter


def released(base: Bundle, adapter: MMDiffAdapter) -> Files:
    """The content of the three files; the last layer of the image encoder is trained."""
    state = adapter.state_dict()
    named = convert(official(base.config("unet")), state, "out").names
    files: Files = {"custom": {}, "unet_adapter": {}, "text_encoder_adapter": {}}
    for name, (ours, _) in named.items():
        part, _, key = name.partition(".")
        if part == "unet_adapter":
            files["unet_adapter"][key] = state[ours]
        elif part == "text":
            files["text_encoder_adapter"][key] = state[ours]
        else:
            files["custom"].setdefault(part, {})[key] = state[ours]
    shapes = expected_shapes("mm_diff_vision", VISION)
    draw = torch.Generator().manual_seed(1)
    files["custom"]["image_encoder"] = {
        f"vision_model.{name}": 0.2 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
        if name.startswith("encoder.layers.2.")
    }
    return files


def write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, tensors in files.items():
        torch.save(tensors, folder / f"{name}_weights.bin")
    return folder
