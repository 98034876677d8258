"""Presets and the checks of configurations that come from outside."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from moma.methods.mm_diff.method import MMDiff
from moma.methods.mm_diff.training import MMDiffTrainingConfig
from moma.methods.moma.config import PRESETS, MethodConfig
from moma.methods.moma.method import MoMA
from moma.methods.text import TextConfig
from moma.sampling.config import TIMESTEPS, SampleConfig
from moma.sampling.diffusion import ScheduleConfig
from moma.sampling.interface import Job


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    again = MoMA.configure("default", **json.loads(json.dumps(asdict(PRESETS[name]))))
    assert again == PRESETS[name]


# What the presets change, restated: a slip in moma/methods/moma/config.py must not pass unseen
# (docs/choices.md explains).
CHANGES = {
    "default": {},
    "release": {
        "reference_noise": "global", "mask_binarise_above": 0.0, "keep_one_key": False, "empty_mask": "mean",
        "geometry": "squash", "label_tokens": "first_piece", "absent_label": "ignore", "m_gen_norm": "batch",
        "m_gen_eps": 0.0,
    },
    "paper": {
        "reference_background": "white", "reference_noise": "none", "reference_text_cut": 0,
        "template": "paper", "context_masked": False, "m_gen_norm": "none", "subject_init": "zero",
        "lambda_init": 1.0, "context_init": "ip_adapter",
    },
}  # fmt: skip


MM_DIFF = {
    "fuse_scale": 0.8, "start_merge_step": 0, "fuse_words": True, "fuse_negative": True, "text_lora": "first",
    "seen": "photo", "patches": "mm_diff_public",
}  # fmt: skip
MM_DIFF_CHANGES = {
    "default": {}, "release": {"start_merge_step": 10}, "paper": {"text_lora": "both", "seen": "segment"}
}  # fmt: skip
MM_DIFF_TRAINING = {
    "init": "base", "subject": "cls", "rank": 64, "text_rank": 64, "refiner_blocks": 4, "without": "nothing",
    "encoder_blocks": 2, "drop_subject": 0.1, "background": "white", "map_weight": 1e-3,
    "image_map_weight": 1e-3, "map_form": "balanced", "map_normalise": False,
}  # fmt: skip


def test_mm_diffs_choices() -> None:
    """As docs/mm-diff.md and the release have them; those of training are FastComposer's or ours."""
    for name, changes in MM_DIFF_CHANGES.items():
        own = asdict(MMDiff.Presets[name])
        assert own == asdict(TextConfig()) | MM_DIFF | changes, name
    assert MMDiff.Presets.keys() == MM_DIFF_CHANGES.keys()
    assert asdict(MMDiffTrainingConfig()) == MM_DIFF_TRAINING


@pytest.mark.parametrize("name", PRESETS)
def test_what_presets_change(name: str) -> None:
    default, preset = asdict(PRESETS["default"]), asdict(PRESETS[name])
    assert {field: value for field, value in preset.items() if value != default[field]} == CHANGES[name]


def test_every_field_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs/choices.md").read_text(encoding="utf-8")
    missing = [f.name for f in fields(MethodConfig) if f"`{f.name}`" not in text and f.name != "attention"]
    assert not missing  # `attention` chooses between equal results


def test_overrides() -> None:
    changed = MoMA.configure("release", m_gen_threshold=0, m_gen_layers=[6, 7])
    assert changed.m_gen_layers == (6, 7) and changed.geometry == "squash"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("geometry", "stretch", "'pad' or 'crop' or 'squash'"),
        ("m_gen_threshold", "high", "expected a number"),
        ("m_gen_threshold", float("nan"), "expected 0 to 1"),
        ("context_masked", "True", "expected true or false"),
        ("m_gen_layers", 3, r"expected a list such as \[0,1\], or null"),
        ("context_masked", 1, "expected true or false"),
        ("subject_below_t", True, "expected a whole number"),
        ("subject_below_t", 3.5, "expected a whole number"),
        ("m_gen_layers", [0.5], "m_gen_layers"),
        ("mllm_layers", "all", "mllm_layers"),
        ("no_such_field", 1, "expected one of"),
    ],
)
def test_wrong_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoMA.configure(**{field: value})


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="default, release, paper"):
        MoMA.configure("mine")


@pytest.mark.parametrize(
    "change",
    [
        {"template": "paper"},
        {"mllm_layers": 0},
        {"mllm_layers": 33},
        {"reference_text_cut": 77},
        {"m_gen_layers": ()},
        {"m_gen_layers": (16,)},
    ],
    ids=str,
)
def test_what_the_networks_cannot_follow(change: dict) -> None:
    sizes = {"attention_layers": 16, "mllm_layers": 32, "text_tokens": 77, "learnable_token": False}
    MethodConfig().check(**sizes)
    with pytest.raises(ValueError, match=next(iter(change))):
        MethodConfig(**change).check(**sizes)


def test_sides_in_which_nothing_could_be_seen() -> None:
    SampleConfig(height=32, width=32).check(factor=8)
    for side in (24, 4, 0, -64):
        with pytest.raises(ValueError, match=f"width {side}: expected 32"):
            SampleConfig(width=side)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 0.5, "0", None])
def test_seeds_that_are_none_or_repeat_another(seed: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number, 0 to 4294967295"):
        Job((), "a house", seed)
    assert Job((), "a house", 2**32 - 1).seed == 2**32 - 1


def test_guidance_is_everywhere_by_default() -> None:
    assert SampleConfig().guidance_interval == (0, TIMESTEPS) and ScheduleConfig().train_steps == TIMESTEPS


def test_sizes_follow_the_autoencoder() -> None:
    SampleConfig(height=68, width=36).check(factor=4)
    with pytest.raises(ValueError, match="multiple of 8"):
        SampleConfig(height=68).check(factor=8)
