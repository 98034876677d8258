"""The methods beside MoMA: IP-Adapter against diffusers, text alone against plain sampling, and ablations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.clip_image import clip_image
from moma import Bundle, Job, Pipeline, SampleConfig, load
from moma.methods.ip_adapter import ImageConditioning, IPAdapterConfig
from moma.methods.moma.conditioning import MoMAConditioning
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.methods.moma.method import MoMA
from moma.methods.prompts import sd_prompt
from moma.sampling.base import NETWORKS
from moma.sampling.cuda_graphs import RecordableHook
from moma.sampling.diffusion import SolverStep, solver_steps
from moma.sampling.interface import State, StepInputs
from moma.sampling.pipeline import to_images
from moma.sampling.sampler import denoise
from tests.baseline import diffusers_unet
from tests.compare import assert_close_to_std
from tests.helpers import condition, latents, same, text_only, text_states
from tests.ip_adapter_case import WIDTH, build_ip_bundle, public_layout

SMALL = SampleConfig(steps=2, height=64, width=64)
PROMPT = "a cat in the snow"


@pytest.fixture(scope="module")
def ip_folder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and a public IP-Adapter."""
    path = tmp_path_factory.mktemp("weights") / "ip"
    build_ip_bundle(folder, path, NETWORKS)
    return path


def loaded(folder: str | Path, name: str, **config: Any) -> Pipeline:
    return load(folder, name, device="cpu", dtype="fp32", config=config)


@pytest.fixture(scope="module")
def ip(ip_folder: Path) -> Pipeline:
    return loaded(ip_folder, "ip-adapter")


def example_image() -> tuple[Image.Image, Image.Image]:
    """A photo, wider than high, and its mask."""
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = np.zeros((60, 90), np.uint8)
    mask[15:45, 30:60] = 255
    return Image.fromarray(values).resize((180, 120)), Image.fromarray(mask).resize((180, 120))


def other_image() -> tuple[Image.Image, Image.Image]:
    """The same upside down."""
    return tuple(x.rotate(180) for x in example_image())


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cat_job(pipe: Pipeline) -> Job:
    return Job(pipe.encode_subject(*example_image(), "cat"), PROMPT, 0)


# --- IP-Adapter --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_ip_adapter_predicts_the_noise_that_diffusers_predicts(ip_folder: Path, scale: float) -> None:
    bundle, pipe = Bundle.open(ip_folder), loaded(ip_folder, "ip-adapter", scale=scale)
    ours = bundle.build("unet")
    theirs = diffusers_unet(ours.cfg, ours.state_dict())
    theirs._load_ip_adapter_weights([public_layout(bundle.state("ip_adapter"), ours.cfg)], False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]

    x, t = tensor(0, 2, 4, 16, 16), torch.tensor([41, 801])
    text, negative, embedding = tensor(1, 2, 77, 32), tensor(2, 2, 77, 32), tensor(3, 2, WIDTH)
    rows, times = torch.cat([x, x]), torch.cat([t, t])
    images, states = torch.cat([torch.zeros_like(embedding), embedding]), torch.cat([negative, text])
    expected = theirs(rows, times, states, added_cond_kwargs={"image_embeds": [images[:, None]]}).sample

    context = pipe.method.adapter(images)
    cond = ImageConditioning(ours.text_kv(states), None, [(context, torch.ones(4, 1, 1, 1))], scale)
    step = solver_steps(pipe.base.schedule, 2, "ddim")[0]
    both, alone = cond.at(step, {}), cond.conditional().at(step, {})
    eps, maps = ours(rows, times, both.text, both.hook, both.added)
    assert maps == [] and cond.next_state(maps, (16, 16)) == {}
    assert_close_to_std(eps, expected)  # both rows of guidance
    assert_close_to_std(ours(x, t, alone.text, alone.hook)[0], expected[2:])
    assert (ours(rows, times, both.text)[0] - expected).abs().max() > 0.05, "the image has a say"


@torch.no_grad()
def test_ip_adapter_looks_at_the_photo_or_at_the_subject_on_white(ip_folder: Path, ip: Pipeline) -> None:
    image, mask = example_image()
    vision = Bundle.open(ip_folder).build("ip_vision", dtype=torch.float32)
    subject = ip.encode_subject(image, mask, "cat")
    assert subject.reference.white.size == (128, 128)
    photo = vision(clip_image(image, vision.cfg.image_size)[None])[1]
    assert photo.shape == (1, WIDTH) and torch.equal(subject.embedding, photo)
    seen = ip.with_config(IPAdapterConfig(image="white")).encode_subject(image, mask, "cat")
    expected = vision(clip_image(seen.reference.white, vision.cfg.image_size)[None])[1]
    assert torch.equal(seen.embedding, expected) and not torch.allclose(expected, photo)
    with pytest.raises(ValueError, match="'mask'"):
        IPAdapterConfig(image="mask")
    with pytest.raises(ValueError, match="has image 'white', the config 'photo'"):
        ip.run([Job(seen, PROMPT, 0)], SMALL)
    with pytest.raises(ValueError, match="encoder 'vision'"):
        ip.with_config(IPAdapterConfig(encoder="vision"))


def test_a_subject_of_another_method_is_refused(folder: str, ip: Pipeline) -> None:
    cat = load(folder, "text", device="cpu", dtype="fp32").encode_subject(*example_image(), "cat")
    with pytest.raises(ValueError, match="by TextToImage, this is IPAdapterMethod; encode it again"):
        ip.run([Job(cat, PROMPT, 0)], SMALL)


def test_ip_adapter_adds_up_subjects(ip: Pipeline) -> None:
    """By their strengths, any number in a batch; 0 leaves one out. Several images of one are their mean."""
    cat, dog = ip.encode_subject(*example_image(), "cat"), ip.encode_subject(*other_image(), "dog")
    one, both = Job(cat, PROMPT, 0), Job((cat, dog), "a cat and a dog", 1, strength=(0.5, None))
    batch = latents(ip, [one, both], SMALL)
    for i, job in enumerate((one, both)):
        same(latents(ip, [job], SMALL), batch[i : i + 1], 1e-3)
    swapped = Job(
        (dog, cat), "a cat and a dog", 1, strength=(1.0, 0.5), text=ip.method.prepare([both])[0].prompt
    )
    same(latents(ip, [swapped], SMALL), batch[1:], 1e-3)
    for strength in ((1.0, 1.0), (0.5, 0.0), (0.0, 0.0)):
        assert not torch.allclose(
            latents(ip, [replace(both, strength=strength)], SMALL), batch[1:], atol=1e-2
        )
    alone, without = (
        replace(one, subjects=(cat, dog), strength=(1.0, 0.0)),
        ip.method.prepare([one])[0].prompt,
    )
    same(latents(ip, [replace(alone, text=without)], SMALL), batch[:1], 1e-3)
    joined = ip.encode_subject(*zip(example_image(), other_image(), strict=True), "cat")
    assert torch.equal(joined.embedding, (cat.embedding + dog.embedding) / 2)


def test_reference_attention_reads_every_image(folder: str) -> None:
    """Of one subject as of several: their keys are side by side, in any order."""
    pipe = loaded(folder, "reference-attention")
    cat, dog = pipe.encode_subject(*example_image(), "cat"), pipe.encode_subject(*other_image(), "cat")
    joined = pipe.method.join_images([cat, dog])
    text = pipe.method.prepare([Job(cat, PROMPT, 0)])[0].prompt
    drawn = [
        latents(pipe, [Job(x, PROMPT, 0, text=text)], SMALL) for x in (joined, (cat, dog), (dog, cat), cat)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[3], atol=1e-2)
    same(drawn[0], drawn[2], 1e-3)


@torch.no_grad()
def test_a_trained_ip_adapter_looks_with_llavas_tower(folder: str, tmp_path: Path) -> None:
    """The bundle says so; without it the public encoder is missing."""
    build_ip_bundle(folder, tmp_path / "trained", (*NETWORKS, "vision"), trained=True)
    pipe = loaded(tmp_path / "trained", "ip-adapter")
    assert pipe.method.config == IPAdapterConfig(image="white", encoder="vision")
    job = cat_job(pipe)
    vision = Bundle.open(folder).build("vision", dtype=torch.float32)
    white = job.subjects[0].reference.white
    assert torch.equal(job.subjects[0].embedding, vision(clip_image(white, vision.cfg.image_size)[None])[1])
    assert latents(pipe, [job], SMALL).isfinite().all()
    with pytest.raises(ValueError, match="ip_vision"):
        loaded(tmp_path / "trained", "ip-adapter", encoder="ip_vision")


def test_ip_adapter_draws_the_batch_as_it_draws_one(ip: Pipeline) -> None:
    image, mask = example_image()
    other = ip.encode_subject(Image.eval(image, lambda v: 255 - v), mask, "cat")
    jobs = [cat_job(ip), Job(other, PROMPT, 0, strength=0.4)]
    first, second = ip.run(jobs, SMALL)
    (alone,) = ip.run(jobs[:1], SMALL)
    assert first.m_gen is None
    same(first.latents, alone.latents, 1e-4)
    assert not torch.allclose(first.latents, second.latents, atol=1e-3)
    step = solver_steps(ip.base.schedule, 2, "ddim")[0]
    assert isinstance(condition(ip, jobs, SMALL).at(step, {}).hook, RecordableHook)


# --- text alone --------------------------------------------------------------------------------------


def test_text_is_plain_sampling_of_the_base_model(ip_folder: Path) -> None:
    pipe = loaded(ip_folder, "text")
    subject = pipe.encode_subject(*example_image(), "cat")
    results = list(pipe.run([Job(subject, PROMPT, seed, strength=0.4) for seed in (3, 4)], SMALL))
    with torch.no_grad():
        cond = text_only(pipe, text_states(pipe, "", "", *[sd_prompt("cat", PROMPT)] * 2))
        x = torch.cat([tensor(seed, 1, 4, 8, 8) for seed in (3, 4)])
        schedule = solver_steps(pipe.base.schedule, 2, "ddim")
        *_, last = denoise(pipe.base.unet, cond, schedule, x, SMALL.guidance, "ddim")
        pixels = pipe.base.vae.decode(last.latents[:1] / pipe.base.vae.cfg.scaling)
    assert torch.equal(torch.cat([r.latents for r in results]), last.latents)
    assert results[0].image.tobytes() == to_images(pixels)[0].tobytes() and results[0].m_gen is None


class Silent(MoMA):
    """MoMA without context and subject."""

    def condition(self, prepared: Sequence[Any], config: SampleConfig) -> MoMAConditioning:
        cond = super().condition(prepared, config)
        context = [(k, torch.zeros_like(v)) for k, v in cond.context]
        return replace(cond, context=context, beta=torch.zeros_like(cond.beta))


def test_text_is_moma_without_context_and_subject(folder: str, pipe: Pipeline) -> None:
    text, moma = loaded(folder, "text"), pipe.method
    silent = replace(pipe, method=Silent(moma.base, moma.adapter, moma.decoder, moma.config))
    expected, job = latents(silent, [cat_job(silent)], SMALL), cat_job(text)
    same(latents(text, [job], SMALL), expected, 1e-4)
    assert not torch.allclose(latents(pipe, [cat_job(pipe)], SMALL), expected, atol=1e-3)


# --- ablations of M_gen ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blended:
    """A conditioning whose M_gen is nearer to 1."""

    cond: MoMAConditioning
    share: float

    def at(self, step: SolverStep, state: State) -> StepInputs:
        return self.cond.at(step, {name: 1 - self.share * (1 - m_gen) for name, m_gen in state.items()})

    def next_state(self, maps: list[Tensor], grid: tuple[int, int]) -> State:
        return self.cond.next_state(maps, grid)

    def conditional(self) -> "Blended":
        return Blended(self.cond.conditional(), self.share)


@torch.no_grad()
def test_masks_act_as_much_as_the_name_says(folder: str, pipe: Pipeline) -> None:
    """From the same noise."""
    job = cat_job(pipe)
    drawn = [latents(pipe, [job], SMALL)]
    schedule = solver_steps(pipe.base.schedule, SMALL.steps, "ddim")
    for name, share in (("half-mask", 0.5), ("no-mask", 0.0)):
        other = pipe.with_config(Bundle.open(folder).method_config(name))
        drawn.append(latents(other, [job], SMALL))
        cond, x = Blended(condition(pipe, [job], SMALL), share), tensor(0, 1, 4, 8, 8)
        *_, last = denoise(pipe.base.unet, cond, schedule, x, SMALL.guidance, "ddim")
        assert torch.equal(drawn[-1], last.latents)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in combinations(drawn, 2))


# --- loading, and the MLLM ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A feature decoder that notes what it is asked."""

    decoder: FeatureDecoder
    calls: list[list[str]]

    def encode_features(self, inputs: Sequence[MLLMInput]) -> list[Tensor]:
        self.calls.append([one.prompt for one in inputs])
        return self.decoder.encode_features(inputs)


def test_the_mllm_reads_prompts_of_a_subject_together_and_once(pipe: Pipeline) -> None:
    moma, calls, image_and_mask = pipe.method, [], example_image()
    asked = replace(pipe, method=MoMA(moma.base, moma.adapter, Asked(moma.decoder, calls), moma.config))
    first, second = (asked.encode_subject(*image_and_mask, "cat", seed=seed) for seed in (0, 1))
    assert calls == []
    jobs = [
        Job(one, prompt, seed) for one in (first, second) for prompt in (PROMPT, "a cat") for seed in (0, 1)
    ]
    alone = asked.method.prepare(jobs)
    assert calls == [[PROMPT, "a cat"] * 2]
    known = asked.encode_subject(*image_and_mask, "cat", prompts=[PROMPT, "a cat"])
    again = asked.method.prepare([Job(known, "a cat", 0)])
    assert calls[1:] == [[PROMPT, "a cat"]] and torch.equal(again[0].embeddings[0], alone[2].embeddings[0])
    assert not torch.equal(first.layers[0].k, second.layers[0].k), "the seed is the reference noise's"


@pytest.mark.parametrize(("name", "network"), [("moma", "adapter"), ("ip-adapter", "ip_adapter")])
def test_bundle_without_the_methods_networks(
    folder: str, ip_folder: Path, no_weights: None, name: str, network: str
) -> None:
    with pytest.raises(ValueError, match=f"has no {network}"):
        loaded(ip_folder if name == "moma" else folder, name)


def test_only_moma_loads_the_language_model(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], Bundle.build
    seen = lambda self, name, *a, **k: built.append(name) or build(self, name, *a, **k)  # noqa: E731
    monkeypatch.setattr(Bundle, "build", seen)
    loaded(folder, "text")
    assert built == list(NETWORKS)
    built.clear()
    loaded(folder, "moma")
    assert set(built) == {*NETWORKS, "adapter", "llava"}
