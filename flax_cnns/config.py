"""What every config field may hold, checked before JAX starts.

`FIELDS` names the same fields as `configs/common.py`, which has their defaults and meanings; a test
holds the two together. Names that only a registry knows (models, data sets) are checked by it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax_cnns import effects
from flax_cnns.errors import UserError, did_you_mean

Check = Callable[[Any], str | None]  # None, or what was expected


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Check:
    def check(value: Any) -> str | None:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        fine = fine and low <= value <= high and abs(value) <= sys.float_info.max
        if fine and not (above and value == low):
            return None
        if high == math.inf:
            return f"a number {'above' if above else 'of at least'} {low:g}"
        return f"a number {'above' if above else 'from'} {low:g} to {high:g}"

    return check


def integer(low: int = 0) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            return f"a whole number of at least {low}"
        return None if value < 2**31 else "a whole number below 2**31"

    return check


def one_of(*names: str) -> Check:
    def check(value: Any) -> str | None:
        known = ", ".join(names)
        return None if value in names else f"one of {known}{_near(value, names)}"

    return check


def _near(value: Any, names: tuple[str, ...]) -> str:
    hint = did_you_mean(str(value), names)
    return hint if "did you mean" in hint else ""


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a text"


def word(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a name"


def duration(value: Any) -> str | None:
    fine = isinstance(value, str) and effects.DURATION.fullmatch(value)
    return None if fine else "a duration such as '20 epochs' or '500 steps'"


def durations(value: Any) -> str | None:
    fine = isinstance(value, (tuple, list)) and all(duration(v) is None for v in value)
    return None if fine else "durations such as ('30 epochs', '60 epochs')"


def shares(value: Any) -> str | None:
    fine = isinstance(value, (tuple, list)) and len(value) in (0, 2)
    fine = fine and all(isinstance(v, (int, float)) and 0 < v <= 1 for v in value)
    fine = fine and list(value) == sorted(value)
    return None if fine else "() or (smallest, largest) share of the area, within 0 to 1"


def randaugment(value: Any) -> str | None:
    fine = isinstance(value, (tuple, list)) and len(value) in (0, 2)
    if fine and value:
        fine = integer(1)(value[0]) is None and number(0, 30)(value[1]) is None
    return None if fine else "() or (operations an image, magnitude from 0 to 30) such as (2, 9)"


def rules(of: Check, what: str, *, single: bool = False) -> Check:
    """Pairs (regex, value); with `single` also one value alone, for every path."""

    def check(value: Any) -> str | None:
        expected = f"rules ((regex, {what}), …)" + (f" or ({what},)" if single else "")
        if not isinstance(value, (tuple, list)):
            return expected
        if single and len(value) == 1 and of(value[0]) is None:
            return None
        for rule in value:
            if not isinstance(rule, (tuple, list)) or len(rule) != 2 or of(rule[1]) is not None:
                return expected
            try:
                re.compile(rule[0])
            except (re.error, TypeError) as error:
                return f"{expected}; {rule[0]!r} is no regular expression ({error})"
        return None

    return check


def weight(value: Any) -> str | None:
    """A number, or corners ((duration, number), …)."""
    if number(-math.inf)(value) is None:
        return None
    fine = isinstance(value, (tuple, list)) and len(value) > 0
    fine = fine and all(
        isinstance(c, (tuple, list))
        and len(c) == 2
        and duration(c[0]) is None
        and number(-math.inf)(c[1]) is None
        for c in value
    )
    return None if fine else "a number"


def compute_dtype(value: Any) -> str | None:
    if value == "float16":  # its gradients vanish below 6e-8
        return "bfloat16 or float32 (training in float16 needs a scaled loss, and ours is not)"
    return one_of("float32", "bfloat16")(value)


def class_list(value: Any) -> str | None:
    fine = isinstance(value, (tuple, list)) and all(
        isinstance(v, (int, str)) and not isinstance(v, bool) for v in value
    )
    return None if fine else "numbers or names of classes such as (0, 3, 'Bag'), () for all"


def per_channel(low: float) -> Check:
    def check(value: Any) -> str | None:
        fine = isinstance(value, (tuple, list)) and all(number(low)(v) is None for v in value)
        return None if fine else "a number per channel such as (0.485, 0.456, 0.406), or ()"

    return check


def source_path(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "a path or None"


FIELDS: dict[str, Check] = {
    "seed": integer(),
    "model.name": word,
    "model.num_classes": integer(),
    "model.dtype": compute_dtype,
    "model.init": text,
    "model.scan": flag,
    "model.remat": flag,
    "data.name": word,
    "data.dir": text,
    "data.source": one_of("auto", "tfds", "archive", "folder"),
    "data.labels": text,
    "data.classes": class_list,
    "data.image_size": integer(1),
    "data.channels": integer(),
    "data.validation": number(),
    "data.fraction": number(0, 1, above=True),
    "data.split_seed": integer(),
    "data.batch_size": integer(1),
    "data.eval_batch_size": integer(1),
    "data.in_memory": one_of("auto", "yes", "no"),
    "data.memory_limit": number(),
    "data.threads": integer(),
    "data.workers": integer(),
    "data.skip_damaged": flag,
    "data.mock": integer(),
    "data.augment.where": one_of("device", "loader"),
    "data.augment.pad_crop": integer(),
    "data.augment.flip": flag,
    "data.augment.rotate": number(0, 180),
    "data.augment.scale": number(0, 0.99),
    "data.augment.random_resized_crop": shares,
    "data.augment.cutout": integer(),
    "data.augment.erase": number(0, 1),
    "data.augment.randaugment": randaugment,
    "data.augment.pca": number(0, 1),
    "data.augment.normalize": flag,
    "data.mean": per_channel(0.0),
    "data.std": per_channel(1e-6),
    "mix.label_smoothing": number(0, 1),
    "mix.mixup": number(),
    "mix.cutmix": number(),
    "optimizer.name": one_of("sgd", "adam", "adamw", "rmsprop", "lamb"),
    "optimizer.momentum": number(0, 1),
    "optimizer.nesterov": flag,
    "optimizer.b1": number(0, 1),
    "optimizer.b2": number(0, 1),
    "optimizer.eps": number(),
    "optimizer.decay_rate": number(0, 1),
    "optimizer.weight_decay": rules(number(), "number", single=True),
    "optimizer.weight_decay_mode": one_of("auto", "coupled", "decoupled"),
    "optimizer.l2": rules(number(), "number", single=True),
    "optimizer.max_norm": rules(number(), "number", single=True),
    "optimizer.grad_noise": number(),
    "optimizer.grad_noise_decay": number(),
    "optimizer.sam": number(),
    "optimizer.trainable": rules(flag, "True or False"),
    "optimizer.bn": rules(
        one_of("train", "frozen_stats", "frozen"), "train, frozen_stats or frozen"
    ),
    "optimizer.lr_mult": rules(number(), "number", single=True),
    "optimizer.layer_decay": number(0, 1),
    "optimizer.clip_norm": number(),
    "schedule.name": one_of("constant", "steps", "cosine", "exponential", "one_cycle", "plateau"),
    "schedule.learning_rate": number(above=True),
    "schedule.warmup": duration,
    "schedule.boundaries": durations,
    "schedule.factor": number(0, 1),
    "schedule.every": duration,
    "schedule.rate": number(0, 1),
    "schedule.end": number(),
    "schedule.pct_start": number(0, 1),
    "schedule.div_factor": number(above=True),
    "schedule.final_div_factor": number(above=True),
    "schedule.patience": integer(1),
    "schedule.min_delta": number(0, 1),
    "train.duration": duration,
    "train.parallel": one_of("shard_map", "pmap"),
    "train.sync_batchnorm": flag,
    "train.accumulate": integer(1),
    "train.ema": number(0, 1),
    "train.ema_warmup": flag,
    "train.aux_weight": rules(weight, "number", single=True),
    "train.dropout": rules(number(0, 0.99), "rate", single=True),
    "train.dropout_mode": one_of("unit", "channel"),
    "train.max_bad_steps": integer(),
    "train.precise_bn": integer(),
    "train.deterministic": flag,
    "train.eval_every": duration,
    "train.early_stopping": integer(),
    "train.test_on": one_of("latest", "best"),
    "train.evaluate_train": flag,
    "checkpoint.every": duration,
    "checkpoint.keep_latest": integer(1),
    "checkpoint.keep_best": integer(),
    "graft.source": text,
    "graft.rules": rules(source_path, "path in the source or None"),
    "graft.adapt_stem": flag,
    "graft.resize_positions": flag,
    "graft.averaged": flag,
    "log.every": duration,
    "log.tensorboard": flag,
    "log.wandb": text,
}


# Fields that runs of older versions lack, with the value by which all is as it was then: a run goes
# on, is evaluated and predicts as one with these. Whoever adds a field adds a row; a test asks.
NEWER: dict[str, Any] = {
    "data.augment.erase": 0.0,
    "data.augment.randaugment": (),
    "data.augment.pca": 0.0,
    "data.augment.where": "device",
    "mix.cutmix": 0.0,
    "optimizer.weight_decay_mode": "auto",
    "optimizer.l2": (),
    "optimizer.max_norm": (),
    "optimizer.grad_noise": 0.0,
    "optimizer.grad_noise_decay": 0.55,
    "optimizer.sam": 0.0,
    "train.dropout": (),
    "train.dropout_mode": "unit",
    "train.evaluate_train": False,
    "graft.adapt_stem": False,
    "graft.resize_positions": False,
    "graft.averaged": False,
}


def completed(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A plain config with those fields of `NEWER` that it lacks, and their names."""
    complete, added = plain(config), []
    for name, value in plain(NEWER).items():
        *parents, field = name.split(".")
        section = complete
        for parent in parents:
            section = section.setdefault(parent, {})
        if field not in section:
            section[field] = value
            added.append(name)
    return complete, added


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict or mapping -> nested dicts and lists as JSON has them (tuples become lists)."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise UserError(f"config: every value is a number, text, tuple or dict: {error}") from None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"name": "x"}}` -> `{"model.name": "x"}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return flat


def reset_as_in(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs`, the plain config of an older run. A field that cannot act there gets its default if
    `ours` has that default: older versions did not reset what they switched off."""
    here = flatten(ours)
    reset = flatten(reset_inert(theirs))
    keep = [name for name, value in reset.items() if here.get(name) != value]
    return reset_inert(theirs, keep)


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two plain configs differ, as `"seed: 0 there, 1 here"`."""
    here, there, missing = flatten(ours), flatten(theirs), object()

    def say(value: Any) -> str:
        return "absent" if value is missing else repr(value)

    return [
        f"{name}: {say(there.get(name, missing))} there, {say(here.get(name, missing))} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name, missing) != there.get(name, missing)
    ]


def validate(config: Any) -> None:
    """Raises `UserError` for an unknown or missing field, a value of the wrong kind, or fields that
    do not go together. Fields under `model` beyond the common ones are the network's to check."""
    flat = flatten(config.to_dict() if hasattr(config, "to_dict") else config)
    for name in flat:
        if name not in FIELDS and not name.startswith("model."):
            raise UserError(f"config: unknown field {name!r}{did_you_mean(name, FIELDS)}")
    for name, check in FIELDS.items():
        if name not in flat:
            raise UserError(f"config: the field {name!r} is missing; start from configs/common.py")
        if expected := check(flat[name]):
            raise UserError(f"config.{name}: expected {expected}, got {flat[name]!r}")
    _together(flat)


def inert(config: Any) -> list[str]:
    """The fields that are not at their defaults and cannot act under the other choices."""
    return list(effects.inert(flatten(config.to_dict() if hasattr(config, "to_dict") else config)))


def doubts(config: Any, facts: effects.Facts | None = None) -> list[str]:
    """A line for each thing that a new run may not have: a field that is set and cannot act, a
    value that makes no sense. Older runs go on with theirs. `config` must be valid. With `facts`:
    only the lines that depend on the network or the data."""
    flat = flatten(config.to_dict() if hasattr(config, "to_dict") else config)
    more = effects.overlong(flat, facts) if facts else effects.senseless(flat)
    return [*effects.inert(flat, facts).values(), *more]


def note(where: Any, found: Collection[str]) -> str:
    """The line to print for older runs that have `doubts`."""
    return f"note: {where} was made before this was refused, and keeps it: {' | '.join(found)}"


def reset_inert(config: Any, keep: Collection[str] = ()) -> Any:
    """A copy of a ConfigDict or mapping in which each field that cannot act under the other choices
    has its default. The run is the same. Fields in `keep` stay."""
    is_config = hasattr(config, "to_dict")
    copy = config.to_dict() if is_config else json.loads(json.dumps(config))
    flat = flatten(copy)
    for name in effects.inert(flat) if flat.keys() >= FIELDS.keys() else ():
        if name not in keep and effects.EFFECTS[name].resets:
            *parents, field = name.split(".")
            section = copy
            for parent in parents:
                section = section[parent]
            section[field] = effects.EFFECTS[name].default
    return type(config)(copy) if is_config else plain(copy)


def check_new(config: Any, where: Any, *, begun: bool, say: Callable[[str], None] = print) -> None:
    """Checks the config of runs in `where`. Raises `UserError` for the first of its `doubts`; if
    `begun`, `where` already holds such runs, and a note goes to `say` instead."""
    found = doubts(config)
    if not begun:
        refuse(found)
    elif found:
        say(note(where, found))


def refuse(found: Collection[str]) -> None:
    """Raises `UserError` with all `doubts` there are, so that they can be mended at once."""
    if found:
        raise UserError(" | ".join(found))


def _together(flat: Mapping[str, Any]) -> None:
    size, pieces = flat["data.batch_size"], flat["train.accumulate"]
    if size % pieces:
        raise UserError(
            f"config.train.accumulate: a batch of {size} does not divide into {pieces} pieces"
        )
    if size % 2 and (flat["mix.mixup"] or flat["mix.cutmix"]):
        raise UserError(
            f"config.data.batch_size: mixup and cutmix pair neighbours; {size} images leave one"
        )
    if bool(flat["data.mean"]) != bool(flat["data.std"]):
        raise UserError("config.data.mean and config.data.std: set both, or neither")
    if flat["data.channels"] not in (0, 1, 3):
        raise UserError(
            "config.data.channels: expected 0 (the data set's own), 1 or 3, "
            f"got {flat['data.channels']}"
        )
    if flat["schedule.name"] == "exponential" and not float(flat["schedule.every"].split()[0]):
        raise UserError("config.schedule.every: exponential needs some, such as '2 epochs'")
    if flat["schedule.name"] == "steps" and not flat["schedule.boundaries"]:
        raise UserError("config.schedule.boundaries: 'steps' needs some, such as ('30 epochs',)")
    everything = [[r"(.*)", r"\1"]]
    if not flat["graft.source"] and [list(rule) for rule in flat["graft.rules"]] != everything:
        raise UserError(
            "config.graft.rules: there is nothing to take from; set config.graft.source, or leave"
            " the rules as they are"
        )
    if flat["data.augment.cutout"] > 2 * flat["data.image_size"]:
        raise UserError(
            "config.data.augment.cutout: the square is larger than the image twice over"
        )
