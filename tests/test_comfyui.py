"""ComfyUI's nodes, against a stand-in of the few interfaces they use."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from moma import METHODS, Pipeline
from tests.helpers import QUICK, ROOT, image, mask

PROMPT = "a cat in the snow"


class Stopped(Exception):
    """ComfyUI's InterruptProcessingException."""


class Comfy:
    """What a queue run leaves behind."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.previews: list[tuple] = []
        self.stop_after = 1000

    def modules(self) -> dict[str, ModuleType]:
        outer = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                outer.steps.append((value, total))
                outer.previews.append(preview)

        def interrupted() -> None:
            if len(outer.steps) >= outer.stop_after:
                raise Stopped

        found = {name: ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management")}
        found["comfy.utils"].ProgressBar = ProgressBar
        found["comfy.model_management"].throw_exception_if_processing_interrupted = interrupted
        found["comfy.model_management"].get_torch_device = lambda: torch.device("cpu")
        for name in ("utils", "model_management"):
            setattr(found["comfy"], name, found[f"comfy.{name}"])
        return found


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    stand_in = Comfy()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


@pytest.fixture
def nodes(comfy: Comfy) -> dict[str, Any]:
    """As ComfyUI loads a folder of custom nodes: checked as it checks them."""
    path = ROOT / "examples" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_nodes_moma", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    return module.NODE_CLASS_MAPPINGS


def call(node: Any, **given: Any) -> Any:
    """With the defaults that ComfyUI fills in; unknown inputs are its error."""
    inputs = node.INPUT_TYPES()
    known = inputs["required"] | inputs.get("optional", {})
    assert given.keys() <= known.keys()
    defaults = {}
    for name, spec in inputs["required"].items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if isinstance(kind, list):
            defaults[name] = kind[0]
        elif "default" in options:
            defaults[name] = options["default"]
    out = getattr(node(), node.FUNCTION)(**(defaults | given))
    assert isinstance(out, tuple) and len(out) == len(node.RETURN_TYPES)
    return out[0]


def inputs() -> dict[str, torch.Tensor]:
    return {
        "image": torch.from_numpy(np.array(image(0))).float()[None] / 255,
        "mask": torch.from_numpy(np.array(mask(30))).float()[None] / 255,
    }


def sample(nodes: dict[str, Any], pipe: Pipeline, **given: Any) -> torch.Tensor:
    subject = call(nodes["MoMAEncodeSubject"], pipeline=pipe, word="cat", **inputs())
    settings = {"prompt": PROMPT, "steps": QUICK.steps, "width": 64, "height": 64} | given
    return call(nodes["MoMASample"], pipeline=pipe, subject=subject, **settings)


def test_nodes_draw_what_the_python_api_draws(nodes: dict[str, Any], comfy: Comfy, pipe: Pipeline) -> None:
    found = sample(nodes, pipe, seed=3, images=2)
    assert found.shape == (2, 64, 64, 3) and found.dtype == torch.float32
    subject = pipe.encode_subject(image(0), mask(30), "cat")
    expected = pipe.sample(subject, PROMPT, [3, 4], config=QUICK)
    assert [np.array(one).tolist() for one in expected] == (found * 255).round().int().tolist()
    assert comfy.steps == [(i + 1, QUICK.steps) for i in range(QUICK.steps)]
    kind, preview, side = comfy.previews[-1]
    assert kind == "JPEG" and preview.size == (64, 64) and side > 0


def test_cancelling_stops_after_the_step(nodes: dict[str, Any], comfy: Comfy, pipe: Pipeline) -> None:
    comfy.stop_after = 1
    with pytest.raises(Stopped):
        sample(nodes, pipe)
    assert len(comfy.steps) == 1


def test_a_bundle_loads_with_any_method(nodes: dict[str, Any], folder: str) -> None:
    assert nodes["MoMALoadBundle"].INPUT_TYPES()["required"]["method"][0] == list(METHODS)
    pipe = call(nodes["MoMALoadBundle"], bundle=folder, method="text")
    assert call(nodes["MoMASample"], pipeline=pipe, prompt=PROMPT, steps=1).shape[0] == 1


def test_a_batch_is_no_subject(nodes: dict[str, Any], pipe: Pipeline) -> None:
    two = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in inputs().items()}
    with pytest.raises(ValueError, match="2 images"):
        call(nodes["MoMAEncodeSubject"], pipeline=pipe, word="cat", **two)
