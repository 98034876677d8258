"""The MLLM's embeddings on the disk: repeat queries with the same weights skip the MLLM.

One file of some kilobytes each, named by a hash of everything that its bits depend on. To clear the cache,
delete the folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from models.weights.loading import read_checkpoint, save_tensors
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.feature_decoder import MAX_MLLM_BATCH, FeatureDecoder, MLLMInput, instruction
from moma.sampling.interface import Runtime

VERSION = 1  # of the files, and of the computation: higher when the same inputs give other bits
NETWORKS = ("vision", "llava", "adapter")  # that the embeddings depend on


@dataclass(frozen=True)
class FeatureCache:
    """A folder of embeddings; it is made when the first one is kept."""

    folder: Path
    identity: Mapping[str, Any]  # all that the bits depend on beside the input; JSON
    method: MethodConfig
    dtype: torch.dtype

    @classmethod
    def of(cls, folder: Path, runtime: Runtime, method: MethodConfig) -> "FeatureCache":
        """The cache for a bundle's feature decoder on this machine.

        Args:
            folder: of the files.
            runtime: weights and machine.
            method: MoMA's config.
        """
        weights, device = runtime.weights, runtime.device
        identity = {
            "version": VERSION,
            "weights": {name: weights.hashes_of(name) for name in NETWORKS},
            "configs": {name: weights.networks[name]["config"] for name in NETWORKS},
            "tokenizer": sha256(weights.tokenizer("tokenizer.model").read_bytes()).hexdigest(),
            "pillow": PIL.__version__,  # resizes the image for the tower
            "mllm_layers": method.mllm_layers,
            "dtype": str(runtime.dtype),
            "torch": torch.__version__,
            "device": device.type,
            # Kernels, and with them the rounding, depend on the processor and on how the work is shared.
            "processor": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        }
        return cls(folder, identity, method, runtime.dtype)

    def path(self, one: MLLMInput) -> Path:
        """Where the embedding is, if it is there."""
        image = one.white
        asked = {
            "image": sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest(),
            "template": self.method.template,  # its text alone does not say whether a learnable token follows
            "text": instruction(one.word, one.prompt, self.method.template),
        }
        key = json.dumps({**self.identity, **asked}, sort_keys=True)
        return self.folder / f"{sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, one: MLLMInput) -> Tensor | None:
        """The embedding (1, E) on the CPU; None if it is not there or the file is damaged."""
        try:
            stored = {name: tensor.read() for name, tensor in read_checkpoint(self.path(one)).items()}
            embedding = stored["embedding"].clone()  # the file does not stay mapped
            whole = torch.equal(stored["digest"], _digest(embedding)) and embedding.dtype == self.dtype
            whole = whole and bool(embedding.isfinite().all())
        except (ValueError, KeyError, OSError):
            return None
        return embedding if whole else None

    def put(self, one: MLLMInput, embedding: Tensor) -> None:
        """Keep an embedding (1, E); does nothing where the folder cannot be written."""
        path, embedding = self.path(one), embedding.cpu()
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder, path.stem, {"embedding": embedding, "digest": _digest(embedding)})


def cached_features(
    inputs: Sequence[MLLMInput], cache: FeatureCache | None, load: Callable[[], FeatureDecoder]
) -> tuple[list[Tensor], str]:
    """An embedding (1, E) of each input, and where they come from, for people.

    Args:
        inputs: pairs of subject and prompt.
        cache: looked up first and added to; None = none.
        load: loads the decoder; called only if an embedding is missing, and nothing of it is kept.
    """
    found = [None if cache is None else cache.get(one) for one in inputs]
    missing = [i for i, embedding in enumerate(found) if embedding is None]
    if not missing:
        return found, f"kept in {cache.folder}"
    decoder = load()
    for start in range(0, len(missing), MAX_MLLM_BATCH):  # a run that is stopped keeps what it has
        group = missing[start : start + MAX_MLLM_BATCH]
        for i, embedding in zip(group, decoder.encode_features([inputs[i] for i in group]), strict=True):
            found[i] = embedding
            if cache is not None:
                cache.put(inputs[i], embedding)
    return found, decoder.how


def _digest(embedding: Tensor) -> Tensor:
    """sha256 of the values, uint8 (32,)."""
    values = embedding.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.tensor(list(sha256(values).digest()), dtype=torch.uint8)
