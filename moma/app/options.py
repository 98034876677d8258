"""The options of sample.py, and the request they make.

A `Request` is everything that decides the images; it comes from the options, or from the settings of an image
that is to be drawn again. Either way mistakes are ValueErrors of one line, before anything is loaded.
"""

import argparse
import importlib.metadata
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from models.weights.files import read_text
from moma.app.files import Parser, given_path
from moma.app.record import OUTPUTS, InputFile, Record, SubjectRecord, follow, short_path
from moma.app.subjects import FoundImage, ImageRequest, SubjectRequest, images_of, partners
from moma.inputs.segment import Box, Pick, Point
from moma.methods import METHODS, find_method
from moma.methods.prompts import fill, joined, plain_text
from moma.sampling.config import TIMESTEPS, SampleConfig, check_seed, parse_field
from moma.sampling.device import DTYPES, choose_device, dtype_name
from moma.sampling.diffusion import SOLVERS
from moma.sampling.interface import Region, Runtime, check_regions
from moma.sampling.memory import Toggle
from moma.sampling.pipeline import Pipeline
from moma.weights.bundle import Bundle

MINI = Path(__file__).parents[2] / "weights" / "mini"  # this repository's, wherever a command is started
WEIGHTS = [MINI.with_name("moma"), MINI]  # where no folder of weights is given: the first that exists
# Of the prompts when none is given; MoMA-mini knows them too.
SCENES = ("on the beach", "in the snow", "in the forest", "at sunset")
# Names of files that do not say what they show: words for images, and those of cameras, phones and browsers.
NO_SUBJECTS = {
    "image", "images", "img", "imag", "mask", "masks", "photo", "photos", "photograph", "foto", "fotos",
    "picture", "pictures", "pic", "pics", "bild", "bilder", "imagen", "ref", "reference", "subject",
    "object", "thing", "camera", "dcim", "mvimg", "vid", "burst", "pano", "scan", "snap", "snapshot",
    "screenshot", "screenshots", "screencast", "screen", "capture", "captura", "bildschirmfoto",
    "download", "downloads", "downloaded", "unnamed", "untitled", "unbenannt", "unknown", "default",
    "maxresdefault", "hqdefault", "sddefault", "file", "files", "data", "copy", "kopie", "new", "temp",
    "tmp", "test", "sample", "input", "output", "result", "results", "final", "original", "edited",
    "cropped", "resized", "attachment", "received", "whatsapp", "telegram", "facebook", "instagram",
    "snapchat", "twitter", "pinterest", "google", "avatar", "thumbnail", "thumb", "clipboard", "paste",
    "pasted", "export", "exported", "render", "index", "source",
}  # fmt: skip
LONGEST_WORD = 20  # letters of a subject in a file name; longer ones are codes
PROMPT_BYTES = 2**20  # of a file of prompts
MAX_IMAGES = 10_000  # of a run; their noise is drawn first
# Options whose values a replayed image provides.
REPLAYED = (
    "point", "box", "object", "subject", "prompt", "prompts", "negative", "num", "seed", "size", "strength",
    "guidance", "guidance_interval", "steps", "solver", "grid", "preset", "set", "batch_size", "method",
    "region", "face_file", "face_number",
)  # fmt: skip
# Options that say the same thing of a subject in two ways.
OF_ONE = (
    ("mask", "point"), ("mask", "box"), ("mask", "object"), ("object", "point"), ("object", "box"),
    ("face_file", "face_number"),
)  # fmt: skip
# Options of which the first has no use for the second: --list-objects draws nothing.
CONTRADICTIONS = (
    *(("list_objects", name) for name in ("mask", "replay", "cache", "debug", *REPLAYED)),
    *(("batch_refs", name) for name in ("ref", "replay", "list_objects", "point", "box", "debug")),
)
# Options that are given for each subject, and those of them that are about a single image.
OF_SUBJECTS = (
    "subject", "mask", "point", "box", "object", "strength", "region", "face_file", "face_number",
)  # fmt: skip
OF_AN_IMAGE = ("point", "box", "object", "face_number")
NONE = "-"  # in the place of an option's value: the subject has none  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What decides the images."""

    method: str  # a name of the registry
    config: Any  # the method's
    subjects: tuple[SubjectRequest, ...]
    images: tuple[tuple[str, int], ...]  # prompt and seed of each
    # The one to keep, None = all. A replay draws its whole batch again, so that every bit is the same.
    only: int | None
    negative: str
    sample: SampleConfig
    dtype: str

    @property
    def words(self) -> tuple[str, ...]:
        """Of the subjects."""
        return tuple(subject.word for subject in self.subjects)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Of each subject."""
        default = self.sample.strength
        return tuple(default if one.strength is None else one.strength for one in self.subjects)

    @property
    def regions(self) -> tuple[Region | None, ...]:
        """Of each subject."""
        return tuple(subject.region for subject in self.subjects)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ValueError for options that contradict each other or lack something."""
    parser = Parser(
        description="Draw new images of the subject of one image.",
        epilog="Each image holds its settings; --replay draws it again from them.",
    )
    _everyday(parser)
    _advanced(parser.add_argument_group("advanced"))
    args = parser.parse_args(argv)
    for first, second in CONTRADICTIONS:
        if _given(args, first) and _given(args, second):
            raise ValueError(f"{_option(first)} contradicts {_option(second)}: give one of them")
    if args.replay:
        given = [name for name in REPLAYED if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{_option(given[0])} contradicts --replay, which takes it from the image")
    elif None in (args.ref or ()):
        raise ValueError(f"--ref {NONE}: expected an image; {NONE} is for --replay, whose files are known")
    elif args.list_objects and len(args.ref or ()) != 1:
        raise ValueError(f"--list-objects: {len(args.ref or ())} --ref, expected one")
    elif not (args.ref or args.batch_refs) and not (
        args.method and 0 in find_method(args.method).method.subjects and args.prompt
    ):
        raise ValueError("which subject? Give an image of it with --ref FILE")
    return args


# Defaults that a replayed image must not mix with are None here and filled in by `request_of_args`.


def _everyday(parser: argparse.ArgumentParser) -> None:
    base = SampleConfig()
    add = parser.add_argument_group("the subject").add_argument
    each: dict[str, Any] = {"action": "append"}
    files = {**each, "type": or_none(given_path)}
    add("--ref", **files, metavar="FILE|DIR", help="image of the subject, or a folder of"
        " images of it; repeated, each is a subject, and the options below, given as often, go to each in"
        f" turn, with {NONE} for none; with --replay: where it is now, {NONE} for where it was")  # fmt: skip
    add("--batch-refs", type=Path, metavar="DIR", help="draw each file or folder in DIR as a subject"
        " of its own; run again, it goes on where it was stopped (docs/sampling.md)")  # fmt: skip
    add("--subject", **each, type=or_none(str), metavar="WORD", help="what the subject is, e.g. cat (default:"
        " the name of its file or folder)")  # fmt: skip
    add("--mask", **files, metavar="FILE|DIR", help="mask of the subject, white on black;"
        " for a folder, one with files of the same names (default: the image's transparency, else SAM if the"
        " weights have it, else a plain background)")  # fmt: skip
    add("--point", **each, type=or_none(parse_points), metavar="X,Y[:X,Y]", help="pixel on the subject, for"
        " SAM; several of one subject: joined by colons, or with one --ref repeated")  # fmt: skip
    add("--box", **each, type=or_none(parse_box), metavar="X0,Y0,X1,Y1",
        help="box around the subject in pixels, for SAM")  # fmt: skip
    add("--list-objects", action="store_true", help="number the image's objects, for --object, and stop")
    add("--object", **each, type=or_none(int), metavar="N",
        help="number of the object that is the subject (default: 1)")  # fmt: skip
    add("--face-file", **files, metavar="FILE|DIR", help="a person's face for mm-diff, a"
        " .safetensors with embedding and landmarks (default: insightface looks for it)")  # fmt: skip
    add("--face-number", **each, type=or_none(int), metavar="N", help="which face, the largest first"
        " (default: 1)")  # fmt: skip
    add("--region", **each, type=or_none(parse_region), metavar="X0,Y0,X1,Y1", help="where the subject"
        " should be, in shares of the new image, e.g. 0,0,0.5,1 (docs/sampling.md)")  # fmt: skip
    add = parser.add_argument_group("the images").add_argument
    add("--prompt", action="append", metavar="TEXT", help="the new scene, naming the subject; {subject}"
        f" stands for its word; may be repeated (default: {len(SCENES)} scenes)")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    add("--num", type=int, metavar="N", help="images per prompt (default: 1)")
    add("--seed", type=int, metavar="N", help="seed of a prompt's first image; the others count up"
        " (default: 0)")  # fmt: skip
    add("--strength", **each, type=or_none(float), metavar="BETA", help="subject strength β: about 1 for"
        " new scenes, 0.4 for new textures; once for all subjects, or for each (default:"
        f" {base.strength})")  # fmt: skip
    add("--size", type=parse_size, metavar="S|WxH", help="size in pixels, e.g. 512 or 768x512 (default: the"
        " weights' own)")  # fmt: skip
    add("--method", choices=tuple(METHODS), help="how the subject is drawn (default: moma)")
    add("--weights", type=Path, metavar="DIR", help="bundle folder (default: weights/moma or weights/mini)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: out)")
    add("--format", choices=tuple(OUTPUTS), default="png", help="of the images; jpeg and webp lose details"
        " and hold the settings, too (default: png)")  # fmt: skip
    add("--replay", type=Path, metavar="FILE", help="draw an image again from the settings inside it")


def _advanced(group: argparse._ArgumentGroup) -> None:
    base, add = SampleConfig(), group.add_argument
    add("--negative", metavar="TEXT", help="what the images should not show (default: nothing)")
    add("--steps", type=int, metavar="N", help=f"denoising steps (default: {base.steps})")
    add("--solver", choices=tuple(SOLVERS), help="ODE solver; dpm needs about half the steps of ddim"
        f" (default: {base.solver})")  # fmt: skip
    add("--grid", choices=get_args(get_type_hints(SampleConfig)["grid"]), help="timesteps; trailing is for"
        f" LoRAs for few steps (docs/sampling.md; default: {base.grid})")  # fmt: skip
    add(
        "--guidance",
        type=float,
        metavar="G",
        help=f"classifier-free guidance scale (default: {base.guidance})",
    )
    add("--guidance-interval", type=int, nargs=2, metavar=("LOW", "HIGH"), help="timesteps"
        f" of {TIMESTEPS} at which guidance acts; the others take half the time, but the image changes"
        " (docs/approximations.md; default: all)")  # fmt: skip
    add("--preset", help="preset of the method, e.g. release or paper for moma, where the two differ"
        " (docs/choices.md; default: default)")  # fmt: skip
    add("--set", action="append", type=parse_field, metavar="FIELD=VALUE", help="set one field of the"
        " method's config, e.g. m_gen_threshold=0.3; may be repeated")  # fmt: skip
    add("--batch-size", type=int, metavar="N", help="images drawn together, which costs memory (default:"
        f" {base.batch_size}; 1 where the method's images change each other)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="dtype of the weights (default: auto)")
    toggle: dict[str, Any] = {"default": "auto", "choices": get_args(Toggle)}
    add("--stream", **toggle, help="read the language model block by block from the disk instead of loading"
        " it (default: auto, if memory is short)")  # fmt: skip
    add("--turns", **toggle, help="load text encoders, UNet and VAE one at a time, each while it is used (not"
        " mm-diff's; default: auto, if memory is short)")  # fmt: skip
    add(
        "--cuda-graph",
        **toggle,
        help="record denoising steps as CUDA graphs (default: auto, on CUDA devices)",
    )
    add("--tiles", **toggle, help="decode images in tiles, which may change their tone a little (default:"
        " auto, if memory is short)")  # fmt: skip
    add("--cache", type=Path, metavar="DIR|off", help="folder of the language model's embeddings: repeat"
        " queries skip it (default: moma/embeddings in the user's cache folder)")  # fmt: skip
    add("--debug", action="store_true", help="add each image's last mask M_gen to the contact sheet")


def _given(args: argparse.Namespace, name: str) -> bool:
    """Whether an option was used; 0 is a value."""
    value = getattr(args, name)
    return value is not None and value is not False


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An option's type that also takes `NONE`."""

    def parsed(text: str) -> Any:
        return None if text == NONE else parse(text)

    parsed.__name__ = parse.__name__  # for argparse's messages
    return parsed


def parse_points(text: str) -> tuple[Point, ...]:
    """'30,40' or '30,40:50,60' -> ((30, 40), (50, 60))"""
    expected = "x and y in pixels such as 30,40, several joined by colons"
    return tuple(_parse_numbers(part, 2, expected) for part in text.split(":"))


def parse_region(text: str) -> Region:
    """'0,0,0.5,1' -> (0.0, 0.0, 0.5, 1.0)"""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
        check_regions(((x0, y0, x1, y1),), 1)
    except ValueError:
        expected = "left, top, right, bottom as shares of the image such as 0,0,0.5,1"
        raise argparse.ArgumentTypeError(f"{text!r:.100}, expected {expected}") from None
    return x0, y0, x1, y1


def parse_box(text: str) -> Box:
    """'10,20,200,220' -> (10, 20, 200, 220)"""
    return _parse_numbers(text, 4, "left, top, right, bottom in pixels such as 10,20,200,220")


def _parse_numbers(text: str, count: int, expected: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+" + r",\d+" * (count - 1), text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return tuple(map(int, text.split(",")))


def parse_size(text: str) -> tuple[int, int]:
    """'512' or '768x512' -> (width, height)."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}, expected pixels such as 512 or 768x512")
    return int(match[1]), int(match[2] or match[1])


def subjects_of_args(args: argparse.Namespace) -> tuple[SubjectRequest, ...]:
    """A subject for each --ref, with what the other options, in their order, say of it."""
    refs, given = args.ref or [], {name: getattr(args, name) for name in OF_SUBJECTS}
    if args.point and len(refs) == 1:  # each another pixel on it
        given["point"] = [tuple(point for points in args.point for point in points or ())]
    if len(args.strength or ()) == 1:  # for all of them
        given["strength"] = None
    columns = {name: paired(name, values, len(refs)) for name, values in given.items()}
    return tuple(
        _subject(ref, {name: column[i] for name, column in columns.items()}) for i, ref in enumerate(refs)
    )


def paired(name: str, values: Sequence[Any] | None, subjects: int) -> Sequence[Any]:
    """An option's values, one for each subject; without any, None for each.

    Args:
        name: of the option.
        values: in the order of the command line.
        subjects: how many there are.

    Raises:
        ValueError: for another number of values.
    """
    if values and len(values) != subjects:
        raise ValueError(
            f"{_option(name)}: {len(values)} given for {subjects} subjects, expected one for each in their"
            f" order, {NONE} for one that needs none"
        )
    return values or [None] * subjects


def _subject(ref: Path, given: Mapping[str, Any]) -> SubjectRequest:
    """A subject; given: its value of each option, or None."""
    said = [name for name in OF_SUBJECTS if given[name] not in (None, ())]
    for first, second in OF_ONE:
        if first in said and second in said:
            raise ValueError(f"{_option(first)} contradicts {_option(second)}: give one of them")
    files = images_of(ref)
    if len(files) > 1 and (of_one := [name for name in OF_AN_IMAGE if name in said]):
        raise ValueError(f"{_option(of_one[0])} is about one image, {ref} has {len(files)}: leave it out")
    pick = Pick(given["point"] or (), given["box"], given["object"])
    masks, faces = (partners(_option(name), given[name], ref, files) for name in ("mask", "face_file"))
    word = subject_of_file(ref) if given["subject"] is None else given["subject"]
    return SubjectRequest(
        " ".join(plain_text(word).split()),
        tuple(
            ImageRequest(file, mask, pick, face_file=face, face_number=given["face_number"])
            for file, mask, face in zip(files, masks, faces, strict=True)
        ),
        given["strength"],
        given["region"],
    )


def request_of_args(args: argparse.Namespace, bundle: Bundle) -> Request:
    """The request that the options make."""
    method = args.method or "moma"
    config = bundle.method_config(
        method, "default" if args.preset is None else args.preset, **dict(args.set or [])
    )
    subjects = subjects_of_args(args)
    if any(x is not None for x in args.strength or ()) and not find_method(method).method.has_strength:
        raise ValueError(f"--strength: {method} has none, leave it out")
    prompts = [*map(plain_text, args.prompt or []), *(read_prompts(args.prompts) if args.prompts else [])]
    width, height = args.size or (None, None)
    names = ("steps", "solver", "grid", "guidance", "guidance_interval", "batch_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if find_method(method).method.batch_dependent(config):
        given.setdefault("batch_size", 1)
    if args.strength and len(args.strength) == 1 and args.strength[0] is not None:  # for all
        given["strength"] = args.strength[0]
    sample = SampleConfig(width=width, height=height, **given).sized(bundle.image_size)
    seed, num = args.seed or 0, 1 if args.num is None else args.num
    if num < 1:
        raise ValueError(f"--num {num}: expected 1 image or more")
    check_seed("--seed", seed, num)
    them = " and ".join(f"{'an' if s.word[:1].lower() in 'aeiou' else 'a'} {s.word}" for s in subjects)
    if subjects:
        prompts = [fill(prompt, joined([one.word for one in subjects])) for prompt in prompts]
    prompts = dict.fromkeys(prompts) or [f"{them} {scene}" for scene in SCENES]
    if num * len(prompts) > MAX_IMAGES:
        raise ValueError(f"{num * len(prompts):,} images: expected at most {MAX_IMAGES:,} in one run")
    return Request(
        method=method,
        config=config,
        subjects=subjects,
        images=tuple((prompt, s) for prompt in prompts for s in range(seed, seed + num)),
        only=None,
        negative=plain_text(args.negative or ""),
        sample=sample,
        dtype=args.dtype,
    )


def request_of_record(record: Record, args: argparse.Namespace, bundle: Bundle) -> Request:
    """The request that draws a recorded image again.

    Args:
        record: the image's settings.
        args: the command line, which may say where files are.
        bundle: the weights.

    Raises:
        ValueError: if a file or the weights are not the recorded ones.
    """
    if weight_hashes(bundle, record.method_name, record.method) != dict(record.weight_hashes):
        raise ValueError(
            f"the weights in {bundle.folder} are not those of {args.replay}: give them with --weights"
        )
    subjects = _recorded_subjects(record, args)
    then = f"{record.device}, torch {record.versions.get('torch')}"
    now = f"{choose_device(args.device)}, torch {importlib.metadata.version('torch')}"
    if then != now:
        print(f"note: drawn on {then}, now on {now}: details may differ")
    return Request(
        method=record.method_name,
        config=record.method,
        subjects=subjects,
        images=record.batch,
        only=record.batch.index((record.prompt, record.seed)),
        negative=record.negative,
        sample=record.sample,
        dtype=record.dtype if args.dtype == "auto" else args.dtype,
    )


def _recorded_subjects(record: Record, args: argparse.Namespace) -> tuple[SubjectRequest, ...]:
    """The subjects of a recorded image, with their files where they are now."""
    count = len(record.subjects)
    refs, masks = (paired(name, getattr(args, name), count) for name in ("ref", "mask"))
    subjects = []
    for subject, ref, mask in zip(record.subjects, refs, masks, strict=True):
        if mask and not any(one.mask for one in subject.images):
            raise ValueError(f"--mask {mask}: {args.replay} was made without a mask file")
        images = tuple(
            ImageRequest(
                _recorded_file("ref", ref, one.file, args.replay),
                one.mask and _recorded_file("mask", mask, one.mask, args.replay),
                segmented=one.segmented,
                face=one.face,
            )
            for one in subject.images
        )
        subjects.append(SubjectRequest(subject.word, images, subject.strength, subject.region))
    return tuple(subjects)


def _recorded_file(option: str, given: Path | None, then: InputFile, replayed: Path) -> Path:
    """Where a recorded input file is now: where the user says, or else inside the current folder."""
    path = given / Path(then.path).name if given and given.is_dir() else given or follow(then.path)
    if path is None or not path.is_file():
        raise ValueError(f"{path or then.path}: no such file here; give where it is now with --{option}")
    if InputFile.of(path).sha256 != then.sha256:
        raise ValueError(f"{path}: not the file that {replayed} was made from; give it with --{option}")
    return path


def subject_of_file(path: Path) -> str:
    """The word that the name of a file or a folder is, such as cat.png's; ValueError if it is none, as those
    that cameras and browsers give."""
    name = path.resolve().name if path.is_dir() else path.stem
    word = plain_text(os.fsencode(name).decode("utf-8", "replace"))
    letters = word[:1].isalpha() and all(c.isalpha() or unicodedata.category(c)[0] == "M" for c in word)
    typed = word in (word.lower(), word.title(), word.upper()) and len(word) <= LONGEST_WORD
    coded = word.isascii() and (len(word) == 1 or not re.search("[aeiouy]", word.lower()))  # as DSCF, PXL
    if letters and typed and not coded and word.lower() not in NO_SUBJECTS:
        return word.lower()
    raise ValueError(f"what does {path} show? Give it with --subject, e.g. --subject cat")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without empty ones and comments, which begin with #."""
    try:
        text = read_text(path, PROMPT_BYTES)
    except ValueError as error:
        raise ValueError(f"--prompts {error}") from None
    lines = [plain_text(line).strip() for line in text.split("\n")]
    if found := [line for line in lines if line and not line.startswith("#")]:
        return found
    raise ValueError(f"--prompts {path}: is empty, expected one prompt per line")


def weight_hashes(bundle: Bundle, method: str, config: Any) -> dict[str, str]:
    """sha256 of the files that a method draws with.

    Args:
        bundle: the weights.
        method: a name of the registry.
        config: of the method.
    """
    names = find_method(method).method.needed(bundle, config)
    return bundle.hashes_of(*(name for name in names if name in bundle.networks))


def records_of(
    request: Request, found: Sequence[FoundImage], pipe: Pipeline | Runtime, bundle: Bundle
) -> list[Record]:
    """The settings of each of the request's images.

    Args:
        request: what is drawn.
        found: every image of its subjects.
        pipe: what draws it, or will.
        bundle: the pipeline's weights.
    """
    size = request.sample.batch_size
    batches = [request.images[i : i + size] for i in range(0, len(request.images), size)]
    rest = iter(one.record for one in found)
    first = Record(
        subjects=tuple(
            SubjectRecord(one.word, tuple(next(rest) for _ in one.images), one.strength, one.region)
            for one in request.subjects
        ),
        prompt=request.images[0][0],
        negative=request.negative,
        seed=request.images[0][1],
        batch=batches[0],
        sample=request.sample,
        method_name=request.method,
        method=request.config,
        weights=short_path(bundle.folder),
        weight_hashes=weight_hashes(bundle, request.method, request.config),
        dtype=dtype_name(pipe.dtype),
        device=str(pipe.device),
        versions={package: importlib.metadata.version(package) for package in ("torch", "pillow")},
    )
    return [replace(first, prompt=p, seed=seed, batch=batch) for batch in batches for p, seed in batch]
