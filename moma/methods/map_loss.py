"""The constraint on attention maps: each subject's attention is kept to its mask.

Letters: B samples, H heads, N queries, n subjects, h w the layer's grid.
"""

from typing import Literal

from torch import Tensor

Form = Literal["balanced", "distance"]
EPSILON = 1e-5  # of FastComposer's constraint


def map_loss(
    maps: Tensor, masks: Tensor, present: Tensor, normalise: bool = False, form: Form = "balanced"
) -> Tensor:
    """The constraint of one layer.

    Args:
        maps: attention of each query to each subject, (B, H, N, n).
        masks: of the subjects on the layer's grid, (B, n, h, w), h * w = N.
        present: which of them there are, bool (B, n).
        normalise: divide each map by its maximum first.
        form: "balanced": the mean attention outside the mask less that inside (FastComposer, arXiv
            2305.10431); "distance": the mean of |A - M| (Subject-Diffusion, arXiv 2307.11410).

    Returns:
        float32 (B,), the mean over heads and subjects that are present; 0 without any.
    """
    maps, inside = maps.float(), masks.float().flatten(2).mT[:, None]  # (B, H, N, n), (B, 1, N, n)
    if normalise:
        maps = maps / (maps.amax(dim=2, keepdim=True) + EPSILON)
    if form == "distance":
        each = (maps - inside).abs().mean(dim=2)  # (B, H, n)
    else:
        means = [
            (maps * part).sum(dim=2) / (part.sum(dim=2) + EPSILON) for part in (1 - inside, inside)
        ]  # (B, H, n) each
        each = means[0] - means[1]  # (B, H, n)
    each = each.mean(dim=1) * present  # (B, n)
    return each.sum(dim=1) / present.sum(dim=1).clamp(min=1)  # (B,)
