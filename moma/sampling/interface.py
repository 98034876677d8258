"""The contract: what a base model, a method and a method that trains offer. The engine knows nothing else.

Letters: B images, R rows of a UNet call (B, or 2B under guidance: B unconditional, then B conditional),
T text tokens, C text width, P pooled width, A added conditioning, Z latent channels, h w latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from models.unet import AttentionHook, Grid, Text, UNetConfig
from moma.sampling.config import SampleConfig, check_seed
from moma.sampling.device import choose_device, choose_dtype
from moma.sampling.diffusion import SolverStep
from moma.sampling.memory import Toggle, check_toggle

# The text's states (R, T, C), or K and V of them for each cross-attention layer, each (R, H, T, D).
TextInput = Text
# What a method carries from one step to the next, such as MoMA's M_gen; every tensor has a leading B.
State = dict[str, Tensor]
# A subject's part of the image, in shares of its width and height: left, top, right, bottom.
Region = tuple[float, float, float, float]


def text_networks(unet: UNetConfig) -> tuple[str, ...]:
    """The text encoders that a UNet reads: one (SD1.5), or two (SDXL, with a pooled text)."""
    return ("text", "text_2") if unet.added_cond_dim else ("text",)


class Weights(Protocol):
    """What methods read networks from: `moma.weights.bundle.Bundle`."""

    folder: Path
    image_size: int
    networks: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, Any]

    def config(self, name: str) -> Any: ...

    def hashes_of(self, *names: str) -> Mapping[str, str]: ...

    def build(self, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module: ...


@dataclass(frozen=True)
class Runtime:
    """Weights and machine, resolved once by each command and passed on."""

    weights: Any  # an opened bundle (`Weights`)
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str = "given"
    stream: Toggle = "auto"  # read the MLLM block by block from the disk; auto: if memory is short
    # Have the base's networks in memory one at a time; auto: if memory is short. Never where `pack` is off.
    turns: Toggle = "auto"
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
        for name in ("stream", "turns", "cuda_graph", "tiles"):
            check_toggle(name, options.get(name, "auto"))
        if options.get("cuda_graph") == "on" and there.type != "cuda":
            raise ValueError(f"CUDA graphs 'on': need a CUDA device, this is {there}; use auto or off")
        return cls(weights, there, *choose_dtype(dtype, there), **options)


def check_regions(regions: Sequence[Region | None], subjects: int) -> None:
    """ValueError for regions of other subjects, or outside the image; none at all are right for any."""
    if regions and len(regions) != subjects:
        raise ValueError(f"{len(regions)} regions for {subjects} subjects: expected one for each")
    for region in regions:
        if region is not None:
            x0, y0, x1, y1 = region
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise ValueError(f"region {region}: expected shares of the image, 0 <= x0 < x1 <= 1, y alike")


@dataclass(frozen=True, eq=False)
class Job:
    """One image to draw: any number of subjects (one may stand alone), a prompt, a seed."""

    subjects: tuple[Any, ...]  # of `Method.encode_subject`; the engine does not look into them
    prompt: str
    seed: int
    negative: str = ""
    # Of the subjects, MoMA's β: one for all, or one for each; None = the SampleConfig's.
    strength: float | tuple[float | None, ...] | None = None
    latents: Tensor | None = None  # float32 (1, Z, h, w), the start noise; None = drawn from the seed
    text: Any = None  # what `Method.read` made of the prompt; None = it is read when it is needed
    regions: tuple[Region | None, ...] = ()  # of each subject, or none

    def __post_init__(self) -> None:
        """ValueError for a seed that repeats another, or strengths or regions not one for each subject."""
        check_seed("seed", self.seed)
        if not isinstance(self.subjects, tuple):
            object.__setattr__(self, "subjects", (self.subjects,))
        count = len(self.subjects)
        if isinstance(self.strength, tuple) and len(self.strength) != count:
            raise ValueError(f"{len(self.strength)} strengths for {count} subjects: expected one for each")
        check_regions(self.regions, count)

    def strengths(self, default: float) -> tuple[float, ...]:
        """The strength of each subject; default: where the job says none."""
        each = isinstance(self.strength, tuple)
        given = self.strength if each else (self.strength,) * len(self.subjects)
        return tuple(default if strength is None else strength for strength in given)


@dataclass(frozen=True, eq=False)
class Result:
    """One finished image."""

    image: Image.Image
    latents: Tensor  # float32 (1, Z, h, w), scaled as the UNet's
    state: State = field(default_factory=dict)  # the method's last state of this image, such as M_gen

    @property
    def m_gen(self) -> Tensor | None:
        """MoMA's last mask of each subject, float32 (S, h, w); None where a method makes none."""
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

    Whatever is constant over the steps (text K, V, context and subject K, V) is computed once, when it is
    made, and handed out unchanged in every step. These are plain tensors: a CUDA graph reads them where they
    are, and one that outlives the batch can copy the next batch's into static buffers.
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
    images: ClassVar[range] = range(1, 2)  # how many of one subject it can use (`join_images`)
    has_strength: ClassVar[bool] = False  # whether a job's strengths have an effect
    # Fields of its config that act in training alone, where the weights begin.
    training_fields: ClassVar[tuple[str, ...]] = ()
    # Networks of its own, beside the public ones: name -> (config dataclass, build(config, UNetConfig)).
    own_networks: ClassVar[Mapping[str, tuple[type, Any]]] = {}

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
    def check_regions(cls, config: Any, regions: Sequence[Region | None]) -> None:
        """ValueError for regions of subjects where the method has no use for them; config: of the method."""
        if any(regions):
            raise ValueError("this method has no use for the regions of subjects: leave them out")

    @classmethod
    @abstractmethod
    def networks(cls, config: Any, encoders: bool) -> tuple[str, ...]:
        """Names of the bundle's networks that it draws with; encoders: as in `Runtime`."""

    @classmethod
    def check(cls, weights: Any, config: Any, encoders: bool = True) -> None:
        """Refuse what the method cannot draw with; reads no weights.

        Args:
            weights: the bundle.
            config: of the method.
            encoders: as in `Runtime`.

        Raises:
            ValueError: for a bundle that lacks a network, or a choice that it cannot follow.
        """
        for name in cls.needed(weights, config, encoders):
            weights.config(name)

    @classmethod
    def needs_face(cls, weights: Any) -> bool:
        """Whether `encode_reference` wants a person's face (`face=`) with these weights; reads none of them.

        weights: the bundle.
        """
        return False

    @classmethod
    def needed(cls, weights: Any, config: Any, encoders: bool = True) -> tuple[str, ...]:
        """`networks`, and the second text encoder where the UNet reads two.

        Args:
            weights: the bundle.
            config: of the method.
            encoders: as in `Runtime`.
        """
        names, unet = cls.networks(config, encoders), weights.configs.get("unet")
        texts = text_networks(unet) if unet and "text" in names else ()
        return (*names, *(name for name in texts if name not in names))

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
        references: Sequence[tuple[Any, str, Sequence[str]]],
        cache: Path | None,
    ) -> tuple[list[dict[str, Tensor]], str]:
        """What encoders that need not stay beside the base make of subjects, for `encode_reference`.

        Args:
            runtime: weights and machine.
            config: the method's.
            references: `moma.inputs.preprocess.Reference` of each image of a subject, what it shows, and the
                prompts that will be drawn of it.
            cache: folder for results, None = none.

        Returns:
            prompt -> tensor, for each reference, and a note on where they came from, "" if the method has no
            such encoder.
        """
        return [{} for _ in references], ""

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

    def join_images(self, images: Sequence[Any]) -> Any:
        """Several images of one subject as one subject.

        Args:
            images: of `encode_reference`, the first one is the most important.

        Raises:
            ValueError: for more of them than the method can use (`images`).
        """
        if len(images) not in self.images:
            raise ValueError(f"{len(images)} images of one subject: this method takes {self.images[-1]}")
        return images[0]

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


class Export(NamedTuple):
    """What a training hands to a bundle."""

    networks: Mapping[str, tuple[Any, Mapping[str, Tensor]]]  # name -> config dataclass, tensors
    method: Mapping[str, Any] = {}  # for the bundle's `method`, the fields that MoMA shares with others
    methods: Mapping[str, Mapping[str, Any]] = {}  # name of a method -> fields of its config


class Training(nn.Module, ABC):
    """One training of a method, `train.py METHOD[:STAGE]`; its parameters are the method's and frozen ones.

    A subclass is a `DenoisingTraining` or a `FeatureTraining` and has a line in the registry
    (`moma.methods`).
    """

    Config: ClassVar[type]  # a frozen dataclass of its own options
    about: ClassVar[str]  # for `train.py --help`
    # Fields of the method's config that it decides itself.
    fixed: ClassVar[Mapping[str, Any]] = {}

    config: Any
    method: Any  # the method's config
    trained: Sequence[str]  # beginnings of the names of its trained parameters, which are float32
    shards: Sequence[nn.Module] = ()  # submodules that FSDP2 cuts up; () = the model stays whole, under DDP
    # Beginnings of the names of trained parameters whose matrices decay: those that start at random.
    decayed: Sequence[str] = ("",)

    @classmethod
    def check(cls, weights: Any, config: Any, method: Any) -> None:
        """ValueError for a bundle that it cannot start from; reads no weights.

        Args:
            weights: the bundle (`Weights`).
            config: of the training.
            method: the method's config.
        """

    @classmethod
    def learning_rate(cls, config: Any) -> float:
        """The default; IP-Adapter's."""
        return 1e-4

    @abstractmethod
    def export(self) -> Export:
        """What it has trained."""


class DenoisingTraining(Training):
    """Eq. 1: a method learns to denoise images on a frozen base.

    The frozen networks read the data once, into a cache. A batch then has, on the device:

        text, label        text states (B, T, C) of the sample's prompt and of its word alone
        text_ids, label_ids  their tokens (B, K*T), by each of K tokenizers
        drop, drop_text    bool (B,): samples without their subject, or without their text
        added, label_added  the same texts' added conditioning (B, A), where the UNet has one
        embedding          (B, E) of the reference, zeroed in some samples; if the training asks for it
        m_gen              the target's mask, float32 (B, 1, H, W) in {0, 1}, in the target's pixels
        t                  timesteps (B,)
        ref_mean, ref_std  the autoencoder's posterior of the reference, (B, Z, h, w)
        m_ref              its mask, float32 (B, 1, S, S) in {0, 1}, in the reference's pixels
        ref_posterior_noise, ref_noise  float32, as ref_mean
        number             (B,), of the sample in the run

    and what `draw` adds. A training that takes `several` subjects of a sample gets, instead of text states,

        label_ids, embedding, m_gen, ref_mean, ref_std, m_ref   as above, (B, n, ...) of n subjects each
        present            bool (B, n); what the others hold means nothing
        places             int64 (B, n, K): the token of each subject's word by each tokenizer, 0 = none

    and shows none of those that `absent`, a bool (B, ·) of its own `draw`, names.
    """

    several: ClassVar[bool] = False
    # The image embedding that it needs, by a name that caches keep; None: it needs none.
    embedding: ClassVar[str | None] = None
    embedding_networks: ClassVar[Sequence[str]] = ()  # of the bundle, that make it
    captions_alone: ClassVar[bool] = False  # its text is the caption; False: the label and the caption

    def __init__(self, base: Any, weights: Any, config: Any, method: Any, seed: int) -> None:
        """A subclass builds its networks here, on the CPU.

        Args:
            base: `moma.sampling.base.Base`, frozen.
            weights: the bundle.
            config: of the training.
            method: the method's config.
            seed: of new weights.
        """
        super().__init__()
        self.base, self.config, self.method = base, config, method

    @classmethod
    def embedding_identity(cls, weights: Any, method: Any) -> dict[str, Any]:
        """What else the embeddings depend on, besides `embedding_networks`; JSON."""
        return {}

    @classmethod
    def load_embedder(
        cls, runtime: Runtime, method: Any
    ) -> Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]:
        """What makes the embeddings.

        Args:
            runtime: weights and machine.
            method: the method's config.

        Returns:
            A function of B subjects on white as the image tower takes them (B, 3, s, s), their words and
            their prompts, that gives (B, E).
        """
        raise ValueError(f"{cls.__name__} needs no embedding")

    @classmethod
    def background(cls, config: Any) -> Literal["white", "noise"]:
        """What is behind the subjects that `load_embedder`'s function gets."""
        return "white"

    @classmethod
    def faces(cls, config: Any) -> bool:
        """Whether its samples are people with a face: their embeddings (B, 512) and crops (B, 3, s, s) are
        then the argument `faces` of `load_embedder`'s function."""
        return False

    @classmethod
    def places(
        cls, tokenizers: Sequence[Any], caption: str, words: Sequence[str], ends: Sequence[int | None]
    ) -> list[tuple[int, ...]]:
        """The token of each subject's word by each tokenizer, 0 where it is not read; for `several`.

        Args:
            tokenizers: the base's.
            caption: of a sample.
            words: of its subjects.
            ends: of the words in the caption, in characters.
        """
        raise ValueError(f"{cls.__name__} takes one subject")

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of one sample, from its own generator; their batch is stacked."""
        return {}

    @abstractmethod
    def inputs(self, batch: Batch) -> StepInputs:
        """What the UNet gets beside the noised latents, of B rows."""

    def constraint(self, maps: Sequence[Any], batch: Batch) -> Tensor | float:
        """What is added to each sample's loss, (B,).

        Args:
            maps: that the hook of `inputs` returned.
            batch: B samples.
        """
        return 0.0

    @abstractmethod
    def subjects(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[Any]:
        """The subjects of a batch as `Method.encode_reference` gives them.

        Args:
            batch: B samples.
            words: what they are.
            prompts: that they will be drawn for.
        """

    def jobs(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[Job]:
        """Images that show how far the training is.

        Args:
            batch: B samples.
            words: what their (first) subjects are.
            prompts: their captions.
        """
        found = zip(self.subjects(batch, words, prompts), prompts, strict=True)
        return [Job(subject, text, seed=i) for i, (subject, text) in enumerate(found)]

    @abstractmethod
    def drawing(self) -> Method:
        """The method with the weights as they are."""


class FeatureTraining(Training):
    """A method's own loss on images, which its workers read anew in each epoch."""

    def __init__(self, runtime: Runtime, config: Any, method: Any, seed: int) -> None:
        """A subclass builds its networks here, on the device.

        Args:
            runtime: weights and machine; its dtype is that of frozen networks.
            config: of the training.
            method: the method's config.
            seed: of new weights.
        """
        super().__init__()
        self.config, self.method = config, method

    @classmethod
    @abstractmethod
    def reader(cls, weights: Any, config: Any, method: Any) -> Callable[[Any, Any, str, str], dict[str, Any]]:
        """What reads a sample in the data's workers; it can be pickled.

        Returns:
            A function of target and reference (`moma.inputs.preprocess.Reference`), word and prompt that
            gives what a batch stacks (tensors) or lists (anything else).
        """

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """The loss of each sample, float32 (B,). Under FSDP2 every call must use every trained parameter."""
