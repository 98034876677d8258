"""Sizes of Segment Anything."""

from dataclasses import dataclass

KINDS = 4  # of points with a place
MASKS = 4  # outputs per prompt: one for the unambiguous prompt, three for the ambiguous
MLP_LAYERS = 3  # of the heads for masks and IoU
MASK_SCALE = 4  # masks have 4h x 4w cells, h x w being the grid of patches
UPSCALING = (4, 8)  # by how much each of the two steps to 4h x 4w divides the channels


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


PRESETS = {
    "b": SAMConfig(),
    "l": SAMConfig(width=1024, layers=24, heads=16, mlp=4096, global_blocks=(5, 11, 17, 23)),
    "h": SAMConfig(width=1280, layers=32, heads=16, mlp=5120, global_blocks=(7, 15, 23, 31)),
}
