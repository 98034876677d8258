"""Bases like SDXL: two text encoders, pooled text and sizes, their own schedule's end; against diffusers'."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import moma
from convert_weights import convert
from models.unet import attention_layers
from moma import DEFAULT, Bundle, Job, Runtime, SampleConfig
from moma.data.triplets import load, open_source
from moma.methods.ip_adapter import IPAdapterTraining
from moma.methods.moma.adapter import AdapterConfig
from moma.methods.moma.training import AdapterTraining, DecoderTraining
from moma.sampling.interface import text_networks
from moma.sampling.pipeline import Pipeline
from moma.training import denoising, features
from moma.training.common import unpack
from moma.training.config import Choices, DenoisingConfig, FeatureConfig, TrainConfig
from moma.training.denoising import DenoisingTask
from moma.training.task import Task
from moma.weights.bundle import expected_shapes
from tests.helpers import condition, image, latents, mask, same, steps
from tests.ip_adapter_case import build_ip_bundle, public_layout
from tests.make_checkpoints import clip_json, unet_json, vae_json
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl
from tests.training_data import SIDE as TRAINED
from tests.training_data import write_data

BASE = ("unet", "vae")
SIDE = 64
CONFIG = SampleConfig(steps=4, height=SIDE, width=96, guidance=5.0)
PROMPT, NEGATIVE = "a cat! on the beach", "snow"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("sdxl") / "tiny"
    build_tiny_bundle(folder, cfg=TinyConfig(networks=tiny_sdxl(), image_size=TRAINED))
    return Bundle.open(folder)


def loaded(bundle: Bundle, method: str = "text") -> Pipeline:
    return moma.load(bundle, method, device="cpu", dtype="fp32", pack=False)


def public_tokenizers(bundle: Bundle) -> list[transformers.CLIPTokenizer]:
    files = [str(bundle.tokenizer(name)) for name in ("vocab.json", "merges.txt")]
    lengths = {"model_max_length": bundle.config("text").positions}
    return [
        transformers.CLIPTokenizer(*files, **lengths),
        transformers.CLIPTokenizer(*files, **lengths, pad_token="!"),
    ]


@torch.no_grad()
def public_pipeline(bundle: Bundle, pipe: Pipeline) -> diffusers.StableDiffusionXLPipeline:
    """diffusers' pipeline with the same weights."""
    unet = diffusers.UNet2DConditionModel(**unet_json(pipe.base.unet.cfg, bundle.config("text_2").projection))
    unet.load_state_dict(pipe.base.unet.state_dict())
    vae = diffusers.AutoencoderKL(**vae_json(pipe.base.vae.cfg))
    vae.load_state_dict(pipe.base.vae.state_dict())
    texts = []
    for ours, kind in zip(
        pipe.base.text_encoders, (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection),
        strict=True,
    ):  # fmt: skip
        theirs = kind(transformers.CLIPTextConfig(**clip_json(ours.cfg)))
        names = {key.replace("text_model.", ""): key for key in theirs.state_dict()}
        theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
        texts.append(theirs.eval())
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae.eval(), *texts, *public_tokenizers(bundle), unet.eval(), scheduler
    )


@pytest.mark.parametrize("text", ["a cat", "wow!!! a cat !", "!", "", "a! b?!", "!" * 90, "cat " * 90])
def test_the_second_tokenizer_is_the_public_one(bundle: Bundle, text: str) -> None:
    """Its padding, "!", is a token of its own wherever it stands."""
    for ours, theirs in zip(bundle.clip_tokenizers(), public_tokenizers(bundle), strict=True):
        assert list(ours.encode(text).ids) == theirs(text, padding="max_length", truncation=True).input_ids


def relative(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs).detach().abs().max()
    return float(difference / theirs.detach().abs().max())


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_drawing_equals_diffusers(bundle: Bundle, negative: str) -> None:
    pipe = loaded(bundle)
    theirs = public_pipeline(bundle, pipe)
    noise = torch.randn(1, 4, SIDE // 8, 96 // 8, generator=torch.Generator().manual_seed(3))
    found = theirs(
        PROMPT, negative_prompt=negative or None, num_inference_steps=CONFIG.steps, latents=noise,
        height=SIDE, width=96, guidance_scale=CONFIG.guidance, output_type="latent",
    ).images  # fmt: skip
    (ours,) = pipe.run([Job((), PROMPT, 0, negative, latents=noise)], CONFIG)
    assert relative(ours.latents, found) < 1e-4
    decoded = theirs.vae.decode(found / theirs.vae.config.scaling_factor).sample
    assert relative(pipe.base.vae.decode(ours.latents / pipe.base.vae.cfg.scaling), decoded) < 1e-4


# --- subjects and trainings ------------------------------------------------------------------------------


def denoising_task(kind: type, bundle: Bundle, method: Any, data: Path, cache: Path) -> DenoisingTask:
    options = DenoisingConfig(
        cache=str(cache), cache_batch=4, cache_workers=1, validation_samples=1, validation_batch=1,
        drop_context=0.0, drop_text=0.0, drop_both=0.0,
    )  # fmt: skip
    runtime = Runtime.choose(bundle, "cpu", "fp32", pack=False)
    return denoising.build(Choices(kind, TrainConfig(), options, kind.Config(), method), runtime, data)


def train(task: Task) -> list[float]:
    return steps(task, next(task.batches(2, 0, 1, {}))[0], 3, 1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 4)


@pytest.mark.parametrize("method", ["moma", "ip-adapter", "reference-attention"])
def test_methods_draw_a_batch_as_its_singles(bundle: Bundle, tmp_path: Path, method: str) -> None:
    if method == "ip-adapter":
        build_ip_bundle(str(bundle.folder), tmp_path / "ip", text_networks(bundle.config("unet")) + BASE)
        bundle = Bundle.open(tmp_path / "ip")
    pipe = loaded(bundle, method)
    subjects = [pipe.encode_subject(image(i), mask(30), "cat") for i in range(2)]
    jobs = [Job(one, "a cat in the snow", seed) for seed, one in enumerate(subjects)]
    config = SampleConfig(steps=2, height=SIDE, width=SIDE)
    batch = latents(pipe, jobs, config)
    for i, job in enumerate(jobs):
        same(latents(pipe, [job], config), batch[i : i + 1], 1e-3 * float(batch.abs().max()))
    other = latents(pipe, [replace(jobs[0], subjects=jobs[1].subjects)], config)
    assert not torch.allclose(other, batch[:1], atol=1e-3), "the subject has an effect"


def test_stage_2_is_the_samplers_computation(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """It trains, its loss on a sample is that of the drawing's conditional row, and its export draws."""
    task = denoising_task(
        AdapterTraining, bundle, replace(DEFAULT, lambda_init=0.7), data, tmp_path / "cache"
    )
    losses = train(task)
    assert losses[-1] < losses[0]
    task.export(tmp_path / "export")
    convert([tmp_path / "export"], tmp_path / "new", bundle, say=lambda text: None)
    pipe = loaded(Bundle.open(tmp_path / "new"), "moma")
    (batch,) = task.validation()
    source = open_source(data)
    triplet = load(source, next(source.read(0)))
    subject = pipe.encode_subject(
        *(triplet.reference or (triplet.image, triplet.mask)), triplet.label,
        posterior_noise=batch["ref_posterior_noise"], reference_noise=batch["ref_noise"],
    )  # fmt: skip
    with torch.no_grad():
        cond = condition(pipe, [Job(subject, triplet.caption, 0)], SampleConfig())
        t, alpha = int(batch["t"][0]), task.model.alphas[batch["t"][0]]
        x0 = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * pipe.base.vae.cfg.scaling
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * batch["noise"]
        hook = replace(cond.hook(t, unpack(batch["m_gen"], TRAINED, TRAINED)), subject_on=True)
        rows = torch.cat([x_t, x_t])
        eps = pipe.base.unet(rows, torch.tensor([t, t]), cond.text, hook, cond.added)[0][1:]
        same(task.model(batch)[0], (eps - batch["noise"]).square().mean(), 1e-5)
    (drawn,) = pipe.run([Job(subject, triplet.caption, 0)], SampleConfig(steps=2))
    assert drawn.image.size == (TRAINED, TRAINED)


def test_dropped_text_is_what_drawing_has_for_none(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    task = denoising_task(AdapterTraining, bundle, DEFAULT, data, tmp_path / "cache")
    batch = next(task.batches(2, 0, 1, {}))[0]
    with torch.no_grad():
        made = task.model.unpacked(batch | {"drop_text": torch.tensor([True, False])})
    base = task.model.trainable.base
    pooled = bundle.config("text_2").projection
    assert not made["text"][0].any() and not made["added"][0, :pooled].any() and made["text"][1].any()
    assert made["label"].any(dim=2).all() and torch.equal(
        made["added"][0, pooled:], made["added"][1, pooled:]
    )
    assert base.unet.cfg.added_cond_dim == made["label_added"].shape[1]


def test_stage_1_and_ip_adapter_train(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    options = FeatureConfig(workers=0, lanes=2, validation_samples=1, validation_batch=1)
    config = DecoderTraining.Config(train="lora", lora_rank=4, lora_alpha=4.0)
    choices = Choices(DecoderTraining, TrainConfig(), options, config, DEFAULT)
    one = features.build(choices, Runtime.choose(bundle, "cpu", "fp32"), data)
    method = bundle.method_config("ip-adapter", **IPAdapterTraining.fixed)
    two = denoising_task(IPAdapterTraining, bundle, method, data, tmp_path / "cache")
    for task in (one, two):
        losses = train(task)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("width", ["own", "other"])
def test_an_ip_adapter_starts_the_context(bundle: Bundle, data: Path, tmp_path: Path, width: str) -> None:
    """Of ViT-H's width it starts the projector too; of bigG's the context K, V alone."""
    embed = bundle.config("vision").width + 8 * (width == "other")
    cfg = AdapterConfig(embed_dim=embed)
    shapes = expected_shapes("ip_adapter", cfg, bundle.config("unet"))
    state = {key: torch.full(shape, 0.1) for key, shape in shapes.items()}
    unet = bundle.config("unet")
    named = public_layout(state, unet)
    flat = {f"{group}.{key}": value for group, part in named.items() for key, value in part.items()}
    assert len([key for key in flat if ".to_k_ip." in key]) == len(attention_layers(unet))
    save_file(flat, tmp_path / "ip-adapter_sdxl.safetensors")
    convert([tmp_path / "ip-adapter_sdxl.safetensors"], tmp_path / "new", bundle, say=lambda text: None)
    method = replace(DEFAULT, context_init="ip_adapter")
    with warnings.catch_warnings(record=True, action="always") as found:
        task = denoising_task(
            AdapterTraining, Bundle.open(tmp_path / "new"), method, data, tmp_path / "cache"
        )
    assert any(str(embed) in str(one.message) for one in found) == (width == "other")
    adapter = task.model.trainable.adapter
    assert all(torch.equal(one.to_k.weight, torch.full_like(one.to_k.weight, 0.1)) for one in adapter.context)
    assert bool((adapter.projector.proj.weight == 0.1).all()) == (width == "own")
