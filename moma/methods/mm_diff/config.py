"""The choices of MM-Diff, where its paper and the released code (alibaba/mm-diff 09c0419) differ."""

from dataclasses import dataclass
from typing import Literal

from moma.methods.text import TextConfig
from moma.sampling.config import TIMESTEPS, check_strength


@dataclass(frozen=True)
class MMDiffConfig(TextConfig):
    """What MM-Diff computes with its weights."""

    fuse_scale: float = 0.8  # λ of the subject tokens' attention; a job's strength multiplies it
    # Steps that read the text alone, without the subjects. The released pipeline's default is 10, all of its
    # demonstrations take 0.
    start_merge_step: int = 0
    fuse_words: bool = True  # images are merged into their subjects' words; False: the paper's ablation
    # The negative text gets the subjects' words where the prompt has them, as in the release.
    fuse_negative: bool = True
    # Text encoders whose LoRA acts: the release loads both and, by a wrong prefix, applies the first one's.
    text_lora: Literal["first", "both"] = "first"
    # What the image encoders see: "photo" = the whole image on black (release), "segment" = the subject on
    # white (paper), "noise" = on random colours (FastComposer's training).
    seen: Literal["photo", "segment", "noise"] = "photo"
    # The bundle's network that reads the patch tokens: the release's, or LLaVA's image tower (train.py).
    patches: Literal["mm_diff_public", "vision"] = "mm_diff_public"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("fuse_scale", self.fuse_scale)
        if not 0 <= self.start_merge_step <= TIMESTEPS:
            raise ValueError(f"start_merge_step {self.start_merge_step}: expected 0 to {TIMESTEPS}")


PRESETS = {
    "default": MMDiffConfig(),
    "release": MMDiffConfig(start_merge_step=10),
    "paper": MMDiffConfig(text_lora="both", seen="segment"),
}
