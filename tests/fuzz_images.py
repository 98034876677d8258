"""Images and masks for `tests.fuzz`: every habit of tools, with one right answer each, and damaged files.

A case is its name, what reads it, and whether nothing but a refusal is right; a wrong answer is an
AssertionError.
"""

import io
import random
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from models.clip_image import clip_image
from moma.inputs.preprocess import FORMATS, find_mask, make_reference, on_white, open_image, open_mask

Case = tuple[str, Callable[[], object], bool]
FOREIGN = ("EPS", "PCX", "TGA", "ICO", "PDF", "SGI", "IM", "DDS")
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"", b"not an image", b"<html><body>404</body></html>", b"PK\3\4", PNG, b"%!PS-Adobe-3.0 EPSF")
LEAST = 0.8  # IoU of a right answer


def drawn(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A dark thing, bool (H, W), on a bright plain background, uint8 (H, W, 3)."""
    height, width = rng.choice(((rng.randint(40, 160), rng.randint(40, 160)), (32, rng.randint(400, 3000))))
    rows, columns = np.mgrid[:height, :width]
    y, x = height * rng.uniform(0.4, 0.6), width * rng.uniform(0.4, 0.6)
    tall, wide = height * rng.uniform(0.25, 0.35), width * rng.uniform(0.25, 0.35)
    subject = ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 < 1
    colours = [rng.randint(0, 90) for _ in range(3)], [rng.randint(200, 255)] * 3
    return np.where(subject[..., None], *colours).astype(np.uint8), subject


def iou(mask: Image.Image, subject: np.ndarray) -> float:
    found = np.asarray(mask.resize(subject.shape[::-1])) > 127
    return float((found & subject).sum() / max(1, (found | subject).sum()))


def use(path: Path, mask: Path | None = None) -> Image.Image:
    """As sample.py goes on with an image; its mask."""
    image = open_image(path)
    found = find_mask(image, mask)
    found.doubt()
    make_reference(image, found.mask, 64)
    clip_image(on_white(image), 32)
    return found.mask


def right(path: Path, subject: np.ndarray, mask: Path | None = None) -> None:
    assert (found := iou(use(path, mask), subject)) >= LEAST, f"IoU {found:.2f}"


def right_mask(path: Path, subject: np.ndarray) -> None:
    assert (found := iou(open_mask(path), subject)) >= LEAST, f"IoU {found:.2f}"


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed, cut off, doubled or taken out; or a PNG's header changed with its checksum."""
    data, how = bytearray(content), rng.randrange(5)
    start, size = rng.randrange(len(data)), rng.randint(1, 40)
    if how == 0:
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 1:
        del data[start:]
    elif how == 2:
        data[start:start] = data[start : start + size]
    elif how == 3 or not content.startswith(PNG) or len(content) < 33:
        del data[start : start + size]
    else:
        data[rng.randrange(16, 29)] = rng.choice((0, 1, 2, 3, 4, 8, 16, 255))
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


# --- images ------------------------------------------------------------------------------------------


def plain_file(rng: random.Random, pixels: np.ndarray, subject: np.ndarray) -> tuple[str, bytes, bool]:
    kind, mode = rng.choice(FORMATS), rng.choice(("RGB", "L", "P"))
    mode = "RGB" if mode == "P" and kind not in ("PNG", "GIF", "TIFF", "BMP") else mode
    image = Image.fromarray(pixels)
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    return f"{kind} {mode}", encoded(image, kind), False


def deep_file(rng: random.Random, pixels: np.ndarray, subject: np.ndarray) -> tuple[str, bytes, bool]:
    factor, kind = rng.choice((1, 4, 16, 60, 100, 257)), rng.choice(("PNG", "TIFF"))
    values = np.where(subject, 40, 250).astype(np.uint16) * factor
    return f"{kind} of 16 bits times {factor}", encoded(Image.fromarray(values), kind), factor in (4, 16, 60)


def alpha_file(rng: random.Random, pixels: np.ndarray, subject: np.ndarray) -> tuple[str, bytes, bool]:
    alpha, name = np.full(subject.shape, 255, np.uint8), rng.choice(("cut out", "lost", "noise", "faint"))
    if name == "cut out":
        alpha[~subject] = rng.choice((0, 0, 60))
        pixels = np.random.default_rng(rng.randrange(2**31)).integers(0, 256, pixels.shape, np.uint8)
    elif name == "lost":
        alpha[rng.randrange(len(alpha)), 0] = rng.choice((0, 128, 254))
    elif name == "noise":
        alpha[:: rng.randint(2, 9)] = rng.randint(200, 254)
    else:
        alpha[:] = rng.randint(100, 255)
    kind = rng.choice(("PNG", "WEBP", "TIFF"))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    return (
        f"{kind}, alpha {name}",
        encoded(Image.fromarray(np.dstack([pixels, alpha])), kind, **options),
        False,
    )


def foreign_file(rng: random.Random, pixels: np.ndarray, subject: np.ndarray) -> tuple[str, bytes, bool]:
    if rng.random() < 0.4:
        text = rng.choice(TEXTS)
        return f"text {text!r}", text, True
    kind = rng.choice(FOREIGN)
    return kind, encoded(Image.fromarray(pixels[:40, :40]), kind), True


def wrong_size(rng: random.Random, pixels: np.ndarray, subject: np.ndarray) -> tuple[str, bytes, bool]:
    size = rng.choice(((31, 400), (400, 1), (9000, 9000), (40_000, 3000), (1, 1)))
    return f"size {size}", encoded(Image.new("1", size), rng.choice(("PNG", "TIFF"))), True


def empty_file(rng: random.Random, pixels: np.ndarray, subject: np.ndarray) -> tuple[str, bytes, bool]:
    blank = Image.new("RGBA", subject.shape[::-1], (rng.randrange(256), 9, 9, rng.choice((0, 255))))
    if rng.random() < 0.5:
        return "one colour", encoded(blank, rng.choice(("PNG", "TIFF", "WEBP"))), True
    options = {"save_all": True, "append_images": [Image.fromarray(pixels).convert("RGBA")]}
    return "empty first frame", encoded(blank, rng.choice(("GIF", "WEBP", "TIFF", "PNG")), **options), True


MAKERS = (plain_file, plain_file, deep_file, alpha_file, foreign_file, wrong_size, empty_file)


def images(rng: random.Random, folder: Path) -> Iterator[Case]:
    """References without a mask, half of them damaged."""
    number = 0
    while True:
        number += 1
        pixels, subject = drawn(rng)
        name, content, wrong = rng.choice(MAKERS)(rng, pixels, subject)
        path = folder / f"{number}.{rng.choice(('png', 'jpg', 'gif', 'x'))}"
        if content and rng.random() < 0.5:
            path.write_bytes(damaged(rng, content))
            yield f"{name}, damaged", partial(use, path), False
        else:
            path.write_bytes(content)
            yield name, partial(use, path) if wrong else partial(right, path, subject), wrong
        path.unlink()


# --- masks -------------------------------------------------------------------------------------------


def palette(rng: random.Random, count: int) -> list[int]:
    """Colours of labels: black first, then `count` of different hues."""
    hues = rng.sample(
        [(128, 0, 0), (0, 128, 0), (0, 0, 128), (220, 20, 60), (0, 0, 142), (70, 130, 20)], count
    )
    return [0, 0, 0, *(value for hue in hues for value in hue)]


def one_subject(rng: random.Random, subject: np.ndarray) -> tuple[str, Image.Image, str]:
    """A mask as some tool writes it: its name, the image, the format."""
    size, level = subject.shape[::-1], rng.choice((1, 1, 2, 64, 100, 200, 255))
    kind = rng.choice(
        ("grey", "deep", "wide", "float", "labels", "colour", "soft", "jpeg", "bit", "alpha", "lost")
    )
    grey = Image.fromarray(subject.astype(np.uint8) * 255)
    if kind == "grey":
        return f"0 and {level}", Image.fromarray(subject.astype(np.uint8) * level), "PNG"
    if kind == "deep":
        top = rng.choice((1, 255, 1000, 4095, 65535))
        return (
            f"16 bits, {top}",
            Image.fromarray(subject.astype(np.uint16) * top),
            rng.choice(("PNG", "TIFF")),
        )
    if kind == "wide":
        top = rng.choice((1, 255, 70_000, 2**31 - 1))
        return f"32 bits, {top}", Image.fromarray(subject.astype(np.int32) * top), "TIFF"
    if kind == "float":
        return "float", Image.fromarray(subject.astype(np.float32) * rng.choice((1.0, 255.0))), "TIFF"
    if kind == "labels":
        image = Image.frombytes("P", size, subject.astype(np.uint8).tobytes())
        image.putpalette(palette(rng, 1))
        return "one label", image, rng.choice(("PNG", "GIF"))
    if kind == "colour":
        return (
            "one colour",
            Image.composite(Image.new("RGB", size, (0, 255, 0)), Image.new("RGB", size), grey),
            "PNG",
        )
    if kind == "soft":
        return "soft", grey.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2))), rng.choice(("PNG", "WEBP"))
    if kind == "jpeg":
        return "jpeg", grey.convert(rng.choice(("L", "RGB"))), "JPEG"
    if kind == "bit":
        return "one bit", grey.convert("1"), rng.choice(("PNG", "TIFF", "BMP"))
    if kind == "alpha":
        return "cut out", Image.merge("LA", (Image.new("L", size, rng.randrange(256)), grey)), "PNG"
    alpha = Image.new("L", size, 255)
    alpha.putpixel((0, 0), rng.choice((0, 254)))
    return "lost pixel", Image.merge("LA", (grey, alpha)), "PNG"


def several(rng: random.Random, subject: np.ndarray) -> tuple[str, Image.Image, str]:
    """A map of two things or more: nothing tells which of them is meant."""
    half = np.arange(subject.shape[1]) > subject.shape[1] // 2
    labels = np.where(half, 2, 1).astype(np.uint8) * subject
    kind = rng.choice(("labels", "spread", "void", "deep", "palette", "colours"))
    if kind in ("palette", "colours"):
        image = Image.frombytes("P", subject.shape[::-1], labels.tobytes())
        image.putpalette(palette(rng, 2))
        return kind, image if kind == "palette" else image.convert("RGB"), "PNG"
    tops = {
        "labels": (1, 2),
        "spread": (rng.randint(20, 120), rng.randint(140, 240)),
        "void": (rng.randint(1, 20), 255),
    }
    values = np.array([0, *tops.get(kind, (300, 900))], np.uint16 if kind == "deep" else np.uint8)
    return f"{kind} {values}", Image.fromarray(values[labels]), "PNG"


def masks(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Masks of one subject, of several, of other shapes, and damaged ones."""
    number = 0
    while True:
        number += 1
        pixels, subject = drawn(rng)
        photo, path = folder / "photo.png", folder / f"{number}.png"
        wrong = rng.random() < 0.3
        name, image, kind = (several if wrong else one_subject)(rng, subject)
        content = encoded(image, kind)
        if rng.random() < 0.35:
            path.write_bytes(damaged(rng, content))
            Image.fromarray(pixels).save(photo)
            yield f"{name}, damaged", partial(use, photo, path), False
        elif rng.random() < 0.2:
            path.write_bytes(encoded(image.resize((image.width, image.height * 2)), kind))
            Image.fromarray(pixels).save(photo)
            yield f"{name}, of another shape", partial(use, photo, path), True
        else:
            path.write_bytes(content)
            yield name, partial(open_mask, path) if wrong else partial(right_mask, path, subject), wrong
        path.unlink()
