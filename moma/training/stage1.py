"""Stage 1 (Sec. 3.4, Eq. 4): the MLLM learns to say what the wanted image looks like to CLIP.

It reads the reference on white and the instruction; its state at the last token, through the mapping, is
regressed on the CLIP image embedding of the image, background included.

Letters: B samples, s side of the image tower's images, N patches, C width of the MLLM, E embedding.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.clip_image import clip_image
from models.llava import Llava
from models.lora import LoRALinear, add_lora, merged_tensors
from models.tokenizers import LlamaTokenizer
from moma.data.stream import Item, Position, StreamConfig, batches, once, stream
from moma.data.triplets import SkipLog, Source, Triplet, open_source
from moma.methods.moma.adapter import Adapter
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.feature_decoder import FeatureDecoder, instruction
from moma.sampling.config import check_types
from moma.training.cache import clip_embedding
from moma.training.common import (
    Prepare,
    export_networks,
    refuse_quantised,
    start_adapter,
    train_only,
    with_config,
)
from moma.training.config import TrainConfig
from moma.training.task import Batch, Delivery
from moma.weights.bundle import Bundle

HELD_OUT = "kept back for validation"
# What LoRA updates: every linear layer of LLaMA's blocks.
LORA_LAYERS = r"llama\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@dataclass(frozen=True)
class Stage1Config:
    """What stage 1 does beyond the loop's own choices."""

    # "mllm": LLaMA, LLaVA's projector, mapping and token (Sec. 3.4; 7B parameters need FSDP); "lora": updates
    # of low rank in their place; "new": mapping and token alone. The image tower is frozen always.
    train: Literal["mllm", "lora", "new"] = "mllm"
    # "new": a fresh mapping (PyTorch's own start), and as token the mean of the word embeddings: the frozen
    # blocks know that place, and it favours no word. "adapter": go on with the bundle's.
    init: Literal["new", "adapter"] = "new"
    lora_rank: int = 64  # far above what a style needs: the model learns a new kind of output
    lora_alpha: float = 64.0  # α; equal to the rank, the update has the size of its factors' product
    gradient_checkpointing: bool = False  # recompute LLaMA's blocks in the backward: slower, less memory
    workers: int = 4  # processes per rank that decode images; 0 = none beside the training
    lanes: int = 32  # of the data's order: a multiple of ranks * workers, and a part of it (StreamConfig)
    validation: str | None = None  # held-out data; None = the training data's first samples are kept back
    validation_samples: int = 64
    validation_batch: int = 8

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        check_types(self)
        for name in ("lora_rank", "lanes", "validation_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        for name in ("workers", "validation_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha {self.lora_alpha}: expected a number above 0")


class Stage1(nn.Module):
    """Batch -> loss of each sample."""

    def __init__(
        self, llava: Llava, adapter: Adapter, tokenizer: LlamaTokenizer, method: MethodConfig
    ) -> None:
        super().__init__()
        self.llava, self.adapter = llava, adapter
        self.decoder = FeatureDecoder(llava, adapter, tokenizer, method)

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 4: the mean of (embedding - CLIP(image))², float32 (B,).

        batch: white, full (B, 3, s, s), the reference on white and the target; instruction, B texts.
        """
        dtype = self.llava.tower.embeddings.class_embedding.dtype
        features = self.llava.encode_images(batch["white"].to(dtype))  # (B, N, C)
        embedding = self.decoder.embed(features, batch["instruction"])  # (B, E)
        target = clip_embedding(self.llava.tower, batch["full"].to(dtype))  # (B, E), no gradient: frozen
        return (embedding.float() - target.float()).square().mean(dim=1)  # (B,)


@dataclass(frozen=True)
class Pair:
    """Triplet -> what stage 1 reads of it; ValueError for samples kept back. Runs in the data's workers."""

    prepare: Prepare
    kept: frozenset[str] = frozenset()  # keys

    def __call__(self, triplet: Triplet) -> dict[str, Any]:
        if triplet.key in self.kept:
            raise ValueError(HELD_OUT)
        (target, reference), size = self.prepare.squares(triplet), self.prepare.tower_size
        return {
            "white": clip_image(reference.white, size),  # (3, s, s)
            "full": clip_image(target.photo, size),  # (3, s, s)
            "instruction": instruction(triplet.label, triplet.caption, self.prepare.method.template),
        }


def collate(items: Sequence[Item]) -> Batch:
    """Samples of `Pair` -> the batch of `Stage1.forward`."""
    return {
        "number": torch.tensor([item.number for item in items]),  # (B,)
        "white": torch.stack([item.sample["white"] for item in items]),  # (B, 3, s, s)
        "full": torch.stack([item.sample["full"] for item in items]),  # (B, 3, s, s)
        "instruction": [item.sample["instruction"] for item in items],
    }


@dataclass(frozen=True, eq=False)
class Stage1Task:
    """Stage 1 as the loop sees it (`moma.training.task.Task`)."""

    model: Stage1
    source: Source
    transform: Pair
    held_out: Sequence[Batch]
    order: StreamConfig
    workers: int
    lora: dict[str, LoRALinear] = field(default_factory=dict)  # by name in llava

    @property
    def shards(self) -> list[nn.Module]:
        """What FSDP cuts up one by one."""
        return list(self.model.llava.llama.layers)

    def deliveries(self, batch_size: int, rank: int, world: int, start: Position) -> Iterator[Delivery]:
        skips = SkipLog(
            tell=lambda text: None if text.endswith(HELD_OUT) else warnings.warn(text, stacklevel=2)
        )
        items = stream(self.source, self.order, rank, world, self.workers, start, self.transform, skips)
        for some, position in batches(items, batch_size, start):
            yield Delivery(collate(some), position)

    def validation(self) -> list[Batch]:
        return list(self.held_out)

    def sample_grid(self) -> None:
        """An embedding is no image."""

    def export(self, folder: Path) -> None:
        model = self.model
        networks = {"adapter": (model.adapter.cfg, dict(model.adapter.named_parameters()))}
        trained = any(parameter.requires_grad for parameter in model.llava.parameters())
        if trained:
            tensors = merged_tensors(model.llava, self.lora)
            cfg = model.llava.cfg
            cfg = replace(cfg, llama=replace(cfg.llama, gradient_checkpointing=False))
            own = {name: p for name, p in tensors.items() if not name.startswith("tower.")}
            networks["llava"] = (cfg, own)
        export_networks(folder, networks, model.decoder.method)


def build(
    bundle: Bundle,
    data: str | Path,
    config: Stage1Config,
    train: TrainConfig,
    method: MethodConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Stage1Task:
    """Stage 1 on a bundle and training data. dtype: of the frozen networks; what is trained is float32.

    ValueError, before the first weight is read, for what does not fit.
    """
    refuse_quantised(bundle)
    sizes, vision = bundle.config("llava"), bundle.config("vision")
    embed = bundle.configs["adapter"].embed_dim if "adapter" in bundle.networks else vision.width
    if embed != vision.width:
        raise ValueError(
            f"{bundle.folder}: the adapter's embeddings are {embed} wide, the image tower's {vision.width}"
        )
    if config.init == "adapter":
        bundle.config("adapter")
    source = open_source(data)
    pair = Pair(Prepare(bundle.image_size, vision.image_size, method))
    held = list(
        islice(once(source if config.validation is None else open_source(config.validation), transform=pair),
               config.validation_samples)
    )  # fmt: skip
    if config.validation is None:
        pair = replace(pair, kept=frozenset(item.key for item in held))

    checkpointing = replace(sizes.llama, gradient_checkpointing=config.gradient_checkpointing)
    whole = config.train == "mllm"
    llava = with_config(bundle, "llava", replace(sizes, llama=checkpointing)).build(
        "llava", device, torch.float32 if whole else dtype
    )
    llava.tower.to(dtype)
    adapter = _adapter(bundle, config, method, llava, train.seed).to(device)
    lora = {}
    if config.train == "lora":
        lora = add_lora(llava, LORA_LAYERS, config.lora_rank, config.lora_alpha, train.seed)
    model = Stage1(llava, adapter, bundle.llama_tokenizer(), method)
    train_only(model, trained_names(config, method, llava, lora))
    groups = [held[i : i + config.validation_batch] for i in range(0, len(held), config.validation_batch)]
    order = StreamConfig(seed=train.seed, lanes=config.lanes)
    return Stage1Task(model, source, pair, [collate(g) for g in groups], order, config.workers, lora)


def trained_names(
    config: Stage1Config, method: MethodConfig, llava: Llava, lora: dict[str, LoRALinear]
) -> tuple[str, ...]:
    """Beginnings of the names in `Stage1` of what is trained; blocks that are not used are not."""
    new = ("adapter.mapping.",) + (("adapter.token",) if method.template == "paper" else ())
    blocks = range(llava.cfg.llama.layers if method.mllm_layers is None else method.mllm_layers)
    used = tuple(f"llava.llama.layers.{i}." for i in blocks)
    if config.train == "mllm":
        return (*new, *used, "llava.llama.embed_tokens.", "llava.llama.norm.", "llava.projector.")
    names = (f"llava.{name}.{part}" for name in lora for part in ("down", "up"))
    return (*new, *(name for name in names if name.startswith(used)))


@torch.no_grad()
def _adapter(bundle: Bundle, config: Stage1Config, method: MethodConfig, llava: Llava, seed: int) -> Adapter:
    """The adapter with the mapping and the token that the training starts from."""
    keep = ("",) if config.init == "adapter" else ("projector.", "context.", "subject.")
    adapter = start_adapter(bundle, keep, method.template == "paper", seed)
    if "adapter" not in bundle.networks:  # the export is complete all the same: stage 2's start
        adapter.init_from_base(bundle.build("unet"), method)
    had = "adapter" in bundle.networks and bundle.config("adapter").learnable_token
    if adapter.token is not None and not (had and config.init == "adapter"):
        adapter.token.copy_(llava.llama.embed_tokens.weight.float().mean(dim=0))
    return adapter
