"""Results of an evaluation as JSON, CSV, and tables beside those of papers."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from moma.app.files import counted, markdown_table
from moma.evaluate.estimates import Estimate, estimate
from moma.evaluate.published import (
    DREAMBOOTH,
    IMAGES,
    NOTE,
    PER_PROMPT,
    PROMPTS,
    SUBJECTS,
    UNSTATED,
    Published,
)
from moma.evaluate.scores import Score

FORMAT, VERSION = "moma-scores", 1
REAL = "Real images"
KINDS = {"context": "New contexts", "texture": "New textures"}  # kind of prompts -> title
WHOLE = "dreambooth"  # the images that published averages cover, of both kinds
TITLES = KINDS | {WHOLE: "DreamBooth's 25 prompts"}
FIELDS = ("method", "subject", "label", "kind", "prompt", "number", "file")  # of the CSV, before the columns
FORMULA = tuple("=+-@|%＝＋－＠")  # what spreadsheets compute or run, also in full width
NONE = "—"  # a missing value in a table
INTERVAL = """Means over images, with 95% intervals by bootstrap over subjects in brackets where there are
several. Real images: the photos of each subject compared with each other; every subject counts alike."""

Means = Mapping[str, Estimate]  # column -> average


@dataclass(frozen=True)
class Results:
    """What was measured, in order of first appearance."""

    scores: Sequence[Score]
    real: Mapping[str, Mapping[str, float]]  # subject -> column -> mean over pairs of its photos
    facts: Mapping[str, str]  # what the scores depend on: bundle, dataset, steps ...
    dreambooth: Collection[str] = ()  # DreamBooth's prompts, if the subjects are its own

    @cached_property
    def columns(self) -> list[str]:
        """Of all scores."""
        rows = [*(score.values for score in self.scores), *self.real.values()]
        return list(dict.fromkeys(name for row in rows for name in row))

    @cached_property
    def methods(self) -> list[str]:
        """Of all scores."""
        return list(dict.fromkeys(score.method for score in self.scores))

    @cached_property
    def kinds(self) -> dict[str, list[Score]]:
        """Kind -> its images, for kinds with images; {"context": []} where there are only real ones."""
        found = {kind: [score for score in self.scores if score.kind == kind] for kind in KINDS}
        return {kind: scores for kind, scores in found.items() if scores} or {"context": []}

    @cached_property
    def whole(self) -> list[Score] | None:
        """The images of DreamBooth's protocol by methods that drew all of it; None without such a method.

        Only these, or real images alone, compare with published averages.
        """
        if not self.dreambooth or len(self.subjects) != SUBJECTS:
            return None
        own = [score for score in self.scores if score.prompt in self.dreambooth]
        mine = {method: [score for score in own if score.method == method] for method in self.methods}
        done = [score for scores in mine.values() if _complete(scores) for score in scores]
        return done if done or not self.scores else None

    @cached_property
    def subjects(self) -> dict[str, str]:
        """Name -> class word, "" where it is unknown."""
        return dict.fromkeys(self.real, "") | {score.subject: score.label for score in self.scores}

    @cached_property
    def means(self) -> dict[str, dict[str, Means]]:
        """Kind of prompts, or `WHOLE` -> real images or method -> averages."""
        groups = self.kinds if self.whole is None else self.kinds | {WHOLE: self.whole}
        return {name: self._rows(scores) for name, scores in groups.items()}

    def _rows(self, scores: Sequence[Score]) -> dict[str, Means]:
        rows: dict[str, list[tuple[str, Mapping[str, float]]]] = {}
        if self.real:
            rows[REAL] = list(self.real.items())
        for score in scores:
            rows.setdefault(score.method, []).append((score.subject, score.values))
        return {name: self._average(row) for name, row in rows.items()}

    def _average(self, rows: Sequence[tuple[str, Mapping[str, float]]]) -> Means:
        means = {}
        for column in self.columns:
            here = [(subject, values[column]) for subject, values in rows if column in values]
            if here:
                values = torch.tensor([value for _, value in here], dtype=torch.float64)  # (N,)
                means[column] = estimate(values, [subject for subject, _ in here])
        return means

    @property
    def notes(self) -> str:
        """What the tables mean."""
        return INTERVAL if self.whole is None else f"{INTERVAL}\n{NOTE}"

    def check(self, folder: Path) -> None:
        """ValueError for scores that cannot be written, or images that a page in the folder cannot show."""
        if REAL in self.methods:
            raise ValueError(f"method {REAL!r}: expected another name, this one is the photos'")
        for score in self.scores:
            place = PurePosixPath(score.file)
            if place.is_absolute() or not (folder / place).is_file():
                raise ValueError(f"score of {score.file!r}: expected the path of an image from {folder}")
            if score.kind not in KINDS:
                raise ValueError(
                    f"score of {score.file!r}: kind {score.kind!r}, expected {' or '.join(KINDS)}"
                )
        for name, values in [*((s.file, s.values) for s in self.scores), *self.real.items()]:
            if bad := [column for column, value in values.items() if not math.isfinite(value)]:
                raise ValueError(f"score of {name!r}: {bad[0]} is {values[bad[0]]}, expected a number")


def _complete(scores: Sequence[Score]) -> bool:
    """Whether a method's images of DreamBooth's prompts are the whole protocol: 4 per subject and prompt."""
    counts = Counter((score.subject, score.prompt) for score in scores)
    numbers = {(score.subject, score.prompt, score.number) for score in scores if score.number < PER_PROMPT}
    return len(counts) == SUBJECTS * PROMPTS and len(numbers) == len(scores) == IMAGES


# --- numbers -----------------------------------------------------------------------------------------


def scores_json(results: Results) -> str:
    """Everything that was measured. The ends of an interval are null for a single subject."""
    averages = {
        name: {
            row: {column: _numbers(found) for column, found in means.items()} for row, means in rows.items()
        }
        for name, rows in results.means.items()
    }
    data = {
        "format": FORMAT,
        "version": VERSION,
        "facts": dict(results.facts),
        "columns": results.columns,
        "averages": averages,
        "real": {subject: dict(values) for subject, values in results.real.items()},
        "scores": [asdict(score) for score in results.scores],
    }
    return json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _numbers(found: Estimate) -> dict[str, float | int | None]:
    return {name: None if math.isnan(value) else value for name, value in found._asdict().items()}


def scores_csv(results: Results) -> str:
    """A line per image; missing values stay empty. An apostrophe keeps texts from being read as formulas."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    rows = [[*FIELDS, *results.columns]]
    for score in results.scores:
        values = (score.values.get(column, "") for column in results.columns)
        rows.append([*(getattr(score, name) for name in FIELDS), *values])
    lines.writerows(
        [f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(FORMULA) else cell for cell in row]
        for row in rows
    )
    return text.getvalue()


# --- tables ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    cells: Sequence[str]  # name, images, then one per column
    published: bool = False


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Row]


def tables(results: Results) -> list[Table]:
    """One per kind of prompts, and one beside published averages where they compare."""
    return [_table(results, name, DREAMBOOTH if name == WHOLE else ()) for name in results.means]


def _table(results: Results, name: str, published: Sequence[Published]) -> Table:
    measured = results.means[name]
    used = {column for row in (*measured.values(), *(p.values for p in published)) for column in row}
    every = [*results.columns, *sorted(used - set(UNSTATED)), *UNSTATED]
    columns = [column for column in dict.fromkeys(every) if column in used]
    rows = []
    for row, means in measured.items():
        count = max((found.count for found in means.values()), default=0)
        said = _subjects(len(results.real)) if row == REAL else str(count)
        rows.append(Row([row, said, *(_cell(means.get(column)) for column in columns)]))
    for paper in published:
        said = str(paper.images) if paper.images else _subjects(SUBJECTS)
        cells = (f"{paper.values[column]:.3f}" if column in paper.values else NONE for column in columns)
        rows.append(Row([f"{paper.name} (published)", said, *cells], published=True))
    return Table(TITLES[name], ["method", "images", *columns], rows)


def _subjects(count: int) -> str:
    return f"of {counted(count, 'subject')}"


def _cell(found: Estimate | None) -> str:
    if found is None:
        return NONE
    ends = "" if math.isnan(found.low) else f" ({found.low:.3f} to {found.high:.3f})"
    return f"{found.mean:.3f}{ends}"


def tables_markdown(results: Results) -> str:
    """The tables, their notes and the facts."""
    parts = []
    for table in tables(results):
        text = markdown_table(_safe(table.head), (_safe(row.cells) for row in table.rows))
        parts.append(f"### {table.title}\n\n{text}")
    parts.append(f"{results.notes}\n")
    if results.facts:
        parts.append("".join("- {}: {}\n".format(*_safe(fact)) for fact in results.facts.items()))
    return "\n".join(parts)


def _safe(texts: Iterable[str]) -> list[str]:
    """Escape texts for a cell of a Markdown table."""
    return [" ".join(text.replace("|", "\\|").replace("<", "&lt;").split()) for text in texts]


def tables_html(results: Results) -> str:
    """The tables alone."""
    parts = []
    for table in tables(results):
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
        parts.append(
            f'<div class="scroll"><table>\n<caption>{escape(table.title)}</caption>\n<tr>{head}</tr>\n'
        )
        for row in table.rows:
            name, *cells = map(escape, row.cells)
            style = ' class="published"' if row.published else ""
            rest = "".join(f"<td>{text}</td>" for text in cells)
            parts.append(f'<tr{style}><th scope="row">{name}</th>{rest}</tr>\n')
        parts.append("</table></div>\n")
    return "".join(parts)
