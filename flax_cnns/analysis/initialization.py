"""The lectures' experiment: how the outputs of dense layers depend on the initial weights.

CS231n (Stanford), lecture "Training Neural Networks", draws `randn(16, 4096)` images, sends them
through six dense layers of 4096 units without biases, and shows a histogram of each layer's output.
With weights that are too small, the outputs shrink to zero; with weights that are too large, tanh
saturates and ReLU explodes.

    for setting, layers in measure_dense_stacks(SETTINGS, width=512).items():
        print(setting.label, [layer.std for layer in layers])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.types import Array


class Setting(NamedTuple):
    """An activation, and the standard deviation of the normal weights before it."""

    activation: Literal["tanh", "relu"]
    label: str
    std: Callable[[int], float]  # number of inputs of a layer -> standard deviation


# Glorot & Bengio 2010, equation 12, for layers with as many outputs as inputs: 1 / inputs.
# He et al. 2015, equation 10: 2 / inputs.
_INITIALIZATIONS: tuple[tuple[str, Callable[[int], float]], ...] = (
    ("N(0, 0.01²)", lambda inputs: 0.01),
    ("N(0, 0.05²)", lambda inputs: 0.05),
    ("Xavier", lambda inputs: inputs**-0.5),
    ("He", lambda inputs: (2 / inputs) ** 0.5),
)
SETTINGS = tuple(
    Setting(activation, label, std)
    for activation in ("tanh", "relu")
    for label, std in _INITIALIZATIONS
)
# The deck prints `randn(Din, Dout) / np.sqrt(2 / Din)` as He's initialization. It must be
# `* np.sqrt(2 / Din)`. As printed, the standard deviation is sqrt(Din / 2), which is 45 for 4096.
AS_PRINTED = tuple(
    Setting(activation, "He as printed", lambda inputs: (inputs / 2) ** 0.5)
    for activation in ("tanh", "relu")
)

RANGES = {"tanh": (-1.0, 1.0), "relu": (0.0, 5.0)}  # of the histograms


class DenseOutputs(NamedTuple):
    """The outputs of one dense layer after its activation, over all images and units."""

    mean: float
    std: float
    mean_square: float
    zeros: float  # fraction of outputs that are exactly 0
    dead: float  # fraction of units that are 0 for all images
    counts: np.ndarray  # i64 [bins], without the outputs that are exactly 0
    edges: np.ndarray  # f64 [bins + 1]


def measure_dense_stacks(
    settings: Sequence[Setting] = SETTINGS,
    *,
    layers: int = 6,
    width: int = 4096,
    images: int = 16,
    key: Array | None = None,
    bins: int = 40,
) -> dict[Setting, list[DenseOutputs]]:
    """Returns statistics of the outputs of `layers` dense layers of `width` units for each setting.

    The images f32 [images width] are drawn from N(0, 1), and there are no biases. All settings use
    the same random numbers, which differ by the scale of the weights alone. The histograms cover
    `RANGES`; values beyond count in the outer bin. Equal keys (by
    default `jax.random.key(0)`) give equal results. Numbers that leave float32 are inf or NaN.
    """
    key = jax.random.key(0) if key is None else key
    start = jax.random.normal(jax.random.fold_in(key, 0), (images, width))
    outputs = dict.fromkeys(settings, start)
    found: dict[Setting, list[DenseOutputs]] = {setting: [] for setting in settings}
    for number in range(layers):
        weights = jax.random.normal(jax.random.fold_in(key, 1 + number), (width, width))
        for setting in settings:
            scale = setting.std(width)
            outputs[setting] = _apply_layer(outputs[setting], weights, scale, setting.activation)
            found[setting].append(_summarize(outputs[setting], setting.activation, bins))
    return found


def _apply_layer(x: Array, weights: Array, scale: float, activation: str) -> Array:
    y = scale * (x @ weights)
    return jnp.tanh(y) if activation == "tanh" else jax.nn.relu(y)


def _summarize(output: Array, activation: str, bins: int) -> DenseOutputs:
    values = np.asarray(output, np.float64)
    low, high = RANGES[activation]
    edges = np.linspace(low, high, bins + 1)
    shown = values[(values != 0) & ~np.isnan(values)]
    with np.errstate(invalid="ignore"):
        mean, std = float(values.mean()), float(values.std())
    return DenseOutputs(
        mean,
        std,
        float((values**2).mean()),
        float((values == 0).mean()),
        float((values == 0).all(0).mean()),
        np.histogram(np.clip(shown, edges[0], edges[-1]), edges)[0],
        edges,
    )
