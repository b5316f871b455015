"""Trains cells on Fashion-MNIST at 14 pixels, all of them with one compiled program."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns import layers
from flax_cnns.data.readers import archives
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.errors import UserError
from flax_cnns.studies.search.nas.cells.shared import SharedNetwork, make_masks
from flax_cnns.types import Array

EVAL_BATCH = 200  # images


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a cell is trained. The default is the recipe of the table."""

    widths: tuple[int, ...] = (16,)  # of the stages
    depth: int = 2  # cells in each stage
    stem_stride: int = 2
    train_images: int = 9600
    validation_images: int = 2000
    test_images: int = 6000
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.1  # at the start; falls to 0 with half a cosine
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # of all parameters

    @property
    def steps(self) -> int:
        return self.epochs * (self.train_images // self.batch_size)

    def fields(self, image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Returns the fields of the network."""
        return dict(
            depths=(self.depth,) * len(self.widths),
            widths=self.widths,
            stem_stride=self.stem_stride,
            input_size=image_shape,
        )


class Images(NamedTuple):
    """Standardized images f32 [N 14 14 1] and labels i32 [N] of each split."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


class Trained(NamedTuple):
    """The result of a training."""

    validation: float  # accuracy in 0..1, of the final weights
    test: float
    seconds: float  # of the processor, for training and evaluation


def read_images(folder: Path, recipe: Recipe) -> Images:
    """Reads Fashion-MNIST's four IDX files, takes means of 2x2 pixels, and splits train by seed 0.

    Raises `UserError` if files are missing or damaged, or do not hold enough images.
    """
    raw = archives.read("fashion_mnist", str(folder), "")
    order = np.random.RandomState(0).permutation(len(raw.sources["train"]))
    train = order[: recipe.train_images]
    validation = order[::-1][: recipe.validation_images]
    wanted = recipe.train_images + recipe.validation_images
    if len(order) < wanted or len(raw.sources["test"]) < recipe.test_images:
        raise UserError(f"{folder}: expected {wanted} images and {recipe.test_images} for testing")
    parts = {}
    for name, split, rows in (
        ("train", "train", train),
        ("validation", "train", validation),
        ("test", "test", np.arange(recipe.test_images)),
    ):
        source = raw.sources[split]
        assert isinstance(source, ArraySource)
        assert source.labels is not None
        x = source.images[rows].astype(np.float32) / 255
        n, height, width, channels = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        parts[name] = x, source.labels[rows].astype(np.int32)
    mean, std = parts["train"][0].mean(), parts["train"][0].std()
    return Images(**{name: ((x - mean) / std, labels) for name, (x, labels) in parts.items()})


class CellTrainer:
    """Trains cells one after the other. Compiles at the first call only.

    A training is one call of one program. Calls for single steps took as much processor time, but
    on a busy machine the process waits for its turn after each of them. A scan is not slow here,
    since convolutions behind a condition are computed in the same way anyway.
    """

    def __init__(self, recipe: Recipe, images: Images):
        self.recipe, self.images = recipe, jax.tree.map(jnp.asarray, images)
        shape = images.train[0].shape[1:]
        self.network = SharedNetwork(num_classes=10, **recipe.fields(shape))
        decay = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
        self.optimizer = optax.chain(
            optax.add_decayed_weights(recipe.weight_decay),
            optax.sgd(decay, recipe.momentum, nesterov=True),
        )
        self._init = jax.jit(self._make_variables)
        self._fit = jax.jit(self._run_steps)
        self._count = jax.jit(self._count_correct)

    def train(self, cell: str, seed: int) -> Trained:
        """Trains a cell. Raises `UserError` for a cell that the program does not hold."""
        start = time.process_time()
        masks = jnp.asarray(make_masks(cell))
        variables = self.fit(self.start(seed), masks, seed)
        validation = self.evaluate(variables, masks, *self.images.validation)
        test = self.evaluate(variables, masks, *self.images.test)
        return Trained(validation, test, time.process_time() - start)

    def start(self, seed: int) -> Any:
        """Returns initial variables. Those of a cell's own network are among them."""
        return self._init(jax.random.key(seed))

    def evaluate(self, variables: Any, masks: Array, images: Array, labels: Array) -> float:
        """Returns the accuracy in 0..1."""
        correct = self._count(variables, masks, images, labels)
        return int(correct) / len(labels)

    def fit(self, variables: Any, masks: Array, seed: int) -> Any:
        """Returns the variables after the recipe's steps. `seed` determines the batches."""
        draw, recipe = np.random.RandomState(seed), self.recipe
        used = recipe.train_images // recipe.batch_size * recipe.batch_size
        order = [draw.permutation(recipe.train_images)[:used] for _ in range(recipe.epochs)]
        rows = np.concatenate(order).reshape(recipe.steps, recipe.batch_size)
        return self._fit(variables, masks, *self.images.train, rows)

    def _make_variables(self, key: Array) -> Any:
        shape = jnp.zeros((1, *self.network.input_size))
        return self.network.init(key, shape, jnp.zeros((2, 6)))

    def _run_steps(
        self, variables: Any, masks: Array, images: Array, labels: Array, rows: Array
    ) -> Any:
        def step(state: tuple, rows: Array) -> tuple[tuple, None]:
            params, statistics, optimizer_state = state

            def find_loss(params: Any) -> tuple[Array, Any]:
                with layers.inside_control_flow():
                    logits, new = self.network.apply(
                        {"params": params, "batch_stats": statistics},
                        images[rows],
                        masks,
                        train=True,
                        mutable=["batch_stats"],
                    )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
                return losses.mean(), new["batch_stats"]

            grads, statistics = jax.grad(find_loss, has_aux=True)(params)
            updates, optimizer_state = self.optimizer.update(grads, optimizer_state, params)
            return (optax.apply_updates(params, updates), statistics, optimizer_state), None

        params = variables["params"]
        state = params, variables["batch_stats"], self.optimizer.init(params)
        (params, statistics, _), _ = jax.lax.scan(step, state, rows)
        return {"params": params, "batch_stats": statistics}

    def _count_correct(self, variables: Any, masks: Array, images: Array, labels: Array) -> Array:
        size = math.gcd(len(labels), EVAL_BATCH)

        def is_correct(batch: tuple[Array, Array]) -> Array:
            with layers.inside_control_flow():
                logits = cast(Array, self.network.apply(variables, batch[0], masks))
            return jnp.argmax(logits, -1) == batch[1]

        batches = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (images, labels))
        return jnp.sum(jax.lax.map(is_correct, batches))
