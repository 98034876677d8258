"""SAM finds the subject of an image: prompt it all over the image and keep the most salient region.

    segmenter = Segmenter.load(bundle)
    mask = segmenter.subject_mask(image)  # or point=(x, y), box=(x0, y0, x1, y1), object=2

Letters: H, W pixels of the image; S side of SAM's input, h w its logits, rows columns those of them that
show the image; N candidates, P prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.sam import BOX_END, BOX_START, FOREGROUND, SAM, Prompts
from models.sam_image import Placement, preprocess, to_image, to_input
from moma.inputs.preprocess import check_not_blank, on_white
from moma.inputs.regions import frame, tidied
from moma.sampling.device import choose_device
from moma.sampling.finite import check_finite
from moma.sampling.interface import Weights

Point = tuple[float, float]  # x, y in pixels of the image
Box = tuple[float, float, float, float]  # x0, y0, x1, y1, the same
SINGLE, MULTIPLE = slice(0, 1), slice(1, 4)  # SAM's outputs for a clear prompt and for an ambiguous one


@dataclass(frozen=True)
class SegmentConfig:
    """Where SAM is prompted, and how its masks are ranked. Shares are of the image's area."""

    # Points per side, half of segment-anything's 32: a subject is wider than a sixteenth of the image.
    grid: int = 16
    # Box prompts, each by the margin it leaves at every border, as a share of the side: for subjects that
    # fill the image, for the usual framing, and for the middle.
    margins: tuple[float, ...] = (0.02, 0.1, 0.25)
    max_prompts: int = 64  # per decoder call, as in segment-anything; bounds the memory
    threshold: float = 0.0  # on the logits, as SAM was trained
    stability_offset: float = 1.0  # logits above and below the threshold; segment-anything's
    # A region below either is a guess. segment-anything's 0.88 and 0.95 are meant for data sets, where
    # dropping a good mask costs nothing; here the score weighs both.
    min_iou: float = 0.5
    min_stability: float = 0.6
    speck: float = 0.01  # of the mask's area: smaller parts and holes are removed
    same: float = 0.7  # two masks with this IoU are one object; segment-anything's, there of boxes
    inside: float = 0.9  # a region with this share inside a better one is a part of it
    # Saliency prefers the whole to its parts: an object of this share reaches half of the maximum.
    half_share: float = 0.1
    full_share: tuple[float, float] = (0.8, 0.95)  # a region this large may be / is the whole scene
    # Share of the image's border that a region covers. A background covers most of it, a wall behind a car
    # about a quarter; a portrait may cover a whole side and more, so small shares cost little.
    border: tuple[float, float] = (0.2, 0.7)
    # Distance of the region's centroid from the image's centre, 1 = at the border. Subjects lie within 0.5.
    # The power keeps the middle flat, so that an object does not lose to its half nearer the centre.
    centre_reach: float = 0.7
    centre_power: int = 4
    corner: float = 0.2  # factor that remains far from the centre, so that objects there are still listed
    # Regions below it are background or too small to be drawn again: a thousandth of the image in the
    # middle, half a hundredth in a corner.
    min_score: float = 0.01
    objects: int = 12  # numbers that can be told apart in one image


@dataclass(frozen=True, eq=False)
class Candidate:
    """A region of an image, as SAM returned it."""

    logits: np.ndarray  # float16 (h, w), of SAM's whole input, positive = inside
    placement: Placement  # of the image in that input
    mask: np.ndarray  # bool (rows, columns), of the image alone
    predicted_iou: float  # SAM's own estimate of the mask's IoU
    stability: float  # 0..1
    saliency: float  # 0..1, how much it looks like the main object of a photo
    box: tuple[int, int, int, int]  # around the mask, in pixels of the image: x0, y0, x1, y1 (exclusive)

    @property
    def quality(self) -> float:
        """How surely it is a region at all, 0..1."""
        return min(max(self.predicted_iou, 0.0), 1.0) * self.stability

    @property
    def score(self) -> float:
        """How surely it is the main object, 0..1."""
        return self.quality * self.saliency

    @property
    def share(self) -> float:
        """Share of the image's area, 0..1."""
        return float(self.mask.mean())

    def clear(self, cfg: SegmentConfig) -> bool:
        """Whether it is a region, not a guess."""
        return self.predicted_iou >= cfg.min_iou and self.stability >= cfg.min_stability

    def cell(self, point: Point) -> tuple[int, int]:
        """Row and column of the mask at a point of the image."""
        height, width = _cell_size(self.logits.shape, self.placement)
        rows, columns = self.mask.shape
        return min(int(point[1] / height), rows - 1), min(int(point[0] / width), columns - 1)

    def image(self, cfg: SegmentConfig, size: tuple[int, int] | None = None) -> Image.Image:
        """The mask as an image of mode L, 255 = inside; size: (width, height), None = the image's own."""
        place = replace(self.placement, image=size[::-1]) if size else self.placement
        inside = to_image(torch.from_numpy(self.logits), place) > cfg.threshold  # (H, W)
        return Image.fromarray(inside.numpy().astype(np.uint8) * np.uint8(255))


@dataclass(frozen=True)
class Pick:
    """The user's hint about the subject: points on it, a box around it, or its number in the object list."""

    points: tuple[Point, ...] = ()
    box: Box | None = None
    object: int | None = None  # from 1, as in `Segmenter.objects`

    def __bool__(self) -> bool:
        return self != Pick()

    def __str__(self) -> str:
        parts = [f"point {x:g},{y:g}" for x, y in self.points]
        parts += [f"box {','.join(f'{v:g}' for v in self.box)}"] if self.box else []
        parts += [f"object {self.object}"] if self.object is not None else []
        return ", ".join(parts) or "its main object"

    def check(self, size: tuple[int, int]) -> None:
        """ValueError unless it fits an image of this (width, height)."""
        width, height = size
        if self.object is not None and (self.points or self.box):
            raise ValueError("object excludes point and box: give one or the other")
        if self.object is not None and self.object < 1:
            raise ValueError(f"object {self.object}: expected 1 or more, as numbered in the list of objects")
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(
                    f"point {x:g},{y:g} is outside the image: expected x from 0 to {width - 1}, y from 0 to"
                    f" {height - 1}"
                )
        if self.box:
            x0, y0, x1, y1 = self.box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ValueError(
                    f"box {x0:g},{y0:g},{x1:g},{y1:g}: expected left, top, right, bottom within the image's"
                    f" {width}x{height} pixels"
                )


# --- candidates --------------------------------------------------------------------------------------


def candidates_of(
    logits: np.ndarray, ious: np.ndarray, placement: Placement, cfg: SegmentConfig
) -> list[Candidate]:
    """SAM's masks with their measures, in the same order.

    Args:
        logits: (N, h, w).
        ious: (N,), as SAM predicts them.
        placement: of the image in SAM's input.
        cfg: thresholds.
    """
    logits = logits.astype(np.float16)  # a grid of prompts gives hundreds of masks
    grid = zip(placement.inside, logits.shape[1:], strict=True)
    rows, columns = (-(-inside * cells // placement.side) for inside, cells in grid)  # the last may be cut
    shown = logits[:, :rows, :columns]
    masks = shown > cfg.threshold
    measures = zip(ious.tolist(), stability(shown, cfg).tolist(), saliency(masks, cfg).tolist(), strict=True)
    return [
        Candidate(logits[i], placement, masks[i], *values, box=_box(masks[i], logits[i].shape, placement))
        for i, values in enumerate(measures)
    ]


def stability(logits: np.ndarray, cfg: SegmentConfig) -> np.ndarray:
    """segment-anything's stability score: IoU of the masks at a strict and a lax threshold.

    (N, h, w) -> (N,), 0..1.
    """
    strict = (logits > cfg.threshold + cfg.stability_offset).sum(axis=(1, 2))
    lax = (logits > cfg.threshold - cfg.stability_offset).sum(axis=(1, 2))
    return strict / np.maximum(lax, 1)


def saliency(masks: np.ndarray, cfg: SegmentConfig, centred: bool = True) -> np.ndarray:
    """How much regions look like the main object of a photo: large but not the whole scene, off the border.

    Args:
        masks: bool (N, rows, columns).
        cfg: weights.
        centred: whether a region also has to lie near the centre.
    Returns:
        (N,), 0..1.
    """
    shares = masks.mean(axis=(1, 2))  # (N,)
    found = shares / (shares + cfg.half_share) * _falling(shares, cfg.full_share)
    found *= _falling(masks[:, frame(masks.shape[1:])].mean(axis=1), cfg.border)
    if centred:
        fall = np.exp(-((_distances(masks) / cfg.centre_reach) ** cfg.centre_power))  # (N,) 1 at the centre
        found *= cfg.corner + (1 - cfg.corner) * fall
    return found


def _falling(x: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """1 up to the first end, 0 from the second, linear between."""
    return np.clip((ends[1] - x) / (ends[1] - ends[0]), 0, 1)


def _distances(masks: np.ndarray) -> np.ndarray:
    """Distance of each mask's centroid from the centre, 1 at the border; (N, rows, columns) -> (N,)."""
    pixels = np.maximum(masks.sum(axis=(1, 2)), 1)
    total = np.zeros(len(masks))
    for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
        steps = (2 * np.arange(length) + 1) / length - 1  # -1..1
        total += ((masks.sum(axis=axis) * steps).sum(axis=1) / pixels) ** 2
    return np.sqrt(total)


def _cell_size(grid: tuple[int, ...], placement: Placement) -> tuple[float, float]:
    """Height and width of a cell of SAM's masks (h, w), in pixels of the image."""
    sides = zip(grid, placement.image, placement.inside, strict=True)
    height, width = (placement.side / cells * image / inside for cells, image, inside in sides)
    return height, width


def _box(mask: np.ndarray, grid: tuple[int, int], placement: Placement) -> tuple[int, int, int, int]:
    """The box around a mask, in pixels of the image; all 0 for an empty one."""
    if not mask.any():
        return 0, 0, 0, 0
    ends = []
    for axis, pixels in enumerate(_cell_size(grid, placement)):
        hit = np.flatnonzero(mask.any(axis=1 - axis))
        ends.append((round(hit[0] * pixels), min(round((hit[-1] + 1) * pixels), placement.image[axis])))
    (y0, y1), (x0, x1) = ends
    return x0, y0, x1, y1


def rank(candidates: Sequence[Candidate], cfg: SegmentConfig) -> list[Candidate]:
    """The distinct objects among the candidates of one image, tidied, at most `cfg.objects`.

    The main object comes first; parts of better regions come after all others.
    """
    likely = [c for c in candidates if c.clear(cfg) and c.score >= cfg.min_score]
    likely.sort(key=lambda c: -c.score)  # stable: ties keep the order of their prompts
    objects, parts = [], []
    for i in distinct([c.mask for c in likely], cfg):
        mask, least = likely[i].mask, cfg.inside * likely[i].mask.sum()
        part = any((mask & other.mask).sum() >= least for other in objects)
        (parts if part else objects).append(likely[i])
    return [tidy(c, cfg) for c in (objects + parts)[: cfg.objects]]


def distinct(masks: Sequence[np.ndarray], cfg: SegmentConfig) -> list[int]:
    """Non-maximum suppression: indices of the masks that are not nearly a better one.

    masks: bool (rows, columns) each, best first.
    """
    kept, bits, sizes = [], [], []
    for i, mask in enumerate(masks):
        packed, size = np.packbits(mask), mask.sum()
        both = [int(np.bitwise_count(packed & other).sum()) for other in bits]
        if all(b < cfg.same * (size + s - b) for b, s in zip(both, sizes, strict=True)):
            kept.append(i)
            bits.append(packed)
            sizes.append(size)
    return kept


def tidy(candidate: Candidate, cfg: SegmentConfig, points: Sequence[Point] = ()) -> Candidate:
    """The candidate without specks and small holes, in its mask and its logits.

    Args:
        candidate: any.
        cfg: `speck` says what is small.
        points: parts at these pixels of the image are kept, however small.
    """
    mask = tidied(candidate.mask, cfg.speck, [candidate.cell(point) for point in points])
    rows, columns = mask.shape
    logits = candidate.logits.copy()
    shown = logits[:rows, :columns]
    shown[mask & ~candidate.mask] = cfg.threshold + cfg.stability_offset
    shown[candidate.mask & ~mask] = cfg.threshold - cfg.stability_offset
    return replace(candidate, logits=logits, mask=mask, box=_box(mask, logits.shape, candidate.placement))


def select_mask(
    candidates: Sequence[Candidate], cfg: SegmentConfig, points: Sequence[Point] = ()
) -> Candidate | None:
    """The best of SAM's masks for one prompt, tidied; None if all are empty.

    Masks that contain all points win over others, clear ones over guesses. A point on an ear means the cat:
    as in `rank`, the whole comes before its parts and the background last, but wherever it lies in the
    image.

    Args:
        candidates: SAM's masks for the prompt.
        cfg: thresholds and weights.
        points: the prompt's points, pixels of the image.
    """
    found = [c for c in candidates if c.mask.any()]
    if not found:
        return None
    salient = saliency(np.stack([c.mask for c in found]), cfg, centred=False)
    order = [
        (all(c.mask[c.cell(point)] for point in points), c.clear(cfg), c.quality * value, c.quality)
        for c, value in zip(found, salient.tolist(), strict=True)
    ]
    return tidy(found[order.index(max(order))], cfg, points)


# --- SAM ---------------------------------------------------------------------------------------------


class Segmenter:
    """Finds subjects with SAM. The same image gives the same masks."""

    def __init__(self, sam: SAM, cfg: SegmentConfig | None = None) -> None:
        self.sam, self.cfg = sam, cfg or SegmentConfig()

    @classmethod
    def load(
        cls, weights: Weights, device: torch.device | str = "auto", cfg: SegmentConfig | None = None
    ) -> Self:
        """Build the network "sam" in float32: edges need its precision.

        Args:
            weights: a bundle. `moma.load.load_segmenter` takes its folder.
            device: "auto" is the accelerator, else the CPU.
            cfg: None = the defaults.

        Raises:
            ValueError: if the weights have no SAM, or the device is not there.
        """
        device = choose_device(device) if isinstance(device, str) else device
        sam = weights.build("sam", device, torch.float32)
        return cls(sam.eval().requires_grad_(False), cfg)

    def candidates(
        self, image: Image.Image, points: Sequence[Point] = (), boxes: Sequence[Box] = ()
    ) -> list[Candidate]:
        """All of SAM's masks for each prompt on its own: three per point, then four per box.

        Args:
            image: RGB, or RGBA (transparent parts become white).
            points: pixels of the image.
            boxes: the same.
        """
        features, placement = self._encode(image)
        prompts = [[((x, y), FOREGROUND)] for x, y in points]
        found = self._decode(features, placement, prompts, MULTIPLE)
        return found + self._decode(features, placement, [_corners(box) for box in boxes], slice(None))

    def objects(self, image: Image.Image) -> list[Candidate]:
        """The distinct objects of an image, the main one first; ValueError if there is none."""
        check_not_blank(image)
        width, height = image.size
        steps = (np.arange(self.cfg.grid) + 0.5) / self.cfg.grid
        points = [(width * x, height * y) for y in steps.tolist() for x in steps.tolist()]
        points.append((width / 2, height / 2))
        boxes = [(width * m, height * m, width * (1 - m), height * (1 - m)) for m in self.cfg.margins]
        if not (found := rank(self.candidates(image, points, boxes), self.cfg)):
            raise ValueError(
                "SAM finds no object in the image: show it where (--point X,Y or --box X0,Y0,X1,Y1), or"
                " give a mask (--mask FILE, white = subject)"
            )
        return found

    def subject(self, image: Image.Image, pick: Pick | None = None) -> Candidate:
        """The subject's region; ValueError if there is none, or if `pick` does not fit the image."""
        pick = pick or Pick()
        pick.check(image.size)
        if pick.points or pick.box:
            check_not_blank(image)
            features, placement = self._encode(image)
            prompt = [(point, FOREGROUND) for point in pick.points] + (_corners(pick.box) if pick.box else [])
            outputs = MULTIPLE if len(prompt) == 1 else SINGLE
            found = select_mask(self._decode(features, placement, [prompt], outputs), self.cfg, pick.points)
            if found is None:
                raise ValueError(f"SAM finds nothing at {pick}: try another place, or give a mask")
            return found
        objects, number = self.objects(image), pick.object or 1
        if number > len(objects):
            raise ValueError(f"object {number}: expected 1 to {len(objects)}, the number of objects found")
        return objects[number - 1]

    def subject_mask(
        self,
        image: Image.Image,
        point: Point | Sequence[Point] | None = None,
        box: Box | None = None,
        object: int | None = None,
    ) -> Image.Image:
        """The subject's mask; without a point, box or number, the main object's.

        Args:
            image: RGB, or RGBA (transparent parts become white).
            point: x, y on the subject, in pixels of the image; or several such points.
            box: x0, y0, x1, y1 around the subject.
            object: its number in `objects`, from 1.
        Returns:
            Mode L, 255 = subject, of the image's size.
        Raises:
            ValueError: there is no such subject, or the hint does not fit the image.
        """
        points = () if point is None else tuple(map(tuple, np.reshape(point, (-1, 2)).tolist()))
        box = None if box is None else tuple(map(float, box))
        return self.mask(image, Pick(points, box, object))

    def mask(self, image: Image.Image, pick: Pick | None = None) -> Image.Image:
        """As `subject_mask`, with the hint as a `Pick`."""
        mask = self.subject(image, pick).image(self.cfg)
        if mask.getbbox() is None:
            raise ValueError("SAM's region covers no pixel of the image: try another point, or give a mask")
        return mask

    @torch.no_grad()
    def _encode(self, image: Image.Image) -> tuple[Tensor, Placement]:
        """(1, C, h/4, w/4)"""
        pixels, placement = preprocess(on_white(image), self.sam.cfg.image_size)  # (1, 3, S, S)
        parameter = next(self.sam.parameters())
        return self.sam.encode(pixels.to(parameter.device, parameter.dtype)), placement

    @torch.no_grad()
    def _decode(
        self, features: Tensor, placement: Placement, prompts: list[list[tuple[Point, int]]], outputs: slice
    ) -> list[Candidate]:
        """prompts: lists of labelled points, all of one length; outputs: which of the four masks to take."""
        found, size = [], self.cfg.max_prompts
        for chunk in (prompts[start : start + size] for start in range(0, len(prompts), size)):
            points = torch.tensor([[point for point, _ in prompt] for prompt in chunk])  # (P, n, 2)
            labels = torch.tensor([[label for _, label in prompt] for prompt in chunk])  # (P, n)
            points = to_input(points, placement)[None].to(features.device)  # (1, P, n, 2)
            logits, ious = self.sam.decode(features, Prompts(points, labels[None].to(features.device)))
            check_finite("SAM", logits, ious)
            logits, ious = (x[0, :, outputs].flatten(0, 1).float().cpu().numpy() for x in (logits, ious))
            found += candidates_of(logits, ious, placement, self.cfg)
        return found


def segment_by(weights: Weights, device: torch.device | str = "auto") -> Callable[[Image.Image], Image.Image]:
    """A function for `find_mask` that gives the main object's mask; it loads SAM on its first call."""
    load = lru_cache(maxsize=1)(lambda: Segmenter.load(weights, device))
    return lambda image: load().subject_mask(image)


def _corners(box: Box) -> list[tuple[Point, int]]:
    return [((box[0], box[1]), BOX_START), ((box[2], box[3]), BOX_END)]
