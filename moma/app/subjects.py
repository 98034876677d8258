"""The subjects of sample.py, from the files and hints that a user gives to what methods encode.

A subject is a file, or a folder of images of it. Whatever can be wrong with one is found before any weight is
read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from models.weights.files import visible
from moma.app.record import ImageRecord, InputFile, Segmented, face_of_text, face_text
from moma.inputs.faces import Face, find_face
from moma.inputs.preprocess import (
    FoundMask,
    Reference,
    ReferenceConfig,
    about,
    check_not_blank,
    find_mask,
    make_reference,
    open_image,
)
from moma.inputs.segment import Pick, Segmenter
from moma.sampling.interface import Region, Runtime


@dataclass(frozen=True)
class ImageRequest:
    """An image of a subject, as the user gives it, or as it was when an image was drawn that is replayed."""

    file: Path
    mask: Path | None = None
    pick: Pick | None = None  # what SAM is asked where there is no other mask, None = it is not asked
    segmented: Segmented | None = None  # what it answered then
    face_file: Path | None = None
    face_number: int | None = None
    face: str | None = None  # what was found then (`moma.app.record.face_text`)


@dataclass(frozen=True)
class SubjectRequest:
    """One subject."""

    word: str
    images: tuple[ImageRequest, ...]
    strength: float | None = None  # None: the sample's
    region: Region | None = None


class FoundImage(NamedTuple):
    """An image of a subject with its mask, and how a record tells of it."""

    word: str
    reference: Reference
    mask: FoundMask
    face: Face | None
    record: ImageRecord


def images_of(ref: Path) -> list[Path]:
    """The images that a file or a folder is, by name, without hidden and system files; ValueError if there
    are none."""
    if not ref.is_dir():
        return [ref]
    if files := [path for path in visible(ref) if not path.name.startswith(".")]:
        return files
    raise ValueError(f"{ref}: is an empty folder, expected images of the subject")


def partners(option: str, given: Path | None, ref: Path, files: Sequence[Path]) -> list[Path | None]:
    """What an option names for each image of a subject: a file for a file, a folder for a folder.

    Args:
        option: for messages.
        given: its value.
        ref: the subject's.
        files: `images_of` it.

    Raises:
        ValueError: where an image has not one file of its name.
    """
    if given is None or not ref.is_dir():
        return [given] * len(files)
    if not given.is_dir():
        raise ValueError(f"{option} {given}: {ref} is a folder, expected a folder with a file for each image")
    found = []
    for path in files:
        named = [other for other in images_of(given) if other.stem == path.stem]
        if len(named) != 1:
            count = len(named) or "no"
            raise ValueError(f"{option} {given}: has {count} files for {path.name}, expected one of its name")
        found.append(named[0])
    return found


def find_images(
    subjects: Sequence[SubjectRequest],
    images: Sequence[Image.Image],
    faces: Sequence[Face | None],
    config: ReferenceConfig,
    runtime: Runtime,
    load: Callable[[], Segmenter] | None = None,
) -> list[FoundImage]:
    """Where the subjects are; SAM is loaded once, after everything that needs no SAM was checked.

    Args:
        subjects: that are asked for.
        images: of all subjects, in order (`open_images`).
        faces: likewise (`find_faces`).
        config: how references are made.
        runtime: weights, which may have SAM, and machine.
        load: gives SAM where the caller keeps it.

    Raises:
        ValueError: for an image without a usable mask.
    """
    asked = [(subject.word, one) for subject in subjects for one in subject.images]
    weights = runtime.weights
    plain_first = weights.familiar is not None

    def made(i: int, found: FoundMask) -> FoundImage:
        word, one = asked[i]
        with about(one.mask or one.file):
            reference = make_reference(images[i], found.mask, weights.image_size, config)
        segmented = one.segmented
        if found.source == "sam" and segmented is None:
            segmented = Segmented.of(found.mask, str(one.pick))
        mask = InputFile.of(one.mask).shortened() if one.mask else None
        face = faces[i] and face_text(faces[i])
        record = ImageRecord(InputFile.of(one.file).shortened(), mask, segmented, face)
        return FoundImage(word, reference, found, faces[i], record)

    done: dict[int, FoundImage] = {}
    for i, (_, one) in enumerate(asked):
        later = (lambda _: None) if "sam" in weights.networks and one.pick is not None else None
        if one.segmented:
            done[i] = made(i, FoundMask(one.segmented.image(), "sam"))
        elif not one.pick:
            with about(one.file):
                found = find_mask(images[i], one.mask, segment=later, plain_first=plain_first)
            if found.mask:
                done[i] = made(i, found)
        else:
            with about(one.file):
                check_not_blank(images[i])
    if len(done) < len(asked):
        segment = (load() if load else Segmenter.load(weights, runtime.device)).mask
        for i, (_, one) in enumerate(asked):
            if i not in done and one.pick:  # whatever else the image says
                with about(one.file):
                    found = FoundMask(segment(images[i], one.pick), "sam")
                done[i] = made(i, found)
            elif i not in done:
                main = partial(segment, pick=one.pick)
                with about(one.file):
                    found = find_mask(images[i], segment=main, plain_first=plain_first)
                done[i] = made(i, found)
    return [done[i] for i in range(len(asked))]


def open_images(subjects: Sequence[SubjectRequest]) -> list[Image.Image]:
    """Every image of every subject, in order."""
    return [open_image(one.file) for subject in subjects for one in subject.images]


def find_faces(
    subjects: Sequence[SubjectRequest], images: Sequence[Image.Image], needed: bool
) -> list[Face | None]:
    """The face in every image, in order, where the method needs them.

    Args:
        subjects: that are asked for.
        images: theirs.
        needed: whether it does.

    Raises:
        ValueError: for a face that is not found, or one that nobody needs.
    """
    asked = [one for subject in subjects for one in subject.images]
    if not needed:
        if any(one.face_file or one.face_number is not None for one in asked):
            raise ValueError("--face-file and --face-number: this method with these weights needs no face")
        return [None] * len(asked)
    faces = []
    for one, image in zip(asked, images, strict=True):
        with about(one.file):
            found = face_of_text(one.face) if one.face else find_face(image, one.face_file, one.face_number)
        faces.append(found)
    return faces


def join(subjects: Sequence[SubjectRequest], encoded: Sequence[Any], method: Any) -> tuple[Any, ...]:
    """The subjects of the images that a method has encoded, in order.

    Args:
        subjects: that are asked for.
        encoded: of each image of all.
        method: that encoded them (`Method.join_images`).
    """
    rest = iter(encoded)
    return tuple(method.join_images([next(rest) for _ in subject.images]) for subject in subjects)


def encode(
    subjects: Sequence[SubjectRequest],
    found: Sequence[FoundImage],
    features: Sequence[Mapping[str, Any]],
    method: Any,
) -> tuple[Any, ...]:
    """The subjects as jobs take them.

    Args:
        subjects: that are asked for.
        found: every image of them.
        features: of each image (`Method.precompute`).
        method: that encodes them.
    """
    encoded = [
        method.encode_reference(
            one.reference, one.word, features=known, **({"face": one.face} if one.face else {})
        )
        for one, known in zip(found, features, strict=True)
    ]
    return join(subjects, encoded, method)
