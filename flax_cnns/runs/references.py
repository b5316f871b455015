"""Names of a user's code in a config: "package.module:Name", and what they stand for.

An object that has no such name is opaque: "<opaque>:Name" stands for it, and it exists in one
process alone.
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
# The config field of each part that may be a user's; the last three hold several.
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
    """The NAME of "package.module:a.NAME"."""
    return re.split(r"[:.]", reference)[-1]


def find_references(config: Any) -> dict[str, list[str]]:
    """{kind: references} of what a config names that is not this package's; kinds without any are
    left out."""
    flat, found = flatten(config), {}
    for kind, field in PART_FIELDS.items():
        values = flat.get(field, ())
        values = [values] if isinstance(values, str) else list(values)
        values = [re.sub(r"^\w+=", "", value) for value in values]
        if values := [value for value in values if is_reference(value)]:
            found[kind] = values
    return found


def check_trust(config: Any, trust: bool, what: str) -> None:
    """Raises `UserError` if `config`, of the run `what`, names code and is not trusted, or names
    objects of another process."""
    found = [ref for refs in find_references(config).values() for ref in refs]
    if opaque := [ref for ref in found if ref.startswith(OPAQUE)]:
        raise UserError(
            f"{what} was trained with {', '.join(map(name_of, opaque))}, an object that only the"
            " process of its run() had; start a run with 'package.module:Name' instead"
        )
    if found and not trust:
        raise UserError(
            f"{what} imports {', '.join(found)}; look at this code, and add --trust"
            " (in Python: trust=True) if it may run here"
        )


def import_reference(reference: str, field: str) -> Any:
    """What "package.module:Name" is; the current folder is looked at last. Raises `UserError` if
    there is no such module or name, or if the module fails as it is imported."""
    module_name, _, path = reference.partition(":")
    if reference.startswith(OPAQUE):
        raise UserError(
            f"{field}={reference!r} was an object of another process: give it to run() again, or"
            " name an importable 'package.module:Name'"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            near = _near_module(module_name)
            raise UserError(f"{field}={reference!r}: no module {error.name!r}{near}") from None
        raise UserError(f"{field}={reference!r}: {module_name} needs {error.name!r}") from error
    except UserError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({at.filename}, line {at.lineno})"
        raise UserError(
            f"{field}={reference!r}: importing {module_name} fails: {type(error).__name__}:"
            f" {said}{where}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            known = [other for other in vars(found) if not other.startswith("_")]
            raise UserError(
                f"{field}={reference!r}: {module_name} has no {name!r}{did_you_mean(name, known)}"
            )
        found = getattr(found, name)
    return found


def _near_module(name: str) -> str:
    """The nearest module of the same package, or of the current folder."""
    package, _, last = name.rpartition(".")
    places = None
    if package:
        try:
            places = list(importlib.import_module(package).__path__)
        except (ImportError, AttributeError):
            return ""
    found = pkgutil.iter_modules(places if package else [os.getcwd()])
    near = did_you_mean(last, [module.name for module in found])
    if near.startswith("; did you mean"):
        return near
    return "" if package else f"; modules are looked for in sys.path and in {os.getcwd()}"


def make_reference(found: Any) -> str | None:
    """ "package.module:Name" of an importable function (under jax.jit, too) or class; None for any
    other object."""
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    if not callable(found) or not module or not name:
        return None
    if module == "__main__" or "<" in name:
        return None
    at = sys.modules.get(module)
    for part in name.split("."):
        at = getattr(at, part, None)
    return f"{module}:{name}" if at is found else None
