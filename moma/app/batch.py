"""Many references in one run (sample.py --batch-refs): each draws into a folder of its own.

What a folder has already, with the settings that are asked for, stays; so a run that was stopped goes on.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from moma.app.files import counted, write_text
from moma.app.options import Request
from moma.app.record import OUTPUTS, Record, read_record
from moma.app.subjects import FoundImage, images_of

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("batch.html")
CHUNK = 64  # subjects whose references are in memory together


@dataclass(frozen=True)
class Plan:
    """A subject that is to be drawn."""

    args: argparse.Namespace  # as if it were the only one
    request: Request
    texts: Mapping[str, Any]  # each prompt, read
    records: Sequence[Record]  # of each image
    there: dict[int, Path]  # images that the folder has, more and more of them

    @property
    def folder(self) -> Path:
        """Of its images."""
        return self.args.out

    @property
    def missing(self) -> list[int]:
        """The images to draw: all of a batch, so that every bit is the same, if one of it is not there."""
        size = self.request.sample.batch_size
        starts = range(0, len(self.records), size)
        batches = [range(len(self.records))[start : start + size] for start in starts]
        return [i for batch in batches if any(j not in self.there for j in batch) for i in batch]

    @property
    def stamp(self) -> str:
        """Changes with the records, and with which images are there."""
        told = [*(_settings(one).to_json() for one in self.records), str(sorted(self.there))]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()


class Failures:
    """What went wrong with which subject; the others are not kept from being drawn."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def told(self, name: str) -> Iterator[None]:
        """Keep and print what is wrong with a subject."""
        try:
            yield
        except ValueError as error:
            self.reasons[name] = " ".join(str(error).split())
            tqdm.write(f"error: {name}: {self.reasons[name]}")

    def check(self, subjects: int) -> None:
        """ValueError if anything went wrong; subjects: how many there are."""
        if self.reasons:
            names = ", ".join(list(self.reasons)[:5]) + ", ..." * (len(self.reasons) > 5)
            of = counted(subjects, "subject")
            raise ValueError(f"{len(self.reasons)} of {of} could not be drawn: {names}")


def each_subject(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The options of each subject, as if it were the only one, by the name of its folder.

    Raises:
        ValueError: for what is wrong whatever the subjects are.
    """
    folder = args.batch_refs
    if not folder.is_dir():
        raise ValueError(f"--batch-refs {folder}: not a folder, expected one with images of subjects")
    for name in ("subject", "mask", "object", "strength", "region", "face_file", "face_number"):
        if len(values := getattr(args, name) or ()) > 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: {len(values)} given, expected one for all of --batch-refs")
    beside = {}
    for name in ("mask", "face_file"):
        if (getattr(args, name) or [None])[0]:
            beside[name] = _named(f"--{name.replace('_', '-')}", getattr(args, name)[0])
    return {
        name: argparse.Namespace(
            **{
                **vars(args),
                **{option: [files.get(name, args.batch_refs / name)] for option, files in beside.items()},
                "ref": [ref],
                "out": args.out / name,
            }
        )
        for name, ref in _named("--batch-refs", folder).items()
    }


def _named(option: str, folder: Path) -> dict[str, Path]:
    """What a folder has, by the names of subjects: those of files without their ends."""
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: expected a folder with a file or folder for each subject")
    named: dict[str, Path] = {}
    for path in images_of(folder):
        name = path.name if path.is_dir() else path.stem
        if other := next((named[one] for one in named if one.casefold() == name.casefold()), None):
            raise ValueError(f"{option}: {other} and {path} have one name, rename one of them")
        if name.casefold() == PAGE:
            raise ValueError(f"{option}: {path} has the name of the page, rename it")
        named[name] = path
    if not named:
        raise ValueError(f"{option} {folder}: has no images")
    return named


def with_masks(request: Request, found: Sequence[FoundImage]) -> Request:
    """With the masks that were found, so that SAM is not asked again.

    Args:
        request: of subjects.
        found: every image of them.
    """
    rest = iter(found)
    subjects = tuple(
        replace(
            subject,
            images=tuple(
                replace(one, pick=None, segmented=next(rest).record.segmented) for one in subject.images
            ),
        )
        for subject in request.subjects
    )
    return replace(request, subjects=subjects)


def _settings(record: Record) -> Record:
    """Without the machine, which may be another one."""
    return replace(record, device="", versions={})


def there(folder: Path, records: Sequence[Record], kind: str) -> dict[int, Path]:
    """Which images a folder has already: number -> file, by the settings in the files, not by names.

    Args:
        folder: of a subject.
        records: of the images that are asked for.
        kind: of files that are asked for, a name of `OUTPUTS`.
    """
    wanted = {_settings(Record.from_json(one.to_json())).to_json(): i for i, one in enumerate(records)}
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*-seed*{OUTPUTS[kind].suffix}")):
        try:
            i = wanted.get(_settings(read_record(path)).to_json())
        except ValueError:  # damaged, or something else
            continue
        if i is not None:
            found.setdefault(i, path)
    return found


@contextmanager
def one_bar(images: Sequence[int]) -> Iterator[list[Callable[[Any], None]]]:
    """A progress bar of all images; of each subject, what is called after a step.

    Args:
        images: how many of each subject.
    """
    with tqdm(total=sum(images), unit="image") as bar:

        def advance(i: int, progress: Any) -> None:
            bar.n = round(sum(images[:i]) + images[i] * progress.done / progress.total, 1)
            bar.refresh()

        yield [partial(advance, i) for i in range(len(images))]


def write_index(folder: Path, plans: Sequence[tuple[Plan, Path]], failures: Mapping[str, str]) -> Path:
    """Write a page with every subject's sheet and images, which needs no network.

    Args:
        folder: of the page.
        plans: subjects, and their sheets.
        failures: subject -> what is wrong with it.
    """

    def link(path: Path) -> str:
        return quote(path.relative_to(folder).as_posix(), errors="surrogateescape")

    def text(value: str) -> str:
        return escape(value.encode("utf-8", "backslashreplace").decode())

    sections = []
    for plan, sheet in plans:
        name, count = text(plan.folder.name), len(plan.records)
        links = ", ".join(
            f'<a href="{link(plan.there[i])}">{text(plan.there[i].stem)}</a>'
            for i in range(count)
            if i in plan.there
        )
        sections.append(
            f"<section><h2>{name} <small>{text(plan.request.words[0])}, {len(plan.there)} of"
            f" {counted(count, 'image')}</small></h2>\n"
            f'<a href="{link(sheet)}"><img loading="lazy" src="{link(sheet)}"'
            f' alt="Sheet of {name}"></a>\n<p>{links}</p></section>\n'
        )
    sections += [
        f"<section><h2>{text(name)}</h2>\n<p><strong>Not drawn:</strong> {text(why)}</p></section>\n"
        for name, why in failures.items()
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=counted(len(plans), "subject") + bool(failures) * f", {len(failures)} not drawn",
        sections="".join(sections),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE
