"""The files and links named in README.md, CONTRIBUTING.md, docs/, experiments/results/ exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import flax_cnns

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
PAGES += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "experiments/results").glob("*.md")])
# Files that a reader or a command writes.
OF_THE_READER = {"mine.py", "my_data.py", "my_orders.py", "sparse_sweep.py"}
OF_A_COMMAND = {"WORKDIR/winner.py"}


def pages(chosen=PAGES):
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


@pages()
def test_what_a_page_names_exists(page):
    named = re.findall(r"`((?:\w+/)*\w+\.py)(?:::(\w+))?", page.read_text())
    missing = []
    for path, test in named:
        places = [ROOT / path, ROOT / "flax_cnns" / path]
        file = next((place for place in places if place.is_file()), None)
        if "NAME" in path or "FAMILY" in path or path in OF_THE_READER | OF_A_COMMAND:
            continue
        if file is None or (test and f"def {test}(" not in file.read_text()):
            missing.append(f"{path}::{test}" if test else path)
    assert missing == []


@pages()
def test_links_between_pages_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(link)
    assert broken == []


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub makes for the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pages()
def test_commands_and_recipes_that_a_page_names_are_there(page):
    text = page.read_text()
    modules = re.findall(r"python -m (experiments|flax_cnns|tests)((?:\.\w+)*)", text)
    files = [ROOT / (top + rest.replace(".", "/")) for top, rest in modules]
    missing = [file for file in files if not (file.with_suffix(".py").is_file() or file.is_dir())]
    configs = re.findall(r"configs/(?:\w+/)*\w+\.py", text)
    missing += [
        name
        for name in configs
        if "NAME" not in name and name != "configs/x.py" and not (ROOT / name).is_file()
    ]
    assert missing == []


def test_contributing_names_a_test_for_most_steps():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(re.findall(r"`tests/[\w/]+\.py::\w+", text)) > 20


def test_the_page_on_stability_lists_the_public_names():
    text = (ROOT / "docs/stability.md").read_text()
    assert [name for name in flax_cnns.__all__ if f"`{name}`" not in text] == []


def test_the_version_is_one_everywhere():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {said}\n" in (ROOT / "CITATION.cff").read_text()
    assert flax_cnns.__version__ in (said, "0+unknown")  # not installed: "0+unknown"
