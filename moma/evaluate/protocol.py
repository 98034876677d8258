"""DreamBooth's protocol (arXiv 2208.12242, Sec. 4) as MoMA's paper uses it.

30 subjects, 25 prompts per subject, 4 images per prompt. Names, classes and prompts are those of
`dataset/prompts_and_classes.txt` in github.com/google/dreambooth, without the unique token before the class,
which only tuned models know. Five prompts change the look of the subject (red, shiny, ...) and count as
textures, the others as contexts. MoMA's paper adds ten texture prompts without listing them; the ten
materials here are a choice of this repository.

With two subjects per image (`pairs_of`): Subject-Diffusion (arXiv 2307.11410) and MM-Diff take 30 pairs of
DreamBooth's subjects, which are not public. Here they are all pairs of different classes of `PAIRED`, with
the contexts that both have.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

from models.weights.files import read_json, read_text, visible

Kind = Literal["context", "texture"]
References = Literal["first", "each"]

AND = "-and-"  # between the names of a pair
CLASSES = {
    "backpack": "backpack", "backpack_dog": "backpack", "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl", "can": "can", "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock",
    "colorful_sneaker": "sneaker", "dog": "dog", "dog2": "dog", "dog3": "dog", "dog5": "dog", "dog6": "dog",
    "dog7": "dog", "dog8": "dog", "duck_toy": "toy", "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal", "monster_toy": "toy", "pink_sunglasses": "glasses",
    "poop_emoji": "toy", "rc_car": "toy", "red_cartoon": "cartoon", "robot_toy": "toy",
    "shiny_sneaker": "sneaker", "teapot": "teapot", "vase": "vase", "wolf_plushie": "stuffed animal",
}  # fmt: skip
# The others have five photos.
SIX = ("backpack", "berry_bowl", "can", "clock", "dog2", "dog3", "fancy_boot", "pink_sunglasses")
PHOTOS = dict.fromkeys(CLASSES, 5) | dict.fromkeys((*SIX, "shiny_sneaker", "vase"), 6)
PHOTOS |= dict.fromkeys(("duck_toy", "red_cartoon"), 4)
# Of which pairs are made: one of each of eight classes.
PAIRED = ("backpack", "bear_plushie", "cat", "clock", "colorful_sneaker", "dog", "teapot", "vase")
LIVE = ("cat", "dog")  # classes with prompts about outfits; the others are objects
PLACES = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
PLACES_OF_OBJECTS = (
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
)
OUTFITS = (
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
)
PROPERTIES = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
MATERIALS = ("wood", "stone", "gold", "glass", "ice", "paper", "leather", "knitted wool", "chocolate", "clay")
ADDED = tuple(f"a {{}} made of {material}" for material in MATERIALS)  # not DreamBooth's

OFFICIAL, OWN = "prompts_and_classes.txt", "subjects.json"  # files in the dataset's folder
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MOST = 1000  # images per prompt


@dataclass(frozen=True)
class ProtocolConfig:
    """The protocol's free choices."""

    per_prompt: int = 4  # images; image n starts from the noise of seed n for every method and prompt
    context_strength: float = 1.0  # β of MoMA, as the release recommends
    texture_strength: float = 0.4
    # Which of a subject's 4 to 6 photos the method is shown; the protocol does not say. "first" by name, or
    # "each": photo n for a prompt's image n, cycling.
    reference: References = "first"
    added: bool = True  # add the ten texture prompts that are not DreamBooth's

    def __post_init__(self) -> None:
        if not 1 <= self.per_prompt <= MOST:
            raise ValueError(f"{self.per_prompt} images per prompt: expected 1 to {MOST}")
        if self.reference not in get_args(References):
            raise ValueError(f"reference {self.reference!r}: expected {' or '.join(get_args(References))}")

    def strength(self, kind: Kind) -> float:
        """β for a kind of prompts."""
        return self.context_strength if kind == "context" else self.texture_strength


@dataclass(frozen=True)
class Prompt:
    text: str
    kind: Kind


@dataclass(frozen=True)
class Subject:
    """A subject, its photos and its prompts; or several that stand in one image."""

    name: str  # of its folder
    word: str  # its class, used in the prompts
    photos: tuple[Path, ...]
    prompts: tuple[Prompt, ...]
    parts: tuple["Subject", ...] = ()  # the several

    @property
    def each(self) -> tuple["Subject", ...]:
        """The subjects that an image shows."""
        return self.parts or (self,)

    @property
    def words(self) -> tuple[str, ...]:
        """Of each."""
        return tuple(one.word for one in self.each)


@dataclass(frozen=True)
class Task:
    """One image to draw."""

    subject: Subject
    prompt: str
    kind: Kind
    number: int  # among the images of the prompt; also the seed

    @property
    def file(self) -> Path:
        """Relative to the method's folder."""
        return Path(self.subject.name, f"{slug(self.prompt)}-{self.number}.png")

    def photos(self, how: References) -> tuple[Path, ...]:
        """The photo of each subject that the method is shown."""
        number = 0 if how == "first" else self.number
        return tuple(one.photos[number % len(one.photos)] for one in self.subject.each)


def slug(text: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def prompts_for(word: str, live: bool, added: bool = True) -> tuple[Prompt, ...]:
    """DreamBooth's 20 contexts and 5 textures.

    Args:
        word: the subject's class.
        live: whether the subject gets the prompts about outfits.
        added: with 10 more textures.
    """
    contexts = (*PLACES, *(OUTFITS if live else PLACES_OF_OBJECTS))
    textures = (*PROPERTIES, *(ADDED if added else ()))
    both = [(text, "context") for text in contexts] + [(text, "texture") for text in textures]
    return tuple(Prompt(text.format(word), kind) for text, kind in both)


def tasks_of(subjects: Sequence[Subject], per_prompt: int) -> list[Task]:
    """All images, subject by subject, prompt by prompt."""
    return [
        Task(subject, prompt.text, prompt.kind, number)
        for subject in subjects
        for prompt in subject.prompts
        for number in range(per_prompt)
    ]


def limited(subjects: Sequence[Subject], number: int | None, prompts: Sequence[int] | None) -> list[Subject]:
    """The first subjects, each with its first prompts.

    Args:
        subjects: all of them.
        number: of subjects, None = all.
        prompts: number of contexts and of textures, or one number for both; None = all.

    Raises:
        ValueError: as `check_limits`.
    """
    check_limits(number, prompts)
    chosen = list(subjects[:number])
    if prompts is None:
        return chosen
    most = dict(zip(get_args(Kind), (*prompts, prompts[-1]), strict=False))
    return [
        replace(
            one,
            prompts=tuple(
                p for kind in most for p in [p for p in one.prompts if p.kind == kind][: most[kind]]
            ),
        )
        for one in chosen
    ]


def pairs_of(subjects: Sequence[Subject]) -> list[Subject]:
    """All pairs of different classes: of `PAIRED` if the subjects are DreamBooth's, else of all.

    ValueError where there is none.
    """
    if {subject.name: subject.word for subject in subjects} == CLASSES:
        subjects = [subject for subject in subjects if subject.name in PAIRED]
    found = [_pair(*both) for both in combinations(subjects, 2) if both[0].word != both[1].word]
    if found := [pair for pair in found if pair.prompts]:
        return found
    raise ValueError(f"{len(subjects)} subjects: no two of different classes with a context that both have")


def _pair(*both: Subject) -> Subject:
    """Two subjects in the contexts that both have."""
    first, second = (
        [
            re.sub(rf"\ban? {re.escape(one.word)}\b", "{}", p.text, count=1)
            for p in one.prompts
            if p.kind == "context"
        ]
        for one in both
    )
    words = " and ".join(f"{'an' if one.word[:1].lower() in 'aeiou' else 'a'} {one.word}" for one in both)
    return Subject(
        AND.join(one.name for one in both),
        " and ".join(one.word for one in both),
        tuple(photo for one in both for photo in one.photos),
        tuple(Prompt(text.format(words), "context") for text in first if text in second),
        both,
    )


def check_limits(number: int | None, prompts: Sequence[int] | None) -> None:
    """ValueError for limits (of `limited`) that leave nothing."""
    if number is not None and number < 1:
        raise ValueError(f"{number} subjects: expected 1 or more")
    if prompts is not None and not (1 <= len(prompts) <= 2 and min(prompts) >= 0 and max(prompts) > 0):
        given = " ".join(map(str, prompts))
        raise ValueError(f"{given} prompts: expected the number of contexts and textures, not both 0")


# --- the dataset's folder ----------------------------------------------------------------------------


def open_dataset(folder: Path, added: bool = True) -> list[Subject]:
    """The subjects of a dataset, a folder of images each, sorted by name; reads no image.

    `subjects.json`, {"folder": "class"}, names them and their classes; without it they are DreamBooth's, and
    `prompts_and_classes.txt`, if it exists, must agree. ValueError for folders that do not fit.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected DreamBooth's `dataset`, with a folder per subject"
        )
    classes = _own_classes(folder / OWN) if (folder / OWN).exists() else CLASSES
    if classes is CLASSES and (folder / OFFICIAL).exists():
        _check_official(folder / OFFICIAL)
    there = {path.name for path in visible(folder) if path.is_dir() and not path.name.startswith(".")}
    if unknown := sorted(there - set(classes)):
        raise ValueError(
            f"{folder / unknown[0]}: unknown class; state it in {folder / OWN}: {{folder: class}}"
        )
    if classes is not CLASSES and (missing := sorted(set(classes) - there)):
        raise ValueError(f"{folder / OWN}: names {missing[0]!r}, but {folder} has no such folder")
    if not there:
        raise ValueError(f"{folder}: has no subject's folder, such as {folder / next(iter(CLASSES))}")
    subjects = []
    for name in sorted(there):
        word = classes[name]
        prompts = prompts_for(word, word in LIVE, added)
        subjects.append(Subject(name, word, images_in(folder / name), prompts))
    return subjects


def images_in(folder: Path) -> tuple[Path, ...]:
    """The images of a folder, sorted by name; ValueError for none, or two that share a mask's name."""
    found = [path for path in visible(folder) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"{folder}: has no image ({', '.join(sorted(SUFFIXES))})")
    names = Counter(path.stem for path in found)
    if (name := next((name for name in names if names[name] > 1), None)) is not None:
        raise ValueError(
            f"{folder / name}: {names[name]} images of that name, expected one; rename the others"
        )
    return tuple(found)


def is_dreambooth(subjects: Sequence[Subject]) -> bool:
    """Whether these are all of DreamBooth's subjects, with all their photos."""
    return {subject.name: len(subject.photos) for subject in subjects} == PHOTOS


def _own_classes(path: Path) -> Mapping[str, str]:
    classes = read_json(path)
    fits = isinstance(classes, dict) and all(isinstance(c, str) and c.strip() for c in classes.values())
    if not fits or not classes:
        raise ValueError(f'{path}: expected the class of each folder, such as {{"my_mug": "mug"}}')
    return classes


def read_official(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """DreamBooth's file -> folder -> class, prompts for objects, prompts for live ones ({} = class)."""
    head, _, prompts = text.partition("Prompts")
    rows = [line.strip().split(",") for line in head.splitlines()]
    classes = {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "subject_name"}
    both = [
        [line.replace("{0} {1}", "{}") for line in re.findall(r"^\s*'(.*)'\.format", part, re.MULTILINE)]
        for part in prompts.partition("Live")[::2]
    ]
    return classes, *both


def _check_official(path: Path) -> None:
    """ValueError if DreamBooth's file differs from this module's lists."""
    lists = [(*PLACES, *own, *PROPERTIES) for own in (PLACES_OF_OBJECTS, OUTFITS)]
    if read_official(read_text(path)) != (CLASSES, *map(list, lists)):
        raise ValueError(
            f"{path}: differs from DreamBooth's; remove it, and name other subjects in {OWN} beside it"
        )
