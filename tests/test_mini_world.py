"""The image world of MoMA-mini."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moma.world import drawing, pairs, world
from moma.world.scenes import PLACES

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey")
PLAIN = world.Spec("cat", 5, "beach", None, 11, 12)


def test_an_image_follows_from_split_and_index():
    first, again, other = world.render(7), world.render(7), world.render(8)
    assert first.image.shape == (64, 64, 3) and first.mask.shape == (64, 64)
    assert first.image.dtype == first.mask.dtype == np.uint8
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)
    assert world.spec(7, "val") != world.spec(7, "test") != world.spec(7)


def test_streams_stay_what_they_were():
    """A change of the seeding would silently make a trained model's test images its training images."""
    assert world.spec(0) == world.Spec("backpack", 3494, "desert", "golden", 500865184, 500146216)


def test_splits_share_no_identity():
    cfg = world.WorldConfig(identities=20, unseen_identities=6)
    seen = {s: {world.spec(i, s, cfg).number for i in range(400)} for s in world.SPLITS}
    assert seen == {"train": set(range(20)), "val": set(range(20, 26)), "test": set(range(26, 32))}


def test_held_out_combinations_are_never_trained():
    specs = [world.spec(i) for i in range(3000)]
    assert not any(world.held_out(s.label, s.scene, s.material) for s in specs)
    assert {s.label for s in specs} == set(world.CLASSES) and {s.scene for s in specs} == set(world.SCENES)
    assert abs(np.mean([s.material is not None for s in specs]) - world.DEFAULT.material_share) < 0.05
    options = (None, *world.MATERIALS)
    combos = [(c, s, m) for c in world.CLASSES for s in world.SCENES for m in options]
    assert 0.06 < np.mean([world.held_out(*combo) for combo in combos]) < 0.14
    for label in world.CLASSES:
        assert sum(world.held_out(label, s, None) for s in world.SCENES) <= 2
    test = [world.spec(i, "test") for i in range(1000)]
    assert any(world.held_out(s.label, s.scene, s.material) for s in test)
    more = world.WorldConfig(unseen_share=0.5)
    again = [world.trained_elsewhere(what, i, more) for i, what in enumerate(specs[:100])]
    assert not any(world.held_out(s.label, s.scene, None, more) for s in again)


@pytest.mark.parametrize("label", world.CLASSES)
@pytest.mark.parametrize("material", [None, "stone"])
def test_mask_is_where_the_subject_is(label, material):
    what, cfg = world.Spec(label, 3, "snow", material, 21, 22), world.DEFAULT
    sample, layer = world.draw(what), world.subject_layer(what, world.whole_image(cfg), cfg)
    empty = world.to_uint8(world.scenery(what, 1.0, cfg) * world.shadow(layer.cover, cfg))
    change = np.abs(sample.image.astype(int) - empty).max(2)
    assert not change[sample.mask == 0].any()
    assert (change[sample.mask == 255] > 4).mean() > 0.9
    rows, columns = np.nonzero(sample.mask > 127)
    tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(tall, wide) >= 0.5 * 64 and max(tall, wide) <= 64
    assert rows.max() > 0.78 * 64 and 0.1 < (sample.mask > 127).mean() < 0.5


def test_subjects_stay_inside_the_image():
    cut = 0
    for i in range(120):
        mask = world.render(i).mask
        cut += (mask[0] > 127).sum() + (mask[-1] > 127).sum()
        cut += ((mask[:, 0] > 127).sum() > 3) + ((mask[:, -1] > 127).sum() > 3)
    assert cut == 0


def test_captions_name_class_scene_and_material_only():
    wordings = set()
    for i in range(200):
        what = world.spec(i)
        text = world.caption(what)
        words = text.replace(",", "").split()
        assert what.label in words and PLACES[what.scene].phrase in text
        assert [m for m in world.MATERIALS if m in words] == ([what.material] if what.material else [])
        assert not set(COLOURS) & set(words) and not any(c.isdigit() for c in text)
        wordings.add(text.replace(what.label, "").replace(PLACES[what.scene].phrase, "*"))
    assert len(wordings) >= 8
    assert world.prompt("cat", "beach") == "a cat on the beach"
    assert world.prompt("dog", "snow", "icy") == "an icy dog in the snow"


def test_an_identity_keeps_its_colours_over_scenes_and_poses():
    def main_colour(number, scene, pose):
        sample = world.draw(replace(PLAIN, number=number, scene=scene, pose_seed=pose, scene_seed=pose))
        return sample.image[sample.mask == 255].mean(0)

    scenes = ("beach", "forest", "snow", "kitchen")
    means = np.array([[main_colour(n, s, i) for i, s in enumerate(scenes)] for n in range(8)])  # (8, 4, 3)
    within = np.linalg.norm(means - means.mean(1, keepdims=True), axis=2).mean()
    between = np.linalg.norm(means.mean(1) - means.mean((0, 1)), axis=1).mean()
    assert within < 8 and between > 3 * within


def test_main_colour_covers_most_of_a_plain_subject():
    plain = [n for n in range(60) if world.identity("teapot", n).pattern == "plain"][:5]
    for number in plain:
        sample = world.draw(world.Spec("teapot", number, "meadow", None, 1, 1))
        inside = sample.image[sample.mask == 255] / 255
        main = np.array(world.identity("teapot", number).main)
        near = np.linalg.norm(inside - main, axis=1) < 0.25
        assert near.mean() > 0.4


@pytest.mark.parametrize("material", world.MATERIALS)
def test_a_material_replaces_the_colours(material):
    pair = [world.draw(replace(PLAIN, number=n, material=material)) for n in (0, 1)]
    means = [sample.image[sample.mask == 255].mean(0) for sample in pair]
    assert np.abs(means[0] - means[1]).max() < 25
    assert np.array_equal(world.draw(replace(PLAIN, number=0)).mask, pair[0].mask)


@pytest.mark.parametrize("size", [32, 96])
def test_other_sizes_show_the_same(size):
    small = world.draw(PLAIN, world.WorldConfig(size=size))
    assert small.image.shape == (size, size, 3)
    covered = [(mask > 127).mean() for mask in (small.mask, world.draw(PLAIN).mask)]
    assert abs(covered[0] - covered[1]) < 0.03


def test_wide_lines_have_no_gaps() -> None:
    """At the corners of a curve, in the outer half of its line."""
    matrix, points, line = np.array([[5.0, 0, 0], [0, 5.0, 0]]), drawing.oval(50, 50, 30, 30), 40
    outside = 50 + (points - 50) * (1 + 0.7 * line / 150)  # (n, 2)
    for draw in (lambda pen: pen.shape(points, 2), lambda pen: pen.stroke(points, 1, width=2)):
        image = Image.new("L", (500, 500))
        draw(drawing.Pen(image, matrix, line, 1))
        found = np.asarray(image)[tuple(np.rint(5 * outside).astype(int).T[::-1])]
        assert (found == 1).all()


def test_render_many_stacks_in_order():
    many = world.render_many([4, 2], "val")
    assert many["image"].shape == (2, 64, 64, 3) and many["mask"].shape == (2, 64, 64)
    for row, index in enumerate((4, 2)):
        one, what = world.render(index, "val"), world.spec(index, "val")
        assert np.array_equal(many["image"][row], one.image) and many["caption"][row] == one.caption
        assert world.CLASSES[many["label"][row]] == what.label and many["number"][row] == what.number
        assert world.SCENES[many["scene"][row]] == what.scene
        assert (*world.MATERIALS, None)[many["material"][row]] == what.material


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.spec(0, "dev"), "'dev'"),
        (lambda: world.spec(-1), "index -1"),
        (lambda: world.draw(replace(PLAIN, label="cow")), "'cow'"),
        (lambda: world.draw(replace(PLAIN, scene="moon")), "'moon'"),
        (lambda: world.prompt("cat", "beach", "paper"), "'paper'"),
        (lambda: world.held_out("cat", "moon", None), "'moon'"),
        (lambda: world.identity("cat", 5000), "5000"),
        (lambda: world.render_many([]), "indices"),
        (lambda: world.in_own_colours("val", world.WorldConfig(material_share=1.0)), "material_share 1"),
        (lambda: pairs.pairs_of("val", True, world.WorldConfig(same_class_share=0.0)), "same_class_share 0"),
        (lambda: pairs.pairs_of("val", False, world.WorldConfig(same_class_share=1.0)), "same_class_share 1"),
        (lambda: world.WorldConfig(size=0), "size"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow  # starts processes
def test_workers_change_nothing() -> None:
    alone, shared = (world.render_many(range(100), "val", workers=workers) for workers in (0, 2))
    assert all(np.array_equal(alone[name], shared[name]) for name in alone)
