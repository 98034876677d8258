"""The options of `python -m moma.evaluate`."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moma.app.files import Parser
from moma.app.options import MINI, parse_size
from moma.evaluate.protocol import OWN, ProtocolConfig, References
from moma.evaluate.tables import REAL
from moma.methods import METHODS, find_method
from moma.sampling.config import SampleConfig
from moma.sampling.device import DTYPES
from moma.sampling.diffusion import SOLVERS

MASKS, WORLD = "masks", "world"  # folders in --out, beside those of methods


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    dataset: Path | None  # None: the drawn world
    methods: Mapping[str, Path]  # name -> bundle
    images: Mapping[str, Path]  # name -> folder of images drawn elsewhere
    scorers: Path
    faces: bool  # score the likeness of faces
    masks: Path | None
    pairs: bool  # two subjects per image
    subjects: int | None
    prompts: tuple[int, ...] | None
    protocol: ProtocolConfig
    sample: SampleConfig
    device: str
    dtype: str


def parse(argv: Sequence[str] | None, description: str) -> Options:
    """Read the command line; ValueError for options that contradict each other or are missing."""
    args = _parser(description).parse_args(argv)
    if args.world == (args.dataset is not None):
        raise ValueError("which subjects? Give either --dataset DIR or --world")
    if args.masks and args.world:
        raise ValueError("--masks contradicts --world, which has masks of its own")
    bundle = args.bundle or (MINI if args.world else None)
    images: dict[str, Path] = {}
    for text in args.images:
        name, equals, folder = text.partition("=")
        if not (name.strip() and equals and folder.strip()):
            raise ValueError(f"--images {text}: expected NAME=DIR")
        _add(images, "--images", name, Path(folder))
    methods = parse_methods(args.method or (["moma"] if bundle and not images else []), bundle)
    if both := sorted(set(images) & {*METHODS, MASKS, WORLD, REAL}):
        raise ValueError(f"--images {both[0]}=...: the name is taken, choose another")
    if args.scorers is None and bundle is None:
        raise ValueError("which networks score? Give --scorers DIR, a bundle with DINO or CLIP")
    return Options(
        out=args.out, dataset=args.dataset, methods=methods, images=images, scorers=args.scorers or bundle,
        faces=args.faces,
        masks=args.masks, pairs=args.pairs, subjects=args.subjects,
        prompts=args.prompts and tuple(args.prompts),
        device=args.device, dtype=args.dtype,
        protocol=ProtocolConfig(
            args.per_prompt, args.context_strength, args.texture_strength, args.reference, not args.no_added
        ),
        sample=sample_config(args),
    )  # fmt: skip


def parse_methods(texts: Sequence[str], bundle: Path | None) -> dict[str, Path]:
    """'NAME' or 'NAME=BUNDLE' each -> name -> bundle; ValueError for an unknown or repeated name.

    Args:
        texts: as given with --method.
        bundle: of methods without one.
    """
    methods: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        find_method(name)
        if equals and not folder.strip():
            raise ValueError(f"--method {text}: expected NAME or NAME=BUNDLE")
        if not folder and bundle is None:
            raise ValueError(f"--method {name} draws with which weights? Give --bundle DIR")
        _add(methods, "--method", name, Path(folder) if folder else bundle)
    return methods


def _add(known: dict[str, Path], option: str, name: str, folder: Path) -> None:
    if name in known:
        raise ValueError(f"{option} {name}: given twice, {known[name]} and {folder}; expected it once")
    known[name] = folder


def _parser(description: str) -> Parser:
    protocol = ProtocolConfig()
    parser = Parser("python -m moma.evaluate", description=description)
    add = parser.add_argument_group("the subjects").add_argument
    add("--dataset", type=Path, metavar="DIR", help="google/dreambooth's `dataset`, or a folder like it: a"
        f" folder of images per subject, with {OWN} naming their classes")  # fmt: skip
    add("--world", action="store_true", help="MoMA-mini's drawn world instead of photos")
    add("--masks", type=Path, metavar="DIR", help="masks as DIR/SUBJECT/IMAGE.png (default: the image's"
        " transparency, else SAM if a bundle has it, else a plain background)")  # fmt: skip
    add("--pairs", action="store_true", help="two subjects per image, of different classes: of DreamBooth's"
        " a fixed list of pairs, else all")  # fmt: skip
    add("--subjects", type=int, metavar="N", help="only the first N, or N pairs")
    add("--prompts", type=int, nargs="+", metavar="N", help="only the first N contexts and N textures, or N"
        " contexts and M textures")  # fmt: skip
    add("--per-prompt", type=int, metavar="N", default=protocol.per_prompt,
        help=f"images per prompt (default: {protocol.per_prompt})")  # fmt: skip
    add = parser.add_argument_group("the methods").add_argument
    add("--bundle", type=Path, metavar="DIR", help="weights (with --world: weights/mini)")
    add("--method", action="append", metavar="NAME[=BUNDLE]", help=f"{', '.join(METHODS)}; may be repeated"
        " (default: moma if there is a --bundle and no --images)")  # fmt: skip
    add("--images", action="append", default=[], metavar="NAME=DIR", help="score images drawn elsewhere:"
        " DIR/SUBJECT/PROMPT-N.png, PROMPT with - between words; may be repeated")  # fmt: skip
    add = parser.add_argument_group("the results").add_argument
    add("--scorers", type=Path, metavar="DIR", help="bundle with the networks that score (default: --bundle)")
    add("--faces", action="store_true", help="also score the likeness of faces, by insightface")
    add("--out", type=Path, default=Path("out/evaluation"), metavar="DIR", help="default: out/evaluation")
    advanced = parser.add_argument_group("advanced")
    add = advanced.add_argument
    add("--no-added", action="store_true", help="leave out the ten texture prompts that DreamBooth's 25 lack")
    add("--reference", choices=get_args(References), default=protocol.reference, help="photo shown to the"
        f" methods: a subject's first, or the n-th for a prompt's image n (default: {protocol.reference})"
        )  # fmt: skip
    for kind in ("context", "texture"):
        beta = getattr(protocol, f"{kind}_strength")
        add(f"--{kind}-strength", type=float, default=beta, metavar="BETA",
            help=f"subject strength β for {kind} prompts (default: {beta:g})")  # fmt: skip
    add_sampling(advanced)
    return parser


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """The options of how images are drawn, which all commands of this package share."""
    base, add = SampleConfig(), group.add_argument
    add("--steps", type=int, default=base.steps, metavar="N", help=f"denoising steps (default: {base.steps})")
    add("--solver", choices=tuple(SOLVERS), default=base.solver, help=f"ODE solver (default: {base.solver})")
    add("--guidance", type=float, default=base.guidance, metavar="G",
        help=f"classifier-free guidance scale (default: {base.guidance})")  # fmt: skip
    add("--size", type=parse_size, default=(None, None), metavar="S|WxH",
        help="size in pixels (default: the weights' own)")  # fmt: skip
    add("--batch-size", type=int, default=base.batch_size, metavar="N",
        help=f"images drawn together, which costs memory (default: {base.batch_size})")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights that draw (default: auto)")


def sample_config(args: argparse.Namespace) -> SampleConfig:
    """What the options of `add_sampling` say."""
    width, height = args.size
    return SampleConfig(
        steps=args.steps, solver=args.solver, guidance=args.guidance, height=height, width=width,
        batch_size=args.batch_size,
    )  # fmt: skip
