"""Own parts as a user might write them, for test_own.py, which names them in configs."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from flax_cnns import Dataset


class Net(nn.Module):
    """Two convolutions and a head, in plain linen."""

    num_classes: int
    width: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2, name="conv1")(images))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2, name="conv2")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


class Bare(nn.Module):
    """The smallest possible network: no fields, ten logits."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(10)(images.reshape(len(images), -1))


def digits(examples=200, *, classes=10):
    """The digits as arrays u8 [N 8 8 1]."""
    images, labels = load_digits(return_X_y=True)
    kept = labels < classes
    images = (images[kept].reshape(-1, 8, 8, 1) * 15.9).astype("uint8")
    labels, half = labels[kept], examples // 2
    return Dataset.from_arrays(
        train=(images[:examples], labels[:examples]),
        test=(images[-half:], labels[-half:]),
        class_names=list("0123456789")[:classes],
    )


def focal(logits, labels, gamma=2.0):
    """The focal loss of Lin et al. 2017."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(labels * (1 - jnp.exp(log_p)) ** gamma * log_p, -1)


@jax.jit
def compiled(logits, labels):
    return -jnp.sum(labels * jax.nn.log_softmax(logits), -1)


def recall(logits, labels, mask):
    """Recall of each class, averaged over the classes that occur."""
    right = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
    return (labels * (mask * right)[:, None]).sum(0), (labels * mask[:, None]).sum(0)


def margin(logits, labels, mask):
    """The logit of the label minus the mean of all logits."""
    apart = jnp.sum(labels * logits, -1) - logits.mean(-1)
    return jnp.sum(jnp.where(mask > 0, apart, 0.0)), mask.sum()


def momentum(learning_rate, beta=0.5):
    return optax.sgd(learning_rate, momentum=beta)


@dataclasses.dataclass
class Shrink:
    """A penalty on the head, noise on the images, and a constraint on the head's kernel."""

    rate: float = 0.0
    bound: float = 3.0

    def augment(self, images, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        return images + self.rate * noise

    def penalty(self, params, step):
        return self.rate * jnp.sum(params["head"]["kernel"] ** 2)

    def constrain(self, params):
        kernel = jnp.clip(params["head"]["kernel"], -self.bound, self.bound)
        return params | {"head": params["head"] | {"kernel": kernel}}


class Recorder:
    """Writes its calls into a file."""

    def __init__(self):
        self.steps, self.validations, self.saves = [], [], []

    def on_step(self, step, numbers):
        self.steps.append((step, numbers))

    def on_validation(self, step, numbers):
        self.validations.append((step, numbers))

    def on_save(self, step):
        self.saves.append(step)


# ---- mistakes


def scalar_loss(logits, labels):
    return jnp.mean(logits)


def count_less(logits, labels, mask):
    return jnp.sum(mask)


def no_data():
    return [1, 2, 3]


class Wrong(nn.Module):
    """Returns maps, not logits."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Conv(3, (3, 3))(images)


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(len(images), -1))


class NeedsKey(nn.Module):
    """Needs a second argument in addition to the images."""

    @nn.compact
    def __call__(self, images, key, *, train):
        return nn.Dense(10)(images.reshape(len(images), -1))


class Streams(nn.Module):
    """Draws from a random stream that a run does not have."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dropout(0.5, rng_collection="noise", deterministic=not train)(images)
        return nn.Dense(10)(x.reshape(len(x), -1))


class LateHead(nn.Module):
    """Creates parameters only in training."""

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        if train:
            self.sow("aux_logits", "logits", nn.Dense(10, name="aux")(x))
        return nn.Dense(10)(x)


class TwoHeads(nn.Module):
    """Returns a pair of logits in training."""

    @nn.compact
    def __call__(self, images, *, train):
        logits = nn.Dense(10)(images.reshape(len(images), -1))
        return (logits, logits) if train else logits


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(64, 10, rngs=rngs)


NUMBER = 3


class Keeps(nn.Module):
    """Keeps a variable in its own collection."""

    @nn.compact
    def __call__(self, images, *, train):
        self.variable("cache", "seen", jnp.zeros, (3,))
        return nn.Dense(10)(images.reshape(len(images), -1))


# ---- batches


def batches(seed=0, *, drifts=False):
    """The digits as a stream whose order depends on `seed` and the step; with `drifts` also on the
    step where the stream began."""
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")[:120]
    labels = data.target[:120]

    def factory(split, start_step, process_index, process_count):
        step = start_step
        while split == "train":
            order = np.random.default_rng((seed, step, start_step * drifts)).permutation(120)
            rows = order[:16][process_index * (n := 16 // process_count) :][:n]
            yield images[rows], labels[rows]
            step += 1
        for first in range(0, 120, 64):
            rows = slice(first + process_index * (n := 64 // process_count), None)
            yield {"image": images[rows][:n], "label": labels[rows][:n]}

    sizes = {"train": 120, "test": 120}
    return Dataset.from_batches(factory, sizes, (8, 8, 1), num_classes=10, mean=[0.3], std=[0.4])
