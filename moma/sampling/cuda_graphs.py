"""CUDA graphs: the kernels of a UNet call, recorded once and launched again by one call from Python.

A step of Stable Diffusion launches many hundreds of kernels, and for a few small images a GPU waits for
Python between them. A graph (torch.cuda.graphs) always computes on the same memory, so whatever changes from
step to step is copied there first, and whatever else decides which kernels run is part of its key.
`GraphedUNet` is the bookkeeping and runs on every device; all that needs a GPU is `CudaRecorder`.

Letters: R rows of a UNet call, Z latent channels, h w latents, T text tokens.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from models.attention import attention
from models.unet import AttentionHook, Grid, UNet, attention_grids
from moma.sampling.interface import TextInput
from moma.sampling.memory import Toggle

# Part of a dtype's digits in which a replay must agree with the eager call. A library may choose another
# algorithm for a recording, which rounds elsewhere; what reads wrong memory is wrong from the first digit.
DIGITS = 0.5

Output = tuple[Tensor, list[Tensor]]  # eps (R, Z, h, w) and the hook's attention maps
Run = Callable[[], Output]


@runtime_checkable
class RecordableHook(AttentionHook, Protocol):
    """An attention hook whose UNet calls can be recorded: what changes from step to step lies in tensors.

    `prepare` comes first. After it nothing waits for the device, and two hooks of one `key`, with `inputs` of
    the same shapes, start the same kernels on other values of `inputs` alone. Attention maps are tensors of
    floats. `GraphedUNet` runs hooks that do not have these methods eagerly.
    """

    def prepare(self, grids: Sequence[Grid]) -> None:
        """Compute whatever shapes depend on, which may synchronise with the device; grids: of all layers."""

    def key(self) -> Hashable:
        """All that decides which kernels run and on which memory, besides `inputs`."""

    def inputs(self) -> list[Tensor]:
        """The tensors that change from step to step."""

    def with_inputs(self, inputs: Sequence[Tensor]) -> AttentionHook:
        """The same hook with other tensors instead of `inputs`."""


class ConstantHook:
    """A `RecordableHook` that has no tensors that change from step to step. Its self-attention is the plain
    one unless a subclass replaces it."""

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v), None

    def prepare(self, grids: Sequence[Grid]) -> None:
        pass

    def key(self) -> Hashable:
        return id(self)

    def inputs(self) -> list[Tensor]:
        return []

    def with_inputs(self, inputs: Sequence[Tensor]) -> Self:
        return self


class Recorder(Protocol):
    """How one batch's calls are recorded: `CudaRecorder`, or a stand-in of tests."""

    def warm_up(self, run: Run) -> Output:
        """Run eagerly, as a recording needs it before."""

    def record(self, run: Run) -> tuple[Output, Callable[[], None]]:
        """The memory of a recording's outputs, and what fills it. RuntimeError if it cannot be recorded."""


class CudaRecorder:
    """torch.cuda.graphs, by its rules: a side stream for warm-up and capture, one memory pool.

    Graphs may share a pool: one runs at a time, and each graph's outputs live as long as it does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Run) -> Output:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = run()
        current.wait_stream(self.stream)
        return outputs

    def record(self, run: Run) -> tuple[Output, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),  # back to it if the capture fails
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            outputs = run()
        return outputs, graph.replay


def choose_recorder(choice: Toggle, device: torch.device) -> Callable[[], Recorder] | None:
    """What makes recorders on this device; None = all runs eagerly. "auto" records on CUDA devices."""
    return partial(CudaRecorder, device) if choice != "off" and device.type == "cuda" else None


@dataclass(frozen=True, eq=False)
class CudaGraph:
    """A recorded UNet call."""

    inputs: list[Tensor]  # read by the replay
    hook: AttentionHook | None  # holds what the replay reads besides, so that its memory is not given away
    outputs: Output  # written by the replay
    replay: Callable[[], None]

    def __call__(self, inputs: Sequence[Tensor]) -> Output:
        """The call for other inputs. The caller may keep what comes back: the next replay spares it."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        eps, maps = self.outputs
        return eps.clone(), [attention_map.clone() for attention_map in maps]


class GraphedUNet:
    """A UNet for the steps of one batch, called like it, under torch.no_grad, and with the same results.

    The first call of a kind (hook's key, text, shapes) runs eagerly: some kinds come once. The second one
    runs eagerly too, and is recorded and compared. From the third one on it is a replay. If recording fails
    or a replay differs, a warning says so and everything runs eagerly from then on.
    """

    def __init__(self, unet: UNet, make_recorder: Callable[[], Recorder] | None) -> None:
        """make_recorder: `choose_recorder`'s; None = the UNet as it is."""
        self.unet, self.make_recorder = unet, make_recorder
        self.reset()

    def reset(self) -> None:
        """Drop all graphs and their memory: they hold the conditioning of their batch."""
        self.met: set[Hashable] = set()
        self.graphs: dict[Hashable, CudaGraph] = {}
        self.constants: list[Any] = []  # kept, so that their ids stay theirs
        self.recorder = None if self.make_recorder is None else self.make_recorder()

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: TextInput,
        hook: AttentionHook | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """The UNet's call. text and added are constants of a recorded call: others make another kind of call.

        Args:
            x: (R, Z, h, w).
            t: (R,).
            text: as `UNet.forward` takes it.
            hook: likewise.
            added: likewise.

        Returns:
            eps (R, Z, h, w) and the hook's attention maps.
        """
        call = partial(_call, self.unet, text, added)
        if self.recorder is None or not isinstance(hook, RecordableHook | None):
            return call(hook, [x, t])
        inputs, key = [x, t], (id(text), id(added))
        if hook is not None:
            hook.prepare(attention_grids(self.unet.cfg, (x.shape[-2], x.shape[-1])))
            inputs, key = inputs + hook.inputs(), (*key, hook.key())
        kind = (key, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if kind in self.graphs:
            return self.graphs[kind](inputs)
        if kind in self.met:
            return self._record(kind, inputs, hook, call)
        self.met.add(kind)
        self.constants.append((text, added))
        return call(hook, [x, t])

    def _record(
        self,
        kind: Hashable,
        inputs: Sequence[Tensor],
        hook: RecordableHook | None,
        call: Callable[..., Output],
    ) -> Output:
        """The eager result; the graph is kept if it gives the same."""
        own = [tensor.clone() for tensor in inputs]

        def run() -> Output:
            return call(None if hook is None else hook.with_inputs(own[2:]), own[:2])

        expected = self.recorder.warm_up(run)
        try:
            graph = CudaGraph(own, hook, *self.recorder.record(run))
            if agree(graph(inputs), expected):
                self.graphs[kind] = graph
                return expected
            problem = "a replay differs from the eager step"
        except RuntimeError as error:
            problem = f"a step cannot be recorded ({' '.join(str(error).split())})"
        warnings.warn(f"CUDA graphs are off for the rest of this drawing: {problem}", stacklevel=2)
        self.make_recorder = None
        self.reset()
        return expected


def _call(
    unet: UNet, text: TextInput, added: Tensor | None, hook: AttentionHook | None, inputs: Sequence[Tensor]
) -> Output:
    x, t = inputs
    return unet(x, t, text, hook, added)


def agree(found: Output, expected: Output) -> bool:
    """Whether each tensor's largest difference is small beside its largest value (`DIGITS`); NaN is not."""
    pairs = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    return all(
        bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** DIGITS * b.abs().max()) for a, b in pairs
    )
