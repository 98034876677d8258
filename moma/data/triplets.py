"""Training samples, from a folder with `metadata.jsonl` or from tar shards."""

import glob
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from models.weights.files import Hashes, parse_json
from moma.data.shards import MOST, NUMBERS, READ, Raw, ReadConfig, read_shard, retried
from moma.inputs.faces import Face
from moma.inputs.preprocess import INPUT, InputConfig, on_white, open_image, open_mask, same_aspect
from moma.methods.prompts import check_prompt, word_ends

METADATA = "metadata.jsonl"
PATHS = ("image", "mask", "reference_image", "reference_mask")  # its fields that name files
FORMATS = ("JPEG", "PNG", "WEBP")  # PIL's others are rare in data sets, and some start programs
# A pixel of a mask is subject above this; between 0 and it lie soft edges and JPEG noise.
HALF = 127
# An RGB image and its subject's mask, mode L of the same size, 255 = subject.
ImageAndMask = tuple[Image.Image, Image.Image]


@dataclass(frozen=True, eq=False)
class Triplet:
    """One training sample: an image, its subject's mask, and the texts."""

    key: str  # names the sample in messages and caches
    image: Image.Image  # RGB
    mask: Image.Image  # L, of the image's size, 255 = subject
    label: str
    caption: str  # names the label
    reference: ImageAndMask | None = None  # another image of the subject; None: `image` itself
    end: int | None = None  # of the label's word in the caption, in characters; None: it is looked for
    face: Face | None = None  # a person's, in the reference
    others: tuple["Triplet", ...] = ()  # the image's further subjects


class Files(NamedTuple):
    """A sample's encoded files."""

    key: str
    texts: dict[str, Any]
    # Of each subject (image, mask) and, if there is one, (reference, its mask); the image is the same.
    subjects: list[list[tuple[bytes, bytes]]]


class Source(Protocol):
    """Numbered shards of samples; each is read from its beginning."""

    shards: Sequence[str]  # names

    def read(self, shard: int) -> Iterator[Raw]:
        """The samples of a shard in order, undecoded; one that cannot be read is a `Raw` with a fault."""

    def files(self, raw: Raw) -> Files:
        """The sample's encoded files; ValueError or OSError if it is incomplete or cannot be read."""

    def names(self) -> str:
        """Identifies which samples there should be, independent of the folder's path; looks at no content."""

    def digests(self, shard: int, size: int) -> list[str]:
        """Identify the content of a shard: of each `size` samples in turn, or of all of it at once."""

    def fingerprint(self) -> str:
        """Identifies the data with its content, independent of the folder's path."""


class FolderSource:
    """A folder whose `metadata.jsonl` has a line {"image", "mask", "label", "caption"} per sample.

    Paths are relative to the folder. Optional fields: "key", which should be unique, "reference_image" with
    "reference_mask", "end", "face" and "others" (`moma/data/shards.py`), each of which has a "mask" and may
    have a reference.
    """

    shards = (METADATA,)

    def __init__(self, folder: Path, cfg: ReadConfig = READ) -> None:
        self.folder, self.cfg, self.hashes = folder, cfg, Hashes.below(folder)
        with (folder / METADATA).open("rb") as file:
            if not any(map(bytes.strip, file)):
                raise ValueError(
                    f"{str(folder / METADATA)!r} is empty: expected one JSON line for each sample"
                )

    def read(self, shard: int) -> Iterator[Raw]:
        number = 0
        try:
            with (self.folder / self.shards[shard]).open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield Raw(f"{METADATA}:{number}", {"json": line})
        except OSError as error:
            yield Raw(f"{METADATA}:{number + 1}", fault=f"it cannot be read ({error})")

    def files(self, raw: Raw) -> Files:
        texts = _texts(raw.fields["json"])
        key = texts.get("key", raw.key)
        if not isinstance(key, str) or not key:
            raise ValueError(f"its key is {key!r}: expected a text")
        subjects = []
        for one in _subjects(texts):
            paths = [texts.get(PATHS[0]), *(one.get(name) for name in PATHS[1:])]
            subjects.append(_pairs([None if path is None else self._content(path) for path in paths]))
        return Files(key, texts, subjects)

    def names(self) -> str:
        with (self.folder / METADATA).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def digests(self, shard: int, size: int) -> list[str]:
        lines, files = [], []
        for raw in self.read(shard):
            lines.append((raw.fields.get("json", b"").decode(errors="replace"), start := len(files)))
            with suppress(ValueError):
                for one in _subjects(_texts(raw.fields.get("json", b""))):
                    files += [self._path(one[name]) for name in PATHS if one.get(name) is not None]
            lines[-1] = (*lines[-1], len(files) - start)
        hashes = self.hashes.of(files)
        found = [(line, hashes[start : start + count]) for line, start, count in lines]
        return [_digest(found[i : i + size]) for i in range(0, len(found), size)]

    def fingerprint(self) -> str:
        return _digest(self.digests(0, 1))

    def _path(self, name: Any) -> Path:
        # Links may lead outside: the owner of the folder may keep its images elsewhere.
        first = os.path.normpath(name).split(os.sep)[0] if isinstance(name, str) else ".."
        if first in ("", "..") or "\0" in name:  # "": an absolute path
            raise ValueError(f"the path {name!r} leaves the folder: expected one inside it")
        return self.folder / name

    def _content(self, name: Any) -> bytes:
        path = self._path(name)

        def read() -> bytes:
            if not path.is_file():
                raise FileNotFoundError(f"its file {name!r} is missing")
            if (size := path.stat().st_size) > self.cfg.file_bytes:
                raise ValueError(f"{name!r} has {size:,} bytes: expected at most {self.cfg.file_bytes:,}")
            return path.read_bytes()

        return retried(read, self.cfg)


class ShardSource:
    """Tar shards in the order of their names; `moma/data/shards.py` describes their content."""

    def __init__(self, paths: Iterable[Path], cfg: ReadConfig = READ) -> None:
        self.paths, self.cfg = sorted(set(paths)), cfg
        top = os.path.commonpath([path.absolute().parent for path in self.paths])
        self.shards = [path.absolute().relative_to(top).as_posix() for path in self.paths]
        self.hashes = Hashes.below(Path(top))

    def read(self, shard: int) -> Iterator[Raw]:
        for raw in read_shard(self.paths[shard], self.cfg):
            raw.key = f"{self.shards[shard]}:{raw.key}"
            yield raw

    def files(self, raw: Raw) -> Files:
        if "json" not in raw.fields:
            raise ValueError("its .json is missing")
        texts, image = _texts(raw.fields["json"]), raw.fields.get("image")
        numbers = NUMBERS[: len(_subjects(texts))]
        if extra := [f"mask{n}" for n in NUMBERS[len(numbers) :] if f"mask{n}" in raw.fields]:
            raise ValueError(f"it has a {extra[0]}, and its JSON has {len(numbers)} subjects")
        names = ([f"mask{n}", f"ref{n}", f"refmask{n}"] for n in numbers)
        subjects = [_pairs([image, *map(raw.fields.get, three)]) for three in names]
        return Files(raw.key, texts, subjects)

    def names(self) -> str:
        return _digest(self.shards)

    def digests(self, shard: int, size: int) -> list[str]:
        return [_digest([self.shards[shard], *self.hashes.of([self.paths[shard]])])]

    def fingerprint(self) -> str:
        return _digest([self.shards, self.hashes.of(self.paths)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def open_source(place: str | Path | Sequence[str | Path], what: str = "training data") -> Source:
    """The samples at `place`; ValueError if there are none.

    Args:
        place: a folder with `metadata.jsonl` or `*.tar`, a shard, a pattern such as `data/*/*.tar`, or a list
            of shards.
        what: names it in messages.
    """
    if not isinstance(place, str | Path):
        paths = [Path(path) for path in place]
        if not paths:
            raise ValueError(f"{what}: an empty list, expected tar shards")
    elif glob.has_magic(str(place)) and not Path(place).exists():
        paths = [Path(path) for path in glob.glob(str(place), recursive=True)]
        if not paths:
            raise ValueError(f"{what} {str(place)!r}: no file matches this pattern")
    elif Path(place).is_dir():
        folder = Path(place)
        paths = list(folder.glob("*.tar"))
        if (folder / METADATA).is_file():
            if paths:
                raise ValueError(f"{what} {str(folder)!r}: has {METADATA} and tar shards, keep one of them")
            return FolderSource(folder)
        if not paths:
            raise ValueError(f"{what} {str(folder)!r}: has neither {METADATA} nor *.tar")
    elif Path(place).name == METADATA and Path(place).exists():
        return FolderSource(Path(place).parent)
    else:
        paths = [Path(place)]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{what} {str(path)!r}: no such file or folder")
        if path.is_dir() or (path.suffix != ".tar" and not path.is_fifo()):
            raise ValueError(f"{what} {str(path)!r}: expected a tar shard (*.tar) or a folder of them")
    return ShardSource(paths)


def load(source: Source, raw: Raw, limits: InputConfig = INPUT) -> Triplet:
    """Read and decode a sample.

    Args:
        source: that `raw` comes from.
        raw: the undecoded sample.
        limits: of its images.
    Raises:
        ValueError, OSError: the sample is damaged, incomplete or unfit for training.
    """
    if raw.fault is not None:
        raise ValueError(raw.fault)
    files = source.files(raw)
    subjects, caption = _subjects(files.texts), files.texts.get("caption")
    labels = [one.get("label") for one in subjects]
    for name, text in (*(("label", label) for label in labels), ("caption", caption)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"its {name} is {text!r}: expected a text")
    ends = subject_ends(labels, [one.get("end") for one in subjects], caption)
    found, image = [], None
    for number, about, end, pairs in zip(NUMBERS, subjects, ends, files.subjects, strict=False):
        who = f"subject {number}'s " if number else ""
        if image is None:
            image = open_image(io.BytesIO(pairs[0][0]), limits, "its image", FORMATS)
        mask, reference = _mask(image, pairs[0][1], who, limits), None
        for content, its_mask in pairs[1:]:
            whose = f"{who}reference's "
            other = open_image(io.BytesIO(content), limits, f"its {whose}image", FORMATS)
            reference = on_white(other), _mask(other, its_mask, whose, limits)
        face = about.get("face")
        if face is not None:
            face = Face.from_json(face, (reference or [image])[0].size)
        found.append(Triplet(files.key, on_white(image), mask, about["label"], caption, reference, end, face))
    return replace(found[0], others=tuple(found[1:]))


def _subjects(texts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a sample's JSON says of each subject; ValueError for what is no list of them."""
    others = texts.get("others", [])
    if not isinstance(others, list) or not all(isinstance(one, dict) for one in others):
        raise ValueError(f"its others are {others!r:.100}: expected a list of objects")
    if len(others) >= MOST:
        raise ValueError(f"it has {1 + len(others)} subjects: expected at most {MOST}")
    return [texts, *others]


def subject_ends(labels: Sequence[str], given: Sequence[Any], caption: str) -> list[int]:
    """Where each subject's word ends in the caption.

    Args:
        labels: of the subjects.
        given: an end, or None, of each.
        caption: names them all.

    Raises:
        ValueError: for a caption without a word for each, or an end that is none.
    """
    check_prompt([label for label, end in zip(labels, given, strict=True) if end is None], caption)
    check_prompt(labels, caption, "ignore")
    ends = list(given)
    for label, end in zip(labels, given, strict=True):
        named = isinstance(end, int) and caption[:end].lower().endswith(label.lower())
        if end is not None and not (named and 0 < end <= len(caption)):
            raise ValueError(f"its end {end!r}: expected where {label!r} ends in {caption!r}")
    if None in ends:
        ends = [end or place for end, place in zip(given, word_ends(labels, caption), strict=True)]
    if None in ends or len(set(ends)) < len(ends):
        raise ValueError(
            f"its caption {caption!r} names {', '.join(labels)}: expected a word for each subject"
        )
    return ends


def _texts(line: bytes) -> dict[str, Any]:
    texts = parse_json(line, "its JSON")
    if not isinstance(texts, dict):
        raise ValueError("its JSON is not an object: expected {...}")
    return texts


def _pairs(contents: Sequence[bytes | None]) -> list[tuple[bytes, bytes]]:
    """Pair up image, mask, reference and its mask; the last two may both be None."""
    names = ("image", "mask", "reference", "mask of the reference")
    wanted = names if any(content is not None for content in contents[2:]) else names[:2]
    found = [content for content in contents if content is not None]
    if len(found) < len(wanted):
        missing = [name for name, content in zip(wanted, contents, strict=False) if content is None]
        raise ValueError(f"its {' and '.join(missing)} is missing")
    return list(zip(found[::2], found[1::2], strict=True))


def _mask(image: Image.Image, content: bytes, whose: str, limits: InputConfig) -> Image.Image:
    mask = open_mask(io.BytesIO(content), limits, f"its {whose}mask", FORMATS)
    if not same_aspect(image.size, mask.size, limits):
        raise ValueError(f"its {whose}mask is {mask.size} pixels, the image {image.size}: expected one shape")
    if mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
    if mask.getextrema()[1] <= HALF:
        raise ValueError(f"its {whose}mask is empty: expected white where the subject is")
    return mask


@dataclass
class SkipLog:
    """Counts every skipped sample and reports each key once."""

    report: Callable[[str], None] = warnings.warn
    limit: float = 1.0  # largest share of the samples; beyond it the data is refused
    slack: int = 10  # skipped samples that are too few to tell a share from
    total: int = 0
    delivered: int = 0
    reasons: dict[str, str] = field(default_factory=dict)  # key -> why

    def add(self, skipped: Iterable[tuple[str, str]], delivered: int = 0) -> None:
        """Count samples; ValueError beyond the limit.

        Args:
            skipped: (key, reason) of each that cannot be used.
            delivered: how many others there are.
        """
        self.delivered += delivered
        for key, reason in skipped:
            self.total += 1
            if key not in self.reasons:
                self.reasons[key] = reason
                self.report(f"training data: {key!r} is skipped: {reason}")
        if self.total > self.slack + self.limit * (self.total + self.delivered):
            example = next(iter(self.reasons.items()))
            raise too_many(self.total, self.total + self.delivered, example, self.limit)


def too_many(skipped: int, of: int, example: tuple[str, str], limit: float) -> ValueError:
    """The error for data of which too little can be used.

    Args:
        skipped: samples that cannot be used.
        of: all samples.
        example: key and reason of one.
        limit: largest share.
    """
    return ValueError(
        f"training data: {skipped:,} of {of:,} samples cannot be used, e.g. {example[0]!r}: {example[1]};"
        f" more than max_skipped {limit:g}: mend them, or allow more with --set max_skipped=SHARE"
    )
