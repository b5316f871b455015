"""CIFAR ResNets: counts by hand, shapes, shortcuts and stochastic depth in closed form."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED

TINY = dict(depths=(1, 1, 1), widths=(4, 6, 8), input_size=(8, 8, 3))
IMAGES = np.random.RandomState(0).randn(8, 8, 8, 3).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return init_variables(create_model("cifar_resnet20", **TINY), jax.random.key(0))


@pytest.mark.parametrize(
    ("layers", "published"),
    [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6), (1202, 19.4e6)],
)
def test_count_by_hand(layers, published):
    """Section 4.2: a 3x3 on 16 channels, 6n 3x3 on 16, 32 and 64, a norm after each, the head."""
    n = (layers - 2) // 6
    convs = 3 * 3 * (3 * 16 + 2 * n * 16 * 16)
    convs += 3 * 3 * (16 * 32 + (2 * n - 1) * 32 * 32)
    convs += 3 * 3 * (32 * 64 + (2 * n - 1) * 64 * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    head = 64 * 10 + 10
    count = PUBLISHED[f"cifar_resnet{layers}"].params
    assert count == convs + norms + head
    assert count == pytest.approx(published, rel=0.02)  # table 6, rounded
    if layers == 110:
        projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # 1x1 with norms, where the width changes
        assert PUBLISHED["cifar_resnet110_optB"].params == count + projections
        assert PUBLISHED["cifar_resnet110_c100"].params == count + 90 * (64 + 1)


def test_stochastic_depth_of_1202_layers():
    twin = create_model("cifar_resnet1202", shortcut="A-mean", drop_path=0.5)
    assert create_model("cifar_resnet1202_sd") == twin


@pytest.mark.parametrize("size", [32, 29])
def test_output_shape_of_each_stage(size):
    model = create_model("cifar_resnet20")

    def run():
        images = jnp.zeros((2, size, size, 3))
        variables = model.init(jax.random.key(0), images)
        return model.apply(variables, images, capture_intermediates=True, mutable="intermediates")

    logits, state = jax.eval_shape(run)
    seen = state["intermediates"]
    half, quarter = -(-size // 2), -(-size // 4)
    for name, expected in {
        "stem": (2, size, size, 16),
        "stage1": (2, size, size, 16),
        "stage2": (2, half, half, 32),
        "stage3": (2, quarter, quarter, 64),
    }.items():
        assert seen[name]["__call__"][0].shape == expected
    assert seen["stage2"]["block3"]["conv1"]["__call__"][0].shape == (2, half, half, 32)
    assert logits.shape == (2, 10)


def test_paths(variables):
    flat = pytree.flatten(variables)
    assert flat["params/stage2/block1/conv1/kernel"].shape == (3, 3, 4, 6)
    assert flat["params/stage3/block1/norm2/scale"].shape == (8,)
    assert flat["params/stem/conv/kernel"].shape == (3, 3, 3, 4)
    assert flat["batch_stats/stem/norm/mean"].shape == (4,)
    assert flat["params/head/kernel"].shape == (8, 10)


def test_option_a_takes_every_second_pixel_and_adds_zeros():
    """With every branch at zero, only the shortcuts remain: a closed form."""
    model = create_model("cifar_resnet20", **TINY, zero_init=True, num_classes=None)
    variables = init_variables(model, jax.random.key(0))
    features, state = jax.jit(
        lambda v: model.apply(
            v, IMAGES, capture_intermediates=lambda m, _: m.name == "stem", mutable="intermediates"
        )
    )(variables)
    stem = np.asarray(state["intermediates"]["stem"]["__call__"][0])
    assert features.shape == (8, 8)
    np.testing.assert_allclose(features[:, :4], stem[:, ::4, ::4].mean((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(features[:, 4:], 0)


def test_training_moves_every_statistic_and_evaluation_none(variables):
    model = create_model("cifar_resnet20", **TINY)

    @jax.jit
    def apply(variables):
        _, trained = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
        _, evaluated = model.apply(variables, IMAGES, train=False, mutable=["batch_stats"])
        return trained["batch_stats"], evaluated["batch_stats"]

    trained, evaluated = (pytree.flatten(tree) for tree in apply(variables))
    for path, before in pytree.flatten(variables["batch_stats"]).items():
        assert (trained[path] != before).all(), path
        np.testing.assert_array_equal(evaluated[path], before)


def test_synchronized_statistics_are_those_of_the_whole_batch(variables):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(axis_name):
        model = create_model("cifar_resnet20", **TINY, axis_name=axis_name)

        def run(images):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

        return run

    def on_four(axis_name):
        run = step(axis_name)

        def averaged(images):
            logits, state = run(images)
            return logits, jax.lax.pmean(state["batch_stats"], "batch")

        specs = dict(in_specs=P("batch"), out_specs=(P("batch"), P()), check_vma=False)
        return jax.jit(jax.shard_map(averaged, mesh=mesh, **specs))(IMAGES)

    logits, state = jax.jit(step(None))(IMAGES)
    sync_logits, sync_state = on_four("batch")
    np.testing.assert_allclose(sync_logits, logits, atol=2e-5)
    for path, leaf in pytree.flatten(state["batch_stats"]).items():
        np.testing.assert_allclose(pytree.flatten(sync_state)[path], leaf, atol=1e-6, err_msg=path)
    local_logits, _ = on_four(None)  # each device normalizes its own two images
    assert np.abs(local_logits - logits).max() > 0.01


def test_axis_name_does_not_touch_initialization(variables):
    model = create_model("cifar_resnet20", **TINY, axis_name="batch")
    jax.tree.map(np.testing.assert_array_equal, init_variables(model, jax.random.key(0)), variables)


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "resnet50"])
def test_scanned_networks_take_stacked_variables(name):
    model = create_model(name, scan=True)
    if name != "cifar_resnet20":
        model = model.clone(depths=(1, 4))
    images = jnp.zeros((2, 64, 64, 3))
    variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    stacked = pytree.stack_blocks(variables)
    assert any("block2-" in path for path in pytree.flatten(stacked))
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    logits, state = jax.eval_shape(apply, stacked, images)
    expected, named = jax.eval_shape(apply, variables, images)
    assert logits == expected
    assert state == pytree.stack_blocks(named)
    assert named["batch_stats"] == variables["batch_stats"]


@pytest.mark.slow  # compiles with all optimizations, as users do
def test_remat_saves_memory():
    """Checks a scanned network on a CPU; layers/stage.py has numbers of a deep network."""

    def temporaries(remat):
        model = create_model(
            "cifar_resnet20", **(TINY | dict(depths=(9,), widths=(4,))), scan=True, remat=remat
        )
        variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
        loss = lambda v: model.apply(v, IMAGES, train=True, mutable=["batch_stats"])[0].sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(pytree.stack_blocks(variables)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < 0.7 * temporaries(remat=False)


def test_bfloat16_computes_and_leaves_logits_and_parameters_in_float32(variables):
    model = create_model("cifar_resnet20", **TINY, dtype="bfloat16")

    def run(key):
        fresh = model.init(key, IMAGES)
        return fresh, model.apply(
            fresh,
            IMAGES,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )

    fresh, (logits, state) = jax.eval_shape(run, jax.random.key(0))
    assert logits.dtype == jnp.float32
    assert state["intermediates"]["stage2"]["__call__"][0].dtype == jnp.bfloat16
    kept = jax.tree.leaves((fresh, state["batch_stats"]))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}


def test_group_norm_keeps_no_statistics():
    model = create_model("cifar_resnet20", norm="group")
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    assert shapes["batch_stats"] == {}


def test_options_b_and_c_project_where_the_shape_changes_and_everywhere():
    projections = {}
    for option in "ABC":
        model = create_model("cifar_resnet20", **TINY | dict(depths=(2, 2, 2)), shortcut=option)
        shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
        paths = [path for path in pytree.flatten(shapes) if path.endswith("projection/kernel")]
        projections[option] = [path.split("/")[1:3] for path in paths]
    wider = [["stage2", "block1"], ["stage3", "block1"]]
    every = [[f"stage{i}", f"block{j}"] for i in (1, 2, 3) for j in (1, 2)]
    assert projections == {"A": [], "B": wider, "C": every}


def test_a_plain_network_has_no_shortcut():
    """With every branch at zero, the output is zero."""
    model = create_model("cifar_plain20", **TINY, zero_init=True, num_classes=None)
    variables = init_variables(model, jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, IMAGES), 0)


@pytest.mark.parametrize("field", ["drop_path", "shake_drop"])
def test_evaluation_counts_each_branch_by_its_survival(variables, field):
    """Scales by p_l = 1 - l/L (1 - p_L).

    The output of a branch's last norm is linear in the norm's scale and bias, so multiplying these
    is the same as multiplying the branch.
    """
    model = create_model("cifar_resnet20", **TINY, **{field: 0.5})
    fresh = init_variables(model, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, fresh, variables)
    rng, flat = np.random.RandomState(1), pytree.flatten(variables)
    for path in flat:
        if path.endswith(("norm2/scale", "norm2/bias")):
            flat[path] = rng.uniform(0.5, 1.5, flat[path].shape).astype(np.float32)
    redrawn = pytree.unflatten(flat)
    for i, survival in enumerate((5 / 6, 4 / 6, 3 / 6), 1):
        for name in ("scale", "bias"):
            path = f"params/stage{i}/block1/norm2/{name}"
            flat[path] = survival * flat[path]
    full = create_model("cifar_resnet20", **TINY)
    expected = jax.jit(full.apply)(pytree.unflatten(flat), IMAGES)
    logits = jax.jit(model.apply)(redrawn, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(logits - jax.jit(full.apply)(redrawn, IMAGES)).max() > 0.01


@pytest.mark.slow
def test_a_scanned_step_with_disturbed_branches_is_the_unrolled_one():
    """Compares loss, gradients and statistics; the key keeps some branches and drops others."""
    fields = dict(TINY, depths=(4,), widths=(4,), drop_path=0.8, shake_drop=0.5)
    rngs = {"shared": jax.random.key(1), "dropout": jax.random.key(2)}

    def step(variables, **compilation):
        model = create_model("cifar_resnet20", **fields, **compilation)

        def loss_fn(params):
            inputs = {**variables, "params": params}
            logits, new = model.apply(
                inputs, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs
            )
            return jnp.sum(logits**2), new["batch_stats"]

        return jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])

    variables = init_variables(create_model("cifar_resnet20", **fields), jax.random.key(0))
    stacked = pytree.stack_blocks(variables)
    (loss, stats), grads = jax.jit(step)(variables)
    (scan_loss, scan_stats), scan_grads = jax.jit(partial(step, scan=True, remat=True))(stacked)
    np.testing.assert_allclose(scan_loss, loss, rtol=1e-4)
    for expected, scanned in ((stats, scan_stats), (grads, scan_grads)):
        scanned = pytree.flatten(pytree.unstack_blocks(scanned))
        for path, leaf in pytree.flatten(expected).items():
            np.testing.assert_allclose(scanned[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)
    moved = [np.any(stats["stage1"][f"block{i}"]["norm1"]["mean"]) for i in (1, 2, 3, 4)]
    assert any(moved)
    assert not all(moved)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("cifar_resnet20", dict(widths=(4, 6)), "a depth and a width for each stage"),
        (
            "cifar_resnet20",
            dict(widths=(8, 4, 8)),
            "shortcut A cannot drop channels: the input has 8",
        ),
        ("cifar_resnet20", dict(shortcut="E"), "unknown shortcut 'E'"),
        ("cifar_plain20", dict(drop_path=0.5), "drop_path needs a shortcut"),
        ("cifar_plain20", dict(shake_drop=0.5), "shake_drop needs a shortcut"),
        (
            "cifar_resnet20",
            dict(drop_path=1.0),
            "must be a number from 0 to below 1, got 1.0",
        ),
    ],
)
def test_fields_that_do_not_go_together(name, fields, message):
    with pytest.raises(UserError, match=message):
        init_variables(create_model(name, **TINY | fields), jax.random.key(0))
