"""The pipeline on the tiny bundle: batches, seeds, switched-off parts, presets, and what it refuses."""

import importlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.attention import attention
from models.clip import CLIPVision
from models.clip_image import clip_image
from models.llama import Llama
from moma import DEFAULT, PAPER, RELEASE, Job, MethodConfig, MoMA, SampleConfig, Subject
from moma.inputs.preprocess import make_reference
from moma.methods.moma.adapter import Adapter
from moma.sampling.device import choose_device, choose_dtype
from moma.sampling.diffusion import SOLVERS, solver_steps
from moma.sampling.pipeline import REFERENCE_STREAM
from moma.sampling.sampler import TextOnly, denoise

QUICK = SampleConfig(steps=3, height=64, width=64)
SOME = (300, 600)  # of QUICK's timesteps, 667, 334 and 1, the middle one


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def mask(radius: int) -> Image.Image:
    y, x = np.ogrid[:90, :120]
    return Image.fromarray(np.uint8(255) * ((y - 45) ** 2 + (x - 60) ** 2 < radius**2))


@pytest.fixture(scope="module")
def cat(pipe: MoMA) -> Subject:
    return pipe.encode_subject(image(0), mask(30), "cat")


@pytest.fixture(scope="module")
def dog(pipe: MoMA) -> Subject:
    return pipe.encode_subject(image(1), mask(12), "dog")


def latents(pipe: MoMA, jobs: list[Job], config: SampleConfig = QUICK) -> Tensor:
    return torch.cat([result.latents for result in pipe.run(jobs, config)])


def far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2)


def same(a: Tensor, b: Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- batches, seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [(0, 1000), SOME])
@pytest.mark.parametrize("impl", ["fused", "explicit"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_equals_singles(
    pipe: MoMA, cat: Subject, dog: Subject, solver: str, impl: str, interval: tuple[int, int]
) -> None:
    """Any mix of subjects (of different size), prompts, seeds, strengths and negative prompts."""
    pipe = pipe.with_method(replace(DEFAULT, attention=impl))
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


def test_release_preset_leaks_across_a_batch(pipe: MoMA, cat: Subject, dog: Subject) -> None:
    """The point mended by `m_gen_norm`: in the release, images of a batch change each other."""
    pipe = pipe.with_method(replace(DEFAULT, m_gen_norm="batch"))
    jobs = [Job(cat, "a cat in the snow", 0), Job(dog, "a dog", 1)]
    together, alone = latents(pipe, jobs), torch.cat([latents(pipe, [job]) for job in jobs])
    assert (together - alone).abs().max() > 1e-3


def test_seeds_make_the_image(pipe: MoMA, cat: Subject) -> None:
    first, again, other = (latents(pipe, [Job(cat, "a cat", seed)]) for seed in (5, 5, 6))
    assert torch.equal(first, again) and far(first, other)


def test_api_of_the_readme(pipe: MoMA, cat: Subject) -> None:
    """`sample` draws prompt by prompt, seed by seed, and reports its steps."""
    steps = []
    images = pipe.sample(
        cat, ["a cat in the snow", "a cat"], seeds=[0, 1], strength=0.4,
        config=replace(QUICK, batch_size=3), on_step=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert [image.size for image in images] == [(64, 64)] * 4
    assert steps == [(i, 6) for i in range(1, 7)]  # two batches of three steps
    (third,) = pipe.sample(cat, "a cat", seeds=[0], strength=0.4, config=QUICK)
    assert np.abs(np.int16(third) - np.int16(images[2])).max() <= 1


def test_given_noise_and_embedding(pipe: MoMA, cat: Subject) -> None:
    """What is drawn or computed can be passed in, with the same result."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    given = Job(cat, "a cat", seed=99, latents=noise, embedding=pipe.embed(cat, "a cat"))
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


@pytest.mark.parametrize(("height", "width"), [(64, 128), (72, 40), (8, 16)])
def test_any_size(pipe: MoMA, cat: Subject, height: int, width: int) -> None:
    (result,) = pipe.run([Job(cat, "a cat", 0)], SampleConfig(steps=2, height=height, width=width))
    assert result.image.size == (width, height) and result.m_gen.shape == (1, height // 8, width // 8)


def test_work_is_done_once(pipe: MoMA, cat: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
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


def texts(pipe: MoMA, *prompts: str) -> Tensor:
    with torch.no_grad():
        return pipe.text(pipe.clip_tokenizer.ids(prompts))[0]


@torch.no_grad()
@pytest.mark.parametrize("interval", [(), ((251, 751),), ((0, 0),)])
def test_adapter_off_is_plain_stable_diffusion(pipe: MoMA, interval: tuple[tuple[int, int], ...]) -> None:
    """Bit-equal to the textbook loop, written here without any of the sampler; guidance everywhere, at two
    timesteps, nowhere."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = texts(pipe, "", "a cat in the snow")
    path = solver_steps(pipe.schedule, 4, "ddim")
    *_, last = denoise(pipe.unet, TextOnly(text), path, x, 7.5, "ddim", *interval)
    guided = {(): (751, 501, 251, 1), ((251, 751),): (501, 251), ((0, 0),): ()}[interval]
    assert last.m_gen is None
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    for t in (751, 501, 251, 1):
        if t in guided:
            eps = pipe.unet(torch.cat([x, x]), torch.tensor([t, t]), text)[0]
            eps = eps[:1] + 7.5 * (eps[1:] - eps[:1])
        else:
            eps = pipe.unet(x, torch.tensor([t]), text[1:])[0]
        a, b = alphas[t], alphas[max(t - 250, 0)]
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    assert torch.equal(last.latents, x)


@pytest.mark.parametrize("impl", ["fused", "explicit"])
def test_left_out_guidance_is_guidance_one(pipe: MoMA, cat: Subject, dog: Subject, impl: str) -> None:
    """The conditional rows alone compute what they do beside the others: images and masks."""
    pipe = pipe.with_method(replace(DEFAULT, attention=impl, m_gen_norm="none"))
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
def test_plain_hook_is_no_hook(pipe: MoMA) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([10, 900]), texts(pipe, "a dog", "a cat in the snow")
    assert torch.equal(pipe.unet(x, t, text)[0], pipe.unet(x, t, text, PlainHook())[0])


@pytest.mark.parametrize("impl", ["fused", "explicit"])
def test_beta_zero_is_base_and_context(pipe: MoMA, cat: Subject, dog: Subject, impl: str) -> None:
    """β = 0: no trace of the reference's features, only the context tokens are left; those do matter."""
    pipe = pipe.with_method(replace(DEFAULT, attention=impl))
    embedding = pipe.embed(cat, "a cat")

    def draw(layers: Subject, strength: float, scale: float = 1.0) -> Tensor:
        subject = replace(cat, layers=layers.layers)
        return latents(pipe, [Job(subject, "a cat", 0, strength=strength, embedding=embedding * scale)])

    assert torch.equal(draw(cat, 0.0), draw(dog, 0.0))
    assert far(draw(cat, 1.0), draw(dog, 1.0)) and far(draw(cat, 1.0), draw(cat, 0.0))
    assert far(draw(cat, 0.0), draw(cat, 0.0, scale=-3.0))
    never = pipe.with_method(replace(pipe.method, subject_below_t=0))  # the subject term at no timestep
    job = Job(cat, "a cat", 0, strength=1.0, embedding=embedding)
    assert torch.equal(latents(never, [job]), draw(cat, 0.0))


@torch.no_grad()
def test_fresh_adapter(folder: str) -> None:
    """The start of stage 2: λ = 0, K', V' and context K, V the base's own; PAPER: zeros and an IP-Adapter."""
    pipe = MoMA.load(folder, "cpu", "fp32", pack=False)
    adapter = Adapter(pipe.adapter.cfg, pipe.unet.cfg)
    adapter.init_from_base(pipe.unet, DEFAULT)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    assert all(new.scale.item() == DEFAULT.lambda_init for new in adapter.subject)
    assert torch.equal(adapter.context[block.layer].to_v.weight, block.attn2.to_v.weight)
    assert torch.equal(adapter.subject[block.layer].to_k.weight, torch.eye(64))
    theirs = {
        name: torch.randn(p.shape)
        for name, p in adapter.named_parameters()
        if name.startswith(("projector.", "context."))
    }
    adapter.init_from_base(pipe.unet, PAPER, theirs)
    assert torch.equal(adapter.context[0].to_k.weight, theirs["context.0.to_k.weight"])
    assert torch.equal(adapter.projector.proj.bias, theirs["projector.proj.bias"])
    for missing in (None, dict(list(theirs.items())[1:])):
        with pytest.raises(ValueError, match="needs an IP-Adapter"):
            adapter.init_from_base(pipe.unet, PAPER, missing)
    assert (
        not adapter.subject[block.layer].to_k.weight.any() and adapter.subject[block.layer].scale.item() == 1
    )


# --- presets, points where release and paper differ ----------------------------------------------------


def test_reference_noise(pipe: MoMA) -> None:
    """Seeded by default; the release's depends on the global generator; the paper has none."""

    def keys(method: MethodConfig, subject_seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        one = pipe.with_method(replace(DEFAULT, reference_noise=method.reference_noise))
        return one.encode_subject(image(0), mask(30), "cat", seed=subject_seed).layers[0].k

    assert torch.equal(keys(DEFAULT, 0, 1), keys(DEFAULT, 0, 2)) and far(
        keys(DEFAULT, 0, 1), keys(DEFAULT, 1, 1)
    )
    assert torch.equal(keys(RELEASE, 0, 1), keys(RELEASE, 1, 1)) and far(
        keys(RELEASE, 0, 1), keys(RELEASE, 0, 2)
    )
    assert torch.equal(keys(PAPER, 0, 1), keys(PAPER, 1, 2)) and far(keys(PAPER, 0, 1), keys(DEFAULT, 0, 1))


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
        {"geometry": "squash"},
        {"geometry": "crop"},
    ],
    ids=str,
)
def test_every_field_acts(pipe: MoMA, change: dict) -> None:
    def draw(method: MethodConfig) -> Tensor:
        one = pipe.with_method(method)
        return latents(one, [Job(one.encode_subject(image(0), mask(30), "cat"), "a cat in the snow", 0)])

    assert (draw(DEFAULT) - draw(replace(DEFAULT, **change))).abs().max() > 1e-4


def test_subject_term_starts_below_its_timestep(pipe: MoMA, cat: Subject) -> None:
    """The release's range(0, 950): off at 950, on at 949; the mask changes nothing about it."""
    guide = pipe.guide([Job(cat, "a cat", 0)], [pipe.embed(cat, "a cat")], QUICK)
    assert [guide.hook(t, None).subject_on for t in (999, 950, 949, 0)] == [False, False, True, True]


def test_absent_label(pipe: MoMA) -> None:
    """A prompt that does not name the subject: an error by default; the release draws with its template's."""
    with pytest.raises(ValueError, match="does not name the subject"):
        dog = pipe.encode_subject(image(0), mask(30), "dog")
        pipe.run([Job(dog, "on the beach", 0)], QUICK)
    release = pipe.with_method(RELEASE)
    dog = release.encode_subject(image(0), mask(30), "dog")
    assert latents(release, [Job(dog, "on the beach", 0)]).isfinite().all()


@torch.no_grad()
def test_decoder_looks_at_the_subject_and_reads_the_instruction(pipe: MoMA, cat: Subject) -> None:
    """`embed` against its steps written out: white background, the instruction's tokens, the last state."""
    prompt = "a cat in the snow"
    text = f"\n A photo of a cat. Describe a new image of the same cat in: {prompt}. ASSISTANT: *"
    ids = pipe.llama_tokenizer.encode("USER: "), pipe.llama_tokenizer.encode(text, bos=False)
    white = np.asarray(image(0).convert("RGB"))
    reference = make_reference(Image.fromarray(white), mask(30), pipe.image_size, DEFAULT)
    pixels = clip_image(reference.white, pipe.llava.cfg.vision.image_size)[None]
    patches = pipe.llava.projector(pipe.llava.tower.hidden(pixels, -2)[:, 1:])
    head, tail = (pipe.llava.llama.embed_tokens(torch.tensor([part])) for part in ids)
    hidden = pipe.llava.llama(torch.cat([head, patches, tail], dim=1))[:, -1]
    same(pipe.embed(cat, prompt), pipe.adapter.mapping(hidden), 1e-5)


def test_noise_streams_differ(pipe: MoMA, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's noise is not the start noise of an image with the same seed and size."""
    method = replace(DEFAULT, reference_noise="seeded")
    zero, one = torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    latent = pipe.with_method(method)._reference_latent(zero, one, 5, None, zero)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    correlation = (latent * start).mean() / (latent.std() * start.std())
    assert correlation.abs() < 0.2


def test_not_finite_is_an_error(pipe: MoMA, cat: Subject) -> None:
    """Never a black image without a word."""
    with pytest.raises(ValueError, match="not finite"):
        list(pipe.run([Job(cat, "a cat", 0, strength=1e30)], replace(QUICK, steps=4)))


def test_empty_mask(pipe: MoMA) -> None:
    with pytest.raises(ValueError, match="mask"):
        pipe.encode_subject(image(0), mask(0), "cat")
    release = pipe.with_method(RELEASE)
    subject = release.encode_subject(image(0), mask(0), "cat")
    assert latents(release, [Job(subject, "a cat", 0)]).isfinite().all()


# --- refusals, devices --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "config", "message"),
    [
        ({}, {"height": 60}, "multiple of 8"),
        ({}, {"width": 0}, "multiple of 8"),
        ({}, {"steps": 0}, "steps"),
        ({}, {"guidance": float("nan")}, "guidance"),
        ({}, {"strength": -1.0}, "strength"),
        ({}, {"batch_size": 0}, "batch size"),
        ({}, {"guidance_interval": (600, 300)}, "guidance interval 600 300: expected two timesteps"),
        ({}, {"guidance_interval": (0, 1001)}, "guidance interval"),
        ({"prompt": "a dog"}, {}, "does not name the subject"),
        ({"prompt": ""}, {}, "empty"),
        ({"latents": torch.zeros(1, 4, 5, 5)}, {}, "start latents"),
        ({"embedding": torch.zeros(1, 5)}, {}, "embedding"),
        ({"strength": float("nan")}, {}, "strength"),
        ({}, {"height": 4096}, "up to 2048"),
    ],
)
def test_refusals(pipe: MoMA, cat: Subject, job: dict, config: dict, message: str) -> None:
    """Before anything is computed: `run` itself raises, not its first image."""
    with pytest.raises(ValueError, match=message) as error:
        pipe.run([Job(**{"subject": cat, "prompt": "a cat", "seed": 0} | job)], replace(QUICK, **config))
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


def test_method_must_fit(pipe: MoMA) -> None:
    with pytest.raises(ValueError, match="m_gen_layers"):
        pipe.with_method(replace(DEFAULT, m_gen_layers=(99,)))


def test_the_weights_own_size(pipe: MoMA, cat: Subject) -> None:
    (image,) = pipe.sample(cat, "a cat", config=SampleConfig(steps=1))
    assert image.size == (pipe.image_size, pipe.image_size)


def test_without_a_decoder(folder: str, cat: Subject) -> None:
    pipe = MoMA.load(folder, device="cpu", dtype="fp32", decoder=False)
    for call in (lambda: pipe.embed(cat, "a cat"), lambda: list(pipe.run([Job(cat, "a cat", 0)], QUICK))):
        with pytest.raises(ValueError, match="every job must bring its embedding"):
            call()


def test_nothing_to_draw(pipe: MoMA) -> None:
    assert list(pipe.run([], QUICK)) == []


def test_load_refuses_what_cannot_be(folder: str) -> None:
    with pytest.raises(ValueError, match="need a CUDA device"):
        MoMA.load(folder, "cpu", cuda_graph="on")
    with pytest.raises(ValueError, match="tiles 'maybe'"):
        MoMA.load(folder, "cpu", tiles="maybe")
    with pytest.raises(ValueError, match="device 'tpu9'"):
        choose_device("tpu9")
    with pytest.raises(ValueError, match="dtype 'int8'"):
        choose_dtype("int8", torch.device("cpu"))
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="not available"):
            MoMA.load(folder, device="cuda")


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


def test_bf16_is_near_fp32(folder: str, pipe: MoMA) -> None:
    """One step from the same noise: bf16 weights and activations, float32 latents."""
    low = MoMA.load(folder, "cpu", "bf16")
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
