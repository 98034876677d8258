"""The photos that methods are shown, each with the mask of its subject."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from pathlib import Path

from PIL import Image

from moma.app.record import RECORDS, read_stamp, save_png
from moma.inputs.preprocess import FoundMask, MaskSource, find_mask, open_image

LISTED = 8  # images named in an error


@dataclass(frozen=True)
class Reference:
    """A photo and its mask, both as files."""

    photo: Path
    mask: Path  # mode L, 255 = subject
    digest: str  # of the pixels of both, so that another PNG of the same pixels has the same
    source: MaskSource

    @classmethod
    def of(cls, photo: Path, mask: Path, source: MaskSource) -> "Reference":
        """The reference of two files.

        Args:
            photo: in any format.
            mask: mode L, 255 = subject.
            source: of the mask.
        """
        digest = sha256()
        for image in (open_image(photo), Image.open(mask, formats=RECORDS)):
            digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
        return cls(photo, mask, digest.hexdigest(), source)


@dataclass(frozen=True)
class Masks:
    """Where masks come from, in the order of `moma.inputs.preprocess.find_mask`.

    A mask file is `folder/SUBJECT/IMAGE.*`, named like its photo.
    """

    folder: Path | None = None
    segment: Callable[[Image.Image], Image.Image] | None = None  # image -> mask, mode L, 255 = subject
    weights: str = ""  # identifies those of `segment`
    plain_first: bool = False

    def given(self, photo: Path) -> Path | None:
        """The mask file of a photo, if there is one."""
        if self.folder is None:
            return None
        return next(iter(sorted((self.folder / photo.parent.name).glob(f"{escape(photo.stem)}.*"))), None)

    def save(self, photo: Path, target: Path) -> MaskSource:
        """Write a photo's mask and return its source; what `segment` has found once is reused.

        Raises:
            ValueError: there is no mask.
        """
        given, stamp = self.given(photo), sha256(photo.read_bytes() + self.weights.encode()).hexdigest()
        if given is None and self.segment is not None and read_stamp(target) == stamp:
            return "sam"
        found = find_mask(open_image(photo), given, segment=self.segment, plain_first=self.plain_first)
        save_png(target, found.mask, stamp=stamp if found.source == "sam" else None)
        return found.source


def find_references(
    photos: Sequence[Path], masks: Masks, out: Path, check: Callable[[Image.Image, Image.Image], None]
) -> dict[Path, Reference]:
    """The reference of each photo.

    Args:
        photos: `.../SUBJECT/IMAGE.*`.
        masks: where their masks come from.
        out: folder that the masks are written to, as `SUBJECT/IMAGE.png`.
        check: takes a photo and its mask (mode L); ValueError for a mask that methods cannot use.

    Raises:
        ValueError: names all photos without a usable mask.
    """
    if masks.folder is not None and not any(map(masks.given, photos)):
        example = masks.folder / photos[0].parent.name / f"{photos[0].stem}.png"
        raise ValueError(f"{masks.folder}: holds no mask of these images, expected names like {example}")
    found, problems, doubts = {}, {}, []
    for photo in photos:
        target = out / photo.parent.name / f"{photo.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source = masks.save(photo, target)
            mask = Image.open(target, formats=RECORDS)
            check(open_image(photo), mask)
            if doubt := FoundMask(mask, source).doubt():
                doubts.append(f"{photo}: {doubt}")
            found[photo] = Reference.of(photo, target, source)
        except ValueError as error:
            problems[photo] = error
    if doubts:
        print(f"note: {len(doubts)} of {len(photos)} masks are doubtful; {doubts[0]}", file=sys.stderr)
    if problems:
        names = ", ".join(map(str, list(problems)[:LISTED]))
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(
            f"{len(problems)} of {len(photos)} images have no usable mask: {names}{more} (the first:"
            f" {next(iter(problems.values()))}); give masks with --masks DIR, as DIR/SUBJECT/IMAGE.png, or a"
            " bundle with SAM"
        )
    return found
