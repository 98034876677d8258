"""Networks that take turns in memory, and weights that are widened layer by layer."""

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moma
from models.weights.loading import write_safetensors
from models.weights.widen import widen
from moma import Bundle, Job, Pipeline, Runtime
from moma.methods.text import TextToImage
from moma.sampling.base import Base
from tests.helpers import QUICK, image, mask
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl

ORDER = {"sd15": ["text", "unet", "vae"], "sdxl": ["text", "text_2", "unet", "vae"]}


@pytest.fixture(scope="module", params=ORDER)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    build_tiny_bundle(folder, cfg=TinyConfig(networks=tiny_sdxl()) if request.param == "sdxl" else None)
    return Bundle.open(folder)


def loaded(bundle: Bundle, method: str = "text", **options: Any) -> Pipeline:
    return moma.load(bundle, method, device="cpu", **{"dtype": "fp32"} | options)


@pytest.mark.parametrize("method", ["text", "moma", "reference-attention"])
def test_images_are_the_same(bundle: Bundle, method: str) -> None:
    drawn = []
    for turns in ("on", "off"):
        pipe = loaded(bundle, method, turns=turns)
        subjects = () if method == "text" else (pipe.encode_subject(image(0), mask(30), "cat"),)
        jobs = [Job(subjects, "a cat in the snow", seed, "fog") for seed in range(2)]
        drawn.append([(result.latents, result.image.tobytes()) for result in pipe.run(jobs, QUICK)])
    for (ours, one), (theirs, other) in zip(*drawn, strict=True):
        assert torch.equal(ours, theirs) and one == other


def test_one_network_is_in_memory(bundle: Bundle) -> None:
    """In the order of their use; a second batch has them again."""
    base = loaded(bundle, turns="on").base
    names = [*ORDER["sdxl" if len(base.text_encoders) > 1 else "sd15"]]
    found: list[tuple[str, weakref.ref]] = []

    def counted(name: str, load: Any) -> Any:
        def run() -> nn.Module:
            assert all(other() is None for _, other in found), "the other one is still there"
            network = load()
            found.append((name, weakref.ref(network)))
            return network

        return run

    for name, turn in zip(names, [*base.text_encoders, base.unet, base.vae], strict=True):
        turn.load = counted(name, turn.load)
    pipe = Pipeline(TextToImage(base, bundle.method_config("text")))
    list(pipe.run([Job((), "a cat", seed) for seed in range(2)], replace(QUICK, batch_size=1)))
    assert [name for name, _ in found] == names * 2


def test_auto_follows_free_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(bundle.networks)
    needed = bundle.nbytes([n for n in ("unet", "vae", "text", "text_2") if n in names], torch.float32)
    for free, turning in ((2 * needed, False), (needed, True)):
        monkeypatch.setattr("moma.sampling.base.free_memory", lambda device, free=free: free)
        base = Base.load(Runtime.choose(bundle, "cpu", "fp32"))
        assert isinstance(base.unet, nn.Module) != turning
    # whoever reads or trains the weights has them in memory
    assert isinstance(
        Base.load(Runtime.choose(bundle, "cpu", "fp32", pack=False, turns="on")).unet, nn.Module
    )


def rewritten(
    bundle: Bundle, folder: Path, name: str, dtype: torch.dtype | None = None, lost: str = ""
) -> Bundle:
    """A copy of the bundle with one network in another dtype, or without one of its tensors."""
    shutil.copytree(bundle.folder, folder)
    tensors = {key: tensor for key, tensor in bundle.tensors(name).items() if key != lost}
    write_safetensors(folder, name, tensors, dtype)
    return Bundle.open(folder)


def test_files_are_checked_before_the_first_turn(bundle: Bundle, tmp_path: Path) -> None:
    broken = rewritten(bundle, tmp_path / "broken", "vae", lost="quant_conv.bias")
    with pytest.raises(ValueError, match=r"quant_conv\.bias"):
        loaded(broken, turns="on")


def test_widened_weights_stay_as_stored(bundle: Bundle, tmp_path: Path) -> None:
    """Of bf16 computed in fp32, in the same network; the images are those of widened copies."""
    stored = rewritten(bundle, tmp_path / "bf16", "unet", torch.bfloat16)
    one, other = loaded(stored, turns="on"), loaded(stored, pack=False)
    jobs = [Job((), "a cat in the snow", 3)]
    for a, b in zip(one.run(jobs, QUICK), other.run(jobs, QUICK), strict=True):
        assert torch.equal(a.latents, b.latents) and a.image.tobytes() == b.image.tobytes()
    matrices = {p.dtype for p in widen(stored.build("unet"), torch.float32).parameters() if p.dim() > 1}
    assert one.dtype == torch.float32 and matrices == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("options", "kept"), [({}, True), ({"mapped": False}, False), ({"dtype": torch.bfloat16}, False)]
)
def test_a_file_counts_once(bundle: Bundle, options: dict[str, Any], kept: bool) -> None:
    """What is copied out of a file does not leave the file mapped."""
    network = bundle.build("unet", **options)
    assert (str(bundle.folder / "unet.safetensors") in Path("/proc/self/maps").read_text()) == kept
    expected = bundle.build("unet").conv_in.weight.to(network.dtype)
    assert torch.equal(network.conv_in.weight, expected)
