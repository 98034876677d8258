"""The context branch as an IP-Adapter file: diffusers loads it and draws what it draws here."""

from pathlib import Path

import diffusers
import pytest
import torch

import convert_weights
from models.weights.loading import read_checkpoint
from moma import Pipeline
from moma.methods.ip_adapter import ImageConditioning
from moma.sampling.diffusion import solver_steps
from moma.sampling.sampler import denoise
from moma.weights.bundle import Bundle
from tests.baseline import diffusers_unet
from tests.helpers import MINI, far
from tests.ip_adapter_case import build_ip_bundle

STEPS, GUIDANCE = 4, 5.0


def export(bundle: str | Path, out: Path) -> int:
    return convert_weights.main(["--export-ip-adapter", str(bundle), "--out", str(out)])


def draw_with_diffusers(folder: str, pipe: Pipeline, file: Path, x, text, images) -> torch.Tensor:
    """Latents of diffusers' whole pipeline; text and images: unconditional and conditional."""
    cfg = pipe.base.schedule
    scheduler = diffusers.DDIMScheduler(
        beta_start=cfg.beta_start, beta_end=cfg.beta_end, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    bundle = Bundle.open(folder)
    unet = diffusers_unet(bundle.config("unet"), bundle.build("unet").state_dict())
    theirs = diffusers.StableDiffusionPipeline(
        None, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    return theirs(
        negative_prompt_embeds=text[:1], prompt_embeds=text[1:], latents=x, guidance_scale=GUIDANCE,
        num_inference_steps=STEPS, output_type="latent", height=64, width=64,
        ip_adapter_image_embeds=[images[:, None]],
    ).images  # fmt: skip


@torch.no_grad()
def test_diffusers_draws_with_it_what_is_drawn_here(folder: str, pipe: Pipeline, tmp_path: Path) -> None:
    """With the same embedding of the image; the context tokens act everywhere, as in IP-Adapter."""
    out = tmp_path / "new" / "context.safetensors"
    assert export(folder, out) == 0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, pipe.base.vae.cfg.latent_channels, 8, 8, generator=generator)
    embedding = torch.randn(1, pipe.method.adapter.cfg.embed_dim, generator=generator)
    images = torch.cat([torch.zeros_like(embedding), embedding])
    text, _ = pipe.base.encode_text(["", "a cat in the snow"])
    expected = draw_with_diffusers(folder, pipe, out, x, text, images)

    context = pipe.method.adapter.context_keys_values(images)
    schedule = solver_steps(pipe.base.schedule, STEPS, "ddim", "leading")

    def drawn(scale: float) -> torch.Tensor:
        conditioning = ImageConditioning(
            pipe.base.unet.text_kv(text), None, [(context, torch.ones(2, 1, 1, 1))], scale
        )
        *_, last = denoise(pipe.base.unet, conditioning, schedule, x, GUIDANCE, "ddim")
        return last.latents

    assert (drawn(1.0) - expected).abs().max() / expected.abs().max() < 1e-4
    assert far(drawn(0.0), expected), "the image has a say"


def test_the_converter_reads_what_is_exported(folder: str, tmp_path: Path) -> None:
    """Every tensor of the context branch comes back, and nothing else is in the file."""
    export(MINI, out := tmp_path / "context.safetensors")
    found = {name: lazy.read() for name, lazy in read_checkpoint(out).items()}
    own = {n: x for n, x in Bundle.open(MINI).state("adapter").items() if n.startswith(("proj", "context"))}
    assert sorted(map(float, (x.float().sum() for x in found.values()))) == pytest.approx(
        sorted(map(float, (x.float().sum() for x in own.values())))
    )


@pytest.mark.parametrize("name", ["context.bin", "there.safetensors"])
def test_files_that_cannot_be_written_are_refused(folder: str, tmp_path: Path, name: str, capsys) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    assert export(folder, tmp_path / name) == 2
    assert name in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"there.safetensors": "mine"}


@pytest.mark.parametrize("given", ["x.bin", "--lora x", "--overwrite", "--dtype fp32", "--with sam"])
def test_what_the_export_has_no_use_for_is_refused(folder: str, tmp_path: Path, given: str, capsys) -> None:
    out = tmp_path / "a.safetensors"
    args = ["--export-ip-adapter", folder, "--out", str(out), *given.split()]
    assert convert_weights.main(args) == 2 and not out.exists()
    printed = capsys.readouterr().err
    assert "--export-ip-adapter" in printed and printed.count("\n") == 1


def test_a_bundle_without_momas_adapter_is_refused(folder: str, tmp_path: Path, capsys) -> None:
    build_ip_bundle(folder, bundle := tmp_path / "ip", ("unet", "vae", "text"))
    assert export(bundle, tmp_path / "out" / "x.safetensors") == 2
    assert "adapter" in capsys.readouterr().err and not (tmp_path / "out").exists()
