"""The whole recipe of MoMA-mini: `python -m moma.mini.pretrain --work DIR --out weights/mini`.

Renders the world, trains every frozen network from scratch, then runs `train.py` on shards of triplets as for
any other data. An interrupted stage resumes. Most stages have a gate, numbers that they must reach before the
next one begins. Under torchrun the ranks train together and rank 0 does the rest; on CPUs, one process per
core is fastest.

Letters: N images, S image side, Z latent channels, h w latents.
"""

import argparse
import io
import json
import os
import runpy
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
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.weights.files import atomic_write, read_object
from models.weights.loading import load_into, read_checkpoint, save_tensors
from moma.app.files import exit_status, write_text
from moma.app.record import save_png
from moma.data.shards import ShardWriter
from moma.evaluate.world import write_scorers
from moma.inputs.segment import Segmenter
from moma.methods.moma.training import refuse_quantised
from moma.methods.prompts import sd_prompt
from moma.mini import SOURCE
from moma.mini.base_numbers import BaseModel, base_numbers, base_sheet
from moma.mini.config import MiniConfig
from moma.mini.familiar import fit_familiar
from moma.mini.segmenting import SegmentTask
from moma.mini.tasks import (
    CaptionTask,
    ClipTask,
    Images,
    Pairs,
    PretrainingTask,
    VAETask,
    to_clip,
)
from moma.mini.text_to_image import Latents, TextToImageTask
from moma.sampling.device import set_precision
from moma.training.checkpoint import check_same, newest
from moma.training.common import to_pixels
from moma.training.config import TrainConfig
from moma.training.loop import EXPORT, fit
from moma.training.parallel import Ranks, start_ranks
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER, Bundle, BundleWriter, build_network
from moma.weights.sources import exact_frequencies
from moma.weights.tiny import learn_tokenizers, with_vocabularies
from moma.world import classifiers
from moma.world.classifiers import BYTE
from moma.world.measures import iou
from moma.world.pairs import PairWords, pair, pair_words, render_pairs
from moma.world.words import Words, words_of_renders
from moma.world.world import CLASSES, draw, render_many, spec, trained_elsewhere

T = TypeVar("T")
ROOT = Path(__file__).parents[2]  # of the repository's scripts


@dataclass(frozen=True)
class Workspace:
    """Where the recipe works. The folder keeps every stage's result, so that no stage runs twice."""

    cfg: MiniConfig
    folder: Path
    ranks: Ranks
    start: Bundle | None = None  # its networks are trained further; None: random weights
    kept: tuple[str, ...] = ()  # stages that take the start's networks as they are

    # --- the stages' results ---

    def keep(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> None:
        """Make named arrays once and write them to a file; called by all ranks."""
        path = self.folder / f"{name}.npz"

        def write() -> None:
            if not path.exists():
                with atomic_write(path) as part, part.open("wb") as file:
                    np.savez(file, **make())

        self.ranks.once(write)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of `keep`; "train" and "val" are those of `world.render_many`."""
        with np.load(self.folder / f"{name}.npz") as found:
            return dict(found)

    def images(self, split: str) -> Images:
        """The renders of "train" or "val", with their captions."""
        found = self.arrays(split)
        images = torch.from_numpy(found["image"]).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
        masks = torch.from_numpy(found["mask"])[:, None]  # (N, 1, S, S)
        return Images(images, masks, words_of_renders(found, self.cfg.world))

    def pairs(self, split: str) -> Pairs:
        """The renders of "train" or "val" with two subjects, with their captions."""
        found = self.arrays(f"{split}_pairs")
        images = torch.from_numpy(found["image"]).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, W)
        world = self.cfg.world
        words = [pair_words(pair(i, split, world), world) for i in range(len(images))]
        return Pairs(images, torch.from_numpy(found["masks"]), words)

    @property
    def tokenizers(self) -> Path:
        return self.folder / "tokenizers"

    def latents(self, kind: str) -> Path:
        """The file of the encoded "single" or "wide" training images."""
        return self.folder / f"latents_{kind}.safetensors"

    def networks(self) -> dict[str, Any]:
        """Sizes of the networks, with the vocabularies and the VAE's scaling once they are known."""
        networks = with_vocabularies(self.cfg.networks, self.tokenizers)
        scaling = self.folder / "scaling.json"
        if scaling.exists():
            networks["vae"] = replace(networks["vae"], scaling=read_object(scaling)["scaling"])
        return networks

    def clip_tokenizer(self) -> ClipTokenizer:
        files = (self.tokenizers / name for name in CLIP_TOKENIZER)
        return ClipTokenizer(*files, self.cfg.networks["text"].positions)

    def llama_tokenizer(self) -> LlamaTokenizer:
        return LlamaTokenizer(self.tokenizers / LLAMA_TOKENIZER[0])

    def new(self, name: str) -> nn.Module:
        """A network to train: of the start, or with random weights from a seed of its own."""
        if self.start:
            found = self.start.build(name, "cpu", torch.float32, lm_head=name == "llava").requires_grad_()
            return with_positions(found, self.cfg.networks[name].positions) if name == "text" else found
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.seeds[name])
            return build_network(name, self.networks()[name], self.networks()["unet"])

    def weights(self, stage: str, name: str) -> Path:
        """The file of a network that a finished stage has trained."""
        return self.folder / stage / EXPORT / f"{name}.safetensors"

    def trained(self, stage: str, name: str) -> nn.Module:
        """A network that a finished stage has trained."""
        config, path = self.networks()[name], self.weights(stage, name)
        return load_into(lambda: build_network(name, config), [path], "cpu", torch.float32).eval()

    def probes(self) -> classifiers.Probes:
        return classifiers.load_probes(self.weights("judges", "probes"), self.cfg.probes)

    def base_model(self) -> BaseModel:
        """The trained base and its judges."""
        cfg, networks = self.cfg, (self.trained("unet", "unet"), self.trained("vae", "vae"))
        text = self.trained("clip", "text"), self.clip_tokenizer()
        layers = cfg.text_to_image.map_layers
        return BaseModel(*networks, *text, self.probes(), cfg.world, cfg.sample, layers)

    def share_of(self, batch: int) -> int:
        """This rank's samples of a batch. ValueError if the ranks cannot share it equally."""
        if batch % self.ranks.world:
            raise ValueError(f"{self.ranks.world} ranks: a step's {batch} samples cannot be shared equally")
        return batch // self.ranks.world

    def fit(self, stage: str, task: PretrainingTask, cfg: TrainConfig) -> None:
        """Train a task, from its last checkpoint if there is one.

        Args:
            stage: name of the folder for its checkpoints and weights.
            task: what to train.
            cfg: how to train it.

        Raises:
            ValueError: for a checkpoint of another training.
        """
        out, cfg = self.folder / stage, replace(cfg, batch_size=self.share_of(cfg.batch_size))
        if stage in self.kept:
            self.ranks.once(lambda: task.export(out / EXPORT))
            return
        identity = {"stage": stage, "train": cfg.identity(self.ranks.world)}
        saved = self.ranks.once(lambda: newest(out))
        if saved:
            check_same(saved, identity, cfg.steps)
        task.model.to(self.ranks.device)
        fit(task, cfg, out, self.ranks, identity, saved)


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
    work.ranks.once(lambda: learn_vocabularies(work, words, pairs))


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
    task = SegmentTask(work.new("sam"), work.images("train"), cfg)
    work.fit("sam", task, cfg.train)


def unet(work: Workspace) -> None:
    """The text-to-image UNet."""
    cfg, images, pairs = work.cfg.text_to_image, work.images("train"), work.pairs("train")
    text, tokenizer = work.trained("clip", "text"), work.clip_tokenizer()
    single = _latents(work, "single", images.images, images.masks), images.words
    wide = _latents(work, "wide", pairs.images, pairs.masks), pairs.words
    network = work.new("unet").to(memory_format=torch.channels_last)
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
    work.ranks.once(lambda: _write_triplets(work))


def stage1(work: Workspace) -> None:
    """The feature decoder (Eq. 4), trained by train.py."""
    _train(work, "stage1", ("moma:stage1", *work.cfg.stage1_options), "base", "decoder")


def stage2(work: Workspace) -> None:
    """The adapter (Eq. 1) and the variants that the report compares it with, trained by train.py."""
    for name, (training, *own) in work.cfg.stage2.items():
        cache = "--cache", f"{work.folder}/caches/{name}"
        options = [option.format(work=work.folder) for option in (*work.cfg.stage2_options, *own)]
        _train(work, f"stage2/{name}", (training, *options, *cache), "decoder", f"bundles/{name}")


STAGES: dict[str, Callable[[Workspace], None]] = {
    stage.__name__: stage
    for stage in (tokenizers, vae, clip, judges, sam, unet, captioner, base, stage1, stage2)
}


KEEPABLE = ("vae", "sam", "unet", "captioner")  # stages whose networks a bundle holds whole


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
        nearest = nn.functional.normalize(seen, dim=1) @ nn.functional.normalize(read, dim=1).T  # (B, B)
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
    """Mean IoU of the subjects that SAM finds without a click."""
    network, held = work.trained("sam", "sam"), work.images("val")
    for parameter in network.parameters():
        parameter.data = parameter.to(work.cfg.dtype).float()  # as in the bundle
    segmenter = Segmenter(network)
    true = held.masks[: work.cfg.segmenting.asked, 0] > BYTE // 2  # (N, S, S)
    found = torch.zeros_like(true)
    for i, image in enumerate(held.images[: len(true)]):
        with suppress(ValueError):  # where no object is found
            mask = segmenter.subject_mask(Image.fromarray(image.permute(1, 2, 0).numpy()))
            found[i] = torch.from_numpy(np.asarray(mask) > 0)
    return {"iou": iou(found, true).mean().item()}


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


def learn_vocabularies(work: Workspace, words: Sequence[Words], pairs: Sequence[PairWords]) -> None:
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
        for name, stage in stages.items():
            tensors = exact_frequencies(read_checkpoint(work.weights(stage, name)))
            writer.add(name, networks[name], tensors, SOURCE, work.cfg.dtype)
        writer.method = dict(work.cfg.method)


def _write_triplets(work: Workspace) -> None:
    """Write the training images as shards; in "pairs", the reference is another render of the identity."""
    found, world = work.arrays("train"), work.cfg.world
    for folder, paired in (("triplets", False), ("pairs", True)):
        with ShardWriter(work.folder / folder) as shards:
            done = shards.done_keys()
            for i in range(work.cfg.triplets):
                if (key := f"{i:06}") in done:
                    continue
                image, mask = (_png(found[name][i]) for name in ("image", "mask"))
                reference = None
                if paired:
                    twin = draw(trained_elsewhere(spec(i, "train", world), i), world)
                    reference = _png(twin.image), _png(twin.mask)
                words = CLASSES[found["label"][i]], str(found["caption"][i])
                shards.add(key, image, "png", mask, *words, reference=reference)


def _train(work: Workspace, name: str, options: Sequence[str], start: str, target: str) -> None:
    """`train.py` on all ranks, and a bundle with its result; SystemExit if it fails.

    name, start, target: of the folders of the run, of the bundle it starts from and of the new bundle.
    """
    training, *rest = options
    out, share = work.folder / name, work.share_of(work.cfg.stage_batch)
    given = {"--bundle": work.folder / start, "--data": work.folder / "triplets", "--out": out}
    given |= {"--batch-size": share, "--device": work.ranks.device.type}
    texts = [str(part) for option in given.items() for part in option]
    _run_script("train.py", [training, "--resume", *texts, *rest])
    work.ranks.once(lambda: put_in(out / EXPORT, work.folder / start, work.folder / target))


def put_in(export: Path, bundle: Path, target: Path) -> None:
    """Write a bundle with the result of a training.

    Args:
        export: folder of the training's export.
        bundle: that the training started from.
        target: folder of the new bundle.
    """
    options = ("--base-bundle", str(bundle), "--out", str(target), "--overwrite")
    _run_script("convert_weights.py", [str(export), *options])


def _run_script(name: str, options: Sequence[str]) -> None:
    """Run a script of the repository in this process, as one of its ranks; SystemExit if it fails."""
    script = runpy.run_path(str(ROOT / name))
    if script.get("run", script["main"])(options):
        raise SystemExit(2)


def add_scorers(work: Workspace, target: Path) -> None:
    """Write, beside the finished bundle, the scorers of `python -m moma.evaluate --world` and what the world
    looks like."""
    write_scorers(target, work.weights("judges", "probes"), work.weights("clip", "heads"))
    fit_familiar(work.cfg.world, work.cfg.familiar).save(target)


def with_positions(text: CLIPText, positions: int) -> CLIPText:
    """A text encoder for at least as long texts; new positions start as the last one."""
    longer = CLIPText(replace(text.cfg, positions=positions))
    state, name = text.state_dict(), "embeddings.position_embedding.weight"
    more = positions - text.cfg.positions
    state[name] = torch.cat([state[name], state[name][-1:].expand(more, -1)])  # (positions, C)
    longer.load_state_dict(state)
    return longer


def _decibels(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error on pixels in [-1, 1]."""
    return 10 * torch.log10(4 / error)


def _png(array: np.ndarray) -> bytes:
    """An image or mask as a PNG file."""
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")


def _check_shares(work: Workspace) -> None:
    """ValueError unless the ranks can share the batches of all stages equally."""
    cfg = work.cfg
    for part in (cfg.vae, cfg.clip, cfg.probes, cfg.segmenting, cfg.text_to_image, cfg.captioner):
        work.share_of(part.train.batch_size)
    work.share_of(cfg.stage_batch)
    classifiers.groups_in(work.share_of(cfg.probes.train.batch_size), cfg.probes)


# --- the recipe --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    parser = argparse.ArgumentParser(description="Train MoMA-mini from nothing.")
    parser.add_argument("--work", type=Path, default=Path("out/mini"), help="folder for every stage's result")
    parser.add_argument("--out", type=Path, default=Path("out/weights-mini"), help="the finished bundle")
    parser.add_argument(
        "--start", type=Path, help="bundle whose networks are trained further (default: random weights)"
    )
    parser.add_argument(
        "--keep",
        nargs="*",
        default=(),
        choices=KEEPABLE,
        metavar="STAGE",
        help="take these from --start as they are",
    )
    parser.add_argument("--until", choices=tuple(STAGES), default="stage2", help="the last stage to run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.until == "stage2" and any(args.out.glob("*")):
        raise ValueError(f"--out {args.out}: not empty, expected a new folder")
    if args.keep and not args.start:
        raise ValueError(f"--keep {' '.join(args.keep)}: expected --start, the bundle to take them from")
    start = Bundle.open(args.start) if args.start else None
    if start:
        refuse_quantised(start)
    args.work.mkdir(parents=True, exist_ok=True)
    with start_ranks(args.device) as ranks:
        work = Workspace(MiniConfig(), args.work, ranks, start, tuple(args.keep))
        recipe(work, args.until)
        if args.until == "stage2":
            export = args.work / "stage2" / "moma" / EXPORT
            work.ranks.once(lambda: put_in(export, args.work / "decoder", args.out))
            work.ranks.once(lambda: add_scorers(work, args.out))


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("pretrain", lambda: main(argv))


def recipe(work: Workspace, until: str) -> None:
    """Run the stages up to one; those that are done are skipped. ValueError if one misses its gate."""
    _check_shares(work)
    for name, stage in STAGES.items():
        done = work.folder / f"{name}.json"
        if not work.ranks.once(done.exists):
            stage(work)
            numbers = work.ranks.once(partial(NUMBERS[name], work)) if name in NUMBERS else {}
            if work.ranks.main:
                print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
            for key, (least, most) in work.cfg.gates.get(name, {}).items():
                if not least <= numbers[key] <= most:
                    found = f"{key} is {numbers[key]:.3f}, expected {least} to {most}"
                    raise ValueError(f"{name}: {found}: train it longer")
            work.ranks.once(partial(_write_json, done, numbers))
        if name == until:
            return


if __name__ == "__main__":
    sys.exit(run())
