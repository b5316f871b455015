"""Formats the numbers of the checks' sentences."""

from __future__ import annotations

from collections.abc import Iterable


def format_percent(share: float) -> str:
    """0.123 -> "12.3 %"."""
    return f"{100 * share:.1f} %"


def format_numbers(values: Iterable[float]) -> str:
    """[0.1, 2] -> "0.1, 2"."""
    return ", ".join(f"{value:.3g}" for value in values)
