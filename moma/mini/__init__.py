"""MoMA-mini: the whole method at 64x64, on a drawn image world."""

# What a bundle says of its weights.
SOURCE = "MoMA-mini, trained from scratch on rendered images by moma.mini.pretrain"
