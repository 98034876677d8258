"""How an image is drawn, and the checks that every configuration shares."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch

from models.weights.files import parse_json

TIMESTEPS = 1000  # of the forward process, as in Stable Diffusion: t is 0 to 999
SHOWN = 100  # characters of a wrong value in a message
IN_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null",
}  # fmt: skip
MIN_SIDE = 32  # pixels of an image; nothing can be recognised in less
MAX_SEED = 2**32 - 1  # of new images: what torch's CPU generator tells apart; higher seeds would repeat them
LARGEST = torch.finfo(torch.float32).max
MOST = 100  # of guidance and strengths; the paper takes 7.5 and up to 1.2, and images are noise long before


def check_types(config: Any) -> None:
    """ValueError for a field of a dataclass whose value does not have the field's type."""
    hints = get_type_hints(type(config))
    for name in (field.name for field in fields(config)):
        if not _fits(value := getattr(config, name), hint := hints[name]):
            raise ValueError(f"{name} {value!r:.{SHOWN}}: expected {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    """What a field takes, as it is written in JSON and in options."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is UnionType:
        return ", or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list" + " such as [0,1]" * (get_args(hint)[0] in (int, float))
    return IN_WORDS.get(hint) or getattr(hint, "__name__", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field: a class, float, Literal, T | None, or a tuple or a
    mapping of such."""
    kinds = get_args(hint)
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in kinds
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in kinds)
    if get_origin(hint) is tuple:
        if kinds[-1] is ...:
            return isinstance(value, tuple) and all(_fits(part, kinds[0]) for part in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(part, kind) for item in value.items() for part, kind in zip(item, kinds, strict=True)
        )
    if hint is float:
        return isinstance(value, float) or (_fits(value, int) and abs(value) <= LARGEST)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def check_strength(name: str, value: float) -> None:
    """ValueError for a guidance, a strength or a scale of attention that only noise could come of."""
    if not 0 <= value <= MOST:
        raise ValueError(f"{name} {value}: expected 0 to {MOST}")


def check_seed(name: str, seed: int, num: int = 1) -> None:
    """ValueError for seeds of new images that would repeat others, or that are no seeds.

    Args:
        name: for the message.
        seed: the first one.
        num: how many there are, counting up.
    """
    if not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED + 1 - num:
        raise ValueError(f"{name} {seed!r:.{SHOWN}}: expected a whole number, 0 to {MAX_SEED + 1 - num}")


def parse_field(text: str) -> tuple[str, Any]:
    """An option's 'name=value' -> the value as JSON if it is that, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}, expected FIELD=VALUE")
    try:
        return name, parse_json(value, name)
    except ValueError:
        return name, value


@dataclass(frozen=True)
class SampleConfig:
    """How an image is drawn. Defaults are the release's."""

    steps: int = 50
    solver: Literal["ddim", "dpm"] = "ddim"  # dpm = DPM-Solver++(2M), good from about 20 steps
    guidance: float = 7.5  # classifier-free guidance scale
    # Guidance acts at timesteps from the first up to below the second; at others the conditional prediction
    # stands alone, for half the work (arXiv 2404.07724). An approximation: the image changes, and so does
    # the range that scales M_gen (moma.methods.moma.masks.next_m_gen).
    guidance_interval: tuple[int, int] = (0, TIMESTEPS)
    strength: float = 1.0  # β of Eq. 3: about 1.0 for a new context, 0.4 for a new texture
    height: int | None = None  # pixels, a multiple of 8; None = the weights' own size
    width: int | None = None
    max_side: int = 2048  # pixels; attention grows with the fourth power of the side
    # Images per UNet call (two rows each). Only memory and speed depend on it, except where
    # MethodConfig.m_gen_norm is "batch".
    batch_size: int = 4
    # Timesteps (`moma.sampling.diffusion.timesteps`): "leading" for images whose records name no grid,
    # "trailing" for LoRAs for few steps.
    grid: Literal["even", "leading", "trailing"] = "even"

    max_batch: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        """ValueError for a value of the wrong type, or too small a side (records come from files)."""
        if isinstance(self.guidance_interval, list):  # JSON has no tuples
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        check_types(self)
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side < MIN_SIDE:
                raise ValueError(f"{name} {side}: expected {MIN_SIDE} pixels or more")

    def sized(self, image_size: int) -> "SampleConfig":
        """With the weights' own size in the place of None."""
        sides = {name: image_size for name in ("height", "width") if getattr(self, name) is None}
        return replace(self, **sides)

    def check(self, factor: int) -> None:
        """ValueError for settings that cannot work; factor: pixels per latent (8 for Stable Diffusion)."""
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is None or side > self.max_side or side % factor:
                limit = f"up to {self.max_side} pixels"
                raise ValueError(f"{name} {side}: expected a multiple of {factor}, {limit}")
        for name in ("guidance", "strength"):
            check_strength(name, getattr(self, name))
        low, high = self.guidance_interval
        if not 0 <= low <= high <= TIMESTEPS:
            expected = f"two timesteps of 0 to {TIMESTEPS}, the lower first"
            raise ValueError(f"guidance interval {low} {high}: expected {expected}")
        if not 1 <= self.batch_size <= self.max_batch:
            raise ValueError(f"batch size {self.batch_size}: expected 1 to {self.max_batch}")
