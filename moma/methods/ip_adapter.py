"""IP-Adapter (arXiv 2308.06721), as its authors sample with it: an image as four more tokens of the prompt.

The image's CLIP embedding becomes context tokens, which a second cross-attention reads beside the text; the
unconditional row gets the tokens of a zero embedding. Self-attention is plain, nothing is masked. Several
subjects have an attention each, and their results are added, as with several adapters at once.

Letters: B images, R rows of a UNet call, H heads, N tokens of a layer, T text tokens, C context tokens,
D channels per head, E embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from models.attention import attention
from models.clip import CLIPVision
from models.clip_image import clip_image
from models.unet import Grid, KeysValues, UNetConfig, attention_layers
from moma.inputs.preprocess import Reference, on_white
from moma.methods.moma.adapter import AdapterConfig, ContextProjection, Projector, context_keys_values
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.training import check_embeddings, start_adapter
from moma.methods.text import Prepared, Subject, TextConditioning, TextConfig, TextToImage, half
from moma.sampling.base import NETWORKS, Base
from moma.sampling.config import SampleConfig, check_strength, check_types
from moma.sampling.cuda_graphs import ConstantHook
from moma.sampling.diffusion import SolverStep
from moma.sampling.finite import check_finite
from moma.sampling.interface import Batch, DenoisingTraining, Export, Runtime, State, StepInputs


@dataclass(frozen=True)
class IPAdapterConfig(TextConfig):
    """How the adapter is used."""

    scale: float = 1.0  # of the second cross-attention: its authors' default; DreamBench++ takes 0.6
    # What its encoder looks at. The authors give it the photo as it is, background included; "white" shows it
    # the subject alone, as MoMA's language model sees it.
    image: Literal["photo", "white"] = "photo"
    # The image encoder it was trained with: its authors' (the bundle's "ip_vision"), or LLaVA's image tower
    # before its projection ("vision"), which train.py uses.
    encoder: Literal["ip_vision", "vision"] = "ip_vision"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("scale", self.scale)


class IPAdapter(nn.Module):
    """What an IP-Adapter trains; parameters are named as in `moma.methods.moma.adapter.Adapter`."""

    def __init__(self, cfg: AdapterConfig, unet_cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = attention_layers(unet_cfg)
        self.projector = Projector(cfg, self.layers[0].context_dim)
        self.context = nn.ModuleList(ContextProjection(layer) for layer in self.layers)

    def forward(self, embedding: Tensor) -> list[KeysValues]:
        """Image embeddings (R, E) -> K, V of the context tokens for each layer, each (R, H, C, D)."""
        return context_keys_values(self.projector(embedding), self.context, self.layers)


@dataclass(frozen=True, eq=False)
class ImageSubject(Subject):
    """A subject with the embedding of its image."""

    embedding: Tensor  # (1, E)


class IPAdapterMethod(TextToImage):
    """The base model with an IP-Adapter."""

    Config = IPAdapterConfig
    Presets: ClassVar[Mapping[str, Any]] = {"default": IPAdapterConfig()}
    subjects, images, has_strength = range(1, 9), range(1, 65), True
    encoding = (*TextToImage.encoding, "image")
    own_networks: ClassVar[Mapping[str, Any]] = {"ip_adapter": (AdapterConfig, IPAdapter)}

    def __init__(self, base: Base, vision: CLIPVision, adapter: IPAdapter, config: IPAdapterConfig) -> None:
        super().__init__(base, config)
        self.vision, self.adapter = vision, adapter

    @classmethod
    def networks(cls, config: IPAdapterConfig, encoders: bool) -> tuple[str, ...]:
        return (*NETWORKS, "ip_adapter", config.encoder)

    @classmethod
    def load(cls, runtime: Runtime, config: IPAdapterConfig) -> Self:
        vision, adapter = (
            runtime.weights.build(name, runtime.device, runtime.dtype).eval().requires_grad_(False)
            for name in (config.encoder, "ip_adapter")
        )
        return cls(Base.load(runtime), vision, adapter, config)

    def with_config(self, config: IPAdapterConfig) -> Self:
        if config.encoder != self.config.encoder:
            raise ValueError(f"encoder {config.encoder!r}: is decided when the weights are loaded")
        return type(self)(self.base, self.vision, self.adapter, config)

    @torch.no_grad()
    def encode_reference(self, reference: Reference, word: str, **options: Any) -> ImageSubject:
        """CLIP's embedding of the image as it came, or of the subject on white
        (`Method.encode_reference`)."""
        seen = on_white(reference.original) if self.config.image == "photo" else reference.white
        pixels = clip_image(seen, self.vision.cfg.image_size)[None]  # (1, 3, S, S)
        embedding = self.vision(pixels.to(self.base.device, self.base.dtype))[1]  # (1, E)
        check_finite("image encoder", embedding)
        return ImageSubject(word, reference, embedding)

    def join_images(self, images: Sequence[ImageSubject]) -> ImageSubject:
        """The mean of the images' embeddings."""
        mean = torch.stack([one.embedding for one in images]).mean(dim=0)  # (1, E)
        return images[0] if len(images) == 1 else replace(images[0], embedding=mean)

    def condition(self, prepared: Sequence[Prepared], config: SampleConfig) -> "ImageConditioning":
        jobs, subjects = [one.job for one in prepared], []
        none = torch.zeros_like(jobs[0].subjects[0].embedding)  # (1, E)
        strengths = (job.strengths(config.strength) for job in jobs)
        pairs = (zip(job.subjects, x, strict=True) for job, x in zip(jobs, strengths, strict=True))
        for each in zip_longest(*pairs):
            embedding = torch.cat([one[0].embedding if one else none for one in each])  # (B, E)
            context = self.adapter(torch.cat([torch.zeros_like(embedding), embedding]))  # of R = 2B rows
            strength = torch.tensor([one[1] if one else 0.0 for one in each] * 2)[:, None, None, None]
            subjects.append((context, strength.to(embedding)))  # (R, 1, 1, 1)
        return ImageConditioning(*self.encode_texts(prepared, config), subjects, self.config.scale)


@dataclass(frozen=True, eq=False)
class ImageConditioning(TextConditioning, ConstantHook):
    """The conditioning of a batch and its own attention hook: no step differs from another."""

    # Of each subject: in each layer K, V of its context tokens, each (R, H, C, D); and its strengths, one
    # number or (R, 1, 1, 1), 0 where an image has fewer subjects.
    subjects: Sequence[tuple[list[KeysValues], Tensor | float]]
    scale: float

    def at(self, step: SolverStep, state: State) -> StepInputs:
        return StepInputs(self.text, self.added, self)

    def conditional(self) -> Self:
        subjects = [([(half(k), half(v)) for k, v in layers], half(s)) for layers, s in self.subjects]
        return replace(super().conditional(), subjects=subjects)

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        z = attention(q, k, v)  # (R, H, N, D)
        for context, strength in self.subjects:
            z = z + self.scale * (attention(q, *context[layer]) * strength)
        return z, None


# --- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IPAdapterTrainingConfig:
    """Options of the training."""

    # "base": a new projector, and the base's text K, V as context K, V; "ip_adapter": continue with the
    # bundle's.
    init: Literal["base", "ip_adapter"] = field(
        default="base", metadata={"help": "start from the base's K, V or from the bundle's IP-Adapter"}
    )

    def __post_init__(self) -> None:
        check_types(self)


class IPAdapterTraining(DenoisingTraining):
    """Eq. 1 of MoMA without masks and without a reference pass, on LLaVA's image tower."""

    Config = IPAdapterTrainingConfig
    about = "an IP-Adapter on LLaVA's image tower: projector and context K, V"
    fixed: ClassVar[Mapping[str, Any]] = {"image": "white", "encoder": "vision"}
    embedding, embedding_networks = "clip", ("vision",)
    trained = ("adapter.",)
    decayed = ("adapter.projector.",)  # K, V start as the base's

    def __init__(
        self,
        base: Base,
        weights: Any,
        config: IPAdapterTrainingConfig,
        method: IPAdapterConfig,
        seed: int,
    ) -> None:
        super().__init__(base, weights, config, method, seed)
        start = start_adapter(weights, (), token=False, seed=seed)  # where MoMA's stage 2 starts
        start.init_from_base(base.unet, DEFAULT)
        again = config.init == "ip_adapter"
        self.adapter = IPAdapter(weights.config("ip_adapter") if again else start.cfg, base.unet.cfg)
        state = weights.state("ip_adapter") if again else start.state_dict()
        self.adapter.load_state_dict({name: state[name].float() for name in self.adapter.state_dict()})
        self.adapter.to(base.device)

    @classmethod
    def check(cls, weights: Any, config: IPAdapterTrainingConfig, method: IPAdapterConfig) -> None:
        if config.init == "ip_adapter":
            weights.config("ip_adapter")
        check_embeddings(weights, "ip_adapter" if config.init == "ip_adapter" else "adapter")

    @classmethod
    def load_embedder(
        cls, runtime: Runtime, method: IPAdapterConfig
    ) -> Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]:
        vision = runtime.weights.build("vision", runtime.device, runtime.dtype).eval().requires_grad_(False)
        return lambda white, words, prompts: vision(white)[1]  # (B, E)

    def inputs(self, batch: Batch) -> StepInputs:
        context, text, added = self.adapter(batch["embedding"]), batch["text"], batch.get("added")
        return StepInputs(text, added, ImageConditioning(text, added, [(context, 1.0)], scale=1.0))

    def subjects(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[ImageSubject]:
        embeddings = batch["embedding"].split(1)  # (1, E) each
        return [ImageSubject(word, None, one) for word, one in zip(words, embeddings, strict=True)]

    def drawing(self) -> IPAdapterMethod:
        return IPAdapterMethod(self.base, None, self.adapter, self.method)

    def export(self) -> Export:
        tensors = dict(self.adapter.named_parameters())
        return Export({"ip_adapter": (self.adapter.cfg, tensors)}, methods={"ip-adapter": self.fixed})
