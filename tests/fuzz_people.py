"""The fuzzer's cases of what people hand in: a study's files, captions, the form of the page to draw with."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from PIL import Image

from moma import METHODS, Bundle, Runtime, SampleConfig
from moma.app.record import Segmented
from moma.data.blip2 import finish
from moma.data.captions import read_captions
from moma.demo.studio import Form, Studio, Subject, lines_of
from moma.evaluate import study
from moma.sampling.config import MAX_SEED
from tests.fuzz_images import Case
from tests.fuzz_json import DELETED, VALUES, nodes, replaced, senseless
from tests.tiny import build_tiny_bundle

TEXTS = ("", " ", "x", "a\x1b[2J\ud800 cat", "\u2028", "cat " * 5000, "a {subject}", "{}", "a cat <image>")
OF_SAMPLE = ("steps", "solver", "guidance", "strength")  # fields of SampleConfig that the page has
NUMBERS = (-(10**30), -1, 0, 1, 7, MAX_SEED, MAX_SEED + 1, 10**30)


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    made = [kind(rng, folder / kind.__name__) for kind in (votes, scores, captions, forms)]
    while True:
        yield next(rng.choice(made))


def changed(rng: random.Random, data: Any) -> tuple[tuple[Any, ...], Any, Any]:
    """A place of a JSON value, what is there, and what is to take its place."""
    place = rng.choice([one for one in nodes(data) if one])
    new = rng.choice(VALUES) if rng.random() < 0.8 else DELETED
    return place, reduce(lambda value, key: value[key], place, data), new


def named(place: tuple[Any, ...], new: Any) -> str:
    return f"{'.'.join(map(str, place))}: {'deleted' if new is DELETED else repr(new)[:60]}"


def quietly(*args: object) -> None:
    """The study's command."""
    with contextlib.redirect_stdout(io.StringIO()):
        study.main([str(arg) for arg in args])


def votes(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Files of votes, and the key of their study."""
    folder.mkdir()
    head = {"format": study.FORMAT, "version": study.VERSION, "study": "0f"}
    trials = [
        {"id": f"t{i}", "subject": f"cat-{i}", "methods": {f"i{i}": "moma", f"j{i}": "text"}} for i in (0, 1)
    ]
    choices = {"t0": "i0", "t1": None}
    rows = [{"trial": trial, "question": "subject", "choice": choice} for trial, choice in choices.items()]
    whole = {
        study.KEY: head | {"questions": ["subject"], "trials": trials},
        "votes.json": head | {"rater": "r", "votes": rows},
    }

    def run(name: str, text: str) -> None:
        for file, data in whole.items():
            (folder / file).write_text(text if file == name else json.dumps(data))
        quietly("--collect", folder / "votes.json", "--out", folder)

    while True:
        name = rng.choice(list(whole))
        place, old, new = changed(rng, whole[name])
        text = json.dumps(replaced(whole[name], place, new))
        if name == study.KEY:
            wrong = place[0] not in head and new is not DELETED and senseless(old, new)
        elif place == ("rater",):
            wrong = not isinstance(new, str)
        else:
            wrong = new != old and (place[-1] != "choice" or new is not None)
            wrong &= new is not DELETED or not isinstance(place[-1], int)
        if rng.random() < 0.1:
            cut, wrong = rng.randrange(len(text)), False
            piece = rng.choice(["", "\0", "[" * 5000, "NaN", '"'])
            text = text[:cut] + piece + text[cut + rng.randrange(3) :]
        yield f"{name} {named(place, new)}", partial(run, name, text), wrong


def scores(rng: random.Random, folder: Path) -> Iterator[Case]:
    """The scores that a study is made of, and its questions."""
    rows = []
    for subject in ("cat-1", "dog-2"):
        for file in ("photo/{}/0.png", "moma/{}.png", "text/{}.png"):
            path = Path(file.format(subject))
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), "red").save(folder / path)
            row = {"subject": subject, "label": "cat", "kind": "context", "prompt": "a cat", "number": 0}
            rows += [row | {"method": path.parts[0], "file": str(path)}] if path.parts[0] != "photo" else []
    question = {"name": "q", "text": "Which {subject}?", "kinds": ["context"], "shows": ["prompt"]}
    whole = {"scores.json": {"scores": rows}, "questions.json": [question]}

    def run(name: str, new: Any) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        for file, data in whole.items():
            (folder / file).write_text(json.dumps(new if file == name else data))
        asked = ["--questions", folder / "questions.json", "--trials", 1, "--reference", "each"]
        quietly("--from", folder, "--dataset", folder / "photo", "--out", folder / "out", *asked)

    while True:
        name = rng.choice(list(whole))
        place, old, new = changed(rng, whole[name])
        wrong = new is not DELETED and senseless(old, new)
        yield f"{name} {named(place, new)}", partial(run, name, replaced(whole[name], place, new)), wrong


def captions(rng: random.Random, folder: Path) -> Iterator[Case]:
    """What a process of BLIP-2 has written."""
    folder.mkdir()
    rows = [{"image_id": name, "caption": f"a {name}"} for name in ("cat", "dog")]
    images = {row["image_id"]: folder for row in rows}

    def run(lines: list[str]) -> None:
        (folder / "part-000.jsonl").write_text("\n".join(lines) + "\n")
        if (result := finish(images, folder)) is not None:
            read_captions(result, images)

    while True:
        place, _, new = changed(rng, rows)
        wrong = new is not DELETED and len(place) == 2 and not isinstance(new, str)
        yield named(place, new), partial(run, list(map(json.dumps, replaced(rows, place, new)))), wrong


def forms(rng: random.Random, folder: Path) -> Iterator[Case]:
    """The page's form."""
    build_tiny_bundle(folder / "tiny")
    studio = Studio(Runtime.choose(Bundle.open(folder / "tiny"), "cpu", "fp32"), folder / "out")
    mask = Segmented.of(Image.new("L", (32, 32), 255), "painted")
    whole = Form(
        (Subject(folder / "cat.png", mask, "cat"),), ("a cat",), "", 0, 1, "moma", SampleConfig(steps=2)
    )

    def run(name: str, new: Any) -> None:
        if name in OF_SAMPLE:
            name, new = "sample", replace(whole.sample, **{name: new})
        studio.requests(whole._replace(**{name: lines_of(new) if name == "prompts" else new}))

    while True:
        name = rng.choice([*Form._fields[1:-1], *OF_SAMPLE])
        if name in OF_SAMPLE:
            new = rng.choice(VALUES)
            wrong = senseless(getattr(whole.sample, name), new) and new is not None
        elif name in ("seed", "count"):
            new = rng.choice(NUMBERS)
            wrong = not (0 <= new <= MAX_SEED if name == "seed" else 1 <= new <= studio.cfg.images)
        elif name == "method":
            new = rng.choice([*METHODS, "", "x"])
            wrong = new not in METHODS
        else:
            new = rng.choice(TEXTS)
            wrong = name == "prompts" and "a {" not in new and "cat" not in new
        yield f"{name} = {new!r:.60}", partial(run, name, new), wrong
