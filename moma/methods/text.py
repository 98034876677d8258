"""Text to image: the base model alone. Other methods build on it.

Letters: B images, R rows of a UNet call (B unconditional, then B conditional, or the latter alone),
T text tokens, A added conditioning.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from models.unet import Grid
from moma.inputs.preprocess import Reference, ReferenceConfig, make_reference, meant_mask
from moma.methods.prompts import AbsentLabel, Prompt, read_prompt
from moma.sampling.base import NETWORKS, Base, Encodings
from moma.sampling.config import SampleConfig, check_types
from moma.sampling.diffusion import SolverStep
from moma.sampling.interface import Job, Method, Runtime, State, StepInputs, TextInput


@dataclass(frozen=True)
class TextConfig(ReferenceConfig):
    """What decides the images of text alone; the reference's fields decide what people see of it."""

    # A prompt without the subject's word: "error", so that methods are compared on the same text; or
    # "ignore".
    absent_label: AbsentLabel = "error"

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.mask_binarise_above <= 1:
            raise ValueError(f"mask_binarise_above {self.mask_binarise_above}: expected 0 to 1")


@dataclass(frozen=True, eq=False)
class Subject:
    """A subject as people see it. Methods that keep more of it have a subclass."""

    word: str
    reference: Reference
    # The method that encoded it, and its `TextToImage.encoding` -> value; None = not known.
    made: tuple[type[Method], Mapping[str, Any]] | None = field(default=None, kw_only=True)


class Prepared(NamedTuple):
    """A job whose texts are checked and tokenised."""

    job: Job
    prompt: Prompt
    negative: Encodings


@dataclass(frozen=True, eq=False)
class TextConditioning:
    """The conditioning of B images by text alone: the same in every step, without a hook."""

    text: TextInput  # K and V of the text for each cross-attention layer, R rows
    added: Tensor | None  # (R, A)
    rows_per_image: int = field(default=2, kw_only=True)  # both of guidance, or the conditional one alone

    def at(self, step: SolverStep, state: State) -> StepInputs:
        return StepInputs(self.text, self.added)

    def next_state(self, maps: list[Any], grid: Grid) -> State:
        return {}

    def conditional(self) -> Self:
        text = [(half(k), half(v)) for k, v in self.text]
        added = None if self.added is None else half(self.added)
        return replace(self, text=text, added=added, rows_per_image=1)


def half(x: Tensor) -> Tensor:
    """The conditional rows of both rows of guidance: (2B, ...) -> (B, ...)."""
    return x[len(x) // 2 :]


class TextToImage(Method):
    """The base model alone. Subjects count by their words, and there may be none."""

    Config = TextConfig
    # Fields of the config that decide what a subject is: under others it has to be encoded again.
    encoding: ClassVar[tuple[str, ...]] = tuple(one.name for one in fields(ReferenceConfig))
    subjects: ClassVar[range] = range(9)  # how many an image may have
    Presets: ClassVar[Mapping[str, Any]] = {"default": TextConfig()}

    def __init__(self, base: Base, config: TextConfig) -> None:
        self.base, self.config = base, config

    @classmethod
    def networks(cls, config: TextConfig, encoders: bool) -> tuple[str, ...]:
        return NETWORKS

    @classmethod
    def load(cls, runtime: Runtime, config: TextConfig) -> Self:
        return cls(Base.load(runtime), config)

    def with_config(self, config: Any) -> Self:
        return type(self)(self.base, config)

    @classmethod
    def read(cls, tokenizers: Sequence[Any], config: TextConfig, words: Sequence[str], prompt: str) -> Prompt:
        cls.check_subjects(words)
        return read_prompt(tokenizers, words, prompt, absent_label=config.absent_label)

    @classmethod
    def check_subjects(cls, words: Sequence[str]) -> None:
        """ValueError for more or fewer subjects than the method draws."""
        if len(words) not in cls.subjects:
            expected = (
                f"{cls.subjects[0]} to {cls.subjects[-1]}" if len(cls.subjects) > 1 else cls.subjects[0]
            )
            raise ValueError(f"{len(words)} subjects: this method draws images with {expected}")

    def encode_subject(self, image: Image.Image, mask: Image.Image, word: str, **options: Any) -> Subject:
        found = meant_mask(mask)
        if doubt := found.doubt():
            warnings.warn(f"{word!r}: {doubt}", stacklevel=3)
        reference = make_reference(image, found.mask, self.base.image_size, self.config)
        made = type(self), {name: getattr(self.config, name) for name in self.encoding}
        return replace(self.encode_reference(reference, word, **options), made=made)

    def encode_reference(self, reference: Reference, word: str, **options: Any) -> Subject:
        return Subject(word, reference)

    def check_subject(self, subject: Any) -> None:
        """Refuse what this method under this config has not encoded.

        Raises:
            TypeError: for what is no subject.
            ValueError: for one of another method, or of a config with another value in `encoding`.
        """
        if not isinstance(subject, Subject):
            found = type(subject).__name__
            raise TypeError(f"a subject of type {found}: expected encode_subject's, several as a tuple")
        kind, then = subject.made or (type(self), {})
        again = "encode it again with this pipeline"
        if not issubclass(kind, type(self)):
            made, now = kind.__name__, type(self).__name__
            raise ValueError(f"subject {subject.word!r}: was encoded by {made}, this is {now}; {again}")
        for name in self.encoding:
            if (now := getattr(self.config, name)) != (made := then.get(name, now)):
                raise ValueError(
                    f"subject {subject.word!r}: has {name} {made!r}, the config {now!r}; {again}"
                )

    def prepare(self, jobs: Sequence[Job]) -> list[Prepared]:
        for subject in (subject for job in jobs for subject in job.subjects):
            self.check_subject(subject)
        texts = [
            job.text
            or self.read(self.base.tokenizers, self.config, [s.word for s in job.subjects], job.prompt)
            for job in jobs
        ]
        negatives = {text: self.base.tokenize(text) for text in {job.negative for job in jobs}}
        return [Prepared(job, text, negatives[job.negative]) for job, text in zip(jobs, texts, strict=True)]

    def condition(self, prepared: Sequence[Prepared], config: SampleConfig) -> TextConditioning:
        return TextConditioning(*self.encode_texts(prepared, config))

    def encode_texts(
        self, prepared: Sequence[Prepared], config: SampleConfig
    ) -> tuple[TextInput, Tensor | None]:
        """Text K, V and added conditioning of both rows of guidance, R = 2B.

        Args:
            prepared: B jobs.
            config: with the images' sizes.
        """
        texts = [one.prompt.encodings for one in prepared] + [one.negative for one in prepared]
        absent = [False] * len(prepared) + [not one.job.negative for one in prepared]
        states, pooled = self.base.encode_text(texts, absent)  # (2B, T, C), (2B, P)
        added = self.base.added_conditioning(pooled, config.height, config.width)  # (2B, A)
        rows = [None if x is None else torch.cat(x.chunk(2)[::-1]) for x in (states, added)]
        return self.base.unet.text_kv(rows[0]), rows[1]
