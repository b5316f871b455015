"""Finds and loads config files: recipes by name, and the user's own files by path.

The recipes are the files in `configs/` of a checkout; a wheel has them in this folder. In both,
`configs/NAME.py` is the module `flax_cnns.recipes.NAME`. Recipes import each other relatively, so
that they never import from another package called `configs`. A user's own config file imports them
from here: `from flax_cnns.recipes import common`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from flax_cnns.errors import UserError, did_you_mean

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE if (_HERE / "common.py").is_file() else _HERE.parents[1] / "configs"
__path__ = [str(FOLDER)]


def list_recipes() -> list[str]:
    """Lists the recipes' names, such as "digits_lenet5" and "ablations/regularizers"."""
    files = (path for path in FOLDER.rglob("*.py") if not path.name.startswith("__"))
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in files)


def find(name: str) -> str:
    """Returns the path of a config file.

    `name` is a path from the current folder, with or without `.py`, or the name of a recipe, with
    or without `configs/` in front. A file takes precedence over a recipe. Raises `UserError` if
    there is neither a file nor a recipe.
    """
    for path in (name, f"{name}.py"):
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    recipe = name.removeprefix("configs/").removesuffix(".py")
    if recipe in list_recipes():
        return str(FOLDER / f"{recipe}.py")
    recipe = recipe.removeprefix("./").removeprefix("configs/")
    neighbors = [str(path.with_suffix("")) for path in Path(name).parent.glob("*.py")]
    hint = did_you_mean(recipe, [*list_recipes(), *neighbors])
    if recipe in list_recipes():
        hint = f"; did you mean {recipe!r}?"
    raise UserError(f"there is no file or recipe {name!r}{hint}")


def load(file: str | os.PathLike) -> ModuleType:
    """Executes a config file and returns its module. Errors that the file raises are passed on.

    Raises `UserError` if the file, such as a copy of a recipe, imports relatively.
    """
    path = Path(file).resolve()
    name = "config_config"  # ml_collections' name for the file of the flag --config
    if path.is_relative_to(FOLDER):
        name = ".".join([__name__, *path.relative_to(FOLDER).with_suffix("").parts])
    loader = importlib.machinery.SourceFileLoader(name, os.fspath(file))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # a SourceFileLoader gives a spec for every name
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except ImportError as error:
        if "relative import" in str(error):
            raise UserError(
                f"{file}: {error}; in a copy of a recipe, write `from flax_cnns.recipes import"
                " common`"
            ) from None
        raise
    return module
