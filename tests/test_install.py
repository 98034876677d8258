"""Installing the repository as a package."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def read_pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return {Requirement(line).name: Requirement(line) for line in lines}


@pytest.mark.parametrize("extra", [None, "tests"])
def test_the_tested_pins_lie_in_the_declared_ranges(extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    declared = {Requirement(line).name: Requirement(line) for line in lines}
    pins = read_pins("tests/requirements.txt" if extra else "requirements.txt")
    assert declared.keys() == pins.keys()
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert declared[name].specifier.contains(exact.version), f"{pin} against {declared[name]}"


@pytest.mark.slow  # pip fetches setuptools
def test_editable_installation_in_a_new_environment(tmp_path: Path) -> None:
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in ("moma", "models"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", str(copy)], check=True)
    code = (
        "import sys, moma, models, moma.evaluate.page as page;"
        "print(moma.__file__, models.__file__, page.TEMPLATE.is_file(), sep='\\n')"
    )
    # The packages that it depends on come from this environment.
    done = subprocess.run(
        [python, "-c", code],
        cwd=elsewhere, env={"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": ""},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [
        str(copy / "moma/__init__.py"),
        str(copy / "models/__init__.py"),
        "True",
    ]
