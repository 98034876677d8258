"""convert_weights.py, moma/weights/bundle.py, moma/weights/download.py: public formats in, one bundle out,
or a clear no."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SamConfig, SamModel

from convert_weights import CHOICES, convert, main
from models.clip import VISION_PRESETS
from models.sam import Prompts
from models.weights.loading import LazyTensor, read_checkpoint
from moma.weights.bundle import SAMPLING, Bundle, BundleWriter, expected_shapes
from moma.weights.download import KNOWN, MOMA_FILE, DownloadConfig, by_hand, download
from moma.weights.sources import DefaultConfigs, guess_tower
from moma.weights.tiny import build_tokenizers
from tests.compare import assert_close_to_std
from tests.helpers import MINI
from tests.make_checkpoints import (
    TINY,
    converted,
    draw,
    ldm_tensors,
    make_clip,
    make_clip_scorer,
    make_dino_hf,
    make_ip_adapter,
    make_ip_vision,
    make_ldm,
    make_llava,
    make_llava_hf,
    make_moma,
    make_sam,
    make_sam_hf,
    make_sd15,
    make_vae,
    sam_json,
    write_json,
)
from tests.recipe import normal, uniform


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each checkpoint that a complete bundle needs."""
    folder = tmp_path_factory.mktemp("public")
    build_tokenizers(folder / "tokenizers")
    make_sd15(folder / "sd15", TINY, folder / "tokenizers")
    make_vae(folder / "vae", TINY)
    make_clip(folder / "clip", TINY)
    make_llava(folder / "llava", TINY, folder / "tokenizers")
    make_moma(folder / MOMA_FILE, TINY)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion in one file."""
    return make_ldm(tmp_path_factory.mktemp("single") / "m.safetensors", TINY)


@pytest.fixture(scope="module")
def complete(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "moma"
    convert([public / name for name in ("sd15", "vae", "clip", "llava", MOMA_FILE)], out, say=lambda _: None)
    return Bundle.open(out)


def state(bundle: Bundle, name: str) -> dict[str, Tensor]:
    return bundle.build(name).state_dict()


def assert_drawn(
    values: dict[str, Tensor],
    dtype: torch.dtype,
    salt: str = "",
    drop: str = "",
    cast: torch.dtype | None = None,
) -> None:
    """The values are those that tests.make_checkpoints drew for these names, whatever the layout was."""
    for name, value in values.items():
        wanted = draw(salt + name.removeprefix(drop), tuple(value.shape), dtype)
        assert torch.equal(value, wanted.to(cast or dtype)), name


# --- every format -------------------------------------------------------------------------------------


def test_complete_set(complete: Bundle) -> None:
    assert tuple(complete.networks) == SAMPLING
    assert_drawn(state(complete, "unet"), torch.float32)
    assert_drawn(state(complete, "vae"), torch.float32, "mse")
    assert_drawn(state(complete, "text"), torch.float32)
    assert_drawn(state(complete, "vision"), torch.float32, "tower")
    llava = state(complete, "llava")
    tower = {name: value for name, value in llava.items() if name.startswith("tower.")}
    assert_drawn(tower, torch.float32, "tower", drop="tower.")
    assert_drawn({name: v for name, v in llava.items() if name not in tower}, torch.float16)
    for name, value in state(complete, "adapter").items():
        kind = torch.float16 if name.startswith(("context", "subject")) else torch.float32
        assert torch.equal(value, draw(name, tuple(value.shape), torch.float32).to(kind)), name
    assert complete.configs["unet"] == TINY.unet
    assert complete.config("llava").llama.lm_head and "llama.lm_head.weight" not in llava
    assert "llama.lm_head.weight" in complete.build("llava", lm_head=True).state_dict()
    assert len(complete.clip_tokenizer().encode("a cat").ids) == TINY.text.positions
    assert complete.llama_tokenizer().encode("a cat")
    for file, digest in complete.hashes.items():
        assert hashlib.sha256((complete.folder / file).read_bytes()).hexdigest() == digest


@pytest.mark.slow  # converts large parts again
def test_the_order_of_llava_and_clip_does_not_matter(public: Path, complete: Bundle, tmp_path: Path) -> None:
    bundle, _ = converted([public / n for n in (MOMA_FILE, "llava", "clip", "sd15", "vae")], tmp_path / "b")
    assert bundle.hashes == complete.hashes


@pytest.mark.parametrize("name", ["a.ckpt", pytest.param("a.safetensors", marks=pytest.mark.slow)])
def test_single_file(complete: Bundle, tmp_path: Path, name: str) -> None:
    source = make_ldm(tmp_path / name, TINY, salt="c")
    bundle, _ = converted([source], tmp_path / "b", complete)
    for network in ("unet", "vae", "text"):
        assert_drawn(state(bundle, network), torch.float16, "c")


def test_swap_keeps_the_rest(complete: Bundle, tmp_path: Path) -> None:
    source = make_ldm(tmp_path / "community.safetensors", TINY, salt="c", vae=False, text=False)
    bundle, said = converted([source], tmp_path / "b", complete)
    assert "community.safetensors: has no VAE" in said and "has no text encoder" in said
    assert bundle.hashes["unet.safetensors"] != complete.hashes["unet.safetensors"]
    kept = [file for file in complete.hashes if file != "unet.safetensors"]
    assert {file: bundle.hashes[file] for file in kept} == {file: complete.hashes[file] for file in kept}
    assert os.path.samefile(bundle.folder / "adapter.safetensors", complete.folder / "adapter.safetensors")
    assert state(bundle, "adapter").keys() == state(complete, "adapter").keys()
    assert Bundle.open(complete.folder).hashes == complete.hashes


def test_single_file_without_base_needs_a_tokenizer(single: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text: .*vocab\.json"):
        converted([single], tmp_path / "b")
    source = make_ldm(tmp_path / "c.safetensors", TINY, text=False)
    bundle, said = converted([source], tmp_path / "b")
    assert set(bundle.networks) == {"unet", "vae"} and "sampling also needs text, vision" in said


def test_ema(complete: Bundle, single: Path, tmp_path: Path) -> None:
    source = make_ldm(tmp_path / "a.ckpt", TINY, torch.float32, ema=True)
    bundle, said = converted([source], tmp_path / "plain", complete)
    assert "--ema takes instead" in said
    assert_drawn(state(bundle, "unet"), torch.float32)
    bundle, _ = converted([source], tmp_path / "ema", complete, ema=True)
    assert_drawn(state(bundle, "unet"), torch.float32, "ema")
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        converted([single], tmp_path / "no", complete, ema=True)


@pytest.mark.slow  # converts large parts again
def test_old_text_prefix(complete: Bundle, tmp_path: Path) -> None:
    tensors = {
        name.replace(".text_model.", "."): t.read() for name, t in ldm_tensors(TINY, torch.float16).items()
    }
    save_file(tensors, tmp_path / "nai.safetensors")
    bundle, said = converted([tmp_path / "nai.safetensors"], tmp_path / "b", complete)
    assert_drawn(state(bundle, "text"), torch.float16)
    assert "unused" not in said


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("ones", [0, 1, 2])
def test_vae_folder_in_every_spelling(complete: Bundle, tmp_path: Path, old: bool, ones: int) -> None:
    folder = make_vae(tmp_path / "vae", TINY, old, salt="v")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {
        name: t.reshape(*t.shape, *[1] * ones) if ".attentions.0." in name and t.dim() == 2 else t
        for name, t in load_file(path).items()
    }
    save_file(tensors, path)
    bundle, _ = converted([folder], tmp_path / "b", complete)
    assert_drawn(state(bundle, "vae"), torch.float32, "v")


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "state_dict."])
def test_vae_file(complete: Bundle, tmp_path: Path, prefix: str) -> None:
    tensors = ldm_tensors(TINY, torch.float16, salt="v", text=False)
    start = "first_stage_model."
    vae = {
        prefix + n.removeprefix(start): t.read().contiguous()
        for n, t in tensors.items()
        if n.startswith(start)
    }
    torch.save(vae | {f"{prefix}loss.logvar": torch.zeros(())}, tmp_path / "vae.ckpt")
    bundle, said = converted([tmp_path / "vae.ckpt"], tmp_path / "b", complete)
    assert_drawn(state(bundle, "vae"), torch.float16, "v")
    assert "unused" not in said


@pytest.mark.slow  # converts large parts again
def test_half_precision_files_and_preference(public: Path, tmp_path: Path) -> None:
    make_sd15(tmp_path / "sd", TINY, public / "tokenizers", torch.float16)
    shutil.copy(
        public / "sd15/unet/diffusion_pytorch_model.safetensors",
        tmp_path / "sd/unet/diffusion_pytorch_model.non_ema.safetensors",
    )
    bundle, _ = converted([tmp_path / "sd"], tmp_path / "b")
    assert {t.dtype for t in state(bundle, "unet").values()} == {torch.float16}


def test_sd_folder_without_vae(public: Path, tmp_path: Path) -> None:
    shutil.copytree(public / "sd15", tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd/vae")
    bundle, said = converted([tmp_path / "sd", public / "vae"], tmp_path / "b")
    assert "has no vae/" in said and "vae" in bundle.networks


@pytest.mark.parametrize("new", [True, False])
def test_llava_hf(public: Path, tmp_path: Path, new: bool) -> None:
    source = make_llava_hf(tmp_path / "hf", TINY, public / "tokenizers", new)
    bundle, _ = converted([source], tmp_path / "b")
    assert set(bundle.networks) == {"vision", "llava"}
    llava = bundle.build("llava", lm_head=True).state_dict()
    assert llava["llama.embed_tokens.weight"].shape[0] == TINY.llama.vocab
    # The padded rows were cut off again, so the values are those of a file without padding
    assert_drawn({n: t for n, t in llava.items() if not n.startswith("tower.")}, torch.float16)
    tower = {n: t for n, t in llava.items() if n.startswith("tower.")}
    assert_drawn(tower, torch.float16, "tower", drop="tower.")


def test_tower_inside_llava(public: Path, complete: Bundle, tmp_path: Path) -> None:
    source = make_llava(tmp_path / "moma", TINY, public / "tokenizers", tower="other")
    bundle, _ = converted([source], tmp_path / "inside", complete)
    assert_drawn(state(bundle, "vision"), torch.float16, "other")
    # with OpenAI's folder given, that one is taken and compared
    bundle, said = converted([source, public / "clip"], tmp_path / "openai")
    assert_drawn(state(bundle, "vision"), torch.float32, "tower")
    ours = read_checkpoint(bundle.folder / "vision.safetensors")
    biggest = max(
        (t.read() - draw(f"other{n}", t.shape, torch.float16).float()).abs().max().item()
        for n, t in ours.items()
    )
    found = re.search(r"differs by at most ([\d.e-]+) \(", said)
    assert found and float(found[1]) == pytest.approx(biggest, rel=1e-2)
    assert "mm_projector.bin not read" in said
    # without any of them, only a tower of known shape can be used
    with pytest.raises(ValueError, match="CLIP folder"):
        converted([source], tmp_path / "none")


def test_identical_tower_is_said_to_be(public: Path, tmp_path: Path) -> None:
    source = make_llava(tmp_path / "l", TINY, public / "tokenizers", tower="tower", dtype=torch.float32)
    _, said = converted([source, public / "clip"], tmp_path / "b")
    assert "differs by at most 0\n" in said + "\n"


def test_known_tower_is_guessed_from_its_shapes() -> None:
    for name in ("l14", "l14_336", "b32"):
        wanted = replace(VISION_PRESETS[name], projection=None)
        shapes = expected_shapes("vision", wanted)
        lazy = {
            n: LazyTensor(shape, torch.float16, Path("x"), lambda: torch.empty(0))
            for n, shape in shapes.items()
        }
        assert guess_tower(lazy, DefaultConfigs().towers) == wanted


@pytest.mark.parametrize("name", ["ip-adapter_sd15.bin", "ip-adapter_sd15.safetensors"])
def test_ip_adapter(complete: Bundle, tmp_path: Path, name: str) -> None:
    sources = [make_ip_adapter(tmp_path / name, TINY), make_ip_vision(tmp_path / "encoder", TINY)]
    bundle, _ = converted(sources, tmp_path / "b", complete)
    assert_drawn(bundle.state("ip_adapter"), torch.float16, "ip")
    assert_drawn(state(bundle, "ip_vision"), torch.float16)
    adapter = bundle.build("adapter")
    missing, unexpected = adapter.load_state_dict(bundle.state("ip_adapter"), strict=False)
    assert not unexpected and all(key.startswith(("mapping.", "subject.")) for key in missing)


def test_unknown_keys_of_the_th_are_listed(public: Path, complete: Bundle, tmp_path: Path) -> None:
    _, said = converted([public / MOMA_FILE], tmp_path / "b", complete)
    line = next(line for line in said.split("\n") if "unused" in line)
    assert MOMA_FILE in line and "llm_mapping.projector.proj.weight" in line


@pytest.mark.parametrize("choice", ["fp32", "bf16", "fp16"])
def test_dtype(public: Path, complete: Bundle, tmp_path: Path, choice: str) -> None:
    kind = CHOICES[choice]
    bundle, _ = converted([public / "vae"], tmp_path / "b", complete, dtype=kind)
    assert_drawn(state(bundle, "vae"), torch.float32, "mse", cast=kind)


def test_dtype_casts_a_base(complete: Bundle, tmp_path: Path) -> None:
    """Alone too; there and back nothing is lost, and a network that has the dtype is the same file."""
    half, _ = converted([], tmp_path / "a", complete, dtype=torch.bfloat16)
    assert half.networks.keys() == complete.networks.keys() and half.configs == complete.configs
    for name in complete.networks:
        before, after = complete.state(name), half.state(name)
        assert before.keys() == after.keys(), name
        assert all(torch.equal(after[key], value.bfloat16()) for key, value in before.items()), name
    again, _ = converted([], tmp_path / "b", half, dtype=torch.bfloat16)
    assert again.hashes == half.hashes
    assert again.files("unet")[0].samefile(half.files("unet")[0])


def test_dtype_leaves_a_base_its_codes_and_scorers(tmp_path: Path) -> None:
    mini = Bundle.open(MINI)
    few, _ = converted([], tmp_path / "few", mini, llm_bits=8)
    wide, _ = converted([], tmp_path / "wide", few, dtype=torch.float32)
    for name in ("llava", "sam"):
        before, after = few.tensors(name), wide.tensors(name)
        stored = {key for key, buffer in wide.build(name, "meta").named_buffers()}
        kept = {key for key in after if after[key].dtype == before[key].dtype}
        assert kept == stored & before.keys() and kept
        assert all(torch.equal(after[key].read(), before[key].read().to(after[key].dtype)) for key in after)


def test_without_llm(public: Path, complete: Bundle, tmp_path: Path) -> None:
    bundle, _ = converted([public / "sd15", public / MOMA_FILE, public / "llava"], tmp_path / "a", llm=False)
    assert set(bundle.networks) == {"unet", "vae", "text", "adapter"}
    for i, sources in enumerate(([public / "vae"], [])):
        bundle, _ = converted(sources, tmp_path / f"b{i}", complete, llm=False)
        assert set(bundle.networks) == {"unet", "vae", "text", "adapter"}


# --- which source wins ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "bigger", "lone"),
    [
        (True, "folder", "folder"),
        pytest.param(True, "file", "file", marks=pytest.mark.slow),
        pytest.param(False, "folder", "file", marks=pytest.mark.slow),
        (False, "file", "folder"),
    ],
)
def test_a_lone_vae_wins_in_any_order(
    public: Path, single: Path, complete: Bundle, tmp_path: Path, first: bool, bigger: str, lone: str
) -> None:
    model = public / "sd15" if bigger == "folder" else single
    vae = public / "vae" / ("" if lone == "folder" else "diffusion_pytorch_model.safetensors")
    bundle, said = converted([vae, model] if first else [model, vae], tmp_path / "b", complete)
    assert_drawn(state(bundle, "vae"), torch.float32, "mse")
    assert f"note: vae: {vae.name} replaces that of {model.name}" in said


@pytest.mark.slow  # converts large parts again
def test_other_dedicated_sources_win_too(public: Path, complete: Bundle, tmp_path: Path) -> None:
    make_sd15(tmp_path / "other", TINY, public / "tokenizers", torch.float16)
    lone = [
        make_ldm(tmp_path / "unet.safetensors", TINY, salt="c", vae=False, text=False),
        tmp_path / "other/text_encoder",
        public / MOMA_FILE,
    ]
    shutil.copytree(public / "llava", tmp_path / "llava")
    make_moma(tmp_path / "llava" / MOMA_FILE, replace(TINY, adapter=replace(TINY.adapter, tokens=8)))
    for i, paths in enumerate(([*lone, public / "sd15", tmp_path / "llava"], [tmp_path / "llava", *lone])):
        bundle, said = converted([*paths, public / "clip", public / "sd15"], tmp_path / f"b{i}")
        assert_drawn(state(bundle, "unet"), torch.float16, "c")
        assert {t.dtype for t in state(bundle, "text").values()} == {torch.float16}
        assert bundle.config("adapter").tokens == 4
        assert f"adapter: {MOMA_FILE} replaces that of llava" in said


def test_of_equal_sources_the_later_wins(public: Path, tmp_path: Path) -> None:
    other = make_vae(tmp_path / "other", TINY, salt="o")
    for i, (paths, salt) in enumerate((([other, public / "vae"], "mse"), ([public / "vae", other], "o"))):
        bundle, said = converted(paths, tmp_path / f"b{i}")
        assert_drawn(state(bundle, "vae"), torch.float32, salt)
        assert f"vae: {paths[1].name} replaces that of {paths[0].name}" in said


def test_a_llava_is_not_less_for_the_tower_inside(public: Path, tmp_path: Path) -> None:
    """Else the original LLaVA, which has none, would win over MoMA's."""
    tuned = make_llava(tmp_path / "l", TINY, public / "tokenizers", tower="other", dtype=torch.float32)
    bundle, said = converted([public / "llava", tuned, public / "clip"], tmp_path / "b")
    assert {t.dtype for t in bundle.tensors("llava").values()} == {torch.float32}
    assert "llava: l replaces that of llava" in said


@pytest.mark.slow  # converts large parts again
def test_a_single_file_takes_its_tokenizer_from_a_clip_folder(
    public: Path, single: Path, tmp_path: Path
) -> None:
    shutil.copytree(public / "clip", tmp_path / "clip")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(public / "tokenizers" / name, tmp_path / "clip")
    bundle, _ = converted([single, tmp_path / "clip"], tmp_path / "b")
    assert bundle.clip_tokenizer().encode("a cat")
    # but a Stable Diffusion folder's goes before it
    (tmp_path / "clip/merges.txt").write_text("")
    bundle, _ = converted([public / "sd15", single, tmp_path / "clip"], tmp_path / "c")
    assert bundle.tokenizer("merges.txt").read_text()


# --- peculiarities of public files -----------------------------------------------------------------------


@pytest.mark.slow  # converts large parts again
def test_a_full_repository_of_a_community_model(public: Path, tmp_path: Path) -> None:
    """Single files beside the folders, half-precision and training variants, weights of other frameworks."""
    folder = make_sd15(tmp_path / "rv", TINY, public / "tokenizers", torch.float16)
    (folder / "Realistic.safetensors").write_text("not looked at")
    (folder / "Realistic.ckpt").write_text("not looked at")
    for name in ("model.safetensors.index.fp16.json", "flax_model.msgpack", "pytorch_model.non_ema.bin"):
        (folder / "text_encoder" / name).write_text("not looked at")
    config = json.loads((folder / "vae/config.json").read_text())
    write_json(folder / "vae/config.json", config | {"force_upcast": True, "scaling_factor": 0.18215})
    bundle, _ = converted([folder], tmp_path / "b")
    for name in ("unet", "vae", "text"):
        assert_drawn(state(bundle, name), torch.float16)


@pytest.mark.slow  # converts large parts again
def test_llava_with_both_kinds_of_shards(public: Path, complete: Bundle, tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "llava", TINY, public / "tokenizers")
    tensors = {k: t.read() for k, t in read_checkpoint(folder / "pytorch_model.bin.index.json").items()}
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    for shard in folder.glob("*.bin"):
        shard.write_text("not looked at")
    bundle, _ = converted([folder, public / "clip"], tmp_path / "b")
    assert bundle.hashes["llava.safetensors"] == complete.hashes["llava.safetensors"]


@pytest.mark.slow  # converts large parts again
def test_the_hubs_cache(public: Path, tmp_path: Path) -> None:
    """A snapshot is a folder called by a hash, of links to files called by hashes."""
    snapshot = (
        tmp_path / "models--stabilityai--sd-vae-ft-mse/snapshots/31f26fdeee1355a5c34592e401dd41e45d25a493"
    )
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted((public / "vae").iterdir())):
        shutil.copy(path, tmp_path / f"blobs/{i}")
        (snapshot / path.name).symlink_to(os.path.relpath(tmp_path / f"blobs/{i}", snapshot))
    bundle, said = converted([public / "sd15", snapshot], tmp_path / "b")
    assert_drawn(state(bundle, "vae"), torch.float32, "mse")
    assert "vae: stabilityai--sd-vae-ft-mse replaces that of sd15" in said


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_config_without_its_class(public: Path, complete: Bundle, tmp_path: Path, part: str) -> None:
    shutil.copytree(public / "sd15" / part, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    del config["_class_name"]
    write_json(tmp_path / "x/config.json", config)
    bundle, _ = converted([tmp_path / "x"], tmp_path / "b", complete)
    assert_drawn(state(bundle, part), torch.float32)


@pytest.mark.parametrize("wrapper", ["module.{part}.{key}", "{part}.module.{key}"])
def test_th_of_wrapped_parts_and_bare_scales(
    public: Path, complete: Bundle, tmp_path: Path, wrapper: str
) -> None:
    content = {}
    for name, tensor in read_checkpoint(public / MOMA_FILE).items():
        part, key = name.split(".", 1)
        values = tensor.read()
        content[wrapper.format(part=part, key=key)] = (
            values[0] if name.endswith("scale_learnable") else values
        )
    torch.save(content, tmp_path / "a.th")
    bundle, _ = converted([tmp_path / "a.th"], tmp_path / "b", complete)
    assert bundle.hashes["adapter.safetensors"] == complete.hashes["adapter.safetensors"]


def test_ip_adapter_in_torchs_old_format(complete: Bundle, tmp_path: Path) -> None:
    content = torch.load(make_ip_adapter(tmp_path / "new.bin", TINY))
    torch.save(content, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    bundle, _ = converted([tmp_path / "old.bin"], tmp_path / "b", complete)
    assert_drawn(bundle.state("ip_adapter"), torch.float16, "ip")


def test_single_file_with_diffusers_names_in_its_vae(complete: Bundle, tmp_path: Path) -> None:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    tensors = {
        re.sub(r"(mid\.attn_1\.)(q|k|v|proj_out)\.", lambda m: f"{m[1]}{names[m[2]]}.", key): t.read()
        for key, t in ldm_tensors(TINY, torch.float16, salt="c").items()
    }
    tensors = {key: t.flatten(1) if ".attn_1.to_" in key and t.dim() > 1 else t for key, t in tensors.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    bundle, said = converted([tmp_path / "a.safetensors"], tmp_path / "b", complete)
    assert_drawn(state(bundle, "vae"), torch.float16, "c")
    assert "unused" not in said


def test_a_description_that_mentions_v_prediction_is_no_refusal(
    complete: Bundle, single: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copy(single, tmp_path))
    source.with_suffix(".json").write_text('{"description": "no v_prediction, a plain model"}')
    converted([source], tmp_path / "b", complete)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", ["keep", "fp16", "bf16"])
def test_float8_needs_a_dtype(complete: Bundle, tmp_path: Path, suffix: str, dtype: str) -> None:
    """Without scales the values are those that count."""
    tensors = {
        name: t.read().to(torch.float8_e4m3fn) if name.startswith(UNET) else t.read().contiguous()
        for name, t in ldm_tensors(TINY, torch.float16).items()
    }
    path = tmp_path / f"a.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    if dtype == "keep":
        with pytest.raises(ValueError, match=r"float8_e4m3fn.*--dtype"):
            converted([path], tmp_path / "b", complete)
        return
    bundle, _ = converted([path], tmp_path / "b", complete, dtype=CHOICES[dtype])
    wanted = tensors[f"{UNET}out.2.weight"].to(CHOICES[dtype])
    assert torch.equal(bundle.state("unet")["conv_out.weight"], wanted)


def test_folders_as_people_have_them(public: Path, complete: Bundle, tmp_path: Path) -> None:
    """A model's folder of the hub's cache, an unpacked archive, system files, weights under another name."""
    hub = tmp_path / "models--o--vae"
    snapshot = hub / "snapshots" / "abc"
    for folder in ("other", "abc"):
        (hub / "snapshots" / folder).mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("abc\n")
    (hub / "blobs").mkdir()
    for i, path in enumerate(sorted((public / "vae").iterdir())):
        shutil.copy(path, hub / "blobs" / str(i))
        (snapshot / path.name).symlink_to(hub / "blobs" / str(i))
    unpacked = tmp_path / "zip"
    shutil.copytree(public / "vae", unpacked / "vae")
    (unpacked / "__MACOSX/vae").mkdir(parents=True)
    (unpacked / ".DS_Store").write_bytes(b"\0")
    for path in sorted((unpacked / "vae").iterdir()):
        (unpacked / "vae" / f"._{path.name}").write_bytes(b"\0\x05\x16\x07")
    (unpacked / "vae/diffusion_pytorch_model.safetensors").rename(unpacked / "vae/mine.bin")
    for number, sources in enumerate([[hub], [unpacked], [unpacked / "vae", unpacked / "__MACOSX"]]):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / ".DS_Store").touch()
        bundle, _ = converted(sources, out, complete)
        assert bundle.hashes["vae.safetensors"] == complete.hashes["vae.safetensors"]


def test_a_folder_with_two_snapshots_and_no_ref(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "models--o--vae/snapshots" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="2 snapshots"):
        converted([tmp_path / "models--o--vae"], tmp_path / "out")


@pytest.mark.slow  # converts large parts again
@pytest.mark.parametrize("order", [("MoMA_llava_7b", "llava-1.5"), ("llava-1.5", "MoMA_llava_7b")])
def test_a_plain_llava_does_not_replace_momas(public: Path, tmp_path: Path, order: tuple[str, str]) -> None:
    for name, dtype in (("MoMA_llava_7b", torch.float16), ("llava-1.5", torch.float32)):
        make_llava(tmp_path / name, TINY, public / "tokenizers", dtype=dtype)
    bundle, said = converted([*(tmp_path / name for name in order), public / "clip"], tmp_path / "b")
    assert bundle.networks["llava"]["source"].startswith("MoMA_llava_7b") and "llava-1.5" in said


def test_a_plain_llava_does_not_replace_a_bases(public: Path, complete: Bundle, tmp_path: Path) -> None:
    """Its adapter was trained with the other; with an adapter of its own, or none, it may."""
    plain = make_llava(tmp_path / "llava-1.5", TINY, public / "tokenizers", dtype=torch.float32)
    with pytest.raises(ValueError, match="does not say that it is MoMA's own"):
        converted([plain], tmp_path / "b", complete)
    assert [path.name for path in tmp_path.iterdir()] == ["llava-1.5"]
    _, said = converted([plain, public / MOMA_FILE], tmp_path / "c", complete)
    assert "does not say that it is MoMA's own" in said
    bare, _ = converted([public / "sd15", public / "clip"], tmp_path / "d")
    bundle, said = converted([plain], tmp_path / "e", bare)
    assert bundle.networks["llava"]["source"] == "llava-1.5" and "MoMA's own" not in said


def test_an_export_stays_in_its_folder(tmp_path: Path, complete: Bundle) -> None:
    shutil.copy(complete.folder / "vae.safetensors", tmp_path / "x.safetensors")
    entry = {"config": complete.networks["vae"]["config"], "files": ["../x.safetensors"]}
    data = {"format": "moma-export", "method": {}, "networks": {"vae": entry}}
    write_json(tmp_path / "e/export.json", data)
    with pytest.raises(ValueError, match=r"\.\./x"):
        converted([tmp_path / "e"], tmp_path / "b", complete)
    for damage in (
        {"networks": []},
        {"networks": {"other": entry}},
        {"method": 3},
        {"networks": {"vae": {}}},
    ):
        write_json(tmp_path / "e/export.json", data | damage)
        with pytest.raises(ValueError, match=r"export\.json"):
            converted([tmp_path / "e"], tmp_path / "b", complete)


# --- Segment Anything ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_sam, make_sam_hf])
def test_sam(complete: Bundle, tmp_path: Path, make: Callable[..., Path]) -> None:
    """Alone, and beside what a bundle has; its random frequencies keep their precision."""
    source = make(tmp_path / "sam.pth", TINY)
    alone, said = converted([source], tmp_path / "alone")
    assert tuple(alone.networks) == ("sam",) and alone.config("sam") == TINY.sam
    assert_drawn(state(alone, "sam"), torch.float32)
    assert "unused" not in said
    again, _ = converted([source], tmp_path / "again", alone, defaults=DefaultConfigs())
    assert again.config("sam") == TINY.sam, "the sizes of a file without any are the base's"
    beside, _ = converted([source], tmp_path / "beside", complete, dtype=torch.float16)
    assert set(beside.networks) == {*complete.networks, "sam"}
    frequencies = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    values = state(beside, "sam")
    exact = {frequencies: values.pop(frequencies)}
    assert_drawn(exact, torch.float32)
    assert_drawn(values, torch.float32, cast=torch.float16)


def test_sam_as_transformers_saves_it(tmp_path: Path) -> None:
    """Converted, it makes the masks that transformers' own network makes."""
    torch.manual_seed(0)
    theirs = SamModel(SamConfig(**sam_json(TINY.sam))).eval()
    for parameter in theirs.parameters():  # of transformers' own initialisation most are zero
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "sam")
    bundle, said = converted([tmp_path / "sam"], tmp_path / "b")
    assert "unused" not in said
    ours = bundle.build("sam")
    side = TINY.sam.image_size
    pixels = torch.from_numpy(normal("convert/sam", (1, 3, side, side)))
    points = torch.from_numpy(uniform("convert/points", (1, 2, 1, 2))) * side
    labels = torch.ones(1, 2, 1, dtype=torch.int64)
    with torch.no_grad():
        logits, iou = ours.decode(ours.encode(pixels), Prompts(points, labels))
        reference = theirs(pixels, input_points=points, input_labels=labels)
    assert_close_to_std(logits[:, :, 1:], reference.pred_masks)
    assert_close_to_std(iou[:, :, 1:], reference.iou_scores)


def test_official_sam_with_its_buffers_and_wrappers(tmp_path: Path) -> None:
    tensors = {name: t.read() for name, t in read_checkpoint(make_sam(tmp_path / "s.pth", TINY)).items()}
    tensors |= {"pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "w.pth")
    bundle, said = converted([tmp_path / "w.pth"], tmp_path / "b")
    assert_drawn(state(bundle, "sam"), torch.float32)
    assert "unused" not in said


def test_sam_that_is_incomplete(tmp_path: Path) -> None:
    tensors = {name: t.read() for name, t in read_checkpoint(make_sam(tmp_path / "s.pth", TINY)).items()}
    del tensors["mask_decoder.iou_token.weight"]
    torch.save(tensors, tmp_path / "s.pth")
    with pytest.raises(ValueError, match=r"s\.pth.*sam.*mask_decoder\.iou_token\.weight"):
        converted([tmp_path / "s.pth"], tmp_path / "b")


# --- refusals -----------------------------------------------------------------------------------------


def ldm_file(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = {name: t.read().contiguous() for name, t in ldm_tensors(TINY, torch.float16).items()}
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def with_channels(channels: int) -> Callable[[Path, Path], Path]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.diffusion_model.input_blocks.0.0.weight"
        tensors[name] = torch.zeros(tensors[name].shape[0], channels, 3, 3)

    return lambda tmp_path, public: ldm_file(tmp_path, change)


def with_tensors(**tensors: Tensor) -> Callable[[Path, Path], Path]:
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return lambda tmp_path, public: ldm_file(tmp_path, lambda t: t.update(named))


def only(**tensors: Tensor) -> Callable[[Path, Path], Path]:
    def make(tmp_path: Path, public: Path) -> Path:
        named = {name.replace("__", "."): value.clone() for name, value in tensors.items()}
        save_file(named, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    return make


def sd_folder(file: str, **changes: object) -> Callable[[Path, Path], Path]:
    def make(tmp_path: Path, public: Path) -> Path:
        shutil.copytree(public / "sd15", tmp_path / "sd")
        path = tmp_path / "sd" / file
        write_json(path, json.loads(path.read_text()) | changes)
        return tmp_path / "sd"

    return make


def sidecar(name: str, text: str) -> Callable[[Path, Path], Path]:
    def make(tmp_path: Path, public: Path) -> Path:
        (tmp_path / name).write_text(text)
        return ldm_file(tmp_path, lambda tensors: None)

    return make


def folder_with(**files: str) -> Callable[[Path, Path], Path]:
    def make(tmp_path: Path, public: Path) -> Path:
        (tmp_path / "f").mkdir()
        for name, text in files.items():
            (tmp_path / "f" / name.replace("__", ".")).write_text(text)
        return tmp_path / "f"

    return make


def lfs_folder(tmp_path: Path, public: Path) -> Path:
    shutil.copytree(public / "sd15", tmp_path / "sd")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n"
    (tmp_path / "sd/unet/diffusion_pytorch_model.safetensors").write_text(pointer)
    return tmp_path / "sd"


def no_weights(tmp_path: Path, public: Path) -> Path:
    shutil.copytree(public / "vae", tmp_path / "v")
    (tmp_path / "v/diffusion_pytorch_model.safetensors").unlink()
    return tmp_path / "v"


def llava_for_another_tower(tmp_path: Path, public: Path) -> Path:
    shutil.copytree(public / "llava", tmp_path / "l")
    config = json.loads((tmp_path / "l/config.json").read_text())
    write_json(tmp_path / "l/config.json", config | {"mm_hidden_size": 1280})
    return tmp_path / "l"


def says(**metadata: str) -> Callable[[Path, Path], Path]:
    """A single file with such a header; in names, __ stands for a dot."""

    def make(tmp_path: Path, public: Path) -> Path:
        tensors = {name: t.read().contiguous() for name, t in ldm_tensors(TINY, torch.float16).items()}
        named = {name.replace("__", "."): text for name, text in metadata.items()}
        save_file(tensors, tmp_path / "a.safetensors", metadata=named)
        return tmp_path / "a.safetensors"

    return make


def cast(names: str, dtype: torch.dtype) -> Callable[[Path, Path], Path]:
    """A single file with the tensors whose names begin so in another dtype."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: t.to(dtype) for name, t in tensors.items() if name.startswith(names)}

    return lambda tmp_path, public: ldm_file(tmp_path, change)


def vae_with(**changes: object) -> Callable[[Path, Path], Path]:
    def make(tmp_path: Path, public: Path) -> Path:
        shutil.copytree(public / "vae", tmp_path / "v")
        path = tmp_path / "v/config.json"
        write_json(path, json.loads(path.read_text()) | changes)
        return tmp_path / "v"

    return make


W = torch.ones(2, 2)
UNET = "model.diffusion_model."
NEGATIVE_ROOTS = torch.linspace(0.0001, 0.02, 1000)  # the linear schedule of DDPM
REFUSALS = {
    "header: v": (says(modelspec__prediction_type="v"), "prediction_type 'v'"),
    "header: kohya v2": (says(ss_v2="True"), "v2 'True'"),
    "header: zero terminal snr": (says(ss_zero_terminal_snr="True"), "zero_terminal_snr"),
    "header: sdxl": (says(modelspec__architecture="stable-diffusion-xl-v1-base"), "xl-v1"),
    "header: lora": (says(modelspec__architecture="stable-diffusion-v1/lora"), "v1/lora"),
    "header: base": (says(ss_base_model_version="sdxl_base_v1-0"), "sdxl_base"),
    "yaml: schedule": (sidecar("a.yaml", "params:\n  linear_start: 0.0015\n"), "linear_start '0.0015'"),
    "yaml: latents": (sidecar("a.yaml", "  scale_factor: 0.13025\n"), "scale_factor '0.13025'"),
    "civitai: distilled": (sidecar("a.civitai.info", '{"baseModel": "SD 1.5 LCM"}'), "LCM"),
    "marker: zero terminal snr": (with_tensors(ztsnr=W), "ztsnr"),
    "marker: edm": (with_tensors(edm_vpred__sigma_max=W), "edm_vpred.sigma_max"),
    "betas": (with_tensors(betas=NEGATIVE_ROOTS), "betas"),
    "alphas": (with_tensors(alphas_cumprod=(1 - NEGATIVE_ROOTS).cumprod(0)), "alphas_cumprod"),
    "schedule of another length": (with_tensors(betas=torch.ones(4000)), "betas"),
    "latents": (with_tensors(scale_factor=torch.tensor(0.13025)), "scale_factor"),
    "distilled": (with_tensors(**{f"{UNET}time_embed.cond_proj.weight": W}), "time_embed.cond_proj"),
    "more layers": (
        with_tensors(**{f"{UNET}middle_block.1.transformer_blocks.9.norm1.weight": W}),
        r"transformer_blocks\.9",
    ),
    "more of the text encoder": (
        with_tensors(**{"cond_stage_model.transformer.text_model.encoder.layers.40.mlp.fc1.weight": W}),
        r"layers\.40",
    ),
    "whole numbers": (cast(f"{UNET}out.", torch.int8), "out.0.* is int8"),
    "bytes": (cast("first_stage_model.", torch.uint8), "is uint8"),
    "float8 with scales": (
        lambda tmp_path, public: ldm_file(
            tmp_path, lambda t: t.update({f"{UNET}out.2.scale_weight": torch.ones(1)})
        ),
        "scale_weight",
    ),
    "not a number": (
        lambda tmp_path, public: ldm_file(
            tmp_path, lambda t: t[f"{UNET}out.2.bias"].__setitem__(1, float("nan"))
        ),
        r"a\.safetensors: model\.diffusion_model\.out\.2\.bias",
    ),
    "loha": (only(lora_unet_x__hada_w1_a=W), "LoRA"),
    "lokr": (only(x__lokr_w1=W), "LoRA"),
    "low rank under other names": (
        only(block__q__down=torch.ones(2, 9), block__q__up=torch.ones(8, 2)),
        "LoRA",
    ),
    "vae of sdxl": (vae_with(scaling_factor=0.13025), "0.13025"),
    "vae of sd3": (vae_with(shift_factor=0.0609), "shift_factor 0.0609"),
    "vae of 16 channels": (vae_with(latent_channels=16), "16"),
    "vae with means": (vae_with(latents_mean=[0.0] * 4), "latents_mean"),
    "unet of another class": (
        sd_folder("unet/config.json", _class_name="UNetMotionModel"),
        "UNetMotionModel",
    ),
    "vae of another class": (vae_with(_class_name="AsymmetricAutoencoderKL"), "Asymmetric"),
    "distilled folder": (sd_folder("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim 256"),
    "extended folder": (sd_folder("unet/config.json", attention_type="gated"), "attention_type 'gated'"),
    "lcm folder": (sd_folder("scheduler/scheduler_config.json", _class_name="LCMScheduler"), "LCMScheduler"),
    "betas folder": (sd_folder("scheduler/scheduler_config.json", beta_schedule="linear"), "'linear'"),
    "snr folder": (
        sd_folder("scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
        "rescale_betas_zero_snr",
    ),
    "text of one dimension": (
        with_tensors(**{f"{UNET}input_blocks.0.0.weight": torch.ones(4)}),
        "input_blocks|conv_in",
    ),
    "vae of one dimension": (
        with_tensors(**{"first_stage_model.encoder.mid.attn_1.q.weight": torch.ones(4)}),
        "to_q|attn_1",
    ),
    "sam of no dimension": (only(image_encoder__pos_embed=torch.tensor(1.0)), "0 wide"),
    "unet of one dimension": (only(conv_in__weight=W[0], down_blocks__0__x__weight=W), "down_blocks"),
    "ip-adapter of one dimension": (
        only(image_proj__proj__weight=W[0], ip_adapter__1__to_k_ip__weight=W[0]),
        "projector",
    ),
    "deep config": (folder_with(config__json="[" * 100_000), r"config\.json"),
    "large sizes": (sd_folder("unet/config.json", layers_per_block=10**9), "resnets 1000000000"),
    "many layers": (sd_folder("unet/config.json", transformer_layers_per_block=200), "tensors"),
    "huge sizes": (sd_folder("unet/config.json", block_out_channels=[2**60] * 4), "unet"),
    "no sizes": (sd_folder("unet/config.json", attention_head_dim=0), r"unet.config\.json"),
    "inpainting": (with_channels(9), "9 input channels"),
    "instruct-pix2pix": (with_channels(8), "8 input channels"),
    "sd2 text": (with_tensors(cond_stage_model__model__ln_final__weight=W), "Stable Diffusion 2"),
    "sd2 width": (
        with_tensors(
            **{
                "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(
                    2, 1024
                )
            }
        ),
        "Stable Diffusion 2",
    ),
    "sdxl's refiner": (with_tensors(conditioner__embedders__0__weight=W), "refiner"),
    "lora": (only(lora_unet_down__lora_down__weight=W), "LoRA"),
    "peft lora": (only(unet__to_k__lora_A__weight=W), "LoRA"),
    "v-prediction marker": (with_tensors(v_pred=W), "v_prediction"),
    "v-prediction yaml": (sidecar("a.yaml", 'params:\n  parameterization: "v"\n'), "v_prediction"),
    "v-prediction json": (
        sidecar("a.json", '{"prediction_type": "v_prediction"}'),
        "v_prediction",
    ),
    "v-prediction folder": (
        sd_folder("scheduler/scheduler_config.json", prediction_type="v_prediction"),
        "v_prediction",
    ),
    "inpainting folder": (sd_folder("unet/config.json", in_channels=9), "inpainting"),
    "sd2 folder": (sd_folder("unet/config.json", cross_attention_dim=1024), "Stable Diffusion 2"),
    "other texts": (sd_folder("unet/config.json", cross_attention_dim=2048), "2048"),
    "ip-adapter plus": (only(image_proj__latents=W, ip_adapter__1__to_k_ip__weight=W), "IP-Adapter Plus"),
    "ip-adapter face": (
        only(image_proj__proj__0__weight=W, ip_adapter__1__to_k_ip__weight=W),
        "IP-Adapter Full Face",
    ),
    "ip-adapter sdxl": (
        only(image_proj__proj__weight=W, ip_adapter__1__to_k_ip__weight=torch.ones(2, 2048)),
        "projector",
    ),
    "tower of another model": (llava_for_another_tower, "mm_hidden_size 1280.*32"),
    "sam-hq": (only(image_encoder__pos_embed=W, mask_decoder__hf_token__weight=W), "SAM-HQ"),
    "mobile sam": (only(image_encoder__layers__0__norm__weight=W), "MobileSAM"),
    "sam 2": (only(model__sam_mask_decoder__iou_token__weight=W), "SAM 2"),
    "sam of another width": (only(image_encoder__pos_embed=W), "2 wide.*48"),
    "sam 2 folder": (folder_with(config__json='{"model_type": "sam2"}'), "'sam2'"),
    "sam-hq folder": (folder_with(config__json='{"model_type": "sam_hq"}'), "'sam_hq'"),
    "lfs": (lfs_folder, "git-lfs"),
    "empty folder": (folder_with(), "empty folder"),
    "other folder": (folder_with(readme__txt="hello"), "unet/"),
    "other model": (folder_with(config__json='{"model_type": "bert"}'), "bert"),
    "bundle as source": (folder_with(config__json='{"format": "moma-bundle"}'), "already a bundle"),
    "broken config": (folder_with(config__json="{"), "not JSON"),
    "incomplete config": (
        folder_with(config__json='{"_class_name": "AutoencoderKL"}'),
        r"config\.json: has no '\w+'",
    ),
    "no weights": (no_weights, "diffusion_pytorch_model"),
    "other tensors": (only(something=W), "something"),
    "nothing": (lambda tmp_path, public: tmp_path / "none", "no such file or folder"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(public: Path, complete: Bundle, tmp_path: Path, case: str) -> None:
    make, message = REFUSALS[case]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message) as error:
        converted([make(tmp_path, public)], out, complete)
    assert "\n" not in str(error.value) and not out.exists() and not list(tmp_path.glob(".out*"))


def test_h14_as_llavas_tower(public: Path, tmp_path: Path) -> None:
    """The image encoder of IP-Adapter alone does not make LLaVA complete."""
    encoder = make_ip_vision(tmp_path / "encoder", TINY)
    with pytest.raises(ValueError, match="openai/clip-vit-large"):
        converted([public / "llava", encoder], tmp_path / "b")
    config = json.loads((encoder / "config.json").read_text())
    write_json(encoder / "config.json", config | {"architectures": ["CLIPVisionModel"]})
    with pytest.raises(ValueError, match=r"mm_hidden_size 32.*48"):
        converted([public / "llava", encoder], tmp_path / "b")


def test_ip_adapter_with_the_wrong_encoder(complete: Bundle, tmp_path: Path) -> None:
    scale = replace(TINY, ip_vision=replace(TINY.ip_vision, projection=24))
    sources = [make_ip_adapter(tmp_path / "ip.bin", TINY), make_ip_vision(tmp_path / "encoder", scale)]
    with pytest.raises(ValueError, match=r"width 40.*24"):
        converted(sources, tmp_path / "b", complete)


def test_tower_inside_of_another_shape(public: Path, tmp_path: Path) -> None:
    scale = replace(TINY, tower=replace(TINY.tower, mlp=48))
    source = make_llava(tmp_path / "l", scale, public / "tokenizers", tower="tower")
    with pytest.raises(ValueError, match="fc1"):
        converted([source, public / "clip"], tmp_path / "b")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("vocab.json", "version https://git-lfs.github.com/spec/v1", "cannot be read"),
        ("vocab.json", None, r"vocab\.json: has \d+ tokens.*1000"),
        ("merges.txt", "", None),
    ],
)
def test_tokenizers_are_checked(
    public: Path, tmp_path: Path, file: str, content: str | None, message: str | None
) -> None:
    shutil.copytree(public / "sd15", tmp_path / "sd")
    path = tmp_path / "sd/tokenizer" / file
    if content is None:
        words = json.loads(path.read_text())
        content = json.dumps(words | {f"word{i}": len(words) + i for i in range(1000)})
    path.write_text(content)
    if message is None:  # a vocabulary of single bytes is poor, but valid
        converted([tmp_path / "sd"], tmp_path / "b")
        return
    with pytest.raises(ValueError, match=message):
        converted([tmp_path / "sd"], tmp_path / "b")


def test_adapter_for_another_llava(complete: Bundle, tmp_path: Path) -> None:
    scale = replace(TINY, adapter=replace(TINY.adapter, mllm_dim=80))
    with pytest.raises(ValueError, match=r"width 80.*64"):
        converted([make_moma(tmp_path / "a.th", scale)], tmp_path / "b", complete)


def test_llava_that_the_kept_adapter_does_not_fit(public: Path, complete: Bundle, tmp_path: Path) -> None:
    scale = replace(TINY, llama=replace(TINY.llama, width=80))
    source = make_llava(tmp_path / "l", scale, public / "tokenizers")
    with pytest.raises(ValueError, match=r"width 64.*80"):
        converted([source], tmp_path / "b", complete)


def test_text_encoder_of_another_width(public: Path, complete: Bundle, tmp_path: Path) -> None:
    source = make_sd15(
        tmp_path / "sd", replace(TINY, text=replace(TINY.text, width=32)), public / "tokenizers"
    )
    with pytest.raises(ValueError, match=r"width 24.*32"):
        converted([source / "text_encoder"], tmp_path / "b", complete)


def test_unet_that_the_kept_adapter_does_not_fit(public: Path, complete: Bundle, tmp_path: Path) -> None:
    scale = replace(TINY, unet=replace(TINY.unet, channels=(16, 32, 32, 64)))
    source = make_sd15(tmp_path / "sd", scale, public / "tokenizers")
    with pytest.raises(ValueError, match=r"adapter: .*context\.6"):
        converted([source], tmp_path / "b", complete)


@pytest.mark.parametrize(
    "change, message", [("drop", "missing: conv_out.bias"), ("shape", "shaped: conv_out.bias")]
)
def test_missing_and_misshaped_keys(
    public: Path, complete: Bundle, tmp_path: Path, change: str, message: str
) -> None:
    shutil.copytree(public / "sd15", tmp_path / "sd")
    path = tmp_path / "sd/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path) | {"extra.weight": W}
    bias = tensors.pop("conv_out.bias")
    save_file(tensors if change == "drop" else tensors | {"conv_out.bias": bias[:2].clone()}, path)
    with pytest.raises(ValueError, match=message) as error:
        converted([tmp_path / "sd"], tmp_path / "b", complete)
    assert "unexpected: extra.weight" in str(error.value) and not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["a.ckpt", "a.th", "a.bin"])
def test_hostile_sources(complete: Bundle, tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'flag'}",)

    torch.save({"state_dict": {"w": W}, "x": Attack()}, tmp_path / name)
    arguments = [str(tmp_path / name), "--base-bundle", str(complete.folder), "--out", str(tmp_path / "b")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".system" in error and "Traceback" not in error
    assert not (tmp_path / "flag").exists() and not (tmp_path / "b").exists()


# --- the command line, and appearing whole or not at all ------------------------------------------------


def test_command_line(public: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources = [str(public / name) for name in ("sd15", "vae", "clip", "llava", MOMA_FILE)]
    out = str(tmp_path / "b")
    assert main([*sources, "--out", out]) == 0
    assert "ready" in capsys.readouterr().out
    assert main([*sources, "--out", out]) == 2
    assert "not empty; choose another folder or add --overwrite" in capsys.readouterr().err
    assert main([*sources[:1], "--base-bundle", out, "--out", out, "--overwrite", "--dtype", "fp16"]) == 0
    assert set(Bundle.open(out).networks) == set(SAMPLING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
    assert main(["--out", str(tmp_path / "c")]) == 2
    assert main(["--base-bundle", out, "--out", str(tmp_path / "c")]) == 2
    assert "--dtype" in capsys.readouterr().err.splitlines()[-1]
    assert main([*sources[:1], "--base-bundle", str(public), "--out", str(tmp_path / "c")]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert main([*sources[:1], "--out", str(tmp_path / "other"), "--overwrite"]) == 2
    assert "holds no bundle" in capsys.readouterr().err and (tmp_path / "other" / "thesis.tex").exists()


def test_a_folder_that_cannot_be_written_is_named_by_its_option(
    public: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Before anything is fetched."""
    (tmp_path / "file").touch()
    bad, good = tmp_path / "file" / "x", tmp_path / "out"
    cases = {
        "--out": [public / "vae", "--out", bad / "b"],
        "--cache": ["--download", "--cache", bad, "--out", good],
        "--out ": ["--export-ip-adapter", MINI, "--out", bad / "b.safetensors"],
    }
    for option, line in cases.items():
        assert main([str(part) for part in line]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"{option.strip()} {bad}: cannot write there (Not a directory): choose another folder" in error


def test_links_to_and_from_bundles(public: Path, complete: Bundle, tmp_path: Path) -> None:
    """A bundle of links is a base like any other; of a link at the target, what it names is replaced."""
    (tmp_path / "linked/tokenizers").mkdir(parents=True)
    for path in complete.folder.rglob("*"):
        if path.is_file():
            place = tmp_path / "linked" / path.relative_to(complete.folder)
            place.symlink_to(os.path.relpath(path, place.parent))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        converted([public / "vae"], tmp_path / "out", Bundle.open(tmp_path / "linked"), overwrite=True)
    assert Bundle.open(tmp_path / "out").hashes == complete.hashes
    assert (tmp_path / "out").is_symlink() and not (tmp_path / "disk/unet.safetensors").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "linked", "out"]


KILLED = """
import os, signal, sys
import moma.weights.bundle, convert_weights
add = moma.weights.bundle.BundleWriter.add
def add_one(self, *args, **options):
    add(self, *args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
moma.weights.bundle.BundleWriter.add = add_one
convert_weights.main(sys.argv[1:])
"""


@pytest.mark.slow  # a process of its own
def test_killed_in_the_middle(public: Path, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    out = tmp_path / "b"
    arguments = [sys.executable, "-c", KILLED, str(public / "sd15"), "--out", str(out)]
    killed = subprocess.run(
        arguments, cwd=root, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -9 and not out.exists()
    assert list(tmp_path.glob(".b.*.part/unet.safetensors")), "it was killed while writing"
    convert([public / "sd15"], out, say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_second_writer_is_refused_at_once(public: Path, tmp_path: Path) -> None:
    """Before it fetches anything. Links under the names of temporary files lead nowhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".b.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no networks"), BundleWriter(tmp_path / "b", 64):
        with pytest.raises(ValueError, match="b: another process"):
            convert([], tmp_path / "b", say=lambda _: None, fetch=lambda: pytest.fail("too late"))
        convert([public / "vae"], tmp_path / "c", say=lambda _: None)
    convert([public / "vae"], tmp_path / "b", say=lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.part", "b", "c", "elsewhere"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_source_that_breaks_while_it_is_read(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(public / "sd15", tmp_path / "sd")
    check_space = BundleWriter.check_space

    def cut(self: BundleWriter, nbytes: int) -> None:
        check_space(self, nbytes)
        with open(tmp_path / "sd/vae/diffusion_pytorch_model.safetensors", "r+b") as stream:
            stream.truncate(100_000)

    monkeypatch.setattr(BundleWriter, "check_space", cut)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        converted([tmp_path / "sd"], tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["sd"]


def test_no_room_on_the_disk(public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("moma.weights.bundle.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"0\.0 GB"):
        converted([public / "vae"], tmp_path / "b")
    assert not list(tmp_path.iterdir())


# --- opening a bundle -----------------------------------------------------------------------------------


@pytest.fixture
def copy(complete: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete.folder, tmp_path / "copy"))


def test_bundle_errors(copy: Path, tmp_path: Path) -> None:
    path = copy / "config.json"
    good = json.loads(path.read_text())

    def expect(message: str, **changes: object) -> None:
        write_json(path, good | changes)
        with pytest.raises(ValueError, match=message) as error:
            Bundle.open(copy)
        assert "\n" not in str(error.value)

    networks = good["networks"]
    unet = networks["unet"]
    expect("config.json", format="other")
    expect("version 2", version=2)
    expect("networks", networks={})
    expect("network 'other'", networks=networks | {"other": unet})
    bare = {key: value for key, value in unet.items() if key != "sha256"}
    expect("files", networks=networks | {"unet": bare})
    expect("files", networks=networks | {"unet": {"config": {}, "files": []}})
    expect("field 'size'", networks=networks | {"unet": unet | {"config": {"size": 1}}})
    shutil.copy(copy / "unet.safetensors", tmp_path / "x")  # a file that could be read
    expect("../x", networks=networks | {"unet": unet | {"files": ["../x"]}})
    expect("gone.safetensors", networks=networks | {"unet": unet | {"files": ["gone.safetensors"]}})
    expect("image_size -1", image_size=-1)
    expect("method field 'beta'", method={"beta": 1})
    expect("vision", networks={n: e for n, e in networks.items() if n != "vision"})
    expect("unet", networks={n: e for n, e in networks.items() if n != "unet"})
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        Bundle.open(copy)
    with pytest.raises(ValueError, match=r"config\.json"):
        Bundle.open(tmp_path)


def test_bundle_with_a_damaged_file(copy: Path) -> None:
    with open(copy / "unet.safetensors", "r+b") as stream:
        stream.truncate(10_000)
    with pytest.raises(ValueError, match=r"unet\.safetensors"):
        Bundle.open(copy)


def test_bundle_without_a_tokenizer(copy: Path) -> None:
    (copy / "tokenizers/merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges\.txt"):
        Bundle.open(copy)


def test_bundle_lacks_a_network(copy: Path) -> None:
    bundle = Bundle.open(copy)
    with pytest.raises(ValueError, match=r"ip_adapter.*unet, vae"):
        bundle.config("ip_adapter")


def test_method_overrides_are_kept(copy: Path, public: Path, tmp_path: Path) -> None:
    data = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", data | {"method": {"m_gen_threshold": 0.3}})
    bundle, _ = converted([public / "vae"], tmp_path / "b", Bundle.open(copy))
    assert bundle.method == {"m_gen_threshold": 0.3}


# --- download, against a server on this machine ----------------------------------------------------------


@dataclass
class FakeHub:
    """As much of the hub as huggingface_hub asks for: a repository's list of files, and files by range."""

    files: dict[str, Path]  # "repo/file" -> path
    cut: dict[str, int] = field(default_factory=dict)  # file -> break its next download after so many bytes
    refuse_after_cut: bool = False  # the server then also refuses to continue: the run must stop
    broken: set[str] = field(default_factory=set)  # files that are refused since they were cut
    asked: list[str] = field(default_factory=list)  # paths of all requests
    ranges: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range header) of each GET
    url: str = ""


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(path)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
                names = [f.removeprefix(f"{found[1]}/") for f in hub.files if f.startswith(f"{found[1]}/")]
                self.json(
                    {"id": found[1], "sha": "0" * 40, "siblings": [{"rfilename": n} for n in names]}, names
                )
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
                prefix = f"{found[1]}/"
                entries = [
                    {
                        "type": "file",
                        "path": f.removeprefix(prefix),
                        "size": p.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for f, p in hub.files.items()
                    if f.startswith(prefix)
                ]
                self.json(entries, entries)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
                self.file(f"{found[1]}/{found[2]}", body)
            else:
                self.send_error(404)

        def json(self, data: object, found: object) -> None:
            if not found:
                self.send_error(404)
                return
            text = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def file(self, name: str, body: bool) -> None:
            if name not in hub.files or (body and name in hub.broken):
                self.send_error(404 if name not in hub.files else 403)
                return
            data = hub.files[name].read_bytes()
            wanted = self.headers.get("Range")
            start = int(re.fullmatch(r"bytes=(\d+)-.*", wanted)[1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{name.replace("/", "-")}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if body:
                hub.ranges.append((name, wanted))
                end = hub.cut.pop(name, None)
                if end is not None and hub.refuse_after_cut:
                    hub.broken.add(name)
                self.wfile.write(data[start:end])
                self.wfile.flush()
                if end is not None:
                    self.close_connection = True
                    self.connection.close()

    return Handler


CONFIG = DownloadConfig("o/base", "o/vae", "o/llava", "o/clip")


@pytest.fixture
def hub(public: Path) -> Iterator[FakeHub]:
    files = {}
    for repo, folder in (("base", "sd15"), ("vae", "vae"), ("llava", "llava"), ("clip", "clip")):
        for path in sorted((public / folder).rglob("*")):
            if path.is_file():
                files[f"o/{repo}/{path.relative_to(public / folder)}"] = path
    files[f"o/llava/{MOMA_FILE}"] = public / MOMA_FILE
    fake = FakeHub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield fake
    server.shutdown()
    server.server_close()


def test_download_takes_what_is_needed_and_converts(hub: FakeHub, complete: Bundle, tmp_path: Path) -> None:
    folders = download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    fetched = {name for name, _ in hub.ranges}
    assert not any("/vae/diffusion" in n and n.startswith("o/base") for n in fetched), "the base's own VAE"
    assert "o/llava/mm_projector.bin" not in fetched and f"o/llava/{MOMA_FILE}" in fetched
    bundle, _ = converted(folders, tmp_path / "b")
    assert bundle.hashes == complete.hashes
    hub.ranges.clear()
    again = download(CONFIG, tmp_path / "cache", endpoint="http://127.0.0.1:9", say=lambda _: None)
    assert again == folders and not hub.ranges, "what is there needs no hub"


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what it keeps at a time
    name = "o/base/unet/diffusion_pytorch_model.safetensors"
    size = hub.files[name].stat().st_size
    hub.cut[name] = size // 2
    folders = download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    assert [wanted for n, wanted in hub.ranges if n == name] == [None, f"bytes={size // 2 >> 16 << 16}-"]
    got = folders[0] / "unet/diffusion_pytorch_model.safetensors"
    assert got.read_bytes() == hub.files[name].read_bytes()


def test_a_stopped_download_keeps_its_finished_files(hub: FakeHub, tmp_path: Path) -> None:
    name = "o/llava/pytorch_model-00002-of-00002.bin"
    hub.cut[name], hub.refuse_after_cut = 1000, True
    with pytest.raises(ValueError, match="o/llava") as error:
        download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache" / name.replace("o/llava", "o--llava")).exists()
    hub.broken.clear()
    hub.ranges.clear()
    folders = download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    fetched = {n for n, _ in hub.ranges}
    assert name in fetched and not any(n.startswith(("o/base", "o/vae")) for n in fetched)
    assert (folders[3] / Path(name).name).read_bytes() == hub.files[name].read_bytes()


def test_offline_says_what_to_place_where(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client waits between its attempts
    said: list[str] = []
    with pytest.raises(ValueError, match="o/base"):
        download(CONFIG, tmp_path / "cache", endpoint="http://127.0.0.1:9", say=said.append)
    assert said == by_hand(CONFIG, tmp_path / "cache")
    text = "\n".join(said)
    for place in (
        "o--base",
        "o--vae",
        "o--llava",
        "o--clip",
        MOMA_FILE,
        "tokenizer.model",
        "unet/config.json",
    ):
        assert place in text
    # and placing them by hand is enough
    for repo, folder in (("base", "sd15"), ("vae", "vae"), ("llava", "llava"), ("clip", "clip")):
        shutil.copytree(public / folder, tmp_path / "cache" / f"o--{repo}")
    shutil.copy(public / MOMA_FILE, tmp_path / "cache/o--llava")
    folders = download(CONFIG, tmp_path / "cache", endpoint="http://127.0.0.1:9", say=said.append)
    bundle, _ = converted(folders, tmp_path / "b")
    assert set(bundle.networks) == set(SAMPLING)


@pytest.mark.slow  # converts large parts again
def test_download_of_scorers_alone_and_with_the_rest(hub: FakeHub, public: Path, tmp_path: Path) -> None:
    repos = {
        "facebook/dino-vits16": make_dino_hf(tmp_path / "dino", TINY),
        "openai/clip-vit-base-patch32": make_clip_scorer(
            tmp_path / "b32", TINY, "clip_b32", public / "tokenizers"
        ),
        "openai/clip-vit-large-patch14": make_clip_scorer(
            tmp_path / "l14", TINY, "clip_l14", public / "tokenizers"
        ),
    }
    hub.files |= {f"{repo}/{path.name}": path for repo, folder in repos.items() for path in folder.iterdir()}
    alone = replace(CONFIG, released=False, extras=("scorers",))
    folders = download(alone, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    assert not any(name.startswith("o/") for name, _ in hub.ranges)
    assert not by_hand(alone, tmp_path)[1].endswith("o--base/")
    bundle, _ = converted(folders, tmp_path / "alone")
    assert tuple(bundle.networks) == ("dino_s16", "clip_b32", "clip_l14")
    both = replace(CONFIG, extras=("scorers",))
    folders = download(both, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    bundle, _ = converted(folders, tmp_path / "both")
    assert set(bundle.networks) == {*SAMPLING, "dino_s16", "clip_b32", "clip_l14"}


def test_a_pinned_revision_and_a_mirror(hub: FakeHub, tmp_path: Path) -> None:
    pinned = DownloadConfig("o/gone", "o/vae", "o/llava", "o/clip", mirrors={"o/gone": "o/base"})
    pinned = replace(pinned, revisions={"o/vae": "abc123"})
    folders = download(pinned, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    assert [folder.name for folder in folders] == ["o--gone", "o--vae@abc123", "o--clip", "o--llava"]
    assert "/api/models/o/vae/revision/abc123" in hub.asked
    with pytest.raises(ValueError, match="o/other"):
        download(replace(CONFIG, revisions={"o/other": "1"}), tmp_path / "cache", endpoint=hub.url)


def test_a_file_that_is_not_the_known_one(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ("o/llava", MOMA_FILE)
    right = hashlib.sha256(hub.files["/".join(name)].read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN, name, (right[:8], right[-3:]))
    download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    (tmp_path / "cache/o--llava" / MOMA_FILE).write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"{MOMA_FILE}.*{right[:8]}"):
        download(CONFIG, tmp_path / "cache", endpoint="http://127.0.0.1:9", say=lambda _: None)


def test_no_room_for_the_download(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("moma.weights.download.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"0\.0 GB free"):
        download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    assert not hub.ranges


def test_the_cache_is_deleted_once_the_bundle_is_complete(
    hub: FakeHub, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files |= {f"facebook/sam-vit-base/{p.name}": p for p in make_sam_hf(tmp_path / "sam", TINY).iterdir()}
    monkeypatch.setattr("convert_weights.download", partial(download, endpoint=hub.url))
    out, cache = tmp_path / "b", tmp_path / "cache"
    arguments = ["--with", "sam", "--cache", str(cache), "--out", str(out)]
    assert main([*arguments, "--clean-cache", "--revision", "nonsense"]) == 2
    assert main(arguments) == 0 and list(cache.iterdir())
    assert main([*arguments, "--overwrite", "--clean-cache"]) == 0 and not list(cache.iterdir())
    assert main([str(public / "vae"), "--clean-cache", "--out", str(tmp_path / "c")]) == 2


def test_download_of_sam(hub: FakeHub, tmp_path: Path) -> None:
    folder = make_sam_hf(tmp_path / "sam", TINY)
    hub.files |= {f"facebook/sam-vit-base/{path.name}": path for path in folder.iterdir()}
    only_sam = replace(CONFIG, released=False, extras=("sam",))
    folders = download(only_sam, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)
    bundle, _ = converted(folders, tmp_path / "b")
    assert tuple(bundle.networks) == ("sam",)


def test_download_of_a_repository_of_another_kind(hub: FakeHub, tmp_path: Path) -> None:
    del hub.files["o/base/unet/diffusion_pytorch_model.safetensors"]
    with pytest.raises(ValueError, match=r"o/base: .*unet/diffusion_pytorch_model"):
        download(CONFIG, tmp_path / "cache", endpoint=hub.url, say=lambda _: None)


def test_download_without_llm(hub: FakeHub, tmp_path: Path) -> None:
    folders = download(CONFIG, tmp_path / "cache", llm=False, endpoint=hub.url, say=lambda _: None)
    assert not any("pytorch_model-" in name for name, _ in hub.ranges)
    bundle, _ = converted(folders, tmp_path / "b", llm=False)
    assert set(bundle.networks) == {"unet", "vae", "text", "adapter"}
