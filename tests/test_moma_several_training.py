"""Stage 2 of MoMA on images of several subjects, from data to a drawing."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import moma
import train
from convert_weights import convert
from moma import Bundle, Job, Runtime, SampleConfig
from moma.sampling.pipeline import Pipeline
from moma.training.common import unpack
from moma.training.denoising import DenoisingTask, build
from tests.helpers import condition, same
from tests.training_data import SIDE, write_bundle, write_pairs

CAPTIONS = ("a cat in the snow", "a cat and a black cat", "a cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    write_bundle(folder / "bundle")
    write_pairs(folder / "data")
    return folder


def options(folder: Path, *sets: str) -> list[str]:
    more = ["--bundle", folder / "bundle", "--data", folder / "data", "--out", folder / "run", "--steps", 2]
    more += ["--batch-size", 2, "--lr", 0.01, "--dtype", "fp32", "--device", "cpu", "--workers", 1]
    more += ["--cache", folder / "cache"]
    sets = ("warmup=0", "validation_samples=2", "grid_steps=2", "lambda_init=0.7", *sets)
    return ["moma:several", *map(str, more), *(part for one in sets for part in ("--set", one))]


def task_of(folder: Path, *sets: str) -> DenoisingTask:
    args, bundle = train.parse_args(options(folder, *sets)), Bundle.open(folder / "bundle")
    runtime = Runtime(bundle, torch.device("cpu"), torch.float32, pack=False)
    return build(train.choices_of(args, bundle), runtime, folder / "data")


def batch_of(task: DenoisingTask, index: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    """Samples with nothing dropped, each with the random numbers of its place in the data."""
    batch = task._batch(task.data, torch.tensor(index), torch.tensor(index), 0)
    return batch | {name: torch.zeros_like(batch[name]) for name in ("drop", "drop_text")}


@torch.no_grad()
@pytest.mark.parametrize("impl", ["fused", "explicit"])
def test_training_is_the_samplers_computation(folder: Path, impl: str) -> None:
    """Of one subject and of two, given the same noises, timestep and masks."""
    task = task_of(folder, f"attention={impl}")
    model, batch = task.model, batch_of(task)
    batch["t"] = torch.tensor([300, 500, 700])
    losses, pipe = model(batch), Pipeline(model.trainable.drawing())
    photo = Image.open(folder / "data" / "photo.png").convert("RGB")
    for i, caption in enumerate(CAPTIONS):
        subjects = [
            pipe.encode_subject(
                photo,
                Image.open(folder / "data" / f"{side}.png").convert("L"),
                word,
                features={caption: batch["embedding"][i, s : s + 1]},
                posterior_noise=batch["ref_posterior_noise"][i : i + 1],
                reference_noise=batch["ref_noise"][i : i + 1],
            )
            for s, (side, word) in enumerate((("left", "cat"), ("right", "black cat"))[: 1 + (i == 1)])
        ]
        cond = condition(pipe, [Job(tuple(subjects), caption, 0)], SampleConfig()).conditional()
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"])[i : i + 1] * pipe.base.vae.cfg.scaling
        alpha, noise = model.alphas[batch["t"][i]], batch["noise"][i : i + 1]
        hook = cond.hook(int(batch["t"][i]), unpack(batch["m_gen"], SIDE, SIDE)[i : i + 1, : len(subjects)])
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        eps = pipe.base.unet(x_t, batch["t"][i : i + 1], cond.text, hook)[0]
        same(losses[i], (eps - noise).square().mean(), 1e-5)


def test_each_word_has_its_place(folder: Path) -> None:
    """The last token of its subject's word in the caption; the constraint sees it."""
    task = task_of(folder, "map_weight=1.0")
    batch, plain = batch_of(task), task_of(folder)
    ids = task.model.trainable.base.tokenizers[0].encode("cat").ids
    first, second = batch["places"][1, :, 0].tolist()
    assert 0 < first < second and [batch["text_ids"][1, i] for i in (first, second)] == [ids[1]] * 2
    difference = (task.model(batch) - plain.model(batch)).detach()
    assert difference.all()
    batch["drop_text"] = torch.tensor([False, True, False])
    assert not (task.model(batch) - plain.model(batch)).detach()[1]


@torch.no_grad()
def test_a_batch_is_its_singles(folder: Path) -> None:
    """Under the constraint, too, where a sample of one subject is padded."""
    task = task_of(folder, "map_weight=3.0")
    singles = torch.cat([task.model(batch_of(task, (i,))) for i in range(3)])
    same(task.model(batch_of(task)), singles)


def test_trains_exports_draws(folder: Path, tmp_path: Path) -> None:
    assert train.run(options(folder)) == 0
    assert (folder / "run" / "samples" / "step-00000002.png").is_file()
    start = Bundle.open(folder / "bundle")
    convert([folder / "run" / "export"], tmp_path / "trained", start, say=lambda text: None)
    before, after = (Bundle.open(x).state("adapter") for x in (folder / "bundle", tmp_path / "trained"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"projector", "context", "subject"}
    assert moma.load(tmp_path / "trained", device="cpu", dtype="fp32").method.config.lambda_init == 0.7
