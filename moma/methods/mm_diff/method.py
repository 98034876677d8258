"""MM-Diff (arXiv 2403.15059): each subject is merged into its word, and read beside the text as tokens.

1. An image's CLIP embedding is merged into the token embedding of the subject's word, ahead of every text
   encoder.
2. The subject's tokens, refined by the image's patch tokens, are read by a second cross-attention, whose
   K, V are the base's with LoRAs of their own: Z = Attn(Q, K, V) + λ·Attn(Q, K_i, V_i).
3. LoRAs on the attention layers of the UNet and of the text encoders act in every step.

Letters: B images, R rows of a UNet call, H heads, N queries, T text tokens, S subject tokens of an image,
X width of the cross-attention, D channels per head, W width of a text encoder, P embedding of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from models.attention import attention
from models.clip import CLIPVision, CLIPVisionConfig
from models.clip_image import clip_image
from models.unet import Grid, KeysValues
from models.weights.packed import optimize_layout
from moma.inputs.faces import EMBEDDING, Face
from moma.inputs.preprocess import Reference, on_noise, on_white
from moma.methods.mm_diff.adapter import MMDiffAdapter, MMDiffSizes, frozen_context, merge
from moma.methods.mm_diff.config import PRESETS, MMDiffConfig
from moma.methods.mm_diff.images import face_pixels, padded
from moma.methods.mm_diff.prompts import MarkedPrompt, read_marked
from moma.methods.text import Prepared, Subject, TextConditioning, TextToImage
from moma.sampling.base import NETWORKS, Base, Change
from moma.sampling.config import SampleConfig
from moma.sampling.cuda_graphs import ConstantHook
from moma.sampling.diffusion import SolverStep, timesteps
from moma.sampling.finite import check_finite
from moma.sampling.interface import Runtime, State, StepInputs, TextInput, TextStates

WORDS, PATCHES = "mm_diff_vision", "mm_diff_public"  # the trained image encoder, and the public one
Text = tuple[TextInput, Tensor | None]  # text and added conditioning of R rows
PATCH_LAYER = -2  # of the public one's hidden states


def build_vision(cfg: CLIPVisionConfig, unet: Any) -> CLIPVision:
    return CLIPVision(cfg)


@dataclass(frozen=True, eq=False)
class MMDiffSubject(Subject):
    """A subject of one or more images; the first is the one that its word gets."""

    embedding: Tensor  # (1, P)
    tokens: Tensor  # (1, S, X)

    def with_more(self, others: Sequence["MMDiffSubject"]) -> Self:
        """The same subject with the tokens of more images of it."""
        return replace(self, tokens=torch.cat([self.tokens, *(one.tokens for one in others)], dim=1))


class MMDiff(TextToImage):
    """The base model with MM-Diff; up to eight subjects."""

    Config = MMDiffConfig
    Presets: ClassVar[Mapping[str, Any]] = PRESETS
    images, has_strength = range(1, 65), True
    encoding = (*TextToImage.encoding, "seen")
    own_networks: ClassVar[Mapping[str, Any]] = {
        "mm_diff": (MMDiffSizes, MMDiffAdapter),
        WORDS: (CLIPVisionConfig, build_vision),
        PATCHES: (CLIPVisionConfig, build_vision),
    }

    def __init__(
        self,
        base: Base,
        adapter: MMDiffAdapter,
        frozen: Sequence[KeysValues],
        vision: CLIPVision | None,
        patches: CLIPVision | None,
        config: MMDiffConfig,
    ) -> None:
        """A method on networks that have the LoRAs in them.

        Args:
            base: computes with the adapter's LoRAs (`merge` or `attach`).
            adapter: of MM-Diff.
            frozen: `frozen_context` of the base before its LoRAs were merged.
            vision: the trained image encoder; None where subjects are made elsewhere.
            patches: the public one, likewise.
            config: of the method.
        """
        super().__init__(base, config)
        self.adapter, self.frozen, self.vision, self.patches = adapter, frozen, vision, patches

    @classmethod
    def networks(cls, config: MMDiffConfig, encoders: bool) -> tuple[str, ...]:
        return (*NETWORKS, "mm_diff", WORDS, config.patches)

    @classmethod
    def check(cls, weights: Any, config: MMDiffConfig, encoders: bool = True) -> None:
        super().check(weights, config, encoders)
        sizes, vision, public = (weights.config(name) for name in ("mm_diff", WORDS, config.patches))
        found = vision.projection or vision.width, public.width
        if found != (sizes.embed_dim, sizes.patch_dim):
            raise ValueError(
                f"{weights.folder}: mm_diff reads embeddings and patches of {sizes.embed_dim} and"
                f" {sizes.patch_dim}, the image encoders give {found[0]} and {found[1]}"
            )
        if sizes.subject == "face" and sizes.face_dim != EMBEDDING:
            raise ValueError(
                f"{weights.folder}: mm_diff reads face embeddings of {sizes.face_dim}, expected {EMBEDDING}"
            )

    @classmethod
    def needs_face(cls, weights: Any) -> bool:
        return weights.config("mm_diff").subject == "face"

    @classmethod
    def load(cls, runtime: Runtime, config: MMDiffConfig) -> Self:
        weights, device = runtime.weights, runtime.device
        base = Base.load(replace(runtime, pack=False))
        adapter = weights.build("mm_diff", device, torch.float32).eval().requires_grad_(False)
        frozen = [(k.clone(), v.clone()) for k, v in frozen_context(base.unet)]
        merge(adapter, base.unet, base.text_encoders[: 1 if config.text_lora == "first" else None])
        if runtime.pack:
            optimize_layout(base.unet, device, runtime.dtype)
        vision, patches = (
            weights.build(name, device, runtime.dtype).eval().requires_grad_(False)
            for name in (WORDS, config.patches)
        )
        return cls(base, adapter.to(runtime.dtype), frozen, vision, patches, config)

    def with_config(self, config: MMDiffConfig) -> Self:
        for name in ("text_lora", "patches"):
            if getattr(config, name) != getattr(self.config, name):
                raise ValueError(f"{name} {getattr(config, name)!r}: is decided when the weights are loaded")
        return type(self)(self.base, self.adapter, self.frozen, self.vision, self.patches, config)

    @classmethod
    def read(
        cls, tokenizers: Sequence[Any], config: MMDiffConfig, words: Sequence[str], prompt: str
    ) -> MarkedPrompt:
        cls.check_subjects(words)
        return read_marked(tokenizers, words, prompt, config.absent_label)

    @torch.no_grad()
    def encode_reference(
        self, reference: Reference, word: str, *, seed: int = 0, face: Face | None = None, **options: Any
    ) -> MMDiffSubject:
        """The embedding of a subject's image and its tokens.

        Args:
            reference: of the subject.
            word: what it is.
            seed: of the noise behind a subject.
            face: in the original image; weights for faces need one.
            options: of `Method.encode_reference`.

        Raises:
            ValueError: without a face where one is needed, or with one that no use is made of.
        """
        if (face is not None) != (self.adapter.cfg.subject == "face"):
            needed = "read no face" if face else "draw people: expected the embedding and landmarks of a face"
            raise ValueError(f"{word!r}: these weights of MM-Diff {needed}")
        base, config = self.base, self.config
        side = self.vision.cfg.image_size
        if config.seen == "photo":
            pixels = padded(on_white(reference.original), side)
        else:
            white = config.seen == "segment"
            pixels = clip_image(reference.white if white else on_noise(reference, seed), side)
        pixels = pixels[None].to(base.device, base.dtype)  # (1, 3, side, side)
        embedding = self.vision(pixels)[1]  # (1, P)
        subject = embedding
        if face is not None:
            face.check()
            crop = face_pixels(on_white(reference.original), face, self.patches.cfg.image_size)
            pixels = crop[None].to(base.device, base.dtype)  # (1, 3, S, S)
            subject = torch.nn.functional.normalize(face.embedding, dim=0)[None].to(pixels)  # (1, 512)
        tokens = self.adapter.head(subject, self.patches.hidden(pixels, PATCH_LAYER))  # (1, S, X)
        check_finite("image encoder", embedding, tokens)
        return MMDiffSubject(word, reference, embedding, tokens)

    def join_images(self, images: Sequence[MMDiffSubject]) -> MMDiffSubject:
        return images[0].with_more(images[1:]) if len(images) > 1 else images[0]

    def condition(self, prepared: Sequence[Prepared], config: SampleConfig) -> "MMDiffConditioning":
        start, subjects = self.config.start_merge_step, [one.job.subjects for one in prepared]
        pure = self._text(prepared, config, merged=False) if start or not any(subjects) else None
        if start >= config.steps or not any(subjects):
            return MMDiffConditioning(*pure)
        hook = self.hook(
            [[one.tokens for one in row] for row in subjects],
            [one.job.strengths(config.strength) for one in prepared],
        )
        grid = timesteps(self.base.schedule, config.steps, config.solver, config.grid)
        return MMDiffConditioning(*self._text(prepared, config, merged=True), pure, grid[start], hook)

    def hook(
        self, subjects: Sequence[Sequence[Tensor]], strengths: Sequence[Sequence[float]]
    ) -> "SubjectHook":
        """The second cross-attention of B images.

        The subjects of an image share one softmax; the strength of each weighs its values.

        Args:
            subjects: tokens of each image's, (1, S, X) each.
            strengths: of the same.
        """
        like = next(tokens for row in subjects for tokens in row)
        lengths = [sum(tokens.shape[1] for tokens in row) for row in subjects]
        tokens = like.new_zeros(len(subjects), max(lengths), like.shape[2])  # (B, S, X)
        # The largest strength of each image, and the subjects' tokens' beside it.
        strongest = torch.zeros(len(subjects))  # (B,)
        weights = torch.ones(tokens.shape[:2])  # (B, S)
        for i, (row, each) in enumerate(zip(subjects, strengths, strict=True)):
            if row:
                tokens[i, : lengths[i]] = torch.cat(list(row), dim=1)[0]
                strongest[i] = max(each)
                spread = [
                    s / (max(each) or 1) for x, s in zip(row, each, strict=True) for _ in range(x.shape[1])
                ]
                weights[i, : lengths[i]] = torch.tensor(spread)
        counts = torch.tensor(lengths, device=like.device)  # (B,)
        keep = torch.arange(max(lengths), device=like.device) < counts[:, None]  # (B, S)
        scale = strongest.to(like.device) * self.config.fuse_scale  # (B,), 0 without subjects
        weights = weights[:, None, :, None].to(like)  # (B, 1, S, 1), of the values
        layers = [(k, v * weights) for k, v in self.adapter.keys_values(tokens, self.frozen)]
        return SubjectHook(layers, keep[:, None, None], scale[:, None, None, None].to(like.dtype))

    def _text(self, prepared: Sequence[Prepared], config: SampleConfig, merged: bool) -> Text:
        """Text K, V and added conditioning of both rows of guidance, R = 2B.

        Args:
            prepared: B jobs.
            config: with the images' sizes.
            merged: with the subjects' images in their words.
        """
        states, pooled = self.read_texts(prepared, merged)
        added = self.base.added_conditioning(pooled, config.height, config.width)  # (R, A)
        return self.base.unet.text_kv(states), added

    def read_texts(self, prepared: Sequence[Prepared], merged: bool) -> TextStates:
        """What the UNet reads of B jobs, negative texts first: (R, T, C), (R, P).

        Args:
            prepared: the jobs.
            merged: with the subjects' images in their words.
        """
        read = [one.negative for one in prepared] + [one.prompt.encodings for one in prepared]
        absent = [not one.job.negative for one in prepared] + [False] * len(prepared)
        change = self._fuse(prepared) if merged and self.config.fuse_words else None
        return self.base.encode_text(read, absent, change)

    def _fuse(self, prepared: Sequence[Prepared]) -> Change:
        """What merges images into the words of both rows of guidance; see `merge_words`."""
        found = [
            (row, place, subject.embedding)
            for i, one in enumerate(prepared)
            for subject, place in zip(one.job.subjects, zip(*one.prompt.places, strict=True), strict=True)
            for row in ((i,) if self.config.fuse_negative and one.job.negative else ()) + (i + len(prepared),)
            if place[0] is not None
        ]
        if not found:
            return lambda encoder, words: words
        rows, places, embeddings = zip(*found, strict=True)
        images = self.adapter.images(torch.cat(embeddings))  # of each text encoder (·, W)

        def fuse(encoder: int, words: Tensor) -> Tensor:
            columns = [place[encoder] for place in places]
            where = tuple(torch.tensor(x, device=words.device) for x in (rows, columns))
            return merge_words(self.adapter, encoder, words, where, images[encoder])

        return fuse


def merge_words(
    adapter: MMDiffAdapter, encoder: int, words: Tensor, where: tuple[Tensor, Tensor], images: Tensor
) -> Tensor:
    """Token embeddings (R, T, W) with the images in the subjects' words.

    Args:
        adapter: has the network that merges.
        encoder: number of the text encoder.
        words: its token embeddings, (R, T, W).
        where: rows and positions of the subjects, (S,) each.
        images: theirs, (S, W).
    """
    merged = adapter.fuse[encoder](words[where], images)  # (S, W)
    return words.index_put(where, merged.to(words.dtype))


@dataclass(frozen=True, eq=False)
class SubjectHook(ConstantHook):
    """The second cross-attention, in the conditional rows; the others come first, as guidance has them."""

    layers: list[KeysValues]  # K and V of the subjects' tokens, (B, H, S, D) each
    keep: Tensor  # bool (B, 1, 1, S); images may have different numbers of tokens
    scale: Tensor  # (B, 1, 1, 1): λ, 0 without subjects

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        z, first = attention(q, k, v), len(q) - len(self.keep)  # (R, H, N, D)
        added = attention(q[first:], *self.layers[layer], self.keep) * self.scale  # (B, H, N, D)
        return torch.cat([z[:first], z[first:] + added.to(z.dtype)]), None


@dataclass(frozen=True, eq=False)
class MMDiffConditioning(TextConditioning):
    """The conditioning of a batch: plain text in the first steps, then the subjects."""

    pure: Text | None = None  # text and added conditioning of the first steps
    merged_from: int = -1  # timestep of the first step with subjects
    hook: SubjectHook | None = None

    def at(self, step: SolverStep, state: State) -> StepInputs:
        if self.pure is not None and step.t > self.merged_from:
            return StepInputs(*self.pure)
        return StepInputs(self.text, self.added, self.hook)

    def conditional(self) -> Self:
        pure = self.pure and TextConditioning(*self.pure).conditional()
        return replace(super().conditional(), pure=pure and (pure.text, pure.added))
