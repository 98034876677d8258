"""What commands say: nothing commands the terminal, and no work is lost to what cannot be said."""

import importlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moma.app.files import Shown, exit_status
from tests.helpers import MINI


def said(text: str, encoding: str = "utf-8") -> str:
    file = io.BytesIO()
    shown = Shown(io.TextIOWrapper(file, encoding=encoding, newline=""))
    assert shown.write(text) == len(text)
    shown.flush()
    return file.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tcat\n", "a\tcat\n"),
        ("β 海滩 🐈", "β 海滩 🐈"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\rb\x08c\x00\x7f\x9b2J", r"a\rb\x08c\x00\x7f\x9b2J"),
        ("\r 3/4 [01:02]", "\r 3/4 [01:02]"),  # a progress bar
        ("\u202etxt.exe\u2066\u2028", r"\u202etxt.exe\u2066\u2028"),
        ("caf\udce9.png", r"caf\udce9.png"),  # a file name that is not UTF-8
    ],
)
def test_control_characters_are_shown(text, expected):
    assert said(text) == expected


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_shown(encoding):
    assert said("a cat 海", encoding) == r"a cat \u6d77"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("two\nlines \x1b[2J"), 2),
        (OSError("disk full"), 2),
        (MemoryError(), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_mistakes_end_with_one_line(capsys, error, status):
    def fail() -> None:
        raise error

    assert exit_status("x", fail) == status
    printed = capsys.readouterr().err
    assert printed.startswith("x: ") and printed.count("\n") == 1 and "\x1b" not in printed
    assert len(printed) > len("x: error: \n") or status == 130


def test_faults_of_the_program_are_not_mistakes():
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        exit_status("x", fail)


CODE = """
import sys
from pathlib import Path
from moma.app.files import exit_status
def main():
    for i in range(3):
        print("x" * 100_000, flush=True)
        print("x" * 100_000, flush=True, file=sys.stderr)
        Path(sys.argv[1], str(i)).touch()
sys.exit(exit_status("x", main))
"""


@pytest.mark.parametrize("where", ["gone", "full", "closed"])
def test_work_goes_on_without_a_reader(tmp_path, where):
    """A pipe whose reader has ended, a log on a full disk, no stdout at all."""
    line = [sys.executable, "-c", CODE, str(tmp_path)]
    if where == "closed":
        line = [sys.executable, "-c", f"import os; os.close(1); os.close(2); os.execv({line[0]!r}, {line!r})"]
    with open("/dev/full" if where == "full" else os.devnull, "w") as log:
        target = subprocess.PIPE if where == "gone" else log
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(line, stdout=target, stderr=target, env=environment)
    if where == "gone":
        process.stdout.close()
        process.stderr.close()
    assert process.wait(60) == 0
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]


EMPTY = {
    "sample": (
        "--ref ''", "--ref cat.png --mask ''", "--ref cat.png --out ' '", "--ref cat.png --cache ''",
        "--batch-refs ''", "--replay ''", "--ref cat.png --prompts ''", "--ref cat.png --face-file ''",
        "--ref cat.png --weights ''",
    ),
    "train": (
        "export ''", "mm-diff --bundle '' --data x", "mm-diff --bundle {} --data ''",
        "mm-diff --bundle {} --data x --cache ''", "mm-diff --bundle {} --data x --validation ''",
        "mm-diff --bundle {} --data x --set cache=", "moma:stage1 --bundle {} --data x --out ''",
    ),
    "convert_weights": ("'' --out x", "a --out ''", "a --out x --cache ''", "--out x --lora ''"),
    "moma.evaluate.__main__": ("--dataset x --out ''", "--world --bundle ''", "--dataset ''"),
    "moma.evaluate.figures": ("masking --ref ''", "beta --ref no.png --out ''", "methods --bundle ''"),
    "moma.evaluate.study": ("--from ''", "--from x --questions ''"),
    "moma.data.annotated": ("'' --out x",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "line"), [(command, line) for command, lines in EMPTY.items() for line in lines]
)
def test_an_empty_path_is_no_folder(command, line, tmp_path, monkeypatch, capsys):
    """The empty path of pathlib is the current folder: nothing is read or written there."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(command)
    argv = shlex.split(line.format(MINI))
    assert exit_status("x", lambda: getattr(module, "run", module.main)(argv)) in (0, 2)
    assert "is empty, expected a file or folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
