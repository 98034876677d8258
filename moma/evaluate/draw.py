"""Draw a method's images. A run that was killed draws only what is missing when it starts again.

    <folder>/settings.json               everything that decides the images; other settings are refused
             <subject>/<prompt>-<n>.png  each stamped with the settings, its task and its reference
             .drafts/                    batches in progress: their latents after some of the steps

A batch's state is saved after every image's worth of steps and kept until all its images are written, so a
kill loses no more work than one image takes. Batches do not depend on where a run was killed: the images are
those of an uninterrupted run, bit for bit where the device is deterministic. If batches must be smaller than
before, a batch in progress is split and continues in parts.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image

from models.weights.files import atomic_write, read_object
from moma.app.files import counted, write_text
from moma.app.options import weight_hashes
from moma.app.record import RECORDS, read_stamp, save_png
from moma.evaluate.protocol import ProtocolConfig, Task
from moma.evaluate.references import Reference
from moma.inputs.faces import find_face
from moma.inputs.preprocess import open_image
from moma.load import load_pipeline
from moma.methods import find_method
from moma.methods.moma.method import MoMA
from moma.sampling.config import SampleConfig
from moma.sampling.device import dtype_name
from moma.sampling.diffusion import History, ScheduleConfig, solver_steps, timesteps
from moma.sampling.interface import Job, Method, Runtime
from moma.sampling.pipeline import Pipeline
from moma.sampling.sampler import Step
from moma.training.checkpoint import differences
from moma.training.parallel import Ranks
from moma.weights.bundle import Bundle

SETTINGS, RESUME = "settings.json", ".drafts"
SUBJECTS_KEPT = 6  # in memory: as many as a subject of DreamBooth's has photos
NAME = 16  # characters of a digest in a file name: 64 bits, enough for any number of batches
NO_EFFECT = ("batch_size", "max_side", "strength")  # on images: the strength is each task's


@dataclass(frozen=True)
class Run:
    """A method's images: where they go and everything that decides them."""

    name: str  # of the method in the registry
    folder: Path
    runtime: Runtime
    config: Any  # the method's
    sample: SampleConfig  # with its sizes
    protocol: ProtocolConfig
    tasks: Sequence[Task]
    references: dict[Path, Reference]  # photo -> reference, of all tasks

    @property
    def batch_dependent(self) -> bool:
        """Whether the images of a batch change each other."""
        return find_method(self.name).method.batch_dependent(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the images, but for tasks and references."""
        sample = {name: value for name, value in asdict(self.sample).items() if name not in NO_EFFECT}
        if self.batch_dependent:
            sample["batch_size"] = self.sample.batch_size
        call = ScheduleConfig(), self.sample.steps, self.sample.solver
        if self.sample.grid != "trailing" and timesteps(*call, "even") == timesteps(*call, "leading"):
            del sample["grid"]
        names = ("context_strength", "texture_strength", "reference")
        return {
            "name": self.name,
            "sample": sample,
            "method": asdict(self.config),
            "dtype": dtype_name(self.runtime.dtype),
            "protocol": {name: getattr(self.protocol, name) for name in names},
            "weights": weight_hashes(self.runtime.weights, self.name, self.config),
        }

    @cached_property
    def stamps(self) -> dict[Task, str]:
        """Task -> digest of everything that decides its image."""
        settings = json.dumps(self.settings, sort_keys=True)
        facts = {
            task: [settings, str(task.file), task.subject.word, task.prompt, task.kind] for task in self.tasks
        }
        shown = {task: [one.digest for one in self.shown(task)] for task in self.tasks}
        return {task: _digest([*known, *shown[task]]) for task, known in facts.items()}

    def shown(self, task: Task) -> tuple[Reference, ...]:
        """What the method is shown of each subject."""
        return tuple(self.references[photo] for photo in task.photos(self.protocol.reference))


def _digest(facts: Sequence[str]) -> str:
    return sha256(json.dumps(facts).encode()).hexdigest()


# --- a batch in progress -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumeFile:
    """A `moma.sampling.interface.ResumeState` on disk."""

    path: Path
    stamps: tuple[str, ...]  # of the batch's images
    steps: int  # per image

    @classmethod
    def of(cls, run: Run, stamps: Sequence[str]) -> "ResumeFile":
        """The file of a batch; stamps: of its images."""
        path = run.folder / RESUME / f"{_digest(stamps)[:NAME]}.pt"
        return cls(path, tuple(stamps), run.sample.steps)

    @classmethod
    def open(cls, path: Path, steps: int) -> "ResumeFile | None":
        """The batch of a file; None if the file holds nothing usable, and then it is deleted."""
        found = _read(path)
        return found and cls(path, found[0], steps)

    def read(self) -> Step | None:
        """The latest step, if there is one."""
        found = _read(self.path)
        return found and found[1]

    def keep(self, step: Step) -> None:
        """Save after as many steps of the batch as cost no more than one whole image, and after the last."""
        done = step.index + 1
        if done == self.steps or done % max(1, self.steps // len(self.stamps)) == 0:
            self.write(step)

    def write(self, step: Step) -> None:
        """Save a step, whatever its number."""
        step = step.to("cpu")
        history = step.history and step.history._asdict()
        with atomic_write(self.path) as part:
            torch.save({"stamps": list(self.stamps), "step": step._asdict() | {"history": history}}, part)


def _read(path: Path) -> tuple[tuple[str, ...], Step] | None:
    """What `ResumeFile.write` wrote: stamps and step."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        history = found["step"].pop("history")
        return tuple(found["stamps"]), Step(**found["step"], history=history and History(**history))
    except FileNotFoundError:
        return None
    # A machine that crashed, or another version, left it.
    except (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
            UnpicklingError, ValueError):  # fmt: skip
        path.unlink()
        return None


# --- what there is to do -----------------------------------------------------------------------------


def strength_for(method: Method, strength: float) -> float:
    """β, which is MoMA's; other methods are compared with it at the strength that is their own.

    Args:
        method: that draws.
        strength: of the protocol.
    """
    return strength if isinstance(method, MoMA) else 1.0


def check_drawable(
    name: str,
    bundle: Bundle,
    sample: SampleConfig,
    strengths: Iterable[float],
    prompts: Iterable[tuple[Sequence[str], str]],
) -> None:
    """Check that a method can draw with a bundle; reads no weights.

    Args:
        name: of the method.
        bundle: its weights.
        sample: with its sizes.
        strengths: of the subject.
        prompts: words of the subjects and prompt, each.

    Raises:
        ValueError: for a missing network, or settings or a prompt that do not fit.
    """
    method, config = find_method(name).method, bundle.method_config(name)
    method.check(bundle, config)
    for strength in strengths:
        replace(sample, strength=strength).check(bundle.config("vae").factor)
    solver_steps(ScheduleConfig(), sample.steps, sample.solver, sample.grid)
    tokenizers = bundle.clip_tokenizers()
    for words, prompt in prompts:
        method.read(tokenizers, config, words, prompt)


def check_settings(run: Run) -> None:
    """ValueError, one line, if the folder belongs to a run with other settings."""
    path = run.folder / SETTINGS
    if path.exists():
        if listed := differences(_read_settings(path), run.settings):
            raise ValueError(
                f"{run.folder}: drawn with other settings: {listed}; choose another --out, or delete it"
            )
    elif next(run.folder.glob("*/*.png"), None):
        raise ValueError(f"{run.folder}: has images, but no {SETTINGS}; choose another --out")


def _read_settings(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        return read_object(path)
    raise ValueError(f"{path}: damaged; choose another --out, or delete {path.parent}")


def missing(run: Run) -> list[Task]:
    """The tasks without a complete image; ValueError for an image made from other inputs."""
    check_settings(run)
    absent = []
    for task, stamp in run.stamps.items():
        found = read_stamp(run.folder / task.file)
        if found not in (None, stamp):
            raise ValueError(
                f"{run.folder / task.file}: made from another reference image or mask; choose another"
                f" --out, or delete {run.folder}"
            )
        if found is None:
            absent.append(task)
    return absent


def begun(run: Run, absent: Sequence[Task]) -> list[ResumeFile]:
    """The batches in progress, largest first.

    Deletes the files of batches whose images are all there, and of those that share an image with a larger
    batch.
    """
    known, wanted = set(run.stamps.values()), {run.stamps[task] for task in absent}
    taken, found = set(), []
    files = [ResumeFile.open(path, run.sample.steps) for path in sorted((run.folder / RESUME).glob("*.pt"))]
    own = [file for file in files if file and known >= set(file.stamps)]
    for file in sorted(own, key=lambda file: -len(file.stamps)):
        if wanted & set(file.stamps) and not taken & set(file.stamps):
            found.append(file)
            taken |= set(file.stamps)
        else:
            file.path.unlink()
    return found


def _split(run: Run, begun: Sequence[ResumeFile], size: int) -> list[ResumeFile]:
    """The batches in progress; those of more than `size` images in parts, each with its own file."""
    found = []
    for file in begun:
        step = file.read() if len(file.stamps) > size else None
        if step is None:
            found.append(file)
            continue
        for start in range(0, len(file.stamps), size):
            part = slice(start, start + size)
            found.append(ResumeFile.of(run, file.stamps[part]))
            found[-1].write(step.rows(part))
        file.path.unlink()
    return found


def batches(run: Run, absent: Sequence[Task], begun: Sequence[ResumeFile], size: int) -> list[list[Task]]:
    """The tasks that are drawn together.

    Args:
        run: whose tasks they are.
        absent: tasks without an image.
        begun: batches in progress; they come first, as they are.
        size: of the other batches, each of one subject, at most.
    """
    tasks = {stamp: task for task, stamp in run.stamps.items()}
    found = [[tasks[stamp] for stamp in file.stamps] for file in begun]
    taken = {task for batch in found for task in batch}
    for _, group in groupby((t for t in absent if t not in taken), key=lambda task: task.subject.name):
        group = list(group)
        found += [group[start : start + size] for start in range(0, len(group), size)]
    return found


# --- drawing -----------------------------------------------------------------------------------------


def draw(run: Run, ranks: Ranks) -> float | None:
    """Draw all missing images; each rank takes an equal, contiguous part of the batches.

    Returns:
        Seconds per image, with what is made of references and prompts; None if this rank has drawn none.
    """
    absent, resume = ranks.once(lambda: _begin(run))
    if not absent:
        return None
    pipe = load_pipeline(replace(run.runtime, device=ranks.device), run.name, run.config)
    size = pipe.max_batch(run.sample)
    if not run.batch_dependent:  # so that one step of a batch costs no more than one whole image
        size = min(size, run.sample.steps)
    resume = ranks.once(lambda: _split(run, resume, size))
    todo = batches(run, absent, resume, size)
    own = todo[len(todo) * ranks.rank // ranks.world : len(todo) * (ranks.rank + 1) // ranks.world]
    encode, wanted, done, start = _encoder(run, pipe, own), set(absent), 0, time.perf_counter()
    for batch in own:
        _draw_batch(run, pipe, encode, batch, wanted)
        done += len(batch)
        print(f"{run.name}: {done} of {counted(sum(map(len, own)), 'image')}", file=sys.stderr)
    seconds = (time.perf_counter() - start) / done if done else None
    ranks.gather(None)  # wait for all ranks
    if ranks.main:
        _remove_empty(run)
    return seconds


def _begin(run: Run) -> tuple[list[Task], list[ResumeFile]]:
    """The missing tasks and the batches in progress; ValueError if the folder is another run's."""
    absent = missing(run)
    (run.folder / RESUME).mkdir(parents=True, exist_ok=True)
    write_text(run.folder / SETTINGS, json.dumps(run.settings, indent=1) + "\n")
    found = begun(run, absent)
    _remove_empty(run)
    return absent, found


def _remove_empty(run: Run) -> None:
    """Remove the folder of resume files, unless it holds batches that this run was not asked for."""
    with suppress(OSError):
        (run.folder / RESUME).rmdir()


Encode = Callable[[Reference, str], Any]  # reference and word -> the method's subject


def _encoder(run: Run, pipe: Pipeline, todo: Sequence[Sequence[Task]]) -> Encode:
    """Encodes a subject once, for all its prompts: a streamed MLLM then reads its weights once for many."""
    prompts: dict[tuple[Reference, str], dict[str, None]] = defaultdict(dict)
    for task in (task for batch in todo for task in batch):
        for one in zip(run.shown(task), task.subject.words, strict=True):
            prompts[one][task.prompt] = None

    needs_face = pipe.method.needs_face(run.runtime.weights)

    @lru_cache(maxsize=SUBJECTS_KEPT)
    def encode(reference: Reference, word: str) -> Any:
        photo, asked = open_image(reference.photo), list(prompts[reference, word])
        face = {"face": find_face(photo)} if needs_face else {}
        with Image.open(reference.mask, formats=RECORDS) as mask:
            return pipe.encode_subject(photo, mask.convert("L"), word, prompts=asked, **face)

    return encode


def _draw_batch(
    run: Run, pipe: Pipeline, encode: Encode, batch: Sequence[Task], wanted: Collection[Task]
) -> None:
    """Draw a batch, from its resume file if there is one, and write those of its images that are wanted."""
    jobs = [
        Job(
            tuple(map(encode, run.shown(task), task.subject.words)),
            task.prompt,
            task.number,
            strength=strength_for(pipe.method, run.protocol.strength(task.kind)),
        )
        for task in batch
    ]
    resume = ResumeFile.of(run, [run.stamps[task] for task in batch])
    resume.path.parent.mkdir(exist_ok=True)
    for task, result in zip(batch, pipe.run(jobs, run.sample, resume=resume), strict=True):
        if task in wanted:
            path = run.folder / task.file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, result.image, stamp=run.stamps[task])
    resume.path.unlink(missing_ok=True)  # another run may share the folder
