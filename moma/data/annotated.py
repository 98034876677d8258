"""Convert images with annotated subjects to shards: the layout of FastComposer's and MM-Diff's data.

    python -m moma.data.annotated ffhq/ --out shards/

ffhq/ holds a list, `image_ids_train.txt` or `image_ids.txt`, and for each line such as 000010000, in a folder
named by its first five characters, the image (.jpg), a number for each pixel (.npy, (H, W), 0 = background)
and {"caption", "segments": [{"id": number, "word", "end": behind the word in the caption}]} (.json). The same
command resumes an interrupted run. --faces keeps the people whose face insightface finds, with it.
"""

import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from models.weights.files import read_bytes, read_object, read_text
from moma.app.files import Parser, check_writable, exit_status
from moma.data.shards import KEY, MOST, READ, Other, ReadConfig, ShardWriter
from moma.data.triplets import SkipLog, subject_ends
from moma.data.words import ARTICLES
from moma.inputs.faces import Face, load_detector
from moma.inputs.preprocess import INPUT, open_image

LISTS = ("image_ids_train.txt", "image_ids.txt")
FOLDER = 5  # characters of an image's name that name its folder
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
EXIF_ORIENTATION, UPRIGHT = 0x0112, 1


class Sample(NamedTuple):
    """An image's caption and subjects, the largest first."""

    image: bytes
    caption: str
    subjects: list[Other]


Detector = Callable[[Image.Image], list[Face]]


def convert(
    folder: Path, out: Path, per_shard: int = 1000, most: int = MOST, detect: Detector | None = None
) -> SkipLog:
    """Write the shards; what an earlier run has written stays.

    Args:
        folder: of the images.
        out: for the shards.
        per_shard: samples in each.
        most: subjects of a sample, the largest ones.
        detect: finds faces (`moma.inputs.faces.load_detector`); subjects without one are then left out.

    Returns:
        What was skipped, and why.

    Raises:
        ValueError: for a folder without a list, or of whose images none can be used.
    """
    found = next((folder / name for name in LISTS if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(
            f"{folder}: has no {' or '.join(LISTS)}, expected FastComposer's or MM-Diff's layout"
        )
    names = list(dict.fromkeys(filter(None, map(str.strip, read_text(found, READ.file_bytes).split("\n")))))
    skips = SkipLog(tqdm.write)
    with ShardWriter(out, per_shard) as shards:
        done = shards.done_keys()
        for name in tqdm(names, unit="image"):
            if name in done:
                skips.add([], 1)
                continue
            try:
                one = read_sample(folder, name, most, detect=detect)
            except (ValueError, OSError) as error:
                skips.add([(name, str(error))])
                continue
            first, *others = one.subjects
            extra = {"end": first.end} | ({} if first.face is None else {"face": first.face})
            shards.add(name, one.image, "jpg", first.mask_png, first.label, one.caption, extra, None, others)
            skips.add([], 1)
    if not skips.delivered:
        reason = next(iter(skips.reasons.items()), (found.name, "it is empty"))
        raise ValueError(f"{folder}: no image can be used, e.g. {reason[0]!r}: {reason[1]}")
    return skips


def read_sample(
    folder: Path, name: str, most: int = MOST, cfg: ReadConfig = READ, detect: Detector | None = None
) -> Sample:
    """One image with its subjects.

    Args:
        folder: of all images.
        name: of this one.
        most: subjects that are kept, the largest ones.
        cfg: limits of the files.
        detect: as in `convert`.

    Raises:
        ValueError, OSError: for files that are missing, damaged, or do not belong together.
    """
    if not KEY.fullmatch(name):
        raise ValueError(f"the name {name!r}: expected letters, digits, - and _ only")
    path = folder / name[:FOLDER] / name
    data = read_bytes(path.with_suffix(".jpg"), cfg.file_bytes)
    image = open_image(io.BytesIO(data), INPUT, "its image", ("JPEG",))
    with Image.open(io.BytesIO(data)) as file:
        if file.getexif().get(EXIF_ORIENTATION, UPRIGHT) != UPRIGHT:
            raise ValueError("its image is stored turned: the orientation of its masks is unknown")
    numbers = read_numbers(path.with_suffix(".npy"), cfg)  # (H, W)
    if numbers.shape != image.size[::-1]:
        raise ValueError(f"its numbers are {numbers.shape}, its image {image.size[::-1]}: expected one shape")
    about = read_object(path.with_suffix(".json"))
    caption, segments = about.get("caption"), about.get("segments")
    if not isinstance(caption, str) or not isinstance(segments, list):
        raise ValueError("its JSON has no caption or no list of segments")
    subjects, faces = [], detect(image) if detect else []
    for segment in segments:
        if not isinstance(segment, dict) or type(segment.get("id")) is not int:
            raise ValueError(f"its segment {segment!r:.100}: expected id, word and end")
        mask = numbers == segment["id"]  # (H, W)
        if segment["id"] > 0 and mask.any():  # a later segment may cover it
            face = next((one for one in faces if _inside(one, mask)), None)
            if face or not detect:
                subjects.append((int(mask.sum()), segment, mask, face and face.to_json()))
    if not subjects:
        raise ValueError(f"it has no segment with a {'face' if detect else 'mask'}")
    subjects = sorted(subjects, key=lambda one: -one[0])[:most]
    words, ends = ([segment.get(key) for _, segment, *_ in subjects] for key in ("word", "end"))
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"its words are {words!r:.100}: expected texts")
    ends = subject_ends(words, ends, caption)
    labels = [
        re.sub(rf"^(?:{'|'.join(ARTICLES)})\s+", "", word.strip(), flags=re.IGNORECASE) for word in words
    ]
    return Sample(
        data,
        caption,
        [
            Other(_png(mask), label, end, None, face)
            for (*_, mask, face), label, end in zip(subjects, labels, ends, strict=True)
        ],
    )


def read_numbers(path: Path, cfg: ReadConfig = READ) -> np.ndarray:
    """A .npy file of (H, W) numbers; ValueError for another."""
    data = read_bytes(path, cfg.file_bytes)
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
    size = math.prod(shape) * dtype.itemsize
    if len(shape) != 2 or dtype.kind not in "buif" or size != len(data) - file.tell():
        raise ValueError(f"{path}: {dtype} {shape} in {len(data):,} bytes, expected (H, W) numbers")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _inside(face: Face, mask: np.ndarray) -> bool:
    """Whether a face's middle lies in a mask, bool (H, W)."""
    x, y = face.landmarks.mean(dim=0).long().tolist()
    return 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and bool(mask[y, x])


def _png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")  # one bit per pixel
    return file.getvalue()


# --- command line ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser(prog="python -m moma.data.annotated", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with the list and the images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--most", type=int, default=MOST, metavar="N", help="subjects of an image (default: 8)"
    )
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples (default: 1000)")

    parser.add_argument("--faces", action="store_true", help="keep people with a face, for train.py mm-diff")

    def run() -> None:
        args = parser.parse_args(argv)
        if not 1 <= args.most <= MOST:
            raise ValueError(f"--most {args.most}: expected 1 to {MOST}")
        check_writable("--out", args.out)
        detect = load_detector() if args.faces else None
        skips = convert(args.folder, args.out, args.per_shard, args.most, detect)
        print(json.dumps({"written": skips.delivered, "skipped": skips.total}))

    return exit_status("annotated", run, "stopped; the same command resumes from here")


if __name__ == "__main__":
    sys.exit(main())
