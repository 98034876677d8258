"""The methods, one file or folder each, and their registry.

To add a method, write its file and add a line to METHODS, or call `register` from a file of your own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moma.methods.ip_adapter import IPAdapterMethod, IPAdapterTraining
from moma.methods.mm_diff.method import MMDiff
from moma.methods.mm_diff.training import MMDiffTraining
from moma.methods.moma.method import MoMA
from moma.methods.moma.several_training import SeveralTraining
from moma.methods.moma.training import AdapterTraining, DecoderTraining
from moma.methods.reference_attention import ReferenceAttention
from moma.methods.text import TextToImage
from moma.sampling.config import SHOWN
from moma.sampling.interface import Method, Training


@dataclass(frozen=True)
class Entry:
    """A method under a name."""

    method: type[Method]
    title: str  # for people
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of its config, for ablations
    trainings: Mapping[str, type[Training]] = field(default_factory=dict)  # by stage, "" = the only


METHODS: dict[str, Entry] = {
    "moma": Entry(
        MoMA,
        "MoMA",
        trainings={"stage1": DecoderTraining, "stage2": AdapterTraining, "several": SeveralTraining},
    ),
    "ip-adapter": Entry(IPAdapterMethod, "IP-Adapter", trainings={"": IPAdapterTraining}),
    "mm-diff": Entry(MMDiff, "MM-Diff", trainings={"": MMDiffTraining}),
    "text": Entry(TextToImage, "text only"),
    "reference-attention": Entry(ReferenceAttention, "reference attention"),
    # The ablation of Table 3: how much of M_gen acts, the rest being 1.
    "half-mask": Entry(MoMA, "MoMA, half mask", {"m_gen_share": 0.5}),
    "no-mask": Entry(MoMA, "MoMA, no mask", {"m_gen_share": 0.0}),
}


def register(
    name: str,
    method: type[Method],
    title: str | None = None,
    *,
    trainings: Mapping[str, type[Training]] | None = None,
    **overrides: Any,
) -> None:
    """Add a method to the registry, so that every command and the Python API know it.

    Args:
        name: on the command line.
        method: its class.
        title: for people; None = the name.
        trainings: stage -> training, for `train.py NAME:STAGE`; "" for the only one, `train.py NAME`.
        overrides: fields of its config that are always set.

    Raises:
        ValueError: for a name that is taken.
        TypeError: for a method or a training that is no class of its kind.
    """
    for given, kind in ((method, Method), *((one, Training) for one in (trainings or {}).values())):
        if not (isinstance(given, type) and issubclass(given, kind)):
            raise TypeError(f"{given!r:.{SHOWN}}: expected a class derived from {kind.__name__}")
    if name in METHODS:
        raise ValueError(f"method {name!r}: is registered already")
    METHODS[name] = Entry(method, title or name, overrides, trainings or {})


def find_method(name: str) -> Entry:
    """The entry of a name; ValueError that lists the names for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"method {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def all_trainings() -> dict[str, tuple[str, type[Training]]]:
    """Every training by its name on the command line, METHOD or METHOD:STAGE, with its method's name."""
    return {
        f"{name}:{stage}" if stage else name: (name, training)
        for name, entry in METHODS.items()
        for stage, training in entry.trainings.items()
    }
