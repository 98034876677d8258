"""The base UNet of MoMA-mini: noise prediction on single images and on pairs, and maps that find a subject.

Letters: B items, R images, G = 3 groups of words, S W sides of an image, Z latent channels, h w latents,
T text tokens, C width, N queries of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention, attention_probs
from models.clip import CLIPText
from models.tokenizers import ClipTokenizer
from models.unet import Grid, UNet
from moma.methods.prompts import joined, occurrences, sd_prompt
from moma.mini.config import TextToImageConfig
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod
from moma.training.common import subject_weighted
from moma.training.order import generators_for
from moma.training.pretraining import PretrainingTask
from moma.training.task import Batch
from moma.world.pairs import PairWords, Told
from moma.world.words import Words

FIRST, SECOND, BOTH = range(3)  # groups of words: of the subject named first, of the other, of both alike


@dataclass(frozen=True, eq=False)
class Latents:
    """Scaled posteriors of images and what the UNet's loss needs to know about them."""

    mean: Tensor  # (N, Z, h, w)
    std: Tensor  # (N, Z, h, w)
    masks: Tensor  # (N, 1 or 2, h, w) uint8, of the subjects as the captions name them


@dataclass(frozen=True, eq=False)
class WordMaps:
    """A hook that records how much attention each query pays to groups of words."""

    groups: Tensor  # (R, G, T), 1 at the tokens of a group
    layers: tuple[int, ...]  # whose cross-attention is recorded
    impl: str  # of the other attention

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v, impl=self.impl), None

    def cross_attn(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> tuple[Tensor, tuple[Tensor, Grid] | None]:
        if layer not in self.layers:
            return attention(q, k, v, impl=self.impl), None
        probs = attention_probs(q, k)  # (R, H, N, T)
        maps = self.groups @ probs.mean(dim=1).transpose(1, 2)  # (R, G, N)
        return probs.to(v.dtype) @ v, (maps, grid)


class NoiseLoss(nn.Module):
    """Squared error of the predicted noise, weighted over t as in P2 (arXiv 2204.00227), and the map loss."""

    def __init__(self, unet: UNet, text: CLIPText, cfg: TextToImageConfig) -> None:
        super().__init__()
        self.unet, self.text, self.cfg = unet, text.requires_grad_(False), cfg
        alphas = alphas_cumprod(ScheduleConfig())  # (1000,)
        weights = (cfg.p2_k + alphas / (1 - alphas)) ** -cfg.p2_gamma  # (1000,)
        self.register_buffer("alphas", alphas, persistent=False)
        self.register_buffer("weights", weights / weights.mean(), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,): the mean over an item's images, the single ones and the wide one."""
        losses = [self._of(batch, kind).view(len(batch["number"]), -1) for kind in ("single", "wide")]
        return torch.cat(losses, dim=1).mean(dim=1)  # (B, images of an item) -> (B,)

    def _of(self, batch: Batch, kind: str) -> Tensor:
        """Losses (R,) of one kind of images: see `TextToImageTask._images`."""
        names = ("mean", "std", "masks", "ids", "groups", "t", "noise")
        mean, std, masks, ids, groups, t, noise = (batch[f"{kind}_{name}"] for name in names)
        x0 = mean.float() + std.float() * noise[:, 0]  # (R, Z, h, w)
        alpha = self.alphas[t][:, None, None, None]  # (R, 1, 1, 1)
        x = add_noise(x0, noise[:, 1], alpha)
        with torch.no_grad():
            states = self.text(ids)[0]  # (R, T, C)
        hook = WordMaps(groups.float(), self.cfg.map_layers, self.cfg.attention)
        eps, maps = self.unet(x, t, states, hook)
        masks = masks / 255  # (R, 1 or 2, h, w)
        error = (eps.float() - noise[:, 1]).square().mean(dim=1, keepdim=True)  # (R, 1, h, w)
        loss = subject_weighted(error, masks.amax(dim=1, keepdim=True), self.cfg.subject_weight)  # (R,)
        seen = word_map_loss([m for m in maps if m is not None], masks, groups.any(dim=2))  # (R,)
        return self.weights[t] * loss + self.cfg.map_weight * seen


def word_map_loss(maps: Sequence[tuple[Tensor, Grid]], masks: Tensor, named: Tensor) -> Tensor:
    """Cosine distance of the attention to a subject's words and its mask, the mean over layers and groups.

    It is 0 where all of a subject gets the same attention and the rest none, so that M_gen finds it whole;
    the share of attention that falls inside would be best where a single point gets all.

    Args:
        maps: per layer the attention (R, G, N) to groups of words, and the grid of the N queries.
        masks: of the subjects, (R, 1 or 2, h, w) in 0..1.
        named: (R, G) bool, whether a group has tokens.

    Returns:
        (R,), 0 for images whose text names no subject.
    """
    total = named.new_zeros(len(named), dtype=torch.float32)  # (R,)
    union = masks.sum(dim=1, keepdim=True).clamp(max=1)  # (R, 1, h, w)
    wanted = torch.cat([masks[:, :1], masks[:, -1:], union], dim=1)  # (R, G, h, w)
    for found, grid in maps:
        inside = F.adaptive_avg_pool2d(wanted, grid).flatten(2)  # (R, G, N)
        losses = (1 - F.cosine_similarity(found, inside, dim=2)) * named  # (R, G)
        total = total + losses.sum(dim=1) / named.sum(dim=1).clamp_min(1)
    return total / max(len(maps), 1)


class Text(NamedTuple):
    """A text of a sample with the characters of its groups of words, G lists of (start, end)."""

    text: str
    groups: tuple[list[tuple[int, int]], ...]


def single_texts(words: Words) -> list[Text]:
    """The texts of one subject: plain, with colours and pattern, each with or without the template, the label
    alone, nothing."""
    label, captions = words.label, (words.caption, words.rich)
    texts = [text for caption in captions for text in (sd_prompt(label, caption), caption)]
    return [Text(text, (occurrences(label, text), [], [])) for text in (*texts, label)] + [NOTHING]


def pair_texts(words: PairWords) -> list[Text]:
    """As `single_texts`, of two subjects; the fifth one names the patterns."""
    both = joined(words.labels)
    plain, patterned, rich = (_bound(words.labels, told, both) for told in words[1:])
    return [plain[0], plain[1], rich[0], rich[1], patterned[0], NOTHING]


def _bound(labels: tuple[str, str], told: Told, both: str) -> tuple[Text, Text]:
    """A caption with and without the template, and which words belong to which subject."""
    first, second = labels
    found = []
    for text in (sd_prompt(both, told.text), told.text):
        places = occurrences(first, text)
        if first != second:
            groups = places, occurrences(second, text), []
        elif told.apart:  # the caption's own two mentions follow their descriptions
            groups = places[-2:-1], places[-1:], places[:-2]
        else:
            groups = [], [], places
        found.append(Text(text, groups))
    return found[0], found[1]


NOTHING = Text("", ([], [], []))


class Texts:
    """All texts of some images: token ids and groups of words, each text once."""

    def __init__(self, rows: Sequence[Sequence[Text]], tokenizer: ClipTokenizer) -> None:
        """rows: per image its texts of each kind. ValueError for a text that is longer than the encoder's."""
        texts = {repr(text): text for row in rows for text in row}
        index = {key: i for i, key in enumerate(texts)}
        encodings = [tokenizer.encode(text.text) for text in texts.values()]
        for text, encoding in zip(texts.values(), encodings, strict=True):
            if encoding.truncated:
                raise ValueError(f"{text.text!r}: longer than {tokenizer.length} tokens")
        groups = [
            [[_touches(span, places) for span in encoding.spans] for places in text.groups]
            for text, encoding in zip(texts.values(), encodings, strict=True)
        ]
        self.ids = torch.tensor([encoding.ids for encoding in encodings])  # (texts, T)
        self.groups = torch.tensor(groups)  # (texts, G, T) bool
        self.index = torch.tensor([[index[repr(text)] for text in row] for row in rows])  # (N, kinds)


def _touches(span: tuple[int, int] | None, places: Sequence[tuple[int, int]]) -> bool:
    return span is not None and any(span[0] < end and start < span[1] for start, end in places)


class TextToImageTask(PretrainingTask):
    """Latents with texts of several kinds. An item is a wide image and the same number of single ones each.

    As in captions of public images, half of the texts name colours and patterns, so that context tokens and
    K', V' can later steer these. Some are the label alone, the text of the reference pass, some are empty.
    """

    def __init__(
        self,
        unet: UNet,
        text: CLIPText,
        tokenizer: ClipTokenizer,
        single: tuple[Latents, Sequence[Words]],
        wide: tuple[Latents, Sequence[PairWords]],
        cfg: TextToImageConfig,
    ) -> None:
        super().__init__(len(wide[1]), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model, self.cfg = NoiseLoss(unet, text, cfg), cfg
        self.latents = {"single": single[0], "wide": wide[0]}
        self.texts = {
            "single": Texts([single_texts(w) for w in single[1]], tokenizer),
            "wide": Texts([pair_texts(w) for w in wide[1]], tokenizer),
        }
        self.singles = len(single[1]) // len(wide[1])  # per wide image
        plain = 1 - cfg.rich - cfg.label_only - cfg.empty
        shares = [plain / 2, plain / 2, cfg.rich / 2, cfg.rich / 2, cfg.label_only]
        self.until = torch.tensor(shares).cumsum(0)  # (5,) bounds of the kinds

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        own = generators_for(self.seed, numbers)
        near = items[:, None] * self.singles + torch.arange(self.singles)  # (B, singles)
        batch = self._images("single", near, own) | self._images("wide", items[:, None], own)
        return {"number": numbers, **batch}

    def _images(self, kind: str, rows: Tensor, own: Sequence[torch.Generator]) -> Batch:
        """mean, std (R, Z, h, w), masks (R, 1 or 2, h, w), ids (R, T), groups (R, G, T), t (R,) and noise
        (R, 2, Z, h, w) of the images `rows` (B, R / B), with the random numbers of B generators."""
        latents, texts, count = self.latents[kind], self.texts[kind], rows.shape[1]
        draws = torch.cat([torch.rand(count, generator=g) for g in own])  # (R,)
        u = torch.cat([torch.rand(count, generator=g) for g in own])  # (R,)
        u = u ** (self.cfg.wide_t if kind == "wide" else 1)
        last = len(self.model.alphas) - 1
        t = ((last + 1) * u).long().clamp(max=last)  # (R,)
        shape = count, 2, *latents.mean.shape[1:]
        noise = torch.cat([torch.randn(shape, generator=g) for g in own])  # (R, 2, Z, h, w)
        rows = rows.flatten()  # (R,)
        text = texts.index[rows, torch.bucketize(draws, self.until, right=True)]  # (R,)
        batch = {"mean": latents.mean[rows], "std": latents.std[rows], "masks": latents.masks[rows]}
        batch |= {"ids": texts.ids[text], "groups": texts.groups[text], "t": t, "noise": noise}
        return {f"{kind}_{name}": value for name, value in batch.items()}

    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.model.unet}
