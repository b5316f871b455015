"""Keras' files: HDF5, with the names of their layers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_cnns.errors import UserError
from flax_cnns.weights.common import Tensors, check_size, import_package

# ---- Keras's HDF5

# The leaves of a layer in the order in which .weights.h5 numbers them.
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
# Keras 1's: the files that its successors still load.
_KERAS1 = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",  # which it is
    "depthwise_kernel": "depthwise_kernel",
    "pointwise_kernel": "pointwise_kernel",
}
_KERAS1_KINDS = {
    "convolution2d": "conv2d",
    "separableconvolution2d": "separable_conv2d",
    "batchnormalization": "batch_normalization",
}


def read_hdf5(path: Path, content: bytes | None = None) -> Tensors:
    h5py = import_package("h5py", path)
    with h5py.File(path if content is None else io.BytesIO(content), "r") as file:
        sets: dict[str, Any] = {}  # hard links only: others may lead into other files
        file.visititems(lambda name, item: sets.update({name: item}))
        arrays = {name: item for name, item in sets.items() if isinstance(item, h5py.Dataset)}
        if other := [name for name, item in arrays.items() if item.external or item.is_virtual]:
            raise UserError(f"{path} is refused: {other[0]} lies in another file")
        check_size(path, sum(item.size * item.dtype.itemsize for item in arrays.values()))
        names = _numbered(arrays, sets) or _legacy(arrays, sets, file)
        return {ours: arrays[theirs][()] for ours, theirs in names.items()}


def _numbered(arrays: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, str]:
    """Of Keras 3's .weights.h5, which numbers the leaves of layers that it names after their
    class: `layers/conv2d_1/vars/0`. The layer's own name is an attribute."""
    names = {}
    for place in arrays:
        if not (found := re.fullmatch(r"(.*/)?layers/((\w+?)(?:_\d+)?)/vars/(\d+)", place)):
            continue
        layer, kind, number = found[2], found[3], int(found[4])
        vars_ = groups[place.rpartition("/")[0]]
        leaves = _LEAVES.get(kind, ())
        if kind == "batch_normalization" and len(vars_) == 3:  # without a scale, as Inception's
            leaves = leaves[1:]
        leaf = leaves[number] if number < len(leaves) else str(number)
        names[f"{vars_.attrs.get('name', layer)}/{leaf}"] = place
    return names


def _legacy(arrays: Mapping[str, Any], groups: Mapping[str, Any], file: Any) -> dict[str, str]:
    """Of .h5 as Keras 1 and 2 wrote it: a group for each layer, with the names of its weights."""
    prefix = "model_weights/" if "model_weights" in groups else ""
    group = groups["model_weights"] if prefix else file
    names = {}
    for layer in _texts(group.attrs, "layer_names"):
        for weight in _texts(groups[f"{prefix}{layer}"].attrs, "weight_names"):
            names[_keras_name(layer, weight)] = f"{prefix}{layer}/{weight}"
    return names


def _texts(attributes: Mapping[str, Any], name: str) -> list[str]:
    """Of an attribute, or of its parts `name0`, `name1` ..., where it is long."""
    parts = [name] if name in attributes else []
    while f"{name}{len(parts)}" in attributes:
        parts.append(f"{name}{len(parts)}")
    texts = [text for part in parts for text in attributes[part]]
    return [t.decode() if isinstance(t, bytes) else str(t) for t in texts]


def _keras_name(layer: str, weight: str) -> str:
    """`conv1_conv/kernel`, as Keras 3 says, whichever version's names."""
    weight = weight.removesuffix(":0")
    if weight.startswith(f"{layer}/") and weight.count("/") == layer.count("/") + 1:
        module, leaf = layer, weight.rpartition("/")[2]
    elif "/" in weight:  # a network inside the network
        *_, module, leaf = weight.split("/")
    else:
        found = re.fullmatch(rf"(?:.*_)?({'|'.join(_KERAS1)})(?:_\d+)?", weight)
        kind, _, number = layer.rpartition("_")
        module = f"{_KERAS1_KINDS[kind]}_{number}" if kind in _KERAS1_KINDS else layer
        leaf = _KERAS1[found[1]] if found else weight.lower()
    return f"{module.replace('/BatchNorm', '_bn').replace('/', '_')}/{leaf}"
