"""How an image is drawn, and the checks that every configuration shares."""

import argparse
import math
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models.weights.files import parse_json

TIMESTEPS = 1000  # of the forward process, as in Stable Diffusion: t is 0 to 999


def check_types(config: Any) -> None:
    """ValueError for a field of a dataclass whose value does not have the field's type."""
    for name, hint in get_type_hints(type(config)).items():
        if not _fits(value := getattr(config, name), hint):
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            expected = " or ".join(map(repr, choices)) or (hint.__name__ if isinstance(hint, type) else hint)
            raise ValueError(f"{name} is {value!r}: expected {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field: float, int, bool, Literal, int | None or a tuple of a type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        fitting = isinstance(value, tuple) and all(_fits(part, kinds[0]) for part in value)
        return fitting and (kinds[-1] is ... or len(value) == len(kinds))
    if hint is float:
        return _fits(value, int) or isinstance(value, float)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


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

    def __post_init__(self) -> None:
        """ValueError for a value of the wrong type (records of images come from files)."""
        if isinstance(self.guidance_interval, list):  # JSON has no tuples
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        check_types(self)

    def sized(self, image_size: int) -> "SampleConfig":
        """With the weights' own size in the place of None."""
        sides = {name: image_size for name in ("height", "width") if getattr(self, name) is None}
        return replace(self, **sides)

    def check(self, factor: int) -> None:
        """ValueError for settings that cannot work; factor: pixels per latent (8 for Stable Diffusion)."""
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is None or not 0 < side <= self.max_side or side % factor:
                limit = f"up to {self.max_side} pixels"
                raise ValueError(f"{name} {side}: expected a multiple of {factor}, {limit}")
        for name in ("guidance", "strength"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected a finite number, 0 or more")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= TIMESTEPS:
            expected = f"two timesteps of 0 to {TIMESTEPS}, the lower first"
            raise ValueError(f"guidance interval {low} {high}: expected {expected}")
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: expected 1 or more")
