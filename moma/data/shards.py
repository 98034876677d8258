"""Samples in tar shards: a reader that never seeks, and a writer that can be interrupted.

A sample consists of adjacent members in any order: `<key>.jpg` (or another of `IMAGE_SUFFIXES`),
`<key>.mask.png`, `<key>.json` ({"label", "caption", ...}) and, if there is another image of the subject,
`<key>.ref.jpg` and `<key>.refmask.png`. Other members are ignored.

An image may show further subjects: the second one's files end in mask2.png, ref2.jpg and refmask2.png, and
so on, and the JSON's "others" has {"label"} of each. "end", beside a label, is the number of the caption's
characters up to the end of its word; without it, the word is looked for. "face", likewise, is a person's
{"embedding", "landmarks"} (`moma.inputs.faces.Face`) in its reference, or else in the image.
"""

import errno
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from models.weights.files import naming

T = TypeVar("T")

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MOST = 8  # subjects of a sample
NUMBERS = ("", *map(str, range(2, MOST + 1)))  # of subjects, in names
# Suffix of a member's name -> field of the sample.
FIELDS = {"json": "json"} | {suffix: "image" for suffix in IMAGE_SUFFIXES}
FIELDS |= {f"{kind}{n}.png": f"{kind}{n}" for kind in ("mask", "refmask") for n in NUMBERS}
FIELDS |= {f"ref{n}.{suffix}": f"ref{n}" for suffix in IMAGE_SUFFIXES for n in NUMBERS}
SHARD_NAME = re.compile(r"(\d{5})\.tar")
PART_NAME = re.compile(r"\.\d{5}\.tar\.part")
# A key ends at its first dot, and a slash would be a folder.
KEY = re.compile(r"[\w-]+")
# Errors of a path, not of the disk: they do not pass while a command waits.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
LASTING_CODES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True)
class ReadConfig:
    """Limits of reading files."""

    file_bytes: int = 2**27  # of one image, mask or JSON file; the largest camera JPEGs take 2**26
    buffer_bytes: int = 2**20  # per read of a shard: network disks are slow with small reads
    retries: int = 3  # of a read that a disk or network fails
    pause: float = 1.0  # seconds before the first retry; doubled for each further one


READ = ReadConfig()


@dataclass
class Raw:
    """A sample as stored, undecoded."""

    key: str
    fields: dict[str, bytes] = field(default_factory=dict)  # value of `FIELDS` -> file content
    fault: str | None = None  # why it cannot be a sample
    rest: bool = False  # the fault is that of all samples from here on
    again: bool = False  # the fault may pass

    @property
    def whole(self) -> bool:
        """Whether it lacks no file that a sample must have."""
        return {"image", "mask", "json"} <= self.fields.keys()

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.fields.values()))


class Other(NamedTuple):
    """A further subject of an image, as `ShardWriter.add` takes it."""

    mask_png: bytes
    label: str
    end: int | None = None  # of its word in the caption
    reference: tuple[bytes, bytes] | None = None  # another image of it and its PNG mask
    face: dict[str, list] | None = None  # of `Face.to_json`


class _End(Exception):
    """A shard's own end."""


class _Header(tarfile.TarInfo):
    """Tells the end of an archive from damage and from a missing end, which tarfile takes for it."""

    damage: list[str] | None = None  # blocks that are no headers, which tarfile then skips; None: refused

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            if cls.damage == []:
                raise _End from None
            raise
        except tarfile.InvalidHeaderError as error:
            if cls.damage is None:
                raise tarfile.ReadError(str(error)) from None
            cls.damage.append(str(error))
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def retried(read: Callable[[], T], cfg: ReadConfig = READ) -> T:
    """What `read` returns; an OSError of a disk or a network, which may pass, is tried again."""
    for attempt in range(cfg.retries):
        try:
            return read()
        except LASTING:
            raise
        except OSError as error:
            if error.errno in LASTING_CODES:
                raise
            time.sleep(cfg.pause * 2**attempt)
    return read()


def read_shard(path: Path, cfg: ReadConfig = READ) -> Iterator[Raw]:
    """Stream a shard's samples in order.

    Never raises: a sample that is damaged is a `Raw` with a fault, and so is the rest of a shard that cannot
    be read on.
    """
    samples, done = _samples(path, cfg), 0

    def again() -> Raw | None:
        nonlocal samples
        try:
            return next(samples, None)
        except OSError:  # a generator ends with its error
            samples = islice(_samples(path, cfg), done, None)
            raise

    try:
        while (sample := retried(again, cfg)) is not None:
            done += 1
            yield sample
    except OSError as error:
        yield Raw("", fault=f"the shard cannot be read on ({error})", rest=True, again=True)


def _samples(path: Path, cfg: ReadConfig) -> Iterator[Raw]:
    """As `read_shard`, but raises OSError."""
    damage: list[str] = []
    gap: str | None = None  # why samples may be missing before this one
    header = type("Header", (_Header,), {"damage": damage})
    sample: Raw | None = None
    options = {"mode": "r|", "bufsize": cfg.buffer_bytes, "tarinfo": header, "ignore_zeros": True}
    try:
        with path.open("rb", buffering=0) as file, tarfile.open(fileobj=file, **options) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isreg() or not stem:  # hidden files belong to no sample
                    continue
                key = f"{folder}/{stem}" if folder else stem
                hurt = f"the shard is damaged here ({damage[0]}): write it again" if damage else None
                damage.clear()
                if sample is not None and key == sample.key:
                    sample.fault = sample.fault or hurt
                else:
                    if sample is not None:
                        yield from _finished(sample, gap)
                        gap = hurt if sample.whole else None
                    sample = Raw(key)
                kind = FIELDS.get(suffix.lower())
                if kind is None:
                    continue
                if kind in sample.fields:
                    sample.fault = f"it has two files for its {kind}: expected one"
                elif member.issparse():
                    sample.fault = f"{name} is stored with holes: expected a plain member"
                elif member.size > cfg.file_bytes:
                    sample.fault = f"{name} has {member.size:,} bytes: expected at most {cfg.file_bytes:,}"
                else:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a regular file
                    sample.fields[kind] = content.read()
    except _End:
        if sample is not None:
            yield from _finished(sample, gap)
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        fault = f"the shard is cut off or damaged from here on ({error}): write it again"
        yield Raw("" if sample is None else sample.key, fault=fault, rest=True)


def _finished(sample: Raw, gap: str | None) -> Iterator[Raw]:
    """A sample, behind what is lost before it: where damage lies between two that lack nothing, others."""
    if gap and sample.whole:
        yield Raw("", fault=gap)
    yield sample


class ShardWriter:
    """Writes samples to shards `00000.tar`, `00001.tar`, ... of a folder.

    with ShardWriter(folder) as shards:
        shards.add("0001", jpeg, "jpg", mask_png, "cat", "a cat on a sofa")

    A shard appears when it is complete, the last one at the end of the `with`. An interruption keeps the
    complete shards and discards the open one. To resume, add the samples that are not in `done_keys()` in the
    same order: the result is byte for byte that of an uninterrupted run. ValueError: the folder holds other
    files or a damaged shard.
    """

    def __init__(self, folder: str | Path, per_shard: int = 1000) -> None:
        if per_shard < 1:
            raise ValueError(f"samples per shard: {per_shard}, expected at least 1")
        self.folder, self.per_shard = Path(folder), per_shard
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"shards {str(folder)!r}: a file, expected a folder or nothing there")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = sorted(self.folder.iterdir())
        for path in found:
            if not SHARD_NAME.fullmatch(path.name) and not PART_NAME.fullmatch(path.name):
                raise ValueError(
                    f"shards {str(folder)!r} holds {path.name!r}: expected shards only, give an empty folder"
                )
        shards = [path for path in found if SHARD_NAME.fullmatch(path.name)]
        for path in set(found) - set(shards):
            path.unlink()  # of an interrupted run
        self._number = int(shards[-1].stem) + 1 if shards else 0
        self._keys = {key for path in shards for key in _keys(path)}
        self._archive: tarfile.TarFile | None = None
        self._open_keys: list[str] = []  # of the shard being written

    def done_keys(self) -> frozenset[str]:
        """Keys of all samples in the folder, including earlier runs'."""
        return frozenset(self._keys)

    def add(
        self,
        key: str,
        image: bytes,
        image_suffix: str,
        mask_png: bytes,
        label: str,
        caption: str,
        extra: dict[str, Any] | None = None,
        reference: tuple[bytes, bytes] | None = None,
        others: Sequence[Other] = (),
    ) -> None:
        """Add one sample.

        Args:
            key: letters, digits, - and _; unique in the folder.
            image: the encoded file.
            image_suffix: one of `IMAGE_SUFFIXES`.
            mask_png: the encoded mask.
            label: the subject's class.
            caption: names the label.
            extra: more fields of its JSON file.
            reference: another image of the subject (JPEG, PNG or WebP) and its PNG mask.
            others: further subjects of the image.
        Raises:
            ValueError: the key is taken or not allowed, or the suffix is unknown.
        """
        suffix = image_suffix.removeprefix(".").lower()
        if suffix not in IMAGE_SUFFIXES:
            raise ValueError(f"sample {key!r}: image {image_suffix!r}, expected one of {IMAGE_SUFFIXES}")
        if not KEY.fullmatch(key):
            raise ValueError(f"sample key {key!r}: expected letters, digits, - and _ only")
        if key in self._keys:
            raise ValueError(f"sample {key!r} is already written, see done_keys()")
        if len(others) >= MOST:
            raise ValueError(f"sample {key!r}: {1 + len(others)} subjects, expected at most {MOST}")
        texts = {**(extra or {}), "label": label, "caption": caption}
        if others:
            told = ({"label": one.label, "end": one.end, "face": one.face} for one in others)
            texts["others"] = [
                {name: value for name, value in one.items() if value is not None} for one in told
            ]
        files = {
            suffix: image,
            "mask.png": mask_png,
            "json": json.dumps(texts, ensure_ascii=False, sort_keys=True).encode(),
        }
        references = (reference, *(one.reference for one in others))
        files |= {f"mask{n}.png": one.mask_png for n, one in zip(NUMBERS[1:], others, strict=False)}
        for n, pair in zip(NUMBERS, references, strict=False):
            if pair is not None:
                files |= {f"ref{n}.{_suffix(pair[0])}": pair[0], f"refmask{n}.png": pair[1]}
        try:
            with naming(self.folder):
                if self._archive is None:
                    self._file = self._part.open("xb")  # not through a link
                    self._archive = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115 (stays open)
                for name, content in files.items():
                    info = tarfile.TarInfo(f"{key}.{name}")  # time and owner stay 0: same data, same bytes
                    info.size = len(content)
                    self._archive.addfile(info, io.BytesIO(content))
        except BaseException:  # the shard may hold half a sample
            self.discard()
            raise
        self._open_keys.append(key)
        self._keys.add(key)
        if len(self._open_keys) == self.per_shard:
            self.close()

    def close(self) -> None:
        """Complete the open shard, if any."""
        if self._archive is None:
            return
        with naming(self.folder):
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())  # content before name, in case of a power cut
            self._file.close()
        os.replace(self._part, self.folder / f"{self._number:05d}.tar")
        self._archive, self._open_keys, self._number = None, [], self._number + 1

    def discard(self) -> None:
        """Remove the open shard and free its keys."""
        if self._archive is not None:
            self._file.close()
        self._part.unlink(missing_ok=True)
        self._keys.difference_update(self._open_keys)
        self._archive, self._open_keys = None, []

    @property
    def _part(self) -> Path:
        return self.folder / f".{self._number:05d}.tar.part"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def _keys(path: Path) -> set[str]:
    """Keys of a complete shard, from its headers."""
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as archive:
            return {name.partition(".")[0] for name in archive.getnames()}
    except (OSError, tarfile.TarError, RecursionError) as error:
        raise ValueError(f"shard {str(path)!r} is cut off or damaged ({error}): delete it") from None


def _suffix(image: bytes) -> str:
    """The file suffix of an encoded image."""
    if image.startswith(b"\xff\xd8"):
        return "jpg"
    return "webp" if image.startswith(b"RIFF") else "png"
