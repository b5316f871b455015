"""LeNet-5 in today's form and of 1998: counts by hand, layers by definition, image sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import lenet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import cost_of


@pytest.fixture(scope="module")
def variables():
    return init_variables(create_model("lenet5"), jax.random.key(0))


def test_count_by_hand():
    c1, c3, c5 = 6 * (5 * 5 + 1), 16 * (6 * 5 * 5 + 1), 120 * (16 * 5 * 5 + 1)
    f6, head = 84 * (120 + 1), 10 * (84 + 1)
    assert (c1, c3, c5, f6, head) == (156, 2416, 48120, 10164, 850)
    assert PUBLISHED["lenet5"].params == c1 + c3 + c5 + f6 + head


def test_parameters_bear_the_papers_names(variables):
    shapes = {path: leaf.shape for path, leaf in pytree.flatten(variables["params"]).items()}
    kernels = {path: shape for path, shape in shapes.items() if path.endswith("kernel")}
    assert kernels == {
        "c1/kernel": (5, 5, 1, 6),
        "c3/kernel": (5, 5, 6, 16),
        "c5/kernel": (5, 5, 16, 120),
        "f6/kernel": (120, 84),
        "head/kernel": (84, 10),
    }
    assert variables["batch_stats"] == {}


def test_forward_is_the_definition(variables):
    params = jax.tree.map(np.asarray, variables["params"])
    images = np.random.RandomState(0).randn(3, 32, 32, 1).astype(np.float32)

    def conv(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
        y = np.einsum("nhwcij,ijco->nhwo", windows, params[name]["kernel"])
        return np.tanh(y + params[name]["bias"])

    def pool(x):
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))

    x = conv(pool(conv(pool(conv(images, "c1")), "c3")), "c5").reshape(3, 120)
    x = np.tanh(x @ params["f6"]["kernel"] + params["f6"]["bias"])
    features = create_model("lenet5", num_classes=None).apply(variables, images)
    np.testing.assert_allclose(features, x, atol=1e-5)
    logits = create_model("lenet5").apply(variables, images)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_outputs_named_s2_and_s4_are_means_after_tanh(variables):
    images = np.random.RandomState(0).randn(3, 32, 32, 1).astype(np.float32)
    capture = dict(capture_intermediates=True, mutable="intermediates")
    _, state = create_model("lenet5").apply(variables, images, **capture)
    seen = state["intermediates"]
    for before, after, shape in (("c1", "s2", (14, 14, 6)), ("c3", "s4", (5, 5, 16))):
        maps = np.tanh(seen[before]["__call__"][0])
        means = maps.reshape(3, shape[0], 2, shape[1], 2, shape[2]).mean((2, 4))
        np.testing.assert_allclose(seen[after]["__call__"][0], means, atol=1e-6)


def test_sizes_and_channels(variables):
    model = create_model("lenet5")
    larger = jax.eval_shape(lambda: model.apply(variables, jnp.zeros((2, 45, 64, 1))))
    assert larger.shape == (2, 10)
    with pytest.raises(UserError, match="31x32 are too small: the smallest is 32x32"):
        model.apply(variables, jnp.zeros((1, 31, 32, 1)))
    with pytest.raises(UserError, match="expected images of 1 channels, got 3"):
        model.apply(variables, jnp.zeros((1, 32, 32, 3)))


def test_computes_in_bfloat16(variables):
    model = create_model("lenet5", dtype="bfloat16")
    images = np.random.RandomState(0).randn(3, 32, 32, 1).astype(np.float32)
    logits = model.apply(variables, images)
    assert logits.dtype == jnp.float32
    exact = create_model("lenet5").apply(variables, images)
    assert 0 < np.abs(logits - exact).max() < 0.05


# The network of 1998. Table I as printed: a row per map of S2, a column per map of C3.
PRINTED = """
X...XXX..XXXX.XX
XX...XXX..XXXX.X
XXX...XXX..X.XXX
.XXX..XXXX..X.XX
..XXX..XXXX.XX.X
...XXX..XXXX.XXX
"""
CONNECTED = np.array([[mark == "X" for mark in line] for line in PRINTED.split()])  # [6 16]


def squash(a):
    return 1.7159 * np.tanh(2 / 3 * a)


@pytest.fixture(scope="module")
def original():
    """Returns variables, images, and the output of every module."""
    model = create_model("lenet5_original", init="paper")
    variables = init_variables(model, jax.random.key(0))
    images = np.random.RandomState(0).uniform(-0.1, 1.175, (3, 32, 32, 1)).astype(np.float32)
    run = jax.jit(
        lambda v: model.apply(v, images, capture_intermediates=True, mutable="intermediates")
    )
    logits, state = jax.tree.map(np.asarray, run(variables))
    flat = pytree.flatten(state["intermediates"])
    seen = {path.removesuffix("/__call__/0"): leaf for path, leaf in flat.items()}
    return variables, images, seen | {"logits": logits}


def test_count_of_1998_by_hand():
    """Section II-B gives these numbers of trainable parameters."""
    c1, s2, c3, s4 = 6 * (5 * 5 + 1), 6 * 2, int(CONNECTED.sum()) * 5 * 5 + 16, 16 * 2
    c5, f6 = 120 * (16 * 5 * 5 + 1), 84 * (120 + 1)
    assert (c1, s2, c3, s4, c5, f6) == (156, 12, 1516, 32, 48120, 10164)
    assert PUBLISHED["lenet5_original"].params == c1 + s2 + c3 + s4 + c5 + f6


def test_connections_of_1998():
    """The paper counts, with biases, 122,304 connections in C1, 151,600 in C3 and 48,120 in C5."""
    macs = {layer.path: layer.macs for layer in cost_of("lenet5_original").layers}
    assert macs["c1/sums"] + 28 * 28 * 6 == 122_304
    c3 = macs["c3/three"] + macs["c3/four"] + macs["c3/six"]
    assert c3 + 10 * 10 * 16 == 151_600
    assert macs["c5/sums"] + 120 == 48_120


def test_shapes_of_1998(original):
    _, _, seen = original
    shapes = {name: seen[name].shape[1:] for name in ("c1", "s2", "c3", "s4", "c5", "f6", "head")}
    assert shapes == {
        "c1": (28, 28, 6),
        "s2": (14, 14, 6),
        "c3": (10, 10, 16),
        "s4": (5, 5, 16),
        "c5": (1, 1, 120),
        "f6": (84,),
        "head": (10,),
    }


def test_table_1(original):
    """Changing a map of S2 changes only the maps of C3 that the table connects with it."""
    variables, _, seen = original
    module = lenet.SparseC3(lambda n, **given: lenet.layers.Conv(n, (5, 5), padding=0, **given))
    given = {"params": variables["params"]["c3"]}
    before = np.asarray(module.apply(given, seen["s2"]))
    np.testing.assert_allclose(before, seen["c3"], atol=1e-6)
    for i in range(6):
        changed = seen["s2"].copy()
        changed[..., i] += 1
        differs = np.any(np.asarray(module.apply(given, changed)) != before, axis=(0, 1, 2))
        np.testing.assert_array_equal(differs, CONNECTED[i])


def test_subsampling_by_its_definition(original):
    variables, _, seen = original
    s2 = variables["params"]["s2"]
    blocks = seen["c1"].reshape(3, 14, 2, 14, 2, 6).sum((2, 4))
    np.testing.assert_allclose(
        seen["s2"], squash(s2["coefficient"] * blocks + s2["bias"]), atol=1e-5
    )
    assert s2["coefficient"].shape == s2["bias"].shape == (6,)


def test_units_are_squashed(original):
    _, _, seen = original
    for name in ("c1", "c5", "f6"):
        np.testing.assert_allclose(seen[name], squash(seen[f"{name}/sums"]), atol=1e-6)
    assert lenet.squash(jnp.array([-1.0, 1.0])) == pytest.approx([-1, 1], abs=1e-4)


def test_output_is_the_distance_to_a_bitmap(original):
    variables, images, seen = original
    codes = lenet.make_rbf_codes(10)
    assert codes.shape == (10, 84)
    assert set(codes.flat) == {-1.0, 1.0}
    distances = [[np.sum((f6 - code) ** 2) for code in codes] for f6 in seen["f6"]]
    np.testing.assert_allclose(seen["logits"], -np.array(distances), rtol=1e-5)
    assert "head" not in variables["params"]  # fixed, and no parameters
    features = create_model("lenet5_original", num_classes=None).apply(variables, images)
    np.testing.assert_allclose(features, seen["f6"], atol=1e-6)
    seven = ["".join(" #"[int(v > 0)] for v in row) for row in codes[7].reshape(12, 7)]
    assert seven[:3] == ["#######", "     ##", "     ##"]


def test_codes_of_other_numbers_of_classes():
    digits, many = lenet.make_rbf_codes(10), lenet.make_rbf_codes(96)
    np.testing.assert_array_equal(lenet.make_rbf_codes(4), digits[:4])
    np.testing.assert_array_equal(many[:10], digits)
    np.testing.assert_array_equal(many[:50], lenet.make_rbf_codes(50))
    assert set(many.flat) == {-1.0, 1.0}
    differing = (many[:, None] != many).sum(-1) + 84 * np.eye(96, dtype=int)
    assert differing.min() >= 5  # pixels that differ between any two codes
    model = create_model("lenet5_original", num_classes=12)
    assert init_shapes(model) == init_shapes(create_model("lenet5_original"))


def init_shapes(model):
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))


def test_initial_values_of_1998(original):
    """Appendix A: uniform within 2.4 / (inputs of the unit)."""
    params = pytree.flatten(original[0]["params"])
    inputs = {
        "c1/sums/kernel": 5 * 5,
        "s2/coefficient": 4,
        "c3/three/kernel": 3 * 5 * 5,
        "c3/four/kernel": 4 * 5 * 5,
        "c3/six/kernel": 6 * 5 * 5,
        "s4/coefficient": 4,
        "c5/sums/kernel": 16 * 5 * 5,
        "f6/sums/kernel": 120,
    }
    assert set(inputs) == {path for path in params if not path.endswith("bias")}
    for path, leaf in params.items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
            continue
        limit = 2.4 / inputs[path]
        assert np.abs(leaf).max() <= limit, path
        if leaf.size > 100:
            assert np.abs(leaf).max() > 0.98 * limit, path
            assert np.std(leaf) == pytest.approx(limit / np.sqrt(3), rel=0.1), path
    plain = init_variables(create_model("lenet5_original"), jax.random.key(0))["params"]
    np.testing.assert_array_equal(plain["s2"]["coefficient"], 0.25)  # as in a mean


def test_sizes_of_1998():
    model = create_model("lenet5_original", dtype="bfloat16")
    run = lambda *size: jax.eval_shape(  # noqa: E731
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, *size)))[0]
    )
    larger = run(45, 64, 1)
    assert larger.shape == (2, 10)
    assert larger.dtype == jnp.float32
    with pytest.raises(UserError, match="31x32 are too small: the smallest is 32x32"):
        run(31, 32, 1)
    with pytest.raises(UserError, match="expected images of 1 channels, got 3"):
        run(32, 32, 3)
