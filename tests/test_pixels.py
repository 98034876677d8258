"""What files' numbers mean: colour profiles, depths, alpha that says nothing, and masks of every habit."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from moma.inputs.pixels import STRIP, by_strips
from moma.inputs.preprocess import find_mask, on_white, open_image, open_mask
from tests import recipe

SUBJECT = np.zeros((80, 100), bool)
SUBJECT[20:60, 30:70] = True
NOISE = Image.fromarray(recipe.u8("pixels", (80, 100, 3)))


def saved(tmp_path: Path, image: Image.Image | np.ndarray, name: str = "x.png", **options) -> Path:
    path = tmp_path / name
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


# --- colour profiles ---------------------------------------------------------------------------------


def s15(*numbers: float) -> bytes:
    """ICC's fixed-point numbers."""
    return b"".join(struct.pack(">i", round(x * 65536)) for x in numbers)


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2."""
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4x4s4s4s4s12x4s28x", 132 + len(table) + len(body), b"\2\x40\0\0", b"mntr", space, pcs, b"acsp"
    )
    return head + s15(0.9642, 1, 0.8249) + bytes(48) + table + body


def matrix(*colorants: tuple[float, float, float], gamma: float) -> bytes:
    """A profile of three primaries."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"rgb"[i : i + 1] + b"XYZ": b"XYZ \0\0\0\0" + s15(*c) for i, c in enumerate(colorants)}
    return profile(b"RGB ", b"XYZ ", tags | {name + b"TRC": curve for name in (b"r", b"g", b"b")})


def inks() -> bytes:
    """A profile of a press whose black is black and whose other inks only darken."""
    identity = bytes(range(256))
    table = [(255 - 60 * (c + m + y) if not k else 0, 128, 128) for c, m, y, k in np.ndindex(2, 2, 2, 2)]
    head = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = bytes(v for row in table for v in row)
    return profile(b"CMYK", b"Lab ", {b"A2B0": head + 4 * identity + table + 3 * identity})


P3 = matrix((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), gamma=2.2)
PROPHOTO = matrix((0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00009, 0.82491), gamma=1.8)
SRGB = ImageCms.createProfile("sRGB")


def through(image: Image.Image, data: bytes) -> np.ndarray:
    """The colours that a profile gives an image."""
    return np.asarray(ImageCms.profileToProfile(image, io.BytesIO(data), SRGB, outputMode="RGB"))


@pytest.mark.parametrize("data", [P3, PROPHOTO])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_profiles_become_srgb(tmp_path, data, mode):
    image = NOISE.quantize(32) if mode == "P" else NOISE.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(recipe.u8("alpha", (80, 100))))
    opened = open_image(saved(tmp_path, image, icc_profile=data))
    assert np.array_equal(np.asarray(opened.convert("RGB")), through(image.convert("RGB"), data))
    assert mode == "L" or opened.convert("RGB").tobytes() != image.convert("RGB").tobytes()
    assert "icc_profile" not in opened.info  # nobody applies it again
    if mode == "RGBA":
        assert opened.getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_inks_have_the_colours_of_their_profile(tmp_path):
    image = Image.merge("CMYK", [*NOISE.split(), Image.new("L", NOISE.size, 20)])
    opened = open_image(saved(tmp_path, image, "x.tif", icc_profile=inks()))
    assert np.array_equal(np.asarray(opened), through(image, inks()))
    assert opened.tobytes() != image.convert("RGB").tobytes()


@pytest.mark.parametrize("data", [ImageCms.ImageCmsProfile(SRGB).tobytes(), b"broken" * 99, inks()])
def test_srgb_broken_and_unfit_profiles_change_nothing(tmp_path, data):
    assert open_image(saved(tmp_path, NOISE, icc_profile=data)).tobytes() == NOISE.tobytes()


# --- depths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_deep_files_of_small_values(tmp_path, kind, suffix):
    grey = np.where(SUBJECT, 60, 200).astype(kind)
    opened = open_image(saved(tmp_path, grey, f"x.{suffix}"))
    assert np.array_equal(np.asarray(opened)[..., 0], grey)
    assert np.asarray(open_image(saved(tmp_path, (grey * 300).astype(kind), f"x.{suffix}"))).max() == 234
    for factor in (20, 60, 1 / 200):  # 12 bits; 14 bits; 0 and 1
        with pytest.raises(ValueError, match=f"{int(200 * factor / (256 if factor > 1 else 1))} of 255"):
            open_image(saved(tmp_path, (grey * factor).astype(kind), f"x.{suffix}"))


def png16(rgb: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which PIL does not write."""
    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_colours_of_16_bits(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png16(np.asarray(NOISE).astype(int) * 257))
    assert open_image(path).tobytes() == NOISE.tobytes()
    path.write_bytes(png16(np.asarray(NOISE).astype(int) * 15))  # 12 bits
    with pytest.raises(ValueError, match="14 of 255"):
        open_image(path)


# --- transparency ------------------------------------------------------------------------------------


def alphas() -> dict[str, np.ndarray]:
    found = {
        name: np.full(SUBJECT.shape, 255, np.uint8)
        for name in ("a lost pixel", "nearly opaque", "corners", "rounded")
    }
    found["a lost pixel"][0, 0] = 0
    found["nearly opaque"][::7, ::5] = 253
    for row, column in ((0, 0), (0, -3), (-3, 0), (-3, -3)):
        found["corners"][row:, column:][:3, :3] = 0
    rounded = Image.new("L", (100, 80))
    ImageDraw.Draw(rounded).rounded_rectangle((0, 0, 99, 79), 11, fill=255)
    found["rounded"] = np.asarray(rounded)
    return found


@pytest.mark.parametrize("name", alphas())
def test_alpha_that_says_nothing(tmp_path, name):
    """In images and in masks."""
    photo = np.where(SUBJECT[..., None], (200, 60, 40), 250).astype(np.uint8)
    image = open_image(saved(tmp_path, np.dstack([photo, alphas()[name]])))
    found = find_mask(image)
    assert found.source == "border" and np.array_equal(np.asarray(found.mask) > 127, SUBJECT)
    white = np.where(SUBJECT, 255, 0).astype(np.uint8)
    mask = open_mask(saved(tmp_path, np.dstack([white, white, white, alphas()[name]])))
    assert np.array_equal(np.asarray(mask) > 127, SUBJECT)


# --- masks -------------------------------------------------------------------------------------------


def voc() -> list[int]:
    """The colours of PASCAL VOC's label maps."""
    colours = []
    for label in range(256):
        bits = [[label >> 3 * i + channel & 1 for i in range(3)] for channel in range(3)]
        colours += [sum(bit << 7 - i for i, bit in enumerate(channel)) for channel in bits]
    return colours


def labelled(labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image = Image.frombytes("P", image.size, labels.astype(np.uint8).tobytes())
    image.putpalette(voc())
    return image


READ = {
    "0 and 1": SUBJECT.astype(np.uint8),
    "0 and 100": SUBJECT.astype(np.uint8) * 100,
    "16 bits, 0 and 1": SUBJECT.astype(np.uint16),
    "16 bits, 0 and 255": SUBJECT.astype(np.uint16) * 255,
    "16 bits, 0 and 1000": SUBJECT.astype(np.uint16) * 1000,
    "16 bits": SUBJECT.astype(np.uint16) * 65535,
    "32 bits, large": SUBJECT.astype(np.int32) * (2**31 - 1),
    "float": SUBJECT.astype(np.float32),
    "VOC, one class": labelled(SUBJECT * 8),
    "VOC colours": labelled(SUBJECT * 8).convert("RGB"),
    "soft": Image.fromarray(SUBJECT.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(6)),
    "supersampled": Image.fromarray(SUBJECT.repeat(3, 0).repeat(3, 1)[1:, 1:]).convert("L").reduce(3),
    "254": np.where(SUBJECT, 254, 0).astype(np.uint8) + (np.arange(100) > 50).astype(np.uint8) * SUBJECT,
}


@pytest.mark.parametrize("name", READ)
def test_masks_that_are_read(tmp_path, name):
    kind = "tif" if "32" in name or name == "float" else "png"
    mask = np.asarray(open_mask(saved(tmp_path, READ[name], f"m.{kind}"))) > 127
    assert mask.shape == SUBJECT.shape and (mask ^ SUBJECT).sum() < 0.03 * SUBJECT.size


STRIPES = np.where(np.arange(100) < 50, SUBJECT, 2 * SUBJECT)  # labels 0, 1 and 2
NAMED = {
    "labels": (STRIPES.astype(np.uint8), "0, 1, 2"),
    "bright labels": ((STRIPES * 100).astype(np.uint8), "0, 100, 200"),
    "trimap": (np.array([0, 128, 255], np.uint8)[STRIPES], "0, 128, 255"),
    "a class and the void": (np.array([0, 1, 255], np.uint8)[STRIPES], "0, 1, 255"),
    "16-bit labels": (STRIPES.astype(np.uint16) * 700, "0, 700, 1400"),
    "VOC": (labelled(np.array([0, 8, 12])[STRIPES]), "0, 8, 12"),
    "VOC with the void": (labelled(np.array([0, 8, 255])[STRIPES]), "0, 8, 255"),
    "colours": (np.array([(0, 0, 0), (220, 20, 60), (0, 0, 142)], np.uint8)[STRIPES], "220, 20, 60"),
    "a dim drawing": (np.asarray(NOISE.convert("L")) // 4, "values"),
    "float": (SUBJECT.astype(np.float32) * np.nan, "nan"),
    "negative": (SUBJECT.astype(np.int32) * -1, "-1"),
}


@pytest.mark.parametrize("name", NAMED)
def test_masks_whose_values_are_named(tmp_path, name):
    mask, named = NAMED[name]
    kind = "tif" if name in ("float", "negative") else "png"
    with pytest.raises(ValueError, match=named):
        open_mask(saved(tmp_path, mask, f"m.{kind}"))


# --- PNG's own words for colours -----------------------------------------------------------------------

SRGB_XY = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # of cHRM


@pytest.mark.parametrize(
    ("gamma", "xy", "srgb", "expected"),
    [
        (45455, SRGB_XY, False, (150, 120, 100)),
        (100_000, None, False, (201, 182, 168)),  # linear: IEC 61966-2-1's curve
        (100_000, None, True, (150, 120, 100)),
        # Display P3; by its matrix to sRGB's in linear light
        (45455, (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000), False, (156, 119, 97)),
        (45455, (0,) * 8, False, (150, 120, 100)),
        (45455, (1, 1) * 4, False, (150, 120, 100)),
    ],
)
def test_gamma_and_primaries_of_a_png_count(gamma, xy, srgb, expected, tmp_path):
    chunks = PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", gamma))
    if xy:
        chunks.add(b"cHRM", struct.pack(">8I", *xy))
    if srgb:
        chunks.add(b"sRGB", b"\0")
    image = Image.new("RGB", (40, 40), (150, 120, 100))
    assert open_image(saved(tmp_path, image, pnginfo=chunks)).getpixel((0, 0)) == pytest.approx(
        expected, abs=1
    )


def test_linear_values_of_16_bits_count(tmp_path):
    chunks = PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", 100_000))
    path = saved(tmp_path, np.full((40, 40), 150 * 257, np.uint16), pnginfo=chunks)
    assert open_image(path).getpixel((0, 0))[0] == pytest.approx(201, abs=1)


def test_strips_make_no_difference():
    values = recipe.u8("strips", (3 * STRIP // 2000 + 7, 2000, 4))
    image = Image.fromarray(values)
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert on_white(image).tobytes() == whole.tobytes()
    assert by_strips(image, "RGBA", lambda part: part).tobytes() == image.tobytes()
