"""Each figure of the command on tiny networks: what its columns share, and in what they differ."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moma import Bundle, Job, Pipeline, Runtime, SampleConfig, load_pipeline
from moma.app.sheets import mask_image
from moma.evaluate import figures
from moma.evaluate.scorers import load_scorers
from moma.inputs.preprocess import find_mask, on_white, open_image
from moma.inputs.segment import Segmenter
from moma.methods import METHODS, Entry
from moma.methods.moma.method import MoMA
from moma.methods.text import TextToImage
from moma.weights.bundle import SAMPLING
from tests.fake_sam import SMALL, FlatSAM
from tests.ip_adapter_case import build_ip_bundle
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_scorers

EXAMPLES = Path(__file__).parents[1] / "examples"
CAT, DOG = EXAMPLES / "cat.png", EXAMPLES / "dog.png"
SNOW = "a {subject} in the snow"


@pytest.fixture(scope="module")
def whole(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that all methods can draw with."""
    path = tmp_path_factory.mktemp("weights") / "whole"
    build_ip_bundle(folder, path, SAMPLING)
    return path


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg, path = TinyConfig(), tmp_path_factory.mktemp("weights") / "judges"
    build_tiny_bundle(path, seed=1, cfg=replace(cfg, networks=cfg.networks | tiny_scorers()))
    return path


@lru_cache
def loaded(folder: Path, name: str) -> Pipeline:
    bundle = Bundle.open(folder)
    return load_pipeline(Runtime.choose(bundle, "cpu", "fp32"), name, bundle.method_config(name))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading takes longer than drawing here."""
    monkeypatch.setattr(
        figures, "load_pipeline", lambda runtime, name, config: loaded(runtime.weights.folder, name)
    )


def options(
    what: str, bundle: str | Path, *more: Any, prompts: tuple[str, ...] = (SNOW,), refs: Any = (CAT,)
) -> list[str]:
    given = ["--bundle", bundle, "--steps", 2, "--size", 64]
    given += ["--device", "cpu", "--dtype", "fp32", "--seed", 5]
    given += [text for prompt in prompts for text in ("--prompt", prompt)]
    return [what, *map(str, [*given, *(text for ref in refs for text in ("--ref", ref)), *more])]


def request_of(argv: list[str]) -> tuple[Any, figures.Request]:
    args = figures.parse(argv)
    return args, figures.request_of(args, Runtime.choose(None, args.device, args.dtype))


def columns_of(what: str, bundle: str | Path, *more: Any, **given: Any) -> list[figures.Column]:
    args, request = request_of(options(what, bundle, *more, **given))
    if what == "beta":
        return list(figures.beta(request, args.strengths))
    return list((figures.masking if what == "masking" else figures.methods)(request))


def cat_job(pipe: Pipeline, prompt: str = "a cat in the snow", **more: Any) -> Job:
    image = open_image(CAT)
    return Job(pipe.encode_subject(image, find_mask(image).mask, "cat"), prompt, 5, **more)


def drawn(pipe: Pipeline, job: Job) -> Any:
    return next(iter(pipe.run([job], SampleConfig(steps=2, height=64, width=64))))


def far(first, second):
    """Largest difference of two images, 0..255."""
    return np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max()


def test_masking_lets_m_gen_act_fully_half_or_not(folder: str) -> None:
    *columns, masks = columns_of("masking", folder)
    assert [c.name for c in (*columns, masks)] == [
        "full mask", "half mask", "no mask", "M_gen, full mask",
    ]  # fmt: skip
    for column, name in zip(columns, ("moma", "half-mask", "no-mask"), strict=True):
        pipe = loaded(Path(folder), name)
        assert column.images[0].tobytes() == drawn(pipe, cat_job(pipe)).image.tobytes()
    full, half, none = (column.images[0] for column in columns)
    assert far(full, half) > 0 and far(half, none) > 0
    pipe = loaded(Path(folder), "moma")
    m_gen = drawn(pipe, cat_job(pipe)).m_gen
    assert masks.images[0].tobytes() == mask_image(m_gen, (64, 64)).tobytes() and not masks.scored


class Mute(MoMA):
    """MoMA with λ = 0."""

    def condition(self, prepared: Any, config: SampleConfig) -> Any:
        cond = super().condition(prepared, config)
        return replace(cond, lam=[0 * lam for lam in cond.lam])


def test_beta_0_is_text_and_context_alone(folder: str, pipe: Pipeline) -> None:
    zero, one = columns_of("beta", folder, "--strengths", "0", "1")
    assert (zero.name, one.name) == ("β = 0", "β = 1")
    moma = pipe.method
    mute = replace(pipe, method=Mute(moma.base, moma.adapter, moma.decoder, moma.config))
    assert far(drawn(mute, cat_job(mute)).image, zero.images[0]) <= 1
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


def test_each_bundle_is_checked(folder, judges, tmp_path, no_weights, capsys):
    """Before the first column is drawn: the second bundle's decoder lacks the layers it is to read."""
    shutil.copytree(judges, tmp_path / "second")
    manifest = tmp_path / "second" / "config.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"method": {"mllm_layers": 99}}))
    assert figures.run(options("community", folder, "--bundle", manifest.parent)) == 2
    assert "mllm_layers 99" in capsys.readouterr().err


def test_methods_side_by_side(folder: str, whole: Path, capsys: pytest.CaptureFixture) -> None:
    columns = columns_of("methods", whole)
    names = ("reference-attention", "text", "ip-adapter", "moma")
    assert [column.name for column in columns] == [METHODS[name].title for name in names]
    for column, name in zip(columns, names, strict=True):
        pipe = loaded(whole, name)
        assert drawn(pipe, cat_job(pipe)).image.tobytes() == column.images[0].tobytes()
    assert "ip_adapter" not in capsys.readouterr().out  # it has all but MM-Diff
    assert [c.name for c in columns_of("methods", folder)] == ["reference attention", "text only", "MoMA"]
    assert "ip_adapter" in capsys.readouterr().out
    some = columns_of("methods", folder, "--method", "text", "--method", f"ip-adapter={whole}")
    assert [column.name for column in some] == ["text only", "IP-Adapter"]
    for column, other in zip(some, columns[1:3], strict=True):
        assert column.images[0].tobytes() == other.images[0].tobytes()


class Opposite(TextToImage):
    """Stable Diffusion that is told the prompt's opposite."""

    def condition(self, prepared: Any, config: SampleConfig) -> Any:
        cond = super().condition(prepared, config)
        return replace(cond, text=[(k.roll(len(k) // 2, 0), v.roll(len(v) // 2, 0)) for k, v in cond.text])


def test_a_registered_method_is_a_choice(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "opposite", Entry(Opposite, "opposite"))
    text, opposite, *_ = columns_of("methods", folder, "--method", "text", "--method", "opposite")
    assert opposite.name == "opposite" and far(text.images[0], opposite.images[0]) > 1
    assert columns_of("methods", folder)[0].images[0].tobytes() == opposite.images[0].tobytes()


@pytest.mark.parametrize(
    "what",
    [what if what == "methods" else pytest.param(what, marks=pytest.mark.slow) for what in figures.FIGURES],
)
def test_commands_write_a_sheet(folder: str, tmp_path: Path, what: str) -> None:
    more = {"beta": ["--strengths", "0", "1"], "community": ["--bundle", folder]}.get(what, [])
    out = tmp_path / "new" / "figure.png"
    assert figures.run(options(what, folder, *more, "--out", out, refs=(CAT, DOG))) == 0
    with Image.open(out) as sheet:
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


def test_all_subjects_in_one_image(folder, judges, tmp_path):
    """A row for each prompt, with both references; likeness is the mean over both."""
    given = {"prompts": ("a {subject} in the snow", "a red {subject}"), "refs": (CAT, DOG)}
    more = ("--together", "--method", "reference-attention", "--method", "text")
    (drawn, plain), (_, request) = (
        columns_of("methods", folder, *more, **given), request_of(options("methods", folder, *more, **given))
    )  # fmt: skip
    assert [wanted.prompt for wanted in request.wanted] == [
        "a cat and a dog in the snow",
        "a red cat and a dog",
    ]
    assert len(drawn.images) == 2 and far(drawn.images[0], plain.images[0]) > 0
    dino, clip = load_scorers(Bundle.open(judges))
    scores = figures.score(request, [drawn], [dino, clip])
    photos = dino.embed_images([on_white(open_image(path)) for path in (CAT, DOG)])
    seen = dino.embed_images(drawn.images)
    mean = sum(score.values["DINO ViT-S/16"] for score in scores) / len(scores)
    assert mean == pytest.approx((seen @ photos.T).mean().item(), abs=1e-5)
    sheet = figures.sheet(request, [drawn, plain], by_photo=False)
    assert sheet.width > sheet.height, "two references and two columns, two rows"


def test_masks_are_sams_where_there_is_one(tmp_path, monkeypatch):
    """Asked for a photo without a mask or transparency, and after the checks."""
    cfg, weights = TinyConfig(), tmp_path / "weights"
    build_tiny_bundle(weights, cfg=replace(cfg, networks=cfg.networks | {"sam": SMALL}))
    asked = []
    monkeypatch.setattr(Segmenter, "load", lambda *a: asked.append(a) or Segmenter(FlatSAM()))
    street = np.zeros((96, 96, 3), np.uint8)
    street[:48], street[48:], street[32:64, 32:64] = (60, 120, 200), (90, 90, 90), (250, 30, 30)
    Image.fromarray(street).save(tmp_path / "car.png")
    args, request = request_of(options("context", weights, refs=(tmp_path / "car.png", CAT)))
    assert [photo.mask is None for (photo,), _ in request.wanted] == [True, False] and not asked
    figures.check(args, request)
    ((car,), prompt), cat = figures.with_masks(request).wanted
    assert len(asked) == 1 and cat == request.wanted[1] and prompt == "a car in the snow"
    red = np.zeros((96, 96), bool)
    red[32:64, 32:64] = True
    assert ((np.asarray(car.mask) > 127) == red).mean() > 0.98


def test_prompts_take_the_subjects_word():
    assert figures.fill("a {subject} and a {subject}", "otter") == "an otter and an otter"
    assert figures.fill("sea {subject}, a red {subject}", "otter") == "sea otter, a red otter"


def test_examples_are_drawn_where_nothing_is_given(folder):
    for what in figures.FIGURES:
        more = ["--bundle", folder] if what == "community" else []
        _, request = request_of(options(what, folder, *more, prompts=(), refs=()))
        assert len(request.wanted) == {"context": 16, "texture": 16, "changes": 28}.get(what, 4)
        assert request.wanted[-1].words == ("teapot",) and "teapot" in request.wanted[-1].prompt
        assert len({prompt for _, prompt in request.wanted}) == len(request.wanted)


@pytest.mark.parametrize(
    ("what", "more", "words"),
    [
        ("masking", ["--bundle", "nowhere"], "2 folders"),
        ("community", [], "--bundle"),
        ("masking", ["--ref", "nowhere.png"], "nowhere.png"),
        ("masking", ["--mask", CAT, "--mask", CAT], "--mask: 2"),
        ("masking", ["--subject", "cat", "--subject", "dog"], "--subject: 2"),
        ("context", ["--prompt", "a dog"], "'a dog'"),
        ("beta", ["--strengths", "-1"], "strength -1.0"),
        ("texture", ["--size", "63"], "63"),
        ("texture", ["--steps", "0"], "0"),
        ("texture", ["--device", "tpu"], "device 'tpu'"),
        ("texture", ["--out", "sheet.jpg"], "sheet.jpg"),
        ("methods", ["--method", "ip-adapter"], "ip_adapter"),
        ("methods", ["--method", "magic"], "'magic'"),
        ("methods", ["--method", "text", "--method", "text=x"], "--method text"),
        ("methods", ["--method", "ip-adapter=nowhere"], "nowhere"),
        ("methods", ["--method", "ip-adapter={}"], "ip_adapter"),
        ("beta", ["--seed", 2**64], "--seed 18446744073709551616"),
        ("beta", ["--seed", "-1"], "--seed -1"),
        ("methods", ["--scorers", "{}"], "dino_s16"),
        ("images", [], "'images'"),
    ],
)
def test_mistakes_take_one_line_before_weights_are_read(folder, no_weights, capsys, what, more, words):
    assert figures.run(options(what, folder, *(str(text).replace("{}", folder) for text in more))) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("figures: error: ") and words in error[0]
