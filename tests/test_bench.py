"""The benchmark on a small UNet: both sides of every ratio compute the same."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models.unet import UNetConfig
from models.weights.loading import read_checkpoint, save_tensors
from models.weights.packed import can_pack, pack_weights
from moma.bench import __main__ as command
from moma.bench import flow, measure, step, training
from moma.bench.curves import curves, curves_image
from moma.bench.measure import Bench, BenchConfig, Part, Ratio
from moma.sampling.interface import Runtime
from moma.weights.bundle import Bundle
from tests.helpers import Rerun
from tests.tiny import TinyConfig, build_tiny_bundle

SMALL = BenchConfig(
    unet=UNetConfig(
        channels=(32, 64), depth=(1, 1), heads=(4, 4), context_dim=(16, 16), resnets=1, norm_groups=8
    ),
    size=128, repeats=1, text_tokens=9, peak=64, images=2, sizes=(64, 128), batches=(1, 2),
    shares=(0.2, 1.0), lengths=(2, 3),
)  # fmt: skip
CPU = torch.device("cpu")
BENCH = Bench(SMALL, Runtime(None, CPU, torch.float32))


@pytest.fixture(scope="module")
def networks() -> step.Networks:
    return step.make_networks(replace(BENCH, baseline="keeps the weights"))


def bench_of(folder: Path) -> Bench:
    """In bf16 with a bundle, whose images have 64 pixels."""
    return Bench(replace(SMALL, size=64), Runtime(Bundle.open(folder), CPU, torch.bfloat16))


def test_equation_3_is_the_same() -> None:
    assert step.equation_3(BENCH).error < 1e-5


def test_the_baseline_is_the_same(networks: step.Networks) -> None:
    """diffusers with the release's processors draws what our step draws; so it is the same work."""
    baseline = pytest.importorskip("tests.baseline")
    found = list(step.steps(replace(BENCH, baseline=baseline), networks))
    ratios = [x for x in found if isinstance(x, Ratio)]
    assert len(ratios) == 3 and all(r.error < 1e-4 for r in ratios[1:])
    one = step.make_step(networks, SMALL)
    with torch.no_grad():
        assert measure.relative_error(one.moma(), one.plain()) > 1e-2  # Eq. 3 does something here


@pytest.mark.slow  # trains
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_baseline_trains_the_same(dtype: torch.dtype) -> None:
    baseline = pytest.importorskip("tests.baseline")
    bench = Bench(SMALL, Runtime(None, CPU, dtype), baseline)
    ours = training.make_training(bench, batch=2)
    theirs = baseline.training(ours)
    assert ours.loss().item() == pytest.approx(
        theirs.loss().item(), rel=1e-4 if dtype == torch.float32 else 0.05
    )
    gradient = ours.gradient()
    assert gradient.abs().max() > 0
    if dtype == torch.float32:
        assert measure.relative_error(gradient, theirs.gradient()) < 1e-4
    found = list(training.training(bench))
    assert [type(x) for x in found] == [Part, Ratio, Ratio] and found[2].times > 1


def test_a_batch_is_its_images(networks: step.Networks) -> None:
    """The batch that the whole drawing is computed from has one row per image and half."""
    two = step.make_step(networks, SMALL, batch=2)
    whole = two.cond
    one = replace(
        whole,
        text=[(k[::2], v[::2]) for k, v in whole.text],
        label=whole.label[::2],
        context=[(k[::2], v[::2]) for k, v in whole.context],
        reference=[r.rows(slice(None, None, 2)) for r in whole.reference],  # one size: none is masked
        beta=whole.beta[::2],
        m_gen=whole.m_gen[:1],
    )
    first = replace(two, x=two.x[::2], t=two.t[::2], states=two.states[::2], cond=one)
    with torch.no_grad():
        assert measure.relative_error(two.moma()[::2], first.moma()) < 1e-4
    (part,) = flow.drawing(BENCH, networks)
    assert part.what == "MoMA step, 2 at once" and part.seconds > 0


def test_a_recorded_step_is_the_same(networks: step.Networks) -> None:
    recorder = Rerun()
    one = step.make_step(replace(networks, make_recorder=lambda: recorder), SMALL)
    assert recorder.recorded == 2  # a plain step, and MoMA's
    ratio = step.recorded(BENCH, one)
    assert ratio.error < 1e-5 and ratio.fast > 0 and len(recorder.replayed) > 2


def test_flow_is_the_sum_of_its_parts() -> None:
    seconds = {
        "reference pass": 1.0, "VAE, encode": 2.0, "VAE, decode": 3.0, "MoMA step, 2 at once": 4.0,
        "decoder, resident": 5.0,
    }  # fmt: skip
    parts = [Part(what, "fp32", s) for what, s in seconds.items()]
    found = [*parts, Ratio("MoMA step, release / ours", "fp32", 1.0, 10.0, 2.0)]
    bench = replace(BENCH, cfg=replace(SMALL, steps=10))
    (ratio,) = flow.flow(bench, found)
    assert ratio.fast == 5 + 2 + 1 + 10 * 4 + 2 * 3 and ratio.slow == 2 * (5 + 2 + 1 + 10 * 10 + 3)
    assert not list(flow.flow(bench, parts))  # nothing to compare with
    found[3] = Part("10 MoMA steps and their recording, 2 at once", "fp32", 50.0)
    (recorded,) = flow.flow(bench, found)
    assert recorded.fast == ratio.fast + 10  # all steps of a drawing, timed together


@pytest.mark.slow  # draws
def test_a_drawing_with_its_recordings(networks: step.Networks) -> None:
    recorders: list[Rerun] = []

    def make() -> Rerun:
        recorders.append(Rerun())
        return recorders[-1]

    bench = replace(BENCH, cfg=replace(SMALL, steps=8))
    (part,) = flow.drawing(bench, replace(networks, make_recorder=make))
    assert part.what == "8 MoMA steps and their recording, 2 at once"
    assert part.seconds > 0 and recorders[-1].recorded >= 1 and len(recorders[-1].replayed) > 1


@pytest.mark.slow  # builds and reads a bundle in every storage
def test_decoder_and_pipeline(tmp_path: Path) -> None:
    build_tiny_bundle(tmp_path / "tiny")
    bench = bench_of(tmp_path / "tiny")
    ratio, *rest = flow.decoder(bench)
    assert ratio.error == 0 and {p.what for p in rest} >= {"decoder, resident", "decoder, streamed"}
    if sys.platform == "linux":
        (memory,) = flow.pipeline(bench)
        assert 0.05 < memory.fast < 4 and memory.unit == "GiB"
    (tmp_path / "tiny" / "config.json").unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        list(flow.pipeline(bench))


def test_a_bundle_of_given_sizes(tmp_path: Path) -> None:
    flow.build_bundle(tmp_path / "made", 128, TinyConfig().networks)
    unet = Bundle.open(tmp_path / "made").build("unet")
    assert unet.conv_in.weight.dtype == torch.bfloat16 and unet.conv_in.weight.float().std() > 0.01


@pytest.mark.slow  # draws at many sizes
def test_curves(networks: step.Networks) -> None:
    points = list(curves(BENCH, networks))
    assert [(p.axis, p.x) for p in points] == [
        ("size", 64), ("size", 128), ("batch", 1), ("batch", 2), ("share", 0.2), ("share", 1.0), ("steps", 2),
        ("steps", 3),
    ]  # fmt: skip
    assert all(p.moma > 0 and p.plain > 0 for p in points)
    image = curves_image(points)
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert (30, 90, 170) in colours and (150, 180, 220) in colours


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_what_a_call_takes(tmp_path: Path) -> None:
    nbytes = 2**26
    found = measure.memory_of(lambda: [torch.ones(nbytes, dtype=torch.uint8) for _ in range(8)], CPU)
    assert 7 * nbytes < found < 9 * nbytes
    save_tensors(tmp_path, "file", {"x": torch.ones(nbytes, dtype=torch.uint8)})
    lazy = read_checkpoint(tmp_path / "file.safetensors")["x"]

    def use() -> None:
        values = lazy.read()
        values.max()
        time.sleep(20 * measure.POLL)

    for mapped in (False, True):
        assert (measure.memory_of(use, CPU, mapped) > 0.9 * nbytes) == mapped


def test_operations_of_packed_layers() -> None:
    if not can_pack(CPU, torch.float32):
        pytest.skip("this machine does not pack")
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    x = torch.zeros(2, 3, 8, 8)
    plain = measure.operations(lambda: layers(x))
    pack_weights(layers)
    assert plain == measure.operations(lambda: layers(x)) == 2 * 2 * 16 * (8 * 27 + 4 * 8)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command, "BenchConfig", lambda: SMALL)
    out = tmp_path / "new" / "bench.json"
    options = ["--dtype", "fp32", "--size", "128", "--repeats", "1", "--out", str(out)]
    assert command.run([*options, "--parts", "eq3", "step", "curves"]) == 0
    printed = capsys.readouterr().out
    assert "| Eq. 3" in printed and "| plain step | fp32" in printed and "| batch | 2 | fp32" in printed
    found = json.loads(out.read_text())
    assert found["ratios"][0]["dtype"] == "fp32" and len(found["points"]) == 8
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "500"], "--size 500"),
        (["--share", "2"], "--share 2"),
        (["--repeats", "0"], "--repeats 0"),
        (["--out", "numbers.png"], "--out numbers.png"),
        (["--bundle", "empty"], "empty"),
    ],
)
def test_refuses(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(command, "measured", lambda *args: pytest.fail("measured"))
    assert command.run(options) != 0
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_table_says_what_is_missed() -> None:
    found = command.tables([Ratio("a", "fp32", 2.0, 3.0, 1.0), Ratio("b", "fp32", 2.0, 3.0, 2.0)])
    assert "| 3.00 | at least 2.00: met |" in found and "| 1.50 | at least 2.00: **missed** |" in found


def test_in_turn_counts_each_side() -> None:
    calls: list[str] = []
    measure.in_turn(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert "".join(calls) == "abababab"


def test_the_square_has_its_share() -> None:
    assert step.square(replace(SMALL, size=512)).mean().item() == pytest.approx(SMALL.share, abs=0.02)
