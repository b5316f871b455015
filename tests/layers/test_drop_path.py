"""Stochastic depth and drop-path: rates, skipped branches, evaluation and random streams."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.layers.drop_path import DropPath
from flax_cnns.train import parallel, steps

DEPTHS = (2, 3)
IMAGES = np.random.RandomState(0).randn(8, 6, 6, 3).astype(np.float32)


class Block(nn.Module):
    """x + norm(conv(x)), where the branch is dropped as `drop` says: [N H W C] -> [N H W C]."""

    conv: Any
    norm: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x, drop=None):
        def branch(block, x):
            return block.norm(name="norm1")(block.conv(3, (1, 1), name="conv1")(x))

        return layers.residual(x, branch, self, x, drop)


class Network(nn.Module):
    drop_path: float = 0.5
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    axis_name: str | None = None
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        drops = layers.make_drop_paths(self, DEPTHS, train)
        norm = layers.make_norm("batch", train=train, axis_name=self.axis_name)
        stage = partial(layers.Stage, partial(Block, norm=norm), layers.Conv)
        for i, (depth, drop) in enumerate(zip(DEPTHS, drops), 1):
            x = stage(depth, scan=self.scan, remat=self.remat, name=f"stage{i}")(x, drop)
        return x


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Network().init)(jax.random.key(0), IMAGES)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.125, 0.25, 0.375, 0.5]),
        ("efficientnet", [0, 0.125, 0.25, 0.375]),
        ("convnext", [0, 1 / 6, 1 / 3, 0.5]),
    ],
)
def test_schedules(schedule, rates):
    np.testing.assert_allclose(layers.drop_rates(0.5, 4, schedule), rates, rtol=1e-6)


def test_linear_decay_is_the_papers_survival():
    """Equation 4 for ResNet-110: a quarter of its 54 blocks is dropped, the 25 % of section 4."""
    L, p_L = 54, 0.5
    survival = [1 - l / L * (1 - p_L) for l in range(1, L + 1)]  # noqa: E741
    np.testing.assert_allclose(1 - layers.drop_rates(1 - p_L, L), survival, rtol=1e-6)
    assert sum(survival) == pytest.approx((3 * L - 1) / 4)  # section 3, "expected network depth"


def keys_of(n, key=1):
    return jax.random.split(jax.random.key(key), n)


class Branch(nn.Module):
    """`residual` with a branch that adds 1."""

    @nn.compact
    def __call__(self, x, drop):
        return layers.residual(x, lambda block, x: jnp.ones_like(x), self, x, drop)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_rates_are_kept_over_many_steps(mode):
    n, rate = 2000, 0.3
    x = jnp.zeros((4, 1, 1, 1))

    def run(key):
        return Branch().apply({}, x, DropPath(jnp.float32(rate), key, mode))[:, 0, 0, 0]

    added = np.asarray(jax.jit(jax.vmap(run))(keys_of(n)))  # [steps, images]
    deviation = np.sqrt(rate * (1 - rate) / n)
    if mode == "batch":  # one decision per step, not scaled
        assert set(np.unique(added)) == {0.0, 1.0}
        assert (added == added[:, :1]).all()
        assert abs(added[:, 0].mean() - 0.7) < 4 * deviation
    else:  # one decision per image, scaled so that the expectation is unchanged
        np.testing.assert_allclose(np.unique(added), [0, 1 / 0.7], rtol=1e-6)
        assert np.abs((added == 0).mean(0) - rate).max() < 4 * deviation
        joint = np.mean((added[:, 0] == 0) & (added[:, 1] == 0))
        assert abs(joint - rate**2) < 4 * deviation  # independent of each other
        assert abs(added.mean() - 1) < 4 * deviation


@pytest.mark.parametrize(("mode", "expected"), [("batch", 0.7), ("sample", 1.0)])
def test_evaluation_is_the_expectation_of_training(mode, expected):
    x = jnp.zeros((4, 1, 1, 1))
    out = Branch().apply({}, x, DropPath(jnp.float32(0.3), None, mode))
    np.testing.assert_allclose(out, np.full_like(x, expected), rtol=1e-6)


def test_an_image_is_dropped_whole():
    x = jnp.zeros((64, 5, 5, 7))
    out = Branch().apply({}, x, DropPath(jnp.float32(0.5), jax.random.key(3), "sample"))
    per_image = np.asarray(out).reshape(64, -1)
    assert (per_image == per_image[:, :1]).all()
    assert len(np.unique(per_image)) == 2


def train(model, variables, key, x=IMAGES):
    """Returns output, statistics and gradients of a training pass with `key` for both streams."""
    rngs = {"shared": key, "dropout": jax.random.fold_in(key, 1)}

    def loss(params):
        given = {**variables, "params": params}
        out, new = model.apply(given, x, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.sum(out**2), (out, new["batch_stats"])

    (_, (out, stats)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return {"out": out, "batch_stats": stats, "grads": grads}


def find_kept(result, variables):
    """Returns {block: whether it ran}. A block that ran has updated its statistics."""
    before, after = (
        pytree.flatten(tree) for tree in (variables["batch_stats"], result["batch_stats"])
    )
    moved = {path: bool((before[path] != after[path]).any()) for path in before}
    blocks = {path.rpartition("/norm1")[0]: moved[path] for path in moved}
    assert all(moved[path] == blocks[path.rpartition("/norm1")[0]] for path in moved)
    return blocks


def test_a_dropped_block_leaves_its_statistics_and_has_no_gradient(variables):
    run = jax.jit(partial(train, Network(drop_path=0.8)))
    seen = set()
    for key in keys_of(8, 2):
        result = run(variables, key)
        ran = find_kept(result, variables)
        grads = pytree.flatten(result["grads"])
        assert all(bool((grads[f"{block}/conv1/kernel"] != 0).any()) == ran[block] for block in ran)
        x = IMAGES
        # The blocks that ran give the same output without the others.
        for block, runs in ran.items():
            if runs:
                block_variables = {
                    name: variables[name][block.split("/")[0]][block.split("/")[1]]
                    for name in variables
                }
                norm = layers.make_norm("batch", train=True)
                alone = Block(layers.Conv, norm)
                x, _ = alone.apply(block_variables, x, mutable=["batch_stats"])
        np.testing.assert_allclose(result["out"], x, rtol=1e-4, atol=1e-5)
        seen.add(tuple(ran.values()))
    assert len(seen) > 3  # the decisions differ between steps


def test_a_dropped_branch_is_not_computed():
    """In the program, it is a branch of a conditional; it is not multiplied by zero."""

    def lowered(mode):
        model = Network(drop_path_mode=mode)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        return str(jax.make_jaxpr(partial(train, model))(shapes, jax.random.key(0)))

    assert lowered("batch").count("cond[") == 2 * sum(DEPTHS)  # forward and backward
    assert "cond[" not in lowered("sample")


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("batch", dict(scan=True, remat=True)),
        pytest.param("sample", dict(scan=True), marks=pytest.mark.slow),
        pytest.param("batch", dict(scan=True), marks=pytest.mark.slow),
        pytest.param("sample", dict(scan=True, remat=True), marks=pytest.mark.slow),
    ],
)
def test_scanned_networks_drop_the_same(variables, mode, fields):
    expected = jax.jit(partial(train, Network(drop_path_mode=mode)))(variables, jax.random.key(5))
    model = Network(drop_path_mode=mode, **fields)
    result = jax.jit(partial(train, model))(pytree.stack_blocks(variables), jax.random.key(5))
    result = pytree.flatten(pytree.unstack_blocks(result))
    for path, leaf in pytree.flatten(expected).items():
        np.testing.assert_allclose(result[path], leaf, rtol=1e-4, atol=1e-3, err_msg=path)


@pytest.mark.parametrize("axis_name", [None, "batch"])
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_four_devices(variables, mode, axis_name):
    """The random streams are those of train/steps.py.

    Decisions about whole branches are the same on all devices, and those about images differ.
    Another step makes other decisions. The same step makes the same decisions again.
    """
    mesh = parallel.make_mesh()
    model = Network(drop_path_mode=mode, axis_name=axis_name)
    once = IMAGES[:1].repeat(8, 0)  # equal images: only the random numbers differ

    def step(variables, batch, state):
        key, number = state
        device = jax.lax.axis_index("batch")
        shared = steps.stream_key(key, steps.Stream.SHARED, number)
        dropout = jax.random.fold_in(steps.stream_key(key, steps.Stream.DROPOUT, number), device)
        out, _ = model.apply(
            variables,
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"shared": shared, "dropout": dropout},
        )
        return jax.lax.all_gather(out[:, 0, 0], "batch", tiled=True)

    mapped = parallel.parallelize(step, mesh, donate=False)
    batch = parallel.shard_batch({"image": once}, mesh)

    def run(number):
        key = (jax.random.key(0), number)
        return np.asarray(mapped(parallel.replicate(variables, mesh), batch, key))

    outs = [run(number) for number in range(6)]
    np.testing.assert_array_equal(outs[3], run(3))
    assert any((out != outs[0]).any() for out in outs[1:])
    devices = [out.reshape(mesh.size, -1) for out in outs]
    differ = [bool(np.abs(images - images[:1]).max() > 1e-6) for images in devices]
    assert any(differ) is (mode == "sample")


def test_evaluation_needs_no_keys_and_scales_by_survival(variables):
    out = Network().apply(variables, IMAGES)
    x = IMAGES
    rates = iter(layers.drop_rates(0.5, sum(DEPTHS)))
    for i, depth in enumerate(DEPTHS, 1):
        for j in range(1, depth + 1):
            block = {name: variables[name][f"stage{i}"][f"block{j}"] for name in variables}
            branch = Block(layers.Conv, layers.make_norm("batch", train=False)).apply(block, x) - x
            x = x + (1 - next(rates)) * branch
    np.testing.assert_allclose(out, x, rtol=1e-4, atol=1e-5)
    plain = Network(drop_path=0.0).apply(variables, IMAGES)
    sample = Network(drop_path_mode="sample").apply(variables, IMAGES)
    np.testing.assert_array_equal(plain, sample)


def test_bfloat16_stays():
    x = jnp.ones((2, 1, 1, 1), jnp.bfloat16)
    for mode in ("batch", "sample"):
        for key in (None, jax.random.key(0)):
            drop = DropPath(jnp.float32(0.3), key, mode)
            assert Branch().apply({}, x, drop).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(drop_path=1.0), "0 to below 1, got 1.0"),
        (dict(drop_path=-0.1), "0 to below 1"),
        (dict(drop_path_mode="batc"), "did you mean 'batch'"),
        (dict(drop_path_schedule="lineer"), "did you mean 'linear'"),
        (dict(drop_path=0.0, drop_path_mode="batc"), "did you mean 'batch'"),
    ],
)
def test_invalid_fields(fields, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(Network(**fields).init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize(("mode", "stream"), [("batch", "shared"), ("sample", "dropout")])
def test_a_missing_stream(variables, mode, stream):
    with pytest.raises(UserError, match=rf'rngs=\{{"{stream}": key\}}'):
        Network(drop_path_mode=mode).apply(variables, IMAGES, train=True, mutable=["batch_stats"])


def test_branches_of_one_block_decide_independently_with_one_rate():
    drop = DropPath(jnp.float32(0.5), jax.random.key(0), "sample")
    shape = (1000, 1, 1)  # images, tokens, channels

    def kept(drop):
        return layers.residual(jnp.zeros(shape), lambda block, x: x, None, jnp.ones(shape), drop)

    first, second = (np.asarray(kept(each)).ravel() for each in layers.split_by_branch(drop, 2))
    assert set(first) == set(second) == {0.0, 2.0}
    assert 400 < (first == second).sum() < 600
    assert layers.split_by_branch(None, 2) == [None, None]
    evaluation = drop.replace(key=None)
    assert layers.split_by_branch(evaluation, 2) == [evaluation, evaluation]
