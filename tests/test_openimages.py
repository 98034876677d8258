"""OpenImages to shards, on small files in the real format, and the filter of captions."""

import io
import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma.data import openimages
from moma.data.captions import CaptionConfig, Captioner, training_caption
from moma.data.openimages import Request, convert, main
from moma.data.shards import ShardWriter, read_shard
from moma.data.tables import FLAGS, OpenImagesConfig
from moma.data.triplets import ShardSource, load
from moma.data.words import HUMAN_CLASSES, WORN_CLASSES
from moma.methods.prompts import check_prompt
from tests.tiny import TinyConfig, build_tiny_bundle

CLASSES = {
    "/m/01yrx": "Cat",
    "/m/0bt9lr": "Dog",
    "/m/0k4j": "Car",
    "/m/01h44": "Bat (Animal)",
    "/m/04yx4": "Man",
    "/m/0k65p": "Human hand",
    "/m/01d40f": "Dress",
    "/m/012n7d": "",
}
MID = {name.lower(): mid for mid, name in CLASSES.items()}
OBJECTS = "train-annotations-object-segmentation.csv"
SEGMENTATION = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
BOXES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,"
    "IsInside,XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
)
BOX = (0.25, 0.75, 0.25, 0.75)  # x min, x max, y min, y max
SMALL = OpenImagesConfig(min_side=64, min_pixels=64, per_shard=3)


class World:
    """A folder with OpenImages' files, filled object by object."""

    def __init__(self, root: Path) -> None:
        self.root, self.rows, self.boxes, self.captions = root, [], [], []
        for folder in ("images", "masks", "csv"):
            (root / folder).mkdir(parents=True)
        self.request = Request(
            root / "images",
            root / "masks",
            [root / "csv"],
            root / "shards",
            root / "captions.jsonl",
            cfg=SMALL,
        )

    def add(
        self, number: int, label: str = "cat", box=BOX, size=(160, 120), mask_size=(80, 60), iou="0.9",
        flags=None, caption="a red cat on a wooden table", image=True, box_id="9a041d52",
    ) -> str:  # fmt: skip
        """Add an object to image `number`; returns the sample's key, its mask's name without suffix."""
        image_id = f"{number:016x}"
        mid = MID.get(label, label)
        key = f"{image_id}_{mid.replace('/', '')}_{box_id}"
        x0, x1, y0, y1 = box
        self.rows.append(
            f"{key}.png,{image_id},{mid},{box_id},{x0:g},{x1:g},{y0:g},{y1:g},{iou},0.5 0.5 1;0.1 0.2 0"
        )
        flags = flags or [0] * 5
        self.boxes.append(
            f"{image_id},xclick,{mid},1,{x0:.6f},{x1:.6f},{y0:.6f},{y1:.6f},{','.join(map(str, flags))}"
        )
        if caption is not None and all(c["image_id"] != image_id for c in self.captions):
            self.captions.append({"image_id": image_id, "caption": caption})
        if image:
            pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
            Image.fromarray(pixels).resize(size).save(self.image(number))
        w, h = mask_size
        mask = np.zeros((h, w), bool)
        mask[int(y0 * h) : int(y1 * h), int(x0 * w) : int(x1 * w)] = True
        (self.root / "masks" / image_id[0]).mkdir(exist_ok=True)
        Image.fromarray(mask).save(self.mask(key))  # mode 1, as OpenImages'
        return key

    def image(self, number: int) -> Path:
        return self.root / "images" / f"{number:016x}.jpg"

    def mask(self, key: str) -> Path:
        return self.root / "masks" / key[0] / f"{key}.png"

    def csv(self, name: str, lines: list[str]) -> None:
        (self.root / "csv" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(self, boxes: bool = True) -> None:
        self.csv(OBJECTS, [SEGMENTATION, *self.rows])
        header = "LabelName,DisplayName"
        self.csv("oidv7-class-descriptions-boxable.csv", [header, *(f"{m},{n}" for m, n in CLASSES.items())])
        if boxes:
            lines = [line + ",0" * 8 for line in self.boxes]
            self.csv("oidv6-train-annotations-bbox.csv", [BOXES, *lines])
        lines = [json.dumps(line) + "\n" for line in self.captions]
        (self.root / "captions.jsonl").write_text("".join(lines), encoding="utf-8")

    def convert(self, boxes: bool = True, cfg: dict | None = None, **changes) -> dict:
        self.write(boxes)
        return convert(replace(self.request, cfg=replace(SMALL, **(cfg or {})), **changes))

    def samples(self) -> dict[str, dict]:
        """key -> texts of the samples of all shards, in order."""
        found = {}
        for path in sorted((self.root / "shards").glob("*.tar")):
            for raw in read_shard(path):
                assert raw.fault is None
                found[raw.key] = json.loads(raw.fields["json"])
        return found

    def info(self, name: str) -> str:
        return (self.root / "shards-info" / name).read_text(encoding="utf-8")

    def bytes(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / "shards").iterdir()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def filled(world: World, count: int = 10) -> World:
    for number in range(count):
        world.add(number, ("cat", "dog", "car")[number % 3])
    return world


# --- samples -----------------------------------------------------------------------------------------


def test_a_sample(world):
    key = world.add(1)
    stats = world.convert()
    source = ShardSource([world.root / "shards" / "00000.tar"])
    (raw,) = source.read(0)
    sample = load(source, raw)
    assert raw.fields["image"] == world.image(1).read_bytes()  # not encoded again
    assert (sample.label, sample.caption) == ("cat", "a cat on a table")
    assert sample.mask.size == sample.image.size == (160, 120)
    x = np.asarray(sample.mask) > 127
    assert x.mean() == pytest.approx(0.25, abs=0.02) and x[60, 80] and not x[10, 10]
    assert world.samples() == {
        key: {
            "label": "cat",
            "caption": "a cat on a table",
            "raw_caption": "a red cat on a wooden table",
            "image_id": f"{1:016x}",
            "label_id": "/m/01yrx",
        }
    }
    assert stats == json.loads(world.info("stats.json"))
    assert stats == {
        "rows": 1, "written": 1, "images missing": 0, "dropped": {}, "classes": {"cat": 1},
    }  # fmt: skip


def test_large_and_odd_images_are_encoded_again(world):
    big = world.add(1, size=(320, 240))
    cmyk = world.add(2)
    Image.open(world.image(2)).convert("CMYK").save(world.image(2))
    world.convert(cfg={"max_side": 200})
    raws = {raw.key: raw for raw in read_shard(world.root / "shards" / "00000.tar")}
    assert {key: Image.open(io.BytesIO(raw.fields["image"])).size for key, raw in raws.items()} == {
        big: (200, 150), cmyk: (160, 120),
    }  # fmt: skip
    assert Image.open(io.BytesIO(raws[big].fields["mask"])).size == (200, 150)
    assert Image.open(io.BytesIO(raws[cmyk].fields["image"])).mode == "RGB"


@pytest.mark.parametrize("layout", ["train", "0", "train/0", "train_0"])
def test_folder_layouts(world, layout):
    world.add(1)
    for folder, path in (("images", world.image(1)), ("masks", next((world.root / "masks").rglob("*.png")))):
        (world.root / folder / layout).mkdir(parents=True, exist_ok=True)
        shutil.move(path, world.root / folder / layout / path.name)
    assert world.convert()["written"] == 1


def test_class_files_of_all_ages(world):
    world.add(1, "bat (animal)", caption="a flying animal")
    world.write()
    lines = [f"{mid},{name}" for mid, name in CLASSES.items()]
    for i, header in enumerate((["id,name"], ["LabelName,DisplayName"], [])):
        world.csv("oidv7-class-descriptions-boxable.csv", header + lines)
        assert convert(replace(world.request, out=world.root / str(i)))["classes"] == {"bat": 1}


# --- filters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "man"}, "class"),
        ({"label": "human hand"}, "class"),
        ({"label": "dress"}, "class"),
        ({"label": ""}, "no class name"),
        ({"label": "/m/unknown"}, "no class name"),
        ({"iou": "0.5"}, "predicted IoU"),
        ({"box": (0.1, 0.2, 0.1, 0.2)}, "box too small"),
        ({"caption": None}, "no caption"),
        ({"caption": "  "}, "no caption"),
        ({"caption": "a <image> of a cat"}, "caption unusable"),
        ({"size": (160, 60), "mask_size": (80, 30)}, "image too small"),
        ({"mask_size": (60, 60)}, "mask of another shape"),
        ({"box": (0.05, 0.97, 0.05, 0.97)}, "subject too large"),
        ({"box": (0, 0.5, 0, 0.5)}, "touches the image's edges"),
        ({"image": False}, "image missing"),
        *(({"flags": [int(i == j) for j in range(5)]}, flag) for i, flag in enumerate(FLAGS)),
    ],
)
def test_filters(world, change, reason):
    good = world.add(1)
    world.add(2, **change)
    stats = world.convert()
    assert (stats["dropped"], stats["rows"], stats["written"]) == ({reason: 1}, 2, 1)
    assert list(world.samples()) == [good]


def test_what_passes(world):
    """No IoU, an unknown flag, a mask at one edge, no box file."""
    world.add(1, iou="")
    world.add(2, flags=[-1] * 5)
    world.add(3, box=(0, 0.5, 0.2, 0.8))
    assert world.convert()["written"] == 3
    world.add(4, flags=[1] * 5)
    (world.root / "csv" / "oidv6-train-annotations-bbox.csv").unlink()
    assert world.convert(boxes=False, out=world.root / "other")["written"] == 4


def test_flags_belong_to_the_box_with_these_coordinates(world):
    world.add(1, flags=[1, 0, 0, 0, 0])
    key = world.add(1, box=(0.2, 0.7, 0.2, 0.7), box_id="b")
    assert world.convert()["dropped"] == {"IsOccluded": 1}
    assert list(world.samples()) == [key]


def test_flags_can_be_chosen(world):
    world.add(1, flags=[1, 0, 0, 0, 0])
    assert world.convert(cfg={"drop_flags": frozenset({"IsDepiction"})})["written"] == 1


def test_small_masks_in_large_boxes(world):
    key = world.add(1)
    mask = np.zeros((60, 80), bool)
    mask[20:30, 20:30] = True
    Image.fromarray(mask).save(world.mask(key))
    world.add(2)
    world.add(3, size=(80, 64), mask_size=(80, 64))  # 1280 of its pixels are subject
    assert world.convert(cfg={"min_pixels": 2000})["dropped"] == {"subject too small": 2}


def test_rotated_images(world):
    world.add(1), world.add(2), world.add(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(world.image(1)).save(world.image(1), exif=exif)
    lines = [f"{2:016x},train,0.0", f"{3:016x},train,270.0", f"{1:016x},train,"]
    world.csv("train-images-boxable-with-rotation.csv", ["ImageID,Subset,Rotation", *lines])
    assert world.convert()["dropped"] == {"rotated": 2}
    assert [key[:16] for key in world.samples()] == [f"{2:016x}"]


def test_the_largest_objects_of_an_image(world):
    small = world.add(1, "dog", box=(0.1, 0.5, 0.1, 0.5), caption="a dog and a cat")
    large = world.add(1, "cat")
    middle = world.add(1, "cat", box=(0.3, 0.75, 0.3, 0.75), box_id="b")
    assert world.convert()["dropped"] == {"not the largest": 2}
    assert list(world.samples()) == [large]
    world.convert(cfg={"per_image": 2}, out=world.root / "two")
    raws = read_shard(world.root / "two" / "00000.tar")
    assert [raw.key for raw in raws] == [large, middle] and small not in (large, middle)


def test_several_subjects_of_an_image(world):
    """One sample of the largest of each class; an image with one class alone makes none."""
    place = {"cat": (0.1, 0.5, 0.1, 0.9), "dog": (0.5, 0.8, 0.1, 0.9), "car": (0.1, 0.4, 0.2, 0.6)}
    for number, labels in ((1, ("dog", "cat", "car")), (2, ("cat",)), (3, ("dog", "cat"))):
        for label in labels:
            world.add(number, label, box=place[label], caption="a red cat beside a red dog")
    world.add(1, "cat", box=(0.6, 0.8, 0.2, 0.5), box_id="b"), world.add(2, box_id="b")
    stats = world.convert(cfg={"subjects": 2})
    assert stats["dropped"] == {"not the largest": 2, "alone in its image": 2}
    assert stats["classes"] == {"cat + dog": 2} and set(world.samples()) == {f"{i:016x}" for i in (1, 3)}
    source = ShardSource([world.root / "shards" / "00000.tar"])
    for sample in (load(source, raw) for raw in source.read(0)):
        (other,) = sample.others
        assert (sample.caption, sample.label, other.label) == ("a cat beside a dog", "cat", "dog")
        assert [sample.caption[: one.end].split()[-1] for one in (sample, other)] == ["cat", "dog"]
        cat, dog = (np.asarray(one.mask) > 127 for one in (sample, other))
        assert cat[60, 40] and dog[60, 100] and not (cat & dog).any()
    with pytest.raises(ValueError, match="per_image 2"):
        world.convert(cfg={"subjects": 2, "per_image": 2}, out=world.root / "two")


def test_own_lists(world, capsys):
    filled(world, 3)
    world.add(3, "dress")
    world.write()
    names = world.root / "names.txt"
    names.write_text("Cat\nDOG\n")
    common = [*arguments(world), "--workers", "1"]
    assert main([*common, "--allow", str(names), "--out", str(world.root / "a")]) == 0
    assert main([*common, "--deny", "cat, Car", "--out", str(world.root / "b")]) == 0
    assert main([*common, "--keep-worn", "--out", str(world.root / "c")]) == 0
    found = [json.loads((world.root / f"{x}-info/stats.json").read_text())["classes"] for x in "abc"]
    assert found[0] == {"cat": 1, "dog": 1} and found[1] == {"dog": 1}
    assert found[2] == {"cat": 1, "dog": 1, "car": 1, "dress": 1}
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == ["2 of 4 objects written", "        2 dropped: class"]


def test_excluded_classes():
    assert {"person", "man", "woman", "boy", "girl", "human face", "human hand"} <= HUMAN_CLASSES
    assert not {"boot", "backpack", "sunglasses", "doll", "teddy bear"} & (HUMAN_CLASSES | WORN_CLASSES)


# --- files -------------------------------------------------------------------------------------------


def test_missing_images_are_listed_and_added_later(world):
    filled(world, 6)
    kept = {number: world.image(number).read_bytes() for number in (2, 4)}
    for number in kept:
        world.image(number).unlink()
    stats = world.convert()
    assert world.info("missing_images.txt") == f"train/{2:016x}\ntrain/{4:016x}\n"
    assert (stats["written"], stats["images missing"], stats["dropped"]) == (4, 2, {"image missing": 2})
    before = world.bytes()
    for number, data in kept.items():
        world.image(number).write_bytes(data)
    stats = world.convert()
    assert world.info("missing_images.txt") == ""
    assert (stats["written"], stats["dropped"]) == (6, {})
    assert len(world.samples()) == 6 and before.items() <= world.bytes().items()


def test_a_call_without_captions_or_images_lists_what_to_get(world, capsys):
    world.add(7, image=False), world.add(1)
    world.write()
    args = arguments(world)[:-2]
    assert main(args) == 2
    assert capsys.readouterr().err.startswith("openimages: error: 1 of 2 images")
    assert world.info("missing_images.txt") == f"train/{7:016x}\n"
    world.image(1).unlink()
    assert main(arguments(world)) == 2
    assert "2 of 2 images" in capsys.readouterr().err
    assert not world.bytes()


def test_broken_files_are_skipped_named_and_tried_again(world):
    keys = [world.add(number) for number in range(4)]
    whole = world.image(0).read_bytes()
    world.image(0).write_bytes(whole[: len(whole) // 2])
    world.mask(keys[1]).write_bytes(b"no image")
    world.mask(keys[2]).unlink()
    stats = world.convert()
    assert stats["dropped"] == {"mask broken or missing": 2, "image broken": 1}
    lines = world.info("broken_files.txt").splitlines()
    names = (world.image(0).name, f"{keys[1]}.png", f"{keys[2]}.png")
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in names)
    world.image(0).write_bytes(whole)
    stats = world.convert()
    assert stats["written"] == 2 and world.info("broken_files.txt").count("\n") == 2


def test_rows_listed_twice(world):
    world.add(1)
    world.rows *= 2
    assert world.convert()["dropped"] == {"listed twice": 1}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (OBJECTS, ["MaskPath,ImageID", "a,b"], "lacks LabelName, BoxXMin"),
        ("oidv6-train-annotations-bbox.csv", ["ImageID,LabelName,XMin"], "lacks XMax, YMin, YMax, IsOcc"),
        ("oidv7-class-descriptions-boxable.csv", ["a,b,c", "1,2,3"], "lacks LabelName, DisplayName"),
        (OBJECTS, [SEGMENTATION, "a.png,a"], ":2: a line of 2 columns"),
        (OBJECTS, [SEGMENTATION, "a.png,a,/m/01yrx,b,x,1,0,1,1,"], "x, 1, 0, 1: "),
        (OBJECTS, [SEGMENTATION, "../a.png,a,/m/01yrx,b,0,1,0,1,1,"], "plain names"),
        (OBJECTS, [SEGMENTATION], "none of 0 objects"),
        (OBJECTS, [SEGMENTATION, "x" * 200_000], f"{OBJECTS}: "),  # more than csv takes for a field
    ],
)  # fmt: skip
def test_bad_tables_stop_it_before_anything_is_written(world, capsys, name, lines, message):
    world.add(1)
    world.write()
    world.csv(name, lines)
    assert main(arguments(world)) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("openimages: ")
    assert {path.name for path in world.root.iterdir()} == {"images", "masks", "csv", "captions.jsonl"}


def test_other_user_mistakes(world, capsys):
    world.add(1)
    world.csv("challenge-2018-image-labels.csv", ["ImageID,Source,Confidence", "a,b,1"])  # ignored
    world.write()
    for extra, message in [
        (["--allow", "unicorn"], "'unicorn'"),
        (["--allow", "man"], "'man'"),
        (["--set", "min_share=x"], "min_share=x"),
        (["--set", "colour=1"], "colour=1"),
        (["--set", "max_share=0.01"], "0.01"),
        (["--set", "per_image=0"], "per_image 0"),
        (["--set", "drop_flags=IsBlue"], "'IsBlue'"),
        (["--masks", "nowhere"], "nowhere"),
        (["--csv", "nowhere"], "nowhere"),
        (["--csv", str(world.root / "csv" / "challenge-2018-image-labels.csv")], "lacks MaskPath"),
        (["--csv", str(world.root / "csv" / "oidv6-train-annotations-bbox.csv")], "no segmentation file"),
        (["--captions", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--nonsense"], "--nonsense"),
    ]:
        assert main([*arguments(world), *extra]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1], lines
    (world.root / "captions.jsonl").write_text('{"image_id": "a", "caption": "b"}\n{"image": 1}\n')
    assert main(arguments(world)) == 2 and "captions.jsonl:2" in capsys.readouterr().err
    assert not (world.root / "shards").exists()
    shutil.move(world.root / "csv" / OBJECTS, world.root / "csv" / "segmentation.csv")
    assert main(arguments(world)) == 2 and "segmentation.csv" in capsys.readouterr().err


def arguments(world: World) -> list[str]:
    places = {name: str(world.root / name) for name in ("images", "masks", "csv")}
    options = [word for name, place in places.items() for word in (f"--{name}", place)]
    small = [f"--set={name}={getattr(SMALL, name)}" for name in ("min_side", "min_pixels", "per_shard")]
    out = ["--out", str(world.root / "shards"), "--workers", "1", *small]
    return [*options, *out, "--captions", str(world.root / "captions.jsonl")]


# --- order, workers, interruptions -------------------------------------------------------------------


@pytest.mark.slow  # starts processes
def test_only_the_seed_changes_the_order(world):
    filled(world, 8)
    world.convert()
    expected, order = world.bytes(), list(world.samples())
    assert len(expected) == 3 and order != sorted(order)
    for name, changes in {
        "workers": {"workers": 2},
        "again": {},
        "seed": {"cfg": {"seed": 1}},
    }.items():
        if name == "again":
            world.rows.reverse()
        world.convert(**changes, out=world.root / name)
        found = {path.name: path.read_bytes() for path in (world.root / name).iterdir()}
        assert (found == expected) == (name != "seed"), name


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 5, 9])
def test_an_interrupted_run_resumes_to_the_same_shards(tmp_path, monkeypatch, after):
    whole, stopped = (World(tmp_path / name) for name in ("whole", "stopped"))
    for world in (whole, stopped):
        filled(world)
        for number in (1, 2):
            world.add(number, box=(0.2, 0.6, 0.2, 0.6), box_id="b")
        world.add(20, "man"), world.add(21, mask_size=(60, 60))
    expected = whole.convert(cfg={"per_image": 2})

    calls, add = [], ShardWriter.add
    with monkeypatch.context() as patch:

        def failing(self, key, *args):
            calls.append(key)
            if len(calls) > after:
                raise Stop
            add(self, key, *args)

        patch.setattr(ShardWriter, "add", failing)
        with pytest.raises(Stop):
            stopped.convert(cfg={"per_image": 2})
    assert len(stopped.samples()) == after // 3 * 3
    progress = stopped.root / "shards-info" / "progress.jsonl"
    with progress.open("a") as file:
        file.write('["0000')  # a line that was cut off
    writes = []
    monkeypatch.setattr(ShardWriter, "add", lambda self, key, *a: (writes.append(key), add(self, key, *a)))
    assert stopped.convert(cfg={"per_image": 2}) == expected
    assert stopped.bytes() == whole.bytes() and len(writes) == 12 - after // 3 * 3
    looked = []
    monkeypatch.setattr(openimages, "examine", lambda task, **_: looked.append(task))
    assert stopped.convert(cfg={"per_image": 2}) == expected and not looked


def test_a_lost_shard_is_written_again(world):
    filled(world, 6)
    stats = world.convert()
    keys = set(world.samples())
    (world.root / "shards" / "00000.tar").unlink()
    assert world.convert() == stats
    assert set(world.samples()) == keys


def test_a_folder_of_other_settings_is_refused(world):
    filled(world, 2)
    world.convert()
    with pytest.raises(ValueError, match="config"):
        world.convert(cfg={"seed": 3})
    world.captions.append({"image_id": "x", "caption": "y"})
    with pytest.raises(ValueError, match="files"):
        world.convert()
    shutil.rmtree(world.root / "shards-info")
    with pytest.raises(ValueError, match=r"settings\.json"):
        world.convert()


# --- LLaVA's captions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    networks = TinyConfig().networks
    llava = networks["llava"]
    networks |= {"llava": replace(llava, llama=replace(llava.llama, lm_head=True))}
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    build_tiny_bundle(folder, cfg=replace(TinyConfig(), networks=networks))
    return folder


def test_llava_writes_the_captions(world, bundle, monkeypatch):
    filled(world, 3)
    short = CaptionConfig(max_new=3, batch=2)
    options = {"captions": None, "caption_bundle": bundle, "caption_cfg": short, "dtype": "fp32"}
    stats = world.convert(**options)
    lines = [json.loads(line) for line in world.info("captions.jsonl").splitlines()]
    assert len(lines) == 3
    raw = {line["image_id"]: line["caption"] for line in lines}
    for sample in world.samples().values():
        check_prompt([sample["label"]], sample["caption"])
        assert sample["raw_caption"] == raw[sample["image_id"]]
    assert stats["written"] + stats["dropped"].get("caption unusable", 0) == 3
    one = Captioner.load(bundle, dtype="fp32", cfg=short)([Image.open(world.image(1))])
    assert one == [raw[f"{1:016x}"]]

    before = world.bytes()
    shutil.rmtree(world.root / "shards")
    monkeypatch.setattr(Captioner, "__call__", None)  # the written captions are used again
    assert world.convert(**options) == stats and world.bytes() == before


def test_a_bundle_that_cannot_write_is_refused(world, bundle, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(bundle, mute)
    config = (mute / "config.json").read_text()
    (mute / "config.json").write_text(config.replace('"lm_head": true', '"lm_head": false'))
    world.add(1)
    with pytest.raises(ValueError, match="lm_head"):
        world.convert(captions=None, caption_bundle=mute)
    assert not world.bytes()


# --- the captions' filter ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "label", "expected"),
    [
        ("a man in a red and white striped shirt with a dog", "dog", "a man in a shirt with a dog"),
        ("a black-and-white cat on a sofa", "cat", "a cat on a sofa"),
        ("a light blue car", "car", "a car"),
        ("an orange cat", "cat", "a cat"),
        ("a yellow umbrella", "umbrella", "an umbrella"),
        ("a green unicycle", "unicycle", "a unicycle"),
        ("an orange on a table", "orange", "an orange on a table"),
        ("an orange cat next to an orange", "orange", "a cat next to an orange"),
        ("oranges in a wooden bowl", "orange", "oranges in a bowl"),
        ("a bowl with an orange on a table", "bowl", "a bowl with an orange on a table"),
        ("the cat is black and white", "cat", "the cat"),
        ("the cat is black and sits on a rug", "cat", "the cat sits on a rug"),
        ("a cat that is grey sitting on a chair", "cat", "a cat sitting on a chair"),
        ("a vase made of glass", "vase", "a vase"),
        ("a woman dressed in black with a dog", "dog", "a woman with a dog"),
        ("two dogs, one brown and one white", "dog", "two dogs"),
        ("a white, a grey and a black cat", "cat", "a cat"),
        ("A red, shiny, old car parked on a street.", "car", "An old car parked on a street."),
        ("a big, red car", "car", "a big car"),
        ("a dog and white cat", "cat", "a dog and cat"),
        ("Red car on the road", "car", "Car on the road"),
        ("a cream colored dog with brown spots", "dog", "a dog"),
        ("a heart shaped box", "box", "a box"),
        ("a cookie in the shape of a heart on a plate", "cookie", "a cookie on a plate"),
        ("a blue-eyed cat", "cat", "a cat"),
        ('a red "stop" sign', "stop sign", "a stop sign"),
        ("a red/white car", "car", "a car"),
        ("it's a red car, isn't it?", "car", "it's a car, isn't it?"),
        ("a brown bear in brown grass", "brown bear", "a brown bear in grass"),
        ("a polka dot dress on a teddy bear", "teddy bear", "a dress on a teddy bear"),
        ("a glass of red wine and a car", "car", "a glass of red wine and a car"),
        # the label
        ("a kitten on a bed", "cat", "a cat on a bed"),
        ("two puppies on a bed", "dog", "two dogs on a bed"),
        ("a blue plane in the sky", "airplane", "an airplane in the sky"),
        ("a keyboard on a desk", "computer keyboard", "a computer keyboard on a desk"),
        ("a dog on a plate", "hot dog", "a hot dog, a dog on a plate"),
        ("A view of a beach", "otter", "an otter, a view of a beach"),
        ("things on a table", "scissors", "scissors, things on a table"),
        ("Cats on a bed", "cat", "Cats on a bed"),
        ("red", "bus", "a bus"),
        ("an orange and white cat", "orange", "an orange, a cat"),
    ],
)  # fmt: skip
def test_training_captions(caption, label, expected):
    assert training_caption(caption, label) == expected
    check_prompt([label], expected)
    assert training_caption(expected, label) == expected


def test_long_captions_are_cut_at_words():
    caption = training_caption("a cat and " * 40, "dog", CaptionConfig(max_words=5))
    assert caption == "a dog, a cat and a cat"


@pytest.mark.parametrize("part", [" ", "red ", "cat ", ",", "a-", "x", "in the shape of "])
def test_endless_captions_are_cut_at_once(part):
    start = time.process_time()
    with suppress(ValueError):  # one endless word
        assert "cat" in training_caption(f"a cat{part * (10**5 // len(part))}on a mat", "cat")
    assert time.process_time() - start < 1


def test_combinations_leave_nothing_dangling():
    attributes = ("red", "orange", "light blue", "black and white", "wooden", "round", "striped")
    patterns = (
        "a {} {} cat", "a {}, {} cat", "the cat is {} and {}", "a {} cat and a {} dog.", "{} cat, {}",
        "a {} and a {} cat", "a cat in {} on {}", "a big, {} and {} cat", "a cat with {} and {} fur",
        "cats, {} or {}, on a bed",
    )  # fmt: skip
    for pattern in patterns:
        for one in attributes:
            for two in attributes:
                caption = training_caption(pattern.format(one, two), "cat")
                words = caption.rstrip(".").replace(",", " ,").split()
                assert "  " not in caption and " ," not in caption, caption
                ends = {"a", "an", "the", "and", "or", ",", "with", "in", "is"}
                assert words[-1] not in ends and words[0] not in {"and", "or", ","}, caption
                for a, b in pairwise(words):
                    assert a not in ("a", "an") or b not in ("a", "an", "and", "or", ",", "in", "on"), caption
                    assert (a, b) != (",", ",") and (a, b) not in product(("and", "or"), repeat=2), caption
                assert not set(words) & {"red", "blue", "white", "wooden", "round", "striped"}, caption


@pytest.mark.parametrize("caption", ["", " ", "an <image> of a cat"])
def test_unusable_captions(caption):
    with pytest.raises(ValueError, match="caption"):
        training_caption(caption, "cat")
