"""Nodes for ComfyUI: load a bundle, encode a subject, sample. README.md says how to install them.

Of ComfyUI they use IMAGE (B, H, W, 3) and MASK (B, H, W) tensors in [0, 1], `comfy.utils.ProgressBar` and
`comfy.model_management`'s device and interruption.

Letters: B images, H W pixels.
"""

from typing import Any, ClassVar

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import moma
from moma.sampling.config import MAX_SEED
from moma.sampling.pipeline import Progress

PREVIEW = 512  # pixels of a preview's longer side


def to_pil(tensor: Tensor) -> Image.Image:
    """(H, W, C) or (H, W) in [0, 1] -> RGB or L."""
    return Image.fromarray((tensor.float().cpu().clamp(0, 1) * 255).round().byte().numpy())


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images -> float32 (B, H, W, 3) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255


class LoadBundle:
    """A bundle of `convert_weights.py`, with a method."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "MoMA", "load", ("MOMA",), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        bundle = ("STRING", {"default": "weights/moma", "tooltip": "a folder of convert_weights.py"})
        return {"required": {"bundle": bundle, "method": (list(moma.METHODS),)}}

    def load(self, bundle: str, method: str) -> tuple[Any]:
        return (moma.load(bundle, method, device=str(comfy.model_management.get_torch_device())),)


class EncodeSubject:
    """What the method keeps of a subject. The mask is 1 on the subject, as painted in the mask editor."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "MoMA", "encode", ("MOMA_SUBJECT",), ("subject",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        word = ("STRING", {"default": "cat", "tooltip": "what the subject is, as prompts name it"})
        return {"required": {"pipeline": ("MOMA",), "image": ("IMAGE",), "mask": ("MASK",), "word": word}}

    def encode(self, pipeline: Any, image: Tensor, mask: Tensor, word: str) -> tuple[Any]:
        if len(image) != 1 or len(mask) != 1:
            raise ValueError(f"{len(image)} images and {len(mask)} masks: expected one of each for a subject")
        return (pipeline.encode_subject(to_pil(image[0]), to_pil(mask[0]), word),)


class Sample:
    """New images of the subjects, which the prompt names."""

    CATEGORY, FUNCTION, RETURN_TYPES = "MoMA", "sample", ("IMAGE",)
    CONFIG: ClassVar = moma.SampleConfig()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        cfg, text = cls.CONFIG, ("STRING", {"default": "", "multiline": True})
        side = ("INT", {"default": 0, "min": 0, "max": cfg.max_side, "step": 8, "tooltip": "0: the bundle's"})
        required = {
            "pipeline": ("MOMA",),
            "prompt": ("STRING", {"default": "a cat in the snow", "multiline": True}),
            "negative": text,
            "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            "images": ("INT", {"default": 1, "min": 1, "max": 64}),
            "strength": ("FLOAT", {"default": cfg.strength, "min": 0.0, "max": 2.0, "step": 0.05}),
            "steps": ("INT", {"default": cfg.steps, "min": 1, "max": 1000}),
            "solver": (["ddim", "dpm"],),
            "guidance": ("FLOAT", {"default": cfg.guidance, "min": 0.0, "max": 30.0, "step": 0.5}),
            "width": side,
            "height": side,
        }
        return {
            "required": required,
            "optional": {name: ("MOMA_SUBJECT",) for name in ("subject", "subject_2")},
        }

    def sample(
        self, pipeline: Any, prompt: str, negative: str, seed: int, images: int, strength: float,
        width: int, height: int, subject: Any = None, subject_2: Any = None, **settings: Any,
    ) -> tuple[Tensor]:  # fmt: skip
        """Settings are `SampleConfig`'s."""
        bar = comfy.utils.ProgressBar(settings["steps"])

        def on_step(now: Progress) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(now.done, now.total, ("JPEG", now.previews()[0], PREVIEW))

        subjects = tuple(one for one in (subject, subject_2) if one is not None)
        config = moma.SampleConfig(**settings, width=width or None, height=height or None)
        seeds = range(seed, seed + images)
        drawn = pipeline.sample(
            subjects, prompt, seeds, strength=strength, negative=negative, config=config, on_step=on_step
        )
        return (to_tensor(drawn),)


NODE_CLASS_MAPPINGS = {"MoMALoadBundle": LoadBundle, "MoMAEncodeSubject": EncodeSubject, "MoMASample": Sample}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MoMALoadBundle": "Load MoMA bundle",
    "MoMAEncodeSubject": "Encode subject (MoMA)",
    "MoMASample": "Sample (MoMA)",
}
