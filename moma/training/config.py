"""Every option of the training loop and of the two kinds of training, and the learning rate of a step."""

import math
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moma.data.triplets import Source
from moma.inputs.preprocess import Geometry
from moma.sampling.config import SampleConfig, check_types
from moma.sampling.interface import Training

# Fields that may change when a run continues: they decide when something is written and how the work is
# split. The samples of a step, which three of them decide together, are compared as one number.
FREE = (
    "steps", "batch_size", "accumulate", "compile", "save_every", "keep_last", "validate_every",
    "sample_every", "log_every", "cache", "cache_batch", "cache_workers", "workers", "max_skipped",
    "gradient_checkpointing", "grid_samples", "grid_steps",
)  # fmt: skip
MANY = 64  # samples of a validation
TENTH = 10  # a validation takes at most one sample of so many


@dataclass(frozen=True)
class TrainConfig:
    """Options of the loop. The paper gives few numbers; each comment names the source of ours."""

    # Optimiser steps. Few can afford IP-Adapter's million at 64 samples; the adapter starts from one, so a
    # tenth is the first thing to try.
    steps: int = 100_000
    batch_size: int = 8  # samples per rank and call of the model
    accumulate: int = 1  # calls of the model per step: a larger batch in the same memory
    lr: float = 1e-4  # IP-Adapter's; trainings may have another default
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's own
    weight_decay: float = 0.01  # IP-Adapter's
    warmup: int = 500  # steps of linear growth, while Adam's averages are rough
    # "cosine" falls to zero at `steps` and cannot be extended; "constant" can.
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = 1.0  # largest gradient norm, None = any
    # Autocast of the model. The trained weights are float32 in both; fp16 would need loss scaling.
    dtype: Literal["bf16", "fp32"] = "bf16"
    # Decay per step of an average of the weights, which is validated, drawn with and exported; None = off. It
    # costs another copy of the weights. 0.9999 suits runs of 100,000 steps, 0.999 shorter ones.
    ema: float | None = None
    # The average of the first steps is short, so that it forgets the start: its decay is at most
    # (1 + step) / (this + step).
    ema_warmup: int = 10
    seed: int = 0  # of every random number; a sample's own also depend on its number in the run
    compile: bool = False  # torch.compile: faster after minutes of compiling
    save_every: int = 1000  # steps between checkpoints
    keep_last: int = 2  # checkpoints kept beside the best one; one of 7B parameters takes 84 GB
    validate_every: int = 1000  # steps; each checkpoint is validated as well
    sample_every: int = 1000  # steps between images of the validation pairs
    log_every: int = 1  # steps

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have (configurations come from JSON and options)."""
        if isinstance(self.betas, list):  # JSON has no tuples
            object.__setattr__(self, "betas", tuple(self.betas))
        check_types(self)
        every = ("save_every", "validate_every", "sample_every", "log_every")
        check_from(1, self, "steps", "batch_size", "accumulate", "keep_last", "ema_warmup", *every)
        check_from(0, self, "warmup", "weight_decay", "seed")
        check_positive(self, "lr", "clip")
        shares = (*self.betas, *([] if self.ema is None else [self.ema]))
        if len(self.betas) != 2 or not all(0 <= share < 1 for share in shares):
            raise ValueError(f"betas {list(self.betas)}, ema {self.ema}: expected 0 or more, below 1 each")

    def identity(self, world: int) -> dict[str, Any]:
        """What must not differ for a checkpoint to continue: all that changes the numbers. world: ranks."""
        same = {name: value for name, value in asdict(self).items() if name not in FREE}
        # The cosine's length is part of its past.
        length = {"steps": self.steps} if self.schedule == "cosine" else {}
        return {**same, **length, "samples per step": self.batch_size * self.accumulate * world}


@dataclass(frozen=True)
class DataConfig:
    """Options of both kinds of training."""

    validation: str | None = None  # held-out data; None = the training data's first samples
    # None: 64, enough to tell runs apart, since their random numbers are fixed, or a tenth of a smaller set.
    validation_samples: int | None = None
    validation_batch: int = 8
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: slower, less memory
    # How an image becomes square: "cover" keeps its whole short side and the subject, without an edge that is
    # repeated; the others as `ReferenceConfig.geometry`, which drawing goes by.
    geometry: Geometry = "cover"
    flip: bool = False  # show mirrored images as well; captions may say left and right
    max_skipped: float = 0.05  # largest share of samples that cannot be used

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        check_types(self)
        check_named(self, "validation")
        check_from(1, self, "validation_batch")
        if self.validation_samples is not None:
            check_from(0, self, "validation_samples")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped {self.max_skipped}: expected 0 to 1")

    @property
    def wanted(self) -> int:
        """Samples of a validation, where there are as many."""
        return MANY if self.validation_samples is None else self.validation_samples

    def kept(self, source: Source, place: str | Path) -> int:
        """How many of the data's first samples validation keeps back; ValueError if none is left.

        Args:
            source: the data, of which no more is read than it takes to tell.
            place: of the data, for the message.
        """
        if self.validation is not None:
            return 0
        enough = TENTH * MANY if self.validation_samples is None else self.validation_samples + 1
        raws = (raw for shard in range(len(source.shards)) for raw in source.read(shard))
        count = sum(1 for _ in islice(raws, enough))
        few = max(count // TENTH, int(count > 1))
        kept = min(MANY, few) if self.validation_samples is None else self.validation_samples
        self.check_kept(kept, count, place)
        return kept

    def check_kept(self, kept: int, samples: int, place: str | Path) -> None:
        """ValueError if no sample is left to train on.

        Args:
            kept: samples that validation keeps back.
            samples: all that can be used.
            place: of the data, for the message.
        """
        if kept >= samples:
            raise ValueError(
                f"training data {str(place)!r}: has {samples} samples, of which validation keeps back {kept}:"
                " keep back fewer with --set validation_samples=N, or give --validation"
            )

    def identity(self) -> dict[str, Any]:
        """What must not differ for a checkpoint to continue."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


@dataclass(frozen=True)
class DenoisingConfig(DataConfig):
    """Options of trainings by Eq. 1 (`moma.training.denoising`)."""

    # Shares of samples without their image embedding (zero in its place), without their text, and without
    # both, which is the unconditional row of guidance. The paper gives none; 5% each is IP-Adapter's.
    drop_context: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    # Weight of the error inside the subject's mask against 1 outside, before each sample's weights are scaled
    # to a mean of 1; 1 = Eq. 1.
    subject_weight: float = 1.0
    # A sample's loss is weighted by min(SNR, this) / SNR of its timestep (Hang et al. 2023, who take 5),
    # scaled to a mean of 1, so that the fine detail of nearly clean images, where errors are largest, does
    # not outweigh colours and shapes, which are decided in the noise; None = Eq. 1.
    snr_gamma: float | None = None
    # Pixels of all targets, multiples of 8; None = the weights' own size. References are square, as drawing
    # makes them.
    height: int | None = None
    width: int | None = None
    cache: str = "out/cache"  # folder of what the frozen networks compute, built if it is missing
    cache_batch: int = 16  # samples per call of a network while it is built
    cache_workers: int = 4  # threads that decode images while it is built
    grid_samples: int = 4  # images of the sample grid
    grid_steps: int = 20  # denoising steps of its images

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        super().__post_init__()
        check_named(self, "cache")
        check_from(1, self, "cache_batch", "cache_workers", "grid_steps")
        check_from(0, self, "grid_samples")
        check_positive(self, "subject_weight", "snr_gamma")
        check_from(0, self, "drop_context", "drop_text", "drop_both")
        dropped = (self.drop_context, self.drop_text, self.drop_both)
        if max(dropped) == 1 or math.fsum(dropped) > 1:
            raise ValueError(f"drop_context, drop_text, drop_both: {dropped}, expected at most 1 together")

    def sample(self, image_size: int) -> SampleConfig:
        """How an image like the targets is drawn; image_size: the weights' own."""
        return SampleConfig(self.grid_steps, height=self.height, width=self.width).sized(image_size)


@dataclass(frozen=True)
class FeatureConfig(DataConfig):
    """Options of trainings with a loss of their own (`moma.training.features`)."""

    workers: int = 4  # processes per rank that decode images; 0 = the training's own
    lanes: int = 32  # of the data's order: best a multiple of ranks * workers (`StreamConfig`)

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        super().__post_init__()
        check_from(1, self, "lanes")
        check_from(0, self, "workers")


class Choices(NamedTuple):
    """Every config of one run."""

    training: type[Training]
    train: TrainConfig
    data: Any  # DenoisingConfig or FeatureConfig
    stage: Any  # the training's own config
    method: Any  # the method's


def check_named(config: Any, name: str) -> None:
    """ValueError for an empty place, which would be the current folder.

    Args:
        config: the dataclass.
        name: of the field, a text or None.
    """
    if (place := getattr(config, name)) is not None and not place.strip():
        raise ValueError(f"{name} {place!r}: is empty, expected a file or folder")


def check_from(least: int, config: Any, *names: str) -> None:
    """ValueError for a field that is too small or not finite.

    Args:
        least: smallest value.
        config: the dataclass.
        names: of the fields.
    """
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} {getattr(config, name)}: expected {least} or more")


def check_positive(config: Any, *names: str) -> None:
    """ValueError for a field that is neither None nor a finite number above 0."""
    for name in names:
        if getattr(config, name) is not None and not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} {getattr(config, name)}: expected a number above 0")


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """The learning rate of the step that follows `step` finished ones."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def average_decay(cfg: TrainConfig, step: int) -> float:
    """The decay of the average of the weights in the step that follows `step` finished ones."""
    return min(cfg.ema or 0.0, (1 + step) / (cfg.ema_warmup + step))
