"""The pipeline on the tiny bundle: batches, seeds, switched-off parts, presets, and what it refuses."""

import copy
import importlib
import json
import shutil
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from models.attention import attention
from models.clip import CLIPVision
from models.clip_image import clip_image
from models.llama import Llama
from models.vae import VAE
from moma import DEFAULT, PAPER, RELEASE, Job, MethodConfig, MoMA, MoMASubject, Pipeline, SampleConfig, load
from moma.inputs.preprocess import make_reference
from moma.methods.moma.adapter import Adapter
from moma.methods.moma.method import REFERENCE_STREAM, reference_latent
from moma.sampling.device import choose_device, choose_dtype
from moma.sampling.diffusion import SOLVERS, solver_steps
from moma.sampling.finite import Autoencoder
from moma.sampling.sampler import denoise
from tests.helpers import (
    QUICK,
    condition,
    embed,
    far,
    image,
    latents,
    mask,
    same,
    text_only,
    text_states,
    with_embedding,
)

SOME = (300, 600)  # of QUICK's timesteps, 667, 334 and 1, the middle one


@pytest.fixture(scope="module")
def cat(pipe: Pipeline) -> MoMASubject:
    return pipe.encode_subject(image(0), mask(30), "cat")


@pytest.fixture(scope="module")
def dog(pipe: Pipeline) -> MoMASubject:
    return pipe.encode_subject(image(1), mask(12), "dog")


# --- batches, seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "impl", "interval"),
    [("ddim", "fused", SOME), ("dpm", "explicit", SOME), ("dpm", "fused", (0, 1000))],
)
def test_batch_equals_singles(
    pipe: Pipeline, cat: MoMASubject, dog: MoMASubject, solver: str, impl: str, interval: tuple[int, int]
) -> None:
    """Any mix of subjects (of different size), prompts, seeds, strengths and negative prompts."""
    pipe = pipe.with_config(replace(DEFAULT, attention=impl))
    jobs = [
        Job(cat, "a cat in the snow", 0),
        Job(dog, "a dog reading a book in a library, studio light", 1, strength=0.4),
        Job(cat, "two cats", 2, negative="snow"),
        Job(dog, "a dog", 3, strength=0.0),
        Job(cat, "a cat in the snow", 1),
    ]
    config = replace(QUICK, solver=solver, height=72, width=40, guidance_interval=interval)
    batched = list(pipe.run(jobs, config))
    for job, result in zip(jobs, batched, strict=True):
        (alone,) = pipe.run([job], config)
        same(result.latents, alone.latents)
        same(result.m_gen, alone.m_gen)
        assert np.abs(np.int16(result.image) - np.int16(alone.image)).max() <= 1


def test_release_preset_leaks_across_a_batch(pipe: Pipeline, cat: MoMASubject, dog: MoMASubject) -> None:
    """The point mended by `m_gen_norm`: in the release, images of a batch change each other."""
    pipe = pipe.with_config(replace(DEFAULT, m_gen_norm="batch"))
    jobs = [Job(cat, "a cat in the snow", 0), Job(dog, "a dog", 1)]
    together, alone = latents(pipe, jobs), torch.cat([latents(pipe, [job]) for job in jobs])
    assert (together - alone).abs().max() > 1e-3


def test_seeds_make_the_image(pipe: Pipeline, cat: MoMASubject) -> None:
    first, again, other = (latents(pipe, [Job(cat, "a cat", seed)]) for seed in (5, 5, 6))
    assert torch.equal(first, again) and far(first, other)


def test_api_of_the_readme(pipe: Pipeline, cat: MoMASubject) -> None:
    """`sample` draws prompt by prompt, seed by seed, and reports its steps."""
    steps = []
    images = pipe.sample(
        cat, ["a cat in the snow", "a cat"], seeds=[0, 1], strength=0.4,
        config=replace(QUICK, batch_size=3), on_step=lambda now: steps.append((now.done, now.total)),
    )  # fmt: skip
    assert [image.size for image in images] == [(64, 64)] * 4
    assert steps == [(i, 6) for i in range(1, 7)]  # two batches of three steps
    (third,) = pipe.sample(cat, "a cat", seeds=[0], strength=0.4, config=QUICK)
    assert np.abs(np.int16(third) - np.int16(images[2])).max() <= 1


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_steps_show_the_image_that_they_predict(pipe: Pipeline, cat: MoMASubject, solver: str) -> None:
    """The last step ends at its prediction; a mask is shown once it is there."""
    seen = []
    config = replace(QUICK, solver=solver)
    (result,) = pipe.run([Job(cat, "a cat", 0)], config, seen.append)
    alpha = solver_steps(pipe.base.schedule, config.steps, solver)[-1].alpha_next
    noise = seen[-1].step.noise_pred
    same(alpha.sqrt() * seen[-1].clean + (1 - alpha).sqrt() * noise, result.latents, atol=1e-4)
    assert torch.equal(seen[-1].m_gen[0], result.m_gen)
    first, *_, last = (now.previews()[0] for now in seen)
    assert first.size == result.image.size and first.tobytes() != last.tobytes()


def test_given_noise_and_embedding(pipe: Pipeline, cat: MoMASubject) -> None:
    """What is drawn or computed can be passed in, with the same result."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    told = with_embedding(cat, "a cat", embed(pipe, cat, "a cat"))
    given = Job(told, "a cat", seed=99, latents=noise)
    assert torch.equal(latents(pipe, [given]), latents(pipe, [Job(cat, "a cat", 3)]))
    shape = (1, 4, 16, 16)
    generator = torch.Generator().manual_seed(7 ^ REFERENCE_STREAM)
    noises = {
        name: torch.randn(shape, generator=generator) for name in ("posterior_noise", "reference_noise")
    }
    drawn = pipe.encode_subject(image(0), mask(30), "cat", seed=7)
    passed = pipe.encode_subject(image(0), mask(30), "cat", seed=8, **noises)
    assert torch.equal(drawn.layers[3].k, passed.layers[3].k)
    assert far(drawn.layers[3].k, pipe.encode_subject(image(0), mask(30), "cat", seed=8).layers[3].k)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (72, 40), (32, 48)])
def test_any_size(pipe: Pipeline, cat: MoMASubject, height: int, width: int) -> None:
    (result,) = pipe.run([Job(cat, "a cat", 0)], SampleConfig(steps=2, height=height, width=width))
    assert result.image.size == (width, height) and result.m_gen.shape == (1, height // 8, width // 8)


def test_work_is_done_once(pipe: Pipeline, cat: MoMASubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLLM sees the image and reads each prompt once, however many images of them are drawn."""
    calls = []

    def counted(kind: type, name: str) -> None:
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: calls.append(kind) or original(*args))

    counted(Llama, "forward")
    counted(CLIPVision, "hidden")
    pipe.sample(cat, ["a cat", "a cat in the snow"], seeds=[0, 1, 2], config=QUICK)
    assert calls == [CLIPVision, Llama, Llama]


# --- switched-off parts -------------------------------------------------------------------------------


class PlainHook:
    """A hook that does what the UNet does without one."""

    def self_attn(self, layer, q, k, v, grid):
        return attention(q, k, v), None

    cross_attn = self_attn


@torch.no_grad()
@pytest.mark.parametrize("interval", [(), ((251, 751),), ((0, 0),)])
def test_adapter_off_is_plain_stable_diffusion(pipe: Pipeline, interval: tuple[tuple[int, int], ...]) -> None:
    """Bit-equal to the textbook loop, written here without any of the sampler; guidance everywhere, at two
    timesteps, nowhere."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = text_states(pipe, "", "a cat in the snow")
    path = solver_steps(pipe.base.schedule, 4, "ddim")
    *_, last = denoise(pipe.base.unet, text_only(pipe, text), path, x, 7.5, "ddim", *interval)
    guided = {(): (751, 501, 251, 1), ((251, 751),): (501, 251), ((0, 0),): ()}[interval]
    assert last.state == {}
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    for t in (751, 501, 251, 1):
        if t in guided:
            eps = pipe.base.unet(torch.cat([x, x]), torch.tensor([t, t]), text)[0]
            eps = eps[:1] + 7.5 * (eps[1:] - eps[:1])
        else:
            eps = pipe.base.unet(x, torch.tensor([t]), text[1:])[0]
        a, b = alphas[t], alphas[max(t - 250, 0)]
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    assert torch.equal(last.latents, x)


@pytest.mark.parametrize("impl", ["fused", pytest.param("explicit", marks=pytest.mark.slow)])
def test_left_out_guidance_is_guidance_one(
    pipe: Pipeline, cat: MoMASubject, dog: MoMASubject, impl: str
) -> None:
    """The conditional rows alone compute what they do beside the others: images and masks."""
    pipe = pipe.with_config(replace(DEFAULT, attention=impl, m_gen_norm="none"))
    jobs = [Job(cat, "a cat in the snow", 0), Job(dog, "a dog", 1, strength=0.4, negative="snow")]
    one = replace(QUICK, guidance=1.0)
    for solver in SOLVERS:
        config = replace(one, solver=solver)
        for interval in ((0, 0), SOME):
            found = zip(
                pipe.run(jobs, config),
                pipe.run(jobs, replace(config, guidance_interval=interval)),
                strict=True,
            )
            for both, alone in found:
                same(both.latents, alone.latents)
                same(both.m_gen, alone.m_gen)
    default, part = (latents(pipe, jobs, replace(QUICK, guidance_interval=i)) for i in ((1, 668), SOME))
    assert torch.equal(default, latents(pipe, jobs)) and far(default, part)


@torch.no_grad()
def test_plain_hook_is_no_hook(pipe: Pipeline) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([10, 900]), text_states(pipe, "a dog", "a cat in the snow")
    assert torch.equal(pipe.base.unet(x, t, text)[0], pipe.base.unet(x, t, text, PlainHook())[0])


@pytest.mark.parametrize("impl", ["fused", "explicit"])
def test_beta_zero_is_base_and_context(pipe: Pipeline, cat: MoMASubject, dog: MoMASubject, impl: str) -> None:
    """β = 0: no trace of the reference's features, only the context tokens are left; those do matter."""
    pipe = pipe.with_config(replace(DEFAULT, attention=impl))
    embedding = embed(pipe, cat, "a cat")

    def draw(layers: MoMASubject, strength: float, scale: float = 1.0) -> Tensor:
        subject = with_embedding(replace(cat, layers=layers.layers), "a cat", embedding * scale)
        return latents(pipe, [Job(subject, "a cat", 0, strength=strength)])

    assert torch.equal(draw(cat, 0.0), draw(dog, 0.0))
    assert far(draw(cat, 1.0), draw(dog, 1.0)) and far(draw(cat, 1.0), draw(cat, 0.0))
    assert far(draw(cat, 0.0), draw(cat, 0.0, scale=-3.0))
    never = pipe.with_config(
        replace(pipe.method.config, subject_below_t=0)
    )  # the subject term at no timestep
    job = Job(with_embedding(cat, "a cat", embedding), "a cat", 0, strength=1.0)
    assert torch.equal(latents(never, [job]), draw(cat, 0.0))


@torch.no_grad()
def test_fresh_adapter(folder: str) -> None:
    """The start of stage 2: λ = 0, K', V' and context K, V the base's own; PAPER: zeros and an IP-Adapter."""
    pipe = load(folder, device="cpu", dtype="fp32", pack=False)
    adapter = Adapter(pipe.method.adapter.cfg, pipe.base.unet.cfg)
    adapter.init_from_base(pipe.base.unet, DEFAULT)
    block = pipe.base.unet.mid_block.attentions[0].transformer_blocks[0]
    assert all(new.scale.item() == DEFAULT.lambda_init for new in adapter.subject)
    assert torch.equal(adapter.context[block.layer].to_v.weight, block.attn2.to_v.weight)
    assert torch.equal(adapter.subject[block.layer].to_k.weight, torch.eye(64))
    theirs = {
        name: torch.randn(p.shape)
        for name, p in adapter.named_parameters()
        if name.startswith(("projector.", "context."))
    }
    adapter.init_from_base(pipe.base.unet, PAPER, theirs)
    assert torch.equal(adapter.context[0].to_k.weight, theirs["context.0.to_k.weight"])
    assert torch.equal(adapter.projector.proj.bias, theirs["projector.proj.bias"])
    for missing in (None, dict(list(theirs.items())[1:])):
        with pytest.raises(ValueError, match="IP-Adapter"):
            adapter.init_from_base(pipe.base.unet, PAPER, missing)
    assert (
        not adapter.subject[block.layer].to_k.weight.any() and adapter.subject[block.layer].scale.item() == 1
    )


# --- presets, points where release and paper differ ----------------------------------------------------


def test_reference_noise(pipe: Pipeline) -> None:
    """Seeded by default; the release's depends on the global generator; the paper has none."""

    def keys(method: MethodConfig, subject_seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        one = pipe.with_config(replace(DEFAULT, reference_noise=method.reference_noise))
        return one.encode_subject(image(0), mask(30), "cat", seed=subject_seed).layers[0].k

    assert torch.equal(keys(DEFAULT, 0, 1), keys(DEFAULT, 0, 2)) and far(
        keys(DEFAULT, 0, 1), keys(DEFAULT, 1, 1)
    )
    assert torch.equal(keys(RELEASE, 0, 1), keys(RELEASE, 1, 1)) and far(
        keys(RELEASE, 0, 1), keys(RELEASE, 0, 2)
    )
    assert torch.equal(keys(PAPER, 0, 1), keys(PAPER, 1, 2)) and far(keys(PAPER, 0, 1), keys(DEFAULT, 0, 1))


def test_a_clean_reference_is_a_noisy_one_without_noise(pipe: Pipeline) -> None:
    """Scaled as that; at t = 0 the noisy one has 1 - 0.00085 of the signal's power."""
    mean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    none, schedule = torch.zeros_like(mean), pipe.base.schedule
    noisy = reference_latent(mean, mean.exp(), (none, none), 0.13025, schedule)
    clean = reference_latent(mean, mean.exp(), None, 0.13025, schedule)
    same(noisy, 0.99915**0.5 * clean, 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"reference_background": "white"},
        {"reference_text_cut": 0},
        {"template": "paper"},
        {"mllm_layers": 1},
        {"context_masked": False},
        {"m_gen_norm": "none"},
        {"m_gen_threshold": 0.5},
        {"m_gen_inside": "one"},
        {"m_gen_layers": (2,)},
        {"subject_below_t": 400},
        {"unconditional_beta": 0.5},
        {"geometry": "squash"},
        {"geometry": "crop"},
    ],
    ids=str,
)
def test_every_field_acts(pipe: Pipeline, change: dict) -> None:
    def draw(method: MethodConfig) -> Tensor:
        one = pipe.with_config(method)
        return latents(one, [Job(one.encode_subject(image(0), mask(30), "cat"), "a cat in the snow", 0)])

    assert (draw(DEFAULT) - draw(replace(DEFAULT, **change))).abs().max() > 1e-4


def test_subject_term_starts_below_its_timestep(pipe: Pipeline, cat: MoMASubject) -> None:
    """The release's range(0, 950): off at 950, on at 949; the mask changes nothing about it."""
    conditioning = condition(pipe, [Job(cat, "a cat", 0)], QUICK)
    assert [conditioning.hook(t, None).subject_on for t in (999, 950, 949, 0)] == [False, False, True, True]


@torch.no_grad()
def test_the_papers_context_is_read_everywhere(pipe: Pipeline, cat: MoMASubject) -> None:
    """M_gen is not in it, whatever it is."""
    pipe, m_gen = pipe.with_config(replace(DEFAULT, context_masked=False)), torch.zeros(1, 1, 8, 8)
    conditioning = condition(pipe, [Job(cat, "a cat", 0)], QUICK)
    (k, v), context = conditioning.text[0], conditioning.context[0]
    q = torch.randn(2, k.shape[1], 64, k.shape[3], generator=torch.Generator().manual_seed(0))
    z, _ = conditioning.hook(500, m_gen).cross_attn(0, q, k, v, (8, 8))
    same(z, attention(q, k, v) + attention(q, *context), 1e-5)


def test_absent_label(pipe: Pipeline) -> None:
    """A prompt that does not name the subject: an error by default; the release draws with its template's."""
    with pytest.raises(ValueError, match="subject"):
        dog = pipe.encode_subject(image(0), mask(30), "dog")
        pipe.run([Job(dog, "on the beach", 0)], QUICK)
    release = pipe.with_config(RELEASE)
    dog = release.encode_subject(image(0), mask(30), "dog")
    assert latents(release, [Job(dog, "on the beach", 0)]).isfinite().all()


@torch.no_grad()
def test_decoder_looks_at_the_subject_and_reads_the_instruction(pipe: Pipeline, cat: MoMASubject) -> None:
    """`embed` against its steps written out: white background, the instruction's tokens, the last state."""
    prompt = "a cat in the snow"
    text = f"\n A photo of a cat. Describe a new image of the same cat in: {prompt}. ASSISTANT: *"
    ids = (
        pipe.method.decoder.tokenizer.encode("USER: "),
        pipe.method.decoder.tokenizer.encode(text, bos=False),
    )
    white = np.asarray(image(0).convert("RGB"))
    reference = make_reference(Image.fromarray(white), mask(30), pipe.image_size, DEFAULT)
    pixels = clip_image(reference.white, pipe.method.decoder.llava.cfg.vision.image_size)[None]
    patches = pipe.method.decoder.llava.projector(pipe.method.decoder.llava.tower.hidden(pixels, -2)[:, 1:])
    head, tail = (pipe.method.decoder.llava.llama.embed_tokens(torch.tensor([part])) for part in ids)
    hidden = pipe.method.decoder.llava.llama(torch.cat([head, patches, tail], dim=1))[:, -1]
    same(embed(pipe, cat, prompt), pipe.method.adapter.mapping(hidden), 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"reference_background": "white"},
        {"geometry": "squash"},
        {"reference_noise": "none"},
        {"reference_text_cut": 0},
    ],
    ids=str,
)
def test_a_subject_of_another_config_is_refused(pipe: Pipeline, cat: MoMASubject, change: dict) -> None:
    other = pipe.with_config(replace(DEFAULT, **change))
    both = pipe.encode_subject([image(0), image(1)], [mask(30), mask(12)], "cat")
    for subject in (cat, both):
        with pytest.raises(ValueError, match=rf"{next(iter(change))} .*encode it again"):
            other.run([Job(subject, "a cat", 0)], QUICK)
    again = other.encode_subject(image(0), mask(30), "cat")
    assert latents(other, [Job(again, "a cat", 0)], QUICK).isfinite().all()
    pipe.with_config(replace(DEFAULT, m_gen_share=0.5)).run([Job(cat, "a cat", 0)], QUICK)


@pytest.mark.parametrize("subject", ["cat.png", None, ["a", "b"], Image.new("RGB", (64, 64))])
def test_what_is_no_subject_is_refused(pipe: Pipeline, subject: object) -> None:
    with pytest.raises(TypeError, match="expected encode_subject's"):
        pipe.sample(subject, "a cat")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((np.zeros((64, 64, 3)), mask(30), "cat"), "image is of type ndarray"),
        (("cat.png", mask(30), "cat"), "image is of type str"),
        ((image(0), np.zeros((64, 64)), "cat"), "mask is of type ndarray"),
        ((image(0), None, "cat"), "mask is of type NoneType"),
        ((image(0), mask(30), None), "word is of type NoneType"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_image_is_refused(pipe: Pipeline, given: tuple, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        pipe.encode_subject(*given)
    with pytest.raises(ValueError, match=f"seed {2**32}"):
        pipe.encode_subject(image(0), mask(30), "cat", seed=2**32)


def test_masks_of_every_kind_are_read_as_files_are(pipe: Pipeline, cat: MoMASubject) -> None:
    white = np.asarray(mask(30)) > 127  # (H, W)
    red, clear = (np.zeros((*white.shape, n), np.uint8) for n in (3, 4))
    red[white, 0] = clear[white, 3] = 255
    label = Image.fromarray(white.astype(np.uint8))
    palette = label.copy()
    palette.putpalette([0, 0, 0, 255, 255, 255])
    for one in (label, palette, *map(Image.fromarray, (red, clear, white.astype(np.float32)))):
        assert torch.equal(pipe.encode_subject(image(0), one, "cat").reference.mask, cat.reference.mask)


def test_a_mask_of_the_background_is_doubted(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"'cat': .*invert the mask"):
        pipe.encode_subject(image(0), ImageOps.invert(mask(30)), "cat")


def test_noise_streams_differ(pipe: Pipeline) -> None:
    """The reference's noise is not the start noise of an image with the same seed and size."""
    zero, one = torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    noises = pipe.method._reference_noises(zero.shape, 5, None, zero)
    latent = reference_latent(zero, one, noises, pipe.base.vae.cfg.scaling, pipe.base.schedule)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    correlation = (latent * start).mean() / (latent.std() * start.std())
    assert correlation.abs() < 0.2


def test_not_finite_is_an_error(pipe: Pipeline, cat: MoMASubject) -> None:
    """Never a black image without a word."""
    with pytest.raises(ValueError, match="not finite"):
        list(pipe.run([Job(cat, "a cat", 0, latents=torch.full((1, 4, 8, 8), torch.nan))], QUICK))


@pytest.mark.parametrize(
    ("name", "network"),
    [("base.text_encoders.0", "text encoder"), ("base.unet", "UNet"), ("base.vae", "VAE"),
     ("decoder.adapter.mapping", "feature decoder")],
)  # fmt: skip
def test_damaged_weights_are_found_where_their_network_ends(folder: str, name: str, network: str) -> None:
    pipe = load(folder, device="cpu", dtype="fp32", pack=False)
    part = pipe.method
    for step in name.split("."):
        part = part[int(step)] if step.isdigit() else getattr(part, step)
    with torch.no_grad():
        list(part.parameters())[-1].fill_(torch.nan)  # used last, so that nothing else sees it
    with pytest.raises(ValueError, match=network):
        list(pipe.run([Job(pipe.encode_subject(image(0), mask(30), "cat"), "a cat", 0)], QUICK))


def loud(vae: VAE, gain: float) -> VAE:
    """The same function, but for the next GroupNorm's eps, with activations `gain` times as large."""
    vae = copy.deepcopy(vae)
    with torch.no_grad():
        for part in (vae.encoder.conv_in, vae.decoder.conv_in):
            part.weight.mul_(gain)
            part.bias.mul_(gain)
    return vae


def test_vae_that_overflows_in_16_bits_is_run_in_float32(pipe: Pipeline) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = pipe.base.vae.encode(x)[0]
        vae = loud(pipe.base.vae, 1e5)
        expected, half = vae.decode(z), copy.deepcopy(vae).half()
        assert not half.decode(z.half()).isfinite().all()
        run = Autoencoder(half)
        with pytest.warns(UserWarning, match="VAE"):
            found = run(lambda network: network.decode(z.to(network.dtype)))
        same(found, expected, atol=0.05)  # the weights are half's
        with warnings.catch_warnings(action="error"):  # from then on without another try
            assert torch.equal(found, run(lambda network: network.decode(z.to(network.dtype))))
        base = replace(pipe.base, vae=half)
        with pytest.warns(UserWarning, match="VAE"):
            mean, std = base.encode_image(x)
        for got, wanted in zip((mean, std), vae.encode(x), strict=True):
            same(got, wanted, atol=0.05)
        half.decoder.conv_out.weight.fill_(torch.nan)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="VAE"):
            Autoencoder(half)(lambda network: network.decode(z.to(network.dtype)))


def test_plain_colour_is_no_image(pipe: Pipeline, cat: MoMASubject) -> None:
    vae = copy.deepcopy(pipe.base.vae)
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
    moma = pipe.method
    plain = replace(pipe, method=MoMA(replace(pipe.base, vae=vae), moma.adapter, moma.decoder, moma.config))
    with pytest.raises(ValueError, match="colour"):
        list(plain.run([Job(cat, "a cat", 0)], QUICK))


def test_empty_mask(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="mask"):
        pipe.encode_subject(image(0), mask(0), "cat")
    release = pipe.with_config(RELEASE)
    subject = release.encode_subject(image(0), mask(0), "cat")
    assert latents(release, [Job(subject, "a cat", 0)]).isfinite().all()


# --- refusals, devices --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "config", "message"),
    [
        ({}, {"height": 60}, "height 60"),
        ({}, {"width": 0}, "width 0"),
        ({}, {"steps": 0}, "steps"),
        ({}, {"guidance": float("nan")}, "guidance"),
        ({}, {"strength": -1.0}, "strength"),
        ({}, {"batch_size": 0}, "batch size"),
        ({}, {"guidance_interval": (600, 300)}, "guidance interval 600 300"),
        ({}, {"guidance_interval": (0, 1001)}, "guidance interval"),
        ({"prompt": "a dog"}, {}, "'cat'"),
        ({"prompt": ""}, {}, "empty"),
        ({"latents": torch.zeros(1, 4, 5, 5)}, {}, "start latents"),
        ({"strength": float("nan")}, {}, "strength"),
        ({}, {"height": 4096}, "height 4096"),
    ],
)
def test_refusals(pipe: Pipeline, cat: MoMASubject, job: dict, config: dict, message: str) -> None:
    """Before anything is computed: `run` itself raises, not its first image."""
    with pytest.raises(ValueError, match=message) as error:
        pipe.run([Job(**{"subjects": cat, "prompt": "a cat", "seed": 0} | job)], replace(QUICK, **config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("solver", "euler"),
        ("steps", "3"),
        ("height", 64.0),
        ("guidance_interval", (0.5, 1)),
        ("guidance_interval", (1,)),
    ],
)
def test_wrong_types(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SampleConfig(**{field: value})


def test_method_must_fit(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="m_gen_layers"):
        pipe.with_config(replace(DEFAULT, m_gen_layers=(99,)))


def test_the_weights_own_size(pipe: Pipeline, cat: MoMASubject) -> None:
    (image,) = pipe.sample(cat, "a cat", config=SampleConfig(steps=1))
    assert image.size == (pipe.image_size, pipe.image_size)


def test_without_a_decoder(folder: str, cat: MoMASubject) -> None:
    """Subjects bring their embeddings, of the right shape; others are refused."""
    pipe = load(folder, device="cpu", dtype="fp32", encoders=False)
    assert pipe.method.decoder is None
    for prompts in ((), ("a cat",)):
        with pytest.raises(ValueError, match="MLLM"):
            pipe.run(
                [Job(pipe.encode_subject(image(0), mask(30), "cat", prompts=prompts), "a cat", 0)], QUICK
            )
    with pytest.raises(ValueError, match=r"embedding \(1, 5\)"):
        pipe.encode_subject(image(0), mask(30), "cat", features={"a cat": torch.zeros(1, 5)})


def test_a_bundle_without_an_mllm(folder: str, tmp_path: Path) -> None:
    """It loads where no MLLM is needed, and is refused by name where one is."""
    manifest = json.loads((Path(folder) / "config.json").read_text())
    for name in ("llava", "vision"):
        del manifest["networks"][name]
    shutil.copytree(folder, tmp_path / "small", ignore=shutil.ignore_patterns("llava*", "vision*"))
    (tmp_path / "small" / "config.json").write_text(json.dumps(manifest))
    pipe = load(tmp_path / "small", device="cpu", dtype="fp32", encoders=False)
    subject = pipe.encode_subject(image(0), mask(30), "cat", features={"a cat": torch.zeros(1, 32)})
    assert latents(pipe, [Job(subject, "a cat", 0)]).isfinite().all()
    assert load(tmp_path / "small", "text", device="cpu").sample((), "a cat", config=QUICK)
    with pytest.raises(ValueError, match="vision"):
        load(tmp_path / "small", device="cpu")


def test_nothing_to_draw(pipe: Pipeline) -> None:
    assert list(pipe.run([], QUICK)) == []


def test_the_cpu_with_a_number_is_the_cpu(folder: str) -> None:
    assert choose_device("cpu:0") == torch.device("cpu")
    assert load(folder, "text", device="cpu:0").sample((), "a cat", config=QUICK)


def test_load_refuses_what_cannot_be(folder: str) -> None:
    with pytest.raises(ValueError, match="need a CUDA device"):
        load(folder, device="cpu", cuda_graph="on")
    with pytest.raises(ValueError, match="tiles 'maybe'"):
        load(folder, device="cpu", tiles="maybe")
    with pytest.raises(ValueError, match="device 'tpu9'"):
        choose_device("tpu9")
    with pytest.raises(ValueError, match="'cpu:1': there is one CPU"):
        choose_device("cpu:1")
    with pytest.raises(ValueError, match="dtype 'int8'"):
        choose_dtype("int8", torch.device("cpu"))
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="not available"):
            load(folder, device="cuda")


COMMANDS = (
    "sample",
    "train",
    "moma.bench.__main__",
    "moma.bench.rounding",
    "moma.data.openimages",
    "moma.mini.pretrain",
    "moma.mini.approximations",
)


@pytest.mark.parametrize("name", [*COMMANDS, "moma.mini.report"])
def test_every_command_sets_its_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 is IEEE float32 on GPUs too, and 16-bit products are added up in float32."""
    settings = [
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    ]
    for place, setting in settings:
        monkeypatch.setattr(place, setting, True)
    with suppress(ValueError, SystemExit):
        importlib.import_module(name).main(["--no-such-option"])
    assert [getattr(place, setting) for place, setting in settings] == [False] * 4


def test_bf16_is_near_fp32(folder: str, pipe: Pipeline) -> None:
    """One step from the same noise: bf16 weights and activations, float32 latents."""
    low = load(folder, device="cpu", dtype="bf16")
    assert low.dtype == torch.bfloat16 and low.dtype_reason == "asked for"
    config, noise = (
        replace(QUICK, steps=1),
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    results = []
    for one in (pipe, low):
        subject = one.encode_subject(image(0), mask(30), "cat")
        results.append(latents(one, [Job(subject, "a cat", 0, latents=noise)], config))
    assert results[1].dtype == torch.float32
    assert (results[0] - results[1]).abs().mean() < 0.05 * results[0].abs().mean()
