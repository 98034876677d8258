"""New pictures of the subject of one picture.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from moma import (
    Job,
    MethodConfig,
    MoMA,
    Question,
    Result,
    SampleConfig,
    Subject,
    load_decoder,
    method_config,
)
from moma.bundle import DTYPES, SAMPLING, Bundle
from moma.config import PRESETS, TIMESTEPS, parse_field
from moma.diffusion import SOLVERS, ScheduleConfig, intervals
from moma.embeddings import EmbeddingCache, embeddings
from moma.graphs import choose_recorder
from moma.memory import Choice
from moma.mini import SOURCE as MINI_SOURCE
from moma.output import Cell, InputFile, Record, contact_sheet, mask_picture, read_record, save_png
from moma.pipeline import check_method, choose_device, choose_dtype, set_precision
from moma.preprocess import FoundMask, find_mask, make_reference, open_image
from moma.prompts import check_prompt, sd_prompt
from moma.tiny import SOURCE as TINY_SOURCE
from moma.tiny import build_tiny_bundle

WEIGHTS = [Path(__file__).parent / "weights" / name for name in ("moma", "mini")]  # the first that exists
# Of the prompts when none is given; MoMA-mini knows them too.
SCENES = ("on the beach", "in the snow", "in the forest", "at sunset")
NO_SUBJECTS = {"image", "img", "input", "mask", "photo", "picture", "ref", "reference", "subject"}
MAX_SEED = 2**32 - 1  # what torch's CPU generator tells apart; higher seeds would repeat pictures
NOTES = {
    TINY_SOURCE: "pseudo-random weights, so the pictures are noise",
    MINI_SOURCE: "MoMA-mini, a small model of a drawn world (cats, cars, teapots ... of 64 pixels)",
}
NO_CACHE = "off"  # in the place of a folder
SLUG = 48  # characters of a prompt in a file name
# Options whose values a replayed picture brings along.
REPLAYED = (
    "subject", "prompt", "prompts", "negative", "num", "seed", "size", "strength", "guidance",
    "guidance_interval", "steps", "solver", "preset", "set", "batch_size",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    args = parse_args(argv)
    record = read_record(args.replay) if args.replay else None
    bundle = Bundle.open(find_weights(args, record))
    request = request_of_args(args, bundle) if record is None else request_of_record(record, args, bundle)
    inputs = open_inputs(request)
    check(request, inputs, args, bundle)  # nothing has been loaded so far

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
        for prompt, seed in request.pictures
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
    print(f"{seconds:.2f} s per picture, peak memory {peak_memory(pipe.device)}")


# --- what is asked for -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What decides the pictures."""

    reference: Path
    mask: Path | None
    subject: str
    pictures: tuple[tuple[str, int], ...]  # prompt and seed of each
    # The one to keep, None = all. A replay draws its whole batch again, so that every bit is the same.
    only: int | None
    negative: str
    subject_seed: int
    sample: SampleConfig
    method: MethodConfig
    dtype: str


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    base = SampleConfig()
    parser = Parser(
        description="New pictures of the subject of one picture, with MoMA.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Each picture's PNG holds its settings; --replay makes it again from them.",
    )
    # Defaults that a replayed picture must not mix with are None here and filled in by `request_of_args`.
    add = parser.add_argument_group("the subject").add_argument
    add("--ref", type=Path, metavar="FILE", help="picture of the subject")
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="where the subject is, white on black (default: the picture's transparency, or else what stands"
        " out from a plain background)",
    )
    add("--subject", metavar="WORD", help="what it is, e.g. cat (default: the picture's file name)")
    add = parser.add_argument_group("the pictures").add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"the new scene, naming the subject; may be repeated (default: {len(SCENES)} scenes)",
    )
    add("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    add("--negative", metavar="TEXT", help="what the pictures should not show (default: nothing)")
    add("--num", type=int, metavar="N", help="pictures per prompt (default: 1)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of the first picture of a prompt, the next one counts up (default: 0)",
    )
    add(
        "--size",
        type=parse_size,
        metavar="S|WxH",
        help="pixels, e.g. 512 or 768x512 (default: the weights' own)",
    )
    add(
        "--strength",
        type=float,
        metavar="BETA",
        help=f"of the subject: about 1 for a new scene, 0.4 for a new texture (default: {base.strength})",
    )
    add("--guidance", type=float, metavar="G", help=f"weight of the prompt (default: {base.guidance})")
    add(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"timesteps, of {TIMESTEPS}, at which guidance acts; others take half the time, but the picture"
        " changes: docs/approximations.md (default: all)",
    )
    add("--steps", type=int, metavar="N", help=f"denoising steps (default: {base.steps})")
    add("--solver", choices=tuple(SOLVERS), help=f"dpm needs about half the steps (default: {base.solver})")
    add(
        "--preset",
        choices=tuple(PRESETS),
        help="points where paper and released code differ: moma/config.py (default: default)",
    )
    add(
        "--set",
        action="append",
        type=parse_field,
        metavar="FIELD=VALUE",
        help="one such point by itself, e.g. m_gen_threshold=0.3; may be repeated",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"pictures drawn at once; costs memory (default: {base.batch_size}, preset release: 1)",
    )
    add("--replay", type=Path, metavar="PNG", help="make a picture again from the settings inside it")
    add = parser.add_argument_group("the machine").add_argument
    add(
        "--weights",
        type=Path,
        metavar="DIR",
        help="bundle folder (default: weights/moma, weights/mini)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default: auto)")
    add(
        "--stream",
        default="auto",
        choices=get_args(Choice),
        help="read the language model block by block instead of loading it: on, off, or auto, when memory is"
        " short (default: auto)",
    )
    add(
        "--cuda-graph",
        default="auto",
        choices=get_args(Choice),
        help="start the work of a step on a CUDA device at once: on, off, or auto, wherever it can be"
        " (default: auto)",
    )
    add(
        "--tiles",
        default="auto",
        choices=get_args(Choice),
        help="decode pictures in tiles, which may change their tone a little: on, off, or auto, when memory"
        " is short (default: auto)",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR|off",
        help="where the language model's answers are kept for the next time (default: moma/embeddings in the"
        " user's cache folder)",
    )
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: out)")
    add("--debug", action="store_true", help="add each picture's last mask M_gen to the contact sheet")
    args = parser.parse_args(argv)
    if args.replay:
        given = [name for name in REPLAYED if getattr(args, name) is not None]
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} contradicts --replay, which takes it from the picture"
            )
    elif args.ref is None:
        raise ValueError("which subject? Give its picture with --ref FILE")
    return args


def parse_size(text: str) -> tuple[int, int]:
    """'512' or '768x512' -> (width, height)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}, expected pixels such as 512 or 768x512")
    return int(match[1]), int(match[2] or match[1])


def request_of_args(args: argparse.Namespace, bundle: Bundle) -> Request:
    subject = args.subject if args.subject is not None else subject_of_file(args.ref)
    prompts = [*(args.prompt or []), *(read_prompts(args.prompts) if args.prompts else [])]
    method = method_config(args.preset or "default", **{**bundle.method, **dict(args.set or [])})
    width, height = args.size or (None, None)
    names = ("steps", "solver", "guidance", "guidance_interval", "strength", "batch_size")
    given = {name: getattr(args, name) for name in names}
    sample = replace(
        SampleConfig(width=width, height=height),
        # Pictures of a batch change each other under the release's normalisation of M_gen.
        **({"batch_size": 1} if method.m_gen_norm == "batch" else {}),
        **{name: value for name, value in given.items() if value is not None},
    ).sized(bundle.image_size)
    seed, num = args.seed or 0, 1 if args.num is None else args.num
    if num < 1:
        raise ValueError(f"--num {num}: expected 1 picture or more")
    if not 0 <= seed <= MAX_SEED - num:
        raise ValueError(f"--seed {seed}: expected 0 to {MAX_SEED - num}")
    article = "an" if subject[:1].lower() in "aeiou" else "a"
    prompts = dict.fromkeys(prompts) or [f"{article} {subject} {scene}" for scene in SCENES]
    return Request(
        reference=args.ref,
        mask=args.mask,
        subject=" ".join(subject.split()),
        pictures=tuple((prompt, s) for prompt in prompts for s in range(seed, seed + num)),
        only=None,
        negative=args.negative or "",
        subject_seed=0,  # the subject is the same whatever is drawn of it
        sample=sample,
        method=method,
        dtype=args.dtype,
    )


def request_of_record(record: Record, args: argparse.Namespace, bundle: Bundle) -> Request:
    """The request that makes a recorded picture again; ValueError if a file is another one than then."""
    if weight_hashes(bundle) != dict(record.weight_hashes):
        raise ValueError(
            f"the weights in {bundle.folder} are not those of {args.replay}: give them with --weights"
        )
    mask = args.mask or (Path(record.mask.path) if record.mask else None)
    if args.mask and not record.mask:
        raise ValueError(f"--mask {args.mask}: {args.replay} was made without a mask file")
    files = (("ref", args.ref or Path(record.reference.path), record.reference), ("mask", mask, record.mask))
    for option, path, then in files:
        if then is None:
            continue
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give where it is now with --{option}")
        if InputFile.of(path).sha256 != then.sha256:
            raise ValueError(
                f"{path}: not the file that {args.replay} was made from; give it with --{option}"
            )
    then = f"{record.device}, torch {record.versions.get('torch')}"
    now = f"{choose_device(args.device)}, torch {importlib.metadata.version('torch')}"
    if then != now:
        print(f"note: drawn on {then}, now on {now}: details may differ")
    return Request(
        reference=files[0][1],
        mask=mask,
        subject=record.subject,
        pictures=record.batch,
        only=record.batch.index((record.prompt, record.seed)),
        negative=record.negative,
        subject_seed=record.subject_seed,
        sample=record.sample,
        method=record.method,
        dtype=record.dtype if args.dtype == "auto" else args.dtype,
    )


def subject_of_file(path: Path) -> str:
    if re.fullmatch(r"[^\W\d_]+", path.stem) and path.stem.lower() not in NO_SUBJECTS:
        return path.stem.lower()
    raise ValueError(f"what does {path} show? Give it with --subject, e.g. --subject cat")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without empty ones."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: not a readable UTF-8 text file ({error})") from None
    if not any(lines):
        raise ValueError(f"--prompts {path}: is empty, expected one prompt per line")
    return [line for line in lines if line]


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


def weight_hashes(bundle: Bundle) -> dict[str, str]:
    """sha256, as recorded at conversion, of the files of the networks that draw."""
    return {path.name: bundle.hashes[path.name] for name in SAMPLING for path in bundle.files(name)}


# --- checks before anything is loaded ----------------------------------------------------------------


class Inputs(NamedTuple):
    image: Image.Image
    found: FoundMask
    reference: InputFile
    mask: InputFile | None


def open_inputs(request: Request) -> Inputs:
    image = open_image(request.reference)
    found = find_mask(image, request.mask)
    mask = InputFile.of(request.mask) if request.mask else None
    return Inputs(image, found, InputFile.of(request.reference), mask)


def check(request: Request, inputs: Inputs, args: argparse.Namespace, bundle: Bundle) -> None:
    """ValueError for whatever would fail later; prints what the user should know."""
    configs = {name: bundle.config(name) for name in SAMPLING}
    method, tokenizer = request.method, bundle.clip_tokenizer()
    check_method(method, bundle)
    make_reference(inputs.image, inputs.found.mask, bundle.image_size, method)
    for prompt in dict.fromkeys(prompt for prompt, _ in request.pictures):
        check_prompt(request.subject, prompt, method.absent_label, tokenizer)
        if tokenizer.encode(sd_prompt(request.subject, prompt)).truncated:
            print(f"note: only {tokenizer.length} tokens are read, so this prompt's end is lost: {prompt}")
    request.sample.check(configs["vae"].factor)
    intervals(ScheduleConfig(), request.sample.steps, request.sample.solver)
    device = choose_device(args.device)
    choose_dtype(request.dtype, device)
    choose_recorder(args.cuda_graph, device)
    check_writable("--out", args.out)
    if args.cache is not None and str(args.cache) != NO_CACHE:
        check_writable("--cache", args.cache)
    if note := NOTES.get(bundle.networks["unet"]["source"]):
        print(f"note: {note}; README.md says how to get the full model")
    ways = {"file": request.mask, "alpha": "the picture's transparency", "border": "its plain background"}
    print(f"subject: {request.subject}, mask from {ways[inputs.found.source]}")


def check_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot write there ({error.strerror})") from None


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
    prompts = list(dict.fromkeys(prompt for prompt, _ in request.pictures))
    questions = [Question(white, request.subject, prompt) for prompt in prompts]
    found, how = embeddings(
        questions,
        cache,
        lambda: load_decoder(bundle.folder, args.device, request.dtype, request.method, args.stream),
    )
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    print(f"decoded in {time.perf_counter() - start:.1f} s ({how})")
    return dict(zip(prompts, found, strict=True))


# --- results -----------------------------------------------------------------------------------------


def record_of(i: int, request: Request, inputs: Inputs, bundle: Bundle, pipe: MoMA) -> Record:
    """Of the request's picture number i."""
    start = i - i % request.sample.batch_size
    return Record(
        subject=request.subject,
        prompt=request.pictures[i][0],
        negative=request.negative,
        seed=request.pictures[i][1],
        batch=request.pictures[start : start + request.sample.batch_size],
        subject_seed=request.subject_seed,
        sample=request.sample,
        method=request.method,
        reference=inputs.reference,
        mask=inputs.mask,
        weights=str(bundle.folder),
        weight_hashes=weight_hashes(bundle),
        dtype=next(name for name, dtype in DTYPES.items() if dtype == pipe.dtype),
        device=str(pipe.device),
        versions={package: importlib.metadata.version(package) for package in ("torch", "pillow")},
    )


def sheet(subject: Subject, drawn: Sequence[tuple[Job, Result]], debug: bool) -> Image.Image:
    """Reference and mask above the pictures, a row per prompt; under `debug` their masks below them."""
    reference = subject.reference
    rows = [
        [
            Cell(reference.photo, ("reference",)),
            Cell(reference.white, ("what the language model sees",)),
            Cell(mask_picture(reference.mask), ("mask M_ref",)),
        ]
    ]
    for prompt in dict.fromkeys(job.prompt for job, _ in drawn):
        row = [(job, result) for job, result in drawn if job.prompt == prompt]
        rows.append([Cell(result.image, (prompt, f"seed {job.seed}")) for job, result in row])
        if debug:
            rows.append([Cell(mask_picture(r.m_gen, r.image.size), ("last M_gen",)) for _, r in row])
    return contact_sheet(rows)


def advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower())[:SLUG].strip("-") or "picture"


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
