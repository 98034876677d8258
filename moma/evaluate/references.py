"""The real images that methods are shown, each with the mask of its subject."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from pathlib import Path

from PIL import Image

from moma.app.record import read_stamp, save_png
from moma.inputs.preprocess import MaskSource, find_mask, make_reference, open_image
from moma.methods.moma.config import MethodConfig

LISTED = 8  # images named in an error


@dataclass(frozen=True)
class Reference:
    """An image and its mask, both as files."""

    photo: Path
    mask: Path  # mode L, 255 = subject
    digest: str  # of both: of their pixels, which another PNG of the same image has, too
    source: MaskSource  # of the mask

    @classmethod
    def of(cls, photo: Path, mask: Path, source: MaskSource) -> "Reference":
        digest = sha256()
        for image in (open_image(photo), Image.open(mask)):
            digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
        return cls(photo, mask, digest.hexdigest(), source)


@dataclass(frozen=True)
class Masks:
    """Where masks come from (`moma.inputs.preprocess.find_mask`).

    A mask's file has the name of its subject and image in `folder`, and any extension.
    """

    folder: Path | None = None
    segment: Callable[[Image.Image], Image.Image] | None = None  # image -> mask, mode L, 255 = subject
    weights: str = ""  # stands for those of `segment`

    def given(self, photo: Path) -> Path | None:
        if self.folder is None:
            return None
        return next(iter(sorted((self.folder / photo.parent.name).glob(f"{escape(photo.stem)}.*"))), None)

    def save(self, photo: Path, target: Path) -> MaskSource:
        """Write the mask of an image, unless `segment` has found it there before, and say where it is from.

        ValueError for none.
        """
        given, stamp = self.given(photo), sha256(photo.read_bytes() + self.weights.encode()).hexdigest()
        if given is None and self.segment is not None and read_stamp(target) == stamp:
            return "sam"
        found = find_mask(open_image(photo), given, segment=self.segment)
        save_png(target, found.mask, stamp=stamp if found.source == "sam" else None)
        return found.source


def find_references(
    photos: Sequence[Path], masks: Masks, out: Path, size: int, method: MethodConfig
) -> dict[Path, Reference]:
    """Each image's reference; the masks used are written to `out`, as `<subject>/<image>.png`.

    size, method: of the square that methods see. ValueError that names all images without a usable mask.
    """
    if masks.folder is not None and not any(map(masks.given, photos)):
        example = masks.folder / photos[0].parent.name / f"{photos[0].stem}.png"
        raise ValueError(f"{masks.folder}: holds no mask of these images, expected names like {example}")
    found, problems = {}, {}
    for photo in photos:
        target = out / photo.parent.name / f"{photo.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source = masks.save(photo, target)
            make_reference(open_image(photo), Image.open(target), size, method)
            found[photo] = Reference.of(photo, target, source)
        except ValueError as error:
            problems[photo] = error
    if problems:
        raise ValueError(_told(problems, len(photos)))
    return found


def _told(problems: Mapping[Path, ValueError], number: int) -> str:
    names = ", ".join(str(photo) for photo in list(problems)[:LISTED])
    more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    first = next(iter(problems.values()))
    return (
        f"{len(problems)} of {number} images have no usable mask: {names}{more} (the first: {first}); give"
        " masks with --masks DIR, as DIR/SUBJECT/IMAGE.png, or a bundle with a segmenter"
    )
