"""Conversion of DINO and whole CLIPs: each public layout in, the same network out, or a clear no."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.clip import PRESETS, CLIPConfig
from models.weights.loading import in_memory, joined
from models.weights.public_configs import clip_text_config, clip_vision_config
from moma.evaluate.scorers import load_scorers
from moma.weights.bundle import CLIP_TOKENIZER, Bundle
from moma.weights.sources import DefaultConfigs, read_source
from moma.weights.tiny import build_tokenizers
from tests.compare import assert_close_to_std
from tests.make_checkpoints import (
    TINY,
    clip_json,
    converted,
    draw,
    make_clip,
    make_clip_scorer,
    make_dino,
    make_dino_hf,
    make_dino_training,
    network,
    save,
    write_json,
)
from tests.recipe import normal

Change = Callable[[dict[str, Tensor]], dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    build_tokenizers(folder)
    return folder


def make_text(folder: Path, tokenizers: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Stable Diffusion's text encoder alone."""
    write_json(folder / "config.json", clip_json(TINY.text))
    save(folder / "model.safetensors", network("text", TINY.text, TINY, dtype))
    for file in CLIP_TOKENIZER:
        shutil.copyfile(tokenizers / file, folder / file)
    return folder


def assert_drawn(bundle: Bundle, which: str) -> None:
    """The values are those that tests.make_checkpoints drew, whatever the layout was."""
    for name, value in bundle.build(which).state_dict().items():
        assert torch.equal(value, draw(which + name, tuple(value.shape), value.dtype)), name


# --- DINO ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dino_s16", "dino_b16"])
@pytest.mark.parametrize("make", [make_dino, make_dino_training])
def test_dinos_own_files(tmp_path: Path, make: Callable[..., Path], name: str) -> None:
    bundle, said = converted([make(tmp_path / "dino.pth", TINY, name)], tmp_path / "b")
    assert tuple(bundle.networks) == (name,) and bundle.config(name) == getattr(TINY, name)
    assert_drawn(bundle, name)
    assert "unused" not in said and "sampling also needs" in said


def test_a_training_wrapped_once_more(tmp_path: Path) -> None:
    path = make_dino_training(tmp_path / "dino.pth", TINY)
    teacher = torch.load(path, weights_only=False)["teacher"]
    torch.save({"teacher": {f"module.{key}": value for key, value in teacher.items()}}, path)
    bundle, _ = converted([path], tmp_path / "b")
    assert_drawn(bundle, "dino_s16")


@torch.no_grad()
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("name", ["dino_s16", "dino_b16"])
def test_transformers_folder(tmp_path: Path, name: str, new: bool) -> None:
    """transformers reads the same folder; both see the same in an image."""
    transformers = pytest.importorskip("transformers")
    folder = make_dino_hf(tmp_path / "dino", TINY, name, new)
    bundle, said = converted([folder], tmp_path / "b")
    assert "unused" not in said
    theirs, found = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    pixels = torch.from_numpy(normal("dino/pixels", (2, 3, 32, 32)))
    reference = theirs.eval()(pixels).last_hidden_state[:, 0]
    assert_close_to_std(bundle.build(name).eval()(pixels), reference)


def changed(change: Change, **config: Any) -> Callable[[Path], Path]:
    """A transformers folder of DINO with other tensors, or another config.json."""

    def make(tmp_path: Path) -> Path:
        folder = make_dino_hf(tmp_path / "f", TINY)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        data = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", data | config)
        return folder

    return make


def flat(change: Change) -> Callable[[Path], Path]:
    """DINO's own file with other content."""

    def make(tmp_path: Path) -> Path:
        path = make_dino(tmp_path / "dino.pth", TINY)
        torch.save(change(torch.load(path)), path)
        return path

    return make


def without(name: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


PATCHES_OF_8 = {"patch_embed.proj.weight": torch.ones(24, 3, 8, 8), "pos_embed": torch.ones(1, 17, 24)}
QUERY = "encoder.layer.1.attention.attention.query.weight"
REFUSALS = {
    "patches of 8": (
        flat(lambda t: t | PATCHES_OF_8),
        r"\[1, 17, 24\] and \[24, 3, 8, 8\]",
    ),
    "no pos_embed": (flat(without("pos_embed")), r"\[\] and "),
    "classes": (flat(lambda t: t | {"head.weight": torch.ones(9, 24)}), r"head\.weight"),
    "cut short": (flat(without("blocks.1.attn.qkv.bias")), r"missing: blocks\.1\.attn\.qkv\.bias"),
    "a student": (
        flat(lambda t: {"student": {f"module.backbone.{key}": value for key, value in t.items()}}),
        r"student",
    ),
    "a pooler": (changed(lambda t: t | {"pooler.dense.weight": torch.ones(2, 2)}), r"pooler\.dense\.weight"),
    "a classifier": (changed(lambda t: {f"vit.{key}": x for key, x in t.items()}), r"vit\."),
    "no query": (changed(without(QUERY)), r"missing: blocks\.1\.attn\.qkv\.weight"),
    "a narrow query": (changed(lambda t: t | {QUERY: torch.ones(24, 23)}), r"\[24, 23\]"),
    "DINOv2": (changed(lambda t: t, model_type="dinov2"), "dinov2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path: Path, case: str) -> None:
    make, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as error:
        converted([make(tmp_path)], tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_joined() -> None:
    a, b = torch.arange(6.0).reshape(3, 2), torch.arange(2.0).reshape(1, 2)
    both = joined([in_memory(a, Path("a")), in_memory(b, Path("b"))])
    assert both.shape == (4, 2) and torch.equal(both.read(), torch.cat([a, b]))


# --- CLIP ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip_b32", "clip_l14"])
def test_clip_folder(tmp_path: Path, tokenizers: Path, name: str) -> None:
    """transformers reads the same folder; both see the same in an image and in a text."""
    transformers = pytest.importorskip("transformers")
    folder = make_clip_scorer(tmp_path / "clip", TINY, name, tokenizers)
    bundle, said = converted([folder], tmp_path / "b")
    assert tuple(bundle.networks) == (name,) and bundle.config(name) == getattr(TINY, name)
    assert "unused" not in said
    assert_drawn(bundle, name)
    theirs, ours = transformers.CLIPModel.from_pretrained(folder).eval(), bundle.build(name).eval()
    side = bundle.config(name).vision.image_size
    pixels = torch.from_numpy(normal("clip/pixels", (2, 3, side, side)))
    assert_close_to_std(ours.image_features(pixels), theirs.get_image_features(pixels).pooler_output)
    ids = bundle.clip_tokenizer(name).ids(["a cat", "a dog on the beach"])
    assert ids.shape == (2, 77)
    assert_close_to_std(ours.text_features(ids), theirs.get_text_features(ids).pooler_output)
    (scorer,) = load_scorers(bundle)
    assert "ViT-B/32" in scorer.columns[1] if name == "clip_b32" else "ViT-L/14" in scorer.columns[1]


@pytest.mark.parametrize(
    "sizes, name", [((32, 512, 768, 12, 224), "clip_b32"), ((14, 768, 1024, 16, 224), "clip_l14")]
)
def test_openais_configs(sizes: tuple[int, ...], name: str) -> None:
    """config.json of openai/clip-vit-base-patch32 and -large-patch14, as far as it is no default."""
    patch, projection, width, heads, side = sizes
    public = {
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {
            "hidden_size": projection,
            "intermediate_size": 4 * projection,
            "num_attention_heads": projection // 64,
            "eos_token_id": 2,
        },
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 12 if width == 768 else 24,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": side,
        },
    }
    preset = PRESETS[name.removeprefix("clip_")]
    found = CLIPConfig(clip_text_config(public), clip_vision_config(public))
    assert found == preset == DefaultConfigs().clips[name]


def test_other_clips_stay_the_image_tower(tmp_path: Path, tokenizers: Path) -> None:
    """336 pixels (LLaVA's tower), another activation (OpenCLIP's), or no text tower."""
    assert list(read_source(make_clip(tmp_path / "336", TINY), DefaultConfigs()).networks) == ["vision"]
    wanted = DefaultConfigs(clips={"clip_b32": TINY.clip_b32})
    folder = make_clip_scorer(tmp_path / "clip", TINY, "clip_b32", tokenizers)
    assert list(read_source(folder, wanted).networks) == ["clip_b32"]
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["hidden_act"] = "gelu"
    write_json(folder / "config.json", config)
    assert list(read_source(folder, wanted).networks) == ["vision"]
    folder = make_clip_scorer(tmp_path / "lone", TINY, "clip_b32", tokenizers)
    tensors = torch.load(folder / "pytorch_model.bin")
    images = {name: value for name, value in tensors.items() if not name.startswith("text")}
    torch.save(images, folder / "pytorch_model.bin")
    assert list(read_source(folder, wanted).networks) == ["vision"]


def test_both_clips_and_stable_diffusion_share_a_tokenizer(tmp_path: Path, tokenizers: Path) -> None:
    sources = [make_clip_scorer(tmp_path / name, TINY, name, tokenizers) for name in ("clip_b32", "clip_l14")]
    text = make_text(tmp_path / "text", tokenizers)
    bundle, _ = converted([*sources, text], tmp_path / "b")
    assert set(bundle.networks) == {"text", "clip_b32", "clip_l14"}
    assert [len(load_scorers(bundle)[i].columns) for i in range(2)] == [2, 2]
    # laid out differently is no other tokenizer
    words = json.loads((sources[0] / "vocab.json").read_text(encoding="utf-8"))
    (sources[0] / "vocab.json").write_text(json.dumps(words, indent=2), encoding="utf-8")
    (sources[0] / "merges.txt").write_bytes((sources[0] / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    converted([*sources, text], tmp_path / "c")
    # other words are
    last, other = max(words, key=words.get), next(iter(words))
    swapped = words | {last: words[other], other: words[last]}
    (sources[0] / "vocab.json").write_text(json.dumps(swapped), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json of clip_b32") as error:
        converted([sources[0], text], tmp_path / "d")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"vocab\.json of clip_b32"):
        converted([sources[0]], tmp_path / "d", base=converted([text], tmp_path / "base")[0])


def test_scorers_are_added_to_a_bundle_and_kept(tmp_path: Path, tokenizers: Path) -> None:
    base, _ = converted([make_text(tmp_path / "text", tokenizers)], tmp_path / "base")
    sources = [
        make_dino(tmp_path / "dino.pth", TINY),
        make_clip_scorer(tmp_path / "clip", TINY, "clip_b32", tokenizers),
    ]
    judged, _ = converted(sources, tmp_path / "judged", base)
    assert set(judged.networks) == {"text", "dino_s16", "clip_b32"}
    assert judged.hashes["text.safetensors"] == base.hashes["text.safetensors"]
    half = make_text(tmp_path / "other", tokenizers, torch.float16)
    swapped, _ = converted([half], tmp_path / "swapped", judged)
    for name in ("dino_s16.safetensors", "clip_b32.safetensors"):
        assert swapped.hashes[name] == judged.hashes[name]
    assert swapped.hashes["text.safetensors"] != judged.hashes["text.safetensors"]


def test_dtype_leaves_scorers_alone(tmp_path: Path, tokenizers: Path) -> None:
    sources = [make_dino(tmp_path / "dino.pth", TINY), make_text(tmp_path / "text", tokenizers)]
    bundle, _ = converted(sources, tmp_path / "b", dtype=torch.bfloat16)
    assert {t.dtype for t in bundle.tensors("text").values()} == {torch.bfloat16}
    assert {t.dtype for t in bundle.tensors("dino_s16").values()} == {torch.float32}


def test_tokenizer_of_a_scorer_is_needed_and_checked(tmp_path: Path, tokenizers: Path) -> None:
    folder = make_clip_scorer(tmp_path / "clip", TINY, "clip_b32", tokenizers)
    bundle, _ = converted([folder], tmp_path / "b")
    for file in CLIP_TOKENIZER:
        copy = tmp_path / f"without {file}"
        shutil.copytree(bundle.folder, copy)
        (copy / "tokenizers" / file).unlink()
        with pytest.raises(ValueError, match="missing"):
            Bundle.open(copy)
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"clip_b32: .*merges\.txt"):
        converted([folder], tmp_path / "c")
    small = replace(TINY, clip_b32=replace(TINY.clip_b32, text=replace(TINY.clip_b32.text, vocab=100)))
    folder = make_clip_scorer(tmp_path / "small", small, "clip_b32", tokenizers)
    with pytest.raises(ValueError, match="100"):
        converted([folder], tmp_path / "d")
