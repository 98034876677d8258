"""Sizes of Segment Anything, and how transformers' config.json says them."""

from dataclasses import dataclass
from typing import Any, Self

KINDS = 4  # of points with a place
MASKS = 4  # outputs per prompt: one for the unambiguous prompt, three for the ambiguous
MLP_LAYERS = 3  # of the heads for masks and IoU
MASK_SCALE = 4  # masks have 4h x 4w cells, h x w being the grid of patches
UPSCALING = (4, 8)  # by how much each of the two steps to 4h x 4w divides the channels

# What transformers' SAM configurations mean by a key that is absent from config.json.
PUBLIC_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 768,
        "output_channels": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 1024,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "mlp_ratio": 4.0,
        "window_size": 14,
        "global_attn_indexes": (2, 5, 8, 11),
    },
    "prompt_encoder_config": {"mask_input_channels": 16},
    "mask_decoder_config": {
        "mlp_dim": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "attention_downsample_rate": 2,
        "iou_head_hidden_dim": 256,
    },
}
# What the configurations could say otherwise, but do not in any SAM; each also means its default.
PUBLIC_FIXED: dict[str, dict[str, Any]] = {
    "vision_config": {
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
    },
    "prompt_encoder_config": {"num_point_embeddings": KINDS, "hidden_act": "gelu"},
    "mask_decoder_config": {
        "hidden_act": "relu",
        "num_multimask_outputs": MASKS - 1,
        "iou_head_depth": MLP_LAYERS,
    },
}


@dataclass(frozen=True)
class SAMConfig:
    """Sizes; the defaults are ViT-B's."""

    width: int = 768  # of the image encoder
    layers: int = 12
    heads: int = 12
    mlp: int = 3072  # width of the hidden layer of each MLP
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)  # attend to the whole image, the others within windows
    window: int = 14  # side in patches
    image_size: int = 1024  # S, pixels
    patch: int = 16  # pixels
    eps: float = 1e-6  # LayerNorm, but for those of the decoder's transformer
    out_channels: int = 256  # C of the features, the prompts and the decoder
    mask_channels: int = 16  # widest hidden layer for masks given as prompts
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    downsample: int = 2  # the decoder attends between tokens and image in C / downsample channels
    iou_width: int = 256  # hidden layers of the head that predicts the IoU

    def __post_init__(self) -> None:
        for name, value, divisor in (
            ("width", self.width, self.heads),
            ("image_size", self.image_size, self.patch),
            ("out_channels", self.out_channels, UPSCALING[-1]),
            ("out_channels", self.out_channels, self.downsample * self.decoder_heads),
            ("mask_channels", self.mask_channels, MASK_SCALE),
        ):
            if value % divisor:
                raise ValueError(f"SAM {name} {value}: expected a multiple of {divisor}")
        if not all(0 <= block < self.layers for block in self.global_blocks):
            raise ValueError(f"SAM global_blocks {self.global_blocks}: expected blocks 0..{self.layers - 1}")

    @property
    def grid(self) -> int:
        """Patches a side, h = w."""
        return self.image_size // self.patch

    @classmethod
    def from_public(cls, public: dict[str, Any]) -> Self:
        """From the config.json of transformers' SamModel, else ValueError."""
        if public.get("model_type") != "sam":
            raise ValueError(f"config.json: model_type {public.get('model_type')!r}, expected 'sam'")
        for part, fixed in PUBLIC_FIXED.items():
            for key, value in fixed.items():
                if (given := (public.get(part) or {}).get(key, value)) != value:
                    raise ValueError(f"SAM {part}: {key} {given!r}, expected {value!r}")
        vision, prompt, decoder = (
            default | (public.get(part) or {}) for part, default in PUBLIC_DEFAULTS.items()
        )
        return cls(
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp=vision.get("mlp_dim") or int(vision["hidden_size"] * vision["mlp_ratio"]),
            global_blocks=tuple(vision["global_attn_indexes"]),
            window=vision["window_size"],
            image_size=vision["image_size"],
            patch=vision["patch_size"],
            eps=vision["layer_norm_eps"],
            out_channels=vision["output_channels"],
            mask_channels=prompt["mask_input_channels"],
            decoder_layers=decoder["num_hidden_layers"],
            decoder_heads=decoder["num_attention_heads"],
            decoder_mlp=decoder["mlp_dim"],
            downsample=decoder["attention_downsample_rate"],
            iou_width=decoder["iou_head_hidden_dim"],
        )


PRESETS = {
    "b": SAMConfig(),
    "l": SAMConfig(width=1024, layers=24, heads=16, mlp=4096, global_blocks=(5, 11, 17, 23)),
    "h": SAMConfig(width=1280, layers=32, heads=16, mlp=5120, global_blocks=(7, 15, 23, 31)),
}
