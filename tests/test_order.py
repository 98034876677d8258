"""The order of training samples."""

from itertools import islice

from moma.training.order import numbered


def test_every_epoch_is_another_permutation() -> None:
    items = 50
    batches = islice(numbered(items, batch_size=10, rank=0, world=1, start={}, seed=0), 15)
    chosen = [item for index, _, _ in batches for item in index.tolist()]
    epochs = [chosen[start : start + items] for start in (0, items, 2 * items)]
    assert all(sorted(epoch) == list(range(items)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
