"""Config files: recipes by their names, and files of the user's own by their paths.

The recipes are the files of `configs/` in a checkout; the wheel carries them in this folder. In
both, `configs/NAME.py` is the module `flax_cnns.recipes.NAME`. The recipes import each other
relatively, so that no other package called `configs` is taken for theirs. A config file of one's
own imports them from here: `from flax_cnns.recipes import common`.
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
    """The recipes' names, such as "digits_lenet5" and "ablations/regularizers"."""
    files = (path for path in FOLDER.rglob("*.py") if not path.name.startswith("__"))
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in files)


def find(name: str) -> str:
    """The path of a config file: `name` as a path from the current folder, with or without `.py`,
    else the recipe of this name, which `configs/` may precede. Raises `UserError` if there is
    neither."""
    for path in (name, f"{name}.py"):
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    recipe = name.removeprefix("configs/").removesuffix(".py")
    if recipe in list_recipes():
        return str(FOLDER / f"{recipe}.py")
    recipe = recipe.removeprefix("./").removeprefix("configs/")
    beside = [str(path.with_suffix("")) for path in Path(name).parent.glob("*.py")]
    near = did_you_mean(recipe, [*list_recipes(), *beside])
    if recipe in list_recipes():
        near = f"; did you mean {recipe!r}?"
    raise UserError(f"there is no file or recipe {name!r}{near}")


def load(file: str | os.PathLike) -> ModuleType:
    """Executes a config file and returns its module. Raises what the file raises."""
    path = Path(file).resolve()
    name = "config_config"  # as ml_collections calls the file of the flag --config
    if path.is_relative_to(FOLDER):
        name = ".".join([__name__, *path.relative_to(FOLDER).with_suffix("").parts])
    loader = importlib.machinery.SourceFileLoader(name, os.fspath(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except ImportError as error:
        if "relative import" in str(error):
            raise UserError(
                f"{file}: {error}; a copy of a recipe says `from flax_cnns.recipes import common`"
            ) from None
        raise
    return module
