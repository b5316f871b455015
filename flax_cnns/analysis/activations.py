"""Statistics of a network's activations, gradient norms by layer, and LSUV initialization.

    for layer in measure_activations(model, variables, images, batchnorm="batch"):
        print(layer.path, layer.mean, layer.std, layer.dead)

`batchnorm` says which statistics BatchNorm uses, while all else is in evaluation: "running" (those
of the variables) or "batch" (those of the batch). At initialization, take "batch": the running
statistics are 0 and 1 there, so that a BatchNorm would do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.analysis.batchnorm import BatchNormMode, use_statistics
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain import relus
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


class LayerActivations(NamedTuple):
    """The outputs of one module over all images and positions."""

    path: str
    values: int  # number of values
    mean: float
    std: float
    # Fraction of channels whose ReLU gives 0 for all images and positions. None unless the output
    # goes into ReLUs alone, or comes from one.
    dead: float | None
    counts: np.ndarray  # i64 [bins]
    edges: np.ndarray  # f64 [bins + 1]


def measure_activations(
    model: nn.Module,
    variables: Variables,
    batches: Array | Iterable[Array],
    paths: Sequence[str] | None = None,
    *,
    batchnorm: BatchNormMode = "running",
    bins: int = 50,
) -> list[LayerActivations]:
    """Returns statistics of the outputs of `paths`.

    `batches` are images [N H W C], or several batches of them. By default, `paths` are all modules
    with parameters of their own, in the order in which they run. Functions such as `nn.relu` are
    not modules: the output of a convolution or norm is the value before the activation. The
    histogram covers four standard deviations of the first batch on both sides of its mean; values
    outside count in the outer bins. Raises `UserError` for an unknown path, if there are no images,
    and if an output is not finite.
    """
    model, variables = tap.unroll(model, variables)
    several: Iterable[Array] = batches
    if isinstance(batches, jax.Array | np.ndarray):
        several = [jnp.asarray(batches)]
    totals: dict[str, _Totals] = {}
    for images in several:
        if paths is None:
            paths = find_layers(model, variables, images)
        measure = partial(
            _measure_batch, model, variables, images, paths=tuple(paths), batchnorm=batchnorm
        )
        if not totals:
            shapes = tap.list_outputs(model, variables, images)
            for path in paths:
                tap.check_path(path, shapes)
            before_relu = find_relus(model, variables, images)
            blank = jnp.zeros((len(paths), 2))
            for path, batch in measure(blank, bins=bins).items():
                totals[path] = _Totals(batch, bins, path in before_relu)
            ranges = jnp.asarray([totals[path].range for path in paths], jnp.float32)
        for path, batch in measure(ranges, bins=bins).items():
            if not np.isfinite(batch.means).all() or not np.isfinite(batch.squares).all():
                raise UserError(f"the output of {path!r} is not finite")
            totals[path].add(batch)
    if paths is None or not totals:
        raise UserError("no images: activations are measured over at least one batch")
    return [totals[path].finish(path) for path in paths]


def find_layers(model: nn.Module, variables: Variables, images: Array) -> list[str]:
    """Returns the paths of modules with parameters of their own, in the order in which they run."""
    owners = {path.rpartition("/")[0] for path in pytree.flatten(variables["params"])}
    outputs = tap.list_outputs(model, variables, images)
    return [path for path in outputs if path.partition("[")[0] in owners]


@tracing.once_per_shape
def find_relus(model: nn.Module, variables: Variables, images: Any) -> frozenset[str]:
    """Returns the paths of modules whose output goes into ReLUs alone, or comes from one.

    Such a channel is dead if its output is never above 0. A ReLU is a call of `nn.relu` or
    `nn.relu6`, or max(x, 0). Only shapes are computed.
    """
    model, variables = tap.unroll(model, variables)
    capture = partial(tap.capture, model)
    program, shapes = jax.make_jaxpr(capture, return_shape=True)(variables, images)
    found = relus.Program(program)
    users: dict[Any, list[bool]] = {}
    made: set[Any] = set()
    for eqn in program.jaxpr.eqns:
        activation = found.find_activation(eqn)
        is_relu = _is_relu(eqn) or (activation is not None and activation.name == "relu")
        for var in eqn.invars:
            if isinstance(var, core.Var):
                users.setdefault(var, []).append(is_relu)
        if is_relu:
            made.update(eqn.outvars)
    outputs = zip(sorted(shapes), program.jaxpr.outvars)  # as JAX sorts the keys of a dict
    return frozenset(
        path for path, var in outputs if var in made or (var in users and all(users[var]))
    )


def _is_relu(eqn: core.JaxprEqn) -> bool:
    """Whether the equation calls a ReLU, directly or inside a `jax.custom_jvp`."""
    if eqn.primitive.name == "custom_jvp_call":
        inner = eqn.params["call_jaxpr"].jaxpr.eqns
        return len(inner) == 1 and _is_relu(inner[0])
    return eqn.params.get("name") in ("relu", "relu6")


def measure_gradients(
    model: nn.Module,
    variables: Variables,
    images: Array,
    labels: Array,
    *,
    batchnorm: BatchNormMode = "running",
    loss: Callable[[Array, Array], Array] | None = None,
) -> dict[str, float]:
    """Returns {layer: Euclidean norm of the gradient of the mean loss by its parameters}.

    `labels`: classes i32 [N], or f32 [N K] in 0..1. `loss(logits f32 [N K], labels)` returns [N];
    None: the cross-entropy of classes, or the sum of the binary cross-entropies of f32 labels.
    Layers are the modules with parameters of their own, in the order in which they run.
    """
    model, variables = tap.unroll(model, variables)
    grads = pytree.flatten(
        _gradients(model, variables, images, labels, batchnorm=batchnorm, loss=loss)
    )
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
    layers: Collection[str] | None = None,
    batchnorm: BatchNormMode = "batch",
    tolerance: float = 0.1,
    most: int = 10,
) -> dict[str, PyTree]:
    """Returns new variables by layer-sequential unit variance, with named blocks.

    Mishkin & Matas 2016, arXiv 1511.06422, algorithm 1. First, each kernel of a convolution or
    dense layer becomes orthonormal, and each bias zero. Then, in the order in which the layers run,
    each kernel is divided by the standard deviation of its layer's output over `images`, until the
    variance is within `tolerance` of 1, at most `most` times. If `layers` is given, other layers
    keep their values. Equal keys give equal values. Raises `UserError` if a layer's output is
    constant.
    """
    model, variables = tap.unroll(model, variables)
    flat = dict(pytree.flatten(variables["params"]))
    order = [
        path
        for path in dict.fromkeys(
            name.partition("[")[0] for name in find_layers(model, variables, images)
        )
        if f"{path}/kernel" in flat
    ]
    chosen = [path for path in order if layers is None or path in layers]
    orthogonal = jax.nn.initializers.orthogonal()
    for number, path in enumerate(order):
        if path not in chosen:
            continue
        kernel = flat[f"{path}/kernel"]
        drawn = orthogonal(jax.random.fold_in(key, number), kernel.shape, kernel.dtype)
        flat[f"{path}/kernel"] = drawn
        if f"{path}/bias" in flat:
            flat[f"{path}/bias"] = jnp.zeros_like(flat[f"{path}/bias"])
    outputs = tap.list_outputs(model, variables, images)
    variances = partial(_variances, model, batchnorm=batchnorm)

    def with_params() -> dict[str, PyTree]:
        return {**variables, "params": pytree.unflatten(flat)}

    for path in chosen:
        call = path if path in outputs else f"{path}[0]"
        for _ in range(most):
            variance = float(variances(with_params(), images)[call])
            if not variance > 0 or not np.isfinite(variance):
                raise UserError(
                    f"lsuv: the output of {path!r} has the variance {variance} over"
                    f" {len(images)} images; give other images, or more"
                )
            if abs(variance - 1) < tolerance:
                break
            flat[f"{path}/kernel"] = flat[f"{path}/kernel"] / variance**0.5
    return with_params()


class _Batch(NamedTuple):
    """One module's outputs for one batch: f32 [C], i32 [bins]. C is 1 for an output [N]."""

    means: Array
    squares: Array  # means of the squared distances from `means`
    highest: Array
    counts: Array
    values: int


class _Totals:
    """Sums over batches."""

    def __init__(self, first: _Batch, bins: int, before_relu: bool):
        mean, std = _mean_and_std(first)
        self.range = mean - 4 * std, max(mean + 4 * std, mean - 4 * std + 1e-12)
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.highest = np.full(np.shape(first.highest), -np.inf)
        self.counts, self.before_relu = np.zeros(bins, np.int64), before_relu

    def add(self, batch: _Batch) -> None:
        values = int(batch.values)
        mean, std = _mean_and_std(batch)
        self.count += values
        self.sum += values * mean
        self.squares += values * (std**2 + mean**2)
        self.highest = np.maximum(self.highest, batch.highest)
        self.counts += np.asarray(batch.counts, np.int64)

    def finish(self, path: str) -> LayerActivations:
        mean = self.sum / self.count
        std = max(self.squares / self.count - mean**2, 0.0) ** 0.5
        dead = float((self.highest <= 0).mean()) if self.before_relu else None
        edges = np.linspace(*self.range, len(self.counts) + 1)
        return LayerActivations(path, self.count, mean, std, dead, self.counts, edges)


def _mean_and_std(batch: _Batch) -> tuple[float, float]:
    """Returns the mean and std of all values, in float64, from those of the channels."""
    means = np.asarray(batch.means, np.float64)
    variance = np.asarray(batch.squares, np.float64).mean() + means.var()
    return float(means.mean()), float(variance**0.5)


@tracing.jit("paths", "batchnorm", "bins")
def _measure_batch(
    model: nn.Module,
    variables: Variables,
    images: Array,
    ranges: Array,
    *,
    paths: tuple[str, ...],
    batchnorm: BatchNormMode,
    bins: int,
) -> dict[str, _Batch]:
    """Returns {path: sums of that module's outputs}. `ranges` f32 [paths 2]: of the histograms."""
    with use_statistics(batchnorm):
        wanted = {path.partition("[")[0] for path in paths}
        captured = tap.capture(model, variables, images, wanted)
    found = {}
    for path, (low, high) in zip(paths, ranges):
        output = captured[path].astype(jnp.float32)
        rows = output.reshape(-1, output.shape[-1] if output.ndim > 1 else 1)
        means = rows.mean(0)
        squares = ((rows - means) ** 2).mean(0)
        place = jnp.floor((rows - low) * (bins / jnp.maximum(high - low, 1e-30)))
        place = jnp.clip(jnp.nan_to_num(place), 0, bins - 1).astype(jnp.int32)
        counts = jnp.zeros(bins, jnp.int32).at[place.ravel()].add(1)
        found[path] = _Batch(means, squares, rows.max(0), counts, output.size)
    return found


@tracing.jit("batchnorm")
def _variances(
    model: nn.Module, variables: Variables, images: Array, *, batchnorm: BatchNormMode
) -> dict[str, Array]:
    """{path: variance of that module's output}: one program for all layers."""
    with use_statistics(batchnorm):
        outputs = tap.capture(model, variables, images)
    return {path: jnp.var(output.astype(jnp.float32)) for path, output in outputs.items()}


@tracing.jit("batchnorm", "loss")
def _gradients(
    model: nn.Module,
    variables: Variables,
    images: Array,
    labels: Array,
    *,
    batchnorm: BatchNormMode,
    loss: Callable[[Array, Array], Array] | None,
) -> PyTree:
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def mean_loss(params: PyTree) -> Array:
        with use_statistics(batchnorm):
            given = {"params": params, **rest}
            logits: Any = model.apply(given, images, train=False, mutable=["batch_stats"])[0]
        logits = jnp.asarray(logits, jnp.float32)
        if loss is not None:
            return loss(logits, labels).mean()
        if labels.ndim == 2:
            both = labels * nn.log_sigmoid(logits) + (1 - labels) * nn.log_sigmoid(-logits)
            return -both.sum(1).mean()
        return -jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1).mean()

    return jax.grad(mean_loss)(variables["params"])
