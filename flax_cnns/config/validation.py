"""Validates configs, and finds problems that only a new run refuses. Does not import JAX."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax_cnns.config import effects
from flax_cnns.config.fields import DEFAULTS, FIELDS
from flax_cnns.config.flat import flatten, set_field, to_plain
from flax_cnns.errors import UserError, did_you_mean


def validate(config: Any) -> None:
    """Raises `UserError` if a field is unknown or missing, has an invalid value, or contradicts
    another field.

    The network checks its own fields under `model`, and the user's parts check theirs under `own`.
    """
    flat = flatten(config)
    for name in flat:
        if name not in FIELDS and not name.startswith(("model.", "own.")):
            raise UserError(f"config: unknown field {name!r}{did_you_mean(name, FIELDS)}")
    _check_values(flat, FIELDS)
    _check_together(flat)


def validate_section(section: Any, path: str) -> None:
    """Validates one section of a config, such as "data.augment", for callers without a whole
    config.

    Raises `UserError` if a field is missing or has an invalid value.
    """
    prefix = f"{path}."
    _check_values(flatten(section, prefix), [name for name in FIELDS if name.startswith(prefix)])


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
            f"config.train.accumulate: data.batch_size={size} is not divisible by {pieces}"
        )
    if size % 2 and (flat["mix.mixup"] or flat["mix.cutmix"]):
        raise UserError(
            f"config.data.batch_size: mixup and cutmix pair neighbors; expected an even number,"
            f" got {size}"
        )
    if bool(flat["data.mean"]) != bool(flat["data.std"]):
        raise UserError("config.data.mean and config.data.std: set both, or neither")
    if flat["schedule.name"] == "exponential" and not float(flat["schedule.every"].split()[0]):
        raise UserError(
            "config.schedule.every: 'exponential' needs a duration above 0, such as '2 epochs'"
        )
    if flat["schedule.name"] == "steps" and not flat["schedule.boundaries"]:
        raise UserError(
            "config.schedule.boundaries: 'steps' needs boundaries, such as ('30 epochs',)"
        )
    everything = [list(rule) for rule in DEFAULTS["graft.rules"]]
    if not flat["graft.source"] and [list(rule) for rule in flat["graft.rules"]] != everything:
        raise UserError(
            "config.graft.rules: there is no source to take weights from; set config.graft.source,"
            " or leave the rules at their default"
        )
    if flat["data.augment.cutout"] > 2 * flat["data.image_size"]:
        raise UserError(
            "config.data.augment.cutout: expected at most twice data.image_size, as a larger square"
            f" always covers the image; got {flat['data.augment.cutout']}"
        )


def require_test(config: Any, why: str) -> None:
    """Raises `UserError` if a run of `config` is never tested. `why` says who needs the test."""
    if flatten(config)["train.test_on"] == "never":
        raise UserError(f"config.train.test_on: {why}; expected 'latest' or 'best', got 'never'")


# ---- problems that only a new run refuses


def find_problems(config: Any, facts: effects.RunFacts | None = None) -> list[str]:
    """Returns a message for each problem that a new run refuses: a field that is set and has no
    effect, or a value that makes no sense. Older runs keep such fields and values.

    `config` must be valid. With `facts`, returns only problems that depend on the network or the
    data.
    """
    flat = flatten(config)
    values = effects.find_long_durations(flat, facts) if facts else effects.find_bad_values(flat)
    return [*effects.find_inert(flat, facts).values(), *values]


def find_inert_fields(config: Any) -> list[str]:
    """Returns the fields that differ from their defaults but have no effect, given the other
    fields."""
    return list(effects.find_inert(flatten(config)))


def reset_inert_fields(config: Any, keep: Collection[str] = ()) -> Any:
    """Returns a copy of a ConfigDict or mapping in which fields without effect have their defaults.
    The copy describes the same run: fields whose reset would change the run are not reset. Fields
    in `keep` are not reset either."""
    is_config = hasattr(config, "to_dict")
    copy = config.to_dict() if is_config else json.loads(json.dumps(config))
    flat = flatten(copy)
    for name in effects.find_inert(flat) if flat.keys() >= FIELDS.keys() else ():
        if name not in keep and effects.EFFECTS[name].can_reset:
            set_field(copy, name, DEFAULTS[name])
    return type(config)(copy) if is_config else to_plain(copy)


def check_new_run(
    config: Any, where: Any, *, begun: bool, say: Callable[[str], None] = print
) -> None:
    """Raises `UserError` if the config of the runs in the folder `where` has problems. If the runs
    have `begun`, calls `say` with a note instead."""
    problems = find_problems(config)
    if not begun:
        raise_problems(problems)
    elif problems:
        say(format_note(where, problems))


def raise_problems(problems: Collection[str]) -> None:
    """Raises one `UserError` with all problems, if there are any."""
    if problems:
        raise UserError(" | ".join(problems))


def format_note(where: Any, problems: Collection[str]) -> str:
    """Returns the line to print for an older run whose config has problems."""
    return f"note: {where} is an older run and keeps what a new run refuses: {' | '.join(problems)}"
