"""What a run leaves behind: pictures that know how they were made, and contact sheets.

A picture's settings are a `Record`, kept as JSON in an iTXt chunk of its PNG file.
"""

import base64
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from moma.chart import fit
from moma.config import MethodConfig, SampleConfig, method_config
from moma.regions import middle, outline

CHUNK = "moma"  # key of the PNG text chunk
STAMP = "moma-stamp"  # another: a text by which a program knows what it has made
FORMAT, VERSION = "moma-picture", 1


@dataclass(frozen=True)
class InputFile:
    """A file that went into a picture."""

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

    def picture(self) -> Image.Image:
        """The mask, mode L, 0 or 255; ValueError if it is damaged."""
        try:
            return Image.open(io.BytesIO(base64.b64decode(self.png, validate=True))).convert("L")
        except Exception as error:  # PIL's readers raise whatever a damaged file makes them stumble over
            raise ValueError(f"the mask in the picture's settings is damaged ({error})") from None


@dataclass(frozen=True)
class Record:
    """Everything that one picture was made from."""

    subject: str
    prompt: str
    negative: str
    seed: int  # of the start noise
    batch: tuple[tuple[str, int], ...]  # prompts and seeds that were drawn together with it, itself included
    subject_seed: int  # of the reference's noise
    sample: SampleConfig
    method: MethodConfig
    reference: InputFile
    mask: InputFile | None  # None: found in the picture itself
    weights: str  # the bundle's folder
    weight_hashes: Mapping[str, str]  # file -> sha256
    dtype: str  # bf16, fp16, fp32
    device: str
    versions: Mapping[str, str]  # package -> version
    segmented: Segmented | None = None  # the mask if it was SAM's; pictures from before there was SAM lack it

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
            data["method"] = method_config(**data["method"])
            data["reference"] = InputFile(**data["reference"])
            data["mask"] = InputFile(**data["mask"]) if data["mask"] else None
            data["segmented"] = Segmented(**data["segmented"]) if data.get("segmented") else None
            record = cls(**data)
            texts = [record.subject, record.prompt, record.negative]
            texts += [record.segmented.how, record.segmented.png] if record.segmented else []
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("subject, prompt, negative prompt and mask are not all texts")
            if (record.prompt, record.seed) not in record.batch:
                raise ValueError("the picture is not in its own batch")
            return record
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"settings of another version or damaged ({error})") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears or changes as a whole."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; it appears or changes as a whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def exit_status(command: str, main: Callable[[], object]) -> int:
    """Run a command: 0, or 2 and one line for a user's mistake or too little memory."""
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


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
    """The stamp of a PNG file; None where there is no whole picture, "" for one without a stamp."""
    try:
        with Image.open(path) as image:
            image.load()
            return str(image.info.get(STAMP, ""))
    except (OSError, SyntaxError):
        return None


def read_record(path: str | Path) -> Record:
    """The record of a picture that `save_png` wrote; ValueError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"picture {str(path)!r}: no such file")
    try:
        with Image.open(path) as image:
            text = image.info.get(CHUNK)
    except (OSError, SyntaxError):
        raise ValueError(f"picture {str(path)!r} is not a picture: expected a PNG of sample.py") from None
    if not isinstance(text, str):
        raise ValueError(
            f"picture {str(path)!r} has no settings in it: expected an unedited PNG of sample.py"
        )
    try:
        return Record.from_json(text)
    except ValueError as error:
        raise ValueError(f"picture {str(path)!r}: {error}") from None


# --- contact sheets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SheetConfig:
    """Looks of a contact sheet, in pixels."""

    cell: int = 256  # side of the square that a picture is fitted into
    gap: int = 12
    caption: int = 34  # height of the two lines below a picture
    font: int = 13
    background: tuple[int, int, int] = (248, 248, 246)
    ink: tuple[int, int, int] = (50, 50, 50)


class Cell(NamedTuple):
    """One picture of a sheet with up to two short lines below."""

    image: Image.Image
    lines: tuple[str, ...] = ()


def contact_sheet(rows: Sequence[Sequence[Cell]], cfg: SheetConfig | None = None) -> Image.Image:
    """Rows of pictures, each fitted into an equal square; lines that are too long end in an ellipsis."""
    cfg = cfg or SheetConfig()
    step_x, step_y = cfg.cell + cfg.gap, cfg.cell + cfg.caption + cfg.gap
    size = (cfg.gap + step_x * max(map(len, rows)), cfg.gap + step_y * len(rows))
    sheet, font = Image.new("RGB", size, cfg.background), ImageFont.load_default(cfg.font)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            x, y = cfg.gap + j * step_x, cfg.gap + i * step_y
            picture = ImageOps.contain(cell.image.convert("RGB"), (cfg.cell, cfg.cell))
            sheet.paste(picture, (x + (cfg.cell - picture.width) // 2, y + (cfg.cell - picture.height) // 2))
            for n, line in enumerate(cell.lines):
                place = (x, y + cfg.cell + 2 + n * cfg.caption // 2)
                draw.text(place, fit(line, font, cfg.cell), cfg.ink, font)
    return sheet


@dataclass(frozen=True)
class NumberedConfig:
    """Looks of a picture whose objects are numbered, in pixels."""

    side: int = 1024  # the longer one: small pictures grow, so that outlines and numbers find room
    line: int = 3
    font: int = 44
    halo: int = 4  # of the numbers, black: they must be seen on any picture
    coarse: int = 8  # places for numbers are sought on a grid of such steps, for speed
    hue: float = 0.381966  # of the next number, in turns: the golden angle keeps neighbours apart


def numbered(
    image: Image.Image,
    draw_masks: Callable[[tuple[int, int]], Sequence[Image.Image]],
    cfg: NumberedConfig | None = None,
) -> Image.Image:
    """An RGB picture with an outline in its own colour and a number, from 1, for each object.

    draw_masks: gives the objects' masks, mode L, 255 = object, of the size (width, height) that it is asked
    for: a photo's own would take much memory. The first one lies on top.
    """
    cfg = cfg or NumberedConfig()
    canvas = ImageOps.contain(image.convert("RGB"), (cfg.side, cfg.side))
    inside = [np.asarray(mask) > 127 for mask in draw_masks(canvas.size)]  # (H, W) each
    colours = [tuple(int(255 * v) for v in hsv_to_rgb(i * cfg.hue % 1, 1, 1)) for i in range(len(inside))]
    pixels = np.array(canvas)  # (H, W, 3)
    for mask, colour in reversed(list(zip(inside, colours, strict=True))):
        pixels[outline(mask, cfg.line)] = colour
    picture, font = Image.fromarray(pixels), ImageFont.load_default(cfg.font)
    draw = ImageDraw.Draw(picture)
    for i, (mask, colour) in enumerate(zip(inside, colours, strict=True)):
        # Not on smaller objects, which have numbers of their own.
        others = [other for other in inside if other.sum() < mask.sum()]
        alone = mask & ~np.any(others, axis=0)
        place = _place(alone, cfg.coarse) or _place(mask, cfg.coarse) or _place(mask, 1)
        if place is None:  # a mask that vanishes in this size
            continue
        halo = {"stroke_width": cfg.halo, "stroke_fill": "black"}
        draw.text(place, str(i + 1), colour, font, anchor="mm", **halo)
    return picture


def _place(mask: np.ndarray, coarse: int) -> tuple[int, int] | None:
    """(x, y) well inside a mask, on a grid of `coarse` pixels; None if no point of the grid is in it."""
    grid = mask[coarse // 2 :: coarse, coarse // 2 :: coarse]
    if not grid.any():
        return None
    x, y = middle(grid)
    return x * coarse + coarse // 2, y * coarse + coarse // 2


def mask_picture(mask: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """A mask (1, h, w) or (1, 1, h, w) in [0, 1] as grey picture, its cells blown up to `size` if given."""
    values = mask.detach().float().cpu().numpy().reshape(mask.shape[-2:])  # (h, w)
    image = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    return image if size is None else image.resize(size, Image.Resampling.NEAREST)
