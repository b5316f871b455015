"""Statistics of a network's activations, gradient norms by layer, and LSUV initialization.

for layer in measure_activations(model, variables, images):
    print(layer.path, layer.mean, layer.std, layer.dead)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


class LayerActivations(NamedTuple):
    """The outputs of one module over all images and positions."""

    path: str
    values: int  # number of values
    mean: float
    std: float
    dead: float  # fraction of channels that are never above 0; after a ReLU, they are always 0
    counts: np.ndarray  # i64 [bins]
    edges: np.ndarray  # f64 [bins + 1]


def measure_activations(
    model: nn.Module,
    variables: Variables,
    batches: Array | Iterable[Array],
    paths: Sequence[str] | None = None,
    *,
    bins: int = 50,
) -> list[LayerActivations]:
    """Returns statistics of the outputs of `paths` in evaluation.

    `batches` are images [N H W C], or several batches of them. By default, `paths` are all modules
    with parameters of their own, in the order in which they run. The histogram covers four standard
    deviations of the first batch on both sides of its mean; values beyond count in the outer bins.
    Raises `UserError` for an unknown path, if there are no images, and if an output is not finite.
    """
    model, variables = tap.unroll(model, variables)
    totals: dict[str, _Totals] = {}
    several: Iterable[Array] = batches
    if isinstance(batches, jax.Array | np.ndarray):
        several = [jnp.asarray(batches)]
    for images in several:
        if paths is None:
            paths = find_layers(model, variables, images)
        for path, output in tap.features(model, variables, images, paths).items():
            if not np.isfinite(values := np.asarray(output, np.float64)).all():
                raise UserError(f"the output of {path!r} is not finite")
            totals.setdefault(path, _Totals(bins)).add(values)
    if paths is None or not totals:
        raise UserError("no images: activations are measured over at least one batch")
    return [totals[path].finish(path) for path in paths]


def find_layers(model: nn.Module, variables: Variables, images: Array) -> list[str]:
    """Returns the paths of modules with parameters of their own, in the order in which they run."""
    owners = {path.rpartition("/")[0] for path in pytree.flatten(variables["params"])}
    outputs = tap.list_outputs(model, variables, images)
    return [path for path in outputs if path.partition("[")[0] in owners]


def measure_gradients(
    model: nn.Module, variables: Variables, images: Array, labels: Array
) -> dict[str, float]:
    """Returns {layer: Euclidean norm of the gradient of the cross-entropy} in evaluation.

    `labels`: i32 [N]. A layer is a module with parameters of its own, in the order in which they
    run.
    """
    model, variables = tap.unroll(model, variables)
    grads = pytree.flatten(_gradients(model, variables, images, labels))
    squares: dict[str, float] = {}
    for path, leaf in grads.items():
        layer = path.rpartition("/")[0]
        squares[layer] = squares.get(layer, 0.0) + float(jnp.vdot(leaf, leaf))
    order = tap.list_calls(model, variables, images)
    return {layer: squares[layer] ** 0.5 for layer in order if layer in squares}


def lsuv(
    model: nn.Module,
    variables: Variables,
    images: Array,
    *,
    key: Array,
    tolerance: float = 0.1,
    most: int = 10,
) -> dict[str, PyTree]:
    """Returns new variables by layer-sequential unit variance, with named blocks.

    Mishkin & Matas 2016, arXiv 1511.06422, algorithm 1. First, each kernel of a convolution or
    dense layer becomes orthonormal, and each bias zero. Then, in the order in which the layers run,
    each kernel is divided by the standard deviation of its layer's output over `images`, until the
    variance is within `tolerance` of 1, at most `most` times. Norms use the running statistics of
    `variables`. Raises `UserError` if a layer's output is constant.
    """
    model, variables = tap.unroll(model, variables)
    flat = dict(pytree.flatten(variables))
    layers = [
        path
        for path in dict.fromkeys(
            name.partition("[")[0] for name in find_layers(model, variables, images)
        )
        if f"params/{path}/kernel" in flat
    ]
    orthogonal = jax.nn.initializers.orthogonal()
    for number, path in enumerate(layers):
        kernel = flat[f"params/{path}/kernel"]
        drawn = orthogonal(jax.random.fold_in(key, number), kernel.shape, kernel.dtype)
        flat[f"params/{path}/kernel"] = drawn
        if f"params/{path}/bias" in flat:
            flat[f"params/{path}/bias"] = jnp.zeros_like(flat[f"params/{path}/bias"])
    outputs = tap.list_outputs(model, variables, images)
    for path in layers:
        call = path if path in outputs else f"{path}[0]"
        for _ in range(most):
            variance = float(_variances(model, pytree.unflatten(flat), images)[call])
            if not variance > 0 or not np.isfinite(variance):
                raise UserError(
                    f"lsuv: the output of {path!r} has the variance {variance} over"
                    f" {len(images)} images; give other images, or more"
                )
            if abs(variance - 1) < tolerance:
                break
            flat[f"params/{path}/kernel"] = flat[f"params/{path}/kernel"] / variance**0.5
    return pytree.unflatten(flat)


class _Totals:
    """Sums over batches."""

    def __init__(self, bins: int):
        self.bins, self.count, self.sum, self.squares = bins, 0, 0.0, 0.0
        self.highest: np.ndarray | None = None  # [C]
        self.edges, self.counts = np.zeros(0), np.zeros(bins, np.int64)

    def add(self, output: np.ndarray) -> None:
        if self.highest is None:
            low, high = output.mean() - 4 * output.std(), output.mean() + 4 * output.std()
            self.edges = np.linspace(low, max(high, low + 1e-12), self.bins + 1)
        clipped = np.clip(output, self.edges[0], self.edges[-1])
        self.counts += np.histogram(clipped, self.edges)[0]
        self.count += output.size
        self.sum += output.sum()
        self.squares += (output**2).sum()
        highest = output.reshape(-1, output.shape[-1]).max(0)
        self.highest = highest if self.highest is None else np.maximum(self.highest, highest)

    def finish(self, path: str) -> LayerActivations:
        assert self.highest is not None
        mean = self.sum / self.count
        std = max(self.squares / self.count - mean**2, 0.0) ** 0.5
        dead = float((self.highest <= 0).mean())
        return LayerActivations(path, self.count, mean, std, dead, self.counts, self.edges)


@tracing.jit()
def _variances(model: nn.Module, variables: Variables, images: Array) -> dict[str, Array]:
    """{path: variance of that module's output}: one program for all layers."""
    outputs = tap.capture(model, variables, images)
    return {path: jnp.var(output.astype(jnp.float32)) for path, output in outputs.items()}


@tracing.jit()
def _gradients(model: nn.Module, variables: Variables, images: Array, labels: Array) -> PyTree:
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: PyTree) -> Array:
        logits: Any = model.apply({"params": params, **rest}, images, train=False)
        picked = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1)
        return -picked.mean()

    return jax.grad(loss)(variables["params"])
