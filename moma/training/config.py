"""Every choice of the training loop in one place, and the learning rate that follows from it."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moma.sampling.config import check_types

# Fields by which two runs may differ and still be the same run: they decide when something is written and
# how the work is cut. The samples of a step, which three of them decide together, are compared as one number.
FREE = (
    "steps", "batch_size", "accumulate", "compile", "save_every", "keep_last", "validate_every",
    "sample_every", "log_every",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained. The paper's text gives few numbers; where ours come from is said here."""

    # Optimiser steps. IP-Adapter's million at 64 samples is out of most people's reach; the adapter starts
    # from one, so a tenth is the first thing to try.
    steps: int = 100_000
    # Samples of one rank in one call of the model; with `accumulate` and the ranks they make up a step.
    batch_size: int = 8
    accumulate: int = 1  # calls of the model per step: a larger batch in the same memory
    lr: float = 1e-4  # IP-Adapter's, whose projector and K, V stage 2 continues; stages may set their own
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's own
    weight_decay: float = 0.01  # IP-Adapter's
    warmup: int = 500  # steps of linear growth: Adam's averages are rough at first
    # "cosine" falls to zero at `steps` and cannot be extended; "constant" can.
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = 1.0  # largest gradient norm, None = any; one odd sample must not undo an hour
    # Autocast of the model. The trained weights are float32 in both; fp16 would need loss scaling.
    dtype: Literal["bf16", "fp32"] = "bf16"
    # Decay per step of an average of the weights, which is then validated, drawn with and exported.
    # None = off: it costs one more copy. 0.9999 suits runs of 100 000 steps, 0.999 shorter ones.
    ema: float | None = None
    seed: int = 0  # of everything drawn; a sample's own draws also depend on its number in the run
    compile: bool = False  # torch.compile: faster after minutes of compiling, so not for a first try
    save_every: int = 1000  # steps between checkpoints: what a crash costs at most
    keep_last: int = 2  # checkpoints kept beside the best one; one of 7B parameters has 84 GB
    validate_every: int = 1000  # validation also comes before each checkpoint, whose rank it decides
    sample_every: int = 1000  # steps between images of the validation pairs
    log_every: int = 1  # a line has 150 bytes, and sparse ones make a curve that misleads

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have (configurations come from JSON and options)."""
        if isinstance(self.betas, list):  # JSON has no tuples
            object.__setattr__(self, "betas", tuple(self.betas))
        check_types(self)
        counts = ("steps", "batch_size", "accumulate", "keep_last")
        for name in (*counts, *(name for name in FREE if name.endswith("_every"))):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        for name in ("warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")
        for name in ("lr", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number above 0")
        shares = (*self.betas, *([] if self.ema is None else [self.ema]))
        if len(self.betas) != 2 or not all(0 <= share < 1 for share in shares):
            raise ValueError(f"betas {list(self.betas)}, ema {self.ema}: expected 0 or more, below 1 each")

    def identity(self, world: int) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on: all that changes the numbers. world: ranks."""
        same = {name: value for name, value in asdict(self).items() if name not in FREE}
        # The cosine's length is part of its past.
        length = {"steps": self.steps} if self.schedule == "cosine" else {}
        return {**same, **length, "samples per step": self.batch_size * self.accumulate * world}


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Of the step that follows `step` finished ones."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))
