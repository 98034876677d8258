"""What a run leaves behind: images that know how they were made, and contact sheets.

An image's settings are a `Record`, kept as JSON in an iTXt chunk of its PNG file.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moma.methods import find_method
from moma.sampling.config import SampleConfig

CHUNK = "moma"  # key of the PNG text chunk
STAMP = "moma-stamp"  # another: a text by which a program knows what it has made
FORMAT, VERSION = "moma-picture", 1


@dataclass(frozen=True)
class InputFile:
    """A file that went into an image."""

    path: str  # as the user gave it
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> Self:
        return cls(str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest())


@dataclass(frozen=True)
class Segmented:
    """A mask that a network drew. It is kept itself, some kilobytes: another machine rounds otherwise, and
    might draw another edge."""

    how: str  # what the network was asked for
    png: str  # base64, one bit per pixel

    @classmethod
    def of(cls, mask: Image.Image, how: str) -> Self:
        """mask: mode L, 0 or 255."""
        file = io.BytesIO()
        mask.convert("1", dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return cls(how, base64.b64encode(file.getvalue()).decode("ascii"))

    def image(self) -> Image.Image:
        """The mask, mode L, 0 or 255; ValueError if it is damaged."""
        try:
            return Image.open(io.BytesIO(base64.b64decode(self.png, validate=True))).convert("L")
        except Exception as error:  # PIL's readers raise whatever a damaged file makes them stumble over
            raise ValueError(f"the mask in the image's settings is damaged ({error})") from None


@dataclass(frozen=True)
class Record:
    """Everything that one image was made from."""

    subject: str
    prompt: str
    negative: str
    seed: int  # of the start noise
    batch: tuple[tuple[str, int], ...]  # prompts and seeds that were drawn together with it, itself included
    sample: SampleConfig
    method_name: str  # in the registry
    method: Any  # its config
    reference: InputFile | None  # None: there is no subject
    mask: InputFile | None  # None: found in the image itself
    weights: str  # the bundle's folder
    weight_hashes: Mapping[str, str]  # file -> sha256
    dtype: str  # bf16, fp16, fp32
    device: str
    versions: Mapping[str, str]  # package -> version
    segmented: Segmented | None = None  # the mask if it was SAM's; images from before there was SAM lack it

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """ValueError for what `to_json` of this version did not write."""
        try:
            data: dict[str, Any] = json.loads(text)
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
    """Write a PNG, with the record or the stamp in it; the file appears only when it is complete."""
    info = PngInfo()
    if record is not None:
        info.add_itxt(CHUNK, record.to_json())
    if stamp is not None:
        info.add_itxt(STAMP, stamp)
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, "PNG", pnginfo=info)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_stamp(path: Path) -> str | None:
    """The stamp of a PNG file; None where there is no whole image, "" for one without a stamp."""
    try:
        with Image.open(path) as image:
            image.load()
            return str(image.info.get(STAMP, ""))
    except (OSError, SyntaxError):
        return None


def read_record(path: str | Path) -> Record:
    """The record of an image that `save_png` wrote; ValueError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {str(path)!r}: no such file")
    try:
        with Image.open(path) as image:
            text = image.info.get(CHUNK)
    except (OSError, SyntaxError):
        raise ValueError(f"image {str(path)!r} is not an image: expected a PNG of sample.py") from None
    if not isinstance(text, str):
        raise ValueError(f"image {str(path)!r} has no settings in it: expected an unedited PNG of sample.py")
    try:
        return Record.from_json(text)
    except ValueError as error:
        raise ValueError(f"image {str(path)!r}: {error}") from None


# --- contact sheets ----------------------------------------------------------------------------------
