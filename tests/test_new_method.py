"""A method from a fork's own file: drawn with, trained, exported, put into a bundle and drawn with again."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import moma
import sample
import train
from convert_weights import convert
from moma import METHODS, Bundle, Job, MoMA, SampleConfig, register
from moma.evaluate.options import parse_methods
from moma.methods.text import Subject
from tests.helpers import ROOT, image, mask
from tests.training_data import write_bundle, write_data

SOURCE = '''
"""Reference attention with a trained gain for each layer."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.attention import attention
from models.unet import attention_layers
from moma.methods import register
from moma.methods.reference_attention import RecordHook, ReferenceSubject
from moma.methods.text import TextConditioning, TextToImage, half
from moma.sampling.base import NETWORKS, Base
from moma.sampling.interface import DenoisingTraining, Export, StepInputs


@dataclass(frozen=True)
class GainSizes:
    start: float = 0.0


class Gain(nn.Module):
    def __init__(self, cfg, unet_cfg):
        super().__init__()
        self.cfg = cfg
        self.gain = nn.Parameter(torch.full((len(attention_layers(unet_cfg)),), cfg.start))


def keys_values(base, mean, label, added=None):
    t = torch.zeros(len(mean), device=mean.device, dtype=torch.long)
    return base.unet(mean * base.vae.cfg.scaling, t, label, RecordHook(), added)[1]


@dataclass(frozen=True, eq=False)
class GainConditioning(TextConditioning):
    layers: list  # of each self-attention, K and V of the reference
    gain: torch.Tensor

    def at(self, step, state):
        return StepInputs(self.text, self.added, self)

    def conditional(self):
        return replace(super().conditional(), layers=[(half(k), half(v)) for k, v in self.layers])

    def self_attn(self, layer, q, k, v, grid):
        return attention(q, k, v) + self.gain[layer] * attention(q, *self.layers[layer]), None

    def cross_attn(self, layer, q, k, v, grid):
        return attention(q, k, v), None


class GainedReference(TextToImage):
    subjects = range(1, 2)
    own_networks = {"gain": (GainSizes, Gain)}

    def __init__(self, base, gain, config):
        super().__init__(base, config)
        self.gain = gain

    @classmethod
    def load(cls, runtime, config):
        weights, base = runtime.weights, Base.load(runtime)
        if "gain" in weights.networks:
            gain = weights.build("gain", runtime.device, runtime.dtype).requires_grad_(False)
        else:  # untrained
            gain = Gain(GainSizes(), base.unet.cfg).to(runtime.device, runtime.dtype).requires_grad_(False)
        return cls(base, gain, config)

    def with_config(self, config):
        return type(self)(self.base, self.gain, config)

    @torch.no_grad()
    def encode_reference(self, reference, word, **options):
        base = self.base
        mean, _ = base.vae.encode(reference.image.to(base.device, base.dtype))
        return ReferenceSubject(word, reference, keys_values(base, mean, base.encode_text([word]).states))

    def condition(self, prepared, config):
        subjects = [one.job.subjects[0].layers for one in prepared]
        layers = [tuple(torch.cat(x * 2) for x in zip(*rows)) for rows in zip(*subjects)]
        return GainConditioning(*self.encode_texts(prepared, config), layers, self.gain.gain)


@dataclass(frozen=True)
class GainTrainingConfig:
    start: float = 0.0


class GainTraining(DenoisingTraining):
    Config = GainTrainingConfig
    about = "a gain for each layer"
    trained = ("network.gain",)

    def __init__(self, base, weights, config, method, seed):
        super().__init__(base, weights, config, method, seed)
        self.network = Gain(GainSizes(config.start), base.unet.cfg).to(base.device)

    def reference(self, batch):
        return keys_values(self.base, batch["ref_mean"].float(), batch["label"])

    def inputs(self, batch):
        hook = GainConditioning(batch["text"], None, self.reference(batch), self.network.gain)
        return StepInputs(batch["text"], None, hook)

    def subjects(self, batch, words, prompts):
        layers = self.reference(batch)
        return [
            ReferenceSubject(word, None, [(k[i : i + 1], v[i : i + 1]) for k, v in layers])
            for i, word in enumerate(words)
        ]

    def drawing(self):
        return GainedReference(self.base, self.network, self.method)

    def export(self):
        tensors = dict(self.network.named_parameters())
        return Export({"gain": (self.network.cfg, tensors)}, methods={"gained": {"absent_label": "ignore"}})


register("gained", GainedReference, "gained reference", trainings={"": GainTraining})
'''


@dataclass(frozen=True)
class Fork:
    """A folder with a bundle and data, and the method's module."""

    folder: Path
    module: object


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    folder = tmp_path_factory.mktemp("fork")
    (folder / "gained_reference.py").write_text(SOURCE, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("gained_reference")
        write_bundle(folder / "bundle")
        write_data(folder / "data", 6)
        yield Fork(folder, module)
    finally:
        sys.path.remove(str(folder))
        METHODS.pop("gained", None)
        sys.modules.pop("gained_reference", None)


def latents(bundle: Path, **config: object) -> torch.Tensor:
    pipe = moma.load(bundle, "gained", device="cpu", dtype="fp32", config=config)
    subject = pipe.encode_subject(image(0), mask(30), "cat")
    (result,) = pipe.run([Job(subject, "a cat in the snow", 0)], SampleConfig(steps=2))
    return result.latents


def test_draw_train_export_draw(fork: Fork) -> None:
    folder, out = fork.folder, fork.folder / "run"
    before = latents(folder / "bundle")
    assert "gain" not in Bundle.open(folder / "bundle").networks
    options = ["--bundle", folder / "bundle", "--data", folder / "data", "--out", out, "--steps", 3]
    options += ["--batch-size", 2, "--lr", 0.1, "--dtype", "fp32", "--device", "cpu", "--workers", 1]
    options += ["--cache", folder / "cache", "--set", "warmup=0", "--set", "validation_samples=2"]
    assert train.run(["gained", *map(str, options), "--set", "grid_steps=2"]) == 0
    assert (out / "samples" / "step-00000003.png").is_file()
    convert([out / "export"], folder / "trained", Bundle.open(folder / "bundle"), say=lambda text: None)
    trained = Bundle.open(folder / "trained")
    assert trained.state("gain")["gain"].abs().min() > 0
    assert trained.method_config("gained").absent_label == "ignore"
    after = latents(folder / "trained")
    assert after.isfinite().all() and not torch.allclose(before, after, atol=1e-3)
    # A later bundle keeps the network and what its method needs.
    convert([], folder / "later", trained, llm_bits=8, say=lambda text: None)
    torch.testing.assert_close(latents(folder / "later"), after)


def test_every_command_offers_it(fork: Fork) -> None:
    assert not fork.folder.is_relative_to(ROOT)
    args = sample.parse_args(["--method", "gained", "--ref", "cat.png", "--prompt", "a cat"])
    assert args.method == "gained"
    args = train.parse_args(["gained", "--bundle", "weights", "--data", "data", "--set", "start=0.5"])
    assert args.command == "gained" and args.set == [("start", 0.5)]
    assert "gained" in parse_methods(["gained"], fork.folder / "bundle")


@pytest.mark.parametrize(
    "wrong", [{"method": 3}, {"method": Subject}, {"method": MoMA, "trainings": {"": MoMA}}]
)
def test_what_is_no_method_is_refused_at_once(wrong: dict) -> None:
    with pytest.raises(TypeError, match="expected a class derived from"):
        register("wrong", **wrong)
    assert "wrong" not in METHODS


@pytest.mark.slow  # a process of its own
def test_the_launcher_of_the_readme_draws(tmp_path: Path) -> None:
    """In a copy of the repository's root, where it lies beside sample.py."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(import moma, mine, sample; [^`]*)`", readme)
    for name in ("models", "moma", "weights", "examples", "sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine.py").write_text("from moma.methods.text import TextToImage as Mine\n")
    (tmp_path / "draw.py").write_text(line)
    options = shlex.split(
        "--method mine --ref examples/cat.png --prompt 'a cat' --weights weights/mini --steps 1"
    )
    done = subprocess.run([sys.executable, "draw.py", *options], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "out" / "a-cat-seed0.png").is_file(), done.stderr
