"""Bases like SDXL: two text encoders, pooled text and sizes, their own schedule's end; against diffusers'."""

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

import moma
from moma import Bundle, Job, SampleConfig
from moma.sampling.pipeline import Pipeline
from moma.weights.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl
from tests.make_checkpoints import clip_json, unet_json, vae_json

SIDE = 64
CONFIG = SampleConfig(steps=4, height=SIDE, width=96, guidance=5.0)
PROMPT, NEGATIVE = "a cat! on the beach", "snow"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("sdxl") / "tiny"
    build_tiny_bundle(folder, cfg=TinyConfig(networks=tiny_sdxl(), image_size=SIDE))
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
