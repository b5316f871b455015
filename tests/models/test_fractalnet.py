"""FractalNet: counts from the paper's widths, the fractal by its definition, drop-path in it."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import fractalnet
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.train import parallel, steps
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

WIDE, NARROW = (64, 128, 256, 512, 512), (16, 32, 64, 128, 128)
# Widths of the blocks, columns, classes, and parameters in millions from the paper's table of
# ultra-deep networks for CIFAR-100.
NETWORKS = {
    "fractalnet_20": (WIDE, 3, 10, None),
    "fractalnet_20_droppath": (WIDE, 3, 10, None),
    "fractalnet_narrow20": (NARROW, 3, 100, 2.1),
    "fractalnet_narrow40": (NARROW, 4, 100, 4.8),
    "fractalnet_narrow80": (NARROW, 5, 100, 10.2),
    "fractalnet_narrow160": (NARROW, 6, 100, 21.1),
    "fractalnet_34": ((128, 256, 512, 1024), 4, 1000, None),
}
TINY = dict(widths=(4, 6), num_classes=3, input_size=(6, 6, 3))
IMAGES = jax.random.normal(jax.random.key(1), (8, 6, 6, 3))


@pytest.mark.parametrize("name", fractalnet.VARIANTS)
def test_count_by_hand(name):
    widths, columns, classes, millions = NETWORKS[name]
    convolutions = 2**columns - 1  # in a block: 1 + 2 + ... + 2^(C-1)
    count, before = 0, 3
    if name == "fractalnet_34":
        count, before = 7 * 7 * 3 * 64 + 2 * 64, 64
    for width in widths:
        count += 9 * columns * before * width  # the first of each column
        count += 9 * (convolutions - columns) * width**2
        count += 2 * convolutions * width  # norms
        before = width
    count += (before + 1) * classes
    assert PUBLISHED[name].params == count
    if millions is not None:
        assert round(count / 1e6, 1) == millions
    if name.startswith("fractalnet_20"):  # the 33.7 M of the paper's widths, not 38.6 M
        assert count == 33_724_618


def test_macs_by_hand():
    sides = (32, 16, 8, 4, 2)
    macs, before = 512 * 10, 3
    for side, width in zip(sides, WIDE):
        macs += side**2 * 9 * (3 * before * width + 4 * width**2)
        before = width
    assert cost_of("fractalnet_20").macs == macs


@pytest.mark.parametrize(("size", "sides"), [(32, (16, 8, 4, 2, 1)), (24, (12, 6, 3, 2, 1))])
def test_output_shape_of_each_block_and_unit(size, sides):
    logits, shapes = capture_shapes("fractalnet_20", size)
    before = size
    for i, (side, width) in enumerate(zip(sides, WIDE), 1):
        assert shapes[f"block{i}"] == (2, side, side, width)
        units = {path for path in shapes if path.startswith(f"block{i}/") and path.count("/") == 1}
        assert units == {
            f"block{i}/column{column}_unit{j}"
            for column, depth in ((1, 1), (2, 2), (3, 4))
            for j in range(1, depth + 1)
        }
        assert {shapes[path] for path in units} == {(2, before, before, width)}
        before = side
    assert logits.shape == (2, 10)


def test_imagenet_has_resnet34s_first_and_last_layers():
    logits, shapes = capture_shapes("fractalnet_34", 224)
    assert shapes["stem"] == (2, 56, 56, 64)
    for i, (side, width) in enumerate(((28, 128), (14, 256), (7, 512), (7, 1024)), 1):
        assert shapes[f"block{i}"] == (2, side, side, width)
    assert sum(path.startswith("block1/column4_unit") for path in shapes) // 4 == 8
    assert logits.shape == (2, 1000)


def make(columns=3, **fields):
    model = create_model("fractalnet_20", **(TINY | fields), columns=columns)
    return model, init_variables(model, jax.random.key(0))


class Fixed:
    """A sample chosen by a test: which inputs each join keeps, by (column, i)."""

    column = jnp.int32(0)

    def __init__(self, kept):
        self.kept = kept

    def keep(self, first, last, number, column, i):
        return self.kept.get((column, i), jnp.ones(last - first + 1, bool))


def test_three_columns_by_their_definition_whatever_is_dropped():
    """f_3(z) = join(f_2(f_2(z)), conv(z)) for every local sample; two joins in a row are one
    join."""
    conv = partial(layers.Conv, use_bias=False)
    unit = partial(
        fractalnet.Unit,
        width=4,
        conv=conv,
        norm=layers.make_norm("batch", train=False),
        drop=layers.make_norm("none", train=False),
    )
    block = fractalnet.Block(3, None, True, unit)
    variables = block.init(jax.random.key(0), IMAGES, None, 1)

    @jax.jit
    def apply(two, three):
        return block.apply(variables, IMAGES, Fixed({(2, 1): two, (1, 1): three}), 1)

    def run(name, x):
        return unit().apply({kind: tree[name] for kind, tree in variables.items()}, x)

    def mean(outs, kept):
        return sum(out for out, keep in zip(outs, kept) if keep) / sum(kept)

    pool = partial(layers.max_pool, window=2, stride=2)
    last = run("column1_unit1", IMAGES)
    first = [
        run("column2_unit1", IMAGES),
        run("column3_unit2", run("column3_unit1", IMAGES)),
    ]
    patterns = [[p for p in itertools.product((False, True), repeat=n) if any(p)] for n in (2, 3)]
    for two, three in itertools.product(*patterns):
        z = mean(first, two)
        outs = [last, run("column2_unit2", z), run("column3_unit4", run("column3_unit3", z))]
        expected = mean([pool(out) for out in outs], three)
        output = apply(jnp.array(two), jnp.array(three))
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    whole = block.apply(variables, IMAGES, None, 1)
    np.testing.assert_allclose(output, whole, rtol=1e-5, atol=1e-5)  # the last pattern keeps all


def train(model, variables, key, images=IMAGES):
    """Returns {"out", "batch_stats", "grads"} of a training pass."""
    rngs = {"shared": key, "dropout": jax.random.fold_in(key, 1)}

    def loss(params):
        inputs = {**variables, "params": params}
        out, new = model.apply(inputs, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.sum(out**2), (out, new["batch_stats"])

    (_, (out, stats)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return {"out": out, "batch_stats": stats, "grads": grads}


def units_that_ran(result, variables):
    before, after = (pytree.flatten(tree["batch_stats"]) for tree in (variables, result))
    moved = {path: bool((before[path] != after[path]).any()) for path in before}
    return {path.rpartition("/norm")[0] for path in moved if moved[path]}


def test_global_sampling_is_the_plain_network_of_one_column():
    def forward(model, variables, key):
        training = dict(train=True, mutable=["batch_stats"], rngs={"shared": key})
        out, new = model.apply(variables, IMAGES, **training)
        return {"out": out, **new}

    model, variables = make(2, drop_path=0.15, drop_path_global=1.0)
    run = jax.jit(partial(forward, model))
    seen = set()
    for key in jax.random.split(jax.random.key(3), 8):
        result = run(variables, key)
        ran = units_that_ran(result, variables)
        (column,) = {int(path.split("column")[1][0]) for path in ran}
        assert len(ran) == 2 * 2 ** (column - 1)  # the whole column, in both blocks
        if column not in seen:
            plain = forward(make(2, column=column)[0], variables, key)
            for path, value in pytree.flatten(plain).items():
                got = pytree.flatten(result)[path]
                np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=path)
        seen.add(column)
    assert seen == {1, 2}


def test_local_sampling_computes_what_leads_to_the_end():
    """Units off the kept paths keep their statistics and have no gradient; columns are mixed."""
    model, variables = make(drop_path=0.6, drop_path_global=0.0, widths=(4,))
    run = jax.jit(partial(train, model))
    seen = set()
    for key in jax.random.split(jax.random.key(4), 10):
        result = run(variables, key)
        ran = units_that_ran(result, variables)
        grads = pytree.flatten(result["grads"])
        for path, grad in grads.items():
            if path.endswith("/conv/kernel"):
                assert np.any(grad) == (path.removesuffix("/conv/kernel") in ran), path
        seen.add(frozenset(ran))
    assert len(seen) > 5
    assert any(len({path.split("_")[0] for path in ran}) > 1 for ran in seen)


def test_a_dropped_path_is_not_computed():
    """The compiled program has a conditional, not a product with zero."""

    def conditionals(mode):
        model, variables = make(drop_path=0.15, drop_path_mode=mode, widths=(4,))
        return str(jax.make_jaxpr(partial(train, model))(variables, jax.random.key(0))).count(
            "cond["
        )

    # Forward and backward for each of seven units. Poolings have conditionals too, by platform.
    assert conditionals("batch") - conditionals("sample") == 2 * 7


@pytest.mark.parametrize(("mode", "axis_name"), [("batch", "batch"), ("sample", None)])
def test_four_devices(mode, axis_name):
    """With the streams of train/steps.py: one sample for all devices, or one per image.

    Another step draws another sample; the same step draws the same again.
    """
    mesh = parallel.make_mesh()
    model, variables = make(2, drop_path=0.5, drop_path_mode=mode, axis_name=axis_name, widths=(4,))
    once = IMAGES[:1].repeat(8, 0)  # identical images: only samples differ

    def step(variables, batch, state):
        key, number = state
        device = jax.lax.axis_index("batch")
        shared = steps.stream_key(key, steps.Stream.SHARED, number)
        dropout = jax.random.fold_in(steps.stream_key(key, steps.Stream.DROPOUT, number), device)
        rngs = {"shared": shared, "dropout": dropout}
        training = dict(train=True, mutable=["batch_stats"], rngs=rngs)
        out, _ = model.apply(variables, batch["image"], **training)
        return jax.lax.all_gather(out, "batch", tiled=True)

    mapped = parallel.parallelize(step, mesh, donate=False)
    batch = parallel.shard_batch({"image": once}, mesh)

    def run(number):
        state = (jax.random.key(0), number)
        return np.asarray(mapped(parallel.replicate(variables, mesh), batch, state))

    outs = [run(number) for number in range(6)]
    np.testing.assert_array_equal(outs[3], run(3))
    assert any((out != outs[0]).any() for out in outs[1:])
    differ = [bool(np.abs(out - out[:1]).max() > 1e-5) for out in outs]
    assert any(differ) is (mode == "sample")


def test_evaluation_keeps_all_paths_and_needs_no_keys():
    model, variables = make(2)
    expected = model.apply(variables, IMAGES)
    for mode in ("batch", "sample"):
        fields = dict(drop_path=0.5, drop_path_mode=mode, dropout=(0.1, 0.2))
        dropping = create_model("fractalnet_20", **TINY, columns=2, **fields)
        np.testing.assert_array_equal(dropping.apply(variables, IMAGES), expected)


def test_a_column_alone_has_its_own_parameters_and_takes_the_whole_networks():
    model, variables = make()
    for column in (1, 2, 3):
        model = model.copy(column=column)
        column_variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        paths = set(pytree.flatten(column_variables["params"]))
        assert paths < set(pytree.flatten(variables["params"]))
        units = {path.split("/")[1] for path in paths if path.startswith("block")}
        assert units == {f"column{column}_unit{i}" for i in range(1, 2 ** (column - 1) + 1)}
        assert jax.eval_shape(model.apply, variables, IMAGES).shape == (8, 3)
    whole, _ = make(columns=1)
    plain, column_variables = make(columns=1, column=1)
    np.testing.assert_array_equal(
        whole.apply(column_variables, IMAGES), plain.apply(column_variables, IMAGES)
    )


def test_dropout_is_between_convolution_and_norm():
    """As in the authors' generator, with the paper's rates for each block."""
    assert create_model("fractalnet_20_droppath").dropout == (0.0, 0.1, 0.2, 0.3, 0.4)
    model, variables = make(dropout=(0.0, 0.5), columns=1)
    rngs = {"dropout": jax.random.key(2)}
    _, state = model.apply(
        variables, IMAGES, train=True, rngs=rngs, capture_intermediates=True, mutable=True
    )
    seen = state["intermediates"]
    zeros = []
    for i in (1, 2):
        parts = seen[f"block{i}"]["column1_unit1"]
        conv, dropped = (parts[name]["__call__"][0] for name in ("conv", "dropout"))
        mask = np.asarray(dropped) == 0
        zeros.append(mask.mean())
        np.testing.assert_allclose(dropped, np.where(mask, 0, conv / (1 - (i - 1) / 2)), rtol=1e-5)
        assert abs(np.mean(parts["norm"]["__call__"][0])) < 1e-3  # the norm follows the dropout
    assert zeros[0] == 0
    assert 0.4 < zeros[1] < 0.6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(column=4), "a column from 1 to 3, got 4"),
        (dict(column=0), "column must be a whole number above 0, got 0"),
        (dict(dropout=(0.1,)), "each of 2 blocks, or no rates, got"),
        (dict(drop_path_mode="image"), "unknown drop_path_mode 'image'"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=message):
        init_variables(
            create_model("fractalnet_20", **(TINY | fields)), jax.random.key(0), IMAGES.shape
        )


def test_training_without_the_shared_stream():
    model, variables = make(drop_path=0.15)
    with pytest.raises(UserError, match=r'rngs=\{"shared": key\}'):
        model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])


def test_papers_initial_values():
    params = init_variables(
        create_model("fractalnet_20", widths=(32, 48), columns=2, init="paper"), jax.random.key(0)
    )["params"]
    for path, leaf in pytree.flatten(params).items():
        if path.endswith("kernel"):  # uniform, of variance 1 / fan_in
            bound = np.sqrt(3 / np.prod(leaf.shape[:-1]))
            assert 0.95 * bound < np.abs(leaf).max() <= bound, path


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_bfloat16_leaves_logits_and_parameters_in_float32(mode):
    model, variables = make(drop_path=0.3, drop_path_mode=mode, dtype="bfloat16")

    def run(key):
        return model.apply(
            variables,
            IMAGES,
            train=True,
            mutable=["batch_stats"],
            rngs={"shared": key, "dropout": key},
        )

    logits, _ = jax.eval_shape(run, jax.random.key(0))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
