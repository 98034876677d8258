"""The options of sample.py, and what they ask for.

A `Request` is everything that decides the images; it comes from the options, or from the record of a
image that is to be drawn again. Either way mistakes are ValueErrors of one line, before anything is loaded.
"""

import argparse
import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from moma.app.files import Parser
from moma.app.record import InputFile, Record, Segmented
from moma.inputs.segment import Box, Pick, Point
from moma.methods.moma.config import PRESETS, MethodConfig, method_config
from moma.sampling.config import TIMESTEPS, SampleConfig, parse_field
from moma.sampling.device import DTYPES, choose_device
from moma.sampling.diffusion import SOLVERS
from moma.sampling.memory import Toggle
from moma.weights.bundle import SAMPLING, Bundle

# Folders of weights where none is given: the first that exists.
WEIGHTS = [Path(__file__).parents[2] / "weights" / name for name in ("moma", "mini")]
# Of the prompts when none is given; MoMA-mini knows them too.
SCENES = ("on the beach", "in the snow", "in the forest", "at sunset")
NO_SUBJECTS = {"image", "img", "input", "mask", "photo", "picture", "ref", "reference", "subject"}
MAX_SEED = 2**32 - 1  # what torch's CPU generator tells apart; higher seeds would repeat images
# Options whose values a replayed image brings along.
REPLAYED = (
    "point", "box", "object", "subject", "prompt", "prompts", "negative", "num", "seed", "size", "strength",
    "guidance", "guidance_interval", "steps", "solver", "preset", "set", "batch_size",
)  # fmt: skip
# Options that say the same thing in two ways, or need a subject that the other one only looks for.
CONTRADICTIONS = (
    ("mask", "point"), ("mask", "box"), ("mask", "object"), ("object", "point"), ("object", "box"),
    ("list_objects", "mask"), ("list_objects", "point"), ("list_objects", "box"), ("list_objects", "object"),
    ("list_objects", "replay"),
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What decides the images."""

    reference: Path
    mask: Path | None
    pick: Pick | None  # what SAM is asked where there is no other mask, None = it is not asked
    segmented: Segmented | None  # what it answered when an image was drawn that is replayed
    subject: str
    images: tuple[tuple[str, int], ...]  # prompt and seed of each
    # The one to keep, None = all. A replay draws its whole batch again, so that every bit is the same.
    only: int | None
    negative: str
    subject_seed: int
    sample: SampleConfig
    method: MethodConfig
    dtype: str


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    base = SampleConfig()
    parser = Parser(
        description="New images of the subject of one image, with MoMA.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Each image's PNG holds its settings; --replay makes it again from them.",
    )
    # Defaults that a replayed image must not mix with are None here and filled in by `request_of_args`.
    add = parser.add_argument_group("the subject").add_argument
    add("--ref", type=Path, metavar="FILE", help="image of the subject")
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="where the subject is, white on black (default: the image's transparency, else what SAM finds"
        " if the weights have it, else what stands out from a plain background)",
    )
    add(
        "--point",
        action="append",
        type=parse_point,
        metavar="X,Y",
        help="pixel of the image that is on the subject, for SAM; may be repeated",
    )
    add("--box", type=parse_box, metavar="X0,Y0,X1,Y1", help="pixels around the subject, for SAM")
    add(
        "--list-objects",
        action="store_true",
        help="draw the image's objects with numbers, for --object, and stop",
    )
    add("--object", type=int, metavar="N", help="which of them is the subject, for SAM (default: 1)")
    add("--subject", metavar="WORD", help="what it is, e.g. cat (default: the image's file name)")
    add = parser.add_argument_group("the images").add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"the new scene, naming the subject; may be repeated (default: {len(SCENES)} scenes)",
    )
    add("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    add("--negative", metavar="TEXT", help="what the images should not show (default: nothing)")
    add("--num", type=int, metavar="N", help="images per prompt (default: 1)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of the first image of a prompt, the next one counts up (default: 0)",
    )
    add(
        "--size",
        type=parse_size,
        metavar="S|WxH",
        help="pixels, e.g. 512 or 768x512 (default: the weights' own)",
    )
    add(
        "--strength",
        type=float,
        metavar="BETA",
        help=f"of the subject: about 1 for a new scene, 0.4 for a new texture (default: {base.strength})",
    )
    add("--guidance", type=float, metavar="G", help=f"weight of the prompt (default: {base.guidance})")
    add(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"timesteps, of {TIMESTEPS}, at which guidance acts; others take half the time, but the image"
        " changes: docs/approximations.md (default: all)",
    )
    add("--steps", type=int, metavar="N", help=f"denoising steps (default: {base.steps})")
    add("--solver", choices=tuple(SOLVERS), help=f"dpm needs about half the steps (default: {base.solver})")
    add(
        "--preset",
        choices=tuple(PRESETS),
        help="points where paper and released code differ: moma/methods/moma/config.py (default: default)",
    )
    add(
        "--set",
        action="append",
        type=parse_field,
        metavar="FIELD=VALUE",
        help="one such point by itself, e.g. m_gen_threshold=0.3; may be repeated",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images drawn at once; costs memory (default: {base.batch_size}, preset release: 1)",
    )
    add("--replay", type=Path, metavar="PNG", help="make an image again from the settings inside it")
    add = parser.add_argument_group("the machine").add_argument
    add(
        "--weights",
        type=Path,
        metavar="DIR",
        help="bundle folder (default: weights/moma, weights/mini)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default: auto)")
    add(
        "--stream",
        default="auto",
        choices=get_args(Toggle),
        help="read the language model block by block instead of loading it: on, off, or auto, when memory is"
        " short (default: auto)",
    )
    add(
        "--cuda-graph",
        default="auto",
        choices=get_args(Toggle),
        help="start the work of a step on a CUDA device at once: on, off, or auto, wherever it can be"
        " (default: auto)",
    )
    add(
        "--tiles",
        default="auto",
        choices=get_args(Toggle),
        help="decode images in tiles, which may change their tone a little: on, off, or auto, when memory"
        " is short (default: auto)",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR|off",
        help="where the language model's answers are kept for the next time (default: moma/embeddings in the"
        " user's cache folder)",
    )
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: out)")
    add("--debug", action="store_true", help="add each image's last mask M_gen to the contact sheet")
    args = parser.parse_args(argv)
    for first, second in CONTRADICTIONS:
        if _given(args, first) and _given(args, second):
            raise ValueError(f"{_option(first)} contradicts {_option(second)}: give one of them")
    if args.replay:
        given = [name for name in REPLAYED if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{_option(given[0])} contradicts --replay, which takes it from the image")
    elif args.ref is None:
        raise ValueError("which subject? Give its image with --ref FILE")
    return args


def _given(args: argparse.Namespace, name: str) -> bool:
    """Whether an option was used; 0 is a value."""
    value = getattr(args, name)
    return value is not None and value is not False


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_point(text: str) -> Point:
    """'30,40' -> (30, 40)"""
    return _parse_numbers(text, 2, "x and y in pixels such as 30,40")


def parse_box(text: str) -> Box:
    """'10,20,200,220' -> (10, 20, 200, 220)"""
    return _parse_numbers(text, 4, "left, top, right, bottom in pixels such as 10,20,200,220")


def _parse_numbers(text: str, count: int, expected: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+" + r",\d+" * (count - 1), text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return tuple(map(int, text.split(",")))


def parse_size(text: str) -> tuple[int, int]:
    """'512' or '768x512' -> (width, height)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}, expected pixels such as 512 or 768x512")
    return int(match[1]), int(match[2] or match[1])


def request_of_args(args: argparse.Namespace, bundle: Bundle) -> Request:
    subject = args.subject if args.subject is not None else subject_of_file(args.ref)
    prompts = [*(args.prompt or []), *(read_prompts(args.prompts) if args.prompts else [])]
    method = method_config(args.preset or "default", **{**bundle.method, **dict(args.set or [])})
    width, height = args.size or (None, None)
    names = ("steps", "solver", "guidance", "guidance_interval", "strength", "batch_size")
    given = {name: getattr(args, name) for name in names}
    sample = replace(
        SampleConfig(width=width, height=height),
        # Images of a batch change each other under the release's normalisation of M_gen.
        **({"batch_size": 1} if method.m_gen_norm == "batch" else {}),
        **{name: value for name, value in given.items() if value is not None},
    ).sized(bundle.image_size)
    seed, num = args.seed or 0, 1 if args.num is None else args.num
    if num < 1:
        raise ValueError(f"--num {num}: expected 1 image or more")
    if not 0 <= seed <= MAX_SEED - num:
        raise ValueError(f"--seed {seed}: expected 0 to {MAX_SEED - num}")
    article = "an" if subject[:1].lower() in "aeiou" else "a"
    prompts = dict.fromkeys(prompts) or [f"{article} {subject} {scene}" for scene in SCENES]
    return Request(
        reference=args.ref,
        mask=args.mask,
        pick=Pick(tuple(args.point or ()), args.box, args.object),
        segmented=None,
        subject=" ".join(subject.split()),
        images=tuple((prompt, s) for prompt in prompts for s in range(seed, seed + num)),
        only=None,
        negative=args.negative or "",
        subject_seed=0,  # the subject is the same whatever is drawn of it
        sample=sample,
        method=method,
        dtype=args.dtype,
    )


def request_of_record(record: Record, args: argparse.Namespace, bundle: Bundle) -> Request:
    """The request that makes a recorded image again; ValueError if a file is another one than then."""
    if weight_hashes(bundle) != dict(record.weight_hashes):
        raise ValueError(
            f"the weights in {bundle.folder} are not those of {args.replay}: give them with --weights"
        )
    mask = args.mask or (Path(record.mask.path) if record.mask else None)
    if args.mask and not record.mask:
        raise ValueError(f"--mask {args.mask}: {args.replay} was made without a mask file")
    files = (("ref", args.ref or Path(record.reference.path), record.reference), ("mask", mask, record.mask))
    for option, path, then in files:
        if then is None:
            continue
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give where it is now with --{option}")
        if InputFile.of(path).sha256 != then.sha256:
            raise ValueError(
                f"{path}: not the file that {args.replay} was made from; give it with --{option}"
            )
    then = f"{record.device}, torch {record.versions.get('torch')}"
    now = f"{choose_device(args.device)}, torch {importlib.metadata.version('torch')}"
    if then != now:
        print(f"note: drawn on {then}, now on {now}: details may differ")
    return Request(
        reference=files[0][1],
        mask=mask,
        pick=None,
        segmented=record.segmented,
        subject=record.subject,
        images=record.batch,
        only=record.batch.index((record.prompt, record.seed)),
        negative=record.negative,
        subject_seed=record.subject_seed,
        sample=record.sample,
        method=record.method,
        dtype=record.dtype if args.dtype == "auto" else args.dtype,
    )


def subject_of_file(path: Path) -> str:
    if re.fullmatch(r"[^\W\d_]+", path.stem) and path.stem.lower() not in NO_SUBJECTS:
        return path.stem.lower()
    raise ValueError(f"what does {path} show? Give it with --subject, e.g. --subject cat")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without empty ones."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: not a readable UTF-8 text file ({error})") from None
    if not any(lines):
        raise ValueError(f"--prompts {path}: is empty, expected one prompt per line")
    return [line for line in lines if line]


def weight_hashes(bundle: Bundle) -> dict[str, str]:
    """sha256, as recorded at conversion, of the files of the networks that draw."""
    return {path.name: bundle.hashes[path.name] for name in SAMPLING for path in bundle.files(name)}
