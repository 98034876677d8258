"""From a file to what the networks see: open the image, find its subject, make it square.

Nothing here knows a network. Sizes are PIL's (width, height) as long as images are PIL images.

Letters: H, W pixels of the input; S side of the square reference.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from moma.inputs.regions import components, frame


@dataclass(frozen=True)
class InputConfig:
    """What an image from outside must be like."""

    min_side: int = 32  # pixels; below this there is nothing to recognise
    max_pixels: int = 80_000_000  # an 80-megapixel photo takes 240 MB as RGB; above it, decompression bombs
    aspect_tolerance: float = 0.02  # relative; a mask scaled with its photo is off by its rounding only
    border_tolerance: int = 24  # 0..255, any channel: JPEG noise and soft vignettes of a studio background
    border_share: float = 0.9  # of the border's pixels; the rest may be a subject that touches the edge
    border_side: int = 1024  # pixels; larger images are scaled down to find their background, for speed
    crop_stray: float = 0.002  # of the subject's pixels beyond each side of its box: specks of a JPEG mask
    crop_margin: float = 0.1  # of the subject's longer side, left free on each side by geometry "crop"


INPUT = InputConfig()


@dataclass(frozen=True)
class ReferenceConfig:
    """How a square reference is made of an image and its mask; a method's config inherits these fields."""

    # What the UNet sees of the reference. The paper's page says the white-background image; the released
    # weights were made with the whole photo and rely on M_ref alone.
    reference_background: Literal["photo", "white"] = "photo"
    # Mask values (0..1, after the resize) above this are subject. The release takes everything above zero,
    # so that soft edges grow the subject by 2-14%.
    mask_binarise_above: float = 0.5
    # A mask without any subject: "error", or (release) attend to every background key alike.
    empty_mask: Literal["error", "mean"] = "error"
    # How an image that is not square becomes square: "pad" repeats the edge, "crop" takes the square around
    # the subject, "squash" (release) ignores the aspect ratio.
    geometry: Literal["pad", "crop", "squash"] = "pad"


REFERENCE = ReferenceConfig()
GREY16 = {"I;16", "I;16L", "I;16B", "I;16N", "I"}  # PIL's modes for 16-bit grey
MaskSource = Literal["file", "alpha", "sam", "border"]


class FoundMask(NamedTuple):
    """A mask (mode L, 255 = subject, in its own size) and where it came from."""

    mask: Image.Image
    source: MaskSource


@dataclass(frozen=True, eq=False)
class Reference:
    """A subject's image, ready for the networks; all parts show the same square."""

    image: Tensor  # (1, 3, S, S) float32 in [-1, 1]: what the VAE encodes
    mask: Tensor  # (1, 1, S, S) float32, 0 or 1: M_ref
    original: Image.Image  # RGB or RGBA, the whole image as it was given, in its own size
    photo: Image.Image  # (S, S) RGB, with its own background
    white: Image.Image  # (S, S) RGB, subject on white: what the MLLM looks at


def open_image(path: str | Path, limits: InputConfig = INPUT) -> Image.Image:
    """The image of a file, upright, as RGB, or as RGBA when it has transparency.

    Takes every mode PIL reads but float: 1-bit, grey, 16-bit grey (scaled to 8), palette, CMYK, ...; an
    animation gives its first frame. ValueError: no such file, not an image, broken, too small, too large.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {str(path)!r}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(path)  # only the header is read
    except UnidentifiedImageError:
        raise ValueError(
            f"image {str(path)!r} is not an image: expected PNG, JPEG or another format PIL reads"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"image {str(path)!r} has far more pixels than the limit of {limits.max_pixels:,}: scale it down"
        ) from None
    except Exception as error:  # PIL's format readers raise whatever a damaged file makes them stumble over
        raise _broken(path, error) from None
    with image:
        _check_size(path, image.size, limits)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:
            raise _broken(path, error) from None
        return _to_rgb(path, upright)


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(f"image {str(path)!r} is broken or cut off ({error}): save it again")


def find_mask(
    image: Image.Image,
    mask_path: str | Path | None = None,
    limits: InputConfig = INPUT,
    segment: Callable[[Image.Image], Image.Image] | None = None,
) -> FoundMask:
    """Where the subject is: a mask file, else the image's transparency, else what `segment` finds, else
    what stands out from its plain background.

    image: from `open_image`. A mask file may have any mode: its alpha channel counts if it varies, else its
    brightest channel (for a grey mask the same as the release's first channel). segment: such as
    `moma.inputs.segment.Segmenter(...).subject_mask`, which raises ValueError if it finds nothing. A
    background
    counts as plain when nearly the whole border has one colour; it is what hangs together with the border in
    that colour, so that patches of it inside the subject stay subject. ValueError when nothing of this is
    there.
    """
    if mask_path is not None:
        mask = open_image(mask_path, limits)
        alpha = _alpha(mask)
        return FoundMask(_brightest(mask) if alpha is None else alpha, "file")
    if (alpha := _alpha(image)) is not None:
        return FoundMask(alpha, "alpha")
    if segment is None:
        return FoundMask(_border_mask(image, limits), "border")
    try:
        return FoundMask(segment(image), "sam")
    except ValueError as error:
        with suppress(ValueError):
            return FoundMask(_border_mask(image, limits), "border")
        raise error from None


def make_reference(
    image: Image.Image,
    mask: Image.Image,
    size: int,
    cfg: ReferenceConfig = REFERENCE,
    limits: InputConfig = INPUT,
) -> Reference:
    """The square reference of side `size` (S) from an image and its mask.

    image: RGB or RGBA (transparent parts become white); mask: mode L, 255 = subject, of the same aspect
    ratio. Geometry and threshold are `cfg`'s; resizing is PIL's antialiased bilinear, as in the release
    (Dataset_evaluate_MoMA), whose tensors `RELEASE` reproduces bit for bit.
    ValueError: mask of another shape than the image; without or with nothing but subject, unless
    `cfg.empty_mask` is "mean".
    """
    original, image, mask = image, on_white(image), mask.convert("L")
    _check_shapes(image.size, mask.size, limits)
    threshold = cfg.mask_binarise_above * 255
    if np.asarray(mask).min() > threshold and cfg.empty_mask == "error":
        raise ValueError("the mask covers the whole image: white should be the subject only")
    if cfg.geometry == "squash":
        photo, soft = (x.resize((size, size), Image.Resampling.BILINEAR) for x in (image, mask))
    else:
        if mask.size != image.size:
            mask = mask.resize(image.size, Image.Resampling.BILINEAR)
        square = _whole(image.size) if cfg.geometry == "pad" else _around(mask, threshold, limits)
        photo, soft = _cut(image, square, size, "edge"), _cut(mask, square, size, "constant")
    subject = np.asarray(soft) > threshold  # (S, S)
    if not subject.any() and cfg.empty_mask == "error":
        raise ValueError(f"the mask has no subject left at {size}x{size}: white should be the subject")
    white = Image.fromarray(np.where(subject[..., None], np.asarray(photo), np.uint8(255)))  # (S, S) RGB
    seen = np.asarray(white if cfg.reference_background == "white" else photo)  # (S, S, 3)
    return Reference(
        image=torch.from_numpy(seen.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1,  # (1, 3, S, S)
        mask=torch.from_numpy(subject.astype(np.float32))[None, None],  # (1, 1, S, S)
        original=original,
        photo=photo,
        white=white,
    )


class _Square(NamedTuple):
    """A square of the input's plane, in its pixels; it may stick out of the image."""

    left: float
    top: float
    side: float


def _whole(size: tuple[int, int]) -> _Square:
    """The smallest square around the whole image, centred."""
    side = max(size)
    return _Square((size[0] - side) / 2, (size[1] - side) / 2, side)


def _around(mask: Image.Image, threshold: float, limits: InputConfig) -> _Square:
    """The square around the subject with a margin; around the whole image when there is no subject."""
    rows, columns = np.nonzero(np.asarray(mask) > threshold)
    if not len(rows):
        return _whole(mask.size)
    edges = (limits.crop_stray, 1 - limits.crop_stray)
    (x0, x1), (y0, y1) = (np.quantile(x, edges).tolist() for x in (columns, rows))
    side = (max(x1 - x0, y1 - y0) + 1) * (1 + 2 * limits.crop_margin)
    return _Square((x0 + x1 + 1 - side) / 2, (y0 + y1 + 1 - side) / 2, side)


def _cut(image: Image.Image, square: _Square, size: int, fill: Literal["edge", "constant"]) -> Image.Image:
    """The square as an image of side `size`; beyond the input its edge is repeated, or 0 stands there."""
    spans, inside = [], []
    for start, length in zip((square.left, square.top), image.size, strict=True):
        low, high = max(start, 0), min(start + square.side, length)
        first, last = (round((x - start) * size / square.side) for x in (low, high))
        spans.append((min(first, size - 1), max(last, first + 1)))  # at least one pixel of a thin image
        inside.append((low, high))
    (left, right), (top, bottom) = spans
    (x0, x1), (y0, y1) = inside
    part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    widths = [(top, size - bottom), (left, size - right), (0, 0)][: np.asarray(part).ndim]
    return Image.fromarray(np.pad(np.asarray(part), widths, mode=fill))


def _check_size(path: Path, size: tuple[int, int], limits: InputConfig) -> None:
    shape = f"image {str(path)!r} is {size[0]}x{size[1]} pixels"
    if min(size) < limits.min_side:
        raise ValueError(f"{shape}: expected at least {limits.min_side} on each side, use a larger image")
    if size[0] * size[1] > limits.max_pixels:
        raise ValueError(f"{shape}: expected at most {limits.max_pixels:,} in all, scale it down")


def _check_shapes(image: tuple[int, int], mask: tuple[int, int], limits: InputConfig) -> None:
    if abs(image[0] * mask[1] / (image[1] * mask[0]) - 1) > limits.aspect_tolerance:
        raise ValueError(
            f"the mask is {mask[0]}x{mask[1]} and the image {image[0]}x{image[1]} pixels: expected the same"
            " shape, make the mask from this image"
        )


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode in GREY16:
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise ValueError(f"image {str(path)!r} has 32-bit values: expected 8 or 16 bits, convert it")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError(f"image {str(path)!r} has float values: expected 8 or 16 bits, convert it")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def on_white(image: Image.Image) -> Image.Image:
    """RGB of any image; transparent parts become white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel if it says anything."""
    if image.mode != "RGBA":
        return None
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    return alpha if low < high else None


def _brightest(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("RGB")).max(axis=2))


def _border_mask(image: Image.Image, limits: InputConfig) -> Image.Image:
    """255 where the image is not its plain background; mode L, at most `border_side` pixels a side."""
    image = on_white(image)
    image.thumbnail((limits.border_side, limits.border_side), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).astype(np.int16)  # (H, W, 3)
    edge = frame(pixels.shape[:2])
    colour = np.median(pixels[edge], axis=0)  # (3,)
    alike = np.abs(pixels - colour).max(axis=2) <= limits.border_tolerance  # (H, W)
    if alike[edge].mean() < limits.border_share:
        raise ValueError(
            "where is the subject? The image has no transparency and no plain background: give a mask"
            " (--mask FILE, white = subject), cut the subject out, or add SAM to the weights"
            " (convert_weights.py)"
        )
    if alike.all():
        raise ValueError("the image is one plain colour, without a subject: use another image")
    labels, _ = components(alike)  # (H, W)
    background = np.isin(labels, labels[edge & alike])  # (H, W)
    return Image.fromarray(np.where(background, 0, 255).astype(np.uint8))
