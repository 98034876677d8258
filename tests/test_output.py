"""Records in image files, and contact sheets."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from moma.app.chart import fit, wrap
from moma.app.record import (
    CHUNK,
    JPEG_BYTES,
    OUTPUTS,
    RECORD_BYTES,
    ImageRecord,
    InputFile,
    Record,
    Segmented,
    SubjectRecord,
    check_fits,
    compared,
    face_of_text,
    face_text,
    follow,
    read_record,
    read_stamp,
    save_new,
    save_png,
    short_path,
)
from moma.app.sheets import (
    Cell,
    NumberedConfig,
    SheetConfig,
    contact_sheet,
    mask_image,
    numbered,
    prompt_rows,
)
from moma.inputs.faces import Face
from moma.methods.moma.config import RELEASE
from moma.sampling.config import SampleConfig
from tests import recipe
from tests.helpers import exit_status, first_version, fork

IMAGE = Image.fromarray(recipe.u8("image", (40, 60, 3)))


def a_record() -> Record:
    return Record(
        subjects=(SubjectRecord("猫", (ImageRecord(InputFile("cat.png", "0" * 64)),)),),
        prompt='a "猫" in the snow\nλ',
        negative="",
        seed=2**60,
        batch=(("a dog", 4), ('a "猫" in the snow\nλ', 2**60)),
        sample=SampleConfig(steps=7, strength=0.1 + 0.2, guidance_interval=(200, 800)),
        method_name="moma",
        method=replace(RELEASE, m_gen_layers=(1, 4)),
        weights="weights/moma",
        weight_hashes={"unet.safetensors": "1" * 64},
        dtype="bf16",
        device="cpu",
        versions={"torch": "2"},
    )


def with_image(**image: object) -> Record:
    """A record whose image has other parts."""
    (subject,) = a_record().subjects
    return replace(a_record(), subjects=(replace(subject, images=(replace(subject.images[0], **image),)),))


def two_subjects() -> Record:
    face = Face(torch.arange(512) / 7, torch.arange(10.0).view(5, 2))
    file, mask = InputFile("man/1.png", "3" * 64), InputFile("m.png", "2" * 64)
    images = (ImageRecord(file, mask), ImageRecord(file, face=face_text(face)))
    man = SubjectRecord("man", images, 0.1 + 0.2, (0.0, 0.0, 1 / 3, 1.0))
    return replace(a_record(), subjects=(*a_record().subjects, man))


@pytest.mark.parametrize(
    "record", [a_record(), with_image(mask=InputFile("m.png", "2" * 64)), two_subjects()]
)
def test_record_survives_the_file(tmp_path, record):
    save_png(tmp_path / "x.png", IMAGE, record)
    assert read_record(tmp_path / "x.png") == record
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.asarray(IMAGE))


def test_older_records():
    """Options and fields that they lack have their defaults; what cannot be drawn again is refused."""
    text = first_version(a_record().to_json())
    assert Record.from_json(text) == a_record() and '"version": 1' in text
    older = text.replace(', "guidance_interval": [200, 800]', "").replace('"method_name": "moma", ', "")
    older = older.replace(', "segmented": null', "").replace('"seed":', '"subject_seed": 0, "seed":')
    older = older.replace(', "grid": "even"', "")
    interval = SampleConfig().guidance_interval
    sample = replace(a_record().sample, guidance_interval=interval, grid="leading")
    assert Record.from_json(older) == replace(a_record(), sample=sample)
    with pytest.raises(ValueError, match="subject_seed 3"):
        Record.from_json(older.replace('"subject_seed": 0', '"subject_seed": 3'))
    alone = json.loads(text) | {"reference": None, "subject": ""}
    assert Record.from_json(json.dumps(alone)) == replace(a_record(), subjects=())
    weak = json.loads(text) | {"method_name": "ip-adapter", "method": {}}
    assert weak["sample"]["strength"] != 1
    assert Record.from_json(json.dumps(weak)).sample.strength == 1, "it had no effect then"


def test_what_a_subject_cannot_be():
    data = json.loads(two_subjects().to_json())
    for change in (
        {"images": []},
        {"images": [{}]},
        {"word": 3},
        {"strength": "1"},
        {"region": [0, 0, 1, 2]},
        {"region": [0, 0, 1]},
        {"colour": "red"},
    ):
        subjects = [data["subjects"][0] | change]
        with pytest.raises(ValueError, match="damaged"):
            Record.from_json(json.dumps(data | {"subjects": subjects}))


def test_a_face_comes_back_to_the_bit():
    face = Face(torch.randn(512), torch.rand(5, 2) * 100)
    text = face_text(face)
    found = face_of_text(text)
    assert torch.equal(found.embedding, face.embedding) and torch.equal(found.landmarks, face.landmarks)
    for wrong in (
        "",
        "no base64!",
        text[:800],
        text[:-8],
        text + text,
        face_text(Face(face.embedding * 0, face.landmarks)),
    ):
        with pytest.raises(ValueError):
            face_of_text(wrong)


def test_segmented_masks_come_back_to_the_pixel(tmp_path):
    mask = Image.new("L", (301, 77))
    ImageDraw.Draw(mask).ellipse((20, 5, 130, 60), fill=255)
    record = with_image(segmented=Segmented.of(mask, "point 30,40"))
    save_png(tmp_path / "x.png", IMAGE, record)
    found, again = record.subjects[0].images[0].segmented, read_record(tmp_path / "x.png")
    assert again == record and len(found.png) < 1000
    assert found.image().mode == "L"
    assert np.array_equal(np.asarray(found.image()), np.asarray(mask))
    for png in ("no base64!", "AAAA", found.png[:80]):
        with pytest.raises(ValueError, match="mask"):
            Segmented("point 30,40", png).image()
    damaged = record.to_json().replace(f'"{found.png}"', "7")
    with pytest.raises(ValueError, match="damaged"):
        Record.from_json(damaged)


def test_numbers_and_outlines():
    """The image grows; each object gets an outline, and its number lies where no smaller object is."""
    image, large, small = (
        Image.new("RGB", (64, 48), "grey"),
        Image.new("L", (64, 48)),
        Image.new("L", (64, 48)),
    )
    ImageDraw.Draw(large).rectangle((4, 4, 59, 43), fill=255)
    ImageDraw.Draw(small).rectangle((8, 8, 39, 39), fill=255)
    found = np.asarray(
        numbered(image, lambda size: [x.resize(size) for x in (large, small)], NumberedConfig(side=640))
    ).astype(int)
    assert found.shape == (480, 640, 3)
    red = (found == (255, 0, 0)).all(axis=2)  # the first colour; lines are 3 pixels wide
    assert red[42, 300] and red[300, 42] and not red[46, 300] and not red[300, 300]
    black = np.argwhere((found == 0).all(axis=2))  # halos of the numbers
    right = black[:, 1] > 400  # beside the small rectangle
    assert right.any() and (~right).any()
    assert np.abs(black[~right].mean(axis=0) - (240, 240)).max() < 25
    assert numbered(image, lambda size: []).size == (1024, 768)


class Unsaved:
    """An image that fills the disk."""

    def save(self, path: Path, *args: object, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")


def test_nothing_half_written(tmp_path):
    path = tmp_path / "x.png"
    save_png(path, IMAGE)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        save_png(path, Unsaved(), a_record())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


def test_stamps(tmp_path):
    save_png(tmp_path / "x.png", IMAGE, stamp="made by λ")
    save_png(tmp_path / "y.png", IMAGE)
    (tmp_path / "z.png").write_bytes((tmp_path / "x.png").read_bytes()[:-200])
    assert [read_stamp(tmp_path / f"{name}.png") for name in "xyzw"] == ["made by λ", "", None, None]


def write(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_itxt(CHUNK, text)
    IMAGE.save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, ""),
        ("not json", ""),
        ("[]", ""),
        ("{}", "format"),
        (a_record().to_json().replace('"version": 2', '"version": 3'), "3"),
        (a_record().to_json().replace('"steps"', '"stairs"'), "stairs"),
        (a_record().to_json().replace('"geometry"', '"geography"'), "geography"),
        (a_record().to_json().replace('"prompt"', '"promt"'), "promt"),
    ],
)
def test_foreign_images_are_refused(tmp_path, text, named):
    with pytest.raises(ValueError, match=rf"x\.png.*{named}") as error:
        read_record(write(tmp_path / "x.png", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", True), ("weights", ["x"]), ("weights", None), ("reference", {"path": 3, "sha256": "x"}),
        ("reference", 0), ("mask", []), ("segmented", {"how": 1, "png": ""}), ("versions", 3),
        ("versions", {"torch": 2}), ("weight_hashes", {"unet": None}), ("subject_seed", 1.5),
        ("subject_seed", False), ("batch", [["a dog", 4], ['a "猫" in the snow\nλ', 2**60], ["a", True]]),
        ("batch", {"ab": 1}), ("batch", [["a dog", -4], ['a "猫" in the snow\nλ', 2**60]]),
        ("batch", [["x", i] for i in range(4)] + [['a "猫" in the snow\nλ', 2**60]]), ("seed", 4.0),
        ("dtype", "int8"), ("device", 1), ("prompt", None), ("sample", {"height": 4}),
        ("sample", {"height": 1e9}), ("sample", {"grid": "odd"}), ("sample", {"steps": True}), ("sample", []),
        ("method", {"preset": "paper"}), ("method", {"m_gen_threshold": "0.5"}),
        ("method_name", ["moma"]), ("extra", 1),
    ],
)  # fmt: skip
def test_settings_of_another_type(field, value):
    with pytest.raises(ValueError, match="settings"):
        Record.from_json(json.dumps(json.loads(a_record().to_json()) | {field: value}))


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5000, '{"format": ' + "9" * 5000 + "}"]
)
def test_settings_that_are_too_deep_or_long(text):
    with pytest.raises(ValueError, match="settings") as error:
        Record.from_json(text)
    assert len(str(error.value)) < 500


def test_settings_do_not_lift_limits():
    data = json.loads(a_record().to_json())
    data["sample"] |= {"max_side": 10**9, "width": 4000, "height": 64}
    with pytest.raises(ValueError, match="4000"):
        Record.from_json(json.dumps(data)).sample.check(8)


def test_paths_in_records(tmp_path, monkeypatch):
    """From the current folder or the home on, or the name alone; followed only inside the current folder."""
    here, home = tmp_path / "home" / "work", tmp_path / "home"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for path, short in (("a.png", "a.png"), (here / "b" / "c", "b/c"), ("../d/e", "~/d/e"), (home, "~"),
                        (tmp_path / "f.png", "f.png"), (here, ".")):  # fmt: skip
        assert short_path(path) == short
    (here / "a.png").touch()
    (home / "d").touch()
    os.symlink(home / "d", here / "link")
    assert follow("a.png") == Path("a.png") and follow(str(here / "a.png")) == here / "a.png"
    for path in ("../d", str(home / "d"), "link", "~/d", "no.png", "/dev/zero"):
        assert follow(path) is None


def test_several_processes_save_into_one_folder(tmp_path):
    """Each image gets a name of its own; a link that leads nowhere is a name that is taken."""
    os.symlink(tmp_path / "nowhere", tmp_path / "cat-2.png")

    def save() -> None:
        for _ in range(20):
            save_new(tmp_path, "cat", IMAGE)

    assert [exit_status(pid) for pid in [fork(save) for _ in range(3)]] == [0] * 3
    names = set(os.listdir(tmp_path)) - {"cat-2.png"}
    assert (
        names == {"cat.png", *(f"cat-{n}.png" for n in range(3, 62))} and not (tmp_path / "nowhere").exists()
    )
    assert all(Image.open(tmp_path / name).size == IMAGE.size for name in names)
    with pytest.raises(OSError, match="disk full"):
        save_new(tmp_path, "dog", Unsaved())
    assert not (tmp_path / "dog.png").exists()


def test_images_are_compared(tmp_path):
    save_png(tmp_path / "x.png", IMAGE)
    assert "identical" in compared(IMAGE, tmp_path / "x.png")
    other = IMAGE.copy()
    other.putpixel((3, 4), tuple(255 - value for value in IMAGE.getpixel((3, 4))))
    most = max(abs(255 - 2 * value) for value in IMAGE.getpixel((3, 4)))
    assert f"{1 / 2400:.2%}" in (text := compared(other, tmp_path / "x.png")) and f" {most} of" in text
    assert "(30, 20)" in compared(IMAGE.resize((30, 20)), tmp_path / "x.png")


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    save_png(tmp_path / "z.png", IMAGE, a_record())
    whole = (tmp_path / "z.png").read_bytes()  # a header of 60,000 x 60,000 pixels, with its sum
    header = b"IHDR" + (60_000).to_bytes(4) * 2 + whole[24:29]
    (tmp_path / "z.png").write_bytes(whole[:12] + header + crc32(header).to_bytes(4) + whole[33:])
    assert read_stamp(tmp_path / "z.png") is None and "z.png" in compared(IMAGE, tmp_path / "z.png")
    os.symlink(tmp_path / "gone", tmp_path / "l.png")
    for name in ("x.png", "y.png", "z.png", "l.png"):
        with pytest.raises(ValueError, match=name):
            read_record(tmp_path / name)


def test_input_file_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert InputFile.of(tmp_path / "a") == InputFile(str(tmp_path / "a"), known)


def test_sheet_holds_every_image_whole():
    cfg = SheetConfig(cell=40, gap=5, caption=20)
    red, wide = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (80, 20), "blue")
    rows = [[Cell(red), Cell(wide, ("two", "lines"))], [Cell(Image.new("L", (10, 10)))], [Cell(wide)]]
    sheet = contact_sheet(rows, cfg)
    assert sheet.size == (5 + 2 * 45, 5 + 2 * 65 + 35)
    pixels = np.asarray(sheet).astype(int)
    assert (pixels[5:45, 5:45] == (255, 0, 0)).all()
    assert (pixels[35:45, 50:90] == (0, 0, 255)).all()  # scaled to 40x10, on the line of its row
    assert (pixels[5:35, 50:90] == cfg.background).all()
    assert (pixels[70:110, 5:45] == 0).all()
    assert (pixels[135:145, 5:45] == (0, 0, 255)).all()  # a row of wide images is no higher than they are
    assert (pixels[45:65, 50:90] != cfg.background).any()  # its caption
    assert (pixels[45:65, 5:45] == cfg.background).all()


def test_cell_of_another_size():
    cfg = SheetConfig(cell=40, gap=5, caption=20)
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    sheet = contact_sheet([[Cell(red, side=60), Cell(blue, ("below",))], [Cell(red)] * 2], cfg)
    assert sheet.size == (5 + 60 + 5 + 40 + 5, 5 + 60 + 20 + 5 + 40 + 20 + 5)
    pixels = np.asarray(sheet).astype(int)
    assert (pixels[5:65, 5:65] == (255, 0, 0)).all()
    assert (pixels[25:65, 70:110] == (0, 0, 255)).all()
    assert (pixels[65:85, 70:110] != cfg.background).any() and (pixels[:, 110:] == cfg.background).all()
    assert (pixels[90:130, 50:90] == (255, 0, 0)).all()


def test_long_captions_are_wrapped_whole_in_their_cell():
    cfg = SheetConfig(cell=60, gap=10)
    white = Image.new("RGB", (60, 60), "white")
    text = "a cat in a firefighter's uniform, hung-over-and-unhyphenatable-as-ever, on a beach"
    sheet = contact_sheet([[Cell(white, (text, "seed 1")), Cell(white)], [Cell(white)]], cfg)
    lines = [*wrap(text, ImageFont.load_default(cfg.font), 60, cfg.lines), "seed 1"]
    assert "".join(lines[:-1]).replace(" ", "") == text.replace(" ", "")
    assert sheet.height == 10 + 60 + 17 * len(lines) + 10 + 60 + 34 + 10
    below = np.asarray(sheet)[70 : 70 + 17 * len(lines)]
    assert all((below[17 * n :][:17, 10:70] != cfg.background).any() for n in range(len(lines)))
    assert (below[:, 70:] == cfg.background).all() and (below[:, :10] == cfg.background).all()


@pytest.mark.parametrize("text", ["x" * 10**6, "word " * 10**5, "\n" * 10**6, "W" * 300])
def test_texts_of_any_length_are_fitted_at_once(text):
    font, start = ImageFont.load_default(13), time.perf_counter()
    lines = wrap(text, font, 100, 5)
    cut = fit(text.strip() or "x", font, 100)
    assert time.perf_counter() - start < 1
    assert len(lines) <= 5 and all(font.getlength(line) <= 100 for line in [*lines, cut])
    assert lines[-1].endswith("…") == (len(text.split()) > 0)


def test_fitted_texts_are_as_long_as_they_can_be():
    font = ImageFont.load_default(13)
    whole = "a cat on the beach"
    assert fit(whole, font, font.getlength(whole)) == whole
    cut = fit(whole, font, 60)
    assert cut[:-1] == whole[: len(cut) - 1] and font.getlength(f"{whole[: len(cut)]}…") > 60
    assert wrap(whole, font, 60, 9) == ["a cat on", "the beach"]


def cells(number: int) -> list[list[Cell]]:
    return [[Cell(IMAGE, (str(n),))] for n in range(number)]


def test_rows_of_prompts_use_the_width():
    pair = [Cell(IMAGE), Cell(IMAGE)]
    of = {
        (1, 1, 1, 1, 1): [4, 1],  # images of each prompt -> cells of each row
        (1,): [1],
        (3, 3): [3, 3],
        (6, 2): [6, 2],
        (10, 1): [8, 2, 1],
    }
    for counts, expected in of.items():
        assert [len(row) for row in prompt_rows([cells(count) for count in counts])] == expected
    assert [len(row) for row in prompt_rows([[pair], [pair], [pair]])] == [4, 2]
    assert [len(row) for row in prompt_rows([[pair] * 5, [pair]])] == [8, 2, 2]
    assert prompt_rows([]) == []


@pytest.mark.parametrize(("size", "height"), [((3000, 2), 59), ((2, 3000), 98), ((1, 1), 98)])
def test_thin_images_stay_in_sheets(size, height):
    image = Image.new("RGB", size, "red")
    assert contact_sheet([[Cell(image)]], SheetConfig(cell=40)).size == (64, height)
    assert max(numbered(image, lambda size: [], NumberedConfig(side=640)).size) == 640


def test_mask_image():
    mask = torch.tensor([[[0.0, 0.5], [1.0, 2.0]]])
    assert np.array_equal(np.asarray(mask_image(mask)), [[0, 128], [255, 255]])
    large = np.asarray(mask_image(mask[None], (4, 4)))
    assert np.array_equal(large, np.array([[0, 128], [255, 255]]).repeat(2, 0).repeat(2, 1))


def test_masks_of_several_subjects_have_their_own_colours():
    masks = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.5, 0.0]]])  # (2, 1, 3)
    first, second, nobody = np.asarray(mask_image(masks))[0].tolist()
    assert first == [255, 0, 0] and max(second) == 128 and second[0] < 128 and nobody == [0, 0, 0]
    assert mask_image(masks[None], (6, 2)).size == (6, 2)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_files_hold_settings(tmp_path, kind):
    record = replace(a_record(), negative="Bär 🐻 \udce9")
    path = save_new(tmp_path, "cat", IMAGE, record, kind)
    assert path.suffix == OUTPUTS[kind].suffix and read_record(path) == record
    with Image.open(path) as saved:
        assert saved.format == OUTPUTS[kind].name
        saved.save(tmp_path / f"edited{path.suffix}")
    with pytest.raises(ValueError, match="edited"):  # without its settings
        read_record(tmp_path / f"edited{path.suffix}")
    assert "identical" in (text := compared(IMAGE, path)) and OUTPUTS[kind].name in text
    assert "identical" not in compared(IMAGE.transpose(Image.Transpose.FLIP_TOP_BOTTOM), path)
    assert save_new(tmp_path, "cat", IMAGE, record, kind).stem == "cat-2"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_damaged_and_foreign_comments_are_refused(tmp_path, kind):
    output = OUTPUTS[kind]
    size = 60_000 if kind == "jpeg" else RECORD_BYTES + 1
    for i, comment in enumerate(
        (b"UNICODE\0{}", b"ASCII\0\0\0{", b"ASCII\0\0\0" + b"[" * size, b"ASCII\0\0\0\xff")
    ):
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        IMAGE.save(path := tmp_path / f"{i}{output.suffix}", output.name, exif=exif)
        with pytest.raises(ValueError, match=path.name):
            read_record(path)
    whole = save_new(tmp_path, "cat", IMAGE, a_record(), kind).read_bytes()
    for cut in (10, 40, 300, 900):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=path.name):
            read_record(path)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    record = replace(a_record(), negative="x" * JPEG_BYTES)
    with pytest.raises(ValueError, match="jpeg"):
        check_fits([a_record(), record], "jpeg")
    for kind in ("png", "webp"):
        check_fits([record], kind)
        assert read_record(save_new(tmp_path, "cat", IMAGE, record, kind)) == record
    most = replace(record, negative="x" * (JPEG_BYTES - len(a_record().to_json()) - 100))
    check_fits([most], "jpeg")
    assert read_record(save_new(tmp_path, "cat", IMAGE, most, "jpeg")) == most
