"""The contract: what a base model, a method and a method that trains offer. The engine knows nothing else.

Letters: B images, R rows of a UNet call (B, or 2B under guidance: B unconditional, then B conditional),
T text tokens, C text width, P pooled width, A added conditioning, Z latent channels, h w latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from models.unet import AttentionHook, Grid, Text
from moma.sampling.config import SampleConfig
from moma.sampling.device import choose_device, choose_dtype
from moma.sampling.diffusion import SolverStep
from moma.sampling.memory import Toggle, check_toggle

# The text's states (R, T, C), or K and V of them for each cross-attention layer, each (R, H, T, D).
TextInput = Text
# What a method carries from one step to the next, such as MoMA's M_gen; every tensor has a leading B.
State = dict[str, Tensor]


class Weights(Protocol):
    """What methods read networks from: `moma.weights.bundle.Bundle`."""

    folder: Path
    image_size: int
    networks: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, Any]

    def config(self, name: str) -> Any: ...

    def build(self, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module: ...


@dataclass(frozen=True)
class Runtime:
    """Weights and machine, resolved once by each command and passed on."""

    weights: Any  # an opened bundle (`Weights`)
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str = "given"
    stream: Toggle = "auto"  # read the MLLM block by block from the disk; auto: if memory is short
    cuda_graph: Toggle = "auto"  # record and replay denoising steps; auto: on CUDA devices
    tiles: Toggle = "auto"  # decode images in tiles; auto: if memory is short
    pack: bool = True  # lay the UNet's weights out for speed; on CPUs they cannot be read or trained then
    # Keep encoders such as the MLLM loaded; False: what they make comes from `Method.precompute`.
    encoders: bool = True

    @classmethod
    def choose(cls, weights: Any, device: str = "auto", dtype: str = "auto", **options: Any) -> Self:
        """Resolve names of the command line.

        Args:
            weights: an opened bundle.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            dtype: "auto", "bf16", "fp16", "fp32".
            options: the other fields.

        Raises:
            ValueError: for a device that is not there or an unknown option.
        """
        there = choose_device(device)
        for name in ("stream", "cuda_graph", "tiles"):
            check_toggle(name, options.get(name, "auto"))
        if options.get("cuda_graph") == "on" and there.type != "cuda":
            raise ValueError(f"CUDA graphs 'on': need a CUDA device, this is {there}; use auto or off")
        return cls(weights, there, *choose_dtype(dtype, there), **options)


@dataclass(frozen=True, eq=False)
class Job:
    """One image to draw: any number of subjects (one may stand alone), a prompt, a seed."""

    subjects: tuple[Any, ...]  # of `Method.encode_subject`; the engine does not look into them
    prompt: str
    seed: int
    negative: str = ""
    strength: float | None = None  # of the subjects, MoMA's β; None = the SampleConfig's
    latents: Tensor | None = None  # float32 (1, Z, h, w), the start noise; None = drawn from the seed
    text: Any = None  # what `Method.read` made of the prompt; None = it is read when it is needed

    def __post_init__(self) -> None:
        if not isinstance(self.subjects, tuple):
            object.__setattr__(self, "subjects", (self.subjects,))


@dataclass(frozen=True, eq=False)
class Result:
    """One finished image."""

    image: Image.Image
    latents: Tensor  # float32 (1, Z, h, w), scaled as the UNet's
    state: State = field(default_factory=dict)  # the method's last state of this image, such as M_gen

    @property
    def m_gen(self) -> Tensor | None:
        """MoMA's last mask, float32 (1, h, w); None where a method makes none."""
        return self.state["m_gen"][0] if "m_gen" in self.state else None


class TextStates(NamedTuple):
    """What a base's text encoders make of B prompts."""

    states: Tensor  # (B, T, C)
    pooled: Tensor | None  # (B, P), where the UNet has an added conditioning


class StepInputs(NamedTuple):
    """What one UNet call gets beside latents and timestep."""

    text: TextInput
    added: Tensor | None = None  # (R, A), SDXL's pooled text and sizes
    hook: AttentionHook | None = None


class Conditioning(Protocol):
    """What steers the denoising of B images.

    It computes whatever is constant over the steps (text K, V, context and subject K, V) once, when it is
    made, and hands out the same tensors in every step: a CUDA graph keeps copies of those it was given.
    """

    def at(self, step: SolverStep, state: State) -> StepInputs:
        """The inputs of one step's call, R = 2B rows; all three may change with the step.

        Args:
            step: the solver step, with its timestep 0..999.
            state: of the step before, {} in the first.
        """

    def next_state(self, maps: list[Any], grid: Grid) -> State:
        """The state for the next step out of what this call's hook returned.

        Args:
            maps: the hook's attention maps in execution order.
            grid: (h, w) of the latents.
        """

    def conditional(self) -> "Conditioning":
        """The same for the conditional rows alone (R = B), where guidance is left out."""


class Method(ABC):
    """A way to draw subjects. Its file adds one line to the registry (`moma.methods`)."""

    Config: ClassVar[type]  # a frozen dataclass of what decides its images; records hold it
    Presets: ClassVar[Mapping[str, Any]]  # name -> Config, "default" among them
    subjects: ClassVar[range]  # how many an image may have
    # Networks of its own, beside the public ones: name -> (config dataclass, build(config, UNetConfig)).
    own_networks: ClassVar[Mapping[str, tuple[type, Any]]] = {}
    trainings: ClassVar[Mapping[str, Any]] = {}  # stage -> `Training`, "" if there is only one

    config: Any
    base: Any  # `moma.sampling.base.Base`

    @classmethod
    def configure(cls, preset: str = "default", **overrides: Any) -> Any:
        """A preset of the method with some fields replaced; ValueError for an unknown preset, field or
        value."""
        if preset not in cls.Presets:
            raise ValueError(f"preset {preset!r}: expected one of {', '.join(cls.Presets)}")
        known = {f.name for f in fields(cls.Config)}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(f"method field {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
        return replace(cls.Presets[preset], **overrides)

    @abstractmethod
    def with_config(self, config: Any) -> Self:
        """The same networks under other choices."""

    @classmethod
    def batch_dependent(cls, config: Any) -> bool:
        """Whether the images of a batch change each other, as in MoMA's preset release."""
        return False

    @classmethod
    @abstractmethod
    def networks(cls, config: Any, encoders: bool) -> tuple[str, ...]:
        """Names of the bundle's networks that it draws with; encoders: as in `Runtime`."""

    @classmethod
    def check(cls, weights: Any, config: Any, encoders: bool = True) -> None:
        """ValueError for a bundle that lacks a network or a choice it cannot follow; reads no weights."""
        for name in cls.networks(config, encoders):
            weights.config(name)

    @classmethod
    @abstractmethod
    def load(cls, runtime: Runtime, config: Any) -> Self:
        """The method with its weights, in evaluation mode."""

    @classmethod
    @abstractmethod
    def read(cls, tokenizers: Sequence[Any], config: Any, words: Sequence[str], prompt: str) -> Any:
        """Check and tokenise a prompt; ValueError (one line) for one that cannot be drawn.

        Args:
            tokenizers: the base's, one per text encoder.
            config: the method's.
            words: of the job's subjects.
            prompt: the user's text.
        """

    @classmethod
    def precompute(
        cls,
        runtime: Runtime,
        config: Any,
        reference: Any,
        word: str,
        prompts: Sequence[str],
        cache: Path | None,
    ) -> tuple[dict[str, Tensor], str]:
        """What encoders that need not stay beside the base make of one subject, for `encode_reference`.

        Args:
            runtime: weights and machine.
            config: the method's.
            reference: `moma.inputs.preprocess.Reference` of the subject.
            word: what it is.
            prompts: that will be drawn.
            cache: folder for results, None = none.

        Returns:
            prompt -> tensor, and a note on where it came from, "" if the method has no such encoder.
        """
        return {}, ""

    @abstractmethod
    def encode_subject(self, image: Image.Image, mask: Image.Image, word: str, **options: Any) -> Any:
        """What is kept of one subject.

        Args:
            image: RGB, or RGBA (transparent parts become white), as `moma.open_image` gives it.
            mask: mode L, 255 = subject, of the same aspect ratio, as `moma.find_mask` gives it.
            word: what it is, such as "cat".
            options: of `encode_reference`.

        Raises:
            ValueError: for an empty or a full mask.
        """

    @abstractmethod
    def encode_reference(
        self,
        reference: Any,
        word: str,
        *,
        seed: int = 0,
        prompts: Sequence[str] = (),
        features: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """What is kept of one subject.

        Args:
            reference: `moma.inputs.preprocess.Reference`.
            word: what it is, such as "cat".
            seed: of all that is drawn at random.
            prompts: that will be asked for, so that an encoder may read them together.
            features: of `precompute`.
        """

    @abstractmethod
    def prepare(self, jobs: Sequence[Job]) -> list[Any]:
        """Each job checked and tokenised, with all that is cheaper to compute for many jobs at once.

        Raises:
            ValueError: before anything is computed, for a job that cannot be drawn.
        """

    @abstractmethod
    def condition(self, prepared: Sequence[Any], config: SampleConfig) -> Conditioning:
        """The conditioning of one batch.

        Args:
            prepared: B of `prepare`'s results.
            config: with sizes; its strength is that of jobs without one.
        """


class ResumeState(Protocol):
    """Where the state of one batch under way is kept, so that a drawing that was stopped can go on."""

    def read(self) -> Any:
        """The latest `moma.sampling.sampler.Step` that was kept, if any."""

    def keep(self, step: Any) -> None:
        """Called after every step; may pass over some, but not over the last one."""


# --- methods that train --------------------------------------------------------------------------------


Batch = dict[str, Any]  # tensors with a leading B, or lists of B things


class Trainable(Protocol):
    """One training of a method. `train.py METHOD[:STAGE]` runs it through the one loop."""

    model: nn.Module  # model(batch) -> the loss of each sample, float32 (B,)
    trained: Sequence[str]  # beginnings of the names of `model`'s parameters that are trained

    def export(self) -> tuple[dict[str, tuple[Any, Mapping[str, Tensor]]], Any]:
        """Networks for a bundle: name -> (config dataclass, tensors), and the method's config to draw
        with."""
