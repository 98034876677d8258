"""Damaged and senseless inputs by the hundred: `python -m tests.fuzz --kind settings --seed 0 --count 700`.

Each input must be read as what it means or refused by one line, soon, before any weight is loaded. A kind
is a function in KINDS: an endless iterator of cases that a seed decides. Findings are printed; exit status 1
if there are any.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

SECONDS = 2.0  # that a case may take


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str  # what it is, for the report
    run: Callable[[], object]  # reads it: returns, or ValueError, OSError or OutOfMemoryError of one line
    wrong: bool = False  # whether nothing but a refusal is right


Kind = Callable[[random.Random, Path], Iterator[Case]]  # the folder is the kind's own


def refused(command: Callable[[list[str]], int], *args: object) -> None:
    """Run a command's function; ValueError with what it said on stderr if it ended with status 2.

    Args:
        command: takes the command line and returns an exit status.
        args: the command line.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = command([str(arg) for arg in args])
    if status == 2:
        raise ValueError(said.getvalue().replace("\r", "\n").rstrip("\n"))
    assert status == 0, f"exit status {status}"


# --- the kinds ---------------------------------------------------------------------------------------


KINDS: dict[str, Kind] = {}


# --- what is run -------------------------------------------------------------------------------------


def finding(case: Case, seconds: float = SECONDS) -> tuple[str, str]:
    """What came of a case: "accepted" or "refused", and what is wrong with that, "" = nothing."""
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            case.run()
        outcome, problem = "accepted", "accepted nonsense" if case.wrong else ""
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        text = str(error)
        outcome, problem = "refused", "" if text.strip() and "\n" not in text else f"not one line: {text!r}"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(place.filename).name}:{place.lineno}"
        outcome, problem = "traceback", f"{type(error).__name__}: {error} ({at})"
    took = time.perf_counter() - start
    return outcome, problem or (f"took {took:.1f} s" if took > seconds else "")


def check(kind: str, seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """Run the first `count` cases of a kind: how they ended, and the findings."""
    outcomes, findings = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(islice(KINDS[kind](random.Random(seed), Path(folder)), count)):
            outcome, problem = finding(case)
            outcomes[outcome] += 1
            if problem:
                findings.append(f"{kind} {number}: {case.name}: {problem}")
    return outcomes, findings


def main(argv: Sequence[str] | None = None) -> int:
    """Print findings and counts; 1 if there are findings."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args(argv)
    outcomes, findings = check(args.kind, args.seed, args.count)
    for line in findings:
        print(line)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"{args.kind}, seed {args.seed}: {counts}; {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
