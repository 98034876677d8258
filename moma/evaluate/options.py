"""The options of `python -m moma.evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moma.app.files import Parser
from moma.evaluate.methods import EVALUATED, check_baseline
from moma.evaluate.protocol import OWN, ProtocolConfig, References
from moma.evaluate.tables import REAL
from moma.sampling.config import SampleConfig
from moma.sampling.device import DTYPES
from moma.sampling.diffusion import SOLVERS

MINI = Path("weights/mini")
MASKS, WORLD = "masks", "world"  # folders in the output's, beside those of methods


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    dataset: Path | None  # or the world
    world: bool
    methods: Mapping[str, Path]  # name -> bundle
    images: Mapping[str, Path]  # name -> folder of images drawn by others
    scorers: Path
    masks: Path | None
    subjects: int | None
    prompts: tuple[int, ...] | None
    protocol: ProtocolConfig
    sample: SampleConfig
    device: str
    dtype: str


def parse(argv: Sequence[str] | None, description: str) -> Options:
    """ValueError for options that contradict each other or lack something."""
    args = _parser(description).parse_args(argv)
    if args.world == (args.dataset is not None):
        raise ValueError("expected either --dataset DIR or --world: what are the subjects?")
    if args.masks and args.world:
        raise ValueError("--masks contradicts --world, which has its own")
    bundle = args.bundle or (MINI if args.world else None)
    images: dict[str, Path] = {}
    for text in args.images:
        name, folder = _pair(text, "--images")
        _add(images, "--images", name, folder)
    methods: dict[str, Path] = {}
    for text in args.method or (["moma"] if bundle and not images else []):
        name, _, folder = text.partition("=")
        if name not in EVALUATED:
            raise ValueError(f"--method {text}: expected one of {', '.join(EVALUATED)}, maybe with =BUNDLE")
        if not folder and bundle is None:
            raise ValueError(f"--method {name} draws with which weights? Give --bundle DIR")
        _add(methods, "--method", name, Path(folder) if folder else bundle)
    if both := sorted(set(images) & {*EVALUATED, MASKS, WORLD, REAL}):
        raise ValueError(f"--images {both[0]}=...: is the name of something else, choose another")
    if args.world and "ip-adapter" in methods:
        moma = (MINI, methods.get("moma", bundle))
        check_baseline("--world --method ip-adapter=DIR", methods["ip-adapter"], moma)
    if args.scorers is None and bundle is None:
        raise ValueError("which networks score? Give --scorers DIR, a bundle with DINO or CLIP")
    return Options(
        out=args.out, dataset=args.dataset, world=args.world, methods=methods, images=images,
        scorers=args.scorers or bundle, masks=args.masks, subjects=args.subjects,
        prompts=args.prompts and tuple(args.prompts), device=args.device, dtype=args.dtype,
        protocol=ProtocolConfig(
            args.per_prompt, args.context_strength, args.texture_strength, args.reference, not args.no_added
        ),
        sample=SampleConfig(
            steps=args.steps, solver=args.solver, guidance=args.guidance, height=args.size, width=args.size,
            batch_size=args.batch_size,
        ),
    )  # fmt: skip


def _pair(text: str, option: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name.strip() and equals and folder):
        raise ValueError(f"{option} {text}: expected NAME=DIR")
    return name, Path(folder)


def _add(known: dict[str, Path], option: str, name: str, folder: Path) -> None:
    if name in known:
        raise ValueError(f"{option} {name}: given twice, {known[name]} and {folder}; expected it once")
    known[name] = folder


def _parser(description: str) -> Parser:
    base, protocol = SampleConfig(), ProtocolConfig()
    parser = Parser("python -m moma.evaluate", description=description)
    add = parser.add_argument_group("the subjects").add_argument
    add("--dataset", type=Path, metavar="DIR", help="google/dreambooth's `dataset`, or one of its form:"
        f" a folder of images for each subject; {OWN} in it names their classes")  # fmt: skip
    add("--world", action="store_true", help="MoMA-mini's world in the place of photos")
    add("--masks", type=Path, metavar="DIR", help="masks as DIR/SUBJECT/IMAGE.png (default: transparency,"
        " else the bundle's SAM, else what stands out from a plain background)")  # fmt: skip
    add("--reference", choices=get_args(References), default=protocol.reference, help="what methods are"
        " shown: a subject's first image, or number n for the n-th one drawn (default: first)")  # fmt: skip
    add("--subjects", type=int, metavar="N", help="the first N only")
    add(
        "--prompts", type=int, nargs="+", metavar="N", help="the first N contexts and N textures only, or N M"
    )
    add("--per-prompt", type=int, metavar="N", default=protocol.per_prompt, help="images (default: 4)")
    add("--no-added", action="store_true", help="DreamBooth's 25 prompts without ten more for textures")
    add = parser.add_argument_group("the methods").add_argument
    add("--bundle", type=Path, metavar="DIR", help=f"weights (with --world: {MINI})")
    add("--method", action="append", metavar="NAME[=BUNDLE]", help=f"{', '.join(EVALUATED)}; may be repeated"
        " (default: moma if there is a --bundle and no --images)")  # fmt: skip
    add("--images", action="append", default=[], metavar="NAME=DIR", help="score the images of another"
        " method: DIR/SUBJECT/PROMPT-N.png, PROMPT with - between words; may be repeated")  # fmt: skip
    add("--context-strength", type=float, default=protocol.context_strength, metavar="BETA")
    add("--texture-strength", type=float, default=protocol.texture_strength, metavar="BETA")
    add("--steps", type=int, default=base.steps, metavar="N", help=f"default {base.steps}")
    add("--solver", choices=tuple(SOLVERS), default=base.solver)
    add("--guidance", type=float, default=base.guidance, metavar="G", help=f"default {base.guidance}")
    add("--size", type=int, metavar="S", help="pixels a side (default: the weights' own)")
    add("--batch-size", type=int, default=base.batch_size, metavar="N", help=f"default {base.batch_size}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights that draw")
    add = parser.add_argument_group("the results").add_argument
    add("--scorers", type=Path, metavar="DIR", help="bundle with the networks that score (default: --bundle)")
    add("--out", type=Path, default=Path("out/evaluation"), metavar="DIR")
    return parser
