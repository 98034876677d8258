"""The methods of the comparison: IP-Adapter against diffusers', the base model against plain sampling."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from models.clip_image import clip_image
from moma import SampleConfig
from moma.evaluate import methods
from moma.methods.ip_adapter import IPAdapterConfig
from moma.methods.prompts import sd_prompt
from moma.mini import report
from moma.sampling.cuda_graphs import RecordableHook
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.pipeline import DRAWING, to_images
from moma.sampling.sampler import TextOnly, denoise
from moma.weights.bundle import Bundle
from tests.baseline import diffusers_unet
from tests.compare import assert_close_to_std
from tests.ip_adapter_case import WIDTH, build_ip_bundle, public_layout

SMALL = SampleConfig(steps=2, height=64, width=64)
PROMPT = "a cat in the snow"


@pytest.fixture(scope="module")
def ip_folder(folder, tmp_path_factory):
    """No more than an IP-Adapter needs."""
    path = tmp_path_factory.mktemp("weights") / "ip"
    build_ip_bundle(folder, path, methods.BASE)
    return path


@pytest.fixture(scope="module")
def ip(ip_folder):
    return methods.METHODS["ip-adapter"](ip_folder, "cpu", "fp32")


def example_image():
    """A photo, wider than high, and where its subject is."""
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = np.zeros((60, 90), np.uint8)
    mask[15:45, 30:60] = 255
    return Image.fromarray(values).resize((180, 120)), Image.fromarray(mask).resize((180, 120))


def tensor(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_ip_adapter_predicts_the_noise_that_diffusers_predicts(ip_folder, scale):
    bundle = Bundle.open(ip_folder)
    method = methods.METHODS["ip-adapter"](ip_folder, "cpu", "fp32", cfg=IPAdapterConfig(scale=scale))
    ours = bundle.build("unet")
    theirs = diffusers_unet(ours.cfg, ours.state_dict())
    theirs._load_ip_adapter_weights([public_layout(bundle.state("ip_adapter"), ours.cfg)], False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]

    x, t = tensor(0, 2, 4, 16, 16), torch.tensor([41, 801])
    text, negative, embedding = tensor(1, 2, 77, 32), tensor(2, 2, 77, 32), tensor(3, 2, WIDTH)
    rows, times = torch.cat([x, x]), torch.cat([t, t])
    images = torch.cat([torch.zeros_like(embedding), embedding])[:, None]  # (R, 1, E)
    expected = theirs(
        rows, times, torch.cat([negative, text]), added_cond_kwargs={"image_embeds": [images]}
    ).sample

    guide = method.pipe.adapter.guide(embedding, text, negative)
    eps, records = ours(rows, times, guide.text, guide.hook(41, None))
    assert records == [] and guide.next_m_gen(records, (16, 16)) is None
    assert_close_to_std(eps, expected)  # both rows of guidance
    alone = guide.conditional()
    eps, _ = ours(x, t, alone.text, alone.hook(41, None))
    assert_close_to_std(eps, expected[2:])
    plain, _ = ours(rows, times, guide.text)
    assert (plain - expected).abs().max() > 0.05, "the image has a say"


@torch.no_grad()
def test_ip_adapter_looks_at_the_photo_or_at_the_subject_on_white(ip_folder, ip):
    image, mask = example_image()
    vision = Bundle.open(ip_folder).build("ip_vision", dtype=torch.float32)
    subject = ip.subject(image, mask, "cat")
    assert subject.layers == [] and subject.reference.white.size == (128, 128)
    photo = vision(clip_image(image, vision.cfg.image_size)[None])[1]
    assert photo.shape == (1, WIDTH) and torch.equal(ip.job(subject, PROMPT, 0).embedding, photo)
    white = methods.METHODS["ip-adapter"](ip_folder, "cpu", "fp32", cfg=IPAdapterConfig(image="white"))
    seen = white.subject(image, mask, "cat")
    expected = vision(clip_image(seen.reference.white, vision.cfg.image_size)[None])[1]
    assert torch.equal(seen.embedding, expected) and not torch.allclose(expected, photo)
    with pytest.raises(ValueError, match="expected photo or white"):
        IPAdapterConfig(image="mask")


def test_ip_adapter_draws_the_batch_as_it_draws_one(ip):
    image, mask = example_image()
    subject = ip.subject(image, mask, "cat")
    other = ip.subject(Image.eval(image, lambda v: 255 - v), mask, "cat")
    jobs = [ip.job(subject, PROMPT, 0, strength=1.0), ip.job(other, PROMPT, 0)]
    first, second = ip.pipe.run(jobs, SMALL)
    (alone,) = ip.pipe.run(jobs[:1], SMALL)
    assert first.m_gen is None
    torch.testing.assert_close(first.latents, alone.latents, rtol=0, atol=1e-4)
    assert not torch.allclose(first.latents, second.latents, atol=1e-3)
    assert isinstance(ip.pipe.guide(jobs, [job.embedding for job in jobs], SMALL), RecordableHook)
    again = ip.pipe.with_method(ip.pipe.method)
    torch.testing.assert_close(next(again.run(jobs[:1], SMALL)).latents, alone.latents, rtol=0, atol=0)


def test_text_is_plain_sampling_of_the_base_model(ip_folder):
    method = methods.METHODS["text"](ip_folder, "cpu", "fp32")
    pipe = method.pipe
    assert pipe.llava is None and pipe.adapter is None
    image, mask = example_image()
    jobs = [method.job(method.subject(image, mask, "cat"), PROMPT, seed, strength=0.4) for seed in (3, 4)]
    results = list(pipe.run(jobs, SMALL))
    with torch.no_grad():
        ids = pipe.clip_tokenizer.ids(["", "", *[sd_prompt("cat", PROMPT)] * 2])
        guide, x = TextOnly(pipe.text(ids)[0]), torch.cat([tensor(seed, 1, 4, 8, 8) for seed in (3, 4)])
        path = solver_steps(ScheduleConfig(), 2, "ddim")
        *_, last = denoise(pipe.unet, guide, path, x, SMALL.guidance, "ddim")
        pixels = pipe.vae.decode(last.latents[:1] / pipe.vae.cfg.scaling)
    assert torch.equal(torch.cat([r.latents for r in results]), last.latents)
    assert results[0].image.tobytes() == to_images(pixels)[0].tobytes() and results[0].m_gen is None


def test_text_is_moma_without_context_and_subject(folder, pipe):
    text, moma = (methods.METHODS[name](folder, "cpu", "fp32") for name in ("text", "moma"))
    image, mask = example_image()
    silent = moma.pipe.changed(methods.text_alone)
    job = moma.job(moma.subject(image, mask, "cat"), PROMPT, 0)
    expected = next(silent.run([job], SMALL)).latents
    found = next(text.pipe.run([text.job(text.subject(image, mask, "cat"), PROMPT, 0)], SMALL)).latents
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    own = next(moma.pipe.run([job], SMALL)).latents
    plain = pipe.sample(pipe.encode_subject(image, mask, "cat"), PROMPT, config=SMALL)[0]
    assert not torch.allclose(own, expected, atol=1e-3), "a change leaves the pipe it came from alone"
    assert next(moma.pipe.run([job], SMALL)).image.tobytes() == plain.tobytes()


def test_masks_as_strong_as_the_name_says(folder):
    """From the same noise; what `Blended` does is tested with the figures."""
    image, mask = example_image()
    moma, *others = (methods.EVALUATED[name](folder, "cpu", "fp32") for name in ("moma", *methods.MASKING))
    job = moma.job(moma.subject(image, mask, "cat"), PROMPT, 0)
    drawn = [next(moma.pipe.run([job], SMALL)).latents]
    for method, name, keep in zip(others, ("half-mask", "no-mask"), (0.5, 0.0), strict=True):
        assert method.name == name
        own = method.job(method.subject(image, mask, "cat"), PROMPT, 0)
        changed = moma.pipe.changed(lambda cond, keep=keep: methods.Blended(cond, keep))
        drawn.append(next(method.pipe.run([own], SMALL)).latents)
        assert torch.equal(drawn[-1], next(changed.run([job], SMALL)).latents)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in combinations(drawn, 2))


def test_moma_reads_each_pair_of_subject_and_prompt_once(folder, monkeypatch):
    method, asked = methods.METHODS["moma"](folder, "cpu", "fp32"), []
    decoder = method.pipe.decoder
    monkeypatch.setattr(
        method.pipe, "decoder", lambda questions: asked.append(questions) or decoder(questions)
    )
    image, mask = example_image()
    first, second = method.subject(image, mask, "cat"), method.subject(image, mask, "cat", seed=1)
    for prompt in (PROMPT, "a cat"):
        jobs = [method.job(subject, prompt, seed) for seed in (0, 1) for subject in (first, second)]
    assert len(asked) == 4 and [job.seed for job in jobs] == [0, 0, 1, 1]
    together = method.subject(image, mask, "cat")  # as a streamed MLLM wants it
    method.read([(together, prompt) for prompt in (PROMPT, "a cat", PROMPT)])
    assert len(asked) == 5 and [question.prompt for question in asked[4]] == [PROMPT, "a cat"]
    assert torch.equal(method.job(together, "a cat", 0).embedding, jobs[0].embedding) and len(asked) == 5
    assert not torch.equal(first.layers[0].k, second.layers[0].k), "the seed is the reference noise's"


def test_baseline_of_moma_mini_draws_as_its_report_draws_it(folder):
    method = methods.BASELINE(folder, "cpu", "fp32")
    steered = methods.Steered.load(folder, "cpu", "fp32")
    cfg = report.replace(report.ReportConfig(), sample=SMALL)
    pairs = report.make_pairs(1, [None], cfg)
    expected = report.generate(steered, pairs, cfg, embed=report.clip_context, context_masked=False)
    seen = report.draw(pairs[0].shown, cfg.world)
    image, mask = Image.fromarray(seen.image), Image.fromarray(seen.mask)
    subject = method.subject(image, mask, pairs[0].shown.label)
    (found,) = method.pipe.run([method.job(subject, pairs[0].prompt, pairs[0].seed)], SMALL)
    difference = report.stacked([found.image]).float() - expected.images.float()
    assert difference.abs().max() <= 1, "bytes are truncated"
    assert method.name == "ip-adapter" and method.pipe.llava is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("moma", "has no adapter, only"), ("ip-adapter", "has no ip_adapter, only")],
)
def test_bundle_without_the_methods_networks(folder, ip_folder, monkeypatch, name, words):
    monkeypatch.delattr(Bundle, "build")  # no weight is read
    with pytest.raises(ValueError, match=words):
        methods.METHODS[name](ip_folder if name == "moma" else folder)


def test_only_moma_loads_the_language_model(folder, monkeypatch):
    built, build = [], Bundle.build
    monkeypatch.setattr(Bundle, "build", lambda self, name, *a: built.append(name) or build(self, name, *a))
    methods.METHODS["text"](folder, "cpu", "fp32")
    assert built == list(methods.BASE)
    built.clear()
    methods.METHODS["moma"](folder, "cpu", "fp32")
    assert set(built) == {*DRAWING, "llava"}
