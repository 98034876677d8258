"""What the report asks for: unseen subjects, each in another scene or of a material, and two in one image.

Letters: N images, S W sides of an image, h w latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from moma.methods.moma.conditioning import MoMAConditioning
from moma.methods.moma.method import MoMA, MoMAPrepared
from moma.mini.base_numbers import autoencoded
from moma.mini.config import ReportConfig
from moma.sampling.config import SampleConfig
from moma.sampling.interface import Job, Result
from moma.sampling.pipeline import Pipeline
from moma.world import pairs, world
from moma.world.classifiers import draw_all, stacked
from moma.world.drawing import stream
from moma.world.world import SCENES, Spec, draw


@dataclass(frozen=True)
class Asked:
    """Unseen subjects in references and in the wanted image."""

    shown: tuple[Spec, ...]  # of each subject's reference, as the prompt names them
    wanted: tuple[Spec, ...]  # the same; scene and material make the prompt, the poses real renders alone
    prompt: str
    seed: int  # of the start noise in every setting


def singles(number: int, materials: Sequence[str | None], cfg: ReportConfig) -> list[Asked]:
    """One subject each, the first identities of the split.

    Args:
        number: of images.
        materials: of the wanted images, in turn; with None, which keeps the identity's own colours,
            `cfg.new` of the images are of a class in a scene of which training saw nothing.
        cfg: what is drawn.
    """
    found: dict[tuple[str, int], Asked] = {}
    for i in count():
        if len(found) == number:
            return list(found.values())
        shown, rng = replace(world.spec(i, cfg.split, cfg.world), material=None), stream("report", i)
        material = materials[len(found) % len(materials)]
        new = material is None and int((len(found) + 1) * cfg.new) > int(len(found) * cfg.new)
        scenes = [
            scene
            for scene in SCENES
            if scene != shown.scene and (not new or world.held_out(shown.label, scene, None, cfg.world))
        ]
        if scenes:
            scene = scenes[rng.integers(len(scenes))]
            wanted = Spec(shown.label, shown.number, scene, material, *world.draw_seeds(rng))
            prompt = world.prompt(wanted.label, wanted.scene, wanted.material)
            found.setdefault((shown.label, shown.number), Asked((shown,), (wanted,), prompt, i))


def duos(number: int, cfg: ReportConfig) -> list[Asked]:
    """Two subjects of different classes each, in their own colours."""
    found = []
    for i, drawn in enumerate(islice(pairs.pairs_of(cfg.split, False, cfg.world), number)):
        what = pairs.Pair(*(replace(one, material=None) for one in drawn.subjects))
        wanted = pairs.named_specs([what], cfg.world)
        shown = tuple(world.elsewhere(one, 2 * i + k) for k, one in enumerate(wanted))
        prompt = pairs.pair_words(what, cfg.world).caption.text
        found.append(Asked(shown, tuple(wanted), prompt, i))
    return found


# --- drawing -------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Drawings of N images."""

    images: Tensor  # (N, 3, S, W) uint8
    m_gen: Tensor  # (N, h, w) float32, of all subjects; zeros (N, 1, 1) where there is none


class TextWithMaps(MoMA):
    """The base model alone, with M_gen of the label's attention maps."""

    def condition(self, prepared: Sequence[MoMAPrepared], config: SampleConfig) -> MoMAConditioning:
        cond = super().condition(prepared, config)
        silent = [(k, torch.zeros_like(v)) for k, v in cond.context]
        return replace(cond, context=silent, beta=torch.zeros_like(cond.beta))


def generate(pipe: Pipeline, asked: Sequence[Asked], cfg: ReportConfig, strength: float = 1.0) -> Drawn:
    """Draw images.

    Args:
        pipe: draws them.
        asked: what to draw, all of one or all of two subjects.
        cfg: how to draw.
        strength: β of Eq. 3.
    """
    return drawn(pipe.run(make_jobs(pipe, asked, cfg, strength), sized(asked, cfg)))


def sized(asked: Sequence[Asked], cfg: ReportConfig) -> SampleConfig:
    """How images are drawn: those of two subjects are wide."""
    wide = {"height": cfg.world.size, "width": cfg.world.pair_pixels}
    return replace(cfg.sample, **wide) if len(asked[0].wanted) > 1 else cfg.sample


def make_jobs(pipe: Pipeline, asked: Sequence[Asked], cfg: ReportConfig, strength: float) -> list[Job]:
    """One job each, with everything computed that precedes the denoising; as `generate`."""
    jobs = []
    for one in asked:
        subjects = []
        for spec in one.shown if pipe.method.subjects[-1] else ():
            image, mask = map(Image.fromarray, draw(spec, cfg.world)[:2])
            options = {"seed": one.seed, "prompts": [one.prompt]}
            subjects.append(pipe.encode_subject(image, mask, spec.label, **options))
        jobs.append(Job(tuple(subjects), one.prompt, one.seed, strength=strength if subjects else None))
    return jobs


def drawn(results: Iterable[Result]) -> Drawn:
    """The drawings of a run."""
    results, none = list(results), torch.zeros(1, 1, 1)
    masks = torch.cat([none if r.m_gen is None else r.m_gen.amax(dim=0, keepdim=True) for r in results])
    return Drawn(stacked([r.image for r in results]), masks.float().cpu())  # m_gen (N, h, w)


def text_alone(pipe: Pipeline, asked: Sequence[Asked], cfg: ReportConfig) -> Drawn:
    """What the base draws without a subject, with M_gen of the label."""
    moma = pipe.method
    method = TextWithMaps(moma.base, moma.adapter, moma.decoder, moma.config)
    return generate(replace(pipe, method=method), asked, cfg)


def real_autoencoded(pipe: Pipeline, asked: Sequence[Asked], cfg: ReportConfig) -> Drawn:
    """Real renders after the autoencoder, an upper bound for generators that use it."""
    found = real(asked, cfg)
    return found._replace(images=autoencoded(pipe.base.vae, found.images))


def real(asked: Sequence[Asked], cfg: ReportConfig, step: int = 0) -> Drawn:
    """The wanted images as the world draws them, of identities `step` places further in the class."""
    specs = [tuple(world.neighbour(spec, step, cfg.world) for spec in one.wanted) for one in asked]
    if len(specs[0]) == 1:
        images = draw_all([one for (one,) in specs], cfg.world)[0]
    else:
        images = stacked([pairs.draw_pair(pairs.Pair(*two), cfg.world).image for two in specs])
    return Drawn(images, torch.zeros(len(asked), 1, 1))
