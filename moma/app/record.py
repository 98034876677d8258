"""Images that hold the settings they were made with: a `Record` as JSON.

PNG has it in an iTXt chunk, JPEG and WebP in Exif's UserComment.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from models.weights.files import atomic_write, check_file, parse_json
from moma.inputs.faces import EMBEDDING, TEMPLATE, Face
from moma.inputs.preprocess import INPUT, open_mask
from moma.methods import find_method
from moma.sampling.config import SampleConfig, check_types
from moma.sampling.interface import Region, check_regions

CHUNK = "moma"  # key of the PNG text chunk
STAMP = "moma-stamp"  # another key: a text that identifies a file's origin
FORMAT, VERSION = "moma-picture", 2
PNG = ("PNG",)
RECORDS = ("PNG", "JPEG", "WEBP")  # formats of files that hold settings
COMMENT = b"ASCII\0\0\0"  # how Exif's UserComment says what follows
RECORD_BYTES = 2**20  # of settings in Exif: PIL's limit for a text of a PNG
JPEG_BYTES = 65_000  # of settings in JPEG, whose segments have 65,533 bytes
FILE_BYTES = 2**29  # of a file that an image is made from: 80 megapixels take as much in most formats
TORCH_SEED = 2**63 - 1  # the highest that torch's generators take; old images may have one


@dataclass(frozen=True)
class Output:
    """A format that images are written in, with PIL's options."""

    name: str  # PIL's
    suffix: str
    options: Mapping[str, Any]


OUTPUTS = {
    "png": Output("PNG", ".png", {}),
    "jpeg": Output("JPEG", ".jpg", {"quality": 95, "subsampling": 0}),
    "webp": Output("WEBP", ".webp", {"quality": 95}),
}


def short_path(path: str | Path) -> str:
    """A path as records hold it, without the places of this machine: from the current folder or the user's
    home ("~/...") on, elsewhere the name alone."""
    full = Path(os.path.abspath(path))
    for base, start in ((Path.cwd(), ""), (Path("~").expanduser(), "~")):
        if full.is_relative_to(base) and base != base.parent:
            return Path(start, full.relative_to(base)).as_posix()
    return full.name


def follow(text: str) -> Path | None:
    """A path of a record if it leads to something inside the current folder, links followed; else None: files
    elsewhere are read when the user names them."""
    here = Path.cwd().resolve()
    path = (here / text).resolve()
    return Path(text) if path.is_relative_to(here) and path.exists() else None


@dataclass(frozen=True)
class InputFile:
    """A file that an image was made from."""

    path: str  # as the user gave it; in records `short_path` of that
    sha256: str

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """ValueError for a file that is too large for an image."""
        with Path(path).open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > FILE_BYTES:
                raise ValueError(f"{path}: {size:,} bytes, expected an image of at most {FILE_BYTES:,}")
            return cls(str(path), hashlib.file_digest(file, "sha256").hexdigest())

    def shortened(self) -> Self:
        """As a record holds it."""
        return replace(self, path=short_path(self.path))


@dataclass(frozen=True)
class Segmented:
    """A mask from SAM. The record keeps the mask itself, a few kilobytes, because another machine rounds
    differently and could move its edge."""

    how: str  # the hint that SAM was given
    png: str  # base64, one bit per pixel

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, mask: Image.Image, how: str) -> Self:
        """Encode a mask of mode L, 0 or 255."""
        file = io.BytesIO()
        mask.convert("1", dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return cls(how, base64.b64encode(file.getvalue()).decode("ascii"))

    def image(self) -> Image.Image:
        """The mask, mode L, 0 or 255; ValueError if it is damaged."""
        try:
            png = io.BytesIO(base64.b64decode(self.png, validate=True))
        except ValueError as error:
            raise ValueError(f"the mask in the image's settings is damaged ({error})") from None
        return open_mask(png, replace(INPUT, min_side=1), "the mask in the image's settings", PNG)


@dataclass(frozen=True)
class ImageRecord:
    """An image of a subject: what it was read from, and what was found in it."""

    file: InputFile
    mask: InputFile | None = None  # None: found in the image itself
    segmented: Segmented | None = None  # the mask if it is SAM's
    face: str | None = None  # `face_text` of the person's, whoever found it

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        kinds = {"file": InputFile, "mask": InputFile, "segmented": Segmented}
        parts = {
            name: kinds[name](**part) for name, part in data.items() if name in kinds and part is not None
        }
        return cls(**{**data, **parts})


@dataclass(frozen=True)
class SubjectRecord:
    """A subject of an image."""

    word: str
    images: tuple[ImageRecord, ...]
    strength: float | None = None  # None: the sample's
    region: Region | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_regions((self.region,), 1)
        if not self.images:
            raise ValueError(f"the subject {self.word!r:.100} has no image")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        images = tuple(map(ImageRecord.from_json, data["images"]))
        region = data.get("region")
        return cls(**{**data, "images": images, "region": region and tuple(region)})


def face_text(face: Face) -> str:
    """A face's numbers, base64 of float32: they are kept because another machine would find others."""
    values = torch.cat([face.embedding, face.landmarks.reshape(-1)]).float()  # (522,)
    return base64.b64encode(values.numpy().tobytes()).decode("ascii")


def face_of_text(text: str) -> Face:
    """What `face_text` was made of; ValueError for anything else."""
    try:
        values = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
        face = Face(values[:EMBEDDING], values[EMBEDDING:].view(len(TEMPLATE), 2))
        face.check()
        return face
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the face in the image's settings is damaged ({error})") from None


@dataclass(frozen=True)
class Record:
    """Everything needed to draw an image again."""

    subjects: tuple[SubjectRecord, ...]
    prompt: str
    negative: str
    seed: int  # of the start noise
    batch: tuple[tuple[str, int], ...]  # prompts and seeds of its batch, its own included
    sample: SampleConfig
    method_name: str  # in the registry
    method: Any  # its config
    weights: str  # the bundle's folder
    weight_hashes: Mapping[str, str]  # file -> sha256
    dtype: Literal["bf16", "fp16", "fp32"]
    device: str
    versions: Mapping[str, str]  # package -> version

    def __post_init__(self) -> None:
        """ValueError for a value of the wrong type, or a seed or batch that cannot be drawn."""
        check_types(self)
        if (self.prompt, self.seed) not in self.batch or len(self.batch) > self.sample.batch_size:
            raise ValueError("the image is not in its own batch, or that is larger than the batch size")
        if wrong := [seed for _, seed in self.batch if not 0 <= seed <= TORCH_SEED]:
            raise ValueError(f"seed {wrong[0]}: expected 0 to {TORCH_SEED}")

    def to_json(self) -> str:
        """What UTF-8 lacks, in names of files, is escaped as JSON does it."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """ValueError for anything but the output of `to_json` in this version of the format, or in the first
        one, which had a single subject."""
        try:
            data: dict[str, Any] = parse_json(text, "settings")
            found = (data.pop("format"), data.pop("version"))
            if repr(found) == repr((FORMAT, 1)):
                _update(data)
            elif repr(found) != repr((FORMAT, VERSION)):
                raise ValueError(f"format {found!r:.100}, expected {(FORMAT, VERSION)}")
            data["subjects"] = tuple(map(SubjectRecord.from_json, data["subjects"]))
            data["batch"] = tuple((prompt, seed) for prompt, seed in data["batch"])
            sample = SampleConfig(**{"grid": "leading", **data["sample"]})  # before there was a choice
            data["sample"] = replace(sample, max_side=SampleConfig.max_side)  # the limit is this program's
            data["method"] = find_method(data["method_name"]).method.configure("default", **data["method"])
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"settings of another version or damaged ({error!s:.300})") from None


def _update(data: dict[str, Any]) -> None:
    """Settings of the first version of the format as this version has them."""
    if repr(seed := data.pop("subject_seed", 0)) != "0":
        raise ValueError(f"subject_seed {seed!r:.100}: only 0 can be drawn again")
    data.setdefault("method_name", "moma")
    if data["method_name"] == "ip-adapter":  # strengths had no effect on it
        data["sample"] = data["sample"] | {"strength": SampleConfig.strength}
    word, image = data.pop("subject"), {"file": data.pop("reference"), "mask": data.pop("mask")}
    image["segmented"] = data.pop("segmented", None)
    data["subjects"] = [] if image["file"] is None else [{"word": word, "images": [image]}]


def free_path(folder: Path, stem: str, suffix: str = ".png") -> Path:
    """A path that nothing had, reserved by an empty file, so that runs may share a folder.

    Args:
        folder: for the file.
        stem: of its name.
        suffix: of its name, with a dot.
    """
    for n in count(1):
        path = folder / f"{stem}-{n}{suffix}" if n > 1 else folder / f"{stem}{suffix}"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            continue
    raise AssertionError


def save_new(
    folder: Path, stem: str, image: Image.Image, record: Record | None = None, kind: str = "png"
) -> Path:
    """Write an image under a name of its own, and return it.

    Args:
        folder: for the file.
        stem: of its name; a number follows where it is taken.
        image: any image.
        record: for `read_record`.
        kind: a name of `OUTPUTS`.
    """
    output = OUTPUTS[kind]
    path = free_path(folder, stem, output.suffix)
    try:
        if kind == "png":
            save_png(path, image, record)
        else:
            with atomic_write(path) as part:
                image.save(part, output.name, exif=_exif(record), **output.options)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _comment(record: Record) -> bytes:
    """A record as Exif's UserComment: JSON whose other characters are escaped."""
    return COMMENT + json.dumps(json.loads(record.to_json())).encode("ascii")


def _exif(record: Record | None) -> Image.Exif:
    exif = Image.Exif()
    if record is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _comment(record)
    return exif


def check_fits(records: Sequence[Record], kind: str) -> None:
    """ValueError if a file cannot hold the settings, which may have masks in them.

    Args:
        records: of the images.
        kind: a name of `OUTPUTS`.
    """
    limit = {"png": None, "jpeg": JPEG_BYTES, "webp": RECORD_BYTES}[kind]
    if limit and (size := max(len(_comment(one)) for one in records)) > limit:
        raise ValueError(f"--format {kind}: {size:,} bytes of settings, it holds {limit:,}; take png")


def save_png(
    path: str | Path, image: Image.Image, record: Record | None = None, stamp: str | None = None
) -> None:
    """Write a PNG atomically.

    Args:
        path: of the file.
        image: any image.
        record: for `read_record`.
        stamp: for `read_stamp`.
    """
    info = PngInfo()
    if record is not None:
        info.add_itxt(CHUNK, record.to_json())
    if stamp is not None:
        info.add_itxt(STAMP, stamp)
    with atomic_write(path) as part:
        image.save(part, "PNG", pnginfo=info)


def read_stamp(path: Path) -> str | None:
    """The stamp of a PNG file; None if there is no intact image, "" if it has no stamp."""
    try:
        with Image.open(path, formats=PNG) as image:
            image.load()
            return str(image.info.get(STAMP, ""))
    except Exception:  # PIL's readers raise many kinds of errors for damaged files
        return None


def read_record(path: str | Path) -> Record:
    """The record in an image of `save_new` or `save_png`; ValueError for any other file."""
    path = Path(path)
    try:
        check_file(path)
        if (size := path.stat().st_size) > FILE_BYTES:
            raise ValueError(f"{path}: {size:,} bytes, expected at most {FILE_BYTES:,}")
    except ValueError as error:
        raise ValueError(f"image {error}") from None
    what = f"image {str(path)!r}"
    try:
        with Image.open(path, formats=RECORDS) as image:
            text = image.info.get(CHUNK) if image.format == "PNG" else _read_comment(image)
    except Exception:  # PIL's readers raise many kinds of errors for damaged files
        raise ValueError(f"{what} is not an image: expected a PNG, JPEG or WebP of sample.py") from None
    if not isinstance(text, str):
        raise ValueError(f"{what} has no settings in it: expected an unedited file of sample.py")
    try:
        return Record.from_json(text)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _read_comment(image: Image.Image) -> str | None:
    """What Exif's UserComment says in ASCII, within bounds."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(COMMENT) or len(comment) > RECORD_BYTES:
        return None
    return comment.removeprefix(COMMENT).decode("ascii")


def compared(image: Image.Image, path: Path) -> str:
    """What an image is to the file that it repeats, in words: identical, or by how much it differs.

    JPEG and WebP lose details; there the image is compared as it is after the same compression.
    """
    how = ""
    try:
        with Image.open(path, formats=RECORDS) as other:
            if other.format != "PNG":
                how = f" after the same {other.format} compression"
                image = _compressed(image, other.format)
            if (other.size, other.mode) != (image.size, image.mode):
                return f"differs from {path}: {other.size} {other.mode}, now {image.size} {image.mode}"
            gap = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(other, dtype=np.int16))  # (H, W, 3)
    except Exception as error:  # as above: the drawing is there, whatever the file is
        return f"cannot be compared with {path}: its pixels are damaged ({error})"
    if not gap.any():
        return f"identical to {path}{how}"
    share = gap.any(axis=2).mean()
    return f"differs from {path} in {share:.2%} of the pixels, by {gap.max()} of 255 at most{how}"


def _compressed(image: Image.Image, name: str) -> Image.Image:
    """As a file of one of PIL's formats in `OUTPUTS` shows it."""
    (output,) = (one for one in OUTPUTS.values() if one.name == name)
    file = io.BytesIO()
    image.save(file, name, **output.options)
    return Image.open(file, formats=[name])
