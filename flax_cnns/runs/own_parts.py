"""A user's own parts of a run: network, data, loss, metrics, optimizer, regularizers, callbacks.

A config names them "package.module:Name", which is imported, also from the current folder. `run`
takes objects, too: an importable function or class becomes its name in the config; any other object
is opaque, "<opaque>:Name", and exists in this process alone.

`own.NAME.FIELD` of a config are keyword arguments of the part that is called NAME.
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

# What each hook of a callback is called with.
CALLBACK_HOOKS = {
    "on_step": ("step", "numbers"),
    "on_validation": ("step", "numbers"),
    "on_save": ("step",),
}
DIGEST_LENGTH = 16  # of a digest
OpaqueObjects = Mapping[str, Any]  # reference -> the object that was given in this process


class OwnParts(NamedTuple):
    """The own parts of a run, ready to use; what a run does without is None or empty."""

    network: Any = None  # a class, function or instance of a linen module
    make_data: Callable[[], Dataset] | None = None
    optimizer: Callable | None = None  # (learning_rate_schedule, **fields)
    optimizer_fields: Mapping[str, Any] = {}
    loss: Callable | None = None
    metrics: Mapping[str, Callable] = {}
    regularizers: Mapping[str, Regularizer] = {}
    callbacks: tuple[Any, ...] = ()
    record: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()  # what may be intended, but would otherwise go unnoticed


# ---------------------------------------------------------------------------- objects into a config


def write_to_config(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the names of the objects that `run` was given into `config`, a ConfigDict, and returns
    {reference: object} of the opaque ones. A text is a reference, or a name of the package's own.
    Raises `UserError` for what cannot be such a part."""
    objects: dict[str, Any] = {}
    for kind, value in given.items():
        if value is None:
            continue
        section, _, field = PART_FIELDS[kind].partition(".")
        if kind in KINDS_WITH_SEVERAL:
            names = tuple(
                _bring_one(kind, one, objects, alias) for alias, one in _listed(kind, value)
            )
            with config.ignore_type():
                config[section][field] = names
        else:
            config[section][field] = _bring_one(kind, value, objects)
    return objects


def _listed(kind: str, value: Any) -> Iterable[tuple[str, Any]]:
    """(alias or "", object) of each."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{kind}: expected a list (or {{name: ...}}), got {value!r}")
    return [("", one) for one in value]


def _bring_one(kind: str, value: Any, objects: dict[str, Any], alias: str = "") -> str:
    """The value of the config's field; an opaque object goes into `objects`."""
    reference = value if isinstance(value, str) else make_reference(value)
    if reference is None:
        name = alias or _object_name(value) or kind
        reference = f"{OPAQUE}:{name}"
        if kind not in KINDS_WITH_SEVERAL and objects.get(reference, value) is not value:
            reference = f"{OPAQUE}:{name}_{kind}"  # another kind has one of this name
        if objects.get(reference, value) is not value:
            raise UserError(f"{kind}: two objects are called {name!r}; give them by name: {{...}}")
        objects[reference] = value
    if not alias or alias == name_of(reference):
        return reference
    if kind != "metrics":
        raise UserError(f"{kind}: {reference} is called {name_of(reference)!r}, got {alias!r}")
    return f"{alias}={reference}"


def _object_name(value: Any) -> str:
    """ "" of a lambda, which has none."""
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, Dataset):
        return re.sub(r"\W", "_", value.name) or "arrays"
    name = getattr(value, "__name__", None) or type(value).__name__
    return "" if name == "<lambda>" else re.sub(r"\W", "", name)


# ---------------------------------------------------------------------------- a config into objects


def resolve(
    config: Any, objects: OpaqueObjects | None = None, *, callbacks: bool = True
) -> OwnParts:
    """The own parts that a config names; `objects` are the opaque ones. Without `callbacks` none of
    these is made, which may begin a file anew. Raises `UserError` for a
    name that cannot be imported, a field that its part does not take, and fields of no part."""
    references = find_references(config)
    fields = to_plain(config.get("own", {}) or {})
    _check_names(references, fields)
    objects, flat, record = objects or {}, flatten(config), {}

    def get(kind: str, reference: str) -> Any:
        given = objects.get(reference)
        found = import_reference(reference, PART_FIELDS[kind]) if given is None else given
        record.setdefault(kind, []).append(_describe(reference, found, fields, config, kind))
        return found

    def get_one(kind: str) -> tuple[Any, dict[str, Any]]:
        if kind not in references:
            return None, {}
        (reference,) = references[kind]
        found = get(kind, reference)
        return found, _fields_for(reference, fields)

    network, _ = get_one("model")
    data, data_fields = get_one("data")
    optimizer, optimizer_fields = get_one("optimizer")
    loss, loss_fields = get_one("loss")
    metrics, hooks, called, notes = {}, {}, [], []
    for value in flat.get("train.metrics", ()):
        alias, reference = re.fullmatch(r"(?:(\w+)=)?(.*)", value).groups()
        with_fields = _fields_for(reference, fields)
        found = _with_fields(get("metrics", reference), with_fields, reference)
        if (name := alias or name_of(reference)) in metrics:
            raise UserError(
                f"train.metrics: two of them are called {name!r}; name one NAME={value}"
            )
        metrics[name] = found
    for reference in references.get("regularizers", ()):
        found = get("regularizers", reference)
        of_it = _fields_for(reference, fields)
        _check_fields(found, of_it, reference)  # of one that is off, too
        if why := _why_off(found, of_it):
            notes.append(f"the regularizer {name_of(reference)} is off: {why}")
        else:
            one = _instance(found, of_it, reference)
            hooks[name_of(reference)] = regularizers.make_regularizer(name_of(reference), one)
    for reference in references.get("callbacks", ()) if callbacks else ():
        of_it = _fields_for(reference, fields)
        called.append(_callback(_instance(get("callbacks", reference), of_it, reference)))
    if optimizer is not None:
        if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
            raise UserError(
                "optimizer: expected a factory (learning_rate_schedule, **fields), got an optimizer"
                " that is made already; give lambda rate: optax.sgd(rate)"
            )
        _check_call(optimizer, {**optimizer_fields}, references["optimizer"][0], skip=1)
    if loss is not None:
        loss = _with_fields(loss, loss_fields, references["loss"][0])
    make_data = None
    if data is not None:
        make_data = functools.partial(_make_data, data, data_fields, references["data"][0])
    return OwnParts(
        network,
        make_data,
        optimizer,
        optimizer_fields,
        loss,
        metrics,
        hooks,
        tuple(called),
        record,
        tuple(notes),
    )


def make_data(config: Any, objects: OpaqueObjects | None = None) -> Dataset | None:
    """The own data of a config; None if it names a data set of the package."""
    found = find_references(config).get("data")
    if not found:
        return None
    data = (objects or {}).get(found[0])
    data = import_reference(found[0], PART_FIELDS["data"]) if data is None else data
    return _make_data(data, _fields_for(found[0], to_plain(config.get("own", {}) or {})), found[0])


def find_network(config: Any, objects: OpaqueObjects | None = None) -> Any:
    """The own network of a config, as `network.make_model` takes it; None for a registered one."""
    found = find_references(config).get("model")
    if not found:
        return None
    network = (objects or {}).get(found[0])
    return import_reference(found[0], PART_FIELDS["model"]) if network is None else network


def _check_names(references: Mapping[str, list[str]], fields: Mapping[str, Any]) -> None:
    names = [name_of(ref) for kind, refs in references.items() if kind != "model" for ref in refs]
    for name in fields:
        if name in map(name_of, references.get("model", ())) and name not in names:
            raise UserError(f"config.own.{name}: a network's fields are config.model.FIELD")
        if name not in names:
            near = did_you_mean(name, names) or "; there are no own parts"
            raise UserError(f"config.own.{name}: none of the own parts is called {name!r}{near}")
        if names.count(name) > 1:
            raise UserError(f"config.own.{name}: {names.count(name)} own parts have this name")
        if not isinstance(fields[name], Mapping):
            raise UserError(f"config.own.{name}: expected fields, own.{name}.FIELD=value")
    for kind in ("regularizers", "callbacks"):
        known = [name_of(ref) for ref in references.get(kind, ())]
        if twice := [name for name in known if known.count(name) > 1]:
            raise UserError(f"train.{kind}: two of them are called {twice[0]!r}")


def _fields_for(reference: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_tuples(v) for name, v in fields.get(name_of(reference), {}).items()}


def _check_call(found: Any, fields: Mapping[str, Any], reference: str, skip: int = 0) -> None:
    """Raises `UserError` unless `found` can be called and takes these keyword arguments; the first
    `skip` of its arguments are ours."""
    name = name_of(reference)
    if not callable(found):
        raise UserError(
            f"{reference}: expected a function or a class, got a {type(found).__name__}"
        )
    try:
        parameters = list(inspect.signature(found).parameters.values())[skip:]
    except (TypeError, ValueError):
        return
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return
    known = [
        p.name for p in parameters if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known) or "; it takes none"
            raise UserError(f"config.own.{name}.{field}: {reference} has no such field{near}")


def _with_fields(found: Callable, fields: dict[str, Any], reference: str) -> Callable:
    _check_call(found, fields, reference)
    return functools.partial(found, **fields) if fields else found


def _makes(found: Any) -> bool:
    """Whether it is a class or a function, which makes the part of its fields; else it is the
    part."""
    return isinstance(found, (type, functools.partial)) or hasattr(found, "__qualname__")


def _check_fields(found: Any, fields: dict[str, Any], reference: str) -> None:
    """Raises `UserError` for fields that a class, a factory or an object does not take."""
    if _makes(found):
        _check_call(found, fields, reference)
    elif fields:
        raise UserError(
            f"config.own.{name_of(reference)}: {reference} is an object, which has its fields; give"
            " run() the class to set them by the config"
        )


def _instance(found: Any, fields: dict[str, Any], reference: str) -> Any:
    """What a class or factory makes of its fields; any other object is itself."""
    _check_fields(found, fields, reference)
    if not _makes(found):
        return found
    try:
        inspect.signature(found).bind(**fields)
    except TypeError as error:
        what = "" if inspect.isclass(found) else "expected a class, or a function that makes one; "
        raise UserError(
            f"{reference}: {what}{error}; its fields are own.{name_of(reference)}.*"
        ) from None
    return found(**fields)


def _why_off(found: Any, fields: Mapping[str, Any]) -> str:
    """In words, that a regularizer's first field is 0, False, None or empty; "" of one that is
    on."""
    if _makes(found):
        first = next(iter(inspect.signature(found).parameters.values()), None)
        if first is None or (first.name not in fields and first.default is first.empty):
            return ""
        name, value = first.name, fields.get(first.name, first.default)
    elif dataclasses.is_dataclass(found) and dataclasses.fields(found):
        name = dataclasses.fields(found)[0].name
        value = getattr(found, name)
    else:
        return ""
    off = value is None or (isinstance(value, (bool, int, float, str, tuple, list)) and not value)
    return f"{name}, its first field, is {value!r}" if off else ""


def _callback(found: Any) -> Any:
    what = f"train.callbacks: {type(found).__name__}"
    for name in dir(found):
        if name.startswith("on_") and name not in CALLBACK_HOOKS and callable(getattr(found, name)):
            near = did_you_mean(name, CALLBACK_HOOKS)
            raise UserError(f"{what} has {name!r}, which nothing calls{near}")
    hooks = [name for name in CALLBACK_HOOKS if callable(getattr(found, name, None))]
    if not hooks:
        known = [name for name in dir(found) if not name.startswith("_")]
        raise UserError(
            f"{what} has none of {', '.join(CALLBACK_HOOKS)}; it has"
            f" {', '.join(known[:8]) or 'nothing'}"
        )
    for name in hooks:
        checks.check_arguments(f"{what}, {name}", getattr(found, name), CALLBACK_HOOKS[name])
    return found


def _make_data(data: Any, fields: dict[str, Any], reference: str) -> Dataset:
    if isinstance(data, Dataset):
        if fields:
            raise UserError(f"config.own.{name_of(reference)}: a Dataset takes no fields")
        return data
    if hasattr(data, "as_data_source"):  # a TFDS builder, or its class
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


# ---------------------------------------------------------------------------- the record


def compute_digest(found: Any) -> str | None:
    """A digest of the source of a function or class; None where there is none."""
    try:
        source = inspect.getsource(found)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:DIGEST_LENGTH]


def _describe(
    reference: str, found: Any, fields: Mapping[str, Any], config: Any, kind: str
) -> dict[str, Any]:
    if kind == "model":
        of_it = {name: v for name, v in to_plain(config.model).items() if name != "name"}
    else:
        of_it = dict(fields.get(name_of(reference), {}))
    if reference.startswith(OPAQUE):
        return {"name": name_of(reference), "opaque": True, "fields": of_it}
    return {"name": reference, "opaque": False, "fields": of_it, "digest": compute_digest(found)}


def compare_records(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Notes on own parts whose source changed since a run began. Raises `UserError` if an opaque
    network has other parameters now."""
    notes = []
    for kind, parts in now.items():
        known = {part["name"]: part for part in was.get(kind, ())}
        for part in parts:
            before = known.get(part["name"], {})
            if part.get("digest") != before.get("digest") and before:
                notes.append(f"the source of {part['name']} changed since this run began")
            if before and part.get("params") != before.get("params"):
                old, new = before.get("params") or {}, part.get("params") or {}
                differ = sorted(
                    name for name in old.keys() | new.keys() if old.get(name) != new.get(name)
                )
                raise UserError(
                    f"{part['name']}: this run began with another network: {differ[0]} was"
                    f" {old.get(differ[0], 'absent')}, is {new.get(differ[0], 'absent')}"
                    f" ({len(differ)} parameters differ); take another --workdir"
                )
    return notes
