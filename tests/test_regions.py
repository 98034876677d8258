"""Regions of boolean arrays, against a pixel-by-pixel flood fill and shapes with known answers."""

import numpy as np
import pytest

from moma.inputs.regions import components, eroded, middle, outline, tidied
from tests import recipe


def drawn(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in line] for line in text.split()])


def flooded(mask: np.ndarray) -> np.ndarray:
    """`components`, one pixel at a time."""
    labels, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count, todo = count + 1, [start]
        while todo:
            y, x = todo.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return labels


@pytest.mark.parametrize("percent", [0, 20, 45, 55, 60, 65, 80, 100])
def test_components_are_those_of_a_flood(percent):
    mask = recipe.ints(f"regions {percent}", (37, 53), 0, 100) < percent
    labels, count = components(mask)
    expected = flooded(mask)
    assert np.array_equal(labels, expected) and count == expected.max()


def test_components_of_winding_shapes():
    spiral = drawn("""
        #########
        #.......#
        #.#####.#
        #.#...#.#
        #.#.#.#.#
        #.#.###.#
        #.#.....#
        #.#######
        """)
    assert components(spiral)[1] == 1 and components(~spiral)[1] == 1
    comb = np.zeros((40, 81), bool)
    comb[:, ::2] = True  # teeth, joined by the last row only
    assert components(comb)[1] == 41
    comb[-1] = True
    assert components(comb)[1] == 1


def test_corners_do_not_join():
    assert np.array_equal(components(drawn("#. .#"))[0], [[1, 0], [0, 2]])


def test_tidied_drops_specks_and_fills_small_holes():
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:50] = True
    mask[20:23, 20:23] = False  # 9 of 1591 pixels
    mask[30:44, 30:44] = False  # 196, like the handle of a cup
    mask[2:4, 2:6] = True  # 8
    mask[54:60, 0:30] = True  # 180, like a foot behind something
    expected = mask.copy()
    expected[20:23, 20:23] = True
    expected[2:4, 2:6] = False
    assert np.array_equal(tidied(mask, 0.01), expected)
    assert np.array_equal(tidied(mask, 0), mask)


def test_tidied_keeps_gaps_at_the_edge_and_the_largest_speck():
    mask = np.ones((50, 50), bool)
    mask[0, 10:14] = mask[30, 49] = mask[40, 40] = False
    expected = mask.copy()
    expected[40, 40] = True
    assert np.array_equal(tidied(mask, 0.01), expected)
    dots = np.zeros((50, 50), bool)
    dots[::2, ::2] = True
    dots[21, 20] = True  # three pixels in a column, of 626
    assert tidied(dots, 0.01).sum() == 3
    assert not tidied(np.zeros((8, 8), bool), 0.01).any()


def test_outline_and_middle():
    mask = np.zeros((20, 30), bool)
    mask[4:15, 2:13] = True
    assert eroded(mask).sum() == 81 and outline(mask, 1).sum() == 121 - 81
    assert outline(mask, 2).sum() == 121 - 49 and np.array_equal(outline(mask, 9), mask)
    assert middle(mask) == (7, 9)
    assert eroded(np.ones((5, 5), bool)).sum() == 9  # outside the image there is nothing
    bar = np.zeros((20, 30), bool)
    bar[3, 5:12] = True
    x, y = middle(bar)
    assert bar[y, x]
