"""Count the repository's lines by room, before the regrouping and after it.

python -m tests.count_lines [--rev REV]

"Code" leaves out docstrings, comments and blank lines; "raw" is every line of the file. The state before is
commit b1a5b72; the state after is the working tree, or `--rev`.
"""

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BEFORE = "b1a5b72"
LAYOUT_TOKENS = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


class Group(NamedTuple):
    """Files by pattern (`**` also matches `/`), in both states, without those of `excluded`."""

    name: str
    before: Sequence[str]
    after: Sequence[str]
    excluded: Sequence[str] = ()


def _files(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}.py" for name in names.split())


NETWORKS = _files("models", "attention clip clip_image llama llava tokenizers unet vae")
WEIGHT_FILES = _files("models", "keymaps loading packed quant stream")
METHOD = _files("moma", "adapter attention masks decoder prompts config")
SAMPLING = _files("moma", "pipeline sampler diffusion graphs tiles memory")
COMMANDS = ("sample.py", "train.py")
# Networks that sampling needs, methods, sampling, both stages with their loop, commands and options. In
# moma/app, whatever has no predecessor outside the core counts.
CORE = (
    Group("networks", NETWORKS, (*NETWORKS, "models/weights/public_configs.py")),
    Group("methods", METHOD, ("moma/methods/**.py",)),
    Group("sampling", SAMPLING, ("moma/sampling/**.py", "moma/*.py"), ("moma/__init__.py",)),
    Group(
        "training",
        ("moma/training/**.py",),
        ("moma/training/**.py", "models/lora.py"),
        ("moma/training/memory.py",),
    ),
    Group(
        "commands",
        (*COMMANDS, "moma/cli.py"),
        (*COMMANDS, "moma/app/**.py"),
        _files("moma/app", "__init__ chart files record sheets"),
    ),
)
# Files of today's core whose predecessors lay outside the core, or that had none.
JOINED = (
    Group(
        "other methods",
        _files("moma/evaluate", "ip_adapter methods"),
        _files("moma/methods", "ip_adapter text reference_attention ablations"),
    ),
    Group("cache of the MLLM's outputs", ("moma/embeddings.py",), ("moma/methods/moma/feature_cache.py",)),
    Group("training of mini's base", ("moma/mini/base.py",), ("moma/training/pretraining.py",)),
)
# Every Python file outside tests/ belongs to exactly one of these; what matches none is shown as "other".
ROOMS = (
    Group("models/", ("models/*.py", "moma/training/lora.py"), ("models/*.py",), WEIGHT_FILES),
    Group("models/weights/", WEIGHT_FILES, ("models/weights/**.py",)),
    Group("moma/sampling/", SAMPLING, ("moma/sampling/**.py",)),
    Group("moma/inputs/", _files("moma", "preprocess segment regions"), ("moma/inputs/**.py",)),
    Group("moma/methods/", METHOD, ("moma/methods/**.py",)),
    Group("moma/weights/", _files("moma", "bundle sources download tiny"), ("moma/weights/**.py",)),
    Group(
        "moma/*.py, moma/app/",
        _files("moma", "__init__ cli embeddings output chart"),
        ("moma/*.py", "moma/app/**.py"),
    ),
    Group("moma/data/", ("moma/data/**.py",), ("moma/data/**.py",)),
    Group("moma/training/", ("moma/training/**.py",), ("moma/training/**.py",)),
    Group("moma/evaluate/", ("moma/evaluate/**.py", "moma/estimates.py"), ("moma/evaluate/**.py",)),
    Group("moma/demo/", (), ("moma/demo/**.py",)),
    Group("moma/mini/, moma/world/", ("moma/mini/**.py",), ("moma/mini/**.py", "moma/world/**.py")),
    Group("moma/bench/", ("moma/bench/**.py", "moma/rounding.py"), ("moma/bench/**.py",)),
    Group("commands, examples/", ("*.py", "examples/*.py"), ("*.py", "examples/*.py")),
)


class Lines(NamedTuple):
    code: int
    raw: int


def count(text: str) -> Lines:
    """The lines of one Python file."""
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT_TOKENS:
            used.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            used.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return Lines(len(used), text.count("\n"))


def at_revision(rev: str) -> dict[str, Lines]:
    """Path -> lines of every Python file of a commit."""
    archive = subprocess.run(["git", "archive", rev], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        members = [m for m in files.getmembers() if m.isfile() and m.name.endswith(".py")]
        return {m.name: count(files.extractfile(m).read().decode()) for m in members}


def of_working_tree() -> dict[str, Lines]:
    """Path -> lines of every Python file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    paths = [name for name in dict.fromkeys(names) if name and (ROOT / name).is_file()]
    return {name: count((ROOT / name).read_text(encoding="utf-8")) for name in paths}


def regular_expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")


def matching(files: Mapping[str, Lines], patterns: Sequence[str], excluded: Sequence[str]) -> set[str]:
    def fits(name: str, patterns: Sequence[str]) -> bool:
        return any(re.fullmatch(regular_expression(pattern), name) for pattern in patterns)

    return {name for name in files if fits(name, patterns) and not fits(name, excluded)}


def print_row(title: str, *columns: object) -> None:
    print(f"{title:<36}" + "".join(f"{column:>10}" for column in columns))


class Report:
    """Prints both states of groups of files.

    Args:
        old: path -> lines before.
        new: path -> lines after.
    """

    def __init__(self, old: Mapping[str, Lines], new: Mapping[str, Lines]):
        self.old, self.new = old, new

    def row(self, title: str, before: set[str], after: set[str]) -> None:
        """Print the sums over two sets of files."""
        old, new = [self.old[name] for name in before], [self.new[name] for name in after]
        code = sum(lines.code for lines in old), sum(lines.code for lines in new)
        print_row(title, *code, sum(lines.raw for lines in old), sum(lines.raw for lines in new))

    def table(self, title: str, groups: Sequence[Group]) -> tuple[set[str], set[str]]:
        """Print a row per group; a file counts in the first group that it fits.

        Returns:
            The files of all groups, before and after.
        """
        print_row(f"\n{title}", "code was", "code is", "raw was", "raw is")
        all_old: set[str] = set()
        all_new: set[str] = set()
        for group in groups:
            before = matching(self.old, group.before, group.excluded) - all_old
            after = matching(self.new, group.after, group.excluded) - all_new
            self.row(f"  {group.name}", before, after)
            all_old |= before
            all_new |= after
        return all_old, all_new


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.count_lines", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rev", help="count this commit as the state after (default: the working tree)")
    args = parser.parse_args(argv)
    old, new = at_revision(BEFORE), at_revision(args.rev) if args.rev else of_working_tree()
    report = Report(old, new)

    core_old, core_new = report.table("core", CORE)
    report.row("  sum", core_old, core_new)
    joined_old, joined_new = report.table("of the core, formerly outside it", JOINED)
    report.row("  core without these", core_old, core_new - joined_new)
    report.row("  core with these in both states", core_old | joined_old, core_new)

    outside_old = {name for name in old if not name.startswith("tests/")}
    outside_new = {name for name in new if not name.startswith("tests/")}
    rooms_old, rooms_new = report.table("all Python outside tests/", ROOMS)
    report.row("  other", outside_old - rooms_old, outside_new - rooms_new)
    report.row("  sum", outside_old, outside_new)
    print()
    report.row("tests/", set(old) - outside_old, set(new) - outside_new)


if __name__ == "__main__":
    main()
