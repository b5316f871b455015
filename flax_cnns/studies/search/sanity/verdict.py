"""Says what the numbers of all checks mean: what is wrong, what to look at, what is fine.

Pure functions of the numbers. The limits are wide: a network that learns well raises no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from flax_cnns.studies.search.sanity import judge_inputs, judge_network, judge_trainings
from flax_cnns.studies.search.sanity.findings import Numbers, SanityFinding

Judge = Callable[[Mapping[str, Numbers]], Iterator[tuple[str, ...]]]

# By check, in the order of the page. A judge also sees the numbers of the other checks.
JUDGES: dict[str, Judge] = {
    "inputs": judge_inputs.judge_inputs,
    "loss": judge_network.judge_loss,
    "layers": judge_network.judge_layers,
    "overfit": judge_trainings.judge_overfit,
    "rate": judge_trainings.judge_rates,
    "capacity": judge_trainings.judge_capacity,
}


def judge(parts: Mapping[str, Numbers]) -> list[SanityFinding]:
    """Returns the findings on the checks that were made, in the order of the page."""
    found: list[SanityFinding] = []
    for name, function in JUDGES.items():
        if name in parts:
            found += [SanityFinding(level, name, *rest) for level, *rest in function(parts)]
    return found
