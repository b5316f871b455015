"""Keras's weight files, which are HDF5."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_cnns.errors import UserError
from flax_cnns.weights.common import Tensors, check_size, import_package

# The leaves of each kind of layer, in the order in which .weights.h5 numbers them.
_DENSE, _NORM = ("kernel", "bias"), ("gamma", "beta", "moving_mean", "moving_variance")
_LEAVES = {
    "conv2d": _DENSE,
    "depthwise_conv2d": _DENSE,
    "dense": _DENSE,
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "batch_normalization": _NORM,
    "layer_normalization": _NORM,
    "layer_scale": ("variable",),
    "normalization": ("mean", "variance", "count"),
}
# Names of Keras 1, whose files later versions still load.
_KERAS1 = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",  # it holds the variance, despite its name
    "depthwise_kernel": "depthwise_kernel",
    "pointwise_kernel": "pointwise_kernel",
}
_KERAS1_KINDS = {
    "convolution2d": "conv2d",
    "separableconvolution2d": "separable_conv2d",
    "batchnormalization": "batch_normalization",
}


def read_hdf5(path: Path, content: bytes | None = None) -> Tensors:
    """The tensors of an HDF5 file, or of its `content`, under the names of Keras 3.

    Raises `UserError` if h5py is missing, or if an array lies in another file.
    """
    h5py = import_package("h5py", path)
    with h5py.File(path if content is None else io.BytesIO(content), "r") as file:
        items: dict[str, Any] = {}
        # `visititems` follows hard links only: other links may lead into other files.
        file.visititems(lambda name, item: items.update({name: item}))
        arrays = {name: item for name, item in items.items() if isinstance(item, h5py.Dataset)}
        if other := [name for name, item in arrays.items() if item.external or item.is_virtual]:
            raise UserError(f"{path} is refused: {other[0]} lies in another file")
        check_size(path, sum(item.size * item.dtype.itemsize for item in arrays.values()))
        names = _numbered_names(arrays, items) or _legacy_names(items, file)
        return {name: arrays[place][()] for name, place in names.items()}


def _numbered_names(arrays: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, str]:
    """{Keras 3's name: place in the file} for Keras 3's .weights.h5; {} for other files.

    A layer is named after its class and its leaves are numbered: `layers/conv2d_1/vars/0`. An
    attribute holds the layer's own name.
    """
    names = {}
    for place in arrays:
        if not (match := re.fullmatch(r"(.*/)?layers/((\w+?)(?:_\d+)?)/vars/(\d+)", place)):
            continue
        layer, kind, number = match[2], match[3], int(match[4])
        vars_ = items[place.rpartition("/")[0]]
        leaves = _LEAVES.get(kind, ())
        if kind == "batch_normalization" and len(vars_) == 3:  # without scale, as in Inception
            leaves = leaves[1:]
        leaf = leaves[number] if number < len(leaves) else str(number)
        names[f"{vars_.attrs.get('name', layer)}/{leaf}"] = place
    return names


def _legacy_names(items: Mapping[str, Any], file: Any) -> dict[str, str]:
    """{Keras 3's name: place in the file} for the .h5 of Keras 1 and 2.

    It has a group for each layer, with the names of the layer's weights in an attribute.
    """
    prefix = "model_weights/" if "model_weights" in items else ""
    group = items["model_weights"] if prefix else file
    names = {}
    for layer in _read_strings(group.attrs, "layer_names"):
        for weight in _read_strings(items[f"{prefix}{layer}"].attrs, "weight_names"):
            names[_keras_name(layer, weight)] = f"{prefix}{layer}/{weight}"
    return names


def _read_strings(attributes: Mapping[str, Any], name: str) -> list[str]:
    """The strings in an attribute; a long one is split into parts `name0`, `name1`, ..."""
    parts = [name] if name in attributes else []
    while f"{name}{len(parts)}" in attributes:
        parts.append(f"{name}{len(parts)}")
    strings = [string for part in parts for string in attributes[part]]
    return [s.decode() if isinstance(s, bytes) else str(s) for s in strings]


def _keras_name(layer: str, weight: str) -> str:
    """The name that Keras 3 gives to a weight (`conv1_conv/kernel`), from a name of any version."""
    weight = weight.removesuffix(":0")
    if weight.startswith(f"{layer}/") and weight.count("/") == layer.count("/") + 1:
        module, leaf = layer, weight.rpartition("/")[2]
    elif "/" in weight:  # a network inside the network
        *_, module, leaf = weight.split("/")
    else:
        match = re.fullmatch(rf"(?:.*_)?({'|'.join(_KERAS1)})(?:_\d+)?", weight)
        kind, _, number = layer.rpartition("_")
        module = f"{_KERAS1_KINDS[kind]}_{number}" if kind in _KERAS1_KINDS else layer
        leaf = _KERAS1[match[1]] if match else weight.lower()
    return f"{module.replace('/BatchNorm', '_bn').replace('/', '_')}/{leaf}"
