"""What a check says: a level, a sentence with its numbers, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

WRONG, LOOK, FINE, LEFT_OUT = "wrong", "look", "fine", "left out"

Numbers = Mapping[str, Any]  # of one check, as sanity.json holds them


class SanityFinding(NamedTuple):
    """One sentence about one check, with the numbers that it comes from."""

    level: str  # WRONG, LOOK, FINE or LEFT_OUT
    check: str
    text: str
    remedy: str = ""
