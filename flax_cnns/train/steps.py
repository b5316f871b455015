"""The training and the evaluation step, written as if there were one device.

Both run inside `parallel.parallelize`, which names the mapped axis. Random streams: every one is
`fold_in` of the run's key with a stream's constant and the step, so nothing is stored.

- augment: then with the image's place in the global batch, so that device counts agree;
- mix, shared, noise: the same on every device, for what concerns the batch, a whole branch, or
  the gradient;
- dropout: then with the device, different on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import batchnorm, losses, metrics, regularizers
from flax_cnns.train.optimizers import Optimizer
from flax_cnns.train.schedules import Schedule
from flax_cnns.train.state import TrainState
from flax_cnns.types import Array, Batch, PyTree

_AUGMENT, _MIX, _SHARED, _DROPOUT, _NOISE = range(5)

Augment = Callable[[Array, Array], Array]  # images, a key an image -> images
Mix = Callable[[Array, Array, Array], tuple[Array, Array]]  # images, labels, key -> images, soft


def stream(key: Array, constant: int, step: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, constant), step)


def prepare(
    batch: Batch, key: Array, step: Array, augment: Augment, mix: Mix, axis_name: str
) -> tuple[Array, Array, dict[str, Array]]:
    """(images f32 [n H W C], soft labels [n K], the network's keys) of a device in a step."""
    device, n = lax.axis_index(axis_name), batch["label"].shape[0]
    images = augment(batch["image"], image_keys(key, step, device * n, n))
    images, labels = mix(images, batch["label"], stream(key, _MIX, step))
    dropout = jax.random.fold_in(stream(key, _DROPOUT, step), device)
    return images, labels, {"shared": stream(key, _SHARED, step), "dropout": dropout}


def image_keys(key: Array, step: Array, first: Array, n: int) -> Array:
    """[n] keys, of the places from `first` on in the global batch of a step."""
    places = first + jnp.arange(n)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream(key, _AUGMENT, step), places)


def make_loader_augment(
    augment: Augment, seed_key: Callable[[], Array], *, first: int
) -> Callable[[Batch, int], Batch]:
    """`augmented(batch, step)`: what `prepare` does to the images of that step, done on the CPU,
    for the loader's thread; for a CPU it is the same to the bit.

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


def aux_loss(
    aux_logits: PyTree, labels: Array, weights: list[tuple[str, Schedule]], step: Array
) -> Array:
    """The weighted sum of the mean losses of all heads sown into `aux_logits`, by head name."""
    # A head `aux1` sows its "logits", and sow keeps a tuple of all that is sown under a name.
    heads = {
        path.rpartition("/")[0].removesuffix("/logits"): logits
        for path, logits in pytree.flatten(aux_logits).items()
    }
    if not heads:
        return jnp.zeros(())
    chosen = pytree.match(weights, heads, what="train.aux_weight")
    return sum(
        chosen[name](step) * jnp.mean(losses.cross_entropy(logits, labels))
        for name, logits in heads.items()
    )


def make_train_step(
    apply_fn: Callable,
    optimizer: Optimizer,
    *,
    augment: Augment,
    mix: Mix,
    aux_weights: list[tuple[str, Schedule]] = (),
    ema_decay: float = 0.0,
    ema_warmup: bool = True,
    accumulate: int = 1,
    axis_name: str = "batch",
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch, key) -> (state, sums)`.

    batch: {"image" u8 [n H W C], "label" i32 [n]}, n examples a device; key: the run's, always the
    same. `augment(images, keys)` takes a key an image; `mix(images, labels, key)` gives soft labels
    [n K]. Sums are of the whole global batch: loss, correct, count (metrics.py), "bad" (1 when the
    gradient, the loss or the statistics were not finite: then nothing but `step` changes), "norm",
    "rate", and "l2" where there is a penalty (it is no part of "loss", as auxiliary heads are none
    of it; "norm" is of the gradient of it all). `accumulate` cuts each device's examples into that
    many pieces, one after another.

    With `optimizer.sam` the gradient is that at the point that `regularizers.ascend` finds: from
    the same images and random keys, by the gradient of the whole global batch (of all devices: in
    the paper each climbs by its own, and their number matters). Statistics and sums are those of
    the weights themselves, and neither L2 nor weight decay is of the point (equation 1).

    Raises `UserError` while tracing where the pieces do not divide.
    """

    def pieces(x: Array) -> Array:
        if x.shape[0] % accumulate:
            raise UserError(
                f"train.accumulate: {x.shape[0]} examples a device do not divide "
                f"into {accumulate} pieces"
            )
        return x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])

    def train_step(state: TrainState, batch: Batch, key: Array):
        images, labels, rngs = prepare(batch, key, state.step, augment, mix, axis_name)
        trainable, frozen = pytree.partition(state.params, optimizer.trainable)
        moves = batchnorm.has_mode(state.batch_stats, optimizer.norms, "train")

        def loss_fn(trainable, batch_stats, images, labels, index):
            variables = {"params": pytree.merge(trainable, frozen), "batch_stats": batch_stats}
            with batchnorm.intercept(optimizer.norms):
                logits, updates = apply_fn(
                    variables,
                    images,
                    train=True,
                    mutable=["batch_stats", "aux_logits"],
                    # Decisions about a whole batch are one a step, whatever pieces it comes in.
                    rngs=rngs | {"dropout": jax.random.fold_in(rngs["dropout"], index)},
                )
            each = losses.cross_entropy(logits, labels)
            total = jnp.mean(each) + aux_loss(
                updates.get("aux_logits", {}), labels, aux_weights, state.step
            )
            sums = metrics.sums(each, logits, jnp.argmax(labels, -1))
            return total, (updates.get("batch_stats", batch_stats), sums)

        def gradients(trainable):
            """(gradients, statistics, sums) of this device's examples."""
            slope = jax.grad(loss_fn, has_aux=True)
            if accumulate == 1:
                grads, (batch_stats, sums) = slope(trainable, state.batch_stats, images, labels, 0)
                return grads, batch_stats, sums

            def one(carry, piece):
                batch_stats, grads = carry
                piece_grads, (batch_stats, sums) = slope(trainable, batch_stats, *piece)
                return (batch_stats, jax.tree.map(jnp.add, grads, piece_grads)), sums

            # Unrolled on CPU, where XLA's convolutions are many times slower inside a loop.
            (batch_stats, grads), sums = lax.scan(
                one,
                (state.batch_stats, jax.tree.map(jnp.zeros_like, trainable)),
                (pieces(images), pieces(labels), jnp.arange(accumulate)),
                unroll=accumulate if jax.default_backend() == "cpu" else 1,
            )
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            return grads, batch_stats, jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)

        grads, batch_stats, sums = gradients(trainable)
        if optimizer.sam:
            uphill = lax.pmean(grads, axis_name)
            grads, _, _ = gradients(regularizers.ascend(trainable, uphill, optimizer.sam))

        # With local statistics the variances are averaged: what each device normalised by.
        moved, kept = pytree.partition(batch_stats, moves)
        grads, moved = lax.pmean((grads, moved), axis_name)
        sums = lax.psum(sums, axis_name)
        if optimizer.penalty is not None:
            sums["l2"], slope = jax.value_and_grad(optimizer.penalty)(trainable)
            grads = jax.tree.map(jnp.add, grads, slope)
        norm = optax.global_norm(grads)
        updates, opt_state = optimizer.tx.update(
            grads, state.opt_state, trainable, step=state.step, key=stream(key, _NOISE, state.step)
        )
        trainable = optax.apply_updates(trainable, updates)
        if optimizer.constrain is not None:
            trainable = optimizer.constrain(trainable)
        # The loss alone would not show it: on CPU a NaN image was seen to give a finite one. The
        # new parameters are watched too: a huge rate overflows with gradients that are finite.
        # (One sum of squares: a flag for each leaf makes XLA's CPU compiler very slow.)
        ok = jnp.isfinite(norm + sums["loss"] + optax.global_norm((moved, trainable)))
        ema = state.ema
        if ema is not None:
            decay = jnp.float32(ema_decay)
            if ema_warmup:
                decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))

            def average(old: PyTree, new: PyTree, moves: PyTree) -> PyTree:
                # Frozen leaves are left out: their average is themselves, to the bit.
                old, still = pytree.partition(old, moves)
                new = jax.tree.map(lambda o, n: decay * o + (1.0 - decay) * n, old, new)
                return pytree.merge(new, still)

            ema = {
                "params": average(ema["params"], trainable, optimizer.trainable),
                "batch_stats": average(ema["batch_stats"], moved, moves),
            }
        new = state.replace(
            params=pytree.merge(trainable, frozen),
            batch_stats=pytree.merge(moved, kept),
            opt_state=opt_state,
            ema=ema,
        )
        new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, state)
        sums = {name: jnp.where(ok, value, 0.0) for name, value in sums.items()}
        sums["bad"] = jnp.where(ok, 0.0, 1.0)
        sums["norm"] = jnp.where(ok, norm, 0.0)
        sums["rate"] = optimizer.learning_rate(state.step, state.opt_state)
        return new.replace(step=state.step + 1), sums

    return train_step


def make_eval_step(
    apply_fn: Callable,
    *,
    normalize: Callable[[Array], Array],
    num_classes: int,
    confusion: bool = False,
    axis_name: str = "batch",
) -> Callable[[PyTree, Batch, Any], dict[str, Array]]:
    """`step(variables, batch, key) -> sums` over the global batch; the key is not used.

    batch: {"image" u8 [n H W C], "label" i32 [n], "mask" f32 [n]}; rows with mask 0 count nowhere.
    With `confusion`, beside metrics.py's sums: "confusion" f32 [K K], rows true, columns predicted.
    """

    def eval_step(variables: PyTree, batch: Batch, key: Any = None):
        del key
        labels, mask = batch["label"], batch["mask"]
        logits = apply_fn(variables, normalize(batch["image"]), train=False)
        each = losses.cross_entropy(logits, jax.nn.one_hot(labels, num_classes))
        sums = metrics.sums(each, logits, labels, mask)
        if confusion:
            empty = jnp.zeros((num_classes, num_classes), jnp.float32)
            sums["confusion"] = empty.at[labels, jnp.argmax(logits, -1)].add(mask)
        return lax.psum(sums, axis_name)

    return eval_step
