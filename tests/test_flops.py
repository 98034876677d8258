"""What a MoMA step computes beyond a plain one, in operations: a path that stops being fast fails here."""

from functools import cache

import pytest
import torch
from torch import Tensor

from models.attention import attention
from models.unet import UNet, UNetConfig, attention_grids, attention_layers
from moma.bench.measure import operations
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.attention import HEAD_ALIGNMENT, QUERY_BUCKET
from moma.methods.moma.conditioning import both_rows, condition_rows, reference_features
from moma.methods.moma.config import MethodConfig

SIDE, TEXT, TOKENS, ROWS = 32, 12, 4, 2
CONFIG = UNetConfig(
    channels=(32, 64), depth=(1, 1), heads=(2, 4), context_dim=(16, 16), resnets=1, norm_groups=8
)


def square(share: float) -> Tensor:
    """A mask (1, 1, SIDE, SIDE) of about that share, a square in the corner."""
    side = round(SIDE * share**0.5)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., :side, :side] = 1
    return mask


@cache
def step(share: float, impl: str) -> tuple[int, int, int]:
    """Operations of a MoMA step with a subject of that share in both images, of a plain step, and of the
    former without guidance."""
    g = torch.Generator().manual_seed(0)
    unet = UNet(CONFIG)
    adapter = Adapter(AdapterConfig(mllm_dim=8, embed_dim=8, tokens=TOKENS), CONFIG)
    method, m = MethodConfig(attention=impl), square(share)
    x = torch.randn(ROWS, 4, SIDE, SIDE, generator=g)
    text = torch.randn(ROWS, TEXT, 16, generator=g)
    with torch.no_grad():
        layers = reference_features(unet, adapter, x[:1], text[:1], m, method)
        embedding, label, beta = torch.randn(ROWS, 8, generator=g), torch.zeros(ROWS, TEXT), torch.ones(ROWS)
        cond = condition_rows(
            adapter, embedding, unet.text_kv(text), None, label, both_rows([layers]), beta, method
        )
    t = torch.full((ROWS,), 500)
    alone = cond.conditional()
    return (
        operations(lambda: unet(x, t, cond.text, cond.hook(500, m))),
        operations(lambda: unet(x, t, cond.text)),
        operations(lambda: unet(x[:1], t[:1], alone.text, alone.hook(500, m))),
    )


@pytest.mark.parametrize("share", [0.1, 0.35, 0.7])
def test_a_moma_step_adds_the_subject_and_nothing_else(share: float) -> None:
    """Subject queries x subject keys, 4 context tokens, and the label's column of V."""
    grids, extra = attention_grids(CONFIG, (SIDE, SIDE)), 0
    for layer, (h, w) in zip(attention_layers(CONFIG), grids, strict=True):
        n, every = h * w, SIDE // h
        keys = int(square(share)[..., ::every, ::every].sum())
        queries = -(-keys // QUERY_BUCKET) * QUERY_BUCKET
        subject = queries * keys * layer.channels
        label = n * TEXT * HEAD_ALIGNMENT * layer.heads
        extra += 4 * ROWS * (subject + queries * TOKENS * layer.channels + label)
    moma, plain, alone = step(share, "fused")
    assert moma - plain == extra and alone * 2 == moma


def test_small_subjects_are_cheap() -> None:
    moma, plain, _ = step(0.1, "fused")
    explicit, _, _ = step(0.1, "explicit")
    q = torch.zeros(1, 2, SIDE**2, 16)
    assert operations(lambda: attention(q, q, q)) == 4 * SIDE**4 * 32  # attention itself is counted
    assert moma < 1.05 * plain < explicit / 1.05
