"""Convolutional networks in JAX and Flax linen: the public face; a name loads when first used."""

import importlib

_WHERE = {
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
# By their name, without a further import.
_MODULES = ("config", "interop", "launch", "layers", "models", "weights")
__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str):
    # Late, so that `import flax_cnns` is quick and a launcher can set the environment before JAX is
    # imported.
    if name in _MODULES:
        return importlib.import_module(f"flax_cnns.{name}")
    if name == "__version__":
        return _find_version()
    if name not in _WHERE:
        raise AttributeError(f"module 'flax_cnns' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def _find_version() -> str:
    """The version of the installed package; "0+unknown" if the package is not installed."""
    from importlib import metadata

    try:
        return metadata.version("flax_cnns")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def __dir__():
    return [*__all__, "__version__"]
