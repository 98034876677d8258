"""The training of MM-Diff: its constraint as recorded, and a run from data to images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import moma
import train
from convert_weights import convert
from moma import Bundle, Job, Runtime, SampleConfig
from moma.inputs.faces import Face
from moma.methods.map_loss import map_loss
from moma.methods.mm_diff.method import MMDiff
from moma.methods.mm_diff.training import MapHook, MMDiffTrainingConfig
from moma.training.denoising import DenoisingTask, build
from tests.golden_files import golden
from tests.helpers import far, image, mask, same
from tests.recipe import normal
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl
from tests.training_data import write_bundle, write_data, write_pairs


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


@torch.no_grad()
def test_maps_of_an_attention_layer() -> None:
    """Both meet the masks at the layer's size, with their weights; none on the finest grid."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, k_i, v_i = (torch.randn(1, 2, n, 8, generator=draw) for n in (24, 5, 5, 4, 4))
    masks, present = torch.zeros(1, 2, 32, 48), torch.ones(2, 1, 2, dtype=torch.bool)
    masks[0, 0, 3:17, 5:21] = masks[0, 1, 14:30, 25:42] = 1
    places, every = torch.tensor([1, 3]), torch.ones(1, 1, 1, 1)
    word = torch.nn.functional.one_hot(places, 5).T[None, None].float()
    config = MMDiffTrainingConfig(map_weight=2.0, image_map_weight=3.0)
    keep = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    hook = MapHook([(k_i, v_i)], keep, every, word, masks, present, (8, 12), config)
    z, loss = hook.cross_attn(0, q, k, v, (4, 6))
    text, image = ((q @ keys.mT / 8**0.5).softmax(dim=-1) for keys in (k, k_i))  # (1, 2, 24, .)
    same(z, text @ v + image @ v_i, 1e-5)
    small = [Image.fromarray(one.numpy()).resize((6, 4), Image.Resampling.BILINEAR) for one in masks[0]]
    expected = 0.0
    for weight, maps in ((2, text[..., places]), (3, image.unflatten(-1, (2, 2)).sum(dim=-1))):
        for j, inside in enumerate(torch.from_numpy(np.array(one)).flatten() for one in small):
            outside_mean, inside_mean = (
                (maps[..., j] * part).sum(dim=-1) / part.sum() for part in (1 - inside, inside)
            )
            expected = expected + weight * (outside_mean - inside_mean).mean() / 2
    same(loss, expected[None], 1e-5)
    assert hook.cross_attn(0, q, k, v, (8, 12))[1] is None


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


@pytest.mark.parametrize("sdxl", [False, pytest.param(True, marks=pytest.mark.slow)])
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


# --- several subjects ----------------------------------------------------------------------------------


def task_of(folder: Path, *sets: str) -> DenoisingTask:
    more = (part for one in sets for part in ("--set", one))
    args = train.parse_args([*options(folder, "run", 1), *more])
    bundle = Bundle.open(folder / "bundle")
    runtime = Runtime(bundle, torch.device("cpu"), torch.float32, pack=False)
    return build(train.choices_of(args, bundle), runtime, folder / "data")


@pytest.fixture(scope="module", params=[False, True])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    networks = {"networks": tiny_sdxl()} if request.param else {}
    build_tiny_bundle(folder / "bundle", 0, TinyConfig(64, **networks))
    write_pairs(folder / "data")
    return folder


def batch_of(task: DenoisingTask, index: list[int], **changes: Tensor) -> dict[str, Tensor]:
    """Samples with nothing dropped, each with the random numbers of its place in the data."""
    batch = task._batch(task.data, torch.tensor(index), torch.tensor(index), 0)
    none = {name: torch.zeros_like(batch[name]) for name in ("drop", "drop_text", "absent")}
    return batch | none | {"t": torch.full((len(index),), 500)} | changes


def moved(task: DenoisingTask) -> DenoisingTask:
    """LoRAs that start at zero have an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in task.model.trainable.adapter.named_parameters():
            if name.endswith(".up"):
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return task


def test_a_batch_is_its_singles(pairs: Path) -> None:
    """Though a sample of one subject is padded there; its words are told apart."""
    task = moved(task_of(pairs, "map_weight=10", "image_map_weight=10"))
    assert task.data.batch(torch.arange(3))["present"].tolist() == [
        [True, False],
        [True, True],
        [True, False],
    ]
    places = task.data.batch(torch.arange(3))["places"][1].T  # (K, n)
    for row, tokenizer in zip(places.tolist(), task.model.trainable.base.tokenizers, strict=True):
        spans = tokenizer.encode("a cat and a black cat").spans
        assert [spans[place][1] for place in row] == [len("a cat"), len("a cat and a black cat")]
    every = [0, 1, 2]
    same(task.model(batch_of(task, every)), torch.cat([task.model(batch_of(task, [i])) for i in every]), 5e-4)
    turned = batch_of(task, [1])
    for name in ("embedding", "m_gen", "places", "label_ids"):
        turned[name] = turned[name].flip(1)
    same(task.model(turned), task.model(batch_of(task, [1])), 1e-4)  # their order means nothing
    turned["embedding"] = turned["embedding"].flip(1)
    assert far(task.model(turned), task.model(batch_of(task, [1])))  # whose mask and word it is does


def test_absent_subjects(pairs: Path) -> None:
    """One that is left out changes neither words nor tokens; all of them leave the text alone."""
    task = moved(task_of(pairs, "drop_subject=0.5"))
    absent = task._batch(task.data, torch.arange(3).repeat(20), torch.arange(60), 0)["absent"]
    assert 0.3 < absent.float().mean() < 0.7
    first, gone = batch_of(task, [1]), torch.zeros(1, 8, dtype=torch.bool)
    gone[:, 1] = True
    without = batch_of(task, [1], absent=gone)
    alone = first | {"present": torch.tensor([[True, False]])}
    same(task.model(without), task.model(alone), 1e-4)
    assert not torch.allclose(task.model(without), task.model(first), atol=1e-3)
    unread = first | {"places": first["places"] * torch.tensor([1, 0])[:, None]}
    same(task.model(without), task.model(unread), 1e-4)
    dropped = batch_of(task, [1], drop=torch.tensor([True]))
    same(task.model(dropped), task.model(batch_of(task, [1], absent=torch.ones_like(gone))), 1e-5)
    silent = batch_of(task, [1], drop_text=torch.tensor([True]))
    assert not torch.allclose(task.model(silent), task.model(first), atol=1e-3)


def test_the_constraint_on_the_tokens_maps(pairs: Path) -> None:
    """It acts on samples of two subjects alone."""
    losses = []
    for weight in (0, 1000):
        task = moved(task_of(pairs, "map_weight=0", f"image_map_weight={weight}"))
        losses.append(task.model(batch_of(task, [0, 1])))
    same(losses[0][:1], losses[1][:1], 0)
    assert far(losses[0][1:], losses[1][1:])


@pytest.mark.parametrize("part", ["words", "refiner", "loras"])
def test_an_ablated_part_has_no_effect_and_stays(pairs: Path, part: str) -> None:
    task, whole = task_of(pairs, f"without={part}"), task_of(pairs)
    trainable = task.model.trainable
    still = {name for name, p in trainable.adapter.named_parameters() if not p.requires_grad}
    kinds = {name.split(".")[0 if part != "refiner" else 1] for name in still}
    assert kinds == {"words": {"images", "fuse"}, "refiner": {"refiner"}, "loras": {"text", "unet"}}[part]
    assert not any("image" in name for name in still if name.startswith("unet.")), "K, V of the tokens train"
    assert all(p.requires_grad for p in whole.model.trainable.adapter.parameters())
    before = task.model(batch_of(task, [0, 1]))
    with torch.no_grad():
        for name, p in trainable.adapter.named_parameters():
            if name in still and not name.startswith(("text.", "unet.", "head.refiner.norm_out")):
                p.add_(0.1)
    same(before, task.model(batch_of(task, [0, 1])), 0 if part != "refiner" else 1e-6)
    assert trainable.export().methods["mm-diff"].get("fuse_words", True) == (part != "words")


def test_noise_behind_subjects(pairs: Path) -> None:
    white = task_of(pairs)
    noise = task_of(pairs, "background=noise", f"cache={pairs / 'noise'}")
    assert far(*(task.data.batch(torch.arange(1))["embedding"] for task in (white, noise)))
    assert noise.model.export().methods["mm-diff"]["seen"] == "noise"


def write_faces(folder: Path) -> Face:
    """A bundle, and pairs of which every subject but one has this face."""
    write_bundle(folder / "bundle")
    write_pairs(folder / "data")
    spots = [[10.0, 14], [20, 14], [15, 20], [11, 26], [19, 26]]
    face = Face(torch.randn(512, generator=torch.Generator().manual_seed(0)), torch.tensor(spots))
    lines = [json.loads(line) for line in (folder / "data" / "metadata.jsonl").read_text().splitlines()]
    lines[0]["face"] = lines[1]["others"][0]["face"] = lines[2]["face"] = face.to_json()
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return face


def exported(folder: Path) -> Path:
    """The bundle with the training's export in it."""
    start = Bundle.open(folder / "bundle")
    convert([folder / "run" / "export"], folder / "trained", start, say=lambda text: None)
    return folder / "trained"


def test_tokens_of_faces(tmp_path: Path) -> None:
    """People with faces train weights that draw with one; subjects without are left out."""
    write_faces(tmp_path)
    sets = ("subject=face", "validation_samples=1")
    assert train.run([*options(tmp_path, "run", 1), *(x for one in sets for x in ("--set", one))]) == 0
    assert [name for _, name, _ in task_of(tmp_path, *sets).data.names] == ["cat", "black cat", "cat"]
    assert MMDiff.needs_face(Bundle.open(exported(tmp_path)))


@torch.no_grad()
@pytest.mark.parametrize("subject", ["cls", "face"])
def test_it_learns_on_the_subjects_that_it_draws_with(tmp_path: Path, subject: str) -> None:
    """Drawing makes the same of the image, once every trained part has moved."""
    face = write_faces(tmp_path)
    task = moved(task_of(tmp_path, f"subject={subject}", "validation_samples=1"))
    generator, trainable = torch.Generator().manual_seed(4), task.model.trainable
    for p in trainable.tail.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    task.export(tmp_path / "run" / "export")
    batch = task.model.unpacked(batch_of(task, [0]))
    learned = trainable.subjects(batch, ["cat"], ["a cat in the snow"])[0][0]
    pipe = moma.load(exported(tmp_path), "mm-diff", device="cpu", dtype="fp32")
    given = [Image.open(tmp_path / "data" / name) for name in ("photo.png", "left.png")]
    found = pipe.encode_subject(*given, "cat", **({"face": face} if subject == "face" else {}))
    same(found.embedding, learned.embedding, 1e-4)
    same(found.tokens, learned.tokens, 1e-4)


def test_all_that_starts_at_random_decays(pairs: Path) -> None:
    """The LoRAs of the UNet and of the text encoders, too, whatever the model calls them."""
    task = task_of(pairs)
    names = {id(p): name for name, p in task.model.trainable.adapter.named_parameters()}
    own = dict(task.model.named_parameters())
    decayed = {names[id(own[name])] for name in task.decayed}
    assert decayed == {name for name, p in task.model.trainable.adapter.named_parameters() if p.ndim > 1}
    assert any(name.startswith("text.") for name in decayed) and any("attn1" in name for name in decayed)


def test_distance_of_maps() -> None:
    maps, masks = torch.rand(2, 3, 16, 2), (torch.rand(2, 2, 4, 4) > 0.5).float()
    present = torch.tensor([[True, True], [True, False]])
    found = map_loss(maps, masks, present, form="distance")
    each = (maps.mT - masks.flatten(2)[:, None]).abs().mean(dim=(1, 3))  # (B, n)
    torch.testing.assert_close(found, torch.stack([each[0].mean(), each[1, 0]]))


def test_in_half_precision_and_as_before_a_stop(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    write_data(tmp_path / "data", 6)
    assert train.run(options(tmp_path, "whole", 2, "bf16")) == 0
    assert train.run(options(tmp_path, "parts", 1, "bf16")) == 0
    assert train.run([*options(tmp_path, "parts", 2, "bf16"), "--resume"]) == 0
    folders = [tmp_path / out / "export" for out in ("whole", "parts")]
    whole, parts = (load_file(folder / "mm_diff.safetensors") for folder in folders)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
