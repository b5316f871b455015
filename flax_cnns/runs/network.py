"""The network of a run: a registered one by name, or the user's own class, function or instance."""

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

# What a step keeps of a network's variables, and what it lets a network write beside them.
KEPT_COLLECTIONS = {"params", "batch_stats"}
TEMPORARY_COLLECTIONS = {"aux_logits", "intermediates"}


def get_model_fields(config: Any) -> dict[str, Any]:
    """`config.model` as `create_model` takes it; fields that some networks lack only where set."""
    if "input_size" in config.model:
        raise UserError(
            "config: unknown field 'model.input_size'; data.image_size and data.channels say it"
        )
    optional = ("num_classes", "init", "scan", "remat")
    fields = {name: v for name, v in config.model.items() if v or name not in optional}
    if config.train.sync_batchnorm:
        fields["axis_name"] = "batch"
    return fields


def make_model(config: Any, dataset: Dataset, network: Any = None) -> nn.Module:
    """The network of a run: as many classes as the data set has, unless the config says more.

    `network`: the user's own, a class or function of its fields, or an instance. Raises
    `UserError`.
    """
    fields = get_model_fields(config)
    classes = fields.get("num_classes", dataset.num_classes)
    if classes < dataset.num_classes:
        raise UserError(
            f"model.num_classes: {classes} classes are too few for {dataset.name}, "
            f"which has {dataset.num_classes}; 0 takes the data set's"
        )
    if network is None:
        fields["num_classes"] = classes
        return registry.create_model(**fields, input_size=dataset.image_shape)
    del fields["name"]
    if isinstance(network, nn.Module):
        return _as_given(network, fields)
    return _make_own(config.model.name, network, fields, dataset)


def _as_given(network: nn.Module, fields: dict[str, Any]) -> nn.Module:
    """An instance, whose fields are its own."""
    axis = fields.pop("axis_name", None)
    if fields.pop("dtype", "float32") != "float32" or fields:
        names = sorted(fields) or ["dtype"]
        raise UserError(
            f"config.model.{names[0]}: the network is an instance of {type(network).__name__} with"
            " fields of its own; set them there, or give the class"
        )
    if axis:
        if not hasattr(network, "axis_name"):
            raise UserError(_lacks("axis_name", type(network).__name__, "train.sync_batchnorm"))
        network = network.clone(axis_name=axis)
    return network


# What a config may ask of a network, which not every own one has: field -> what asks for it.
_ASKS = {
    "num_classes": "model.num_classes",
    "dtype": "model.dtype",
    "kernel_init": "model.init",
    "scan": "model.scan",
    "remat": "model.remat",
    "axis_name": "train.sync_batchnorm",
}


def _lacks(field: str, name: str, asked: str) -> str:
    return (
        f"{asked} needs a field {field!r} of the network, and {name} has none; add one, or leave it"
    )


def _make_own(name: str, network: Any, fields: dict[str, Any], dataset: Dataset) -> nn.Module:
    _check_kind(name, network)
    known = _known_fields(network)
    fields = {field: to_tuples(value) for field, value in fields.items()}
    if "init" in fields:
        fields["kernel_init"] = fields.pop("init")
    if fields.get("dtype") == "float32" and "dtype" not in known:
        del fields["dtype"]  # what every network computes in by itself
    if "num_classes" in known:
        fields.setdefault("num_classes", dataset.num_classes)
    if "input_size" in known:
        fields["input_size"] = tuple(dataset.image_shape)
    for field in fields:
        if field in known:
            continue
        if field in _ASKS:
            raise UserError(_lacks(field, name, _ASKS[field]))
        near = did_you_mean(field, known)
        raise UserError(f"config.model.{field}: {name} has no field {field!r}{near}")
    if inspect.isclass(network):
        with contextlib.suppress(NameError, TypeError, KeyError):  # annotations of no known name
            fields = check_values(name, network, fields)
    if "dtype" in fields:
        fields["dtype"] = jnp.dtype(fields["dtype"])
    try:
        inspect.signature(network).bind(**fields)
    except TypeError as error:
        raise UserError(f"{name}: {error}; its fields are config.model.FIELD") from None
    made = network(**fields)
    if not isinstance(made, nn.Module):
        _check_kind(name, made)
        raise UserError(f"{name}: expected a flax.linen module, got a {type(made).__name__}")
    return made


def _check_kind(name: str, network: Any) -> None:
    """Raises `UserError` for a module of NNX, and for what makes no network."""
    bases = (network if inspect.isclass(network) else type(network)).__mro__
    if nn.Module not in bases and any(base.__module__.startswith("flax.nnx") for base in bases):
        raise UserError(
            f"{name}: expected a flax.linen module, got one of Flax NNX; give"
            " flax.nnx.bridge.to_linen(CLASS, ...)"
        )
    if not callable(network):
        raise UserError(
            f"{name}: expected a flax.linen module, its class, or a function that makes it; got a"
            f" {type(network).__name__}"
        )


def _known_fields(network: Any) -> set[str]:
    if inspect.isclass(network) and dataclasses.is_dataclass(network):
        return {f.name for f in dataclasses.fields(network) if f.init} - {"name", "parent"}
    return set(inspect.signature(network).parameters)


def to_tuples(value: Any) -> Any:
    """Lists of a config as tuples."""
    return tuple(map(to_tuples, value)) if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------- what it must do


def check_network(model: nn.Module, dataset: Dataset) -> int:
    """The number of logits that an own network gives. Computes shapes only.

    Raises `UserError` unless it takes `(images, train=...)`, keeps no variables but `params` and
    `batch_stats`, and gives logits [N K] of the data set's classes or more, in training too.
    """
    name = type(model).__name__
    parameters = inspect.signature(type(model).__call__).parameters.values()
    kind = inspect.Parameter
    if not any(p.name == "train" or p.kind is kind.VAR_KEYWORD for p in parameters):
        raise UserError(f"{name}: expected __call__(self, images, *, train), and it has no train")
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
        raise UserError(f"{name}: it has no parameters, so that there is nothing to train")
    if extra := sorted(variables.keys() - KEPT_COLLECTIONS - TEMPORARY_COLLECTIONS):
        raise UserError(
            f"{name}: it keeps variables of {', '.join(extra)}, and a run keeps params and"
            " batch_stats alone; put running values into batch_stats"
        )
    kept = {key: value for key, value in variables.items() if key in KEPT_COLLECTIONS}
    logits = jax.eval_shape(partial(model.apply, train=False), kept, images)
    classes = _check_logits(name, logits, dataset)
    logits = _shapes_in_training(name, model, kept, images)
    if _check_logits(f"{name}, in training", logits, dataset) != classes:
        raise UserError(
            f"{name}: it gives {classes} logits an image, and {logits.shape[1]} in training"
        )
    return classes


def _check_logits(name: str, logits: Any, dataset: Dataset) -> int:
    """K of logits [N K] of 2 images."""
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < dataset.num_classes:
        got = f"[{' '.join(map(str, shape))}]" if shape is not None else type(logits).__name__
        raise UserError(
            f"{name}: expected logits [N K] with K of at least {dataset.num_classes}, the classes"
            f" of {dataset.name}; for 2 images of {list(dataset.image_shape)} it gives {got}"
        )
    return shape[1]


# What flax says of a network that trains otherwise than a run lets it -> what a run does.
_IN_TRAINING = {
    flax.errors.InvalidRngError: "a run gives the streams dropout and shared",
    flax.errors.ModifyScopeVariableError: "a run lets it write batch_stats, and sow aux_logits",
    flax.errors.ScopeParamNotFoundError: "parameters are made with train=False: make all of them",
    flax.errors.ScopeCollectionNotFound: "variables are made with train=False: make all of them",
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
    except tuple(_IN_TRAINING) as error:
        said = str(error).partition(" (https://")[0].rstrip(".")
        raise UserError(f"{name}, in training: {said}; {_IN_TRAINING[type(error)]}") from None


def describe_parameters(variables: PyTree) -> dict[str, list[int]]:
    """{path: shape} of all parameters."""
    leaves: Mapping[str, Any] = pytree.flatten(variables["params"])
    return {path: list(leaf.shape) for path, leaf in leaves.items()}
