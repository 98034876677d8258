"""Contact sheets, and images whose objects are numbered."""

from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moma.app.chart import plain, wrap
from moma.inputs.regions import middle, outline


@dataclass(frozen=True)
class SheetConfig:
    """Layout and colours of a contact sheet, in pixels."""

    cell: int = 256  # side of the square that an image is fitted into; rows of wide images alone are lower
    gap: int = 12
    caption: int = 34  # height of two lines below an image; more lines make a row higher
    font: int = 13
    lines: int = 24  # of a caption, at most: a prompt of the length that text encoders read has fewer
    columns: tuple[int, int] = (4, 8)  # of `prompt_rows`, at least and at most
    background: tuple[int, int, int] = (248, 248, 246)
    ink: tuple[int, int, int] = (50, 50, 50)


class Cell(NamedTuple):
    """One image of a sheet, with its caption in paragraphs."""

    image: Image.Image
    lines: tuple[str, ...] = ()
    side: int | None = None  # of its square, in pixels; None = the sheet's


def contact_sheet(rows: Sequence[Sequence[Cell]], cfg: SheetConfig | None = None) -> Image.Image:
    """Rows of images, each fitted into a square, on one line above their wrapped captions."""
    cfg = cfg or SheetConfig()
    font, line = ImageFont.load_default(cfg.font), cfg.caption // 2
    made = [[_made(cell, cfg, font) for cell in row] for row in rows]
    captions = [max(cfg.caption, *(line * len(text) for *_, text in row)) for row in made]
    tallest = [max(image.height for image, *_ in row) for row in made]
    width = cfg.gap + max(sum(side + cfg.gap for _, side, _ in row) for row in made)
    height = cfg.gap * (1 + len(rows)) + sum(tallest) + sum(captions)
    sheet = Image.new("RGB", (width, height), cfg.background)
    draw, y = ImageDraw.Draw(sheet), cfg.gap
    for row, tall, caption in zip(made, tallest, captions, strict=True):
        x = cfg.gap
        for image, side, text in row:
            sheet.paste(image, (x + (side - image.width) // 2, y + tall - image.height))
            for n, part in enumerate(text):
                draw.text((x, y + tall + 2 + n * line), part, cfg.ink, font)
            x += side + cfg.gap
        y += tall + caption + cfg.gap
    return sheet


def _made(cell: Cell, cfg: SheetConfig, font: Any) -> tuple[Image.Image, int, list[str]]:
    """A cell's image as it is shown, the side of its square, and the lines below it."""
    side = cell.side or cfg.cell
    lines = [part for text in cell.lines for part in wrap(plain(text), font, side, cfg.lines)]
    return _fitted(cell.image, side), side, lines


def prompt_rows(
    prompts: Sequence[Sequence[Sequence[Cell]]], cfg: SheetConfig | None = None
) -> list[list[Cell]]:
    """Rows that use the width: the images of one prompt, or several prompts where each has one image.

    Args:
        prompts: of each prompt, of each image: its cells, which stay side by side.
        cfg: how many columns.
    """
    least, most = (cfg or SheetConfig()).columns
    if all(len(images) == 1 for images in prompts):
        prompts = [[image for images in prompts for image in images]]
        most = least
    rows = []
    for images in prompts:
        step = max(1, most // max(map(len, images), default=1))
        for start in range(0, len(images), step):
            rows.append([cell for image in images[start : start + step] for cell in image])
    return rows


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """RGB, with its longer side of `side` pixels and at least one pixel in the other."""
    size = tuple(max(1, round(x / max(image.size) * side)) for x in image.size)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


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
    canvas = _fitted(image, cfg.side)
    inside = [np.asarray(mask) > 127 for mask in draw_masks(canvas.size)]  # (H, W) each
    colours = [tuple(int(255 * v) for v in colour) for colour in _colours(len(inside), cfg.hue)]
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
    """Masks as an image: one in grey, those of several subjects each in its own colour.

    Args:
        mask: (S, h, w) or (1, S, h, w) in [0, 1].
        size: (width, height) to enlarge it to.
    """
    values = mask.detach().float().cpu().numpy().reshape(-1, *mask.shape[-2:]).clip(0, 1)  # (S, h, w)
    values = (
        values[0]
        if len(values) == 1
        else np.tensordot(values, _colours(len(values), NumberedConfig.hue), (0, 0)).clip(0, 1)
    )
    image = Image.fromarray((values * 255).round().astype(np.uint8))  # (h, w) or (h, w, 3)
    return image if size is None else image.resize(size, Image.Resampling.NEAREST)


def _colours(count: int, step: float) -> np.ndarray:
    """Colours that tell things apart, (count, 3) in [0, 1]; step: between their hues, in turns."""
    return np.array([hsv_to_rgb(i * step % 1, 1, 1) for i in range(count)])
