"""Draws what is missing of a method's images, so that a run that was killed goes on.

    <folder>/settings.json               what decided the images; another run's are refused
             <subject>/<prompt>-<n>.png  each with a stamp of the settings, its task and its reference
             .drafts/                    batches under way: their latents after some steps

A batch's state is kept as often as one image's worth of steps has been done, and until all its images are
written: whenever a run ends, no more than that is lost. Batches do not depend on where a run was killed, so
that the images are those of a run that was not, bit for bit where the device repeats itself; where they
have to be smaller than before, a batch under way is cut up and goes on in parts.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from PIL import Image

import moma
from moma.app.files import write_text
from moma.app.record import read_stamp, save_png
from moma.evaluate.methods import Loader, Method
from moma.evaluate.protocol import ProtocolConfig, Task
from moma.evaluate.references import Reference
from moma.inputs.preprocess import open_image
from moma.methods.moma.config import MethodConfig
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import History
from moma.sampling.sampler import Step
from moma.training.checkpoint import differences
from moma.training.parallel import Ranks
from moma.weights.bundle import Bundle

SETTINGS, DRAFTS = "settings.json", ".drafts"
SUBJECTS_KEPT = 6  # in memory: as many images as a subject of DreamBooth's has
NAME = 16  # characters of a digest in a file name: 64 bits, enough for any number of batches
PER_MACHINE = ("batch_size", "max_side", "strength")  # fields that decide no image; tasks have strengths


@dataclass(frozen=True)
class Run:
    """A method's images: where they go and all that decides them."""

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
        if self.method.m_gen_norm == "batch":  # there the batch decides what its images are
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
            "loader": asdict(self.loader.settings) if self.loader.settings else {},
            "weights": {file: digest for file, digest in self.bundle.hashes.items() if file in files},
        }

    def stamps(self) -> dict[Task, str]:
        """What each image is known by."""
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
    """A `moma.sampling.sampler.ResumeState` on the disk."""

    path: Path
    stamps: tuple[str, ...]  # of the batch's images
    steps: int  # of an image

    @classmethod
    def of(cls, run: Run, stamps: Sequence[str]) -> "DraftFile":
        path = run.folder / DRAFTS / f"{_digest(stamps)[:NAME]}.pt"
        return cls(path, tuple(stamps), run.sample.steps)

    def read(self) -> Step | None:
        kept = _load(self.path)
        return kept and kept.step

    def keep(self, step: Step) -> None:
        """After as many steps of the batch as take no longer than all steps of one image."""
        last = step.index + 1 == self.steps
        if last or (step.index + 1) % max(1, self.steps // len(self.stamps)) == 0:
            self.write(step)

    def write(self, step: Step) -> None:
        step = step.to("cpu")
        history = None if step.history is None else step.history._asdict()
        part = self.path.with_suffix(".part")
        torch.save({"stamps": list(self.stamps), "step": step._asdict() | {"history": history}}, part)
        os.replace(part, self.path)


class Kept(NamedTuple):
    """A batch's state, and what it is of."""

    stamps: tuple[str, ...]
    step: Step

    def rows(self, part: slice) -> "Kept":
        """The state of some of the images."""
        s = self.step
        cut = {"latents": s.latents[part].clone(), "noise_pred": s.noise_pred[part].clone()}
        m_gen = None if s.m_gen is None else s.m_gen[part].clone()
        history = s.history and s.history._replace(x0=s.history.x0[part].clone())
        return Kept(self.stamps[part], s._replace(**cut, m_gen=m_gen, history=history))


def _load(path: Path) -> Kept | None:
    """What `DraftFile.write` wrote; None where there is nothing that can be used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        history = state["step"].pop("history")
        step = Step(**state["step"], history=None if history is None else History(**history))
        return Kept(tuple(state["stamps"]), step)
    except FileNotFoundError:
        return None
    # What a dying machine or another version has left behind.
    except (RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, AttributeError):
        path.unlink()
        return None


# --- what there is to do -----------------------------------------------------------------------------


def check_settings(run: Run) -> None:
    """ValueError, one line, if the folder is another run's."""
    path = run.folder / SETTINGS
    if path.exists():
        if listed := differences(_settings(path), run.settings):
            raise ValueError(
                f"{run.folder}: drawn with other settings: {listed}; choose another --out, or delete it"
            )
    elif next(run.folder.glob("*/*.png"), None):
        raise ValueError(f"{run.folder}: has images, but no {SETTINGS}; choose another --out")


def _settings(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise ValueError(f"{path}: damaged; choose another --out, or delete {path.parent}")


def missing(run: Run) -> list[Task]:
    """The tasks without a whole image. ValueError for an image of another run's."""
    check_settings(run)
    absent = []
    for task, stamp in run.stamps().items():
        found = read_stamp(run.folder / task.file)
        if found not in (None, stamp):
            raise ValueError(
                f"{run.folder / task.file}: made from another reference image or mask; choose another"
                f" --out, or delete {run.folder}"
            )
        if found is None:
            absent.append(task)
    return absent


def begun(run: Run, absent: Sequence[Task]) -> list[tuple[str, ...]]:
    """The batches that were under way, as stamps of their images.

    Drafts of which nothing is wanted are removed, and so are those that share an image with a larger one.
    """
    stamps = run.stamps()
    known, wanted, taken, found = set(stamps.values()), {stamps[task] for task in absent}, set(), []
    drafts = [(path, _load(path)) for path in sorted((run.folder / DRAFTS).glob("*.pt"))]
    whole = [(path, kept.stamps) for path, kept in drafts if kept and known >= set(kept.stamps)]
    for path, own in sorted(whole, key=lambda draft: -len(draft[1])):
        if wanted & set(own) and not taken & set(own):
            found.append(own)
            taken |= set(own)
        else:
            path.unlink()
    return found


def cut_up(run: Run, drafts: Sequence[tuple[str, ...]], size: int) -> list[tuple[str, ...]]:
    """The batches that were under way; those that are too large for now in parts, each with a draft."""
    found = []
    for stamps in drafts:
        file = DraftFile.of(run, stamps)
        kept = _load(file.path) if len(stamps) > size else None
        if kept is None:
            found.append(stamps)
            continue
        parts = [kept.rows(slice(start, start + size)) for start in range(0, len(stamps), size)]
        for part in parts:
            DraftFile.of(run, part.stamps).write(part.step)
        file.path.unlink()
        found += [part.stamps for part in parts]
    return found


def batches(run: Run, absent: Sequence[Task], drafts: Sequence[Sequence[str]], size: int) -> list[list[Task]]:
    """What is drawn together: first the batches that were under way, then, of a subject, what is absent."""
    tasks = {stamp: task for task, stamp in run.stamps().items()}
    first = [[tasks[stamp] for stamp in stamps] for stamps in drafts]
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
    """Nothing but images is left, unless batches are under way of tasks that this run was not asked for."""
    with suppress(OSError):
        (run.folder / DRAFTS).rmdir()


def draw(run: Run, ranks: Ranks) -> None:
    """Draw all missing images; the ranks take equal, connected parts of the batches."""
    absent, drafts = ranks.once(lambda: begin(run))
    if not absent:
        return
    method = run.loader(run.bundle.folder, str(ranks.device), run.dtype)
    size = batch_size(run, method)
    drafts = ranks.once(lambda: cut_up(run, drafts, size))
    todo = batches(run, absent, drafts, size)
    own = todo[len(todo) * ranks.rank // ranks.world : len(todo) * (ranks.rank + 1) // ranks.world]
    open_subject = lru_cache(maxsize=SUBJECTS_KEPT)(partial(subject_of, method, prompts_of(run, own)))
    stamps, wanted, done = run.stamps(), set(absent), 0
    for batch in own:
        draw_batch(run, method, open_subject, batch, [stamps[task] for task in batch], wanted)
        done += len(batch)
        print(f"{run.name}: {done} of {sum(map(len, own))} images", file=sys.stderr)
    ranks.gather(None)  # until all have drawn
    if ranks.main:
        end(run)


def batch_size(run: Run, method: Method) -> int:
    """Images at once; no more than steps, so that one step of all is no more work than one image."""
    size = method.pipe.at_once(run.sample)
    return size if run.method.m_gen_norm == "batch" else min(size, run.sample.steps)


Prompts = Mapping[tuple[Reference, str], Sequence[str]]  # of each reference and word


def prompts_of(run: Run, todo: Sequence[Sequence[Task]]) -> Prompts:
    found: dict[tuple[Reference, str], list[str]] = defaultdict(list)
    for batch in todo:
        for task in batch:
            found[run.reference(task), task.subject.word].append(task.prompt)
    return found


def subject_of(method: Method, prompts: Prompts, reference: Reference, word: str) -> moma.Subject:
    """With the embeddings of all its prompts, which a streamed MLLM makes together."""
    with Image.open(reference.mask) as mask:
        subject = method.subject(open_image(reference.photo), mask.convert("L"), word)
    method.read([(subject, prompt) for prompt in prompts[reference, word]])
    return subject


def draw_batch(
    run: Run,
    method: Method,
    open_subject: Callable[[Reference, str], moma.Subject],
    batch: Sequence[Task],
    stamps: Sequence[str],
    wanted: Collection[Task],
) -> None:
    """Draw a batch, from its draft if there is one, and write those of its images that are wanted."""
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
    draft = DraftFile.of(run, stamps)
    results = method.pipe.run(jobs, run.sample, draft=draft)
    for task, stamp, result in zip(batch, stamps, results, strict=True):
        if task in wanted:
            path = run.folder / task.file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, result.image, stamp=stamp)
    draft.path.unlink()
