"""The documentation names files, definitions and links that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# `folder/file.py` or `folder/file.py: Name.member` in code style, of the repository's own folders.
SOURCE = re.compile(r"`((?:(?:moma|models|tests|examples)/[\w/]*)?\w+\.py)(?:: (\w+)[\w.]*)?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_definitions_exist(page: Path) -> None:
    for file, name in SOURCE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), f"{page.name}: {file}"
        defined = rf"^(?:class |def )?{name}\b"
        assert not name or re.search(defined, (ROOT / file).read_text(), re.MULTILINE), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {file}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {file}#{anchor}"


def test_the_example_of_a_method_is_its_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "class " in code)
    lines = iter((ROOT / "moma/methods/reference_attention.py").read_text(encoding="utf-8").splitlines())
    for line in filter(None, shown.splitlines()):
        assert line in lines, line  # in this order
