"""Memory of full-size training, counted without a GPU: `python -m moma.bench.training_memory`.

The networks run on shapes alone (torch's FakeTensorMode), and every tensor that autograd saves for the
backward pass is counted. Weights are added: 2 bytes if frozen; if trained, 4 and as many for the gradient and
each of AdamW's two averages. Buffers of single operators and the allocator's rounding are not counted.

Letters: B samples, Z latent channels, h w latents, T text tokens, M reference keys, C width of LLaMA.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.attention import split_heads
from models.llama import Llama, LlamaConfig
from models.llava import LlavaConfig
from models.lora import add_lora
from models.unet import SD15, Grid, UNet, attention_grids
from moma.app.files import markdown_table
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.attention import Gate, ReferenceLayer, gathered_queries
from moma.methods.moma.conditioning import MoMAHook, condition_rows
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.training import ADAPTER, LORA_LAYERS

GB = 1e9
FROZEN, TRAINED = 2, 16  # bytes per parameter: bf16; float32 with gradient and AdamW's two averages


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes of the training."""

    side: int = 64  # of the latents: 512 pixels
    text_tokens: int = 77  # of Stable Diffusion's text encoder
    subject_share: float = 0.35  # of the positions that are the subject's keys and queries
    prompt_tokens: int = 640  # of LLaVA: 576 patches and the instruction
    lora_rank: int = 64  # stage 1's default
    batches: tuple[int, ...] = (1, 4, 8)
    ranks: tuple[int, ...] = (1, 8)  # of FSDP
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(learnable_token=True))


def kept_for_backward(forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves in `forward`; shared memory counts once, parameters do not count."""
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage._cdata] = (storage.nbytes(), tensor)  # the reference keeps the address unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(nbytes for nbytes, _ in found.values())


def stage2(batch: int, checkpointing: bool, cfg: MemoryConfig) -> tuple[int, int]:
    """Memory of one step of stage 2.

    Args:
        batch: B.
        checkpointing: whether the UNet uses gradient checkpointing.
        cfg: sizes.

    Returns:
        Bytes of weights, and of tensors saved for the backward pass.
    """
    with FakeTensorMode(), torch.device("cpu"):
        with _parameters_in(torch.bfloat16):
            unet = UNet(replace(SD15, gradient_checkpointing=checkpointing)).requires_grad_(False)
        adapter = Adapter(cfg.adapter, SD15)
        trained = sum(p.numel() for name, p in adapter.named_parameters() if name.startswith(ADAPTER))
        x = torch.empty(batch, SD15.in_channels, cfg.side, cfg.side, dtype=torch.bfloat16)
        text = torch.empty(batch, cfg.text_tokens, SD15.context_dim[0], dtype=torch.bfloat16)
        grids = attention_grids(SD15, (cfg.side, cfg.side))

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                reference = []
                for new, layer, (h, w) in zip(adapter.subject, adapter.layers, grids, strict=True):
                    keys = torch.empty(batch, int(cfg.subject_share * h * w), layer.channels, dtype=x.dtype)
                    k, v = (split_heads(project(keys), layer.heads) for project in (new.to_k, new.to_v))
                    reference.append(ReferenceLayer(k, v, None))
                embedding = torch.empty(batch, cfg.adapter.embed_dim)
                label, beta = torch.zeros(batch, cfg.text_tokens), torch.ones(batch)
                cond = condition_rows(adapter, embedding, text, None, label, reference, beta, DEFAULT)
                m_gen = torch.ones(batch, 1, cfg.side, cfg.side)
                hook = MoMAHook(cond, True, m_gen, {grid: _gate(batch, grid, cfg) for grid in set(grids)})
                eps, _ = unet(x, torch.zeros(batch), text, hook)
                return eps.float().square().mean()

        return FROZEN * _count(unet) + TRAINED * trained, kept_for_backward(forward)


def _gate(batch: int, grid: Grid, cfg: MemoryConfig) -> Gate:
    """A gate with the shapes of a grid."""
    tokens = grid[0] * grid[1]
    gathered = gathered_queries(int(cfg.subject_share * tokens), tokens)
    m_gen = torch.ones(batch, 1, tokens if gathered is None else gathered, 1, dtype=torch.bfloat16)
    return Gate(m_gen, None if gathered is None else torch.zeros(batch, gathered, dtype=torch.long))


def _stage1(train: str, ranks: int, cfg: MemoryConfig) -> tuple[int, int]:
    """The same per rank for stage 1 with one sample and gradient checkpointing."""
    sizes, llava = replace(LlamaConfig(), gradient_checkpointing=True, lm_head=False), LlavaConfig()
    with FakeTensorMode(), torch.device("cpu"):
        with _parameters_in(torch.float32 if train == "mllm" else torch.bfloat16):
            llama = Llama(sizes)
        rest = _count(Adapter(cfg.adapter, SD15).mapping)
        rest += (llava.vision.width + 1 + llava.llama.width + 1) * llava.llama.width  # LLaVA's projector
        if train == "mllm":
            weights = TRAINED * (_count(llama) + rest)
        else:
            frozen = _count(llama.requires_grad_(False))
            if train == "lora":
                add_lora(llama, LORA_LAYERS.replace("llama\\.", "", 1), cfg.lora_rank, 1.0, 0)
            weights = FROZEN * frozen + TRAINED * (_count(llama) - frozen + rest)
        embeds = torch.empty(1, cfg.prompt_tokens, sizes.width, dtype=torch.bfloat16, requires_grad=True)

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return llama(embeds).float().square().mean()

        return weights // ranks, kept_for_backward(forward)


@contextmanager
def _parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    cfg, rows = MemoryConfig(), []
    for suffix, checkpointing in (("", False), (", gradient checkpointing", True)):
        rows += [(f"stage 2{suffix}", 1, n, *stage2(n, checkpointing, cfg)) for n in cfg.batches]
    for train in ("new", "lora", "mllm"):
        rows += [(f"stage 1, {train}", n, 1, *_stage1(train, n, cfg)) for n in cfg.ranks]
    heads = ("training", "ranks", "batch per rank", "weights", "saved tensors", "total")
    table = [
        (name, str(ranks), str(batch), *(f"{x / GB:.1f} GB" for x in (weights, kept, weights + kept)))
        for name, ranks, batch, weights, kept in rows
    ]
    print(markdown_table(heads, table), end="")


if __name__ == "__main__":
    sys.exit(main())
