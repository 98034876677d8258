"""MoMA: tuning-free personalised image generation (arXiv 2404.05674) in pure PyTorch."""

from moma.config import DEFAULT, PAPER, RELEASE, MethodConfig, SampleConfig, method_config
from moma.decoder import Question
from moma.pipeline import Job, MoMA, Result, Subject, load_decoder

__all__ = [
    "DEFAULT",
    "PAPER",
    "RELEASE",
    "Job",
    "MethodConfig",
    "MoMA",
    "Question",
    "Result",
    "SampleConfig",
    "Subject",
    "load_decoder",
    "method_config",
]
