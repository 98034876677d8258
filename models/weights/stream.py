"""LLaVA whose weights stay in their files: each LLaMA block is read when it is needed, then dropped.

MoMA's feature decoder is one prefill: every block runs once and leaves neither logits nor keys, so that the
weights need not be in memory together. A thread reads the next block while one computes. Results equal those
of the resident networks bit for bit, as blocks, functions and casts are the same (tests/test_stream.py).

Letters as in models/llava.py.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models.llama import Llama, LlamaConfig
from models.llava import Llava, LlavaConfig
from models.weights.loading import LazyTensor, below, does_not_fit, sized_by, state_dict_mismatch
from models.weights.quant import quantise_as_configured

PAGE = 4096  # bytes, the smallest page in use: touching one byte per page reads a mapped file

Weights = dict[str, Tensor]


class StreamedLlama(Llama):
    """`Llama` without gradients that holds at most two blocks in memory."""

    def __init__(
        self, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Read the embedding's header and group the tensors by block.

        Args:
            cfg: sizes, without lm_head.
            tensors: the state of the network, by name.
            device: where the blocks run.
            dtype: of the floating-point parameters.
        """
        with torch.device("meta"):
            super().__init__(cfg)
            quantise_as_configured(self)
        self.embed_tokens = EmbeddingRows(tensors["embed_tokens.weight"], dtype)
        self.blocks = [below(f"layers.{i}.", tensors) for i in range(cfg.layers)]
        self.final_norm = below("norm.", tensors)
        self.device, self.dtype = device, dtype
        # one stream for all reads, as memory that a stream has used is not given to another one
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def forward(self, embeds: Tensor, layers: int | None = None) -> Tensor:
        return self.each([embeds], layers)[0]

    @torch.no_grad()
    def each(self, embeds: Sequence[Tensor], layers: int | None = None) -> list[Tensor]:
        """As `Llama.each`; reads every block once, whatever the number of sequences."""
        states, ropes, count = list(embeds), [self.rope(x) for x in embeds], self.depth(layers)

        def apply(i: int, weights: Weights) -> None:
            for n, rope in enumerate(ropes):
                states[n] = functional_call(self.layers[i], weights, (states[n], rope))  # (B, T, C)

        one_after_another(self.blocks[:count], apply, self.device, self.dtype, self.copies)
        norm = fetch(self.final_norm, self.device, self.dtype)
        return [functional_call(self.norm, norm, (x,)) for x in states]  # (B, T, C) each


class EmbeddingRows(nn.Module):
    """nn.Embedding that reads only the rows it looks up (of a mapped file, the pages that hold them)."""

    def __init__(self, table: LazyTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) int64 -> (T, C) on the device of ids."""
        return F.embedding(ids.cpu(), self.table.read()).to(ids.device, self.dtype)  # (T, C)


class StreamedLlava(Llava):
    """`Llava` without lm_head, with a `StreamedLlama`.

    Tower and projector are read whole, and dropped before LLaMA's blocks are read: ViT-L/14 is smaller than
    two blocks of a 7B LLaMA.
    """

    def __init__(
        self, cfg: LlavaConfig, tensors: Mapping[str, LazyTensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """ValueError, before any value is read, unless the tensors fit the network.

        Args:
            cfg: sizes, without lm_head.
            tensors: the state of the network, by name.
            device: where the network runs.
            dtype: of the floating-point parameters.
        """
        with sized_by(len(tensors)):
            super().__init__(cfg)
            quantise_as_configured(self.llama)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if problems := state_dict_mismatch(wanted, tensors):
            where = ", ".join(sorted({str(tensor.file) for tensor in tensors.values()}))
            raise ValueError(does_not_fit(where, type(self).__name__, problems))
        stored = {name for name, _ in self.named_buffers()}  # codes and scales keep their dtype
        tensors = {name: replace(tensor, castable=name not in stored) for name, tensor in tensors.items()}
        self.front = {name: t for name, t in tensors.items() if name.startswith(("tower.", "projector."))}
        self.llama = StreamedLlama(cfg.llama, below("llama.", tensors), device, dtype)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.encode_each([pixels])[0]

    @torch.no_grad()
    def encode_each(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """As `Llava.encode_each`; reads the weights once and drops them."""
        with torch.device("meta"):
            front = Llava(replace(self.cfg, llama=replace(self.cfg.llama, layers=0)))
        weights = fetch(self.front, self.llama.device, self.llama.dtype)
        front.load_state_dict(weights, strict=False, assign=True)  # the rest of its LLaMA stays on meta
        return [front.encode_images(x) for x in pixels]  # (B, N, C) each


def one_after_another(
    groups: Sequence[Mapping[str, LazyTensor]],
    use: Callable[[int, Weights], None],
    device: torch.device,
    dtype: torch.dtype,
    copies: torch.cuda.Stream | None = None,
) -> None:
    """Call use(i, weights of group i) for each group in turn, while a thread reads the next one.

    Args:
        groups: tensors by name; at most two groups are in memory.
        use: must not keep the weights.
        device: where the weights go.
        dtype: of the floating-point weights.
        copies: on CUDA, the stream that copies through pinned memory while another one computes.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_read_ahead, groups[0], device, dtype, copies)
        for i in range(len(groups)):
            weights = coming.result()
            if i + 1 < len(groups):
                coming = thread.submit(_read_ahead, groups[i + 1], device, dtype, copies)
            use(i, weights)
            if copies is not None:  # the memory of `weights` may be reused as soon as they are dropped
                torch.cuda.current_stream(device).synchronize()
            del weights


def fetch(group: Mapping[str, LazyTensor], device: torch.device, dtype: torch.dtype) -> Weights:
    """The values of a group.

    Args:
        group: tensors by name.
        device: to copy to.
        dtype: of floating-point values.
    """
    return {name: _cast(tensor, dtype).to(device) for name, tensor in group.items()}


def _read_ahead(
    group: Mapping[str, LazyTensor],
    device: torch.device,
    dtype: torch.dtype,
    copies: torch.cuda.Stream | None,
) -> Weights:
    """`fetch` that has read and copied everything when it returns."""
    if copies is not None:
        with torch.cuda.stream(copies):
            pinned = ((name, _cast(tensor, dtype).pin_memory()) for name, tensor in group.items())
            weights = {name: values.to(device, non_blocking=True) for name, values in pinned}
        copies.synchronize()
        return weights
    weights = fetch(group, device, dtype)
    if device.type == "cpu":  # a tensor that needs no cast is only mapped from its file so far
        for values in weights.values():
            values.reshape(-1).view(torch.uint8).numpy()[::PAGE].max(initial=0)
    return weights


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    values = tensor.read()
    return values.to(dtype) if tensor.castable and values.is_floating_point() else values
