"""Effect of 8- and 4-bit LLaMA weights on the embedding of the feature decoder.

    python convert_weights.py --base-bundle weights/mini --llm-bits 4 --out out/mini4
    # compare bundles on subjects and prompts of MoMA-mini's world
    python -m moma.bench.rounding weights/mini out/mini4
    python -m moma.bench.rounding --full-size 32              # LLaVA-1.5-7B's sizes, pseudo-random weights

Letters: N pairs of subject and prompt, T tokens, C width of LLaMA, E embedding.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.llama import GatedMLP, LlamaBlock, LlamaConfig, RMSNorm, rope_at
from models.weights.quant import PRESETS, QuantConfig, quantise, use_quantised_layers
from moma.app.files import Parser, exit_status
from moma.inputs.preprocess import make_reference
from moma.methods.moma.adapter import AdapterConfig
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.mini.asked import singles
from moma.mini.config import ReportConfig
from moma.sampling.device import set_precision
from moma.sampling.interface import Runtime
from moma.weights.bundle import Bundle
from moma.weights.tiny import fill
from moma.world.world import draw


@dataclass(frozen=True)
class RoundingConfig:
    """What is compared."""

    pairs: int = 64  # N
    tokens: int = 64  # T at full size; LLaVA's prompts have 640
    seed: int = 0  # of the pseudo-random weights and states
    llama: LlamaConfig = LlamaConfig(lm_head=False)  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Agreement:
    """How near vectors are to the ones wanted. Those of all prompts share a large part, which says little."""

    cosine: float  # mean over N
    removed: float  # the same after each side's mean over N is removed
    least: float  # of these
    found: int  # vectors whose nearest wanted one, by the latter cosine, is their own
    count: int  # N

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.5f}, mean removed {self.removed:.4f} (least {self.least:.4f}), "
            f"{self.found} of {self.count} nearest to their own"
        )


def agreement(wanted: Tensor, found: Tensor) -> Agreement:
    """Compare vectors (N, C) with the ones wanted."""
    a, b = (F.normalize(x - x.mean(dim=0), dim=1) for x in (wanted, found))  # (N, C)
    each, nearest = (a * b).sum(dim=1), (b @ a.T).argmax(dim=1)  # (N,)
    return Agreement(
        F.cosine_similarity(wanted, found).mean().item(),
        each.mean().item(),
        each.min().item(),
        int((nearest == torch.arange(len(nearest))).sum()),
        len(nearest),
    )


def rounded(state: dict[str, Tensor], quant: QuantConfig) -> dict[str, Tensor]:
    """The state of LLaMA or of one of its blocks, with the blocks' matrices as codes and scales."""
    small = dict(state)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        layer = name.removesuffix(".weight")
        small[f"{layer}.codes"], small[f"{layer}.scale"] = quantise(small.pop(name), quant)
    return small


def share(state: dict[str, Tensor], small: dict[str, Tensor]) -> float:
    """Bytes of the rounded matrices over those in 16 bits."""
    plain = sum(2 * state[name].numel() for name in state if name not in small)
    return sum(value.nbytes for name, value in small.items() if name not in state) / plain


# --- bundles -----------------------------------------------------------------------------------------


@torch.no_grad()
def embeddings(folder: Path, dtype: str, cfg: RoundingConfig) -> Tensor:
    """Embeddings of a bundle for MoMA-mini's world.

    Args:
        folder: of the bundle.
        dtype: of the computation, a name.
        cfg: number of pairs.

    Returns: (N, E) float32.
    """
    runtime, inputs = Runtime.choose(Bundle.open(folder), "cpu", dtype), []
    config = runtime.weights.method_config("moma")
    decoder = FeatureDecoder.load(runtime, config, None, ("adapter",))
    for pair in singles(cfg.pairs, [None], ReportConfig()):
        image, mask = map(Image.fromarray, draw(pair.shown[0], ReportConfig().world)[:2])
        white = make_reference(image, mask, runtime.weights.image_size, config).white
        inputs.append(MLLMInput(white, pair.shown[0].label, pair.prompt))
    return torch.cat(decoder.encode_features(inputs)).float()  # (N, E)


def compare(folders: Sequence[Path], cfg: RoundingConfig) -> Iterator[str]:
    """Lines of text that compare each bundle with the first one in bf16."""
    wanted = embeddings(folders[0], "bf16", cfg)
    yield f"{cfg.pairs} pairs of subject and prompt, against {folders[0]} in bf16"
    yield f"another pair's embedding: {agreement(wanted, wanted.roll(1, dims=0))}"
    for folder, dtype in [(folders[0], "fp32"), *((folder, "bf16") for folder in folders[1:])]:
        yield f"{folder} in {dtype}: {agreement(wanted, embeddings(folder, dtype, cfg))}"


# --- full size ---------------------------------------------------------------------------------------


@torch.no_grad()
def full_size(blocks: int, cfg: RoundingConfig) -> Iterator[str]:
    """LLaMA on random states in bf16 and in fewer bits, with one block's weights in memory at a time.

    Yields a line per block: cosine of the last token's embedding, and of the states of all tokens.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    sizes = AdapterConfig(mllm_dim=cfg.llama.width)
    mapping = GatedMLP(sizes.mllm_dim, sizes.embed_dim, sizes.embed_dim).bfloat16()
    fill(mapping, generator)
    norm = RMSNorm(cfg.llama.width, cfg.llama.eps)
    rope = rope_at(torch.arange(cfg.tokens)[None], cfg.llama)  # (1, 1, T, D)
    start = torch.randn(1, cfg.tokens, cfg.llama.width, generator=generator).bfloat16()  # (1, T, C)
    states = dict.fromkeys((None, *PRESETS), start)
    for i in range(1, blocks + 1):
        with torch.device("meta"):
            block = LlamaBlock(cfg.llama).bfloat16()
        block.to_empty(device="cpu")
        fill(block, generator)
        for bits, x in states.items():
            states[bits] = (block if bits is None else _in_bits(block, bits, cfg.llama))(x, rope)
        normed = {bits: norm(x.float())[0] for bits, x in states.items()}  # (T, C)
        last = {bits: mapping(x[-1:].bfloat16()).float() for bits, x in normed.items()}  # (1, E)
        found = [
            f"{bits} bits {F.cosine_similarity(last[bits], last[None]).item():.5f} "
            f"({F.cosine_similarity(normed[bits], normed[None]).mean():.5f})"
            for bits in PRESETS
        ]
        yield f"{i} blocks, embedding (states): {', '.join(found)}"


def _in_bits(block: LlamaBlock, bits: int, cfg: LlamaConfig) -> LlamaBlock:
    """The block with matrices quantised by `models.weights.quant`."""
    with torch.device("meta"):
        other = LlamaBlock(cfg)
        use_quantised_layers(other, PRESETS[bits])
    other.load_state_dict(rounded(block.state_dict(), PRESETS[bits]), assign=True)
    return other


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison. ValueError for wrong arguments."""
    set_precision()
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bundles", nargs="*", type=Path, help="bundles to compare with the first one")
    parser.add_argument(
        "--full-size", type=int, metavar="BLOCKS", help="compare that many of LLaVA-1.5-7B's 32 blocks"
    )
    args = parser.parse_args(argv)
    if bool(args.bundles) == (args.full_size is not None):
        raise ValueError("expected bundles, or --full-size with a number of blocks")
    cfg = RoundingConfig()
    if args.full_size is not None and not 1 <= args.full_size <= cfg.llama.layers:
        raise ValueError(f"--full-size {args.full_size}: expected 1 to {cfg.llama.layers} blocks")
    for text in full_size(args.full_size, cfg) if args.full_size else compare(args.bundles, cfg):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(exit_status("rounding", main))
