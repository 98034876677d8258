"""Trainings by Eq. 1 whose targets are not square."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import moma
import train
from convert_weights import convert
from moma import Bundle, Job, Runtime, SampleConfig
from moma.inputs.preprocess import ReferenceConfig, make_reference
from moma.sampling.pipeline import Pipeline
from moma.training.common import unpack
from moma.training.denoising import DenoisingTask, build
from tests.helpers import condition, far, image, mask, same
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl
from tests.training_data import SIDE, write_pairs

KINDS = ("moma:several", "moma:stage2", "ip-adapter", "mm-diff")
CAPTIONS = ("a cat in the snow", "a cat and a black cat", "a cat")
# The images are wider still. Both subjects begin with the left one's edge, where the window is moved to.
IMAGE, WIDTH, LEFT = 128, 96, 11


def base_and_pairs(folder: Path, **networks: Any) -> Path:
    build_tiny_bundle(folder / "bundle", 0, TinyConfig(SIDE, **networks))
    write_pairs(folder / "data", IMAGE)
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_and_pairs(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_and_pairs(tmp_path_factory.mktemp("sdxl"), networks=tiny_sdxl())


@pytest.fixture(params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def options(folder: Path, kind: str, *sets: str, steps: int = 2, out: str = "run") -> list[str]:
    more = ["--bundle", folder / "bundle", "--data", folder / "data", "--out", folder / f"{out}-{kind}"]
    more += ["--cache", folder / f"cache-{kind}", "--steps", steps, "--batch-size", 2, "--lr", 0.01]
    more += ["--dtype", "fp32", "--device", "cpu", "--workers", 1]
    sets = ("warmup=0", "validation_samples=1", "grid_steps=1", f"width={WIDTH}", *sets)
    small = ("rank=4", "text_rank=4", "refiner_blocks=1") if kind == "mm-diff" else ()
    return [kind, *map(str, more), *(part for one in (*small, *sets) for part in ("--set", one))]


def task_of(folder: Path, kind: str, *sets: str) -> DenoisingTask:
    args, bundle = train.parse_args(options(folder, kind, *sets)), Bundle.open(folder / "bundle")
    runtime = Runtime(bundle, torch.device("cpu"), torch.float32, pack=False)
    return build(train.choices_of(args, bundle), runtime, folder / "data")


def batch_of(task: DenoisingTask, index: list[int]) -> dict[str, Tensor]:
    """Samples with nothing dropped, each with the random numbers of its place in the data."""
    batch = task._batch(task.data, torch.tensor(index), torch.tensor(index), 0)
    kept = ("drop", "drop_text", "absent")
    return batch | {name: torch.zeros_like(batch[name]) for name in kept if name in batch}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moma:several", "ip-adapter"])
@pytest.mark.parametrize("upright", [False, True])
def test_the_target_is_the_window_around_all_subjects(tmp_path: Path, kind: str, upright: bool) -> None:
    """As cut by hand, with each mask where its subject is; the reference is the square that drawing makes."""
    data = base_and_pairs(tmp_path) / "data"
    box, sets = (LEFT, 0, LEFT + WIDTH, SIDE), [f"width={WIDTH}"]
    if upright:
        for path in data.glob("*.png"):
            Image.open(path).transpose(Image.Transpose.TRANSPOSE).save(path)
        box, sets = (0, LEFT, SIDE, LEFT + WIDTH), [f"width={SIDE}", f"height={WIDTH}"]
    task = task_of(tmp_path, kind, *sets)
    photo, left, right = (Image.open(data / f"{name}.png") for name in ("photo", "left", "right"))
    window, vae = photo.crop(box), task.model.trainable.base.vae
    batch, cover = task.data.batch(torch.tensor([1])), ReferenceConfig(geometry="cover")
    pixels = torch.from_numpy(np.array(window)).permute(2, 0, 1)[None] / 127.5 - 1
    for found, expected in zip((batch["mean"], batch["std"]), vae.encode(pixels), strict=True):
        same(found, expected)
    masks = [left, right] if task.model.trainable.several else [left]
    m_gen, m_ref = unpack(batch["m_gen"], *window.size[::-1]), unpack(batch["m_ref"], SIDE, SIDE)
    assert m_gen.shape[:2] == m_ref.shape[:2] == (1, len(masks))
    for i, own in enumerate(masks):
        assert torch.equal(m_gen[0, i] > 0, torch.from_numpy(np.array(own.crop(box)) > 0))
        square = make_reference(photo, own, SIDE, cover)
        assert torch.equal(m_ref[0, i], square.mask[0, 0])
        mean = batch["ref_mean"][:, i] if task.model.trainable.several else batch["ref_mean"]
        same(mean, vae.encode(square.image)[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_singles(sd: Path, kind: str) -> None:
    constrained = ("map_weight=3", "image_map_weight=3") if kind == "mm-diff" else ("map_weight=3",)
    task = task_of(sd, kind, "subject_weight=4", *(constrained if kind != "ip-adapter" else ()))
    every = [0, 1, 2]
    together = task.model(batch_of(task, every))
    same(together, torch.cat([task.model(batch_of(task, [i])) for i in every]), 1e-4)
    assert far(together, task.model(batch_of(task, every) | {"m_gen": 0 * batch_of(task, every)["m_gen"]}))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moma:several", "moma:stage2"])
def test_training_is_the_samplers_computation(folder: Path, kind: str) -> None:
    """Of an image as wide, given the same noises, timestep and masks; SDXL reads each image's own size."""
    task = task_of(folder, kind, "lambda_init=0.7")
    model, batch = task.model, batch_of(task, [0, 1, 2]) | {"t": torch.tensor([300, 500, 700])}
    losses, trainable = model(batch), model.trainable
    pipe = Pipeline(trainable.drawing().with_config(replace(trainable.method, geometry="cover")))
    photo = Image.open(folder / "data" / "photo.png")
    for i, caption in enumerate(CAPTIONS):
        embeddings = batch["embedding"][i].reshape(-1, batch["embedding"].shape[-1])  # (n, E)
        shown = (("left", "cat"), ("right", "black cat"))[: 1 + (i == 1 and trainable.several)]
        subjects = [
            pipe.encode_subject(
                photo,
                Image.open(folder / "data" / f"{side}.png"),
                word,
                features={caption: embeddings[s : s + 1]},
                posterior_noise=batch["ref_posterior_noise"][i : i + 1],
                reference_noise=batch["ref_noise"][i : i + 1],
            )
            for s, (side, word) in enumerate(shown)
        ]
        jobs, size = [Job(tuple(subjects), caption, 0)], SampleConfig(height=SIDE, width=WIDTH)
        cond = condition(pipe, jobs, size).conditional()
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"])[i : i + 1] * pipe.base.vae.cfg.scaling
        alpha, noise, t = model.alphas[batch["t"][i]], batch["noise"][i : i + 1], batch["t"][i : i + 1]
        m_gen = unpack(batch["m_gen"], SIDE, WIDTH)[i : i + 1, : len(subjects)]
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        eps = pipe.base.unet(x_t, t, cond.text, cond.hook(int(t), m_gen), cond.added)[0]
        same(losses[i], (eps - noise).square().mean(), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sdxl_reads_the_targets_height_and_width(sdxl: Path, kind: str) -> None:
    task = task_of(sdxl, kind)
    base = task.model.trainable.base
    added = task.model.trainable.inputs(task.model.unpacked(batch_of(task, [0, 1]))).added  # (B, A)
    pooled = added[:, : base.text_encoders[1].cfg.projection]
    assert torch.equal(added, base.added_conditioning(pooled, SIDE, WIDTH))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moma:several", "mm-diff"])
def test_attention_inside_the_masks_costs_less(sd: Path, kind: str) -> None:
    """Planted on a coarse grid of the target's shape, at the subject and mirrored."""
    task = task_of(sd, kind, "map_weight=1")
    trainable, batch = task.model.trainable, task.model.unpacked(batch_of(task, [0]))
    inside = F.adaptive_avg_pool2d(batch["m_gen"], (4, 6))  # (1, 1, h, w)

    def cost(maps: Tensor) -> Tensor:
        if kind == "moma:several":
            return trainable.constraint([maps], batch)
        hook = trainable.inputs(batch).hook
        heads, width = hook.layers[0][0].shape[1::2]
        q, k = torch.zeros(1, heads, 24, width), torch.zeros(1, heads, hook.word.shape[2], width)
        q[..., 0], k[:, :, batch["places"][0, 0, 0], 0] = 9 * maps.flatten(), 9
        return hook.cross_attn(0, q, k, torch.zeros_like(k), (4, 6))[1]

    assert cost(inside) < cost(inside.flip(-1)) - 0.1


@pytest.mark.parametrize(
    "kind", ["moma:several", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_trains_stops_resumes_exports_draws(sd: Path, tmp_path: Path, kind: str) -> None:
    assert train.run(options(sd, kind, out="whole")) == 0
    with Image.open(sd / f"whole-{kind}" / "samples" / "step-00000002.png") as grid:
        grid.load()
    for path in (sd / f"cache-{kind}").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # as a crash leaves it
    assert train.run(options(sd, kind, steps=1)) == 0
    assert train.run([*options(sd, kind, "width=80"), "--resume"]) == 2
    assert train.run([*options(sd, kind), "--resume"]) == 0
    names = [path.name for path in (sd / f"run-{kind}" / "export").glob("*.safetensors")]
    for name in names:
        whole, parts = (load_file(sd / f"{out}-{kind}" / "export" / name) for out in ("whole", "run"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    start = Bundle.open(sd / "bundle")
    convert([sd / f"run-{kind}" / "export"], tmp_path / "new", start, say=lambda text: None)
    pipe = moma.load(tmp_path / "new", kind.split(":")[0], device="cpu", dtype="fp32")
    job = Job(pipe.encode_subject(image(0), mask(30), "cat"), "a cat in the snow", 0)
    (drawn,) = pipe.run([job], SampleConfig(steps=1, height=SIDE, width=WIDTH))
    assert drawn.image.size == (WIDTH, SIDE)


@pytest.mark.parametrize("value", ["width=90", "height=0", "width=4096", "height=64.5", "width=-64"])
def test_sizes_that_do_not_fit(sd: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    """Before anything is computed."""
    cache = sd / f"none-{value}"
    assert train.run(options(sd, "moma:several", f"cache={cache}", value, out="none")) == 2
    name, number = value.split("=")
    assert f"{name} {number}" in capsys.readouterr().err and not cache.exists()


def test_the_weights_own_size_given_is_none_given(sd: Path, tmp_path: Path) -> None:
    """A cache of one is one of the other, with each image once; another shape's is refused."""
    place = f"cache={tmp_path / 'cache'}"
    task_of(sd, "moma:stage2", place, f"width={SIDE}", "height=64")
    (part,) = (tmp_path / "cache").glob("*.safetensors")
    before = part.stat().st_mtime_ns
    data = task_of(sd, "moma:stage2", place, "width=null").data
    assert torch.equal(data.target, data.reference)
    assert part.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=f"{WIDTH}"):
        task_of(sd, "moma:stage2", place)
