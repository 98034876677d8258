"""Each figure of the command on tiny networks: what its columns have in common, and in what they differ."""

import json
import shutil
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moma.app.sheets import mask_image
from moma.evaluate import figures, methods
from moma.evaluate.methods import METHODS, Blended
from moma.evaluate.scorers import load_scorers
from moma.inputs.preprocess import find_mask, on_white, open_image
from moma.inputs.segment import Segmenter
from moma.sampling.sampler import TextOnly
from moma.weights.bundle import SAMPLING, Bundle
from moma.weights.tiny import TinyConfig, build_tiny_bundle, tiny_scorers
from tests.fake_sam import SMALL, FlatSAM
from tests.ip_adapter_case import build_ip_bundle
from tests.test_mini_weights import MINI

EXAMPLES = Path(__file__).parents[1] / "examples"
CAT, DOG = EXAMPLES / "cat.png", EXAMPLES / "dog.png"
SNOW = "a {subject} in the snow"


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A bundle that all methods can draw with."""
    path = tmp_path_factory.mktemp("weights") / "whole"
    build_ip_bundle(folder, path, SAMPLING)
    return path


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    cfg, path = TinyConfig(), tmp_path_factory.mktemp("weights") / "judges"
    build_tiny_bundle(path, seed=1, cfg=replace(cfg, networks=cfg.networks | tiny_scorers()))
    return path


@lru_cache
def loaded(loader, folder):
    return loader(folder, "cpu", "fp32")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Loading takes longer than drawing here."""
    monkeypatch.setattr(figures, "load", lambda loader, folder, request: loaded(loader, Path(folder)))


def options(what, bundle, *more, prompts=(SNOW,), refs=(CAT,)):
    given = [
        "--bundle",
        bundle,
        "--steps",
        2,
        "--size",
        64,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--seed",
        5,
    ]
    given += [text for prompt in prompts for text in ("--prompt", prompt)]
    return [what, *map(str, [*given, *(text for ref in refs for text in ("--ref", ref)), *more])]


def columns_of(what, bundle, *more, **given):
    args = figures.parse(options(what, bundle, *more, **given))
    request = figures.request_of(args, figures.FIGURES[what])
    if what == "beta":
        return list(figures.beta(request, args.strengths))
    draw = (
        figures.masking
        if what == "masking"
        else partial(figures.methods, loaders=figures.loaders_of(args, request))
    )
    return list(draw(request))


def cat_job(pipe, prompt="a cat in the snow", **more):
    image = open_image(CAT)
    subject = pipe.encode_subject(image, find_mask(image).mask, "cat")
    return figures.Job(subject, prompt, 5, **more)


def drawn(pipe, job):
    return next(iter(pipe.run([job], figures.SampleConfig(steps=2, height=64, width=64))))


def far(first, second):
    """Largest difference of two images, 0..255."""
    return np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max()


def test_masking_keeps_all_some_or_nothing_of_m_gen(folder):
    full, half, none, masks = columns_of("masking", folder)
    assert [c.name for c in (full, half, none, masks)] == [
        "full mask",
        "half mask",
        "no mask",
        "M_gen, full mask",
    ]
    pipe = loaded(METHODS["moma"], Path(folder)).pipe
    job = cat_job(pipe)
    plain, free = drawn(pipe, job), drawn(pipe.changed(lambda cond: Blended(cond, keep=0.0)), job)
    assert full.images[0].tobytes() == plain.image.tobytes()
    assert none.images[0].tobytes() == free.image.tobytes()
    assert masks.images[0].tobytes() == mask_image(plain.m_gen, (64, 64)).tobytes()
    assert far(full.images[0], half.images[0]) > 0 and far(half.images[0], none.images[0]) > 0
    unmasked = pipe.changed(lambda cond: Everywhere(cond))  # the same noise, and no M_gen from the start
    assert drawn(unmasked, job).image.tobytes() == none.images[0].tobytes()


class Everywhere:
    def __init__(self, cond):
        self.cond, self.text = cond, cond.text

    def conditional(self):
        return Everywhere(self.cond.conditional())

    def hook(self, t, m_gen):
        return self.cond.hook(t, None if m_gen is None else torch.ones_like(m_gen))

    def next_m_gen(self, records, size):
        return self.cond.next_m_gen(records, size)


def test_beta_0_is_text_and_context_alone(folder, pipe):
    zero, one = columns_of("beta", folder, "--strengths", "0", "1")
    assert (zero.name, one.name) == ("β = 0", "β = 1")
    steered = loaded(METHODS["moma"], Path(folder)).pipe
    mute = steered.changed(lambda cond: replace(cond, lam=[torch.zeros_like(lam) for lam in cond.lam]))
    assert far(drawn(mute, cat_job(steered)).image, zero.images[0]) <= 1
    assert far(drawn(pipe, cat_job(pipe, strength=1.0)).image, one.images[0]) == 0
    assert far(zero.images[0], one.images[0]) > 1


@pytest.mark.parametrize("what", ["context", "texture"])
def test_grids_are_moma_by_subjects_and_prompts(folder, pipe, what, tmp_path):
    prompts = (SNOW, "a golden {subject}")
    (column,) = columns_of(what, folder, prompts=prompts, refs=(CAT, DOG))
    assert column.name == "MoMA" and len(column.images) == 4
    beta = {"context": 1.0, "texture": 0.4}[what]
    expected = drawn(pipe, cat_job(pipe, "a golden cat", strength=beta)).image
    assert far(column.images[1], expected) <= 1


def test_community_of_one_model_twice_and_of_another(folder, judges, capsys):
    """Identical columns from identical weights, and another image from others."""
    once, again, other = columns_of("community", folder, "--bundle", folder, "--bundle", judges)
    assert once.images[0].tobytes() == again.images[0].tobytes()
    assert far(once.images[0], other.images[0]) > 0 and other.name == str(judges)
    named = columns_of("community", folder, "--bundle", judges)
    assert [column.name for column in named] == ["tiny", "judges"]
    notes = capsys.readouterr().out.splitlines()
    assert notes == [f"note: {judges} has another adapter file than {folder}"] * 2


def test_each_bundle_is_checked(folder, judges, tmp_path, monkeypatch, capsys):
    """Before the first column is drawn: the second bundle's decoder lacks the layers it is to read."""
    monkeypatch.delattr(Bundle, "build")
    shutil.copytree(judges, tmp_path / "second")
    manifest = tmp_path / "second" / "config.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"method": {"mllm_layers": 99}}))
    assert figures.run(options("community", folder, "--bundle", manifest.parent)) == 2
    assert "mllm_layers 99: expected 1 to" in capsys.readouterr().err


def test_methods_side_by_side(folder, whole, judges, capsys):
    columns = columns_of("methods", whole)
    assert [column.name for column in columns] == ["text only", "IP-Adapter", "MoMA"]
    for column, name in zip(columns, ("text", "ip-adapter", "moma"), strict=True):
        method, image = loaded(METHODS[name], whole), open_image(CAT)
        job = method.job(method.subject(image, find_mask(image).mask, "cat"), "a cat in the snow", 5)
        assert drawn(method.pipe, job).image.tobytes() == column.images[0].tobytes()
    assert capsys.readouterr().out == ""
    assert [c.name for c in columns_of("methods", folder)] == ["text only", "MoMA"]
    assert capsys.readouterr().out == f"note: ip-adapter is left out: {folder} has no ip_adapter\n"
    some = columns_of("methods", folder, "--method", "text", "--baseline", judges, "--method", "ip-adapter")
    assert [column.name for column in some] == ["text only", "IP-Adapter"]
    assert some[0].images[0].tobytes() == columns[0].images[0].tobytes()


def test_a_new_method_is_a_class_and_an_entry(folder, monkeypatch):
    """README's way: here, Stable Diffusion that is told the prompt's opposite."""

    class Opposite(methods.BaseModel):
        @torch.no_grad()
        def guide(self, jobs, embeddings, config):
            text, negative = self.read_texts(jobs)
            return TextOnly(torch.cat([text, negative]))

    def load_opposite(folder, device, dtype):
        return methods.Method("opposite", methods.load_without_mllm(Opposite, folder, device, dtype))

    monkeypatch.setitem(METHODS, "opposite", methods.Loader(load_opposite, methods.BASE))
    text, opposite, *_ = columns_of("methods", folder, "--method", "text", "--method", "opposite")
    assert opposite.name == "opposite" and far(text.images[0], opposite.images[0]) > 1


@pytest.mark.parametrize(
    ("what", "across", "down"),
    [
        ("masking", 5, 2),
        ("beta", 3, 2),
        ("context", 2, 2),
        ("texture", 2, 2),
        ("community", 3, 2),
        ("methods", 3, 2),
    ],
)
def test_commands_write_a_sheet(folder, tmp_path, what, across, down):
    more = {"beta": ["--strengths", "0", "1"], "community": ["--bundle", folder]}.get(what, [])
    out = tmp_path / "new" / "figure.png"
    assert figures.run(options(what, folder, *more, "--out", out, refs=(CAT, DOG))) == 0
    with Image.open(out) as sheet:
        cfg, cell = figures.FigureConfig().sheet, 128
        assert sheet.size == (
            cfg.gap + across * (cell + cfg.gap),
            cfg.gap + down * (cell + cfg.caption + cfg.gap),
        )
        assert np.asarray(sheet).std() > 10
    assert [path.name for path in out.parent.iterdir()] == ["figure.png"]


def test_table_of_scores_beside_the_sheet(folder, judges, tmp_path, capsys):
    """Every number again from the networks' embeddings, by hand."""
    out = tmp_path / "beta.png"
    more = ("--strengths", "0", "1", "--scorers", judges, "--out", out)
    given = {"prompts": (SNOW, "a golden {subject}"), "refs": (CAT, DOG)}
    assert figures.run(options("beta", folder, *more, **given)) == 0
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and "Means over 4 images" in text
    head, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[:4]]
    assert head == ["", "DINO ViT-S/16", "CLIP-I ViT-B/32", "CLIP-T ViT-B/32"]
    dino, clip = load_scorers(Bundle.open(judges))
    photos = [on_white(open_image(path)) for path in (CAT, CAT, DOG, DOG)]
    prompts = ["a cat in the snow", "a golden cat", "a dog in the snow", "a golden dog"]
    for row, column in zip(rows, columns_of("beta", folder, "--strengths", "0", "1", **given), strict=True):
        pairs = [(scorer.embed_images(column.images), scorer.embed_images(photos)) for scorer in (dino, clip)]
        pairs.append((clip.embed_images(column.images), clip.embed_texts(prompts)))
        means = [(a * b).sum(dim=1).mean().item() for a, b in pairs]
        assert row[0] == column.name and [float(v) for v in row[1:]] == pytest.approx(means, abs=6e-4)


def test_masks_are_sams_where_there_is_one(tmp_path, monkeypatch):
    """Asked for a photo without a mask or transparency, and after the checks."""
    cfg, weights = TinyConfig(), tmp_path / "weights"
    build_tiny_bundle(weights, cfg=replace(cfg, networks=cfg.networks | {"sam": SMALL}))
    loaded = []
    monkeypatch.setattr(Segmenter, "load", lambda *a: loaded.append(a) or Segmenter(FlatSAM()))
    street = np.zeros((96, 96, 3), np.uint8)
    street[:48], street[48:], street[32:64, 32:64] = (60, 120, 200), (90, 90, 90), (250, 30, 30)
    Image.fromarray(street).save(tmp_path / "car.png")
    args = figures.parse(options("context", weights, refs=(tmp_path / "car.png", CAT)))
    request = figures.request_of(args, figures.FIGURES["context"])
    assert [photo.mask is None for photo, _ in request.wanted] == [True, False] and not loaded
    figures.check(args, request, figures.loaders_of(args, request))
    (car, prompt), cat = figures.with_masks(request).wanted
    assert len(loaded) == 1 and cat == request.wanted[1] and prompt == "a car in the snow"
    red = np.zeros((96, 96), bool)
    red[32:64, 32:64] = True
    assert ((np.asarray(car.mask) > 127) == red).mean() > 0.98


def test_prompts_take_the_subjects_word():
    assert figures.fill("a {subject} and a {subject}", "otter") == "an otter and an otter"
    assert figures.fill("sea {subject}, a red {subject}", "otter") == "sea otter, a red otter"
    assert figures.wrapped("β = 1", 128, figures.FigureConfig()) == ("beta = 1",)
    assert figures.wrapped("a cat on the beach at sunset", 128, figures.FigureConfig()) == (
        "a cat on the beach at",
        "sunset",
    )


def test_examples_are_drawn_where_nothing_is_given(folder):
    for what, figure in figures.FIGURES.items():
        more = ["--bundle", folder] if what == "community" else []
        args = figures.parse(options(what, folder, *more, prompts=(), refs=()))
        request = figures.request_of(args, figure)
        assert len(request.wanted) == (16 if what in ("context", "texture") else 4)
        assert request.wanted[-1].photo.word == "teapot" and "teapot" in request.wanted[-1].prompt
        assert len({prompt for _, prompt in request.wanted}) == len(request.wanted)


@pytest.mark.parametrize(
    ("what", "more", "words"),
    [
        ("masking", ["--bundle", "nowhere"], "2 folders, expected one"),
        ("community", [], "two or more"),
        ("masking", ["--ref", "nowhere.png"], "no such file"),
        ("masking", ["--mask", CAT, "--mask", CAT], "--mask: 2 given, expected 1"),
        ("masking", ["--subject", "cat", "--subject", "dog"], "--subject: 2 given, expected 1"),
        ("context", ["--prompt", "a dog"], "does not name the subject"),
        ("beta", ["--strengths", "-1"], "strength -1.0: expected"),
        ("texture", ["--size", "63"], "multiple of 8"),
        ("texture", ["--steps", "0"], "steps"),
        ("texture", ["--device", "tpu"], "device 'tpu'"),
        ("texture", ["--out", "sheet.jpg"], "ends in .png"),
        ("methods", ["--method", "ip-adapter"], "has no ip_adapter, only"),
        ("methods", ["--baseline", "nowhere"], "no config.json there"),
        ("methods", ["--baseline", "{}"], "is MoMA's; give a bundle whose adapter is an IP-Adapter"),
        ("methods", ["--baseline", MINI, "--method", "ip-adapter"], "weights/mini is MoMA's"),
        ("methods", ["--baseline", MINI, "--method", "text"], "draws nothing without --method ip-adapter"),
        ("beta", ["--seed", 2**64], "--seed 18446744073709551616: expected 0 to"),
        ("beta", ["--seed", "-1"], "--seed -1: expected 0 to"),
        ("methods", ["--scorers", "{}"], "has none of dino_s16"),
        ("images", [], "invalid choice"),
    ],
)
def test_mistakes_take_one_line_before_weights_are_read(folder, monkeypatch, capsys, what, more, words):
    monkeypatch.delattr(Bundle, "build")
    assert figures.run(options(what, folder, *(str(text).replace("{}", folder) for text in more))) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("figures: error: ") and words in error[0]
