"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): LLaMA reads CLIP's patch features in place of an image token.

Parameter names: `tower.*` as in models/clip.py, `llama.*` as in models/llama.py, `projector.*` as the
original files' `model.mm_projector.*`.

Letters: B batch, S image side in pixels, N patches, C LLaMA's width, W the tower's width, T tokens with the
image's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.clip import CLIPVision, CLIPVisionConfig
from models.llama import Llama, LlamaConfig
from models.tokenizers import IMAGE_TOKEN

PROJECTORS = ("linear", "mlp2x_gelu")


@dataclass(frozen=True)
class LlavaConfig:
    """The defaults are LLaVA-1.5-7B's."""

    llama: LlamaConfig = field(default_factory=LlamaConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"  # LLaVA-1 has one linear layer, LLaVA-1.5 two
    tower_layer: int = -2  # hidden state read from the tower

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            raise ValueError(f"LLaVA projector {self.projector!r}: expected one of {', '.join(PROJECTORS)}")
        states = self.vision.layers + 1
        if not -states <= self.tower_layer < states:
            raise ValueError(
                f"LLaVA tower_layer {self.tower_layer}: expected one of the tower's {states} states"
            )


class Llava(nn.Module):
    """Image and instruction -> hidden state of the last token, or text."""

    def __init__(self, cfg: LlavaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tower = CLIPVision(cfg.vision)
        layers = [nn.Linear(cfg.vision.width, cfg.llama.width)]
        if cfg.projector == "mlp2x_gelu":
            layers += [nn.GELU(), nn.Linear(cfg.llama.width, cfg.llama.width)]
        self.projector = nn.Sequential(*layers)
        self.llama = Llama(cfg.llama)

    def forward(
        self, pixels: Tensor, ids: Sequence[Tensor], extra: Tensor | None = None, layers: int | None = None
    ) -> Tensor:
        """Last hidden state (B, C) of each prompt.

        Args:
            pixels: (B, 3, S, S), normalised by `models.clip_image`.
            ids, extra: see `splice`.
            layers: number of LLaMA's blocks to run; None = all.
        """
        embeds, lengths = self.splice(ids, self.encode_images(pixels), extra)
        return self.last_hidden(embeds, lengths, layers)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S), normalised by `models.clip_image` -> (B, N, C)."""
        patches = self.tower.hidden(pixels, self.cfg.tower_layer)[:, 1:]  # (B, N, W), without the class token
        return self.projector(patches)  # (B, N, C)

    def encode_each(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """`encode_images` of each (B, 3, S, S) on its own."""
        return [self.encode_images(x) for x in pixels]

    def splice(
        self, ids: Sequence[Tensor], image_features: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed each prompt with its image in place of IMAGE_TOKEN.

        Args:
            ids: B int64 vectors; ValueError unless each holds IMAGE_TOKEN exactly once.
            image_features: (B, N, C) of `encode_images`.
            extra: (B, 1, C) appended to each row, such as a learnable token.

        Returns: embeddings (B, T, C), right-padded with zeros, and lengths (B,) int64.
        """
        rows = []
        for i, row in enumerate(ids):
            at = (row == IMAGE_TOKEN).nonzero()  # (count, 1)
            if len(at) != 1:
                raise ValueError(f"prompt {i} holds {len(at)} image tokens: expected exactly one")
            head, tail = row[: at[0, 0]], row[at[0, 0] + 1 :]  # ids before and after the image
            parts = [self.llama.embed_tokens(head), image_features[i], self.llama.embed_tokens(tail)]
            if extra is not None:
                parts.append(extra[i])
            rows.append(torch.cat(parts))  # (T_i, C)
        lengths = torch.tensor([len(row) for row in rows], device=image_features.device)
        return pad_sequence(rows, batch_first=True), lengths  # (B, T, C), (B,)

    def last_hidden(self, embeds: Tensor, lengths: Tensor, layers: int | None = None) -> Tensor:
        """State after the final RMSNorm at each row's last valid position, (B, C).

        Args:
            embeds, lengths: see `splice`.
            layers: number of LLaMA's blocks to run; None = all.
        """
        return self.last_hidden_each([(embeds, lengths)], layers)[0]

    def last_hidden_each(
        self, rows: Sequence[tuple[Tensor, Tensor]], layers: int | None = None
    ) -> list[Tensor]:
        """`last_hidden` of each (embeds, lengths) on its own."""
        states = self.llama.each([embeds for embeds, _ in rows], layers)  # (B, T, C) each
        return [
            hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]  # (B, C)
            for hidden, (_, lengths) in zip(states, rows, strict=True)
        ]

    def generate(self, pixels: Tensor, ids: Sequence[Tensor], max_new: int) -> list[list[int]]:
        """Answer each prompt with at most max_new ids; see `forward` and `Llama.generate`."""
        embeds, lengths = self.splice(ids, self.encode_images(pixels))
        return self.llama.generate(embeds, lengths, max_new)
