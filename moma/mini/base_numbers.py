"""What the base UNet of MoMA-mini can do by itself: images of one and of two subjects, colours that are told,
word maps, and sharpness.

Letters: N images, S W sides of an image, Z latent channels, h w latents, T text tokens, G groups of words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer
from models.unet import Grid, UNet
from models.vae import VAE
from moma.app.sheets import Cell, contact_sheet
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.masks import next_m_gen
from moma.methods.prompts import joined, sd_prompt
from moma.methods.text import TextConditioning
from moma.mini.config import BaseNumbersConfig
from moma.mini.text_to_image import BOTH, FIRST, SECOND, Texts, WordMaps, pair_texts
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import ScheduleConfig, add_noise, alphas_cumprod, solver_steps
from moma.sampling.pipeline import to_images
from moma.sampling.sampler import denoise
from moma.training.common import to_pixels
from moma.world.classifiers import (
    BYTE,
    Probes,
    classify,
    classify_views,
    compare,
    draw_all,
    gallery,
    stacked,
    truth_of,
)
from moma.world.measures import iou, retrieved, sharpness
from moma.world.pairs import draw_pairs, named_specs, pair, pair_words, pairs_of
from moma.world.words import words_of
from moma.world.world import WorldConfig, caption, in_own_colours, spec


@dataclass(frozen=True, eq=False)
class BaseModel:
    """The trained networks and who judges them."""

    unet: UNet
    vae: VAE
    text: CLIPText
    tokenizer: ClipTokenizer
    probes: Probes
    world: WorldConfig
    sample: SampleConfig
    map_layers: tuple[int, ...]  # of cross-attention, whose maps are measured
    method: MethodConfig  # of M_gen


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
    plain = stacked(draw_texts(model, [sd_prompt(w.label, w.caption) for w in words]))  # (N, 3, S, S)
    right = compare(classify(model.probes, plain).truth, truth_of(specs, model.world))
    found = {name: _mean(right[name]) for name in ("class", "scene", "material")}

    own = [replace(what, material=None) for what in specs]
    texts = [words_of(what, caption(what), model.world) for what in own]
    told = stacked(draw_texts(model, [sd_prompt(w.label, w.rich) for w in texts]))  # (N, 3, S, S)
    seen = classify(model.probes, told)
    right = compare(seen.truth, truth_of(own, model.world))
    others = gallery(model.probes, own, cfg.distractors, model.world)
    found |= {f"told {name}": _mean(right[name]) for name in ("class", "pattern", "colour")}
    found["told identity"] = _mean(retrieved(seen.embedding, others))
    true = autoencoded(model.vae, draw_all(own, model.world)[0])  # (N, 3, S, S)
    real = classify(model.probes, true).mask
    return found | {"sharpness": _mean(sharpness(told, seen.mask)) / _mean(sharpness(true, real))}


def pair_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """both: both subjects of a pair are present, each of its class; same: the same where both have one class;
    told: each description beside its own subject."""
    found = {}
    for name, same_class, count in (("both", False, cfg.pairs), ("same", True, cfg.same)):
        pairs = list(islice(pairs_of(cfg.split, same_class, model.world), count))
        words = [pair_words(what, model.world) for what in pairs]
        texts = [sd_prompt(joined(w.labels), w.caption.text) for w in words]
        images = stacked(draw_texts(model, texts, model.world.pair_width))  # (N, 3, S, W)
        seen, there = classify_views(model.probes, images, cfg.present, model.world)  # 2N rows
        present = there.view(-1, 2).all(dim=1)  # (N,)
        labels = seen.truth.label.view(-1, 2).sort(dim=1).values  # (N, 2)
        true = truth_of(named_specs(pairs, model.world), model.world)  # 2N rows
        asked = true.label.view(-1, 2).sort(dim=1).values  # (N, 2)
        found[name] = _mean(present & (labels == asked).all(dim=1))
    return found


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


# --- the autoencoder -----------------------------------------------------------------------------------


def latents(vae: VAE, images: Tensor) -> Tensor:
    """Scaled latents (N, Z, h, w), float32, of images (N, 3, S, W) uint8."""
    return vae.encode(_pixels(vae, images))[0].float() * vae.cfg.scaling


@torch.no_grad()
def autoencoded(vae: VAE, images: Tensor) -> Tensor:
    """Images (N, 3, S, W) uint8, encoded and decoded."""
    return stacked(to_images(vae.decode(vae.encode(_pixels(vae, images))[0])))


def _pixels(vae: VAE, images: Tensor) -> Tensor:
    weight = next(vae.parameters())
    return to_pixels(images).to(weight.device, weight.dtype)


# --- noise errors and maps on true images ------------------------------------------------------------


@torch.no_grad()
def error_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """told error T: the noise error inside the subject at T with colours and pattern told, as a share of the
    error with the plain caption, the same noise."""
    specs = list(islice(in_own_colours(cfg.split, model.world), cfg.noised))
    images, masks = draw_all(specs, model.world)  # (N, 3, S, S), (N, 1, S, S)
    x0 = latents(model.vae, images)  # (N, Z, h, w)
    inside = F.adaptive_avg_pool2d(masks / BYTE, x0.shape[-2:])  # (N, 1, h, w)
    words = [words_of(what, caption(what), model.world) for what in specs]
    plain = [sd_prompt(w.label, w.caption) for w in words]
    told = [sd_prompt(w.label, w.rich) for w in words]
    found = {}
    for t in cfg.timesteps:
        x, noise = _noised(x0, t)  # (N, Z, h, w) each
        misses = [_predict(model, x, t, texts) - noise for texts in (plain, told)]  # 2 x (N, Z, h, w)
        without, with_ = ((miss.square() * inside).sum().item() for miss in misses)
        found[f"told gain {t}"] = 1 - with_ / without
    return found


@torch.no_grad()
def map_numbers(model: BaseModel, cfg: BaseNumbersConfig) -> dict[str, float]:
    """map AUC: how well the ratio of the two words' maps tells the subjects of true pairs apart; map IoU: of
    each subject and where its word's M_gen is above 0."""
    pairs = list(islice(pairs_of(cfg.split, False, model.world), cfg.noised))
    drawn = draw_pairs(pairs, model.world)
    masks = torch.from_numpy(drawn["masks"]) / BYTE  # (N, 2, S, W)
    x0 = latents(model.vae, stacked(drawn["image"]))  # (N, Z, h, w)
    texts = Texts([pair_texts(pair_words(what, model.world))[:1] for what in pairs], model.tokenizer)
    rows = texts.index[:, 0]  # (N,)
    hook = WordMaps(texts.groups[rows].float(), model.map_layers, "explicit")
    states, found, covered = model.text(texts.ids[rows])[0], [], []
    own = F.adaptive_avg_pool2d(masks, x0.shape[-2:]) > 0.5  # (N, 2, h, w)
    for t in cfg.map_timesteps:
        _, maps = model.unet(_noised(x0, t)[0], torch.full((len(x0),), t), states, hook)
        score = _finest(maps, x0.shape[-2:])  # (N, G, h, w)
        found.append((score[:, FIRST] / score[:, SECOND]).log())  # (N, h, w)
        layers = [m.unflatten(2, grid)[:, :BOTH] for m, grid in filter(None, maps)]  # (N, 2, h_l, w_l) each
        m_gen = next_m_gen(layers, x0.shape[-2:], model.method, rows_per_image=1)  # (N, 2, h, w)
        covered.append(iou((m_gen > 0).flatten(0, 1), own.flatten(0, 1)))  # (2N,)
    ratio = torch.stack(found).mean(dim=0)  # (N, h, w)
    apart = [auc(r[a], r[b]) for r, (a, b) in zip(ratio, own, strict=True)]
    return {"map AUC": float(np.mean(apart)), "map IoU": _mean(torch.stack(covered))}


def auc(positive: Tensor, negative: Tensor) -> float:
    """The share of (positive, negative) pairs whose first score (n,) is above the second (m,)."""
    above = positive[:, None] - negative[None]  # (n, m)
    return ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()


def _finest(maps: Sequence[tuple[Tensor, Grid] | None], grid: Grid) -> Tensor:
    """The mean of the recorded maps, each (N, G, queries) of its own grid, in this one: (N, G, h, w)."""
    seen = [F.interpolate(m.unflatten(2, own), size=grid, mode="bilinear") for m, own in filter(None, maps)]
    return torch.stack(seen).mean(dim=0)


def _noised(x0: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """x_t and its noise, the same in every call."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
    return add_noise(x0, noise, alphas_cumprod(ScheduleConfig())[t]), noise


def _predict(model: BaseModel, x: Tensor, t: int, texts: Sequence[str]) -> Tensor:
    states = model.text(model.tokenizer.ids(texts))[0]  # (N, T, C)
    return model.unet(x, torch.full((len(x),), t), states)[0]


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
