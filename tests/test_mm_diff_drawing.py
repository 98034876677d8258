"""Drawing with MM-Diff on small bases of one and of two text encoders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from models.clip_image import clip_image
from models.tokenizers import ClipTokenizer
from models.unet import UNet, UNetConfig, sinusoids
from models.vae import VAE, VAEConfig
from moma import Job, Pipeline, SampleConfig
from moma.inputs.faces import Face
from moma.methods.mm_diff.adapter import MMDiffAdapter, MMDiffSizes, TextLoRA, attach, frozen_context, merge
from moma.methods.mm_diff.images import face_pixels, padded
from moma.methods.mm_diff.method import MMDiff
from moma.sampling.base import SIZES, Base
from moma.sampling.diffusion import solver_steps
from moma.weights.tiny import build_tokenizers, fill
from tests.helpers import Rerun, image, latents, mask, same

WIDTHS, POOLED, SIDE = (16, 32), 24, 64
CONFIG = SampleConfig(steps=6, height=SIDE, width=SIDE, batch_size=4)
LANDMARKS = torch.tensor([[30.0, 30], [60, 30], [45, 50], [33, 65], [57, 65]])
VISION = CLIPVisionConfig(width=32, layers=3, heads=4, mlp=64, image_size=56, patch=14, projection=24)


def filled(network: nn.Module, seed: int = 0) -> Any:
    fill(network, torch.Generator().manual_seed(seed))
    return network.eval().requires_grad_(False)


def networks(folder: Path, encoders: int, subject: str = "cls") -> tuple[Base, MMDiffAdapter]:
    """A base, and an adapter whose LoRAs are not zero."""
    build_tokenizers(folder)
    tokenizer = ClipTokenizer(folder / "vocab.json", folder / "merges.txt")
    vocab = len(json.loads((folder / "vocab.json").read_text()))
    texts = [
        CLIPTextConfig(width=w, layers=2, heads=4, mlp=32, vocab=vocab, projection=p)
        for w, p in zip(WIDTHS, (None, POOLED), strict=True)
    ][-encoders:]
    width = sum(cfg.width for cfg in texts)
    unet = UNetConfig(
        channels=(32, 64, 64), depth=(1, 1, 0), heads=(4, 4, 4), context_dim=(width,) * 3, norm_groups=8,
        added_cond_dim=POOLED + SIZES * 8 if encoders == 2 else None,
    )  # fmt: skip
    vae = VAEConfig(channels=(16, 16, 32, 32), resnets=1, norm_groups=8)
    sizes = MMDiffSizes(
        subject=subject, face_dim=16, embed_dim=24, patch_dim=32, text_dims=tuple(cfg.width for cfg in texts),
        hidden=32, depth=2, heads=2, head_dim=8, rank=4, text_1=TextLoRA.of(texts[0], 4, mlp=True),
        text_2=TextLoRA.of(texts[1], 4) if encoders == 2 else None,
    )  # fmt: skip
    own = tuple(filled(CLIPText(cfg), i) for i, cfg in enumerate(texts))
    base = Base(filled(UNet(unet)), filled(VAE(vae)), own, (tokenizer,) * encoders, SIDE)
    return base, filled(MMDiffAdapter(sizes, unet), 1)


def pipeline(folder: Path, encoders: int, subject: str = "cls", **config: Any) -> Pipeline:
    base, adapter = networks(folder, encoders, subject)
    frozen = [(k.clone(), v.clone()) for k, v in frozen_context(base.unet)]
    merge(adapter, base.unet, base.text_encoders[:1])
    vision, patches = filled(CLIPVision(VISION), 2), filled(CLIPVision(VISION), 3)
    return Pipeline(MMDiff(base, adapter, frozen, vision, patches, MMDiff.configure(**config)))


@pytest.fixture(scope="module", params=[1, 2])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return pipeline(tmp_path_factory.mktemp("tokenizers"), request.param)


@pytest.fixture(scope="module")
def jobs(pipe: Pipeline) -> list[Job]:
    """Images with none, one, two and three subjects, one of them of two images."""
    cat, dog, vase = (
        pipe.encode_subject(image(i), mask(20 + i), w) for i, w in enumerate(("cat", "dog", "vase"))
    )
    more = cat.with_more([pipe.encode_subject(image(7), mask(25), "cat")])
    return [
        Job((), "a house in the snow", 0),
        Job(dog, "a dog", 1, negative="snow on a house"),
        Job((more, dog), "a dog and a cat", 2, strength=0.7),
        Job((cat, dog, vase), "a cat, a dog and a vase", 3),
    ]


@pytest.mark.parametrize(("start", "interval"), [(0, (0, 1000)), (2, (0, 1000)), (0, (300, 800))])
def test_a_batch_is_its_singles(
    pipe: Pipeline, jobs: list[Job], start: int, interval: tuple[int, int]
) -> None:
    pipe = pipe.with_config(replace(pipe.method.config, start_merge_step=start))
    config = replace(CONFIG, guidance_interval=interval)
    batch = latents(pipe, jobs, config)
    for i, job in enumerate(jobs):
        same(latents(pipe, [job], config), batch[i : i + 1], 1e-3 * float(batch.abs().max()))
        if i:
            alone = latents(pipe, [replace(job, subjects=())], config)
            assert not torch.allclose(alone, batch[i : i + 1], atol=1e-2), "subjects have an effect"


def test_what_changes_an_image(pipe: Pipeline, jobs: list[Job]) -> None:
    """Each choice does, and a merge after the last step leaves the text alone."""
    before = latents(pipe, jobs[1:3], CONFIG)
    for field, value in (("fuse_scale", 0.3), ("start_merge_step", 3), ("fuse_negative", False)):
        changed = pipe.with_config(replace(pipe.method.config, **{field: value}))
        other = latents(changed, jobs[1:3], CONFIG)
        differ = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, other, strict=True)]
        assert differ == [True, field != "fuse_negative"], field  # the second image has no negative text
    with pytest.raises(ValueError, match="the config 'segment'"):
        pipe.with_config(replace(pipe.method.config, seen="segment")).run(jobs[1:3], CONFIG)
    words = [replace(one, strength=0.0) for one in jobs[1:3]]
    for fused in (True, False):
        changed = pipe.with_config(replace(pipe.method.config, fuse_words=fused))
        found = (
            latents(changed, words, CONFIG),
            latents(changed, [replace(j, subjects=()) for j in words], CONFIG),
        )
        assert torch.allclose(*found, atol=1e-3) != fused, "only words are left"
    late = pipe.with_config(replace(pipe.method.config, start_merge_step=CONFIG.steps))
    same(
        latents(late, jobs[1:3], CONFIG), latents(pipe, [replace(j, subjects=()) for j in jobs[1:3]], CONFIG)
    )
    cat, dog = jobs[2].subjects
    swapped = [replace(jobs[2], subjects=(dog, cat))]  # words, not their order, tell whose is whose
    same(latents(pipe, swapped, CONFIG), before[1:], 1e-3)
    first = [replace(jobs[2], subjects=(replace(cat, tokens=cat.tokens[:, :4]), dog))]
    assert not torch.allclose(latents(pipe, first, CONFIG), before[1:], atol=1e-3), "all images are read"


def test_strengths_of_subjects(pipe: Pipeline, jobs: list[Job]) -> None:
    """Equal ones are one for all; each weighs its own subject."""

    def draw(*strength: float | None) -> Tensor:
        return latents(pipe, [replace(jobs[2], strength=strength)], CONFIG)

    both = draw(0.7, 0.7)
    assert torch.equal(both, latents(pipe, [replace(jobs[2], strength=0.7)], CONFIG))
    assert torch.equal(draw(None, 1.0), draw(1.0, 1.0))
    for other in (draw(0.7, 0.0), draw(0.0, 0.7), draw(0.0, 0.0), draw(1.4, 0.7)):
        assert not torch.allclose(other, both, atol=1e-3)
    assert not torch.allclose(draw(0.7, 0.0), draw(0.0, 0.7), atol=1e-3)
    batch = [replace(jobs[i], strength=each) for i, each in ((2, (0.2, 1.0)), (3, (1.0, 0.5, 0.0)))]
    drawn = latents(pipe, batch, CONFIG)
    for i, job in enumerate(batch):
        same(latents(pipe, [job], CONFIG), drawn[i : i + 1], 1e-3 * float(drawn.abs().max()))


@pytest.mark.parametrize("start", [0, 4])
def test_graphs_change_nothing(pipe: Pipeline, jobs: list[Job], start: int) -> None:
    pipe = pipe.with_config(replace(pipe.method.config, start_merge_step=start))
    config, recorder = replace(CONFIG, steps=12), Rerun()
    graphed = latents(replace(pipe, make_recorder=lambda: recorder), jobs, config)
    same(graphed, latents(pipe, jobs, config), 1e-4)
    assert recorder.recorded == (2 if start else 1)


def test_merged_is_attached(tmp_path: Path, pipe: Pipeline, jobs: list[Job]) -> None:
    """LoRAs in the weights and beside them, as in training, compute the same."""
    base, adapter = networks(tmp_path, len(pipe.base.text_encoders))
    attach(adapter, base.unet, base.text_encoders[:1])
    method = MMDiff(base, adapter, frozen_context(base.unet), None, None, pipe.method.config)
    same(latents(Pipeline(method), jobs, CONFIG), latents(pipe, jobs, CONFIG), 1e-3)


def test_faces(tmp_path: Path) -> None:
    """Weights for faces want one, of any length, and read where it is."""
    pipe = pipeline(tmp_path, 2, "face")
    with pytest.raises(ValueError, match="face"):
        pipe.encode_subject(image(0), mask(30), "man")
    embedding = torch.randn(16, generator=torch.Generator().manual_seed(0))
    one, longer, moved, other = (
        pipe.encode_subject(image(0), mask(30), "man", face=Face(e, at)).tokens
        for e, at in (
            (embedding, LANDMARKS), (3 * embedding, LANDMARKS), (embedding, LANDMARKS + 9),
            (-embedding, LANDMARKS),
        )
    )  # fmt: skip
    same(one, longer, 1e-5)
    assert not torch.allclose(one, moved, atol=1e-3) and not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("subject", "seen"), [("cls", "photo"), ("cls", "segment"), ("face", "photo")])
def test_what_the_image_encoders_see(tmp_path: Path, subject: str, seen: str) -> None:
    """The trained one gives the embedding of the whole image on black, or of the subject on white; the public
    one, before its last block, the patch tokens, with the class token, of the same or of the aligned face."""
    pipe, given = pipeline(tmp_path, 2, subject, seen=seen), image(0)
    given.putalpha(mask(40))
    flat = Image.alpha_composite(Image.new("RGBA", given.size, "white"), given).convert("RGB")
    face = Face(torch.randn(16, generator=torch.Generator().manual_seed(0)), LANDMARKS)
    options = {"face": face} if subject == "face" else {}
    found = pipe.encode_subject(given, mask(30), "cat", **options)
    side, head = VISION.image_size, pipe.method.adapter.head
    white = clip_image(found.reference.white, side)
    pixels = (white if seen == "segment" else padded(flat, side))[None]
    embedding = pipe.method.vision(pixels)[1]
    same(found.embedding, embedding, 1e-6)
    own, shown = embedding, pixels
    if subject == "face":
        own = (face.embedding / face.embedding.norm())[None]
        shown = face_pixels(flat, face, side)[None]
    same(found.tokens, head(own, pipe.method.patches.hidden(shown, -2)), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid", ["even", "leading"])
def test_steps_and_sizes(pipe: Pipeline, jobs: list[Job], grid: str) -> None:
    """The subjects come in the chosen step of any solver and grid; both kinds of steps know the image's
    height and width."""
    pipe = pipe.with_config(replace(pipe.method.config, start_merge_step=2))
    config, base = replace(CONFIG, solver="dpm", grid=grid, width=96), pipe.base
    prepared = pipe.method.prepare(jobs[1:2])
    conditioning = pipe.method.condition(prepared, config)
    inputs = [conditioning.at(step, {}) for step in solver_steps(base.schedule, 6, "dpm", grid)]
    assert [one.hook is not None for one in inputs] == [False, False, True, True, True, True]
    for one, merged in ((inputs[1], False), (inputs[2], True)):
        states, pooled = pipe.method.read_texts(prepared, merged)
        for (k, v), (own_k, own_v) in zip(one.text, base.unet.text_kv(states), strict=True):
            assert torch.equal(k, own_k) and torch.equal(v, own_v)
        if len(base.text_encoders) == 2:
            sizes = torch.cat([sinusoids(torch.tensor([n]), 8, 10000) for n in (64, 96, 0, 0, 64, 96)], dim=1)
            same(one.added, torch.cat([pooled, sizes.expand(2, -1)], dim=1), 1e-6)


def test_choices_of_loading_stay(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="text_lora"):
        pipe.with_config(replace(pipe.method.config, text_lora="both"))
