"""Pretraining of MoMA-mini's frozen networks: one `Task` each for the loop that also trains MoMA.

Letters: N images, B batch, S image side, Z latent channels, h w latents, T text tokens, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import CLIPText, CLIPVision
from models.clip_image import normalise
from models.llava import Llava
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.vae import VAE
from moma.mini.config import CaptionerConfig, ClipConfig, VAETrainingConfig
from moma.training.common import to_pixels
from moma.training.order import generators_for
from moma.training.pretraining import PretrainingTask
from moma.training.task import Batch
from moma.world.pairs import PairWords
from moma.world.words import Words


@dataclass(frozen=True, eq=False)
class Images:
    """Renders in memory."""

    images: Tensor  # (N, 3, S, S) uint8
    masks: Tensor  # (N, 1, S, S) uint8, coverage by the subject
    words: Sequence[Words]  # N

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Renders of two subjects in memory."""

    images: Tensor  # (N, 3, S, W) uint8
    masks: Tensor  # (N, 2, S, W) uint8, of the subjects in the order in which the captions name them
    words: Sequence[PairWords]  # N

    def __len__(self) -> int:
        return len(self.images)


class VAELoss(nn.Module):
    """Reconstruction error and Kullback-Leibler divergence."""

    def __init__(self, vae: VAE, cfg: VAETrainingConfig) -> None:
        super().__init__()
        self.vae, self.cfg, self.seed = vae, cfg, cfg.train.seed

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of pixels (B, 3, S, S) in [-1, 1], mask (B, 1, S, S) in 0..1, number (B,)."""
        pixels = batch["pixels"]
        mean, std = self.vae.encode(pixels)  # 2 x (B, Z, h, w)
        own = generators_for(self.seed, batch["number"])
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in own])  # (B, Z, h, w)
        error = (self.vae.decode(mean + std * noise.to(mean)) - pixels).float()  # (B, 3, S, S)
        weight = 1 + (self.cfg.subject_weight - 1) * batch["mask"]  # (B, 1, S, S)
        fit = ((error.square() + self.cfg.absolute_weight * error.abs()) * weight).mean(dim=(1, 2, 3))  # (B,)
        variance = std.float().square()
        divergence = 0.5 * (mean.float().square() + variance - 1 - variance.log())  # (B, Z, h, w)
        return fit + self.cfg.kl_weight * divergence.mean(dim=(1, 2, 3))


class VAETask(PretrainingTask):
    """Random crops of images through the autoencoder."""

    def __init__(self, vae: VAE, images: Images, cfg: VAETrainingConfig) -> None:
        super().__init__(len(images), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model, self.images, self.cfg = VAELoss(vae, cfg), images, cfg

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        whole = torch.cat([self.images.images[items], self.images.masks[items]], dim=1)  # (B, 4, S, S)
        side, crops = self.cfg.crop, []
        for image, generator in zip(whole, generators_for(self.seed, numbers), strict=True):
            y, x = torch.randint(whole.shape[-1] - side + 1, (2,), generator=generator).tolist()
            crops.append(image[:, y : y + side, x : x + side])
        pixels, mask = torch.stack(crops).split((3, 1), dim=1)  # (B, 3, crop, crop), (B, 1, crop, crop)
        return {"pixels": to_pixels(pixels), "mask": mask / 255, "number": numbers}

    def networks(self) -> dict[str, nn.Module]:
        return {"vae": self.model.vae}


class ClipLoss(nn.Module):
    """Symmetric contrastive loss (arXiv 2103.00020, Fig. 3) of images and their rich captions.

    Each rank contrasts its own samples only.
    """

    def __init__(self, text: CLIPText, vision: CLIPVision, width: int, cfg: ClipConfig) -> None:
        super().__init__()
        self.text, self.vision = text, vision
        self.text_head = nn.Linear(text.cfg.width, width, bias=False)  # heads: for this loss only
        self.vision_head = nn.Linear(vision.cfg.width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(cfg.initial_scale).log())

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of pixels (B, 3, S, S), normalised, and ids (B, T)."""
        image = F.normalize(self.vision_head(self.vision(batch["pixels"])[1]).float(), dim=-1)  # (B, P)
        text = F.normalize(self.text_head(self.text(batch["ids"])[1]).float(), dim=-1)  # (B, P)
        logits = self.log_scale.exp() * image @ text.T  # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        rows, columns = (F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T))  # (B,)
        return (rows + columns) / 2


class ClipTask(PretrainingTask):
    """Images with rich captions: of one subject, also alone on white, and of two."""

    def __init__(
        self,
        text: CLIPText,
        vision: CLIPVision,
        images: Images,
        pairs: Pairs,
        tokenizer: ClipTokenizer,
        cfg: ClipConfig,
    ) -> None:
        super().__init__(len(images), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model = ClipLoss(text, vision, cfg.projection, cfg)
        self.images, self.pairs, self.tokenizer, self.cfg = images, pairs, tokenizer, cfg
        self.until = torch.tensor([cfg.cut_out, cfg.paired]).cumsum(0)  # (2,) bounds of the kinds

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        pixels, texts = [], []
        for item, generator in zip(items.tolist(), generators_for(self.seed, numbers), strict=True):
            kind = int(torch.bucketize(torch.rand((), generator=generator), self.until, right=True))
            words, image = self.images.words[item], _image(self.images, item, cut_out=kind == 0)
            text = words.subject if kind == 0 else words.rich
            if kind == 1:
                pair = item % len(self.pairs)
                image, text = squeezed(self.pairs.images[pair]), self.pairs.words[pair].rich.text
            pixels.append(image)
            texts.append(text)
        return {"pixels": to_clip(torch.stack(pixels)), "ids": self.tokenizer.ids(texts), "number": numbers}

    def networks(self) -> dict[str, nn.Module]:
        heads = nn.ModuleDict({"text_head": self.model.text_head, "vision_head": self.model.vision_head})
        return {"text": self.model.text, "vision": self.model.vision, "heads": heads}


class CaptionLoss(nn.Module):
    """Next-token error of the answers. The image tower is frozen, as in LLaVA's own training."""

    def __init__(self, llava: Llava) -> None:
        super().__init__()
        self.llava = llava
        llava.tower.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of pixels (B, 3, S, S), normalised, ids of B texts, and answer, (B,) lengths."""
        features = self.llava.encode_images(batch["pixels"])  # (B, N, C)
        texts = [ids.to(features.device) for ids in batch["ids"]]
        embeds, lengths = self.llava.splice(texts, features)  # (B, T, C), (B,)
        logits = self.llava.llama.lm_head(self.llava.llama(embeds)).float()  # (B, T, V)
        rows = zip(logits, texts, batch["answer"].tolist(), lengths.tolist(), strict=True)
        losses = [F.cross_entropy(row[end - n - 1 : end - 1], ids[-n:]) for row, ids, n, end in rows]
        return torch.stack(losses)


class CaptionTask(PretrainingTask):
    """Instruction tuning: describe the image, or how the subject would look in a wanted image."""

    def __init__(self, llava: Llava, images: Images, tokenizer: LlamaTokenizer, cfg: CaptionerConfig) -> None:
        super().__init__(len(images), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model, self.images, self.tokenizer, self.cfg = CaptionLoss(llava), images, tokenizer, cfg

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        pixels, rows, counts = [], [], []
        for item, generator in zip(items.tolist(), generators_for(self.seed, numbers), strict=True):
            kind = int(torch.randint(3, (), generator=generator))
            words = self.images.words[item]
            pixels.append(_image(self.images, item, cut_out=kind > 0))
            question, answer = self.cfg.dialogues[kind]
            head = self.tokenizer.encode_with_image(question.format(**vars(words)))
            tail = [*self.tokenizer.encode(answer.format(**vars(words)), bos=False), self.cfg.eos]
            rows.append(torch.tensor(head + tail))
            counts.append(len(tail))
        answer = torch.tensor(counts)
        return {"pixels": to_clip(torch.stack(pixels)), "ids": rows, "answer": answer, "number": numbers}

    def networks(self) -> dict[str, nn.Module]:
        return {"llava": self.model.llava}


def to_clip(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 of the tower's size as float32, normalised as in `models.clip_image`."""
    return normalise(images / 255)


def squeezed(image: Tensor) -> Tensor:
    """A wide image (3, S, W) as (3, S, S), both uint8: the tower has one input size."""
    return F.interpolate(image[None].float(), (image.shape[1],) * 2, mode="area")[0].round().byte()


def _image(images: Images, item: int, cut_out: bool) -> Tensor:
    """One image (3, S, S) uint8, whole or the subject alone on white."""
    image = images.images[item]
    return torch.where(images.masks[item] > 127, image, 255) if cut_out else image
