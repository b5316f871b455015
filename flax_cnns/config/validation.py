"""Whether a config is valid, and whether a new run may have it; before JAX starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax_cnns.config import effects
from flax_cnns.config.fields import DEFAULTS, FIELDS
from flax_cnns.config.flat import flatten, set_field, to_plain
from flax_cnns.errors import UserError, did_you_mean


def validate(config: Any) -> None:
    """Raises `UserError` for an unknown or missing field, a value of the wrong kind, or fields that
    do not go together. Fields under `model` beyond the common ones are the network's to check, and
    those under `own` the user's parts'."""
    flat = flatten(config)
    for name in flat:
        if name not in FIELDS and not name.startswith(("model.", "own.")):
            raise UserError(f"config: unknown field {name!r}{did_you_mean(name, FIELDS)}")
    _check_values(flat, FIELDS)
    _check_together(flat)


def validate_section(section: Any, path: str) -> None:
    """Raises `UserError` for a missing field or a value of the wrong kind in one section, such as
    "data.augment", of a config: for callers who have no whole config."""
    below = f"{path}."
    _check_values(flatten(section, below), [name for name in FIELDS if name.startswith(below)])


def _check_values(flat: Mapping[str, Any], names: Collection[str]) -> None:
    for name in names:
        if name not in flat:
            raise UserError(f"config: the field {name!r} is missing; start from configs/common.py")
        if expected := FIELDS[name].check(flat[name]):
            raise UserError(f"config.{name}: expected {expected}, got {flat[name]!r}")


def _check_together(flat: Mapping[str, Any]) -> None:
    size, pieces = flat["data.batch_size"], flat["train.accumulate"]
    if size % pieces:
        raise UserError(
            f"config.train.accumulate: a batch of {size} does not divide into {pieces} pieces"
        )
    if size % 2 and (flat["mix.mixup"] or flat["mix.cutmix"]):
        raise UserError(
            f"config.data.batch_size: mixup and cutmix pair neighbors; {size} images leave one"
        )
    if bool(flat["data.mean"]) != bool(flat["data.std"]):
        raise UserError("config.data.mean and config.data.std: set both, or neither")
    if flat["schedule.name"] == "exponential" and not float(flat["schedule.every"].split()[0]):
        raise UserError("config.schedule.every: exponential needs some, such as '2 epochs'")
    if flat["schedule.name"] == "steps" and not flat["schedule.boundaries"]:
        raise UserError("config.schedule.boundaries: 'steps' needs some, such as ('30 epochs',)")
    everything = [list(rule) for rule in DEFAULTS["graft.rules"]]
    if not flat["graft.source"] and [list(rule) for rule in flat["graft.rules"]] != everything:
        raise UserError(
            "config.graft.rules: there is nothing to take from; set config.graft.source, or leave"
            " the rules as they are"
        )
    if flat["data.augment.cutout"] > 2 * flat["data.image_size"]:
        raise UserError(
            "config.data.augment.cutout: the square is larger than the image twice over"
        )


# ---- what only a new run is refused for


def find_problems(config: Any, facts: effects.RunFacts | None = None) -> list[str]:
    """A line for each thing that a new run may not have: a field that is set and cannot act, a
    value that makes no sense. Older runs go on with theirs. `config` must be valid. With `facts`:
    only the lines that depend on the network or the data."""
    flat = flatten(config)
    more = effects.find_long_durations(flat, facts) if facts else effects.find_bad_values(flat)
    return [*effects.find_inert(flat, facts).values(), *more]


def find_inert_fields(config: Any) -> list[str]:
    """The fields that are not at their defaults and cannot act under the other choices."""
    return list(effects.find_inert(flatten(config)))


def reset_inert_fields(config: Any, keep: Collection[str] = ()) -> Any:
    """A copy of a ConfigDict or mapping in which each field that cannot act under the other choices
    has its default. The run is the same. Fields in `keep` stay."""
    is_config = hasattr(config, "to_dict")
    copy = config.to_dict() if is_config else json.loads(json.dumps(config))
    flat = flatten(copy)
    for name in effects.find_inert(flat) if flat.keys() >= FIELDS.keys() else ():
        if name not in keep and effects.EFFECTS[name].resets:
            set_field(copy, name, DEFAULTS[name])
    return type(config)(copy) if is_config else to_plain(copy)


def check_new_run(
    config: Any, where: Any, *, begun: bool, say: Callable[[str], None] = print
) -> None:
    """Checks the config of runs in `where`. Raises `UserError` for its doubts; if `begun`, `where`
    already holds such runs, and a note goes to `say` instead."""
    found = find_problems(config)
    if not begun:
        raise_problems(found)
    elif found:
        say(format_note(where, found))


def raise_problems(found: Collection[str]) -> None:
    """Raises `UserError` with all the doubts that were found, so that they can be mended at
    once."""
    if found:
        raise UserError(" | ".join(found))


def format_note(where: Any, found: Collection[str]) -> str:
    """The line to print for older runs of which doubts were found."""
    return f"note: {where} was made before this was refused, and keeps it: {' | '.join(found)}"
