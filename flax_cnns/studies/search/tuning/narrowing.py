"""Coarse to fine: the space of a finer stage, from the best trials of the coarser one.

The rule, which the report repeats:

1. The best tenth of the trials that completed or were pruned, rounded up, but at least `MIN_BEST`;
   all of them complete, ranked by their value. Of equal values, the earlier trial is better.
2. A range becomes the range of the values that these trials drew, plus `MARGIN` of the old width on
   each side, in the logarithm if the old range is logarithmic. It never leaves the old range. Of
   integers, those inside remain.
3. A choice keeps the values that these trials drew, in their order.
4. A field that has one value left is no longer searched: the finer stage's config has this value.
   If the field's condition may fail, it keeps its old range instead.
5. A condition keeps the values that can still be drawn. A field whose condition can no longer hold,
   also because of a field that is left out, is left out. A field that none of these trials drew
   keeps its range.

A field that does not matter has values all over its range among the best, so it stays wide.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax_cnns.config.spaces import Distribution, get_options
from flax_cnns.errors import UserError

BEST_FRACTION = 0.1  # of the trials
MIN_BEST = 3  # trials
MARGIN = 0.1  # of the old range's width, on each side


class ScoredTrial(NamedTuple):
    """A trial of the coarser stage."""

    number: int
    drawn: Mapping[str, Any]  # {path: drawn value}
    state: str  # complete, pruned, failed
    value: float  # NaN if it has none


class NarrowedSpace(NamedTuple):
    """What a finer stage searches."""

    space: dict[str, Distribution]
    fixed: dict[str, Any]  # {path: drawn value} of the fields that have one value left
    basis: tuple[int, ...]  # numbers of the trials that it is made from, best first


def select_best(trials: Sequence[ScoredTrial], *, maximize: bool = True) -> list[ScoredTrial]:
    """Returns the best tenth of the trials, best first; see the rule above.

    Raises UserError if fewer than `MIN_BEST` trials are complete.
    """
    complete = [t for t in trials if t.state == "complete" and math.isfinite(t.value)]
    if len(complete) < MIN_BEST:
        raise UserError(
            f"a finer stage needs at least {MIN_BEST} complete trials of the coarser one, got"
            f" {len(complete)}; give more --trials"
        )
    tried = sum(trial.state in ("complete", "pruned") for trial in trials)
    number = max(MIN_BEST, math.ceil(tried * BEST_FRACTION))
    sign = -1 if maximize else 1
    ranked = sorted(complete, key=lambda trial: (sign * trial.value, trial.number))
    return ranked[:number]


def narrow_space(space: Mapping[str, Distribution], best: Sequence[ScoredTrial]) -> NarrowedSpace:
    """Narrows a space to the surroundings of the best trials; see the rule above.

    Raises UserError if no field has more than one value left.
    """
    narrowed: dict[str, Distribution] = {}
    fixed: dict[str, Any] = {}
    for path, old in space.items():
        when = _narrow_condition(old, space, narrowed, fixed)
        if when is None:
            continue
        drawn = [trial.drawn[path] for trial in best if path in trial.drawn]
        new = _narrow(old, drawn) if drawn else old
        is_always_drawn = all(name not in narrowed for name in when)
        if _count_values(new) == 1 and is_always_drawn:
            fixed[path] = new.ends[0]
            continue
        narrowed[path] = dataclasses.replace(old if _count_values(new) == 1 else new, when=when)
    if not narrowed:
        raise UserError(
            f"the best {len(best)} trials agree on all fields, so a finer stage has nothing to"
            " search; use a wider space or more --trials"
        )
    return NarrowedSpace(narrowed, fixed, tuple(trial.number for trial in best))


def _narrow(old: Distribution, drawn: Sequence[Any]) -> Distribution:
    if old.kind == "choice":
        seen = set(map(_as_json, drawn))
        values = tuple(value for value in old.values if _as_json(value) in seen)
        return dataclasses.replace(old, values=values)
    scale, unscale = (math.log, math.exp) if old.log else (float, float)
    margin = MARGIN * (scale(old.high) - scale(old.low))
    low = unscale(scale(min(drawn)) - margin)
    high = unscale(scale(max(drawn)) + margin)
    if old.kind == "integer":
        low, high = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    # The old ends are kept exactly, not as exp(log(end)).
    return dataclasses.replace(
        old, low=low if low > old.low else old.low, high=high if high < old.high else old.high
    )


def _count_values(distribution: Distribution) -> float:
    if distribution.kind == "choice":
        return len(distribution.values)
    return 1 if distribution.low == distribution.high else math.inf


def _narrow_condition(
    old: Distribution,
    space: Mapping[str, Distribution],
    narrowed: Mapping[str, Distribution],
    fixed: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Returns the condition with the values that can still be drawn; None if it cannot hold."""
    when = {}
    for name, wanted in old.when.items():
        options = get_options(wanted)
        if name in narrowed:
            remaining = [narrowed[name].make_value(value) for value in narrowed[name].values]
        elif name in fixed:
            remaining = [space[name].make_value(fixed[name])]
        else:  # a field that is not searched, or no longer: the config decides
            when[name] = wanted
            continue
        known = set(map(_as_json, remaining))
        options = tuple(option for option in options if _as_json(option) in known)
        if not options:
            return None
        when[name] = options
    return when


def _as_json(value: Any) -> str:
    return json.dumps(value)
