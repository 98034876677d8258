"""MoMA: tuning-free personalised image generation (arXiv 2404.05674) in pure PyTorch."""

from moma.config import DEFAULT, PAPER, RELEASE, MethodConfig, SampleConfig, method_config
from moma.pipeline import Job, MoMA, Result, Subject

__all__ = [
    "DEFAULT",
    "PAPER",
    "RELEASE",
    "Job",
    "MethodConfig",
    "MoMA",
    "Result",
    "SampleConfig",
    "Subject",
    "method_config",
]
