"""The classifiers of MoMA-mini: one small network that says what an image shows and which subject it is.

It is trained on renders only. No generator is trained with it or sees its predictions.

Letters: N images, B pairs of a batch, S image side, s mask side (S / 2), C channels, K distractors,
E embedding.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.weights.loading import load_into, save_tensors
from moma.data.stream import Position
from moma.training.config import TrainConfig
from moma.training.order import generator_for, generators_for
from moma.training.pretraining import PretrainingTask
from moma.training.task import Batch
from moma.world.measures import iou, retrieved
from moma.world.pairs import pair, slots
from moma.world.subjects import PATTERNS
from moma.world.world import (
    CLASSES,
    DEFAULT,
    MATERIALS,
    SCENES,
    Spec,
    WorldConfig,
    described,
    draw,
    elsewhere,
    identity,
    neighbour,
    painted,
    specs_of,
)

BYTE = 255  # pixels are 0..255 outside and 0..1 in the network
NONE = len(MATERIALS)  # class index of "no material"
FAR = -1e4  # a score that never wins
LOOKED_UP = 200  # images of `accuracy` whose identity is looked up; each takes 11 more renders
# Heads that read inside the subject's mask, with their numbers of classes.
SUBJECT_HEADS = {"label": len(CLASSES), "material": NONE + 1, "pattern": len(PATTERNS)}


@dataclass(frozen=True)
class ProbeConfig:
    """The network and its training."""

    side: int = 64  # of the world's images; other images are resized to it
    channels: tuple[int, int, int] = (32, 64, 128)  # at 1/2, 1/4, 1/8 of the side
    groups: int = 8  # of the normalisations
    figure: tuple[int, int, int] = (16, 32, 64)  # channels of the branch that reads the pattern alone
    hidden: int = 256  # width before the subject heads
    embedding: int = 64  # E: far more than the dozen numbers of an identity need
    temperature: float = 0.1  # of the contrastive loss: hard negatives count, but not they alone
    colour_weight: float = 5.0  # colour errors are near 0.1, the other losses near 1
    mask_weight: float = 4.0  # everything about the subject is read inside the mask
    blur: float = 1.0  # up to a 3x3 mean, since generated images pass through an autoencoder
    noise: float = 0.04  # largest standard deviation, of 0..1, for the same reason
    view: float = 0.82  # side of the window in which a subject of a pair is read, of the image's height
    pairs: int = 12_000  # images with a second one of the same identity
    wide: int = 3000  # wide images, of each of whose subjects a view has a second image as well
    group: int = 8  # pairs of one class that stay together: hard negatives for one another
    held_out: int = 256  # pairs of the validation loss
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=900, batch_size=64, lr=3e-3, warmup=50, schedule="cosine", weight_decay=0.02,
            save_every=150, validate_every=150,
        )
    )  # fmt: skip


# --- data --------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What N images show."""

    label: Tensor  # (N,) int64 index into CLASSES
    scene: Tensor  # (N,) index into SCENES
    material: Tensor  # (N,) index into MATERIALS; NONE: the identity's own colours and pattern show
    pattern: Tensor  # (N,) index into PATTERNS
    colours: Tensor  # (N, 6) main and second colour of the identity, RGB 0..1


def truth_of(specs: Sequence[Spec], world: WorldConfig = DEFAULT) -> Truth:
    """What images of specs show."""
    who = [identity(what.label, what.number, world) for what in specs]
    materials = [MATERIALS.index(what.material) if what.material else NONE for what in specs]
    return Truth(
        torch.tensor([CLASSES.index(what.label) for what in specs]),
        torch.tensor([SCENES.index(what.scene) for what in specs]),
        torch.tensor(materials),
        torch.tensor([PATTERNS.index(w.pattern) for w in who]),
        torch.tensor([[*w.main, *w.second] for w in who]),
    )


def draw_all(specs: Sequence[Spec], world: WorldConfig = DEFAULT, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Draw images and the subjects' coverage.

    Args:
        specs: the images.
        world: its config.
        workers: as in `world.painted`.

    Returns:
        uint8 (N, 3, S, S) and (N, 1, S, S).
    """
    samples = painted(partial(draw, cfg=world), specs, workers)
    return stacked([s.image for s in samples]), stacked([s.mask[..., None] for s in samples])


def stacked(images: Sequence[Any]) -> Tensor:
    """Images (S, S, C), arrays or PIL's, as a tensor (N, C, S, S)."""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def views(images: Tensor, share: float, world: WorldConfig = DEFAULT) -> Tensor:
    """Windows around the left and the right subject of wide images, as large as images of one subject.

    Args:
        images: uint8 (N, C, S, W).
        share: side of a window, of S.
        world: the world, whose pairs' places are known.

    Returns:
        uint8 (N, 2, C, S, S); beyond the image its edge is repeated.
    """
    height = images.shape[2]
    side, pad = round(share * height), height // 4
    wide = F.pad(images.float(), (pad, pad, 0, 0), mode="replicate")[:, :, height - side :]
    found = []
    for slot in slots(world):
        left = pad + round(height * (slot.left + slot.right - share) / 2)
        part = wide[..., left : left + side]  # (N, C, side, side)
        found.append(F.interpolate(part, (height,) * 2, mode="bilinear", antialias=True))
    return torch.stack(found, dim=1).round().byte()


def views_of_pairs(
    found: Mapping[str, np.ndarray], split: str, share: float, world: WorldConfig = DEFAULT
) -> dict[str, np.ndarray]:
    """Both subjects of `pairs.render_pairs`, as `world.render_many` gives single ones: 2N rows, two per pair.

    Args:
        found: its images and masks, from index 0.
        split: of the pairs.
        share: as in `views`.
        world: the world.
    """
    pairs = [pair(i, split, world) for i in range(len(found["image"]))]
    sides = torch.tensor([what.named(world).index(i) for what in pairs for i in (0, 1)]).view(-1, 2)  # (N, 2)
    masks = torch.from_numpy(found["masks"]).take_along_dim(sides[..., None, None], dim=1)  # (N, 2, S, W)
    images = views(stacked(found["image"]), share, world)  # (N, 2, 3, S, S)
    own = views(masks, share, world).diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)  # (N, 2, S, S)
    rows = described([s for what in pairs for s in what.subjects])
    images = images.flatten(0, 1).permute(0, 2, 3, 1)  # (2N, S, S, 3)
    return rows | {"image": images.numpy(), "mask": own.flatten(0, 1).numpy()}


# --- network -----------------------------------------------------------------------------------------


class Block(nn.Sequential):
    """Convolution, normalisation, nonlinearity."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(conv, nn.GroupNorm(groups, outputs), nn.SiLU())


class Probes(nn.Module):
    """A convolutional trunk that finds the subject. One head reads outside its mask, the others inside."""

    def __init__(self, cfg: ProbeConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or ProbeConfig()
        fine, middle, coarse = cfg.channels
        self.to_half = Block(3, fine, cfg.groups, stride=2)
        self.to_quarter = nn.Sequential(Block(fine, middle, cfg.groups, 2), Block(middle, middle, cfg.groups))
        blocks = Block(middle, coarse, cfg.groups, 2), Block(coarse, coarse, cfg.groups)
        self.to_eighth = nn.Sequential(*blocks)
        self.up_quarter, self.up_half = nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)
        self.join = Block(middle, middle, cfg.groups)
        self.maps = nn.Conv2d(fine, 3, 3, padding=1)  # subject, main colour, second colour
        first, second, last = cfg.figure
        blocks = Block(2, first, cfg.groups, 2), Block(first, second, cfg.groups, 2)
        self.figure = nn.Sequential(*blocks, Block(second, last, cfg.groups))
        self.colours = nn.Linear(2 * fine, 6)  # corrects for the light
        self.inside = nn.Sequential(nn.Linear(2 * (last + fine + middle + coarse), cfg.hidden), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(cfg.hidden, n) for name, n in SUBJECT_HEADS.items()})
        self.embed = nn.Linear(cfg.hidden, cfg.embedding)
        self.scene = nn.Linear(2 * coarse, len(SCENES))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Read images (N, 3, S, S) in 0..1.

        Returns:
            label, scene, material, pattern: logits (N, classes); colours: (N, 6) in 0..1; mask: logits
            (N, 1, s, s); embedding: (N, E) of unit length.
        """
        half = self.to_half((images - 0.5).contiguous(memory_format=torch.channels_last))  # (N, C, S/2, S/2)
        quarter = self.to_quarter(half)  # (N, C, S/4, S/4)
        eighth = self.to_eighth(quarter)  # (N, C, S/8, S/8)
        joined = self.join(quarter + _double(self.up_quarter(eighth)))  # (N, C, S/4, S/4)
        detail = F.silu(half + _double(self.up_half(joined)))  # (N, C, s, s)
        mask, parts = self.maps(detail).float().split((1, 2), dim=1)  # (N, 1, s, s), (N, 2, s, s)
        found = mask.detach().sigmoid()  # (N, 1, s, s); the other heads' gradients do not move the mask
        weights = (parts + F.logsigmoid(mask.detach())).flatten(2).softmax(dim=2)  # (N, 2, s * s)
        pixels = F.adaptive_avg_pool2d(images, mask.shape[-2:]).flatten(2)  # (N, 3, s * s)
        colours = (weights @ pixels.transpose(1, 2)).flatten(1) + self.colours(_pool(detail, found))  # (N, 6)
        figure = self.figure(_share(images, colours.detach().float(), found))  # (N, C, S/4, S/4)
        hidden = self.inside(torch.cat([_pool(x, found) for x in (figure, detail, joined, eighth)], dim=1))
        return {name: head(hidden).float() for name, head in self.heads.items()} | {
            "scene": self.scene(_pool(eighth, 1 - found)).float(),
            "colours": colours.float(),
            "mask": mask,
            "embedding": F.normalize(self.embed(hidden).float(), dim=1),
        }


def _share(images: Tensor, colours: Tensor, mask: Tensor) -> Tensor:
    """Position of pixels between the colours (N, 6), 0 main to 1 second, and the mask: (N, 2, S, S)."""
    main, second = colours[:, :, None, None].chunk(2, dim=1)  # (N, 3, 1, 1) each
    step = second - main  # (N, 3, 1, 1)
    length = step.square().sum(dim=1, keepdim=True).clamp_min(0.01)  # (N, 1, 1, 1)
    along = ((images - main) * step).sum(dim=1, keepdim=True) / length  # (N, 1, S, S)
    large = F.interpolate(mask, size=images.shape[-2:], mode="nearest")  # (N, 1, S, S)
    return torch.cat([along.clamp(-1, 2) * large, large], dim=1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _pool(x: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum of x (N, C, h, w) inside the mask (N, 1, s, s): (N, 2C)."""
    weight = F.adaptive_avg_pool2d(mask, x.shape[-2:])  # (N, 1, h, w)
    mean = (x * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp_min(1)
    return torch.cat([mean, (x * weight).amax(dim=(2, 3))], dim=1)


# --- training ----------------------------------------------------------------------------------------


class ProbeLoss(nn.Module):
    """All heads' losses, summed."""

    def __init__(self, probes: Probes) -> None:
        super().__init__()
        self.probes = probes

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of images, masks and fields of `Truth`, (B, 2, ...): two images of each identity."""
        cfg, true = self.probes.cfg, {name: value.flatten(0, 1) for name, value in batch.items()}
        says, own = self.probes(true["images"]), (true["material"] == NONE).float()  # (2B,)
        loss = cfg.colour_weight * own * (says["colours"] - true["colours"]).abs().mean(dim=1)  # (2B,)
        for name, weight in (("label", 1.0), ("scene", 1.0), ("material", 1.0), ("pattern", own)):
            loss = loss + weight * F.cross_entropy(says[name], true[name], reduction="none")
        cover = F.adaptive_avg_pool2d(true["masks"], says["mask"].shape[-2:])  # (2B, 1, s, s)
        fit = F.binary_cross_entropy_with_logits(says["mask"], cover, reduction="none").mean(dim=(1, 2, 3))
        pairs = (x.unflatten(0, (-1, 2)) for x in (loss + cfg.mask_weight * fit, says["embedding"], own))
        loss, embedding, own = pairs  # (B, 2), (B, 2, E), (B, 2)
        return loss.mean(dim=1) + contrast(embedding, own.prod(dim=1), cfg.temperature)


def contrast(embedding: Tensor, shown: Tensor, temperature: float) -> Tensor:
    """Contrastive loss: each image has to find the other one of its identity in the batch.

    Args:
        embedding: (B, 2, E) of unit length.
        shown: (B,), 1 where both images show their identity, else 0.
        temperature: of the softmax.

    Returns:
        (B,), 0 for pairs that do not show their identity.
    """
    first, second = embedding.unbind(1)  # (B, E) each
    scores = first @ second.T / temperature  # (B, B)
    scores = scores.masked_fill(shown[None] * shown[:, None] == 0, FAR)
    target = torch.arange(len(scores), device=scores.device)
    rows, columns = (F.cross_entropy(s, target, reduction="none") for s in (scores, scores.T))  # (B,) each
    return shown * (rows + columns) / 2


class ProbeTask(PretrainingTask):
    """Pairs of renders of one identity, a little blurred and noisy."""

    def __init__(self, probes: Probes, rows: dict[str, Tensor]) -> None:
        """rows: images, masks and fields of `Truth`, (N, 2, ...) each. An item is a group of one class."""
        cfg = probes.cfg
        self.size = cfg.group
        order = rows["label"][:, 0].argsort(stable=True)  # (N,)
        groups = order[: len(order) // self.size * self.size].view(-1, self.size)
        self.groups = groups[torch.randperm(len(groups), generator=generator_for(cfg.train.seed, 0))]
        batch = groups_in(cfg.train.batch_size, cfg)
        super().__init__(len(groups), groups_in(cfg.held_out, cfg), batch, cfg.train.seed)
        self.model, self.cfg, self.rows = ProbeLoss(probes), cfg, rows

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        """As the base class; batch_size counts pairs, a position counts groups."""
        return super().batches(groups_in(batch_size, self.cfg), rank, world, start)

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        """As the base class; items and numbers (B / group,) are those of groups."""
        pairs = self.groups[items].flatten()  # (B,)
        batch = {name: values[pairs] for name, values in self.rows.items()}
        images = batch["images"] / BYTE  # (B, 2, 3, S, S)
        generators = generators_for(self.seed, numbers)
        shapes = (self.size, 2, 2, 1, 1, 1), (self.size, *images.shape[1:])
        draws = torch.cat([torch.rand(shapes[0], generator=g) for g in generators])  # (B, 2, 2, 1, 1, 1)
        grain = torch.cat([torch.randn(shapes[1], generator=g) for g in generators])  # (B, 2, 3, S, S)
        soft = F.avg_pool2d(images.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(images)
        images = images + self.cfg.blur * draws[:, 0] * (soft - images)
        return batch | {
            "images": images + self.cfg.noise * draws[:, 1] * grain,
            "masks": batch["masks"] / BYTE,
        }

    def networks(self) -> dict[str, nn.Module]:
        return {"probes": self.model.probes}

    def export(self, folder: Path) -> None:
        """Write float16: unlike the other networks, this one is not trained further."""
        folder.mkdir(parents=True, exist_ok=True)
        save_probes(folder / "probes.safetensors", self.model.probes)


def groups_in(pairs: int, cfg: ProbeConfig) -> int:
    """The number of groups in that many pairs. ValueError unless it is a whole one."""
    if pairs % cfg.group:
        raise ValueError(f"{pairs} pairs for the classifiers: expected a multiple of {cfg.group}, a group")
    return pairs // cfg.group


def second_images(first: Mapping[str, np.ndarray], world: WorldConfig = DEFAULT) -> dict[str, np.ndarray]:
    """Another image of each identity of `world.render_many`: image (N, 3, S, S), mask (N, 1, S, S)."""
    images, masks = draw_all(_second_specs(specs_of(first)), world, os.cpu_count() or 1)
    return {"image": images.numpy(), "mask": masks.numpy()}


def _second_specs(first: Sequence[Spec]) -> list[Spec]:
    return [elsewhere(what, i) for i, what in enumerate(first)]


def probe_task(
    found: Mapping[str, np.ndarray],
    seconds: Mapping[str, np.ndarray],
    world: WorldConfig = DEFAULT,
    cfg: ProbeConfig | None = None,
) -> ProbeTask:
    """The training task.

    Args:
        found: N images of `world.render_many`.
        seconds: `second_images` of them.
        world: the world that they show.
        cfg: the network and its training.
    """
    cfg, first = cfg or ProbeConfig(), specs_of(found)
    views = {
        "images": (stacked(found["image"]), torch.from_numpy(seconds["image"])),
        "masks": (stacked(found["mask"][..., None]), torch.from_numpy(seconds["mask"])),
    }
    known = [truth_of(specs, world) for specs in (first, _second_specs(first))]
    views |= {name: values for name, *values in zip(Truth._fields, *known, strict=True)}
    rows = {name: torch.stack(list(both), dim=1) for name, both in views.items()}  # (N, 2, ...)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        return ProbeTask(Probes(cfg), rows)


def save_probes(path: str | Path, probes: Probes) -> None:
    """Write the weights as float16 to one safetensors file, without the settings."""
    path = Path(path)
    save_tensors(path.parent, path.stem, {name: value.half() for name, value in probes.state_dict().items()})


def load_probes(path: str | Path, cfg: ProbeConfig | None = None) -> Probes:
    """Read a file of `save_probes` as float32, in evaluation mode. ValueError for another file."""
    return load_into(lambda: Probes(cfg), [Path(path)], "cpu", torch.float32).eval().requires_grad_(False)


# --- classifying -------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What the classifiers say about N images."""

    truth: Truth
    mask: Tensor  # (N, s, s) bool
    embedding: Tensor  # (N, E) of unit length


@torch.no_grad()
def classify(probes: Probes, images: Tensor, batch: int = 256) -> Prediction:
    """Classify images.

    Args:
        probes: the classifiers.
        images: (N, 3, S, S) uint8, of any side S.
        batch: images per call, which bounds the memory.
    """
    side = (probes.cfg.side,) * 2
    parts = [probes(F.interpolate(some / BYTE, size=side, mode="area")) for some in images.split(batch)]
    says = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    chosen = {name: says[name].argmax(dim=1) for name in ("label", "scene", "material", "pattern")}
    return Prediction(Truth(**chosen, colours=says["colours"]), says["mask"][:, 0] > 0, says["embedding"])


def classify_views(
    probes: Probes, images: Tensor, least: float, world: WorldConfig = DEFAULT
) -> tuple[Prediction, Tensor]:
    """Classify both views of wide images, 2N rows, the left one first.

    Args:
        probes: the classifiers.
        images: uint8 (N, 3, S, W).
        least: share of its view that a subject fills at least.
        world: the world.

    Returns:
        What they show, and whether a subject is there, bool (2N,).
    """
    seen = classify(probes, views(images, probes.cfg.view, world).flatten(0, 1))
    return seen, seen.mask.float().mean(dim=(1, 2)) >= least


def compare(seen: Truth, true: Truth) -> dict[str, Tensor]:
    """Whether each property was classified correctly, bool (N,), and the colour error 0..255, float (N,)."""
    names = {"class": "label", "scene": "scene", "material": "material", "pattern": "pattern"}
    right = {key: getattr(seen, name) == getattr(true, name) for key, name in names.items()}
    return right | {"colour": (seen.colours - true.colours).abs().mean(dim=1) * BYTE}


def gallery(probes: Probes, specs: Sequence[Spec], distractors: int, world: WorldConfig) -> Tensor:
    """Embeddings of the identities that each image is compared with.

    Args:
        probes: the classifiers.
        specs: of N images of unseen identities.
        distractors: K.
        world: the world.

    Returns:
        (N, 1 + K, E): another image of the image's own identity, then images of K others of its class.
    """
    near = [neighbour(what, step, world) for what in specs for step in range(distractors + 1)]
    shown = [elsewhere(what, i) for i, what in enumerate(near)]
    return classify(probes, draw_all(shown, world)[0]).embedding.unflatten(0, (len(specs), -1))


def accuracy(
    probes: Probes, found: Mapping[str, np.ndarray], world: WorldConfig = DEFAULT, distractors: int = 10
) -> dict[str, float]:
    """Accuracy on renders.

    Args:
        probes: the classifiers.
        found: N images of val or test, of `world.render_many`.
        world: the world that they show.
        distractors: K.

    Returns:
        Means of `compare`, pattern and colour where they show; mask: mean IoU; identity: share of images that
        are nearer to their own identity than to all distractors.
    """
    specs = specs_of(found)
    true, seen = truth_of(specs, world), classify(probes, stacked(found["image"]))
    own = true.material == NONE  # (N,)
    answers = compare(seen.truth, true)
    answers |= {name: answers[name][own] for name in ("pattern", "colour")}
    masks = stacked(found["mask"][..., None]) / BYTE  # (N, 1, S, S)
    answers["mask"] = iou(seen.mask, F.adaptive_avg_pool2d(masks, seen.mask.shape[-2:])[:, 0] > 0.5)
    few = torch.nonzero(own)[:LOOKED_UP, 0]  # (n,)
    others = gallery(probes, [specs[i] for i in few.tolist()], distractors, world)  # (n, 1 + K, E)
    answers["identity"] = retrieved(seen.embedding[few], others)
    return {name: value.double().mean().item() for name, value in answers.items()}
