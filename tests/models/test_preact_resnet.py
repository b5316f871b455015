"""Pre-activation ResNets for ImageNet: published counts and costs, strides, padding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import preact_resnet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes

TINY = dict(depths=(1, 3), width=4, num_classes=3, input_size=(24, 24, 3))
IMAGES = np.random.RandomState(0).randn(4, 24, 24, 3).astype(np.float32)


def test_the_same_networks_under_timm_s_names():
    variants = preact_resnet.VARIANTS
    for n in (50, 101, 152):
        ours, timm_s = variants[f"preact_resnet{n}"], variants[f"resnetv2_{n}"]
        assert (ours.func, ours.keywords) == (timm_s.func, timm_s.keywords)


def test_the_200_layers_by_hand():
    """It has 16 more units than 152, at 28x28. A norm has two parameters per channel."""
    count = 7 * 7 * 3 * 64 + 2 * 2048 + 2048 * 1000 + 1000
    channels = 64
    for depth, width in zip((3, 24, 36, 3), (64, 128, 256, 512)):
        wide = 4 * width
        count += channels * wide  # the projection
        count += (channels + (depth - 1) * wide) * (width + 2)  # first 1x1, norm before it
        count += depth * (9 * width * width + width * wide + 4 * width)
        channels = wide
    assert count == PUBLISHED["preact_resnet200"].params


@pytest.mark.parametrize(
    ("name", "sides"), [("resnetv2_50", (56, 28, 14, 7)), ("keras_resnet50v2", (28, 14, 7, 7))]
)
def test_output_shape_of_each_stage(name, sides):
    logits, shapes = capture_shapes(name, 224)
    assert shapes["stem"] == (2, 56, 56, 64)
    for i, side in enumerate(sides):
        assert shapes[f"stage{i + 1}"] == (2, side, side, 256 * 2**i)
    assert shapes["norm"] == (2, 7, 7, 2048)
    assert logits.shape == (2, 1000)


def test_the_first_block_of_a_stage_strides_or_keras_s_last():
    _, shapes = capture_shapes("resnetv2_50", 224)
    assert shapes["stage2/block1/conv1"] == (2, 56, 56, 128)
    assert shapes["stage2/block1/conv2"] == (2, 28, 28, 128)
    assert shapes["stage2/block1/projection"] == (2, 28, 28, 512)
    _, shapes = capture_shapes("keras_resnet50v2", 224)
    assert shapes["stage1/block1/projection"] == (2, 56, 56, 256)
    assert shapes["stage1/block3/conv1"] == (2, 56, 56, 64)
    assert shapes["stage1/block3/conv2"] == (2, 28, 28, 64)
    assert "stage1/block3/projection" not in shapes
    assert shapes["stage4/block3/conv2"] == (2, 7, 7, 512)


def test_biases_of_keras():
    model = create_model("keras_resnet50v2")
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))["params"]
    biased = {
        path for path in pytree.flatten(shapes) if path.endswith("bias") and "norm" not in path
    }
    block = {f"stage{i}/block1/projection/bias" for i in range(1, 5)}
    depths = zip(range(1, 5), (3, 4, 6, 3))
    last = {f"stage{i}/block{j}/conv3/bias" for i, n in depths for j in range(1, n + 1)}
    assert biased == {"stem/conv/bias", "head/bias"} | block | last


def test_zeros_around_the_maps_can_be_what_the_stem_pools():
    for pad_zeros, border in ((False, -147.0), (True, 0.0)):
        conv = partial(layers.Conv, kernel_init=jax.nn.initializers.ones)
        stem = preact_resnet.Stem(2, conv, bias=False, pad_zeros=pad_zeros)
        x = jnp.full((1, 32, 32, 3), -1.0)
        y = stem.apply(stem.init(jax.random.key(0), x), x)
        assert y.shape == (1, 8, 8, 2)
        assert (y[:, 4, 4] == -147).all()  # 7 * 7 * 3
        assert (y[:, 0] == 0).all() == pad_zeros
        assert (y[:, 0, 4] == (border if pad_zeros else y[:, 0, 4])).all()
        assert (y[:, 0] < 0).all() != pad_zeros


@pytest.mark.parametrize("name", ["resnetv2_50", "keras_resnet50v2"])
def test_options_keep_the_parameters(name):
    """Logits and parameters stay in float32 with bfloat16."""

    def run(**fields):
        model = create_model(name, **TINY | fields)

        def both(key):
            variables = model.init(key, IMAGES)
            rngs = {"shared": key}
            given = dict(train=True, mutable=["batch_stats"], rngs=rngs)
            return variables, model.apply(variables, IMAGES, **given)

        return jax.eval_shape(both, jax.random.key(0))

    plain = run()
    assert run(remat=True, drop_path=0.5) == plain
    assert run(dtype="bfloat16") == plain
    if name == "resnetv2_50":
        assert run(scan=True, drop_path=0.5) == plain
    else:
        with pytest.raises(UserError, match="with late_stride the last block of a stage differs"):
            run(scan=True)
    variables, (features, _) = run(num_classes=None)
    assert features.shape == (4, 32)
    assert "head" not in variables["params"]


@pytest.mark.parametrize("late_stride", [False, True])
def test_a_dropped_branch_leaves_its_statistics_and_a_shared_norm_moves(late_stride):
    model = create_model("resnetv2_50", **TINY, drop_path=0.9999, late_stride=late_stride)
    variables = init_variables(model, jax.random.key(0))

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(variables, key):
        given = dict(train=True, mutable=["batch_stats"], rngs={"shared": key})
        return model.apply(variables, IMAGES, **given)[1]["batch_stats"]

    after = pytree.flatten(step(variables, jax.random.key(1)))
    before = pytree.flatten(variables["batch_stats"])
    moved = {path.removesuffix("/mean") for path in before if (before[path] != after[path]).all()}
    # The last block is dropped. The first block of a stage has norm and ReLU before its projection.
    assert {"norm", "stage1/block1/norm1", "stage2/block1/norm1"} <= moved
    assert not any("stage2/block3" in path for path in moved)


def test_in_evaluation_branches_count_by_their_survival():
    """The features before the last norm are then linear in the rate of the only block."""
    fields = TINY | dict(depths=(1,))
    variables = init_variables(create_model("resnetv2_50", **fields), jax.random.key(0))

    def stage(rate):
        model = create_model("resnetv2_50", **fields, drop_path=rate)
        seen = dict(capture_intermediates=lambda m, _: m.name == "stage1", mutable="intermediates")
        _, state = model.apply(variables, IMAGES, **seen)
        return state["intermediates"]["stage1"]["__call__"][0]

    none, some, more = jax.jit(lambda: [stage(rate) for rate in (0.0, 0.25, 0.75)])()
    assert np.abs(more - none).max() > 0.1
    np.testing.assert_allclose(more - none, 3 * (some - none), atol=1e-5)
