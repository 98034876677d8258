"""MoMA (arXiv 2404.05674): one image of a subject in, new images of it out, in pure PyTorch."""

from moma.inputs.preprocess import find_mask, open_image
from moma.inputs.segment import Segmenter
from moma.load import load, load_pipeline, load_segmenter
from moma.methods import METHODS, register
from moma.methods.moma.config import DEFAULT, PAPER, RELEASE, MethodConfig
from moma.methods.moma.method import MoMA, MoMASubject
from moma.sampling.config import SampleConfig
from moma.sampling.device import set_precision
from moma.sampling.interface import Job, Method, Result, Runtime
from moma.sampling.pipeline import Pipeline
from moma.weights.bundle import Bundle

__all__ = [
    "DEFAULT",
    "METHODS",
    "PAPER",
    "RELEASE",
    "Bundle",
    "Job",
    "Method",
    "MethodConfig",
    "MoMA",
    "MoMASubject",
    "Pipeline",
    "Result",
    "Runtime",
    "SampleConfig",
    "Segmenter",
    "find_mask",
    "load",
    "load_pipeline",
    "load_segmenter",
    "open_image",
    "register",
    "set_precision",
]
