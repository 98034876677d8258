"""Every public network at its full size against the reference implementation, one after another.

    python -m tests.parity --full

The test suite compares small sizes; this takes some minutes, and each case runs in a process of its own, so
that memory is given back (below 14 GiB each). Weights are pseudo-random and the same on both sides.
"""

import argparse
import resource
import subprocess
import sys
import time

from tests.compare import TOLERANCE, relative_error
from tests.parity_image import CASES as IMAGE
from tests.parity_language import CASES as LANGUAGE
from tests.parity_mm_diff import CASES as MM_DIFF
from tests.parity_sam import CASES as SAM
from tests.parity_scorers import CASES as SCORERS

CASES = IMAGE + LANGUAGE + MM_DIFF + SAM + SCORERS


def run_case(index: int) -> bool:
    """One row of the table; whether the networks agree."""
    start = time.perf_counter()
    error = relative_error(*CASES[index].run())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    good = error <= TOLERANCE
    verdict = "equal" if good else "DIFFERENT"
    print(
        f"| {CASES[index].name:38} | {error:13.1e} | {seconds:7.0f} | {peak:8.1f} | {verdict:9} |", flush=True
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="full-size parity with diffusers and transformers")
    parser.add_argument("--full", action="store_true", help="run every case")
    parser.add_argument("--case", type=int, metavar="N", help="run one case in this process")
    args = parser.parse_args()
    if args.case is not None:
        return 0 if run_case(args.case) else 1
    if not args.full:
        parser.error(f"give --full to run {len(CASES)} cases (some minutes), or --case 0..{len(CASES) - 1}")
    print(f"max |difference| over the reference's standard deviation, allowed {TOLERANCE:.0e}; float32, CPU")
    print(f"| {'network':38} | max diff/std | seconds | peak GiB | verdict   |")
    print(f"|{'-' * 40}|--------------:|--------:|---------:|-----------|", flush=True)
    command = [sys.executable, "-m", "tests.parity", "--case"]
    return max(subprocess.run([*command, str(i)], check=False).returncode for i in range(len(CASES)))


if __name__ == "__main__":
    sys.exit(main())
