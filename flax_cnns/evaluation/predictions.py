"""Predictions of every image of a split, in the split's order, on any number of devices.

    predictions = predict_batches(model, variables, batches, normalize=normalize)
    predictions.probabilities  # f32 [N K]

Accuracy needs sums only (`evaluation.exact`). Ensembles, calibration and the comparison of two
networks on the same images need the predictions themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy.special import expit, log_expit, log_softmax, softmax

from flax_cnns.errors import Interrupted, UserError
from flax_cnns.train import losses, metrics, parallel
from flax_cnns.types import Array, Batch, PyTree

# (images [N H W C] as the loader gives them, numbers of the images in the split i32 [N]) -> images
Transform = Callable[[Array, Array], Array]
# (variables, {"image" [N H W C], "number" i32 [N]}) -> logits f32 [N K]
PredictStep = Callable[[PyTree, Batch], Array]


class Predictions(NamedTuple):
    """A network's predictions for N images, in the order of the split."""

    # f32 [N K]. Where probabilities were averaged, their logarithms: the softmax of these logits is
    # the average.
    logits: np.ndarray
    labels: np.ndarray  # i32 [N], or f32 [N K] if labels are soft or multilabel
    task: str = "classes"  # or "multilabel"

    @property
    def probabilities(self) -> np.ndarray:
        """f32 [N K]: the softmax; for the task "multilabel", the sigmoid."""
        squash = expit if self.task == "multilabel" else softmax
        return squash(self.logits, **({} if self.task == "multilabel" else {"axis": -1}))

    @property
    def classes(self) -> np.ndarray:
        """i64 [N]: the true classes; of soft labels, the largest entry. Raises UserError for
        multilabel data."""
        if self.task != "classes":
            raise UserError(f"{self.task} data have no single true class per image")
        return np.argmax(self.labels, -1) if self.labels.ndim > 1 else self.labels.astype(np.int64)

    def is_correct(self, k: int = 1) -> np.ndarray:
        """Returns bool [N]: whether the true class is among the `k` highest logits. Ties go to the
        lower class, as in `train.metrics`. Raises UserError for multilabel data."""
        # Counting the logits ahead of the true one is 25 times as fast as sorting 1000 of them.
        true = self.classes[:, None]
        value = np.take_along_axis(self.logits, true, 1)
        ahead = (self.logits > value).sum(-1)
        ahead += ((self.logits == value) & (np.arange(self.logits.shape[-1]) < true)).sum(-1)
        return (ahead < k) & ~np.isnan(value[:, 0])


def average(predictions: Iterable[Predictions], *, of: str = "probabilities") -> Predictions:
    """Averages the predictions of several networks, or of several crops, for the same images.

    `of`: "probabilities", whose average is returned as logarithms, or "logits". Raises UserError if
    the images' labels or the numbers of classes differ.
    """
    running = RunningAverage(of)
    for each in predictions:
        running.add(each)
    return running.result()


class RunningAverage:
    """`average` of predictions that come one after the other; holds one or two arrays f64 [N K]."""

    def __init__(self, of: str = "probabilities"):
        if of not in ("probabilities", "logits"):
            raise UserError(f"average of: expected probabilities or logits, got {of!r}")
        self.count = 0
        self._of = of
        self._first: Predictions | None = None
        self._totals: list[np.ndarray] = []

    def add(self, predictions: Predictions) -> None:
        """Adds a member. Raises UserError if its labels or the number of its classes differ."""
        first = self._first = predictions if self._first is None else self._first
        if predictions.logits.shape != first.logits.shape or predictions.task != first.task:
            raise UserError(
                f"predictions of {_describe(first)} cannot be averaged with"
                f" {_describe(predictions)}"
            )
        if not np.array_equal(predictions.labels, first.labels):
            raise UserError("predictions can be averaged only for the same images: labels differ")
        logits = predictions.logits.astype(np.float64)
        if self._of == "logits":
            terms = [logits]
        elif first.task == "multilabel":
            terms = [log_expit(logits), log_expit(-logits)]
        else:
            terms = [log_softmax(logits, axis=-1)]
        add = np.add if self._of == "logits" else np.logaddexp
        self._totals = [add(*pair) for pair in zip(self._totals, terms)] if self.count else terms
        self.count += 1

    def result(self) -> Predictions:
        """Returns the average of the members so far. Raises UserError if there are none."""
        if self._first is None:
            raise UserError("an average needs predictions of at least one network")
        if self._of == "logits":
            logits = self._totals[0] / self.count
        elif self._first.task == "multilabel":
            logits = self._totals[0] - self._totals[1]
        else:
            logits = self._totals[0] - np.log(self.count)
        return self._first._replace(logits=logits.astype(np.float32))


def _describe(predictions: Predictions) -> str:
    return " images x ".join(map(str, predictions.logits.shape)) + f" {predictions.task}"


def predict_batches(
    model: nn.Module,
    variables: PyTree,
    batches: Iterable[Batch],
    *,
    normalize: Callable[[Array], Array] = lambda images: images,
    transform: Transform | None = None,
    apply: Callable[..., Any] | None = None,
    step: PredictStep | None = None,
    crops_per_step: int = 1,
    mesh: Mesh | None = None,
    task: str = "classes",
    should_stop: Callable[[], bool] = lambda: False,
) -> Predictions:
    """Returns the predictions for all images with mask 1, in order.

    `batches` are {"image" [n H W C] or [n V H W C], "label" [n] or [n K], "mask" f32 [n]}, this
    process's rows of each global batch, all of the same shape; without "mask" every row counts. The
    probabilities of V crops of an image are averaged. The network sees
    `normalize(transform(images, numbers))`. `apply`: what is called, by default `model.apply`; see
    `evaluation.dense`. `step`: what `make_predict_step` returned for the same mesh, so that several
    calls compile it once; `normalize`, `transform` and `apply` are not used then. `crops_per_step`:
    at most how many crops of each image are computed at once. `mesh`: the devices, by default all;
    a batch of several devices is divided among them, so n must be a multiple of their number.

    Raises UserError if there is no image, and `Interrupted` if `should_stop()` returns True between
    two batches.
    """
    mesh = parallel.make_mesh() if mesh is None else mesh
    if step is None:
        apply = model.apply if apply is None else apply
        step = make_predict_step(apply, normalize=normalize, transform=transform, mesh=mesh)
    variables = parallel.replicate(variables, mesh)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    pending: tuple[Array, np.ndarray, np.ndarray] | None = None
    first = 0
    for batch in batches:
        if should_stop():
            raise Interrupted
        local = len(batch["label"])
        numbers = first + jax.process_index() * local + np.arange(local, dtype=np.int32)
        first += local * jax.process_count()
        mask = np.asarray(batch.get("mask", np.ones(local, np.float32)))
        given = {"image": batch["image"], "number": numbers}
        scores = _predict_crops(step, variables, given, mesh, task, crops_per_step)
        if pending is not None:
            rows.append(_fetch(pending, mesh))
        pending = scores, np.asarray(batch["label"]), mask
    if pending is not None:
        rows.append(_fetch(pending, mesh))
    if not rows or not sum(len(labels) for _, labels in rows):
        raise UserError("no images: predictions need at least one")
    logits, labels = zip(*rows)
    return Predictions(np.concatenate(logits), np.concatenate(labels), task)


def measure(
    predictions: Predictions,
    *,
    loss: losses.Loss | None = None,
    own_metrics: Mapping[str, metrics.Metric] = {},
    chunk: int = 1024,
) -> dict[str, float]:
    """Returns the metrics of predictions by name, as `evaluation.exact.summarize` does.

    `loss`: the cross-entropy by default. `chunk`: the images at once.
    """
    loss = losses.select_loss(loss, predictions.task)
    logits, labels, task = predictions
    total: dict[str, Any] = {}
    for first in range(0, len(logits), chunk):
        part = slice(first, first + chunk)
        some, some_labels = jnp.asarray(logits[part]), jnp.asarray(labels[part])
        soft = losses.soft_labels(some_labels, logits.shape[-1])
        sums = metrics.sum_metrics(
            loss(some, soft), some, some_labels, soft, task=task, own_metrics=own_metrics
        )
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return metrics.compute(total)


def make_predict_step(
    apply: Callable[..., Any],
    *,
    normalize: Callable[[Array], Array],
    transform: Transform | None,
    mesh: Mesh,
) -> PredictStep:
    """Returns `step(variables, {"image" [N H W C], "number" i32 [N]}) -> logits f32 [N K]`, which
    divides the images among the devices of the mesh."""
    axis = mesh.axis_names[0]

    def step(variables: PyTree, batch: Batch) -> Array:
        images = batch["image"]
        if transform is not None:
            images = transform(images, batch["number"])
        logits = apply(variables, normalize(images), train=False)
        return jnp.asarray(logits, jnp.float32)

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(axis), check_vma=False
    )
    return jax.jit(mapped)


def _predict_crops(
    step: Callable[[PyTree, Batch], Array],
    variables: PyTree,
    batch: dict[str, Any],
    mesh: Mesh,
    task: str,
    crops_per_step: int,
) -> Array:
    """Logits of a batch; of several crops [n V H W C], those of their mean probability.

    Some crops of all images are one call of the compiled step. At most two calls have their images
    on the devices at once.
    """
    images, numbers = batch["image"], batch["number"]
    if images.ndim == 4:
        return step(variables, parallel.shard_batch(batch, mesh))
    count = images.shape[1]
    several = max(part for part in range(1, crops_per_step + 1) if count % part == 0)
    # Logarithms throughout: a probability that is 0 in float32 would make the loss NaN.
    total = None
    for first in range(0, count, several):
        crops = images[:, first : first + several].reshape(-1, *images.shape[2:])
        rows = {"image": np.ascontiguousarray(crops), "number": np.repeat(numbers, several)}
        on_devices = parallel.shard_batch(rows, mesh)
        jax.block_until_ready(total)
        logits = step(variables, on_devices)
        logits = logits.reshape(-1, several, logits.shape[-1])
        if task == "multilabel":  # [2 n K]: of "yes" and of "no"
            logs = jnp.stack([jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)])
        else:
            logs = jax.nn.log_softmax(logits)
        some = jax.nn.logsumexp(logs, axis=-2)
        total = some if total is None else jnp.logaddexp(total, some)
    assert total is not None
    return total[0] - total[1] if task == "multilabel" else total - math.log(count)


def _fetch(rows: tuple[Array, np.ndarray, np.ndarray], mesh: Mesh) -> tuple[Any, Any]:
    """The logits and labels of the global batch on the host, without masked rows."""
    logits, labels, mask = rows
    if jax.process_count() == 1:
        seen = mask > 0
        return np.asarray(logits)[seen], labels[seen]
    gathered = parallel.shard_batch({"label": labels, "mask": mask}, mesh)
    everything = multihost_utils.process_allgather((logits, gathered), tiled=True)
    seen = everything[1]["mask"] > 0
    return everything[0][seen], everything[1]["label"][seen]
