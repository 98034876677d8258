"""Results of an evaluation as numbers: JSON, CSV, and tables beside what papers give."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from moma.estimates import Estimate, estimate
from moma.evaluate.published import NOTE, PICTURES, SUBJECTS, UNSTATED, Published
from moma.evaluate.scores import Score
from moma.output import markdown_table

FORMAT, VERSION = "moma-scores", 1
REAL = "Real images"
TITLES = {"context": "New contexts", "texture": "New textures"}  # of each kind of prompt
FIELDS = ("method", "subject", "label", "kind", "prompt", "number", "file")  # of the CSV, then the columns
NONE = "—"  # in a table, where there is no value
INTERVAL = """Means over pictures; brackets hold 95% intervals, by bootstrap over subjects, where there are
several. Real images: the photos of each subject against each other, every subject counting alike."""

Means = Mapping[str, Estimate]  # column -> average


@dataclass(frozen=True)
class Results:
    """What was measured. Orders are those of first appearance."""

    scores: Sequence[Score]
    real: Mapping[str, Mapping[str, float]]  # subject -> column -> mean over pairs of its photos
    facts: Mapping[str, str]  # what the scores depend on: bundle, dataset, steps, hashes ...
    published: Sequence[Published] = ()  # for a dataset and prompts that are the papers'

    @cached_property
    def columns(self) -> list[str]:
        rows = [*(score.values for score in self.scores), *self.real.values()]
        return list(dict.fromkeys(name for row in rows for name in row))

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(score.method for score in self.scores))

    @cached_property
    def kinds(self) -> list[str]:
        """Those that there are pictures of; the first one where there are only real pictures."""
        return [kind for kind in TITLES if any(s.kind == kind for s in self.scores)] or [next(iter(TITLES))]

    @cached_property
    def subjects(self) -> dict[str, str]:
        """Name -> class word, empty where it is not known."""
        return dict.fromkeys(self.real, "") | {score.subject: score.label for score in self.scores}

    def means(self, kind: str) -> dict[str, Means]:
        """The real pictures and each method that has pictures of the kind -> averages."""
        rows: dict[str, list[tuple[str, Mapping[str, float]]]] = {}
        if self.real:
            rows[REAL] = list(self.real.items())
        for score in self.scores:
            if score.kind == kind:
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
    def whole_protocol(self) -> bool:
        """Whether there are as many subjects and pictures as published averages are of."""
        counts = dict.fromkeys(self.methods, 0)
        for score in self.scores:
            counts[score.method] += score.kind == "context"
        return len(self.subjects) == SUBJECTS and all(count == PICTURES for count in counts.values())

    @property
    def shown(self) -> Sequence[Published]:
        """Published rows that may stand beside these."""
        return self.published if self.whole_protocol else ()

    @property
    def notes(self) -> str:
        return f"{INTERVAL}\n{NOTE}" if self.shown else INTERVAL

    def check(self, folder: Path) -> None:
        """ValueError for what cannot be written, or shown from a page in the folder."""
        if REAL in self.methods:
            raise ValueError(f"method {REAL!r}: expected another name, this is that of the photos' row")
        for score in self.scores:
            place = PurePosixPath(score.file)
            if place.is_absolute() or not (folder / place).is_file():
                raise ValueError(f"score of {score.file!r}: expected the path of a picture from {folder}")
            if score.kind not in TITLES:
                raise ValueError(
                    f"score of {score.file!r}: kind {score.kind!r}, expected {' or '.join(TITLES)}"
                )
        for name, values in [*((s.file, s.values) for s in self.scores), *self.real.items()]:
            if bad := [column for column, value in values.items() if not math.isfinite(value)]:
                raise ValueError(f"score of {name!r}: {bad[0]} is {values[bad[0]]}, expected a number")


# --- numbers -----------------------------------------------------------------------------------------


def scores_json(results: Results) -> str:
    """Everything that was measured. An interval's ends are null where there is one subject only."""
    averages = {
        kind: {
            row: {column: _numbers(found) for column, found in means.items()}
            for row, means in results.means(kind).items()
        }
        for kind in results.kinds
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
    """A line for each picture; a column that it lacks stays empty."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*FIELDS, *results.columns])
    for score in results.scores:
        values = (score.values.get(column, "") for column in results.columns)
        lines.writerow([*(getattr(score, name) for name in FIELDS), *values])
    return text.getvalue()


# --- tables ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    cells: Sequence[str]  # name, pictures, then one for each column
    published: bool = False


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Row]


def tables(results: Results) -> list[Table]:
    """One for each kind of prompt: what was measured, and beside it what papers say."""
    return [_table(results, kind, results.shown if kind == "context" else ()) for kind in results.kinds]


def _table(results: Results, kind: str, published: Sequence[Published]) -> Table:
    measured = results.means(kind)
    used = {column for row in (*measured.values(), *(p.values for p in published)) for column in row}
    every = [*results.columns, *sorted(used - set(UNSTATED)), *UNSTATED]
    columns = [column for column in dict.fromkeys(every) if column in used]
    rows = []
    for name, means in measured.items():
        count = max((found.count for found in means.values()), default=0)
        said = _subjects(len(results.real)) if name == REAL else str(count)
        rows.append(Row([name, said, *(_cell(means.get(column)) for column in columns)]))
    for row in published:
        said = str(row.pictures) if row.pictures else _subjects(SUBJECTS)
        cells = (f"{row.values[column]:.3f}" if column in row.values else NONE for column in columns)
        rows.append(Row([f"{row.name} (published)", said, *cells], published=True))
    return Table(TITLES[kind], ["method", "pictures", *columns], rows)


def _subjects(count: int) -> str:
    return f"of {count} subject{'s' * (count != 1)}"


def _cell(found: Estimate | None) -> str:
    if found is None:
        return NONE
    ends = "" if math.isnan(found.low) else f" ({found.low:.3f} to {found.high:.3f})"
    return f"{found.mean:.3f}{ends}"


def tables_markdown(results: Results) -> str:
    """The tables, their notes and the facts: a part of a page."""
    parts = []
    for table in tables(results):
        text = markdown_table(_safe(table.head), (_safe(row.cells) for row in table.rows))
        parts.append(f"### {table.title}\n\n{text}")
    parts.append(f"{results.notes}\n")
    if results.facts:
        parts.append("".join("- {}: {}\n".format(*_safe(fact)) for fact in results.facts.items()))
    return "\n".join(parts)


def _safe(texts: Iterable[str]) -> list[str]:
    """Texts that stay within their cells and lines of Markdown, and begin no tag."""
    return [" ".join(text.replace("|", "\\|").replace("<", "&lt;").split()) for text in texts]


def tables_html(results: Results) -> str:
    parts = []
    for table in tables(results):
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
        parts.append(f'<div class="scroll"><table>\n<caption>{table.title}</caption>\n<tr>{head}</tr>\n')
        for row in table.rows:
            name, *cells = map(escape, row.cells)
            style = ' class="published"' if row.published else ""
            rest = "".join(f"<td>{text}</td>" for text in cells)
            parts.append(f'<tr{style}><th scope="row">{name}</th>{rest}</tr>\n')
        parts.append("</table></div>\n")
    return "".join(parts)
