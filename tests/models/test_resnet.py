"""ResNet for ImageNet: published counts, table 1's shapes, where v1.5 strides."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import pytree
from flax_cnns.errors import UserError
from flax_cnns.models import resnet
from flax_cnns.registry import create_model, init_variables, model_info
from tests.models.captured import captured

# torchvision 0.28.0, ResNet*_Weights.IMAGENET1K_V1.meta["num_params"]
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_count(name):
    assert model_info(name).params == PUBLISHED[name]


def test_every_variant_is_counted():
    assert set(PUBLISHED) == set(resnet.VARIANTS)


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize(
    ("size", "sides"), [(224, (56, 28, 14, 7)), (97, (25, 13, 7, 4)), (1, (1, 1, 1, 1))]
)
def test_output_shape_of_each_stage(name, expansion, size, sides):
    logits, shapes = captured(name, size)
    assert shapes["stem"] == (2, sides[0], sides[0], 64)
    for i, side in enumerate(sides):
        assert shapes[f"stage{i + 1}"] == (2, side, side, 64 * 2**i * expansion)
    assert logits.shape == (2, 1000)


def test_a_bottleneck_strides_on_its_3x3():
    _, shapes = captured("resnet50", 224)
    assert shapes["stage2/block1/conv1"] == (2, 56, 56, 128)
    assert shapes["stage2/block1/conv2"] == (2, 28, 28, 128)
    assert shapes["stage2/block1/projection"] == (2, 28, 28, 512)
    assert "stage2/block2/projection" not in shapes


def test_without_classes_it_gives_pooled_features():
    features, shapes = captured("resnet50", 64, num_classes=None)
    assert features.shape == (2, 2048)
    assert "head" not in shapes


def test_bfloat16_leaves_logits_and_parameters_in_float32():
    model = create_model("resnet18", dtype=jnp.bfloat16)

    def run(key):
        images = jnp.zeros((2, 64, 64, 3))
        variables = model.init(key, images)
        return variables, model.apply(variables, images)

    variables, logits = jax.eval_shape(run, jax.random.key(0))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_zero_init_starts_every_branch_at_zero_and_nothing_else():
    fields = dict(depths=(1, 1), width=4, num_classes=3, input_size=(16, 16, 3))
    plain = init_variables(create_model("resnet50", **fields), jax.random.key(0))
    zero = init_variables(create_model("resnet50", **fields, zero_init=True), jax.random.key(0))
    zero = pytree.flatten(zero)
    for path, leaf in pytree.flatten(plain).items():
        expected = np.zeros_like(leaf) if path.endswith("norm3/scale") else leaf
        np.testing.assert_array_equal(zero[path], expected, err_msg=path)


def test_wrong_channels():
    with pytest.raises(UserError, match="expected images of 3 channels, got 4"):
        init_variables(create_model("resnet18"), jax.random.key(0), (1, 64, 64, 4))


def test_fixup_is_resnet_50_without_normalisation():
    """Zhang et al. 2019, section 4.2: scalars of rule 3 by hand, logits of zero at the start."""
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
    ("name", "fields", "said"),
    [
        ("plain18", dict(norm="fixup"), "needs a shortcut"),
        ("plain18", dict(drop_path=0.5), "needs a shortcut"),
        ("resnet50d", dict(norm="fixup"), "single convolution"),
    ],
)
def test_fields_that_do_not_go_together(name, fields, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda: init_variables(create_model(name, **fields), jax.random.key(0)))
