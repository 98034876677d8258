"""M_ref and M_gen: which keys of the reference are the subject, and where the subject appears (Sec. 3.3).

Letters: B images, R = 2B rows of a UNet call (B unconditional, then B conditional), S subjects, h w latent
grid, N tokens of a layer, l layers of one grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moma.methods.moma.config import MethodConfig

Grid = tuple[int, int]


def m_ref_of_layer(m_ref: Tensor, grid: Grid, keep_one_key: bool) -> Tensor:
    """M_ref on a layer's grid, nearest as the release.

    Args:
        m_ref: (B, 1, H, W) in {0, 1}.
        grid: (h, w) of the layer, h * w = N.
        keep_one_key: where nearest sampling loses a small subject, its best-covered cell stands for it;
            a mask that is empty stays empty.

    Returns:
        bool (B, N).
    """
    keep = F.interpolate(m_ref, size=grid, mode="nearest").flatten(1) > 0  # (B, N)
    if not keep_one_key:
        return keep
    coverage = F.adaptive_avg_pool2d(m_ref, grid).flatten(1)  # (B, N)
    best = F.one_hot(coverage.argmax(dim=1), coverage.shape[1]).bool() & (coverage > 0)  # (B, N)
    return keep | (best & ~keep.any(dim=1, keepdim=True))


def m_gen_of_layer(m_gen: Tensor, grid: Grid) -> Tensor:
    """M_gen on a layer's grid, ready to weight attention outputs: (B, S, h, w) -> (B, S, N, 1), nearest."""
    return F.interpolate(m_gen, size=grid, mode="nearest").flatten(2)[..., None]


def next_m_gen(maps: list[Tensor], size: Grid, method: MethodConfig, rows_per_image: int = 2) -> Tensor:
    """M_gen for the next step from this step's label maps (release: get_mask_from_cross).

    Several subjects of an image are scaled together, so that one who is not there stays small. Without
    unconditional rows the last scaling does not see them: M_gen is the same for `m_gen_norm` "none" and has
    another range for "image" and "batch".

    Args:
        maps: per layer (R, S, h_l, w_l), the attention that each label's tokens get, of any float dtype.
        size: (h, w) of the latents.
        method: MoMA's config.
        rows_per_image: 2 = both rows of guidance, 1 = the conditional one alone (R = B).

    Returns:
        float32 (B, S, h, w) in [0, 1], of the conditional rows.
    """
    if method.m_gen_layers is not None:
        maps = [maps[i] for i in method.m_gen_layers]
    eps = method.m_gen_eps
    scaled = []
    for grid in dict.fromkeys(m.shape[-2:] for m in maps):  # all layers of a grid at once: few kernels
        alike = torch.stack([m for m in maps if m.shape[-2:] == grid], dim=1).float()  # (R, l, S, h_l, w_l)
        alike = min_max(alike, dims=(2, 3, 4), eps=eps)  # each row of each layer alone
        alike = F.interpolate(alike.flatten(1, 2), size=size, mode="nearest")  # (R, l*S, h, w)
        scaled.append(alike.unflatten(1, (-1, maps[0].shape[1])))  # (R, l, S, h, w)
    mean = torch.cat(scaled, dim=1).mean(dim=1)  # (R, S, h, w)
    rows = mean.unflatten(0, (rows_per_image, -1))  # (2 | 1, B, S, h, w)
    if method.m_gen_norm == "image":
        rows = min_max(rows, dims=(0, 2, 3, 4), eps=eps)
    elif method.m_gen_norm == "batch":
        rows = min_max(rows, dims=(0, 1, 2, 3, 4), eps=eps)
    conditional = rows[-1]  # (B, S, h, w)
    inside = conditional if method.m_gen_inside == "soft" else 1 + 0 * conditional  # (B, S, h, w), NaN stays
    return inside.masked_fill(conditional <= method.m_gen_threshold, 0.0)


def min_max(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Scale to 0..1.

    Args:
        x: any shape.
        dims: over which minimum and maximum are taken.
        eps: smallest range to divide by; 0 gives NaN for a constant map.
    """
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (x - low) / (high - low).clamp_min(eps)
