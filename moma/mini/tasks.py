"""Pretraining of MoMA-mini's frozen networks: one `Task` each for the loop that also trains MoMA.

Letters: N images, B batch, S image side, Z latent channels, h w latents, T text tokens, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.clip import CLIPText, CLIPVision
from models.clip_image import MEAN, STD
from models.llava import Llava
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.unet import Grid, UNet
from models.vae import VAE
from moma.methods.prompts import sd_prompt
from moma.mini.config import CaptionerConfig, ClipConfig, TextToImageConfig, VAETrainingConfig
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod
from moma.training.order import generator_for
from moma.training.pretraining import PretrainingTask
from moma.training.task import Batch
from moma.world.words import Words


@dataclass(frozen=True, eq=False)
class Images:
    """Renders in memory."""

    images: Tensor  # (N, 3, S, S) uint8
    masks: Tensor  # (N, 1, S, S) uint8, coverage by the subject
    words: Sequence[Words]  # N

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class PlainAttention:
    """A hook that only selects the implementation of attention."""

    impl: str

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v, impl=self.impl), None

    cross_attn = self_attn


class VAELoss(nn.Module):
    """Reconstruction error and Kullback-Leibler divergence."""

    def __init__(self, vae: VAE, cfg: VAETrainingConfig) -> None:
        super().__init__()
        self.vae, self.cfg, self.seed = vae, cfg, cfg.train.seed

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of pixels (B, 3, S, S) in [-1, 1], mask (B, 1, S, S) in 0..1, number (B,)."""
        pixels = batch["pixels"]
        mean, std = self.vae.encode(pixels)  # 2 x (B, Z, h, w)
        generators = _generators(self.seed, batch["number"])
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])  # (B, Z, h, w)
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
        for image, generator in zip(whole, _generators(self.seed, numbers), strict=True):
            y, x = torch.randint(whole.shape[-1] - side + 1, (2,), generator=generator).tolist()
            crops.append(image[:, y : y + side, x : x + side])
        pixels, mask = torch.stack(crops).split((3, 1), dim=1)  # (B, 3, crop, crop), (B, 1, crop, crop)
        return {"pixels": to_vae(pixels), "mask": mask / 255, "number": numbers}

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
        rows, columns = (
            F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T)
        )  # (B,) each
        return (rows + columns) / 2


class ClipTask(PretrainingTask):
    """Images, some of the subject alone on white, with captions that name colours and pattern."""

    def __init__(
        self,
        text: CLIPText,
        vision: CLIPVision,
        images: Images,
        tokenizer: ClipTokenizer,
        cfg: ClipConfig,
    ) -> None:
        super().__init__(len(images), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model = ClipLoss(text, vision, cfg.projection, cfg)
        self.images, self.tokenizer, self.cfg = images, tokenizer, cfg

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        pixels, texts = [], []
        for item, generator in zip(items.tolist(), _generators(self.seed, numbers), strict=True):
            cut_out = bool(torch.rand((), generator=generator) < self.cfg.cut_out)
            words = self.images.words[item]
            pixels.append(_image(self.images, item, cut_out))
            texts.append(words.subject if cut_out else words.rich)
        return {"pixels": to_clip(torch.stack(pixels)), "ids": self.tokenizer.ids(texts), "number": numbers}

    def networks(self) -> dict[str, nn.Module]:
        heads = nn.ModuleDict({"text_head": self.model.text_head, "vision_head": self.model.vision_head})
        return {"text": self.model.text, "vision": self.model.vision, "heads": heads}


class NoiseLoss(nn.Module):
    """Squared error of the predicted noise with min-SNR weights over t (arXiv 2303.09556)."""

    def __init__(self, unet: UNet, text: CLIPText, cfg: TextToImageConfig) -> None:
        super().__init__()
        self.unet, self.text, self.cfg = unet, text.requires_grad_(False), cfg
        self.register_buffer("alphas", alphas_cumprod(ScheduleConfig()), persistent=False)  # (1000,)

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of mean and std (B, Z, h, w), scaled, ids (B, T), number (B,)."""
        generators = _generators(self.cfg.train.seed, batch["number"])
        shape = batch["mean"].shape[1:]
        t = torch.stack([torch.randint(len(self.alphas), (), generator=g) for g in generators])  # (B,)
        noise = torch.stack([torch.randn((2, *shape), generator=g) for g in generators])  # (B, 2, Z, h, w)
        t, noise = (drawn.to(self.alphas.device) for drawn in (t, noise))
        x0 = batch["mean"].float() + batch["std"].float() * noise[:, 0]
        alpha = self.alphas[t][:, None, None, None]  # (B, 1, 1, 1)
        x = add_noise(x0, noise[:, 1], alpha).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            states = self.text(batch["ids"])[0]  # (B, T, C)
        eps, _ = self.unet(x, t, states, PlainAttention(self.cfg.attention))
        snr = self.alphas[t] / (1 - self.alphas[t])  # (B,)
        weight = (self.cfg.snr_limit / snr).clamp(max=1)  # (B,)
        return weight * (eps.float() - noise[:, 1]).square().mean(dim=(1, 2, 3))


class TextToImageTask(PretrainingTask):
    """Latents with texts of several kinds.

    As in captions of public images, some texts name colours and pattern, so that context tokens and K', V'
    can later steer these. Some are the label alone, the text of the reference pass, and some are empty.
    """

    def __init__(
        self,
        unet: UNet,
        latents: tuple[Tensor, Tensor],
        words: Sequence[Words],
        text: CLIPText,
        tokenizer: ClipTokenizer,
        cfg: TextToImageConfig,
    ) -> None:
        super().__init__(len(words), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.mean, self.std = latents  # each (N, Z, h, w), scaled
        kinds = [[sd_prompt(w.label, w.caption), sd_prompt(w.label, w.rich), w.label, ""] for w in words]
        index = {text: i for i, text in enumerate(sorted({text for row in kinds for text in row}))}
        self.ids = tokenizer.ids(list(index))  # (texts, T)
        self.texts = torch.tensor([[index[text] for text in row] for row in kinds])  # (N, 4)
        rest = 1 - cfg.rich - cfg.label_only - cfg.empty
        self.until = torch.tensor([rest, cfg.rich, cfg.label_only]).cumsum(0)  # (3,) bounds of the kinds
        self.model, self.cfg = NoiseLoss(unet, text, cfg), cfg

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        draws = [torch.rand((), generator=g) for g in _generators(self.seed, -numbers)]
        kind = torch.bucketize(torch.stack(draws), self.until, right=True)  # (B,) 0..3
        ids = self.ids[self.texts[items, kind]]  # (B, T)
        return {"mean": self.mean[items], "std": self.std[items], "ids": ids, "number": numbers}

    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.model.unet}


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
        for item, generator in zip(items.tolist(), _generators(self.seed, numbers), strict=True):
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


def to_vae(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 as float32 in [-1, 1]."""
    return images / 127.5 - 1


def to_clip(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 of the tower's size as float32, normalised as in `models.clip_image`."""
    return (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _image(images: Images, item: int, cut_out: bool) -> Tensor:
    """One image (3, S, S) uint8, whole or the subject alone on white."""
    image = images.images[item]
    return torch.where(images.masks[item] > 127, image, 255) if cut_out else image


def _generators(seed: int, numbers: Tensor) -> list[torch.Generator]:
    """A generator for each sample number (B,)."""
    return [generator_for(seed, number) for number in numbers.tolist()]
