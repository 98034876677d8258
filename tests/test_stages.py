"""The two stages: what they train, that it is what the sampler does, and what comes out."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import moma
from convert_weights import convert
from models.attention import attention_probs
from models.clip_image import clip_image
from models.lora import LoRALinear
from moma import DEFAULT, Job, Runtime, SampleConfig
from moma.data.triplets import load, open_source
from moma.inputs.preprocess import make_reference
from moma.methods.ip_adapter import IPAdapterTraining
from moma.methods.map_loss import map_loss
from moma.methods.moma.adapter import AdapterConfig
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.training import AdapterTraining, DecoderTraining, move
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod
from moma.sampling.interface import Batch
from moma.training import denoising, features
from moma.training.common import pack, unpack
from moma.training.config import Choices, DenoisingConfig, FeatureConfig, TrainConfig
from moma.training.denoising import DenoisingTask, draw
from moma.training.features import FeatureTask
from moma.training.task import Task
from moma.weights.bundle import Bundle
from tests.helpers import condition, embed, steps, trained
from tests.training_data import SIDE, write_bundle, write_data

CPU = torch.device("cpu")
ONE = FeatureConfig(workers=0, lanes=2, validation_samples=2, validation_batch=2)
TWO = DenoisingConfig(
    cache_batch=4, cache_workers=1, validation_samples=2, grid_samples=2, grid_steps=2,
    drop_context=0.0, drop_text=0.0, drop_both=0.0,
)  # fmt: skip
# The subject part acts from the beginning, as after some training.
MOVED = replace(DEFAULT, lambda_init=0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bundle, data of ten samples, caches."""
    folder = tmp_path_factory.mktemp("stages")
    write_bundle(folder / "bundle")
    write_data(folder / "data", 10)
    return folder


def split(options: object, fields: dict) -> tuple:
    """Fields of the data's options, and the others, which are the training's."""
    own = {name: value for name, value in fields.items() if not hasattr(options, name)}
    return replace(options, **{name: fields[name] for name in fields if name not in own}), own


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[..., FeatureTask]:
    def build(
        method: MethodConfig = DEFAULT, bundle: str = "bundle", data: Path = folder / "data", **fields: object
    ) -> FeatureTask:
        options, own = split(ONE, fields)
        config = DecoderTraining.Config(**{"lora_rank": 4, "lora_alpha": 4.0, **own})
        runtime = Runtime.choose(Bundle.open(folder / bundle), "cpu", "fp32")
        choices = Choices(DecoderTraining, TrainConfig(), options, config, method)
        return features.build(choices, runtime, data)

    return build


def denoising_task(
    kind: type,
    folder: Path,
    method: object,
    bundle: str = "bundle",
    data: Path | None = None,
    **fields: object,
) -> DenoisingTask:
    opened = Bundle.open(folder / bundle)
    name = f"cache-{kind.embedding}-{method.reference_background}-{getattr(method, 'template', '')}-{bundle}"
    options, own = split(replace(TWO, cache=str(folder / name)), fields)
    runtime = Runtime.choose(opened, "cpu", "fp32", pack=False)
    choices = Choices(kind, TrainConfig(), options, kind.Config(**own), method)
    return denoising.build(choices, runtime, data or folder / "data")


@pytest.fixture(scope="module")
def two(folder: Path) -> Callable[..., DenoisingTask]:
    def build(method: MethodConfig = DEFAULT, **fields: object) -> DenoisingTask:
        return denoising_task(AdapterTraining, folder, method, **fields)

    return build


@pytest.fixture(scope="module")
def ip(folder: Path) -> Callable[..., DenoisingTask]:
    def build(bundle: str = "bundle", **fields: object) -> DenoisingTask:
        method = Bundle.open(folder / bundle).method_config("ip-adapter", **IPAdapterTraining.fixed)
        return denoising_task(IPAdapterTraining, folder, method, bundle=bundle, **fields)

    return build


def first(task: Task, size: int = 8) -> Batch:
    return next(task.batches(size, 0, 1, {}))[0]


def changed_by_two_steps(task: Task) -> tuple[set[str], set[str]]:
    """Names of the parameters that the first step changes, and of those that two steps change."""
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    changed, batch = [], first(task)
    optimizer = torch.optim.Adam(trained(task.model).values(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        task.model(batch).mean().backward()
        optimizer.step()
        changed.append(
            {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
        )
    return changed[0], changed[1]


def same(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- what is trained ----------------------------------------------------------------------------------


def test_stage_2_trains_the_adapter(two: Callable[..., DenoisingTask]) -> None:
    """λ = 0 at first: K', V' wait for λ's first step; from the second on everything moves, nothing else."""
    task = two()
    names = {name for name in trained(task.model)}
    assert names == {
        f"trainable.adapter.{name}"
        for name, _ in task.model.trainable.adapter.named_parameters()
        if name.split(".")[0] in ("projector", "context", "subject")
    }
    waiting = {
        name for name in names if name.startswith("trainable.adapter.subject.") and not name.endswith("scale")
    }
    after_one, after_two = changed_by_two_steps(task)
    assert after_one == names - waiting
    assert after_two == names


def test_stage_2_of_the_paper(two: Callable[..., DenoisingTask]) -> None:
    """λ = 1 on zero K', V': V' moves at once, K' and λ, held back by V' = 0, in the second step."""
    task = two(replace(DEFAULT, subject_init="zero", lambda_init=1.0))
    names = {name for name in trained(task.model)}
    waiting = {name for name in names if ".subject." in name and not name.endswith("to_v.weight")}
    after_one, after_two = changed_by_two_steps(task)
    # K' is still zero in the second step: alike scores, but V' differs by now and so does K''s gradient.
    assert (after_one, after_two) == (names - waiting, names)


def test_ip_adapter_trains_projector_and_context(ip: Callable[..., DenoisingTask]) -> None:
    task = ip()
    names = {f"trainable.adapter.{n}" for n, _ in task.model.trainable.adapter.named_parameters()}
    assert set(trained(task.model)) == names
    assert changed_by_two_steps(task) == (names, names)
    batch, other = first(task), first(task)
    other |= {"ref_mean": -batch["ref_mean"], "m_ref": 0 * batch["m_ref"], "m_gen": 0 * batch["m_gen"]}
    assert torch.equal(task.model(batch), task.model(other))  # no trace of masks and reference


@pytest.mark.parametrize("template", ["release", "paper"])
@pytest.mark.parametrize("mode", ["mllm", "lora", "new"])
def test_stage_1_trains_what_it_says(one: Callable[..., FeatureTask], mode: str, template: str) -> None:
    """LoRA's A waits for B, which starts at zero. The tower never moves, nor does the rest of the adapter."""
    task = one(replace(DEFAULT, template=template), train=mode)
    new = {f"adapter.mapping.{name}_proj.weight" for name in ("gate", "up", "down")}
    new |= {"adapter.token"} if template == "paper" else set()
    everything = dict(task.model.named_parameters())
    expected = {
        "mllm": {name for name in everything if name.startswith(("llava.llama.", "llava.projector."))},
        "lora": {name for name in everything if name.endswith((".down", ".up"))},
        "new": set(),
    }[mode]
    assert len(expected) == {"mllm": 24, "lora": 28, "new": 0}[mode]
    assert set(trained(task.model)) == new | expected
    after_one, after_two = changed_by_two_steps(task)
    assert after_one == new | {name for name in expected if not name.endswith(".down")}
    assert after_two == new | expected


def test_fewer_blocks(one: Callable[..., FeatureTask]) -> None:
    """Blocks that the method leaves out are not trained: they would never get a gradient."""
    for mode in ("mllm", "lora"):
        task = one(replace(DEFAULT, mllm_layers=1), train=mode)
        names = set(trained(task.model))
        assert not any(".layers.1." in name for name in names) and any(".layers.0." in name for name in names)
        assert changed_by_two_steps(task)[1] == names


def test_what_starts_elsewhere_than_at_random_does_not_decay(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask], ip: Callable[..., DenoisingTask]
) -> None:
    for task in (two(), ip()):
        assert task.decayed == ["trainable.adapter.projector.proj.weight"]
    mapping = [f"adapter.mapping.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert list(one(replace(DEFAULT, template="paper"), train="mllm").decayed) == mapping
    lora = set(one(train="lora").decayed) - set(mapping)
    assert len(lora) == 28 and all(name.endswith((".down", ".up")) for name in lora)


@pytest.mark.slow  # 100 steps
def test_losses_fall(one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask]) -> None:
    """Eight samples learned by heart, their draws fixed: stage 1 to a hundredth, stage 2 to four fifths (a
    frozen UNet of random weights does not get far)."""
    task = one()
    losses = steps(task, first(task), 80, 3e-3)
    assert losses[-1] < 0.01 * losses[0]
    task = two()
    losses = steps(task, first(task), 20, 1e-2)
    assert losses[-1] < 0.8 * losses[0]


# --- what images are seen -----------------------------------------------------------------------------


def test_cover_shows_the_subject_without_repeated_edges() -> None:
    """The largest square of the image, from its middle, moved no further than the subject's box asks."""
    cover = replace(DEFAULT, geometry="cover")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    places = ((45, 55, 20), (85, 97, 37), (2, 30, 2), (0, 100, 20), (30, 96, 33), (0, 80, 10))
    for turned in (False, True):
        for low, high, start in places:
            mask = Image.new("L", (100, 60))
            mask.paste(255, (low, 10, high, 40))
            box = (start, 0, start + 60, 60)
            pair = [x.transpose(Image.Transpose.TRANSPOSE) if turned else x for x in (image, mask)]
            found = make_reference(*pair, SIDE, cover)
            area = (0, start, 60, start + 60) if turned else box
            expected = [x.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=area) for x in pair]
            assert found.photo.tobytes() == expected[0].tobytes(), (low, high)
            subject = torch.from_numpy(np.asarray(expected[1]) > 127.5)
            assert torch.equal(found.mask[0, 0].bool(), subject)
    square, round_mask = image.crop((0, 0, 60, 60)), Image.new("L", (60, 60))
    round_mask.paste(255, (0, 20, 20, 60))
    pad = make_reference(square, round_mask, SIDE, DEFAULT)
    assert make_reference(square, round_mask, SIDE, cover).photo.tobytes() == pad.photo.tobytes()


def test_geometry_of_the_data(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask], folder: Path, tmp_path: Path
) -> None:
    """ "cover" unless another one is set, whatever the method draws with; the export keeps the method's."""
    wide = write_data(tmp_path / "wide", 4)
    for path in wide.glob("*.png"):
        image = Image.open(path)
        image.resize((2 * SIDE, SIDE)).save(path)
    raw = load(open_source(wide), next(open_source(wide).read(0)))
    for geometry in ("cover", "pad"):
        own = {} if geometry == "cover" else {"geometry": geometry}
        task = two(data=wide, cache=str(tmp_path / geometry), validation_samples=1, **own)
        square = make_reference(raw.image, raw.mask, SIDE, replace(DEFAULT, geometry=geometry))
        base = task.model.trainable.base
        same(task.data.batch(torch.tensor([0]))["mean"], base.vae.encode(square.image)[0])
        (batch,) = one(data=wide, validation_samples=1, **own).validation()
        same(batch["full"][0], clip_image(square.photo, batch["full"].shape[-1]))
        assert task.model.export().method == {} and task.model.trainable.method.geometry == "pad"


def test_mirrored_images(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask], tmp_path: Path
) -> None:
    """Stage 1 mirrors about half of the samples, reference and target alike, by their numbers; stage 2 sees
    both forms, and neither of those that are kept back. Validation mirrors nothing."""
    plain, task = one(), one(flip=True)
    before, after = first(plain), first(task)
    changed = [not torch.equal(a, b) for a, b in zip(before["full"], after["full"], strict=True)]
    assert 0 < sum(changed) < len(changed)
    for name in ("white", "full"):
        for i, mirrored in enumerate(changed):
            assert torch.equal(after[name][i], before[name][i].flip(-1) if mirrored else before[name][i])
    for a, b in zip(plain.validation(), task.validation(), strict=True):
        assert torch.equal(a["full"], b["full"])
    part, _ = next(task.batches(4, 1, 2, {}))
    assert torch.equal(part["full"], after["full"][1::2])

    plain, task = two(), two(flip=True, cache=str(tmp_path / "mirrored"))
    means = [{tuple(m.flatten().tolist()) for m in first(t, n)["mean"]} for t, n in ((plain, 8), (task, 16))]
    assert means[0] < means[1] and len(means[1]) == 16
    for a, b in zip(plain.validation(), task.validation(), strict=True):
        assert torch.equal(a["mean"], b["mean"]) and torch.equal(a["noise"], b["noise"])
    assert task.sample_grid().size == plain.sample_grid().size


def test_another_number_of_samples_is_no_continuation(two: Callable[..., DenoisingTask]) -> None:
    """The order would be another one."""
    task = two()
    _, position = next(task.batches(2, 0, 1, {}))
    with pytest.raises(ValueError, match=r"8 usable .* 9 .*--change data"):
        next(task.batches(2, 0, 1, position | {"items": 9}))


# --- the loss is a function of the sample -------------------------------------------------------------


@torch.no_grad()
def test_batches_and_ranks_do_not_matter(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask]
) -> None:
    """One process with four samples, two ranks with two, single samples: the same losses by number."""
    for task in (one(replace(DEFAULT, template="paper")), two(MOVED, drop_context=0.5)):
        whole = first(task, 4)
        expected = dict(zip(whole["number"].tolist(), task.model(whole), strict=True))
        assert list(expected) == [0, 1, 2, 3]
        for rank in range(2):
            part, _ = next(task.batches(2, rank, 2, {}))
            for number, loss in zip(part["number"].tolist(), task.model(part), strict=True):
                assert number % 2 == rank
                same(loss, expected[number])
        for i in range(4):
            same(task.model({name: value[i : i + 1] for name, value in whole.items()})[0], expected[i])


def test_goes_on_at_a_position(one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask]) -> None:
    for task in (one(), two(drop_context=0.5)):
        stream = task.batches(3, 0, 1, {})
        *_, (_, position), (batch, after) = (next(stream) for _ in range(4))
        again, end = next(task.batches(3, 0, 1, position))
        assert end == after
        for name, value in again.items():
            expected = batch[name]
            assert value == expected if isinstance(value, list) else torch.equal(value, expected)


def test_an_epoch_has_every_sample_but_those_kept_back(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask], folder: Path
) -> None:
    """Ten samples, two of them held out: the eight others, once each."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # those kept back are no news
        texts = first(one(), 8)["instruction"]
    assert len(texts) == 8
    task = two()
    held = {tuple(mean.flatten().tolist()) for batch in task.validation() for mean in batch["mean"]}
    means = [tuple(mean.flatten().tolist()) for mean in first(task, 8)["mean"]]
    assert len(set(means)) == 8 and len(held) == 2 and not held & set(means)
    # From data of its own nothing is held back.
    assert (
        len({tuple(m.flatten().tolist()) for m in first(two(validation=str(folder / "data")), 10)["mean"]})
        == 10
    )


def test_validation_is_fixed(one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask]) -> None:
    """The same batches on every call and for every seed, nothing dropped."""
    for task in (one(), two(drop_context=0.5, drop_text=0.4)):
        (a,), (b,) = (
            task.validation(),
            replace(task, **({"seed": 9} if "drop" in first(task) else {})).validation(),
        )
        assert len(a["number"]) == 2 and a.keys() == first(task).keys()
        assert all(a[k] == b[k] if isinstance(a[k], list) else torch.equal(a[k], b[k]) for k in a)
        assert not a.get("drop", torch.zeros(1)).any()


def test_a_single_sample_is_trained_on_without_a_validation(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask], tmp_path: Path
) -> None:
    write_data(tmp_path / "data", 1)
    for build in (one, partial(two, cache=str(tmp_path / "cache"))):
        task = build(data=tmp_path / "data", validation_samples=None)
        assert task.validation() == [] and len(first(task, 2)["number"]) == 2


@pytest.mark.parametrize("stage", ["one", "two"])
def test_gradient_checkpointing_changes_nothing(request: pytest.FixtureRequest, stage: str) -> None:
    build, results = request.getfixturevalue(stage), []
    for checkpointing in (False, True):
        task = build(MOVED, gradient_checkpointing=checkpointing)
        loss = task.model(first(task, 4))
        loss.sum().backward()
        results.append((loss.detach(), {name: p.grad for name, p in trained(task.model).items()}))
    same(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        same(gradient, results[1][1][name], 1e-4)


# --- stage 1 computes the paper's formula -------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("template", ["release", "paper"])
def test_stage_1_is_equation_4(one: Callable[..., FeatureTask], folder: Path, template: str) -> None:
    """The sampler's decoder, on the reference, against CLIP of the target with its background."""
    method = replace(DEFAULT, template=template)
    task = one(method, init="adapter", validation_samples=3, validation_batch=3)
    (batch,) = task.validation()
    pipe, source = moma.load(folder / "bundle", device="cpu", dtype="fp32"), open_source(folder / "data")
    pipe = pipe.with_config(replace(pipe.method.config, template=template))
    for loss, raw in zip(task.model(batch), source.read(0), strict=False):
        triplet = load(source, raw)
        subject = pipe.encode_subject(*(triplet.reference or (triplet.image, triplet.mask)), triplet.label)
        tower = pipe.method.decoder.llava.tower
        pixels = clip_image(triplet.image, tower.cfg.image_size)[None]
        target = tower.pool(tower.hidden(pixels))
        same(loss, (embed(pipe, subject, triplet.caption) - target).square().mean())


# --- stage 2 computes the paper's formulas ------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("impl", ["fused", "explicit"])
@pytest.mark.parametrize("background", ["photo", "white"])
def test_training_is_the_samplers_computation(
    two: Callable[..., DenoisingTask], folder: Path, tmp_path: Path, impl: str, background: str
) -> None:
    """The sampler's conditional row, given the same noises, timestep and M_gen, has the training's loss."""
    method = replace(MOVED, attention=impl, reference_background=background)
    task = two(method, validation_samples=3, validation_batch=3)  # the third has another image as reference
    (batch,) = task.validation()
    task.export(tmp_path / "export")
    convert([tmp_path / "export"], tmp_path / "new", Bundle.open(folder / "bundle"), say=lambda text: None)
    pipe = moma.load(tmp_path / "new", device="cpu", dtype="fp32")
    pipe = pipe.with_config(replace(pipe.method.config, attention=impl))  # weights do not say how to compute
    assert pipe.method.config == method
    source, losses = open_source(folder / "data"), task.model(batch)
    for i, raw in enumerate([*source.read(0)][:3]):
        triplet = load(source, raw)
        subject = pipe.encode_subject(
            *(triplet.reference or (triplet.image, triplet.mask)),
            triplet.label,
            posterior_noise=batch["ref_posterior_noise"][i : i + 1],
            reference_noise=batch["ref_noise"][i : i + 1],
        )
        cond = condition(pipe, [Job(subject, triplet.caption, 0)], SampleConfig())
        t, noise = int(batch["t"][i]), batch["noise"][i : i + 1]
        alpha = task.model.alphas[t]
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"])[i : i + 1] * pipe.base.vae.cfg.scaling
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        hook = cond.hook(t, unpack(batch["m_gen"], SIDE, SIDE)[i : i + 1])
        assert hook.subject_on == (t < 950)
        hook = replace(hook, subject_on=True)  # training has the term at all timesteps
        eps = pipe.base.unet(torch.cat([x_t, x_t]), torch.tensor([t, t]), cond.text, hook)[0][1:]
        same(losses[i], (eps - noise).square().mean())


@torch.no_grad()
def test_start_of_stage_2(two: Callable[..., DenoisingTask]) -> None:
    """λ = 0: no trace of the reference. Where M_gen is 0, and it gates the context tokens, nothing at all is
    left of the adapter: the loss is the base UNet's, bit for bit. Ungated, the context tokens act."""

    def base(task: DenoisingTask, batch: Batch) -> Tensor:
        model = task.model
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * model.scaling
        alpha = model.alphas[batch["t"]][:, None, None, None]
        text = model.unpacked(batch)["text"]
        eps = model.unet(alpha.sqrt() * x0 + (1 - alpha).sqrt() * batch["noise"], batch["t"], text)[0]
        return (eps - batch["noise"]).square().mean(dim=(1, 2, 3))

    task = two()
    batch = first(task)
    other = batch | {"ref_mean": -batch["ref_mean"], "m_ref": batch["m_ref"].flip(0)}
    assert torch.equal(task.model(batch), task.model(other))
    closed = batch | {"m_gen": torch.zeros_like(batch["m_gen"])}
    same(task.model(closed), base(task, batch))
    assert (task.model(batch) - base(task, batch)).abs().min() > 1e-4
    ungated = two(replace(DEFAULT, context_masked=False))
    assert (ungated.model(closed) - base(task, batch)).abs().min() > 1e-4
    # Zero K', V' do the same for any λ.
    zero = two(replace(DEFAULT, subject_init="zero", lambda_init=1.0))
    same(zero.model(batch), task.model(batch))


@torch.no_grad()
def test_dropped_context(two: Callable[..., DenoisingTask]) -> None:
    """A dropped sample has the zero embedding's context tokens, and text and reference like any other."""
    task = two(MOVED, drop_context=0.5)
    batch = first(task)
    drop = batch["drop"]
    assert drop.any() and not drop.all()
    kept = batch | {"drop": torch.zeros_like(drop)}
    zeroed = kept | {"embedding": batch["embedding"] * ~drop[:, None]}
    assert torch.equal(task.model(batch), task.model(zeroed))
    assert torch.equal(task.model(batch)[~drop], task.model(kept)[~drop])
    assert not torch.isclose(task.model(batch)[drop], task.model(kept)[drop]).any()
    for changed in ({"text_ids": batch["label_ids"]}, {"ref_mean": -batch["ref_mean"]}):
        other = task.model(batch | changed)
        assert not torch.isclose(task.model(batch)[drop], other[drop]).any(), changed.keys()
    for draws in (first(two(drop_context=0.0)), batch):  # the other draws are the same
        assert torch.equal(draws["noise"], batch["noise"]) and torch.equal(draws["t"], batch["t"])


@torch.no_grad()
def test_dropped_text(two: Callable[..., DenoisingTask]) -> None:
    """Without the embedding, the text, or both as in the sampler's unconditional row; the label stays."""
    shares = {"drop_context": 0.2, "drop_text": 0.3, "drop_both": 0.1}
    task, whole = two(MOVED, **shares), two(MOVED)
    numbers = torch.arange(4000)
    found = draw(numbers, 0, ((1, 1, 1),) * 2, task.model.options, task.model.trainable)
    image, text = found["drop"], found["drop_text"]
    for chosen, share in zip((image & ~text, text & ~image, image & text), shares.values(), strict=True):
        assert abs(chosen.float().mean() - share) < 0.03
    plain = draw(numbers, 0, ((1, 1, 1),) * 2, whole.model.options, task.model.trainable)
    assert torch.equal(plain["t"], found["t"]) and not plain["drop"].any() and not plain["drop_text"].any()

    batch = first(whole)
    both = batch | {name: torch.ones_like(batch[name]) for name in ("drop", "drop_text")}
    empty = whole.model.trainable.base.tokenizers[0].ids([""]).expand_as(batch["text_ids"])
    by_hand = batch | {"text_ids": empty, "embedding": torch.zeros_like(batch["embedding"])}
    assert torch.equal(whole.model(both), whole.model(by_hand))
    assert not torch.isclose(whole.model(both), whole.model(batch)).any()
    seen = whole.model.unpacked(both)
    assert torch.equal(seen["label"], whole.model.unpacked(batch)["label"])
    cond = whole.model.trainable.base.encode_text([""]).states
    same(seen["text"], cond.expand_as(seen["text"]))


@torch.no_grad()
def test_fields_of_the_loss(two: Callable[..., DenoisingTask]) -> None:
    """subject_below_t switches Eq. 3's term off above, drop_reference does in some samples; subject_weight
    moves the loss towards the subject.

    snr_gamma takes weight from timesteps with little noise.
    """
    plain, limited = two(MOVED), two(MOVED, subject_below_t=500)
    batch = first(plain)
    early = batch["t"] < 500
    assert early.any() and not early.all()
    without = plain.model(batch | {"ref_mean": -batch["ref_mean"]})
    assert torch.equal(limited.model(batch)[early], plain.model(batch)[early])
    assert not torch.isclose(limited.model(batch)[~early], plain.model(batch)[~early]).any()
    other = limited.model(batch | {"ref_mean": -batch["ref_mean"]})
    assert torch.equal(other[~early], limited.model(batch)[~early])
    assert torch.equal(other[early], without[early])
    alone = two(MOVED, drop_reference=0.5)
    shown = first(alone)["shown"]  # (B,), drawn beside what is drawn without it
    assert shown.any() and not shown.all() and torch.equal(first(alone)["shift"], batch["shift"])
    losses, moved = (
        alone.model(x | {"shown": shown}) for x in (batch, batch | {"ref_mean": -batch["ref_mean"]})
    )
    assert torch.equal(losses[shown], plain.model(batch)[shown])
    assert torch.equal(moved[shown], without[shown]) and torch.equal(moved[~shown], losses[~shown])
    full = batch | {"m_gen": torch.full_like(batch["m_gen"], 255)}
    heavy = two(MOVED, subject_weight=5.0)
    same(heavy.model(full), plain.model(full))  # the same weight everywhere
    assert not torch.isclose(heavy.model(batch), plain.model(batch)).all()
    alphas = alphas_cumprod(ScheduleConfig())  # (T,)
    weights, t = (0.1 * (1 - alphas) / alphas).clamp(max=1), batch["t"]
    assert (weights[t] < 1).any() and (weights[t] == 1).any()
    same(two(MOVED, snr_gamma=0.1).model(batch), plain.model(batch) * weights[t] / weights.mean())


@pytest.mark.parametrize("form", ["balanced", "distance"])
def test_label_maps_are_kept_to_the_mask(two: Callable[..., DenoisingTask], form: str) -> None:
    """Eq. 1 plus the constraint on the attention of the label's tokens, below the finest grid."""
    plain = two()
    batch = first(plain, 4)
    batch["drop_text"] = torch.tensor([False, False, False, True])
    task = two(map_weight=3.0, map_form=form)
    base, unpacked = task.model.trainable.base, task.model.unpacked(batch)
    inputs = task.model.trainable.inputs(unpacked)
    end = base.tokenizers[0].end_id
    words = [ids[1 : ids.index(end)] for ids in batch["label_ids"].tolist()]
    label = torch.tensor(
        [
            [float(i in word) for i in ids]
            for ids, word in zip(unpacked["text_ids"].tolist(), words, strict=True)
        ]
    )  # (B, T)
    x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * base.vae.cfg.scaling
    x_t = add_noise(x0, batch["noise"], task.model.alphas[batch["t"]][:, None, None, None])
    maps: list[tuple[Tensor, tuple[int, int]]] = []

    class Maps:
        def self_attn(self, *args: object, **options: object) -> tuple[Tensor, None]:
            return inputs.hook.self_attn(*args, **options)

        def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> object:
            maps.append((attention_probs(q, k).mean(dim=1), grid))  # (B, N, T)
            return inputs.hook.cross_attn(layer, q, k, v, grid)

    base.unet(x_t, batch["t"], inputs.text, Maps(), inputs.added)
    expected = []
    for probs, grid in maps:
        if grid != batch["mean"].shape[-2:]:
            found = (probs * label[:, None]).sum(dim=2)[:, None, :, None]  # (B, 1, N, 1)
            masks = F.interpolate(unpacked["m_gen"], grid, mode="bilinear", antialias=True)
            expected.append(map_loss(found, masks, ~batch["drop_text"][:, None], form=form))
    difference = task.model(batch) - plain.model(batch)
    same(difference, 3 * torch.stack(expected).mean(dim=0), 1e-4)
    assert difference[:3].all() and not difference[3]


def test_move() -> None:
    """Down and right, each sample by its own shift; the edges repeat."""
    x = torch.arange(2 * 12.0).view(2, 1, 3, 4)
    there = move(x, torch.tensor([[1, 2], [0, -1]]))
    assert torch.equal(there[0, 0, 1:, 2:], x[0, 0, :2, :2])
    assert (there[0, 0, 0] == there[0, 0, 1]).all() and (there[0, 0, 1, :2] == x[0, 0, 0, 0]).all()
    assert torch.equal(there[1, 0, :, :3], x[1, 0, :, 1:]) and torch.equal(there[1, 0, :, 3], x[1, 0, :, 3])


@torch.no_grad()
def test_the_reference_is_moved(two: Callable[..., DenoisingTask]) -> None:
    """reference_shift moves the reference's latents and M_ref together, and nothing else."""
    still, moving = two(MOVED), two(MOVED, reference_shift=2)
    before, batch = first(still), first(moving)
    assert (before["shift"] == 0).all() and batch["shift"].abs().max() == 2
    assert all(torch.equal(before[name], batch[name]) for name in before if name != "shift")
    model = moving.model
    assert not torch.isclose(model(batch), still.model(before)).all()
    m_ref = unpack(batch["m_ref"], SIDE, SIDE)  # (B, 1, S, S)
    scale = SIDE // batch["mean"].shape[-1]
    by_hand = batch | {
        "ref_mean": move(batch["ref_mean"], batch["shift"]),
        "ref_std": move(batch["ref_std"], batch["shift"]),
        "m_ref": torch.stack([pack(m) for m in move(m_ref, scale * batch["shift"])]),
        "shift": torch.zeros_like(batch["shift"]),
    }
    assert torch.equal(model(by_hand), model(batch))


# --- what comes out -----------------------------------------------------------------------------------


def put_in(task: Task, folder: Path, out: Path) -> Bundle:
    """The bundle with what the task exports."""
    task.export(out.with_name(f"{out.name}-export"))
    export = out.with_name(f"{out.name}-export")
    convert([export], out, Bundle.open(folder / "bundle"), say=lambda text: None)
    return Bundle.open(out)


def first_triplet(folder: Path) -> Any:
    source = open_source(folder / "data")
    return load(source, next(source.read(0)))


@pytest.mark.parametrize("name", ["moma", "ip-adapter"])
def test_export_draws(
    two: Callable[..., DenoisingTask], ip: Callable[..., DenoisingTask], folder: Path, name: str
) -> None:
    """Export -> bundle -> image, drawn with what was trained; the training continues from there."""
    build, start = (two, "adapter") if name == "moma" else (ip, "ip_adapter")
    task = build()
    steps(task, first(task), 2, 1e-2)
    put_in(task, folder, folder / name)
    pipe = moma.load(folder / name, name, device="cpu", dtype="fp32")
    for key, value in task.model.trainable.adapter.state_dict().items():
        assert torch.equal(pipe.method.adapter.state_dict()[key], value), key
    triplet = first_triplet(folder)
    subject = pipe.encode_subject(triplet.image, triplet.mask, triplet.label)
    if name == "ip-adapter":
        assert (pipe.method.config.image, pipe.method.config.encoder) == ("white", "vision")
        same(task.data.batch(torch.tensor([0]))["embedding"], subject.embedding)
    (drawn,) = pipe.run([Job(subject, triplet.caption, seed=0)], SampleConfig(steps=2))
    assert drawn.image.size == (SIDE, SIDE)
    again = build(bundle=name, init=start)
    with torch.no_grad():
        same(again.model(first(again)), task.model(first(task)))


@pytest.mark.parametrize(
    "mode", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mllm", "new"))]
)
def test_stage_1_export_is_stage_2s_start(
    one: Callable[..., FeatureTask], two: Callable[..., DenoisingTask], folder: Path, mode: str
) -> None:
    """The bundle made of the export predicts what the trained model does; stage 2's embeddings are its."""
    task = one(replace(DEFAULT, template="paper"), train=mode)
    steps(task, first(task), 2, 1e-2)
    name = f"stage1-{mode}"
    bundle = put_in(task, folder, folder / name)
    assert (folder / f"{name}-export" / "llava.safetensors").exists() == (mode != "new")
    assert bundle.method == {"template": "paper"}
    method = bundle.method_config("moma")
    again = one(method, bundle=name, train=mode, init="adapter")
    with torch.no_grad():
        same(again.model(first(again)), task.model(first(task)), 1e-4)
    second = two(method, bundle=name)
    pipe = moma.load(folder / name, device="cpu", dtype="fp32")
    triplet = first_triplet(folder)
    subject = pipe.encode_subject(triplet.image, triplet.mask, triplet.label)
    same(second.data.batch(torch.tensor([0]))["embedding"], embed(pipe, subject, triplet.caption))
    mapping = second.model.trainable.adapter.mapping
    assert torch.equal(mapping.up_proj.weight, task.model.adapter.mapping.up_proj.weight)


def test_a_bundle_without_an_adapter(folder: Path) -> None:
    """Stage 1 is where the first one comes from; what it does not train is stage 2's start."""
    bundle = without(Bundle.open(folder / "bundle"), "adapter")
    runtime = Runtime.choose(bundle, "cpu", "fp32")
    method = replace(DEFAULT, template="paper")
    choices = Choices(DecoderTraining, TrainConfig(), ONE, DecoderTraining.Config(), method)
    task = features.build(choices, runtime, folder / "data")
    adapter, llama = task.model.adapter, task.model.llava.llama
    same(adapter.token, llama.embed_tokens.weight.mean(dim=0))
    assert all(part.scale.item() == 0 for part in adapter.subject) and adapter.context[0].to_v.weight.any()
    with pytest.raises(ValueError, match="adapter"):
        AdapterTraining.check(bundle, AdapterTraining.Config(), DEFAULT)


def test_ip_adapter_needs_neither_mllm_nor_adapter(ip: Callable[..., DenoisingTask], folder: Path) -> None:
    bundle = without(Bundle.open(folder / "bundle"), "adapter", "llava")
    runtime = Runtime.choose(bundle, "cpu", "fp32", pack=False)
    full = ip()
    options, method = full.model.options, full.model.trainable.method
    choices = Choices(IPAdapterTraining, TrainConfig(), options, IPAdapterTraining.Config(), method)
    lean = denoising.build(choices, runtime, folder / "data")
    assert lean.model(first(lean)).isfinite().all()


def without(bundle: Bundle, *names: str) -> Bundle:
    kept = ("networks", "configs")
    return replace(
        bundle, **{k: {n: v for n, v in getattr(bundle, k).items() if n not in names} for k in kept}
    )


@torch.no_grad()
def test_lora_merges(one: Callable[..., FeatureTask]) -> None:
    layer = LoRALinear.start(nn.Linear(6, 5), rank=2, alpha=3.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), layer.base(x))
    layer.up.normal_()
    same(layer(x), nn.functional.linear(x, layer.merged(), layer.base.bias))
    task = one(train="lora")
    lora = task.model.lora
    assert len(lora) == 14 and all(name.startswith("llama.layers.") for name in lora)


def test_grid(two: Callable[..., DenoisingTask], ip: Callable[..., DenoisingTask]) -> None:
    """A row for each pair, drawn with the weights as they are; the model stays as it is."""
    task = two(MOVED)
    grid = task.sample_grid()
    assert grid.width > grid.height * 1.2  # two rows of three
    assert task.sample_grid().tobytes() == grid.tobytes()
    assert two(MOVED, reference_shift=2).sample_grid().tobytes() == grid.tobytes()  # shown where it is
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    task.sample_grid()
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())
    with torch.no_grad():
        for part in task.model.trainable.adapter.subject:
            part.scale.mul_(-3)
    assert task.sample_grid().tobytes() != grid.tobytes()
    assert two(grid_samples=0).sample_grid() is None
    assert ip().sample_grid() is not None


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_context": 1.0}, "drop_context"),
        ({"init": "all"}, "init"),
        ({"subject_weight": 0.0}, "subject_weight"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"reference_shift": -1}, "reference_shift"),
        ({"drop_reference": 1.0}, "drop_reference 1.0"),
        ({"reference_shift": 100}, "reference_shift 100"),
        ({"validation_samples": 10}, "validation_samples"),
    ],
)
def test_stage_2_refuses(two: Callable[..., DenoisingTask], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        two(**fields)
    assert "\n" not in str(error.value)


def test_an_ip_adapter_of_another_space_is_told(folder: Path) -> None:
    """In MoMA's preset "paper" and where its own training goes on; not one trained on LLaVA's tower."""
    tower, sizes = Bundle.open(folder / "bundle").config("vision"), AdapterConfig()
    plain = Bundle.open(folder / "bundle")
    own = {"ip-adapter": dict(IPAdapterTraining.fixed)}
    method = replace(DEFAULT, context_init="ip_adapter")
    for methods, told in (({}, True), (own, False)):
        configs = {**plain.configs, "ip_adapter": replace(sizes, embed_dim=tower.width)}
        bundle = replace(plain, configs=configs, methods=methods)
        for kind, config, choice in (
            (AdapterTraining, AdapterTraining.Config(), method),
            (IPAdapterTraining, IPAdapterTraining.Config(init="ip_adapter"), None),
        ):
            with warnings.catch_warnings(record=True, action="always") as found:
                kind.check(bundle, config, choice)
            assert [("ip_vision" in str(one.message)) for one in found] == [True] * told


def test_stage_2_needs_the_ip_adapter_that_it_starts_from(two: Callable[..., DenoisingTask]) -> None:
    with pytest.raises(ValueError, match="ip_adapter"):
        two(replace(DEFAULT, context_init="ip_adapter"))


@pytest.mark.parametrize(
    ("fields", "message"), [({"train": "all"}, "train"), ({"lora_rank": 0}, "lora_rank")]
)
def test_stage_1_refuses(one: Callable[..., FeatureTask], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(**fields)
