"""Estimates the running statistics of BatchNorm again, for weights that no training step left."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import jax

from flax_cnns import tree as pytree
from flax_cnns.runs import build
from flax_cnns.train import batchnorm_modes, parallel, precise_bn
from flax_cnns.types import PyTree

Reestimate = Callable[[PyTree], PyTree]


def find_updated_layers(components: build.RunComponents, variables: PyTree) -> dict[str, str]:
    """Returns {BatchNorm layer: mode} as the run trains them: statistics that the run kept frozen
    stay. Empty for a network without BatchNorm."""
    config = components.config.optimizer
    trainable = pytree.expand_per_parameter(
        config.trainable, variables["params"], what="optimizer.trainable", default=True
    )
    stats = variables.get("batch_stats", {})
    return batchnorm_modes.decide_modes(config.bn, trainable, stats)


def make_reestimation(
    components: build.RunComponents, modes: dict[str, str], images: int
) -> tuple[Reestimate, int]:
    """Returns (a function that replaces the running statistics of variables, the number of images).

    The statistics are those of the run's first training batches, at least `images` images, which
    are augmented and mixed as in training (`train.precise_bn`). They depend on the run's seed
    alone. Variables have the layout that the network takes: stacked if it scans.
    """
    step = parallel.parallelize(
        precise_bn.make_moments_step(
            components.model.apply, modes, **build.make_augment_and_mix(components)
        ),
        components.mesh,
        mode=components.mode,
        donate=False,
    )
    size = components.config.data.batch_size
    count = -(-images // size)
    with contextlib.closing(build.train_batches(components)) as stream:
        batches = list(itertools.islice(stream, count))
    key = parallel.replicate(build.make_training_key(components.config), components.mesh)

    def reestimate(variables: PyTree) -> PyTree:
        placed = parallel.replicate(variables, components.mesh)
        stats = precise_bn.estimate_statistics(step, placed, batches, key)
        return {**variables, "batch_stats": jax.device_get(stats)}

    return reestimate, count * size
