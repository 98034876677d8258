"""The judges of MoMA-mini: one small network that says what an image shows and which subject it is.

It is trained on renders only, and no generator is ever trained with it or shown its opinion.

Letters: N images, B pairs of a batch, S image side, s mask side (S / 2), C channels, K distractors,
E embedding.
"""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from moma.training.order import generator_for
from moma.training.pretraining import PretrainingTask
from moma.training.task import Batch, Delivery
from moma.world.drawing import stream
from moma.world.measures import iou, retrieved
from moma.world.subjects import PATTERNS
from moma.world.world import CLASSES, DEFAULT, MATERIALS, SCENES, Spec, WorldConfig, draw, identity

BYTE = 255  # pixels are 0..255 outside and 0..1 in the network
NONE = len(MATERIALS)  # the number of "no material"
SEEDS = 1 << 31  # of poses and scenes lie below this, as the world's
FAR = -1e4  # a score that never wins
LOOKED_UP = 200  # images of `accuracy` whose identity is looked up: each takes 11 renders more
# What is read inside the subject's mask, each with its number of outputs.
SUBJECT_HEADS = {"label": len(CLASSES), "material": NONE + 1, "pattern": len(PATTERNS)}


@dataclass(frozen=True)
class ProbeConfig:
    """The network and its training."""

    side: int = 64  # of the world's images; images of another size are scaled to it
    channels: tuple[int, int, int] = (32, 64, 128)  # at a half, a quarter, an eighth of the side
    groups: int = 8  # of the normalisations
    figure: tuple[int, int, int] = (16, 32, 64)  # channels of the branch that looks at the pattern alone
    hidden: int = 256  # width before the subject's heads
    embedding: int = 64  # of an identity: far more than its dozen numbers need
    temperature: float = 0.1  # of the contrastive loss: hard negatives count, but not they alone
    colour_weight: float = 5.0  # colour errors are near 0.1, the other losses near 1
    mask_weight: float = 4.0  # everything about the subject is read inside the mask
    blur: float = 1.0  # up to a 3x3 mean: generated images come through an autoencoder
    noise: float = 0.04  # largest deviation, of 0..1, for the same reason
    pairs: int = 12_000  # images with a second one of the same identity
    group: int = 8  # pairs of one class that stay together: hard negatives for one another
    held_out: int = 256  # pairs of the validation loss
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=500, batch_size=64, lr=3e-3, warmup=50, schedule="cosine", weight_decay=0.02,
            save_every=150, validate_every=150,
        )
    )  # fmt: skip


# --- data --------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What N images show."""

    label: Tensor  # (N,) int64, places in CLASSES; likewise:
    scene: Tensor
    material: Tensor  # NONE: the identity's own colours and pattern show
    pattern: Tensor
    colours: Tensor  # (N, 6) main and second colour of the identity, RGB 0..1


def truth_of(specs: Sequence[Spec], world: WorldConfig = DEFAULT) -> Truth:
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
    """Images (N, 3, S, S) and subjects' coverage (N, 1, S, S), uint8; workers > 0 share the drawing."""
    paint = partial(draw, cfg=world)
    with multiprocessing.get_context("spawn").Pool(workers) if workers else nullcontext() as pool:
        samples = list((pool.map if pool else map)(paint, specs))
    return stacked([s.image for s in samples]), stacked([s.mask[..., None] for s in samples])


def specs_of(found: Mapping[str, np.ndarray]) -> list[Spec]:
    """What `world.render_many`'s images show; their seeds are not known and stand as 0."""
    rows = zip(*(found[name].tolist() for name in ("label", "number", "scene", "material")), strict=True)
    return [Spec(CLASSES[a], n, SCENES[b], MATERIALS[m] if m >= 0 else None, 0, 0) for a, n, b, m in rows]


def elsewhere(what: Spec, seed: int) -> Spec:
    """The same subject in its own colours in a scene and pose that follow from the seed."""
    rng = stream("elsewhere", seed)
    scene = SCENES[rng.integers(len(SCENES))]
    return Spec(what.label, what.number, scene, None, *(int(v) for v in rng.integers(SEEDS, size=2)))


def neighbour(what: Spec, step: int, world: WorldConfig = DEFAULT) -> int:
    """The number of another unseen identity of the class, in the same split."""
    place = (what.number - world.identities) % world.unseen_identities
    return what.number - place + (place + step) % world.unseen_identities


def stacked(images: Sequence[Any]) -> Tensor:
    """Images (S, S, C), arrays or PIL's -> (N, C, S, S)."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    )


# --- network -----------------------------------------------------------------------------------------


class Block(nn.Sequential):
    """Convolution, normalisation, nonlinearity."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(conv, nn.GroupNorm(groups, outputs), nn.SiLU())


class Probes(nn.Module):
    """A convolutional trunk that finds the subject; some heads read inside its mask, one outside."""

    def __init__(self, cfg: ProbeConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or ProbeConfig()
        fine, middle, coarse = cfg.channels
        self.to_half = Block(3, fine, cfg.groups, stride=2)
        self.to_quarter = nn.Sequential(Block(fine, middle, cfg.groups, 2), Block(middle, middle, cfg.groups))
        self.to_eighth = nn.Sequential(
            Block(middle, coarse, cfg.groups, 2), Block(coarse, coarse, cfg.groups)
        )
        self.up_quarter, self.up_half = nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)
        self.join = Block(middle, middle, cfg.groups)
        self.maps = nn.Conv2d(fine, 3, 3, padding=1)  # the subject; where its main, its second colour shows
        first, second, last = cfg.figure
        blocks = (
            Block(2, first, cfg.groups, 2),
            Block(first, second, cfg.groups, 2),
            Block(second, last, cfg.groups),
        )
        self.figure = nn.Sequential(*blocks)
        self.colours = nn.Linear(2 * fine, 6)  # corrects for light
        self.inside = nn.Sequential(nn.Linear(2 * (last + fine + middle + coarse), cfg.hidden), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(cfg.hidden, n) for name, n in SUBJECT_HEADS.items()})
        self.embed = nn.Linear(cfg.hidden, cfg.embedding)
        self.scene = nn.Linear(2 * coarse, len(SCENES))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (N, 3, S, S) in 0..1 -> logits (N, answers) by the names of `Truth`; colours (N, 6) in 0..1;
        mask, logits (N, 1, s, s); embedding (N, E) of unit length."""
        half = self.to_half((images - 0.5).contiguous(memory_format=torch.channels_last))  # (N, C, S/2, S/2)
        quarter = self.to_quarter(half)  # (N, C, S/4, S/4)
        eighth = self.to_eighth(quarter)  # (N, C, S/8, S/8)
        joined = self.join(quarter + _double(self.up_quarter(eighth)))  # (N, C, S/4, S/4)
        detail = F.silu(half + _double(self.up_half(joined)))  # (N, C, s, s)
        mask, parts = self.maps(detail).float().split((1, 2), dim=1)  # (N, 1, s, s), (N, 2, s, s)
        found = mask.detach().sigmoid()  # what is read does not move the mask
        weights = (parts + F.logsigmoid(mask.detach())).flatten(2).softmax(dim=2)  # (N, 2, s * s)
        pixels = F.adaptive_avg_pool2d(images, mask.shape[-2:]).flatten(2)  # (N, 3, s * s)
        colours = (weights @ pixels.transpose(1, 2)).flatten(1) + self.colours(_pool(detail, found))  # (N, 6)
        figure = self.figure(_share(images, colours.detach().float(), found))  # (N, C, S/4, S/4)
        hidden = self.inside(torch.cat([_pool(x, found) for x in (figure, detail, joined, eighth)], dim=1))
        told = {name: head(hidden).float() for name, head in self.heads.items()} | {
            "colours": colours.float()
        }
        told |= {"scene": self.scene(_pool(eighth, 1 - found)).float(), "mask": mask}
        return told | {"embedding": F.normalize(self.embed(hidden).float(), dim=1)}


def _share(images: Tensor, colours: Tensor, mask: Tensor) -> Tensor:
    """Where a pixel's colour lies between the two of (N, 6), main 0, second 1; the mask. (N, 2, S, S)."""
    main, second = colours[:, :, None, None].chunk(2, dim=1)  # (N, 3, 1, 1) each
    step = second - main  # (N, 3, 1, 1)
    length = step.square().sum(dim=1, keepdim=True).clamp_min(0.01)  # (N, 1, 1, 1)
    along = ((images - main) * step).sum(dim=1, keepdim=True) / length  # (N, 1, S, S)
    large = F.interpolate(mask, size=images.shape[-2:], mode="nearest")  # (N, 1, S, S)
    return torch.cat([along.clamp(-1, 2) * large, large], dim=1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _pool(x: Tensor, mask: Tensor) -> Tensor:
    """Mean and largest value of x (N, C, h, w) where the mask (N, 1, s, s) is -> (N, 2C)."""
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
        """batch: images, masks and Truth's fields for two images of each identity, (B, 2, ...) -> (B,)."""
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
    """Each image has to find the other one of its identity among the batch's.

    embedding (B, 2, E); shown (B,): 1 where both show their identity -> (B,), 0 for pairs that do not.
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
        """rows: images, masks and Truth's fields, (N, 2, ...) each. An item is a group of like classes."""
        cfg = probes.cfg
        self.size = cfg.group
        order = rows["label"][:, 0].argsort(stable=True)  # (N,)
        groups = order[: len(order) // self.size * self.size].view(-1, self.size)
        self.groups = groups[torch.randperm(len(groups), generator=generator_for(cfg.train.seed, 0))]
        batch = groups_in(cfg.train.batch_size, cfg)
        super().__init__(len(groups), groups_in(cfg.held_out, cfg), batch, cfg.train.seed)
        self.model, self.cfg, self.rows = ProbeLoss(probes), cfg, rows

    def deliveries(self, batch_size: int, rank: int, world: int, start: Position) -> Iterator[Delivery]:
        """batch_size: pairs; a position counts groups."""
        return super().deliveries(groups_in(batch_size, self.cfg), rank, world, start)

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        """items, numbers: of groups (B / group,)."""
        pairs = self.groups[items].flatten()  # (B,)
        batch = {name: values[pairs] for name, values in self.rows.items()}
        images = batch["images"] / BYTE  # (B, 2, 3, S, S)
        generators = [generator_for(self.seed, n) for n in numbers.tolist()]
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
        """As float16, unlike the networks that are trained on."""
        folder.mkdir(parents=True, exist_ok=True)
        save_probes(folder / "probes.safetensors", self.model.probes)


def groups_in(pairs: int, cfg: ProbeConfig) -> int:
    """How many groups so many pairs are. ValueError unless they are whole ones."""
    if pairs % cfg.group:
        raise ValueError(f"{pairs} pairs of the judges at once: expected a multiple of {cfg.group}, a group")
    return pairs // cfg.group


def second_images(first: Mapping[str, np.ndarray], world: WorldConfig = DEFAULT) -> dict[str, np.ndarray]:
    """Another image of each identity of `world.render_many`'s: image (N, 3, S, S), mask (N, 1, S, S)."""
    second = [elsewhere(what, i) for i, what in enumerate(specs_of(first))]
    images, masks = draw_all(second, world, os.cpu_count() or 1)
    return {"image": images.numpy(), "mask": masks.numpy()}


def task(
    found: Mapping[str, np.ndarray],
    seconds: Mapping[str, np.ndarray],
    world: WorldConfig = DEFAULT,
    cfg: ProbeConfig | None = None,
) -> ProbeTask:
    """Training on N images of `world.render_many`'s and `second_images` of them."""
    cfg = cfg or ProbeConfig()
    first = specs_of(found)
    second = [elsewhere(what, i) for i, what in enumerate(first)]
    views = [
        (stacked(found["image"]), stacked(found["mask"][..., None])),
        (torch.from_numpy(seconds["image"]), torch.from_numpy(seconds["mask"])),
    ]
    known = [truth_of(specs, world)._asdict() for specs in (first, second)]
    both = [{"images": v[0], "masks": v[1]} | facts for v, facts in zip(views, known, strict=True)]
    rows = {name: torch.stack([view[name] for view in both], dim=1) for name in both[0]}  # (N, 2, ...)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        return ProbeTask(Probes(cfg), rows)


def save_probes(path: str | Path, probes: Probes) -> None:
    """Write the weights as float16, one safetensors file of 1 MB; the settings are not in it."""
    path = Path(path)
    save_tensors(path.parent, path.stem, {name: value.half() for name, value in probes.state_dict().items()})


def load_probes(path: str | Path, cfg: ProbeConfig | None = None) -> Probes:
    """The network of `save_probes`, float32, in evaluation mode; ValueError for a file that is none."""
    return load_into(lambda: Probes(cfg), [Path(path)], "cpu", torch.float32).eval().requires_grad_(False)


# --- judging -----------------------------------------------------------------------------------------


class Judgement(NamedTuple):
    """What the probes decide about N images, in the terms of `Truth`."""

    truth: Truth
    mask: Tensor  # (N, s, s) bool
    embedding: Tensor  # (N, E) of unit length


@torch.no_grad()
def judge(probes: Probes, images: Tensor, batch: int = 256) -> Judgement:
    """images uint8 (N, 3, S, S), of any side S; batch bounds the memory."""
    side = (probes.cfg.side,) * 2
    parts = [probes(F.interpolate(some / BYTE, size=side, mode="area")) for some in images.split(batch)]
    says = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    chosen = {name: says[name].argmax(dim=1) for name in ("label", "scene", "material", "pattern")}
    return Judgement(Truth(**chosen, colours=says["colours"]), says["mask"][:, 0] > 0, says["embedding"])


def compare(seen: Truth, true: Truth) -> dict[str, Tensor]:
    """For each image whether it was seen as it is, bool (N,), and the colours' error 0..255, float (N,)."""
    names = {"class": "label", "scene": "scene", "material": "material", "pattern": "pattern"}
    right = {key: getattr(seen, name) == getattr(true, name) for key, name in names.items()}
    return right | {"colour": (seen.colours - true.colours).abs().mean(dim=1) * BYTE}


def gallery(probes: Probes, specs: Sequence[Spec], distractors: int, world: WorldConfig) -> Tensor:
    """Embeddings (N, 1 + K, E) of another image of each identity and, after it, of others of its class."""
    shown = []
    for i, what in enumerate(specs):
        for step in range(distractors + 1):
            who = Spec(what.label, neighbour(what, step, world), what.scene, None, 0, 0)
            shown.append(elsewhere(who, i * (distractors + 1) + step))
    return judge(probes, draw_all(shown, world)[0]).embedding.unflatten(0, (len(specs), -1))


def accuracy(
    probes: Probes, found: Mapping[str, np.ndarray], world: WorldConfig = DEFAULT, distractors: int = 10
) -> dict[str, float]:
    """Means of `compare` on renders of val or test (`world.render_many`), pattern and colour where they show.

    mask: mean IoU; identity: share of images that are nearer to their own identity than to all distractors.
    """
    specs = specs_of(found)
    true, seen = truth_of(specs, world), judge(probes, stacked(found["image"]))
    own = true.material == NONE  # (N,)
    answers = compare(seen.truth, true)
    answers |= {name: answers[name][own] for name in ("pattern", "colour")}
    masks = stacked(found["mask"][..., None]) / BYTE  # (N, 1, S, S)
    answers["mask"] = iou(seen.mask, F.adaptive_avg_pool2d(masks, seen.mask.shape[-2:])[:, 0] > 0.5)
    few = torch.nonzero(own)[:LOOKED_UP, 0]  # (n,)
    others = gallery(probes, [specs[i] for i in few.tolist()], distractors, world)  # (n, 1 + K, E)
    answers["identity"] = retrieved(seen.embedding[few], others)
    return {name: value.double().mean().item() for name, value in answers.items()}


def agreement(probes: Probes, images: np.ndarray, asked: Sequence[Spec]) -> dict[str, float]:
    """Shares of images (N, S, S, 3) uint8 that show the class, scene and material asked for."""
    right = compare(judge(probes, stacked(images)).truth, truth_of(asked))
    return {name: right[name].double().mean().item() for name in ("class", "scene", "material")}
