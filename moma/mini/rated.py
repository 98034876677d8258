"""What the classifiers find in the report's drawings, image by image, and the tables made of it.

Letters: N images, S W sides of an image, s side of the predicted masks, h w latents, K distractors,
E embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moma.app.files import markdown_table
from moma.evaluate.estimates import Estimate, estimate
from moma.mini.asked import Asked, Drawn
from moma.mini.config import ReportConfig
from moma.world import classifiers
from moma.world.classifiers import BYTE, Prediction, Probes
from moma.world.measures import iou, retrieved, sharpness

Shown = Mapping[str, Drawn]  # name of a setting -> its drawings
Seen = Mapping[str, Prediction]  # the same -> what the classifiers see in them
Values = dict[str, Tensor]  # name of a measure -> its value for each image or subject, (N,) bool or float
HEADINGS = {
    "class": "class %", "scene": "scene %", "material": "material %", "identity": "identity %",
    "pattern": "pattern %", "colour": "colour error", "mask": "M_gen IoU", "sharpness": "sharpness",
    "change": "background change", "tint": "background tint", "difference": "difference",
    "both": "both present %", "each": "identity of each %", "swapped": "other's colours %",
}  # fmt: skip


def classified(shown: Shown, probes: Probes) -> Seen:
    """What the classifiers see in drawings of one subject each."""
    return {name: classifiers.classify(probes, its.images) for name, its in shown.items()}


def measure(
    shown: Shown, seen: Seen, asked: Sequence[Asked], probes: Probes, cfg: ReportConfig
) -> dict[str, Values]:
    """Measure drawings of one subject each.

    Args:
        shown: name of a setting -> its drawings.
        seen: `classified` drawings.
        asked: what was to be drawn.
        probes: the classifiers.
        cfg: what is measured.

    Returns:
        Name of a setting -> its measures.
    """
    wanted = [one for what in asked for one in what.wanted]
    true = classifiers.truth_of(wanted, cfg.world)
    others = classifiers.gallery(probes, wanted, cfg.distractors, cfg.world)  # (N, 1 + K, E)
    values = {}
    for name, its in shown.items():
        what = seen[name]
        mask = F.adaptive_avg_pool2d(what.mask.float(), its.m_gen.shape[-2:]) > 0.5  # (N, h, w)
        values[name] = {
            **classifiers.compare(what.truth, true),
            "identity": retrieved(what.embedding, others),
            "mask": iou(its.m_gen > 0, mask),
            "sharpness": sharpness(its.images, what.mask),
        }
    return values


def measure_duos(
    shown: Shown, asked: Sequence[Asked], probes: Probes, cfg: ReportConfig
) -> dict[str, Values]:
    """Measure drawings of two subjects of different classes each; as `measure`.

    Returns:
        both (N,): a subject of each class is there. each (2N,): it is there and found among those of its
        class. swapped (2N,): it is there with colours nearer to the other subject's than to its own.
    """
    wanted = [one for what in asked for one in what.wanted]  # 2N
    true = classifiers.truth_of(wanted, cfg.world)
    others = classifiers.gallery(probes, wanted, cfg.distractors, cfg.world)  # (2N, 1 + K, E)
    label = true.label.view(-1, 2)  # (N, 2)
    values = {}
    for name, its in shown.items():
        seen, there = classifiers.classify_views(probes, its.images, cfg.present, cfg.world)  # 2N rows
        found = seen.truth.label.masked_fill(~there, -1).view(-1, 2)  # (N, 2), left and right
        match = found[:, None] == label[:, :, None]  # (N, 2 subjects, 2 views)
        present = match.any(dim=2)  # (N, 2)
        view = match.int().argmax(dim=2) + 2 * torch.arange(len(match))[:, None]  # (N, 2)
        mine = view.flatten()  # (2N,)
        error = [
            (seen.truth.colours[mine] - colours).abs().mean(dim=1)  # (2N,)
            for colours in (true.colours, true.colours.view(-1, 2, 6).flip(1).flatten(0, 1))
        ]
        values[name] = {
            "both": present.all(dim=1),
            "each": retrieved(seen.embedding[mine], others) & present.flatten(),
            "swapped": (error[0] > error[1]) & present.flatten(),
            "scene": seen.truth.scene.view(-1, 2)[:, 0] == true.scene.view(-1, 2)[:, 0],
        }
    return values


def background(
    base: tuple[Drawn, Prediction], other: tuple[Drawn, Prediction], colour: Tensor, margin: int
) -> Values:
    """Changes of the background, outside of either image's subject and its margin.

    Args:
        base: drawings, and what the classifiers see in them.
        other: drawings from the same noise.
        colour: main colours of the subjects, (N, 3) in 0..1.
        margin: in cells of the predicted mask.

    Returns:
        change: mean difference, 0..255; tint: how much nearer the background came to the subject's main
        colour, which only spilling causes.
    """
    subject = (base[1].mask | other[1].mask).float()[:, None]  # (N, 1, s, s)
    near = F.max_pool2d(subject, 2 * margin + 1, stride=1, padding=margin)
    then, later, colour = base[0].images.float(), other[0].images.float(), colour[..., None, None] * BYTE
    outside = F.interpolate(1 - near, size=later.shape[-2:], mode="nearest")[:, 0]  # (N, S, S)
    maps = {"change": (later - then).abs(), "tint": (then - colour).abs() - (later - colour).abs()}
    area = outside.sum(dim=(1, 2)).clamp_min(1)  # (N,)
    return {name: (x.mean(dim=1) * outside).sum(dim=(1, 2)) / area for name, x in maps.items()}


def backgrounds(
    shown: Shown, seen: Seen, base: str, names: Sequence[str], asked: Sequence[Asked], cfg: ReportConfig
) -> dict[str, Values]:
    """`background` of some settings against the one without a subject.

    Args:
        shown: name of a setting -> its drawings.
        seen: `classified` drawings.
        base: the setting to compare with.
        names: of the others.
        asked: what was to be drawn, one subject each.
        cfg: what is measured.
    """
    colours = classifiers.truth_of([one.wanted[0] for one in asked], cfg.world).colours[:, :3]  # (N, 3)
    both = {name: (shown[name], seen[name]) for name in (base, *names)}
    return {name: background(both[base], both[name], colours, cfg.margin) for name in names}


# --- tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Settings by measures; the cells of measures that a row lacks stay empty."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Mapping[str, Values]
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # heading -> row -> text, first

    def numbers(self) -> dict[str, dict[str, Estimate]]:
        """Row -> measure -> its average."""
        return {
            row: {name: estimate(found[name]) for name in self.columns if name in found}
            for row, found in self.rows.items()
        }

    def markdown(self) -> str:
        """Title, note and table."""
        heads = ["", *self.facts, *(HEADINGS[name] for name in self.columns)]
        lines = []
        for row, found in self.numbers().items():
            facts = [texts.get(row, "") for texts in self.facts.values()]
            cells = (_cell(name, found[name]) if name in found else "" for name in self.columns)
            lines.append([row, *facts, *cells])
        return "\n\n".join(filter(None, [f"### {self.title}", self.note, markdown_table(heads, lines)]))


def _cell(name: str, found: Estimate) -> str:
    times = 100 if HEADINGS[name].endswith("%") else 1
    mean, low, high = (f"{times * value:.3g}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"
