"""The user's own parts of a run: network, data, loss, metrics, optimizer, regularizers, callbacks.

A config names own parts as "package.module:Name". They are imported, also from the current folder.
`run` also takes objects. An importable function or class is written into the config by its name.
Any other object is opaque: its reference is "<opaque>:Name", and it exists in this process only.

`own.NAME.FIELD` in a config are the keyword arguments of the own part NAME.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flax_cnns.config import flatten, to_plain
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs.network import to_tuples
from flax_cnns.runs.references import (
    KINDS_WITH_SEVERAL,
    OPAQUE,
    PART_FIELDS,
    find_references,
    import_reference,
    make_reference,
    name_of,
)
from flax_cnns.train import checks, regularizers
from flax_cnns.train.regularizers import Regularizer

# The arguments of each hook of a callback.
CALLBACK_HOOKS = {
    "on_step": ("step", "numbers"),
    "on_validation": ("step", "numbers"),
    "on_save": ("step",),
}
DIGEST_LENGTH = 16
OpaqueObjects = Mapping[str, Any]  # reference -> object that only this process has


class OwnParts(NamedTuple):
    """The own parts of a run, ready to use. Kinds that the run does not have are None or empty."""

    network: Any = None  # a class, function or instance of a linen module
    make_data: Callable[[], Dataset] | None = None
    optimizer: Callable | None = None  # (learning_rate_schedule, **fields)
    optimizer_fields: Mapping[str, Any] = {}
    loss: Callable | None = None
    metrics: Mapping[str, Callable] = {}
    regularizers: Mapping[str, Regularizer] = {}
    callbacks: tuple[Any, ...] = ()
    record: Mapping[str, Any] = {}  # {kind: [{name, opaque, fields, digest}]}, see `own.json`
    notes: tuple[str, ...] = ()  # about own parts that have no effect


# ---------------------------------------------------------------------------- objects to config


def write_to_config(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Writes references to the objects that `run` got into `config`, a ConfigDict.

    `given` is {kind: object}. A string is a reference, or the name of a part of this package.
    Returns {reference: object} of the opaque objects. Raises UserError for unsuitable objects.
    """
    objects: dict[str, Any] = {}
    for kind, value in given.items():
        if value is None:
            continue
        section, _, field = PART_FIELDS[kind].partition(".")
        if kind in KINDS_WITH_SEVERAL:
            names = tuple(
                _make_field_value(kind, part, objects, alias)
                for alias, part in _list_parts(kind, value)
            )
            with config.ignore_type():
                config[section][field] = names
        else:
            config[section][field] = _make_field_value(kind, value, objects)
    return objects


def _list_parts(kind: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Returns (alias or "", object) of each part."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{kind}: expected a list (or {{name: ...}}), got {value!r}")
    return [("", part) for part in value]


def _make_field_value(kind: str, value: Any, objects: dict[str, Any], alias: str = "") -> str:
    """Returns the value for the config field. Adds an opaque object to `objects`."""
    reference = value if isinstance(value, str) else make_reference(value)
    if reference is None:
        name = alias or _object_name(value) or kind
        reference = f"{OPAQUE}:{name}"
        if kind not in KINDS_WITH_SEVERAL and objects.get(reference, value) is not value:
            reference = f"{OPAQUE}:{name}_{kind}"  # a part of another kind has this name
        if objects.get(reference, value) is not value:
            raise UserError(f"{kind}: two objects are called {name!r}; name them: {{NAME: ...}}")
        objects[reference] = value
    if not alias or alias == name_of(reference):
        return reference
    if kind != "metrics":
        raise UserError(f"{kind}: {reference} is called {name_of(reference)!r}, got {alias!r}")
    return f"{alias}={reference}"


def _object_name(value: Any) -> str:
    """Returns the name of an object; "" for a lambda."""
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, Dataset):
        return re.sub(r"\W", "_", value.name) or "arrays"
    name = getattr(value, "__name__", None) or type(value).__name__
    return "" if name == "<lambda>" else re.sub(r"\W", "", name)


# ---------------------------------------------------------------------------- config to objects


def resolve(
    config: Any, objects: OpaqueObjects | None = None, *, callbacks: bool = True
) -> OwnParts:
    """Imports and creates the own parts that a config names.

    `objects` holds the opaque objects by reference. With `callbacks=False` no callback is created:
    a callback may truncate a file. Raises UserError for a name that cannot be imported, a field
    that its part does not take, and fields that belong to no part.
    """
    references = find_references(config)
    fields = to_plain(config.get("own", {}) or {})
    _check_names(references, fields)
    objects, flat = objects or {}, flatten(config)
    record: dict[str, list[dict[str, Any]]] = {}

    def get(kind: str, reference: str) -> Any:
        part = objects.get(reference)
        part = import_reference(reference, PART_FIELDS[kind]) if part is None else part
        record.setdefault(kind, []).append(_describe(reference, part, fields, config, kind))
        return part

    def get_single(kind: str) -> tuple[Any, dict[str, Any]]:
        if kind not in references:
            return None, {}
        (reference,) = references[kind]
        return get(kind, reference), _fields_for(reference, fields)

    network, _ = get_single("model")
    data, data_fields = get_single("data")
    optimizer, optimizer_fields = get_single("optimizer")
    loss, loss_fields = get_single("loss")
    metrics: dict[str, Callable] = {}
    active: dict[str, Regularizer] = {}
    created_callbacks, notes = [], []
    for value in flat.get("train.metrics", ()):
        match = re.fullmatch(r"(?:(\w+)=)?(.*)", value)
        assert match is not None  # matches every line
        alias, reference = match.groups()
        part, part_fields = get("metrics", reference), _fields_for(reference, fields)
        function = _with_fields(part, part_fields, reference)
        if (name := alias or name_of(reference)) in metrics:
            raise UserError(f"train.metrics: two metrics are {name!r}; rename one: NAME={value}")
        metrics[name] = function
    for reference in references.get("regularizers", ()):
        part, part_fields = get("regularizers", reference), _fields_for(reference, fields)
        _check_fields(part, part_fields, reference)  # also of a regularizer that is off
        if why := _why_off(part, part_fields):
            notes.append(f"the regularizer {name_of(reference)} is off: {why}")
        else:
            instance = _make_instance(part, part_fields, reference)
            active[name_of(reference)] = regularizers.make_regularizer(name_of(reference), instance)
    for reference in references.get("callbacks", ()) if callbacks else ():
        part, part_fields = get("callbacks", reference), _fields_for(reference, fields)
        instance = _make_instance(part, part_fields, reference)
        _check_callback(instance)
        created_callbacks.append(instance)
    if optimizer is not None:
        if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
            raise UserError(
                "optimizer: expected a factory (learning_rate_schedule, **fields), got an optimizer"
                " that already exists; pass lambda rate: optax.sgd(rate)"
            )
        _check_call(optimizer, {**optimizer_fields}, references["optimizer"][0], skip=1)
    if loss is not None:
        loss = _with_fields(loss, loss_fields, references["loss"][0])
    make_data = None
    if data is not None:
        make_data = functools.partial(_make_data, data, data_fields, references["data"][0])
    return OwnParts(
        network=network,
        make_data=make_data,
        optimizer=optimizer,
        optimizer_fields=optimizer_fields,
        loss=loss,
        metrics=metrics,
        regularizers=active,
        callbacks=tuple(created_callbacks),
        record=record,
        notes=tuple(notes),
    )


def make_data(config: Any, objects: OpaqueObjects | None = None) -> Dataset | None:
    """Makes the own data that a config names; None if the data set is one of this package."""
    references = find_references(config).get("data")
    if not references:
        return None
    (reference,) = references
    data = (objects or {}).get(reference)
    data = import_reference(reference, PART_FIELDS["data"]) if data is None else data
    fields = to_plain(config.get("own", {}) or {})
    return _make_data(data, _fields_for(reference, fields), reference)


def find_network(config: Any, objects: OpaqueObjects | None = None) -> Any:
    """Returns the own network of a config for `network.make_model`; None for a registered one."""
    references = find_references(config).get("model")
    if not references:
        return None
    network = (objects or {}).get(references[0])
    return import_reference(references[0], PART_FIELDS["model"]) if network is None else network


def _check_names(references: Mapping[str, list[str]], fields: Mapping[str, Any]) -> None:
    """Raises UserError if `own.NAME` names no part or several, or if two parts share a name."""
    names = [name_of(ref) for kind, refs in references.items() if kind != "model" for ref in refs]
    for name in fields:
        if name in map(name_of, references.get("model", ())) and name not in names:
            raise UserError(f"config.own.{name}: a network's fields are config.model.FIELD")
        if name not in names:
            near = did_you_mean(name, names) or "; the config names no own parts"
            raise UserError(f"config.own.{name}: no own part is called {name!r}{near}")
        if names.count(name) > 1:
            raise UserError(f"config.own.{name}: {names.count(name)} own parts have this name")
        if not isinstance(fields[name], Mapping):
            raise UserError(f"config.own.{name}: expected fields, own.{name}.FIELD=value")
    for kind in ("regularizers", "callbacks"):
        known = [name_of(ref) for ref in references.get(kind, ())]
        if twice := [name for name in known if known.count(name) > 1]:
            raise UserError(f"train.{kind}: two {kind} are called {twice[0]!r}")


def _fields_for(reference: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_tuples(v) for name, v in fields.get(name_of(reference), {}).items()}


def _check_call(part: Any, fields: Mapping[str, Any], reference: str, skip: int = 0) -> None:
    """Raises UserError unless `part` takes these keyword arguments, after `skip` other ones."""
    name = name_of(reference)
    if not callable(part):
        raise UserError(f"{reference}: expected a function or a class, got a {type(part).__name__}")
    try:
        parameters = list(inspect.signature(part).parameters.values())[skip:]
    except (TypeError, ValueError):
        return
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return
    by_name = (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    known = [p.name for p in parameters if p.kind in by_name]
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known) or "; it has no fields"
            raise UserError(f"config.own.{name}.{field}: {reference} has no such field{near}")


def _with_fields(function: Callable, fields: dict[str, Any], reference: str) -> Callable:
    _check_call(function, fields, reference)
    return functools.partial(function, **fields) if fields else function


def _is_factory(part: Any) -> bool:
    """Whether `part` is a class or a function that makes the own part, and not the part itself."""
    return isinstance(part, (type, functools.partial)) or hasattr(part, "__qualname__")


def _check_fields(part: Any, fields: dict[str, Any], reference: str) -> None:
    """Raises UserError for fields that the class, function or object does not take."""
    if _is_factory(part):
        _check_call(part, fields, reference)
    elif fields:
        raise UserError(
            f"config.own.{name_of(reference)}: {reference} is an object, whose fields are already"
            " set; pass the class to run() to set them in the config"
        )


def _make_instance(part: Any, fields: dict[str, Any], reference: str) -> Any:
    """Calls a class or a function with its fields. Returns any other object unchanged."""
    _check_fields(part, fields, reference)
    if not _is_factory(part):
        return part
    try:
        inspect.signature(part).bind(**fields)
    except TypeError as error:
        expected = "" if inspect.isclass(part) else "expected a class or a factory function; "
        raise UserError(
            f"{reference}: {expected}{error}; its fields are own.{name_of(reference)}.*"
        ) from None
    return part(**fields)


def _why_off(part: Any, fields: Mapping[str, Any]) -> str:
    """Returns why a regularizer is off (first field 0, False, None or empty); "" if it is on."""
    if _is_factory(part):
        first = next(iter(inspect.signature(part).parameters.values()), None)
        if first is None or (first.name not in fields and first.default is first.empty):
            return ""
        name, value = first.name, fields.get(first.name, first.default)
    elif dataclasses.is_dataclass(part) and dataclasses.fields(part):
        name = dataclasses.fields(part)[0].name
        value = getattr(part, name)
    else:
        return ""
    off = value is None or (isinstance(value, (bool, int, float, str, tuple, list)) and not value)
    return f"{name}, its first field, is {value!r}" if off else ""


def _check_callback(callback: Any) -> None:
    """Raises UserError if the object has no hook, or has a hook with wrong arguments."""
    what = f"train.callbacks: {type(callback).__name__}"
    for name in dir(callback):
        is_hook = name.startswith("on_") and callable(getattr(callback, name))
        if is_hook and name not in CALLBACK_HOOKS:
            near = did_you_mean(name, CALLBACK_HOOKS)
            raise UserError(f"{what} has {name!r}, which is never called{near}")
    hooks = [name for name in CALLBACK_HOOKS if callable(getattr(callback, name, None))]
    if not hooks:
        known = [name for name in dir(callback) if not name.startswith("_")]
        has = ", ".join(known[:8]) or "nothing"
        raise UserError(f"{what} has none of {', '.join(CALLBACK_HOOKS)}; it has {has}")
    for name in hooks:
        checks.check_arguments(f"{what}, {name}", getattr(callback, name), CALLBACK_HOOKS[name])


def _make_data(data: Any, fields: dict[str, Any], reference: str) -> Dataset:
    if isinstance(data, Dataset):
        if fields:
            raise UserError(f"config.own.{name_of(reference)}: a Dataset takes no fields")
        return data
    if hasattr(data, "as_data_source"):  # a TFDS builder, or the class of one
        return Dataset.from_tfds(data, **fields)
    if callable(data):
        _check_call(data, fields, reference)
    made = data(**fields) if callable(data) else data
    if not isinstance(made, Dataset):
        raise UserError(
            f"{reference}: expected a flax_cnns.Dataset, or a function that returns one, got a"
            f" {type(made).__name__}; Dataset.from_arrays(train=(images, labels)) makes one"
        )
    return made


def compute_digest(part: Any) -> str | None:
    """Returns a digest of the source of a function or class; None if the source is unknown."""
    try:
        source = inspect.getsource(part)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:DIGEST_LENGTH]


def _describe(
    reference: str, part: Any, fields: Mapping[str, Any], config: Any, kind: str
) -> dict[str, Any]:
    if kind == "model":
        own_fields = {name: v for name, v in to_plain(config.model).items() if name != "name"}
    else:
        own_fields = dict(fields.get(name_of(reference), {}))
    if reference.startswith(OPAQUE):
        return {"name": name_of(reference), "opaque": True, "fields": own_fields}
    digest = compute_digest(part)
    return {"name": reference, "opaque": False, "fields": own_fields, "digest": digest}


def compare_records(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns notes on changed sources. Raises UserError if an opaque network was changed."""
    notes = []
    for kind, parts in now.items():
        known = {part["name"]: part for part in was.get(kind, ())}
        for part in parts:
            before = known.get(part["name"], {})
            if part.get("digest") != before.get("digest") and before:
                notes.append(f"the source of {part['name']} changed since this run began")
            if before and part.get("params") != before.get("params"):
                old, new = before.get("params") or {}, part.get("params") or {}
                names = old.keys() | new.keys()
                differ = sorted(name for name in names if old.get(name) != new.get(name))
                raise UserError(
                    f"{part['name']}: this run began with another network: {differ[0]} was"
                    f" {old.get(differ[0], 'absent')}, is {new.get(differ[0], 'absent')}"
                    f" ({len(differ)} parameters differ); use another --workdir"
                )
    return notes
