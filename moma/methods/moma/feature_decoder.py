"""The generative image-feature decoder (Sec. 3.2): the MLLM looks at the subject, reads what image is
wanted, and its state at one last token becomes an image embedding.

Letters: B pairs of subject and prompt, N patches, C width of the MLLM, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from models.clip_image import clip_image
from models.llava import Llava
from models.tokenizers import LlamaTokenizer
from moma.methods.moma.adapter import Adapter
from moma.methods.moma.config import MethodConfig

# Questions that are answered in one reading of streamed weights. Each keeps features, input and hidden states
# in memory, at most 15 MB for LLaVA-7B in bf16; the two blocks beside them take 810 MB.
MAX_MLLM_BATCH = 16


@dataclass(frozen=True, eq=False)
class MLLMInput:
    """What the decoder is asked for: an embedding of this subject in the image that the prompt wants."""

    white: Image.Image  # RGB, the subject on white (`Reference.white`)
    word: str  # what it is
    prompt: str


@dataclass(frozen=True, eq=False)
class FeatureDecoder:
    """The networks that answer, on one device and in one dtype; llava may be streamed
    (models/weights/stream.py)."""

    llava: Llava
    adapter: Adapter
    tokenizer: LlamaTokenizer
    method: MethodConfig
    how: str = "resident"  # for people: whether llava is streamed, and why

    @torch.no_grad()
    def __call__(self, questions: Sequence[MLLMInput]) -> list[Tensor]:
        """An embedding (1, E) for each question. It does not depend on the other questions, bit for bit."""
        if not questions:
            return []
        weight = self.adapter.mapping.down_proj.weight
        images = {id(q.white): q.white for q in questions}  # each is looked at once
        side = self.llava.cfg.vision.image_size
        pixels = [clip_image(p, side)[None].to(weight.device, weight.dtype) for p in images.values()]
        features = dict(zip(images, self.llava.encode_each(pixels), strict=True))  # (1, N, C) each
        found = []
        for start in range(0, len(questions), MAX_MLLM_BATCH):
            rows = [self._row(q, features[id(q.white)]) for q in questions[start : start + MAX_MLLM_BATCH]]
            states = self.llava.last_hidden_each(rows, self.method.mllm_layers)  # (1, C) each
            found += [self.adapter.mapping(state) for state in states]  # (1, E) each
        return found

    def _row(self, question: MLLMInput, features: Tensor) -> tuple[Tensor, Tensor]:
        return self._spliced(features, [instruction(question.word, question.prompt, self.method.template)])

    def embed(self, features: Tensor, instructions: Sequence[str]) -> Tensor:
        """features (B, N, C) of `Llava.encode_images`, B texts of
        `moma.methods.moma.feature_decoder.instruction` -> (B, E).

        One forward pass, no generation: the state after the final norm at the last token, through the
        mapping; with gradients. Official: MoMA_main_modal.forward_MLLM.
        """
        embeds, lengths = self._spliced(features, instructions)
        state = self.llava.last_hidden(embeds, lengths, self.method.mllm_layers)  # (B, C)
        return self.adapter.mapping(state)  # (B, E)

    def _spliced(self, features: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The MLLM's input for arguments as in `embed`: embeddings (B, T, C), lengths (B,).

        The last token is the text's own `*` (template "release") or the adapter's learnable one ("paper").
        """
        device = features.device
        ids = [torch.tensor(self.tokenizer.encode_with_image(text), device=device) for text in instructions]
        extra = None
        if self.method.template == "paper":
            extra = self.adapter.token.expand(len(ids), 1, -1)  # (B, 1, C)
        return self.llava.splice(ids, features, extra)  # (B, T, C), (B,)


# "release" ends in the token `*`, whose hidden state becomes the image feature (the released code's text,
# double dot included); "paper" (Sec. 3.2) ends where a learnable token is appended.
INSTRUCTIONS = {
    "release": (
        "USER: <image>\n A photo of a {subject}. Describe a new image of the same {subject} in: {prompt}."
        " ASSISTANT: *"
    ),
    "paper": "USER: <image>\n An image of {subject}. Describe {prompt} ASSISTANT:",
}


def instruction(subject: str, prompt: str, template: Literal["release", "paper"] = "release") -> str:
    """The text for the multimodal LLM; `<image>` marks where the image's features go."""
    return INSTRUCTIONS[template].format(subject=subject, prompt=prompt)
