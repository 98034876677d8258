"""MoMA-mini's drawn world as a dataset to evaluate on, and its small scorers.

The dataset is written like DreamBooth's, a folder of images per subject, so that everything else works as
for photos; each image comes with its true mask. The classifiers' identity embedding stands in for DINO, and
the bundle's CLIP towers, with the projections of their training, stand in for CLIP. These scores compare
only with one another.

Letters: N images or texts, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from models.clip import CLIP, CLIPConfig
from models.weights.loading import read_checkpoint, save_tensors
from moma.app.record import save_png
from moma.evaluate.protocol import Prompt, Subject
from moma.evaluate.scorers import BATCH, CLIPScorer, ImageScorer
from moma.weights.bundle import CLIP_HEADS, PROBES, Bundle
from moma.world.classifiers import Probes, classify, load_probes, stacked
from moma.world.drawing import stream
from moma.world.world import CLASSES, DEFAULT, MATERIALS, SCENES, SEEDS, Spec, WorldConfig, draw, prompt


@dataclass(frozen=True)
class WorldEvaluation:
    """Size of the dataset."""

    subjects: int = 30  # as many as DreamBooth has; the classes take turns
    photos: int = 5  # per subject, as for most of DreamBooth's


# --- the dataset -------------------------------------------------------------------------------------


def photos_of(index: int, cfg: WorldEvaluation, world: WorldConfig = DEFAULT) -> list[Spec]:
    """Images of a subject that nothing was trained on, each in another scene.

    Args:
        index: of the subject, from 0.
        cfg: how many images.
        world: what is drawn.
    """
    label, rng = CLASSES[index % len(CLASSES)], stream("evaluation", index)
    number = world.identities + world.unseen_identities + index // len(CLASSES)
    places = rng.permutation(len(SCENES))
    seeds = rng.integers(SEEDS, size=(cfg.photos, 2)).tolist()
    return [Spec(label, number, SCENES[places[i % len(SCENES)]], None, *seed) for i, seed in enumerate(seeds)]


def _prompts_of(shown: Spec) -> tuple[Prompt, ...]:
    """Contexts: all scenes but the first image's. Textures: all materials in that scene."""
    contexts = [prompt(shown.label, scene) for scene in SCENES if scene != shown.scene]
    textures = [prompt(shown.label, shown.scene, material) for material in MATERIALS]
    both = [(text, "context") for text in contexts] + [(text, "texture") for text in textures]
    return tuple(Prompt(*one) for one in both)


def write_world(
    folder: Path, cfg: WorldEvaluation | None = None, world: WorldConfig = DEFAULT
) -> tuple[list[Subject], Path]:
    """Write the dataset.

    Args:
        folder: for the images, as `photos/SUBJECT/NN.png`, and their masks, as `masks/SUBJECT/NN.png`.
        cfg: its size.
        world: what is drawn.

    Returns:
        The subjects, and the folder of their masks.

    Raises:
        ValueError: for more subjects than there are.
    """
    cfg, subjects = cfg or WorldEvaluation(), []
    if cfg.subjects > len(CLASSES) * world.unseen_identities:
        raise ValueError(
            f"{cfg.subjects} subjects: the world has {len(CLASSES) * world.unseen_identities} unseen ones"
        )
    for index in range(cfg.subjects):
        specs = photos_of(index, cfg, world)
        name = f"{specs[0].label}-{specs[0].number}"
        files = [Path(name, f"{i:02}.png") for i in range(len(specs))]
        for file, what in zip(files, specs, strict=True):
            sample = draw(what, world)
            for kind, array in (("photos", sample.image), ("masks", sample.mask)):
                (folder / kind / name).mkdir(parents=True, exist_ok=True)
                save_png(folder / kind / file, Image.fromarray(array))
        photos = tuple(folder / "photos" / file for file in files)
        subjects.append(Subject(name, specs[0].label, photos, _prompts_of(specs[0])))
    return subjects, folder / "masks"


# --- the scorers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdentityScorer:
    """The classifiers' embedding of which subject an image shows."""

    probes: Probes
    columns: tuple[str, ...] = ("identity judge",)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size -> (N, E) of unit length."""
        side = (self.probes.cfg.side,) * 2
        seen = [image.convert("RGB").resize(side, Image.Resampling.BOX) for image in images]
        return classify(self.probes, stacked(seen), BATCH).embedding


def mini_scorers(bundle: Bundle) -> list[ImageScorer]:
    """The scorers of MoMA-mini's bundle, on the CPU in float32: they are small.

    ValueError for a bundle without them.
    """
    check_world_scorers(bundle)
    return [
        IdentityScorer(load_probes(bundle.folder / PROBES)),
        CLIPScorer(_load_clip(bundle), bundle.clip_tokenizer(), ("CLIP-I MoMA-mini", "CLIP-T MoMA-mini")),
    ]


def check_world_scorers(bundle: Bundle) -> None:
    """ValueError for a bundle without MoMA-mini's scorers."""
    for name in ("text", "vision"):
        bundle.config(name)
    for file in (PROBES, CLIP_HEADS):
        if not (bundle.folder / file).is_file():
            raise ValueError(f"{bundle.folder}: has no {file}, which --world is scored with; see --scorers")


def _load_clip(bundle: Bundle) -> CLIP:
    """The bundle's two towers with the projections of CLIP_HEADS, float32."""
    path, names = bundle.folder / CLIP_HEADS, ("text", "vision")
    heads = {name: tensor.read().float() for name, tensor in read_checkpoint(path).items()}
    widths = {f"{name}_head.weight": bundle.config(name).width for name in names}
    if {name: head.shape[-1] for name, head in heads.items()} != widths:
        raise ValueError(f"{path}: expected projections of CLIP's embeddings, {widths}")
    towers = [bundle.build(name, "cpu", torch.float32) for name in names]
    width = heads["text_head.weight"].shape[0]
    with torch.device("meta"):  # all weights are assigned below
        clip = CLIP(CLIPConfig(*(replace(tower.cfg, projection=width) for tower in towers)))
    text = {"text_projection.weight": heads["text_head.weight"], **towers[0].state_dict()}
    vision = {"visual_projection.weight": heads["vision_head.weight"], **towers[1].state_dict()}
    clip.text_model.load_state_dict(text, assign=True)
    clip.vision_model.load_state_dict(vision, assign=True)
    return clip.eval().requires_grad_(False)


def write_scorers(folder: Path, probes: Path, heads: Path) -> None:
    """Add the scorers' files to a bundle's folder, as float16.

    Args:
        folder: the bundle's.
        probes: checkpoint of the classifiers.
        heads: checkpoint of CLIP's projections.
    """
    for stem, path in ((Path(PROBES).stem, probes), (Path(CLIP_HEADS).stem, heads)):
        save_tensors(folder, stem, {name: t.read().half() for name, t in read_checkpoint(path).items()})
