"""Builds the network of a run, from the registry or from the user's class, function or module."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import registry
from flax_cnns.models.fields import check_values
from flax_cnns.types import PyTree

# The variable collections that a step keeps, and those that a network may also write in a call.
KEPT_COLLECTIONS = {"params", "batch_stats"}
TEMPORARY_COLLECTIONS = {"aux_logits", "intermediates"}

LSUV = "lsuv"  # a value of `config.model.init`


def get_model_fields(config: Any) -> dict[str, Any]:
    """Returns `config.model` as keyword arguments for `create_model`.

    Fields that some networks lack are included only if they are set. `init = "lsuv"` and
    `whiten` are left out, because the run itself changes the initial weights
    (`start.make_initial_variables`). Raises UserError for `model.input_size`.
    """
    if "input_size" in config.model:
        raise UserError(
            "config: unknown field 'model.input_size'; set data.image_size and data.channels"
        )
    optional = ("num_classes", "init", "scan", "remat")
    fields = {name: v for name, v in config.model.items() if v or name not in optional}
    fields.pop("whiten", None)
    if fields.get("init") == LSUV:
        del fields["init"]
    if config.train.sync_batchnorm:
        fields["axis_name"] = "batch"
    return fields


def make_model(config: Any, dataset: Dataset, network: Any = None) -> nn.Module:
    """Builds the network of a run.

    The network has the data set's number of classes, unless `model.num_classes` is larger.

    `network`: the user's own class, function or module instance; None takes `config.model.name`
    from the registry. Raises UserError.
    """
    fields = get_model_fields(config)
    classes = fields.get("num_classes", dataset.num_classes)
    if classes < dataset.num_classes:
        raise UserError(
            f"model.num_classes: {classes} classes are too few for {dataset.name}, "
            f"which has {dataset.num_classes}; set 0 to use the data set's number"
        )
    if network is None:
        fields["num_classes"] = classes
        return registry.create_model(**fields, input_size=dataset.image_shape)
    del fields["name"]
    if isinstance(network, nn.Module):
        return _configure_instance(network, fields)
    return _make_own(config.model.name, network, fields, dataset)


def _configure_instance(network: nn.Module, fields: dict[str, Any]) -> nn.Module:
    """Returns the user's module instance with the config's `axis_name`.

    Raises UserError for all other fields, because an instance already has its own.
    """
    axis = fields.pop("axis_name", None)
    if fields.pop("dtype", "float32") != "float32" or fields:
        names = sorted(fields) or ["dtype"]
        raise UserError(
            f"config.model.{names[0]}: the network is an instance of {type(network).__name__} with"
            " fields of its own; set them there, or pass the class"
        )
    if axis:
        if not hasattr(network, "axis_name"):
            name = type(network).__name__
            raise UserError(_format_missing("axis_name", name, "train.sync_batchnorm"))
        network = network.clone(axis_name=axis)
    return network


# Fields that a network of the user's own may lack -> the config field that needs them.
_OPTIONAL_FIELDS = {
    "num_classes": "model.num_classes",
    "dtype": "model.dtype",
    "kernel_init": "model.init",
    "scan": "model.scan",
    "remat": "model.remat",
    "axis_name": "train.sync_batchnorm",
}


def _format_missing(field: str, name: str, config_field: str) -> str:
    return (
        f"{config_field} needs a field {field!r} of the network, and {name} has none; add it, or"
        f" leave {config_field} unset"
    )


def _make_own(name: str, network: Any, fields: dict[str, Any], dataset: Dataset) -> nn.Module:
    """Calls the user's class or function with the fields that the config and the data set give."""
    _check_kind(name, network)
    known = _known_fields(network)
    fields = {field: to_tuples(value) for field, value in fields.items()}
    if "init" in fields:
        fields["kernel_init"] = fields.pop("init")
    if fields.get("dtype") == "float32" and "dtype" not in known:
        del fields["dtype"]  # the default computation of every network
    if "num_classes" in known:
        fields.setdefault("num_classes", dataset.num_classes)
    if "input_size" in known:
        fields["input_size"] = tuple(dataset.image_shape)
    for field in fields:
        if field in known:
            continue
        if field in _OPTIONAL_FIELDS:
            raise UserError(_format_missing(field, name, _OPTIONAL_FIELDS[field]))
        near = did_you_mean(field, known)
        raise UserError(f"config.model.{field}: {name} has no field {field!r}{near}")
    if inspect.isclass(network):
        with contextlib.suppress(NameError, TypeError, KeyError):  # unknown names in annotations
            fields = check_values(name, network, fields)
    if "dtype" in fields:
        fields["dtype"] = jnp.dtype(fields["dtype"])
    try:
        inspect.signature(network).bind(**fields)
    except TypeError as error:
        raise UserError(f"{name}: {error}; its fields are config.model.FIELD") from None
    model = network(**fields)
    if not isinstance(model, nn.Module):
        _check_kind(name, model)
        raise UserError(f"{name}: expected a flax.linen module, got a {type(model).__name__}")
    return model


def _check_kind(name: str, network: Any) -> None:
    """Raises UserError for an NNX module and for an object that cannot make a network."""
    bases = (network if inspect.isclass(network) else type(network)).__mro__
    if nn.Module not in bases and any(base.__module__.startswith("flax.nnx") for base in bases):
        raise UserError(
            f"{name}: expected a flax.linen module, got a Flax NNX module; pass"
            " flax.nnx.bridge.to_linen(CLASS, ...)"
        )
    if not callable(network):
        raise UserError(
            f"{name}: expected a flax.linen module, its class, or a function that returns it;"
            f" got a {type(network).__name__}"
        )


def _known_fields(network: Any) -> set[str]:
    if inspect.isclass(network) and dataclasses.is_dataclass(network):
        return {f.name for f in dataclasses.fields(network) if f.init} - {"name", "parent"}
    return set(inspect.signature(network).parameters)


def to_tuples(value: Any) -> Any:
    """Converts the lists of a config to tuples, also nested lists."""
    return tuple(map(to_tuples, value)) if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------- checks


def check_network(model: nn.Module, dataset: Dataset) -> int:
    """Returns the number of logits of a network of the user's own. Computes shapes only.

    Raises UserError unless the network takes `(images, train=...)`, keeps no variables except
    `params` and `batch_stats`, and gives logits [N K], with K at least the data set's number of
    classes, both in evaluation and in training.
    """
    name = type(model).__name__
    parameters = inspect.signature(type(model).__call__).parameters.values()
    kind = inspect.Parameter
    if not any(p.name == "train" or p.kind is kind.VAR_KEYWORD for p in parameters):
        raise UserError(f"{name}: expected __call__(self, images, *, train), got no train argument")
    try:
        inspect.signature(type(model).__call__).bind(model, "images", train=False)
    except TypeError as error:
        raise UserError(f"{name}: expected __call__(self, images, *, train): {error}") from None
    if getattr(model, "axis_name", None):
        model = model.clone(axis_name=None)  # the axis exists only inside a step
    images = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32)
    keys = {"params": jax.random.key(0)}
    variables = jax.eval_shape(partial(model.init, train=False), keys, images)
    if "params" not in variables:
        raise UserError(f"{name}: the network has no parameters, so there is nothing to train")
    if extra := sorted(variables.keys() - KEPT_COLLECTIONS - TEMPORARY_COLLECTIONS):
        raise UserError(
            f"{name}: the network keeps variables of {', '.join(extra)}, but a run keeps only"
            " params and batch_stats; put running values into batch_stats"
        )
    kept = {key: value for key, value in variables.items() if key in KEPT_COLLECTIONS}
    logits = jax.eval_shape(partial(model.apply, train=False), kept, images)
    classes = _check_logits(name, logits, dataset)
    logits = _shapes_in_training(name, model, kept, images)
    if _check_logits(f"{name}, in training", logits, dataset) != classes:
        raise UserError(
            f"{name}: the network gives {classes} logits per image in evaluation and"
            f" {logits.shape[1]} in training"
        )
    return classes


def _check_logits(name: str, logits: Any, dataset: Dataset) -> int:
    """Returns K of logits [N K] of 2 images."""
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < dataset.num_classes:
        got = f"[{' '.join(map(str, shape))}]" if shape is not None else type(logits).__name__
        raise UserError(
            f"{name}: expected logits [N K], K at least {dataset.num_classes} (the classes of"
            f" {dataset.name}); for 2 images of {list(dataset.image_shape)} it gives {got}"
        )
    return shape[1]


# Flax's error in a training call -> what a run offers to a network in training.
_TRAINING_ERRORS: dict[type[Exception], str] = {
    flax.errors.InvalidRngError: "a run has only the random streams dropout and shared",
    flax.errors.ModifyScopeVariableError: "a run lets it write batch_stats, and sow aux_logits",
    flax.errors.ScopeParamNotFoundError: "create all parameters also with train=False",
    flax.errors.ScopeCollectionNotFound: "create all variables also with train=False",
}


def _shapes_in_training(name: str, model: nn.Module, variables: PyTree, images: Any) -> Any:
    call = partial(
        model.apply,
        train=True,
        mutable=["batch_stats", *TEMPORARY_COLLECTIONS],
        rngs={"shared": jax.random.key(0), "dropout": jax.random.key(0)},
    )
    try:
        return jax.eval_shape(call, variables, images)[0]
    except tuple(_TRAINING_ERRORS) as error:
        message = str(error).partition(" (https://")[0].rstrip(".")
        cure = _TRAINING_ERRORS[type(error)]
        raise UserError(f"{name}, in training: {message}; {cure}") from None


def describe_parameters(variables: PyTree) -> dict[str, list[int]]:
    """Returns {path: shape} of all parameters."""
    leaves: Mapping[str, Any] = pytree.flatten(variables["params"])
    return {path: list(leaf.shape) for path, leaf in leaves.items()}
