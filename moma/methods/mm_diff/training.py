"""The training of MM-Diff: Eq. 1, and each subject's attention kept to its mask.

The last blocks of the image encoder train with the adapter: caches hold the states before them. The subject's
tokens are made of its own embedding and patches (paper), or of a face's (release); its image is the subject
on white or on noise.

Letters: B samples, N queries, T text tokens, K tokens of a subject, n subjects of a sample, H heads,
D channels per head, W width of a text encoder, P embedding of an image, M states of the image encoder,
C their width, H W sides of the images.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.clip import CLIPVision
from models.unet import Grid
from moma.methods.map_loss import Form, map_loss
from moma.methods.mm_diff.adapter import MMDiffAdapter, MMDiffSizes, TextLoRA, attach, frozen_context
from moma.methods.mm_diff.config import MMDiffConfig
from moma.methods.mm_diff.method import PATCH_LAYER, WORDS, MMDiff, MMDiffSubject, SubjectHook
from moma.methods.mm_diff.prompts import TRIGGER, MarkedPrompt, read_marked
from moma.sampling.base import Base
from moma.sampling.config import LARGEST, check_types
from moma.sampling.interface import Batch, DenoisingTraining, Export, Job, Runtime, StepInputs

TRAINABLE = 2  # last blocks of the image encoder that caches leave out
# Names of the adapter's parameters that an ablation leaves as they start, without an effect.
ABLATED = {
    "nothing": r"(?!)",
    "words": r"images\.|fuse\.",
    "refiner": r"head\.refiner\.",
    "loras": r"text\.|unet\.\d+\.attn",
}


@dataclass(frozen=True)
class MMDiffTrainingConfig:
    """Options of the training."""

    init: Literal["base", "mm_diff"] = "base"  # start anew, or go on with the bundle's
    subject: Literal["cls", "face"] = "cls"  # what the tokens are made of; a face must be in the data
    rank: int = 64  # of the UNet's LoRAs
    text_rank: int = 64  # of the text encoders'
    refiner_blocks: int = 4
    # The paper's ablations: no image in the words, tokens of the embedding alone, or LoRAs on the K, V of the
    # subjects' tokens only.
    without: Literal["nothing", "words", "refiner", "loras"] = "nothing"
    encoder_blocks: int = 2  # last ones of the image encoder that are trained, up to 2 (FastComposer)
    # A subject is left out of a sample, whose caption stays, with this probability (FastComposer).
    drop_subject: float = 0.1
    background: Literal["white", "noise"] = "white"  # behind a subject; the paper's figure, FastComposer
    # Weights of the constraint on attention maps (FastComposer's): of the subjects' words in the text's
    # attention, and of their tokens, summed, in the second attention.
    map_weight: float = 1e-3
    image_map_weight: float = 1e-3
    map_form: Form = "balanced"
    map_normalise: bool = False  # each map is divided by its maximum first

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("rank", "text_rank", "refiner_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.encoder_blocks <= TRAINABLE:
            raise ValueError(f"encoder_blocks {self.encoder_blocks}: expected 0 to {TRAINABLE}")
        if not 0 <= self.drop_subject < 1:
            raise ValueError(f"drop_subject {self.drop_subject}: expected 0 or more, below 1")
        for name in ("map_weight", "image_map_weight"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} {getattr(self, name)}: expected a finite number, 0 or more")


class VisionTail(nn.Module):
    """The end of an image encoder, trained, and the frozen block that gives the patch tokens."""

    def __init__(self, vision: CLIPVision, public: CLIPVision) -> None:
        super().__init__()
        self.first = vision.cfg.layers - TRAINABLE
        self.blocks, self.norm = vision.encoder.layers[self.first :], vision.post_layernorm
        self.projection = getattr(vision, "visual_projection", None)
        self.frozen = deepcopy(public.encoder.layers[self.first])

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States before the last blocks (B, M, C) -> embedding (B, P) and patch tokens (B, M, C)."""
        x = states
        for block in self.blocks:
            x = block(x, False)  # (B, M, C)
        x = self.norm(x[:, 0])  # (B, C)
        return x if self.projection is None else self.projection(x), self.frozen(states, False)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by their names in the image encoder."""
        blocks = {f"encoder.layers.{self.first + i}.": block for i, block in enumerate(self.blocks)}
        parts = blocks | {"post_layernorm.": self.norm}
        if self.projection is not None:
            parts["visual_projection."] = self.projection
        return {start + name: p for start, part in parts.items() for name, p in part.named_parameters()}


class MMDiffTraining(DenoisingTraining):
    """Eq. 1 with the subjects in words and tokens, and the constraint on their attention maps."""

    Config = MMDiffTrainingConfig
    about = "MM-Diff: refiner, fusion, LoRAs on UNet and text encoders, end of the image encoder"
    fixed: ClassVar[Mapping[str, Any]] = {"seen": "segment", "patches": "vision", "text_lora": "both"}
    embedding, embedding_networks = "states before the last blocks", ("vision",)
    captions_alone = several = True
    decayed = ("adapter.",)

    def __init__(
        self, base: Base, weights: Any, config: MMDiffTrainingConfig, method: MMDiffConfig, seed: int
    ) -> None:
        super().__init__(base, weights, config, method, seed)
        again, self.weights = config.init == "mm_diff", weights
        public = weights.build("vision", base.device, torch.float32)
        vision = weights.build(WORDS, base.device, torch.float32) if again else deepcopy(public)
        self.vision_cfg, self.tail = vision.cfg, VisionTail(vision, public)
        sizes = weights.config("mm_diff") if again else new_sizes(base, vision, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = MMDiffAdapter(sizes, base.unet.cfg)
        if again:
            state = weights.state("mm_diff")
            self.adapter.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        if config.without == "refiner":
            nn.init.zeros_(self.adapter.head.refiner.norm_out.weight)  # its bias is 0
        ablated = re.compile(ABLATED[config.without]).match
        self.adapter.to(base.device)
        attach(self.adapter, base.unet, base.text_encoders)
        self.frozen = frozen_context(base.unet)
        blocks = range(TRAINABLE - config.encoder_blocks, TRAINABLE)
        ends = ("tail.norm.", "tail.projection.") if config.encoder_blocks else ()
        own = [f"adapter.{name}" for name, _ in self.adapter.named_parameters() if not ablated(name)]
        self.trained = (*own, *(f"tail.blocks.{i}." for i in blocks), *ends)

    @classmethod
    def check(cls, weights: Any, config: MMDiffTrainingConfig, method: MMDiffConfig) -> None:
        if weights.config("vision").layers <= TRAINABLE:
            raise ValueError(f"{weights.folder}: vision has too few layers, expected more than {TRAINABLE}")
        if config.init == "mm_diff":
            if (found := weights.config("mm_diff").subject) != config.subject:
                raise ValueError(
                    f"{weights.folder}: its mm_diff reads {found!r}, expected subject {config.subject!r}"
                )
            MMDiff.check(weights, method)

    @classmethod
    def load_embedder(cls, runtime: Runtime, method: MMDiffConfig) -> Callable[..., Tensor]:
        vision = runtime.weights.build("vision", runtime.device, runtime.dtype).eval().requires_grad_(False)

        def embed(
            white: Tensor,
            words: Sequence[str],
            prompts: Sequence[str],
            faces: tuple[Tensor, Tensor] | None = None,
        ) -> Tensor:
            states = vision.hidden(white, -1 - TRAINABLE).flatten(1)  # (B, M * C)
            if faces is None:
                return states
            own, crops = faces
            own = F.normalize(own, dim=1).to(states.dtype)  # (B, 512)
            patches = vision.hidden(crops, PATCH_LAYER).flatten(1)  # (B, M * C)
            return torch.cat([states, own, patches], dim=1)  # (B, 2 * M * C + 512)

        return embed

    @classmethod
    def background(cls, config: MMDiffTrainingConfig) -> Literal["white", "noise"]:
        return config.background

    @classmethod
    def faces(cls, config: MMDiffTrainingConfig) -> bool:
        return config.subject == "face"

    @classmethod
    def places(
        cls, tokenizers: Sequence[Any], caption: str, words: Sequence[str], ends: Sequence[int | None]
    ) -> list[tuple[int, ...]]:
        found = []
        for word, end in zip(words, ends, strict=True):
            marked = caption if end is None else f"{caption[:end]}{TRIGGER}{caption[end:]}"
            try:
                places = read_marked(tokenizers, [word], marked, "ignore").places
            except ValueError:  # beyond the text encoder's limit, for one
                places = [(None,)] * len(tokenizers)
            found.append(tuple(place[0] or 0 for place in places))
        return found

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"absent": torch.rand(MMDiff.subjects[-1], generator=generator) < self.config.drop_subject}

    def inputs(self, batch: Batch) -> StepInputs:
        embedding, tokens = self._subjects(batch)  # (B * n, P), (B, n, K, X)
        images = self.adapter.images(embedding)  # of each text encoder (B * n, W)
        b, n, k = tokens.shape[:3]
        places = batch["places"].unbind(dim=2)  # of each text encoder (B, n)
        read = (places[0] > 0) | batch["drop_text"][:, None]  # (B, n)
        shown = batch["present"] & read & ~batch["drop"][:, None] & ~batch["absent"][:, :n]  # (B, n)
        named = [shown & (place > 0) for place in places]  # (B, n) each
        # The others write what is there at BOS, where no word is.
        places = [place * here for place, here in zip(places, named, strict=True)]
        rows = torch.arange(b, device=shown.device)[:, None]  # (B, 1)

        def change(encoder: int, words: Tensor) -> Tensor:
            before = words[rows, places[encoder]]  # (B, n, W)
            merged = self.adapter.fuse[encoder](before, images[encoder].unflatten(0, (b, n))).to(words.dtype)
            chosen = torch.where(named[encoder][..., None], merged, before)  # (B, n, W)
            return words.index_put((rows, places[encoder]), chosen)

        merged = change if self.config.without != "words" else None
        text, pooled = self.base.encode_ids(batch["text_ids"], batch["drop_text"], merged)
        keep = shown.repeat_interleave(k, dim=1)  # (B, n * K)
        hook = MapHook(
            self.adapter.keys_values(tokens.flatten(1, 2), self.frozen),
            keep[:, None, None],
            shown.any(dim=1)[:, None, None, None].to(tokens.dtype),
            F.one_hot(places[0], text.shape[1]).mT[:, None].to(text.dtype),
            batch["m_gen"],
            torch.stack([named[0], shown]),
            batch["mean"].shape[-2:],
            self.config,
        )
        return StepInputs(text, self.base.added_conditioning(pooled, *batch["m_gen"].shape[-2:]), hook)

    def constraint(self, maps: Sequence[Tensor], batch: Batch) -> Tensor | float:
        return torch.stack(list(maps)).mean(dim=0) if maps else 0.0

    def _subjects(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (B * n, P) and tokens (B, n, K, X)."""
        count, width = batch["embedding"].shape[:2], self.vision_cfg.width  # B, n
        rows = batch["embedding"].flatten(0, 1).to(self.tail.norm.weight.dtype)  # (B * n, E)
        own, faced = self.adapter.cfg.face_dim, self.config.subject == "face"
        length = (rows.shape[1] - own) // 2 if faced else rows.shape[1]  # M * C
        states, face, crop = rows.split([length, *((own, length) if faced else (0, 0))], dim=1)
        embedding, patches = self.tail(states.unflatten(1, (-1, width)))  # (B * n, P), (B * n, M, C)
        subject = embedding
        if faced:
            subject, patches = face, crop.unflatten(1, (-1, width))  # (B * n, 512), (B * n, M, C)
        return embedding, self.adapter.head(subject, patches).unflatten(0, count)

    def subjects(
        self, batch: Batch, words: Sequence[str], prompts: Sequence[str]
    ) -> list[tuple[MMDiffSubject, ...]]:
        embedding, tokens = self._subjects(batch)  # (B * n, P), (B, n, K, X)
        embedding = embedding.unflatten(0, tokens.shape[:2])  # (B, n, P)
        return [
            tuple(MMDiffSubject(word, None, e[i : i + 1], t[i : i + 1]) for i in range(int(present.sum())))
            for word, e, t, present in zip(words, embedding, tokens, batch["present"], strict=True)
        ]

    def jobs(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[Job]:
        """The captions are read as the cache has them, whose words may need no mark."""
        jobs = []
        for job, places in zip(super().jobs(batch, words, prompts), batch["places"].mT.tolist(), strict=True):
            own = tuple(tuple(place or None for place in one[: len(job.subjects)]) for one in places)
            labels = tuple((place,) if place else () for place in own[0])
            text = MarkedPrompt(job.prompt, self.base.tokenize(job.prompt), labels, own)
            jobs.append(replace(job, text=text))
        return jobs

    def drawing(self) -> MMDiff:
        return MMDiff(self.base, self.adapter, self.frozen, None, None, self.method)

    def export(self) -> Export:
        start = self.weights.state(WORDS if self.config.init == "mm_diff" else "vision")
        networks = {
            "mm_diff": (self.adapter.cfg, dict(self.adapter.named_parameters())),
            WORDS: (self.vision_cfg, start | self.tail.tensors()),
        }
        seen = {"white": "segment", "noise": "noise"}[self.config.background]
        fused = {} if self.config.without != "words" else {"fuse_words": False}
        return Export(networks, methods={"mm-diff": {**self.fixed, "seen": seen, **fused}})


def new_sizes(base: Base, vision: CLIPVision, config: MMDiffTrainingConfig) -> MMDiffSizes:
    """Sizes of a new adapter; the last block of the first of two text encoders is not read."""
    texts, cfg = [encoder.cfg for encoder in base.text_encoders], vision.cfg
    loras = [TextLoRA.of(text, config.text_rank) for text in texts]
    if len(texts) > 1:
        loras[0] = TextLoRA(texts[0].layers - 1, texts[0].width, config.text_rank)
    return MMDiffSizes(
        subject=config.subject,
        embed_dim=cfg.projection or cfg.width,
        patch_dim=cfg.width,
        text_dims=tuple(text.width for text in texts),
        depth=config.refiner_blocks,
        rank=config.rank,
        text_1=loras[0],
        text_2=loras[1] if len(loras) > 1 else None,
    )


@dataclass(frozen=True, eq=False)
class MapHook(SubjectHook):
    """The second cross-attention; below the finest grid it also gives the loss of both maps."""

    word: Tensor  # (B, 1, T, n): 1 at each subject's word
    masks: Tensor  # of the subjects, (B, n, H, W)
    present: Tensor  # bool (2, B, n): in the text, among the tokens
    finest: Grid
    config: MMDiffTrainingConfig

    def cross_attn(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor | None]:
        if tuple(grid) == tuple(self.finest):
            return super().cross_attn(layer, q, k, v, grid)
        mark, (k_i, v_i) = self.word.to(v.dtype).expand(-1, v.shape[1], -1, -1), self.layers[layer]
        both = attention(q, k, torch.cat([v, mark], dim=-1))  # (B, H, N, D + n)
        n, width = self.word.shape[3], v.shape[3]
        owner = torch.eye(n, device=q.device, dtype=q.dtype).repeat_interleave(k_i.shape[2] // n, dim=0)
        values = torch.cat(
            [v_i.to(q.dtype), owner.expand(*v_i.shape[:2], -1, -1)], dim=-1
        )  # (B, H, S, D + n)
        both_i = attention(q, k_i.to(q.dtype), values, self.keep)  # (B, H, N, D + n)
        masks = F.interpolate(self.masks, grid, mode="bilinear", antialias=True)  # (B, n, h, w)
        named, shown = self.present
        shown = shown & (shown.sum(dim=1, keepdim=True) > 1)  # one subject's tokens take all of the attention
        cfg, form = self.config, (self.config.map_normalise, self.config.map_form)
        loss = cfg.map_weight * map_loss(both[..., width:], masks, named, *form)  # (B,)
        loss = loss + cfg.image_map_weight * map_loss(both_i[..., width:], masks, shown, *form)
        return both[..., :width] + (both_i[..., :width] * self.scale).to(q.dtype), loss
