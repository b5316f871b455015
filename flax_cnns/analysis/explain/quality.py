"""Measures of the quality of saliency maps: cascading randomization, deletion, insertion, ROAD.

The measures have one value per image, so that `flax_cnns.analysis.statistics` can compute intervals
over images. `random_maps` and `edge_maps` are maps that do not depend on the network. A method
should be better than both.

Deletion, insertion and ROAD sort the pixels of a map. Equal pixels are sorted at random, always in
the same way, so that a map of zeros is as good as a random map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage, sparse, stats
from scipy.sparse import linalg

from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import Target, TargetLike, compute_scores, make_target
from flax_cnns.errors import UserError
from flax_cnns.types import Array

# The weights of the eight neighbors in ROAD's imputation (Rong et al. 2022).
_NEIGHBORS = {
    (dy, dx): 1 / 6 if dy == 0 or dx == 0 else 1 / 12
    for dy in (-1, 0, 1)
    for dx in (-1, 0, 1)
    if (dy, dx) != (0, 0)
}
ROAD_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the pixels that are removed


class Road(NamedTuple):
    """The target's mean value while pixels are removed in two orders: f64 [N] each."""

    most_relevant_first: np.ndarray  # the paper's MoRF, lower is better
    least_relevant_first: np.ndarray  # the paper's LeRF, higher is better

    @property
    def gap(self) -> np.ndarray:
        """LeRF minus MoRF: f64 [N], higher is better, near 0 for a random map."""
        return self.least_relevant_first - self.most_relevant_first


def randomize(
    model: nn.Module, variables: Variables, images: Array, key: Array
) -> Iterator[tuple[str, Variables]]:
    """Yields (layer, variables) from the head down; each time, `layer` is random as well.

    This is cascading randomization (Adebayo et al. 2018, arXiv 1810.03292, section 3). A layer is a
    module with parameters of its own. Its parameters and statistics are replaced by those of a new
    initialization, drawn from `key`.
    """
    model, variables = tap.unroll(model, variables)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    drawn = pytree.flatten(_initialize(model, key, shape))
    mixed = pytree.flatten(variables)
    # The network's own parameters, such as a transformer's positions, are those of its input.
    order = ["", *filter(None, tap.list_calls(model, variables, images))]
    owners = {path: path.split("/", 1)[1].rpartition("/")[0] for path in mixed}
    for layer in reversed(order):
        leaves = [path for path, owner in owners.items() if owner == layer and path in drawn]
        if leaves:
            mixed |= {path: _place_like(mixed[path], drawn[path]) for path in leaves}
            owners = {path: owner for path, owner in owners.items() if path not in leaves}
            yield layer, pytree.unflatten(mixed)


def _place_like(leaf: Array | np.ndarray, drawn: Array) -> Array:
    """Returns `drawn` on the devices of `leaf`, so that JAX need not compile for a mixture."""
    if isinstance(leaf, jax.Array) and getattr(leaf, "committed", False):
        return jax.device_put(drawn, leaf.sharding)
    return drawn


def rank_correlation(
    maps: Array | np.ndarray, others: Array | np.ndarray, *, absolute: bool = True
) -> np.ndarray:
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
    maps: Array | np.ndarray,
    target: TargetLike = None,
    *,
    steps: int = 20,
    fill: Array | float = 0.0,
) -> np.ndarray:
    """Returns the area under the curve of the class's probability while the most salient pixels are
    removed: f64 [N], lower is better.

    Petsiuk et al. 2018, arXiv 1806.07421, section 4.2. In each of `steps` steps an equal share of
    the pixels becomes `fill`. Raises `UserError` for maps of another size than the images', and as
    `make_target` does.
    """
    _check_maps(maps, images)
    _check_steps(steps)
    fills = jnp.broadcast_to(jnp.asarray(fill, images.dtype), images.shape)
    return _measure_area(model, variables, images, fills, maps, target, steps)


def insertion(
    model: nn.Module,
    variables: Variables,
    images: Array,
    maps: Array | np.ndarray,
    target: TargetLike = None,
    *,
    steps: int = 20,
    fill: Array | float | None = None,
) -> np.ndarray:
    """Returns the area under the curve of the class's probability while the most salient pixels are
    inserted into `fill`: f64 [N], higher is better.

    Petsiuk et al. 2018, section 4.2. If `fill` is None, it is the image after `blur`, as in the
    paper. Raises `UserError` as `deletion` does.
    """
    _check_maps(maps, images)
    _check_steps(steps)
    fills = blur(images) if fill is None else jnp.asarray(fill, images.dtype)
    fills = jnp.broadcast_to(fills, images.shape)
    goal = make_target(target, model, variables, images)  # predicted for images, not for fills
    return _measure_area(model, variables, fills, images, maps, goal, steps)


def blur(images: Array, sigma: float | None = None) -> Array:
    """Returns images [N H W C] after a Gaussian blur of `sigma` pixels.

    If `sigma` is None, it is 5 pixels for images of 224 pixels, as in the code of Petsiuk et al.
    (which cuts the kernel to 11 pixels), and in proportion for images of other sizes.
    """
    if sigma is None:
        sigma = 5 * min(images.shape[1:3]) / 224
    blurred = ndimage.gaussian_filter(np.asarray(images, np.float32), (0, sigma, sigma, 0))
    return jnp.asarray(blurred, images.dtype)


def _measure_area(
    model: nn.Module,
    variables: Variables,
    first: Array,
    last: Array,
    maps: Array | np.ndarray,
    target: TargetLike,
    steps: int,
) -> np.ndarray:
    """Returns the area under the target's curve while the images `first` become `last`."""
    goal = _take_probabilities(make_target(target, model, variables, first))
    pixels = first.shape[1] * first.shape[2]
    rank = jnp.asarray(rank_pixels(maps))
    values = []
    for step in range(steps + 1):
        changed = (rank < round(pixels * step / steps))[..., None]
        images = jnp.where(changed, last, first)
        values.append(np.asarray(compute_scores(model, variables, images, goal), np.float64))
    return np.asarray(np.trapezoid(np.array(values), dx=1 / steps, axis=0))


def road(
    model: nn.Module,
    variables: Variables,
    images: Array,
    maps: Array | np.ndarray,
    target: TargetLike = None,
    *,
    shares: Sequence[float] = ROAD_SHARES,
    noise: float = 0.01,
    seed: int = 0,
) -> Road:
    """Returns ROAD: the class's mean probability over `shares` of removed pixels.

    Rong et al. 2022, arXiv 2202.00449. Removed pixels get the values of `impute`, so that the
    shape of the removed part says little about the class. The paper takes the accuracy over many
    images in place of the probability. Half of `Road.gap` is ROADCombined of pytorch-grad-cam, for
    the probability. Raises `UserError` for shares outside of 0 to 1, and as `deletion` does.
    """
    _check_maps(maps, images)
    if not shares or not all(0 < share < 1 for share in shares):
        raise UserError(f"shares: expected numbers above 0 and below 1, got {list(shares)}")
    goal = _take_probabilities(make_target(target, model, variables, images))
    pixels = images.shape[1] * images.shape[2]
    rank = rank_pixels(maps)
    most: list[np.ndarray] = []
    least: list[np.ndarray] = []
    for share in shares:
        removed = round(pixels * share)
        for keep, values in ((rank >= removed, most), (rank < pixels - removed, least)):
            filled = jnp.asarray(impute(images, keep, noise=noise, seed=seed), images.dtype)
            values.append(np.asarray(compute_scores(model, variables, filled, goal), np.float64))
    return Road(np.mean(most, axis=0), np.mean(least, axis=0))


def impute(
    images: Array | np.ndarray, keep: np.ndarray, *, noise: float = 0.01, seed: int = 0
) -> np.ndarray:
    """Returns images [N H W C] whose removed pixels are weighted means of their neighbors: f32.

    `keep`: bool [N H W]; False marks the removed pixels. This is the noisy linear imputation of
    Rong et al. 2022. A neighbor has the weight 1/6, a diagonal neighbor 1/12, a
    neighbor outside of the image 0. The means of all removed pixels are the solution of one sparse
    linear system. Normal noise of the standard deviation `noise` is added to them, drawn with
    `seed`. Raises `UserError` if an image keeps no pixel.
    """
    filled = np.array(images, np.float32)
    keep = np.asarray(keep, bool)
    if keep.shape != filled.shape[:3]:
        raise UserError(f"keep: expected {list(filled.shape[:3])}, got {list(keep.shape)}")
    if not keep.any((1, 2)).all():
        raise UserError("keep: expected at least one pixel to keep in each image")
    generator = np.random.default_rng(seed)
    for image, kept in zip(filled, keep):
        drawn = generator.normal(0, noise, image.shape) if noise else np.zeros(image.shape)
        if not kept.all():
            image[~kept] = _solve_neighbor_means(image, kept) + drawn[~kept]
    return filled


def _solve_neighbor_means(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Returns the values [removed C] of the removed pixels. Each value, times the sum of its
    neighbors' weights, equals the weighted sum of its neighbors."""
    # A border of one pixel stands for neighbors outside of the image.
    number = np.pad(np.where(keep, -1, np.cumsum(~keep).reshape(keep.shape) - 1), 1)
    kept, inside = np.pad(keep, 1), np.pad(np.ones_like(keep), 1)
    values = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    y, x = (index + 1 for index in np.nonzero(~keep))
    count = len(y)
    each = np.arange(count)
    total, known = np.zeros(count), np.zeros((count, image.shape[-1]))
    rows, columns, weights = [], [], []
    for (dy, dx), weight in _NEIGHBORS.items():
        neighbor = y + dy, x + dx
        total += weight * inside[neighbor]
        known += weight * kept[neighbor][:, None] * values[neighbor]
        unknown = inside[neighbor] & ~kept[neighbor]
        rows.append(each[unknown])
        columns.append(number[neighbor][unknown])
        weights.append(np.full(unknown.sum(), -weight))
    entries = np.concatenate([*weights, total])
    places = np.concatenate([*rows, each]), np.concatenate([*columns, each])
    system = sparse.csc_matrix((entries, places), (count, count))
    return linalg.spsolve(system, known).reshape(known.shape)


def rank_pixels(maps: Array | np.ndarray) -> np.ndarray:
    """Returns each pixel's place, from 0 for the largest value of its map [N H W] on: i64 [N H W].
    Equal pixels are sorted at random, in the same way in each call."""
    flat = np.asarray(maps, np.float64).reshape(len(maps), -1)
    ties = np.random.default_rng(0).random(flat.shape)
    order = np.lexsort((ties, -flat), axis=1)
    return np.argsort(order, axis=1).reshape(np.shape(maps))


def random_maps(images: Array, seed: int = 0) -> np.ndarray:
    """Returns a map of independent uniform numbers for each of the images [N H W C]: [N H W]."""
    return np.random.default_rng(seed).random(images.shape[:3], np.float32)


def edge_maps(images: Array | np.ndarray) -> np.ndarray:
    """Returns the edges of images [N H W C]: the length of the Sobel gradient of the mean over
    channels, f32 [N H W]."""
    # One by one: SciPy's filter would mix the images.
    gray = np.asarray(images, np.float32).mean(-1)
    return np.stack([np.hypot(ndimage.sobel(a, axis=0), ndimage.sobel(a, axis=1)) for a in gray])


def _take_probabilities(target: Target) -> Target:
    if target.function is not None:
        return target
    return dataclasses.replace(target, of_probabilities=True)


def _check_maps(maps: Array | np.ndarray, images: Array) -> None:
    if maps.shape != images.shape[:3]:
        raise UserError(
            f"maps: expected {list(images.shape[:3])}, as the images, got {list(maps.shape)};"
            " jax.image.resize resizes them"
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps: expected at least 1, got {steps}")


@tracing.jit("images")
def _initialize(model: nn.Module, key: Array, images: jax.ShapeDtypeStruct) -> Variables:
    return model.init(key, jnp.zeros((1, *images.shape[1:]), images.dtype), train=False)
