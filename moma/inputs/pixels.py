"""What the numbers in an image file mean: depths, colour profiles, transparency, masks.

All functions take PIL images as decoded, in their own mode. `what` names the image in messages.
"""

import io
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFilter

HALF = 127  # the largest 8-bit value that is not subject
BYTE, WORD = 255, 65535  # the largest values of 8 and 16 bits
WIDE = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}  # PIL's modes of more than 8 bits
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # a profile's colours -> PIL's mode
FITS = {"RGB": ("1", "L", "LA", "P", "PA", "RGBA"), "L": ("1", "LA")}  # other modes that its profile suits
SRGB = ImageCms.createProfile("sRGB")
WHITE_XY, PRIMARIES_XY = (0.3127, 0.329), (0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # of sRGB, as in PNG's cHRM
GAMMA = 1 / 2.2  # as in PNG's gAMA: what stands for sRGB's curve
D50 = np.array([0.9642, 1, 0.8249])  # XYZ of the white that ICC profiles are stated for
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC's parameters g, a, b, c, d
STEP = 64  # of 8-bit values, where colours are told apart
STRIP = 2**20  # pixels of a large image that are converted at a time, so that few copies of it exist


@dataclass(frozen=True)
class PixelConfig:
    """When values are what they seem."""

    # A 16-bit file whose largest value, as 8 bits, is lower holds something else: 0 and 1, or 12 bits.
    least_peak: int = 4  # of values up to 255, which are not scaled
    least_scaled_peak: int = 64
    shift: int = 2  # of 255: a profile that moves no colour further is sRGB
    lattice: int = 16  # values per channel at which a profile is tried
    # Share of pixels that must be transparent; below it they are lost pixels or round corners.
    transparent_share: float = 0.02
    # A mask's areas of one value, each with this share of the pixels: more than two are labels.
    label_share: float = 0.002
    label_side: int = 1024  # pixels; larger masks are sampled to find their labels, for speed
    few: int = 16  # different values in a mask; with more, those near each other are noise of one
    noise: int = 8  # of 255
    listed: int = 6  # values named in an error


PIXELS = PixelConfig()


def eight_bits(image: Image.Image, what: str, deep: bool, cfg: PixelConfig = PIXELS) -> Image.Image:
    """The image with 8 bits per channel. Values of 16 bits are scaled, unless none is above 255.

    Args:
        image: in any mode.
        what: names it.
        deep: the file has 16 bits per channel, which PIL has cut to 8 unless the mode has more.
        cfg: what is too dark to be meant.
    Raises:
        ValueError: for values of 32 bits or fractions, and for small values, where nothing could be seen.
    """
    scaled = deep
    if image.mode in WIDE:
        deep = True
        low, high = image.getextrema()
        if image.mode == "F" or low < 0 or high > WORD:
            kind = "float" if image.mode == "F" else "32-bit"
            raise ValueError(
                f"{what} has {kind} values, {low:g} to {high:g}: expected 8 or 16 bits, convert it"
            )
        scaled, info = high > BYTE, image.info
        share = 1 / (BYTE + 1) if scaled else 1
        image = by_strips(image, "L", lambda part: part.convert("I").point(lambda v: v * share).convert("L"))
        image.info = {k: v for k, v in info.items() if k != "transparency"}  # a value that was not scaled
    if deep and not image.has_transparency_data:
        peak = max(high for _, high in image.convert("RGB").getextrema())
        if peak < (cfg.least_scaled_peak if scaled else cfg.least_peak):
            raise ValueError(
                f"{what} is black: 16-bit values that reach {peak} of {BYTE} as 8 bits; convert it"
            )
    return image


def in_srgb(image: Image.Image, cfg: PixelConfig = PIXELS) -> Image.Image:
    """RGB, or RGBA if it has transparency, in sRGB: an embedded profile is applied, unless it is broken.

    Args:
        image: with 8 bits per channel.
        cfg: which profiles are sRGB.
    """
    kind = "RGBA" if image.has_transparency_data else "RGB"
    seen, data = None, image.info.get("icc_profile") or _png_profile(image.info)
    with suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data or b""))
        mode = SPACES.get(profile.profile.xcolor_space.strip())
        if mode == image.mode or image.mode in FITS.get(mode, ()):
            change = ImageCms.buildTransform(profile, SRGB, mode, "RGB")
            if mode not in ("RGB", "L") or _moves(change, mode, cfg) > cfg.shift:

                def changed(part: Image.Image) -> Image.Image:
                    seen = part.convert(kind)
                    found = ImageCms.applyTransform(part if part.mode == mode else seen.convert(mode), change)
                    if kind == "RGBA":
                        found.putalpha(seen.getchannel("A"))
                    return found

                seen = by_strips(image, kind, changed)
                seen.info = {key: value for key, value in image.info.items() if key != "transparency"}
    seen = image.convert(kind) if seen is None else seen
    seen.info.pop("icc_profile", None)
    return seen


def _png_profile(info: Mapping[str, Any], tolerance: float = 0.01) -> bytes:
    """The ICC profile that a PNG's chunks gAMA and cHRM stand for; b"" where they say sRGB, or nothing."""
    gamma, xy = info.get("gamma", GAMMA), np.array(info.get("chromaticity", WHITE_XY + PRIMARIES_XY))
    curve = SRGB_CURVE if abs(gamma - GAMMA) <= tolerance else (1 / gamma,) if gamma > 0 else ()
    standard = np.abs(xy - (WHITE_XY + PRIMARIES_XY)).max() <= tolerance
    if "srgb" in info or not curve or (standard and curve is SRGB_CURVE) or not (xy[1::2] > 0).all():
        return b""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in xy.reshape(4, 2)]).T  # columns: white, R, G, B
    with suppress(ValueError, OverflowError, struct.error):  # colours that no profile can have
        colorants = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])
        adapted = np.diag(BRADFORD @ D50 / (BRADFORD @ xyz[:, 0]))
        colorants = np.linalg.solve(BRADFORD, adapted @ BRADFORD @ colorants)
        numbers = {
            f"{band}XYZ".encode(): (b"XYZ \0\0\0\0", v) for band, v in zip("rgb", colorants.T, strict=True)
        }
        form = b"para\0\0\0\0" + struct.pack(">H2x", 3 if curve is SRGB_CURVE else 0)
        numbers |= {f"{band}TRC".encode(): (form, curve) for band in "rgb"}
        table, body = struct.pack(">I", len(numbers)), b""
        for name, (start, values) in numbers.items():
            tag = start + b"".join(struct.pack(">i", round(v * 2**16)) for v in values)
            table += name + struct.pack(">II", 132 + 12 * len(numbers) + len(body), len(tag))
            body += tag
        sizes = struct.pack(">I4x", 128 + len(table) + len(body)) + b"\4\0\0\0mntrRGB XYZ "
        white = b"".join(struct.pack(">i", round(v * 2**16)) for v in D50)
        return sizes + bytes(12) + b"acsp" + bytes(28) + white + bytes(48) + table + body
    return b""


def by_strips(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What a function of single pixels makes of an image, from some rows at a time.

    Args:
        image: in any mode.
        mode: of the result.
        change: takes an image and returns one of that mode.
    """
    made, rows = Image.new(mode, image.size), max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        made.paste(change(image.crop(box)), box)
    return made


def _moves(change: ImageCms.ImageCmsTransform, mode: str, cfg: PixelConfig) -> int:
    """How far a transform moves a colour of a lattice, at most."""
    steps = np.linspace(0, BYTE, cfg.lattice).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(cfg.lattice, -1, 3)
    before = Image.fromarray(colours if mode == "RGB" else colours[..., 0].copy())
    pairs = zip(before.convert("RGB").split(), ImageCms.applyTransform(before, change).split(), strict=True)
    return max(ImageChops.difference(*pair).getextrema()[1] for pair in pairs)


def real_alpha(image: Image.Image, cfg: PixelConfig = PIXELS) -> Image.Image | None:
    """The alpha channel if it says where something is: a real share is transparent, and not everything."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    share = sum(alpha.histogram()[: HALF + 1]) / (alpha.width * alpha.height)
    return alpha if cfg.transparent_share <= share < 1 else None


def mask_of(image: Image.Image, what: str, cfg: PixelConfig = PIXELS) -> Image.Image:
    """The mask that an image means; mode L, 255 = subject.

    Its transparency counts, else its brightest channel. Where nothing is bright, the higher of two values is
    the subject: masks of 0 and 1, or of one label.

    Args:
        image: in any mode and depth.
        what: names it.
        cfg: what is a label.
    Raises:
        ValueError: for more labels or colours than two; it names them.
    """
    if (alpha := real_alpha(image, cfg)) is not None:
        return alpha
    grey, dim = image, False
    if image.mode in WIDE:
        low, high = image.getextrema()
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"{what} has values from {low:g} to {high:g}: expected 0 and {BYTE}")
        top = high if high > BYTE or (image.mode == "F" and 0 < high <= 1) else BYTE

        def scaled(part: Image.Image) -> Image.Image:
            values = part if part.mode == "F" else part.convert("I").convert("F")
            return values.point(lambda v: v * (BYTE / top) + 0.5).convert("L")

        grey = by_strips(image, "L", scaled)
        dim = BYTE < top < WORD // 4
    channels = (grey if grey.mode == "L" else grey.convert("RGB")).split()
    mask = reduce(ImageChops.lighter, channels)
    levels = [value for value, count in enumerate(mask.histogram()) if count]
    dim = dim or levels[-1] <= HALF
    if len(levels) == 2 and dim:
        return mask.point(lambda v: BYTE * (v == levels[-1]))
    if (len(levels) > 2 and (dim or _labels(mask, len(levels), cfg))) or _hues(channels, cfg) > 1:
        raise ValueError(
            f"{what} has {_values(image, cfg)}: expected one subject, white ({BYTE}) on black (0)"
        )
    return mask


def _labels(mask: Image.Image, levels: int, cfg: PixelConfig) -> bool:
    """Whether more than two values fill areas. A soft edge has more values, but fills none with them."""
    small = _sampled(mask, cfg)
    ranges = (small.filter(kind(3)) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    flat = ImageChops.difference(*ranges).point(lambda v: BYTE * (v == 0))
    least = cfg.label_share * small.width * small.height
    areas = [min(v, BYTE - cfg.noise) for v, count in enumerate(small.histogram(flat)) if count >= least]
    same = cfg.noise if levels > cfg.few else 0
    return sum(value - before > same for before, value in pairwise(areas)) > 1


def _hues(channels: Sequence[Image.Image], cfg: PixelConfig) -> int:
    """How many hues have a real share of the pixels, told apart by their strongest channels."""
    if len(channels) == 1:
        return 0
    small = _sampled(Image.merge("RGB", channels), cfg)
    found = small.point(lambda v: v // STEP).getcolors() or []  # at most 4 ** 3
    least = cfg.label_share * small.width * small.height
    hues = {
        tuple(v == max(colour) for v in colour)
        for count, colour in found
        if max(colour) > min(colour) and count >= least
    }
    return len(hues)


def _sampled(image: Image.Image, cfg: PixelConfig) -> Image.Image:
    """Some of the pixels of a large image, unmixed."""
    size = tuple(min(side, cfg.label_side) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.NEAREST)


def _values(image: Image.Image, cfg: PixelConfig) -> str:
    """The most frequent values of an image, for a message: labels, greys or colours."""
    if image.mode in WIDE:
        sample = np.unique(np.asarray(_sampled(image, cfg)))
        found, common = sample, sample[: cfg.listed].tolist()
    else:
        found = _sampled(image, cfg).getcolors(cfg.label_side**2) or []
        common = sorted(value for _, value in sorted(found, key=lambda pair: -pair[0])[: cfg.listed])
    return f"{len(found)} values, such as {', '.join(map(str, common))}"
