"""Image files of every kind, the ways to a mask, geometry, and the release's tensors."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from safetensors import safe_open

from moma.inputs.preprocess import (
    InputConfig,
    ReferenceConfig,
    _box_side,
    find_mask,
    make_reference,
    on_white,
    open_image,
    open_mask,
    same_aspect,
)
from moma.methods.moma.config import RELEASE
from tests import recipe
from tests.golden_files import CARRIED

GOLDEN = CARRIED / "preprocess.safetensors"
RED, BLUE = (200, 30, 40), (30, 60, 200)


def scene(width: int = 120, height: int = 80) -> Image.Image:
    """A red disc, diameter 40, left of the middle on a varying background."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 180 + (x + y) % 20], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).ellipse((30, 20, 69, 59), fill=RED)
    return image


def disc(width: int = 120, height: int = 80) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((30, 20, 69, 59), fill=255)
    return mask


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **options) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


# --- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("1", "png", "RGB"),
        ("L", "png", "RGB"),
        ("LA", "png", "RGBA"),
        ("P", "png", "RGB"),
        ("RGB", "jpg", "RGB"),
        ("RGBA", "png", "RGBA"),
        ("CMYK", "jpg", "RGB"),
        ("YCbCr", "jpg", "RGB"),
        ("LAB", "tif", "RGB"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, expected):
    image = open_image(
        saved(tmp_path, scene().convert("RGB").convert(mode) if mode != "LAB" else lab(), f"x.{suffix}")
    )
    assert image.mode == expected and image.size == (120, 80)
    if mode in ("RGB", "CMYK", "RGBA"):
        assert np.abs(np.asarray(image.convert("RGB")).astype(int)[40, 50] - RED).max() < 12


def lab() -> Image.Image:
    return Image.new("LAB", (120, 80), (128, 128, 128))


def test_palette_with_transparency_has_alpha(tmp_path):
    image = scene().quantize(16)
    path = saved(tmp_path, image, transparency=image.getpixel((0, 0)))
    opened = open_image(path)
    assert opened.mode == "RGBA" and opened.getpixel((0, 0))[3] == 0 and opened.getpixel((50, 40))[3] == 255


def test_transparent_colour_of_an_rgb_png_has_alpha(tmp_path):
    image = Image.new("RGB", (64, 64), BLUE)
    image.paste(RED, (10, 10, 40, 40))
    opened = open_image(saved(tmp_path, image, transparency=BLUE))
    assert opened.mode == "RGBA" and opened.getpixel((0, 0))[3] == 0 and opened.getpixel((20, 20))[3] == 255


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = open_image(saved(tmp_path, Image.fromarray(ramp), f"x.{suffix}"))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 0], ramp >> 8)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    image = Image.new("RGB", (100, 60), BLUE)
    image.paste(RED, (0, 0, 100, 30))
    opened = open_image(saved(tmp_path, image, "x.png", exif=exif))
    assert opened.size == (60, 100)
    assert opened.getpixel((50, 50)) == RED and opened.getpixel((10, 50)) == BLUE


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).convert("RGB").getpixel((3, 3)) == RED


@pytest.mark.parametrize("empty", [("RGB", (64, 64), "white"), ("RGBA", (64, 64), (9, 9, 9, 0))])
def test_an_animation_that_begins_empty_is_named(tmp_path, empty):
    frames = [Image.new(*empty), scene(64, 64)]
    path = tmp_path / "x.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for more in ({}, {"segment": pytest.fail}, {"mask_path": saved(tmp_path, disc(64, 64))}):
        with pytest.raises(ValueError, match="2 frames"):
            find_mask(open_image(path), **more)


@pytest.mark.parametrize("format", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_other_formats_are_not_opened(tmp_path, format, monkeypatch):
    """Some of PIL's readers start programs, whatever a file's name says."""
    path = saved(tmp_path, scene(64, 64), "cat.png", format=format)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
    for reader in (open_image, open_mask):
        with pytest.raises(ValueError, match=r"cat\.png"):
            reader(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_formats_that_people_have(tmp_path, format):
    path = saved(tmp_path, scene(), "x", format=format)
    assert np.abs(np.asarray(open_image(path).convert("RGB")).astype(int)[40, 50] - RED).max() < 12


def broken_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    whole = saved(tmp_path, Image.fromarray(recipe.u8("noise", (200, 200, 3))), "whole.png").read_bytes()
    files = {
        "cut off": (whole[: len(whole) // 2], "broken or cut off"),
        "damaged": (whole[:60] + bytes(40) + whole[100:], "broken or cut off"),
        "text": (b"not an image at all", "is not an image"),
        "empty": (b"", "is not an image"),
    }
    cases = {}
    for name, (content, message) in files.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        cases[name] = (path, message)
    jpeg = saved(tmp_path, scene(400, 400), "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    cases["cut jpeg"] = (tmp_path / "cut.jpg", "broken or cut off")
    cases["missing"] = (tmp_path / "no.png", "no such file")
    (tmp_path / "link.png").symlink_to("gone.png")
    cases["link"] = (tmp_path / "link.png", "gone.png")
    cases["folder"] = (tmp_path, "a folder")
    cases["tiny"] = (saved(tmp_path, Image.new("RGB", (31, 500)), "tiny.png"), "31x500")
    cases["float"] = (saved(tmp_path, Image.new("F", (64, 64), 0.5), "float.tif"), "float values")
    wide = Image.fromarray(np.full((64, 64), 70_000, np.int32))
    cases["32 bit"] = (saved(tmp_path, wide, "wide.tif"), "32-bit values")
    return cases


@pytest.mark.parametrize(
    "name",
    [
        "cut off",
        "damaged",
        "text",
        "empty",
        "cut jpeg",
        "missing",
        "link",
        "folder",
        "tiny",
        "float",
        "32 bit",
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, name):
    path, message = broken_files(tmp_path)[name]
    with pytest.raises(ValueError, match=message) as error:
        open_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_huge_images_are_refused_from_the_header(tmp_path):
    path = saved(tmp_path, Image.new("1", (10_000, 8_001)))  # 80 million pixels in a few kB
    with pytest.raises(ValueError, match="80,000,000"):
        open_image(path)
    path = saved(tmp_path, Image.new("1", (20_000, 9_500)))  # PIL itself refuses from 179 million on
    with pytest.raises(ValueError, match="80,000,000"):
        open_image(path)


# --- finding the mask ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["L", "1", "RGB", "RGBA", "colour", "cut-out", "jpg"])
def test_mask_files_of_every_kind(tmp_path, kind):
    mask = disc()
    if kind == "colour":
        mask = Image.composite(Image.new("RGB", mask.size, (0, 255, 0)), Image.new("RGB", mask.size), mask)
    elif kind == "cut-out":  # the subject itself on transparency: its shape counts, not its colours
        mask = Image.new("RGBA", mask.size, (0, 0, 0, 0))
        mask.paste((10, 10, 10, 255), mask=disc())
    elif kind != "jpg":
        mask = mask.convert(kind)
    found = find_mask(scene(), saved(tmp_path, mask, "m.jpg" if kind == "jpg" else "m.png"))
    assert found.source == "file" and found.mask.mode == "L"
    assert np.array_equal(np.asarray(found.mask) > 127, np.asarray(disc()) > 127)


def test_alpha_channel_is_the_mask(tmp_path):
    image = scene()
    image.putalpha(disc())
    found = find_mask(image)
    assert found.source == "alpha" and np.array_equal(np.asarray(found.mask), np.asarray(disc()))
    # A file wins over it.
    assert find_mask(image, saved(tmp_path, disc())).source == "file"


def test_transparent_parts_become_white_whatever_their_hidden_colour():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*RED, 255), (16, 16, 48, 48))
    reference = make_reference(image, find_mask(image).mask, 64)
    assert reference.photo.getpixel((2, 2)) == (255, 255, 255) and reference.photo.getpixel((30, 30)) == RED


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_every_kind_of_transparency_becomes_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert on_white(image.convert(mode)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_images_of_16_bits_are_scaled_as_their_files_are(tmp_path, mode):
    deep = Image.fromarray((np.asarray(scene().convert("L")).astype(np.uint16) << 8) + 7)
    made = [make_reference(x, disc(), 64) for x in (deep.convert(mode), open_image(saved(tmp_path, deep)))]
    assert torch.equal(made[0].image, made[1].image) and made[0].image.std() > 0.1


def test_images_of_fractions_are_refused():
    with pytest.raises(ValueError, match="float values, 0 to 1"):
        make_reference(
            Image.linear_gradient("L").convert("F").point(lambda v: v / 255 + 0), disc(256, 256), 64
        )


def test_constant_alpha_says_nothing():
    image = scene()
    image.putalpha(255)
    with pytest.raises(ValueError, match="--mask"):
        find_mask(image)


def plain(background: tuple[int, int, int] = (240, 240, 238)) -> Image.Image:
    """A red ring with background inside and outside, slightly noisy."""
    image = Image.new("RGB", (200, 160), background)
    ImageDraw.Draw(image).ellipse((50, 30, 149, 129), fill=RED)
    ImageDraw.Draw(image).ellipse((85, 65, 114, 94), fill=background)
    noise = recipe.ints("plain noise", (160, 200, 3), -8, 9)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("background", [(240, 240, 238), (0, 0, 0), (20, 120, 60)])
def test_plain_background_is_found_and_holes_stay_subject(background):
    found = find_mask(plain(background))
    expected = Image.new("L", (200, 160))
    ImageDraw.Draw(expected).ellipse((50, 30, 149, 129), fill=255)  # without the hole
    assert found.source == "border"
    assert np.array_equal(np.asarray(found.mask), np.asarray(expected))


def test_plain_background_with_winding_bays():
    """The flood must turn corners: a spiral of subject walls with background between them."""
    image = Image.new("RGB", (90, 90), "white")
    draw = ImageDraw.Draw(image)
    for inset in (10, 20, 30):
        draw.rectangle((inset, inset, 89 - inset, 89 - inset), outline=RED, width=2)
        draw.rectangle((inset + 3, inset, inset + 6, inset + 1), fill="white")  # a door in each wall
    assert not find_mask(image).mask.getpixel((45, 45))
    draw.rectangle((10, 10, 79, 79), outline=RED, width=2)  # shut the outermost door
    assert find_mask(image).mask.getpixel((45, 45)) == 255


def test_subject_may_touch_a_little_of_the_border():
    image = plain()
    image.paste(RED, (80, 100, 110, 160))  # feet on the lower edge, 4% of the border
    found = find_mask(image)
    assert found.mask.getpixel((95, 159)) == 255 and found.mask.getpixel((5, 159)) == 0


def unclear(what: str) -> Image.Image:
    """A red disc on grey, where something else stands out as well."""
    image = Image.new("RGB", (200, 160), (200, 200, 200))
    draw = ImageDraw.Draw(image)
    if what == "a shadow":
        draw.ellipse((40, 100, 190, 150), fill=(165, 165, 165))
    if what == "folds":
        for x in range(10, 200, 12):
            draw.line((x, 0, x - 8, 120), fill=(235, 235, 235), width=3)
    if what == "a hand":
        draw.polygon(((90, 120), (110, 120), (120, 159), (80, 159)), fill=(180, 120, 90))
        draw.ellipse((85, 70, 115, 130), fill=RED)
    elif what == "little contrast":
        draw.ellipse((50, 30, 149, 129), fill=(230, 215, 215))
    else:
        draw.ellipse((60, 30, 129, 99), fill=RED)
    return image


@pytest.mark.parametrize("what", ["a shadow", "folds", "a hand", "little contrast"])
def test_an_unclear_outline_asks_for_a_mask(what):
    """A wrong subject would be worse than none."""
    with pytest.raises(ValueError, match="--mask"):
        find_mask(unclear(what))
    assert find_mask(unclear("nothing")).source == "border"


def test_large_images_give_a_mask_of_bounded_size_and_the_same_shape():
    found = find_mask(plain().resize((2400, 1920)), limits=InputConfig(border_side=300))
    assert max(found.mask.size) == 300
    make_reference(plain(), found.mask, 64)


@pytest.mark.parametrize("size", [(9000, 32), (3000, 40), (40, 2500), (200_000, 32)])
def test_own_masks_of_thin_images_fit(size):
    width, height = size
    image = Image.new("RGB", size, "white")
    box = (width // 3, height // 4, width // 2, 3 * height // 4)
    image.paste(RED, box)
    found = find_mask(image).mask
    assert found.width * found.height <= 1.1 * 1024**2
    mask = np.asarray(found.resize(size, Image.Resampling.NEAREST)) > 127
    expected = np.zeros(mask.shape, bool)
    expected[box[1] : box[3], box[0] : box[2]] = True
    assert (mask & expected).sum() / (mask | expected).sum() > 0.6
    make_reference(image, found, 512, ReferenceConfig(geometry="crop"))


def test_shapes_differ_by_the_rounding_at_most():
    assert same_aspect((3000, 40), (1024, 14)) and same_aspect((1024, 14), (3000, 40))
    assert same_aspect((1000, 999), (64, 64))
    assert not same_aspect((3000, 40), (1024, 16)) and not same_aspect((100, 50), (100, 53))


@pytest.mark.parametrize("kind", ["painted", "cut out"])
def test_inverted_masks_are_doubted(tmp_path, kind):
    inverted = ImageChops.invert(disc())
    if kind == "cut out":
        inverted = Image.merge("LA", (disc(), inverted))
    found = find_mask(scene(), saved(tmp_path, inverted, "m.png"))
    share, border = found.shares()
    assert border == 1 and share == pytest.approx(1 - np.pi * 400 / 9600, abs=0.01)
    assert "87%" in found.doubt() and "100%" in found.doubt()
    assert find_mask(scene(), saved(tmp_path, disc())).doubt() is None


def test_a_network_comes_after_file_and_alpha_and_before_the_border(tmp_path):
    asked = []

    def segment(image: Image.Image) -> Image.Image:
        asked.append(image)
        return disc()

    transparent = scene()
    transparent.putalpha(disc())
    assert find_mask(scene(), saved(tmp_path, disc()), segment=segment).source == "file"
    assert find_mask(transparent, segment=segment).source == "alpha" and not asked
    for image in (scene(), plain()):
        found = find_mask(image, segment=segment)
        assert found.source == "sam" and asked.pop() is image
        assert np.array_equal(np.asarray(found.mask), np.asarray(disc()))


def test_where_a_network_finds_nothing_the_border_decides(tmp_path):
    def segment(image: Image.Image) -> Image.Image:
        raise ValueError("no object")

    assert find_mask(plain(), segment=segment).source == "border"
    with pytest.raises(ValueError, match="no object"):
        find_mask(scene(), segment=segment)


def test_busy_border_asks_for_a_mask():
    with pytest.raises(ValueError, match="--mask"):
        find_mask(scene())


def test_one_plain_colour_has_no_subject():
    for image in (Image.new("RGB", (64, 64), BLUE), Image.new("RGBA", (64, 64), (*BLUE, 0))):
        for more in ({}, {"segment": pytest.fail}, {"segment": pytest.fail, "plain_first": True}):
            with pytest.raises(ValueError, match="colour"):
                find_mask(image, **more)


# --- making the reference --------------------------------------------------------------------------


def test_reference_is_square_and_consistent():
    for background in ("photo", "white"):
        reference = make_reference(scene(), disc(), 96, ReferenceConfig(reference_background=background))
        assert reference.image.shape == (1, 3, 96, 96) and reference.image.dtype == torch.float32
        assert reference.mask.shape == (1, 1, 96, 96) and set(reference.mask.unique().tolist()) == {0, 1}
        assert reference.photo.size == reference.white.size == (96, 96)
        seen = reference.white if background == "white" else reference.photo
        expected = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None] / 127.5 - 1
        assert torch.equal(reference.image, expected)
        outside = reference.mask[0, 0].numpy() == 0
        assert (np.asarray(reference.white)[outside] == 255).all()
        assert (np.asarray(reference.white)[~outside] == np.asarray(reference.photo)[~outside]).all()


def red(reference) -> np.ndarray:
    """Where the disc's colour is, found independently of the mask."""
    return np.asarray(reference.photo)[..., 2] < 115  # half way between the disc's blue and the rest's


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (121, 79), (300, 70), (90, 90)])
@pytest.mark.parametrize("geometry", ["pad", "crop", "squash"])
@pytest.mark.parametrize("wanted", [(128, 128), (192, 96), (104, 160)])
def test_geometry_keeps_mask_on_the_subject(size, geometry, wanted):
    reference = make_reference(scene(*size), disc(*size), wanted, ReferenceConfig(geometry=geometry))
    assert reference.photo.size == wanted and reference.image.shape[-2:] == wanted[::-1]
    mask, subject = reference.mask[0, 0].numpy() > 0, red(reference)
    assert (mask & subject).sum() / (mask | subject).sum() > 0.93
    rows, columns = np.nonzero(mask)
    aspect = (columns.max() - columns.min() + 1) / (rows.max() - rows.min() + 1)
    expected = size[1] / size[0] * wanted[0] / wanted[1] if geometry == "squash" else 1
    assert aspect == pytest.approx(expected, rel=0.08)  # the disc stays round unless squashed


def test_pad_repeats_the_edge_and_masks_nothing_there():
    image = Image.new("RGB", (100, 50), BLUE)
    image.paste(RED, (0, 25, 100, 50))
    full = Image.new("L", (100, 50), 255)
    full.putpixel((0, 0), 0)
    reference = make_reference(image, full, 100)
    assert reference.photo.getpixel((50, 5)) == BLUE and reference.photo.getpixel((50, 95)) == RED
    mask = reference.mask[0, 0]
    assert mask[:25].sum() == 0 and mask[75:].sum() == 0 and mask[26:74].mean() == 1


def test_pad_centres_the_image():
    for width, height in ((100, 50), (50, 100)):
        image, mask = Image.new("RGB", (width, height), BLUE), Image.new("L", (width, height))
        mask.paste(255, (width // 2 - 10, height // 2 - 10, width // 2 + 10, height // 2 + 10))
        rows, columns = np.nonzero(make_reference(image, mask, 100).mask[0, 0].numpy())
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 59, 40, 59)


def test_crop_centres_the_subject_and_may_stick_out():
    image, mask = Image.new("RGB", (200, 100), BLUE), Image.new("L", (200, 100))
    image.paste(RED, (0, 60, 40, 100))
    mask.paste(255, (0, 60, 40, 100))
    mask.putpixel((150, 5), 255)  # a speck, as JPEG masks have
    reference = make_reference(image, mask, 120, ReferenceConfig(geometry="crop"))
    rows, columns = np.nonzero(reference.mask[0, 0].numpy())
    assert abs(rows.mean() - 59.5) < 1 and abs(columns.mean() - 59.5) < 1
    assert 96 <= np.ptp(columns) + 1 <= 104  # 10% margin on each side of 120 pixels


def test_mask_of_another_size_is_scaled():
    half = disc().resize((60, 40), Image.Resampling.BILINEAR)
    for geometry in ("pad", "crop", "squash"):
        cfg = ReferenceConfig(geometry=geometry)
        a, b = (make_reference(scene(), mask, 128, cfg).mask for mask in (disc(), half))
        assert (a * b).sum() / (a + b).clamp(max=1).sum() > 0.95


def test_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"80x120.*120x80"):
        make_reference(scene(), disc(80, 120), 64)


@pytest.mark.parametrize("geometry", ["pad", "crop", "squash"])
def test_empty_and_full_masks(geometry):
    for value, message in ((0, "black all over"), (255, "whole image")):
        mask = Image.new("L", (120, 80), value)
        with pytest.raises(ValueError, match=message):
            make_reference(scene(), mask, 64, ReferenceConfig(geometry=geometry))
        tolerant = ReferenceConfig(geometry=geometry, empty_mask="mean")
        assert make_reference(scene(), mask, 64, tolerant).mask.max() == (value > 0)


def test_subject_that_vanishes_in_the_resize_is_an_error():
    mask = Image.new("L", (640, 640))
    mask.paste(255, (100, 100, 104, 104))
    with pytest.raises(ValueError, match="64x64"):
        make_reference(scene(640, 640), mask, 64)


def test_release_threshold_grows_soft_masks(tmp_path):
    """A JPEG mask rings and blurs, and the release takes every pixel above zero as subject."""
    found = find_mask(scene(), saved(tmp_path, disc(), "m.jpg", quality=80))
    areas = {
        name: make_reference(scene(), found.mask, 240, cfg).mask.sum().item()
        for name, cfg in (("default", ReferenceConfig(geometry="squash")), ("release", RELEASE))
    }
    exact = np.pi / 4 * 80 * 120  # a disc of 40x40 pixels, scaled by 2 and 3
    assert areas["default"] == pytest.approx(exact, rel=0.02)
    assert areas["release"] > 1.05 * exact


@pytest.mark.parametrize("cfg", [ReferenceConfig(), RELEASE])
def test_arguments_stay_as_they_were(cfg: ReferenceConfig):
    image, mask = scene(), disc()
    assert make_reference(image, mask, 64, cfg).original is image
    assert np.array_equal(np.asarray(image), np.asarray(scene()))
    assert np.array_equal(np.asarray(mask), np.asarray(disc()))


def test_release_bit_for_bit():
    """Dataset_evaluate_MoMA of the released code on a synthetic pair; excerpts, and hashes of the whole."""
    with safe_open(GOLDEN, "pt") as file:
        golden = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        hashes = file.metadata()
    rgb = golden["rgb_blocks"].repeat(8, axis=0).repeat(8, axis=1)[:200, :300]
    mask = (recipe.ellipse(200, 300, 100, 140, 70, 90)[0, 0] * 255).astype(np.uint8)
    reference = make_reference(Image.fromarray(rgb), Image.fromarray(mask), 512, RELEASE)
    photo, white = np.asarray(reference.photo), np.asarray(reference.white)
    subject = reference.mask[0, 0].numpy().astype(np.uint8)
    assert np.array_equal(photo[::8, ::8], golden["syn.image_u8.every8"])
    assert np.array_equal(white[::8, ::8], golden["syn.white_u8.every8"])
    assert np.array_equal(np.packbits(subject), golden["syn.mask.packed"])
    results = {
        "rgb": rgb,
        "syn.mask_in": mask,
        "syn.image_u8": photo,
        "syn.white_u8": white,
        "syn.mask": subject,
    }
    assert {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in results.items()} == hashes


def test_the_subjects_box_is_that_of_quantiles():
    rng = np.random.default_rng(0)
    for _ in range(300):
        inside = rng.random(rng.integers(1, 60, 2)) < rng.random() ** 3
        for axis, places in enumerate(np.nonzero(inside)[::-1]):
            if len(places):
                expected = np.quantile(places, (0.02, 0.98)).tolist()
                assert _box_side(inside.sum(axis), 0.02) == expected
