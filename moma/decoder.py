"""The generative image-feature decoder (Sec. 3.2): the MLLM looks at the subject, reads what picture is
wanted, and its state at one last token becomes an image embedding.

Letters: B pairs of subject and prompt, N patches, C width of the MLLM, E embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.llava import Llava
from models.tokenizers import LlamaTokenizer
from moma.adapter import Adapter
from moma.config import MethodConfig


def decode_embedding(
    llava: Llava,
    adapter: Adapter,
    tokenizer: LlamaTokenizer,
    image_features: Tensor,
    instructions: Sequence[str],
    method: MethodConfig,
) -> Tensor:
    """image_features (B, N, C) of `Llava.encode_images`, B texts of `moma.prompts.instruction` -> (B, E).

    One forward pass, no generation: the state after the final norm at the last token, through the mapping.
    The last token is the text's own `*` (template "release") or the adapter's learnable one ("paper").
    Official: MoMA_main_modal.forward_MLLM.
    """
    device = image_features.device
    ids = [torch.tensor(tokenizer.encode_with_image(text), device=device) for text in instructions]
    extra = None
    if method.template == "paper":
        extra = adapter.token.expand(len(ids), 1, -1)  # (B, 1, C)
    embeds, lengths = llava.splice(ids, image_features, extra)  # (B, T, C), (B,)
    return adapter.mapping(llava.last_hidden(embeds, lengths, method.mllm_layers))  # (B, E)
