"""Results of an evaluation: numbers, tables, the chart of the subjects, the page."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from moma.app.chart import DotsConfig, Panel, Series, dots
from moma.evaluate.estimates import estimate
from moma.evaluate.page import PageConfig, write_outputs, write_page
from moma.evaluate.published import DREAMBOOTH, UNSTATED
from moma.evaluate.rate import embed_files
from moma.evaluate.scores import Score
from moma.evaluate.tables import NONE, Results, tables, tables_markdown

DINO, CLIP_I, CLIP_T = COLUMNS = ("DINO ViT-S/16", "CLIP-I ViT-B/32", "CLIP-T ViT-B/32")
HOSTILE = "<script>alert('x')</script> | \"&amp;\"\nline"
FACTS = {"bundle": "weights/x", "sha256": "0" * 64}
WRITTEN = {"scores.json", "scores.csv", "table.md", "subjects.png", "index.html"}


def a_score(method: str, subject: str, kind: str, number: int, *values: float, file: str = "x.png") -> Score:
    prompt = f"a {subject} in the snow" if kind == "context" else f"a golden {subject}"
    found = dict(zip(COLUMNS, values, strict=False))
    return Score(method, subject, subject, kind, prompt, number, file, found)


# The first method's means: of contexts .5, .6, .3, of textures .2 (one subject); the second drew no textures.
SCORES = [
    a_score("one", "cat", "context", 0, 0.2, 0.5, 0.3),
    a_score("one", "cat", "context", 1, 0.4, 0.5, 0.3),
    a_score("one", "dog", "context", 0, 0.6, 0.7, 0.3),
    a_score("one", "dog", "context", 1, 0.8, 0.7, 0.3),
    a_score("one", "dog", "texture", 0, 0.2, 0.9),
    a_score("two", "cat", "context", 0, 0.1),
    a_score("two", "dog", "context", 0, 0.3),
]
FOUND = {"cat": {DINO: 0.7}, "dog": {DINO: 0.8}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with an image, and photos beside it."""
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (40, 40), (200, 40, 40)).save(out / "x.png")
    Image.new("RGB", (400, 300), (40, 40, 200)).save(tmp_path / "photo.jpg")
    return out


def cells(results: Results) -> list[dict[str, list[str]]]:
    """For each table: name of a row -> cells."""
    return [{row.cells[0]: list(row.cells[1:]) for row in table.rows} for table in tables(results)]


class Page(HTMLParser):
    """Balanced tags, and what they refer to."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.seen if name == tag and all(a.get(k) == v for k, v in wanted.items())]

    @property
    def links(self) -> list[str]:
        return [a[key] for _, a in self.seen for key in ("src", "href") if key in a]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


# --- numbers -----------------------------------------------------------------------------------------


def test_means_and_missing_columns():
    context, texture = cells(Results(SCORES, FOUND, FACTS))
    assert list(context) == ["Real images", "one", "two"] and list(texture) == ["Real images", "one"]
    assert context["Real images"] == ["of 2 subjects", "0.750 (0.700 to 0.800)", NONE, NONE]
    assert context["one"] == [
        "4",
        "0.500 (0.300 to 0.700)",
        "0.600 (0.500 to 0.700)",
        "0.300 (0.300 to 0.300)",
    ]
    assert context["two"] == ["2", "0.200 (0.100 to 0.300)", NONE, NONE]
    # One subject says nothing about others; a column that no row has is left out.
    assert texture["one"] == ["1", "0.200", "0.900"]
    assert tables(Results(SCORES, FOUND, FACTS))[1].head == ["method", "images", DINO, CLIP_I]


def test_interval_is_of_subjects_not_of_images():
    """Copies of an image add nothing: 2 subjects of 50 equal images are known as well as 2 images."""
    values = torch.tensor([0.0] * 50 + [1.0] * 50)
    few, many = estimate(values[[0, -1]], ["a", "b"]), estimate(values, ["a"] * 50 + ["b"] * 50)
    assert (few.mean, few.low, few.high) == (many.mean, many.low, many.high) == (0.5, 0.0, 1.0)
    alone = estimate(values)
    assert 0.38 < alone.low < 0.42 and 0.58 < alone.high < 0.62
    # Groups of other sizes weigh as many images as they have.
    assert estimate(torch.tensor([0.0, 0.0, 0.0, 1.0]), [1, 1, 1, 2]).mean == 0.25


def test_json_and_csv_hold_every_score(folder):
    scores = [*SCORES, replace(SCORES[0], method=HOSTILE, prompt='a, "b"\nc')]
    write_outputs(folder, scores, FOUND, FACTS)
    data = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert [Score(**score) for score in data["scores"]] == scores
    assert (data["real"], data["facts"], data["columns"]) == (FOUND, FACTS, list(COLUMNS))
    dino = data["averages"]["context"]["one"][DINO]
    assert dino == {"mean": pytest.approx(0.5), "low": pytest.approx(0.3), "high": 0.7, "count": 4}
    assert data["averages"]["texture"]["one"][DINO] == {"mean": 0.2, "low": None, "high": None, "count": 1}
    rows = list(csv.DictReader(io.StringIO((folder / "scores.csv").read_text(encoding="utf-8"))))
    read_back = [
        Score(
            *(row[name] for name in ("method", "subject", "label", "kind", "prompt")),
            int(row["number"]), row["file"], {name: float(row[name]) for name in COLUMNS if row[name]},
        )
        for row in rows
    ]  # fmt: skip
    assert read_back == scores
    assert {path.name for path in folder.iterdir()} == WRITTEN | {"x.png"}  # no temporary files


def test_no_cell_of_the_csv_is_a_formula(folder):
    """Texts are escaped; numbers stay numbers, negative ones too."""
    texts = ["=1+1", "@SUM(1)", "+1", "-1", "\t=1", "|x", "＝1", "plain - text"]
    scores = [replace(SCORES[0], method=text, subject=text, values={"=c": -0.5, DINO: 1.0}) for text in texts]
    write_outputs(folder, scores, {}, {})
    head, *rows = csv.reader(io.StringIO((folder / "scores.csv").read_text(encoding="utf-8")))
    assert "'=c" in head and [row[0] for row in rows] == [f"'{text}" for text in texts[:-1]] + texts[-1:]
    assert {row[head.index("'=c")] for row in rows} == {"-0.5"}


def test_names_that_are_not_utf8_are_escaped(folder):
    Image.new("RGB", (40, 40)).save(folder / "caf\udce9.png")
    write_outputs(folder, [replace(SCORES[0], file="caf\udce9.png")], {}, {"data": "\udce9"})
    assert json.loads((folder / "scores.json").read_text(encoding="utf-8"))["facts"]["data"] == "\udce9"
    assert 'src="caf%E9.png"' in (folder / "index.html").read_text(encoding="utf-8")


# --- tables beside papers ----------------------------------------------------------------------------


def whole_protocol() -> tuple[list[Score], dict[str, dict[str, float]], set[str]]:
    """30 subjects, 4 images of each of 20 contexts and 5 textures; and another texture of each."""
    subjects = [f"s{i}" for i in range(30)]
    kinds = ["context"] * 20 + ["texture"] * 5
    scores = [
        replace(a_score("one", s, kind, n, 0.5, 0.6, 0.3), prompt=f"prompt {i}")
        for s in subjects
        for i, kind in enumerate(kinds)
        for n in range(4)
    ]
    prompts = {score.prompt for score in scores}
    added = [replace(a_score("one", s, "texture", 0, 0.9, 0.9, 0.9), prompt="added") for s in subjects]
    return scores + added, {s: {DINO: 0.77, CLIP_I: 0.88} for s in subjects}, prompts


def test_published_rows_fill_no_column_of_another_variant():
    scores, real, prompts = whole_protocol()
    half = [replace(score, method="half") for score in scores[::2]]
    results = Results(scores + half, real, FACTS, prompts)
    *others, table = tables(results)
    assert [other.title for other in others] == ["New contexts", "New textures"]
    assert not any(row.published for other in others for row in other.rows)
    rows = cells(results)[-1]
    assert "half" not in rows and rows["one"][0] == "3000"
    columns = table.head[2:]
    assert columns == [*COLUMNS, *UNSTATED]
    found = {name: dict(zip(columns, row[1:], strict=True)) for name, row in rows.items()}
    shown = [row.cells[0] for row in table.rows if row.published]
    assert shown == [f"{row.name} (published)" for row in DREAMBOOTH]
    for name in shown:
        assert found[name][CLIP_I] == found[name][CLIP_T] == NONE
    assert found["Real images (published)"][DINO] == "0.774"
    assert found["Real images (published)"]["CLIP-I, variant not stated"] == "0.885"
    assert found["IP-Adapter (SD 1.5) (published)"][DINO] == NONE
    assert found["one"] == dict.fromkeys(columns, NONE) | {
        DINO: "0.500 (0.500 to 0.500)", CLIP_I: "0.600 (0.600 to 0.600)", CLIP_T: "0.300 (0.300 to 0.300)",
    }  # fmt: skip
    # With another DINO there is a column for each.
    other = [replace(score, values={"DINO ViT-B/16": 0.5}) for score in scores]
    table = tables(Results(other, {}, FACTS, prompts))[-1]
    assert table.head[2:4] == ["DINO ViT-B/16", DINO]


@pytest.mark.parametrize(
    "case", ["an image less", "a subject less", "a prompt less", "other prompts", "real ones alone"]
)
def test_published_rows_only_beside_the_whole_protocol(case):
    scores, real, prompts = whole_protocol()
    if case == "an image less":
        scores = scores[1:]
    elif case == "a subject less":
        scores = [replace(s, subject="s0") if s.subject == "s1" else s for s in scores]
        del real["s1"]
    elif case == "a prompt less":  # and as many images of the others
        scores = [s for s in scores if s.prompt != "prompt 0"]
        again = (" 1", " 2", " 3", " 4")
        scores += [replace(s, number=4) for s in scores if s.prompt[-2:] in again][::4]
        assert sum(s.prompt != "added" for s in scores) == 3000
    elif case == "other prompts":
        prompts = set()
    else:
        scores = []
    text = tables_markdown(Results(scores, real, FACTS, prompts))
    assert ("published" in text) == ("DreamBooth's 25 prompts" in text) == (case == "real ones alone")


def test_markdown_keeps_hostile_names_in_their_cells():
    scores = [replace(score, method=HOSTILE) for score in SCORES[:4]]
    text = tables_markdown(Results(scores, {}, {HOSTILE: HOSTILE}))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert "<script" not in text and "- &lt;script" in text


# --- chart -------------------------------------------------------------------------------------------


def test_dots_stand_where_their_values_say():
    """Larger values lie further to the right, each in its row; equal values stay apart."""
    red, blue, cfg = (255, 0, 0), (0, 0, 255), DotsConfig()
    series = [Series("a", {"x": 0.0, "y": 1.0}, red), Series("b", {"x": 0.0, "y": 0.5}, blue, shape=1)]
    image = np.asarray(dots(["y", "x"], [Panel("t", series)], "", cfg)).astype(int)
    top = cfg.gap + 2 * cfg.line

    def centre(colour: tuple[int, int, int], row: int) -> tuple[float, float]:
        ys, xs = np.nonzero((image[top + row * cfg.row :][: cfg.row] == colour).all(axis=2))
        return xs.mean(), ys.mean()

    (red_y, blue_y), (red_x, blue_x) = ([centre(colour, row) for colour in (red, blue)] for row in (0, 1))
    assert red_y[0] > blue_y[0] > red_x[0] and abs(red_x[0] - blue_x[0]) < 1
    assert red_x[1] != blue_x[1] and red_y[1] != blue_y[1]
    assert all((image[:top] == colour).all(axis=2).any() for colour in (red, blue)), "the legend"


def test_chart_grows_with_its_subjects_and_cuts_long_names():
    cfg, series = DotsConfig(), {f"{'long name ' * 9}{i}": 0.5 for i in range(30)}
    image = dots(list(series), [Panel("t", [Series("a", series, (9, 9, 9))])], "c", cfg)
    assert image.width < cfg.names + cfg.panel + 4 * cfg.gap
    assert image.height - dots([], [], "nothing", cfg).height >= 30 * cfg.row


# --- page --------------------------------------------------------------------------------------------


def test_page_refers_only_to_files_beside_it(folder):
    names = ["a b#1%.png", "q?.png", "dir/ü.png"]
    (folder / "dir").mkdir()
    for name in names:
        (folder / "x.png").rename(folder / name) if name == names[-1] else Image.new("RGB", (32, 32)).save(
            folder / name
        )
    scores = [replace(score, file=names[i % 3]) for i, score in enumerate(SCORES)]
    write_outputs(folder, scores, FOUND, FACTS, {"cat": [folder.parent / "photo.jpg"] * 2})
    page = read(folder / "index.html")
    assert {unquote(link) for link in page.links} == {
        *names,
        "subjects.png",
        "real/000-0.jpg",
        "real/000-1.jpg",
    }
    assert all((folder / unquote(link)).is_file() for link in page.links)
    assert max(Image.open(folder / "real/000-0.jpg").size) == PageConfig().side
    images = page.of("img", loading="lazy")
    assert len(images) == len(SCORES) + 2 and all(image["alt"] for image in page.of("img"))
    # The photos come first, then the images by prompt and method, each with its scores.
    assert [image["alt"] for image in images[:4]] == [
        "Real image 1 of cat", "Real image 2 of cat",
        "one: a cat in the snow (cat, image 1)", "one: a cat in the snow (cat, image 2)",
    ]  # fmt: skip
    (texture,) = page.of("figure", **{"data-kind": "texture"})
    assert texture["data-values"] == "0.2 0.9 -" and "0.900 CLIP-I" in page.text
    assert "0.750 (0.700 to 0.800)" in page.text


def test_page_escapes_every_text(folder):
    scores = [
        Score(HOSTILE, HOSTILE, HOSTILE, "context", HOSTILE, 0, "x.png", {HOSTILE: 0.5}),
        Score("${title} $x", "s", "l", "texture", "${sections}", 0, "x.png", {HOSTILE: 0.5}),
    ]
    photos = {HOSTILE: [folder.parent / "photo.jpg"]}
    write_outputs(folder, scores, {HOSTILE: {HOSTILE: 0.1}}, {HOSTILE: HOSTILE}, photos)
    page = read(folder / "index.html")
    assert len(page.of("script")) == 1 and page.of("script") == [{}]
    first, second = page.of("figure", **{"class": "shot"})
    assert first["data-subject"] == first["data-method"] == HOSTILE and second["data-method"] == "${title} $x"
    assert HOSTILE in [option["value"] for option in page.of("option")]
    assert all((folder / unquote(link)).resolve().is_relative_to(folder) for link in page.links)


def test_embedded_page_is_a_single_file(folder, tmp_path):
    Image.new("RGB", (300, 600), (200, 40, 40)).save(folder / "x.png")
    results, path = Results(SCORES, FOUND, FACTS), tmp_path / "one.html"
    photos = {"dog": [folder.parent / "photo.jpg"]}
    write_page(path, folder, results, photos, PageConfig(embed=True, side=50, subjects=1, numbers=1))
    page = read(path)
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    rest = re.sub(r"data:image/[^\"]*", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|//", rest)
    # One subject, one image of each method and prompt, of seven.
    assert len(page.of("figure", **{"class": "shot"})) == 2 and "2 of 7 images are shown" in page.text
    assert not (folder / "real").exists()


def test_transparent_parts_of_photos_are_white(folder):
    """As methods and scorers see them, whatever colour lies below."""
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "clear.png")
    write_outputs(folder, [], FOUND, FACTS, {"cat": [folder / "clear.png"]})
    assert np.asarray(Image.open(folder / "real/000-0.jpg")).min() > 250

    class Seen:
        def embed_images(self, images):
            return images

    ((seen,),) = embed_files([Seen()], [folder / "clear.png"])
    assert seen.mode == "RGB" and seen.getextrema() == ((255, 255),) * 3


def test_real_images_alone(folder):
    write_outputs(folder, [], FOUND, FACTS, {"cat": [folder.parent / "photo.jpg"]})
    page = read(folder / "index.html")
    assert "0.750 (0.700 to 0.800)" in page.text and len(page.of("section")) == 2
    assert Image.open(folder / "subjects.png").height > 2 * DotsConfig().row


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "missing.png"}, "missing.png"),
        ({"file": "/etc/passwd"}, "/etc/passwd"),
        ({"values": {DINO: float("nan")}}, "DINO ViT-S/16 is nan"),
        ({"kind": "style"}, "kind 'style'"),
        ({"method": "Real images"}, "Real images"),
    ],
)
def test_what_cannot_be_written_is_refused_first(folder, change, said):
    with pytest.raises(ValueError, match=said) as error:
        write_outputs(folder, [*SCORES, replace(SCORES[0], **change)], FOUND, FACTS)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["x.png"]
