"""Convert OpenImages' segmentations to shards of (image, subject mask, label, caption), the paper's data.

    python -m moma.data.openimages --images images/ --masks masks/ --csv csv/ --captions captions.jsonl \
        --out shards/

csv/ holds OpenImages' own files: `*-annotations-object-segmentation.csv` and `*class-descriptions*.csv`.
`*-annotations-bbox.csv` also drops occluded and other unclear objects, `*-images-*rotation.csv` drops rotated
images. Captions are lines {"image_id": ..., "caption": ...}, or LLaVA writes them (--caption-bundle).

Nothing is downloaded: a run without captions lists the images to get in `<out>-info/missing_images.txt`, in
the format of OpenImages' downloader.py. That folder also gets `stats.json`, `broken_files.txt`, LLaVA's
captions and the progress from which an interrupted run resumes. The seed gives the order of the images; the
shards are the same bytes for any number of workers and interruptions.
"""

import argparse
import io
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, reduce
from itertools import islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from models.weights.files import append_text, parse_json, read_object
from moma.app.files import Parser, exit_status, write_text
from moma.data.captions import CAPTIONS, CaptionConfig, Captioner, read_captions, training_caption
from moma.data.shards import Other, ShardWriter
from moma.data.tables import OpenImagesConfig, Row, by_image, find_tables, select_rows
from moma.data.triplets import HALF, subject_ends
from moma.data.words import WORN_CLASSES
from moma.inputs.preprocess import FORMATS, INPUT, encoded, find_mask, open_image, same_aspect
from moma.sampling.device import DTYPES, set_precision
from moma.weights.bundle import Bundle

# Possible paths of a file: {s} split, {h} first character of the image's id, as in the archives.
LAYOUTS = ("{n}", "{h}/{n}", "{s}/{n}", "{s}/{h}/{n}", "{s}_{h}/{n}", "{s}-masks-{h}/{n}")
EXIF_ORIENTATION, UPRIGHT = 0x0112, 1
CAPTIONS_FILE = "captions.jsonl"  # LLaVA's
TOP = 20  # classes printed at the end; stats.json has all
LIMITS = replace(INPUT, min_side=1)
AHEAD = 4  # images decoded ahead per worker; bounds the memory


@dataclass(frozen=True)
class Request:
    """What `convert` reads and writes."""

    images: Path
    masks: Path
    tables: Sequence[Path]  # CSV files and folders of them
    out: Path
    captions: Path | None = None  # JSONL file
    caption_bundle: Path | None = None  # whose LLaVA writes the captions instead
    workers: int = 1
    device: str = "auto"  # of LLaVA
    dtype: str = "auto"
    cfg: OpenImagesConfig = field(default_factory=OpenImagesConfig)
    caption_cfg: CaptionConfig = CAPTIONS

    @property
    def info(self) -> Path:
        """Folder beside the shards for everything else."""
        return self.out.with_name(f"{self.out.name}-info")


def convert(request: Request) -> dict[str, Any]:
    """Write the shards and the files beside them; resume an earlier run with the same settings.

    Broken files are tried again.

    Returns:
        The statistics, as in stats.json.

    Raises:
        ValueError: with nothing written, for unusable CSV or caption files or settings; with the list of
            missing images, if all are missing or no captions are given.
    """
    cfg, info, dropped = request.cfg, request.info, Counter[str]()
    cfg.check()
    for folder in (request.images, request.masks):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    tables = find_tables(request.tables)
    rows, count = select_rows(tables, cfg, dropped)
    images = by_image(rows, cfg.seed, dropped)
    if not images:
        raise ValueError(f"none of {count} objects passes the filters; dropped: {dict(dropped)}")
    captions = read_captions(request.captions, images) if request.captions else {}
    settings = _check_settings(request, tables)
    writer = ShardWriter(request.out, cfg.per_shard)
    info.mkdir(exist_ok=True)
    progress = Progress(info / "progress.jsonl", writer, cfg.per_shard)

    new = [i for i in images if i not in progress.done]
    paths = {i: _find(request.images, images[i][0].split, f"{i}.jpg") for i in new}
    missing = sorted(f"{images[i][0].split}/{i}" for i in new if paths[i] is None)
    write_text(info / "missing_images.txt", _lines(missing))
    if len(missing) == len(images) or not (request.captions or request.caption_bundle):
        raise ValueError(
            f"{len(missing)} of {len(images)} images are not in {request.images}, see"
            f" {info}/missing_images.txt; get them, then give --captions or --caption-bundle"
        )
    captioner = _load_captioner(request, images, captions)
    write_text(info / "settings.json", f"{settings}\n")
    tasks = []
    for i in new:
        if paths[i] is None or not (captioner or i in captions):
            dropped["image missing" if paths[i] is None else "no caption"] += len(images[i])
        else:
            tasks.append(Task(paths[i], images[i]))
    outcomes = _ordered(partial(examine, masks=request.masks, cfg=cfg), tasks, request.workers)
    with progress, closing(outcomes), writer, tqdm(total=len(tasks), unit="image") as bar:
        for outcome in _with_captions(outcomes, captions, captioner, info / CAPTIONS_FILE):
            progress.add(outcome, captions.get(outcome.image_id, ""), request.caption_cfg)
            bar.update()
    classes = Counter[str]()
    for _, written, reasons in progress.results(images):
        classes.update(written.values())
        dropped.update(reasons)
    write_text(info / "broken_files.txt", _lines(progress.broken))
    stats = {
        "rows": count,
        "written": classes.total(),
        "images missing": len(missing),
        "dropped": dict(dropped.most_common()),
        "classes": dict(classes.most_common()),
    }
    write_text(info / "stats.json", json.dumps(stats, indent=1) + "\n")
    return stats


def _check_settings(request: Request, tables: Mapping[str, Sequence[Path]]) -> str:
    """The settings of a run as JSON; ValueError if the folders hold a run with others."""
    files = [path for paths in (*tables.values(), [request.captions]) for path in paths if path]
    values = {
        "config": asdict(request.cfg),
        "captions": asdict(request.caption_cfg),
        "caption bundle": request.caption_bundle and Bundle.open(request.caption_bundle).hashes,
        "files": {path.name: path.stat().st_size for path in files},
    }
    text = json.dumps(values, indent=1, default=sorted)
    path = request.info / "settings.json"
    if path.exists():
        before = read_object(path)
        if other := [key for key, value in json.loads(text).items() if before.get(key) != value]:
            raise ValueError(
                f"{request.out}: begun with another {other[0]}, see {path}; choose another --out"
            )
    elif request.out.is_dir() and any(request.out.iterdir()):
        raise ValueError(f"{request.out}: not empty and without {path}; choose another --out")
    return text


# --- images ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    path: Path  # of the image
    rows: Sequence[Row]


class Sample(NamedTuple):
    key: str
    image: bytes  # JPEG
    mask: bytes  # PNG of the same size
    row: Row
    others: tuple[tuple[bytes, Row], ...] = ()  # masks and rows of further subjects


class Outcome(NamedTuple):
    """The samples of an image, and why its other objects were dropped."""

    image_id: str
    samples: list[Sample]
    dropped: Counter[str]
    broken: list[str]  # a line per broken file


def _find(folder: Path, split: str, name: str) -> Path | None:
    """The file under one of the `LAYOUTS`."""
    places = (folder / layout.format(n=name, h=name[0], s=split) for layout in LAYOUTS)
    return next((place for place in places if place.is_file()), None)


def examine(task: Task, masks: Path, cfg: OpenImagesConfig) -> Outcome:
    """Read an image and its masks and filter by them; runs in a worker.

    Args:
        task: the image and its objects.
        masks: folder of the mask files.
        cfg: the filters.
    """
    outcome = Outcome(task.rows[0].image_id, [], Counter(), [])
    try:
        image, data = open_image(task.path, LIMITS), task.path.read_bytes()
        with Image.open(task.path, formats=FORMATS) as file:
            plain = file.format == "JPEG" and file.mode in ("RGB", "L")
            upright = file.getexif().get(EXIF_ORIENTATION, UPRIGHT) == UPRIGHT
    except (ValueError, OSError) as error:
        outcome.broken.append(str(error))
        outcome.dropped["image broken"] = len(task.rows)
        return outcome
    if not upright or min(image.size) < cfg.min_side:  # rotated: the mask's orientation is unknown
        outcome.dropped["image too small" if upright else "rotated"] = len(task.rows)
        return outcome
    kept = []
    for row in task.rows:
        path = _find(masks, row.split, row.mask) or masks / row.mask
        try:
            mask = np.asarray(find_mask(image, path, LIMITS).mask) > HALF  # (H, W)
        except (ValueError, OSError) as error:
            outcome.broken.append(str(error))
            outcome.dropped["mask broken or missing"] += 1
            continue
        if fault := _fault(mask, image.size, cfg):
            outcome.dropped[fault] += 1
        else:
            kept.append((mask, row))
    kept.sort(key=lambda pair: (-pair[0].mean(), pair[1].mask))
    if cfg.subjects > 1:
        largest: dict[str, tuple[np.ndarray, Row]] = {}
        for pair in kept:
            largest.setdefault(pair[1].label, pair)
        kept, before = list(largest.values()), len(kept)
        kept = kept[: cfg.subjects] if len(kept) > 1 else []
        if before > len(kept):
            outcome.dropped["not the largest" if kept else "alone in its image"] += before - len(kept)
    elif others := kept[cfg.per_image :]:
        outcome.dropped["not the largest"] = len(others)
        kept = kept[: cfg.per_image]
    if kept and (max(image.size) > cfg.max_side or not plain):
        scale = min(1, cfg.max_side / max(image.size))
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        data = encoded(image, "JPEG", quality=cfg.jpeg_quality)
    masks = []
    for mask, row in kept:
        mask_image = Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
        masks.append((encoded(mask_image, "PNG"), row))
    if cfg.subjects > 1 and masks:
        outcome.samples.append(Sample(outcome.image_id, data, *masks[0], tuple(masks[1:])))
    else:
        outcome.samples.extend(Sample(Path(row.mask).stem, data, mask, row) for mask, row in masks)
    return outcome


def _fault(mask: np.ndarray, size: tuple[int, int], cfg: OpenImagesConfig) -> str | None:
    """Why a mask, bool (H, W), is not a subject of an image of this (width, height); None if it is."""
    if not same_aspect(size, mask.shape[::-1]):
        return "mask of another shape"
    share = mask.mean()
    if share < cfg.min_share or share * size[0] * size[1] < cfg.min_pixels:
        return "subject too small"
    if share > cfg.max_share:
        return "subject too large"
    edges = sum(bool(edge.any()) for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    return "touches the image's edges" if edges > cfg.max_edges else None


def _ordered(
    function: Callable[[Task], Outcome], tasks: Iterable[Task], workers: int
) -> Generator[Outcome, None, None]:
    """The results in the order of the tasks; ValueError if a worker dies."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    # "fork" may deadlock once torch has started threads.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    waiting: deque[Future[Outcome]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= workers * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError("a worker process died, perhaps of too little memory: fewer --workers") from None
        finally:
            for future in waiting:
                future.cancel()


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


# --- captions and progress ---------------------------------------------------------------------------


def _load_captioner(request: Request, images: Collection[str], captions: dict[str, str]) -> Captioner | None:
    """LLaVA, if no captions are given; adds an earlier run's captions to `captions`."""
    if request.captions is not None or request.caption_bundle is None:
        return None
    path = request.info / CAPTIONS_FILE
    if path.exists():
        complete = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last line may be cut off
        write_text(path, _lines(complete))
        captions.update(read_captions(path, images))
    return Captioner.load(request.caption_bundle, request.device, request.dtype, request.caption_cfg)


def _with_captions(
    outcomes: Iterable[Outcome], captions: dict[str, str], captioner: Captioner | None, path: Path
) -> Iterator[Outcome]:
    """Pass the outcomes on, once the captions of those with samples are in `captions` and in the file."""
    if captioner is None:
        yield from outcomes
        return
    rest = iter(outcomes)
    while batch := list(islice(rest, captioner.cfg.batch)):
        if new := [o for o in batch if o.samples and o.image_id not in captions]:
            texts = captioner([open_image(io.BytesIO(o.samples[0].image), LIMITS) for o in new])
            lines = [{"image_id": o.image_id, "caption": text} for o, text in zip(new, texts, strict=True)]
            append_text(path, _lines(map(json.dumps, lines)))
            captions.update((line["image_id"], line["caption"]) for line in lines)
        yield from batch


Result = tuple[str, dict[str, str], dict[str, int]]  # image; key -> label of its samples; reason -> dropped


class Progress:
    """Writes samples and keeps a line for each finished image, once its shards are complete.

    An interruption loses lines but no samples: those images are examined again, and samples in a complete
    shard are not written twice. An image with broken files is never finished.
    """

    def __init__(self, path: Path, writer: ShardWriter, per_shard: int) -> None:
        self.path, self.writer, self.per_shard, self.added = path, writer, per_shard, 0
        self.keys = writer.done_keys()
        self.done: dict[str, Result] = {}
        self.new: list[Result] = []
        self.broken: list[str] = []
        self._waiting: deque[tuple[int, Result]] = deque()  # (samples added so far, its line)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError):  # the last line may be cut off
                image_id, written, reasons = parse_json(line, "line")
                if self.keys.issuperset(written):  # else a shard was deleted
                    self.done[image_id] = (image_id, written, reasons)
        write_text(path, _lines(map(json.dumps, self.done.values())))

    def add(self, outcome: Outcome, raw_caption: str, cfg: CaptionConfig) -> None:
        """Write an image's samples."""
        written: dict[str, str] = {}
        for key, image, mask, row, others in outcome.samples:
            labels = [row.label, *(other.label for _, other in others)]
            try:
                caption = reduce(lambda text, label: training_caption(text, label, cfg), labels, raw_caption)
                subject_ends(labels, [None] * len(labels), caption)
            except ValueError:
                outcome.dropped["caption unusable"] += len(labels)
                continue
            written[key] = " + ".join(labels)
            if key not in self.keys:
                extra = {"image_id": row.image_id, "label_id": row.label_id, "raw_caption": raw_caption}
                more = [Other(png, other.label) for png, other in others]
                self.writer.add(key, image, "jpg", mask, row.label, caption, extra, None, more)
                self.added += 1
        self.new.append((outcome.image_id, written, dict(outcome.dropped)))
        self.broken += outcome.broken
        if not outcome.broken:
            self._waiting.append((self.added, self.new[-1]))
        self._flush(self.added - self.added % self.per_shard)

    def results(self, images: Collection[str]) -> list[Result]:
        """The results of these images, including earlier runs'."""
        return [result for result in (*self.done.values(), *self.new) if result[0] in images]

    def _flush(self, complete: int) -> None:
        """Write the lines of images whose samples are among the first `complete`."""
        lines = []
        while self._waiting and self._waiting[0][0] <= complete:
            lines.append(json.dumps(self._waiting.popleft()[1]))
        append_text(self.path, _lines(lines))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # the writer has completed the last shard
            self._flush(self.added)


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


# --- command line ------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> Request:
    parser = Parser(prog="python -m moma.data.openimages", description=(__doc__ or "").split("\n")[0])
    add = partial(parser.add_argument, metavar="DIR")
    add("--images", type=Path, required=True, help="folder of the images, <ImageID>.jpg")
    add("--masks", type=Path, required=True, help="folder of the mask PNGs")
    add("--csv", type=Path, required=True, nargs="+", metavar="PATH", help="CSV files or folders of them")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--captions", type=Path, metavar="FILE", help='JSONL of {"image_id", "caption"}')
    source.add_argument("--caption-bundle", type=Path, metavar="DIR", help="bundle with a captioning LLaVA")
    add("--out", type=Path, required=True, help="folder for the shards; DIR-info holds everything else")
    names = {"type": _names, "default": frozenset(), "metavar": "A,B"}
    add("--allow", **names, help="use only these classes: a list, or a file with one per line")
    add("--deny", **names, help="exclude these classes: a list, or a file with one per line")
    parser.add_argument("--keep-worn", action="store_true", help="keep clothes, which mostly show people")
    add("--max-side", type=int, metavar="N", help="pixels; larger images are scaled down (default: 1024)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: all cores)",
    )
    add("--device", default="auto", metavar="NAME", help="LLaVA's device: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="LLaVA's dtype")
    several = {"action": "append", "default": [], "type": _field, "metavar": "FIELD=VALUE"}
    add("--set", **several, help="set a field of OpenImagesConfig, e.g. per_image=2; repeatable")
    args = parser.parse_args(argv)
    values = dict(args.set) | ({} if args.max_side is None else {"max_side": args.max_side})
    cfg = replace(OpenImagesConfig(), **values)
    exclude = (cfg.exclude - WORN_CLASSES if args.keep_worn else cfg.exclude) | args.deny
    cfg = replace(cfg, exclude=exclude, only=cfg.only | args.allow)
    same = ("images", "masks", "out", "captions", "caption_bundle", "workers", "device", "dtype")
    return Request(tables=args.csv, cfg=cfg, **{name: getattr(args, name) for name in same})


def _names(text: str) -> frozenset[str]:
    """Classes from a comma-separated list or from a file with one per line."""
    path = Path(text)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    return frozenset(" ".join(line.lower().split()) for line in lines if line.strip())


def _field(text: str) -> tuple[str, Any]:
    """'name=value' -> a field of OpenImagesConfig and its value in the field's type."""
    name, _, value = text.partition("=")
    kinds = {f.name: type(getattr(OpenImagesConfig(), f.name)) for f in fields(OpenImagesConfig)}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(kinds)}, = and a value")
    try:
        kind = kinds[name]
        return name, frozenset(filter(None, value.split(","))) if kind is frozenset else kind(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {name} as {kinds[name].__name__}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    set_precision()
    return exit_status(
        "openimages", lambda: _report(convert(_parse(argv))), "stopped; the same command resumes from here"
    )


def _report(stats: Mapping[str, Any]) -> None:
    print(f"{stats['written']:,} of {stats['rows']:,} objects written")
    for reason, number in stats["dropped"].items():
        print(f"{number:>9,} dropped: {reason}")
    for label, number in list(stats["classes"].items())[:TOP]:
        print(f"{number:>9,} {label}")


if __name__ == "__main__":
    sys.exit(main())
