"""A study with people (Table 2): `python -m moma.evaluate.study --from out/evaluation`.

Makes one page from an evaluation's images: raters see pairs or triples of methods without their names and in
random order, answer a file's questions, and save their votes as a file. `--collect votes/*.json` makes the
table of these files. Which image is whose is in `key.json`, which stays with whoever runs the study.
"""

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any, Self, get_args

from models.weights.files import read_json, read_object
from moma.app.files import Parser, check_writable, exit_status, given_text, write_text
from moma.evaluate.options import WORLD
from moma.evaluate.page import PageConfig, data_uri, small_jpeg
from moma.evaluate.protocol import AND, Kind, References, images_in
from moma.evaluate.votes import FORMAT, VERSION, Trial, read_votes, table
from moma.sampling.config import check_types

TEMPLATE, QUESTIONS = Path(__file__).with_name("study.html"), Path(__file__).with_name("questions")
PAGE, KEY, TABLE = "index.html", "key.json", "table.md"  # files in --out
SHOWS = ("reference", "prompt")
GROUPS = (2, 3)  # methods side by side
IDENTITY = 4  # bytes of a name that tells nothing


@dataclass(frozen=True)
class StudyConfig:
    """What raters see."""

    trials: int = 40  # sets of images; each is asked every question of its kind of prompts
    reference: References = "first"  # of `moma.evaluate.protocol.ProtocolConfig`
    seed: int = 0  # of the choice and of the images' names
    images: PageConfig = field(default_factory=lambda: PageConfig(side=512, quality=92))


@dataclass(frozen=True)
class Question:
    """What raters are asked of a set of images."""

    name: str  # column of the table
    text: str  # {subject} stands for the subject's word
    kinds: tuple[str, ...] = get_args(Kind)  # of prompts that it is asked for
    shows: tuple[str, ...] = SHOWS  # beside the images

    def __post_init__(self) -> None:
        check_types(self)
        for part, known in ((self.kinds, get_args(Kind)), (self.shows, SHOWS)):
            if wrong := [name for name in part if name not in known]:
                raise ValueError(f"{wrong[0]!r}: expected {' or '.join(known)}")

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """The questions of a file, a list of objects with these fields."""
        try:
            rows = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in read_json(path)
            ]
            found = [cls(**row) for row in rows]
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        names = Counter(question.name for question in found)
        if not found or max(names.values()) > 1:
            raise ValueError(
                f"{path}: {dict(names)}: expected one question or more, each with a name of its own"
            )
        return found


# --- what is shown -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What every method has drawn an image of."""

    subject: str
    word: str
    kind: str
    prompt: str
    number: int

    def __post_init__(self) -> None:
        check_types(self)


Images = Mapping[str, Mapping[Shown, Path]]  # method -> its images


def read_images(folder: Path, methods: Sequence[str]) -> Images:
    """The images of an evaluation's `scores.json`.

    Args:
        folder: of the evaluation.
        methods: the wanted ones; none = all.

    Raises:
        ValueError: for a damaged file, or a method that has not been scored.
    """
    path, found = folder / "scores.json", {}
    data = read_object(path)
    try:
        for row in data["scores"]:
            shown = Shown(row["subject"], row["label"], row["kind"], row["prompt"], row["number"])
            found.setdefault(row["method"], {})[shown] = folder / row["file"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); expected that of moma.evaluate") from None
    if unknown := [name for name in methods if name not in found]:
        raise ValueError(f"--method {unknown[0]}: {folder} has {', '.join(found)}")
    return {name: found[name] for name in methods or found}


def choose(images: Images, kinds: Sequence[str], group: int, cfg: StudyConfig) -> list[tuple[Shown, Trial]]:
    """Sets of images of the same subject, prompt and noise, spread evenly over kinds, subjects and methods.

    Args:
        images: of `read_images`.
        kinds: of prompts that a question is asked for.
        group: methods side by side.
        cfg: how many.

    Raises:
        ValueError: if there are fewer.
    """
    rng, groups = random.Random(cfg.seed), list(combinations(images, group))
    every = [shown for shown in next(iter(images.values())) if all(shown in one for one in images.values())]
    order, turns = rng.sample(every, len(every)), Counter()
    ranks = {}
    for shown in order:
        turns.update([place := (shown.kind, shown.subject)])
        ranks[shown] = turns[place]
    queues = [
        sorted((s for s in order if s.kind == kind), key=ranks.get) for kind in kinds
    ]  # subjects in turn
    longest = max(map(len, queues), default=0)
    order = [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
    if cfg.trials < 1 or len(order) < cfg.trials:
        raise ValueError(
            f"--trials {cfg.trials}: expected 1 to {len(order)}, the images that all methods drew"
        )

    def name() -> str:
        return rng.randbytes(IDENTITY).hex()

    trials = []
    for i, shown in enumerate(order[: cfg.trials]):
        chosen = rng.sample(groups[i // len(kinds) % len(groups)], group)
        trials.append((shown, Trial(name(), shown.subject, {name(): method for method in chosen})))
    return trials


def write_page(
    out: Path,
    trials: Sequence[tuple[Shown, Trial]],
    images: Images,
    photos: Mapping[str, Sequence[Path]],
    questions: Sequence[Question],
    cfg: StudyConfig,
) -> None:
    """Write the page and its key.

    Args:
        out: folder.
        trials: of `choose`.
        images: of `read_images`.
        photos: of each subject.
        questions: in the order that they are asked in.
        cfg: which photo, and how large images are.
    """

    def small(path: Path) -> str:  # encoded anew: an image's own settings name its method
        return data_uri("jpeg", small_jpeg(path, cfg.images))

    rows, references = [], {}
    for shown, trial in trials:
        mine = photos[shown.subject]
        photo = mine[shown.number % len(mine) if cfg.reference == "each" else 0]
        references.setdefault(photo, (f"r{len(references)}", small(photo)))
        asked = [
            {"name": q.name, "text": q.text.replace("{subject}", shown.word), "shows": q.shows}
            for q in questions
            if shown.kind in q.kinds
        ]
        rows.append(
            {"id": trial.id, "prompt": shown.prompt, "reference": references[photo][0], "questions": asked}
            | {"images": {one: small(images[method][shown]) for one, method in trial.methods.items()}}
        )
    key = {"questions": [q.name for q in questions], "trials": [asdict(trial) for _, trial in trials]}
    study = hashlib.sha256(json.dumps([key, rows]).encode()).hexdigest()[: 4 * IDENTITY]
    head = {"format": FORMAT, "version": VERSION, "study": study}
    text = json.dumps(head | {"trials": rows, "references": dict(references.values())})
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(data=text.replace("<", "\\u003c"))
    write_text(out / KEY, json.dumps(head | key, ensure_ascii=False, indent=1) + "\n")
    write_text(out / PAGE, page)


# --- the command -------------------------------------------------------------------------------------


def parser() -> Parser:
    """The command line."""
    cfg = StudyConfig()
    parser = Parser("python -m moma.evaluate.study", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--from", dest="folder", type=Path, metavar="DIR", help="an evaluation's --out, with its scores.json")
    add("--method", action="append", default=[], metavar="NAME", help="to be compared (default: all)")
    add("--group", type=int, choices=GROUPS, help="methods side by side (default: all, or 2 of more than 3)")
    add("--dataset", type=Path, metavar="DIR", help="the evaluation's photos (default: those of --world)")
    add("--reference", choices=get_args(References), default=cfg.reference, help="photo that raters see, as"
        f" in the evaluation (default: {cfg.reference})")  # fmt: skip
    shipped = ", ".join(sorted(path.stem for path in QUESTIONS.glob("*.json")))
    add(
        "--questions",
        type=given_text,
        default="moma",
        metavar="NAME|FILE",
        help=f"{shipped}, or a file (default: moma)",
    )
    add("--trials", type=int, default=cfg.trials, metavar="N", help=f"sets of images (default: {cfg.trials})")
    add("--seed", type=int, default=cfg.seed, metavar="N", help="of the choice of images (default: 0)")
    add("--collect", type=Path, nargs="+", metavar="FILE", help="files of votes: print their table")
    add("--out", type=Path, default=Path("out/study"), metavar="DIR", help="the study's folder (default:"
        " out/study)")  # fmt: skip
    return parser


def make(args: Any) -> None:
    """Write the page; ValueError before anything is written."""
    if args.folder is None:
        raise ValueError("which images? Give an evaluation with --from DIR, or votes with --collect FILES")
    shipped = QUESTIONS / f"{args.questions}.json"
    questions = Question.read(shipped if shipped.is_file() else Path(args.questions))
    images = read_images(args.folder, args.method)
    group = args.group or (len(images) if len(images) in GROUPS else min(GROUPS))
    if len(images) < group:
        raise ValueError(f"{', '.join(images)}: expected {group} methods or more")
    kinds = [kind for kind in get_args(Kind) if any(kind in question.kinds for question in questions)]
    cfg = replace(StudyConfig(), trials=args.trials, reference=args.reference, seed=args.seed)
    trials = choose(images, kinds, group, cfg)
    dataset = args.dataset or args.folder / WORLD / "photos"
    if absent := [shown.subject for shown, _ in trials if not (dataset / shown.subject).is_dir()]:
        if all((dataset / one).is_dir() for one in absent[0].split(AND)):
            raise ValueError(f"{absent[0]}: a pair; a study is of images of one subject, expected no --pairs")
        raise ValueError(
            f"{dataset / absent[0]}: no such folder; name the evaluation's photos with --dataset"
        )
    photos = {shown.subject: images_in(dataset / shown.subject) for shown, _ in trials}
    check_writable("--out", args.out)
    if (args.out / KEY).exists():
        raise ValueError(f"{args.out}: holds a study, whose votes need its {KEY}; choose another --out")
    write_page(args.out, trials, images, photos, questions, cfg)
    asked = sum(shown.kind in question.kinds for shown, _ in trials for question in questions)
    print(f"{args.out / PAGE}: {asked} questions; votes need {args.out / KEY}, which raters should not see")


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake."""
    args = parser().parse_args(argv)
    if args.collect is None:
        return make(args)
    text = table(read_votes(args.collect, args.out / KEY))
    write_text(args.out / TABLE, text)
    print(text)


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("study", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
