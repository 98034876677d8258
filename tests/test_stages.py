"""The two stages: what they train, that it is what the sampler does, and what comes out."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convert_weights import convert
from models.clip_image import clip_image
from models.lora import LoRALinear
from moma import DEFAULT, MoMA, SampleConfig
from moma.data.triplets import load, open_source
from moma.methods.moma.config import MethodConfig, method_config
from moma.sampling.diffusion import ScheduleConfig, alphas_cumprod
from moma.sampling.pipeline import Job
from moma.training import stage1, stage2
from moma.training.cache import clip_embedding
from moma.training.common import pack, unpack
from moma.training.config import TrainConfig
from moma.training.stage1 import Stage1Config, Stage1Task
from moma.training.stage2 import Stage2Config, Stage2Task
from moma.training.task import Batch, Task
from moma.weights.bundle import Bundle
from tests.training_data import SIDE, write_bundle, write_data

CPU, FP32 = torch.device("cpu"), torch.float32
ONE = Stage1Config(workers=0, lanes=2, validation_samples=2, lora_rank=4, lora_alpha=4.0, validation_batch=2)
TWO = Stage2Config(
    cache_batch=4, cache_workers=1, validation_samples=2, grid_samples=2, grid_steps=2, drop_context=0.0
)
# The subject part acts from the beginning, as after some training.
MOVED = replace(DEFAULT, lambda_init=0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bundle, data of ten samples, caches."""
    folder = tmp_path_factory.mktemp("stages")
    write_bundle(folder / "bundle")
    write_data(folder / "data", 10)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[..., Stage1Task]:
    def build(method: MethodConfig = DEFAULT, bundle: str = "bundle", **fields: object) -> Stage1Task:
        opened, config = Bundle.open(folder / bundle), replace(ONE, **fields)
        return stage1.build(opened, folder / "data", config, TrainConfig(), method, CPU, FP32)

    return build


@pytest.fixture(scope="module")
def two(folder: Path) -> Callable[..., Stage2Task]:
    def build(method: MethodConfig = DEFAULT, bundle: str = "bundle", **fields: object) -> Stage2Task:
        config = replace(TWO, **fields)
        name = f"cache-{config.embedding}-{method.reference_background}-{method.template}-{bundle}"
        config, opened = replace(config, cache=str(folder / name)), Bundle.open(folder / bundle)
        return stage2.build(opened, folder / "data", config, TrainConfig(), method, CPU, FP32)

    return build


def first(task: Task, size: int = 8) -> Batch:
    return next(task.deliveries(size, 0, 1, {})).batch


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(task: Task, batch: Batch, count: int, lr: float) -> list[float]:
    """Adam without decay, so that a parameter whose gradient is zero stays as it is."""
    optimizer, losses = torch.optim.Adam(trained(task.model).values(), lr), []
    for _ in range(count):
        loss = task.model(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


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


def test_stage_2_trains_the_adapter(two: Callable[..., Stage2Task]) -> None:
    """λ = 0 at first: K', V' wait for λ's first step; from the second on everything moves, nothing else."""
    task = two()
    names = {name for name in trained(task.model)}
    assert names == {
        f"adapter.{name}"
        for name, _ in task.model.adapter.named_parameters()
        if name.split(".")[0] in ("projector", "context", "subject")
    }
    waiting = {name for name in names if name.startswith("adapter.subject.") and not name.endswith("scale")}
    after_one, after_two = changed_by_two_steps(task)
    assert after_one == names - waiting
    assert after_two == names


def test_stage_2_of_the_paper(two: Callable[..., Stage2Task]) -> None:
    """λ = 1 on zero K', V': V' moves at once, K' and λ, held back by V' = 0, in the second step."""
    task = two(replace(DEFAULT, subject_init="zero", lambda_init=1.0))
    names = {name for name in trained(task.model)}
    waiting = {name for name in names if ".subject." in name and not name.endswith("to_v.weight")}
    after_one, after_two = changed_by_two_steps(task)
    # K' is still zero in the second step: alike scores, but V' differs by now and so does K''s gradient.
    assert (after_one, after_two) == (names - waiting, names)


def test_ip_adapter_trains_projector_and_context(two: Callable[..., Stage2Task]) -> None:
    task = two(parts="ip_adapter", embedding="clip")
    names = {
        n for n, _ in task.model.named_parameters() if n.startswith(("adapter.projector", "adapter.context"))
    }
    assert set(trained(task.model)) == names
    assert changed_by_two_steps(task) == (names, names)
    batch, other = first(task), first(task)
    other |= {"ref_mean": -batch["ref_mean"], "m_ref": 0 * batch["m_ref"], "m_gen": 0 * batch["m_gen"]}
    assert torch.equal(task.model(batch), task.model(other))  # no trace of masks and reference


@pytest.mark.parametrize("template", ["release", "paper"])
@pytest.mark.parametrize("mode", ["mllm", "lora", "new"])
def test_stage_1_trains_what_it_says(one: Callable[..., Stage1Task], mode: str, template: str) -> None:
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


def test_fewer_blocks(one: Callable[..., Stage1Task]) -> None:
    """Blocks that the method leaves out are not trained: they would never get a gradient."""
    for mode in ("mllm", "lora"):
        task = one(replace(DEFAULT, mllm_layers=1), train=mode)
        names = set(trained(task.model))
        assert not any(".layers.1." in name for name in names) and any(".layers.0." in name for name in names)
        assert changed_by_two_steps(task)[1] == names


def test_losses_fall(one: Callable[..., Stage1Task], two: Callable[..., Stage2Task]) -> None:
    """Eight samples learned by heart, their draws fixed: stage 1 to a hundredth, stage 2 to four fifths (a
    frozen UNet of random weights does not get far)."""
    task = one()
    losses = steps(task, first(task), 80, 3e-3)
    assert losses[-1] < 0.01 * losses[0]
    task = two()
    losses = steps(task, first(task), 20, 1e-2)
    assert losses[-1] < 0.8 * losses[0]


# --- the loss is a function of the sample -------------------------------------------------------------


@torch.no_grad()
def test_batches_and_ranks_do_not_matter(
    one: Callable[..., Stage1Task], two: Callable[..., Stage2Task]
) -> None:
    """One process with four samples, two ranks with two, single samples: the same losses by number."""
    for task in (one(replace(DEFAULT, template="paper")), two(MOVED, drop_context=0.5)):
        whole = first(task, 4)
        expected = dict(zip(whole["number"].tolist(), task.model(whole), strict=True))
        assert list(expected) == [0, 1, 2, 3]
        for rank in range(2):
            part = next(task.deliveries(2, rank, 2, {})).batch
            for number, loss in zip(part["number"].tolist(), task.model(part), strict=True):
                assert number % 2 == rank
                same(loss, expected[number])
        for i in range(4):
            same(task.model({name: value[i : i + 1] for name, value in whole.items()})[0], expected[i])


def test_goes_on_at_a_position(one: Callable[..., Stage1Task], two: Callable[..., Stage2Task]) -> None:
    for task in (one(), two(drop_context=0.5)):
        stream = task.deliveries(3, 0, 1, {})
        deliveries = [next(stream) for _ in range(4)]
        again = next(task.deliveries(3, 0, 1, deliveries[2].position))
        assert again.position == deliveries[3].position
        for name, value in again.batch.items():
            expected = deliveries[3].batch[name]
            assert value == expected if isinstance(value, list) else torch.equal(value, expected)


def test_an_epoch_has_every_sample_but_those_kept_back(
    one: Callable[..., Stage1Task], two: Callable[..., Stage2Task], folder: Path
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


def test_validation_is_fixed(one: Callable[..., Stage1Task], two: Callable[..., Stage2Task]) -> None:
    """The same batches on every call and for every seed, nothing dropped."""
    for task in (one(), two(drop_context=0.9)):
        (a,), (b,) = (
            task.validation(),
            replace(task, **({"seed": 9} if "drop" in first(task) else {})).validation(),
        )
        assert len(a["number"]) == 2 and a.keys() == first(task).keys()
        assert all(a[k] == b[k] if isinstance(a[k], list) else torch.equal(a[k], b[k]) for k in a)
        assert not a.get("drop", torch.zeros(1)).any()


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
def test_stage_1_is_equation_4(one: Callable[..., Stage1Task], folder: Path, template: str) -> None:
    """The sampler's decoder, on the reference, against CLIP of the target with its background."""
    method = replace(DEFAULT, template=template)
    task = one(method, init="adapter", validation_samples=3, validation_batch=3)
    (batch,) = task.validation()
    pipe, source = MoMA.load(folder / "bundle", "cpu", "fp32", method), open_source(folder / "data")
    for loss, raw in zip(task.model(batch), source.read(0), strict=False):
        triplet = load(source, raw)
        subject = pipe.encode_subject(*(triplet.reference or (triplet.image, triplet.mask)), triplet.label)
        pixels = clip_image(triplet.image, pipe.llava.tower.cfg.image_size)[None]
        target = pipe.llava.tower.pool(pipe.llava.tower.hidden(pixels))
        same(loss, (pipe.embed(subject, triplet.caption) - target).square().mean())


# --- stage 2 computes the paper's formulas ------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("impl", ["fused", "explicit"])
@pytest.mark.parametrize("background", ["photo", "white"])
def test_training_is_the_samplers_computation(
    two: Callable[..., Stage2Task], folder: Path, tmp_path: Path, impl: str, background: str
) -> None:
    """The sampler's conditional row, given the same noises, timestep and M_gen, has the training's loss."""
    method = replace(MOVED, attention=impl, reference_background=background)
    task = two(method, validation_samples=3, validation_batch=3)  # the third has another image as reference
    (batch,) = task.validation()
    task.export(tmp_path / "export")
    convert([tmp_path / "export"], tmp_path / "new", Bundle.open(folder / "bundle"), say=lambda text: None)
    pipe = MoMA.load(tmp_path / "new", "cpu", "fp32")
    pipe = pipe.with_method(replace(pipe.method, attention=impl))  # weights do not say how to compute
    assert pipe.method == method
    source, losses = open_source(folder / "data"), task.model(batch)
    for i, raw in enumerate([*source.read(0)][:3]):
        triplet = load(source, raw)
        subject = pipe.encode_subject(
            *(triplet.reference or (triplet.image, triplet.mask)),
            triplet.label,
            posterior_noise=batch["ref_posterior_noise"][i : i + 1],
            reference_noise=batch["ref_noise"][i : i + 1],
        )
        embedding = pipe.embed(subject, triplet.caption)
        guide = pipe.guide([Job(subject, triplet.caption, 0)], [embedding], SampleConfig())
        t, noise = int(batch["t"][i]), batch["noise"][i : i + 1]
        alpha = task.model.alphas[t]
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"])[i : i + 1] * pipe.vae.cfg.scaling
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        hook = guide.hook(t, unpack(batch["m_gen"], SIDE)[i : i + 1])
        assert hook.subject_on == (t < 950)
        hook = replace(hook, subject_on=True)  # training has the term at all timesteps
        eps = pipe.unet(torch.cat([x_t, x_t]), torch.tensor([t, t]), guide.text, hook)[0][1:]
        same(losses[i], (eps - noise).square().mean())


@torch.no_grad()
def test_start_of_stage_2(two: Callable[..., Stage2Task]) -> None:
    """λ = 0: no trace of the reference. Where M_gen is 0, and it gates the context tokens, nothing at all is
    left of the adapter: the loss is the base UNet's, bit for bit. Ungated, the context tokens act."""

    def base(task: Stage2Task, batch: Batch) -> Tensor:
        model = task.model
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * model.scaling
        alpha = model.alphas[batch["t"]][:, None, None, None]
        eps = model.unet(alpha.sqrt() * x0 + (1 - alpha).sqrt() * batch["noise"], batch["t"], batch["text"])[
            0
        ]
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
def test_dropped_context(two: Callable[..., Stage2Task]) -> None:
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
    for name in ("text", "ref_mean"):
        other = task.model(batch | {name: -batch[name]})
        assert not torch.isclose(task.model(batch)[drop], other[drop]).any(), name
    for draws in (first(two(drop_context=0.0)), batch):  # the other draws are the same
        assert torch.equal(draws["noise"], batch["noise"]) and torch.equal(draws["t"], batch["t"])


@torch.no_grad()
def test_fields_of_the_loss(two: Callable[..., Stage2Task]) -> None:
    """subject_below_t switches Eq. 3's term off above; subject_weight moves the loss towards the subject.

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
    full = batch | {"m_gen": torch.full_like(batch["m_gen"], 255)}
    heavy = two(MOVED, subject_weight=5.0)
    same(heavy.model(full), plain.model(full))  # the same weight everywhere
    assert not torch.isclose(heavy.model(batch), plain.model(batch)).all()
    alphas = alphas_cumprod(ScheduleConfig())  # (T,)
    weights, t = (0.1 * (1 - alphas) / alphas).clamp(max=1), batch["t"]
    assert (weights[t] < 1).any() and (weights[t] == 1).any()
    same(two(MOVED, snr_gamma=0.1).model(batch), plain.model(batch) * weights[t] / weights.mean())


def test_moved() -> None:
    """Down and right, each sample by its own shift; the edges repeat."""
    x = torch.arange(2 * 12.0).view(2, 1, 3, 4)
    there = stage2.moved(x, torch.tensor([[1, 2], [0, -1]]))
    assert torch.equal(there[0, 0, 1:, 2:], x[0, 0, :2, :2])
    assert (there[0, 0, 0] == there[0, 0, 1]).all() and (there[0, 0, 1, :2] == x[0, 0, 0, 0]).all()
    assert torch.equal(there[1, 0, :, :3], x[1, 0, :, 1:]) and torch.equal(there[1, 0, :, 3], x[1, 0, :, 3])


@torch.no_grad()
def test_the_reference_is_moved(two: Callable[..., Stage2Task]) -> None:
    """reference_shift moves the reference's latents and M_ref together, and nothing else."""
    still, moving = two(MOVED), two(MOVED, reference_shift=2)
    before, batch = first(still), first(moving)
    assert (before["shift"] == 0).all() and batch["shift"].abs().max() == 2
    assert all(torch.equal(before[name], batch[name]) for name in before if name != "shift")
    model = moving.model
    assert not torch.isclose(model(batch), still.model(before)).all()
    m_ref = unpack(batch["m_ref"], SIDE)  # (B, 1, S, S)
    scale = SIDE // batch["mean"].shape[-1]
    by_hand = batch | {
        "ref_mean": stage2.moved(batch["ref_mean"], batch["shift"]),
        "ref_std": stage2.moved(batch["ref_std"], batch["shift"]),
        "m_ref": torch.stack([pack(m) for m in stage2.moved(m_ref, scale * batch["shift"])]),
        "shift": torch.zeros_like(batch["shift"]),
    }
    assert torch.equal(model(by_hand), model(batch))


# --- what comes out -----------------------------------------------------------------------------------


def test_stage_2_export_draws(two: Callable[..., Stage2Task], folder: Path, tmp_path: Path) -> None:
    """Export -> bundle -> image; the baseline's bundle knows that its context tokens are not gated."""
    for fields, context_masked in (({}, True), ({"parts": "ip_adapter", "embedding": "clip"}, False)):
        task, name = two(**fields), fields.get("parts", "moma")
        steps(task, first(task), 2, 1e-2)
        task.export(tmp_path / name)
        convert(
            [tmp_path / name],
            tmp_path / f"{name}-bundle",
            Bundle.open(folder / "bundle"),
            say=lambda text: None,
        )
        pipe = MoMA.load(tmp_path / f"{name}-bundle", "cpu", "fp32")
        assert pipe.method.context_masked == context_masked
        for key, value in task.model.adapter.state_dict().items():
            assert torch.equal(pipe.adapter.state_dict()[key], value), key
        triplet = load(source := open_source(folder / "data"), next(source.read(0)))
        subject = pipe.encode_subject(triplet.image, triplet.mask, triplet.label)
        job = Job(subject, triplet.caption, seed=0)
        if not context_masked:  # the baseline draws with CLIP's embedding, which the cache also has
            tower = pipe.llava.tower
            pixels = clip_image(subject.reference.white, tower.cfg.image_size)[None]
            with torch.no_grad():
                job = replace(job, strength=0.0, embedding=clip_embedding(tower, pixels))
            same(task.data.batch(torch.tensor([0]))["embedding"], job.embedding)
        (drawn,) = pipe.run([job], SampleConfig(steps=2))
        assert drawn.image.size == (SIDE, SIDE)
        # and stage 2 goes on from there, with the same losses
        new = Bundle.open(tmp_path / f"{name}-bundle")
        config = replace(task.model.cfg, init="adapter")
        again = stage2.build(
            new, folder / "data", config, TrainConfig(), method_config(**new.method), CPU, FP32
        )
        with torch.no_grad():
            same(again.model(first(again)), task.model(first(task)))


@pytest.mark.parametrize("mode", ["mllm", "lora", "new"])
def test_stage_1_export_is_stage_2s_start(
    one: Callable[..., Stage1Task], two: Callable[..., Stage2Task], folder: Path, mode: str
) -> None:
    """The bundle made of the export predicts what the trained model does; stage 2's embeddings are its."""
    task = one(replace(DEFAULT, template="paper"), train=mode)
    steps(task, first(task), 2, 1e-2)
    name = f"stage1-{mode}"
    task.export(folder / f"{name}-export")
    assert (folder / f"{name}-export" / "llava.safetensors").exists() == (mode != "new")
    convert([folder / f"{name}-export"], folder / name, Bundle.open(folder / "bundle"), say=lambda text: None)
    bundle = Bundle.open(folder / name)
    assert bundle.method == {"template": "paper"}
    method = method_config(**bundle.method)
    again = one(method, bundle=name, train=mode, init="adapter")
    with torch.no_grad():
        same(again.model(first(again)), task.model(first(task)), 1e-4)
    second = two(method, bundle=name)
    pipe = MoMA.load(folder / name, "cpu", "fp32")
    triplet = load(source := open_source(folder / "data"), next(source.read(0)))
    subject = pipe.encode_subject(triplet.image, triplet.mask, triplet.label)
    same(second.data.batch(torch.tensor([0]))["embedding"], pipe.embed(subject, triplet.caption))
    assert torch.equal(second.model.adapter.mapping.up_proj.weight, task.model.adapter.mapping.up_proj.weight)


def test_a_bundle_without_an_adapter(one: Callable[..., Stage1Task], folder: Path) -> None:
    """Stage 1 is where the first one comes from; what it does not train is stage 2's start."""
    bundle = Bundle.open(folder / "bundle")
    bare = replace(
        bundle,
        **{
            k: {n: v for n, v in getattr(bundle, k).items() if n != "adapter"}
            for k in ("networks", "configs")
        },
    )
    task = stage1.build(
        bare, folder / "data", ONE, TrainConfig(), replace(DEFAULT, template="paper"), CPU, FP32
    )
    adapter, llama = task.model.adapter, task.model.llava.llama
    same(adapter.token, llama.embed_tokens.weight.mean(dim=0))
    assert all(part.scale.item() == 0 for part in adapter.subject) and adapter.context[0].to_v.weight.any()
    with pytest.raises(ValueError, match="has no adapter"):
        stage2.build(bare, folder / "data", TWO, TrainConfig(), DEFAULT, CPU, FP32)


@torch.no_grad()
def test_lora_merges(one: Callable[..., Stage1Task]) -> None:
    layer = LoRALinear(nn.Linear(6, 5), rank=2, alpha=3.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), layer.base(x))
    layer.up.normal_()
    same(layer(x), nn.functional.linear(x, layer.merged(), layer.base.bias))
    task = one(train="lora")
    assert len(task.lora) == 14 and all(name.startswith("llama.layers.") for name in task.lora)


def test_grid(two: Callable[..., Stage2Task]) -> None:
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
        for part in task.model.adapter.subject:
            part.scale.mul_(-3)
    assert task.sample_grid().tobytes() != grid.tobytes()
    assert two(grid_samples=0).sample_grid() is None
    assert two(parts="ip_adapter").sample_grid() is not None


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_context": 1.0}, "drop_context"),
        ({"parts": "all"}, "parts"),
        ({"subject_weight": 0.0}, "subject_weight"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"reference_shift": -1}, "reference_shift"),
        ({"reference_shift": 100}, "reference_shift 100: expected below half"),
        ({"validation_samples": 10}, "keeps back"),
    ],
)
def test_stage_2_refuses(two: Callable[..., Stage2Task], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        two(**fields)
    assert "\n" not in str(error.value)


def test_stage_2_needs_the_ip_adapter_that_it_starts_from(two: Callable[..., Stage2Task]) -> None:
    with pytest.raises(ValueError, match="has no ip_adapter"):
        two(replace(DEFAULT, context_init="ip_adapter"))


@pytest.mark.parametrize(
    ("fields", "message"), [({"train": "all"}, "train"), ({"lora_rank": 0}, "lora_rank")]
)
def test_stage_1_refuses(one: Callable[..., Stage1Task], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(**fields)
