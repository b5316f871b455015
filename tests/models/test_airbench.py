"""airbench94: the count by hand, initial values, and what config fields do to a run."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10_fast
from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.runs import start
from flax_cnns.runs.build import build_components
from flax_cnns.runs.plan import RunPlan
from tests.models.published import PUBLISHED
from tests.models.shapes import cost_of


def test_count_by_hand():
    widths = (24, 64, 256, 256)  # whiten has 2 * 2 * 2 * 3 maps
    expected = 2 * 2 * 3 * 24 + 24 + 256 * 10
    for before, width in itertools.pairwise(widths):
        expected += 9 * before * width + 9 * width * width + 2 * width  # norms have no scale
    assert expected == PUBLISHED["airbench94"].params == cost_of("airbench94").params


def test_shapes_of_the_stages():
    rows = {row.path: row.output_shape for row in cost_of("airbench94").layers}
    assert rows["whiten"] == (1, 31, 31, 24)
    assert rows["stage1/conv1"] == (1, 31, 31, 64)
    assert rows["stage1/conv2"] == (1, 15, 15, 64)
    assert rows["stage2/conv2"] == (1, 7, 7, 256)
    assert rows["stage3/conv2"] == (1, 3, 3, 256)


def test_initial_filters_copy_channels_and_the_rest_are_uniform():
    model = create_model("airbench94", widths=(32, 8, 40))
    params = init_variables(model, jax.random.key(0))["params"]
    identity = np.zeros((3, 3, 24, 24), np.float32)
    identity[1, 1] = np.eye(24)
    kernel = params["stage1"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel[..., :24], identity)
    rest = np.asarray(kernel[..., 24:])
    bound = 1 / np.sqrt(9 * 24)  # PyTorch's default
    assert 0.95 * bound < abs(rest).max() <= bound
    # Fewer features than channels: each feature copies a channel.
    narrow = params["stage2"]["conv1"]["kernel"]
    np.testing.assert_array_equal(narrow[1, 1], np.eye(32, 8))
    assert float(abs(narrow).sum()) == 8


@pytest.mark.oracle
def test_identity_filters_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    for channels, features in ((3, 5), (5, 3)):
        theirs = torch.nn.init.dirac_(torch.empty(features, channels, 3, 3))
        init = layers.dirac(lambda key, shape, dtype: jnp.zeros(shape, dtype))
        ours = init(jax.random.key(0), (3, 3, channels, features))
        np.testing.assert_array_equal(ours, theirs.permute(2, 3, 1, 0))


def test_whitened_patches_have_unit_second_moments():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 12, 12, 3)).astype(np.float32)
    images += 2 * images.mean(-1, keepdims=True)  # channels and neighbors are correlated
    images[:, 1:] += images[:, :-1]
    kernel = layers.make_whitening_kernel(images, epsilon=0)
    assert kernel.shape == (2, 2, 3, 24)
    maps = np.asarray(layers.conv2d(images, kernel, padding=0)).reshape(-1, 24)
    moments = maps[:, :12].T @ maps[:, :12] / len(maps)
    np.testing.assert_allclose(moments, np.eye(12), atol=1e-3)
    np.testing.assert_array_equal(kernel[..., :12], -kernel[..., 12:])


@pytest.fixture
def config():
    config = cifar10_fast.get_config("smoke")
    config.data.name, config.data.mock, config.data.image_size = "digits", 0, 12
    config.model.widths = (4, 4, 4)
    config.data.batch_size = config.data.eval_batch_size = 64
    return config


def test_a_run_starts_with_whitening_filters_that_stay(config):
    components = build_components(config)
    plan = RunPlan(components)
    variables, _ = start.make_initial_variables(plan)
    images = np.concatenate([components.dataset.splits["train"].images]) / np.float32(255)
    normalized = (images - components.dataset.mean) / components.dataset.std
    maps = layers.conv2d(
        jnp.asarray(normalized, jnp.float32), variables["params"]["whiten"]["kernel"], padding=0
    )
    moments = np.mean(np.square(maps), (0, 1, 2))
    np.testing.assert_allclose(moments, 1, atol=0.15)  # epsilon, and not all images
    optimizer = plan.make_optimizer(variables)
    frozen = [path for path, learns in pytree.flatten(optimizer.trainable).items() if not learns]
    assert frozen == ["whiten/kernel"]


def test_a_network_without_the_layer_is_refused(config):
    config.model.name = "lenet5"
    del config.model.widths
    config.data.image_size = 32
    config.optimizer.trainable = ()
    with pytest.raises(UserError, match=r"model\.whiten: lenet5 has no layer named whiten"):
        start.make_initial_variables(RunPlan(build_components(config)))
