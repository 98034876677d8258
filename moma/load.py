"""From a bundle's folder to what is used of it: a pipeline with any registered method, a segmenter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moma.inputs.segment import Segmenter
from moma.methods import find_method
from moma.sampling.interface import Runtime
from moma.sampling.pipeline import Pipeline
from moma.weights.bundle import Bundle


def load(
    weights: str | Path | Bundle,
    method: str = "moma",
    *,
    device: str = "auto",
    dtype: str = "auto",
    preset: str = "default",
    config: Mapping[str, Any] | None = None,
    **memory: Any,
) -> Pipeline:
    """A pipeline with one method.

    Args:
        weights: a bundle or its folder.
        method: a name of `moma.methods.METHODS`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "bf16", "fp16", "fp32".
        preset: of the method's config.
        config: fields of it to change.
        memory: `stream`, `turns`, `cuda_graph`, `tiles`, `pack`, `encoders` of
            `moma.sampling.interface.Runtime`.

    Raises:
        ValueError: before any weight is read, for a folder that is no bundle, a bundle that lacks a network,
        a
            device that is not there, an unknown name or value.
    """
    bundle = weights if isinstance(weights, Bundle) else Bundle.open(weights)
    runtime = Runtime.choose(bundle, device, dtype, **memory)
    pipe = load_pipeline(runtime, method, bundle.method_config(method, preset, **(config or {})))
    return replace(pipe, knows=bundle.familiar.knows) if bundle.familiar else pipe


def load_pipeline(runtime: Runtime, method: str, config: Any) -> Pipeline:
    """A pipeline on a machine that is resolved already.

    Args:
        runtime: weights and machine.
        method: a name of `moma.methods.METHODS`.
        config: of the method (`Bundle.method_config`).

    Raises:
        ValueError: before any weight is read, for a bundle that lacks a network.
    """
    kind = find_method(method).method
    kind.check(runtime.weights, config, runtime.encoders)
    return Pipeline.of(kind.load(runtime, config), runtime)


def load_segmenter(weights: str | Path | Bundle, device: str = "auto") -> Segmenter:
    """SAM of a bundle or its folder; ValueError if the bundle has none or the device is not there."""
    bundle = weights if isinstance(weights, Bundle) else Bundle.open(weights)
    return Segmenter.load(bundle, device)
