"""Which config fields act under which other choices, and values that make no sense in a new run.

`EFFECTS` and `IN_A_RUN` hold a row for each field that other fields, the network or the data can
switch off. A field at its default is never wrong. Fields that are missing here act always, or
whether they act is unknown until the run has begun.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flax_cnns.config.checks import DURATION, is_reference
from flax_cnns.config.fields import DEFAULTS

Flat = Mapping[str, Any]  # a config by paths: {"optimizer.name": "sgd", ...}

FLOAT32_MAX, FLOAT32_MIN = (
    3.4028234e38,
    1.1754944e-38,
)  # float32: the largest, and the smallest normal number
MAX_STEPS = 2**31  # steps are counted by int32


class RunFacts(NamedTuple):
    """What is known of a run once network and data are there. The functions trace the network."""

    total: int  # steps
    count: Callable[[str], int]  # a duration in steps
    validates: bool  # whether there is a validation split
    own_validation: bool  # whether that is the data set's own, not taken from train
    has_batchnorm: Callable[[], bool]
    has_aux_heads: Callable[[], bool]
    decodes: bool = True  # whether images are decoded, and not a user's own arrays or batches


class Effect(NamedTuple):
    """When a field acts. `why` says in words what it belongs to; `{optimizer.name}` stands for the
    value of that field."""

    why: str
    acts: Callable[..., bool]  # of Flat; in `IN_A_RUN` of Flat and RunFacts
    cure: str = ""  # in place of "leave it at" the default
    resets: bool = True  # False: to reset it would change the run
    beside: str = ""  # the field that must be on, where that decides


def parse_amount(duration: Any) -> float:
    """The number of a duration; NaN for another text."""
    match = DURATION.fullmatch(str(duration))
    return float(match[1]) if match else math.nan


def is_on(value: Any) -> bool:
    """Whether a value is neither empty nor 0; for rules (regex, number), whether any number is."""
    if isinstance(value, (tuple, list)):
        return any(v for v in _leaves(value) if not isinstance(v, str))
    return bool(value)


def _only(field: str, *names: str) -> Effect:
    *most, last = names
    known = f"{', '.join(most)} and {last} have it" if most else f"{last} has it"
    return Effect(f"{known}, and {field} is {{{field}}}", lambda flat: flat[field] in names)


def _beside(field: str, what: str) -> Effect:
    why = f"{what}, and {field} is {{{field}}}"
    return Effect(why, lambda flat: is_on(flat[field]), beside=field)


def _validates(flat: Flat) -> bool:
    return parse_amount(flat["train.eval_every"]) != 0


def _looks_at_validation(flat: Flat) -> bool:
    return flat["schedule.name"] == "plateau" or is_on(flat["train.early_stopping"])


_NEVER = "and train.eval_every is {train.eval_every}: only the last step validates"
_EVERY = "set train.eval_every='1 epochs'"


def _is_own(flat: Flat) -> bool:
    """Whether the data are arrays or batches of the user's."""
    return is_reference(flat["data.name"]) or flat["data.name"].endswith(".npz")


def _is_read(otherwise: Effect | None = None) -> Effect:
    """Of a field that says how data are read: no own data, and what `otherwise` says."""
    why = "own data are not read but come as they are, and data.name is {data.name}"
    if otherwise is None:
        return Effect(why, lambda flat: not _is_own(flat))
    why = f"{otherwise.why} (or {why})"
    return Effect(why, lambda flat: not _is_own(flat) and otherwise.acts(flat))


def _is_decoded(otherwise: Effect | None = None) -> Effect:
    """Of a field that says how images are decoded, those of a user's own TFDS builder too: no file
    of arrays, and what `otherwise` says. `IN_A_RUN` knows of other own data."""
    why = "arrays are not decoded, and data.name is {data.name}"
    return Effect(
        f"{otherwise.why} (or {why})" if otherwise else why,
        lambda flat: (
            not flat["data.name"].endswith(".npz") and (otherwise is None or otherwise.acts(flat))
        ),
    )


EFFECTS: dict[str, Effect] = {
    "data.dir": Effect(
        "own data come as they are, and data.name is {data.name}",
        lambda flat: not is_reference(flat["data.name"]),  # a file's name may be below it
    ),
    "data.source": _is_read(),
    "data.image_size": _is_read(),
    "data.channels": _is_read(),
    "data.in_memory": _is_decoded(),
    "data.threads": _is_decoded(),
    "data.skip_damaged": _is_decoded(),
    "data.mock": _is_read(),
    "data.labels": _is_read(
        Effect(
            "data sets of TFDS and of archives may have several kinds, and a folder has one",
            lambda flat: (
                flat["data.source"] != "folder"
                and (flat["data.source"] != "auto" or flat["data.name"] != "folder")
            ),
        )
    ),
    "data.memory_limit": _is_decoded(_only("data.in_memory", "auto")),
    "data.workers": _is_decoded(
        Effect(
            "they decode what is streamed, and data.in_memory is {data.in_memory}",
            lambda flat: flat["data.in_memory"] != "yes",
        )
    ),
    "data.mean": _beside("data.augment.normalize", "normalization subtracts it"),
    "data.std": _beside("data.augment.normalize", "normalization divides by it"),
    "optimizer.momentum": _only("optimizer.name", "sgd", "rmsprop"),
    "optimizer.nesterov": Effect(
        "sgd with momentum has it, and optimizer.name is {optimizer.name}, optimizer.momentum"
        " {optimizer.momentum}",
        lambda flat: flat["optimizer.name"] == "sgd" and is_on(flat["optimizer.momentum"]),
    ),
    "optimizer.b1": _only("optimizer.name", "adam", "adamw", "lamb"),
    "optimizer.b2": _only("optimizer.name", "adam", "adamw", "lamb"),
    "optimizer.eps": _only("optimizer.name", "adam", "adamw", "lamb", "rmsprop"),
    "optimizer.decay_rate": _only("optimizer.name", "rmsprop"),
    "optimizer.weight_decay_mode": _beside(
        "optimizer.weight_decay", "it says how weight decay acts"
    ),
    "optimizer.grad_noise_decay": _beside(
        "optimizer.grad_noise", "it says how gradient noise falls"
    ),
    "schedule.name": Effect(
        f"plateau looks at validations, {_NEVER}",
        lambda flat: flat["schedule.name"] != "plateau" or _validates(flat),
        cure=_EVERY,
        resets=False,
    ),
    "schedule.warmup": Effect(
        "one_cycle rises by itself, and schedule.name is {schedule.name}",
        lambda flat: (
            flat["schedule.name"] != "one_cycle" or parse_amount(flat["schedule.warmup"]) == 0
        ),
    ),
    "schedule.boundaries": _only("schedule.name", "steps"),
    "schedule.factor": _only("schedule.name", "steps", "plateau"),
    "schedule.every": _only("schedule.name", "exponential"),
    "schedule.rate": _only("schedule.name", "exponential"),
    "schedule.end": _only("schedule.name", "cosine", "exponential"),
    "schedule.pct_start": _only("schedule.name", "one_cycle"),
    "schedule.div_factor": _only("schedule.name", "one_cycle"),
    "schedule.final_div_factor": _only("schedule.name", "one_cycle"),
    "schedule.patience": _only("schedule.name", "plateau"),
    "schedule.min_delta": _only("schedule.name", "plateau"),
    "train.ema_warmup": _beside("train.ema", "it says how the averaged weights begin"),
    "train.dropout_mode": _beside("train.dropout", "it says what dropout drops"),
    "train.best_by": Effect(f"the best is chosen by validations on the way, {_NEVER}", _validates),
    "train.best_mode": Effect(
        "it says which value of train.best_by is the best, and that is {train.best_by}",
        lambda flat: flat["train.best_by"] != "auto",
    ),
    "train.test_on": Effect(f"the best is chosen by validations on the way, {_NEVER}", _validates),
    "train.early_stopping": Effect(
        f"it counts validations on the way, {_NEVER}", _validates, cure=_EVERY
    ),
    "checkpoint.keep_best": Effect(
        f"the best are chosen by validations on the way, {_NEVER}",
        lambda flat: flat["checkpoint.keep_best"] == 0 or _validates(flat),
    ),
    "graft.rules": _beside("graft.source", "they say what is taken from the source"),
    "graft.adapt_stem": _beside("graft.source", "it changes what is taken"),
    "graft.resize_positions": _beside("graft.source", "it changes what is taken"),
    "graft.averaged": _beside("graft.source", "it chooses among a file's weights"),
}


# ---- what depends on the network or the data


def _ends_before(field: str) -> Callable[[Flat, RunFacts], bool]:
    return lambda flat, facts: facts.count(flat[field]) <= facts.total


def _constant(*fields: str) -> str:
    """The cure for a rate that never changes: to say so. The fields of the schedule would be
    refused then."""
    *most, last = (f"schedule.{field}={DEFAULTS[f'schedule.{field}']!r}" for field in fields)
    return f"schedule.name='constant' with {', '.join(most)} and {last}"


_NO_BATCHNORM = "the network {model.name} has no BatchNorm"
_NO_VALIDATION = "validations choose the best, and there is no validation split"

IN_A_RUN: dict[str, Effect] = {
    "data.validation": Effect(
        "{data.name} has a validation split of its own, and that is taken",
        # 0 takes nothing from train, and nothing is taken. Where something looks at validations, 0
        # contradicts it.
        lambda flat, facts: (
            not facts.own_validation
            or (flat["data.validation"] == 0 and not _looks_at_validation(flat))
        ),
    ),
    "schedule.warmup": Effect(
        "the warm-up is longer than the run, train.duration={train.duration}: the rate would never"
        " reach schedule.learning_rate",
        _ends_before("schedule.warmup"),
        cure="shorten it, or train longer",
    ),
    "schedule.boundaries": Effect(
        "the run, train.duration={train.duration}, ends before the first of them: the rate would"
        " never change",
        lambda flat, facts: (
            flat["schedule.name"] != "steps"
            or any(facts.count(at) < facts.total for at in flat["schedule.boundaries"])
        ),
        cure=f"take earlier ones, or {_constant('boundaries', 'factor')}",
    ),
    "schedule.every": Effect(
        "the run, train.duration={train.duration}, ends before that: the rate would never change",
        lambda flat, facts: (
            flat["schedule.name"] != "exponential"
            or facts.count(flat["schedule.warmup"]) + facts.count(flat["schedule.every"])
            < facts.total
        ),
        cure=f"take a shorter one, or {_constant('every', 'rate', 'end')}",
    ),
    "train.sync_batchnorm": Effect(_NO_BATCHNORM, lambda flat, facts: facts.has_batchnorm()),
    "train.precise_bn": Effect(_NO_BATCHNORM, lambda flat, facts: facts.has_batchnorm()),
    "train.aux_weight": Effect(
        "the network {model.name} has no auxiliary heads",
        lambda flat, facts: not is_on(flat["train.aux_weight"]) or facts.has_aux_heads(),
    ),
    **{
        f"data.{field}": Effect(
            "arrays and batches of your own are not decoded, and data.name is {data.name}",
            lambda flat, facts: facts.decodes,
        )
        for field in ("in_memory", "memory_limit", "workers", "threads", "skip_damaged")
    },
    "train.best_by": Effect(_NO_VALIDATION, lambda flat, facts: facts.validates),
    "train.test_on": Effect(_NO_VALIDATION, lambda flat, facts: facts.validates),
    "checkpoint.keep_best": Effect(
        _NO_VALIDATION,
        lambda flat, facts: flat["checkpoint.keep_best"] == 0 or facts.validates,
    ),
}


def find_inert(flat: Flat, facts: RunFacts | None = None) -> dict[str, str]:
    """{field: a line that says why} for the fields that are set and cannot act. Without `facts` the
    config alone decides; with `facts` the network and the data alone do."""
    found = {}
    for field, effect in (EFFECTS if facts is None else IN_A_RUN).items():
        given = (flat,) if facts is None else (flat, facts)
        if _plain(flat[field]) == _plain(DEFAULTS[field]) or effect.acts(*given):
            continue
        why = re.sub(r"\{([\w.]+)\}", lambda match: repr(flat[match[1]]), effect.why)
        cure = effect.cure or f"leave it at {DEFAULTS[field]!r}"
        found[field] = f"config.{field}={flat[field]!r}: {why}; {cure}"
    return found


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


# ---- values that make no sense


def find_bad_values(flat: Flat) -> Iterator[str]:
    """A line for each value that a new run may not have; older runs go on with theirs. `flat` has
    passed the checks of its fields."""

    def say(field: str, expected: str) -> str:
        return f"config.{field}: expected {expected}, got {flat[field]!r}"

    for field in ("data.mean", "data.std"):
        if any(value > 1 for value in flat[field]):
            yield say(field, "numbers of images in 0..1, such as 0.485 (those of 0..255, over 255)")
    for field in ("optimizer.b1", "optimizer.b2"):
        if flat[field] == 1:
            yield say(field, "a number from 0 to below 1, as Adam divides by 1 - b^step")
    if flat["train.ema"] == 1 and not flat["train.ema_warmup"]:
        yield say("train.ema", "a number from 0 to below 1: with 1 the average never moves")
    if flat["mix.label_smoothing"] == 1:
        yield say("mix.label_smoothing", "a number from 0 to below 1: with 1 no label is left")
    name, rate = flat["schedule.name"], flat["schedule.learning_rate"]
    if name in ("cosine", "exponential") and flat["schedule.end"] > rate:
        yield say("schedule.end", f"a last rate of at most schedule.learning_rate={rate!r}")
    for field in ("schedule.div_factor", "schedule.final_div_factor"):
        if name == "one_cycle" and flat[field] < 1:
            yield say(field, "a number of at least 1: the rate starts low, and ends lower")
    for field in flat:
        if any(parse_amount(value) >= MAX_STEPS for value in _durations(flat[field])):
            yield say(field, "a duration below 2**31")
        if any(
            value and not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX
            for value in _numbers(flat[field])
        ):
            yield say(field, "a number that float32 holds: 0, or 1.2e-38 to 3.4e38")


def find_long_durations(flat: Flat, facts: RunFacts) -> Iterator[str]:
    """A line for each duration in epochs that is too many steps."""
    for field, value in flat.items():
        for duration in _durations(value):
            if (count := facts.count(duration)) >= MAX_STEPS:
                yield f"config.{field}: {duration!r} are {count:,} steps; expected fewer than 2**31"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _durations(value: Any) -> list[str]:
    return [v for v in _leaves(value) if isinstance(v, str) and DURATION.fullmatch(v)]


def _numbers(value: Any) -> list[float]:
    return [v for v in _leaves(value) if isinstance(v, (int, float)) and not isinstance(v, bool)]
