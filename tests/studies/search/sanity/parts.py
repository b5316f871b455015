"""A small network and the digits, which fields of the config break in different ways."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from flax_cnns import Dataset


class Net(nn.Module):
    """A convolution with BatchNorm and a head. `std`: of the kernels; -1: He et al.'s."""

    num_classes: int
    width: int = 8
    std: float = -1.0
    norm: bool = True
    aux: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        he = nn.initializers.he_normal()
        init = he if self.std < 0 else nn.initializers.normal(self.std)
        x = nn.Conv(self.width, (3, 3), strides=2, kernel_init=init, name="conv")(images)
        if self.norm:
            norm = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name="norm")
            x = norm(x)
        x = nn.relu(x).reshape(len(x), -1)
        if self.aux and train:
            self.sow("aux_logits", "logits", jnp.zeros((len(x), self.num_classes)))
        return nn.Dense(self.num_classes, kernel_init=init, name="head")(x)


class Decay:
    """A regularizer with a penalty that is easy to compute."""

    def __init__(self, rate=0.0):
        self.rate = rate

    def penalty(self, params, step):
        return self.rate * sum(jnp.sum(jnp.abs(x)) for x in nn.meta.unbox(params)["head"].values())


_load_digits = functools.cache(functools.partial(load_digits, return_X_y=True))


def digits(shuffled="", numbered=False, scale=1.0, copies=0, sort=False):
    """The digits, u8 [N 8 8 1], or floats times `scale`: 800 for training, 200 for validation."""
    images, labels = _load_digits()
    images = (images.reshape(-1, 8, 8, 1) * 15.9).astype("uint8")
    rng = np.random.default_rng(0)
    order = rng.permutation(1000)
    images, labels = images[order], labels[order]
    train, validation = (images[:800], labels[:800]), (images[800:], labels[800:])
    if shuffled:
        train = images[:800], rng.permutation(labels[:800])
    if shuffled == "all":
        validation = images[800:], rng.permutation(labels[800:])
    if numbered:
        validation = images[800:], (labels[800:] + 3) % 10
    if copies:
        validation = (
            np.concatenate([train[0][:copies], validation[0][copies:]]),
            np.concatenate([train[1][:copies], validation[1][copies:]]),
        )
    normalize = scale == 1
    if not normalize:
        train = (train[0].astype("float32") / 255 * scale, train[1])
        validation = (validation[0].astype("float32") / 255 * scale, validation[1])
    if sort:
        return _stream(train, validation)
    return Dataset.from_arrays(
        train=train, test=validation, validation=validation, num_classes=10, normalize=normalize
    )


def _stream(train, validation):
    """Batches in order of class."""
    order = np.argsort(train[1], kind="stable")

    def factory(split, start, process, processes):
        images, labels = train if split == "train" else validation
        if split != "train":
            for first in range(0, len(images), 200):
                yield images[first : first + 200], labels[first : first + 200]
            return
        step = start
        while True:
            rows = order[(step * 40 + np.arange(40)) % len(order)]
            yield images[rows], labels[rows]
            step += 1

    sizes = {"train": len(train[1]), "validation": len(validation[1]), "test": len(validation[1])}
    return Dataset.from_batches(factory, sizes, (8, 8, 1), num_classes=10, mean=(0.3,), std=(0.37,))
