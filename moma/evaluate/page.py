"""Write an evaluation's results: numbers, the chart of Fig. 7, and a page of the images with their scores.

The page opens from disk and needs no network.
"""

import base64
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from PIL import Image

from moma.app.chart import Colour, DotsConfig, Panel, Series, dots
from moma.app.files import write_bytes, write_text
from moma.app.record import save_png
from moma.evaluate.scores import Score, averages
from moma.evaluate.tables import KINDS, REAL, Results, scores_csv, scores_json, tables_html, tables_markdown
from moma.inputs.preprocess import encoded, on_white, open_image

TEMPLATE = Path(__file__).with_name("page.html")
CHART = "subjects.png"


@dataclass(frozen=True)
class PageConfig:
    """Which images the page shows, and how."""

    embed: bool = False  # one file with small images in it
    side: int = 192  # pixels, longer side of embedded images and of real photos
    quality: int = 85  # JPEG quality of those images
    real: int = 6  # photos shown per subject; DreamBooth has at most 6
    subjects: int | None = None  # only the first; None = all
    numbers: int | None = None  # images per method, subject and prompt; None = all
    across: int = 6  # images side by side for one prompt, at most
    colours: tuple[Colour, ...] = (  # of methods, distinguishable by colour-blind readers
        (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
    )  # fmt: skip
    grey: Colour = (110, 110, 110)  # of the real photos
    chart: DotsConfig = DotsConfig()  # noqa: RUF009 (frozen)


def write_outputs(
    folder: Path,
    scores: Sequence[Score],
    real: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, str],
    photos: Mapping[str, Sequence[Path]] | None = None,
    dreambooth: Collection[str] = (),
    cfg: PageConfig | None = None,
) -> None:
    """Write scores.json, scores.csv, table.md, subjects.png and index.html.

    Args:
        folder: of the images.
        scores: one per image.
        real: subject -> column -> score of its own photos.
        facts: what the scores depend on.
        photos: subject -> its photos, the reference first; small copies go to `real/`.
        dreambooth: DreamBooth's own prompts if the subjects are its own too: methods that drew them all are
            compared with published averages.
        cfg: what the page shows.

    Raises:
        ValueError: before anything is written, for a missing image or a score that is not finite.
    """
    cfg, results = cfg or PageConfig(), Results(scores, real, facts, dreambooth)
    results.check(folder)
    write_text(folder / "scores.json", scores_json(results))
    write_text(folder / "scores.csv", scores_csv(results))
    write_text(folder / "table.md", tables_markdown(results))
    save_png(folder / CHART, _subjects_chart(results, cfg))
    write_page(folder / "index.html", folder, results, photos or {}, cfg)


# --- chart -------------------------------------------------------------------------------------------


def _subjects_chart(results: Results, cfg: PageConfig) -> Image.Image:
    """Fig. 7: each method's scores on each subject, a chart per kind of prompts, one below the other."""
    charts = [_kind_chart(results, kind, cfg) for kind in results.kinds]
    size = max(image.width for image in charts), sum(image.height for image in charts)
    sheet, y = Image.new("RGB", size, cfg.chart.background), 0
    for image in charts:
        sheet.paste(image, (0, y))
        y += image.height
    return sheet


def _kind_chart(results: Results, kind: str, cfg: PageConfig) -> Image.Image:
    """Subjects are sorted by the first method's score in the first column, best first."""
    found: dict[str, dict[str, Mapping[str, float]]] = {method: {} for method in results.methods}
    for (method, subject), average in averages(results.kinds[kind], "method", "subject").items():
        found[method][subject] = average.values
    colours = _method_colours(results, cfg)
    panels: dict[str, list[Series]] = {}
    for column in results.columns:
        real = Series(REAL, _column(results.real, column), cfg.grey, hollow=True)
        panels[column] = [
            Series(method, _column(rows, column), colours[method], shape)
            for shape, (method, rows) in enumerate(found.items())
        ] + [real]
    panels = {column: series for column, series in panels.items() if any(one.values for one in series)}
    if not panels:
        return dots([], [], "No scores", cfg.chart)
    column = next(iter(panels))
    first = next(one for one in panels[column] if one.values)
    seen = {subject for series in panels.values() for one in series for subject in one.values}
    rows = sorted(seen, key=lambda subject: (-first.values.get(subject, -math.inf), subject))
    shown = [Panel(f"{KINDS[kind]}: {column}", series) for column, series in panels.items()]
    return dots(rows, shown, f"Mean of each subject; sorted by {column} of {first.name}", cfg.chart)


def _column(rows: Mapping[str, Mapping[str, float]], column: str) -> dict[str, float]:
    return {name: values[column] for name, values in rows.items() if column in values}


def _method_colours(results: Results, cfg: PageConfig) -> dict[str, Colour]:
    return {name: cfg.colours[i % len(cfg.colours)] for i, name in enumerate(results.methods)}


# --- the page ----------------------------------------------------------------------------------------


def write_page(
    path: Path, folder: Path, results: Results, photos: Mapping[str, Sequence[Path]], cfg: PageConfig
) -> None:
    """Write the page.

    Args:
        path: of the page; in `folder`, unless it embeds the images.
        folder: of the images.
        results: their scores.
        photos: subject -> its photos.
        cfg: what the page shows.
    """
    link = partial(_embedded, folder, cfg) if cfg.embed else partial(quote, errors="surrogateescape")
    groups = _groups(results, cfg)
    sections = []
    for number, (subject, prompts) in enumerate(groups.items()):
        files = photos.get(subject, ())[: cfg.real]
        links = [_photo(folder, f"{number:03d}-{i}.jpg", file, cfg) for i, file in enumerate(files)]
        sections.append(_section(results, subject, links, prompts, link, cfg))
    shown = sum(len(group) for prompts in groups.values() for group in prompts.values())
    every = f"{shown} of {len(results.scores)} images are shown." if shown < len(results.scores) else ""
    orders = [
        (f"{i}{sign}", f"{column}, {way} first")
        for i, column in enumerate(results.columns)
        for sign, way in (("-", "highest"), ("+", "lowest"))
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Scores of {', '.join(results.methods) or 'real images'}"),
        tables=tables_html(results),
        notes=escape(results.notes),
        chart=data_uri("png", encoded(_subjects_chart(results, cfg), "PNG")) if cfg.embed else CHART,
        facts="".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in results.facts.items()),
        subjects=_options((name, name) for name in groups),
        kinds=_options((kind, KINDS[kind]) for kind in results.kinds),
        methods=_options((name, name) for name in results.methods),
        orders=_options(orders),
        shown=every,
        across=_across(groups, cfg),
        sections="".join(sections),
    )
    write_text(path, page)


Prompts = dict[tuple[str, str], list[Score]]  # kind and prompt -> images


def _groups(results: Results, cfg: PageConfig) -> dict[str, Prompts]:
    """The subjects and images that are shown; those of a prompt are sorted by method, then by number."""
    groups: dict[str, Prompts] = {subject: {} for subject in list(results.subjects)[: cfg.subjects]}
    for score in results.scores:
        if score.subject in groups:
            groups[score.subject].setdefault((score.kind, score.prompt), []).append(score)
    for prompts in groups.values():
        for key, scores in prompts.items():
            scores.sort(key=lambda score: score.number)
            some = [[s for s in scores if s.method == method][: cfg.numbers] for method in results.methods]
            prompts[key] = [score for found in some for score in found]
    return groups


def _across(groups: Mapping[str, Prompts], cfg: PageConfig) -> int:
    """Images side by side: those of one method, or one per method."""
    every = [Counter(s.method for s in scores) for prompts in groups.values() for scores in prompts.values()]
    most = max((max(counts.values()) for counts in every), default=1)
    return min(cfg.across, most if most > 1 else max(map(len, every), default=1))


def _section(
    results: Results,
    subject: str,
    photos: Sequence[str],
    prompts: Prompts,
    link: Callable[[str], str],
    cfg: PageConfig,
) -> str:
    """A subject: its photos, then its images by prompt."""
    name, label = escape(subject), results.subjects[subject]
    real = "".join(
        f'<figure><img loading="lazy" src="{source}" alt="Real image {i} of {name}"></figure>\n'
        for i, source in enumerate(photos, 1)
    )
    values = ", ".join(f"{c} {v:.3f}" for c, v in results.real.get(subject, {}).items())
    blocks = []
    for (kind, prompt), scores in prompts.items():
        shots = "".join(_shot(results, score, link(score.file), cfg) for score in scores)
        title = f"{escape(prompt)} <small>{escape(kind)}</small>"
        blocks.append(f'<div class="prompt"><h3>{title}</h3>\n<div class="shots">\n{shots}</div></div>\n')
    return (
        f'<section class="subject" data-subject="{name}">\n'
        f"<h2>{name} <small>{escape(label) if label != subject else ''}</small></h2>\n"
        f'<div class="photos">\n{real}</div>\n'
        f'<p class="values">{escape(f"{REAL}: {values}" if values else "")}</p>\n'
        f'<div class="prompts">\n{"".join(blocks)}</div>\n</section>\n'
    )


def _shot(results: Results, score: Score, source: str, cfg: PageConfig) -> str:
    """One image with its scores."""
    method, subject, prompt = escape(score.method), escape(score.subject), escape(score.prompt)
    alt = f"{method}: {prompt} ({subject}, image {score.number + 1})"
    image = f'<img loading="lazy" src="{source}" alt="{alt}">'
    if not cfg.embed:
        image = f'<a href="{source}">{image}</a>'
    values = " ".join(f"{score.values[c]:.6g}" if c in score.values else "-" for c in results.columns)
    lines = "".join(f"<span><em>{v:.3f}</em> {escape(c)}</span>" for c, v in score.values.items())
    colour = "#{:02x}{:02x}{:02x}".format(*_method_colours(results, cfg)[score.method])
    return (
        f'<figure class="shot" data-subject="{subject}" data-kind="{score.kind}" data-method="{method}"'
        f' data-values="{values}">{image}<figcaption><b style="--of: {colour}">{method}</b>'
        f'<span class="where">{subject}: {prompt}</span>{lines}</figcaption></figure>\n'
    )


def _options(choices: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in choices)


def _photo(folder: Path, name: str, file: Path, cfg: PageConfig) -> str:
    """Link to a real photo: embedded, or a small copy beside the images."""
    data = small_jpeg(file, cfg)
    if cfg.embed:
        return data_uri("jpeg", data)
    (folder / "real").mkdir(exist_ok=True)
    write_bytes(folder / "real" / name, data)
    return f"real/{name}"


def _embedded(folder: Path, cfg: PageConfig, file: str) -> str:
    return data_uri("jpeg", small_jpeg(folder / file, cfg))


def small_jpeg(file: Path, cfg: PageConfig) -> bytes:
    """A small copy as JPEG."""
    small = on_white(open_image(file))
    small.thumbnail((cfg.side, cfg.side))
    return encoded(small, "JPEG", quality=cfg.quality)


def data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
