"""Damaged and senseless inputs by the hundred: `python -m tests.fuzz --kind settings --seed 0 --count 700`.

Each input must be read as what it means or refused by one line, soon, before any weight is loaded. A kind
is a function in KINDS: an endless iterator of cases that a seed decides. Findings are printed; exit status 1
if there are any.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample
from moma.app.record import CHUNK
from moma.weights.tiny import build_tiny_bundle
from tests import fuzz_images

SECONDS = 2.0  # of CPU time that a case may take
STOPPED = 130  # a command's exit status when it was stopped before its work
CAT = Path(__file__).parents[1] / "examples" / "cat.png"


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str  # what it is, for the report
    run: Callable[[], object]  # reads it: returns, or ValueError, OSError or OutOfMemoryError of one line
    wrong: bool = False  # whether nothing but a refusal is right


Kind = Callable[[random.Random, Path], Iterator[Case]]  # the folder is the kind's own


def refused(command: Callable[[list[str]], int], *args: object) -> None:
    """Run a command's function; ValueError with what it said if it ended with status 2.

    Args:
        command: takes the command line and returns an exit status.
        args: the command line.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = command([str(arg) for arg in args])
    if status == 2:
        raise ValueError(said.getvalue().replace("\r", "\n").rstrip("\n"))
    assert status in (0, STOPPED), f"exit status {status}"


# --- the kinds ---------------------------------------------------------------------------------------

# What takes the place of a value: other types, other sizes, and what a terminal or a reader trips over.
VALUES = (
    None, True, False, 0, 1, -1, 3.7, 10**30, -(10**30), math.nan, math.inf, "", "x", "7", "NaN",
    "a\x1b[2J\ud800", "x" * 5000, [], [1], ["x"], {}, {"a": 1}, [[[[]]]], [None] * 99,
)  # fmt: skip


def checked(*args: object) -> None:
    """sample.py's command up to where it would read weights; ValueError for a refusal."""
    with mock.patch("sample.precompute", side_effect=KeyboardInterrupt):
        refused(sample.run, *args)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON value, the whole included."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*path, key))


def replaced(value: Any, path: Sequence[Any], new: Any) -> Any:
    """A JSON value with another one at a place; `DELETED` takes it out."""
    if not path:
        return new
    key, *rest = path
    value = copy.copy(value)
    if not rest and new is DELETED:
        del value[key]
    else:
        value[key] = replaced(value[key] if key in value or isinstance(value, list) else None, rest, new)
    return value


DELETED = object()


def senseless(old: Any, new: Any) -> bool:
    """Whether no field that holds the old value can hold the new one, by its type alone."""
    if old is None or (isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool)):
        return False
    return type(old) is not type(new) or (isinstance(new, float) and not math.isfinite(new))


def settings(rng: random.Random, folder: Path) -> Iterator[Case]:
    """The settings inside an image that is drawn again."""
    weights, out, file = folder / "tiny", folder / "out", folder / "edited.png"
    build_tiny_bundle(weights)
    start = ["--ref", CAT, "--weights", weights, "--cache", "off", "--dtype", "fp32"]
    refused(sample.run, *start, "--steps", 1, "--prompt", "a cat in the snow", "--out", out)
    image = Image.open(out / "a-cat-in-the-snow-seed0.png")
    text = image.info[CHUNK]
    data, image = json.loads(text), image.convert("RGB")
    # What may be null or left out, and what may hold anything of its type.
    optional = {("mask",), ("segmented",), ("method_name",)}
    optional |= {path for path in nodes(data) if path[0:1] in (("sample",), ("method",)) and len(path) == 2}
    exact = {("reference", "sha256"), ("format",), ("version",), ("prompt",), ("seed",)}
    exact |= {path for path in nodes(data) if path[0:1] in (("weight_hashes",), ("batch",)) and len(path) > 1}
    limited = {("sample", name) for name in ("steps", "height", "width", "batch_size")}

    def case(name: str, edited: str, wrong: bool) -> Case:
        info = PngInfo()
        info.add_itxt(CHUNK, edited)

        def run() -> None:
            image.save(file, "PNG", pnginfo=info)
            checked("--replay", file, *start, "--out", out)

        return Case(name, run, wrong)

    places = [path for path in nodes(data) if path]
    while True:
        path, way = rng.choice(places), rng.random()
        old = reduce(lambda value, key: value[key], path, data)
        if way < 0.75:
            new = rng.choice(VALUES)
            wrong = senseless(old, new) and not (new is None and path in optional)
            wrong |= path in exact and new != old
            wrong |= path in limited and new not in (None, 1) and new is not old
        elif way < 0.85:
            new = DELETED
            wrong = path not in optional and path[:1] not in (("versions",), ("sample",), ("method",))
            wrong |= path in (("sample",), ("method",), ("versions",))
        elif way < 0.95:
            holder = path if isinstance(old, dict) else ()
            path, new = (*holder, f"x{rng.random()}"), rng.choice(VALUES)
            wrong = holder != ("versions",)
        else:
            position = rng.randrange(len(text))
            damaged = rng.choice([
                text[:position], text[:position] + rng.choice('"[]{}:,\\0\x00é') + text[position + 1 :],
                "[" * 10_000, '{"a":' * 10_000, "9" * 5000, text[:position] + text[position:] * 2,
                "\ufeff" + text,
            ])  # fmt: skip
            yield case(f"text {damaged!r:.60}", damaged, damaged[:1] != "{" and damaged[:1] != "\ufeff")
            continue
        what = "deleted" if new is DELETED else f"{new!r:.60}"
        yield case(f"{'.'.join(map(str, path))}: {what}", json.dumps(replaced(data, path, new)), wrong)


# Option -> values that are right and values that nothing can be drawn with; {} = a folder of files.
OPTIONS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "--prompt": (["a cat in the snow", "a (cat:1.2) <lora:x:1>", "雪の中のcat", "cat " * 300, "ｃａｔ\u2028"],
        ["", " ", "a dog", "a cat <image>", "a cat " * 3000, "a cat \udce9", "a category"]),
    "--subject": (["cat", "Cat", " cat "], ["", " ", "\u200b"]),
    "--num": (["1", "2"], ["0", "-1", "1.5", "x", "", "1000000", "9" * 5000]),
    "--seed": (["0", "7", "4294967200"], ["-1", "4294967296", "x", "1e3", ""]),
    "--strength": (["0", "1", "0.4"], ["-1", "nan", "inf", "1e999", "1e39", "x", ""]),
    "--guidance": (["0", "1", "7.5"], ["-1", "nan", "-inf", "1e39", "x"]),
    "--guidance-interval": (["0 1000", "300 600"], ["600 300", "0 1001", "-1 5", "1", "a b"]),
    "--size": (["64", "64x72"],
        ["4", "0", "-64", "60", "64x", "x64", "99999", "8x8", "1x2x3", "1e2", "9" * 5000]),
    "--steps": (["1", "2", "30", "999"], ["0", "-5", "1000", "1e2", "x", "9" * 5000]),
    "--solver": (["ddim", "dpm"], ["euler", ""]),
    "--negative": (["", "a dog", "zebra " * 200, "[x]"], ["\udce9"]),
    "--preset": (["default"], ["best", ""]),
    "--set": (["m_gen_threshold=0.3", "m_gen_layers=[0,1]", "geometry=crop", "m_gen_share=0"],
        ["m_gen_threshold=2", "m_gen_threshold=NaN", "geometry=stretch", "geometry", "=", "x=1",
         "mllm_layers=99", "m_gen_layers=" + "[" * 9999, "m_gen_layers=[99]", "subject_below_t=-1",
         "lambda_init=Infinity", "context_masked=1", "reference_text_cut=77", "m_gen_eps=" + "9" * 5000]),
    "--batch-size": (["1", "3"], ["0", "-1", "99999", "x"]),
    "--device": (["cpu", "auto", "cpu:0"], ["cpu:1", "cpu:-1", "cuda:99", "mps:7", "quantum", "", "meta"]),
    "--dtype": (["fp32", "auto"], ["int8", "float32", ""]),
    "--stream": (["auto", "off", "on"], ["maybe", ""]),
    "--tiles": (["auto", "off", "on"], ["1"]),
    "--cuda-graph": (["auto", "off"], ["on", "x"]),
    "--cache": (["off", "{}/cache"], ["{}/empty.txt", "{}/empty.txt/x", "x" * 300]),
    "--method": (["moma", "text", "no-mask", "reference-attention"], ["mine", "", "ip-adapter"]),
    "--mask": (["{}/mask.png"], ["no", "{}", "{}/empty.txt", "", "{}/gone.png", "{}/tall.png", "{}/cut.png"]),
    "--point": ([], ["3,4", "3", "x", "-1,-1"]),
    "--object": ([], ["1", "0", "x"]),
    "--prompts": (["{}/prompts.txt"],
        ["no.txt", "{}", "{}/empty.txt", "{}/bytes.txt", "{}/gone.png", "/dev/zero"]),
    "--ref": ([],
        ["no", "{}", "{}/empty.txt", "", "{}/gone.png", "{}/cut.png", "/dev/zero", "x" * 300, "a\0b"]),
    "--replay": ([], ["no.png", "{}/cat.png", "{}/mask.png", "{}", "{}/gone.png", "/dev/zero"]),
    "--weights": ([], ["{}", "no", "{}/empty.txt", "", "x" * 300]),
    "--out": (["{}/out/deep"], ["{}/empty.txt", "{}/empty.txt/x", "/proc/x", "x" * 300]),
    "--debug": ([], ["x"]),
    "--stepz": ([], ["3"]),
}  # fmt: skip


def commands(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Command lines of sample.py."""
    build_tiny_bundle(folder / "tiny")
    shutil.copy(CAT, folder / "cat.png")
    (folder / "cut.png").write_bytes(CAT.read_bytes()[:3000])
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with Image.open(CAT) as image:
        mask = image.getchannel("A")
    mask.save(folder / "mask.png")
    mask.resize((40, 90)).save(folder / "tall.png")
    (folder / "empty.txt").write_text("\ufeff\n # nothing\n")
    (folder / "bytes.txt").write_bytes(b"a cat \xe9")
    (folder / "prompts.txt").write_text("\ufeffa cat\r\n# a dog\na cat\u2028in the snow\n", encoding="utf-8")
    start = {"--ref": "{}/cat.png", "--weights": "{}/tiny", "--out": "{}/out", "--cache": "off",
             "--steps": "1", "--size": "64", "--dtype": "fp32", "--prompt": "a cat"}  # fmt: skip
    while True:
        line, wrong = dict(start), False
        for option in rng.sample(list(OPTIONS), rng.randint(1, 4)):
            right, others = OPTIONS[option]
            bad = not right or rng.random() < 0.4
            line[option], wrong = rng.choice(others if bad else right), wrong or bad
        args = []
        for option, value in line.items():
            values = value.split() if option == "--guidance-interval" else [value]
            args += [option, *(text.replace("{}", str(folder)) for text in values)]
        name = " ".join(f"{key} {value!r:.40}" for key, value in line.items() if start.get(key) != value)
        yield Case(name, partial(checked, *args), wrong)


def of_images(kind: Callable[[random.Random, Path], Iterator[fuzz_images.Case]]) -> Kind:
    """Cases of `tests.fuzz_images`."""
    return lambda rng, folder: (Case(*case) for case in kind(rng, folder))


KINDS: dict[str, Kind] = {
    "settings": settings,
    "commands": commands,
    "images": of_images(fuzz_images.images),
    "masks": of_images(fuzz_images.masks),
}


# --- what is run -------------------------------------------------------------------------------------


def finding(case: Case, seconds: float = SECONDS) -> tuple[str, str]:
    """What came of a case: "accepted" or "refused", and what is wrong with that, "" = nothing."""
    start = time.process_time()
    try:
        with warnings.catch_warnings(action="ignore"):
            case.run()
        outcome, problem = "accepted", "accepted nonsense" if case.wrong else ""
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        text = str(error)
        outcome, problem = "refused", "" if text.strip() and "\n" not in text else f"not one line: {text!r}"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(place.filename).name}:{place.lineno}"
        outcome, problem = "traceback", f"{type(error).__name__}: {error} ({at})"
    took = time.process_time() - start
    return outcome, problem or (f"took {took:.1f} s" if took > seconds else "")


def check(kind: str, seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """Run the first `count` cases of a kind: how they ended, and the findings."""
    outcomes, findings = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(islice(KINDS[kind](random.Random(seed), Path(folder)), count)):
            outcome, problem = finding(case)
            outcomes[outcome] += 1
            if problem:
                findings.append(f"{kind} {number}: {case.name}: {problem}")
    return outcomes, findings


def main(argv: Sequence[str] | None = None) -> int:
    """Print findings and counts; 1 if there are findings."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args(argv)
    outcomes, findings = check(args.kind, args.seed, args.count)
    for line in findings:
        print(line)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"{args.kind}, seed {args.seed}: {counts}; {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
