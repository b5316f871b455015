from __future__ import annotations

import pathlib

from flax_cnns.config import FIELDS, STRATEGY
from flax_cnns.config.__main__ import COLUMNS, make_page

PAGE = pathlib.Path(__file__).parents[2] / "docs/config.md"


def test_the_page_is_that_of_the_table():
    message = "write it again: python -m flax_cnns.config > docs/config.md"
    assert PAGE.read_text() == make_page(), message


def test_each_field_is_a_row_that_says_what_is_expected():
    rows = [line.replace(r"\|", "").split(" | ") for line in make_page().splitlines()]
    rows = [row for row in rows if row[0].startswith("| `")]
    names = sorted([*(path.rpartition(".")[2] for path in FIELDS), *STRATEGY.fields])
    assert sorted(row[0].strip("| `") for row in rows) == names
    assert all(len(row) == len(COLUMNS) and row[2] and row[3] for row in rows)
