"""The loss around trained parameters: lines, planes, trajectories, curvature, sharpness.

    loss = Loss(model, [(images, labels)])
    directions = tuple(random_direction(variables["params"], jax.random.key(i)) for i in (0, 1))
    losses = evaluate_plane(loss, variables, directions, xs, ys, folder="runs/plane")

The network runs in evaluation. BatchNorm uses the running statistics of the variables, or, with
`Loss(..., batchnorm="batch")`, those of each batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import files
from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.errors import UserError
from flax_cnns.layers.conv import inside_control_flow
from flax_cnns.types import Array, PyTree

Variables = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean cross-entropy of a network over batches of images [N H W C] and labels i32 [N]."""

    model: nn.Module
    batches: Sequence[tuple[Array, Array]]
    batchnorm: Literal["running", "batch"] = "running"

    def __call__(self, variables: Variables) -> float:
        """Returns the loss of `variables`."""
        return float(self._sum_over_batches(_loss_sum, variables) / self.count)

    def gradient(self, variables: Variables) -> PyTree:
        """Returns the gradient by `variables["params"]`."""
        total = self._sum_over_batches(_gradient_sum, variables)
        return jax.tree.map(lambda leaf: leaf / self.count, total)

    def hessian_times(self, variables: Variables, direction: PyTree) -> PyTree:
        """Returns the Hessian by the parameters, times `direction`, forward over reverse."""
        total = self._sum_over_batches(_hessian_sum, variables, direction)
        return jax.tree.map(lambda leaf: leaf / self.count, total)

    def row(self, variables: Variables, directions: PyTree, xs: Array, y: float) -> np.ndarray:
        """Returns the losses at params + x * directions[0] + y * directions[1] for every x."""
        total = self._sum_over_batches(_row_sums, variables, directions, jnp.asarray(xs), y)
        return np.asarray(total / self.count)

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(len(labels) for _, labels in self.batches)

    def _sum_over_batches(self, function: Callable, *args: Any) -> Any:
        if not self.count:
            raise UserError("no images: the loss is a mean over at least one")
        parts = (function(self.model, self.batchnorm, *batch, *args) for batch in self.batches)
        total = next(parts)
        for part in parts:
            total = jax.tree.map(jnp.add, total, part)
        return total


def random_direction(params: PyTree, key: Array) -> PyTree:
    """Returns a random normal direction in which each filter has the norm of the weights' filter.

    Li et al. 2018, arXiv 1712.09913, section 4: d *= |w| / |d|. A filter is one output of a kernel:
    the last axis of Flax's kernels, also of dense layers. The direction is 0 for biases, scales and
    other parameters with fewer than two axes. Stacked blocks (`tree.stack_blocks`) get the
    direction that they have one by one. Equal keys give equal directions.
    """
    named = pytree.unstack_blocks(params)
    leaves = {}
    for number, (path, leaf) in enumerate(sorted(pytree.flatten(named).items())):
        drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
        leaves[path] = jnp.zeros_like(leaf) if leaf.ndim < 2 else _scale_filters(drawn, leaf)
    direction = pytree.unflatten(leaves)
    stacked = pytree.flatten(named).keys() != pytree.flatten(params).keys()
    return pytree.stack_blocks(direction) if stacked else direction


def _scale_filters(drawn: Array, weights: Array) -> Array:
    axes = tuple(range(weights.ndim - 1))
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, axis=axes, keepdims=True))  # noqa: E731
    return drawn * norm(weights) / (norm(drawn) + 1e-10)


def evaluate_plane(
    loss: Loss,
    variables: Variables,
    directions: tuple[PyTree, PyTree],
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    folder: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> np.ndarray:
    """Returns the losses f32 [len(ys) len(xs)] at params + x * directions[0] + y * directions[1].

    If `folder` is given, each row is saved there, and a repeated call computes only the missing
    rows. Raises `UserError` if the folder holds rows of another plane.
    """
    rows = []
    place = None if folder is None else _open_folder(folder, loss, variables, directions, xs, ys)
    for number, y in enumerate(ys):
        path = None if place is None else place / f"row{number}.npy"
        if path is not None and path.is_file():
            rows.append(np.load(path))
            continue
        rows.append(loss.row(variables, directions, jnp.asarray(xs, jnp.float32), float(y)))
        if path is not None:
            with files.replace_atomically(path) as temporary, open(temporary, "wb") as file:
                np.save(file, rows[-1])
        say(f"row {number + 1}/{len(ys)}: {rows[-1].min():.4g} to {rows[-1].max():.4g}")
    return np.stack(rows)


def evaluate_line(
    loss: Loss, start: Variables, end: Variables, alphas: Sequence[float]
) -> np.ndarray:
    """Returns the losses f32 [len(alphas)] at (1 - alpha) * start + alpha * end.

    All variables are interpolated, the running statistics of BatchNorm too. Raises `UserError` if
    the two have other parameters.
    """
    first, second = pytree.flatten(start), pytree.flatten(end)
    shapes = [{path: leaf.shape for path, leaf in each.items()} for each in (first, second)]
    if shapes[0] != shapes[1]:
        differing = sorted(path for path, _ in shapes[0].items() ^ shapes[1].items())
        raise UserError(
            f"the two ends differ in the shape of {differing[0]!r}: they are not of one network"
        )
    losses = []
    for alpha in alphas:
        between = jax.tree.map(lambda a, b, t=alpha: (1 - t) * a + t * b, start, end)
        losses.append(loss(between))
    return np.array(losses, np.float32)


class Trajectory(NamedTuple):
    """The plane that holds most of a run's path, and the path in it."""

    directions: tuple[PyTree, PyTree]  # orthonormal
    points: np.ndarray  # f64 [steps 2]; the last is 0, 0
    explained: np.ndarray  # f64 [2]: share of the variance of the path


def fit_trajectory(checkpoints: Sequence[PyTree]) -> Trajectory:
    """Returns the first two principal components of params_i - params_last (Li et al. 2018, section
    7). Raises `UserError` for fewer than three checkpoints, and for checkpoints on a line."""
    if len(checkpoints) < 3:
        raise UserError(f"a trajectory needs at least 3 checkpoints, got {len(checkpoints)}")
    # Leaf by leaf: only small matrices, of as many rows as there are checkpoints, hold sums.
    steps = jax.tree.map(_differences, checkpoints[-1], *checkpoints)
    centered = [leaf - leaf.mean(0) for leaf in jax.tree.leaves(steps)]
    gram = sum(leaf @ leaf.T for leaf in centered)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if values[1] <= 1e-12 * values[0]:
        raise UserError("the checkpoints lie on a line: there is no plane; take evaluate_line")
    weights = (vectors / np.sqrt(values)).T  # [2 checkpoints]
    axes = [weights @ leaf for leaf in centered]
    points = sum(step @ axis.T for step, axis in zip(jax.tree.leaves(steps), axes))
    return Trajectory(
        (_restore(axes, 0, checkpoints[-1]), _restore(axes, 1, checkpoints[-1])),
        points,
        values / np.trace(gram),
    )


class Eigenpair(NamedTuple):
    value: float
    vector: PyTree  # of norm 1
    steps: int


def find_top_eigenvalues(
    loss: Loss | Any,
    variables: Variables,
    count: int = 1,
    *,
    key: Array,
    tolerance: float = 1e-3,
    most: int = 100,
) -> list[Eigenpair]:
    """Returns the eigenvalues of the Hessian that are largest in absolute value, by power iteration
    with deflation.

    Each iteration ends when the value changes by less than `tolerance`, relatively, or after `most`
    steps. `loss` is a `Loss`, or has its method `hessian_times`.
    """
    found: list[Eigenpair] = []
    for number in range(count):
        drawn = {
            path: jax.random.normal(jax.random.fold_in(key, number * 10_000 + i), leaf.shape)
            for i, (path, leaf) in enumerate(pytree.flatten(variables["params"]).items())
        }
        vector, value = _normalize(pytree.unflatten(drawn)), 0.0
        for steps in range(1, most + 1):
            for pair in found:
                overlap = _dot(vector, pair.vector)
                vector = jax.tree.map(lambda v, u, c=overlap: v - c * u, vector, pair.vector)
            vector = _normalize(vector)
            product = loss.hessian_times(variables, vector)
            value, last = float(_dot(vector, product)), value
            if abs(value - last) <= tolerance * max(abs(value), 1e-12) or steps == most:
                break
            vector = product
        # The vector whose value this is; it is orthogonal to those before.
        found.append(Eigenpair(value, vector, steps))
    return found


def measure_sharpness(loss: Loss, variables: Variables, rho: float = 0.05) -> float:
    """Returns L(w + rho g / |g|) - L(w), SAM's sharpness to first order (Foret et al. 2021, arXiv
    2010.01412, equation 2)."""
    climb = _normalize(loss.gradient(variables))
    moved = jax.tree.map(lambda w, g: w + rho * g, variables["params"], climb)
    return loss({**variables, "params": moved}) - loss(variables)


# ---- one batch


def _sum(
    model: nn.Module, batchnorm: str, images: Array, labels: Array, variables: Variables
) -> Array:
    """The sum of the cross-entropy over a batch."""
    if batchnorm == "batch":
        with nn.intercept_methods(_normalize_by_batch):
            logits, _ = model.apply(variables, images, train=False, mutable=["batch_stats"])
    else:
        logits = model.apply(variables, images, train=False)
    logits = jnp.asarray(logits, jnp.float32)
    return -jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1).sum()


def _normalize_by_batch(function, args, kwargs, context):
    """Lets each BatchNorm take the statistics of the batch, while all else is in evaluation."""
    layer = context.module
    if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
        return function(*args, **kwargs)
    if layer.use_running_average is None:
        return function(*args, **{**kwargs, "use_running_average": False})
    if layer.use_running_average is False:
        return function(*args, **kwargs)
    # The clone shares the layer's scope, and so its variables.
    return layer.clone(parent=layer.scope, use_running_average=False)(*args, **kwargs)


@tracing.jit("batchnorm")
def _loss_sum(model, batchnorm, images, labels, variables):
    return _sum(model, batchnorm, images, labels, variables)


@tracing.jit("batchnorm")
def _gradient_sum(model, batchnorm, images, labels, variables):
    def loss(params: PyTree) -> Array:
        return _sum(model, batchnorm, images, labels, {**variables, "params": params})

    return jax.grad(loss)(variables["params"])


@tracing.jit("batchnorm")
def _hessian_sum(model, batchnorm, images, labels, variables, direction):
    def gradient(params: PyTree) -> PyTree:
        def loss(params: PyTree) -> Array:
            return _sum(model, batchnorm, images, labels, {**variables, "params": params})

        return jax.grad(loss)(params)

    return jax.jvp(gradient, (variables["params"],), (direction,))[1]


@tracing.jit("batchnorm")
def _row_sums(model, batchnorm, images, labels, variables, directions, xs, y):
    first, second = directions

    def loss(x: Array) -> Array:
        with inside_control_flow():
            moved = jax.tree.map(
                lambda w, d, e: w + x * d + y * e, variables["params"], first, second
            )
            return _sum(model, batchnorm, images, labels, {**variables, "params": moved})

    return jax.lax.map(loss, xs)


# ---- vectors


def _pairs(tree: PyTree, other: PyTree) -> Iterable[tuple[Any, Any]]:
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other))


def _dot(tree: PyTree, other: PyTree) -> Array:
    return sum((jnp.sum(a * b) for a, b in _pairs(tree, other)), jnp.float32(0))


def _normalize(tree: PyTree) -> PyTree:
    norm = jnp.sqrt(_dot(tree, tree)) + 1e-12
    return jax.tree.map(lambda leaf: leaf / norm, tree)


def _differences(last: Array, *leaves: Array) -> np.ndarray:
    """f64 [checkpoints, size of the leaf]: each minus the last."""
    return np.stack([np.ravel(leaf).astype(np.float64) - np.ravel(last) for leaf in leaves])


def _restore(axes: Sequence[np.ndarray], number: int, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    parts = [axis[number].reshape(leaf.shape) for axis, leaf in zip(axes, leaves)]
    return jax.tree.unflatten(
        structure, [jnp.asarray(part, leaf.dtype) for part, leaf in zip(parts, leaves)]
    )


def _open_folder(
    folder: str | os.PathLike,
    loss: Loss,
    variables: Variables,
    directions: tuple[PyTree, PyTree],
    xs: Sequence[float],
    ys: Sequence[float],
) -> Path:
    """The folder, which holds rows of this plane alone. Raises `UserError`."""
    place = Path(folder)
    checksum = 0
    for leaf in jax.tree.leaves((variables, directions, loss.batches)):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
    mine = {
        "xs": [float(x) for x in xs],
        "ys": [float(y) for y in ys],
        "batchnorm": loss.batchnorm,
        "crc32": checksum,
    }
    about = place / "plane.json"
    if about.is_file():
        there = json.loads(about.read_text())
        if there != mine:
            differing = sorted(key for key in mine if mine[key] != there.get(key))
            raise UserError(
                f"{place} holds rows of another plane ({', '.join(differing)} differ); name another"
                " folder, or remove it"
            )
        return place
    place.mkdir(parents=True, exist_ok=True)
    files.write_json(about, mine)
    return place
