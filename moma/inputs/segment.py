"""From an image to the mask of its subject, without a click: SAM is asked about many places at once, and the
region that looks most like the main object of a photo is taken.

    segmenter = Segmenter.load("weights/moma")
    mask = segmenter.subject_mask(image)  # or point=(x, y), box=(x0, y0, x1, y1), object=2

What SAM answers are `Candidate`s; everything after that is functions of arrays.

Letters: H, W pixels of the image; S side of SAM's input, h w its logits, rows columns those of them that
show the image; N candidates, P prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.sam import BOX_END, BOX_START, FOREGROUND, SAM, Prompts
from models.sam_image import Placement, preprocess, to_image, to_input
from moma.inputs.preprocess import on_white
from moma.inputs.regions import frame, tidied
from moma.sampling.device import choose_device
from moma.weights.bundle import Bundle

Point = tuple[float, float]  # x, y in pixels of the image
Box = tuple[float, float, float, float]  # x0, y0, x1, y1, the same
SINGLE, SEVERAL = slice(0, 1), slice(1, 4)  # SAM's outputs: of a clear prompt, and of one that may mean much


@dataclass(frozen=True)
class SegmentConfig:
    """Where SAM is asked, and which of its answers is the subject. Shares are of the image's area."""

    # Points a side, half of segment-anything's 32: a subject worth the name is wider than a sixteenth.
    grid: int = 16
    # Boxes, by what they leave free at each border, as a share of the side: nearly the whole image, for
    # subjects that fill it, the usual frame, and the middle.
    margins: tuple[float, ...] = (0.02, 0.1, 0.25)
    # 0..255, between the darkest and the brightest pixel of some channel: with less there is nothing to see,
    # but a small SAM dreams up regions in such images.
    least_contrast: int = 8
    prompts_at_once: int = 64  # segment-anything's; ViT-sized features take 0.3 GB per layer for them
    threshold: float = 0.0  # of the logits, as SAM was trained
    stability_offset: float = 1.0  # logits up and down from the threshold; segment-anything's
    # Below these it is a guess, not a region. segment-anything's 0.88 and 0.95 are meant for data sets, where
    # dropping a good mask costs nothing; here the score weighs both.
    min_iou: float = 0.5
    min_stability: float = 0.6
    speck: float = 0.01  # of the mask's area: smaller parts are crumbs, smaller holes are highlights
    same: float = 0.7  # IoU from which two masks are one object; segment-anything's, there of boxes
    inside: float = 0.9  # share of a region in a better one from which it is a part of that
    # The whole is more likely meant than its part: an object of this share counts half of one without end.
    half_share: float = 0.1
    full_share: tuple[float, float] = (0.8, 0.95)  # from here a region is the scene, from there surely
    # Share of the image's border that a region takes. The background takes most of it, a wall behind a car
    # a quarter; but subjects may take a whole side and more (portraits), so that less of it counts little.
    border: tuple[float, float] = (0.2, 0.7)
    # Distance of the region's centre from the image's, 1 = at the border:
    # subjects are within 0.5. Flat in the middle, so that an object does not lose to its half that is nearer
    # the centre; and an object in a corner is still one, to be listed.
    centre_reach: float = 0.7
    centre_power: int = 4
    corner: float = 0.2  # what is left of its saliency
    # Less is background, or too small to be drawn again: a thousandth of the image in its middle, or half a
    # hundredth in a corner.
    min_score: float = 0.01
    objects: int = 12  # more numbers cannot be told apart in an image


@dataclass(frozen=True, eq=False)
class Candidate:
    """A region of an image, as SAM drew it."""

    logits: np.ndarray  # float16 (h, w), of SAM's whole input, positive = inside
    place: Placement  # of the image in that input
    mask: np.ndarray  # bool (rows, columns), of the image alone
    predicted_iou: float  # by SAM, with what was meant
    stability: float  # 0..1
    saliency: float  # 0..1, to the main object of a photo
    box: tuple[int, int, int, int]  # around the mask, in pixels of the image: x0, y0, and beyond it x1, y1

    @property
    def quality(self) -> float:
        """0..1, whether it is a region at all."""
        return min(max(self.predicted_iou, 0.0), 1.0) * self.stability

    @property
    def score(self) -> float:
        """0..1: how surely it is a region, and the main object."""
        return self.quality * self.saliency

    @property
    def share(self) -> float:
        """Of the image's area, 0..1."""
        return float(self.mask.mean())

    def clear(self, cfg: SegmentConfig) -> bool:
        """Whether it is a region, not a guess."""
        return self.predicted_iou >= cfg.min_iou and self.stability >= cfg.min_stability

    def cell(self, point: Point) -> tuple[int, int]:
        """Row and column of the mask where a point of the image lies."""
        height, width = _cell_size(self.logits.shape, self.place)
        rows, columns = self.mask.shape
        return min(int(point[1] / height), rows - 1), min(int(point[0] / width), columns - 1)

    def image(self, cfg: SegmentConfig, size: tuple[int, int] | None = None) -> Image.Image:
        """Mode L, 255 = inside, of the image's size or another (width, height) of the same shape."""
        place = replace(self.place, image=size[::-1]) if size else self.place
        inside = to_image(torch.from_numpy(self.logits), place) > cfg.threshold  # (H, W)
        return Image.fromarray(inside.numpy().astype(np.uint8) * np.uint8(255))


@dataclass(frozen=True)
class Pick:
    """What is known about the subject: nothing, or places on it, or its number in `Segmenter.objects`."""

    points: tuple[Point, ...] = ()
    box: Box | None = None
    object: int | None = None  # from 1

    def __bool__(self) -> bool:
        return self != Pick()

    def __str__(self) -> str:
        parts = [f"point {x:g},{y:g}" for x, y in self.points]
        parts += [f"box {','.join(f'{v:g}' for v in self.box)}"] if self.box else []
        parts += [f"object {self.object}"] if self.object is not None else []
        return ", ".join(parts) or "its main object"

    def check(self, size: tuple[int, int]) -> None:
        """ValueError unless it fits an image of this width and height."""
        width, height = size
        if self.object is not None and (self.points or self.box):
            raise ValueError("object contradicts point and box: each says by itself what the subject is")
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
    logits: np.ndarray, ious: np.ndarray, place: Placement, cfg: SegmentConfig
) -> list[Candidate]:
    """SAM's answers with their measures, in order: logits (N, h, w), ious (N,) as SAM predicts them."""
    logits = logits.astype(np.float16)  # hundreds are kept, and the sign is what counts
    grid = zip(place.inside, logits.shape[1:], strict=True)
    rows, columns = (-(-inside * cells // place.side) for inside, cells in grid)  # the last may be cut
    shown = logits[:, :rows, :columns]
    masks = shown > cfg.threshold
    measures = zip(ious.tolist(), stability(shown, cfg).tolist(), saliency(masks, cfg).tolist(), strict=True)
    return [
        Candidate(logits[i], place, masks[i], *values, box=_box(masks[i], logits[i].shape, place))
        for i, values in enumerate(measures)
    ]


def stability(logits: np.ndarray, cfg: SegmentConfig) -> np.ndarray:
    """How little a mask depends on the threshold: IoU of a strict and a lax one; (N, h, w) -> (N,), 0..1."""
    strict = (logits > cfg.threshold + cfg.stability_offset).sum(axis=(1, 2))
    lax = (logits > cfg.threshold - cfg.stability_offset).sum(axis=(1, 2))
    return strict / np.maximum(lax, 1)


def saliency(masks: np.ndarray, cfg: SegmentConfig, centred: bool = True) -> np.ndarray:
    """How much regions look like the main object of a photo; bool (N, rows, columns) -> (N,), 0..1.

    Large, but not the scene; not along the border, as the background is; around the centre, unless
    `centred` is False.
    """
    shares = masks.mean(axis=(1, 2))  # (N,)
    found = shares / (shares + cfg.half_share) * _falling(shares, cfg.full_share)
    found *= _falling(masks[:, frame(masks.shape[1:])].mean(axis=1), cfg.border)
    if centred:
        fall = np.exp(-((_distances(masks) / cfg.centre_reach) ** cfg.centre_power))  # (N,) 1 at the centre
        found *= cfg.corner + (1 - cfg.corner) * fall
    return found


def _falling(x: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """1 up to the first end, 0 from the second, straight between."""
    return np.clip((ends[1] - x) / (ends[1] - ends[0]), 0, 1)


def _distances(masks: np.ndarray) -> np.ndarray:
    """Of each mask's centroid from the centre, the borders at 1; (N, rows, columns) -> (N,)."""
    pixels = np.maximum(masks.sum(axis=(1, 2)), 1)
    total = np.zeros(len(masks))
    for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
        steps = (2 * np.arange(length) + 1) / length - 1  # -1..1
        total += ((masks.sum(axis=axis) * steps).sum(axis=1) / pixels) ** 2
    return np.sqrt(total)


def _cell_size(grid: tuple[int, ...], place: Placement) -> tuple[float, float]:
    """Height and width of a cell of SAM's masks (h, w), in pixels of the image."""
    sides = zip(grid, place.image, place.inside, strict=True)
    height, width = (place.side / cells * image / inside for cells, image, inside in sides)
    return height, width


def _box(mask: np.ndarray, grid: tuple[int, int], place: Placement) -> tuple[int, int, int, int]:
    """Around a mask, in pixels of the image; all 0 for an empty one."""
    if not mask.any():
        return 0, 0, 0, 0
    ends = []
    for axis, pixels in enumerate(_cell_size(grid, place)):
        hit = np.flatnonzero(mask.any(axis=1 - axis))
        ends.append((round(hit[0] * pixels), min(round((hit[-1] + 1) * pixels), place.image[axis])))
    (y0, y1), (x0, x1) = ends
    return x0, y0, x1, y1


def rank(candidates: Sequence[Candidate], cfg: SegmentConfig) -> list[Candidate]:
    """The objects among candidates of one image, tidied, no two of the same region, at most `cfg.objects`:
    the main one first, and parts of better ones after all others."""
    likely = [c for c in candidates if c.clear(cfg) and c.score >= cfg.min_score]
    likely.sort(key=lambda c: -c.score)  # equals stay in the order of their prompts
    objects, parts = [], []
    for i in distinct([c.mask for c in likely], cfg):
        mask, least = likely[i].mask, cfg.inside * likely[i].mask.sum()
        part = any((mask & other.mask).sum() >= least for other in objects)
        (parts if part else objects).append(likely[i])
    return [tidy(c, cfg) for c in (objects + parts)[: cfg.objects]]


def distinct(masks: Sequence[np.ndarray], cfg: SegmentConfig) -> list[int]:
    """Non-maximum suppression: which masks, best first, are not nearly a better one; bool (rows, columns)."""
    kept, bits, sizes = [], [], []
    for i, mask in enumerate(masks):
        packed, size = np.packbits(mask), mask.sum()
        both = [int(np.bitwise_count(packed & other).sum()) for other in bits]
        if all(b < cfg.same * (size + s - b) for b, s in zip(both, sizes, strict=True)):
            kept, bits, sizes = [*kept, i], [*bits, packed], [*sizes, size]
    return kept


def tidy(candidate: Candidate, cfg: SegmentConfig, points: Sequence[Point] = ()) -> Candidate:
    """Without specks and small holes; the logits are changed there, for the large mask.

    points: what lies there stays, however small.
    """
    mask = tidied(candidate.mask, cfg.speck, [candidate.cell(point) for point in points])
    rows, columns = mask.shape
    logits = candidate.logits.copy()
    shown = logits[:rows, :columns]
    shown[mask & ~candidate.mask] = cfg.threshold + cfg.stability_offset
    shown[candidate.mask & ~mask] = cfg.threshold - cfg.stability_offset
    return replace(candidate, logits=logits, mask=mask, box=_box(mask, logits.shape, candidate.place))


def meant(
    candidates: Sequence[Candidate], cfg: SegmentConfig, points: Sequence[Point] = ()
) -> Candidate | None:
    """Of the answers to one prompt, with these points in it, the one to take, tidied; None if all are empty.

    It has all the points in it if one does, and is no guess if one is not. Wherever it lies in the image:
    the user has pointed there. A point on an ear means the cat: as in `rank` the whole goes before its parts,
    and the background comes last.
    """
    found = [c for c in candidates if c.mask.any()]
    if not found:
        return None
    like = saliency(np.stack([c.mask for c in found]), cfg, centred=False)
    order = [
        (all(c.mask[c.cell(point)] for point in points), c.clear(cfg), c.quality * value, c.quality)
        for c, value in zip(found, like.tolist(), strict=True)
    ]
    return tidy(found[order.index(max(order))], cfg, points)


# --- SAM ---------------------------------------------------------------------------------------------


class Segmenter:
    """A SAM and what is done with its answers. The same image gives the same masks."""

    def __init__(self, sam: SAM, cfg: SegmentConfig | None = None) -> None:
        self.sam, self.cfg = sam, cfg or SegmentConfig()

    @classmethod
    def load(
        cls, weights: str | Path | Bundle, device: str = "auto", cfg: SegmentConfig | None = None
    ) -> Self:
        """The network "sam" of a bundle, in float32: ViT-H is 2.6 GB, and edges need the digits.

        ValueError for a bundle without it, or a device that is not there.
        """
        bundle = weights if isinstance(weights, Bundle) else Bundle.open(weights)
        sam = bundle.build("sam", choose_device(device), torch.float32)
        return cls(sam.eval().requires_grad_(False), cfg)

    def candidates(
        self, image: Image.Image, points: Sequence[Point] = (), boxes: Sequence[Box] = ()
    ) -> list[Candidate]:
        """All that SAM answers to each point and each box by itself: three masks per point, four per box.

        image: RGB, or RGBA (transparent parts become white).
        """
        features, place = self._encode(image)
        prompts = [[((x, y), FOREGROUND)] for x, y in points]
        found = self._decode(features, place, prompts, SEVERAL)
        return found + self._decode(features, place, [_corners(box) for box in boxes], slice(None))

    def objects(self, image: Image.Image) -> list[Candidate]:
        """What is in an image, the main object first, no two of one region; ValueError if nothing is."""
        width, height = image.size
        steps = (np.arange(self.cfg.grid) + 0.5) / self.cfg.grid
        points = [(width * x, height * y) for y in steps.tolist() for x in steps.tolist()]
        points.append((width / 2, height / 2))
        boxes = [(width * m, height * m, width * (1 - m), height * (1 - m)) for m in self.cfg.margins]
        contrast = max(high - low for low, high in on_white(image).getextrema())
        seen = self.candidates(image, points, boxes) if contrast >= self.cfg.least_contrast else []
        if not (found := rank(seen, self.cfg)):
            raise ValueError(
                "SAM finds no object in the image: show it where (--point X,Y or --box X0,Y0,X1,Y1), or"
                " give a mask (--mask FILE, white = subject)"
            )
        return found

    def subject(self, image: Image.Image, pick: Pick | None = None) -> Candidate:
        """The region of the subject; ValueError if there is none, or `pick` does not fit the image."""
        pick = pick or Pick()
        pick.check(image.size)
        if pick.points or pick.box:
            features, place = self._encode(image)
            prompt = [(point, FOREGROUND) for point in pick.points] + (_corners(pick.box) if pick.box else [])
            outputs = SEVERAL if len(prompt) == 1 else SINGLE
            found = meant(self._decode(features, place, [prompt], outputs), self.cfg, pick.points)
            if found is None:
                raise ValueError(f"SAM sees nothing at {pick}: try another place, or give a mask")
            return found
        objects, number = self.objects(image), pick.object or 1
        if number > len(objects):
            raise ValueError(f"object {number}: expected 1 to {len(objects)}, so many are in the image")
        return objects[number - 1]

    def subject_mask(
        self,
        image: Image.Image,
        point: Point | Sequence[Point] | None = None,
        box: Box | None = None,
        object: int | None = None,
    ) -> Image.Image:
        """The subject's mask, mode L, 255 = subject, of the image's size; ValueError as `subject`.

        point: on the subject, x and y in pixels of the image, or several of them; box: around it, x0, y0,
        x1, y1; object: its number in `objects`, from 1. Without any, the main object.
        """
        points = () if point is None else tuple(map(tuple, np.reshape(point, (-1, 2)).tolist()))
        box = None if box is None else tuple(map(float, box))
        return self.mask(image, Pick(points, box, object))

    def mask(self, image: Image.Image, pick: Pick | None = None) -> Image.Image:
        """As `subject_mask`."""
        mask = self.subject(image, pick).image(self.cfg)
        if mask.getbbox() is None:
            raise ValueError("SAM's region covers no pixel of the image: point at another, or give a mask")
        return mask

    @torch.no_grad()
    def _encode(self, image: Image.Image) -> tuple[Tensor, Placement]:
        """(1, C, h/4, w/4)"""
        pixels, place = preprocess(on_white(image), self.sam.cfg.image_size)  # (1, 3, S, S)
        parameter = next(self.sam.parameters())
        return self.sam.encode(pixels.to(parameter.device, parameter.dtype)), place

    @torch.no_grad()
    def _decode(
        self, features: Tensor, place: Placement, prompts: list[list[tuple[Point, int]]], outputs: slice
    ) -> list[Candidate]:
        """prompts: lists of labelled points, all equally long; outputs: which of the four masks to take."""
        found = []
        size = self.cfg.prompts_at_once
        for some in (prompts[start : start + size] for start in range(0, len(prompts), size)):
            points = torch.tensor([[point for point, _ in prompt] for prompt in some])  # (P, n, 2)
            labels = torch.tensor([[label for _, label in prompt] for prompt in some])  # (P, n)
            points = to_input(points, place)[None].to(features.device)  # (1, P, n, 2)
            asked = Prompts(points, labels[None].to(features.device))
            logits, ious = (x[0, :, outputs].flatten(0, 1) for x in self.sam.decode(features, asked))
            found += candidates_of(logits.float().cpu().numpy(), ious.float().cpu().numpy(), place, self.cfg)
        return found


def segment_by(bundle: Bundle, device: str = "auto") -> Callable[[Image.Image], Image.Image]:
    """The main object's mask by the bundle's SAM, which is loaded when it is first asked: for
    `moma.inputs.preprocess.find_mask`."""
    load = lru_cache(maxsize=1)(lambda: Segmenter.load(bundle, device))
    return lambda image: load().subject_mask(image)


def _corners(box: Box) -> list[tuple[Point, int]]:
    return [((box[0], box[1]), BOX_START), ((box[2], box[3]), BOX_END)]
