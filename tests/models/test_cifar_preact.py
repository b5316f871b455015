"""Pre-activation ResNets for CIFAR: orders by figure 4, counts by hand."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import lax

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.cifar_preact import ORDERS, Unit
from flax_cnns.models.registry import create_model, init_variables
from tests.models.counting import count_params
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of, variable_shapes

BASIC = dict(windows=(3, 3), expansion=1)
BOTTLENECK = dict(windows=(1, 3, 1), expansion=4)
TINY = dict(depths=(2, 1), widths=(4, 8), num_classes=3, input_size=(8, 8, 3))
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


def test_count_of_110_layers_by_hand():
    """ResNet-110 of He et al. 2015 plus two projections. The norms are in other places, but equally
    many.
    """
    convs = 3 * 3 * (3 * 16 + 36 * 16 * 16)
    convs += 3 * 3 * (16 * 32 + 35 * 32 * 32) + 3 * 3 * (32 * 64 + 35 * 64 * 64)
    norms = 2 * (36 * 16 + (16 + 35 * 32) + (32 + 35 * 64) + 64)
    head = 64 * 10 + 10
    assert convs + norms + head == 1_727_962  # ResNet-110's, option A
    assert convs + norms + head + 16 * 32 + 32 * 64 == PUBLISHED["cifar_preact110"].params


@pytest.mark.parametrize(("name", "printed"), [("164", 1.7e6), ("1001", 10.2e6)])
def test_count_of_bottlenecks_by_hand(name, printed):
    n = (int(name) - 2) // 9
    count = 3 * 3 * 3 * 16 + 2 * 256 + 256 * 10 + 10
    channels = 16
    for width in (16, 32, 64):
        count += channels * 4 * width + (channels + (n - 1) * 4 * width) * (width + 2)
        count += n * (9 * width * width + width * 4 * width + 4 * width)
        channels = 4 * width
    assert count == PUBLISHED[f"cifar_preact{name}"].params
    assert count == pytest.approx(printed, rel=0.02)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_differ_in_the_norms_of_projections_only(order):
    """These norms have 2 (32 + 64) parameters in 110 layers, 2 (64 + 128 + 256) in 164."""
    norms = order in ("original", "relu_before_add", "relu_only_preact")
    for name, more in (("cifar_preact110", 192), ("cifar_preact164", 896)):
        counted = count_params(create_model(name, order=order))
        assert counted == PUBLISHED[name].params + more * norms


def test_the_original_order_with_option_a_is_cifar_resnet110():
    """The parameters have the same names and shapes; compared at depths (2, 2, 2)."""
    depths = create_model("cifar_preact110").depths
    assert depths == create_model("cifar_resnet110").depths
    fields = dict(depths=(2, 2, 2))
    shapes = variable_shapes("cifar_preact110", order="original", shortcut="A", **fields)
    assert shapes == variable_shapes("cifar_resnet110", **fields)


def test_the_original_order_with_option_a_computes_what_cifar_resnet_computes():
    fields = TINY | dict(depths=(2, 2))
    resnet = create_model("cifar_resnet20", **fields)
    model = create_model("cifar_preact110", **fields, order="original", shortcut="A")
    variables = init_variables(resnet, jax.random.key(0))
    got, wanted = jax.jit(lambda v: (model.apply(v, IMAGES), resnet.apply(v, IMAGES)))(variables)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


# ---- one unit, written out along its column of figure 4


def conv(v, name, x, stride=1):
    kernel = v["params"][name]["kernel"]
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def bn(v, name, x):
    p, s = v["params"][name], v["batch_stats"][name]
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def relu(x):
    return np.maximum(x, 0)


def basic(order, v, x, first, stride):
    """Two convolutions. `first`: the activated input feeds shortcut and branch."""
    c1, c2 = partial(conv, v, "conv1", stride=stride), partial(conv, v, "conv2")
    n1, n2 = partial(bn, v, "norm1"), partial(bn, v, "norm2")
    project = partial(conv, v, "projection", stride=stride)
    projects = "projection" in v["params"]

    def normed(x):
        return bn(v, "projection_norm", project(x)) if projects else x

    def bare(x):
        return project(x) if projects else x

    match order:
        case "original":
            return relu(normed(x) + n2(c2(relu(n1(c1(x))))))
        case "bn_after_add":
            return relu(n2(bare(x) + c2(relu(n1(c1(x))))))
        case "relu_before_add":
            return normed(x) + relu(n2(c2(relu(n1(c1(x))))))
        case "relu_only_preact":
            a = relu(x)
            return normed(a if first else x) + n2(c2(relu(n1(c1(a)))))
        case "full_preact":
            a = relu(n1(x))
            return bare(a if first else x) + c2(relu(n2(c1(a))))


def bottleneck(order, v, x, first, stride):
    c1 = partial(conv, v, "conv1", stride=stride)
    c2, c3 = partial(conv, v, "conv2"), partial(conv, v, "conv3")
    n1, n2, n3 = (partial(bn, v, f"norm{i}") for i in (1, 2, 3))
    project = partial(conv, v, "projection", stride=stride)
    projects = "projection" in v["params"]

    def normed(x):
        return bn(v, "projection_norm", project(x)) if projects else x

    def bare(x):
        return project(x) if projects else x

    match order:
        case "original":
            return relu(normed(x) + n3(c3(relu(n2(c2(relu(n1(c1(x)))))))))
        case "bn_after_add":
            return relu(n3(bare(x) + c3(relu(n2(c2(relu(n1(c1(x)))))))))
        case "relu_before_add":
            return normed(x) + relu(n3(c3(relu(n2(c2(relu(n1(c1(x)))))))))
        case "relu_only_preact":
            a = relu(x)
            return normed(a if first else x) + n3(c3(relu(n2(c2(relu(n1(c1(a))))))))
        case "full_preact":
            a = relu(n1(x))
            return bare(a if first else x) + c3(relu(n3(c2(relu(n2(c1(a)))))))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("straight", "kind", "channels"), [(basic, BASIC, 3), (bottleneck, BOTTLENECK, 12)]
)
def test_a_unit_is_its_column_of_figure_4(order, straight, kind, channels):
    random = np.random.RandomState(0)
    x = random.randn(2, 5, 5, channels).astype(np.float32)
    norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
    conv = partial(layers.Conv, use_bias=False)
    # A later unit; the first of the network, which keeps the shape; the first of a later stage.
    for width, stride in ((3, None), (3, 1), (6, 2)):
        unit = Unit(width, **kind, order=ORDERS[order], conv=conv, norm=norm, stride=stride)
        shapes = jax.eval_shape(unit.init, jax.random.key(0), x)
        variables = jax.tree.map(
            lambda a: (
                random.uniform(0.2, 1, a.shape).astype(np.float32) - (0.6 if a.ndim == 4 else 0)
            ),
            shapes,
        )
        wanted = straight(order, variables, x, stride is not None, stride or 1)
        got = unit.apply(variables, x)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("order", "stem", "end"),
    [
        ("original", True, False),
        ("bn_after_add", True, False),
        ("relu_before_add", True, False),
        ("relu_only_preact", True, False),
        ("full_preact", False, True),
    ],
)
def test_where_a_network_has_norms_outside_of_units(order, stem, end):
    model = create_model("cifar_preact110", **TINY, order=order)
    params = jax.eval_shape(partial(init_variables, model), jax.random.key(0))["params"]
    assert ("norm" in params["stem"], "norm" in params) == (stem, end)


@pytest.mark.parametrize("order", [o for o in ORDERS if o != "relu_before_add"])
def test_what_is_pooled_has_passed_a_relu(order):
    """Leaves out "relu_before_add", in which projections do not end in a ReLU."""
    model = create_model("cifar_preact110", **TINY | dict(num_classes=None), order=order)
    variables = init_variables(model, jax.random.key(0))
    assert (jax.jit(model.apply)(variables, IMAGES) >= 0).all()


@pytest.mark.parametrize("size", [32, 29])
def test_output_shape_of_each_stage(size):
    half, quarter = -(-size // 2), -(-size // 4)
    for name, expansion in (("cifar_preact110", 1), ("cifar_preact164", 4)):
        logits, shapes = capture_shapes(name, size, depths=(2, 2, 2))
        assert shapes["stem"] == (2, size, size, 16)
        for i, side in enumerate((size, half, quarter)):
            assert shapes[f"stage{i + 1}"] == (2, side, side, expansion * 16 * 2**i)
        assert shapes["stage2/block1/conv1"] == (2, half, half, 32)  # conv1 has the stride
        assert logits.shape == (2, 10)
    assert "stage1/block2/projection" not in shapes


def test_macs_of_164_layers():
    """A unit's first convolution has the stride."""
    macs = 3 * 9 * 16 * 32**2 + 256 * 10
    channels = 16
    for width, side in ((16, 32), (32, 16), (64, 8)):
        macs += side**2 * (channels + 17 * 4 * width) * width  # first 1x1
        macs += side**2 * (18 * (9 + 4) * width * width + channels * 4 * width)
        channels = 4 * width
    assert cost_of("cifar_preact164").macs == macs == 244_500_992


@pytest.mark.parametrize("order", ORDERS)
def test_options_keep_the_parameters(order):
    """bfloat16 also leaves logits and parameters in float32."""

    def run(**fields):
        model = create_model("cifar_preact164", **TINY | dict(depths=(3, 1)), order=order, **fields)

        def init_and_train(key):
            variables = model.init(key, IMAGES)
            rngs = {"shared": key, "dropout": key}
            training = dict(train=True, mutable=["batch_stats"], rngs=rngs)
            return variables, model.apply(variables, IMAGES, **training)

        return jax.eval_shape(init_and_train, jax.random.key(0))

    plain = run()
    assert run(drop_path=0.5, scan=True, remat=True, dtype="bfloat16") == plain
    assert run(drop_path=0.5, drop_path_mode="sample") == plain


def test_a_dropped_unit_leaves_its_statistics():
    model = create_model(
        "cifar_preact110", **TINY | dict(depths=(2,), widths=(4,)), drop_path=0.9999
    )
    variables = init_variables(model, jax.random.key(0))
    training = dict(train=True, mutable=["batch_stats"], rngs={"shared": jax.random.key(1)})
    after = jax.jit(lambda v: model.apply(v, IMAGES, **training)[1]["batch_stats"])(variables)
    before = pytree.flatten(variables["batch_stats"])
    moved = {path for path, leaf in pytree.flatten(after).items() if (leaf != before[path]).all()}
    assert {"stage1/block1/norm1/mean", "norm/mean"} <= moved
    assert not any("block2" in path for path in moved)


def test_errors():
    for fields, message in (
        (dict(order="full_preactivation"), "unknown order .*did you mean 'full_preact'"),
        (dict(shortcut="none"), 'got "none": a plain net has no residual sum'),
        (dict(shortcut="E"), "unknown shortcut 'E'"),
    ):
        model = create_model("cifar_preact110", **TINY, **fields)
        with pytest.raises(UserError, match=message):
            jax.eval_shape(partial(init_variables, model), jax.random.key(0))
