"""The counter behind the README's table of GPU memory."""

from moma.bench.training_memory import MemoryConfig, stage2


def test_stage_2_in_figures() -> None:
    """SD1.5 at 512 pixels: the UNet 1.7 GB and the trained part; checkpointing keeps blocks' inputs only."""
    weights, kept = stage2(1, checkpointing=False, cfg=MemoryConfig())
    same, less = stage2(1, checkpointing=True, cfg=MemoryConfig())
    assert weights == same and 2.4e9 < weights < 2.6e9
    assert 5 * less < kept < 2e9
    _, whole = stage2(1, checkpointing=False, cfg=MemoryConfig(subject_share=1.0))
    assert kept < whole  # Eq. 3 keeps what lies inside M_ref and M_gen only
