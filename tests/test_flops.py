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
from moma.methods.moma.several import SeveralConditioning, Shown, competing_layers, subject_rows

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


@cache
def several_step(shares: tuple[float, ...], ownership: str) -> tuple[int, int]:
    """Operations of a step of one image with subjects of those shares, each in a corner of its own, and of a
    plain step."""
    g = torch.Generator().manual_seed(0)
    unet = UNet(CONFIG)
    adapter = Adapter(AdapterConfig(mllm_dim=8, embed_dim=8, tokens=TOKENS), CONFIG)
    method, masks = MethodConfig(ownership=ownership), corners(shares)
    x, text = torch.randn(2, 4, SIDE, SIDE, generator=g), torch.randn(2, TEXT, 16, generator=g)
    grids = attention_grids(CONFIG, (SIDE, SIDE))
    with torch.no_grad():
        shown = [
            Shown(x[:1, 0, 0, :8], reference_features(unet, adapter, x[:1], text[:1], m, method), 1.0)
            for m in masks
        ]
        cond = SeveralConditioning(
            unet.text_kv(text), None, torch.zeros(2, len(masks), TEXT),
            subject_rows(adapter, [shown], method), [new.scale for new in adapter.subject],
            torch.ones(1, len(masks), SIDE, SIDE, dtype=torch.bool), None,
            competing_layers(grids, len(masks), method), method,
        )  # fmt: skip
    t = torch.full((2,), 500)
    hook = cond.hook(500, torch.cat(masks, dim=1))
    return operations(lambda: unet(x, t, cond.text, hook)), operations(lambda: unet(x, t, cond.text))


def corners(shares: tuple[float, ...]) -> list[Tensor]:
    """Disjoint squares of those shares."""
    return [square(share).rot90(i, (2, 3)) for i, share in enumerate(shares)]


@pytest.mark.parametrize("ownership", ["word", "reference"])
@pytest.mark.parametrize("shares", [(0.1,), (0.1, 0.2), (0.2, 0.1, 0.15)])
def test_each_further_subject_adds_its_own_keys_and_context(
    shares: tuple[float, ...], ownership: str
) -> None:
    """For its own queries; keys that compete add QK' for the foreground, in the conditional row."""
    grids, extra = attention_grids(CONFIG, (SIDE, SIDE)), 0
    bucketed = lambda cells: -(-cells // QUERY_BUCKET) * QUERY_BUCKET  # noqa: E731
    for layer, (h, w) in zip(attention_layers(CONFIG), grids, strict=True):
        every = SIDE // h
        cells = [int(mask[..., ::every, ::every].sum()) for mask in corners(shares)]
        for keys in cells:
            extra += 4 * 2 * bucketed(keys) * (keys + TOKENS) * layer.channels
        extra += 4 * 2 * h * w * TEXT * HEAD_ALIGNMENT * layer.heads  # the labels' columns, once
        if ownership == "reference" and len(shares) > 1 and h == SIDE:
            extra += 2 * bucketed(sum(cells)) * sum(cells) * layer.channels
    moma, plain = several_step(shares, ownership)
    assert moma - plain == extra


def test_small_subjects_are_cheap() -> None:
    moma, plain, _ = step(0.1, "fused")
    explicit, _, _ = step(0.1, "explicit")
    q = torch.zeros(1, 2, SIDE**2, 16)
    assert operations(lambda: attention(q, q, q)) == 4 * SIDE**4 * 32  # attention itself is counted
    assert moma < 1.05 * plain < explicit / 1.05
