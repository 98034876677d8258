"""M_ref per layer and M_gen: hand-made cases, and each mended point both ways."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moma.methods.moma.config import DEFAULT, PAPER, RELEASE
from moma.methods.moma.masks import m_gen_of_layer, m_ref_of_layer, min_max, next_m_gen


def maps(*peaks: float, rows: int = 2, seed: int = 0) -> list[Tensor]:
    """Three layers' maps (rows, 1, h, w); row i is scaled by peaks[i % len(peaks)]."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([peaks[i % len(peaks)] for i in range(rows)])[:, None, None, None]
    return [torch.rand(rows, 1, n, n, generator=g) * scale for n in (16, 8, 4)]


def test_small_subject_keeps_a_key() -> None:
    """A subject between the sampled pixels: lost in the release, its best-covered cell by default."""
    m_ref = torch.zeros(2, 1, 64, 64)
    m_ref[0, 0, 18:22, 34:39] = 1  # within cell (2, 4) of 8 x 8, away from its corner (16, 32)
    m_ref[1] = 1
    lost = m_ref_of_layer(m_ref, (8, 8), keep_one_key=RELEASE.keep_one_key)
    kept = m_ref_of_layer(m_ref, (8, 8), keep_one_key=DEFAULT.keep_one_key)
    assert lost[0].sum() == 0 and lost[1].all()
    assert kept[0].nonzero().tolist() == [[2 * 8 + 4]] and kept[1].all()


def test_no_key_is_added_where_there_are_some() -> None:
    m_ref = torch.zeros(1, 1, 64, 64)
    m_ref[0, 0, 0, 0] = 1  # sampled, but covers little of its cell
    m_ref[0, 0, 17:24, 33:40] = 1  # the best-covered cell, not sampled
    assert m_ref_of_layer(m_ref, (8, 8), keep_one_key=True)[0].nonzero().tolist() == [[0]]


def test_empty_mask_stays_empty() -> None:
    assert not m_ref_of_layer(torch.zeros(1, 1, 64, 64), (8, 8), keep_one_key=True).any()


def test_m_ref_on_wide_grids() -> None:
    m_ref = torch.zeros(1, 1, 32, 64)
    m_ref[..., :32] = 1  # the left half
    keep = m_ref_of_layer(m_ref, (4, 8), keep_one_key=True).view(4, 8)
    assert keep[:, :4].all() and not keep[:, 4:].any()


def test_images_do_not_change_each_other() -> None:
    """Default: an image's mask is the same alone and beside a sharper one. Release: it is not."""
    both = maps(1.0, rows=4)  # uncond a, uncond b, cond a, cond b
    for m in both:  # the layers agree on a, so that its average is sharp; they do not on b
        m[[0, 2]] = torch.eye(m.shape[-1])
    alone = [m[[1, 3]] for m in both]
    mended = next_m_gen(both, (16, 16), DEFAULT)[1:], next_m_gen(alone, (16, 16), DEFAULT)
    torch.testing.assert_close(*mended, rtol=0, atol=1e-6)
    leaking = next_m_gen(both, (16, 16), RELEASE)[1:], next_m_gen(alone, (16, 16), RELEASE)
    assert (leaking[0] - leaking[1]).abs().max() > 1e-3
    torch.testing.assert_close(mended[1], leaking[1], rtol=0, atol=1e-6)  # equal for a single image


def test_conditional_rows_alone() -> None:
    """Without unconditional rows: the same M_gen if it is not scaled, else another range."""
    both = maps(1.0, rows=6)  # 3 images
    alone = [m[3:] for m in both]
    same = next_m_gen(both, (16, 16), PAPER), next_m_gen(alone, (16, 16), PAPER, rows_per_image=1)
    assert torch.equal(*same)
    mean = sum(F.interpolate(min_max(m, (1, 2, 3), 0), size=(16, 16)) for m in alone) / 3
    for norm, dims in (("image", (1, 2, 3)), ("batch", (0, 1, 2, 3))):
        method = replace(DEFAULT, m_gen_norm=norm)
        scaled = min_max(mean, dims, 0)
        expected = scaled.masked_fill(scaled <= DEFAULT.m_gen_threshold, 0)
        torch.testing.assert_close(next_m_gen(alone, (16, 16), method, rows_per_image=1), expected)


def test_constant_maps() -> None:
    """A label without tokens has maps of zeros: NaN in the release, an empty mask by default."""
    zeros = [m * 0 for m in maps(1.0)]
    assert next_m_gen(zeros, (16, 16), RELEASE).isnan().all()
    assert (next_m_gen(zeros, (16, 16), DEFAULT) == 0).all()


def test_threshold_keeps_soft_values() -> None:
    m_gen = next_m_gen(maps(1.0), (16, 16), DEFAULT)
    assert m_gen.shape == (1, 1, 16, 16) and m_gen.dtype == torch.float32
    assert ((m_gen == 0) | (m_gen > DEFAULT.m_gen_threshold)).all()
    assert ((m_gen > 0) & (m_gen < 1)).any() and m_gen.max() <= 1


def test_a_value_at_the_threshold_is_outside() -> None:
    layer = torch.tensor([[0.0, 0.25], [0.5, 1.0]]).expand(2, 1, 2, 2)
    m_gen = next_m_gen([layer], (2, 2), replace(DEFAULT, m_gen_threshold=0.25))
    assert m_gen[0, 0].tolist() == [[0.0, 0.0], [0.5, 1.0]]


def test_m_gen_of_ones() -> None:
    """`m_gen_inside` "one" keeps the outline and fills it."""
    soft, ones = (
        next_m_gen(maps(1.0), (16, 16), replace(DEFAULT, m_gen_inside=inside)) for inside in ("soft", "one")
    )
    assert torch.equal(ones, (soft > 0).float()) and not torch.equal(ones, soft)


def test_paper_averages_the_maps() -> None:
    layers = maps(1.0)
    mean = sum(F.interpolate(min_max(m, (1, 2, 3), 0), size=(16, 16)) for m in layers)[1:] / 3
    expected = mean.masked_fill(mean <= PAPER.m_gen_threshold, 0)
    torch.testing.assert_close(next_m_gen(layers, (16, 16), PAPER), expected)


def test_chosen_layers() -> None:
    layers = maps(1.0)
    chosen = next_m_gen(layers, (16, 16), replace(DEFAULT, m_gen_layers=(1,)))
    torch.testing.assert_close(chosen, next_m_gen(layers[1:2], (16, 16), DEFAULT))


def test_m_gen_of_layer_is_nearest() -> None:
    m_gen = torch.arange(32.0).view(1, 1, 4, 8)
    weights = m_gen_of_layer(m_gen, (2, 4))
    assert weights.shape == (1, 1, 8, 1)
    torch.testing.assert_close(weights.flatten(), m_gen[0, 0, ::2, ::2].flatten(), rtol=0, atol=0)
