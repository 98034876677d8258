"""The training of MM-Diff: Eq. 1, and each subject's attention kept to its mask.

The last blocks of the image encoder train with the adapter: caches hold the states before them. The subject's
tokens are made of its own embedding (paper); its image is the subject on white.

Letters: B samples, N queries, T text tokens, K subject tokens, n subjects, H heads, W width of a text
encoder, P embedding of an image, M states of the image encoder, C their width, S side of the images.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.clip import CLIPVision
from models.unet import Grid
from moma.methods.mm_diff.adapter import MMDiffAdapter, MMDiffSizes, TextLoRA, attach, frozen_context
from moma.methods.mm_diff.config import MMDiffConfig
from moma.methods.mm_diff.method import WORDS, MMDiff, MMDiffSubject, SubjectHook
from moma.sampling.base import Base
from moma.sampling.config import LARGEST, check_types
from moma.sampling.interface import Batch, DenoisingTraining, Export, Runtime, StepInputs

TRAINABLE = 2  # last blocks of the image encoder that caches leave out
EPSILON = 1e-5  # of FastComposer's constraint


@dataclass(frozen=True)
class MMDiffTrainingConfig:
    """Options of the training."""

    init: Literal["base", "mm_diff"] = "base"  # start anew, or go on with the bundle's
    rank: int = 64  # of the UNet's LoRAs
    text_rank: int = 64  # of the text encoders'
    refiner_blocks: int = 4
    encoder_blocks: int = 2  # last ones of the image encoder that are trained, up to 2 (FastComposer)
    # Weight of the constraint on attention maps, and whether each map is divided by its maximum first.
    map_weight: float = 1e-3
    map_normalise: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("rank", "text_rank", "refiner_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.encoder_blocks <= TRAINABLE:
            raise ValueError(f"encoder_blocks {self.encoder_blocks}: expected 0 to {TRAINABLE}")
        if not 0 <= self.map_weight <= LARGEST:
            raise ValueError(f"map_weight {self.map_weight}: expected a finite number, 0 or more")


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
    captions_alone = True
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
        self.adapter.to(base.device)
        attach(self.adapter, base.unet, base.text_encoders)
        self.frozen = frozen_context(base.unet)
        blocks = range(TRAINABLE - config.encoder_blocks, TRAINABLE)
        ends = ("tail.norm.", "tail.projection.") if config.encoder_blocks else ()
        self.trained = ("adapter.", *(f"tail.blocks.{i}." for i in blocks), *ends)

    @classmethod
    def check(cls, weights: Any, config: MMDiffTrainingConfig, method: MMDiffConfig) -> None:
        if weights.config("vision").layers <= TRAINABLE:
            raise ValueError(f"{weights.folder}: vision has too few layers, expected more than {TRAINABLE}")
        if config.init == "mm_diff":
            if (found := weights.config("mm_diff").subject) != "cls":
                raise ValueError(f"{weights.folder}: its mm_diff reads a {found}, this training trains 'cls'")
            MMDiff.check(weights, method)

    @classmethod
    def load_embedder(
        cls, runtime: Runtime, method: MMDiffConfig
    ) -> Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]:
        vision = runtime.weights.build("vision", runtime.device, runtime.dtype).eval().requires_grad_(False)
        return lambda white, words, prompts: vision.hidden(white, -1 - TRAINABLE).flatten(1)  # (B, M * C)

    def inputs(self, batch: Batch) -> StepInputs:
        embedding, tokens = self._subjects(batch)  # (B, P), (B, K, X)
        images = self.adapter.images(embedding)  # of each text encoder (B, W)
        ids, shown = batch["text_ids"], ~batch["drop"]  # (B, K*T), (B,)
        count = len(self.base.text_encoders)
        pairs = zip(*(x.chunk(count, dim=1) for x in (ids, batch["label_ids"])), strict=True)
        places = [
            label_places(own, label, tokenizer.end_id)  # (B,) each
            for (own, label), tokenizer in zip(pairs, self.base.tokenizers, strict=True)
        ]
        named = [shown & (place > 0) for place in places]  # (B,) each

        def change(encoder: int, words: Tensor) -> Tensor:
            where = torch.arange(len(words), device=words.device), places[encoder]
            before = words[where]  # (B, W)
            merged = self.adapter.fuse[encoder](before, images[encoder]).to(words.dtype)  # (B, W)
            return words.index_put(where, torch.where(named[encoder][:, None], merged, before))

        text, pooled = self.base.encode_ids(ids, batch["drop_text"], change)
        size = self.base.image_size
        hook = MapHook(
            self.adapter.keys_values(tokens, self.frozen),
            shown[:, None, None, None].expand(-1, -1, -1, tokens.shape[1]),
            shown[:, None, None, None].to(tokens.dtype),
            F.one_hot(places[0], text.shape[1])[:, None, :, None].to(text.dtype),
            batch["m_gen"],
            torch.stack([named[0], shown], dim=1),
            batch["mean"].shape[-2:],
            self.config.map_normalise,
        )
        return StepInputs(text, self.base.added_conditioning(pooled, size, size), hook)

    def constraint(self, maps: Sequence[Tensor], batch: Batch) -> Tensor | float:
        return self.config.map_weight * torch.stack(list(maps)).mean(dim=0) if maps else 0.0

    def _subjects(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P) and tokens (B, K, X)."""
        states = batch["embedding"].unflatten(1, (-1, self.vision_cfg.width))  # (B, M, C)
        embedding, patches = self.tail(states.to(self.tail.norm.weight.dtype))
        return embedding, self.adapter.head(embedding, patches)

    def subjects(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[MMDiffSubject]:
        parts = zip(words, *(x.split(1) for x in self._subjects(batch)), strict=True)
        return [MMDiffSubject(word, None, embedding, tokens) for word, embedding, tokens in parts]

    def drawing(self) -> MMDiff:
        return MMDiff(self.base, self.adapter, self.frozen, None, None, self.method)

    def export(self) -> Export:
        start = self.weights.state(WORDS if self.config.init == "mm_diff" else "vision")
        networks = {
            "mm_diff": (self.adapter.cfg, dict(self.adapter.named_parameters())),
            WORDS: (self.vision_cfg, start | self.tail.tensors()),
        }
        return Export(networks, methods={"mm-diff": self.fixed})


def new_sizes(base: Base, vision: CLIPVision, config: MMDiffTrainingConfig) -> MMDiffSizes:
    """Sizes of a new adapter; the last block of the first of two text encoders is not read."""
    texts, cfg = [encoder.cfg for encoder in base.text_encoders], vision.cfg
    loras = [TextLoRA.of(text, config.text_rank) for text in texts]
    if len(texts) > 1:
        loras[0] = TextLoRA(texts[0].layers - 1, texts[0].width, config.text_rank)
    return MMDiffSizes(
        subject="cls",
        embed_dim=cfg.projection or cfg.width,
        patch_dim=cfg.width,
        text_dims=tuple(text.width for text in texts),
        depth=config.refiner_blocks,
        rank=config.rank,
        text_1=loras[0],
        text_2=loras[1] if len(loras) > 1 else None,
    )


def label_places(ids: Tensor, labels: Tensor, end: int) -> Tensor:
    """Position of the last token of each text's label, 0 (which is BOS) where the text lacks it.

    Args:
        ids: of texts, (B, T).
        labels: of the labels alone, (B, T).
        end: the token that ends a text.

    Returns:
        int64 (B,).
    """
    found = []
    for text, label in zip(ids.tolist(), labels.tolist(), strict=True):
        word = label[1 : label.index(end)]
        starts = (i for i in range(1, len(text)) if word and text[i : i + len(word)] == word)
        found.append(next((i + len(word) - 1 for i in starts), 0))
    return torch.tensor(found, device=ids.device)


def map_loss(maps: Tensor, masks: Tensor, present: Tensor, normalise: bool = False) -> Tensor:
    """FastComposer's constraint (arXiv 2305.10431): attention outside each subject's mask, less that inside.

    Args:
        maps: attention of each query to each subject, (B, H, N, n).
        masks: of the subjects on the layer's grid, (B, n, h, w), h * w = N.
        present: which of them there are, bool (B, n).
        normalise: divide each map by its maximum first.

    Returns:
        float32 (B,), the mean over heads and subjects that are present; 0 without any.
    """
    maps, inside = maps.float(), masks.float().flatten(2).mT[:, None]  # (B, H, N, n), (B, 1, N, n)
    if normalise:
        maps = maps / (maps.amax(dim=2, keepdim=True) + EPSILON)
    means = [
        (maps * part).sum(dim=2) / (part.sum(dim=2) + EPSILON) for part in (1 - inside, inside)
    ]  # (B, H, n) each
    each = (means[0] - means[1]).mean(dim=1) * present  # (B, n)
    return each.sum(dim=1) / present.sum(dim=1).clamp(min=1)  # (B,)


@dataclass(frozen=True, eq=False)
class MapHook(SubjectHook):
    """The second cross-attention of one subject per sample; below the finest grid it also gives the loss of
    both maps."""

    word: Tensor  # (B, 1, T, 1): 1 at the subject's word
    masks: Tensor  # of the subjects, (B, 1, S, S)
    present: Tensor  # bool (B, 2): in the text, among the tokens
    finest: Grid
    normalise: bool

    def cross_attn(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor | None]:
        if tuple(grid) == tuple(self.finest):
            return super().cross_attn(layer, q, k, v, grid)
        mark = self.word.to(v.dtype).expand(-1, v.shape[1], -1, -1)  # (B, H, T, 1)
        both = attention(q, k, torch.cat([v, mark], dim=-1))  # (B, H, N, D + 1)
        k_i, v_i = self.layers[layer]  # one subject's tokens take all of the second attention
        z_i = attention(q, k_i.to(q.dtype), v_i.to(q.dtype), self.keep)  # (B, H, N, D)
        masks = F.interpolate(self.masks, grid, mode="bilinear", antialias=True)  # (B, 1, h, w)
        loss = map_loss(both[..., -1:], masks, self.present[:, :1], self.normalise)  # (B,)
        return both[..., :-1] + (z_i * self.scale).to(q.dtype), loss
