"""MoMA-mini's world as a dataset to evaluate on, and its own small scorers.

The dataset is written as DreamBooth's is published, a folder of images for each subject, so that all else
is done as for photos; the truth being known, each image has its mask. The judges' embedding of an identity
stands where DINO stands, and the bundle's CLIP, with the projections of its training, where CLIP stands.
Their figures compare with one another only.

Letters: N images or texts, S image side, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from models.clip import CLIP, CLIPConfig
from models.weights.loading import load_into, read_checkpoint, save_tensors
from moma.app.record import save_png
from moma.evaluate.protocol import Prompt, Subject
from moma.evaluate.scorers import BATCH, CLIPScorer, ImageScorer
from moma.weights.bundle import Bundle
from moma.world.classifiers import Probes, classify, load_probes, stacked
from moma.world.drawing import stream
from moma.world.world import CLASSES, DEFAULT, MATERIALS, SCENES, SEEDS, Spec, WorldConfig, draw, prompt

PROBES, CLIP_HEADS = "probes.safetensors", "clip_heads.safetensors"  # files beside the bundle's own


@dataclass(frozen=True)
class WorldEvaluation:
    """What is taken of the world."""

    subjects: int = 30  # as many as DreamBooth has, of the classes in turn
    photos: int = 5  # of each, as most of DreamBooth's have


# --- the dataset -------------------------------------------------------------------------------------


def photos_of(index: int, cfg: WorldEvaluation, world: WorldConfig = DEFAULT) -> list[Spec]:
    """Images of the index-th subject, which nothing was trained on, each in a scene of its own."""
    label, rng = CLASSES[index % len(CLASSES)], stream("evaluation", index)
    number = world.identities + world.unseen_identities + index // len(CLASSES)
    places = rng.permutation(len(SCENES))
    seeds = rng.integers(SEEDS, size=(cfg.photos, 2)).tolist()
    return [Spec(label, number, SCENES[places[i % len(SCENES)]], None, *seed) for i, seed in enumerate(seeds)]


def prompts_of(shown: Spec) -> tuple[Prompt, ...]:
    """All scenes but the first image's as contexts; in that one, all materials as textures."""
    contexts = [prompt(shown.label, scene) for scene in SCENES if scene != shown.scene]
    textures = [prompt(shown.label, shown.scene, material) for material in MATERIALS]
    both = [(text, "context") for text in contexts] + [(text, "texture") for text in textures]
    return tuple(Prompt(*one) for one in both)


def write_world(
    folder: Path, cfg: WorldEvaluation | None = None, world: WorldConfig = DEFAULT
) -> tuple[list[Subject], Path]:
    """The subjects, their images written below `folder` as PNG files, and the folder of their masks."""
    cfg, subjects = cfg or WorldEvaluation(), []
    if cfg.subjects > len(CLASSES) * world.unseen_identities:
        raise ValueError(
            f"{cfg.subjects} subjects: the world has {len(CLASSES) * world.unseen_identities} that are unseen"
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
        subjects.append(Subject(name, specs[0].label, photos, prompts_of(specs[0])))
    return subjects, folder / "masks"


# --- the scorers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdentityScorer:
    """The judges' embedding of which subject an image shows."""

    probes: Probes
    columns: tuple[str, ...] = ("identity judge",)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size -> (N, E) of unit length."""
        side = (self.probes.cfg.side,) * 2
        seen = [image.convert("RGB").resize(side, Image.Resampling.BOX) for image in images]
        return classify(self.probes, stacked(seen), BATCH).embedding


def mini_scorers(folder: Path) -> list[ImageScorer]:
    """The scorers beside and in MoMA-mini's bundle, on the CPU in float32: they are small.

    ValueError for a folder without them.
    """
    check_scorers(folder)
    bundle = Bundle.open(folder)
    clip = load_clip(folder / CLIP_HEADS, bundle)
    return [
        IdentityScorer(load_probes(folder / PROBES)),
        CLIPScorer(clip, bundle.clip_tokenizer(), ("CLIP-I MoMA-mini", "CLIP-T MoMA-mini")),
    ]


def check_scorers(folder: Path) -> None:
    """ValueError for a bundle that lacks a scorer's files."""
    for name in ("text", "vision"):
        Bundle.open(folder).config(name)
    for file in (PROBES, CLIP_HEADS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: has no {file}, which --world is scored with; see --scorers")


def load_clip(path: Path, bundle: Bundle) -> CLIP:
    """The bundle's two towers with the projections of a file, float32."""
    heads, towers = load_heads(path, bundle), {}
    for name in ("text", "vision"):
        towers[name] = bundle.build(name, "cpu", torch.float32)
    width = heads["text_head"].out_features
    with torch.device("meta"):  # no weights but those that are given
        clip = CLIP(CLIPConfig(*(replace(tower.cfg, projection=width) for tower in towers.values())))
    text = {"text_projection.weight": heads["text_head"].weight, **towers["text"].state_dict()}
    vision = {"visual_projection.weight": heads["vision_head"].weight, **towers["vision"].state_dict()}
    clip.text_model.load_state_dict(text, assign=True)
    clip.vision_model.load_state_dict(vision, assign=True)
    return clip.eval().requires_grad_(False)


def load_heads(path: Path, bundle: Bundle) -> nn.ModuleDict:
    """The projections that `moma.mini.tasks.ClipLoss` trains, float32."""
    found = read_checkpoint(path)
    width = next(iter(found.values())).shape[0] if found else 0
    sizes = {f"{name}_head": bundle.config(name).width for name in ("text", "vision")}

    def make() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(size, width, bias=False) for name, size in sizes.items()})

    return load_into(make, [path], "cpu", torch.float32).eval().requires_grad_(False)


def write_scorers(folder: Path, probes: Path, heads: Path) -> None:
    """Put the judges' file, and that of CLIP's projections as float16, beside a bundle."""
    for stem, path in ((Path(PROBES).stem, probes), (Path(CLIP_HEADS).stem, heads)):
        save_tensors(folder, stem, {name: t.read().half() for name, t in read_checkpoint(path).items()})
