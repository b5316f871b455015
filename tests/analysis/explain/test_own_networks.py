"""Looking into networks of other kinds: a user's own, transformers, networks that scan."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, init_variables
from flax_cnns.analysis.explain import backward_rules, cams, features, gradients, quality
from flax_cnns.errors import UserError


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(x))


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="dense")(x)


class Own(nn.Module):
    """Two blocks, and a dense layer on the means. `widths` can be a list, which has no hash."""

    widths: Sequence[int] = (4,)
    remat: str = ""  # not the package's field of this name
    scan: bool = False

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(self.widths[0], (3, 3), name="stem")(images)
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            over = nn.scan(lambda block, x, _: (block(x), None), length=2, **axes)
            x, _ = over(Block(name="blocks"), x, None)
        else:
            block = nn.remat(Block) if self.remat else Block
            for i in (1, 2):
                x = block(name=f"block{i}")(x)
        return Head(name="head")(x.mean((1, 2)))


IMAGES = jax.random.normal(jax.random.key(1), (2, 6, 4, 1))


@pytest.fixture(scope="module")
def plain():
    variables = Own().init(jax.random.key(0), IMAGES)
    return variables, _explain(Own(), variables)


def _explain(model, variables):
    given = (model, variables, IMAGES, 2)
    return [
        gradients.gradient(*given),
        backward_rules.guided_backprop(*given),
        cams.grad_cam(*given, "block1/conv"),
        cams.grad_cam(*given),
        cams.cam(*given) / 24,  # 6 x 4 pixels
    ]


def test_rematerialized_blocks_and_lists_as_fields(plain):
    variables, wanted = plain
    assert not np.allclose(*wanted[:2])
    np.testing.assert_allclose(wanted[3], wanted[4], rtol=1e-4, atol=1e-6)
    both = Own(remat="full", widths=[4])
    for found, each in zip(_explain(both, variables), wanted):
        np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-6)


def test_a_network_with_its_own_scan():
    variables = Own(scan=True).init(jax.random.key(0), IMAGES)
    given = (Own(scan=True), variables, IMAGES)
    assert list(features.list_outputs(*given)) == ["stem", "head/dense", "head", ""]
    assert cams.grad_cam(*given).shape == (2, 6, 4)
    order = [layer for layer, _ in quality.randomize(*given, jax.random.key(1))]
    assert order == ["head/dense", "blocks/conv", "stem"]
    # Its ReLUs would keep their gradient.
    with pytest.raises(UserError, match="a ReLU is inside a scan"):
        backward_rules.guided_backprop(*given)


def test_a_network_is_traced_once_for_each_shape(plain):
    variables, _ = plain
    traces = []

    class Counted(Own):
        @nn.compact
        def __call__(self, images, *, train=False):
            traces.append(images.shape)
            return super().__call__(images)

    def explain():
        for method in (gradients.gradient, cams.grad_cam, backward_rules.guided_backprop):
            method(Counted(), variables, IMAGES)
        features.features(Counted(), variables, IMAGES, ["stem"])

    explain()
    first = len(traces)
    explain()
    # Their steps are gradients of the same shape.
    gradients.integrated_gradients(Counted(), variables, IMAGES, steps=3)
    gradients.smooth_grad(Counted(), variables, IMAGES, key=jax.random.key(0), samples=3)
    assert len(traces) == first
    # Variables on a mesh, as those of a run; layers that are drawn must be placed like them.
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("batch",)), jax.P())
    placed = jax.device_put(variables, sharding)
    counts = []
    for _, changed in quality.randomize(Counted(), placed, IMAGES, jax.random.key(1)):
        gradients.gradient(Counted(), changed, IMAGES, 0)
        counts.append(len(traces))
    assert len(counts) == 4
    assert len(set(counts)) == 1


def test_a_transformer_has_no_class_activation_map_by_default():
    model = create_model("vit_tiny_patch16_224", input_size=(32, 32, 3), depth=1)
    variables = init_variables(model, jax.random.key(0))
    images = jnp.ones((1, 32, 32, 3))
    with pytest.raises(UserError, match="has tokens after its last spatial maps"):
        cams.choose_path(model, variables, images)
    order = [layer for layer, _ in quality.randomize(model, variables, images, jax.random.key(1))]
    assert (order[0], order[-1]) == ("head", "")  # "": the positions
