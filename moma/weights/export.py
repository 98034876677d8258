"""A bundle's context branch as an IP-Adapter file that other programs load, such as diffusers.

The file holds the projector and each layer's K, V of the context tokens. Eq. 3 and M_gen are no part of such
files: what draws with one attends to the context tokens everywhere, and not to the reference.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.unet import UNetConfig
from models.weights.keymaps import convert, ip_adapter
from models.weights.loading import in_memory, write_safetensors
from moma.methods.moma.adapter import AdapterConfig
from moma.weights.bundle import Bundle

SUFFIX, TOKENS = ".safetensors", AdapterConfig().tokens  # diffusers knows these files with as many tokens


def public_tensors(state: Mapping[str, Tensor], unet: UNetConfig) -> dict[str, Tensor]:
    """Projector and context K, V (`moma.methods.moma.adapter.Adapter`) under their public names."""
    down, up = sum(unet.depth) * unet.resnets, sum(unet.depth) * (unet.resnets + 1)
    own = {name: x for name, x in state.items() if name.startswith(("projector.", "context."))}
    names = convert(ip_adapter(down, up, unet.mid_depth), own, "out").names
    return {name: change(own[old]).contiguous() for name, (old, change) in names.items()}


def check_export(folder: Path, out: Path) -> Bundle:
    """The bundle; ValueError for one without a fitting adapter, and for a file that cannot be written."""
    bundle = Bundle.open(folder)
    if (tokens := bundle.config("adapter").tokens) != TOKENS:
        raise ValueError(f"{folder}: {tokens} context tokens, expected {TOKENS} as other programs do")
    if out.suffix != SUFFIX:
        raise ValueError(f"--out {out}: expected a name that ends in {SUFFIX}")
    if out.exists():
        raise ValueError(f"--out {out}: exists; choose another name, or delete it")
    return bundle


def export_ip_adapter(folder: Path, out: Path) -> None:
    """Write the file.

    Args:
        folder: of a bundle with MoMA's adapter.
        out: a new file.

    Raises:
        ValueError: as `check_export`, with nothing written.
    """
    bundle = check_export(folder, out)
    tensors = public_tensors(bundle.state("adapter"), bundle.config("unet"))
    out.parent.mkdir(parents=True, exist_ok=True)
    lazy = {name: in_memory(tensor, out) for name, tensor in tensors.items()}
    write_safetensors(out.parent, out.stem, lazy)
