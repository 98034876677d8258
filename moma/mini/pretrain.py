"""The whole recipe of MoMA-mini: `python -m moma.mini.pretrain --work DIR --out weights/mini`.

Renders the world, trains every frozen network from scratch, then runs `train.py` on shards of triplets as for
any other data. An interrupted stage resumes. Most stages have a gate, numbers that they must reach before the
next one begins. Under torchrun the ranks train together and rank 0 does the rest; on CPUs, one process per
core is fastest.

Letters: N images, S image side, Z latent channels, h w latents.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.weights.loading import load_into, read_checkpoint, save_tensors
from moma.app.files import Parser, check_writable, exit_status, write_text
from moma.app.record import save_png
from moma.evaluate.world import write_scorers
from moma.inputs.segment import Segmenter
from moma.methods.moma.training import refuse_quantised
from moma.methods.prompts import sd_prompt
from moma.mini import SOURCE, report
from moma.mini.adapters import ablations, adapters, bundle_of, decoder, put_in, write_pairs, write_singles
from moma.mini.base_numbers import base_numbers, base_sheet
from moma.mini.config import MiniConfig, ReportConfig
from moma.mini.familiar import fit_familiar
from moma.mini.segmenting import SegmentTask, hints
from moma.mini.tasks import CaptionTask, ClipTask, VAETask, to_clip
from moma.mini.text_to_image import Latents, TextToImageTask
from moma.mini.workspace import FILES, KEEPABLE, Workspace
from moma.sampling.device import dtype_name, set_precision
from moma.training.common import to_pixels
from moma.training.loop import EXPORT
from moma.training.parallel import start_ranks
from moma.weights.bundle import (
    CLIP_TOKENIZER,
    LLAMA_TOKENIZER,
    LM_HEAD,
    PROBES,
    Bundle,
    BundleWriter,
    build_network,
)
from moma.weights.sources import exact_frequencies
from moma.weights.tiny import learn_tokenizers
from moma.world import classifiers
from moma.world.classifiers import BYTE
from moma.world.measures import iou
from moma.world.pairs import PairWords, render_pairs
from moma.world.words import Words
from moma.world.world import render_many

# --- the stages; all ranks run them ------------------------------------------------------------------


def tokenizers(work: Workspace) -> None:
    """The renders, and BPE and sentencepiece vocabularies of their captions."""
    for split, number in (("train", work.cfg.images), ("val", work.cfg.unseen_images)):
        given = range(number), split, work.cfg.world, os.cpu_count() or 1
        work.keep(split, partial(render_many, *given))
    for split, number in (("train", work.cfg.pairs), ("val", work.cfg.unseen_pairs)):
        given = range(number), split, work.cfg.world, os.cpu_count() or 1
        work.keep(f"{split}_pairs", partial(render_pairs, *given))
    words = work.images("train").words[: work.cfg.tokenizer_captions]
    pairs = work.pairs("train").words[: work.cfg.tokenizer_captions]
    work.ranks.once(lambda: _learn_vocabularies(work, words, pairs))


def vae(work: Workspace) -> None:
    """The autoencoder."""
    cfg, images = work.cfg.vae, work.images("train")
    work.fit("vae", VAETask(work.new("vae"), images, cfg), cfg.train)


def clip(work: Workspace) -> None:
    """Text and image encoder."""
    cfg, images, tokenizer = work.cfg.clip, work.images("train"), work.clip_tokenizer()
    task = ClipTask(work.new("text"), work.new("vision"), images, work.pairs("train"), tokenizer, cfg)
    work.fit("clip", task, cfg.train)


def judges(work: Workspace) -> None:
    """The classifiers, trained on renders alone, for gates and report only."""
    cfg, world = work.cfg.probes, work.cfg.world
    wide = {name: values[: cfg.wide] for name, values in work.arrays("train_pairs").items()}
    wide, single = classifiers.views_of_pairs(wide, "train", cfg.view, world), work.arrays("train")
    first = {name: np.concatenate([single[name][: cfg.pairs], values]) for name, values in wide.items()}
    work.keep("second", lambda: classifiers.second_images(first, world))
    task = classifiers.probe_task(first, work.arrays("second"), world, cfg)
    work.fit("judges", task, cfg.train)


def sam(work: Workspace) -> None:
    """SAM, for references without a mask."""
    cfg = work.cfg.segmenting
    task = SegmentTask(work.new("sam"), work.images("train"), work.pairs("train"), cfg)
    work.fit("sam", task, cfg.train)


def unet(work: Workspace) -> None:
    """The text-to-image UNet."""
    cfg, images, pairs = work.cfg.text_to_image, work.images("train"), work.pairs("train")
    text, tokenizer = work.trained("clip", "text"), work.clip_tokenizer()
    single = _latents(work, "single", images.images, images.masks), images.words
    wide = _latents(work, "wide", pairs.images, pairs.masks), pairs.words
    network = work.new("unet")
    if work.start is None:
        nn.init.zeros_(network.conv_out.weight)  # the first prediction is the mean, 0
    task = TextToImageTask(network, text, tokenizer, single, wide, cfg)
    work.fit("unet", task, cfg.train)


def captioner(work: Workspace) -> None:
    """LLaVA on the frozen image tower."""
    cfg, llava = work.cfg.captioner, work.new("llava")
    llava.tower = work.trained("clip", "vision")
    task = CaptionTask(llava, work.images("train"), work.llama_tokenizer(), cfg)
    work.fit("captioner", task, cfg.train)


def base(work: Workspace) -> None:
    """The frozen networks as a bundle, and the training data as shards."""
    work.ranks.once(lambda: _write_bundle(work))
    work.ranks.once(lambda: write_singles(work, "mixed"))
    work.ranks.once(lambda: write_pairs(work))


STAGES: dict[str, Callable[[Workspace], None]] = {
    stage.__name__: stage
    for stage in (tokenizers, vae, clip, judges, sam, unet, captioner, base, decoder, adapters)
}


FINISHED, REPORT = next(reversed(STAGES)), "report"


# --- measures for the gates; rank 0 computes them on held-out images ---------------------------------


@torch.no_grad()
def _vae_numbers(work: Workspace) -> dict[str, float]:
    """PSNR in dB of images, and of all subjects together; also writes the scaling of the latents."""
    network, held = work.trained("vae", "vae"), work.images("val")
    pixels = to_pixels(held.images[: work.cfg.vae.held_out])  # (N, 3, S, S)
    mean, _ = network.encode(pixels)  # (N, Z, h, w)
    error = (network.decode(mean).clamp(-1, 1) - pixels).square()  # (N, 3, S, S)
    on = held.masks[: len(pixels)] / 255  # (N, 1, S, S)
    _write_json(work.folder / "scaling.json", {"scaling": 1 / mean.std().item()})
    for kind in ("single", "wide"):  # they may come from another autoencoder
        work.latents(kind).unlink(missing_ok=True)
    return {
        "psnr": _decibels(error.mean(dim=(1, 2, 3))).mean().item(),
        "subject_psnr": _decibels((error * on).sum() / (pixels.shape[1] * on.sum())).item(),
    }


@torch.no_grad()
def _clip_numbers(work: Workspace) -> dict[str, float]:
    """Share of images whose own caption is the nearest in a batch."""
    cfg, tokenizer = work.cfg.clip, work.clip_tokenizer()
    text, vision = work.trained("clip", "text"), work.trained("clip", "vision")
    heads = {name: t.read() for name, t in read_checkpoint(work.weights("clip", "heads")).items()}
    held, hits = work.images("val"), []
    for start in range(0, cfg.held_out, cfg.train.batch_size):
        rows = slice(start, start + cfg.train.batch_size)
        seen = vision(to_clip(held.images[rows]))[1] @ heads["vision_head.weight"].T  # (B, P)
        read = text(tokenizer.ids([w.rich for w in held.words[rows]]))[1] @ heads["text_head.weight"].T
        nearest = F.normalize(seen, dim=1) @ F.normalize(read, dim=1).T  # (B, B)
        hits.append(nearest.argmax(dim=1) == torch.arange(len(seen)))
    return {"retrieval": torch.cat(hits).float().mean().item()}


def _judges_numbers(work: Workspace) -> dict[str, float]:
    """Accuracy of the classifiers on renders of one subject and, as "pair ...", on views of two."""
    probes, world = work.probes(), work.cfg.world
    wide = classifiers.views_of_pairs(work.arrays("val_pairs"), "val", probes.cfg.view, world)
    pairs = classifiers.accuracy(probes, wide, world)
    single = classifiers.accuracy(probes, work.arrays("val"), world)
    return single | {f"pair {name}": value for name, value in pairs.items()}


@torch.no_grad()
def _sam_numbers(work: Workspace) -> dict[str, float]:
    """Mean IoU of the subjects that SAM finds without a click, and of two by a box or a click on each."""
    network, cfg = work.trained("sam", "sam"), work.cfg.segmenting
    for parameter in network.parameters():
        parameter.data = parameter.to(work.cfg.dtype).float()  # as in the bundle
    segmenter = Segmenter(network)

    def found(images: Tensor, masks: Tensor, hints: Sequence[Mapping[str, Any]]) -> float:
        true, seen = masks > BYTE // 2, torch.zeros_like(masks, dtype=torch.bool)  # (N, H, W)
        for i, (image, hint) in enumerate(zip(images, hints, strict=True)):
            with suppress(ValueError):  # where no object is found
                mask = segmenter.subject_mask(Image.fromarray(image.permute(1, 2, 0).numpy()), **hint)
                seen[i] = torch.from_numpy(np.asarray(mask) > 0)
        return iou(seen, true).mean().item()

    held, pairs = work.images("val"), work.pairs("val")
    images = pairs.images[: cfg.asked_pairs].repeat_interleave(2, dim=0)  # (2N, 3, S, W)
    masks = pairs.masks[: cfg.asked_pairs].flatten(0, 1)  # (2N, S, W)
    boxes, clicks = zip(*(hints(mask > BYTE // 2) for mask in masks), strict=True)
    return {
        "iou": found(held.images[: cfg.asked], held.masks[: cfg.asked, 0], [{}] * cfg.asked),
        "pair iou": found(images, masks, [{"box": box} for box in boxes]),
        "pair iou of a click": found(images, masks, [{"point": click} for click in clicks]),
    }


def _unet_numbers(work: Workspace) -> dict[str, float]:
    """What the base can do by itself; also saves a sheet of single and wide images."""
    model, cfg = work.base_model(), work.cfg.base_numbers
    save_png(work.folder / "unet" / "drawn.png", base_sheet(model, cfg))
    return base_numbers(model, cfg)


@torch.no_grad()
def _captioner_numbers(work: Workspace) -> dict[str, float]:
    """Share of images whose description names their class and main colour."""
    cfg, tokenizer, held = work.cfg.captioner, work.llama_tokenizer(), work.images("val")
    config = work.networks()["llava"]
    files = {"": [work.weights("captioner", "llava")], "tower.": [work.weights("clip", "vision")]}
    llava = load_into(lambda: build_network("llava", config), files, "cpu", torch.float32).eval()
    ids = [torch.tensor(tokenizer.encode_with_image(cfg.dialogues[0][0]))] * cfg.asked
    answers = llava.generate(to_clip(held.images[: cfg.asked]), ids, max_new=cfg.answer_tokens)
    right = [
        set(tokenizer.decode(answer).split()) >= {*w.rich.split()[1:2], w.label}
        for answer, w in zip(answers, held.words, strict=False)
    ]
    return {"right": float(np.mean(right))}


# The report measures the other stages.
NUMBERS: dict[str, Callable[[Workspace], dict[str, float]]] = {
    "vae": _vae_numbers, "clip": _clip_numbers, "judges": _judges_numbers, "sam": _sam_numbers,
    "unet": _unet_numbers, "captioner": _captioner_numbers,
}  # fmt: skip


# --- parts of the stages -----------------------------------------------------------------------------


def _learn_vocabularies(work: Workspace, words: Sequence[Words], pairs: Sequence[PairWords]) -> None:
    """Learn the vocabularies of the captions, or copy those of the start."""
    if work.start:
        work.tokenizers.mkdir(exist_ok=True)
        for name in (*CLIP_TOKENIZER, *LLAMA_TOKENIZER):
            shutil.copyfile(work.start.tokenizer(name), work.tokenizers / name)
        return
    texts = {t for w in words for t in (sd_prompt(w.label, w.caption), w.rich, w.subject)}
    clip = sorted(texts | {t.text for w in pairs for t in w[1:]})
    talks = (f"{question} {answer}" for question, answer in work.cfg.captioner.dialogues)
    forms = [talk.replace("<image>", "") for talk in talks]
    llama = sorted({form.format(**vars(w)) for form in forms for w in words})
    learn_tokenizers(work.tokenizers, clip, work.cfg.clip_merges, llama, work.cfg.llama_pieces)


def _latents(work: Workspace, kind: str, images: Tensor, masks: Tensor) -> Latents:
    """Scaled posteriors of images (N, 3, S, W), computed once, and their masks (N, 1 or 2, S, W), smaller."""
    path, factor = work.latents(kind), work.cfg.networks["vae"].factor
    work.ranks.once(lambda: path.exists() or _encode(work, path, images))
    found = read_checkpoint(path)
    small = F.avg_pool2d(masks.float(), factor).round().byte()  # (N, 1 or 2, h, w)
    return Latents(found["mean"].read(), found["std"].read(), small)


@torch.no_grad()
def _encode(work: Workspace, path: Path, images: Tensor) -> None:
    """Write the scaled mean and standard deviation of each image's posterior, bf16 (N, Z, h, w)."""
    network, scaling = work.trained("vae", "vae"), work.networks()["vae"].scaling
    network.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [network.encode(to_pixels(part)) for part in images.split(work.cfg.encode_batch)]
    both = zip(("mean", "std"), zip(*parts, strict=True), strict=True)
    found = {name: (torch.cat(part) * scaling).bfloat16() for name, part in both}
    save_tensors(path.parent, path.stem, found)


def _write_bundle(work: Workspace) -> None:
    """Write the frozen networks, without an adapter, to the folder "base"."""
    stages = {"vae": "vae", "text": "clip", "vision": "clip", "unet": "unet", "sam": "sam"}
    stages |= {"llava": "captioner"}
    with BundleWriter(work.folder / "base", work.cfg.world.size, overwrite=True) as writer:
        for name in (*CLIP_TOKENIZER, *LLAMA_TOKENIZER):
            writer.add_tokenizer(name, work.tokenizers / name)
        networks = work.networks()
        networks["llava"] = replace(networks["llava"], llama=replace(networks["llava"].llama, lm_head=False))
        for name, stage in stages.items():
            tensors = exact_frequencies(read_checkpoint(work.weights(stage, name)))
            own = {key: tensor for key, tensor in tensors.items() if not key.startswith(LM_HEAD)}
            writer.add(name, networks[name], own, SOURCE, work.cfg.dtype)
        writer.method = dict(work.cfg.method)


def _decibels(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error on pixels in [-1, 1]."""
    return 10 * torch.log10(4 / error)


def _write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")


def _check_shares(work: Workspace) -> None:
    """ValueError unless the ranks can share the batches of all stages equally."""
    for part in work.cfg.trainings().values():
        work.share_of(part.train.batch_size)
    work.share_of(work.cfg.adapter_batch)
    classifiers.groups_in(work.share_of(work.cfg.probes.train.batch_size), work.cfg.probes)


# --- the recipe --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe. ValueError for wrong arguments, and for a missed gate."""
    set_precision()
    args = _parse(argv)
    start = Bundle.open(args.start) if args.start else None
    if start:
        refuse_quantised(start)
        _check_kept(args.keep, start)
    check_writable("--work", args.work)
    check_writable("--out", args.out.parent)
    cfg = MiniConfig() if args.length == 1 else MiniConfig().shortened(args.length)
    with start_ranks(args.device) as ranks:
        work = Workspace(cfg, args.work, ranks, start, tuple(args.keep))
        recipe(work, FINISHED if args.until == REPORT else args.until, args.past_gates)
        if args.until in (FINISHED, REPORT):
            ranks.once(lambda: finish(work, args.out))
        if args.ablations:
            ablations(work)
    if args.until == REPORT:
        report.main(_report_options(args, cfg))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train MoMA-mini from nothing.")
    add = parser.add_argument
    add("--work", type=Path, default=Path("out/mini"), help="folder for every stage's result")
    add("--out", type=Path, default=Path("out/weights-mini"), help="the finished bundle")
    add("--start", type=Path, help="bundle whose networks are trained further (default: random weights)")
    about = "take these from --start as they are"
    add("--keep", nargs="*", default=(), choices=KEEPABLE, metavar="STAGE", help=about)
    add("--until", choices=(*STAGES, REPORT), default=FINISHED, help="the last stage to run")
    add("--past-gates", action="store_true", help="go on where a stage misses its gate, and say so")
    add("--ablations", action="store_true", help="train the ablations as well")
    about = "of renders and steps, without gates (default: 1)"
    add("--length", type=float, default=1.0, metavar="SHARE", help=about)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.until in (FINISHED, REPORT) and any(args.out.glob("*")):
        raise ValueError(f"--out {args.out}: not empty, expected a new folder")
    if args.keep and not args.start:
        raise ValueError(f"--keep {' '.join(args.keep)}: expected --start, the bundle to take them from")
    if not 0 < args.length <= 1:
        raise ValueError(f"--length {args.length}: expected above 0, at most 1")
    return args


def _check_kept(stages: Sequence[str], start: Bundle) -> None:
    """ValueError for stages that the start does not hold, or that need others of it."""
    if "unet" in stages and (missing := {"vae", "clip"} - set(stages)):
        raise ValueError(
            f"--keep unet: expected {' and '.join(sorted(missing))} as well, which it was made for"
        )
    for stage in stages:
        for name in KEEPABLE[stage]:
            found = (start.folder / FILES[name]).exists() if name in FILES else name in start.configs
            if not found:
                raise ValueError(f"--keep {stage}: {start.folder} has no {FILES.get(name, name)}")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("pretrain", lambda: main(argv))


def recipe(work: Workspace, until: str, past_gates: bool = False) -> None:
    """Run the stages up to one; those that are done are skipped.

    Args:
        work: where.
        until: the last stage.
        past_gates: whether to go on where a stage misses its gate; else a ValueError says so.
    """
    _check_shares(work)
    for name, stage in STAGES.items():
        done = work.folder / f"{name}.json"
        if not work.ranks.once(done.exists):
            if name in work.kept:
                work.ranks.once(partial(work.take, name))
            else:
                stage(work)
            kept = name == "captioner" and name in work.kept  # it may not be able to write
            measured = name in NUMBERS and not kept
            numbers = work.ranks.once(partial(NUMBERS[name], work)) if measured else {}
            if work.ranks.main:
                print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
            for key, (least, most) in work.cfg.gates.get(name, {}).items() if measured else ():
                if not least <= numbers[key] <= most:
                    found = f"{name}: {key} is {numbers[key]:.3f}, expected {least} to {most}"
                    if not past_gates:
                        raise ValueError(f"{found}: train it longer, or give --past-gates")
                    print(f"note: {found}", file=sys.stderr)
            work.ranks.once(partial(_write_json, done, numbers))
        if name == until:
            return


def finish(work: Workspace, target: Path) -> None:
    """Write the finished bundle, the last adapter's, and beside it the scorers of `python -m moma.evaluate
    --world` and what the world looks like."""
    name, last = list(work.cfg.adapters.items())[-1]
    export = work.folder / "adapters" / name / EXPORT
    put_in(export, bundle_of(work, last.start), target, dtype_name(work.cfg.dtype))
    write_scorers(target, work.weights("judges", "probes"), work.weights("clip", "heads"))
    fit_familiar(work.cfg.world, work.cfg.familiar).save(target)


def _report_options(args: argparse.Namespace, cfg: MiniConfig) -> list[str]:
    asked, numbers = ReportConfig(), ("pairs", "textures", "duos")
    sizes = {f"--{name}": max(1, round(args.length * getattr(asked, name))) for name in numbers}
    paths = {"--bundle": args.out, "--probes": args.out / PROBES, "--work": args.work / "drawn"}
    given = paths | sizes | {"--page": args.work / "report.md", "--device": args.device}
    return [str(part) for option in given.items() for part in option]


if __name__ == "__main__":
    sys.exit(run())
