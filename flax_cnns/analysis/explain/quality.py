"""Measures of the quality of saliency maps: cascading randomization, deletion, insertion.

The measures have one value per image, so that `flax_cnns.analysis.statistics` can compute intervals
over images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import TargetLike, compute_scores, make_target
from flax_cnns.errors import UserError
from flax_cnns.types import Array


def randomize(
    model: nn.Module, variables: Variables, images: Array, key: Array
) -> Iterator[tuple[str, Variables]]:
    """Yields (layer, variables), where one more layer is random each time, from the head down.

    This is cascading randomization (Adebayo et al. 2018, arXiv 1810.03292, section 3). A layer is a
    module with parameters of its own. Its parameters and statistics are replaced by those of a new
    initialization, drawn from `key`.
    """
    model, variables = tap.unroll(model, variables)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    fresh = pytree.flatten(_initialize(model, key, shape))
    now = pytree.flatten(variables)
    # The network's own parameters, such as a transformer's positions, are those of its input.
    order = ["", *filter(None, tap.list_calls(model, variables, images))]
    owners = {path: path.split("/", 1)[1].rpartition("/")[0] for path in now}
    for layer in reversed(order):
        mine = [path for path, owner in owners.items() if owner == layer and path in fresh]
        if mine:
            now |= {path: fresh[path] for path in mine}
            owners = {path: owner for path, owner in owners.items() if path not in mine}
            yield layer, pytree.unflatten(now)


def rank_correlation(maps: Array, others: Array, *, absolute: bool = True) -> np.ndarray:
    """Returns Spearman's rank correlation of two maps [N H W] for each image: f64 [N].

    Absolute values are compared unless `absolute` is False. The result is NaN for a constant map.
    """
    first, second = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (maps, others))
    if absolute:
        first, second = np.abs(first), np.abs(second)
    first, second = (stats.rankdata(a, axis=1) for a in (first, second))
    first, second = (a - a.mean(1, keepdims=True) for a in (first, second))
    with np.errstate(invalid="ignore"):
        return (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))


def deletion(
    model: nn.Module,
    variables: Variables,
    images: Array,
    maps: Array,
    target: TargetLike = None,
    *,
    steps: int = 20,
    fill: Array | float = 0.0,
) -> np.ndarray:
    """Returns the area under the class's probability while the most salient pixels are removed:
    f64 [N], lower is better.

    Petsiuk et al. 2018, arXiv 1806.07421, section 4.2. In each of `steps` steps an equal share of
    the pixels becomes `fill`. Raises `UserError` for maps of another size than the images'.
    """
    return _area(model, variables, images, maps, target, steps, fill, "deletion")


def insertion(
    model: nn.Module,
    variables: Variables,
    images: Array,
    maps: Array,
    target: TargetLike = None,
    *,
    steps: int = 20,
    fill: Array | float = 0.0,
) -> np.ndarray:
    """Returns the area under the class's probability while the most salient pixels are inserted
    into `fill`: f64 [N], higher is better.

    The paper's `fill` is the blurred image. Raises `UserError` as `deletion` does.
    """
    return _area(model, variables, images, maps, target, steps, fill, "insertion")


def _area(
    model: nn.Module,
    variables: Variables,
    images: Array,
    maps: Array,
    target: TargetLike,
    steps: int,
    fill: Array | float,
    what: Literal["deletion", "insertion"],
) -> np.ndarray:
    if maps.shape != images.shape[:3]:
        raise UserError(
            f"maps: expected {list(images.shape[:3])}, as the images, got {list(maps.shape)};"
            " jax.image.resize resizes them"
        )
    if steps < 1:
        raise UserError(f"steps: expected at least 1, got {steps}")
    goal = make_target(target, model, variables, images)
    if goal.function is None:
        goal = dataclasses.replace(goal, of_probabilities=True)
    pixels = images.shape[1] * images.shape[2]
    order = np.argsort(-np.asarray(maps).reshape(len(images), -1), axis=1, kind="stable")
    rank = jnp.asarray(np.argsort(order, axis=1, kind="stable").reshape(maps.shape))
    curve = []
    for step in range(steps + 1):
        changed = (rank < round(pixels * step / steps))[..., None]
        kept, taken = (images, fill) if what == "deletion" else (fill, images)
        curve.append(
            np.asarray(compute_scores(model, variables, jnp.where(changed, taken, kept), goal))
        )
    return np.asarray(np.trapezoid(np.array(curve, np.float64), dx=1 / steps, axis=0))


@tracing.jit("images")
def _initialize(model: nn.Module, key: Array, images: jax.ShapeDtypeStruct) -> Variables:
    return model.init(key, jnp.zeros((1, *images.shape[1:]), images.dtype), train=False)
