"""MoMA: tuning-free personalised image generation (arXiv 2404.05674) in pure PyTorch."""

from moma.methods.moma.config import DEFAULT, PAPER, RELEASE, MethodConfig, method_config
from moma.methods.moma.feature_decoder import MLLMInput
from moma.sampling.config import SampleConfig
from moma.sampling.pipeline import Job, MoMA, Result, Subject, load_decoder

__all__ = [
    "DEFAULT",
    "PAPER",
    "RELEASE",
    "Job",
    "MLLMInput",
    "MethodConfig",
    "MoMA",
    "Result",
    "SampleConfig",
    "Subject",
    "load_decoder",
    "method_config",
]
