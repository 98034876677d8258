"""The training of MM-Diff: its constraint as recorded, and a run from data to images."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moma
import train
from convert_weights import convert
from moma import Bundle, Job, SampleConfig
from moma.methods.mm_diff.training import label_places, map_loss
from moma.weights.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl
from tests.golden_files import golden
from tests.helpers import image, mask
from tests.recipe import normal
from tests.training_data import write_bundle, write_data


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("side", [16, 8])
def test_map_loss(side: int, normalise: bool) -> None:
    recorded = golden("mmdiff_map_loss")
    scores = torch.from_numpy(normal(f"input/mmdiff_map_loss/scores{side}", (6, side * side, 77)))
    probs = (2 * scores).softmax(dim=-1).unflatten(0, (2, 3))  # (B, H, N, T)
    places, present = torch.tensor([[2, 5], [4, 0]]), torch.tensor([[True, True], [True, False]])
    maps = torch.stack([probs[i][..., row] for i, row in enumerate(places)])  # (B, H, N, n)
    masks = torch.nn.functional.interpolate(
        recorded["segmaps"].float(), (side, side), mode="bilinear", antialias=True
    )
    found = map_loss(maps, masks, present, normalise).mean()
    theirs = recorded[f"text.layer{side}.normalize={normalise}"][0]
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-7)


def test_a_labels_place() -> None:
    ids = torch.tensor([[8, 1, 2, 3, 2, 3, 9], [8, 4, 5, 9, 9, 9, 9], [8, 9, 9, 9, 9, 9, 9]])
    labels = torch.tensor([[8, 2, 3, 9, 9, 9, 9], [8, 3, 9, 9, 9, 9, 9], [8, 3, 9, 9, 9, 9, 9]])
    assert label_places(ids, labels, 9).tolist() == [3, 0, 0]


def drawn(bundle: Path) -> Tensor:
    pipe = moma.load(bundle, "mm-diff", device="cpu", dtype="fp32")
    subject = pipe.encode_subject(image(0), mask(30), "cat")
    (result,) = pipe.run([Job(subject, "a cat in the snow", 0, negative="dog")], SampleConfig(steps=2))
    return result.latents


def options(folder: Path, out: str, steps: int, dtype: str = "fp32") -> list[str]:
    more = ["--bundle", folder / "bundle", "--data", folder / "data", "--out", folder / out, "--steps", steps]
    more += ["--batch-size", 2, "--lr", 0.01, "--dtype", dtype, "--device", "cpu", "--workers", 1]
    more += ["--cache", folder / f"cache-{dtype}"]
    sets = ("warmup=0", "validation_samples=2", "grid_steps=2", "rank=4", "text_rank=4", "refiner_blocks=1")
    return ["mm-diff", *map(str, more), *(part for one in sets for part in ("--set", one))]


@pytest.mark.parametrize("sdxl", [False, True])
def test_train_export_draw(tmp_path: Path, sdxl: bool) -> None:
    if sdxl:
        build_tiny_bundle(tmp_path / "bundle", 0, TinyConfig(64, networks=tiny_sdxl()))
    else:
        write_bundle(tmp_path / "bundle")
    write_data(tmp_path / "data", 6)
    assert train.run(options(tmp_path, "run", 3)) == 0
    assert (tmp_path / "run" / "samples" / "step-00000003.png").is_file()
    start = Bundle.open(tmp_path / "bundle")
    convert([tmp_path / "run" / "export"], tmp_path / "trained", start, say=lambda text: None)
    trained = Bundle.open(tmp_path / "trained")
    state, method = trained.state("mm_diff"), trained.method_config("mm-diff")
    assert (method.seen, method.patches, method.text_lora) == ("segment", "vision", "both")
    still = [name for name, tensor in state.items() if name.endswith(".up") and not tensor.any()]
    assert not still, "every LoRA has moved"
    before, after = start.state("vision"), trained.state("mm_diff_vision")
    moved = {
        name.split(".")[2]
        for name in before
        if not torch.equal(before[name], after[name]) and "layers" in name
    }
    assert moved == {"1", "2"}, "the last two blocks"
    assert drawn(tmp_path / "trained").isfinite().all()
    (tmp_path / "bundle").rename(tmp_path / "first")
    (tmp_path / "trained").rename(tmp_path / "bundle")
    assert train.run([*options(tmp_path, "again", 1), "--set", "init=mm_diff"]) == 0


def test_in_half_precision_and_as_before_a_stop(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    write_data(tmp_path / "data", 6)
    assert train.run(options(tmp_path, "whole", 2, "bf16")) == 0
    assert train.run(options(tmp_path, "parts", 1, "bf16")) == 0
    assert train.run([*options(tmp_path, "parts", 2, "bf16"), "--resume"]) == 0
    folders = [tmp_path / out / "export" for out in ("whole", "parts")]
    whole, parts = (load_file(folder / "mm_diff.safetensors") for folder in folders)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
