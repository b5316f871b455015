"""The training step, written as if there were one device.

It runs inside `parallel.parallelize`, which names the mapped axis. `take_step` is the training
step; the functions below it are its stages, in the order in which it calls them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import batchnorm_modes, losses, parallel, regularizers
from flax_cnns.train.hooks import Regularizer
from flax_cnns.train.metrics import Metric, check_own_metrics, sum_metrics
from flax_cnns.train.mirror import mirror_images
from flax_cnns.train.optimizers import Optimizer
from flax_cnns.train.schedules import Schedule
from flax_cnns.train.state import TrainState
from flax_cnns.types import Array, Batch, PyTree

Augment = Callable[[Array, Array], Array]  # images, a key per image -> images
Mix = Callable[[Array, Array, Array], tuple[Array, Array]]  # images, labels, key -> images, soft
Sums = dict[str, Array]

# ---------------------------------------------------------------------------- random streams


class Stream(enum.IntEnum):
    """Random streams: the key of a stream is the run's key folded with its constant and the step.

    So no generator state is stored. Never renumber the constants: every run would change.
    """

    AUGMENT = 0  # then folded with the image's position in the global batch
    MIX = 1  # equal on all devices: decisions about the batch
    SHARED = 2  # equal on all devices: decisions about a whole branch
    DROPOUT = 3  # then folded with the device's index: different on each device
    NOISE = 4  # equal on all devices: gradient noise


def stream_key(key: Array, constant: Stream, step: Array) -> Array:
    """Returns the key of a random stream in a step; `key` is the run's."""
    return jax.random.fold_in(jax.random.fold_in(key, int(constant)), step)


def image_keys(key: Array, step: Array, first: Array | int, n: int) -> Array:
    """Returns the keys [n] of the images at positions first .. first + n - 1 of a global batch."""
    index = first + jnp.arange(n)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream_key(key, Stream.AUGMENT, step), index)


# ---------------------------------------------------------------------------- examples


class Examples(NamedTuple):
    """A device's examples as the network takes them, and the network's random keys for the step."""

    images: Array  # f32 [n H W C]
    labels: Array  # f32 [n K], soft
    rngs: dict[str, Array]


def prepare_examples(
    batch: Batch,
    key: Array,
    step: Array,
    augment: Augment,
    mix: Mix,
    axis_name: str,
    active: Mapping[str, Regularizer] = {},
) -> Examples:
    """Augments and mixes a device's examples; the hooks of `active` regularizers act after that."""
    device, n = lax.axis_index(axis_name), batch["label"].shape[0]
    keys = image_keys(key, step, device * n, n)
    images = regularizers.augment(active, augment(mirror_images(batch), keys), keys)
    mix_key = stream_key(key, Stream.MIX, step)
    images, labels = mix(images, batch["label"], mix_key)
    images, labels = regularizers.mix(active, images, labels, mix_key)
    dropout = jax.random.fold_in(stream_key(key, Stream.DROPOUT, step), device)
    rngs = {"shared": stream_key(key, Stream.SHARED, step), "dropout": dropout}
    return Examples(images, labels, rngs)


def make_loader_augment(
    augment: Augment, seed_key: Callable[[], Array], *, first: int
) -> Callable[[Batch, int], Batch]:
    """Returns `augment_batch(batch, step)`, which augments on the CPU, in the loader's thread.

    `augment` gets the same images and keys as in `prepare_examples`. If training runs on a CPU, the
    results are equal bit for bit. `seed_key()` makes the run's key; this process's rows start at
    `first` in the global batch. Raises `UserError` if JAX has no CPU backend.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "data.augment.where='loader' needs JAX's CPU backend in addition to the accelerator: "
            "add it to JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu"
        ) from None
    with jax.default_device(cpu):
        key = seed_key()

    @jax.jit
    def augment_images(batch: Batch, key: Array, step: Array) -> Array:
        images = mirror_images(batch)
        return augment(images, image_keys(key, step, first, len(images)))

    def augment_batch(batch: Batch, step: int) -> Batch:
        given = {name: batch[name] for name in ("image", "mirror") if name in batch}
        given, at = jax.device_put((given, np.int32(step)), cpu)
        others = {name: value for name, value in batch.items() if name != "mirror"}
        return others | {"image": np.asarray(augment_images(given, key, at))}

    return augment_batch


# ---------------------------------------------------------------------------- the training step


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The parts of a training step that do not depend on the state and the batch.

    `augment(images, keys)` takes a key per image; `mix(images, labels, key)` returns soft labels
    [n K]. `loss(logits [N K], labels f32 [N K])` returns [N], also for auxiliary heads; None: the
    loss of the `task`, "classes" or "multilabel". `metrics` are the user's metrics by name, in
    addition to the task's (metrics.py). Each device's examples are split into `accumulate` pieces.
    """

    apply_fn: Callable
    optimizer: Optimizer
    augment: Augment
    mix: Mix
    loss: losses.Loss | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    task: str = "classes"
    aux_weights: Sequence[tuple[str, Schedule]] = ()
    ema_decay: float = 0.0
    ema_warmup: bool = True
    accumulate: int = 1
    axis_name: str = "batch"


def make_train_step(
    apply_fn: Callable, optimizer: Optimizer, **fields: Any
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Sums]]:
    """Returns `step(state, batch, key) -> (state, sums)`; `fields` are those of `StepConfig`.

    Raises `UserError` if the name of a metric is taken, or if a loss or a metric takes other
    arguments. Their results are checked while the step is traced.
    """
    config = StepConfig(apply_fn, optimizer, **fields)
    check_own_metrics(config.metrics, regularizers.list_penalties(optimizer.regularizers))
    config = dataclasses.replace(config, loss=losses.select_loss(config.loss, config.task))

    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Sums]:
        return take_step(config, state, batch, key)

    return train_step


def take_step(
    config: StepConfig, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Sums]:
    """Takes a training step; returns (the next state, sums over the global batch).

    batch: {"image" u8 or f32 [n H W C], "label" i32 [n] or f32 [n K]}, n examples per device. key:
    the run's key, equal in all steps.

    The sums are loss, correct, count and the user's metrics (metrics.py); "bad", "norm", "rate";
    and the value of each penalty by its name, such as "l2". "bad" is 1 if the gradient, the loss,
    the statistics or the new weights were not finite; then only `step` changes in the state. "loss"
    includes neither the penalties nor the auxiliary losses. "norm" is the norm of the full
    gradient, which includes both.

    If a regularizer perturbs the weights, as SAM does, the gradient of the update is taken at
    another point, for the same images and random keys. Statistics, sums, penalties and weight decay
    are still those of the weights themselves.

    Raises `UserError` while tracing if the examples cannot be split into `accumulate` equal pieces,
    or if the network, the loss or a user's hook returns another shape than expected.
    """
    optimizer = config.optimizer
    active = optimizer.regularizers
    examples = prepare_examples(
        batch, key, state.step, config.augment, config.mix, config.axis_name, active
    )
    weights, frozen = pytree.partition(state.params, optimizer.trainable)
    gradients = partial(compute_gradients, config, state, frozen, examples)

    grads, batch_stats, sums = gradients(weights)
    if regularizers.perturbs(active):
        uphill = lax.pmean(grads, config.axis_name)
        grads, _, _ = gradients(regularizers.perturb(active, weights, uphill))
    grads, moved, kept, sums = average_over_devices(config, grads, batch_stats, sums)
    grads, penalties = regularizers.add_penalties(active, weights, grads, state.step)
    norm = optax.global_norm(grads)
    weights, opt_state = optimizer.update(
        weights,
        grads,
        state.opt_state,
        step=state.step,
        key=stream_key(key, Stream.NOISE, state.step),
    )
    finite = is_finite(norm, sums["loss"], moved, weights)
    new = state.replace(
        ema=update_ema(config, state, weights, moved),
        params=pytree.merge(weights, frozen),
        batch_stats=pytree.merge(moved, kept),
        opt_state=opt_state,
    )
    new, sums = reject_non_finite(finite, new, state, sums | penalties, norm)
    sums["rate"] = optimizer.learning_rate(state.step, state.opt_state)
    return new.replace(step=state.step + 1), sums


def compute_loss(
    config: StepConfig,
    step: Array,
    frozen: PyTree,
    weights: PyTree,
    batch_stats: PyTree,
    examples: Examples,
) -> tuple[Array, tuple[PyTree, Sums]]:
    """Returns (mean loss with auxiliary losses, (statistics, sums)) of some examples."""
    variables = {"params": pytree.merge(weights, frozen), "batch_stats": batch_stats}
    with (
        regularizers.intercept(config.optimizer.regularizers),
        batchnorm_modes.intercept(config.optimizer.batchnorm_modes),
    ):
        logits, updates = config.apply_fn(
            variables,
            examples.images,
            train=True,
            mutable=["batch_stats", "aux_logits"],
            rngs=examples.rngs,
        )
    labels = examples.labels
    losses.check_logits(logits, *labels.shape)
    assert config.loss is not None  # `make_train_step` sets it
    each = config.loss(logits, labels)
    total = jnp.mean(each) + losses.aux_loss(
        updates.get("aux_logits", {}), labels, config.aux_weights, step, config.loss
    )
    sums = sum_metrics(each, logits, labels, labels, task=config.task, own_metrics=config.metrics)
    return total, (updates.get("batch_stats", batch_stats), sums)


def compute_gradients(
    config: StepConfig, state: TrainState, frozen: PyTree, examples: Examples, weights: PyTree
) -> tuple[PyTree, PyTree, Sums]:
    """Returns (gradients at `weights`, statistics, sums) of this device's examples."""

    def loss_of_piece(weights, batch_stats, images, labels, index):
        # Pieces differ only in the key of "dropout"; decisions about the whole batch are shared.
        dropout = jax.random.fold_in(examples.rngs["dropout"], index)
        piece = Examples(images, labels, examples.rngs | {"dropout": dropout})
        return compute_loss(config, state.step, frozen, weights, batch_stats, piece)

    gradient = jax.grad(loss_of_piece, has_aux=True)
    images, labels, _ = examples
    if config.accumulate == 1:
        grads, (batch_stats, sums) = gradient(weights, state.batch_stats, images, labels, 0)
        return grads, batch_stats, sums

    def accumulate_piece(carry: tuple, piece: tuple) -> tuple[tuple, Sums]:
        batch_stats, grads = carry
        piece_grads, (batch_stats, sums) = gradient(weights, batch_stats, *piece)
        return (batch_stats, jax.tree.map(jnp.add, grads, piece_grads)), sums

    # Unrolled for a CPU, where XLA's convolutions are many times slower inside a loop.
    n = config.accumulate
    (batch_stats, grads), sums = lax.scan(
        accumulate_piece,
        (state.batch_stats, jax.tree.map(jnp.zeros_like, weights)),
        (split_batch(images, n), split_batch(labels, n), jnp.arange(n)),
        unroll=n if parallel.find_platform() == "cpu" else 1,
    )
    grads = jax.tree.map(lambda g: g / n, grads)
    return grads, batch_stats, jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)


def split_batch(x: Array, pieces: int) -> Array:
    """[n ...] -> [pieces n/pieces ...]. Raises `UserError` if n is not divisible by `pieces`."""
    if x.shape[0] % pieces:
        raise UserError(
            f"train.accumulate: {x.shape[0]} examples per device cannot be split into {pieces}"
            " equal pieces"
        )
    return x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:])


def average_over_devices(
    config: StepConfig, grads: PyTree, batch_stats: PyTree, sums: Sums
) -> tuple[PyTree, PyTree, PyTree, Sums]:
    """Returns (averaged gradients, averaged moving statistics, fixed statistics, total sums)."""
    # With unsynchronized BatchNorm, this averages the variances that the devices normalized by.
    moved, kept = pytree.partition(batch_stats, find_moving_statistics(config, batch_stats))
    grads, moved = lax.pmean((grads, moved), config.axis_name)
    return grads, moved, kept, lax.psum(sums, config.axis_name)


def find_moving_statistics(config: StepConfig, batch_stats: PyTree) -> PyTree:
    """Returns a bool for each leaf of `batch_stats`: whether training updates it."""
    return batchnorm_modes.has_mode(batch_stats, config.optimizer.batchnorm_modes, "train")


def is_finite(norm: Array, loss: Array, batch_stats: PyTree, weights: PyTree) -> Array:
    """Whether all results of a step are finite: bool []."""
    # The loss is not enough: on a CPU, a NaN image gave a finite loss. The new weights are checked
    # too, because with a huge learning rate they overflow although the gradients are finite. There
    # is one sum of squares, because a flag for each leaf makes XLA's CPU compiler very slow.
    return jnp.isfinite(norm + loss + optax.global_norm((batch_stats, weights)))


def update_ema(
    config: StepConfig, state: TrainState, weights: PyTree, batch_stats: PyTree
) -> PyTree | None:
    """Returns the moving average updated by a step's weights and moving statistics; None if off."""
    if state.ema is None:
        return None
    decay = jnp.float32(config.ema_decay)
    if config.ema_warmup:
        decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))

    def blend(old: PyTree, new: PyTree, moves: PyTree) -> PyTree:
        # Frozen leaves are left out, so that they stay bit-identical.
        old, still = pytree.partition(old, moves)
        new = jax.tree.map(lambda o, n: decay * o + (1.0 - decay) * n, old, new)
        return pytree.merge(new, still)

    old = state.ema
    return {
        "params": blend(old["params"], weights, config.optimizer.trainable),
        "batch_stats": blend(
            old["batch_stats"], batch_stats, find_moving_statistics(config, state.batch_stats)
        ),
    }


def reject_non_finite(
    finite: Array, new: TrainState, old: TrainState, sums: Sums, norm: Array
) -> tuple[TrainState, Sums]:
    """Returns (new state, sums) if `finite`, else (old state, zeros); adds "bad" and "norm"."""
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    sums = {name: jnp.where(finite, value, 0.0) for name, value in sums.items()}
    sums["bad"] = jnp.where(finite, 0.0, 1.0)
    sums["norm"] = jnp.where(finite, norm, 0.0)
    return new, sums
