"""Contact sheets, and images whose objects are numbered."""

from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from moma.app.chart import fit
from moma.inputs.regions import middle, outline


@dataclass(frozen=True)
class SheetConfig:
    """Layout and colours of a contact sheet, in pixels."""

    cell: int = 256  # side of the square that an image is fitted into
    gap: int = 12
    caption: int = 34  # height of the two lines below an image
    font: int = 13
    background: tuple[int, int, int] = (248, 248, 246)
    ink: tuple[int, int, int] = (50, 50, 50)


class Cell(NamedTuple):
    """One image of a sheet, with up to two lines of caption."""

    image: Image.Image
    lines: tuple[str, ...] = ()


def contact_sheet(rows: Sequence[Sequence[Cell]], cfg: SheetConfig | None = None) -> Image.Image:
    """Rows of images, each fitted into a square; captions that are too long end in an ellipsis."""
    cfg = cfg or SheetConfig()
    step_x, step_y = cfg.cell + cfg.gap, cfg.cell + cfg.caption + cfg.gap
    size = (cfg.gap + step_x * max(map(len, rows)), cfg.gap + step_y * len(rows))
    sheet, font = Image.new("RGB", size, cfg.background), ImageFont.load_default(cfg.font)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            x, y = cfg.gap + j * step_x, cfg.gap + i * step_y
            image = ImageOps.contain(cell.image.convert("RGB"), (cfg.cell, cfg.cell))
            sheet.paste(image, (x + (cfg.cell - image.width) // 2, y + (cfg.cell - image.height) // 2))
            for n, line in enumerate(cell.lines):
                place = (x, y + cfg.cell + 2 + n * cfg.caption // 2)
                draw.text(place, fit(line, font, cfg.cell), cfg.ink, font)
    return sheet


@dataclass(frozen=True)
class NumberedConfig:
    """Layout of an image with numbered objects, in pixels."""

    side: int = 1024  # longer side; images are scaled to it, so that outlines and numbers have room
    line: int = 3
    font: int = 44
    halo: int = 4  # black, around the numbers: visible on any image
    coarse: int = 8  # step of the grid that is searched for the numbers' positions
    hue: float = 0.381966  # step between numbers, in turns: the golden angle


def numbered(
    image: Image.Image,
    draw_masks: Callable[[tuple[int, int]], Sequence[Image.Image]],
    cfg: NumberedConfig | None = None,
) -> Image.Image:
    """Outline and number an image's objects, from 1, each in its own colour.

    Args:
        image: any image.
        draw_masks: (width, height) -> the objects' masks at that size, mode L, 255 = object; the first one
            is drawn on top. Masks at a photo's own size would take much memory.
        cfg: layout.
    """
    cfg = cfg or NumberedConfig()
    canvas = ImageOps.contain(image.convert("RGB"), (cfg.side, cfg.side))
    inside = [np.asarray(mask) > 127 for mask in draw_masks(canvas.size)]  # (H, W) each
    colours = [tuple(int(255 * v) for v in hsv_to_rgb(i * cfg.hue % 1, 1, 1)) for i in range(len(inside))]
    pixels = np.array(canvas)  # (H, W, 3)
    for mask, colour in reversed(list(zip(inside, colours, strict=True))):
        pixels[outline(mask, cfg.line)] = colour
    sheet, font = Image.fromarray(pixels), ImageFont.load_default(cfg.font)
    draw = ImageDraw.Draw(sheet)
    for i, (mask, colour) in enumerate(zip(inside, colours, strict=True)):
        # Away from smaller objects, which have their own numbers.
        others = [other for other in inside if other.sum() < mask.sum()]
        alone = mask & ~np.any(others, axis=0)
        place = _place(alone, cfg.coarse) or _place(mask, cfg.coarse) or _place(mask, 1)
        if place is None:  # the mask vanishes at this size
            continue
        halo = {"stroke_width": cfg.halo, "stroke_fill": "black"}
        draw.text(place, str(i + 1), colour, font, anchor="mm", **halo)
    return sheet


def _place(mask: np.ndarray, coarse: int) -> tuple[int, int] | None:
    """(x, y) deep inside a mask, on a grid with steps of `coarse`; None if no grid point is in it."""
    grid = mask[coarse // 2 :: coarse, coarse // 2 :: coarse]
    if not grid.any():
        return None
    x, y = middle(grid)
    return x * coarse + coarse // 2, y * coarse + coarse // 2


def mask_image(mask: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """A mask (1, h, w) or (1, 1, h, w) in [0, 1] as a grey image, enlarged to `size` (width, height)."""
    values = mask.detach().float().cpu().numpy().reshape(mask.shape[-2:])  # (h, w)
    image = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    return image if size is None else image.resize(size, Image.Resampling.NEAREST)
