"""SDXL in the public layouts, and what is refused of its kin."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.weights import keymaps
from models.weights.loading import in_memory, read_checkpoint
from moma import Bundle
from moma.weights.tiny import build_tokenizers
from tests.make_checkpoints import (
    SDXL_TINY,
    TINY,
    converted,
    ldm_tensors,
    make_sd15,
    make_vae,
    network,
    save_sharded,
    write_json,
)

UNET, SECOND = "model.diffusion_model.", keymaps.SDXL_TEXT_PREFIXES[1]
BASE = ("unet", "vae", "text", "text_2")


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    build_tokenizers(folder / "tokenizers")
    return make_sd15(folder / "sdxl", SDXL_TINY, folder / "tokenizers")


@pytest.fixture(scope="module")
def folder_bundle(public: Path) -> Bundle:
    return converted([public], public.parent / "bundle")[0]


def single_file(tmp_path: Path, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> Path:
    tensors = {k: t.read().contiguous() for k, t in ldm_tensors(SDXL_TINY, torch.float32).items()}
    change(tensors)
    save_file(
        tensors, tmp_path / "xl.safetensors", metadata={"modelspec.architecture": "stable-diffusion-xl"}
    )
    return tmp_path / "xl.safetensors"


def test_a_folder_becomes_a_bundle(folder_bundle: Bundle) -> None:
    assert folder_bundle.image_size == 96 and set(folder_bundle.networks) == set(BASE)
    for name in BASE:
        assert folder_bundle.config(name) == getattr(SDXL_TINY, name)
        wanted = network(name, getattr(SDXL_TINY, name), SDXL_TINY, torch.float32, "2" * (name == "text_2"))
        found = folder_bundle.state(name)
        assert all(torch.equal(found.pop(key), tensor.read()) for key, tensor in wanted.items()) and not found
    one, two = folder_bundle.clip_tokenizers()
    assert one.pad_id == one.end_id and two.pad_id == 0


def test_a_single_file_gives_the_same_bundle(folder_bundle: Bundle, tmp_path: Path) -> None:
    """In OpenCLIP's layout q, k and v are one matrix, and the projection is transposed."""
    path = single_file(tmp_path)
    bundle = converted([path], tmp_path / "out", folder_bundle)[0]
    public, ours = load_file(path), bundle.state("text_2")
    assert torch.equal(public[f"{SECOND}text_projection"].T, ours["text_projection.weight"])
    joint = public[f"{SECOND}transformer.resblocks.1.attn.in_proj_weight"].chunk(3)
    for part, matrix in zip("qkv", joint, strict=True):
        assert torch.equal(matrix, ours[f"encoder.layers.1.self_attn.{part}_proj.weight"])
    for name in BASE:
        assert bundle.config(name) == folder_bundle.config(name)
        found = bundle.state(name)
        wanted = folder_bundle.state(name).items()
        assert all(torch.equal(found.pop(key), value) for key, value in wanted) and not found, name


def test_variants_and_shards(public: Path, folder_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(public, tmp_path / "fp16")
    unet, text = tmp_path / "fp16/unet", tmp_path / "fp16/text_encoder_2"
    stem = "diffusion_pytorch_model"
    (unet / f"{stem}.safetensors").rename(unet / f"{stem}.fp16.safetensors")
    tensors = read_checkpoint(text / "model.safetensors")
    whole = {key: in_memory(t.read().clone(), text) for key, t in tensors.items()}
    save_sharded(text, whole, 20_000, "safetensors")
    (text / "model.safetensors").unlink()
    bundle = converted([tmp_path / "fp16"], tmp_path / "out")[0]
    assert bundle.hashes_of(*BASE) == folder_bundle.hashes_of(*BASE)


def test_a_vae_takes_the_unets_scaling(public: Path, folder_bundle: Bundle, tmp_path: Path) -> None:
    """A folder says it, as the fp16-fix VAE's; a file without a config gets it from the UNet."""
    fixed = make_vae(tmp_path / "fix", SDXL_TINY, old=False)
    bare = tmp_path / "sdxl_vae.safetensors"
    shutil.copyfile(fixed / "diffusion_pytorch_model.safetensors", bare)
    hashes = set()
    for i, sources in enumerate(([public, fixed], [public, bare], [bare])):
        base = folder_bundle if sources == [bare] else None
        bundle = converted(sources, tmp_path / f"out{i}", base)[0]
        assert bundle.config("vae").scaling == SDXL_TINY.vae.scaling
        hashes.add(bundle.hashes_of("vae")["vae.safetensors"])
    assert len(hashes) == 1 != folder_bundle.hashes_of("vae")["vae.safetensors"]
    with pytest.raises(ValueError, match=str(TINY.vae.scaling)):
        converted([public, make_vae(tmp_path / "sd15", TINY)], tmp_path / "refused")


def edited(public: Path, tmp_path: Path, file: str, **changes: object) -> Path:
    shutil.copytree(public, tmp_path / "edited", dirs_exist_ok=True)
    path = tmp_path / "edited" / file
    data = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, data | changes)
    return tmp_path / "edited"


def without_first(tensors: dict[str, Tensor]) -> None:
    """The refiner's single text encoder is OpenCLIP's, as the first."""
    for key in [key for key in tensors if key.startswith("conditioner.")]:
        value = tensors.pop(key)
        if key.startswith(SECOND):
            tensors[key.replace("embedders.1.", "embedders.0.")] = value


def inpainting(tensors: dict[str, Tensor]) -> None:
    key = f"{UNET}input_blocks.0.0.weight"
    tensors[key] = torch.ones(len(tensors[key]), 9, 3, 3)


def third(tensors: dict[str, Tensor]) -> None:
    tensors[f"{SECOND}transformer.resblocks.0.attn.in_proj_weight"] = torch.ones(41, 40)


REFUSED = {
    "refiner": ("unet/config.json", {"cross_attention_dim": 1280}, "refiner"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "inpainting"),
    "turbo": ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}, "trailing"),
    "v": ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    "padding": ("tokenizer_2/tokenizer_config.json", {"pad_token": "<pad>"}, "<pad>"),
    "vocabulary": ("tokenizer_2/vocab.json", {"more": 999}, "tokenizer_2"),
    "pooled": ("unet/config.json", {"projection_class_embeddings_input_dim": 70}, "70"),
    "positions": ("text_encoder_2/config.json", {"max_position_embeddings": 64}, "64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_of_other_models_are_refused(public: Path, tmp_path: Path, name: str) -> None:
    file, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        converted([edited(public, tmp_path, file, **changes)], tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"), [(without_first, "refiner"), (inpainting, "inpainting"), (third, "41")]
)
def test_files_of_other_models_are_refused(
    folder_bundle: Bundle, tmp_path: Path, change: Callable, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        converted([single_file(tmp_path, change)], tmp_path / "out", folder_bundle)
    assert "\n" not in str(error.value)


def test_a_file_that_says_turbo_is_refused(folder_bundle: Bundle, tmp_path: Path) -> None:
    path = single_file(tmp_path)
    path.with_suffix(".json").write_text('{"baseModel": "SDXL Turbo"}')
    with pytest.raises(ValueError, match="Turbo"):
        converted([path], tmp_path / "out", folder_bundle)
