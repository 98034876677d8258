"""FastComposer's and MM-Diff's layout of annotated images, into shards."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.annotated import convert, main
from moma.data.stream import once
from moma.data.triplets import open_source
from moma.inputs.faces import Face

CAPTION = "A young man and a woman"
MAN = {"id": 1, "word": "A young man", "start": 0, "end": 11, "bbox": [0, 0, 20, 32]}
WOMAN = {"id": 2, "word": "woman", "start": 18, "end": 23, "bbox": [20, 0, 40, 32]}
WHERE = np.zeros((32, 40))
WHERE[4:28, 2:12], WHERE[4:28, 20:38] = 1, 2


def write(folder: Path, name: str, numbers: Any = WHERE, **about: Any) -> None:
    path = folder / name[:5] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), "red").save(path.with_suffix(".jpg"))
    np.save(path.with_suffix(".npy"), numbers)
    told = {"image_id": name, "caption": CAPTION, "segments": [MAN, WOMAN], **about}
    path.with_suffix(".json").write_text(json.dumps(told))
    with (folder / "image_ids_train.txt").open("a") as file:
        file.write(f"{name}\n")


def test_subjects_words_and_masks(tmp_path: Path) -> None:
    write(tmp_path / "data", "000010000")
    write(
        tmp_path / "data",
        "000020000",
        WHERE.astype(np.uint8).copy(order="F"),
        segments=[MAN, WOMAN | {"id": 7}],
    )
    assert main([str(tmp_path / "data"), "--out", str(tmp_path / "shards")]) == 0
    two, one = (item.sample for item in once(open_source(tmp_path / "shards")))
    assert (two.key[-9:], one.key[-9:]) == ("000010000", "000020000") and not one.others
    (man,) = two.others  # the smaller one
    assert (two.label, man.label, one.label) == ("woman", "young man", "young man")
    assert (two.caption[: two.end], man.caption[: man.end]) == (CAPTION, "A young man")
    for found, number in ((two, 2), (man, 1), (one, 1)):
        assert np.array_equal(np.asarray(found.mask) > 127, number == WHERE)


def test_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        write(tmp_path / "data", f"0000{i}0000")
    convert(tmp_path / "data", tmp_path / "whole", 2)
    (tmp_path / "data" / "00003" / "000030000.jpg").rename(tmp_path / "away.jpg")
    assert convert(tmp_path / "data", tmp_path / "parts", 2).total == 1  # as a stop leaves it: less is there
    for path in sorted((tmp_path / "parts").glob("*.tar"))[1:]:
        path.unlink()
    (tmp_path / "away.jpg").rename(tmp_path / "data" / "00003" / "000030000.jpg")
    assert convert(tmp_path / "data", tmp_path / "parts", 2).delivered == 5
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_people_with_faces(tmp_path: Path) -> None:
    """A face belongs to the segment that it lies in; a segment without one is left out."""
    write(tmp_path / "data", "000010000")
    write(tmp_path / "data", "000020000", np.where(WHERE == 2, 2, 0))
    spots = torch.tensor([[4.0, 8], [8, 8], [6, 10], [5, 13], [7, 13]])
    faces = [Face(torch.ones(512), spots + 100), Face(torch.ones(512) * 2, spots)]
    skips = convert(tmp_path / "data", tmp_path / "shards", detect=lambda image: faces)
    (item,) = once(open_source(tmp_path / "shards"))
    assert (item.sample.label, item.sample.others) == ("young man", ())
    assert "face" in skips.reasons["000020000"]
    assert torch.equal(item.sample.face.landmarks, spots) and item.sample.face.embedding[0] == 2


def turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (40, 32)).save(folder / "000010000.jpg", exif=exif)


def numbers(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "000010000.npy").write_bytes(content)


def stored(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """A .npy file, perhaps with another shape in its header."""
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array) | ({"shape": shape} if shape else {})
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def about(**values: Any) -> Callable[[Path], object]:
    told = {"caption": CAPTION, "segments": [MAN], **values}
    return lambda folder: (folder / "000010000.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (turned, "turned"),
        (lambda folder: (folder / "000010000.jpg").unlink(), "000010000.jpg"),
        (numbers(b"x"), "npy"),
        (numbers(stored(np.zeros(9))), r"\(9,\)"),
        (numbers(stored(np.zeros((32, 40)), (10**6, 10**6))), "1000000"),
        (numbers(stored(np.zeros((40, 32)))), r"\(40, 32\)"),
        (numbers(stored(np.zeros((32, 40), "V8"))), "V8"),
        (numbers(stored(np.zeros((32, 40)))), "no segment"),
        (about(segments=3), "segments"),
        (about(segments=[3]), "segment 3"),
        (about(segments=[MAN | {"id": "1"}]), "'1'"),
        (about(segments=[MAN | {"id": 0}]), "no segment"),
        (about(segments=[MAN | {"word": 1}]), "words"),
        (about(segments=[MAN | {"end": 12}]), "end 12"),
        (about(segments=[MAN, WOMAN | {"word": "man", "end": 11}]), "man, A young man"),
        (about(caption=None), "caption"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[Path], object], reason: str) -> None:
    write(tmp_path / "data", "000010000")
    change(tmp_path / "data" / "00001")
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path / "data", tmp_path / "shards")
    assert "\n" not in str(error.value) and not list((tmp_path / "shards").iterdir())


def test_names_stay_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "data", "000010000")
    (tmp_path / "data" / "image_ids_train.txt").write_text("../../x\n")
    with pytest.raises(ValueError, match=r"'\.\./\.\./x'"):
        convert(tmp_path / "data", tmp_path / "shards")
    with pytest.raises(ValueError, match="image_ids"):
        convert(tmp_path, tmp_path / "shards")
