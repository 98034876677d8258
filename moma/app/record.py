"""PNG files that hold the settings they were made with: a `Record` as JSON in an iTXt chunk."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.weights.files import atomic_write, parse_json
from moma.inputs.preprocess import INPUT, open_mask
from moma.methods import find_method
from moma.sampling.config import SampleConfig

CHUNK = "moma"  # key of the PNG text chunk
STAMP = "moma-stamp"  # another key: a text that identifies a file's origin
FORMAT, VERSION = "moma-picture", 1
RECORDS = ("PNG",)  # formats of files that hold settings


@dataclass(frozen=True)
class InputFile:
    """A file that an image was made from."""

    path: str  # as the user gave it
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> Self:
        return cls(str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest())


@dataclass(frozen=True)
class Segmented:
    """A mask from SAM. The record keeps the mask itself, a few kilobytes, because another machine rounds
    differently and could move its edge."""

    how: str  # the hint that SAM was given
    png: str  # base64, one bit per pixel

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
        return open_mask(png, replace(INPUT, min_side=1), "the mask in the image's settings", RECORDS)


@dataclass(frozen=True)
class Record:
    """Everything needed to draw an image again."""

    subject: str
    prompt: str
    negative: str
    seed: int  # of the start noise
    batch: tuple[tuple[str, int], ...]  # prompts and seeds of its batch, its own included
    sample: SampleConfig
    method_name: str  # in the registry
    method: Any  # its config
    reference: InputFile | None  # None: there is no subject
    mask: InputFile | None  # None: found in the reference itself
    weights: str  # the bundle's folder
    weight_hashes: Mapping[str, str]  # file -> sha256
    dtype: str  # bf16, fp16, fp32
    device: str
    versions: Mapping[str, str]  # package -> version
    segmented: Segmented | None = None  # the mask if it is SAM's

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """ValueError for anything but the output of `to_json` in this version of the format."""
        try:
            data: dict[str, Any] = parse_json(text, "settings")
            found = (data.pop("format"), data.pop("version"))
            if found != (FORMAT, VERSION):
                raise ValueError(f"format {found}, expected {(FORMAT, VERSION)}")
            data["batch"] = tuple((prompt, seed) for prompt, seed in data["batch"])
            data["sample"] = SampleConfig(**data["sample"])
            if seed := data.pop("subject_seed", 0):
                raise ValueError(f"subject_seed {seed}: only 0 can be drawn again")
            data.setdefault("method_name", "moma")
            data["method"] = find_method(data["method_name"]).method.configure(**data["method"])
            data["reference"] = InputFile(**data["reference"]) if data["reference"] else None
            data["mask"] = InputFile(**data["mask"]) if data["mask"] else None
            data["segmented"] = Segmented(**data["segmented"]) if data.get("segmented") else None
            record = cls(**data)
            texts = [record.subject, record.prompt, record.negative]
            texts += [record.segmented.how, record.segmented.png] if record.segmented else []
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("subject, prompt, negative prompt and mask are not all texts")
            if (record.prompt, record.seed) not in record.batch:
                raise ValueError("the image is not in its own batch")
            return record
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"settings of another version or damaged ({error})") from None


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
        with Image.open(path, formats=RECORDS) as image:
            image.load()
            return str(image.info.get(STAMP, ""))
    except (OSError, SyntaxError):
        return None


def read_record(path: str | Path) -> Record:
    """The record in a PNG of `save_png`; ValueError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {str(path)!r}: no such file")
    try:
        with Image.open(path, formats=RECORDS) as image:
            text = image.info.get(CHUNK)
    except (OSError, SyntaxError):
        raise ValueError(f"image {str(path)!r} is not an image: expected a PNG of sample.py") from None
    if not isinstance(text, str):
        raise ValueError(f"image {str(path)!r} has no settings in it: expected an unedited PNG of sample.py")
    try:
        return Record.from_json(text)
    except ValueError as error:
        raise ValueError(f"image {str(path)!r}: {error}") from None
