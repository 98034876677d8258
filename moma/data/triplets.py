"""A training sample, and where it comes from: a folder with `metadata.jsonl`, or tar shards."""

import glob
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from moma.data.shards import READ, Raw, ReadConfig, read_shard
from moma.inputs.preprocess import GREY16, INPUT, InputConfig
from moma.methods.prompts import check_prompt

METADATA = "metadata.jsonl"
FORMATS = ("JPEG", "PNG", "WEBP")  # PIL's others are rare in data sets, and some of them start programs
# A pixel of a mask is subject above this; between 0 and it lie soft edges and JPEG noise.
HALF = 127
ImageAndMask = tuple[
    Image.Image, Image.Image
]  # RGB, and its subject's mask: L of the same size, 255 = subject


@dataclass(frozen=True, eq=False)
class Triplet:
    """One training sample."""

    key: str  # names the sample in messages and caches
    image: Image.Image  # RGB
    mask: Image.Image  # L, of the image's size, 255 = subject
    label: str
    caption: str  # names the label
    reference: ImageAndMask | None = None  # another image of the same subject; None: the image itself is it


class Files(NamedTuple):
    """A sample's encoded files."""

    key: str
    texts: dict[str, Any]
    images: list[tuple[bytes, bytes]]  # (image, mask) and, if there is one, (reference, its mask)


class Source(Protocol):
    """Where samples lie: numbered shards, each a sequence that is read from its beginning."""

    shards: Sequence[str]  # names

    def read(self, shard: int) -> Iterator[Raw]:
        """The samples of a shard in order, undecoded; what cannot be read is a `Raw` with a fault."""

    def files(self, raw: Raw) -> Files:
        """ValueError, OSError: the sample is incomplete or cannot be read."""

    def fingerprint(self) -> str:
        """Identifies the data, wherever the folder lies."""


class FolderSource:
    """`metadata.jsonl`, a line {"image", "mask", "label", "caption"} for each sample; paths from its folder.

    Optional: "key", which should be unique, and "reference_image" with "reference_mask".
    """

    shards = (METADATA,)

    def __init__(self, folder: Path, cfg: ReadConfig = READ) -> None:
        self.folder, self.cfg = folder, cfg
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
        paths = [texts.get(name) for name in ("image", "mask", "reference_image", "reference_mask")]
        contents = [None if path is None else self._content(path) for path in paths]
        key = texts.get("key", raw.key)
        if not isinstance(key, str) or not key:
            raise ValueError(f"its key is {key!r}: expected a text")
        return Files(key, texts, _pairs(contents))

    def fingerprint(self) -> str:
        with (self.folder / METADATA).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _content(self, name: Any) -> bytes:
        # Links are followed: whoever made the folder may keep its images elsewhere.
        if (
            not isinstance(name, str)
            or os.path.isabs(name)
            or os.path.normpath(name).split(os.sep)[0] == ".."
        ):
            raise ValueError(f"the path {name!r} leaves the folder: expected one inside it")
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"its file {name!r} is missing")
        if (size := path.stat().st_size) > self.cfg.file_bytes:
            raise ValueError(f"{name!r} has {size:,} bytes: expected at most {self.cfg.file_bytes:,}")
        return path.read_bytes()


class ShardSource:
    """Tar shards, in the order of their names (see `moma/data/shards.py` for what is in them)."""

    def __init__(self, paths: Iterable[Path], cfg: ReadConfig = READ) -> None:
        self.paths, self.cfg = sorted(set(paths)), cfg
        top = os.path.commonpath([path.absolute().parent for path in self.paths])
        self.shards = [path.absolute().relative_to(top).as_posix() for path in self.paths]

    def read(self, shard: int) -> Iterator[Raw]:
        for raw in read_shard(self.paths[shard], self.cfg):
            raw.key = f"{self.shards[shard]}:{raw.key}"
            yield raw

    def files(self, raw: Raw) -> Files:
        if "json" not in raw.fields:
            raise ValueError("its .json is missing")
        images = _pairs([raw.fields.get(name) for name in ("image", "mask", "ref", "refmask")])
        return Files(raw.key, _texts(raw.fields["json"]), images)

    def fingerprint(self) -> str:
        sizes = [(name, path.stat().st_size) for name, path in zip(self.shards, self.paths, strict=True)]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def open_source(place: str | Path | Sequence[str | Path]) -> Source:
    """A folder with `metadata.jsonl` or `*.tar`, a shard, a pattern such as `data/*/*.tar`, a list of shards.

    ValueError: there is nothing of this.
    """
    if not isinstance(place, str | Path):
        paths = [Path(path) for path in place]
        if not paths:
            raise ValueError("training data: an empty list, expected tar shards")
    elif glob.has_magic(str(place)) and not Path(place).exists():
        paths = [Path(path) for path in glob.glob(str(place), recursive=True)]
        if not paths:
            raise ValueError(f"training data {str(place)!r}: no file fits this pattern, check it")
    elif Path(place).is_dir():
        folder = Path(place)
        paths = list(folder.glob("*.tar"))
        if (folder / METADATA).is_file():
            if paths:
                raise ValueError(
                    f"training data {str(folder)!r}: has {METADATA} and tar shards, keep one kind"
                )
            return FolderSource(folder)
        if not paths:
            raise ValueError(
                f"training data {str(folder)!r}: has neither {METADATA} nor *.tar, give a folder that has"
            )
    elif Path(place).name == METADATA and Path(place).exists():
        return FolderSource(Path(place).parent)
    else:
        paths = [Path(place)]
    for path in paths:
        if not path.exists():
            raise ValueError(f"training data {str(path)!r}: no such file or folder")
        if path.is_dir() or (path.suffix != ".tar" and not path.is_fifo()):
            raise ValueError(f"training data {str(path)!r}: expected a tar shard (*.tar) or a folder of them")
    return ShardSource(paths)


def load(source: Source, raw: Raw, limits: InputConfig = INPUT) -> Triplet:
    """Read and decode a sample. ValueError, OSError: it is damaged, incomplete or not what training takes."""
    if raw.fault is not None:
        raise ValueError(raw.fault)
    files = source.files(raw)
    label, caption = (files.texts.get(name) for name in ("label", "caption"))
    for name, text in (("label", label), ("caption", caption)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"its {name} is {text!r}: expected a text")
    check_prompt(label, caption)
    pairs = zip(files.images, ("", "reference's "), strict=False)
    (image, mask), *others = (_image(*pair, whose, limits) for pair, whose in pairs)
    return Triplet(files.key, image, mask, label, caption, others[0] if others else None)


def _texts(line: bytes) -> dict[str, Any]:
    try:
        texts = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON is damaged ({error})") from None
    if not isinstance(texts, dict):
        raise ValueError("its JSON is no object: expected {...}")
    return texts


def _pairs(contents: Sequence[bytes | None]) -> list[tuple[bytes, bytes]]:
    """From image, mask, reference, its mask; the last two may both be None."""
    names = ("image", "mask", "reference", "mask of the reference")
    wanted = names if any(content is not None for content in contents[2:]) else names[:2]
    found = [content for content in contents if content is not None]
    if len(found) < len(wanted):
        missing = [name for name, content in zip(wanted, contents, strict=False) if content is None]
        raise ValueError(f"its {' and '.join(missing)} is missing")
    return list(zip(found[::2], found[1::2], strict=True))


def _image(content: bytes, mask_content: bytes, whose: str, limits: InputConfig) -> ImageAndMask:
    image = _decode(content, f"{whose}image", limits)
    mask = _decode(mask_content, f"{whose}mask", limits).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if abs(image.width * mask.height / (image.height * mask.width) - 1) > limits.aspect_tolerance:
        raise ValueError(f"its {whose}mask is {mask.size} pixels, the image {image.size}: expected one shape")
    if mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
    if mask.getextrema()[1] <= HALF:
        raise ValueError(f"its {whose}mask is empty: expected white where the subject is")
    return image.convert("RGB"), mask


def _decode(content: bytes, what: str, limits: InputConfig) -> Image.Image:
    """The image, upright, in its own mode; its size is checked before its pixels are decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"its {what} is no image: expected one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"its {what} has far more than the {limits.max_pixels:,} pixels that are allowed"
        ) from None
    except Exception as error:  # PIL's format readers raise whatever a damaged file makes them stumble over
        raise _broken(what, error) from None
    if min(image.size) < limits.min_side or image.width * image.height > limits.max_pixels:
        raise ValueError(
            f"its {what} is {image.width}x{image.height} pixels: expected at least {limits.min_side} on each"
            f" side and at most {limits.max_pixels:,} in all"
        )
    if image.mode in GREY16:
        raise ValueError(f"its {what} has 16-bit values: expected 8 bits")
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise _broken(what, error) from None


def _broken(what: str, error: Exception) -> ValueError:
    return ValueError(f"its {what} is broken or cut off ({error})")


@dataclass
class SkipLog:
    """What was passed over: every occurrence counts, every sample is told once."""

    tell: Callable[[str], None] = warnings.warn
    total: int = 0
    reasons: dict[str, str] = field(default_factory=dict)  # key -> why

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """(key, reason) of each sample."""
        for key, reason in skipped:
            self.total += 1
            if key not in self.reasons:
                self.reasons[key] = reason
                self.tell(f"training data: {key!r} is skipped: {reason}")
