"""What an evaluation will do, from its options. Mistakes are found here, before anything is drawn or scored.

No weights are read for that, except SAM's where masks are missing.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from moma.app.files import check_writable
from moma.evaluate.draw import Run, check_drawable, check_settings
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
    pairs_of,
    prompts_for,
    tasks_of,
)
from moma.evaluate.published import PAIRS
from moma.evaluate.rate import find_images
from moma.evaluate.references import Masks, Reference, find_references
from moma.evaluate.scorers import check_scorers
from moma.evaluate.world import WorldEvaluation, check_world_scorers, write_world
from moma.inputs.faces import find_face, load_detector
from moma.inputs.preprocess import MaskSource, about, make_reference, open_image
from moma.inputs.segment import segment_by
from moma.methods import find_method
from moma.methods.prompts import SD_TEMPLATE, plain_text
from moma.sampling.device import dtype_name
from moma.sampling.interface import Runtime
from moma.weights.bundle import Bundle

SOURCES: dict[MaskSource, str] = {
    "file": "given", "alpha": "by transparency", "sam": "by SAM", "border": "by a plain background",
}  # fmt: skip
ADDED_NOTE = "; those for things `made of` something are not DreamBooth's"


@dataclass(frozen=True)
class Plan:
    """What is drawn and what is scored."""

    subjects: Sequence[Subject]
    runs: Sequence[Run]
    images: Mapping[str, Mapping[Task, Path]]  # method -> task -> image, also those drawn elsewhere
    facts: Mapping[str, str]
    dreambooth: frozenset[str]  # DreamBooth's own prompts, if the subjects are its own too
    scorers: Bundle
    segmenter: Bundle | None  # finds each subject in an image of several


def prepare(options: Options, runtime: Runtime) -> Plan:
    """Check everything and find the masks.

    Args:
        options: the command line.
        runtime: the machine; its weights are replaced by each method's.

    Raises:
        ValueError: for anything that would fail later.
    """
    scorers = Bundle.open(options.scorers)
    (check_scorers if options.dataset else check_world_scorers)(scorers)
    if options.faces:
        load_detector()
    subjects, masks = _open_subjects(options)
    for subject in subjects:
        plain_text(subject.name)
    tasks = tasks_of(subjects, options.protocol.per_prompt)
    images = {name: find_images(folder, tasks) for name, folder in options.images.items()}
    runs = [
        make_run(name, replace(runtime, weights=Bundle.open(folder)), options, tasks)
        for name, folder in options.methods.items()
    ]
    _check_readable(photo for subject in subjects for photo in subject.photos)
    _check_readable(path for drawn in images.values() for path in drawn.values())
    for run in runs:
        check_settings(run)
        images[run.name] = {task: run.folder / task.file for task in tasks}
    check_writable("--out", options.out)
    references = open_references(options, masks, runs) if runs else {}
    runs = [replace(run, references=references) for run in runs]
    own = (
        options.pairs
        or options.dataset is None
        or (options.dataset / OWN).exists()
        or not is_dreambooth(subjects)
    )
    known = () if own else (p.text for s in subjects for p in prompts_for(s.word, s.word in LIVE, False))
    bundles = [scorers, *(run.runtime.weights for run in runs)]
    segmenter = next((bundle for bundle in bundles if options.pairs and "sam" in bundle.networks), None)
    facts = _facts(options, subjects, runs)
    return Plan(subjects, runs, images, facts, frozenset(known), scorers, segmenter)


def _open_subjects(options: Options) -> tuple[list[Subject], Path | None]:
    """The subjects with their prompts, and the folder of their masks, if there is one."""
    check_limits(options.subjects, options.prompts)
    if options.dataset is None:
        number = WorldEvaluation().subjects if options.subjects is None else options.subjects
        subjects, masks = write_world(options.out / WORLD, WorldEvaluation(subjects=number))
    else:
        subjects, masks = open_dataset(options.dataset, options.protocol.added), options.masks
    if options.pairs:
        subjects = pairs_of(subjects)
    return limited(subjects, options.subjects, options.prompts), masks


def _check_readable(files: Iterable[Path]) -> None:
    """ValueError for an image that is damaged."""
    for file in files:
        open_image(file)


def make_run(name: str, runtime: Runtime, options: Options, tasks: Sequence[Task]) -> Run:
    """A method's images, without references; reads no weights.

    Args:
        name: of the method.
        runtime: with the method's bundle.
        options: the command line.
        tasks: what is drawn.

    Raises:
        ValueError: for a bundle, settings or a prompt that the method cannot draw with.
    """
    bundle = runtime.weights
    config, sample = bundle.method_config(name), options.sample.sized(bundle.image_size)
    strengths = options.protocol.context_strength, options.protocol.texture_strength
    prompts = dict.fromkeys((task.subject.words, task.prompt) for task in tasks)
    check_drawable(name, bundle, sample, strengths, prompts)
    return Run(name, options.out / name, runtime, config, sample, options.protocol, tasks, {})


def open_references(options: Options, masks: Path | None, runs: Sequence[Run]) -> dict[Path, Reference]:
    """The reference of every photo that methods are shown.

    Args:
        options: the command line.
        masks: folder of mask files, if there is one.
        runs: at least one; the first bundle with SAM finds the masks that are missing.

    Raises:
        ValueError: names the photos without a usable mask.
    """

    def check(image: Image.Image, mask: Image.Image) -> None:
        for run in runs:
            make_reference(image, mask, run.runtime.weights.image_size, run.config)

    shown = (task.photos(options.protocol.reference) for task in runs[0].tasks)
    photos = list(dict.fromkeys(photo for some in shown for photo in some))
    if any(find_method(run.name).method.needs_face(run.runtime.weights) for run in runs):
        for photo in photos:
            with about(photo):
                find_face(open_image(photo))
    for folder, known in {run.runtime.weights.folder: run.runtime.weights.familiar for run in runs}.items():
        if strange := [photo for photo in photos if known and not known.knows(open_image(photo))]:
            print(
                f"note: {len(strange)} of {len(photos)} references, such as {strange[0]}, are not of the kind"
                f" {folder} knows: no image will resemble them",
                file=sys.stderr,
            )
    runtime = next((run.runtime for run in runs if "sam" in run.runtime.weights.networks), None)
    found = Masks(masks)
    if runtime is not None:
        digests = " ".join(runtime.weights.hashes_of("sam").values())
        plain_first = runtime.weights.familiar is not None
        found = Masks(masks, segment_by(runtime.weights, runtime.device), digests, plain_first)
    return find_references(photos, found, options.out / MASKS, check)


def _facts(options: Options, subjects: Sequence[Subject], runs: Sequence[Run]) -> dict[str, str]:
    """What the tables depend on."""
    protocol, prompts = options.protocol, max(len(subject.prompts) for subject in subjects)
    texts = {prompt.text for subject in subjects for prompt in subject.prompts}
    added = any(text.format(s.word) in texts for text in ADDED for s in subjects)
    shown = {"first": "the first image of each subject", "each": "image n for the n-th of a prompt"}
    told = {
        "data": str(options.dataset or "MoMA-mini's world"),
        "subjects": str(len(subjects)),
    }
    if options.pairs:
        names = dict.fromkeys(one.name for subject in subjects for one in subject.each)
        told["subjects"] = f"{len(subjects)} pairs of {', '.join(names)}"
        told["scores"] = "DINO and CLIP-I are means over both subjects"
        told["published, of other pairs and prompts"] = "; ".join(
            f"{one.name} {', '.join(f'{value:.3f}' for value in one.values.values())}" for one in PAIRS
        )
    if runs or options.images:
        told |= {
            "prompts": f"{prompts} of each subject{ADDED_NOTE if added else ''}",
            "images": f"{protocol.per_prompt} of each prompt",
        }
    if runs:  # images drawn elsewhere have settings of their own
        told |= {
            "reference": shown[protocol.reference],
            "text": f"methods that draw here read {SD_TEMPLATE!r}, MM-Diff the prompt alone",
            "strength": f"β = {protocol.context_strength:g}, for textures {protocol.texture_strength:g}",
        }
    told["scorers"] = str(options.scorers)
    if runs:
        counts = Counter(reference.source for reference in runs[0].references.values())
        told["masks"] = ", ".join(f"{counts[name]} {how}" for name, how in SOURCES.items() if counts[name])
    for run in runs:
        s = run.sample
        how = f"{s.steps} steps of {s.solver}, guidance {s.guidance:g}, {s.width}x{s.height} pixels"
        told[f"method {run.name}"] = f"{how}, {dtype_name(run.runtime.dtype)}, {run.runtime.weights.folder}"
    return told
