"""The tests and files that CONTRIBUTING.md, README.md and docs/ name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", ROOT / "docs/architecture.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    named = re.findall(r"`((?:\w+/)*\w+\.py)(?:::(\w+))?", page.read_text())
    missing = []
    for path, test in named:
        places = [ROOT / path, ROOT / "flax_cnns" / path]
        file = next((place for place in places if place.is_file()), None)
        if "NAME" in path or "FAMILY" in path:
            continue
        if file is None or (test and f"def {test}(" not in file.read_text()):
            missing.append(f"{path}::{test}" if test else path)
    assert missing == []


def test_contributing_names_a_test_for_most_steps():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(re.findall(r"`tests/[\w/]+\.py::\w+", text)) > 20
