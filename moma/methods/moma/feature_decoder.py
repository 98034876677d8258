"""The generative image-feature decoder (Sec. 3.2): the MLLM sees the subject and reads the prompt, and its
hidden state at the last token becomes an image embedding.

Letters: B pairs of subject and prompt, N patches, C width of the MLLM, T tokens, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor

from models.clip_image import clip_image
from models.llava import Llava
from models.tokenizers import LlamaTokenizer
from moma.methods.moma.adapter import Adapter
from moma.methods.moma.config import MethodConfig
from moma.sampling.finite import check_finite
from moma.sampling.interface import Runtime
from moma.sampling.memory import choose_saving, free_memory

# "release" ends in the token `*`, whose hidden state becomes the image feature (the released code's text,
# double dot included); "paper" (Sec. 3.2) ends where a learnable token is appended.
INSTRUCTIONS = {
    "release": (
        "USER: <image>\n A photo of a {subject}. Describe a new image of the same {subject} in: {prompt}."
        " ASSISTANT: *"
    ),
    "paper": "USER: <image>\n An image of {subject}. Describe {prompt} ASSISTANT:",
}
# Inputs per reading of streamed weights. Each keeps features, input and hidden states in memory, a fiftieth
# of the two blocks of LLaVA-7B that lie beside them.
MAX_MLLM_BATCH = 16


def instruction(subject: str, prompt: str, template: Literal["release", "paper"] = "release") -> str:
    """The text for the multimodal LLM; `<image>` marks where the image's features go.

    Args:
        subject: its word.
        prompt: the user's text.
        template: of INSTRUCTIONS.
    """
    return INSTRUCTIONS[template].format(subject=subject, prompt=prompt)


@dataclass(frozen=True, eq=False)
class MLLMInput:
    """One pair of subject and prompt."""

    white: Image.Image  # RGB, the subject on white (`Reference.white`)
    word: str  # what it is
    prompt: str


@dataclass(frozen=True, eq=False)
class FeatureDecoder:
    """LLaVA and the adapter's mapping, on one device and in one dtype."""

    llava: Llava  # resident, or streamed (models/weights/stream.py)
    adapter: Adapter
    tokenizer: LlamaTokenizer
    method: MethodConfig
    how: str = "resident"  # for people: whether llava is streamed, and why

    @classmethod
    def load(
        cls, runtime: Runtime, method: MethodConfig, adapter: Adapter | None, beside: Sequence[str]
    ) -> Self:
        """The decoder of a bundle.

        Args:
            runtime: weights and machine.
            method: MoMA's config.
            adapter: if it is loaded already.
            beside: the bundle's networks that are in memory together with LLaVA.
        """
        weights, device, dtype = runtime.weights, runtime.device, runtime.dtype
        needed = weights.nbytes(("llava", *beside), dtype)
        streamed, reason = choose_saving(runtime.stream, needed, free_memory(device))
        llava = weights.stream(device, dtype) if streamed else weights.build("llava", device, dtype)
        adapter = adapter or weights.build("adapter", device, dtype).eval().requires_grad_(False)
        how = f"{'streamed' if streamed else 'resident'}: {reason}"
        return cls(llava.eval().requires_grad_(False), adapter, weights.llama_tokenizer(), method, how)

    @torch.no_grad()
    def encode_features(self, inputs: Sequence[MLLMInput]) -> list[Tensor]:
        """An embedding (1, E) of each input. It does not depend on the other inputs, bit for bit."""
        if not inputs:
            return []
        weight = self.adapter.mapping.down_proj.weight
        images = {id(one.white): one.white for one in inputs}  # each is encoded once
        side = self.llava.cfg.vision.image_size
        pixels = [clip_image(x, side)[None].to(weight.device, weight.dtype) for x in images.values()]
        features = dict(zip(images, self.llava.encode_each(pixels), strict=True))  # (1, N, C) each
        found = []
        for start in range(0, len(inputs), MAX_MLLM_BATCH):
            rows = [
                self._splice(
                    features[id(one.white)], [instruction(one.word, one.prompt, self.method.template)]
                )
                for one in inputs[start : start + MAX_MLLM_BATCH]
            ]
            states = self.llava.last_hidden_each(rows, self.method.mllm_layers)  # (1, C) each
            found += [self.adapter.mapping(state) for state in states]  # (1, E) each
        check_finite("feature decoder", *found)
        return found

    def embed(self, features: Tensor, instructions: Sequence[str]) -> Tensor:
        """features (B, N, C) of `Llava.encode_images` and B texts of `instruction` -> (B, E), with gradients.

        One forward pass, no generation: the state after the final norm at the last token, through the
        mapping. Official: MoMA_main_modal.forward_MLLM.
        """
        embeds, lengths = self._splice(features, instructions)
        state = self.llava.last_hidden(embeds, lengths, self.method.mllm_layers)  # (B, C)
        return self.adapter.mapping(state)  # (B, E)

    def _splice(self, features: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The MLLM's input embeddings (B, T, C) and their lengths (B,).

        The last token is the text's own `*` (template "release") or the adapter's learnable one ("paper").
        """
        device = features.device
        ids = [torch.tensor(self.tokenizer.encode_with_image(text), device=device) for text in instructions]
        extra = None
        if self.method.template == "paper":
            extra = self.adapter.token.expand(len(ids), 1, -1)  # (B, 1, C)
        return self.llava.splice(ids, features, extra)  # (B, T, C), (B,)
