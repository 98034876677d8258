"""What an evaluation is to do, from its options; mistakes are found here, before anything is drawn or scored.

No weights are read for that but SAM's, where it is asked for masks.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moma.app.files import check_writable
from moma.evaluate.draw import Run, check_settings
from moma.evaluate.methods import BASELINE, EVALUATED, Loader
from moma.evaluate.options import MASKS, WORLD, Options
from moma.evaluate.protocol import (
    ADDED,
    LIVE,
    OWN,
    Subject,
    Task,
    check_limits,
    is_dreambooth,
    limited,
    open_dataset,
    prompts_for,
    tasks_of,
)
from moma.evaluate.rate import find_images
from moma.evaluate.references import Masks, Reference, find_references
from moma.evaluate.world import WorldEvaluation, check_scorers, write_world
from moma.inputs.preprocess import MaskSource, open_image
from moma.inputs.segment import segment_by
from moma.methods.moma.config import method_config
from moma.methods.prompts import SD_TEMPLATE, check_prompt
from moma.sampling.device import choose_dtype, dtype_name
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.pipeline import check_method
from moma.weights.bundle import SCORERS, Bundle

SOURCES: dict[MaskSource, str] = {
    "file": "given", "alpha": "by transparency", "sam": "by SAM", "border": "by a plain background",
}  # fmt: skip
ADDED_NOTE = "; those for things `made of` something are not DreamBooth's"


@dataclass(frozen=True)
class Plan:
    """What is drawn and what is scored."""

    subjects: Sequence[Subject]
    runs: Sequence[Run]
    images: Mapping[str, Mapping[Task, Path]]  # of each method, those of others too
    facts: Mapping[str, str]
    dreambooth: frozenset[str]  # its prompts, where the subjects are its own, too


def prepare(options: Options, device: torch.device) -> Plan:
    """Check all and find the masks. ValueError for whatever would fail later."""
    check_scorer_files(options)
    subjects, masks = open_data(options)
    tasks = tasks_of(subjects, options.protocol.per_prompt)
    images = {name: find_images(folder, tasks) for name, folder in options.images.items()}
    runs = [make_run(name, folder, options, tasks, device) for name, folder in options.methods.items()]
    for run in runs:
        check_settings(run)
        images[run.name] = {task: run.folder / task.file for task in tasks}
    check_readable(photo for subject in subjects for photo in subject.photos)
    check_readable(path for name in options.images for path in images[name].values())
    check_writable("--out", options.out)
    references = open_references(options, masks, tasks, runs, str(device)) if runs else {}
    runs = [replace(run, references=references) for run in runs]
    own = options.world or (options.dataset / OWN).exists() or not is_dreambooth(subjects)
    known = () if own else (p.text for s in subjects for p in prompts_for(s.word, s.word in LIVE, False))
    return Plan(subjects, runs, images, facts(options, subjects, runs), frozenset(known))


def open_data(options: Options) -> tuple[list[Subject], Path | None]:
    """The subjects with their prompts, and the folder of their masks, if there is one."""
    check_limits(options.subjects, options.prompts)
    if options.world:
        number = WorldEvaluation().subjects if options.subjects is None else options.subjects
        subjects, masks = write_world(options.out / WORLD, WorldEvaluation(subjects=number))
    else:
        subjects, masks = open_dataset(options.dataset, options.protocol.added), options.masks
    return limited(subjects, options.subjects, options.prompts), masks


def check_scorer_files(options: Options) -> None:
    if options.world:
        check_scorers(options.scorers)
    elif not set(SCORERS) & set(Bundle.open(options.scorers).networks):
        raise ValueError(
            f"{options.scorers}: has no network that scores ({', '.join(SCORERS)}); convert one into it, or"
            " give another bundle with --scorers"
        )


def check_readable(files: Iterable[Path]) -> None:
    """ValueError for an image that cannot be read to its end."""
    for file in files:
        open_image(file)


def make_run(name: str, folder: Path, options: Options, tasks: Sequence[Task], device: torch.device) -> Run:
    """A method's images, without references; reads no weights."""
    bundle, loader = Bundle.open(folder), loader_of(name, options)
    loader.check(bundle)
    method = method_config(**bundle.method)
    if "llava" in loader.networks:
        check_method(method, bundle)
    sample = options.sample.sized(bundle.image_size)
    for strength in (options.protocol.context_strength, options.protocol.texture_strength):
        replace(sample, strength=strength).check(bundle.config("vae").factor)
    solver_steps(ScheduleConfig(), sample.steps, sample.solver)
    tokenizer = bundle.clip_tokenizer()
    for word, prompt in dict.fromkeys((task.subject.word, task.prompt) for task in tasks):
        check_prompt(word, prompt, method.absent_label, tokenizer)
    dtype = dtype_name(choose_dtype(options.dtype, device)[0])
    target = options.out / name
    return Run(name, target, bundle, loader, method, dtype, sample, options.protocol, tasks, {})


def loader_of(name: str, options: Options) -> Loader:
    """In MoMA-mini's world an IP-Adapter is one that train.py has made."""
    return BASELINE if options.world and name == "ip-adapter" else EVALUATED[name]


def open_references(
    options: Options, masks: Path | None, tasks: Sequence[Task], runs: Sequence[Run], device: str
) -> dict[Path, Reference]:
    """Of all images that methods are shown."""
    photos = list(dict.fromkeys(task.photo(options.protocol.reference) for task in tasks))
    bundle, method = runs[0].bundle, runs[0].method
    segmenting = next((run.bundle for run in runs if "sam" in run.bundle.networks), None)
    found = Masks(masks)
    if segmenting is not None:
        digests = " ".join(segmenting.networks["sam"]["sha256"].values())
        found = Masks(masks, segment_by(segmenting, device), digests)
    return find_references(photos, found, options.out / MASKS, bundle.image_size, method)


def facts(options: Options, subjects: Sequence[Subject], runs: Sequence[Run]) -> dict[str, str]:
    """What the tables are of."""
    protocol, prompts = options.protocol, max(len(subject.prompts) for subject in subjects)
    texts = {prompt.text for subject in subjects for prompt in subject.prompts}
    added = any(text.format(s.word) in texts for text in ADDED for s in subjects)
    shown = {"first": "the first image of each subject", "each": "image n for the n-th of a prompt"}
    asked = {
        "prompts": f"{prompts} of each subject{ADDED_NOTE if added else ''}",
        "images": f"{protocol.per_prompt} of each prompt",
    }
    drawn = {  # not so with what others have drawn
        "reference": shown[protocol.reference],
        "text": f"methods that draw here read {SD_TEMPLATE!r}",
        "strength": f"β = {protocol.context_strength:g}, for textures {protocol.texture_strength:g}",
    }
    told = {
        "data": "MoMA-mini's world" if options.world else str(options.dataset),
        "subjects": str(len(subjects)),
        **(asked if runs or options.images else {}),
        **(drawn if runs else {}),
        "scorers": str(options.scorers),
    }
    if runs:
        counts = Counter(reference.source for reference in runs[0].references.values())
        told["masks"] = ", ".join(f"{counts[name]} {how}" for name, how in SOURCES.items() if counts[name])
    for run in runs:
        s = run.sample
        how = f"{s.steps} steps of {s.solver}, guidance {s.guidance:g}, {s.width}x{s.height} pixels"
        told[f"method {run.name}"] = f"{how}, {run.dtype}, {run.bundle.folder}"
    return told
