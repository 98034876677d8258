"""New images of the subjects of images.

python sample.py --ref examples/cat.png --prompt "a cat on the beach"
python sample.py --ref cat.png --ref teapot.png --prompt "a cat and a teapot on the beach"
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from moma import Job, Pipeline, Result, Runtime, SampleConfig, Segmenter, load_pipeline, set_precision
from moma.app.batch import (
    CHUNK,
    Failures,
    Plan,
    each_subject,
    one_bar,
    there,
    with_masks,
    write_index,
)
from moma.app.files import check_writable, counted, exit_status
from moma.app.options import WEIGHTS, Request, parse_args, records_of, request_of_args, request_of_record
from moma.app.record import (
    Record,
    check_fits,
    compared,
    follow,
    read_record,
    read_stamp,
    save_new,
    save_png,
    short_path,
)
from moma.app.sheets import Cell, contact_sheet, mask_image, numbered, prompt_rows
from moma.app.subjects import FoundImage, encode, find_faces, find_images, open_images
from moma.inputs.preprocess import Reference, about, check_not_blank, on_white, open_image
from moma.methods import find_method
from moma.methods.prompts import foreign_syntax
from moma.mini import SOURCE as MINI_SOURCE
from moma.sampling.config import MAX_SEED
from moma.sampling.device import choose_device
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.pipeline import Progress
from moma.weights.bundle import Bundle
from moma.weights.tiny import SOURCE as TINY_SOURCE

NOTES = {
    TINY_SOURCE: "pseudo-random weights, so the images are noise",
    MINI_SOURCE: "MoMA-mini, a small model of a drawn world (cats, cars, teapots ... of 64 pixels)",
}
NO_CACHE = "off"  # in the place of a folder
SLUG, SLUG_BYTES = 48, 96  # characters of a text in a file name, and bytes; names have 255
SHOWN = 5  # parts of a prompt that a note shows


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    args = parse_args(argv)
    record = read_record(args.replay) if args.replay else None
    bundle = Bundle.open(find_weights(args, record))
    if args.list_objects:
        return _list_objects(args, bundle)
    if args.batch_refs:
        return _draw_many(args, bundle)
    request = request_of_args(args, bundle) if record is None else request_of_record(record, args, bundle)
    runtime = _choose_runtime(args, bundle, request.dtype)
    images = open_images(request.subjects)
    texts = _check(request, runtime, images, args)  # nothing has been loaded so far
    _note_weights(bundle)

    found = _find_subjects(request, runtime, images, args)
    check_fits(records_of(request, found, runtime, bundle), args.format)
    features = precompute(request, runtime, found, args)
    start = time.perf_counter()
    pipe = load_pipeline(runtime, request.method, request.config)
    loaded = time.perf_counter()
    how = f"{pipe.device} {pipe.dtype} ({pipe.dtype_reason})"
    print(f"loaded {bundle.folder} in {loaded - start:.1f} s, {how}")

    jobs = _make_jobs(request, pipe, found, features, texts)
    records = records_of(request, found, pipe, bundle)
    drawn = []
    try:
        for i, result in enumerate(_with_progress(pipe, jobs, request.sample)):
            if request.only in (None, i):
                stem = f"{_stem(request.words, jobs[i].prompt)}-seed{records[i].seed}"
                tqdm.write(str(save_new(args.out, stem, result.image, records[i], args.format)))
                drawn.append((jobs[i], result))
    finally:  # what was drawn before a mistake or Ctrl-C, too
        if drawn and (record is None or args.debug):
            sheet = _sheet(found, drawn, args.debug)
            print(save_new(args.out, f"{_slug(' and '.join(request.words))}-sheet", sheet))
    if record:
        print(compared(drawn[0][1].image, args.replay))
    seconds = (time.perf_counter() - loaded) / len(jobs)
    print(f"{seconds:.2f} s per image, peak memory {_peak_memory(pipe.device)}")


def _choose_runtime(args: argparse.Namespace, bundle: Bundle, dtype: str) -> Runtime:
    toggles = {name: getattr(args, name) for name in ("stream", "turns", "cuda_graph", "tiles")}
    return Runtime.choose(bundle, args.device, dtype, **toggles, encoders=False)


# --- weights -----------------------------------------------------------------------------------------


def find_weights(args: argparse.Namespace, record: Record | None) -> Path:
    """The folder asked for, or the recorded one where it is here or this program's, or the first there is."""
    if args.weights:
        return args.weights
    if record:
        places = [folder for folder in WEIGHTS if short_path(folder) == record.weights]
        found = next((place for place in (follow(record.weights), *places) if place and place.is_dir()), None)
        if found is None:
            raise ValueError(
                f"{record.weights}: no such folder here; give the weights of {args.replay} with --weights"
            )
        return found
    found = next((folder for folder in WEIGHTS if folder.is_dir()), None)
    if found is None:
        raise ValueError(f"no weights in {WEIGHTS[0].parent}: give a bundle with --weights (README.md)")
    return found


def user_cache() -> Path:
    """The user's folder for caches of this program."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moma"
    except RuntimeError:
        raise ValueError(
            "this user has no home folder: name a folder for caches in XDG_CACHE_HOME, or give --cache"
        ) from None


# --- checks before anything is loaded ----------------------------------------------------------------


def _check(
    request: Request, runtime: Runtime, images: Sequence[Image.Image], args: argparse.Namespace
) -> dict[str, Any]:
    """Each prompt, read; ValueError for whatever would fail later. Prints what the user should know."""
    bundle, method = runtime.weights, find_method(request.method).method
    method.check(bundle, request.config, encoders=True)
    asked = [one for subject in request.subjects for one in subject.images]
    for one, image in zip(asked, images, strict=True):
        if one.pick:
            _check_sam("--point, --box and --object need", bundle)
            with about(one.file):
                one.pick.check(image.size)
    for subject in request.subjects:
        if len(subject.images) not in method.images:
            count, most = len(subject.images), method.images[-1]
            raise ValueError(f"{count} images of {subject.word!r}: {request.method} takes {most}")
    method.check_regions(request.config, request.regions)
    tokenizers, texts = bundle.clip_tokenizers(), {}
    for prompt in dict.fromkeys(prompt for prompt, _ in request.images):
        texts[prompt] = method.read(tokenizers, request.config, request.words, prompt)
        if texts[prompt].truncated:
            length = tokenizers[0].length
            print(f"note: only {length} tokens are read, so this prompt's end is lost: {prompt}")
    if any(tokenizer.encode(request.negative).truncated for tokenizer in tokenizers):
        length = tokenizers[0].length
        print(f"note: only {length} tokens of the negative prompt are read, its end is lost")
    read = (*(text.text for text in texts.values()), request.negative)
    foreign = [part for text in read for part in foreign_syntax(text)]
    if shown := ", ".join(list(dict.fromkeys(foreign))[:SHOWN]):
        print(f"note: syntax of other tools is read as plain text here, with its brackets and marks: {shown}")
    for strength in request.strengths or (request.sample.strength,):
        replace(request.sample, strength=strength).check(bundle.config("vae").factor)
    solver_steps(ScheduleConfig(), request.sample.steps, request.sample.solver, request.sample.grid)
    check_writable("--out", args.out)
    if args.cache is not None and str(args.cache) != NO_CACHE:
        check_writable("--cache", args.cache)
    for one, image in zip(asked, images, strict=True):
        if (known := bundle.familiar) and not known.knows(image):
            print(f"note: {one.file} is not of the kind these weights know: no image will resemble it")
    return texts


def _note_weights(bundle: Bundle) -> None:
    if note := NOTES.get(bundle.networks["unet"]["source"]):
        print(f"note: {note}; README.md says how to get the full model")


def _check_sam(who: str, bundle: Bundle) -> None:
    """ValueError, beginning with `who` needs it, for a bundle without SAM."""
    if "sam" not in bundle.networks:
        raise ValueError(
            f"{who} SAM, which {bundle.folder} does not have: add it with convert_weights.py --with sam"
            f" --base-bundle {bundle.folder} --out {bundle.folder}_sam, or give a mask with --mask FILE"
        )


# --- the subjects ------------------------------------------------------------------------------------


def _find_subjects(
    request: Request, runtime: Runtime, images: Sequence[Image.Image], args: argparse.Namespace
) -> list[FoundImage]:
    """Where the subjects are; the masks are kept in files. SAM's memory is free again on return."""
    needed = find_method(request.method).method.needs_face(runtime.weights)
    faces = find_faces(request.subjects, images, needed)
    found = find_images(request.subjects, images, faces, request.config, runtime)
    _free_accelerator(runtime.device)
    several = len({one.word for one in found}) < len(found)  # a word does not say which image
    for one in found:
        kept, record = "", one.record
        if request.only is None:  # a replay has its mask already
            kept = f", kept in {save_new(args.out, f'{_slug(one.word)}-mask', one.mask.mask)}"
        ways = {
            "file": record.mask and record.mask.path,
            "alpha": "the image's transparency",
            "sam": record.segmented and f"SAM ({record.segmented.how})",
            "border": "its plain background",
        }
        where = f"{ways[one.mask.source]} ({one.mask.shares()[0]:.0%} of the image)"
        print(f"subject: {one.word}{f' of {record.file.path}' * several}, mask from {where}{kept}")
        if doubt := one.mask.doubt():
            print(f"note: {doubt}")
    return found


def precompute(
    request: Request, runtime: Runtime, found: Sequence[FoundImage], args: argparse.Namespace
) -> Sequence[Mapping[str, Tensor]]:
    """What the method's encoders make of each image and the prompts; they are freed before the UNet loads."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in request.images))
    return _encode_early(request, runtime, [(one.reference, one.word, prompts) for one in found], args)


def _encode_early(
    request: Request,
    runtime: Runtime,
    references: Sequence[tuple[Reference, str, Sequence[str]]],
    args: argparse.Namespace,
) -> Sequence[Mapping[str, Tensor]]:
    """Of each reference, as `Method.precompute` takes them.

    Args:
        request: of one of them: its method and config.
        runtime: weights and machine.
        references: of any number of subjects.
        args: where the cache is.
    """
    if not references:
        return []
    start = time.perf_counter()
    cache = None if str(args.cache) == NO_CACHE else args.cache or user_cache() / "embeddings"
    method = find_method(request.method).method
    features, how = method.precompute(runtime, request.config, references, cache)
    _free_accelerator(runtime.device)
    if how:
        print(f"decoded in {time.perf_counter() - start:.1f} s ({how})")
    return features


def _list_objects(args: argparse.Namespace, bundle: Bundle) -> None:
    """Write the image with the numbers that --object takes, and say what they are."""
    (ref,) = args.ref
    image = open_image(ref)
    _check_sam("--list-objects needs", bundle)
    check_not_blank(image)
    check_writable("--out", args.out)
    segmenter = Segmenter.load(bundle, choose_device(args.device))
    objects = segmenter.objects(image)
    for i, found in enumerate(objects, 1):
        box = ",".join(map(str, found.box))
        print(f"{i}: box {box}, {found.share:.1%} of the image, score {found.score:.2f}")
    sheet = numbered(on_white(image), lambda size: [o.image(segmenter.cfg, size) for o in objects])
    path = save_new(args.out, f"{_slug(ref.stem)}-objects", sheet)
    print(f"{path}: choose with --object N (default: 1)")


def _free_accelerator(device: torch.device) -> None:
    """Give unused memory back to the system."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _make_jobs(
    request: Request,
    pipe: Pipeline,
    found: Sequence[FoundImage],
    features: Sequence[Mapping[str, Tensor]],
    texts: Mapping[str, Any],
) -> list[Job]:
    """A job for each image; the subjects are encoded once.

    Args:
        request: what is drawn.
        pipe: what draws it.
        found: every image of the subjects.
        features: of `precompute`.
        texts: each prompt, read.
    """
    torch.manual_seed(0)  # the release draws the reference's noise from the global generator, seeded before
    same = {
        "subjects": encode(request.subjects, found, features, pipe.method),
        "negative": request.negative,
        "strength": request.strengths,
        "regions": request.regions,
    }
    return [  # old records may have seeds with more bits, which torch's generator has always ignored
        Job(prompt=prompt, seed=seed & MAX_SEED, text=texts[prompt], **same)
        for prompt, seed in request.images
    ]


# --- many references ---------------------------------------------------------------------------------


def _draw_many(args: argparse.Namespace, bundle: Bundle) -> None:
    """Draw every subject of --batch-refs; the networks are loaded once, and one subject's mistakes stop no
    other."""
    each, failures = each_subject(args), Failures()
    runtime = _choose_runtime(args, bundle, args.dtype)
    check_writable("--out", args.out)
    plans = _plan(each, bundle, runtime, failures)
    todo = {name: plan for name, plan in plans.items() if plan.missing}
    print(
        f"{counted(len(todo), 'subject')} to draw, {len(plans) - len(todo)} are there,"
        f" {len(failures.reasons)} cannot be"
    )
    try:
        if todo:
            features = _encode_many(todo, runtime, args)
            request = next(iter(todo.values())).request
            pipe = load_pipeline(runtime, request.method, request.config)
            with one_bar([len(plan.missing) for plan in todo.values()]) as bars:
                for (name, plan), advance in zip(todo.items(), bars, strict=True):
                    with failures.told(name):
                        _draw_plan(plan, pipe, runtime, features[name], advance)
    finally:  # after Ctrl-C, too
        sheets = []
        for name, plan in plans.items():
            with failures.told(name):
                sheets += [(plan, _plan_sheet(plan, runtime))] if plan.there else []
        print(write_index(args.out, sheets, failures.reasons))
    failures.check(len(each))


def _plan(
    each: Mapping[str, argparse.Namespace], bundle: Bundle, runtime: Runtime, failures: Failures
) -> dict[str, Plan]:
    """What is to be drawn of each subject that can be; SAM is asked after everything else was checked."""
    checked: dict[str, tuple[argparse.Namespace, Request, dict[str, Any]]] = {}
    for name, args in each.items():
        with failures.told(name):
            request = request_of_args(args, bundle)
            images = open_images(request.subjects)
            texts = _check(request, runtime, images, args)
            with suppress(_LaterError):
                _find(request, runtime, images, _later)
            checked[name] = args, request, texts
    if not checked:
        failures.check(len(each))
    _note_weights(bundle)
    load = cache(lambda: Segmenter.load(bundle, runtime.device))
    plans = {}
    for name, (args, request, texts) in checked.items():
        with failures.told(name):
            found = _find(request, runtime, open_images(request.subjects), load)
            records = records_of(request, found, runtime, bundle)
            check_fits(records, args.format)
            kept = with_masks(request, found)
            plans[name] = Plan(args, kept, texts, records, there(args.out, records, args.format))
    load.cache_clear()
    _free_accelerator(runtime.device)
    if not plans:
        failures.check(len(each))
    return plans


class _LaterError(Exception):
    """SAM is needed, and not yet to be loaded."""


def _later() -> Segmenter:
    raise _LaterError


def _find(
    request: Request,
    runtime: Runtime,
    images: Sequence[Image.Image],
    load: Callable[[], Segmenter] | None = None,
) -> list[FoundImage]:
    """`find_images` with its faces; nothing is kept.

    Args:
        request: what is drawn.
        runtime: weights and machine.
        images: of the subjects.
        load: gives SAM.
    """
    needed = find_method(request.method).method.needs_face(runtime.weights)
    faces = find_faces(request.subjects, images, needed)
    return find_images(request.subjects, images, faces, request.config, runtime, load)


def _encode_many(
    plans: Mapping[str, Plan], runtime: Runtime, args: argparse.Namespace
) -> dict[str, Sequence[Mapping[str, Tensor]]]:
    """`_encode_early` of each subject's images, of some subjects at a time, so that memory stays small."""
    features: dict[str, Sequence[Mapping[str, Tensor]]] = {}
    names = list(plans)
    for start in range(0, len(names), CHUNK):
        some, references = names[start : start + CHUNK], []
        for name in some:
            request = plans[name].request
            prompts = list(dict.fromkeys(prompt for prompt, _ in request.images))
            for one in _find(request, runtime, open_images(request.subjects)):
                small = replace(one.reference, original=one.reference.photo)
                references.append((small, one.word, prompts))
        rest = iter(_encode_early(request, runtime, references, args))
        for name in some:
            features[name] = [next(rest) for one in plans[name].request.subjects for _ in one.images]
    return features


def _draw_plan(
    plan: Plan,
    pipe: Pipeline,
    runtime: Runtime,
    features: Sequence[Mapping[str, Tensor]],
    advance: Callable[[Progress], None],
) -> None:
    """Draw what a subject's folder does not have, and add it to `plan.there`.

    Args:
        plan: of the subject.
        pipe: what draws it.
        runtime: weights and machine.
        features: of `_encode_many`.
        advance: called after each step.
    """
    request, missing = plan.request, plan.missing
    found = _find(request, runtime, open_images(request.subjects))
    records = records_of(request, found, pipe, runtime.weights)
    jobs = _make_jobs(request, pipe, found, features, plan.texts)
    results = pipe.run([jobs[i] for i in missing], request.sample, advance)
    for i, result in zip(missing, results, strict=True):
        if i not in plan.there:
            stem = f"{_stem(request.words, jobs[i].prompt)}-seed{jobs[i].seed}"
            plan.there[i] = save_new(plan.folder, stem, result.image, records[i], plan.args.format)
            tqdm.write(str(plan.there[i]))


def _plan_sheet(plan: Plan, runtime: Runtime) -> Path:
    """The subject's contact sheet, made anew where its images are others now."""
    path = plan.folder / f"{_slug(plan.request.words[0])}-sheet.png"
    stamp = plan.stamp
    if read_stamp(path) != stamp:
        found = _find(plan.request, runtime, open_images(plan.request.subjects))
        drawn = [
            (Job((), *plan.request.images[i]), Result(open_image(file), torch.empty(0)))
            for i, file in sorted(plan.there.items())
        ]
        save_png(path, _sheet(found, drawn, debug=False), stamp=stamp)
    return path


# --- results -----------------------------------------------------------------------------------------


def _sheet(found: Sequence[FoundImage], drawn: Sequence[tuple[Job, Result]], debug: bool) -> Image.Image:
    """References and masks above the images of each prompt; with `debug`, their masks beside them."""
    several = len(found) > 1
    rows = [
        [
            Cell(one.reference.photo, ("reference" + f": {one.word}" * several,)),
            Cell(one.reference.white, ("what the language model sees",)),
            Cell(mask_image(one.reference.mask), ("mask M_ref",)),
        ]
        for one in found
    ]
    cells: dict[str, list[list[Cell]]] = {}
    for job, result in drawn:
        image = [Cell(result.image, (job.prompt, f"seed {job.seed}"))]
        if debug and result.m_gen is not None:
            image.append(Cell(mask_image(result.m_gen, result.image.size), ("last M_gen",)))
        cells.setdefault(job.prompt, []).append(image)
    rows += prompt_rows(list(cells.values()))
    return contact_sheet(rows)


def _with_progress(pipe: Pipeline, jobs: Sequence[Job], config: SampleConfig) -> Iterator[Result]:
    """The drawings, with a bar of the steps."""
    with tqdm(unit="step") as bar:

        def advance(progress: Progress) -> None:
            bar.total = progress.total
            bar.update(progress.done - bar.n)

        yield from pipe.run(jobs, config, advance)


def _slug(text: str) -> str:
    """A text as part of a file name."""
    short = re.sub(r"\W+", "-", text.lower())[:SLUG].encode()[:SLUG_BYTES].decode(errors="ignore")
    return short.strip("-") or "image"


def _stem(words: Sequence[str], prompt: str) -> str:
    """The name of a prompt's file, with the subjects where a long prompt's beginning does not show them."""
    prompt = _slug(prompt)
    shown = all(_slug(word) == "image" or _slug(word) in prompt for word in words)
    return prompt if shown else f"{_slug(' and '.join(words))}-{prompt}"


def _peak_memory(device: torch.device) -> str:
    """Peak GPU memory, else process RSS."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    try:
        import resource
    except ImportError:  # Windows
        return "not known"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("sample.py", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
