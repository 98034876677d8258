"""The log of a run, one JSON object a line, and the image of its losses."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from moma.app.chart import Colour, Line, Points, chart
from moma.app.files import write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; [] if there is none. What a killed process has left of a line is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_log(path: Path, step: int) -> None:
    """Forget what is younger than `step`, as the run goes on from there."""
    lines = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(lines))


def write_log(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line; it survives the process from here on."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


# --- the image -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveConfig:
    """Looks of the image of the losses."""

    # The smoothed line averages over about this share of the run: a diffusion loss jumps with its timesteps.
    smooth: float = 0.03
    # The axis ends at this share of the training losses, so that one outlier does not flatten the rest.
    shown: float = 0.995
    raw: Colour = (190, 210, 235)
    train: Colour = (30, 90, 170)
    validation: Colour = (200, 80, 30)


def loss_curve(log: Sequence[Mapping[str, Any]], cfg: CurveConfig | None = None) -> Image.Image:
    """Training loss, as it is and smoothed, and validation loss over the steps, out of a log's lines."""
    cfg = cfg or CurveConfig()
    raw = [(line["step"], line["loss"]) for line in log if "loss" in line]
    validation = [(line["step"], line["validation"]) for line in log if "validation" in line]
    smooth = smoothed(raw, max(1.0, cfg.smooth * len(raw)))
    lines = (
        Line("loss", raw, cfg.raw, thin=True),
        Line("smoothed", smooth, cfg.train),
        Line("validation", validation, cfg.validation, marks=True),
    )
    losses = sorted(y for _, y in raw)[: math.ceil(cfg.shown * len(raw))]
    losses += [y for _, y in smooth + validation]
    return chart(lines, "step", (min(losses, default=0), max(losses, default=1)))


def smoothed(points: Points, length: float) -> Points:
    """Exponential average over about `length` points, corrected for its beginning."""
    result, total, weight, keep = [], 0.0, 0.0, 1 - 1 / length
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result
