"""What the base UNet of MoMA-mini can do by itself: images of one and of two subjects, colours that are told,
word maps, and sharpness.

Letters: N images, S W sides of an image, Z latent channels, h w latents, T text tokens, G groups of words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer
from models.unet import UNet
from models.vae import VAE
from moma.app.sheets import Cell, contact_sheet
from moma.methods.prompts import joined, sd_prompt
from moma.methods.text import TextConditioning
from moma.mini.config import BaseNumbersConfig
from moma.mini.text_to_image import FIRST, SECOND, Texts, WordMaps, pair_texts
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod, solver_steps
from moma.sampling.pipeline import to_images
from moma.sampling.sampler import denoise
from moma.training.common import to_pixels
from moma.world import classifiers
from moma.world.measures import retrieved, sharpness
from moma.world.pairs import draw_pair, named_specs, pair, pair_words
from moma.world.words import words_of
from moma.world.world import WorldConfig, caption, draw_many, spec


@dataclass(frozen=True, eq=False)
class BaseModel:
    """The trained networks and who judges them."""

    unet: UNet
    vae: VAE
    text: CLIPText
    tokenizer: ClipTokenizer
    probes: classifiers.Probes
    world: WorldConfig
    sample: SampleConfig
    map_layers: tuple[int, ...]


@torch.no_grad()
def draw_texts(model: BaseModel, prompts: Sequence[str], width: float = 1.0) -> list[Image.Image]:
    """Images of texts; image i starts from seed i.

    Args:
        model: the networks.
        prompts: one per image.
        width: of the images, in heights.
    """
    sample, unet, dtype = model.sample, model.unet, torch.bfloat16
    schedule = solver_steps(ScheduleConfig(), sample.steps, sample.solver)
    height = model.world.size // model.vae.cfg.factor
    shape = unet.cfg.in_channels, height, round(width * height)  # (Z, h, w)
    images = []
    for start in range(0, len(prompts), sample.batch_size):
        part = prompts[start : start + sample.batch_size]
        states = model.text(model.tokenizer.ids([*[""] * len(part), *part]))[0].to(dtype)  # (2B, T, C)
        seeds = range(start, start + len(part))
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in seeds])
        with torch.autocast("cpu", dtype):
            cond = TextConditioning(unet.text_kv(states), None)
            *_, last = denoise(unet, cond, schedule, noise, sample.guidance, sample.solver)
            images += to_images(model.vae.decode(last.latents / model.vae.cfg.scaling))
    return images


def base_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """Every number of the base's gates."""
    return (
        single_numbers(model, cfg)
        | pair_numbers(model, cfg)
        | error_numbers(model, cfg)
        | map_numbers(model, cfg)
    )


# --- drawing -----------------------------------------------------------------------------------------


def single_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """class, scene, material of plain captions; told: what texts that name colours and pattern reach."""
    specs = [spec(i, cfg.split, model.world) for i in range(cfg.images)]
    words = [words_of(what, caption(what), model.world) for what in specs]
    plain = classifiers.stacked(draw_texts(model, [sd_prompt(w.label, w.caption) for w in words]))
    right = classifiers.compare(
        classifiers.classify(model.probes, plain).truth, classifiers.truth_of(specs, model.world)
    )
    found = {name: _mean(right[name]) for name in ("class", "scene", "material")}

    own = [replace(what, material=None) for what in specs]
    texts = [words_of(what, caption(what), model.world) for what in own]
    told = classifiers.stacked(draw_texts(model, [sd_prompt(w.label, w.rich) for w in texts]))
    seen = classifiers.classify(model.probes, told)
    right = classifiers.compare(seen.truth, classifiers.truth_of(own, model.world))
    others = classifiers.gallery(model.probes, own, cfg.distractors, model.world)
    found |= {f"told {name}": _mean(right[name]) for name in ("class", "pattern", "colour")}
    found["told identity"] = _mean(retrieved(seen.embedding, others))
    true = _autoencoded(model, classifiers.stacked([s.image for s in draw_many(own, model.world)]))
    real = classifiers.classify(model.probes, true).mask
    return found | {"sharpness": _mean(sharpness(told, seen.mask)) / _mean(sharpness(true, real))}


def pair_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """both: both subjects of a pair are present, each of its class; same: the same where both have one class;
    told: each description beside its own subject."""
    pairs = [pair(i, cfg.split, model.world) for i in range(8 * (cfg.pairs + cfg.same))]
    alike = [what.left.label == what.right.label for what in pairs]
    found = {}
    for name, wanted, count in (("both", False, cfg.pairs), ("same", True, cfg.same)):
        chosen = [what for what, same in zip(pairs, alike, strict=True) if same == wanted][:count]
        words = [pair_words(what, model.world) for what in chosen]
        texts = [sd_prompt(joined(w.labels), w.caption.text) for w in words]
        images = classifiers.stacked(draw_texts(model, texts, model.world.pair_width))  # (N, 3, S, W)
        seen, there = classifiers.classify_views(model.probes, images, cfg.present, model.world)  # 2N rows
        present = there.view(-1, 2).all(dim=1)  # (N,)
        labels = seen.truth.label.view(-1, 2).sort(dim=1).values  # (N, 2)
        asked = (
            classifiers.truth_of(named_specs(chosen, model.world), model.world)
            .label.view(-1, 2)
            .sort(dim=1)
            .values
        )
        found[name] = _mean(present & (labels == asked).all(dim=1))
    return found


@torch.no_grad()
def _autoencoded(model: BaseModel, images: Tensor) -> Tensor:
    """Images (N, 3, S, W) uint8 through the autoencoder."""
    decoded = model.vae.decode(model.vae.encode(to_pixels(images))[0])
    return ((decoded / 2 + 0.5).clamp(0, 1) * classifiers.BYTE).byte()


def base_sheet(model: BaseModel, cfg: BaseNumbersConfig) -> Image.Image:
    """Images of one and of two subjects, row by row in turn, to look at."""
    return contact_sheet([_shown(model, cfg, row) for row in range(cfg.shown // cfg.columns)])


def _shown(model: BaseModel, cfg: BaseNumbersConfig, row: int) -> list[Cell]:
    """A row of the sheet: images of one subject and of two in turn, the texts of every second pair naming
    colours."""
    indices, world = range(row * cfg.columns, (row + 1) * cfg.columns), model.world
    if row % 2 == 0:
        specs = [spec(i, cfg.split, world) for i in indices]
        texts = [sd_prompt(what.label, caption(what)) for what in specs]
        return [Cell(image) for image in draw_texts(model, texts)]
    words = [pair_words(pair(i, cfg.split, world), world) for i in indices]
    told = [w.rich.text if row % 4 == 3 else w.caption.text for w in words]
    texts = [sd_prompt(joined(w.labels), text) for w, text in zip(words, told, strict=True)]
    return [Cell(image) for image in draw_texts(model, texts, world.pair_width)]


# --- noise errors and maps on true images ------------------------------------------------------------


@torch.no_grad()
def error_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """told error T: the noise error inside the subject at T with colours and pattern told, as a share of the
    error with the plain caption, the same noise."""
    indices = range(4 * cfg.noised)
    specs = [what for i in indices if (what := spec(i, cfg.split, model.world)).material is None][
        : cfg.noised
    ]
    samples = draw_many(specs, model.world)
    masks = classifiers.stacked([s.mask[..., None] for s in samples]) / classifiers.BYTE  # (N, 1, S, S)
    x0 = _encoded(model, classifiers.stacked([s.image for s in samples]))  # (N, Z, h, w)
    inside = F.adaptive_avg_pool2d(masks, x0.shape[-2:])  # (N, 1, h, w)
    words = [words_of(what, caption(what), model.world) for what in specs]
    found = {}
    for t in cfg.timesteps:
        noisy, noise = _noised(x0, t)
        plain, told = (
            ((_predict(model, noisy, t, texts) - noise).square() * inside).sum().item()
            for texts in (
                [sd_prompt(w.label, getattr(w, kind)) for w in words] for kind in ("caption", "rich")
            )
        )
        found[f"told gain {t}"] = 1 - told / plain
    return found


@torch.no_grad()
def map_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """map AUC: how well the ratio of the two words' maps tells the subjects of true pairs apart."""
    pairs = [pair(i, cfg.split, model.world) for i in range(4 * cfg.noised)]
    pairs = [what for what in pairs if what.left.label != what.right.label][: cfg.noised]
    samples = [draw_pair(what, model.world) for what in pairs]
    masks = torch.stack(
        [
            torch.from_numpy(s.masks[list(what.named(model.world))])
            for what, s in zip(pairs, samples, strict=True)
        ]
    )  # (N, 2, S, W)
    x0 = _encoded(model, classifiers.stacked([s.image for s in samples]))  # (N, Z, h, w)
    texts = Texts([pair_texts(pair_words(what, model.world))[:1] for what in pairs], model.tokenizer)
    rows = texts.index[:, 0]  # (N,)
    hook = WordMaps(texts.groups[rows].float(), model.map_layers, "explicit")
    states, found = model.text(texts.ids[rows])[0], []
    for t in cfg.map_timesteps:
        _, maps = model.unet(_noised(x0, t)[0], torch.full((len(x0),), t), states, hook)
        score = _finest(maps, x0.shape[-2:])  # (N, G, h, w)
        found.append((score[:, FIRST] / score[:, SECOND]).log())  # (N, h, w)
    ratio = torch.stack(found).mean(dim=0)  # (N, h, w)
    own = F.adaptive_avg_pool2d(masks / classifiers.BYTE, x0.shape[-2:]) > 0.5  # (N, 2, h, w)
    return {"map AUC": float(np.mean([auc(r[a], r[b]) for r, (a, b) in zip(ratio, own, strict=True)]))}


def auc(positive: Tensor, negative: Tensor) -> float:
    """The share of (positive, negative) pairs whose first score (n,) is above the second (m,)."""
    above = positive[:, None] - negative[None]  # (n, m)
    return ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()


def _finest(maps: Sequence, grid: tuple[int, int]) -> Tensor:
    """The mean of the recorded maps (N, G, N') at the grid's size: (N, G, h, w)."""
    seen = [m for m in maps if m is not None]
    return torch.stack([F.interpolate(m.unflatten(2, g), size=grid, mode="bilinear") for m, g in seen]).mean(
        dim=0
    )


def _encoded(model: BaseModel, images: Tensor) -> Tensor:
    return model.vae.encode(to_pixels(images))[0] * model.vae.cfg.scaling


def _noised(x0: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """x_t and its noise, the same in every call."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
    return add_noise(x0, noise, alphas_cumprod(ScheduleConfig())[t]), noise


def _predict(model: BaseModel, x: Tensor, t: int, texts: Sequence[str]) -> Tensor:
    states = model.text(model.tokenizer.ids(texts))[0]  # (N, T, C)
    return model.unet(x, torch.full((len(x),), t), states)[0]


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
