"""The paper's figures and ablations on any bundle: `python -m moma.evaluate.figures masking --ref cat.png`.

One command each: masking (Table 3, Fig. 9), beta (Table 4, Fig. 8), context and texture (Figs. 4, 5),
community (Fig. 10), methods (Table 1). Without --ref the repository's examples are drawn, without --prompt
scenes and materials that MoMA-mini knows, too. All images start from the same noise.

Letters: N images of one photo, E embedding.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

from PIL import Image

from moma.app.files import Parser, check_writable, exit_status, markdown_table, write_text
from moma.app.options import MAX_SEED, SCENES, WEIGHTS, parse_size, subject_of_file
from moma.app.record import save_png
from moma.app.sheets import Cell, SheetConfig, contact_sheet, mask_image
from moma.evaluate.methods import BASELINE, METHODS, Blended, Loader, Method, Steered, check_baseline
from moma.evaluate.protocol import Kind, ProtocolConfig
from moma.evaluate.scorers import ImageScorer, load_scorers, measure
from moma.evaluate.scores import Score, averages
from moma.inputs.preprocess import find_mask, make_reference, on_white, open_image
from moma.inputs.segment import segment_by
from moma.methods.moma.config import MethodConfig, method_config
from moma.methods.prompts import check_prompt
from moma.sampling.config import SampleConfig
from moma.sampling.device import DTYPES, choose_device, choose_dtype, set_precision
from moma.sampling.diffusion import SOLVERS, ScheduleConfig, solver_steps
from moma.sampling.pipeline import Job, Result, check_method
from moma.weights.bundle import SCORERS, Bundle

EXAMPLES = [
    Path(__file__).parents[2] / "examples" / f"{word}.png" for word in ("cat", "dog", "car", "teapot")
]
SUBJECT = "{subject}"  # stands in a prompt for the subject's word
MATERIALS = ("wooden", "golden", "stone", "icy")
IN_SCENES = tuple(f"a {SUBJECT} {scene}" for scene in SCENES)
OF_MATERIALS = tuple(
    f"{'an' if what[0] in 'aeiou' else 'a'} {what} {SUBJECT} {SCENES[0]}" for what in MATERIALS
)

CONTEXT, TEXTURE = (ProtocolConfig().strength(kind) for kind in get_args(Kind))  # β of a scene, of a texture
NAMES = {"moma": "MoMA", "ip-adapter": "IP-Adapter", "text": "text only"}  # of methods, for people


@dataclass(frozen=True)
class FigureConfig:
    """What is compared, and how it looks."""

    # How much of M_gen is kept, the rest being 1 (Table 3).
    masks: tuple[tuple[str, float], ...] = (("full mask", 1.0), ("half mask", 0.5), ("no mask", 0.0))
    strengths: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # β of Fig. 8
    cell: int = 256  # pixels of an image on the sheet, at most
    blow_up: int = 2  # images smaller than half a cell, such as MoMA-mini's, grow by this
    letter: int = 6  # pixels, the mean width of the captions' letters
    sheet: SheetConfig = field(default_factory=lambda: SheetConfig(gap=6, caption=30, font=11))


# --- what is drawn -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Photo:
    """An image of a subject."""

    image: Image.Image
    mask: Image.Image | None  # None until SAM has been asked (`with_masks`)
    word: str
    name: str  # of its file


class Wanted(NamedTuple):
    """What every column has an image of."""

    photo: Photo
    prompt: str


@dataclass(frozen=True)
class Request:
    """What a figure is made of."""

    bundles: tuple[Path, ...]
    wanted: tuple[Wanted, ...]
    seed: int  # of the start noise, the same for all images
    sample: SampleConfig
    device: str
    dtype: str
    cfg: FigureConfig = FigureConfig()


class Column(NamedTuple):
    """An image of each `Wanted`."""

    name: str
    images: list[Image.Image]
    scored: bool = True  # False: for people only, such as masks


Loaders = Sequence[tuple[str, Loader, Path]]  # name of a column, how it is drawn, and of which bundle


def load(loader: Loader, folder: Path, request: Request) -> Method:
    return loader(folder, request.device, request.dtype)


def make_jobs(method: Method, request: Request) -> list[Job]:
    """An image of each `Wanted`; a photo is encoded once, and the MLLM reads all prompts together."""
    photos = dict.fromkeys(photo for photo, _ in request.wanted)
    subjects = {photo: method.subject(photo.image, photo.mask, photo.word) for photo in photos}
    method.read([(subjects[photo], prompt) for photo, prompt in request.wanted])
    return [method.job(subjects[photo], prompt, request.seed) for photo, prompt in request.wanted]


def draw(name: str, method: Method, jobs: Sequence[Job], request: Request) -> list[Result]:
    print(f"{name}: {len(jobs)} images", file=sys.stderr)
    return list(method.pipe.run(jobs, request.sample))


# --- the figures -------------------------------------------------------------------------------------


def masking(request: Request) -> Iterator[Column]:
    """M_gen in full, by half, and not at all; and how it was in the end."""
    method = load(METHODS["moma"], request.bundles[0], request)
    jobs, first = make_jobs(method, request), None
    for name, keep in request.cfg.masks:
        change = Steered.change if keep == 1 else partial(Blended, keep=keep)
        results = draw(name, replace(method, pipe=method.pipe.changed(change)), jobs, request)
        first = first or results
        yield Column(name, [result.image for result in results])
    masks = [mask_image(result.m_gen, result.image.size) for result in first]
    yield Column(f"M_gen, {request.cfg.masks[0][0]}", masks, scored=False)


def beta(request: Request, strengths: Sequence[float]) -> Iterator[Column]:
    """The same at rising strengths."""
    method = load(METHODS["moma"], request.bundles[0], request)
    jobs = make_jobs(method, request)
    for strength in strengths:
        name = f"β = {strength:g}"
        results = draw(name, method, [replace(job, strength=strength) for job in jobs], request)
        yield Column(name, [result.image for result in results])


def methods(request: Request, loaders: Loaders) -> Iterator[Column]:
    """The same in several ways, of which one is in memory at a time."""
    for name, loader, folder in loaders:
        method = load(loader, folder, request)
        results = draw(name, method, make_jobs(method, request), request)
        yield Column(name, [result.image for result in results])
        del method


# --- the sheet and the table -------------------------------------------------------------------------


def sheet(request: Request, columns: Sequence[Column], by_photo: bool, method: MethodConfig) -> Image.Image:
    """Photos and their images. by_photo: a row holds all that one column has of a photo, else the images
    of one `Wanted` in all columns.
    """
    cfg, sides = request.cfg, (request.sample.width, request.sample.height)
    side = min(cfg.cell, cfg.blow_up * max(sides))

    def cell(image: Image.Image, text: str) -> Cell:
        scale = max(1, side // max(image.size))
        large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        return Cell(large, wrapped(text, side, cfg))

    def shown(photo: Photo, text: str) -> Cell:
        return cell(make_reference(photo.image, photo.mask, side, method).photo, text)

    if by_photo:
        rows = []
        for photo in dict.fromkeys(photo for photo, _ in request.wanted):
            mine = [i for i, what in enumerate(request.wanted) if what.photo is photo]
            for column in columns:
                drawn = [cell(column.images[i], request.wanted[i].prompt) for i in mine]
                rows.append([shown(photo, photo.word), *drawn])
    else:
        rows = [
            [shown(photo, prompt), *(cell(column.images[i], column.name) for column in columns)]
            for i, (photo, prompt) in enumerate(request.wanted)
        ]
    return contact_sheet(rows, replace(cfg.sheet, cell=side))


def wrapped(text: str, side: int, cfg: FigureConfig) -> tuple[str, ...]:
    """A caption below an image of that width; PIL's font lacks the Greek letter."""
    first, *rest = textwrap.wrap(text.replace("β", "beta"), side // cfg.letter)
    return (first, " ".join(rest)) if rest else (first,)


def score(request: Request, columns: Sequence[Column], scorers: Sequence[ImageScorer]) -> list[Score]:
    """What the scorers say of each image; the only real image of a subject is its photo."""
    rows = [
        (column, photo, [i for i, what in enumerate(request.wanted) if what.photo is photo])
        for column in columns
        if column.scored
        for photo in dict.fromkeys(photo for photo, _ in request.wanted)
    ]
    found = []
    for column, photo, mine in rows:
        images, prompts = [column.images[i] for i in mine], [request.wanted[i].prompt for i in mine]
        values: list[dict[str, float]] = [{} for _ in mine]
        for scorer in scorers:
            real = scorer.embed_images([on_white(photo.image)])  # (1, E)
            judged = measure(scorer, scorer.embed_images(images), real, prompts)  # of (N, E)
            values = [known | new for known, new in zip(values, judged, strict=True)]
        found += [
            Score(column.name, photo.name, photo.word, "", prompt, 0, "", value)
            for prompt, value in zip(prompts, values, strict=True)
        ]
    return found


def table(scores: Sequence[Score], request: Request) -> str:
    """Markdown: a row for each column of the figure."""
    found, sample = averages(scores, "method"), request.sample
    heads = list(next(iter(found.values())).values)
    rows = [[name, *(f"{mean.values[head]:.3f}" for head in heads)] for (name,), mean in found.items()]
    count = next(iter(found.values())).count
    note = (
        f"Means over {count} images; the photo itself is the one real image that they are compared with. "
        f"{sample.steps} steps, guidance {sample.guidance:g}, seed {request.seed}."
    )
    return f"{markdown_table(['', *heads], rows)}\n{note}\n"


# --- the command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One figure of the command."""

    about: str
    prompts: tuple[str, ...]
    strength: float
    by_photo: bool = False  # see `sheet`


FIGURES = {
    "masking": Figure("M_gen in full, by half, not at all (Table 3, Fig. 9)", IN_SCENES, CONTEXT),
    "beta": Figure("strengths of the subject (Table 4, Fig. 8)", IN_SCENES[:2] + OF_MATERIALS[:2], CONTEXT),
    "context": Figure("subjects in new scenes (Fig. 4)", IN_SCENES, CONTEXT, by_photo=True),
    "texture": Figure("subjects of new textures (Fig. 5)", OF_MATERIALS, TEXTURE, by_photo=True),
    "community": Figure("several base models, a bundle for each (Fig. 10)", IN_SCENES, CONTEXT),
    "methods": Figure("MoMA beside other methods (Table 1)", IN_SCENES, CONTEXT),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m moma.evaluate.figures", description=__doc__.split("\n\n")[1])
    figures = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    for name, figure in FIGURES.items():
        own = figures.add_parser(name, help=figure.about, description=figure.about)
        add_options(own, name)
        add = own.add_argument
        if name == "beta":
            add("--strengths", type=float, nargs="+", default=FigureConfig().strengths, metavar="BETA")
        else:
            text = f"of the subject, β of Eq. 3 (default: {figure.strength})"
            add("--strength", type=float, default=figure.strength, metavar="BETA", help=text)
        if name == "methods":
            text = "may be repeated (default: all that the bundle has weights for)"
            add("--method", action="append", choices=tuple(METHODS), help=text)
            text = (
                "bundle whose adapter is an IP-Adapter that train.py has made, such as MoMA-mini's baseline"
            )
            add("--baseline", type=Path, metavar="DIR", help=text)
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Those that all figures have."""
    base = SampleConfig()
    many = "one for each base model" if name == "community" else "default: weights/moma, weights/mini"
    files = {
        "--bundle": ("DIR", f"weights; {many}"),
        "--ref": ("FILE", "image of a subject; may be repeated (default: the repository's examples)"),
        "--mask": ("FILE", "its mask, for each --ref in turn (default: found as sample.py finds it)"),
    }
    for option, (metavar, text) in files.items():
        parser.add_argument(option, type=Path, action="append", metavar=metavar, help=text)
    add = parser.add_argument
    text = "its word, for each --ref in turn (default: the files' names)"
    add("--subject", action="append", metavar="WORD", help=text)
    text = f"for each subject, whose word stands in the place of {SUBJECT}; may be repeated"
    add("--prompt", action="append", metavar="TEXT", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of the start noise of all images (default: 0)")
    add("--steps", type=int, default=base.steps, metavar="N", help=f"denoising steps (default: {base.steps})")
    add("--solver", choices=tuple(SOLVERS), default=base.solver, help=f"default: {base.solver}")
    add("--size", type=parse_size, metavar="S|WxH", help="pixels (default: the weights' own)")
    text = f"images drawn at once (default: {base.batch_size})"
    add("--batch-size", type=int, default=base.batch_size, metavar="N", help=text)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default: auto)")
    text = "bundle with DINO or CLIP to score with; a table goes beside the sheet"
    add("--scorers", type=Path, metavar="DIR", help=text)
    out = Path("out", "figures", f"{name}.png")
    add("--out", type=Path, default=out, metavar="FILE.png", help=f"default: {out}")


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake, before any weight is loaded."""
    set_precision()
    args = parse(argv)
    figure = FIGURES[args.what]
    request = request_of(args, figure)
    loaders = loaders_of(args, request)
    method = check(args, request, loaders)
    request = with_masks(request)
    ways: dict[str, Callable[[], Iterator[Column]]] = {
        "masking": lambda: masking(request),
        "beta": lambda: beta(request, args.strengths),
    }
    columns = list(ways.get(args.what, lambda: methods(request, loaders))())
    save_png(args.out, sheet(request, columns, figure.by_photo, method))
    print(args.out)
    if args.scorers:
        scorers = load_scorers(Bundle.open(args.scorers), choose_device(args.device))
        text = table(score(request, columns, scorers), request)
        write_text(args.out.with_suffix(".md"), text)
        print(text)


def request_of(args: argparse.Namespace, figure: Figure) -> Request:
    bundles = args.bundle or [place for place in WEIGHTS if place.is_dir()][:1]
    if args.what == "community" and len(bundles) < 2:
        raise ValueError("which base models? Give a --bundle for each, two or more")
    if args.what != "community" and len(bundles) != 1:
        raise ValueError(f"--bundle: {len(bundles)} folders, expected one")
    if not 0 <= args.seed <= MAX_SEED:
        raise ValueError(f"--seed {args.seed}: expected 0 to {MAX_SEED}")
    bundle = Bundle.open(bundles[0])
    photos, prompts = open_photos(args, bundle), args.prompt or figure.prompts
    if args.ref or args.prompt or figure.by_photo:
        wanted = [Wanted(photo, fill(prompt, photo.word)) for photo, prompt in product(photos, prompts)]
    else:  # the examples, each in a scene of its own
        wanted = [Wanted(p, fill(prompt, p.word)) for p, prompt in zip(photos, prompts, strict=True)]
    width, height = args.size or (None, None)
    sample = SampleConfig(
        steps=args.steps,
        solver=args.solver,
        strength=getattr(args, "strength", figure.strength),
        width=width,
        height=height,
        batch_size=args.batch_size,
    ).sized(bundle.image_size)
    return Request(tuple(bundles), tuple(wanted), args.seed, sample, args.device, args.dtype)


def open_photos(args: argparse.Namespace, bundle: Bundle) -> list[Photo]:
    files = args.ref or EXAMPLES
    given: dict[str, list] = {}
    for option in ("mask", "subject"):
        given[option] = getattr(args, option) or [None] * len(files)
        if len(given[option]) != len(files):
            expected = f"expected {len(files)}, one for each image"
            raise ValueError(f"--{option}: {len(given[option])} given, {expected}")
    photos, later = [], (lambda _: None) if "sam" in bundle.networks else None
    for path, mask, word in zip(files, given["mask"], given["subject"], strict=True):
        image = open_image(path)
        word = subject_of_file(path) if word is None else " ".join(word.split())
        photos.append(Photo(image, find_mask(image, mask, segment=later).mask, word, path.stem))
    return photos


def with_masks(request: Request) -> Request:
    """The request with SAM's masks where photos have none; its memory is free again when this returns."""
    photos = list(dict.fromkeys(photo for photo, _ in request.wanted))
    if all(photo.mask for photo in photos):
        return request
    segment = segment_by(request.bundles[0], request.device)
    found = {p: p if p.mask else replace(p, mask=find_mask(p.image, segment=segment).mask) for p in photos}
    return replace(request, wanted=tuple(Wanted(found[p], prompt) for p, prompt in request.wanted))


def fill(prompt: str, word: str) -> str:
    """The prompt for a subject: "a {subject}" becomes "an ..." where it must."""
    article = "an" if word[:1].lower() in "aeiou" else "a"
    return re.sub(rf"\ba {re.escape(SUBJECT)}", f"{article} {SUBJECT}", prompt).replace(SUBJECT, word)


def loaders_of(args: argparse.Namespace, request: Request) -> Loaders:
    """What is drawn; for masking and beta, what is loaded."""
    folders = request.bundles
    if args.what == "community":
        names = [folder.resolve().name for folder in folders]
        names = names if len(set(names)) == len(names) else map(str, folders)
        adapters = [Bundle.open(folder).networks.get("adapter", {}).get("sha256") for folder in folders]
        for folder, adapter in zip(folders, adapters, strict=True):
            if adapter != adapters[0]:
                print(f"note: {folder} has another adapter file than {folders[0]}")
        return [(name, METHODS["moma"], folder) for name, folder in zip(names, folders, strict=True)]
    if args.what != "methods":
        return [(NAMES["moma"], METHODS["moma"], folders[0])]
    if args.baseline:
        if "ip-adapter" not in (args.method or METHODS):
            raise ValueError("--baseline draws nothing without --method ip-adapter")
        check_baseline("--baseline", args.baseline, (*folders, *WEIGHTS))
    bundle = Bundle.open(folders[0])
    found: dict[str, tuple[Loader, Path]] = {}
    for name in args.method or reversed(METHODS):
        if name == "ip-adapter" and args.baseline:
            found[name] = BASELINE, args.baseline
        elif args.method or not (missing := METHODS[name].missing(bundle)):
            found[name] = METHODS[name], bundle.folder
        else:
            print(f"note: {name} is left out: {bundle.folder} has no {missing[0]}")
    return [(NAMES.get(name, name), *way) for name, way in found.items()]


def check(args: argparse.Namespace, request: Request, loaders: Loaders) -> MethodConfig:
    """ValueError for whatever would fail later; what the first bundle's weights need of the method."""
    for _, loader, folder in loaders:
        check_way(Bundle.open(folder), loader, args, request)
    solver_steps(ScheduleConfig(), request.sample.steps, request.sample.solver)
    choose_dtype(request.dtype, choose_device(request.device))
    if args.scorers and not set(SCORERS) & set(Bundle.open(args.scorers).networks):
        raise ValueError(f"--scorers {args.scorers}: has none of {', '.join(SCORERS)}; convert one into it")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: expected a name that ends in .png")
    check_writable("--out", args.out.parent)
    return method_config(**Bundle.open(request.bundles[0]).method)


def check_way(bundle: Bundle, loader: Loader, args: argparse.Namespace, request: Request) -> None:
    """ValueError for what a bundle cannot draw, or not with this method."""
    loader.check(bundle)
    method, tokenizer = method_config(**bundle.method), bundle.clip_tokenizer()
    if loader is METHODS["moma"]:
        check_method(method, bundle)
    for strength in (request.sample.strength, *getattr(args, "strengths", ())):
        replace(request.sample, strength=strength).check(bundle.config("vae").factor)
    for photo, prompt in request.wanted:
        if photo.mask:
            make_reference(photo.image, photo.mask, bundle.image_size, method)
        check_prompt(photo.word, prompt, method.absent_label, tokenizer)


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("figures", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
