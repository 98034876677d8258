"""The study with people: what is shown, what a page keeps secret, votes, and their table."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from moma.app.record import save_png
from moma.evaluate.estimates import crossed_estimate
from moma.evaluate.study import QUESTIONS, Question, run
from moma.evaluate.votes import FORMAT, VERSION, Trial, Vote, agreement, read_votes, share, table
from tests.browser import chromium

METHODS, SUBJECTS = ("moma", "text", "half-mask"), ("cat-1", "dog-2", "car-3", "teapot-4")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation's folder: each image in a colour of its method, which its own settings name."""
    folder, scores = tmp_path_factory.mktemp("evaluation"), []
    for number, subject in enumerate(SUBJECTS):
        for photo in range(2):
            (place := folder / "world" / "photos" / subject).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (40 * number, 200, 80 * photo)).save(place / f"0{photo}.png")
        for m, method in enumerate(METHODS):
            for kind, prompt in (("context", "a <b>{}</b> in snow"), ("texture", "a golden {}")):
                file = Path(method, subject, f"{kind}.png")
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                save_png(folder / file, Image.new("RGB", (32, 32), (80 * m, 60 * number, 0)), None, method)
                scores.append(
                    {"method": method, "subject": subject, "label": subject[:-2], "kind": kind, "number": 0}
                    | {"prompt": prompt.format(subject[:-2]), "file": str(file), "values": {}}
                )
    (folder / "scores.json").write_text(json.dumps({"scores": scores}))
    return folder


def make(evaluation: Path, out: Path, *options: str) -> dict:
    assert run(["--from", str(evaluation), "--out", str(out), "--trials", "8", *options]) == 0
    return json.loads((out / "key.json").read_text())


def page_data(out: Path) -> dict:
    (text,) = re.findall(r'id="data">(.*)</script>', (out / "index.html").read_text())
    return json.loads(text)


def answers(key: dict, rater: str, prefers: dict[str, float], seed: int) -> dict:
    """Votes of a rater who chooses methods with these weights."""
    rng, votes = random.Random(seed), []
    for trial in key["trials"]:
        for question in key["questions"]:
            images = list(trial["methods"])
            weights = [prefers[trial["methods"][image]] for image in images]
            votes.append(
                {"trial": trial["id"], "question": question, "choice": rng.choices(images, weights)[0]}
            )
    head = {name: key[name] for name in ("format", "version", "study")}
    return head | {"rater": rater, "votes": votes}


def write(folder: Path, *raters: dict) -> list[str]:
    files = [folder / f"{i}.json" for i in range(len(raters))]
    for file, votes in zip(files, raters, strict=True):
        file.write_text(json.dumps(votes))
    return list(map(str, files))


# --- the page ----------------------------------------------------------------------------------------


def test_the_page_tells_raters_no_method(evaluation: Path, tmp_path: Path) -> None:
    make(evaluation, tmp_path)
    text = (tmp_path / "index.html").read_text()
    data = page_data(tmp_path)
    assert len(data["trials"]) == 8 and all(len(trial["images"]) == 3 for trial in data["trials"])
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched
    values = re.findall(r': "([^"]*)"', json.dumps(data))
    assert not set(METHODS) & set(values) and METHODS[2] not in text
    images = [image for trial in data["trials"] for image in trial["images"].values()]
    assert all(image.startswith("data:image/jpeg;") for image in images)  # without the PNG's own settings
    first = Counter(next(iter(trial["images"].values())) for trial in data["trials"])
    assert len(first) > len(SUBJECTS)  # not always the same method first


def test_questions_are_asked_of_their_kind_of_prompts(evaluation: Path, tmp_path: Path) -> None:
    make(evaluation, tmp_path, "--group", "2")
    for trial in page_data(tmp_path)["trials"]:
        names = [question["name"] for question in trial["questions"]]
        assert ("texture editing" in names) == ("golden" in trial["prompt"]) != ("prompt fidelity" in names)
        assert "{" not in str([question["text"] for question in trial["questions"]])


def test_subjects_kinds_and_pairs_are_spread_evenly(evaluation: Path, tmp_path: Path) -> None:
    make(evaluation, tmp_path, "--group", "2", "--trials", "6")
    key = json.loads((tmp_path / "key.json").read_text())
    pairs = Counter(frozenset(trial["methods"].values()) for trial in key["trials"])
    assert sorted(pairs.values()) == [2, 2, 2]
    assert max(Counter(trial["subject"] for trial in key["trials"]).values()) <= 2
    assert sum("golden" in trial["prompt"] for trial in page_data(tmp_path)["trials"]) == 3


@pytest.mark.parametrize("path", sorted(QUESTIONS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_questions_are_read(path: Path) -> None:
    assert Question.read(path)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '[{"name": "a"}]', '[{"name": "a", "text": "?", "kinds": ["scene"]}]', '["a"]',
             '[{"name": "a", "text": "?"}, {"name": "a", "text": "!"}]', '[{"name": "a", "text": 3}]'],
)  # fmt: skip
def test_wrong_questions_are_refused(evaluation: Path, tmp_path: Path, text: str, capsys) -> None:
    (tmp_path / "q.json").write_text(text)
    options = ["--questions", str(tmp_path / "q.json"), "--out", str(tmp_path / "out")]
    assert run(["--from", str(evaluation), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--method", "moma"], ["--method", "nobody"], ["--trials", "9"], ["--trials", "0"],
                ["--dataset", "nowhere"], ["--questions", "nowhere.json"]],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_written(
    evaluation: Path, tmp_path: Path, options: list[str], capsys
) -> None:
    out = tmp_path / "out"
    assert run(["--from", str(evaluation), "--trials", "8", "--out", str(out), *options]) == 2
    assert options[1] in capsys.readouterr().err and not out.exists()


def test_pairs_are_told_from_photos_that_are_elsewhere(evaluation: Path, tmp_path: Path, capsys) -> None:
    pairs, pair = tmp_path / "pairs", "-and-".join(SUBJECTS[:2])
    scores = json.loads((evaluation / "scores.json").read_text())
    for row in scores["scores"]:
        row["subject"] = pair
    pairs.mkdir()
    (pairs / "scores.json").write_text(json.dumps(scores))
    args = ["--from", str(pairs), "--trials", "1", "--out", str(tmp_path / "out"), "--dataset"]
    for photos, told in ((evaluation / "world" / "photos", "--pairs"), (tmp_path / "no", "--dataset")):
        assert run([*args, str(photos)]) == 2
        printed = capsys.readouterr().err
        assert told in printed and pair in printed and not (tmp_path / "out").exists()


def test_a_study_is_not_overwritten(evaluation: Path, tmp_path: Path) -> None:
    make(evaluation, tmp_path)
    assert run(["--from", str(evaluation), "--out", str(tmp_path), "--trials", "8"]) == 2


# --- votes -------------------------------------------------------------------------------------------


def test_a_known_preference_is_found(evaluation: Path, tmp_path: Path) -> None:
    key = make(evaluation, tmp_path)
    prefers = {"moma": 0.6, "text": 0.1, "half-mask": 0.3}
    files = write(tmp_path, *(answers(key, f"r{i}", prefers, i) for i in range(40)))
    votes = read_votes([Path(file) for file in files], tmp_path / "key.json")
    for method, weight in prefers.items():
        found = share(votes, method)
        assert found.low < weight < found.high and found.high - found.low < 0.15
    assert run(["--collect", *files, "--out", str(tmp_path)]) == 0
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert len(rows[0].split("|")) == 3 + len(key["questions"])
    assert {row.split("|")[1].strip() for row in rows if row.startswith("| ")} > set(METHODS)


def votes_of(*rows: tuple[str, str, str | None]) -> list[Vote]:
    """(rater, trial, method) each, of two methods."""
    trials = {name: Trial(name, name, {"x": "a", "y": "b"}) for _, name, _ in rows}
    return [Vote(rater, trials[trial], "q", method) for rater, trial, method in rows]


def test_agreement_is_one_for_the_same_answers_and_none_for_one_rater() -> None:
    same = votes_of(*((r, t, m) for r in "rs" for t, m in (("1", "a"), ("2", "b"), ("3", "a"))))
    assert agreement(same) == 1
    assert math.isnan(agreement(same[:3]))


def test_agreement_is_krippendorffs() -> None:
    """His worked example of nominal data: 10 units, two raters, alpha = 0.095 (Computing Krippendorff's
    Alpha-Reliability, 2011, section A)."""
    first, second = "0100000010", "1110010000"
    both = (("r", first), ("s", second))
    answers = [(rater, str(i), answer) for rater, row in both for i, answer in enumerate(row)]
    assert agreement(votes_of(*answers)) == pytest.approx(0.095, abs=5e-4)


def test_a_vote_for_none_counts_in_equal_parts() -> None:
    votes = votes_of(("r", "1", "a"), ("r", "2", None))
    assert share(votes, "a").mean == 0.75 and share(votes, "b").mean == 0.25
    assert "1 of 2" in table(votes)


def test_intervals_resample_raters_and_subjects() -> None:
    """Where all votes of a rater agree, many trials make no interval narrower than few raters do."""
    raters, trials = [i // 100 for i in range(400)], [i % 100 for i in range(400)]
    values = torch.tensor([float(rater % 2) for rater in raters])
    found = crossed_estimate(values, raters, trials)
    assert found.mean == 0.5 and found.high - found.low > 0.8
    found = crossed_estimate(values, trials, raters)
    assert found.high - found.low > 0.8


@pytest.mark.parametrize("change", [
    {"study": "0"}, {"version": 2}, {"votes": [{"trial": "x", "question": "overall", "choice": None}]},
    {"votes": [{"trial": 0, "question": "no such", "choice": None}]}, {"votes": 3}, {"votes": ["x"]},
    {"votes": [{"trial": 0, "question": "overall", "choice": "no such"}]}, {"votes": []},
    {"votes": [{"trial": 0, "question": "overall", "choice": None}] * 2},
    {"votes": [{"trial": 0, "question": "overall", "choice": ["list"]}]},
])  # fmt: skip
def test_foreign_votes_are_refused(evaluation: Path, tmp_path: Path, change: dict, capsys) -> None:
    key = make(evaluation, tmp_path)
    if isinstance(change.get("votes"), list):
        rows = [r | {"trial": key["trials"][0]["id"]} if isinstance(r, dict) and r["trial"] == 0 else r
                for r in change["votes"]]  # fmt: skip
        change = {"votes": rows}
    files = write(tmp_path, answers(key, "r", dict.fromkeys(METHODS, 1.0), 0) | change)
    capsys.readouterr()
    assert run(["--collect", *files, "--out", str(tmp_path)]) == 2
    assert files[0] in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "table.md").exists()


def test_a_rater_votes_once(evaluation: Path, tmp_path: Path, capsys) -> None:
    key = make(evaluation, tmp_path)
    files = write(tmp_path, *[answers(key, "r", dict.fromkeys(METHODS, 1.0), 0)] * 2)
    assert run(["--collect", *files, "--out", str(tmp_path)]) == 2
    assert files[1] in capsys.readouterr().err


# --- in a browser ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 1440])
def test_raters_vote_in_a_browser(evaluation: Path, tmp_path: Path, width: int) -> None:
    """By key, click and touch; votes outlive the page, and the file says what was chosen."""
    key = make(evaluation, tmp_path, "--method", "moma", "--method", "text")
    methods = {image: method for trial in key["trials"] for image, method in trial["methods"].items()}
    with chromium() as browser:
        page = browser.new_context(viewport={"width": width, "height": 900}, has_touch=True).new_page()
        page.goto((tmp_path / "index.html").as_uri())
        total = page.evaluate("steps.length")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for i in range(total):
            if i == 3:
                page.reload()  # as after a crash
                assert page.evaluate("Object.keys(state.votes).length") == 3
            shown = page.evaluate("steps[state.at].images")
            assert page.locator("#choices img").count() == 2
            wanted = next(n for n, image in enumerate(shown) if methods[image] == "moma")
            if i == 1:
                page.keyboard.press("0")
                page.keyboard.press("ArrowLeft")  # and changes their mind
            button = page.locator("#choices button").nth(wanted)
            if i % 3 == 0:
                page.keyboard.press(str(wanted + 1))
            elif i % 3 == 1:
                button.click()
            else:
                button.tap()
            page.wait_for_function(f"Object.keys(state.votes).length == {i + 1}")  # a tap's click comes later
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save votes").click()
        saved.value.save_as(file := tmp_path / "votes.json")
    votes = read_votes([file], tmp_path / "key.json")
    assert len(votes) == total and {vote.method for vote in votes} == {"moma"}
    assert tuple(json.loads(file.read_text())[name] for name in ("format", "version")) == (FORMAT, VERSION)
