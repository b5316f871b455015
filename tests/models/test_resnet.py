"""ResNet for ImageNet: published counts and MACs, table 1's shapes, and what each field does."""

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
from flax_cnns.models import resnet
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.types import ModuleDef
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, variable_shapes


def of_table_1(depths: tuple[int, ...], projected: str) -> int:
    """Counts parameters with two 3x3 per block; `projected`: "none" or "all" of the shortcuts."""
    count, before = 49 * 3 * 64 + 2 * 64, 64
    for depth, width in zip(depths, (64, 128, 256, 512)):
        for _ in range(depth):
            count += 9 * before * width + 9 * width * width + 2 * 2 * width
            count += (before * width + 2 * width) * (projected == "all")
            before = width
    return count + 512 * 1000 + 1000


DERIVED = {  # the paper's shortcut A has no parameters
    "plain18": of_table_1((2, 2, 2, 2), "none"),
    "plain34": of_table_1((3, 4, 6, 3), "none"),
    "resnet34_optA": of_table_1((3, 4, 6, 3), "none"),
    "resnet34_optC": of_table_1((3, 4, 6, 3), "all"),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_count(name):
    assert PUBLISHED[name].params == DERIVED[name]


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize(
    ("size", "sides"), [(224, (56, 28, 14, 7)), (97, (25, 13, 7, 4)), (1, (1, 1, 1, 1))]
)
def test_output_shape_of_each_stage(name, expansion, size, sides):
    logits, shapes = capture_shapes(name, size)
    assert shapes["stem"] == (2, sides[0], sides[0], 64)
    for i, side in enumerate(sides):
        assert shapes[f"stage{i + 1}"] == (2, side, side, 64 * 2**i * expansion)
    assert logits.shape == (2, 1000)


def test_a_bottleneck_strides_on_its_3x3():
    _, shapes = capture_shapes("resnet50", 224)
    assert shapes["stage2/block1/conv1"] == (2, 56, 56, 128)
    assert shapes["stage2/block1/conv2"] == (2, 28, 28, 128)
    assert shapes["stage2/block1/projection"] == (2, 28, 28, 512)
    assert "stage2/block2/projection" not in shapes


def test_v1_strides_on_the_first_1x1():
    _, shapes = capture_shapes("resnet50_v1", 224)
    assert shapes["stage2/block1/conv1"] == (2, 28, 28, 128)
    _, shapes = capture_shapes("keras_resnet50", 224)
    assert shapes["stage2/block1/conv1"] == (2, 28, 28, 128)


def test_resnet_d_has_a_deep_stem_and_projects_means():
    """With odd maps too: a mean at the border is over the existing pixels."""
    _, shapes = capture_shapes("resnet50d", 100)
    assert [shapes[f"stem/conv{i}"] for i in (1, 2, 3)] == [(2, 50, 50, n) for n in (32, 32, 64)]
    assert [shapes[f"stage{i}"][1] for i in (1, 2, 3, 4)] == [25, 13, 7, 4]
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    kept = partial(layers.Conv, kernel_init=nn.initializers.ones)
    y, _ = InBlock("D", 1, 2, kept).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y[0, :, :, 0], [[2.0, 3.5], [6.5, 8.0]])


class InBlock(nn.Module):
    option: str
    width: int
    stride: int
    conv: ModuleDef = layers.Conv

    @nn.compact
    def __call__(self, x):
        norm = layers.make_norm("none", train=False)
        return resnet.shortcut(self.option, x, self.width, self.stride, self.conv, norm)


def test_shortcut_a_skips_pixels_and_adds_zeros():
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 2))
    y, variables = InBlock("A", 5, 2).init_with_output(jax.random.key(0), x)
    assert not variables
    expected = np.zeros((1, 2, 2, 5))
    for i in range(2):
        for j in range(2):
            expected[0, i, j, :2] = x[0, 2 * i, 2 * j]
    np.testing.assert_array_equal(y, expected)
    with pytest.raises(UserError, match="the input has 2, the output 1"):
        InBlock("A", 1, 1).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("option", "first", "projections"),  # kernels: of the first block, and of all 2 + 2 blocks
    [
        *(("B", (1, 1), 1), ("C", (1, 1), 4), ("D", (1, 1), 1), ("3x3", (3, 3), 1)),
        *(("A", None, 0), ("none", None, 0)),
    ],
)
def test_projections(option, first, projections):
    shapes = variable_shapes("resnet18", depths=(2, 2), shortcut=option)
    kernels = {
        path: leaf.shape[:2]
        for path, leaf in pytree.flatten(shapes["params"]).items()
        if path.endswith("projection/kernel")
    }
    assert len(kernels) == projections
    assert kernels.get("stage2/block1/projection/kernel") == first


def test_groups_and_base_width_are_those_of_a_bottleneck():
    fields = dict(depths=(1,), groups=4, base_width=32)
    _, shapes = capture_shapes("resnet50", 32, **fields)
    assert shapes["stage1/block1/conv2"][-1] == 64 * 32 // 64 * 4
    with pytest.raises(UserError, match="belong to bottlenecks: got 4 and 32"):
        capture_shapes("resnet18", 32, **fields)


TINY = dict(depths=(1, 2), width=4, num_classes=3, input_size=(16, 16, 3))
NO_OPTIMIZATION = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def tiny():
    """Returns (variables of TINY, images)."""
    variables = init_variables(create_model("resnet18", **TINY), jax.random.key(0))
    return variables, jax.random.normal(jax.random.key(1), (4, 16, 16, 3))


def test_stochastic_depth_scales_branches_and_changes_no_name(tiny):
    """With three blocks and the linear schedule, evaluation scales branches by 5/6, 2/3 and 1/2."""
    variables, images = tiny
    model = create_model("resnet18", **TINY, drop_path=0.5)
    shapes = variable_shapes("resnet18", **TINY, drop_path=0.5)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    flat = pytree.flatten(variables)
    rates = {"stage1/block1": 5 / 6, "stage2/block1": 2 / 3, "stage2/block2": 1 / 2}
    for block, stay in rates.items():  # the last norm of the branch is linear
        for leaf in ("scale", "bias"):
            path = f"params/{block}/norm2/{leaf}"
            flat[path] = flat[path] * stay
    run = lambda model, v: jax.jit(model.apply, compiler_options=NO_OPTIMIZATION)(v, images)  # noqa: E731
    plain = create_model("resnet18", **TINY)
    np.testing.assert_allclose(
        run(model, variables), run(plain, pytree.unflatten(flat)), rtol=1e-4, atol=1e-5
    )
    sample = create_model("resnet18", **TINY, drop_path=0.5, drop_path_mode="sample")
    np.testing.assert_array_equal(run(sample, variables), run(plain, variables))


@pytest.mark.parametrize(("mode", "stream"), [("batch", "shared"), ("sample", "dropout")])
def test_stochastic_depth_needs_its_stream(tiny, mode, stream):
    variables, images = tiny
    model = create_model("resnet18", **TINY, drop_path=0.5, drop_path_mode=mode)

    def train(**rngs):
        return model.apply(variables, images, train=True, mutable="batch_stats", rngs=rngs)

    with pytest.raises(UserError, match=stream):
        jax.eval_shape(train)
    logits, _ = jax.eval_shape(lambda key: train(**{stream: key}), jax.random.key(0))
    assert logits.shape == (4, 3)


def test_momentum_is_the_source_s(tiny):
    """After one step from 0, Keras's 0.99 gives a tenth of what PyTorch's 0.9 gives."""
    variables, images = tiny

    def mean(model):
        _, state = jax.jit(
            lambda v: model.apply(v, images, train=True, mutable="batch_stats"),
            compiler_options=NO_OPTIMIZATION,
        )(variables)
        return state["batch_stats"]["stem"]["norm"]["mean"]

    keras = create_model("keras_resnet50")
    assert (keras.epsilon, create_model("resnet50").epsilon) == (1.001e-5, 1e-5)
    slow = create_model("resnet18", **TINY, momentum=keras.momentum)
    np.testing.assert_allclose(
        10 * mean(slow), mean(create_model("resnet18", **TINY)), rtol=1e-3, atol=1e-7
    )


def test_zero_init_starts_every_branch_at_zero_and_nothing_else():
    fields = dict(depths=(1, 1), width=4, num_classes=3, input_size=(16, 16, 3))
    plain = init_variables(create_model("resnet50", **fields), jax.random.key(0))
    zero = init_variables(create_model("resnet50", **fields, zero_init=True), jax.random.key(0))
    zero = pytree.flatten(zero)
    for path, leaf in pytree.flatten(plain).items():
        expected = np.zeros_like(leaf) if path.endswith("norm3/scale") else leaf
        np.testing.assert_array_equal(zero[path], expected, err_msg=path)


def test_fixup_is_resnet_50_without_normalization():
    """Zhang et al. 2019, section 4.2: rule 3's scalars counted by hand, initial logits of zero."""
    fields = dict(depths=(1, 2), width=8, num_classes=5, input_size=(32, 32, 3))
    fixed = create_model("resnet50", **fields, norm="fixup")
    variables = init_variables(fixed, jax.random.key(0))
    assert variables["batch_stats"] == {}
    flat = pytree.flatten(variables["params"])
    kernels = {path for path in flat if path.endswith("kernel")}
    bare = create_model("resnet50", **fields, norm="none")
    shapes = jax.eval_shape(lambda: init_variables(bare, jax.random.key(0)))
    assert {path: leaf.shape for path, leaf in flat.items() if leaf.ndim} == {
        path: leaf.shape for path, leaf in pytree.flatten(shapes["params"]).items()
    }
    branches, projections = 3, 2
    scalars = [path for path in flat if flat[path].ndim == 0]
    # stem 2; a branch: before 3 convolutions, 2 ReLUs, at its end, and the multiplier; the head.
    assert len(scalars) == 2 + 7 * branches + projections + 1
    for path in kernels:
        last = path.endswith(("conv3/kernel", "head/kernel"))
        assert bool((flat[path] == 0).all()) is last, path
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    np.testing.assert_array_equal(jax.jit(fixed.apply)(variables, images), 0)
    inside = float(jnp.std(flat["stage2/block2/conv2/kernel"]))
    he = float(np.sqrt(2 / (9 * 16)))
    assert inside == pytest.approx(branches**-0.25 * he, rel=0.1)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("plain18", dict(norm="fixup"), "needs a shortcut"),
        ("plain18", dict(drop_path=0.5), "needs a shortcut"),
        ("resnet50d", dict(norm="fixup"), "single convolution"),
        ("resnet18", dict(shortcut="E"), "unknown shortcut 'E'"),
    ],
)
def test_fields_that_do_not_go_together(name, fields, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: init_variables(create_model(name, **fields), jax.random.key(0)))
