"""The fuzzer's own judgement, and a few cases of each kind."""

import time
from collections.abc import Callable

import pytest

from tests.fuzz import KINDS, Case, check, finding


def refuse(text: str) -> Callable[[], None]:
    def run() -> None:
        raise ValueError(text)

    return run


def busy() -> None:
    start = time.process_time()
    while time.process_time() < start + 0.2:
        pass


@pytest.mark.parametrize(
    ("case", "outcome", "found"),
    [
        (Case("", lambda: 1), "accepted", False),
        (Case("", lambda: 1, wrong=True), "accepted", True),
        (Case("", refuse("one line"), wrong=True), "refused", False),
        (Case("", refuse("two\nlines")), "refused", True),
        (Case("", refuse("")), "refused", True),
        (Case("", lambda: [][0]), "traceback", True),
        (Case("", busy), "accepted", True),
    ],
)
def test_what_counts_as_a_finding(case, outcome, found):
    got, problem = finding(case, seconds=0.1)
    assert (got, bool(problem)) == (outcome, found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases(kind):
    _, findings = check(kind, seed=1, count=20)
    assert not findings, "\n".join(findings)
