"""The log of a run, one JSON object a line, and the image of its losses."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from models.weights.files import append_text, parse_json, read_bytes
from moma.app.chart import Colour, Line, Points, chart
from moma.app.files import write_text

LOG_BYTES = 2**30  # of a log: a line of 100 bytes each step


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without those that are damaged or incomplete; [] if there is no log."""
    *lines, _ = read_bytes(path, LOG_BYTES).decode(errors="replace").split("\n") if path.is_file() else [""]
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(parse_json(line, str(path)))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def cut_log(path: Path, step: int) -> None:
    """Remove the lines after `step`, from which the run continues."""
    lines = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(lines))


def write_log(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line."""
    append_text(path, json.dumps(line) + "\n")


# --- the image -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveConfig:
    """Looks of the image of the losses."""

    # Share of the run that the smoothed line averages over: a diffusion loss varies with its timesteps.
    smooth: float = 0.03
    # Quantile of the training losses at which the axis ends, so that one outlier does not flatten the rest.
    shown: float = 0.995
    raw: Colour = (190, 210, 235)
    train: Colour = (30, 90, 170)
    validation: Colour = (200, 80, 30)


def loss_curve(log: Sequence[Mapping[str, Any]], cfg: CurveConfig | None = None) -> Image.Image:
    """A chart of training loss, raw and smoothed, and validation loss over the steps of a log."""
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
    """Exponential average over about `length` points, with bias correction."""
    result, total, weight, keep = [], 0.0, 0.0, 1 - 1 / length
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result
