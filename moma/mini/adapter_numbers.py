"""What adapters tell the base: `python -m moma.mini.adapter_numbers --bundle out/mini/bundles/moma`.

The paired noise error inside unseen subjects, by timestep: with the text alone, with what the method makes of
another render of the subject, and of another subject's. Each part must lower it before long runs pay.

Letters: N images, S side of an image, Z latent channels, h w latents.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moma.app.files import exit_status, markdown_table
from moma.app.options import MINI
from moma.load import load
from moma.methods.moma.method import MoMA
from moma.mini.base_numbers import latents
from moma.mini.report import parser_of
from moma.sampling.config import TIMESTEPS, SampleConfig
from moma.sampling.device import set_precision
from moma.sampling.diffusion import SolverStep, add_noise, alphas_cumprod
from moma.sampling.interface import Job
from moma.sampling.pipeline import Pipeline
from moma.world.classifiers import BYTE, draw_all
from moma.world.world import DEFAULT, Spec, WorldConfig, caption, draw, elsewhere, in_own_colours, neighbour


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
    specs = list(islice(in_own_colours(cfg.split, world), cfg.images))
    alphas, found = alphas_cumprod(base.schedule), []
    for start in range(0, cfg.images, cfg.batch):
        some = specs[start : start + cfg.batch]
        images, masks = draw_all(some, world)  # (N, 3, S, S), (N, 1, S, S)
        x0 = latents(base.vae, images)  # (N, Z, h, w)
        inside = F.adaptive_avg_pool2d(masks / BYTE, x0.shape[-2:]) > 0.5  # (N, 1, h, w)
        m_gen = inside.float().to(base.device)
        shown = [elsewhere(neighbour(what, int(other), world), i) for i, what in enumerate(some, start)]
        jobs = [_job(pipe, what, one, strength, world) for what, one in zip(some, shown, strict=True)]
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


def _job(pipe: Pipeline, what: Spec, shown: Spec, strength: float, world: WorldConfig) -> Job:
    """A render's caption with the subject of another render."""
    image, mask = map(Image.fromarray, draw(shown, world)[:2])
    subject = pipe.encode_subject(image, mask, what.label, prompts=[caption(what)])
    return Job(subject, caption(what), 0, strength=strength)


def table(bundle: Path, methods: Sequence[str], cfg: AdapterNumbersConfig, device: str, dtype: str) -> str:
    """Mean errors as shares of those with the text alone, a row for each setting.

    Args:
        bundle: with the adapters.
        methods: of the registry.
        cfg: what is measured.
        device: as `load` takes it.
        dtype: of the networks, the same.
    """
    alone = load(bundle, "text", device=device, dtype=dtype)
    text = errors(alone, 0.0, False, cfg).mean(dim=1)  # (timesteps,)
    rows = [("text, error", *(f"{value:.4f}" for value in text.tolist()))]
    for method in methods:
        pipe = load(bundle, method, device=device, dtype=dtype)
        settings = {f"{method}, another render": (1.0, False), f"{method}, another subject": (1.0, True)}
        if isinstance(pipe.method, MoMA):
            settings = {f"{method}, context alone": (0.0, False), **settings}
        for name, (strength, other) in settings.items():
            share = errors(pipe, strength, other, cfg).mean(dim=1) / text  # (timesteps,)
            rows.append((name, *(f"{value:.3f}" for value in share.tolist())))
    return markdown_table(("error inside, share of the text's", *(f"t = {t}" for t in cfg.timesteps)), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table. ValueError for wrong arguments."""
    set_precision()
    paths = {"--bundle": (str(MINI), "with the adapters")}
    numbers = {"--images": AdapterNumbersConfig.images}
    parser = parser_of("moma.mini.adapter_numbers", __doc__, paths, numbers)
    parser.add_argument("--methods", nargs="+", default=["moma"], help="of the registry (default: moma)")
    parser.set_defaults(dtype="fp32")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise ValueError(f"--images {args.images}: expected 1 or more")
    cfg = AdapterNumbersConfig(images=args.images)
    print(table(args.bundle, args.methods, cfg, args.device, args.dtype), end="")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("adapter_numbers", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
