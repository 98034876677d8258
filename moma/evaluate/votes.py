"""Votes of a study with people: read, checked, counted."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch

from models.weights.files import read_object
from moma.app.files import markdown_table
from moma.evaluate.estimates import Estimate, crossed_estimate, estimate
from moma.sampling.config import check_types

FORMAT, VERSION = "moma-study", 1
VOTES = 2**22  # bytes of a file of votes
NONE = "—"


@dataclass(frozen=True)
class Trial:
    """A set of images of one subject and prompt; names tell raters nothing."""

    id: str
    subject: str
    methods: Mapping[str, str]  # name of an image -> its method

    def __post_init__(self) -> None:
        check_types(self)


class Vote(NamedTuple):
    """An answer."""

    rater: str
    trial: Trial
    question: str
    method: str | None  # None: the rater could not tell


def read_votes(files: Sequence[Path], key_file: Path) -> list[Vote]:
    """All answers.

    Args:
        files: that raters saved.
        key_file: of the study.

    Raises:
        ValueError: names the file that is damaged, of another study, or a rater's second one.
    """
    key = read_object(key_file)
    try:
        trials = {row["id"]: Trial(**row) for row in key["trials"]}
        study, questions = key["study"], frozenset(key["questions"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key_file}: damaged ({error!r}); expected a study's key") from None
    votes, raters = [], {}
    for file in files:
        data = read_object(file, VOTES)
        if (data.get("format"), data.get("version"), data.get("study")) != (FORMAT, VERSION, study):
            raise ValueError(
                f"{file}: study {data.get('study')!r:.50}, expected votes of {study!r} ({key_file})"
            )
        mine = _votes(file, data, trials, questions)
        if (first := raters.setdefault(data["rater"], file)) != file:
            raise ValueError(f"{file}: rater {data['rater']!r:.50} as in {first}; give the later file alone")
        votes += mine
    if not votes:
        raise ValueError(f"{', '.join(map(str, files))}: no vote in them")
    return votes


def _votes(file: Path, data: Mapping, trials: Mapping[str, Trial], questions: frozenset[str]) -> list[Vote]:
    """The answers of one rater, each question of each trial at most once."""
    found: dict[tuple[str, str], Vote] = {}
    try:
        if not isinstance(rater := data["rater"], str):
            raise TypeError(f"rater {rater!r}")
        for row in data["votes"]:
            trial, question, choice = trials[row["trial"]], row["question"], row["choice"]
            if question not in questions or (trial.id, question) in found:
                raise KeyError(question)
            method = None if choice is None else trial.methods[choice]
            found[trial.id, question] = Vote(rater, trial, question, method)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: {error!s:.100}: unknown, missing or given twice, expected a file of votes"
        ) from None
    return list(found.values())


def share(votes: Sequence[Vote], method: str) -> Estimate:
    """How often a method is chosen where it is shown; a vote for none counts as one for each in equal parts.

    The interval resamples raters and subjects: with one rater, subjects alone; with one subject, raters.
    """
    mine = [vote for vote in votes if method in vote.trial.methods.values()]
    values = torch.tensor(
        [1 / len(vote.trial.methods) if vote.method is None else vote.method == method for vote in mine],
        dtype=torch.float64,
    )  # (N,)
    raters, subjects = [vote.rater for vote in mine], [vote.trial.subject for vote in mine]
    if len(set(raters)) > 1 and len(set(subjects)) > 1:
        return crossed_estimate(values, raters, subjects)
    return estimate(values, raters if len(set(raters)) > 1 else subjects)


def agreement(votes: Sequence[Vote]) -> float:
    """Krippendorff's alpha for categories: 1 = raters agree, 0 = as by chance; nan where nothing says.

    1 - D_o / D_e, of the pairs of answers to the same question about the same images, and of all pairs.
    """
    units: dict[tuple[str, str], list[str | None]] = defaultdict(list)
    for vote in votes:
        units[vote.trial.id, vote.question].append(vote.method)
    several = [answers for answers in units.values() if len(answers) > 1]
    every = Counter(answer for answers in several for answer in answers)
    n = every.total()
    observed = sum(
        2 * sum(a != b for a, b in combinations(answers, 2)) / (len(answers) - 1) for answers in several
    )
    expected = sum(2 * a * b for a, b in combinations(every.values(), 2))
    return 1 - (n - 1) * observed / expected if expected else math.nan


def table(votes: Sequence[Vote]) -> str:
    """Markdown: a row per method and one for the agreement, a column per question."""
    by_question: dict[str, list[Vote]] = {}
    for vote in votes:
        by_question.setdefault(vote.question, []).append(vote)
    methods = dict.fromkeys(method for vote in votes for method in vote.trial.methods.values())

    def cell(mine: Sequence[Vote], name: str) -> str:
        if not any(name in vote.trial.methods.values() for vote in mine):
            return NONE
        found = share(mine, name)
        interval = "" if math.isnan(found.low) else f" ({found.low:.2f} to {found.high:.2f})"
        return f"{found.mean:.2f}{interval}"

    rows = [[name, *(cell(mine, name) for mine in by_question.values())] for name in sorted(methods)]
    alphas = [agreement(mine) for mine in by_question.values()]
    rows.append(["agreement α", *(NONE if math.isnan(alpha) else f"{alpha:.2f}" for alpha in alphas)])
    rows.append(["votes", *(str(len(mine)) for mine in by_question.values())])
    raters, sides = len({vote.rater for vote in votes}), {len(vote.trial.methods) for vote in votes}
    chance, none = ", ".join(f"1/{n}" for n in sorted(sides)), sum(vote.method is None for vote in votes)
    note = (
        f"Share of the votes of {raters} raters for each method where it was shown, with 95% intervals by"
        f" bootstrap over raters and subjects. By chance it is {chance}; {none} of {len(votes)} votes are for"
        " none and count for all in equal parts. α is Krippendorff's: 1 = raters agree, 0 = as by chance."
    )
    return f"{markdown_table(['', *by_question], rows)}\n{note}\n"
