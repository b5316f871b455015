"""References to a user's code in a config: "package.module:Name".

An object without an importable name is opaque: its reference is "<opaque>:Name", and it exists in
one process only.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import traceback
from typing import Any

from flax_cnns.config import flatten
from flax_cnns.config.checks import is_reference
from flax_cnns.errors import UserError, did_you_mean

OPAQUE = "<opaque>"
# The config field of each kind of own part. The fields of KINDS_WITH_SEVERAL hold several
# references.
PART_FIELDS = {
    "model": "model.name",
    "data": "data.name",
    "optimizer": "optimizer.name",
    "loss": "train.loss",
    "metrics": "train.metrics",
    "regularizers": "train.regularizers",
    "callbacks": "train.callbacks",
}
KINDS_WITH_SEVERAL = ("metrics", "regularizers", "callbacks")


def name_of(reference: str) -> str:
    """Returns the NAME of "package.module:a.NAME"."""
    return re.split(r"[:.]", reference)[-1]


def find_references(config: Any) -> dict[str, list[str]]:
    """Returns {kind: references} of the own parts in a config, without kinds that have none."""
    flat = flatten(config)
    references: dict[str, list[str]] = {}
    for kind, field in PART_FIELDS.items():
        values = flat.get(field, ())
        values = [values] if isinstance(values, str) else list(values)
        values = [re.sub(r"^\w+=", "", value) for value in values]
        if values := [value for value in values if is_reference(value)]:
            references[kind] = values
    return references


def check_trust(config: Any, trust: bool, what: str) -> None:
    """Raises UserError if `config` names code and `trust` is False, or names objects of another
    process.

    `what` names the run in the message.
    """
    references = [ref for refs in find_references(config).values() for ref in refs]
    if opaque := [ref for ref in references if ref.startswith(OPAQUE)]:
        raise UserError(
            f"{what} was trained with {', '.join(map(name_of, opaque))}, an object that existed"
            " only in the process of its run(); start a run with 'package.module:Name' instead"
        )
    if references and not trust:
        raise UserError(
            f"{what} imports {', '.join(references)}; read this code, and add --trust"
            " (in Python: trust=True) if it may run here"
        )


def import_reference(reference: str, field: str) -> Any:
    """Imports what "package.module:Name" refers to. The current folder is searched last.

    `field` is the config field in the messages. Raises UserError if the module or the name does not
    exist, or if importing the module fails.
    """
    module_name, _, path = reference.partition(":")
    if reference.startswith(OPAQUE):
        raise UserError(
            f"{field}={reference!r} was an object of another process: give it to run() again, or"
            " name an importable 'package.module:Name'"
        )
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            near = _near_module(module_name)
            raise UserError(f"{field}={reference!r}: no module {error.name!r}{near}") from None
        raise UserError(f"{field}={reference!r}: {module_name} needs {error.name!r}") from error
    except UserError:
        raise
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({at.filename}, line {at.lineno})"
        raise UserError(
            f"{field}={reference!r}: importing {module_name} fails: {type(error).__name__}:"
            f" {message}{where}"
        ) from error
    for name in path.split("."):
        if not hasattr(target, name):
            known = [other for other in vars(target) if not other.startswith("_")]
            raise UserError(
                f"{field}={reference!r}: {module_name} has no {name!r}{did_you_mean(name, known)}"
            )
        target = getattr(target, name)
    return target


def _near_module(name: str) -> str:
    """Suggests the nearest module of the same package or of the current folder, for a message."""
    package, _, last = name.rpartition(".")
    folders = None
    if package:
        try:
            folders = list(importlib.import_module(package).__path__)
        except (ImportError, AttributeError):
            return ""
    modules = pkgutil.iter_modules(folders if package else [os.getcwd()])
    near = did_you_mean(last, [module.name for module in modules])
    if near.startswith("; did you mean"):
        return near
    return "" if package else f"; modules are searched in sys.path and in {os.getcwd()}"


def make_reference(part: Any) -> str | None:
    """Returns "package.module:Name" of an importable class or function; None for other objects.

    A function may be wrapped in jax.jit.
    """
    module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", None)
    if not callable(part) or not module or not name:
        return None
    if module == "__main__" or "<" in name:
        return None
    target: Any = sys.modules.get(module)
    for attribute in name.split("."):
        target = getattr(target, attribute, None)
    return f"{module}:{name}" if target is part else None
