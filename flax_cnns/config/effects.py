"""Finds config fields that have no effect, and values that make no sense in a new run.

`EFFECTS` and `RUN_EFFECTS` have a row for each field that other fields, the network or the data can
switch off. A field at its default is never reported. A field without a row always has an effect, or
only the run itself can tell whether it has one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flax_cnns.config.checks import DURATION, is_reference
from flax_cnns.config.fields import DEFAULTS

Flat = Mapping[str, Any]  # a flat config: {"optimizer.name": "sgd", ...}

FLOAT32_MAX = 3.4028234e38
FLOAT32_MIN = 1.1754944e-38  # the smallest positive normal number
MAX_STEPS = 2**31  # steps are counted in int32


class RunFacts(NamedTuple):
    """Facts about a run that depend on its network and data. `has_batchnorm` and `has_aux_heads`
    trace the network."""

    total_steps: int
    count_steps: Callable[[str], int]  # duration -> steps
    has_validation: bool
    has_own_validation: bool  # the data set has a validation split; none is taken from train
    has_batchnorm: Callable[[], bool]
    has_aux_heads: Callable[[], bool]
    decodes_images: bool = True  # False for a user's own arrays and batches


class Effect(NamedTuple):
    """When a field has an effect. `reason` is the message if the field has none; in the message,
    `{optimizer.name}` stands for the value of that field."""

    reason: str
    has_effect: Callable[..., bool]  # (Flat) -> bool; in `RUN_EFFECTS` (Flat, RunFacts) -> bool
    fix: str = ""  # replaces "leave it at DEFAULT" in the message
    can_reset: bool = True  # False: resetting the field to its default would change the run
    needs: str = ""  # the field that must be on for this field to have an effect


def parse_amount(duration: Any) -> float:
    """Returns the number of a duration; NaN for any other string."""
    match = DURATION.fullmatch(str(duration))
    return float(match[1]) if match else math.nan


def is_on(value: Any) -> bool:
    """Whether a value is neither empty nor 0. Rules (regex, number) are on if any number is not
    0."""
    if isinstance(value, (tuple, list)):
        return any(v for v in _leaves(value) if not isinstance(v, str))
    return bool(value)


def _used_only_by(field: str, *names: str) -> Effect:
    *most, last = names
    users = f"{', '.join(most)} and {last} use it" if most else f"{last} uses it"
    return Effect(f"only {users}, and {field} is {{{field}}}", lambda flat: flat[field] in names)


def _needs(field: str, purpose: str) -> Effect:
    reason = f"{purpose}, and {field} is {{{field}}}"
    return Effect(reason, lambda flat: is_on(flat[field]), needs=field)


def _validates(flat: Flat) -> bool:
    return parse_amount(flat["train.eval_every"]) != 0


def _needs_validation(flat: Flat) -> bool:
    return flat["schedule.name"] == "plateau" or is_on(flat["train.early_stopping"])


_ONLY_LAST = "but train.eval_every is {train.eval_every}: only the last step validates"
_SET_EVERY = "set train.eval_every='1 epochs'"
_BEST_BY_VALIDATIONS = f"validations during the run choose the best checkpoint, {_ONLY_LAST}"


def _is_own_data(flat: Flat) -> bool:
    """Whether the data are the user's own arrays or batches."""
    return is_reference(flat["data.name"]) or flat["data.name"].endswith(".npz")


def _needs_reading(also: Effect | None = None) -> Effect:
    """Returns the effect of a field that says how data are read: the field has an effect if the
    data are not the user's own, and if `also`, when given, has an effect."""
    reason = "your own data are used as they are, and data.name is {data.name}"
    if also is None:
        return Effect(reason, lambda flat: not _is_own_data(flat))
    reason = f"{also.reason} (or {reason})"
    return Effect(reason, lambda flat: not _is_own_data(flat) and also.has_effect(flat))


def _needs_decoding(also: Effect | None = None) -> Effect:
    """Returns the effect of a field that says how images are decoded: the field has an effect if
    the data are not a file of arrays, and if `also`, when given, has an effect. The images of a
    user's own TFDS builder are decoded too. `RUN_EFFECTS` covers users' own arrays and batches."""
    reason = "arrays are not decoded, and data.name is {data.name}"
    return Effect(
        f"{also.reason} (or {reason})" if also else reason,
        lambda flat: (
            not flat["data.name"].endswith(".npz") and (also is None or also.has_effect(flat))
        ),
    )


EFFECTS: dict[str, Effect] = {
    "data.dir": Effect(
        "your own data are used as they are, and data.name is {data.name}",
        lambda flat: not is_reference(flat["data.name"]),  # a file of arrays may lie in data.dir
    ),
    "data.source": _needs_reading(),
    "data.image_size": _needs_reading(),
    "data.channels": _needs_reading(),
    "data.in_memory": _needs_decoding(),
    "data.decoder": _needs_decoding(
        Effect(
            "random images are not decoded, and data.mock is {data.mock}",
            lambda flat: not flat["data.mock"],
        )
    ),
    "data.threads": _needs_decoding(),
    "data.skip_damaged": _needs_decoding(),
    "data.mock": _needs_reading(),
    "data.labels": _needs_reading(
        Effect(
            "only TFDS data sets and archives may have several kinds of labels; a folder has one",
            lambda flat: (
                flat["data.source"] != "folder"
                and (flat["data.source"] != "auto" or flat["data.name"] != "folder")
            ),
        )
    ),
    "data.memory_limit": _needs_decoding(_used_only_by("data.in_memory", "auto")),
    "data.workers": _needs_decoding(
        Effect(
            "they decode streamed images, and data.in_memory is {data.in_memory}",
            lambda flat: flat["data.in_memory"] != "yes",
        )
    ),
    "data.mean": _needs("data.augment.normalize", "normalization subtracts it"),
    "data.std": _needs("data.augment.normalize", "normalization divides by it"),
    "data.augment.alternate_flip": _needs("data.augment.flip", "it says which images are mirrored"),
    "optimizer.momentum": _used_only_by("optimizer.name", "sgd", "muon", "rmsprop"),
    "optimizer.nesterov": Effect(
        "only sgd and muon with momentum use it, and optimizer.name is {optimizer.name},"
        " optimizer.momentum is {optimizer.momentum}",
        lambda flat: (
            flat["optimizer.name"] in ("sgd", "muon") and is_on(flat["optimizer.momentum"])
        ),
    ),
    "optimizer.b1": _used_only_by("optimizer.name", "adam", "adamw", "lamb"),
    "optimizer.b2": _used_only_by("optimizer.name", "adam", "adamw", "lamb"),
    "optimizer.eps": _used_only_by("optimizer.name", "adam", "adamw", "lamb", "rmsprop"),
    "optimizer.decay_rate": _used_only_by("optimizer.name", "rmsprop"),
    "optimizer.weight_decay_mode": _needs(
        "optimizer.weight_decay", "it says how weight decay acts"
    ),
    "optimizer.grad_noise_decay": _needs(
        "optimizer.grad_noise", "it says how gradient noise decays"
    ),
    "schedule.name": Effect(
        f"plateau needs validations during the run, {_ONLY_LAST}",
        lambda flat: flat["schedule.name"] != "plateau" or _validates(flat),
        fix=_SET_EVERY,
        can_reset=False,
    ),
    "schedule.warmup": Effect(
        "one_cycle has its own warm-up, and schedule.name is {schedule.name}",
        lambda flat: (
            flat["schedule.name"] != "one_cycle" or parse_amount(flat["schedule.warmup"]) == 0
        ),
    ),
    "schedule.boundaries": _used_only_by("schedule.name", "steps"),
    "schedule.factor": _used_only_by("schedule.name", "steps", "plateau"),
    "schedule.every": _used_only_by("schedule.name", "exponential"),
    "schedule.rate": _used_only_by("schedule.name", "exponential"),
    "schedule.end": _used_only_by("schedule.name", "cosine", "exponential"),
    "schedule.pct_start": _used_only_by("schedule.name", "one_cycle"),
    "schedule.div_factor": _used_only_by("schedule.name", "one_cycle"),
    "schedule.final_div_factor": _used_only_by("schedule.name", "one_cycle"),
    "schedule.patience": _used_only_by("schedule.name", "plateau"),
    "schedule.min_delta": _used_only_by("schedule.name", "plateau"),
    "train.ema_warmup": _needs("train.ema", "it changes the first steps of the average"),
    "train.dropout_mode": _needs("train.dropout", "it says what dropout drops"),
    "train.best_by": Effect(_BEST_BY_VALIDATIONS, _validates),
    "train.best_mode": Effect(
        "it is for a metric that train.best_by names, and train.best_by is {train.best_by}",
        lambda flat: flat["train.best_by"] != "auto",
    ),
    "train.test_on": Effect(
        _BEST_BY_VALIDATIONS, lambda flat: flat["train.test_on"] == "never" or _validates(flat)
    ),
    "train.early_stopping": Effect(
        f"it counts validations during the run, {_ONLY_LAST}", _validates, fix=_SET_EVERY
    ),
    "checkpoint.keep_best": Effect(
        _BEST_BY_VALIDATIONS,
        lambda flat: flat["checkpoint.keep_best"] == 0 or _validates(flat),
    ),
    "graft.rules": _needs("graft.source", "they say which weights are taken from the source"),
    "graft.adapt_stem": _needs("graft.source", "it adapts the weights of the source"),
    "graft.resize_positions": _needs("graft.source", "it adapts the weights of the source"),
    "graft.averaged": _needs("graft.source", "it selects weights of the source"),
}


# ---- effects that depend on the network or the data


def _fits_into_run(field: str) -> Callable[[Flat, RunFacts], bool]:
    return lambda flat, facts: facts.count_steps(flat[field]) <= facts.total_steps


def _suggest_constant(*fields: str) -> str:
    """Returns the fix for a rate that never changes: a constant schedule. The `fields` must then be
    at their defaults, because a new run refuses fields without effect."""
    *most, last = (f"schedule.{field}={DEFAULTS[f'schedule.{field}']!r}" for field in fields)
    return f"schedule.name='constant' with {', '.join(most)} and {last}"


_NO_BATCHNORM = "the network {model.name} has no BatchNorm"
_NO_VALIDATION = "validations choose the best checkpoint, and there is no validation split"

RUN_EFFECTS: dict[str, Effect] = {
    "data.validation": Effect(
        "{data.name} has a validation split of its own, which is used",
        # With 0, nothing is taken from train, which is true here too. But 0 contradicts a schedule
        # or early stopping that needs validations.
        lambda flat, facts: (
            not facts.has_own_validation
            or (flat["data.validation"] == 0 and not _needs_validation(flat))
        ),
    ),
    "schedule.warmup": Effect(
        "the warm-up is longer than the run, train.duration={train.duration}: the rate would never"
        " reach schedule.learning_rate",
        _fits_into_run("schedule.warmup"),
        fix="shorten it, or train longer",
    ),
    "schedule.boundaries": Effect(
        "the run, train.duration={train.duration}, ends before the first boundary: the rate would"
        " never change",
        lambda flat, facts: (
            flat["schedule.name"] != "steps"
            or any(facts.count_steps(at) < facts.total_steps for at in flat["schedule.boundaries"])
        ),
        fix=f"take earlier ones, or {_suggest_constant('boundaries', 'factor')}",
    ),
    "schedule.every": Effect(
        "the run, train.duration={train.duration}, ends before the first change: the rate would"
        " never change",
        lambda flat, facts: (
            flat["schedule.name"] != "exponential"
            or facts.count_steps(flat["schedule.warmup"])
            + facts.count_steps(flat["schedule.every"])
            < facts.total_steps
        ),
        fix=f"take a shorter one, or {_suggest_constant('every', 'rate', 'end')}",
    ),
    "train.sync_batchnorm": Effect(_NO_BATCHNORM, lambda flat, facts: facts.has_batchnorm()),
    "train.precise_bn": Effect(_NO_BATCHNORM, lambda flat, facts: facts.has_batchnorm()),
    "train.aux_weight": Effect(
        "the network {model.name} has no auxiliary heads",
        lambda flat, facts: not is_on(flat["train.aux_weight"]) or facts.has_aux_heads(),
    ),
    **{
        f"data.{field}": Effect(
            "your own arrays and batches are not decoded, and data.name is {data.name}",
            lambda flat, facts: facts.decodes_images,
        )
        for field in ("in_memory", "memory_limit", "workers", "decoder", "threads", "skip_damaged")
    },
    "train.best_by": Effect(_NO_VALIDATION, lambda flat, facts: facts.has_validation),
    "train.test_on": Effect(
        _NO_VALIDATION,
        lambda flat, facts: flat["train.test_on"] == "never" or facts.has_validation,
    ),
    "checkpoint.keep_best": Effect(
        _NO_VALIDATION,
        lambda flat, facts: flat["checkpoint.keep_best"] == 0 or facts.has_validation,
    ),
}


def find_inert(flat: Flat, facts: RunFacts | None = None) -> dict[str, str]:
    """Returns {field: message} for the fields that are not at their defaults and have no effect.

    Without `facts`, only effects that depend on the config alone are checked. With `facts`, only
    effects that depend on the network or the data are checked.
    """
    messages = {}
    for field, effect in (EFFECTS if facts is None else RUN_EFFECTS).items():
        given = (flat,) if facts is None else (flat, facts)
        if _to_lists(flat[field]) == _to_lists(DEFAULTS[field]) or effect.has_effect(*given):
            continue
        reason = re.sub(r"\{([\w.]+)\}", lambda match: repr(flat[match[1]]), effect.reason)
        fix = effect.fix or f"leave it at {DEFAULTS[field]!r}"
        messages[field] = f"config.{field}={flat[field]!r}: {reason}; {fix}"
    return messages


def _to_lists(value: Any) -> Any:
    return [_to_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


# ---- values that make no sense


def find_bad_values(flat: Flat) -> Iterator[str]:
    """Yields a message for each value that a new run refuses; older runs keep such values. `flat`
    has passed the checks of its fields."""

    def describe(field: str, expected: str) -> str:
        return f"config.{field}: expected {expected}, got {flat[field]!r}"

    for field in ("data.mean", "data.std"):
        if any(value > 1 for value in flat[field]):
            yield describe(
                field, "values for images in 0..1, such as 0.485 (divide those for 0..255 by 255)"
            )
    for field in ("optimizer.b1", "optimizer.b2"):
        if flat[field] == 1:
            yield describe(
                field, "a number of at least 0 and below 1, as Adam divides by 1 - b^step"
            )
    if flat["train.ema"] == 1 and not flat["train.ema_warmup"]:
        yield describe(
            "train.ema", "a number of at least 0 and below 1: with 1 the average never moves"
        )
    if flat["mix.label_smoothing"] == 1:
        yield describe(
            "mix.label_smoothing", "a number of at least 0 and below 1: with 1 all labels are equal"
        )
    name, rate = flat["schedule.name"], flat["schedule.learning_rate"]
    if name in ("cosine", "exponential") and flat["schedule.end"] > rate:
        yield describe("schedule.end", f"a rate of at most schedule.learning_rate={rate!r}")
    for field in ("schedule.div_factor", "schedule.final_div_factor"):
        if name == "one_cycle" and flat[field] < 1:
            yield describe(field, "a number of at least 1: the rate starts low and ends lower")
    for field in flat:
        if any(parse_amount(value) >= MAX_STEPS for value in _durations(flat[field])):
            yield describe(field, "a duration below 2**31")
        if any(
            value and not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX
            for value in _numbers(flat[field])
        ):
            yield describe(field, "a number that float32 holds: 0, or 1.2e-38 to 3.4e38")


def find_long_durations(flat: Flat, facts: RunFacts) -> Iterator[str]:
    """Yields a message for each duration that has too many steps."""
    for field, value in flat.items():
        for duration in _durations(value):
            if (count := facts.count_steps(duration)) >= MAX_STEPS:
                yield f"config.{field}: {duration!r} is {count:,} steps; expected fewer than 2**31"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _durations(value: Any) -> list[str]:
    return [v for v in _leaves(value) if isinstance(v, str) and DURATION.fullmatch(v)]


def _numbers(value: Any) -> list[float]:
    return [v for v in _leaves(value) if isinstance(v, (int, float)) and not isinstance(v, bool)]
