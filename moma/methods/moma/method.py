"""MoMA (arXiv 2404.05674): one image of a subject in, new images of it out, without tuning.

The equations are in `attention.py` (Eq. 3, decoupled cross-attention) and `masks.py` (M_ref, M_gen); this
file says in which order they are used: the reference pass once per subject, the MLLM once per prompt, and the
conditioning once per batch. Several subjects in one image: `several.py`.

Letters: B images, R = 2B rows of a UNet call, Z latent channels, S side of the reference, h w latents,
T text tokens, E embedding, P texts of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from models.unet import KeysValues, attention_grids, attention_layers
from moma.inputs.preprocess import Reference
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.attention import ReferenceLayer, side_by_side
from moma.methods.moma.conditioning import both_rows, condition_rows, reference_features
from moma.methods.moma.config import PRESETS, MethodConfig
from moma.methods.moma.feature_cache import FeatureCache, cached_features
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.methods.moma.several import (
    SeveralConditioning,
    Shown,
    allowed_of,
    competing_layers,
    label_weights,
    reads_of,
    subject_rows,
)
from moma.methods.prompts import Prompt, own_prompt, read_prompt
from moma.methods.text import Subject, TextConditioning, TextToImage
from moma.sampling.base import NETWORKS, Base
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod
from moma.sampling.finite import check_finite
from moma.sampling.interface import Job, Region, Runtime, TextInput

# Turns a seed into another one for the reference's noise, so that it is not the start noise of an image with
# the same seed. Any pattern of 32 bits serves; torch's CPU generator ignores higher ones.
REFERENCE_STREAM = 0x9E3779B9


@dataclass(frozen=True, eq=False)
class MoMASubject(Subject):
    """What is computed once per subject."""

    layers: list[ReferenceLayer]  # L x K', V', M_ref, one row each
    features: Mapping[str, Tensor]  # prompt -> the feature decoder's embedding (1, E), as far as computed
    images: tuple["MoMASubject", ...] = ()  # what `join_images` made it of


class MoMAPrepared(NamedTuple):
    """A job with its texts and the embedding (1, E) of each subject."""

    job: Job
    prompt: Prompt
    negative: Any
    embeddings: tuple[Tensor, ...]
    own: tuple[Prompt, ...]  # each subject's prompt without the others, where the job has regions

    @property
    def regions(self) -> tuple[Region | None, ...]:
        """Of each subject."""
        return self.job.regions or (None,) * len(self.job.subjects)


class MoMA(TextToImage):
    """MoMA on a base model. `decoder` is None where subjects bring the embeddings of their prompts."""

    Config = MethodConfig
    Presets = PRESETS
    images, has_strength = range(1, 65), True
    encoding = (
        *TextToImage.encoding,
        *("reference_noise", "reference_text_cut", "keep_one_key", "template", "mllm_layers"),
    )
    training_fields = ("lambda_init", "subject_init", "context_init")
    own_networks: ClassVar[Mapping[str, Any]] = {"adapter": (AdapterConfig, Adapter)}

    def __init__(
        self, base: Base, adapter: Adapter, decoder: FeatureDecoder | None, config: MethodConfig
    ) -> None:
        super().__init__(base, config)
        self.adapter, self.decoder = adapter, decoder

    @classmethod
    def batch_dependent(cls, config: MethodConfig) -> bool:
        return config.m_gen_norm == "batch"

    @classmethod
    def networks(cls, config: MethodConfig, encoders: bool) -> tuple[str, ...]:
        return (*NETWORKS, "adapter", *(("vision", "llava") if encoders else ()))

    @classmethod
    def check(cls, weights: Any, config: MethodConfig, encoders: bool = True) -> None:
        super().check(weights, config, encoders)
        config.check(
            attention_layers=len(attention_layers(weights.config("unet"))),
            mllm_layers=weights.config("llava").llama.layers if encoders else None,
            text_tokens=weights.config("text").positions,
            learnable_token=weights.config("adapter").learnable_token,
        )

    @classmethod
    def load(cls, runtime: Runtime, config: MethodConfig) -> Self:
        decoder, beside = None, cls.needed(runtime.weights, config, encoders=False)
        adapter = runtime.weights.build("adapter", runtime.device, runtime.dtype).eval().requires_grad_(False)
        if runtime.encoders:
            decoder = FeatureDecoder.load(runtime, config, adapter, beside)
        return cls(Base.load(runtime), adapter, decoder, config)

    def with_config(self, config: MethodConfig) -> Self:
        config.check(
            len(self.adapter.layers),
            self.decoder and self.decoder.llava.cfg.llama.layers,
            self.base.text_encoders[0].cfg.positions,
            self.adapter.token is not None,
        )
        decoder = self.decoder and FeatureDecoder(
            self.decoder.llava, self.adapter, self.decoder.tokenizer, config, self.decoder.how
        )
        return type(self)(self.base, self.adapter, decoder, config)

    # --- once per subject ----------------------------------------------------------------------------

    @classmethod
    def precompute(
        cls,
        runtime: Runtime,
        config: MethodConfig,
        references: Sequence[tuple[Reference, str, Sequence[str]]],
        cache: Path | None,
    ) -> tuple[list[dict[str, Tensor]], str]:
        """The feature decoder's embeddings, by an MLLM that is freed on return (`Method.precompute`)."""
        inputs = [
            MLLMInput(one.white, word, prompt) for one, word, prompts in references for prompt in prompts
        ]
        kept = None if cache is None else FeatureCache.of(cache, runtime, config)
        found, how = cached_features(
            inputs, kept, lambda: FeatureDecoder.load(runtime, config, None, ("adapter",))
        )
        rest = iter(found)
        return [{prompt: next(rest) for prompt in prompts} for _, _, prompts in references], how

    def encode_reference(
        self,
        reference: Reference,
        word: str,
        *,
        seed: int = 0,
        prompts: Sequence[str] = (),
        features: Mapping[str, Tensor] | None = None,
        posterior_noise: Tensor | None = None,
        reference_noise: Tensor | None = None,
    ) -> MoMASubject:
        """The reference pass, and the embeddings of prompts that are known (`Method.encode_reference`).

        Args:
            reference: the subject's square.
            word: what the subject is.
            seed: of the two noises, unless they are given.
            prompts: for which the decoder is asked, together.
            features: of `precompute`.
            posterior_noise: float32 (1, Z, S/f, S/f), of the autoencoder's posterior.
            reference_noise: likewise, of `add_noise` at t = 0.
        """
        layers = self.reference_pass(
            reference.image, reference.mask, word, seed, posterior_noise, reference_noise
        )
        known = {prompt: self._placed(one) for prompt, one in (features or {}).items()}
        new = [MLLMInput(reference.white, word, prompt) for prompt in prompts if prompt not in known]
        if new:
            known |= {one.prompt: x for one, x in zip(new, self.embed(new), strict=True)}
        return MoMASubject(word, reference, layers, known)

    @torch.no_grad()
    def reference_pass(
        self,
        image: Tensor,
        m_ref: Tensor,
        word: str,
        seed: int = 0,
        posterior_noise: Tensor | None = None,
        reference_noise: Tensor | None = None,
    ) -> list[ReferenceLayer]:
        """K', V' and M_ref of every self-attention layer (Sec. 3.3): one UNet call at t = 0.

        Args:
            image: (1, 3, S, S) in [-1, 1].
            m_ref: (1, 1, H, W) in {0, 1}, of any size.
            word: the label, which is the call's text.
            seed: of the two noises, unless they are given (`MethodConfig.reference_noise`).
            posterior_noise: float32 (1, Z, S/f, S/f).
            reference_noise: likewise.
        """
        base = self.base
        moments = base.encode_image(image)  # 2 x (1, Z, S/f, S/f)
        noises = self._reference_noises(moments[0].shape, seed, posterior_noise, reference_noise)
        latent = reference_latent(*moments, noises, base.vae.cfg.scaling, base.schedule).to(base.dtype)
        label, pooled = base.encode_text([word])  # (1, T, context_dim), (1, P)
        added = base.added_conditioning(pooled, *image.shape[-2:])  # (1, A)
        m_ref = m_ref.to(base.device)
        layers = reference_features(base.unet, self.adapter, latent, label, m_ref, self.config, added)
        check_finite("UNet (reference)", *(part for layer in layers for part in (layer.k, layer.v)))
        return layers

    def _reference_noises(self, shape: torch.Size, seed: int, *given: Tensor | None) -> list[Tensor] | None:
        """The posterior's and the schedule's noise, float32 (1, Z, h, w) each; None = a clean reference."""
        if self.config.reference_noise == "none":
            return None
        generator = None  # "global", the release: torch's own
        if self.config.reference_noise == "seeded":
            generator = torch.Generator().manual_seed(seed ^ REFERENCE_STREAM)
        for noise in given:
            if noise is not None and noise.shape != shape:
                raise ValueError(f"reference noise {tuple(noise.shape)}: expected {tuple(shape)}")
        drawn = [torch.randn(shape, generator=generator) for _ in given]
        return [(d if g is None else g).to(self.base.device) for d, g in zip(drawn, given, strict=True)]

    def embed(self, inputs: Sequence[MLLMInput]) -> list[Tensor]:
        """The decoder's embeddings (1, E); ValueError where there is no MLLM."""
        if self.decoder is None:
            raise ValueError("without an MLLM every subject must bring the embeddings of its prompts")
        return self.decoder.encode_features(inputs)

    def _placed(self, embedding: Tensor) -> Tensor:
        expected = (1, self.adapter.cfg.embed_dim)
        if tuple(embedding.shape) != expected:
            raise ValueError(f"embedding {tuple(embedding.shape)}: expected {expected}")
        return embedding.to(self.base.device, self.base.dtype)

    # --- once per batch ------------------------------------------------------------------------------

    @classmethod
    def read(
        cls, tokenizers: Sequence[Any], config: MethodConfig, words: Sequence[str], prompt: str
    ) -> Prompt:
        cls.check_subjects(words)
        found = read_prompt(tokenizers, words, prompt, config.label_tokens, config.absent_label)
        for i, j in combinations(range(len(words) if config.ownership == "word" else 0), 2):
            if words[i].lower() == words[j].lower() or found.labels[i] == found.labels[j]:
                raise ValueError(
                    f"two subjects are {words[i]!r}, and their words are to tell them apart: name each by its"
                    " looks, such as 'striped cat', or take --set ownership=reference"
                )
        return found

    @classmethod
    def check_regions(cls, config: MethodConfig, regions: Sequence[Region | None]) -> None:
        """ValueError for regions that leave subjects open where they alone decide; config: of the method."""
        if config.ownership != "regions" or len(regions) < 2:
            return
        for (i, one), (j, other) in combinations(enumerate(regions, 1), 2):
            if one is None or other is None:
                raise ValueError("ownership 'regions': expected a region for each subject")
            if max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(
                one[3], other[3]
            ):
                raise ValueError(
                    f"ownership 'regions': those of subjects {i} and {j} overlap, expected them apart"
                )

    def join_images(self, images: Sequence[MoMASubject]) -> MoMASubject:
        """Several images of one subject: K', V', M_ref side by side, and the mean of the embeddings."""
        if len(images) < 2:
            return super().join_images(images)
        layers = [side_by_side(rows) for rows in zip(*(one.layers for one in images), strict=True)]
        known = set.intersection(*(set(one.features) for one in images))
        features = {prompt: _mean([one.features[prompt] for one in images]) for prompt in known}
        return MoMASubject(
            images[0].word, images[0].reference, layers, features, tuple(images), made=images[0].made
        )

    def prepare(self, jobs: Sequence[Job]) -> list[MoMAPrepared]:
        """Jobs checked and tokenised; the MLLM reads every new pair of subject and prompt once, together."""
        prepared = super().prepare(jobs)
        for job in jobs:
            if self.config.ownership == "regions" and len(job.subjects) > 1 and not job.regions:
                raise ValueError("ownership 'regions': expected a region for each subject")
        pairs = dict.fromkeys((one, job.prompt) for job in jobs for one in job.subjects)
        known = {(one, prompt): one.features[prompt] for one, prompt in pairs if prompt in one.features}
        new = [pair for pair in pairs if pair not in known]
        asked = [(image, prompt) for one, prompt in new for image in one.images or (one,)]
        inputs = [MLLMInput(image.reference.white, image.word, prompt) for image, prompt in asked]
        found = iter(self.embed(inputs) if inputs else ())
        known |= {pair: _mean([next(found) for _ in pair[0].images or (pair[0],)]) for pair in new}
        return [
            MoMAPrepared(*one, tuple(known[x, one.job.prompt] for x in one.job.subjects), self._own(one.job))
            for one in prepared
        ]

    def _own(self, job: Job) -> tuple[Prompt, ...]:
        words = [one.word for one in job.subjects]
        return tuple(
            self.read(self.base.tokenizers, self.config, [word], own_prompt(words, job.prompt, i))
            for i, word in enumerate(words if any(job.regions) else ())
        )

    def condition(self, prepared: Sequence[MoMAPrepared], config: SampleConfig) -> TextConditioning:
        """Context tokens, reference features, label positions and β of both rows of guidance.

        The unconditional rows get the context tokens of a zero embedding, and the subject's features like the
        conditional ones (release).
        """
        text, added = self.encode_texts(prepared, config)  # R = 2B rows
        if not any(one.job.subjects for one in prepared):
            return TextConditioning(text, added)
        if any(len(one.job.subjects) != 1 or any(one.regions) for one in prepared):
            return self._several(prepared, config, text, added)
        label = torch.zeros(len(prepared), len(prepared[0].prompt.encodings[0].ids))  # (B, T)
        for row, one in zip(label, prepared, strict=True):
            row[list(one.prompt.labels[0])] = 1
        beta = torch.tensor([one.job.strengths(config.strength)[0] for one in prepared])  # (B,)
        beta = torch.cat([self.config.unconditional_beta * beta, beta])  # (R,)
        embedding = torch.cat([one.embeddings[0] for one in prepared])  # (B, E)
        return condition_rows(
            self.adapter,
            torch.cat([torch.zeros_like(embedding), embedding]),  # (R, E)
            text,
            added,
            torch.cat([label, label]).to(self.base.device),  # (R, T)
            both_rows([one.job.subjects[0].layers for one in prepared]),
            beta.to(self.base.device, self.base.dtype),
            self.config,
        )

    def _several(
        self, prepared: Sequence[MoMAPrepared], config: SampleConfig, text: TextInput, added: Tensor | None
    ) -> SeveralConditioning:
        """The same for images of any numbers of subjects, at least one in all.

        Args:
            prepared: B jobs.
            config: with the images' sizes.
            text: of `encode_texts`.
            added: likewise.
        """
        base, labels = self.base, [one.prompt.labels for one in prepared]
        most, regions = max(map(len, labels)), [one.regions for one in prepared]
        label = label_weights(labels, most, len(prepared[0].prompt.encodings[0].ids))  # (B, S, T)
        factor = base.vae.cfg.factor
        grid, reads = (config.height // factor, config.width // factor), None
        if any(map(any, regions)):
            own = [[*one.own, *[one.prompt] * (most - len(one.own))] for one in prepared]  # B x S
            text = self._beside(text, own)
            labels = [[x.labels[0] for x in one.own] for one in prepared]
            beside = label_weights(labels, most, label.shape[-1])  # (B, S, T), each in a text of its own
            beside = torch.diag_embed(beside.mT).permute(0, 2, 3, 1).flatten(2)  # (B, S, S*T)
            label = torch.cat([label, beside], dim=-1)  # (B, S, P*T)
            reads = reads_of(regions, grid).to(base.device)  # (R, P, h, w)
        shown = [
            [
                Shown(*pair, strength)
                for *pair, strength in zip(
                    one.embeddings,
                    (subject.layers for subject in one.job.subjects),
                    one.job.strengths(config.strength),
                    strict=True,
                )
            ]
            for one in prepared
        ]
        return SeveralConditioning(
            text,
            added,
            torch.cat([label, label]).to(base.device),  # (R, S, P*T)
            subject_rows(self.adapter, shown, self.config),
            [new.scale for new in self.adapter.subject],
            allowed_of(regions, grid).to(base.device),
            reads,
            competing_layers(attention_grids(base.unet.cfg, grid), most, self.config),
            self.config,
        )

    def _beside(self, text: TextInput, own: Sequence[Sequence[Prompt]]) -> list[KeysValues]:
        """K, V of more texts beside each image's first.

        Args:
            text: K, V of R rows.
            own: S texts of each of B images.
        """
        states = self.base.encode_text([one.encodings for row in own for one in row]).states  # (B*S, T, C)
        more = self.base.unet.text_kv(states.unflatten(0, (len(own), -1)).flatten(1, 2))  # (B, H, S*T, D)
        return [
            tuple(torch.cat([x, torch.cat([y, y])], dim=2) for x, y in zip(*pair, strict=True))
            for pair in zip(text, more, strict=True)
        ]  # (R, H, P*T, D) each


def _mean(embeddings: Sequence[Tensor]) -> Tensor:
    """(1, E) each -> (1, E); one alone stays as it is."""
    return embeddings[0] if len(embeddings) == 1 else torch.stack(list(embeddings)).mean(dim=0)


def reference_latent(
    mean: Tensor,
    std: Tensor,
    noises: Sequence[Tensor] | None,
    scaling: float,
    schedule: ScheduleConfig,
) -> Tensor:
    """The posterior of the reference -> the latent that the UNet sees at t = 0.

    Args:
        mean: (B, Z, h, w), not scaled.
        std: likewise.
        noises: of the posterior and of `add_noise` at t = 0, each like mean; None = the posterior's mean
        alone
            (the paper's "clear reference image").
        scaling: the autoencoder's.
        schedule: the base's.

    Returns:
        float32 (B, Z, h, w).
    """
    if noises is None:
        return mean.float() * scaling
    latent = (mean.float() + std.float() * noises[0]) * scaling
    return add_noise(latent, noises[1], alphas_cumprod(schedule)[0])
