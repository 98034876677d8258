"""New images of the subject of one image.

python sample.py --ref examples/cat.png --prompt "a cat on the beach"
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from moma import Job, MLLMInput, MoMA, Result, Subject, load_decoder
from moma.app.feature_cache import EmbeddingCache, embeddings
from moma.app.files import check_writable
from moma.app.options import WEIGHTS, Request, parse_args, request_of_args, request_of_record, weight_hashes
from moma.app.record import InputFile, Record, Segmented, read_record, save_png
from moma.app.sheets import Cell, contact_sheet, mask_image, numbered
from moma.inputs.preprocess import FoundMask, find_mask, make_reference, on_white, open_image
from moma.inputs.segment import Segmenter
from moma.methods.prompts import check_prompt, sd_prompt
from moma.mini import SOURCE as MINI_SOURCE
from moma.sampling.cuda_graphs import choose_recorder
from moma.sampling.device import choose_device, choose_dtype, dtype_name, set_precision
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.pipeline import check_method
from moma.weights.bundle import SAMPLING, Bundle
from moma.weights.tiny import SOURCE as TINY_SOURCE
from moma.weights.tiny import build_tiny_bundle

NOTES = {
    TINY_SOURCE: "pseudo-random weights, so the images are noise",
    MINI_SOURCE: "MoMA-mini, a small model of a drawn world (cats, cars, teapots ... of 64 pixels)",
}
NO_CACHE = "off"  # in the place of a folder
SLUG = 48  # characters of a prompt in a file name


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    args = parse_args(argv)
    record = read_record(args.replay) if args.replay else None
    bundle = Bundle.open(find_weights(args, record))
    if args.list_objects:
        return list_objects(args, bundle)
    request = request_of_args(args, bundle) if record is None else request_of_record(record, args, bundle)
    image = open_image(request.reference)
    check(request, image, args, bundle)  # nothing has been loaded so far

    inputs = find_subject(request, image, args, bundle)
    embedding = decode(request, inputs, args, bundle)
    start = time.perf_counter()
    pipe = MoMA.load(
        bundle.folder, args.device, request.dtype, request.method,
        decoder=False, cuda_graph=args.cuda_graph, tiles=args.tiles,
    )  # fmt: skip
    loaded = time.perf_counter()
    print(
        f"loaded {bundle.folder} in {loaded - start:.1f} s, {pipe.device} {pipe.dtype} ({pipe.dtype_reason})"
    )

    if request.method.reference_noise == "global":  # the released script seeds, too, before it starts
        torch.manual_seed(request.subject_seed)
    subject = pipe.encode_subject(inputs.image, inputs.found.mask, request.subject, seed=request.subject_seed)
    jobs = [
        Job(subject, prompt, seed, request.negative, embedding=embedding[prompt])
        for prompt, seed in request.images
    ]
    drawn = []
    with tqdm(unit="step") as bar:
        results = pipe.run(jobs, request.sample, lambda done, total: advance(bar, done, total))
        for i, (job, result) in enumerate(zip(jobs, results, strict=True)):
            if request.only in (None, i):
                path = free_path(args.out, f"{slug(job.prompt)}-seed{job.seed}")
                save_png(path, result.image, record_of(i, request, inputs, bundle, pipe))
                bar.write(str(path))
                drawn.append((job, result))
    seconds = (time.perf_counter() - loaded) / len(jobs)
    path = free_path(args.out, f"{slug(request.subject)}-sheet")
    save_png(path, sheet(subject, drawn, args.debug))
    print(path)
    print(f"{seconds:.2f} s per image, peak memory {peak_memory(pipe.device)}")


# --- weights -----------------------------------------------------------------------------------------


def find_weights(args: argparse.Namespace, record: Record | None) -> Path:
    """The folder asked for, or the first that is there, or a tiny bundle in the user's cache, made now."""
    if args.weights:
        return args.weights
    if record:
        if not Path(record.weights).is_dir():
            raise ValueError(
                f"{record.weights}: no such folder; give the weights of {args.replay} with --weights"
            )
        return Path(record.weights)
    if found := [place for place in WEIGHTS if place.is_dir()]:
        return found[0]
    cache = user_cache()
    tiny = cache / "tiny"
    with suppress(ValueError):  # of an earlier version of this code, or none: made anew
        Bundle.open(tiny)
        return tiny
    shutil.rmtree(tiny, ignore_errors=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            build_tiny_bundle(Path(draft) / "tiny")
            with suppress(OSError):  # another run was faster
                os.rename(Path(draft) / "tiny", tiny)
    except OSError as error:
        raise ValueError(
            f"{cache}: cannot write the tiny weights there ({error.strerror}); give others with --weights"
        ) from None
    return tiny


def user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moma"
    except RuntimeError:
        raise ValueError(
            "this user has no home folder: name a folder for caches in XDG_CACHE_HOME, or give --weights and "
            "--cache"
        ) from None


# --- checks before anything is loaded ----------------------------------------------------------------


def check(request: Request, image: Image.Image, args: argparse.Namespace, bundle: Bundle) -> None:
    """ValueError for whatever would fail later; prints what the user should know."""
    configs = {name: bundle.config(name) for name in SAMPLING}
    method, tokenizer = request.method, bundle.clip_tokenizer()
    check_method(method, bundle)
    if request.pick:
        check_sam("--point, --box and --object need", bundle)
        request.pick.check(image.size)
    for prompt in dict.fromkeys(prompt for prompt, _ in request.images):
        check_prompt(request.subject, prompt, method.absent_label, tokenizer)
        if tokenizer.encode(sd_prompt(request.subject, prompt)).truncated:
            print(f"note: only {tokenizer.length} tokens are read, so this prompt's end is lost: {prompt}")
    request.sample.check(configs["vae"].factor)
    solver_steps(ScheduleConfig(), request.sample.steps, request.sample.solver)
    device = choose_device(args.device)
    choose_dtype(request.dtype, device)
    choose_recorder(args.cuda_graph, device)
    check_writable("--out", args.out)
    if args.cache is not None and str(args.cache) != NO_CACHE:
        check_writable("--cache", args.cache)
    if note := NOTES.get(bundle.networks["unet"]["source"]):
        print(f"note: {note}; README.md says how to get the full model")


def check_sam(who: str, bundle: Bundle) -> None:
    if "sam" not in bundle.networks:
        raise ValueError(
            f"{who} SAM, which {bundle.folder} does not have: add it with convert_weights.py --with sam"
            f" --base-bundle {bundle.folder} --out {bundle.folder}_sam, or give a mask with --mask FILE"
        )


# --- the mask ----------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    image: Image.Image
    found: FoundMask
    reference: InputFile
    mask: InputFile | None
    segmented: Segmented | None


def find_subject(request: Request, image: Image.Image, args: argparse.Namespace, bundle: Bundle) -> Inputs:
    """Where the subject is; the mask is kept in a file. SAM's memory is free again when this returns."""

    def segment(image: Image.Image) -> Image.Image:
        return Segmenter.load(bundle, args.device).mask(image, request.pick)

    segmented = request.segmented
    if segmented:
        found = FoundMask(segmented.image(), "sam")
    elif request.pick:  # whatever else the image says
        found = FoundMask(segment(image), "sam")
    else:
        asked = request.pick is not None and "sam" in bundle.networks
        found = find_mask(image, request.mask, segment=segment if asked else None)
    free_accelerator(args)
    make_reference(image, found.mask, bundle.image_size, request.method)  # ValueError for an empty mask, ...
    if found.source == "sam" and segmented is None:
        segmented = Segmented.of(found.mask, str(request.pick))
    path = free_path(args.out, f"{slug(request.subject)}-mask")
    save_png(path, found.mask)
    ways = {
        "file": request.mask,
        "alpha": "the image's transparency",
        "sam": f"SAM ({segmented.how})" if segmented else None,
        "border": "its plain background",
    }
    print(f"subject: {request.subject}, mask from {ways[found.source]}, kept in {path}")
    mask = InputFile.of(request.mask) if request.mask else None
    return Inputs(image, found, InputFile.of(request.reference), mask, segmented)


def list_objects(args: argparse.Namespace, bundle: Bundle) -> None:
    """Write the image with the numbers that --object takes, and say what they are."""
    image = open_image(args.ref)
    check_sam("--list-objects needs", bundle)
    check_writable("--out", args.out)
    segmenter = Segmenter.load(bundle, args.device)
    objects = segmenter.objects(image)
    for i, found in enumerate(objects, 1):
        box = ",".join(map(str, found.box))
        print(f"{i}: box {box}, {found.share:.1%} of the image, score {found.score:.2f}")
    path = free_path(args.out, f"{slug(args.ref.stem)}-objects")
    save_png(path, numbered(on_white(image), lambda size: [o.image(segmenter.cfg, size) for o in objects]))
    print(f"{path}: choose with --object N (default: 1)")


def free_accelerator(args: argparse.Namespace) -> None:
    """What is no longer used goes back to the system."""
    if choose_device(args.device).type != "cpu":
        torch.accelerator.empty_cache()


# --- the decoder ------------------------------------------------------------------------------------


def decode(request: Request, inputs: Inputs, args: argparse.Namespace, bundle: Bundle) -> dict[str, Tensor]:
    """Prompt -> the decoder's embedding (1, E). The MLLM's memory is free again before the UNet is loaded."""
    start = time.perf_counter()
    device = choose_device(args.device)
    dtype, _ = choose_dtype(request.dtype, device)
    cache = None
    if str(args.cache) != NO_CACHE:
        folder = args.cache or user_cache() / "embeddings"
        cache = EmbeddingCache.of(folder, bundle, request.method, device, dtype)
    white = make_reference(inputs.image, inputs.found.mask, bundle.image_size, request.method).white
    prompts = list(dict.fromkeys(prompt for prompt, _ in request.images))
    questions = [MLLMInput(white, request.subject, prompt) for prompt in prompts]
    found, how = embeddings(
        questions,
        cache,
        lambda: load_decoder(bundle.folder, args.device, request.dtype, request.method, args.stream),
    )
    free_accelerator(args)
    print(f"decoded in {time.perf_counter() - start:.1f} s ({how})")
    return dict(zip(prompts, found, strict=True))


# --- results -----------------------------------------------------------------------------------------


def record_of(i: int, request: Request, inputs: Inputs, bundle: Bundle, pipe: MoMA) -> Record:
    """Of the request's image number i."""
    start = i - i % request.sample.batch_size
    return Record(
        subject=request.subject,
        prompt=request.images[i][0],
        negative=request.negative,
        seed=request.images[i][1],
        batch=request.images[start : start + request.sample.batch_size],
        subject_seed=request.subject_seed,
        sample=request.sample,
        method=request.method,
        reference=inputs.reference,
        mask=inputs.mask,
        weights=str(bundle.folder),
        weight_hashes=weight_hashes(bundle),
        dtype=dtype_name(pipe.dtype),
        device=str(pipe.device),
        versions={package: importlib.metadata.version(package) for package in ("torch", "pillow")},
        segmented=inputs.segmented,
    )


def sheet(subject: Subject, drawn: Sequence[tuple[Job, Result]], debug: bool) -> Image.Image:
    """Reference and mask above the images, a row per prompt; under `debug` their masks below them."""
    reference = subject.reference
    rows = [
        [
            Cell(reference.photo, ("reference",)),
            Cell(reference.white, ("what the language model sees",)),
            Cell(mask_image(reference.mask), ("mask M_ref",)),
        ]
    ]
    for prompt in dict.fromkeys(job.prompt for job, _ in drawn):
        row = [(job, result) for job, result in drawn if job.prompt == prompt]
        rows.append([Cell(result.image, (prompt, f"seed {job.seed}")) for job, result in row])
        if debug:
            rows.append([Cell(mask_image(r.m_gen, r.image.size), ("last M_gen",)) for _, r in row])
    return contact_sheet(rows)


def advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower())[:SLUG].strip("-") or "image"


def free_path(folder: Path, stem: str) -> Path:
    """A PNG path that does not exist yet."""
    path, n = folder / f"{stem}.png", 2
    while path.exists():
        path, n = folder / f"{stem}-{n}.png", n + 1
    return path


def peak_memory(device: torch.device) -> str:
    """Of the GPU where torch counts it, else of this process where the system does."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    try:
        import resource
    except ImportError:  # Windows
        return "not known"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status: 2 and one line for a user's mistake, never a traceback for it."""
    try:
        main(argv)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sample.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
