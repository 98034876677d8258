"""What many tests share: images and masks, comparisons, and short ways into the pipeline."""

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import sample
from moma import DEFAULT, Bundle, Job, MethodConfig, MoMASubject, Pipeline, Runtime, SampleConfig
from moma.methods.moma.conditioning import MoMAConditioning
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.methods.text import TextConditioning
from moma.sampling.cuda_graphs import Output, Run
from moma.sampling.memory import Toggle
from moma.training.task import Batch, Task

ROOT = Path(__file__).parents[1]
MINI = ROOT / "weights" / "mini"
QUICK = SampleConfig(steps=3, height=64, width=64)
# 16x16 latents, so that a bucket of queries is a part of the finest grid; a step without M_gen, then one each
# that is eager, recorded and replayed.
GRAPHED = SampleConfig(steps=4, height=128, width=128)


def image(seed: int) -> Image.Image:
    """120x90 pixels of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def mask(radius: int) -> Image.Image:
    """A disc in the middle of 120x90 pixels."""
    y, x = np.ogrid[:90, :120]
    return Image.fromarray(np.uint8(255) * ((y - 45) ** 2 + (x - 60) ** 2 < radius**2))


def far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2)


def same(a: Tensor, b: Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def latents(pipe: Pipeline, jobs: list[Job], config: SampleConfig = QUICK) -> Tensor:
    return torch.cat([result.latents for result in pipe.run(jobs, config)])


def embed(pipe: Pipeline, subject: MoMASubject, prompt: str) -> Tensor:
    """MoMA's embedding (1, E) of one subject and prompt."""
    return pipe.method.embed([MLLMInput(subject.reference.white, subject.word, prompt)])[0]


def feature_decoder(
    folder: str | Path, dtype: str = "fp32", method: MethodConfig = DEFAULT, stream: Toggle = "on"
) -> FeatureDecoder:
    """MoMA's feature decoder alone, on the CPU."""
    runtime = Runtime.choose(Bundle.open(folder), "cpu", dtype, stream=stream)
    return FeatureDecoder.load(runtime, method, None, ("adapter",))


def with_embedding(subject: MoMASubject, prompt: str, embedding: Tensor) -> MoMASubject:
    """The subject with a given embedding for a prompt."""
    return replace(subject, features={prompt: embedding})


def condition(pipe: Pipeline, jobs: list[Job], config: SampleConfig) -> MoMAConditioning:
    """The conditioning of one batch."""
    with torch.no_grad():
        return pipe.method.condition(pipe.method.prepare(jobs), config.sized(pipe.image_size))


def text_states(pipe: Pipeline, *prompts: str) -> Tensor:
    with torch.no_grad():
        return pipe.base.encode_text(prompts).states


def text_only(pipe: Pipeline, states: Tensor) -> TextConditioning:
    """Plain Stable Diffusion on text states (2B, T, C)."""
    with torch.no_grad():
        return TextConditioning(pipe.base.unet.text_kv(states), None)


@dataclass
class Rerun:
    """As CUDA does it: recording computes nothing, a replay runs the same code and overwrites its outputs."""

    recorded: int = 0
    replayed: list[int] = field(default_factory=list)  # which recording, one entry per replay

    def warm_up(self, run: Run) -> Output:
        return run()

    def record(self, run: Run) -> tuple[Output, Callable[[], None]]:
        eps, records = run()
        outputs = torch.full_like(eps, torch.nan), [torch.full_like(r, torch.nan) for r in records]
        number, self.recorded = self.recorded, self.recorded + 1

        def replay() -> None:
            self.replayed.append(number)
            new_eps, new_records = run()
            for old, new in zip((outputs[0], *outputs[1]), (new_eps, *new_records), strict=True):
                old.copy_(new)

        return outputs, replay


def fork(code: Callable[[], object]) -> int:
    """Run code in a copy of this process; the copy's id."""
    pid = os.fork()
    if pid == 0:
        try:
            code()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def exit_status(pid: int) -> int:
    """A copy's exit status, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def first_version(settings: str) -> str:
    """A record's JSON as the first version of the format has it, of at most one subject."""
    data = json.loads(settings)
    subjects = data.pop("subjects")
    image = subjects[0]["images"][0] if subjects else {"file": None, "mask": None, "segmented": None}
    first = {"subject": subjects[0]["word"] if subjects else "", "reference": image["file"]}
    first |= {"mask": image["mask"], "segmented": image["segmented"]}
    return json.dumps(data | {"version": 1} | first, ensure_ascii=False)


def run_sample(*args: object) -> int:
    """sample.py in this process."""
    return sample.run([str(arg) for arg in args])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(task: Task, batch: Batch, count: int, lr: float) -> list[float]:
    """Adam without decay, so that a parameter whose gradient is zero stays as it is."""
    optimizer, losses = torch.optim.Adam(trained(task.model).values(), lr), []
    for _ in range(count):
        loss = task.model(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
