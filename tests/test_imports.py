"""Import rules by package: imports go one way, importing does nothing else, and the runtime stays small."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A file imports only its own room and the rooms before it. A room is a folder with all that lies deeper, but
# for folders that are rooms themselves; "moma" is the files that lie flat in moma/, "" the scripts.
ROOMS = (
    "models", "models/weights", "moma/sampling", "moma/inputs", "moma/methods", "moma/weights", "moma",
    "moma/app", "moma/data", "moma/training", "moma/world", "moma/evaluate", "moma/demo",
    "moma/mini", "moma/bench", "",
)  # fmt: skip
FLAT = 6  # Python files that may lie flat in moma/
OPTIONAL = {"insightface", "gradio", "transformers"}  # packages of extras, imported where they are used
IMPORT_NAMES = {"pillow": "PIL"}  # of packages that are imported under another name


@cache
def modules() -> dict[str, Path]:
    """Name -> file of every module that is no test."""
    found = {}
    for folder in ("*.py", "examples/*.py", "models/**/*.py", "moma/**/*.py"):
        for path in ROOT.glob(folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports, by absolute name, wherever in the file the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write the full name"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {member if member in modules() else str(node.module) for member in members}
    return frozenset(found)


def arrows() -> Iterator[tuple[str, str]]:
    """Every import of one of the repository's modules by another one."""
    for name in sorted(modules()):
        yield from ((name, other) for other in sorted(imports(name)) if other in modules())


def room(name: str) -> str:
    folder = modules()[name].parent.relative_to(ROOT).as_posix()
    if folder in (".", "examples"):
        return ""
    while folder not in ROOMS:
        folder = Path(folder).parent.as_posix()
        assert folder not in (".", "moma"), f"{modules()[name]}: its folder is no room; add it to ROOMS"
    return folder


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, other in arrows()
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_networks_stand_alone_and_the_engine_knows_no_method() -> None:
    for name, other in arrows():
        if room(name).startswith("models"):
            assert room(other).startswith("models"), f"{name} imports {other}"
        if room(name) == "moma/sampling":
            assert room(other) != "moma/methods", f"{name} imports {other}"


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for name, other in arrows():
        graph.setdefault(name, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_few_files_lie_flat() -> None:
    flat = sorted(path.name for path in ROOT.glob("moma/*.py"))
    assert len(flat) <= FLAT, flat


def test_runtime_packages_only() -> None:
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    packages = [pin.split("==")[0].replace("-", "_") for pin in pins]
    runtime = {IMPORT_NAMES.get(package, package) for package in packages}
    own = {name.split(".")[0] for name in modules()} | {"examples"}
    for name in modules():
        foreign = {other.split(".")[0] for other in imports(name)} - runtime - set(sys.stdlib_module_names)
        assert foreign <= own | OPTIONAL, f"{name} imports {foreign - own}"


def test_imports_have_no_side_effects(tmp_path: Path) -> None:
    """Importing everything prints and writes nothing and leaves torch's random state and settings alone."""
    shown = [name for name in modules() if not name.startswith("examples") and "gradio" not in imports(name)]
    names = ", ".join(sorted(shown))
    code = (
        "import torch\n"
        "def settings():\n"
        "    precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()\n"
        "    return torch.get_default_dtype(), torch.get_num_threads(), precision\n"
        "before = torch.get_rng_state(), settings()\n"
        f"import {names}\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == settings()"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_tests_share_by_helpers_alone() -> None:
    """A test file imports no other one, so that each can change by itself."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        found = re.findall(
            r"^\s*from tests\.(test_\w+) |^\s*import tests\.(test_\w+)", path.read_text(), re.M
        )
        assert not found, f"{path.name} imports {found}"
