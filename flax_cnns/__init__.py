"""Convolutional networks in JAX and Flax linen. Public names are loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for IDEs and type checkers
    from flax_cnns import config as config
    from flax_cnns import interop as interop
    from flax_cnns import launch as launch
    from flax_cnns import layers as layers
    from flax_cnns import models as models
    from flax_cnns import weights as weights
    from flax_cnns.checkpoint.graft.graft import FRESH as FRESH
    from flax_cnns.checkpoint.graft.graft import graft as graft
    from flax_cnns.data.types import Dataset as Dataset
    from flax_cnns.errors import UserError as UserError
    from flax_cnns.models.registry import create_model as create_model
    from flax_cnns.models.registry import init_variables as init_variables
    from flax_cnns.models.registry import list_models as list_models
    from flax_cnns.models.registry import model_info as model_info
    from flax_cnns.runs.load import load_run as load_run
    from flax_cnns.runs.train import run as run
    from flax_cnns.weights import load_weights as load_weights

    __version__: str

_MODULE_OF = {
    "create_model": "flax_cnns.models.registry",
    "list_models": "flax_cnns.models.registry",
    "model_info": "flax_cnns.models.registry",
    "init_variables": "flax_cnns.models.registry",
    "graft": "flax_cnns.checkpoint.graft.graft",
    "FRESH": "flax_cnns.checkpoint.graft.graft",
    "load_weights": "flax_cnns.weights",
    "run": "flax_cnns.runs.train",
    "load_run": "flax_cnns.runs.load",
    "Dataset": "flax_cnns.data.types",
    "UserError": "flax_cnns.errors",
}
_SUBMODULES = ("config", "interop", "launch", "layers", "models", "weights")
__all__ = sorted([*_MODULE_OF, *_SUBMODULES])


if not TYPE_CHECKING:  # a type checker that saw __getattr__ would accept any name

    def __getattr__(name: str) -> Any:
        # Loading names late keeps `import flax_cnns` quick, and lets a launcher set the environment
        # before JAX is imported.
        if name in _SUBMODULES:
            return importlib.import_module(f"flax_cnns.{name}")
        if name == "__version__":
            return _find_version()
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'flax_cnns' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULE_OF[name]), name)


def _find_version() -> str:
    """Returns the version of the installed package; "0+unknown" if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version("flax_cnns")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
