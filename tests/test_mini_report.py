"""The classifiers of MoMA-mini, the report's arithmetic, and whole reports on networks that draw noise."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

import moma
from moma.evaluate.estimates import estimate
from moma.evaluate.options import parse
from moma.methods.text import TextConditioning
from moma.mini import adapter_numbers, approximations, rated, report
from moma.mini.asked import Drawn, duos, generate, singles
from moma.mini.config import ReportConfig
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.sampler import denoise
from moma.weights.bundle import Bundle
from moma.world import classifiers, world
from moma.world.measures import iou, retrieved
from tests.helpers import ROOT
from tests.ip_adapter_case import build_ip_bundle
from tests.tiny import build_tiny_bundle

SMALL = world.WorldConfig(identities=40, unseen_identities=30)


def test_intervals_hold_known_values():
    low = estimate(torch.tensor([True] * 9 + [False]))
    assert low == pytest.approx((0.9, 0.5958, 0.9821, 10), abs=1e-4)  # Wilson's, from his formula by hand
    assert estimate(torch.ones(20, dtype=torch.bool))[1] == pytest.approx(0.8389, abs=1e-4)
    assert estimate(torch.full((5,), 3.0)) == (3.0, 3.0, 3.0, 5)
    values = torch.arange(400.0)
    found = estimate(values)
    width = 1.96 * values.std().item() / 20
    assert found.mean == 199.5 and found.low == pytest.approx(199.5 - width, abs=1.5)
    assert estimate(values) == found


def test_overlap():
    a = torch.zeros(3, 4, 4, dtype=torch.bool)
    b = a.clone()
    a[0, :2], b[0, 1:3] = True, True  # 8 cells each, 4 of them shared
    a[1, 0], b[1, 0] = True, True
    assert iou(a, b).tolist() == pytest.approx([4 / 12, 1.0, 0.0])


def test_retrieval_of_perfect_and_permuted_embeddings():
    own = torch.eye(12)  # (N, E)
    gallery = torch.stack([torch.roll(own, -i, dims=0)[:11] for i in range(12)])  # own first, ten others
    assert retrieved(own, gallery).all()
    assert not retrieved(own.roll(1, dims=0), gallery).any()
    assert not retrieved(torch.ones(12, 12) / 12**0.5, gallery).any(), "a tie is no hit"


def shot(images):
    return Drawn(images, torch.zeros(len(images), 1, 1))


def test_background_change_and_tint():
    truth = classifiers.Truth(*[torch.zeros(1)] * 5)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 3:5, 3:5] = True
    seen = classifiers.Prediction(truth, mask, torch.zeros(1, 2))
    grey = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    subject = grey.clone()
    subject[..., 4:12, 4:12] = 255  # within the subject and one cell around it
    red = torch.tensor([[1.0, 0.0, 0.0]])
    still = rated.background((shot(grey), seen), (shot(subject), seen), red, margin=1)
    assert still["change"].item() == still["tint"].item() == 0
    tinted = grey.clone()
    tinted[:, 0] += 30
    found = rated.background((shot(grey), seen), (shot(tinted), seen), red, margin=1)
    assert found["change"].item() == pytest.approx(10) and found["tint"].item() == pytest.approx(10)
    away = rated.background((shot(tinted), seen), (shot(grey), seen), red, margin=1)
    assert away["tint"].item() == pytest.approx(-10)


def test_what_is_asked_for_is_unseen_and_elsewhere():
    cfg = ReportConfig()
    asked = singles(60, [None], cfg)
    assert asked == singles(60, [None], cfg)
    assert len({(one.shown[0].label, one.shown[0].number) for one in asked}) == 60
    first = cfg.world.identities + cfg.world.unseen_identities
    for one in asked:
        (shown,), (wanted,) = one.shown, one.wanted
        assert shown.number == wanted.number >= first
        assert shown.scene != wanted.scene and shown.material is None
        near = {world.neighbour(wanted, step, cfg.world).number for step in range(12)}
        assert len(near) == 12 and min(near) >= first
    new = [world.held_out(one.wanted[0].label, one.wanted[0].scene, None) for one in asked]
    assert 30 <= sum(new) < 40, "half, and those that are drawn by chance"
    made_of = [one.wanted[0].material for one in singles(8, world.MATERIALS, cfg)]
    assert made_of == [*world.MATERIALS] * 2
    assert min(one.wanted[0].number for one in singles(8, [None], replace(cfg, split="val"))) < first


def test_duos_are_two_classes_in_the_order_of_naming():
    cfg = ReportConfig()
    for one in duos(20, cfg):
        labels = [spec.label for spec in one.wanted]
        assert labels == [spec.label for spec in one.shown] and labels[0] != labels[1]
        assert [spec.number for spec in one.wanted] == [spec.number for spec in one.shown]
        assert one.prompt.index(labels[0]) < one.prompt.index(labels[1])
        assert not any(spec.material for spec in (*one.shown, *one.wanted))


def test_two_subjects_are_found_missed_and_swapped(monkeypatch):
    """Classifiers that read what is written into a view: label, colour and embedding of its subject."""
    cfg = replace(ReportConfig(), distractors=1, world=SMALL)
    asked = duos(3, cfg)
    true = classifiers.truth_of([spec for one in asked for spec in one.wanted], SMALL)
    eye = torch.eye(6)

    def classify(probes, views, batch=256):
        rows = views[:, 0, 0, 0].long()  # of the subjects; 255: nothing is there
        there, rows = rows < 6, rows.clamp(max=5)
        colours = views[:, 1, 0, 0].long().clamp(max=5)
        truth = true._replace(label=true.label[rows], colours=true.colours[colours], scene=true.scene[rows])
        mask = there[:, None, None].expand(-1, 4, 4)
        return classifiers.Prediction(truth, mask, eye[rows])

    monkeypatch.setattr(classifiers, "classify", classify)
    monkeypatch.setattr(classifiers, "gallery", lambda *_: torch.stack([eye, eye.roll(1, 0)], dim=1))
    monkeypatch.setattr(classifiers, "views", lambda images, *_: images)  # (N, 2, 3, 1, 1)

    def measured(*views):
        images = torch.tensor(views, dtype=torch.uint8).view(3, 2, 2)  # of each view: subject, colours
        images = torch.cat([images, images[..., :1]], dim=2)[..., None, None]
        probes = classifiers.Probes()
        found = rated.measure_duos({"": Drawn(images, torch.zeros(3, 1, 1))}, asked, probes, cfg)[""]
        return [found[name].tolist() for name in ("both", "each", "swapped")]

    yes, no = [True] * 6, [False] * 6
    right = (0, 0), (1, 1), (3, 3), (2, 2), (4, 4), (5, 5)  # the second image: in the other order
    assert measured(*right) == [[True] * 3, yes, no]
    assert measured((0, 1), (1, 0), *right[2:]) == [[True] * 3, yes, [True, True, *no[2:]]]
    assert measured((0, 0), (255, 1), *right[2:]) == [[False, True, True], [True, False, *yes[2:]], no]


def test_classifiers_learn_and_come_back_from_their_file(tmp_path):
    found = world.render_many(range(24), "train", SMALL)
    cfg = classifiers.ProbeConfig(held_out=8)
    rows = world.specs_of(found)
    assert [what.label for what in rows] == [world.spec(i, "train", SMALL).label for i in range(24)]
    truth = classifiers.truth_of(rows, SMALL)._asdict()
    images, masks = classifiers.stacked(found["image"]), classifiers.stacked(found["mask"][..., None])
    pairs = {"images": images, "masks": masks, **truth}
    torch.manual_seed(0)
    twice = {name: torch.stack([values, values], dim=1) for name, values in pairs.items()}
    task = classifiers.ProbeTask(classifiers.Probes(cfg), twice)
    labels = task.rows["label"][task.groups[task.groups[:, 0].argsort()]]  # (groups, 8, 2)
    assert len(task.groups.unique()) == 24 and (labels.diff(dim=1) >= 0).all(), "like classes stay together"
    batch, again = (task.assemble(torch.arange(2), torch.arange(2)) for _ in range(2))
    assert torch.equal(batch["images"], again["images"])
    assert not torch.equal(*batch["images"].unbind(dim=1))
    optimizer, losses = torch.optim.AdamW(task.model.parameters(), lr=3e-3), []
    for _ in range(8):
        loss = task.model(batch)
        assert loss.shape == (16,)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.8 * losses[0]
    task.export(tmp_path)
    path = tmp_path / "probes.safetensors"
    assert path.stat().st_size < 2e6
    loaded = classifiers.load_probes(path)
    first, second = (classifiers.classify(probes, images) for probes in (task.model.probes, loaded))
    assert torch.allclose(first.embedding, second.embedding, atol=0.02)
    unseen = world.render_many(range(20), "val", SMALL)
    known = classifiers.accuracy(loaded, unseen, SMALL, distractors=2)
    assert set(known) == {"class", "scene", "material", "pattern", "colour", "mask", "identity"}
    with pytest.raises(ValueError, match="Probes"):
        classifiers.load_probes(path, classifiers.ProbeConfig(hidden=8))


def test_contrast_is_lowest_for_matching_pairs():
    eye = torch.eye(4)
    right, wrong = torch.stack([eye, eye], dim=1), torch.stack([eye, eye.roll(1, 0)], dim=1)
    shown = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert classifiers.contrast(right, shown, 0.1).max() < 0.01
    bad = classifiers.contrast(wrong, shown, 0.1)
    assert bad[:2].min() > 5 and bad[3] == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny bundle with untrained classifiers."""
    folder = tmp_path_factory.mktemp("report")
    build_tiny_bundle(folder / "plain")
    networks = (*Bundle.open(folder / "plain").configs,)
    build_ip_bundle(folder / "plain", folder / "tiny", networks, trained=True)
    torch.manual_seed(0)
    classifiers.save_probes(folder / "probes.safetensors", classifiers.Probes())
    return folder


def options(place, *more):
    paths = {"--bundle": "tiny", "--probes": "probes.safetensors", "--work": "work"}
    paths |= {"--page": "docs/mini.md"}
    given = [text for name, path in paths.items() for text in (name, str(place / path))]
    sizes = [part for name in ("pairs", "textures", "duos") for part in (f"--{name}", "1")]
    sizes += ["--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    return [*given, *sizes, "--variant", f"again={place / 'tiny'}@moma,m_gen_inside=one", *more]


@pytest.mark.slow  # two processes, the whole report
def test_whole_report_by_two_ranks_is_idempotent_and_goes_on(place, capsys):
    (place / "docs").mkdir()
    page = place / "docs/mini.md"
    page.write_text(f"before\n{report.MARKS[0]}\nstale\n{report.MARKS[1]}\nafter\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "moma.mini.report", *options(place)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    text = page.read_text()
    images = {p.name: p.read_bytes() for p in (place / "docs/mini").iterdir()}
    titles = ("Two subjects", "Guidance", "Table 1", "Table 3", "Table 4", "Fig. 8")
    assert all(name in text for name in (*titles, "IP-Adapter", "half", "| again |", "missed"))
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    sheets = ("methods", "duos", "strength", "textures", "masking")
    assert set(images) == {*(f"{name}.png" for name in sheets), "numbers.json"}
    with Image.open(place / "docs/mini/masking.png") as sheet:
        assert np.asarray(sheet).std() > 0
    numbers = json.loads(images["numbers.json"])
    assert all(0 <= row["class"][0] <= 1 for row in numbers["Methods (Table 1)"].values())

    drawn = sorted((place / "work").iterdir())
    times = {path: path.stat().st_mtime_ns for path in drawn[1:]}
    drawn[0].unlink()  # as if it had been killed there
    capsys.readouterr()
    assert report.run(options(place)) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1, "only the missing batch is drawn"
    assert {path: path.stat().st_mtime_ns for path in drawn[1:]} == times
    assert page.read_text() == text
    assert {p.name: p.read_bytes() for p in (place / "docs/mini").iterdir()} == images


@pytest.mark.slow  # six drawings
def test_settings_differ_where_they_should(place):
    cfg = ReportConfig()
    cfg = replace(cfg, sample=replace(cfg.sample, steps=2))
    pairs = singles(1, [None], cfg)
    settings = report.plan(place / "tiny", {}, cfg)["scenes"]
    drawn, share = {}, "MoMA, unconditional β = 0.5"
    names = (report.TEXT, report.IP_ADAPTER, report.REFERENCE, report.NONE, report.MAIN, share, "half", "off")
    for name in names:
        setting = settings[name]
        pipe = moma.load(setting.bundle, setting.method, device="cpu", dtype="fp32", config=setting.config)
        drawn[name] = setting.draw(pipe, pairs, cfg)
    assert len({found.images.numpy().tobytes() for found in drawn.values()}) == len(drawn)
    assert report.RELEASE not in settings, "the bundle makes M_gen as the release does"
    text = moma.load(place / "tiny", "text", device="cpu", dtype="fp32")
    difference = generate(text, pairs, cfg).images.int() - drawn[report.TEXT].images.int()
    assert difference.abs().max() <= 1  # of 255: attention that also gives the maps rounds otherwise
    assert drawn[report.TEXT].m_gen.any() and not drawn[report.IP_ADAPTER].m_gen.any()


# --- moma.mini.adapter_numbers --------------------------------------------------------------------------


def test_errors_inside_subjects(place, capsys):
    cfg = adapter_numbers.AdapterNumbersConfig(images=3, timesteps=(300, 700), batch=2)
    pipes = {name: moma.load(place / "tiny", name, device="cpu", dtype="fp32") for name in ("text", "moma")}
    text = adapter_numbers.errors(pipes["text"], 0.0, False, cfg)
    assert text.shape == (2, 3) and (text > 0).all()
    whole = adapter_numbers.errors(pipes["text"], 0.0, False, replace(cfg, batch=3))
    torch.testing.assert_close(text, whole, rtol=1e-4, atol=1e-5)
    ways = (0.0, False), (1.0, False), (1.0, True)
    found = [adapter_numbers.errors(pipes["moma"], *way, cfg) for way in ways]
    assert all((a - b).abs().max() > 1e-4 for a, b in combinations([text, *found], 2))
    given = ["--bundle", str(place / "tiny"), "--methods", "moma", "ip-adapter", "--images", "1"]
    assert adapter_numbers.run(given) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 3 + 2


# --- moma.mini.approximations --------------------------------------------------------------------------


def approximate(place, *more):
    paths = {"--bundle": "tiny", "--probes": "probes.safetensors", "--page": "approximations.md"}
    given = [text for name, path in paths.items() for text in (name, str(place / path))]
    sizes = ["--pairs", "1", "--steps", "5", "--device", "cpu", "--dtype", "fp32"]
    return approximations.run([*given, *sizes, *more])


@pytest.mark.slow  # the whole report
def test_approximations_are_measured(place, capsys):
    page = place / "approximations.md"
    page.write_text(f"before\n{report.MARKS[0]}\nstale\n{report.MARKS[1]}\nafter\n")
    assert approximate(place) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "--steps 5" in text and capsys.readouterr().out.strip() in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    named = approximations.settings(5)
    settings, less = rows[2 : 2 + len(named)], rows[-len(named) + 1 :]
    assert [row[0].removeprefix("| ") for row in settings] == [*named]
    assert [row[0].removeprefix("| ") for row in less] == [*named][1:]
    assert [row[1] for row in settings[:4]] == ["1", "1", "0.4", "0.4"] and settings[0][2] == "1"
    differences = {name: row[3].partition(" ")[0] for name, row in zip(named, settings, strict=True)}
    assert differences.pop("DDIM, 5 steps: the baseline") == ""
    assert differences.pop("subject term at t < 950") == "0"  # these weights' own
    assert all(float(value) > 0 for value in differences.values())


def test_unet_rows_are_those_of_the_sampler():
    rows = []

    def unet(x, t, text, hook, added):
        rows.append(len(x))
        return x, []

    for setting in approximations.settings(50).values():
        rows.clear()
        sample = replace(ReportConfig().sample, **setting.sample)
        schedule = solver_steps(ScheduleConfig(), sample.steps, sample.solver)
        cond, x = TextConditioning([], None), torch.zeros(3, 1, 1, 1)
        steps = list(denoise(unet, cond, schedule, x, 7.5, sample.solver, sample.guidance_interval))
        assert len(steps) == sample.steps and sum(rows) == 3 * approximations.unet_rows(sample)


def test_approximations_less_the_baseline():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    shots = {
        name: approximations.Timed(Drawn(images + brighter, torch.zeros(2, 1, 1)), seconds)
        for name, brighter, seconds in (("base", 10, [2.0, 4.0, 1.0]), ("fast", 4, [1.0, 1.0, 0.9]))
    }
    hits = {"base": [True, False], "fast": [False, False]}
    values = {name: dict.fromkeys(approximations.MEASURES, torch.tensor(hit)) for name, hit in hits.items()}
    shown, less = approximations.compared(values, shots)
    assert "difference" not in shown["base"] and shown["fast"]["difference"].tolist() == [6, 6]
    assert list(less) == ["fast"] and less["fast"]["mask"].tolist() == [-1, 0]
    named = {"base": approximations.Setting(), "fast": approximations.Setting({"steps": 10})}
    costs = approximations.costs(shots, named, ReportConfig().sample)
    assert costs == {
        "UNet rows": {"base": "1", "fast": "0.2"},
        "seconds": {"base": "1", "fast": "0.50 (0.25 to 0.90)"},
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bundle", "nowhere"], "nowhere"),
        (["--probes", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--pairs", "0"], "--pairs"),
        (["--steps", "4"], "--steps 4"),
        (["--steps", "1000"], "1000"),
        (["--page", "{}/tiny/config.json"], "config.json"),
    ],
)
def test_mistakes_in_approximations_take_one_line(place, capsys, monkeypatch, more, words):
    """Before anything is drawn."""
    monkeypatch.delattr(approximations, "draw_batch")
    assert approximate(place, *(text.replace("{}", str(place)) for text in more)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("approximations: error: ") and words in error[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bundle", "nowhere"], "nowhere"),
        (["--probes", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--variant", "folder"], "folder"),
        (["--pairs", "0"], "--pairs"),
    ],
)
def test_mistakes_take_one_line(place, capsys, more, words):
    assert report.run(options(place, *more)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("report: error: ") and words in error[0]


def test_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "mini.md"
    page.write_text("own words")
    with pytest.raises(ValueError, match=page.name):
        report.rewrite(page, "text")
    assert page.read_text() == "own words"


@pytest.mark.parametrize("text", ["again", "a=b@", "a=b,c", "=b"])
def test_a_variant_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="NAME=BUNDLE"):
        report.variant(text)


def test_the_shipped_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = report.parser_of("x", "\n\nx", report.SHIPPED, {}).parse_args([])
    assert found.bundle.is_dir() and found.probes.is_file()
    options = parse(["--world"], "x")
    assert options.methods["moma"].is_dir() and options.scorers.is_dir()
