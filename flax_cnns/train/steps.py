"""The training and the evaluation step, written as if there were one device.

Both run inside `parallel.parallelize`, which names the mapped axis. `take_step` reads as a training
step does on paper; what it calls, in that order, are its stages.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import batchnorm_modes, losses, regularizers
from flax_cnns.train.hooks import Regularizer
from flax_cnns.train.metrics import Metric, check_own_metrics, sum_metrics
from flax_cnns.train.optimizers import Optimizer
from flax_cnns.train.schedules import Schedule
from flax_cnns.train.state import TrainState
from flax_cnns.types import Array, Batch, PyTree

Augment = Callable[[Array, Array], Array]  # images, a key an image -> images
Mix = Callable[[Array, Array, Array], tuple[Array, Array]]  # images, labels, key -> images, soft
Sums = dict[str, Array]

# ---------------------------------------------------------------------------- random streams


class Stream(enum.IntEnum):
    """Constants of the random streams: each stream is `fold_in` of the run's key with its constant
    and the step, so nothing is stored. Never renumber them: every run would differ."""

    AUGMENT = 0  # then with the image's place in the global batch, so that device counts agree
    MIX = 1  # the same on every device, for what concerns the batch
    SHARED = 2  # the same on every device, for what concerns a whole branch
    DROPOUT = 3  # then with the device: different on each
    NOISE = 4  # the same on every device, for what concerns the gradient


def stream_key(key: Array, constant: Stream, step: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, int(constant)), step)


def image_keys(key: Array, step: Array, first: Array, n: int) -> Array:
    """[n] keys, of the places from `first` on in the global batch of a step."""
    places = first + jnp.arange(n)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream_key(key, Stream.AUGMENT, step), places)


# ---------------------------------------------------------------------------- examples


class Examples(NamedTuple):
    """A device's examples as the network takes them, and the network's keys of the step."""

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
    """A device's examples in a step, augmented and mixed; behind that by the regularizers."""
    device, n = lax.axis_index(axis_name), batch["label"].shape[0]
    keys = image_keys(key, step, device * n, n)
    images = regularizers.augment(active, augment(batch["image"], keys), keys)
    mix_key = stream_key(key, Stream.MIX, step)
    images, labels = mix(images, batch["label"], mix_key)
    images, labels = regularizers.mix(active, images, labels, mix_key)
    dropout = jax.random.fold_in(stream_key(key, Stream.DROPOUT, step), device)
    rngs = {"shared": stream_key(key, Stream.SHARED, step), "dropout": dropout}
    return Examples(images, labels, rngs)


def make_loader_augment(
    augment: Augment, seed_key: Callable[[], Array], *, first: int
) -> Callable[[Batch, int], Batch]:
    """`augmented(batch, step)`: what `prepare_examples` does to the images of that step, but on the
    CPU, for the loader's thread. For a training step on a CPU the images are equal to the bit.

    `seed_key()` makes the run's key; this process's rows start at `first` in the global batch.
    Raises `UserError` where JAX has no CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "data.augment.where='loader' needs JAX's CPU beside the accelerator: add it to "
            "JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu"
        ) from None
    with jax.default_device(cpu):
        key = seed_key()

    @jax.jit
    def of_images(images: Array, key: Array, step: Array) -> Array:
        return augment(images, image_keys(key, step, first, len(images)))

    def augmented(batch: Batch, step: int) -> Batch:
        images, at = jax.device_put((batch["image"], np.int32(step)), cpu)
        return batch | {"image": np.asarray(of_images(images, key, at))}

    return augmented


# ---------------------------------------------------------------------------- the training step


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a training step does, whatever the state and the batch.

    `augment(images, keys)` takes a key an image; `mix(images, labels, key)` gives soft labels
    [n K]. `accumulate` cuts each device's examples into that many pieces, one after another.
    `loss(logits [N K], labels f32 [N K])` gives [N], of the heads too; None: that of the `task`,
    "classes" or "multilabel". `metrics` are those besides the task's (metrics.py), by name.
    """

    apply_fn: Callable
    optimizer: Optimizer
    augment: Augment
    mix: Mix
    loss: losses.Loss | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    task: str = "classes"
    aux_weights: list[tuple[str, Schedule]] = ()
    ema_decay: float = 0.0
    ema_warmup: bool = True
    accumulate: int = 1
    axis_name: str = "batch"


def make_train_step(
    apply_fn: Callable, optimizer: Optimizer, **fields: Any
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Sums]]:
    """`step(state, batch, key) -> (state, sums)`: `take_step` with these fields of `StepConfig`.

    Raises `UserError` for a metric whose name is taken, and for a loss or a metric that takes other
    arguments; what they return is checked while the step is traced.
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
    """(the next state, sums over the global batch).

    batch: {"image" u8 [n H W C], "label" i32 [n] or f32 [n K]}, n examples a device; key: the
    run's, always the same. Sums: loss, correct, count and own metrics (metrics.py), "bad" (1 when
    the gradient, the loss or the statistics were not finite: then nothing but `step` changes),
    "norm", "rate", and the value of each penalty by its name, such as "l2" (it is no part of
    "loss", as auxiliary heads are none of it; "norm" is of the gradient of it all).

    A regularizer that perturbs the weights, SAM, takes the gradient elsewhere, from the same images
    and random keys. Statistics and sums are those of the weights themselves, and penalties and
    weight decay are too.

    Raises `UserError` while tracing where the pieces do not divide, and where the network, the loss
    or a user's own hook gives something of another shape.
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
    """The mean loss of some examples, auxiliary heads' included, and (statistics, sums)."""
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
    each = config.loss(logits, labels)
    total = jnp.mean(each) + losses.aux_loss(
        updates.get("aux_logits", {}), labels, config.aux_weights, step, config.loss
    )
    sums = sum_metrics(each, logits, labels, labels, task=config.task, own_metrics=config.metrics)
    return total, (updates.get("batch_stats", batch_stats), sums)


def compute_gradients(
    config: StepConfig, state: TrainState, frozen: PyTree, examples: Examples, weights: PyTree
) -> tuple[PyTree, PyTree, Sums]:
    """(gradients at `weights`, statistics, sums) of this device's examples."""

    def loss_of_piece(weights, batch_stats, images, labels, index):
        # Decisions about a whole batch are one a step, whatever pieces it comes in.
        dropout = jax.random.fold_in(examples.rngs["dropout"], index)
        piece = Examples(images, labels, examples.rngs | {"dropout": dropout})
        return compute_loss(config, state.step, frozen, weights, batch_stats, piece)

    slope = jax.grad(loss_of_piece, has_aux=True)
    images, labels, _ = examples
    if config.accumulate == 1:
        grads, (batch_stats, sums) = slope(weights, state.batch_stats, images, labels, 0)
        return grads, batch_stats, sums

    def one(carry, piece):
        batch_stats, grads = carry
        piece_grads, (batch_stats, sums) = slope(weights, batch_stats, *piece)
        return (batch_stats, jax.tree.map(jnp.add, grads, piece_grads)), sums

    # Unrolled on CPU, where XLA's convolutions are many times slower inside a loop.
    n = config.accumulate
    (batch_stats, grads), sums = lax.scan(
        one,
        (state.batch_stats, jax.tree.map(jnp.zeros_like, weights)),
        (split_batch(images, n), split_batch(labels, n), jnp.arange(n)),
        unroll=n if jax.default_backend() == "cpu" else 1,
    )
    grads = jax.tree.map(lambda g: g / n, grads)
    return grads, batch_stats, jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)


def split_batch(x: Array, pieces: int) -> Array:
    """[n ...] -> [pieces n/pieces ...]. Raises `UserError` where n does not divide."""
    if x.shape[0] % pieces:
        raise UserError(
            f"train.accumulate: {x.shape[0]} examples a device do not divide into {pieces} pieces"
        )
    return x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:])


def average_over_devices(
    config: StepConfig, grads: PyTree, batch_stats: PyTree, sums: Sums
) -> tuple[PyTree, PyTree, PyTree, Sums]:
    """(gradients, statistics that move, those that stay, sums) of all devices together."""
    # With local statistics the variances are averaged: what each device normalized by.
    moved, kept = pytree.partition(batch_stats, find_moving_statistics(config, batch_stats))
    grads, moved = lax.pmean((grads, moved), config.axis_name)
    return grads, moved, kept, lax.psum(sums, config.axis_name)


def find_moving_statistics(config: StepConfig, batch_stats: PyTree) -> PyTree:
    """Bools in the shape of `batch_stats`: whether the running statistics move in training."""
    return batchnorm_modes.has_mode(batch_stats, config.optimizer.batchnorm_modes, "train")


def is_finite(norm: Array, loss: Array, batch_stats: PyTree, weights: PyTree) -> Array:
    """Whether a step may be taken: bool []."""
    # The loss alone would not show it: on CPU a NaN image was seen to give a finite one. The
    # new parameters are watched too: a huge rate overflows with gradients that are finite.
    # (One sum of squares: a flag for each leaf makes XLA's CPU compiler very slow.)
    return jnp.isfinite(norm + loss + optax.global_norm((batch_stats, weights)))


def update_ema(
    config: StepConfig, state: TrainState, weights: PyTree, batch_stats: PyTree
) -> PyTree | None:
    """The moving average with a step's weights and statistics, those that move, in it."""
    if state.ema is None:
        return None
    decay = jnp.float32(config.ema_decay)
    if config.ema_warmup:
        decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))

    def blend(old: PyTree, new: PyTree, moves: PyTree) -> PyTree:
        # Frozen leaves are left out: their average is themselves, to the bit.
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
    """(the new state, its sums with "bad" and "norm"), or the old one and zeros if not `finite`."""
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    sums = {name: jnp.where(finite, value, 0.0) for name, value in sums.items()}
    sums["bad"] = jnp.where(finite, 0.0, 1.0)
    sums["norm"] = jnp.where(finite, norm, 0.0)
    return new, sums


# ---------------------------------------------------------------------------- evaluation


def make_eval_step(
    apply_fn: Callable,
    *,
    normalize: Callable[[Array], Array],
    num_classes: int,
    loss: losses.Loss | None = None,
    metrics: Mapping[str, Metric] = {},
    task: str = "classes",
    confusion: bool = False,
    axis_name: str = "batch",
) -> Callable[[PyTree, Batch, Any], dict[str, Array]]:
    """`step(variables, batch, key) -> sums` over the global batch; the key is not used.

    batch: {"image" u8 [n H W C], "label" i32 [n] or f32 [n K], "mask" f32 [n]}; rows with mask 0
    count nowhere. `loss`, `metrics` and `task` are as in `StepConfig`. With `confusion`, beside
    metrics.py's sums: "confusion" f32 [K K], rows true, columns predicted. Raises `UserError` where
    `make_train_step` does, and for a confusion matrix of multilabel data.
    """
    check_own_metrics(metrics)
    loss = losses.select_loss(loss, task)
    if confusion and task == "multilabel":
        raise UserError("a confusion matrix needs one class an example; multilabel data has none")

    def eval_step(variables: PyTree, batch: Batch, key: Any = None):
        del key
        labels, mask = batch["label"], batch["mask"]
        logits = apply_fn(variables, normalize(batch["image"]), train=False)
        soft = losses.soft_labels(labels, num_classes)
        losses.check_logits(logits, *soft.shape)
        each = loss(logits, soft)
        sums = sum_metrics(each, logits, labels, soft, mask, task=task, own_metrics=metrics)
        if confusion:
            labels = labels if labels.ndim == 1 else jnp.argmax(soft, -1)
            empty = jnp.zeros((num_classes, num_classes), jnp.float32)
            sums["confusion"] = empty.at[labels, jnp.argmax(logits, -1)].add(mask)
        return lax.psum(sums, axis_name)

    return eval_step
