"""Images of two subjects, their words, and what the base learns and is asked of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.tokenizers import ClipTokenizer
from moma.methods.prompts import sd_prompt
from moma.mini.base_numbers import auc
from moma.mini.text_to_image import BOTH, FIRST, SECOND, Texts, pair_texts, single_texts, word_map_loss
from moma.weights.bundle import CLIP_TOKENIZER, Bundle
from moma.world import pairs, world
from moma.world.classifiers import views, views_of_pairs
from moma.world.measures import sharpness
from moma.world.pairs import Pair, Told, draw_pair, named_specs, pair, pair_words, render_pairs
from moma.world.words import Words
from moma.world.world import Spec
from tests.helpers import MINI

CAT = Spec("cat", 7, "snow", None, 1, 2)
OTHER = Spec("cat", 11, "snow", None, 3, 4)
TEAPOT = Spec("teapot", 5, "snow", None, 5, 6)


@pytest.mark.parametrize("index", range(12))
def test_both_subjects_are_seen_and_hardly_overlap(index: int) -> None:
    what, cfg = pair(index), world.DEFAULT
    sample = draw_pair(what)
    assert sample.image.shape == (64, 96, 3) and sample.masks.shape == (2, 64, 96)
    seen = sample.masks / 255.0
    assert seen.sum(axis=0).max() <= 1.01
    for subject, mask, slot in zip(what.subjects, seen, pairs.slots(cfg), strict=True):
        whole = world.subject_layer(subject, slot, cfg).cover
        assert mask.sum() > 0.9 * whole.sum() > 400
        edges = np.concatenate([whole[:, 0], whole[:, -1], whole[0]])
        assert edges.max() == 0
    left, right = ((mask.sum(axis=0) * np.arange(96)).sum() / mask.sum() for mask in seen)
    assert left < 48 < right


def test_a_pair_is_the_same_every_time_and_its_parts_are_those_of_its_specs() -> None:
    one, again = draw_pair(pair(3, "val")), draw_pair(pair(3, "val"))
    assert np.array_equal(one.image, again.image)
    what = Pair(CAT, TEAPOT)
    before, moved = draw_pair(what), draw_pair(Pair(CAT, replace(TEAPOT, pose_seed=8)))
    assert np.array_equal(before.masks[0], moved.masks[0])
    assert not np.array_equal(before.masks[1], moved.masks[1])
    with pytest.raises(ValueError, match="snow and beach"):
        Pair(CAT, replace(TEAPOT, scene="beach"))


def test_what_is_held_out_stays_out_of_pairs() -> None:
    cfg = world.DEFAULT
    for index in range(300):
        for subject in pair(index).subjects:
            assert subject.number < cfg.identities
            assert not world.held_out(subject.label, subject.scene, subject.material)
    test = [subject for i in range(50) for subject in pair(i, "test").subjects]
    assert min(s.number for s in test) >= cfg.identities + cfg.unseen_identities
    drawn = [pair(i) for i in range(400)]
    same = np.mean([what.left.label == what.right.label for what in drawn])
    assert abs(same - cfg.same_class_share) < 0.07
    assert abs(np.mean([what.named() == (0, 1) for what in drawn]) - cfg.left_first) < 0.05
    assert all(what.left.number != what.right.number for what in drawn)


def test_captions_name_both_subjects_in_the_order_of_naming() -> None:
    for left, right in ((CAT, TEAPOT), (replace(CAT, scene_seed=9), TEAPOT)):
        what = Pair(left, right)
        words = pair_words(what)
        first, second = named_specs([what])
        assert words.labels == (first.label, second.label)
        assert words.caption.text.index(first.label) < words.caption.text.index(second.label)
        assert "snow" in words.caption.text and not words.caption.apart
    alike = pair_words(Pair(CAT, OTHER))
    assert "two cats" in alike.caption.text and not alike.caption.apart
    assert alike.rich.text.count("cat") == 2 and alike.rich.apart
    mixed = pair_words(Pair(CAT, replace(OTHER, material="icy")))
    assert "an icy cat" in mixed.caption.text and mixed.caption.apart


def test_rendered_masks_come_in_the_order_of_naming() -> None:
    found = render_pairs(range(6), "val")
    for i, masks in enumerate(found["masks"]):
        what = pair(i, "val")
        assert np.array_equal(masks, draw_pair(what).masks[list(what.named())])


def test_a_view_holds_its_subject_whole() -> None:
    found = render_pairs(range(4), "val")
    rows = views_of_pairs(found, "val", 0.82)
    assert rows["image"].shape == (8, 64, 64, 3) and rows["mask"].shape == (8, 64, 64)
    for i, subject in enumerate(s for j in range(4) for s in pair(j, "val").subjects):
        assert world.CLASSES[rows["label"][i]] == subject.label and rows["number"][i] == subject.number
        sample = draw_pair(pair(i // 2, "val"))
        grown = rows["mask"][i].sum() / sample.masks[i % 2].sum()
        assert abs(grown * 0.82**2 - 1) < 0.06
    plain = torch.arange(96).expand(1, 3, 64, 96).byte()
    left, right = views(plain, 0.82)[0]
    assert left[0, 0, 0] == 0 and right[0, 0, -1] == 95 and right[0, 0, 32] - left[0, 0, 32] == 45


# --- words and maps ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    bundle = Bundle.open(MINI)
    return ClipTokenizer(*(bundle.tokenizer(name) for name in CLIP_TOKENIZER), 60)


def words_at(tokenizer: ClipTokenizer, text: str, tokens: torch.Tensor) -> list[str]:
    spans = tokenizer.encode(text).spans
    return [text[slice(*spans[i])] for i in tokens.nonzero()[:, 0].tolist()]


def groups_of(tokenizer: ClipTokenizer, text: object) -> list[list[str]]:
    texts = Texts([[text]], tokenizer)
    return [words_at(tokenizer, text.text, tokens) for tokens in texts.groups[0]]


def test_words_are_bound_to_the_subject_that_they_name(tokenizer: ClipTokenizer) -> None:
    words = pair_words(Pair(CAT, TEAPOT))
    for text in pair_texts(words)[:-1]:
        found = groups_of(tokenizer, text)
        mentions = 2 if "photo" in text.text else 1
        assert found[FIRST] == [words.labels[0]] * mentions and found[SECOND] == [words.labels[1]] * mentions
        assert found[BOTH] == []


def test_two_of_a_class_are_told_apart_only_by_their_descriptions(tokenizer: ClipTokenizer) -> None:
    words = pair_words(Pair(CAT, OTHER))
    plain, bare, rich = pair_texts(words)[:3]
    assert groups_of(tokenizer, bare)[:2] == [[], []] and groups_of(tokenizer, bare)[BOTH]
    assert len(groups_of(tokenizer, plain)[BOTH]) > len(groups_of(tokenizer, bare)[BOTH])
    assert groups_of(tokenizer, rich) == [["cat"], ["cat"], ["cat", "cat"]]  # the template's two are both's
    tokens = Texts([[rich]], tokenizer).groups[0]
    assert tokens[FIRST].nonzero()[0] < tokens[SECOND].nonzero()[0]


def test_a_single_image_has_texts_with_and_without_colours(tokenizer: ClipTokenizer) -> None:
    words = Words("cat", "a cat on the beach", "a red and blue cat on the beach", "a red and blue cat")
    texts = single_texts(words)
    assert [t.text for t in texts] == [
        sd_prompt("cat", words.caption), words.caption, sd_prompt("cat", words.rich), words.rich, "cat", "",
    ]  # fmt: skip
    assert groups_of(tokenizer, texts[0]) == [["cat", "cat"], [], []]
    assert groups_of(tokenizer, texts[-1]) == [[], [], []]
    with pytest.raises(ValueError, match="60 tokens"):
        Texts([[texts[0]._replace(text="cat " * 70)]], tokenizer)


def test_the_map_loss_is_least_where_words_see_all_of_their_subject_alone() -> None:
    masks = torch.zeros(1, 2, 2, 2)
    masks[0, 0, :, 0] = 1  # the first subject fills the left column, the second one the right
    masks[0, 1, :, 1] = 1
    named = torch.tensor([[True, True, False]])
    left = torch.tensor([0.3, 0, 0.3, 0])
    maps = torch.stack([left, left, left])[None]  # (1, G, 4): both words look at the left
    assert word_map_loss([(maps, (2, 2))], masks, named).item() == pytest.approx(0.5)  # right, and wrong
    even = torch.full((1, 3, 4), 0.1)
    assert word_map_loss([(even, (2, 2))] * 2, masks, named).item() == pytest.approx(1 - math.sqrt(0.5))
    both = torch.tensor([[False, False, True]])
    assert word_map_loss([(even, (2, 2))], masks, both).item() == pytest.approx(0)  # the two fill the image
    assert word_map_loss([(maps, (2, 2))], masks, torch.zeros(1, 3, dtype=torch.bool)).item() == 0
    single, first = masks[:, :1], torch.tensor([[True, False, False]])
    assert word_map_loss([(maps, (2, 2))], single, first).item() == pytest.approx(0)
    point = torch.tensor([1.0, 0, 0, 0]).expand(1, 3, 4)  # all attention at one place inside is not enough
    assert word_map_loss([(point, (2, 2))], single, first).item() == pytest.approx(1 - math.sqrt(0.5))


def test_auc_and_sharpness() -> None:
    high, low = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])
    assert auc(high, low) == 1 and auc(low, high) == 0 and auc(high, high) == 0.5
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255
    images = checks.expand(1, 3, 8, 8).byte()
    inside = torch.zeros(1, 8, 8, dtype=torch.bool)
    inside[:, 2:6, 2:6] = True
    all_, masks = torch.cat([images, images // 2, images * 0]), inside.expand(3, -1, -1)
    assert sharpness(all_, masks).tolist() == pytest.approx([4 * 255, 4 * 127, 0])


def test_told_is_false_where_the_words_are_the_same() -> None:
    told = pair_words(Pair(replace(CAT, material="wooden"), replace(OTHER, material="wooden")))
    assert isinstance(told.rich, Told) and not told.rich.apart and "two wooden cats" in told.rich.text
