"""What is compared: ways to draw a subject by a prompt, under one interface.

A `Method` makes subjects and jobs, and its pipe draws them; `METHODS` says how each is loaded from a bundle.
All of them read the same text (`moma.methods.prompts.sd_prompt`) and start from the same noise.

Letters: B images, R = 2B rows of a UNet call, C context tokens, h w latents, E embedding.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from models.weights.loading import load_into
from moma.inputs.preprocess import make_reference
from moma.methods.ip_adapter import ImagePrompt, IPAdapter, IPAdapterConfig
from moma.methods.moma.adapter import Conditioning, MoMAHook
from moma.methods.moma.config import method_config
from moma.methods.moma.masks import Grid
from moma.sampling.config import SampleConfig
from moma.sampling.cuda_graphs import choose_recorder
from moma.sampling.device import choose_device, choose_dtype
from moma.sampling.pipeline import DRAWING, Job, MoMA, Subject, load_drawing
from moma.sampling.sampler import Guide, TextOnly
from moma.weights.bundle import Bundle

BASE = ("unet", "vae", "text")  # the networks that every method draws with
AS_PUBLISHED, ON_WHITE = IPAdapterConfig(), IPAdapterConfig(image="white")
TRAINED = ("mapping.", "subject.", "token")  # of an adapter, what is no IP-Adapter's


# --- changes of MoMA's conditioning ------------------------------------------------------------------


class Steered(MoMA):
    """The pipeline with its conditioning changed before drawing: ablations need no switch in the method."""

    change: Callable[[Conditioning], Guide] = staticmethod(lambda cond: cond)

    def guide(self, jobs: Sequence[Job], embeddings: Sequence[Tensor], config: SampleConfig) -> Guide:
        return self.change(super().guide(jobs, embeddings, config))

    def changed(self, change: Callable[[Conditioning], Guide], **method: Any) -> "Steered":
        """The same networks under another change and other fields of MethodConfig."""
        pipe = self.with_method(replace(self.method, **method))
        pipe.change = change
        return pipe


def text_alone(cond: Conditioning) -> Conditioning:
    """The base model: neither context nor subject; the label's maps are recorded all the same."""
    silent = [(k, torch.zeros_like(v)) for k, v in cond.context]
    return replace(cond, context=silent, beta=torch.zeros_like(cond.beta))


@dataclass(frozen=True)
class Blended:
    """M_gen acts as if it were nearer to 1: keep 0 is no masking."""

    cond: Conditioning
    keep: float

    @property
    def text(self) -> Tensor:
        return self.cond.text

    def conditional(self) -> "Blended":
        return Blended(self.cond.conditional(), self.keep)

    def hook(self, t: int, m_gen: Tensor | None) -> MoMAHook:
        return self.cond.hook(t, None if m_gen is None else 1 - self.keep * (1 - m_gen))

    def next_m_gen(self, records: list[Tensor], size: Grid) -> Tensor:
        return self.cond.next_m_gen(records, size)


# --- methods beside MoMA -----------------------------------------------------------------------------


class BaseModel(MoMA):
    """The base model alone, text to image: no MLLM, no adapter, no reference pass, no M_gen."""

    embed_dim = 0  # a text needs no embedding

    def encode_subject(self, image: Image.Image, mask: Image.Image, word: str, *, seed: int = 0) -> Subject:
        """The subject as people see it; the images depend on its word alone."""
        return Subject(word, make_reference(image, mask, self.image_size, self.method), [])

    def embed(self, subject: Subject, prompt: str) -> Tensor:
        return torch.empty(1, 0)

    def embed_each(self, pairs: Sequence[tuple[Subject, str]]) -> list[Tensor]:
        return [self.embed(subject, prompt) for subject, prompt in pairs]

    @torch.no_grad()
    def guide(self, jobs: Sequence[Job], embeddings: Sequence[Tensor], config: SampleConfig) -> Guide:
        text, negative = self.read_texts(jobs)  # 2 x (B, T, context_dim)
        return TextOnly(torch.cat([negative, text]))


@dataclass(frozen=True, eq=False)
class SeenSubject(Subject):
    """A subject with the embedding of its image."""

    embedding: Tensor  # (1, E)


class ImagePrompting(BaseModel):
    """The base model with an IP-Adapter; `adapter` is its `ImagePrompt`."""

    @property
    def embed_dim(self) -> int:
        return self.adapter.embed_dim

    def encode_subject(
        self, image: Image.Image, mask: Image.Image, word: str, *, seed: int = 0
    ) -> SeenSubject:
        reference = super().encode_subject(image, mask, word).reference
        return SeenSubject(word, reference, [], self.adapter.embed(image, reference))

    def embed(self, subject: SeenSubject, prompt: str) -> Tensor:
        return subject.embedding

    @torch.no_grad()
    def guide(self, jobs: Sequence[Job], embeddings: Sequence[Tensor], config: SampleConfig) -> Guide:
        return self.adapter.guide(torch.cat(list(embeddings)), *self.read_texts(jobs))


# --- the interface -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Method:
    """A way to draw subjects: `pipe.run([method.job(method.subject(...), prompt, seed)])`."""

    name: str
    pipe: MoMA

    @torch.no_grad()
    def subject(self, image: Image.Image, mask: Image.Image, word: str, seed: int = 0) -> Subject:
        """What is computed once per subject; arguments as in `MoMA.encode_subject`."""
        return self.pipe.encode_subject(image, mask, word, seed=seed)

    @torch.no_grad()
    def read(self, pairs: Sequence[tuple[Subject, str]]) -> None:
        """Embed prompts of subjects for the jobs to come; a streamed MLLM reads its weights once for many."""
        known = self._embeddings
        new = [(one, prompt) for one, prompt in dict.fromkeys(pairs) if prompt not in known.get(one, ())]
        found = self.pipe.embed_each(new) if new else []
        for (subject, prompt), embedding in zip(new, found, strict=True):
            known.setdefault(subject, {})[prompt] = embedding

    def job(self, subject: Subject, prompt: str, seed: int, strength: float | None = None) -> Job:
        """One image to draw, with its embedding. strength: MoMA's β; other methods have none."""
        self.read([(subject, prompt)])
        return Job(subject, prompt, seed, strength=strength, embedding=self._embeddings[subject][prompt])

    @cached_property
    def _embeddings(self) -> WeakKeyDictionary[Subject, dict[str, Tensor]]:
        """Of each subject's prompts (25, and 10 of textures), each read once; they go with their subjects."""
        return WeakKeyDictionary()


@dataclass(frozen=True)
class Loader:
    """How a method is made of a bundle: called with its folder, a device and a dtype (`MoMA.load`)."""

    load: Callable[..., Method]
    networks: tuple[str, ...]  # of the bundle, that the method draws with
    settings: Any = None  # a frozen dataclass of what else decides its images

    def __call__(
        self, folder: str | Path, device: str = "auto", dtype: str = "auto", **options: Any
    ) -> Method:
        """ValueError, before any weight is read, for a bundle that lacks one of the networks."""
        self.check(Bundle.open(folder))
        return self.load(folder, device, dtype, **options)

    def missing(self, bundle: Bundle) -> list[str]:
        """The networks that the bundle lacks."""
        return [name for name in self.networks if name not in bundle.networks]

    def check(self, bundle: Bundle) -> None:
        for name in self.missing(bundle):
            bundle.config(name)  # says what to do


def load_without_mllm(
    kind: type[BaseModel],
    folder: str | Path,
    device: str,
    dtype: str,
    adapter: Callable[[Bundle, torch.device, torch.dtype], Any] = lambda *_: None,
) -> BaseModel:
    """The pipe of a method that needs no MLLM; adapter: makes what `kind` has in the place of MoMA's."""
    bundle, place = Bundle.open(folder), choose_device(device)
    chosen, reason = choose_dtype(dtype, place)
    return kind(
        **load_drawing(bundle, place, chosen, BASE),
        llava=None,
        adapter=adapter(bundle, place, chosen),
        clip_tokenizer=bundle.clip_tokenizer(),
        llama_tokenizer=None,
        image_size=bundle.image_size,
        method=method_config(**bundle.method),
        dtype_reason=reason,
        make_recorder=choose_recorder("auto", place),
    )


def load_moma(folder: str | Path, device: str, dtype: str) -> Method:
    return Method("moma", Steered.load(folder, device, dtype))


def load_masked(name: str, keep: float, folder: str | Path, device: str, dtype: str) -> Method:
    """MoMA with M_gen `Blended`."""
    return Method(name, Steered.load(folder, device, dtype).changed(partial(Blended, keep=keep)))


def load_text(folder: str | Path, device: str, dtype: str) -> Method:
    return Method("text", load_without_mllm(BaseModel, folder, device, dtype))


def load_ip_adapter(
    folder: str | Path, device: str, dtype: str, cfg: IPAdapterConfig | None = None
) -> Method:
    """The public weights, converted: `convert_weights.py ip-adapter_sd15.safetensors image_encoder/ ...`."""
    prompt = partial(_image_prompt, ("ip_adapter", "ip_vision"), cfg or AS_PUBLISHED)
    return Method("ip-adapter", load_without_mllm(ImagePrompting, folder, device, dtype, prompt))


def load_baseline(folder: str | Path, device: str, dtype: str) -> Method:
    """An IP-Adapter that train.py has made: it is a part of the bundle's adapter, and reads the embedding of
    LLaVA's image tower before its projection, of subjects on white (`moma.training.cache`).
    """
    prompt = partial(_image_prompt, ("adapter", "vision"), ON_WHITE)
    return Method("ip-adapter", load_without_mllm(ImagePrompting, folder, device, dtype, prompt))


METHODS: dict[str, Loader] = {
    "moma": Loader(load_moma, (*DRAWING, "vision", "llava")),
    "ip-adapter": Loader(load_ip_adapter, (*BASE, "ip_adapter", "ip_vision"), AS_PUBLISHED),
    "text": Loader(load_text, BASE),
}
# The paper's Table 3: how much of M_gen is kept, the rest being 1.
MASKING: dict[str, Loader] = {
    name: Loader(partial(load_masked, name, keep), METHODS["moma"].networks)
    for name, keep in {"half-mask": 0.5, "no-mask": 0.0}.items()
}
EVALUATED = METHODS | MASKING
# Stands for "ip-adapter" in MoMA-mini's world.
BASELINE = Loader(load_baseline, (*BASE, "adapter", "vision"), ON_WHITE)


def check_baseline(option: str, folder: Path, moma: Iterable[Path]) -> None:
    """ValueError where MoMA's own adapter, of one of its bundles, would be drawn with as if it were the
    IP-Adapter."""
    if folder.resolve() in {place.resolve() for place in moma}:
        raise ValueError(
            f"{option}: {folder} is MoMA's; give a bundle whose adapter is an IP-Adapter that train.py has"
            " made"
        )


def _image_prompt(
    names: tuple[str, str], cfg: IPAdapterConfig, bundle: Bundle, device: torch.device, dtype: torch.dtype
) -> ImagePrompt:
    """names: the bundle's networks with the IP-Adapter and with the image encoder."""
    sizes, unet = bundle.config(names[0]), bundle.config("unet")
    adapter = load_into(lambda: IPAdapter(sizes, unet), bundle.files(names[0]), device, dtype, TRAINED)
    vision = bundle.build(names[1], device, dtype)
    return ImagePrompt(*(network.eval().requires_grad_(False) for network in (vision, adapter)), cfg)
