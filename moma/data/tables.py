"""OpenImages' CSV files: which segmentations become training samples.

Headers identify the files. Box attributes are matched by image, class and coordinates.
"""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from moma.data.shards import MOST
from moma.data.words import HUMAN_CLASSES, WORN_CLASSES

# Attributes of a box: 1 yes, 0 no, -1 unknown.
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
# Kind of CSV file, part of its usual name -> the columns that are read.
TABLES = {
    "segmentation": (
        "MaskPath", "ImageID", "LabelName", "BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax", "PredictedIoU",
    ),
    "bbox": ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", *FLAGS),
    "class-descriptions": ("LabelName", "DisplayName"),
    "rotation": ("ImageID", "Rotation"),
}  # fmt: skip
NEEDED = ("segmentation", "class-descriptions")
CLASS_HEADERS = (["LabelName", "DisplayName"], ["id", "name"])  # older files have none
SPLITS = ("train", "validation", "test")  # a segmentation file's name contains one
NAME = re.compile(r"[\w-]+")  # of an image or a mask; used as path and key


@dataclass(frozen=True)
class OpenImagesConfig:
    """Which objects become training samples, and how they are stored."""

    exclude: frozenset[str] = HUMAN_CLASSES | WORN_CLASSES  # reasons: moma/data/words.py
    only: frozenset[str] = frozenset()  # classes to keep; empty: all but `exclude`
    # Hidden parts, groups, drawings and interiors do not show one subject clearly. Without IsOccluded, which
    # most boxes have, there are more samples.
    drop_flags: frozenset[str] = frozenset(FLAGS)
    min_iou: float = 0.7  # OpenImages' estimate of the mask's quality, if given
    min_share: float = 0.05  # of the image: three cells of the UNet's smallest map, 8x8
    max_share: float = 0.8  # of the image; above it there is no context to describe
    min_pixels: int = 128**2  # of the subject; below it details are lost
    min_side: int = 256  # of the image: half of what the UNet is trained at
    max_edges: int = 1  # of the image that the mask may touch; if more, it is cut off or scenery
    per_image: int = 1  # samples, of the largest masks; they share one caption
    # Of a sample, of different classes, the largest ones; from 2 on, an image makes one sample, of 2 or more.
    subjects: int = 1
    box_tolerance: float = 2e-3  # between the coordinates of a mask and its box, rounded differently
    max_side: int = 1024  # pixels stored; training uses 512, the rest is room for crops
    jpeg_quality: int = 95  # of images that are scaled down; others keep their bytes
    per_shard: int = 1000  # samples, some 200 MB: large enough to read fast, small enough to shuffle
    seed: int = 0  # of the order of the images, which mixes the classes within a shard

    def check(self) -> None:
        """ValueError for values that contradict each other or are out of range."""
        if not 0 <= self.min_share < self.max_share <= 1:
            raise ValueError(
                f"min_share {self.min_share}, max_share {self.max_share}: expected 0 <= min < max <= 1"
            )
        for name in ("per_image", "max_side", "per_shard", "min_side", "subjects"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.subjects > (1 if self.per_image > 1 else MOST):
            raise ValueError(
                f"subjects {self.subjects}: expected at most {MOST}, and 1 with per_image {self.per_image}"
            )
        if unknown := sorted(self.drop_flags - set(FLAGS)):
            raise ValueError(f"drop_flags {unknown[0]!r}: expected some of {', '.join(FLAGS)}")
        if both := sorted(self.only & self.exclude):
            raise ValueError(f"class {both[0]!r} is asked for and excluded (people, worn clothes or --deny)")


class Row(NamedTuple):
    """An object of the segmentation file."""

    image_id: str
    split: str
    mask: str  # file name
    label_id: str  # /m/...
    label: str
    box: tuple[float, ...]  # x min, x max, y min, y max in [0, 1]


def find_tables(places: Sequence[Path]) -> dict[str, list[Path]]:
    """The CSV files of each kind, identified by their headers; other files of a folder are ignored.

    ValueError: a file lacks the columns of the kind in its name, or a necessary kind is missing.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in TABLES}
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder")
        for path in sorted(place.glob("*.csv")) if place.is_dir() else [place]:
            header = next(_lines(path), [])
            classes = header in CLASS_HEADERS or (len(header) == 2 and header[0].startswith("/"))
            fits = [kind for kind, columns in TABLES.items() if set(columns) <= set(header)]
            named = next((kind for kind in TABLES if kind in path.name), "segmentation")
            if classes or fits:
                found["class-descriptions" if classes else fits[0]].append(path)
            elif named in path.name or path == place:
                lacks = ", ".join(column for column in TABLES[named] if column not in header)
                raise ValueError(f"{path}: its header lacks {lacks}; expected OpenImages' {named} file")
    for kind in NEEDED:
        if not found[kind]:
            raise ValueError(f"--csv: no {kind} file, expected one named like *{kind}*.csv")
    return found


def _read_table(path: Path, kind: str) -> Iterator[list[str]]:
    """The columns in `TABLES` of every line; ValueError if a line is too short."""
    lines, places, first = _lines(path), [0, 1], 1
    if kind != "class-descriptions":
        header, first = next(lines), 2
        places = [header.index(column) for column in TABLES[kind]]
    for number, line in enumerate(tqdm(lines, desc=path.name, unit="row", leave=False, delay=1), first):
        if line and len(line) <= max(places):
            raise ValueError(f"{path}:{number}: a line of {len(line)} columns, too few")
        if line and line not in CLASS_HEADERS:
            yield [line[place] for place in places]


def _lines(path: Path) -> Iterator[list[str]]:
    """The lines of a CSV file; ValueError, with its name, for what is none."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv.reader(file)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def select_rows(
    tables: Mapping[str, Sequence[Path]], cfg: OpenImagesConfig, dropped: Counter[str]
) -> tuple[list[Row], int]:
    """The objects that pass all filters that need no image, and the number of all objects.

    Args:
        tables: files by kind, from `find_tables`.
        cfg: the filters.
        dropped: counts the other objects by reason.

    Raises:
        ValueError: for unusable files or an unknown class.
    """
    classes = tables["class-descriptions"]
    lines = (line for path in classes for line in _read_table(path, "class-descriptions"))
    names = {label_id: _display(name) for label_id, name in lines}
    if unknown := sorted(cfg.only - set(names.values())):
        raise ValueError(f"--allow: no class is called {unknown[0]!r}, see {classes[0]}")
    lines = (line for path in tables["rotation"] for line in _read_table(path, "rotation"))
    rotated = {image_id for image_id, angle in lines if angle.strip("0.")}
    rows, count = [], 0
    for path in tables["segmentation"]:
        split = next((split for split in SPLITS if split in path.name), None)
        if split is None:
            raise ValueError(f"{path}: expected {', '.join(SPLITS)} in its name: it is the images' folder")
        for mask, image_id, label_id, *values, iou in _read_table(path, "segmentation"):
            count += 1
            box = _numbers(values, path)
            label = names.get(label_id, "")
            if not (NAME.fullmatch(image_id) and NAME.fullmatch(mask.removesuffix(".png"))):
                raise ValueError(f"{path}: ImageID {image_id!r}, MaskPath {mask!r}: expected plain names")
            if not label:
                dropped["no class name"] += 1
            elif label in cfg.exclude or (cfg.only and label not in cfg.only):
                dropped["class"] += 1
            elif iou and _numbers([iou], path)[0] < cfg.min_iou:
                dropped["predicted IoU"] += 1
            elif (box[1] - box[0]) * (box[3] - box[2]) < cfg.min_share:  # the box contains the mask
                dropped["box too small"] += 1
            elif image_id in rotated:
                dropped["rotated"] += 1
            else:
                rows.append(Row(image_id, split, mask, label_id, label, box))
    return _without_flags(rows, tables["bbox"], cfg, dropped), count


def _display(name: str) -> str:
    """'Bat (Animal)' -> 'bat'."""
    return " ".join(name.partition("(")[0].lower().split())


def _numbers(values: Sequence[str], path: Path) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except ValueError:
        raise ValueError(f"{path}: {', '.join(values)}: expected numbers") from None


def _without_flags(
    rows: Sequence[Row], paths: Iterable[Path], cfg: OpenImagesConfig, dropped: Counter[str]
) -> list[Row]:
    """The rows whose box has none of `cfg.drop_flags`."""
    wanted: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        wanted.setdefault((row.image_id, row.label_id), []).append(i)
    reasons: dict[int, str] = {}
    for path in paths:
        for image_id, label_id, *values in _read_table(path, "bbox"):
            places = wanted.get((image_id, label_id), ())
            flags = zip(FLAGS, values[4:], strict=True)
            if not places or not (bad := [f for f, v in flags if v == "1" and f in cfg.drop_flags]):
                continue
            box = _numbers(values[:4], path)
            for i in places:
                if max(abs(a - b) for a, b in zip(rows[i].box, box, strict=True)) <= cfg.box_tolerance:
                    reasons[i] = bad[0]
    dropped.update(reasons.values())
    return [row for i, row in enumerate(rows) if i not in reasons]


def by_image(rows: Iterable[Row], seed: int, dropped: Counter[str]) -> dict[str, list[Row]]:
    """Group rows by image.

    Args:
        rows: objects.
        seed: of the order of the images; an image's place depends only on its own id.
        dropped: counts objects that are listed twice.
    """
    masks: dict[str, dict[str, Row]] = {}
    for row in rows:
        if masks.setdefault(row.image_id, {}).setdefault(row.mask, row) is not row:
            dropped["listed twice"] += 1
    order = sorted(masks, key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    return {i: list(masks[i].values()) for i in order}
