"""From SAM's masks to the subject: drawn scenes whose right answer is known, and the whole way with a network
that knows the answers."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from models.sam import SAM
from models.sam_image import Placement, placement
from moma.inputs.regions import eroded, middle
from moma.inputs.segment import (
    Candidate,
    Pick,
    SegmentConfig,
    Segmenter,
    candidates_of,
    distinct,
    rank,
    saliency,
    select_mask,
    stability,
    tidy,
)
from tests.fake_sam import SMALL, FlatSAM
from tests.golden_files import CARRIED

CFG = SegmentConfig()
GRID = 64  # of the drawn candidates: the image has four times as many pixels, as with SAM
SQUARE = placement(4 * GRID, 4 * GRID, 4 * GRID)


def shape(kind: str, *box: int) -> np.ndarray:
    """An ellipse or a rectangle within x0, y0, x1, y1 inclusive; bool (64, 64)."""
    image = Image.new("1", (GRID, GRID))
    getattr(ImageDraw.Draw(image), kind)(box, fill=1)
    return np.array(image)


def seen(
    masks: list[np.ndarray], ious: list[float] | None = None, place: Placement = SQUARE
) -> list[Candidate]:
    """Candidates with sharp edges; predicted IoU 0.9 unless given."""
    logits = np.where(np.stack(masks), np.float32(8), np.float32(-8))
    return candidates_of(logits, np.array(ious or [0.9] * len(masks)), place, CFG)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """IoU."""
    return (a & b).sum() / (a | b).sum()


ALL = shape("rectangle", 0, 0, 63, 63)
LEFT, TOP, MIDDLE = (shape("rectangle", 0, 0, *end) for end in ((31, 63), (63, 31), (63, 40)))


def disc() -> list[np.ndarray]:
    """A disc in the middle of a scene, its parts, the scene without it, all of it, a strip of its border."""
    whole = shape("ellipse", 16, 16, 47, 47)
    eye = shape("ellipse", 24, 24, 30, 30)
    strip = ALL & ~shape("rectangle", 2, 2, 61, 61)
    return [whole, whole & LEFT, whole & TOP, eye, ~whole, ALL, strip]


def portrait() -> list[np.ndarray]:
    """A bust on the whole lower border, its head, its shirt, what is behind it, sky alone."""
    head, shirt = shape("ellipse", 20, 8, 43, 38), shape("ellipse", 0, 34, 63, 100)
    bust = head | shirt
    return [bust, head, shirt, ~bust, ~bust & TOP]


def close_up() -> list[np.ndarray]:
    """A subject on 70% of the image that touches two borders; its half, the rest, corners of the rest."""
    whole = shape("ellipse", 1, -2, 62, 68)
    return [whole, whole & TOP, whole & LEFT, ~whole, ~whole & LEFT & TOP, ALL]


def on_a_floor() -> list[np.ndarray]:
    """A small car on a floor in front of a wall."""
    car = shape("rectangle", 20, 38, 43, 50)
    return [car, shape("ellipse", 21, 46, 28, 53), MIDDLE & ~car, ~MIDDLE & ~car, ~car, ALL, car | ~MIDDLE]


def aside() -> list[np.ndarray]:
    """A cat at the left of a dark image, its half nearer the middle, its head, the dark, a spot of light in
    the very middle."""
    cat = shape("ellipse", 2, 10, 31, 60)
    half = cat & ~shape("rectangle", 0, 0, 16, 63)
    return [cat, half, cat & TOP, ~cat, shape("ellipse", 36, 28, 42, 34)]


def unsure() -> list[np.ndarray]:
    """A ball, and a larger blob in the middle that SAM is unsure of."""
    return [shape("ellipse", 10, 20, 33, 43), shape("ellipse", 18, 18, 60, 60)]


SCENES = {"disc": disc, "portrait": portrait, "close_up": close_up, "on_a_floor": on_a_floor, "aside": aside}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("turn", range(3))
def test_the_main_object_comes_first(scene, turn):
    """Whatever the order of the prompts."""
    masks = SCENES[scene]()
    shuffled = masks[turn:] + masks[:turn]
    assert np.array_equal(rank(seen(shuffled), CFG)[0].mask, masks[0])


@pytest.mark.parametrize("scene", SCENES)
def test_mirrored_scenes_have_the_same_subject(scene):
    masks = [mask[:, ::-1] for mask in SCENES[scene]()]
    assert np.array_equal(rank(seen(masks), CFG)[0].mask, masks[0])


def test_shares_of_the_scenes():
    """The scenes are what their descriptions say."""
    assert close_up()[0].mean() > 0.7 and portrait()[0][-1].all() and aside()[0].mean() > 0.25


def test_background_is_not_listed():
    whole, *_, rest, scene, strip = disc()
    assert [c.mask.sum() for c in rank(seen([strip, scene, rest, whole]), CFG)] == [whole.sum()]
    assert rank(seen([strip, scene, rest]), CFG) == []
    assert rank([], CFG) == []


def test_unsure_masks_lose():
    ball, blob = unsure()
    assert np.array_equal(rank(seen([ball, blob]), CFG)[0].mask, blob)
    assert np.array_equal(rank(seen([ball, blob], [0.9, 0.55]), CFG)[0].mask, ball)
    (only,) = rank(seen([ball, blob], [0.9, 0.3]), CFG)  # dropped
    assert np.array_equal(only.mask, ball)
    logits = np.where(np.stack([ball, blob]), 8.0, -8.0)
    logits[1, blob & shape("rectangle", 0, 0, 40, 63)] = 0.5  # on at threshold 0, off at 1
    (only,) = rank(candidates_of(logits, np.array([0.9, 0.9]), SQUARE, CFG), CFG)
    assert np.array_equal(only.mask, ball)


def test_two_objects_and_their_doubles():
    """The larger one in the middle comes first; masks that differ only at their edge are one object."""
    large, small = shape("ellipse", 22, 14, 55, 49), shape("rectangle", 2, 30, 16, 50)
    doubles = [
        shape("ellipse", 23, 15, 55, 49),
        shape("rectangle", 2, 30, 16, 51),
        shape("ellipse", 22, 13, 56, 49),
    ]
    found = rank(seen([small, *doubles, large], [0.9, 0.89, 0.88, 0.87, 0.95]), CFG)
    assert len(found) == 2
    assert np.array_equal(found[0].mask, large) and np.array_equal(found[1].mask, small)
    assert found[0].score > found[1].score


def test_parts_come_after_other_objects():
    """Even if they score higher. They stay listed, since the apparent whole may have been too much."""
    bust, head, *_ = portrait()
    ball = shape("ellipse", 48, 4, 61, 17)
    found = rank(seen([ball, head, bust]), CFG)
    assert [int(c.mask.sum()) for c in found] == [int(m.sum()) for m in (bust, ball, head)]
    assert found[1].score < found[2].score


def test_specks_and_holes_are_removed():
    whole = disc()[0]
    rough = whole.copy()
    rough[30, 30] = rough[20:22, 30] = False
    rough[2, 2] = rough[60, 50:52] = True
    candidate = seen([rough])[0]
    (found,) = rank([candidate], CFG)
    assert np.array_equal(found.mask, whole) and found.box == (64, 64, 192, 192)
    assert candidate.box == (8, 8, 208, 244) and np.array_equal(candidate.mask, rough)  # as it was
    image = np.asarray(found.image(CFG))  # the large mask, from the changed logits
    clean = np.asarray(seen([whole])[0].image(CFG))
    assert image.shape == (256, 256) and set(np.unique(image)) == {0, 255}
    assert (image != clean).mean() < 0.001 and image[122, 122] == 255 and not image[242, 204]


def test_handles_stay_open():
    ring = disc()[0] & ~shape("ellipse", 28, 28, 35, 35)  # 6% of it
    assert np.array_equal(rank(seen([ring]), CFG)[0].mask, ring)


def test_the_list_is_bounded():
    dots = [shape("rectangle", x, y, x + 9, y + 9) for x in range(8, 48, 10) for y in range(8, 48, 10)]
    found = rank(seen(dots), CFG)
    assert len(found) == CFG.objects < len(dots)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)


def test_stability_counts_pixels():
    logits = np.full((3, 4, 5), -8.0)
    logits[0, 0], logits[0, 1, 0] = 8, 0.5  # 5 strict, 6 lax
    logits[1, 0, 0], logits[1, 0, 1:4] = 1.5, -0.5  # 1 strict, 4 lax
    assert np.allclose(stability(logits, CFG), [5 / 6, 1 / 4, 0])


def test_saliency_by_hand():
    """A fifth of the image in its middle: 0.2 / (0.2 + 0.1), nothing taken off."""
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 12:28, 10:30] = True
    assert saliency(mask, CFG)[0] == pytest.approx(2 / 3)
    moved = np.roll(mask, 10, axis=2)  # its centre half way to the border, still free of it
    assert saliency(moved, CFG)[0] == pytest.approx(2 / 3 * (0.2 + 0.8 * np.exp(-((0.5 / 0.7) ** 4))))
    assert saliency(moved, CFG, centred=False)[0] == pytest.approx(2 / 3)
    assert saliency(np.ones((1, 40, 40), bool), CFG)[0] == 0


def test_distinct_by_hand():
    a, b = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    a[:7], b[:10] = True, True  # IoU 0.7: the same
    assert distinct([a, b], CFG) == [0]
    a[6, 9] = False
    assert distinct([a, b, a], CFG) == [0, 1]


def test_padding_is_not_the_image():
    """A wide image: the lower half of SAM's input is padding, whatever SAM says there."""
    place = placement(100, 200, 256)
    assert place.inside == (128, 256)
    mask = shape("ellipse", 20, 4, 43, 27)
    mask[40:] = True
    (found,) = rank(seen([mask], place=place), CFG)
    assert found.mask.shape == (32, 64) and found.share == pytest.approx(np.pi * 12**2 / 2048, rel=0.05)
    assert found.box == (62, 12, 138, 88)  # 3.125 pixels per cell
    assert found.image(CFG).size == (200, 100)


@pytest.mark.parametrize("image", ["0", "7", "11", "26"])
def test_recorded_answers_of_a_trained_network(image):
    """Masks of MoMA-mini's SAM for a render; the surest of them are mostly the background."""
    with np.load(CARRIED / "sam_candidates.npz") as recorded:
        logits, ious, true = (recorded[f"{name}.{image}"] for name in ("logits", "ious", "mask"))
    found = candidates_of(logits / np.float32(2), ious, placement(GRID, GRID, GRID), CFG)
    ranked = rank(found, CFG)
    assert overlap(ranked[0].mask, true) > 0.94
    assert all(overlap(a.mask, b.mask) < CFG.same for a, b in combinations(ranked, 2))
    sure = max(found, key=lambda c: c.quality)
    assert overlap(sure.mask, true) < 0.02


PHOTOS = ("1", "3", "8", "11", "14", "16", "21", "23", "cat")


def photographed(name: str) -> tuple[list[np.ndarray], Placement]:
    """Regions of a real photo: its subject, masked by hand; areas of one colour (parts of the subject, things
    around it, the backdrop, mixtures); everything but the subject; everything."""
    with np.load(CARRIED / "photo_regions.npz") as recorded:
        packed, drawn, size = (recorded[f"{part}.{name}"] for part in ("masks", "shape", "size"))
    masks = np.unpackbits(packed, count=drawn.prod()).reshape(drawn).astype(bool)  # (N, rows, columns)
    masks = np.concatenate([masks, ~masks[:1], np.ones_like(masks[:1])])
    wide = np.zeros((len(masks), GRID, GRID), bool)
    wide[:, : drawn[1], : drawn[2]] = masks
    return list(wide), placement(*size.tolist()[::-1], GRID)


@pytest.mark.parametrize("name", PHOTOS)
def test_subjects_of_real_photos_come_first(name):
    """By saliency alone, with equal quality. In 23, half the car and the wall behind it have one colour: that
    mixture comes first, but not if the network is a little surer of the car."""
    masks, place = photographed(name)
    true = masks[0][: place.inside[0], : place.inside[1]]
    assert len(masks) > 40
    first, second, *_ = rank(seen(masks[::-1], place=place), CFG)
    found = second if name == "23" else first
    assert overlap(found.mask, true) > 0.98  # small gaps are closed
    sure = [0.93, *[0.88] * (len(masks) - 1)]
    assert overlap(rank(seen(masks, sure, place), CFG)[0].mask, true) > 0.98


@pytest.mark.parametrize("name", PHOTOS)
def test_clicks_on_real_photos(name):
    """Two of three masks contain the point. On the subject, the subject wins over its largest part and the
    rest; beside it, the rest wins."""
    masks, place = photographed(name)
    true, rest = masks[0], masks[-2]
    part = max((m & true for m in masks[1:-2]), key=lambda m: m.sum() * (m.sum() < 0.9 * true.sum()))
    cell = max(place.image) / place.side  # pixels of the image
    for where, wanted in ((part, true), (rest, rest)):
        point = tuple((v + 0.5) * cell for v in middle(where))
        found = select_mask(seen([part, rest, true], [0.92, 0.95, 0.9], place), CFG, [point])
        rows, columns = found.mask.shape
        assert overlap(found.mask, wanted[:rows, :columns]) > 0.95


@pytest.mark.parametrize("name", PHOTOS)
def test_rough_masks_of_real_photos_become_smooth(name):
    masks, place = photographed(name)
    true = masks[0]
    dots = np.zeros_like(true)
    dots[3::6, 3::6] = True
    near = true ^ (dots & (eroded(eroded(true)) | eroded(eroded(masks[-2]))))  # holes and specks off its edge
    rough, clean = (tidy(c, CFG).mask for c in seen([near, true], place=place))
    assert overlap(near, true) < 0.97 and np.array_equal(rough, clean)


# --- prompts of the user -------------------------------------------------------------------------------


def test_a_point_means_the_whole():
    cat, half, head, dark, _ = aside()
    found = select_mask(seen([head, cat, dark], [0.97, 0.93, 0.99]), CFG)
    assert np.array_equal(found.mask, cat)
    assert np.array_equal(select_mask(seen([half & TOP, half], [0.97, 0.3]), CFG).mask, half & TOP)


def test_a_point_on_the_background_does_not_mean_the_object():
    """Even if SAM returns the object's mask too, as a guess or as a sure answer."""
    cat, _, _, dark, _ = aside()
    for ious in ([0.02, 0.96], [0.97, 0.4]):
        assert np.array_equal(select_mask(seen([cat, dark], ious), CFG, [(250, 4)]).mask, dark)
    spot = shape("ellipse", 40, 2, 47, 9)
    found = select_mask(seen([spot | TOP, spot | dark], [0.03, 0.96]), CFG, [(175, 22)])  # both contain it
    assert np.array_equal(found.mask, spot | dark)


def test_points_and_boxes_agree_where_the_last_cells_are_cut():
    """129 rows of SAM's 256 show the image: 32 cells and a quarter."""
    place = placement(126, 250, 256)
    assert place.inside == (129, 256)
    for row in (0, 16, 31, 32):
        mask = np.zeros((GRID, GRID), bool)
        mask[row, 10] = True
        (found,) = seen([mask], place=place)
        x0, y0, x1, y1 = found.box
        assert found.cell(((x0 + x1) / 2, (y0 + y1) / 2)) == (row, 10)


def test_a_part_that_is_pointed_at_stays_however_small():
    large, small = shape("rectangle", 4, 4, 53, 53), shape("rectangle", 58, 58, 59, 59)
    (both,) = seen([large | small])
    assert np.array_equal(select_mask([both], CFG).mask, large)
    assert np.array_equal(select_mask([both], CFG, [(235, 236)]).mask, large | small)  # 4 pixels a cell
    assert np.array_equal(select_mask([both], CFG, [(20, 20)]).mask, large)


def test_what_is_pointed_at_need_not_look_like_an_object():
    empty = np.zeros_like(ALL)
    *_, rest, scene, _ = disc()
    assert np.array_equal(select_mask(seen([empty, ~MIDDLE], [0.99, 0.4]), CFG).mask, ~MIDDLE)
    assert np.array_equal(select_mask(seen([scene, rest], [0.5, 0.6]), CFG).mask, rest)
    assert select_mask(seen([empty]), CFG) is None


# --- with a network ------------------------------------------------------------------------------------

BLUE, RED, GREEN, GREY = (20, 60, 200), (200, 30, 30), (40, 160, 60), (120, 120, 120)


def photo(size: tuple[int, int] = (240, 160)) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A grey scene with a large red disc and a small green one; their masks."""
    masks = []
    image = Image.new("RGB", size, GREY)
    for colour, box in ((RED, (80, 30, 179, 129)), (GREEN, (10, 100, 49, 139))):
        ImageDraw.Draw(image).ellipse(box, fill=colour)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        masks.append(np.asarray(mask) > 0)
    return image, *masks


def iou(mask: Image.Image, expected: np.ndarray) -> float:
    found = np.asarray(mask) > 0
    return (found & expected).sum() / (found | expected).sum()


def test_subjects_of_a_photo():
    image, red, green = photo()
    segmenter = Segmenter(FlatSAM())
    mask = segmenter.subject_mask(image)
    assert mask.mode == "L" and mask.size == image.size and set(np.unique(mask)) == {0, 255}
    assert iou(mask, red) > 0.93
    assert iou(segmenter.subject_mask(image, object=1), red) > 0.93
    assert iou(segmenter.subject_mask(image, point=(30, 120)), green) > 0.88
    assert iou(segmenter.subject_mask(image, point=[(30, 120), (130, 80)]), red | green) > 0.88
    assert iou(segmenter.subject_mask(image, box=(5, 95, 55, 145)), green) > 0.88
    first, *others = segmenter.objects(image)
    assert np.allclose(first.box, (80, 30, 180, 130), atol=2) and first.share == pytest.approx(
        red.mean(), abs=0.01
    )
    number = 2 + [iou(c.image(CFG), green) > 0.88 for c in others].index(True)
    assert iou(segmenter.subject_mask(image, object=number), green) > 0.88
    assert np.array_equal(mask, segmenter.subject_mask(image))


def test_prompts_of_the_whole_image():
    """A grid, the centre and boxes, in chunks; the candidates do not depend on the chunks."""
    sam, image = FlatSAM(), photo()[0]
    objects = Segmenter(sam).objects(image)
    asked = CFG.grid**2 + 1
    assert sum(p for _, p, n in sam.asked if n == 1) == asked and (1, len(CFG.margins), 2) in sam.asked
    assert max(p for _, p, _ in sam.asked) == CFG.max_prompts
    sam.asked.clear()
    again = Segmenter(sam, SegmentConfig(max_prompts=1)).objects(image)
    assert len(sam.asked) == asked + len(CFG.margins)
    for one, other in zip(objects, again, strict=True):
        assert np.array_equal(one.mask, other.mask) and one.score == other.score
    sam.asked.clear()
    Segmenter(sam).subject(image, Pick(((30, 120), (130, 80)), (5, 5, 200, 150)))
    assert sam.asked == [(1, 1, 4)]
    found = Segmenter(sam).candidates(image, [(30, 120), (130, 80)], [(5, 95, 55, 145)])
    assert len(found) == 3 + 3 + 4
    red, green = (round(float(mask.mean()), 2) for mask in photo()[1:])
    assert [round(found[i].share, 2) for i in (1, 4, 6)] == [green, red, green]


def test_transparent_parts_are_white():
    image, red, _ = photo()
    image.putalpha(Image.fromarray(np.where(red, 255, 0).astype(np.uint8)))
    assert iou(Segmenter(FlatSAM()).subject_mask(image), red) > 0.93


def test_nothing_to_find():
    segmenter, image = Segmenter(FlatSAM()), Image.new("RGB", (64, 64), BLUE)
    for pick in (Pick(), Pick(points=((9, 9),)), Pick(object=1)):
        with pytest.raises(ValueError, match="one plain colour"):
            segmenter.subject(image, pick)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"point": (240, 5)}, "point 240,5"),
        ({"point": [(3, 4), (5, -1)]}, "point 5,-1"),
        ({"box": (10, 10, 241, 20)}, "box 10,10,241,20"),
        ({"box": (20, 10, 20, 30)}, "box 20,10,20,30"),
        ({"object": 99}, "object 99"),
        ({"object": 0}, "object 0"),
        ({"object": 1, "point": (3, 4)}, "object .* point"),
    ],
)
def test_mistakes(options, named):
    with pytest.raises(ValueError, match=named):
        Segmenter(FlatSAM()).subject_mask(photo()[0], **options)


def test_a_real_network():
    """Small, with pseudo-random weights: shapes, and chunks that change only the rounding."""
    torch.manual_seed(0)
    sam = SAM(SMALL).eval().requires_grad_(False)
    image, points, boxes = photo()[0], [(30.0, 120.0), (130.0, 80.0), (5.0, 5.0)], [(5.0, 5.0, 200.0, 150.0)]
    found = Segmenter(sam).candidates(image, points, boxes)
    assert len(found) == 13 and found[0].mask.shape == (11, 16) and found[0].logits.shape == (16, 16)
    single = Segmenter(sam, SegmentConfig(max_prompts=1)).candidates(image, points, boxes)
    for one, other in zip(found, single, strict=True):
        assert np.allclose(one.logits, other.logits, rtol=2e-3, atol=2e-3)
        assert one.predicted_iou == pytest.approx(other.predicted_iou, abs=1e-4)
    assert Segmenter(sam).subject(image, Pick(((30, 120),))).image(CFG).size == image.size
