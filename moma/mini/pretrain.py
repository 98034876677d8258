"""The whole recipe of MoMA-mini: `python -m moma.mini.pretrain --work DIR --out weights/mini`.

Renders the world, trains every frozen network from scratch, then runs `train.py stage1` and `train.py stage2`
on shards of triplets as for any other data. Every stage can be interrupted and goes on where it was; each has
a gate, a number that must be reached before the next stage begins. Under torchrun the ranks train together,
and rank 0 does the rest; on CPUs, one process for each core is the fastest.

Letters: N images, S image side, Z latent channels, h w latents.
"""

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import convert_weights
import train
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.weights.loading import load_into, read_checkpoint, save_tensors
from moma.app.files import exit_status, write_text
from moma.app.record import save_png
from moma.app.sheets import Cell, contact_sheet
from moma.data.shards import ShardWriter
from moma.evaluate.world import write_scorers
from moma.inputs.segment import Segmenter
from moma.methods.prompts import sd_prompt
from moma.mini import SOURCE
from moma.mini.config import MiniConfig
from moma.mini.segmenting import SegmentTask
from moma.mini.tasks import (
    CaptionTask,
    ClipTask,
    Images,
    PretrainingTask,
    TextToImageTask,
    VAETask,
    to_clip,
    to_vae,
)
from moma.sampling.device import set_precision
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.sampler import TextOnly, denoise
from moma.training.checkpoint import check_same, checkpoints
from moma.training.common import refuse_quantised
from moma.training.config import TrainConfig
from moma.training.loop import EXPORT, fit
from moma.training.parallel import Ranks, start_ranks
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER, Bundle, BundleWriter, build_network
from moma.weights.sources import exact_frequencies
from moma.weights.tiny import learn_tokenizers, with_vocabularies
from moma.world import classifiers
from moma.world.classifiers import BYTE
from moma.world.measures import iou
from moma.world.words import Words, words_of_renders
from moma.world.world import CLASSES, draw, render_many, spec, trained_elsewhere

T = TypeVar("T")


@dataclass(frozen=True)
class Workspace:
    """Where the recipe works. `work` keeps every stage's result, so that a stage is never done twice."""

    cfg: MiniConfig
    work: Path
    ranks: Ranks
    start: Bundle | None = None  # whose networks are trained on; None = random ones

    # --- the stages' results ---

    def once(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, known to all; the others wait for it."""
        return self.ranks.once(make)

    def keep(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> None:
        """Named arrays in a file, made once; on all ranks."""
        path = self.work / f"{name}.npz"

        def write() -> None:
            if not path.exists():
                np.savez(part := path.with_suffix(".part.npz"), **make())
                os.replace(part, path)

        self.once(write)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What `keep` wrote; of "train" and "val", `world.render_many`'s."""
        with np.load(self.work / f"{name}.npz") as found:
            return dict(found)

    def images(self, split: str) -> Images:
        found = self.arrays(split)
        images = torch.from_numpy(found["image"]).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
        masks = torch.from_numpy(found["mask"])[:, None]  # (N, 1, S, S)
        return Images(images, masks, words_of_renders(found, self.cfg.world))

    @property
    def tokenizers(self) -> Path:
        return self.work / "tokenizers"

    @property
    def latents(self) -> Path:
        return self.work / "latents.safetensors"

    def networks(self) -> dict[str, Any]:
        """Sizes, with the vocabularies and the VAE's scaling as far as they are known."""
        networks = with_vocabularies(self.cfg.networks, self.tokenizers)
        scaling = self.work / "scaling.json"
        if scaling.exists():
            networks["vae"] = replace(networks["vae"], scaling=json.loads(scaling.read_text())["scaling"])
        return networks

    def clip_tokenizer(self) -> ClipTokenizer:
        files = (self.tokenizers / name for name in CLIP_TOKENIZER)
        return ClipTokenizer(*files, self.cfg.networks["text"].positions)

    def llama_tokenizer(self) -> LlamaTokenizer:
        return LlamaTokenizer(self.tokenizers / LLAMA_TOKENIZER[0])

    def new(self, name: str) -> nn.Module:
        """A network to train: the start's, or with weights drawn by torch from a seed of its own."""
        if self.start:
            return self.start.build(name, "cpu", torch.float32, lm_head=name == "llava").requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.seeds[name])
            return build_network(name, self.networks()[name], self.networks()["unet"])

    def weights(self, stage: str, name: str) -> Path:
        return self.work / stage / EXPORT / f"{name}.safetensors"

    def trained(self, stage: str, name: str) -> nn.Module:
        """A network as a finished stage left it."""
        config, path = self.networks()[name], self.weights(stage, name)
        return load_into(lambda: build_network(name, config), [path], "cpu", torch.float32).eval()

    def judges(self) -> classifiers.Probes:
        return classifiers.load_probes(self.weights("judges", "probes"), self.cfg.probes)

    def share_of(self, batch: int) -> int:
        """This rank's samples of a step's. ValueError where it cannot be shared equally."""
        if batch % self.ranks.world:
            raise ValueError(f"{self.ranks.world} ranks: a step's {batch} samples cannot be shared equally")
        return batch // self.ranks.world

    def fit(self, stage: str, task: PretrainingTask, cfg: TrainConfig) -> None:
        """Train a task in work/<stage>, from its last checkpoint if there is one.

        ValueError for a checkpoint of another training.
        """
        out, cfg = self.work / stage, replace(cfg, batch_size=self.share_of(cfg.batch_size))
        identity = {"stage": stage, "train": cfg.identity(self.ranks.world)}
        saved = next(reversed(self.once(lambda: checkpoints(out))), None)
        if saved:
            check_same(saved, identity, cfg.steps)
        task.model.to(self.ranks.device)
        fit(task, cfg, out, self.ranks, identity, saved)


# --- the stages: all ranks run them ------------------------------------------------------------------


def tokenizers(workspace: Workspace) -> None:
    """The renders; BPE and sentencepiece vocabularies of their captions."""
    for split, number in (("train", workspace.cfg.images), ("val", workspace.cfg.unseen_images)):
        given = range(number), split, workspace.cfg.world, os.cpu_count() or 1
        workspace.keep(split, partial(render_many, *given))
    words = workspace.images("train").words[: workspace.cfg.tokenizer_captions]
    workspace.once(lambda: learn_vocabularies(workspace, words))


def vae(workspace: Workspace) -> None:
    """The autoencoder."""
    cfg, images = workspace.cfg.vae, workspace.images("train")
    workspace.fit("vae", VAETask(workspace.new("vae"), images, cfg, cfg.train.seed), cfg.train)


def clip(workspace: Workspace) -> None:
    """Text and image encoder."""
    cfg, images, tokenizer = workspace.cfg.clip, workspace.images("train"), workspace.clip_tokenizer()
    task = ClipTask(workspace.new("text"), workspace.new("vision"), images, tokenizer, cfg, cfg.train.seed)
    workspace.fit("clip", task, cfg.train)


def judges(workspace: Workspace) -> None:
    """The probes, trained on renders alone; only gates and the report ask them."""
    cfg, world = workspace.cfg.probes, workspace.cfg.world
    first = {name: values[: cfg.pairs] for name, values in workspace.arrays("train").items()}
    workspace.keep("second", lambda: classifiers.second_images(first, world))
    task = classifiers.probe_task(first, workspace.arrays("second"), world, cfg)
    workspace.fit("judges", task, cfg.train)


def sam(workspace: Workspace) -> None:
    """SAM, for references without a mask."""
    cfg = workspace.cfg.segmenting
    workspace.fit(
        "sam", SegmentTask(workspace.new("sam"), workspace.images("train"), cfg, cfg.train.seed), cfg.train
    )


def unet(workspace: Workspace) -> None:
    """The text-to-image UNet."""
    cfg, text, tokenizer = (
        workspace.cfg.text_to_image,
        workspace.trained("clip", "text"),
        workspace.clip_tokenizer(),
    )
    images = workspace.images("train")
    workspace.once(lambda: encode_latents(workspace, images.images))
    found = read_checkpoint(workspace.latents)
    latents, words = (found["mean"].read(), found["std"].read()), images.words
    network = workspace.new("unet").to(memory_format=torch.channels_last)
    if workspace.start is None:
        nn.init.zeros_(network.conv_out.weight)  # the first prediction is the mean, 0
    task = TextToImageTask(network, latents, words, text, tokenizer, cfg, cfg.train.seed)
    workspace.fit("unet", task, cfg.train)


def captioner(workspace: Workspace) -> None:
    """LLaVA on the frozen image tower."""
    cfg, llava = workspace.cfg.captioner, workspace.new("llava")
    llava.tower = workspace.trained("clip", "vision")
    task = CaptionTask(llava, workspace.images("train"), workspace.llama_tokenizer(), cfg, cfg.train.seed)
    workspace.fit("captioner", task, cfg.train)


def base(workspace: Workspace) -> None:
    """The frozen networks as a bundle, and the training data as shards."""
    workspace.once(lambda: write_bundle(workspace))
    workspace.once(lambda: write_triplets(workspace))


def stage1(workspace: Workspace) -> None:
    """The decoder (Eq. 4) by train.py."""
    run_training(
        "stage1", workspace, workspace.work / "base", workspace.work / "stage1", workspace.cfg.stage1_options
    )
    workspace.once(
        lambda: put_in(
            workspace.work / "stage1" / EXPORT, workspace.work / "base", workspace.work / "decoder"
        )
    )


def stage2(workspace: Workspace) -> None:
    """The adapter (Eq. 1) by train.py, and the variants that the report compares it with."""
    for name, options in {"moma": (), **workspace.cfg.variants}.items():
        own = [option.format(work=workspace.work) for option in options]
        out, target = workspace.work / "stage2" / name, workspace.work / "bundles" / name
        given = (*workspace.cfg.stage2_options, *own, "--cache", str(workspace.work / "caches" / name))
        run_training("stage2", workspace, workspace.work / "decoder", out, given)
        workspace.once(partial(put_in, out / EXPORT, workspace.work / "decoder", target))


STAGES: dict[str, Callable[[Workspace], None]] = {
    stage.__name__: stage
    for stage in (tokenizers, vae, clip, judges, sam, unet, captioner, base, stage1, stage2)
}


# --- what the gates read: rank 0 measures on held-out images ----------------------------------------


@torch.no_grad()
def vae_numbers(workspace: Workspace) -> dict[str, float]:
    """PSNR in dB, of images and of all subjects together; also fixes the scaling of the latents."""
    network, held = workspace.trained("vae", "vae"), workspace.images("val")
    pixels = to_vae(held.images[: workspace.cfg.vae.held_out])  # (N, 3, S, S)
    mean, _ = network.encode(pixels)  # (N, Z, h, w)
    error = (network.decode(mean).clamp(-1, 1) - pixels).square()  # (N, 3, S, S)
    on = held.masks[: len(pixels)] / 255  # (N, 1, S, S)
    write_json(workspace.work / "scaling.json", {"scaling": 1 / mean.std().item()})
    workspace.latents.unlink(missing_ok=True)  # those of an earlier autoencoder
    return {
        "psnr": decibels(error.mean(dim=(1, 2, 3))).mean().item(),
        "subject_psnr": decibels((error * on).sum() / (pixels.shape[1] * on.sum())).item(),
    }


@torch.no_grad()
def clip_numbers(workspace: Workspace) -> dict[str, float]:
    """Share of images whose own caption is the nearest of a batch."""
    cfg, tokenizer = workspace.cfg.clip, workspace.clip_tokenizer()
    text, vision = workspace.trained("clip", "text"), workspace.trained("clip", "vision")
    heads = {name: t.read() for name, t in read_checkpoint(workspace.weights("clip", "heads")).items()}
    held, hits = workspace.images("val"), []
    for start in range(0, cfg.held_out, cfg.train.batch_size):
        rows = slice(start, start + cfg.train.batch_size)
        seen = vision(to_clip(held.images[rows]))[1] @ heads["vision_head.weight"].T  # (B, P)
        read = text(tokenizer.ids([w.rich for w in held.words[rows]]))[1] @ heads["text_head.weight"].T
        nearest = nn.functional.normalize(seen, dim=1) @ nn.functional.normalize(read, dim=1).T  # (B, B)
        hits.append(nearest.argmax(dim=1) == torch.arange(len(seen)))
    return {"retrieval": torch.cat(hits).float().mean().item()}


def judges_numbers(workspace: Workspace) -> dict[str, float]:
    """How often the judges are right about renders."""
    return classifiers.accuracy(workspace.judges(), workspace.arrays("val"), workspace.cfg.world)


@torch.no_grad()
def sam_numbers(workspace: Workspace) -> dict[str, float]:
    """Mean IoU of the subjects that are found without a click."""
    network, held = workspace.trained("sam", "sam"), workspace.images("val")
    for parameter in network.parameters():
        parameter.data = parameter.to(workspace.cfg.dtype).float()  # as the bundle keeps them
    segmenter = Segmenter(network)
    true = held.masks[: workspace.cfg.segmenting.asked, 0] > BYTE // 2  # (N, S, S)
    found = torch.zeros_like(true)
    for i, image in enumerate(held.images[: len(true)]):
        with suppress(ValueError):  # where no object is found
            mask = segmenter.subject_mask(Image.fromarray(image.permute(1, 2, 0).numpy()))
            found[i] = torch.from_numpy(np.asarray(mask) > 0)
    return {"iou": iou(found, true).mean().item()}


def unet_numbers(workspace: Workspace) -> dict[str, float]:
    """Share of drawn images whose class, and scene, the judges recognise; also saves some as a sheet."""
    cfg = workspace.cfg.text_to_image
    asked = [spec(i, "val", workspace.cfg.world) for i in range(cfg.drawn)]
    words = workspace.images("val").words[: cfg.drawn]
    images = draw_texts(workspace, [sd_prompt(w.label, w.caption) for w in words])
    rows = [[Cell(Image.fromarray(image), ())] for image in images[: cfg.shown]]
    save_png(workspace.work / "unet" / "drawn.png", contact_sheet(rows))
    return classifiers.agreement(workspace.judges(), images, asked)


@torch.no_grad()
def captioner_numbers(workspace: Workspace) -> dict[str, float]:
    """Share of images described with their class and main colour."""
    cfg, tokenizer, held = workspace.cfg.captioner, workspace.llama_tokenizer(), workspace.images("val")
    config = workspace.networks()["llava"]
    files = {"": [workspace.weights("captioner", "llava")], "tower.": [workspace.weights("clip", "vision")]}
    llava = load_into(lambda: build_network("llava", config), files, "cpu", torch.float32).eval()
    ids = [torch.tensor(tokenizer.encode_with_image(cfg.dialogues[0][0]))] * cfg.asked
    answers = llava.generate(to_clip(held.images[: cfg.asked]), ids, max_new=cfg.answer_tokens)
    right = [
        set(tokenizer.decode(answer).split()) >= {*w.rich.split()[1:2], w.label}
        for answer, w in zip(answers, held.words, strict=False)
    ]
    return {"right": float(np.mean(right))}


# What comes of the others, the report measures.
NUMBERS: dict[str, Callable[[Workspace], dict[str, float]]] = {
    "vae": vae_numbers, "clip": clip_numbers, "judges": judges_numbers, "sam": sam_numbers,
    "unet": unet_numbers, "captioner": captioner_numbers,
}  # fmt: skip


# --- their parts -------------------------------------------------------------------------------------


def learn_vocabularies(workspace: Workspace, words: Sequence[Words]) -> None:
    """Those of the captions, or the start's."""
    if workspace.start:
        workspace.tokenizers.mkdir(exist_ok=True)
        for name in (*CLIP_TOKENIZER, *LLAMA_TOKENIZER):
            shutil.copyfile(workspace.start.tokenizer(name), workspace.tokenizers / name)
        return
    clip = sorted({t for w in words for t in (sd_prompt(w.label, w.caption), w.rich, w.subject)})
    talks = (f"{question} {answer}" for question, answer in workspace.cfg.captioner.dialogues)
    forms = [talk.replace("<image>", "") for talk in talks]
    llama = sorted({form.format(**vars(w)) for form in forms for w in words})
    learn_tokenizers(workspace.tokenizers, clip, workspace.cfg.clip_merges, llama, workspace.cfg.llama_pieces)


@torch.no_grad()
def encode_latents(workspace: Workspace, images: Tensor) -> None:
    """Mean and deviation of every image's posterior, scaled, bf16 (N, Z, h, w) each; once.

    images: uint8 (N, 3, S, S).
    """
    if workspace.latents.exists():
        return
    network, scaling = workspace.trained("vae", "vae"), workspace.networks()["vae"].scaling
    parts = [network.encode(to_vae(part)) for part in images.split(workspace.cfg.encode_batch)]
    both = zip(("mean", "std"), zip(*parts, strict=True), strict=True)
    found = {name: (torch.cat(part) * scaling).bfloat16() for name, part in both}
    save_tensors(workspace.work, workspace.latents.stem, found)


@torch.no_grad()
def draw_texts(workspace: Workspace, prompts: list[str]) -> np.ndarray:
    """Images of the plain UNet, (N, S, S, 3) uint8; seed i for image i."""
    cfg, sample, dtype = workspace.networks(), workspace.cfg.sample, torch.bfloat16
    networks = {"unet": workspace.trained("unet", "unet"), "vae": workspace.trained("vae", "vae")}
    text, tokenizer = workspace.trained("clip", "text"), workspace.clip_tokenizer()
    path = solver_steps(ScheduleConfig(), sample.steps, sample.solver)
    side = workspace.cfg.world.size // cfg["vae"].factor
    images = []
    for start in range(0, len(prompts), sample.batch_size):
        part = prompts[start : start + sample.batch_size]
        states = text(tokenizer.ids([*[""] * len(part), *part]))[0].to(dtype)  # (2B, T, C)
        seeds = range(start, start + len(part))
        noise = [
            torch.randn(cfg["unet"].in_channels, side, side, generator=torch.Generator().manual_seed(i))
            for i in seeds
        ]
        with torch.autocast("cpu", dtype):
            *_, last = denoise(
                networks["unet"], TextOnly(states), path, torch.stack(noise), sample.guidance, sample.solver
            )
            pixels = networks["vae"].decode(last.latents / cfg["vae"].scaling).float()  # (B, 3, S, S)
        images.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1))
    return torch.cat(images).numpy()


def write_bundle(workspace: Workspace) -> None:
    """The frozen networks, without an adapter, in work/base."""
    stages = {
        "vae": "vae",
        "text": "clip",
        "vision": "clip",
        "unet": "unet",
        "llava": "captioner",
        "sam": "sam",
    }
    with BundleWriter(workspace.work / "base", workspace.cfg.world.size, overwrite=True) as writer:
        for name in (*CLIP_TOKENIZER, *LLAMA_TOKENIZER):
            writer.add_tokenizer(name, workspace.tokenizers / name)
        networks = workspace.networks()
        for name, stage in stages.items():
            tensors = exact_frequencies(read_checkpoint(workspace.weights(stage, name)))
            writer.add(name, networks[name], tensors, SOURCE, workspace.cfg.dtype)
        writer.method = dict(workspace.cfg.method)


def write_triplets(workspace: Workspace) -> None:
    """The training images as shards; the reference of "pairs" is another render of the same identity."""
    for folder, paired in (("triplets", False), ("pairs", True)):
        found = workspace.arrays("train")
        with ShardWriter(workspace.work / folder) as shards:
            done = shards.done_keys()
            for i in range(workspace.cfg.triplets):
                if (key := f"{i:06}") in done:
                    continue
                label, caption = CLASSES[found["label"][i]], str(found["caption"][i])
                other = None
                if paired:
                    shown = spec(i, "train", workspace.cfg.world)
                    twin = draw(trained_elsewhere(shown, i), workspace.cfg.world)
                    other = (png(twin.image), png(twin.mask))
                shards.add(
                    key, png(found["image"][i]), "png", png(found["mask"][i]), label, caption, reference=other
                )


def run_training(stage: str, workspace: Workspace, bundle: Path, out: Path, options: Sequence[str]) -> None:
    """`python train.py STAGE ...` on all ranks; SystemExit if it fails."""
    given = {
        "--bundle": bundle, "--data": workspace.work / "triplets", "--out": out,
        "--batch-size": workspace.share_of(workspace.cfg.stage_batch), "--device":
        workspace.ranks.device.type,
    }  # fmt: skip
    texts = [str(part) for option in given.items() for part in option]
    if train.run([stage, "--resume", *texts, *options]):
        raise SystemExit(2)


def put_in(export: Path, bundle: Path, target: Path) -> None:
    """`python convert_weights.py EXPORT --base-bundle BUNDLE --out TARGET --overwrite`."""
    options = [str(export), "--base-bundle", str(bundle), "--out", str(target), "--overwrite"]
    if convert_weights.main(options):
        raise SystemExit(2)


def add_scorers(workspace: Workspace, target: Path) -> None:
    """What images are judged with, beside the finished bundle."""
    write_scorers(target, workspace.weights("judges", "probes"), workspace.weights("clip", "heads"))


def decibels(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of a mean squared error on pixels in [-1, 1]."""
    return 10 * torch.log10(4 / error)


def png(array: np.ndarray) -> bytes:
    """An image or mask as a PNG file."""
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")


def check_shares(workspace: Workspace) -> None:
    """ValueError unless every step's samples can be shared among the ranks."""
    cfg = workspace.cfg
    for part in (cfg.vae, cfg.clip, cfg.probes, cfg.segmenting, cfg.text_to_image, cfg.captioner):
        workspace.share_of(part.train.batch_size)
    workspace.share_of(cfg.stage_batch)
    classifiers.groups_in(workspace.share_of(cfg.probes.train.batch_size), cfg.probes)


# --- the recipe --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    parser = argparse.ArgumentParser(description="Train MoMA-mini from nothing.")
    parser.add_argument("--work", type=Path, default=Path("out/mini"), help="keeps every stage's result")
    parser.add_argument("--out", type=Path, default=Path("out/weights-mini"), help="the finished bundle")
    parser.add_argument("--start", type=Path, help="bundle whose networks are trained on (default: random)")
    parser.add_argument("--until", choices=tuple(STAGES), default="stage2", help="the last stage to run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.until == "stage2" and any(args.out.glob("*")):
        raise ValueError(f"--out {args.out}: not empty, expected a new folder")
    start = Bundle.open(args.start) if args.start else None
    if start:
        refuse_quantised(start)
    args.work.mkdir(parents=True, exist_ok=True)
    with start_ranks(args.device) as ranks:
        workspace = Workspace(MiniConfig(), args.work, ranks, start)
        recipe(workspace, args.until)
        if args.until == "stage2":
            workspace.once(
                lambda: put_in(args.work / "stage2" / "moma" / EXPORT, args.work / "decoder", args.out)
            )
            workspace.once(lambda: add_scorers(workspace, args.out))


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("pretrain", lambda: main(argv))


def recipe(workspace: Workspace, until: str) -> None:
    """Every stage up to `until` that is not done yet. ValueError where one misses its gate."""
    check_shares(workspace)
    for name, stage in STAGES.items():
        done = workspace.work / f"{name}.json"
        if not workspace.once(done.exists):
            stage(workspace)
            numbers = workspace.once(partial(NUMBERS[name], workspace)) if name in NUMBERS else {}
            if workspace.ranks.main:
                print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
            for key, least in workspace.cfg.gates.get(name, {}).items():
                if not numbers[key] >= least:
                    raise ValueError(
                        f"{name}: {key} is {numbers[key]:.3f}, expected {least}: train it longer"
                    )
            workspace.once(partial(write_json, done, numbers))
        if name == until:
            return


if __name__ == "__main__":
    sys.exit(run())
