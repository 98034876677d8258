"""The folder of MoMA-mini's recipe: what its stages have made, and their networks.

Letters: N images, S W sides of an image, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.clip import CLIPText
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.weights.files import atomic_write, read_object
from models.weights.loading import load_into, read_checkpoint, save_tensors
from moma.methods.moma.config import MethodConfig
from moma.mini.base_numbers import BaseModel
from moma.mini.config import MiniConfig
from moma.mini.tasks import Images, Pairs, PretrainingTask
from moma.training.checkpoint import check_same, newest
from moma.training.config import TrainConfig
from moma.training.loop import EXPORT, fit
from moma.training.parallel import Ranks
from moma.weights.bundle import (
    CLIP_HEADS,
    CLIP_TOKENIZER,
    LLAMA_TOKENIZER,
    PROBES,
    TOWER,
    Bundle,
    build_network,
)
from moma.weights.tiny import with_vocabularies
from moma.world import classifiers
from moma.world.pairs import pair, pair_words
from moma.world.words import words_of_renders

# Stage -> its networks, which a bundle holds; of some it has only a file.
KEEPABLE = {
    "vae": ("vae",),
    "clip": ("text", "vision", "heads"),
    "judges": ("probes",),
    "sam": ("sam",),
    "unet": ("unet",),
    "captioner": ("llava",),
}
FILES = {"heads": CLIP_HEADS, "probes": PROBES}


@dataclass(frozen=True)
class Workspace:
    """Where the recipe works. The folder keeps every stage's result, so that no stage runs twice."""

    cfg: MiniConfig
    folder: Path
    ranks: Ranks
    start: Bundle | None = None  # its networks are trained further; None: random weights
    kept: tuple[str, ...] = ()  # stages that take the start's networks as they are

    # --- the stages' results ---

    def keep(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> None:
        """Make named arrays once and write them to a file; called by all ranks."""
        path = self.folder / f"{name}.npz"

        def write() -> None:
            if not path.exists():
                with atomic_write(path) as part, part.open("wb") as file:
                    np.savez(file, **make())

        self.ranks.once(write)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of `keep`; "train" and "val" are those of `world.render_many`."""
        with np.load(self.folder / f"{name}.npz") as found:
            return dict(found)

    def images(self, split: str) -> Images:
        """The renders of "train" or "val", with their captions."""
        found = self.arrays(split)
        images = torch.from_numpy(found["image"]).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
        masks = torch.from_numpy(found["mask"])[:, None]  # (N, 1, S, S)
        return Images(images, masks, words_of_renders(found, self.cfg.world))

    def pairs(self, split: str) -> Pairs:
        """The renders of "train" or "val" with two subjects, with their captions."""
        found = self.arrays(f"{split}_pairs")
        images = torch.from_numpy(found["image"]).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, W)
        world = self.cfg.world
        words = [pair_words(pair(i, split, world), world) for i in range(len(images))]
        return Pairs(images, torch.from_numpy(found["masks"]), words)

    @property
    def tokenizers(self) -> Path:
        return self.folder / "tokenizers"

    def latents(self, kind: str) -> Path:
        """The file of the encoded "single" or "wide" training images."""
        return self.folder / f"latents_{kind}.safetensors"

    def networks(self) -> dict[str, Any]:
        """Sizes of the networks, with the vocabularies and the VAE's scaling once they are known."""
        networks = with_vocabularies(self.cfg.networks, self.tokenizers)
        scaling = self.folder / "scaling.json"
        if scaling.exists():
            networks["vae"] = replace(networks["vae"], scaling=read_object(scaling)["scaling"])
        return networks

    def clip_tokenizer(self) -> ClipTokenizer:
        files = (self.tokenizers / name for name in CLIP_TOKENIZER)
        return ClipTokenizer(*files, self.cfg.networks["text"].positions)

    def llama_tokenizer(self) -> LlamaTokenizer:
        return LlamaTokenizer(self.tokenizers / LLAMA_TOKENIZER[0])

    def new(self, name: str) -> nn.Module:
        """A network to train: of the start, or with random weights from a seed of its own."""
        if self.start:
            writes = name == "llava" and "captioner" not in self.kept  # it need not if it is not trained here
            found = self.start.build(name, "cpu", torch.float32, lm_head=writes).requires_grad_()
            return with_positions(found, self.cfg.networks[name].positions) if name == "text" else found
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.seeds[name])
            return build_network(name, self.networks()[name], self.networks()["unet"])

    def weights(self, stage: str, name: str) -> Path:
        """The file of a network that a finished stage has trained."""
        return self.folder / stage / EXPORT / f"{name}.safetensors"

    def trained(self, stage: str, name: str) -> nn.Module:
        """A network that a finished stage has trained."""
        config, path = self.networks()[name], self.weights(stage, name)
        return load_into(lambda: build_network(name, config), [path], "cpu", torch.float32).eval()

    def probes(self) -> classifiers.Probes:
        return classifiers.load_probes(self.weights("judges", "probes"), self.cfg.probes)

    def base_model(self) -> BaseModel:
        """The trained base and its judges."""
        cfg, networks = self.cfg, (self.trained("unet", "unet"), self.trained("vae", "vae"))
        text = self.trained("clip", "text"), self.clip_tokenizer()
        layers = cfg.text_to_image.map_layers
        method = MethodConfig(**{**cfg.method, "m_gen_layers": None})  # the maps are of those layers alone
        return BaseModel(*networks, *text, self.probes(), cfg.world, cfg.sample, layers, method)

    def share_of(self, batch: int) -> int:
        """This rank's samples of a batch. ValueError if the ranks cannot share it equally."""
        if batch % self.ranks.world:
            raise ValueError(f"{self.ranks.world} ranks: a step's {batch} samples cannot be shared equally")
        return batch // self.ranks.world

    def take(self, stage: str) -> None:
        """Export a stage's networks as the start has them."""
        folder = self.folder / stage / EXPORT
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEEPABLE[stage]:
            if file := FILES.get(name):
                found = {
                    key: t.read().float() for key, t in read_checkpoint(self.start.folder / file).items()
                }
            else:
                state = self.new(name).state_dict()
                found = {key: tensor for key, tensor in state.items() if not key.startswith(TOWER)}
            save_tensors(folder, name, found)

    def fit(self, stage: str, task: PretrainingTask, cfg: TrainConfig) -> None:
        """Train a task, from its last checkpoint if there is one.

        Args:
            stage: name of the folder for its checkpoints and weights.
            task: what to train.
            cfg: how to train it.

        Raises:
            ValueError: for a checkpoint of another training.
        """
        out, cfg = self.folder / stage, replace(cfg, batch_size=self.share_of(cfg.batch_size))
        identity = {"stage": stage, "train": cfg.identity(self.ranks.world)}
        saved = self.ranks.once(lambda: newest(out))
        if saved:
            check_same(saved, identity, cfg.steps)
        task.model.to(self.ranks.device)
        fit(task, cfg, out, self.ranks, identity, saved)


def with_positions(text: CLIPText, positions: int) -> CLIPText:
    """A text encoder for at least as long texts; new positions start as the last one."""
    longer = CLIPText(replace(text.cfg, positions=positions))
    state, name = text.state_dict(), "embeddings.position_embedding.weight"
    more = positions - text.cfg.positions
    state[name] = torch.cat([state[name], state[name][-1:].expand(more, -1)])  # (positions, C)
    longer.load_state_dict(state)
    return longer
