"""PreciseBN: recomputes BatchNorm's running statistics for the current weights.

A moving average mixes the statistics of many recent weights. Averaged over devices, it also lacks
the variance between devices (steps.py). Here the statistics of many training batches under one set
of weights are pooled: the mean of the means, and the variance from the mean of the squares, as in
Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns import tree as pytree
from flax_cnns.errors import Interrupted
from flax_cnns.train import batchnorm_modes
from flax_cnns.train.hooks import Regularizer
from flax_cnns.train.steps import Augment, Mix, prepare_examples
from flax_cnns.types import Array, Batch, PyTree

Moments = dict[str, tuple[Array, Array]]  # layer -> mean [C], variance [C]


def make_moments_step(
    apply_fn: Callable,
    modes: Mapping[str, str],
    *,
    augment: Augment,
    mix: Mix,
    active: Mapping[str, Regularizer] = {},
    axis_name: str = "batch",
) -> Callable[[tuple[PyTree, Any], Batch, Array], Moments]:
    """Returns `step((variables, index), batch, key)`, which returns the moments of a global batch.

    The moments are those of the inputs of each BatchNorm with the mode "train". The batch is
    augmented and mixed as in training step number `index`. As in evaluation, `train.dropout` and
    the `intercept` hooks of regularizers are off.

    `modes` are `Optimizer.batchnorm_modes`, `active` are `Optimizer.regularizers`. The variance of
    a layer is negative if the layer was not computed because stochastic depth dropped its branch.
    """
    layers = [layer for layer, mode in modes.items() if mode == "train"]

    def moments_step(given: tuple[PyTree, Any], batch: Batch, key: Array) -> Moments:
        variables, index = given
        images, _, rngs = prepare_examples(batch, key, index, augment, mix, axis_name, active)
        stats = pytree.flatten(variables["batch_stats"])
        for layer in layers:
            stats[f"{layer}/var"] = -jnp.ones_like(stats[f"{layer}/var"])
        # With momentum 0 the running statistics become those of the batch.
        with batchnorm_modes.intercept(modes, momentum=0.0):
            _, updates = apply_fn(
                {"params": variables["params"], "batch_stats": pytree.unflatten(stats)},
                images,
                train=True,
                mutable=["batch_stats", "aux_logits"],
                rngs=rngs,
            )
        new_stats = pytree.flatten(updates["batch_stats"])
        moments = {}
        for layer in layers:
            local, variance = new_stats[f"{layer}/mean"], new_stats[f"{layer}/var"]
            mean = lax.pmean(local, axis_name)
            # The variance within devices plus the variance between them.
            moments[layer] = mean, lax.pmean(variance + jnp.square(local - mean), axis_name)
        return moments

    return moments_step


def estimate_statistics(
    step: Callable[[tuple[PyTree, Any], Any, Array], Moments],
    variables: PyTree,
    batches: Iterable[Any],
    key: Array,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> PyTree:
    """Returns `variables["batch_stats"]` with pooled statistics of all `batches`, as NumPy arrays.

    Layers that `step` leaves out, and layers that no batch reached, keep their statistics. The old
    statistics of the other layers have no influence, so a second call returns the same bits.

    Raises `Interrupted` if `should_stop()` returns True between two batches.
    """
    totals: dict[str, np.ndarray] = {}  # sums of counts, means and mean squares: [3 C]
    for index, batch in enumerate(batches):
        if should_stop():
            raise Interrupted
        for layer, moments in jax.device_get(
            step((variables, np.int32(index)), batch, key)
        ).items():
            mean, variance = np.asarray(moments, np.float64)
            counts = variance >= 0
            seen = np.stack([counts, counts * mean, counts * (variance + mean**2)])
            totals[layer] = totals.get(layer, 0.0) + seen
    stats = pytree.flatten(jax.device_get(variables["batch_stats"]))
    for layer, (count, means, squares) in totals.items():
        mean = means / np.maximum(count, 1)
        variance = squares / np.maximum(count, 1) - mean**2
        for name, value in (("mean", mean), ("var", variance)):
            old = stats[f"{layer}/{name}"]
            stats[f"{layer}/{name}"] = np.where(count > 0, value, old).astype(old.dtype)
    return pytree.unflatten(stats)
