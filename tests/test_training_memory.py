"""The counter behind the README's table of GPU memory."""

import pytest

from moma.bench.training_memory import MemoryConfig, stage2


def test_stage_2_in_figures() -> None:
    """SD1.5 at 512 pixels: the UNet 1.7 GB and the trained part; checkpointing keeps blocks' inputs only."""
    weights, kept = stage2(1, checkpointing=False, cfg=MemoryConfig())
    assert 2.4e9 < weights < 2.6e9 and kept < 2e9


@pytest.mark.slow  # public sizes
def test_what_is_kept_for_the_backward_pass() -> None:
    weights, kept = stage2(1, checkpointing=False, cfg=MemoryConfig())
    same, less = stage2(1, checkpointing=True, cfg=MemoryConfig())
    assert weights == same and 5 * less < kept
    _, whole = stage2(1, checkpointing=False, cfg=MemoryConfig(subject_share=1.0))
    assert kept < whole  # Eq. 3 keeps what lies inside M_ref and M_gen only
