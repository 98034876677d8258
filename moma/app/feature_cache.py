"""The decoder's embeddings on the disk: the same question to the same weights needs no MLLM a second time.

A file of some kilobytes for each, named by a hash of everything that its bits depend on. To clear it, delete
the folder.
"""

import json
import os
import tempfile
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
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput, instruction
from moma.weights.bundle import LLAMA_TOKENIZER, Bundle

VERSION = 1  # of the files, and of the computation: higher when the same inputs give other bits
NETWORKS = ("vision", "llava", "adapter")  # that the decoder is made of


@dataclass(frozen=True)
class EmbeddingCache:
    """A folder of embeddings, which is made when the first one is kept."""

    folder: Path
    identity: Mapping[str, Any]  # all that the bits depend on beside the question; JSON
    method: MethodConfig
    dtype: torch.dtype
    entries: int = 4096  # the oldest beyond these are deleted: 16 MB on a disk with blocks of 4 KB

    @classmethod
    def of(
        cls, folder: Path, bundle: Bundle, method: MethodConfig, device: torch.device, dtype: torch.dtype
    ) -> "EmbeddingCache":
        """The cache in `folder` for a bundle's decoder on a device, in a dtype."""
        identity = {
            "version": VERSION,
            "weights": {name: bundle.networks[name]["sha256"] for name in NETWORKS},
            "configs": {name: bundle.networks[name]["config"] for name in NETWORKS},
            "tokenizer": sha256(bundle.tokenizer(*LLAMA_TOKENIZER).read_bytes()).hexdigest(),
            "pillow": PIL.__version__,  # resizes the image for the tower
            "mllm_layers": method.mllm_layers,
            "dtype": str(dtype),
            "torch": torch.__version__,
            "device": device.type,
            # Kernels, and with them the rounding, go by the processor and by how the work is shared.
            "processor": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        }
        return cls(folder, identity, method, dtype)

    def path(self, question: MLLMInput) -> Path:
        """Where the embedding is, if it is there."""
        image = question.white
        asked = {
            "image": sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest(),
            "template": self.method.template,  # its text alone does not say whether a learnable token follows
            "text": instruction(question.word, question.prompt, self.method.template),
        }
        key = json.dumps({**self.identity, **asked}, sort_keys=True)
        return self.folder / f"{sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, question: MLLMInput) -> Tensor | None:
        """The embedding (1, E) on the CPU; None if it is not there or the file is damaged."""
        try:
            stored = {name: tensor.read() for name, tensor in read_checkpoint(self.path(question)).items()}
            embedding = stored["embedding"].clone()  # the file does not stay mapped
            whole = torch.equal(stored["digest"], _digest(embedding)) and embedding.dtype == self.dtype
        except (ValueError, KeyError, OSError):
            return None
        return embedding if whole else None

    def put(self, question: MLLMInput, embedding: Tensor) -> None:
        """Keep an embedding (1, E); where the folder cannot be written, nothing happens."""
        path, embedding = self.path(question), embedding.cpu()
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as draft:
                save_tensors(Path(draft), path.stem, {"embedding": embedding, "digest": _digest(embedding)})
                os.replace(Path(draft) / path.name, path)
            kept = sorted(self.folder.glob("*.safetensors"), key=os.path.getmtime)
            for old in kept[: -self.entries]:
                old.unlink(missing_ok=True)


def embeddings(
    questions: Sequence[MLLMInput], cache: EmbeddingCache | None, decoder: Callable[[], FeatureDecoder]
) -> tuple[list[Tensor], str]:
    """An embedding (1, E) for each question, and where they come from, for people.

    decoder: loads it; called only if the cache lacks an embedding, and nothing of it is kept.
    """
    found = [None if cache is None else cache.get(question) for question in questions]
    missing = [i for i, embedding in enumerate(found) if embedding is None]
    if not missing:
        return found, f"kept in {cache.folder}"
    asked = decoder()
    for i, embedding in zip(missing, asked([questions[i] for i in missing]), strict=True):
        found[i] = embedding
        if cache is not None:
            cache.put(questions[i], embedding)
    return found, asked.how


def _digest(embedding: Tensor) -> Tensor:
    """sha256 of the values, uint8 (32,)."""
    values = embedding.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.tensor(list(sha256(values).digest()), dtype=torch.uint8)
