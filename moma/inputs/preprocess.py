"""From a file to what the networks see: open the image, find its subject, bring both to their shape.

No network is known here. Sizes are PIL's (width, height) as long as images are PIL images.

Letters: H, W pixels of the input; S side of the square reference, S x T pixels of one that is not square.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.weights.files import check_file
from moma.inputs.pixels import (
    BYTE,
    HALF,
    PIXELS,
    PixelConfig,
    by_strips,
    eight_bits,
    in_srgb,
    mask_of,
    real_alpha,
)  # fmt: skip
from moma.inputs.regions import components, frame

# PIL's names of what is opened: its readers of these run in this process, and no file needs another.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM")
FRAMES = "frames"  # of an animation that begins with a blank one: a key of the image's info
PLAIN = "the image is one plain colour, without a subject: use another image"
DEEP = (";16B", ";16L", ";16N")  # in PIL's names of file layouts: 16 bits per channel


@dataclass(frozen=True)
class InputConfig:
    """Limits of images that users give, and how a mask is found in them."""

    min_side: int = 32  # pixels; a subject in a smaller image cannot be recognised
    max_pixels: int = 80_000_000  # an 80-megapixel photo takes 240 MB as RGB; guards against bombs
    max_wide: int = 40_000_000  # pixels of JPEG 2000, whose reader takes 4 bytes for each channel beside ours
    max_scans: int = 100  # of a JPEG, which are decoded one by one, each over all pixels; cameras write 10
    aspect_tolerance: float = 0.02  # relative; rounding of a mask scaled with its photo
    # Range of the widest colour channel, 0..255. Below it the image is blank, yet a small SAM still returns
    # regions.
    least_contrast: int = 8
    border_tolerance: int = 24  # 0..255, any channel: JPEG noise and soft vignettes of a studio background
    border_share: float = 0.9  # of the border's pixels; a subject may touch the rest
    # What stands out by this much must be nearly the same; else shadows or folds count as subject.
    outline_tolerance: int = 48
    outline_same: float = 0.88  # IoU of the two
    outline_cut: float = 0.5  # of its own size may lie along the border; more is a hand that reaches in
    border_side: int = 1024  # pixels; larger images are scaled down to find their background, for speed
    crop_stray: float = 0.002  # share of subject pixels ignored beyond each side of its box: specks
    crop_margin: float = 0.1  # of the smallest square around the subject, left free on each side by "crop"
    inverted_border: float = 0.5  # of the border; a mask that covers more may be the background's
    note_side: int = 256  # pixels; larger masks are scaled down to measure them
    pixels: PixelConfig = PIXELS


INPUT = InputConfig()


Geometry = Literal["pad", "crop", "squash", "cover"]


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
    # How an image that is not square becomes square (a target may have another shape): "pad" repeats the
    # edge, "crop" takes the square around the subject, "cover" the largest one within the image with the
    # subject in it, "squash" (release) ignores the aspect ratio.
    geometry: Geometry = "pad"


REFERENCE = ReferenceConfig()
MaskSource = Literal["file", "alpha", "sam", "border"]


class FoundMask(NamedTuple):
    """A mask (mode L, 255 = subject, in its own size) and where it came from."""

    mask: Image.Image
    source: MaskSource

    def shares(self, limits: InputConfig = INPUT) -> tuple[float, float]:
        """The subject's shares of the image and of its border."""
        small = self.mask.copy()
        small.thumbnail((limits.note_side, limits.note_side), Image.Resampling.BOX)
        inside = np.asarray(small) > HALF  # (H, W)
        return float(inside.mean()), float(inside[frame(inside.shape)].mean())

    def doubt(self, limits: InputConfig = INPUT) -> str | None:
        """Why it may not be the subject's, if it fills most of the image's border."""
        share, border = self.shares(limits)
        if border <= limits.inverted_border:
            return None
        return (
            f"the mask covers {share:.0%} of the image and {border:.0%} of its border: white or opaque should"
            " be the subject; invert the mask if it is the background"
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """A subject's image, ready for the networks; all parts but `original` show the same."""

    image: Tensor  # (1, 3, S, S) float32 in [-1, 1]: what the VAE encodes
    mask: Tensor  # (1, 1, S, S) float32, 0 or 1: M_ref
    original: Image.Image  # RGB or RGBA, the whole image as it was given, in its own size
    photo: Image.Image  # (S, S) RGB, with its own background
    white: Image.Image  # (S, S) RGB, subject on white: what the MLLM looks at


def open_image(
    file: str | Path | BinaryIO,
    limits: InputConfig = INPUT,
    what: str | None = None,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """The image of a file, upright and in sRGB, as RGB, or as RGBA if it has transparency.

    Takes every mode PIL reads except float: 1-bit, grey, 16-bit (scaled to 8), palette, CMYK, ...; of an
    animation, the first frame.

    Args:
        file: a path, or a file open for reading.
        limits: of the size.
        what: names the image in messages, None = by its path.
        formats: PIL's names of those that are accepted.
    Raises:
        ValueError: no such file, not an image, broken, too small, too large, or too dark to be meant.
    """
    what = what or f"image {str(file)!r}"
    image, deep = _decoded(file, what, limits, formats)
    return in_srgb(eight_bits(image, what, deep, limits.pixels), limits.pixels)


def open_mask(
    file: str | Path | BinaryIO,
    limits: InputConfig = INPUT,
    what: str | None = None,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """The mask that a file means, upright; mode L, 255 = subject (`moma.inputs.pixels.mask_of`).

    Arguments and ValueErrors as `open_image`, and for labels.
    """
    what = what or f"mask {str(file)!r}"
    return mask_of(_decoded(file, what, limits, formats)[0], what, limits.pixels)


def _decoded(
    file: str | Path | BinaryIO, what: str, limits: InputConfig, formats: Sequence[str]
) -> tuple[Image.Image, bool]:
    """An upright image in its own mode, and whether the file has more than 8 bits per channel.

    Its size is checked before its pixels are decoded. Arguments and ValueErrors as `open_image`.
    """
    if isinstance(file, str | Path):
        try:
            check_file(Path(file))
        except ValueError as error:
            raise ValueError(f"{what}: {str(error).removeprefix(f'{Path(file)}: ')}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(file, formats=formats)  # reads only the header
        with image:
            width, height = image.size
            most = limits.max_wide if image.format == "JPEG2000" else limits.max_pixels
            fits = min(width, height) >= limits.min_side and width * height <= most
            if fits:
                if image.format == "JPEG" and _scans(image.fp) > limits.max_scans:
                    raise ValueError(f"more than {limits.max_scans} scans")
                deep = any(name in str(tile.args) for tile in image.tile for name in DEEP)
                image.load()
                frames = getattr(image, "n_frames", 1) if _is_blank(image) else 1
                image = ImageOps.exif_transpose(image)
                image.info[FRAMES] = frames  # PIL's copies keep it
    except UnidentifiedImageError:
        raise ValueError(f"{what} is not an image: expected {', '.join(formats)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{what} has far more pixels than the limit of {limits.max_pixels:,}") from None
    except Exception as error:  # PIL's readers raise many kinds of errors for damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} is broken or cut off ({reason}): save it again") from None
    if not fits:
        raise ValueError(
            f"{what} is {width}x{height} pixels: expected at least {limits.min_side} on each side and at most"
            f" {most:,} in all"
        )
    return image, deep


def _scans(file: BinaryIO) -> int:
    """How often a JPEG file has the mark that begins a scan; its place in the file is kept."""
    place, last = file.tell(), b""
    file.seek(0)
    count = 0
    while block := file.read(2**20):
        count += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(place)
    return count


def _is_blank(image: Image.Image) -> bool:
    """Whether an image of any mode is of one colour, or wholly transparent."""
    ranges = image.getextrema()
    ranges = ranges if isinstance(ranges[0], tuple) else (ranges,)
    return all(low == high for low, high in ranges) or (image.mode[-1:] == "A" and ranges[-1][1] == 0)


def check_not_blank(image: Image.Image, limits: InputConfig = INPUT) -> None:
    """ValueError for an image of one colour, or wholly transparent, which shows no subject.

    Args:
        image: as from `open_image`.
        limits: say how little colours must vary.
    """
    seen = image if image.mode == "RGB" else on_white(image)
    if max(high - low for low, high in seen.getextrema()) >= limits.least_contrast:
        return
    if (frames := image.info.get(FRAMES, 1)) > 1:
        raise ValueError(f"the first of the image's {frames} frames is empty: save the one that you mean")
    raise ValueError(PLAIN)


def find_mask(
    image: Image.Image,
    mask_path: str | Path | None = None,
    limits: InputConfig = INPUT,
    segment: Callable[[Image.Image], Image.Image] | None = None,
    plain_first: bool = False,
) -> FoundMask:
    """The subject's mask: from a file, else the image's transparency, else `segment`, else what stands out
    from a plain background.

    A mask file may have any mode. Its alpha channel counts if it varies, else its brightest channel (for a
    grey mask the same as the release's first channel). A background is plain if nearly the whole border has
    one colour; patches of that colour inside the subject stay subject.

    Args:
        image: as from `open_image`.
        mask_path: white or opaque = subject.
        limits: of the mask file, and what counts as a plain background.
        segment: gives a mask or raises ValueError, such as `moma.inputs.segment.Segmenter.subject_mask`.
        plain_first: a plain background comes before `segment`, which knows one kind of images only.
    Raises:
        ValueError: none of these gives a mask, or the image is blank.
    """
    alpha = real_alpha(image, limits.pixels) if mask_path is None else None
    if alpha is not None:
        return FoundMask(alpha, "alpha")
    check_not_blank(image, limits)
    if mask_path is not None:
        return FoundMask(open_mask(mask_path, limits), "file")
    if segment is None:
        return FoundMask(_border_mask(image, limits), "border")
    if plain_first:
        with suppress(ValueError):
            return FoundMask(_border_mask(image, limits), "border")
    try:
        return FoundMask(segment(image), "sam")
    except ValueError as error:
        with suppress(ValueError):
            return FoundMask(_border_mask(image, limits), "border")
        raise error from None


def meant_mask(image: Image.Image) -> FoundMask:
    """The mask that an image is, as `open_mask` of its file; one of mode L with white in it stays as it is,
    since soft ones of `find_mask` may have values that a file's would be taken for labels by."""
    white = image.mode == "L" and image.getextrema()[1] > HALF
    return FoundMask(image if white else mask_of(image, "the mask"), "file")


@contextmanager
def about(file: str | Path) -> Iterator[None]:
    """What is wrong inside, a ValueError, begins with the file that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def make_reference(
    image: Image.Image,
    mask: Image.Image,
    size: int | tuple[int, int],
    cfg: ReferenceConfig = REFERENCE,
    limits: InputConfig = INPUT,
    chosen_by: Image.Image | None = None,
) -> Reference:
    """The reference of an image and its mask, a square or of another shape.

    Resizing is PIL's antialiased bilinear, as in the release (Dataset_evaluate_MoMA); with the preset
    "release" the tensors are the same bit for bit.

    Args:
        image: RGB or RGBA (transparent parts become white).
        mask: mode L, 255 = subject, of the same aspect ratio.
        size: side S of the square, or width T and height S of another shape, pixels.
        cfg: geometry, threshold and background; a method's config has these fields.
        limits: margins of geometry "crop", tolerance of the aspect ratio.
        chosen_by: a mask of the image's size that the square (or window) is chosen by instead.
    Raises:
        ValueError: the mask has another shape than the image; it covers nothing or everything, unless
            `cfg.empty_mask` is "mean".
    """
    size = (size, size) if isinstance(size, int) else size
    original, image = image, image if image.mode == "RGB" else on_white(image)
    mask = mask if mask.mode == "L" else mask.convert("L")
    if not same_aspect(image.size, mask.size, limits):
        raise ValueError(
            f"the mask is {mask.width}x{mask.height} and the image {image.width}x{image.height} pixels:"
            " expected the same shape, make the mask from this image"
        )
    threshold = cfg.mask_binarise_above * 255
    if np.asarray(mask).max() <= threshold and cfg.empty_mask == "error":
        raise ValueError("the mask is black all over: white should be the subject")
    if np.asarray(mask).min() > threshold and cfg.empty_mask == "error":
        raise ValueError("the mask covers the whole image: white should be the subject only")
    if cfg.geometry == "squash":
        photo, soft = (x.resize(size, Image.Resampling.BILINEAR) for x in (image, mask))
    else:
        if mask.size != image.size:
            mask = mask.resize(image.size, Image.Resampling.BILINEAR)
        if cfg.geometry == "pad":
            window = _whole(image.size, size[0] / size[1])
        else:
            choose = _around if cfg.geometry == "crop" else _within
            window = choose(chosen_by or mask, size[0] / size[1], threshold, limits)
        photo, soft = _cut(image, window, size, "edge"), _cut(mask, window, size, "constant")
    subject = np.asarray(soft) > threshold  # (S, S)
    if not subject.any() and cfg.empty_mask == "error":
        raise ValueError(f"the mask has no subject left at {size[0]}x{size[1]}: white should be the subject")
    white = Image.fromarray(np.where(subject[..., None], np.asarray(photo), np.uint8(255)))  # (S, S) RGB
    seen = np.asarray(white if cfg.reference_background == "white" else photo)  # (S, S, 3)
    return Reference(
        image=torch.from_numpy(seen.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1,  # (1, 3, S, S)
        mask=torch.from_numpy(subject.astype(np.float32))[None, None],  # (1, 1, S, S)
        original=original,
        photo=photo,
        white=white,
    )


def on_noise(reference: Reference, seed: int) -> Image.Image:
    """The subject of a reference with random colours behind it, (S, S) RGB."""
    photo = np.asarray(reference.photo)  # (S, S, 3)
    noise = np.random.default_rng(seed).integers(0, 256, photo.shape, dtype=np.uint8)
    return Image.fromarray(np.where(reference.mask[0, 0, :, :, None].numpy() > 0, photo, noise))


class _Window(NamedTuple):
    """A part of the image in its pixels, of the reference's aspect; it may extend beyond it."""

    left: float
    top: float
    width: float
    height: float


def _covering(width: float, height: float, aspect: float) -> tuple[float, float]:
    """Width and height of the smallest window that holds so much; aspect: its width / height."""
    return max(width, height * aspect), max(height, width / aspect)


def _whole(size: tuple[int, int], aspect: float) -> _Window:
    """The smallest window around the whole image, centred."""
    width, height = _covering(*size, aspect)
    return _Window((size[0] - width) / 2, (size[1] - height) / 2, width, height)


def _around(mask: Image.Image, aspect: float, threshold: float, limits: InputConfig) -> _Window:
    """The window around the subject with a margin; around the whole image if there is no subject."""
    inside = np.asarray(mask) > threshold  # (H, W)
    if not inside.any():
        return _whole(mask.size, aspect)
    (x0, x1), (y0, y1) = (_box_side(inside.sum(axis), limits.crop_stray) for axis in (0, 1))
    sides = _covering(x1 - x0 + 1, y1 - y0 + 1, aspect)
    width, height = (side * (1 + 2 * limits.crop_margin) for side in sides)
    return _Window((x0 + x1 + 1 - width) / 2, (y0 + y1 + 1 - height) / 2, width, height)


def _box_side(counts: np.ndarray, stray: float) -> list[float]:
    """Where the pixels of each column or row begin and end, without a share of strays on either side.

    The quantiles of `np.quantile`, which would need the place of every pixel.
    """
    ends, found = counts.cumsum(), []
    for share in (stray, 1 - stray):
        index = share * (ends[-1] - 1)  # between the pixels, sorted by their places
        around = np.searchsorted(ends, [int(index), min(int(index) + 1, ends[-1] - 1)], side="right")
        found.append(float(np.quantile(around, index % 1)))
    return found


def _within(mask: Image.Image, aspect: float, threshold: float, limits: InputConfig) -> _Window:
    """The largest window within the image, moved from its middle until the subject's box is inside.

    Where the box is larger, the middle of the box is shown.
    """
    width, height = mask.size
    sides = min(width, height * aspect), min(height, width / aspect)
    corner = []
    inside = np.asarray(mask) > threshold  # (H, W)
    for axis, (length, side) in enumerate(zip(mask.size, sides, strict=True)):
        places = np.flatnonzero(inside.any(axis))
        low, high = (places.min(), places.max() + 1) if len(places) else (0, length)
        start = (length - side) / 2
        start = min(max(start, high - side), low) if high - low <= side else (low + high - side) / 2
        corner.append(float(min(max(start, 0), length - side)))
    return _Window(*corner, *sides)


def _cut(
    image: Image.Image, window: _Window, size: tuple[int, int], fill: Literal["edge", "constant"]
) -> Image.Image:
    """The window as an image of `size`; beyond the image, `fill` repeats its edge or is 0."""
    spans, inside = [], []
    for start, side, length, wanted in zip(window[:2], window[2:], image.size, size, strict=True):
        low, high = max(start, 0), min(start + side, length)
        first, last = (round((x - start) * wanted / side) for x in (low, high))
        spans.append((min(first, wanted - 1), max(last, first + 1)))  # at least one pixel of a thin image
        inside.append((low, high))
    (left, right), (top, bottom) = spans
    (x0, x1), (y0, y1) = inside
    part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    widths = [(top, size[1] - bottom), (left, size[0] - right), (0, 0)][: np.asarray(part).ndim]
    return Image.fromarray(np.pad(np.asarray(part), widths, mode=fill))


def same_aspect(size: tuple[int, int], other: tuple[int, int], limits: InputConfig = INPUT) -> bool:
    """Whether two images have one shape; either may have been scaled to whole pixels.

    Args:
        size: (width, height) in pixels.
        other: likewise.
        limits: how far they may differ.
    """
    scale = max(other) / max(size)
    rounded = all(abs(new - old * scale) <= max(1, scale) for old, new in zip(size, other, strict=True))
    return rounded or abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= limits.aspect_tolerance


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of an image.

    Args:
        image: any image.
        kind: PIL's name of the format.
        options: of `PIL.Image.Image.save`.
    """
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """RGB of any image; transparent parts become white. ValueError for values that `eight_bits` refuses."""
    image = eight_bits(image, "the image", deep=False)
    if not image.has_transparency_data:
        return image.convert("RGB")

    def composed(part: Image.Image) -> Image.Image:
        return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part.convert("RGBA"))

    return by_strips(image, "RGB", lambda part: composed(part).convert("RGB"))


def _border_mask(image: Image.Image, limits: InputConfig) -> Image.Image:
    """Mode L, 255 where the image is not its plain background, of about `border_side`² pixels at most.

    No side is longer than `border_side`, unless the other would fall below `min_side`.
    """
    image = on_white(image)
    aspect = max(image.size) / min(image.size)
    side = max(limits.border_side, int(min(limits.min_side * aspect, limits.border_side * math.sqrt(aspect))))
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).astype(np.int16)  # (H, W, 3)
    edge = frame(pixels.shape[:2])
    away = np.abs(pixels - np.median(pixels[edge], axis=0)).max(axis=2)  # (H, W) from the background's colour
    if (away <= limits.border_tolerance)[edge].mean() < limits.border_share:
        raise ValueError(
            "where is the subject? The image has neither transparency nor a plain background: give a mask"
            " (--mask FILE, white = subject), cut out the subject, or add SAM to the weights"
            " (convert_weights.py)"
        )
    if away.max() <= limits.border_tolerance:
        raise ValueError(PLAIN)
    levels = limits.border_tolerance, limits.outline_tolerance
    inside, clear = (_enclosed(away > level, edge) for level in levels)
    cut = (inside & edge).sum() / math.sqrt(inside.sum())
    if (inside & clear).sum() < limits.outline_same * (inside | clear).sum() or cut > limits.outline_cut:
        raise ValueError(
            "where is the subject? The background is plain, but shadows or folds blur the subject's outline,"
            " or something reaches in from the border: give a mask (--mask FILE, white = subject), or cut it"
            " out"
        )
    return Image.fromarray(inside.astype(np.uint8) * np.uint8(BYTE))


def _enclosed(stands_out: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """What stands out and what it encloses, bool (H, W): all but the rest that is joined to the edge."""
    labels, _ = components(~stands_out)  # (H, W)
    return ~np.isin(labels, np.unique(labels[edge & ~stands_out]))
