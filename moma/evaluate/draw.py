"""Draws what is missing of a method's pictures, so that a run that was killed goes on.

    <folder>/settings.json               what decided the pictures; another run's are refused
             <subject>/<prompt>-<n>.png  each with a stamp of the settings, its task and its reference
             .drafts/                    batches under way: their latents after some steps

A batch's state is kept as often as one picture's worth of steps has been done, and until all its pictures are
written: whenever a run ends, no more than that is lost. Batches do not depend on where a run was killed, so
that the pictures are those of a run that was not, bit for bit where the device repeats itself.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image

import moma
from moma.bundle import Bundle
from moma.config import MethodConfig, SampleConfig
from moma.diffusion import History
from moma.evaluate.methods import Loader, Method
from moma.evaluate.protocol import ProtocolConfig, Task
from moma.evaluate.references import Reference
from moma.output import read_stamp, save_png, write_text
from moma.preprocess import open_image
from moma.sampler import Step
from moma.training.checkpoint import differences
from moma.training.parallel import Ranks

SETTINGS, DRAFTS = "settings.json", ".drafts"
SUBJECTS_KEPT = 6  # in memory: as many pictures as a subject of DreamBooth's has
NAME = 16  # characters of a digest in a file name: 64 bits, enough for any number of batches
PER_MACHINE = ("batch_size", "max_side", "strength")  # fields that decide no picture; tasks have strengths


@dataclass(frozen=True)
class Run:
    """A method's pictures: where they go and all that decides them."""

    name: str
    folder: Path
    bundle: Bundle
    loader: Loader
    method: MethodConfig
    dtype: str
    sample: SampleConfig  # with its sizes
    protocol: ProtocolConfig
    tasks: Sequence[Task]
    references: Mapping[Path, Reference]  # by photo, of all that the tasks show

    @property
    def settings(self) -> dict[str, Any]:
        sample = {name: value for name, value in asdict(self.sample).items() if name not in PER_MACHINE}
        if self.method.m_gen_norm == "batch":  # there the batch decides what its pictures are
            sample["batch_size"] = self.sample.batch_size
        files = {path.name for name in self.loader.networks for path in self.bundle.files(name)}
        return {
            "name": self.name,
            "sample": sample,
            "method": asdict(self.method),
            "dtype": self.dtype,
            "protocol": {
                name: getattr(self.protocol, name)
                for name in ("context_strength", "texture_strength", "reference")
            },
            "weights": {file: digest for file, digest in self.bundle.hashes.items() if file in files},
        }

    def stamps(self) -> dict[Task, str]:
        """What each picture is known by."""
        settings = json.dumps(self.settings, sort_keys=True)
        facts = {
            task: [settings, str(task.file), task.subject.word, task.prompt, task.kind] for task in self.tasks
        }
        return {task: _digest([*known, self.reference(task).digest]) for task, known in facts.items()}

    def reference(self, task: Task) -> Reference:
        return self.references[task.photo(self.protocol.reference)]


def _digest(facts: Sequence[str]) -> str:
    return sha256(json.dumps(facts).encode()).hexdigest()


# --- a batch under way -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DraftFile:
    """A `moma.sampler.Draft` on the disk."""

    path: Path
    stamps: tuple[str, ...]  # of the batch's pictures
    steps: int  # of a picture

    def read(self) -> Step | None:
        state = _load(self.path)
        if state is None:
            return None
        history = state["step"].pop("history")
        return Step(**state["step"], history=None if history is None else History(**history))

    def keep(self, step: Step) -> None:
        """After as many steps of the batch as take no longer than all steps of one picture."""
        last = step.index + 1 == self.steps
        if last or (step.index + 1) % max(1, self.steps // len(self.stamps)) == 0:
            step = step.to("cpu")
            history = None if step.history is None else step.history._asdict()
            part = self.path.with_suffix(".part")
            torch.save({"stamps": list(self.stamps), "step": step._asdict() | {"history": history}}, part)
            os.replace(part, self.path)


def _load(path: Path) -> dict[str, Any] | None:
    """What `DraftFile.keep` wrote; None where there is nothing that can be used."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, UnpicklingError):  # what a dying machine has left behind
        path.unlink()
        return None


# --- what there is to do -----------------------------------------------------------------------------


def check_settings(run: Run) -> None:
    """ValueError, one line, if the folder is another run's."""
    path = run.folder / SETTINGS
    if path.exists():
        if listed := differences(json.loads(path.read_text(encoding="utf-8")), run.settings):
            raise ValueError(
                f"{run.folder}: drawn with other settings: {listed}; choose another --out, or delete it"
            )
    elif next(run.folder.glob("*/*.png"), None):
        raise ValueError(f"{run.folder}: has pictures, but no {SETTINGS}; choose another --out")


def missing(run: Run) -> list[Task]:
    """The tasks without a whole picture. ValueError for a picture of another run's."""
    check_settings(run)
    absent = []
    for task, stamp in run.stamps().items():
        found = read_stamp(run.folder / task.file)
        if found not in (None, stamp):
            raise ValueError(
                f"{run.folder / task.file}: made from another reference picture or mask; choose another"
                f" --out, or delete {run.folder}"
            )
        if found is None:
            absent.append(task)
    return absent


def begun(run: Run, absent: Sequence[Task]) -> list[tuple[str, ...]]:
    """The batches that were under way, as stamps of their pictures; drafts of finished ones are removed."""
    stamps = run.stamps()
    known, wanted, found = set(stamps.values()), {stamps[task] for task in absent}, []
    for path in sorted((run.folder / DRAFTS).glob("*.pt")):
        state = _load(path)
        if state is not None and known >= set(state["stamps"]):
            if wanted & set(state["stamps"]):
                found.append(tuple(state["stamps"]))
            else:
                path.unlink()
    return found


def batches(run: Run, absent: Sequence[Task], drafts: Sequence[Sequence[str]], size: int) -> list[list[Task]]:
    """What is drawn together: first the batches that were under way, then, of a subject, what is absent."""
    tasks = {stamp: task for task, stamp in run.stamps().items()}
    first = [[tasks[stamp] for stamp in stamps] for stamps in drafts if len(stamps) <= size]
    taken = {task for batch in first for task in batch}
    rest = []
    for _, group in groupby((t for t in absent if t not in taken), key=lambda task: task.subject.name):
        group = list(group)
        rest += [group[start : start + size] for start in range(0, len(group), size)]
    return first + rest


# --- drawing -----------------------------------------------------------------------------------------


def begin(run: Run) -> tuple[list[Task], list[tuple[str, ...]]]:
    """What is missing, and the batches that were under way. ValueError if the folder is another run's."""
    absent = missing(run)
    (run.folder / DRAFTS).mkdir(parents=True, exist_ok=True)
    write_text(run.folder / SETTINGS, json.dumps(run.settings, indent=1) + "\n")
    drafts = begun(run, absent)
    end(run)
    return absent, drafts


def end(run: Run) -> None:
    """Nothing but pictures is left, unless batches are under way of tasks that this run was not asked for."""
    with suppress(OSError):
        (run.folder / DRAFTS).rmdir()


def draw(run: Run, ranks: Ranks) -> None:
    """Draw all missing pictures; the ranks take equal, connected parts of the batches."""
    absent, drafts = ranks.once(lambda: begin(run))
    if not absent:
        return
    method = run.loader(run.bundle.folder, str(ranks.device), run.dtype)
    todo = batches(run, absent, drafts, method.pipe.at_once(run.sample))
    own = todo[len(todo) * ranks.rank // ranks.world : len(todo) * (ranks.rank + 1) // ranks.world]
    open_subject = lru_cache(maxsize=SUBJECTS_KEPT)(partial(subject_of, method))
    stamps, wanted, done = run.stamps(), set(absent), 0
    for batch in own:
        draw_batch(run, method, open_subject, batch, [stamps[task] for task in batch], wanted)
        done += len(batch)
        print(f"{run.name}: {done} of {sum(map(len, own))} pictures", file=sys.stderr)
    ranks.gather(None)  # until all have drawn
    if ranks.main:
        end(run)


def subject_of(method: Method, reference: Reference, word: str) -> moma.Subject:
    with Image.open(reference.mask) as mask:
        return method.subject(open_image(reference.photo), mask.convert("L"), word)


def draw_batch(
    run: Run,
    method: Method,
    open_subject: Callable[[Reference, str], moma.Subject],
    batch: Sequence[Task],
    stamps: Sequence[str],
    wanted: Collection[Task],
) -> None:
    """Draw a batch, from its draft if there is one, and write those of its pictures that are wanted."""
    jobs = [
        method.job(
            open_subject(run.reference(task), task.subject.word),
            task.prompt,
            task.number,
            run.protocol.strength(task.kind),
        )
        for task in batch
    ]
    (run.folder / DRAFTS).mkdir(exist_ok=True)
    draft = DraftFile(run.folder / DRAFTS / f"{_digest(stamps)[:NAME]}.pt", tuple(stamps), run.sample.steps)
    results = method.pipe.run(jobs, run.sample, draft=draft)
    for task, stamp, result in zip(batch, stamps, results, strict=True):
        if task in wanted:
            path = run.folder / task.file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, result.image, stamp=stamp)
    draft.path.unlink()
