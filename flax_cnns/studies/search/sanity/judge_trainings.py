"""Says what the numbers of the checks `overfit`, `rate` and `capacity` mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from flax_cnns.studies.search.sanity.findings import FINE, LEFT_OUT, LOOK, WRONG, Numbers
from flax_cnns.studies.search.sanity.trainings import smooth
from flax_cnns.studies.search.sanity.wording import format_numbers, format_percent


def judge_overfit(parts: Mapping[str, Numbers]) -> Iterator[tuple[str, ...]]:
    """Whether the network learns twenty images by heart."""
    n = parts["overfit"]
    first, last = n["attempts"][0], n["attempts"][-1]
    if first["steps"]:
        text = (
            f"learns {n['images']} images by heart in {first['steps']} steps at the config's rate"
        )
        yield FINE, f"{text}, {first['rate']:.3g}"
    elif last["steps"]:
        text = (
            f"at the config's rate, {first['rate']:.3g}, at most {format_percent(first['best'])} of"
            f" {n['images']} images are learned;"
            f" {last['steps']} steps at {last['rate']:.3g} learn all"
        )
        yield LOOK, text, f"schedule.learning_rate={last['rate']:.3g}, or a warm-up"
    else:
        best = max(n["attempts"], key=lambda attempt: attempt["best"])
        rates = format_numbers(attempt["rate"] for attempt in n["attempts"])
        text = (
            f"cannot learn {n['images']} images by heart at any of the rates {rates}: at most"
            f" {format_percent(best['best'])}, at {best['rate']:.3g}"
        )
        remedy = "first check the initialization, BatchNorm, and the loss; then the network's size"
        yield WRONG, text, remedy


# ---------------------------------------------------------------------------- rates


class RateReading(NamedTuple):
    """What a range test says. A field is None if the test does not show it."""

    start: float  # smoothed loss of the first rates
    lowest: float  # lowest smoothed loss
    best: float  # the rate there
    suggested: float | None  # a tenth of it, unless the loss did not fall
    limit: float | None  # the first higher rate at which the loss is above `start` again


def read_rates(numbers: Numbers) -> RateReading:
    """Reads the curve of a range test (`trainings.measure_rates`)."""
    rates, losses = np.asarray(numbers["rates"]), smooth(numbers["losses"])
    start = float(np.mean(losses[: max(len(losses) // 10, 1)]))
    at = int(np.argmin(losses))
    falls = start - losses[at] > 0.03 * abs(start)
    above = np.flatnonzero((losses > start) & (np.arange(len(losses)) > at))
    return RateReading(
        start,
        float(losses[at]),
        float(rates[at]),
        float(rates[at]) / 10 if falls else None,
        float(rates[above[0]]) if falls and len(above) else None,
    )


FAR = 3.0  # times the limit: no warm-up reaches so far
MANY = 100  # steps after which a high rate should be no worse than a low one


def find_highest_rate(numbers: Numbers) -> float:
    """Returns the highest rate for trainings that compare widths: a third of the rate at which the
    loss of the range test is lowest; infinity if the loss does not fall."""
    reading = read_rates(numbers)
    return reading.best / 3 if reading.suggested is not None else float("inf")


def _learns(row: Numbers) -> bool:
    """Whether a short training ends at a lower loss than guessing."""
    return row["train"]["loss"] < 0.98 * row["train"]["guessing"]


def judge_rates(parts: Mapping[str, Numbers]) -> Iterator[tuple[str, ...]]:
    """Where the config's learning rate lies in the range test."""
    n, capacity = parts["rate"], parts.get("capacity")
    reading, own = read_rates(n), n["own"]
    if reading.suggested is None:
        text = (
            f"the loss falls at no rate from {n['rates'][0]:.2g} to {n['rates'][-1]:.2g}: from"
            f" {reading.start:.4g} to at best {reading.lowest:.4g}"
        )
        yield LOOK, text, "first repair what else is wrong; then more --steps"
        return
    text = (
        f"the loss falls from {reading.start:.4g} to {reading.lowest:.4g}, lowest at rate"
        f" {reading.best:.2g}"
    )
    if reading.limit is not None:
        text += f"; from {reading.limit:.2g} on it is above the first again"
    text += f". The config's rate is {own:.3g}"
    remedy = f"schedule.learning_rate={reading.suggested:.1g}, a tenth of the lowest point's"
    # The same rate in a short training, which warms up to it and keeps it.
    capacity = capacity or {}
    calm = next((r for r in capacity.get("widths", []) if r["width"] == 1), None)
    row = capacity.get("trial") or calm
    fails = row is not None and not _learns(row)
    if row is not None and calm is not None and capacity["steps"] >= MANY:
        fails |= row["train"]["accuracy"] < calm["train"]["accuracy"] - 0.3
    if row is not None and own > reading.best:
        accuracy = format_percent(row["train"]["accuracy"])
        text += f", with which the short training reaches {accuracy} of training images"
    if fails and calm is not None and calm is not row:
        text += f" ({format_percent(calm['train']['accuracy'])} at {capacity['rate']:.2g})"
    limit = float("inf") if reading.limit is None else reading.limit
    over = own >= limit
    if own >= FAR * limit or (fails and own > reading.best):
        yield WRONG, f"{text}: too high", remedy
    elif over or own > 2 * reading.best:
        yield LOOK, f"{text}: near the edge", remedy
    elif own < reading.suggested / 100:
        yield LOOK, f"{text}: low", remedy
    else:
        yield FINE, f"{text}: in the range where the loss falls"


# ---------------------------------------------------------------------------- capacity


def judge_capacity(parts: Mapping[str, Numbers]) -> Iterator[tuple[str, ...]]:
    """The gap between training and validation accuracy by width, as the lectures read it."""
    n = parts["capacity"]
    rows = n["widths"]
    for row in rows:
        text = (
            f"width x{row['width']:g} ({row['params']:,} parameters), {n['steps']} steps"
            f" ({n['epochs']:.1f} epochs): training accuracy"
            f" {format_percent(row['train']['accuracy'])}"
        )
        if "validation" in row:
            gap = row["train"]["accuracy"] - row["validation"]["accuracy"]
            text += f", validation {format_percent(row['validation']['accuracy'])}"
            text += f", gap {100 * gap:+.1f} points"
        yield FINE, text
    if len(rows) < 2:
        why = "the network has no field width_mult, widths or width"
        if n["field"]:
            why = "no other width can be built"
        if n["grafted"]:
            why = "the grafted weights fit one width"
        yield LEFT_OUT, f"capacity over widths: {why}"
    own = next(row for row in rows if row["width"] == 1)
    if "validation" not in own:
        yield LEFT_OUT, "the gap: there is no validation split"
        return
    train, validation = (own[split]["accuracy"] for split in ("train", "validation"))
    gap, widest = train - validation, max(row["validation"]["accuracy"] for row in rows)
    if train < 0.9 and gap < 0.05:
        text = (
            f"after {n['epochs']:.1f} epochs the network still fits the training images to"
            f" {format_percent(train)} only, so the gap of {100 * gap:+.1f} points says little"
        )
        yield FINE, f"{text}; longer trainings (--steps) tell more"
    elif gap < 0.05:
        text = f"the gap is small ({100 * gap:+.1f} points)"
        if validation < 0.97:
            text += ": more capacity may help"
        yield FINE, f"{text}; the best width reaches {format_percent(widest)} on validation"
    else:
        level = LOOK if gap > 0.15 else FINE
        text = f"the gap is large ({100 * gap:+.1f} points): regularize, augment, or add data"
        yield level, text
