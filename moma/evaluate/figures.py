"""The paper's figures and ablations on any bundle: `python -m moma.evaluate.figures masking --ref cat.png`.

One command each: masking (Table 3, Fig. 9), beta (Table 4, Fig. 8), context and texture (Figs. 4, 5),
changes and community (Fig. 10), methods (Table 1). Without --ref it draws the repository's examples, without
--prompt scenes and materials that MoMA-mini knows too; of changes it knows none. All images start from the
same noise.

Letters: N images of one photo, E embedding.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

from PIL import Image

from moma.app.files import Parser, check_writable, counted, exit_status, markdown_table, write_text
from moma.app.options import SCENES, WEIGHTS, subject_of_file
from moma.app.record import save_png
from moma.app.sheets import Cell, SheetConfig, contact_sheet, mask_image
from moma.evaluate.draw import check_drawable, strength_for
from moma.evaluate.options import add_sampling, parse_methods, sample_config
from moma.evaluate.protocol import Kind, ProtocolConfig
from moma.evaluate.scorers import ImageScorer, check_scorers, embed, load_scorers, measure
from moma.evaluate.scores import Score, averages
from moma.inputs.preprocess import about, find_mask, make_reference, on_white, open_image
from moma.inputs.segment import segment_by
from moma.load import load_pipeline
from moma.methods import METHODS, find_method
from moma.methods.prompts import SUBJECT, fill, joined
from moma.sampling.config import SampleConfig, check_seed
from moma.sampling.device import set_precision
from moma.sampling.interface import Job, Result, Runtime
from moma.sampling.pipeline import Pipeline
from moma.weights.bundle import Bundle

EXAMPLES = [
    Path(__file__).parents[2] / "examples" / f"{word}.png" for word in ("cat", "dog", "car", "teapot")
]
MATERIALS = ("wooden", "golden", "stone", "icy")
IN_SCENES = tuple(f"a {SUBJECT} {scene}" for scene in SCENES)
OF_MATERIALS = tuple(
    f"{'an' if what[0] in 'aeiou' else 'a'} {what} {SUBJECT} {SCENES[0]}" for what in MATERIALS
)
# Fig. 10, upper row: accessories, poses, camera.
CHANGES = tuple(
    text.format(f"a {SUBJECT}")
    for text in (
        "{} wearing sunglasses", "{} wearing a red hat", "{} running", "{} lying on the floor",
        "a close-up of {}", "{} seen from above", "{} seen from behind",
    )
)  # fmt: skip
CONTEXT, TEXTURE = (ProtocolConfig().strength(kind) for kind in get_args(Kind))  # β of a scene, of a texture
MASKS = {"full mask": "moma", "half mask": "half-mask", "no mask": "no-mask"}  # column -> method (Table 3)


@dataclass(frozen=True)
class FigureConfig:
    """What is compared, and the layout."""

    strengths: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # β of Fig. 8
    cell: int = 256  # pixels of an image on the sheet, at most
    blow_up: int = 2  # factor for images smaller than half a cell, such as MoMA-mini's
    sheet: SheetConfig = field(default_factory=lambda: SheetConfig(gap=6, caption=30, font=11))


# --- what is drawn -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Photo:
    """An image of a subject."""

    image: Image.Image
    mask: Image.Image | None  # None until SAM has found it (`with_masks`)
    word: str
    name: str  # of its file


class Wanted(NamedTuple):
    """A row: every column has an image of it, with one subject or with several."""

    photos: tuple[Photo, ...]
    prompt: str

    @property
    def words(self) -> tuple[str, ...]:
        """Of the subjects."""
        return tuple(photo.word for photo in self.photos)


class Way(NamedTuple):
    """A column: a method with the weights of a bundle."""

    column: str
    method: str  # its name in the registry
    runtime: Runtime

    @property
    def config(self) -> Any:
        """The method's, as the bundle needs it."""
        return self.runtime.weights.method_config(self.method)

    def load(self) -> Pipeline:
        """The pipeline with its weights."""
        return load_pipeline(self.runtime, self.method, self.config)


@dataclass(frozen=True)
class Request:
    """What a figure is made of."""

    ways: tuple[Way, ...]
    wanted: tuple[Wanted, ...]
    seed: int  # of the start noise, the same for all images
    sample: SampleConfig
    cfg: FigureConfig = FigureConfig()

    @property
    def runtime(self) -> Runtime:
        """With the first bundle."""
        return self.ways[0].runtime

    @property
    def photos(self) -> list[Photo]:
        """Each once."""
        return list(dict.fromkeys(photo for wanted in self.wanted for photo in wanted.photos))

    def rows_of(self, photo: Photo) -> list[int]:
        """Positions in `wanted`."""
        return [i for i, wanted in enumerate(self.wanted) if photo in wanted.photos]


class Column(NamedTuple):
    """An image of each `Wanted`."""

    name: str
    images: list[Image.Image]
    scored: bool = True  # False: only to look at, such as masks


def _make_jobs(pipe: Pipeline, request: Request) -> list[Job]:
    """An image of each `Wanted`; each photo is encoded once, for all its prompts."""
    subjects = {
        photo: pipe.encode_subject(
            photo.image,
            photo.mask,
            photo.word,
            prompts=list(dict.fromkeys(request.wanted[i].prompt for i in request.rows_of(photo))),
        )
        for photo in request.photos
    }
    beta = strength_for(pipe.method, request.sample.strength)
    return [
        Job(tuple(subjects[photo] for photo in photos), prompt, request.seed, strength=beta)
        for photos, prompt in request.wanted
    ]


def _draw(column: str, pipe: Pipeline, jobs: Sequence[Job], request: Request) -> list[Result]:
    print(f"{column}: {counted(len(jobs), 'image')}", file=sys.stderr)
    return list(pipe.run(jobs, request.sample))


# --- the figures -------------------------------------------------------------------------------------


def masking(request: Request) -> Iterator[Column]:
    """M_gen acts fully, half, and not at all; then the last M_gen itself."""
    (way,) = request.ways
    pipe = way.load()
    jobs = _make_jobs(pipe, request)  # how much of M_gen acts does not change the subjects
    masks = None
    for column, name in MASKS.items():
        config = way.runtime.weights.method_config(name)
        results = _draw(column, pipe.with_config(config), jobs, request)
        yield Column(column, [result.image for result in results])
        if masks is None:
            images = [mask_image(result.m_gen, result.image.size) for result in results]
            masks = Column(f"M_gen, {column}", images, scored=False)
    yield masks


def beta(request: Request, strengths: Sequence[float]) -> Iterator[Column]:
    """The same images at each strength."""
    pipe = request.ways[0].load()
    jobs = _make_jobs(pipe, request)
    for strength in strengths:
        column = f"β = {strength:g}"
        results = _draw(column, pipe, [replace(job, strength=strength) for job in jobs], request)
        yield Column(column, [result.image for result in results])


def methods(request: Request) -> Iterator[Column]:
    """The same images in each way, with one of them in memory at a time."""
    for way in request.ways:
        pipe = way.load()
        results = _draw(way.column, pipe, _make_jobs(pipe, request), request)
        yield Column(way.column, [result.image for result in results])
        del pipe


# --- the sheet and the table -------------------------------------------------------------------------


def sheet(request: Request, columns: Sequence[Column], by_photo: bool) -> Image.Image:
    """The photos and their images.

    Args:
        request: what was drawn.
        columns: the images.
        by_photo: a row holds all images that one column has of a photo; else the images of one `Wanted` in
            all columns.
    """
    cfg, sample = request.cfg, request.sample
    side = min(cfg.cell, cfg.blow_up * max(sample.width, sample.height))
    reference = request.runtime.weights.method_config("moma")

    def cell(image: Image.Image, *lines: str) -> Cell:
        scale = max(1, side // max(image.size))
        return Cell(
            image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), lines
        )

    def shown(photo: Photo) -> Cell:
        square = make_reference(photo.image, photo.mask, side, reference).photo
        return cell(square, f"reference: {photo.word}")

    if by_photo:
        rows = []
        for photo, column in product(request.photos, columns):
            drawn = [cell(column.images[i], request.wanted[i].prompt) for i in request.rows_of(photo)]
            rows.append([shown(photo), *drawn])
    else:
        rows = [
            [*map(shown, photos), *(cell(column.images[i], column.name, prompt) for column in columns)]
            for i, (photos, prompt) in enumerate(request.wanted)
        ]
    return contact_sheet(rows, replace(cfg.sheet, cell=side))


def score(request: Request, columns: Sequence[Column], scorers: Sequence[ImageScorer]) -> list[Score]:
    """A score for each image and each of its subjects, column by column.

    Args:
        request: what was drawn; a photo is the only real image of its subject.
        columns: the images.
        scorers: of the images.
    """
    real = {photo: embed(scorers, [on_white(photo.image)]) for photo in request.photos}
    found = []
    for column in (column for column in columns if column.scored):
        for photo in request.photos:
            mine = request.rows_of(photo)
            prompts = [request.wanted[i].prompt for i in mine]
            seen = embed(scorers, [column.images[i] for i in mine])  # of each scorer (N, E)
            for prompt, values in zip(prompts, measure(scorers, seen, real[photo], prompts), strict=True):
                found.append(Score(column.name, photo.name, photo.word, "", prompt, 0, "", values))
    return found


def table(scores: Sequence[Score], request: Request) -> str:
    """Markdown: a row for each column of the figure."""
    found, sample = averages(scores, "method"), request.sample
    heads = list(next(iter(found.values())).values)
    rows = [[name, *(f"{mean.values[head]:.3f}" for head in heads)] for (name,), mean in found.items()]
    note = (
        f"Means over {counted(len(request.wanted), 'image')}; each is compared with one real image of each"
        " subject, the photo itself. "
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
    "masking": Figure("M_gen acts fully, half, not at all (Table 3, Fig. 9)", IN_SCENES, CONTEXT),
    "beta": Figure("strengths of the subject (Table 4, Fig. 8)", IN_SCENES[:2] + OF_MATERIALS[:2], CONTEXT),
    "context": Figure("subjects in new scenes (Fig. 4)", IN_SCENES, CONTEXT, by_photo=True),
    "texture": Figure("subjects with new textures (Fig. 5)", OF_MATERIALS, TEXTURE, by_photo=True),
    "changes": Figure("accessories, poses, camera (Fig. 10, above)", CHANGES, CONTEXT, by_photo=True),
    "community": Figure("several base models, a bundle for each (Fig. 10, below)", IN_SCENES, CONTEXT),
    "methods": Figure("MoMA beside other methods (Table 1)", IN_SCENES, CONTEXT),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("python -m moma.evaluate.figures", description=__doc__.split("\n\n")[1])
    figures = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    for name, figure in FIGURES.items():
        own = figures.add_parser(name, help=figure.about, description=figure.about)
        _add_options(own, name, figure)
    return parser.parse_args(argv)


def _add_options(parser: argparse.ArgumentParser, name: str, figure: Figure) -> None:
    add = parser.add_argument
    many = "one for each base model" if name == "community" else "default: weights/moma or weights/mini"
    files: dict[str, Any] = {"type": Path, "action": "append"}
    add("--ref", **files, metavar="FILE", help="image of a subject; may be repeated (default: the"
        " repository's examples)")  # fmt: skip
    add("--subject", action="append", metavar="WORD", help="what it is, for each --ref in turn (default: the"
        " files' names)")  # fmt: skip
    add("--mask", **files, metavar="FILE", help="its mask, for each --ref in turn (default: as sample.py"
        " finds it)")  # fmt: skip
    add("--together", action="store_true", help="all subjects in each image, instead of one")
    add("--prompt", action="append", metavar="TEXT", help=f"for each subject, with {SUBJECT} for its word;"
        " may be repeated (default: the figure's)")  # fmt: skip
    if name == "beta":
        strengths = FigureConfig().strengths
        add("--strengths", type=float, nargs="+", default=strengths, metavar="BETA",
            help=f"subject strengths β (default: {' '.join(map(str, strengths))})")  # fmt: skip
    else:
        add("--strength", type=float, default=figure.strength, metavar="BETA",
            help=f"subject strength β (default: {figure.strength})")  # fmt: skip
    add("--bundle", **files, metavar="DIR", help=f"weights; {many}")
    if name == "methods":
        add("--method", action="append", metavar="NAME[=BUNDLE]", help=f"{', '.join(METHODS)}; may be"
            " repeated (default: all that the bundle has weights for, without ablations)")  # fmt: skip
    add("--scorers", type=Path, metavar="DIR", help="bundle with DINO or CLIP: a table of scores goes beside"
        " the sheet")  # fmt: skip
    out = Path("out", "figures", f"{name}.png")
    add("--out", type=Path, default=out, metavar="FILE.png", help=f"default: {out}")
    advanced = parser.add_argument_group("advanced")
    text = "of the start noise of all images (default: 0)"
    advanced.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    add_sampling(advanced)


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake, before any weight is loaded."""
    set_precision()
    args = parse(argv)
    figure = FIGURES[args.what]
    request = request_of(args, Runtime.choose(None, args.device, args.dtype))
    scorers = check(args, request)
    request = with_masks(request)
    draw: dict[str, Callable[[], Iterator[Column]]] = {
        "masking": lambda: masking(request),
        "beta": lambda: beta(request, args.strengths),
    }
    columns = list(draw.get(args.what, lambda: methods(request))())
    save_png(args.out, sheet(request, columns, figure.by_photo and not args.together))
    print(args.out)
    if scorers:
        text = table(score(request, columns, load_scorers(scorers, request.runtime.device)), request)
        write_text(args.out.with_suffix(".md"), text)
        print(text)


def request_of(args: argparse.Namespace, runtime: Runtime) -> Request:
    """The request that the options make; runtime: the machine, without weights."""
    figure = FIGURES[args.what]
    folders = args.bundle or [folder for folder in WEIGHTS if folder.is_dir()][:1]
    if args.what == "community" and len(folders) < 2:
        raise ValueError("which base models? Give a --bundle for each, two or more")
    if args.what != "community" and len(folders) != 1:
        raise ValueError(f"--bundle: {len(folders)} folders, expected one")
    check_seed("--seed", args.seed)
    ways = _ways(args, [replace(runtime, weights=Bundle.open(folder)) for folder in folders])
    photos, prompts = _open_photos(args, ways), args.prompt or figure.prompts
    if args.together:
        pairs = [(tuple(photos), prompt) for prompt in prompts]
    elif args.ref or args.prompt or figure.by_photo:
        pairs = [((photo,), prompt) for photo, prompt in product(photos, prompts)]
    else:  # the examples, each in another scene
        pairs = [((photo,), prompt) for photo, prompt in zip(photos, prompts, strict=True)]
    wanted = tuple(Wanted(some, fill(prompt, joined([p.word for p in some]))) for some, prompt in pairs)
    strength = getattr(args, "strength", figure.strength)
    sample = replace(sample_config(args), strength=strength).sized(ways[0].runtime.weights.image_size)
    return Request(ways, wanted, args.seed, sample)


def _ways(args: argparse.Namespace, runtimes: Sequence[Runtime]) -> tuple[Way, ...]:
    """What is loaded: a column each, or for masking and beta the one that all columns share."""
    bundles = [runtime.weights for runtime in runtimes]
    if args.what == "community":
        adapters = [bundle.networks.get("adapter", {}).get("sha256") for bundle in bundles]
        for bundle, adapter in zip(bundles, adapters, strict=True):
            if adapter != adapters[0]:
                print(f"note: {bundle.folder} has another adapter file than {bundles[0].folder}")
        names = [bundle.folder.resolve().name for bundle in bundles]
        if len(set(names)) < len(names):
            names = [str(bundle.folder) for bundle in bundles]
        return tuple(Way(name, "moma", runtime) for name, runtime in zip(names, runtimes, strict=True))
    if args.what != "methods":
        return (Way(METHODS["moma"].title, "moma", runtimes[0]),)
    if args.method:
        chosen = parse_methods(args.method, bundles[0].folder)
        opened = {bundles[0].folder: runtimes[0]}
        for folder in chosen.values():
            opened.setdefault(folder, replace(runtimes[0], weights=Bundle.open(folder)))
        return tuple(Way(find_method(name).title, name, opened[folder]) for name, folder in chosen.items())
    found = []
    for name, entry in reversed(METHODS.items()):
        if entry.overrides:
            continue
        networks = entry.method.needed(bundles[0], bundles[0].method_config(name))
        missing = [network for network in networks if network not in bundles[0].networks]
        if missing:
            print(f"note: {name} is left out: {bundles[0].folder} has no {missing[0]}")
        else:
            found.append(Way(entry.title, name, runtimes[0]))
    return tuple(found)


def _open_photos(args: argparse.Namespace, ways: Sequence[Way]) -> list[Photo]:
    """The subjects; without a mask where SAM will find it."""
    files = args.ref or EXAMPLES
    given: dict[str, list] = {}
    for option in ("mask", "subject"):
        given[option] = getattr(args, option) or [None] * len(files)
        if len(given[option]) != len(files):
            expected = f"expected {len(files)}, one for each image"
            raise ValueError(f"--{option}: {len(given[option])} given, {expected}")
    bundle = ways[0].runtime.weights
    photos, later = [], (lambda _: None) if "sam" in bundle.networks else None
    for path, mask, word in zip(files, given["mask"], given["subject"], strict=True):
        image = open_image(path)
        word = subject_of_file(path) if word is None else " ".join(word.split())
        if bundle.familiar and not bundle.familiar.knows(image):
            print(f"note: {path} is not of the kind {bundle.folder} knows: no image will resemble it")
        with about(path):
            found = find_mask(image, mask, segment=later, plain_first=bundle.familiar is not None)
        if found.mask and (doubt := found.doubt()):
            print(f"note: {path}: {doubt}", file=sys.stderr)
        photos.append(Photo(image, found.mask, word, path.stem))
    return photos


def with_masks(request: Request) -> Request:
    """The request with SAM's masks where photos have none; SAM's memory is free again on return."""
    if all(photo.mask for photo in request.photos):
        return request
    segment = segment_by(request.runtime.weights, request.runtime.device)
    found = {}
    for photo in request.photos:
        found[photo] = photo
        if photo.mask is None:
            with about(photo.name):
                found[photo] = replace(photo, mask=find_mask(photo.image, segment=segment).mask)
    wanted = (Wanted(tuple(found[photo] for photo in photos), prompt) for photos, prompt in request.wanted)
    return replace(request, wanted=tuple(wanted))


def check(args: argparse.Namespace, request: Request) -> Bundle | None:
    """ValueError for anything that would fail later; returns the scorers' bundle, if there is one."""
    strengths = (request.sample.strength, *getattr(args, "strengths", ()))
    prompts = [(wanted.words, wanted.prompt) for wanted in request.wanted]
    for way in request.ways:
        bundle = way.runtime.weights
        check_drawable(way.method, bundle, request.sample, strengths, prompts)
        if find_method(way.method).method.needs_face(bundle):
            raise ValueError(
                f"{way.method}: these weights draw people and need faces, which figures do not find"
            )
        for photo in request.photos:
            if photo.mask:
                with about(photo.name):
                    make_reference(photo.image, photo.mask, bundle.image_size, way.config)
    scorers = Bundle.open(args.scorers) if args.scorers else None
    if scorers:
        check_scorers(scorers)
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: expected a name that ends in .png")
    check_writable("--out", args.out.parent)
    return scorers


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("figures", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
