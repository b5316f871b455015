"""The program for all cells equals the network of each; pruned cells train alike, to the bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.nas_bench_201 import CellNetwork, write_cell
from flax_cnns.studies.search.nas.cells.shared import make_masks
from flax_cnns.studies.search.nas.cells.space import prune_cell
from flax_cnns.studies.search.nas.cells.training import CellTrainer, Images, Recipe

RECIPE = Recipe(widths=(4,), train_images=24, validation_images=8, test_images=8, batch_size=8)
NONE, SKIP, CONV = "none", "skip_connect", "nor_conv_3x3"
CELLS = [
    write_cell(operations)
    for operations in (
        (CONV, NONE, CONV, SKIP, NONE, SKIP),
        (SKIP, CONV, NONE, CONV, SKIP, CONV),
        (NONE, NONE, NONE, SKIP, SKIP, CONV),  # node 3 takes the convolution of zeros
    )
]
SMALL = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time


@pytest.fixture(scope="module")
def trainer():
    random = np.random.RandomState(0)

    def split(n):
        return random.randn(n, 6, 6, 1).astype(np.float32), np.arange(n, dtype=np.int32) % 10

    return CellTrainer(RECIPE, Images(split(24), split(8), split(8)))


@pytest.fixture(scope="module")
def shared_step(trainer):
    images, labels = (array[:8] for array in trainer.images.train)

    def step(variables, masks):
        def find_loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, new = trainer.network.apply(
                given, images, masks, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        evaluated = trainer.network.apply(variables, images, masks)
        return evaluated, jax.grad(find_loss, has_aux=True)(variables["params"])

    return jax.jit(step, compiler_options=SMALL)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(CELLS[0], marks=pytest.mark.slow),
        CELLS[1],
        pytest.param(CELLS[2], marks=pytest.mark.slow),
    ],
)
def test_logits_statistics_and_gradients_are_those_of_the_cells_own_network(
    cell, trainer, shared_step
):
    images, labels = (array[:8] for array in trainer.images.train)
    network = CellNetwork(cell=cell, num_classes=10, **RECIPE.fields((6, 6, 1)))
    variables = trainer.start(seed=3)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    flat = pytree.flatten(variables)
    own = pytree.unflatten({path: flat[path] for path in pytree.flatten(shapes)})
    logits, (grads, statistics) = shared_step(variables, jnp.asarray(make_masks(cell)))

    def find_loss(params):
        given = {"params": params, "batch_stats": own["batch_stats"]}
        logits, new = network.apply(given, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    @jax.jit
    def own_step(own):
        return network.apply(own, images), jax.grad(find_loss, has_aux=True)(own["params"])

    own_logits, (own_grads, own_statistics) = own_step(own)
    np.testing.assert_allclose(logits, own_logits, rtol=1e-4, atol=1e-5)
    assert np.std(own_logits) > 0.01
    ours = pytree.flatten({"params": grads, "batch_stats": statistics})
    wanted = pytree.flatten({"params": own_grads, "batch_stats": own_statistics})
    for path, leaf in wanted.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-3, atol=1e-5, err_msg=path)
    # Convolutions that the cell lacks get no gradient.
    others = [ours[path] for path in ours.keys() - wanted.keys() if path.startswith("params")]
    assert others
    assert not any(np.any(leaf) for leaf in others)


@pytest.mark.slow
def test_a_cell_trains_to_the_bit_like_its_pruned_cell_and_unlike_others(trainer):
    cell = write_cell((CONV, NONE, CONV, SKIP, SKIP, NONE))  # node 2 leads nowhere
    pruned = prune_cell(cell)
    assert pruned == write_cell((CONV, NONE, NONE, SKIP, SKIP, NONE))

    def fit(cell, seed=0):
        trained = trainer.fit(trainer.start(seed), jnp.asarray(make_masks(cell)), seed)
        return pytree.flatten(trained)

    first, second, again, other = fit(cell), fit(pruned), fit(pruned), fit(pruned, seed=1)
    for path, leaf in second.items():
        used = "edge" not in path or "edge0_1" in path
        assert np.array_equal(first[path], leaf) or not used, path
        assert np.array_equal(again[path], leaf), path
    assert not np.array_equal(other["params/head/kernel"], second["params/head/kernel"])
    assert trainer.train(cell, 0)[:2] == trainer.train(pruned, 0)[:2]


@pytest.mark.slow
def test_the_scan_takes_the_steps_of_optax(trainer):
    """Three steps by hand with the cell's own network, on the batches that the seed draws."""
    cell, seed = CELLS[0], 5
    network = CellNetwork(cell=cell, num_classes=10, **RECIPE.fields((6, 6, 1)))
    start = trainer.start(seed)
    got = pytree.flatten(trainer.fit(start, jnp.asarray(make_masks(cell)), seed))
    shapes = pytree.flatten(jax.eval_shape(network.init, jax.random.key(0), jnp.ones((1, 6, 6, 1))))
    own = pytree.unflatten({path: pytree.flatten(start)[path] for path in shapes})
    params, statistics = own["params"], own["batch_stats"]
    momentum = jax.tree.map(jnp.zeros_like, params)
    order = np.random.RandomState(seed).permutation(24).reshape(3, 8)

    @jax.jit
    def find_grads(params, statistics, rows):
        def find_loss(params):
            given = {"params": params, "batch_stats": statistics}
            images, labels = (array[rows] for array in trainer.images.train)
            logits, new = network.apply(given, images, train=True, mutable=["batch_stats"])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -picked.mean(), new["batch_stats"]

        return jax.grad(find_loss, has_aux=True)(params)

    for i, rows in enumerate(order):
        grads, statistics = find_grads(params, statistics, rows)
        rate = 0.1 * (1 + np.cos(np.pi * i / 3)) / 2
        grads = jax.tree.map(lambda g, p: g + 5e-4 * p, grads, params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        step = jax.tree.map(lambda m, g: g + 0.9 * m, momentum, grads)
        params = jax.tree.map(lambda p, s, rate=rate: p - rate * s, params, step)
    for path, leaf in pytree.flatten({"params": params, "batch_stats": statistics}).items():
        np.testing.assert_allclose(got[path], leaf, rtol=2e-3, atol=2e-4, err_msg=path)


def test_accuracy_counts_every_image(trainer):
    variables, masks = trainer.start(0), jnp.asarray(make_masks(CELLS[0]))
    network = CellNetwork(cell=CELLS[0], num_classes=10, **RECIPE.fields((6, 6, 1)))
    images, labels = trainer.images.test
    shapes = pytree.flatten(jax.eval_shape(network.init, jax.random.key(0), images))
    own = pytree.unflatten({path: pytree.flatten(variables)[path] for path in shapes})
    logits = network.apply(own, images)
    wanted = np.mean(np.argmax(logits, -1) == labels)
    assert trainer.evaluate(variables, masks, images, labels) == pytest.approx(wanted)


def test_masks():
    masks = make_masks(CELLS[0])
    assert masks.tolist() == [[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]]
    with pytest.raises(UserError, match="avg_pool_3x3 is not in the space none, skip_connect"):
        make_masks(write_cell(["avg_pool_3x3"] * 6))


def test_steps():
    assert (RECIPE.steps, dataclasses.replace(RECIPE, epochs=2).steps, Recipe().steps) == (
        3,
        6,
        300,
    )
