"""docs/regularizers.md has a card for every config field that is a regularizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flax_cnns.config import FIELDS

PAGE = Path(__file__).parents[1] / "docs/regularizers.md"
PARTS = ["What", "Paper", "Fields", "In a step", "Cost", "When not", "Measured"]
CARDS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
RESULTS = Path(__file__).parents[1] / "experiments/results/ablations.md"


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.regularizer])
def test_every_field_that_regularizes_has_a_card(name):
    fields = [
        re.search(r"\*\*Fields\*\*(.*?)\n- \*\*", card, re.DOTALL)[1] for card in CARDS.values()
    ]
    assert any(f"`{name}`" in listed for listed in fields)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_the_others_say(name):
    assert re.findall(r"^- \*\*(.+?)\*\*:", CARDS[name], re.MULTILINE) == PARTS


@pytest.mark.parametrize("name", CARDS)
def test_the_fields_of_a_card_are_there(name):
    fields = re.findall(r"`((?:data|mix|optimizer|train)\.[\w.]+)", CARDS[name])
    assert set(fields) <= set(FIELDS)


def test_intervals_and_times_of_the_cards_are_those_of_the_results():
    intervals = re.findall(r"\[[-+][\d.]+, [-+][\d.]+\]", PAGE.read_text())
    times = re.findall(r"(0\.\d+) s\b", PAGE.read_text())
    recorded = RESULTS.read_text()
    assert len(intervals) > 15
    assert [number for number in (*intervals, *times) if number not in recorded] == []
