"""New images of the subjects of images.

python sample.py --ref examples/cat.png --prompt "a cat on the beach"
python sample.py --ref cat.png --ref teapot.png --prompt "a cat and a teapot on the beach"
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from moma import Job, Pipeline, Result, Runtime, SampleConfig, Segmenter, load_pipeline, set_precision
from moma.app.files import check_writable, exit_status
from moma.app.options import WEIGHTS, Request, parse_args, records_of, request_of_args, request_of_record
from moma.app.record import Record, compared, follow, read_record, save_new, short_path
from moma.app.sheets import Cell, contact_sheet, mask_image, numbered, prompt_rows
from moma.app.subjects import FoundImage, encode, find_faces, find_images, open_images
from moma.inputs.preprocess import on_white, open_image
from moma.methods import find_method
from moma.methods.prompts import foreign_syntax
from moma.mini import SOURCE as MINI_SOURCE
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
    request = request_of_args(args, bundle) if record is None else request_of_record(record, args, bundle)
    runtime = Runtime.choose(
        bundle, args.device, request.dtype,
        stream=args.stream, turns=args.turns, cuda_graph=args.cuda_graph, tiles=args.tiles, encoders=False,
    )  # fmt: skip
    images = open_images(request.subjects)
    texts = _check(request, runtime, images, args)  # nothing has been loaded so far

    found = _find_subjects(request, runtime, images, args)
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
                stem = f"{_stem(request.words, jobs[i].prompt)}-seed{jobs[i].seed}"
                tqdm.write(str(save_new(args.out, stem, result.image, records[i])))
                drawn.append((jobs[i], result))
    finally:  # what was drawn before a mistake or Ctrl-C, too
        if drawn and (record is None or args.debug):
            sheet = _sheet(found, drawn, args.debug)
            print(save_new(args.out, f"{_slug(' and '.join(request.words))}-sheet", sheet))
    if record:
        print(compared(drawn[0][1].image, args.replay))
    seconds = (time.perf_counter() - loaded) / len(jobs)
    print(f"{seconds:.2f} s per image, peak memory {_peak_memory(pipe.device)}")


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
    if note := NOTES.get(bundle.networks["unet"]["source"]):
        print(f"note: {note}; README.md says how to get the full model")
    for one, image in zip(asked, images, strict=True):
        if (known := bundle.familiar) and not known.knows(image):
            print(f"note: {one.file} is not of the kind these weights know: no image will resemble it")
    return texts


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
    if not found:
        return []
    start = time.perf_counter()
    cache = None if str(args.cache) == NO_CACHE else args.cache or user_cache() / "embeddings"
    prompts = list(dict.fromkeys(prompt for prompt, _ in request.images))
    method = find_method(request.method).method
    features, how = method.precompute(
        runtime, request.config, [(one.reference, one.word) for one in found], prompts, cache
    )
    _free_accelerator(runtime.device)
    if how:
        print(f"decoded in {time.perf_counter() - start:.1f} s ({how})")
    return features


def _list_objects(args: argparse.Namespace, bundle: Bundle) -> None:
    """Write the image with the numbers that --object takes, and say what they are."""
    (ref,) = args.ref
    image = open_image(ref)
    _check_sam("--list-objects needs", bundle)
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
    return [Job(prompt=prompt, seed=seed, text=texts[prompt], **same) for prompt, seed in request.images]


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
