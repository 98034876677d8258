"""What adapters tell the base: `python -m moma.mini.adapter_numbers --bundle out/mini/bundles/moma`.

The paired noise error inside unseen subjects, by timestep: with the text alone, with what the method makes of
another render of the subject, and of another subject's. Each part must lower it before long runs pay.

Letters: N images, S side of an image, Z latent channels, h w latents.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moma.app.files import exit_status, markdown_table
from moma.load import load
from moma.methods.moma.method import MoMA
from moma.sampling.config import TIMESTEPS, SampleConfig
from moma.sampling.device import set_precision
from moma.sampling.diffusion import SolverStep, add_noise, alphas_cumprod
from moma.sampling.interface import Job
from moma.sampling.pipeline import Pipeline
from moma.training.common import to_pixels
from moma.world.classifiers import BYTE, stacked
from moma.world.world import DEFAULT, WorldConfig, caption, draw, elsewhere, neighbour, spec


@dataclass(frozen=True)
class AdapterNumbersConfig:
    """What is measured."""

    split: str = "val"
    images: int = 48
    timesteps: tuple[int, ...] = (200, 600, 900)
    batch: int = 16
    world: WorldConfig = DEFAULT


@torch.no_grad()
def errors(pipe: Pipeline, strength: float, other: bool, cfg: AdapterNumbersConfig) -> Tensor:
    """The noise error of the conditional rows inside the subjects, the same noise in every call.

    Args:
        pipe: of a method; M_gen is the subject's own mask.
        strength: of the subjects; MoMA's β acts on Eq. 3, so that at 0 the context tokens are left.
        other: whether the reference shows another subject of the class.
        cfg: what is measured.

    Returns:
        (timesteps, N).
    """
    method, base, world = pipe.method, pipe.base, cfg.world
    specs = [what for i in range(4 * cfg.images) if (what := spec(i, cfg.split, world)).material is None]
    alphas, found = alphas_cumprod(base.schedule), []
    for start in range(0, cfg.images, cfg.batch):
        some = specs[start : min(start + cfg.batch, cfg.images)]
        samples = [draw(what, world) for what in some]
        pixels = to_pixels(stacked([s.image for s in samples])).to(base.device, base.dtype)  # (N, 3, S, S)
        x0 = base.vae.encode(pixels)[0].float() * base.vae.cfg.scaling  # (N, Z, h, w)
        masks = stacked([s.mask[..., None] for s in samples]) / BYTE  # (N, 1, S, S)
        m_gen = (F.adaptive_avg_pool2d(masks, x0.shape[-2:]) > 0.5).float().to(base.device)  # (N, 1, h, w)
        jobs = []
        for i, what in enumerate(some, start):
            shown = draw(elsewhere(neighbour(what, int(other), world), i), world)
            image, mask, text = Image.fromarray(shown.image), Image.fromarray(shown.mask), caption(what)
            subject = pipe.encode_subject(image, mask, what.label, prompts=[text])
            jobs.append(Job(subject, text, 0, strength=strength))
        size = SampleConfig(batch_size=len(jobs)).sized(world.size)
        cond = method.condition(method.prepare(jobs), size).conditional()
        rows = []
        for t in cfg.timesteps:
            own = [torch.Generator().manual_seed(TIMESTEPS * i + t) for i in range(start, start + len(some))]
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in own]).to(x0)  # (N, Z, h, w)
            x = add_noise(x0, noise, alphas[t].to(x0)).to(base.dtype)
            inputs = cond.at(SolverStep(t, alphas[t], alphas[t]), {"m_gen": m_gen})
            steps = torch.full((len(x),), t, device=base.device)
            eps = base.unet(x, steps, inputs.text, inputs.hook, inputs.added)[0].float()  # (N, Z, h, w)
            rows.append(((eps - noise).square() * m_gen).sum(dim=(1, 2, 3)) / m_gen.sum(dim=(1, 2, 3)))
        found.append(torch.stack(rows))  # (timesteps, N)
    return torch.cat(found, dim=1)


def table(bundle: Path, methods: Sequence[str], cfg: AdapterNumbersConfig, dtype: str) -> str:
    """Mean errors as shares of those with the text alone, a row for each setting.

    Args:
        bundle: with the adapters.
        methods: of the registry.
        cfg: what is measured.
        dtype: of the networks.
    """
    text = errors(load(bundle, "text", dtype=dtype), 0.0, False, cfg).mean(dim=1)  # (timesteps,)
    rows = [("text, error", *(f"{value:.4f}" for value in text.tolist()))]
    for method in methods:
        pipe = load(bundle, method, dtype=dtype)
        settings = {f"{method}, another render": (1.0, False), f"{method}, another subject": (1.0, True)}
        if isinstance(pipe.method, MoMA):
            settings = {f"{method}, context alone": (0.0, False), **settings}
        for name, (strength, other) in settings.items():
            share = errors(pipe, strength, other, cfg).mean(dim=1) / text  # (timesteps,)
            rows.append((name, *(f"{value:.3f}" for value in share.tolist())))
    return markdown_table(("error inside, share of the text's", *(f"t = {t}" for t in cfg.timesteps)), rows)


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    parser = argparse.ArgumentParser(
        "python -m moma.mini.adapter_numbers", description=__doc__.split("\n\n")[1]
    )
    add, cfg = parser.add_argument, AdapterNumbersConfig()
    add("--bundle", type=Path, default=Path("weights/mini"), help="(default: %(default)s)")
    add("--methods", nargs="+", default=["moma"], help="of the registry (default: moma)")
    add("--images", type=int, default=cfg.images, help="(default: %(default)s)")
    add("--dtype", default="fp32", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise ValueError(f"--images {args.images}: expected 1 or more")
    print(table(args.bundle, args.methods, AdapterNumbersConfig(images=args.images), args.dtype), end="")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("adapter_numbers", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
