"""Sizes of Segment Anything."""

from dataclasses import dataclass

POINT_LABELS = 4  # kinds of points with a position
MASKS = 4  # outputs per prompt: one for an unambiguous prompt, three for an ambiguous one
MLP_LAYERS = 3  # in the heads for masks and IoU
MASK_SCALE = 4  # masks have 4h x 4w cells for a grid of h x w patches
UPSCALING = (4, 8)  # divisors of the channels after each of the two steps to 4h x 4w


@dataclass(frozen=True)
class SAMConfig:
    """Sizes; the defaults are ViT-B's."""

    width: int = 768  # of the image encoder
    layers: int = 12
    heads: int = 12
    mlp: int = 3072  # width of the hidden layer of each MLP
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)  # attend globally, the others within windows
    window: int = 14  # side, patches
    image_size: int = 1024  # S, pixels
    patch: int = 16  # pixels
    eps: float = 1e-6  # LayerNorm, except in the decoder's transformer
    out_channels: int = 256  # C of the features, the prompts and the decoder
    mask_channels: int = 16  # widest hidden layer of the mask prompts
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    downsample: int = 2  # attention between tokens and image has C / downsample channels
    iou_width: int = 256  # hidden width of the head that predicts the IoU

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
        """Patches per side, h = w."""
        return self.image_size // self.patch


PRESETS = {
    "b": SAMConfig(),
    "l": SAMConfig(width=1024, layers=24, heads=16, mlp=4096, global_blocks=(5, 11, 17, 23)),
    "h": SAMConfig(width=1280, layers=32, heads=16, mlp=5120, global_blocks=(7, 15, 23, 31)),
}
