"""NASNet-A: published counts and MACs, shapes of stages, and what cells and fields do."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.layers import cell as cells
from flax_cnns.models import nasnet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_modules, capture_shapes

TINY = dict(depths=(1, 1), width=8, stem_width=8, num_classes=3)
NO_OPTIMIZATION = {"xla_backend_optimization_level": 0}


def shapes_of(name: str, **fields) -> dict:
    model = create_model(name, **{"kernel_init": nn.initializers.zeros} | fields)  # quick
    return pytree.flatten(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))


def squeezed(c: int, width: int) -> int:
    return c * width + 2 * width  # and norm


def separable(k: int, c: int, width: int) -> int:
    return k * k * c + squeezed(c, width) + k * k * width + squeezed(width, width)


def of_cifar(n: int, f: int) -> int:
    """Counts parameters by figure 4: n cells per stage, f channels at first, no auxiliary head.

    The first cell takes the stem's 3f channels for both inputs and does not squeeze one of them.
    """
    count = 9 * 3 * 3 * f + 2 * 3 * f  # stem
    x = p = 3 * f
    for stage, width in enumerate((f, 2 * f, 4 * f)):
        if stage:
            count += squeezed(x, width) + squeezed(p, width)
            count += sum(separable(k, width, width) for k in (5, 7, 7, 5, 3))
            x, p = 4 * width, x
        for i in range(n):
            count += squeezed(x, width)
            count += separable(5, width, width) + separable(3, width, width)  # of x
            first = stage == i == 0
            c = p if first else width
            # Without a squeeze, three means or identities and the part in the output are projected.
            count += squeezed(p, width) * (4 if first else 1)
            count += sum(separable(k, c, width) for k in (3, 5, 3))  # of p
            x, p = 6 * width, x
    return count + 24 * f * 10 + 10


def of_head(channels: int, side: int, classes: int) -> int:
    return squeezed(channels, 128) + squeezed(side**2 * 128, 768) + 768 * classes + classes


@pytest.mark.parametrize(
    ("name", "without", "head"),
    [
        # After the second stage: the 5x5/3 mean reduces 14 and 16 pixels to 4.
        ("nasnet_a_mobile", PUBLISHED["keras_nasnetmobile"].params, of_head(12 * 44, 4, 1000)),
        ("nasnet_a_6_768", of_cifar(6, 32), of_head(12 * 32, 4, 10)),
        ("nasnet_a_7_2304", of_cifar(7, 96), of_head(12 * 96, 4, 10)),
    ],
)
def test_count_by_hand_and_the_heads(name, without, head):
    assert PUBLISHED[name].params == without + head


def test_large_networks_differ_only_in_the_head_and_in_fields_without_parameters():
    free = dict(momentum=0.9, dropout=0.0, drop_path=0.0, zero_pools=("mean",))
    for name in ("nasnet_a_large", "keras_nasnetlarge"):
        assert create_model(name, aux=None, **free) == create_model("nasnetalarge")
    assert create_model("nasnet_a_large").aux == 6


def test_table_1():
    assert of_cifar(6, 32) == pytest.approx(3.3e6, rel=0.02)
    # The 27.6 M of the other row fit neither seven cells nor six: see the module's docstring.
    assert (of_cifar(7, 96), of_cifar(6, 96)) == (32_590_954, 28_213_546)


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("nasnetalarge", 331, (165, 83, 42, 42, 21, 11)),
        ("nasnet_a_mobile", 224, (111, 56, 28, 28, 14, 7)),
        ("nasnet_a_6_768", 32, (32, None, None, 32, 16, 8)),
    ],
)
def test_output_shape_of_each_stage(name, size, sides):
    model = create_model(name)
    logits, shapes = capture_shapes(name, size, depths=(1, 1, 1))
    f = model.width
    assert shapes["stem/norm"] == (2, sides[0], sides[0], model.stem_width)
    for i, width in enumerate((f // 4, f // 2), 1):
        if sides[i]:
            assert shapes[f"stem/reduction{i}"] == (2, sides[i], sides[i], 4 * width)
    for i, side in enumerate(sides[3:], 1):
        width = f * 2 ** (i - 1)
        assert shapes[f"stage{i}/normal1"] == (2, side, side, 6 * width)
        if i > 1:
            assert shapes[f"stage{i}/reduction"] == (2, side, side, 4 * width)
    assert shapes["Dropout_0"] == (2, 24 * f)
    assert logits.shape == (2, model.num_classes)


def test_n_cells_in_each_stage():
    names = {path.rpartition("/block")[0] for path in shapes_of("keras_nasnetmobile")}
    cells = {name.partition("/")[2] for name in names if name.endswith(tuple("0123456789n"))}
    normal = {f"stage{i}/normal{j}" for i in (1, 2, 3) for j in (1, 2, 3, 4)}
    reductions = {"stem/reduction1", "stem/reduction2", "stage2/reduction", "stage3/reduction"}
    assert cells == normal | reductions


@pytest.mark.parametrize(("skip", "channels"), [(False, 6 * 8), (True, 4 * 4)])
def test_what_the_cell_after_a_reduction_takes(skip, channels):
    """As p the cell takes the output of stage 1's only cell, or, with `skip_reduction`, the input
    of that cell: the stem's last output."""
    shapes = shapes_of("nasnetalarge", **TINY, skip_reduction=skip)
    assert shapes["params/stage2/normal1/squeeze_previous/conv1/kernel"].shape[2] == channels


def test_a_reduction_in_two_halves():
    """The two 1x1 return even rows and columns, and odd ones with zeros after the last."""
    x = jnp.arange(1.0, 26.0).reshape(1, 5, 5, 1)
    conv = partial(layers.Conv, use_bias=False)
    module = cells.FactorizedReduction(2, conv, layers.make_norm("none", train=False))
    ones = {
        "conv1": {"kernel": jnp.ones((1, 1, 1, 1))},
        "conv2": {"kernel": jnp.ones((1, 1, 1, 1))},
    }
    y = module.apply({"params": ones}, x)
    np.testing.assert_array_equal(y[0, :, :, 0], [[1, 3, 5], [11, 13, 15], [21, 23, 25]])
    np.testing.assert_array_equal(y[0, :, :, 1], [[7, 9, 0], [17, 19, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "zeros", "corner"),
    [
        *(("mean", (), -1.0), ("mean", ("mean",), -4 / 9), ("mean", ("max",), -1.0)),
        *(("max", (), -1.0), ("max", ("max",), 0.0), ("max", ("mean",), -1.0)),
    ],
)
def test_what_poolings_see_around_the_maps(kind, zeros, corner):
    """With stride 2 and an odd size they see zeros; with stride 1 the padding does not count."""
    conv, norm = layers.Conv, layers.make_norm("none", train=False)
    x = -jnp.ones((1, 5, 5, 3))
    pool = partial(cells.Pool, 3, kind, conv, norm, cells.PaddingRules("same", zeros))
    y = pool(2).apply({}, x)
    assert y.shape == (1, 3, 3, 3)
    assert y[0, 0, 0, 0] == y[0, 2, 2, 0] == pytest.approx(corner)
    assert y[0, 1, 1, 0] == -1
    np.testing.assert_array_equal(pool(1).apply({}, x), x)


@pytest.mark.parametrize(("padding", "first"), [("same", 7.0), ("torch", 5.0)])
def test_padding(padding, first):
    """With stride 2 and an even size "same" pads only the end, so that the first window has pixels
    0 to 2. "torch" pads both ends, so that it has pixels 0 and 1."""
    conv, norm = layers.Conv, layers.make_norm("none", train=False)
    padding_rules = cells.PaddingRules(padding, ())
    x = jnp.array([[0.0, 1, 2, 3], [4, 5, 6, 0], [0, 0, 7, 0], [0, 0, 0, 0]])[None, ..., None]
    y = cells.Pool(1, "max", conv, norm, padding_rules, 2).apply({}, x)
    assert (y.shape, float(y[0, 0, 0, 0])) == ((1, 2, 2, 1), first)
    modules = capture_modules("nasnet_a_mobile", 32, **TINY, padding=padding)
    paddings = {m.padding for m in modules.values() if isinstance(m, layers.SeparableConv)}
    assert paddings == {padding}


def cell(recipe=nasnet.NORMAL, stride=1):
    conv = partial(layers.Conv, use_bias=False)
    norm = layers.make_norm("batch", train=False)
    return cells.Cell(4, recipe, conv, norm, cells.PaddingRules("same", ()), stride)


def run(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    random = np.random.RandomState(0)
    v = jax.tree.map(lambda s: random.uniform(0.5, 1.5, s.shape).astype(np.float32), shapes)
    return jax.jit(module.apply, compiler_options=NO_OPTIMIZATION)(v, *args)


def test_a_cell_all_of_whose_operations_are_dropped():
    """Only identities stay: of p in the third row, of x in the fifth, and p in the output."""
    x, p = jnp.ones((2, 4, 4, 3)), 2 * jnp.ones((2, 4, 4, 5))
    drop = layers.DropPath(jnp.float32(1 - 1e-6), jax.random.key(1), "sample")
    parts = jnp.split(run(cell(), x, p, drop), 6, axis=-1)
    assert [bool(jnp.any(part)) for part in parts] == [True, False, False, True, False, True]
    np.testing.assert_array_equal(parts[0], parts[3])
    whole = jnp.split(run(cell(), x, p, None), 6, axis=-1)
    assert all(bool(jnp.all(part)) for part in whole)
    np.testing.assert_array_equal(parts[0], whole[0])


def test_each_operation_of_a_cell_is_dropped_for_itself_and_each_image_too():
    x = jnp.ones((16, 4, 4, 4))
    drop = layers.DropPath(jnp.float32(0.5), jax.random.key(1), "sample")
    recipe = cells.CellRecipe(
        rows=(("mean3", "x", "max3", "x"), ("max3", "x", "mean3", "x")), output=("1", "2")
    )
    parts = np.asarray(run(cell(recipe), x, x, drop)).reshape(16, 4, 4, 2, 4)
    whole = np.asarray(run(cell(recipe), x, x, None)).reshape(16, 4, 4, 2, 4)
    kept = np.round(parts / whole, 3)  # 0, 1 or 2 halves, each scaled by 2
    assert (kept == kept[:, :1, :1, :, :1]).all()  # constant over each map
    assert set(kept[:, 0, 0, :, 0].ravel()) == {0.0, 1.0, 2.0}
    assert (kept[:, 0, 0, 0, 0] != kept[:, 0, 0, 1, 0]).any()


def test_drop_path_grows_from_cell_to_cell_and_adds_no_parameters():
    seen = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, cells.Cell) and context.method_name == "__call__":
            seen.append(args[2].rate)
        return call(*args, **kwargs)

    given = {**TINY, "drop_path": 0.5, "kernel_init": nn.initializers.zeros}
    model = create_model("nasnet_a_large", **given)
    variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    images, key = jnp.ones((2, 19, 19, 3)), jax.random.key(0)  # any size
    mutable = ["batch_stats", "aux_logits"]

    def rates(variables):  # returns only the rates, so that nothing else is compiled
        with nn.intercept_methods(note):
            model.apply(variables, images, train=True, mutable=mutable, rngs={"dropout": key})
        return jnp.stack(seen)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    # Cells: two in the stem, a normal cell, a reduction, a normal cell.
    np.testing.assert_allclose(jax.jit(rates)(zeros), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    assert shapes_of("nasnet_a_large", **TINY, drop_path=0.0) == pytree.flatten(variables)


@pytest.mark.parametrize(
    ("name", "train", "fields", "heads"),
    [
        ("nasnet_a_mobile", True, {}, {"aux1/logits/0": (2, 3)}),
        ("nasnet_a_mobile", False, {}, {}),
        (
            "nasnet_a_6_768",
            True,
            {"drop_path_mode": "batch"},
            {"aux1/logits/0": (2, 3)},
        ),
        ("nasnet_a_6_768", True, {"num_classes": None}, {}),
        ("keras_nasnetmobile", True, {}, {}),
    ],
)
def test_the_head_in_training_only(name, train, fields, heads):
    model = create_model(name, **{"kernel_init": nn.initializers.zeros} | TINY | fields)
    variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    assert ("aux1" in variables["params"]) == bool(model.aux and model.num_classes)
    rngs = dict.fromkeys(("dropout", "shared"), jax.random.key(0))
    apply = partial(model.apply, train=train, rngs=rngs, mutable=["batch_stats", "aux_logits"])
    out, state = jax.eval_shape(apply, variables, jnp.zeros((2, 20, 23, 3)))  # any size
    assert out.shape == (2, 3 if model.num_classes else 6 * 16)
    assert {k: v.shape for k, v in pytree.flatten(state.get("aux_logits", {})).items()} == heads


@pytest.mark.parametrize(("name", "smallest"), [("nasnet_a_mobile", 19), ("nasnet_a_6_768", 3)])
def test_other_sizes_have_the_same_parameters(name, smallest):
    given = {**TINY, "input_size": (smallest, 45, 3)}
    assert shapes_of(name, **given) == shapes_of(name, **TINY)


@pytest.mark.parametrize("field", [dict(remat=True), dict(norm="none")])
def test_remat_and_norms(field):
    shapes = shapes_of("nasnet_a_mobile", **TINY, **field)
    kernels = [path for path in shapes if path.endswith("kernel")]
    assert kernels == [p for p in shapes_of("nasnet_a_mobile", **TINY) if p.endswith("kernel")]


def test_statistics_and_dropout():
    def constants_of(name):
        modules = capture_modules(name, 32, **TINY)
        norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm)]
        return {(m.momentum, m.epsilon) for m in norms}, modules["Dropout_0"].rate

    assert constants_of("nasnetalarge") == ({(0.9, 1e-3)}, 0.0)  # PyTorch's momentum 0.1
    assert constants_of("nasnet_a_large") == ({(0.9997, 1e-3)}, 0.5)
    assert constants_of("keras_nasnetmobile") == ({(0.9997, 1e-3)}, 0.0)
    assert constants_of("nasnet_a_6_768") == ({(0.9, 1e-5)}, 0.0)


def test_slims_first_values():
    for shape, fan_out in [((3, 3, 1, 400), 9), ((1, 1, 50, 400), 400)]:
        values = np.asarray(nasnet.slim_initializer(jax.random.key(0), shape))
        assert values.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert shapes_of("nasnet_a_6_768", **TINY, kernel_init="paper")


def test_errors():
    with pytest.raises(UserError, match=r"unknown padding 'sane'.*'same'"):
        capture_shapes("nasnet_a_mobile", 32, padding="sane")
    wrong = cells.CellRecipe(rows=(("mean4", "x", "identity", "x"),), output=("1",))
    with pytest.raises(UserError, match=r"unknown operation 'mean4' of a cell.*'mean3'"):
        capture_shapes("nasnet_a_mobile", 32, normal=wrong)
