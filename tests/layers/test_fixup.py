"""Fixup: each of its three rules, and their purpose: deep networks without normalization."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cnns import create_model, layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import init_variables

IMAGES = np.random.RandomState(0).randn(8, 8, 8, 3).astype(np.float32)
LABELS = np.arange(8) % 4
TINY = dict(depths=(2, 2), widths=(4, 6), input_size=(8, 8, 3), num_classes=4, norm="fixup")
CONV = partial(layers.Conv, use_bias=False, kernel_init=layers.he, param_dtype=jnp.float32)
DENSE = partial(nn.Dense, param_dtype=jnp.float32)


@pytest.fixture(scope="module")
def variables():
    return init_variables(create_model("cifar_resnet20", **TINY), jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "branches", "depth", "gain"),
    [
        ("conv1", 54, 2, 54**-0.5),  # L^(-1/(2m-2)), m = 2: ResNet-110
        ("conv2", 54, 2, 0),
        ("conv1", 16, 3, 0.5),  # m = 3: 16^(-1/4), ResNet-50
        ("conv2", 16, 3, 0.5),
        ("conv3", 16, 3, 0),
        ("projection", 54, 2, 1),
        ("conv", 54, 2, 1),  # the stem
    ],
)
def test_initial_scale_by_role(name, branches, depth, gain):
    """Rules 1 and 2: He's N(0, 2 / (k k out)) times L^(-1/(2m-2)) in a branch, and 0 at its end."""
    conv, *_ = layers.fixup(CONV, DENSE, branches=branches, depth=depth)
    kernel = conv(64, (3, 3), name=name).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))
    std = np.std(kernel["params"]["kernel"])
    assert std == pytest.approx(gain * (2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "depth"), [("cifar_resnet20", 2), ("resnet18", 2), ("resnet50", 3)]
)
def test_layers_of_our_networks_have_the_names_that_fixup_needs(name, depth):
    """A renamed layer would silently get another initialization."""
    fields = dict(norm="fixup", depths=(1, 2), shortcut="C")
    fields |= dict(widths=(4, 8)) if name.startswith("cifar") else dict(width=4)
    params = jax.eval_shape(
        partial(init_variables, create_model(name, **fields)), jax.random.key(0)
    )["params"]
    inside = range(1, depth + 1)
    convs = {f"conv{i}": {"kernel", "input_bias"} for i in inside}
    norms = {f"norm{i}": {"bias"} for i in inside} | {f"norm{depth}": {"bias", "scale"}}
    projection = {"projection": {"kernel", "input_bias"}}
    leaves_of = lambda module: {part: set(leaves) for part, leaves in module.items()}  # noqa: E731
    blocks = [block for stage in ("stage1", "stage2") for block in params[stage].values()]
    assert len(blocks) == 3
    for block in blocks:
        assert leaves_of(block) == convs | norms | projection
    assert leaves_of(params["stem"]) == {"conv": {"kernel", "input_bias"}, "norm": {"bias"}}


def test_what_the_scalars_do():
    """Rule 3: shifts before convolutions and activations, and the multiplier of the branch."""
    conv, norm, dense = layers.fixup(CONV, DENSE, branches=4, depth=2)
    x = IMAGES[..., :1]
    kernel = jnp.ones((1, 1, 1, 1))
    shifted = conv(1, (1, 1), name="conv1").apply(
        {"params": {"kernel": kernel, "input_bias": 2.0}}, x
    )
    np.testing.assert_allclose(shifted, x + 2, atol=1e-6)
    inside = norm(name="norm1").apply({"params": {"bias": 3.0}}, x)
    np.testing.assert_allclose(inside, x + 3, atol=1e-6)
    scalars = {"params": {"bias": 3.0, "scale": 5.0}}
    last = norm(name="norm2", scale_init=nn.initializers.zeros).apply(scalars, x)
    np.testing.assert_allclose(last, 5 * x + 3, atol=1e-6)
    assert norm(name="projection_norm").init(jax.random.key(0), x) == {}
    head = {"params": {"kernel": jnp.eye(3), "bias": jnp.arange(3.0), "input_bias": 1.0}}
    pooled = IMAGES[:, 0, 0]
    logits = dense(3, name="head").apply(head, pooled)
    np.testing.assert_allclose(logits, pooled + 1 + np.arange(3), atol=1e-6)


def test_the_number_of_scalars_by_hand():
    """ResNet-20 for CIFAR has 5 scalars in each of its 9 blocks, 2 in the stem and 1 in the head.

    In a block, 2 are before convolutions, 2 before activations, and 1 is the multiplier.
    """
    model = create_model("cifar_resnet20", norm="fixup")
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    flat = pytree.flatten(shapes)
    scalars = [path for path, leaf in flat.items() if leaf.shape == ()]
    assert len(scalars) == 9 * 5 + 2 + 1
    convs = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    assert pytree.count(shapes["params"]) == convs + 64 * 10 + 10 + len(scalars)
    assert shapes["batch_stats"] == {}


def test_it_starts_as_the_identity(variables):
    """The last maps are the stem's (by shortcut A), logits are 0, and scalars are 0 or 1."""
    model = create_model("cifar_resnet20", **TINY)

    @jax.jit
    def run(v):
        only = lambda m, _: m.name in ("stem", "stage2")  # noqa: E731
        return model.apply(v, IMAGES, capture_intermediates=only, mutable="intermediates")

    logits, state = run(variables)
    np.testing.assert_array_equal(logits, 0)
    seen = state["intermediates"]
    stem, end = (np.asarray(seen[name]["__call__"][0]) for name in ("stem", "stage2"))
    np.testing.assert_allclose(end[..., :4], stem[:, ::2, ::2], atol=1e-6)
    np.testing.assert_array_equal(end[..., 4:], 0)
    for path, leaf in pytree.flatten(variables).items():
        if leaf.shape == ():
            assert leaf == (1 if path.endswith("/scale") else 0), path


def test_gradients_reach_everything_in_the_third_step(variables):
    """In the first step, gradients reach only the classifier, which is 0.

    In the second step, they reach the last convolutions of the branches, which are 0 too. In the
    third step, they reach the other convolutions.
    """
    model = create_model("cifar_resnet20", **TINY)

    @jax.jit
    def gradients(params):
        def loss(params):
            logits = model.apply({"params": params}, IMAGES, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        return jax.grad(loss)(params)

    params, reached = variables["params"], []
    for _ in range(3):
        grads = gradients(params)
        reached.append({path for path, g in pytree.flatten(grads).items() if np.any(g)})
        params = jax.tree.map(lambda p, g: p - g, params, grads)
    assert reached[0] == {"head/kernel"}  # not its bias: the labels are balanced
    assert "stage1/block1/conv2/kernel" in reached[1]
    assert "stage1/block1/conv1/kernel" not in reached[1]
    assert reached[2] == set(pytree.flatten(params))


@pytest.mark.slow
def test_110_layers_train_without_normalization():
    """With SGD at the paper's rate, 0.1, the loss decreases and the maps do not grow.

    With He's initialization alone, the initial maps are a million times as large.
    """
    model = create_model("cifar_resnet110", **dict(TINY, depths=(54,), widths=(4,)), scan=True)
    params = pytree.stack_blocks(model.init(jax.random.key(0), IMAGES[:1]))["params"]

    @jax.jit
    def step(params):
        def loss(params):
            logits = model.apply({"params": params}, IMAGES, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    @jax.jit
    def largest(params):
        return model.clone(num_classes=None).apply({"params": params}, IMAGES).max()

    before, losses, trained = largest(params), [], params
    for _ in range(20):
        loss, trained = step(trained)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(4), abs=1e-6)
    assert (np.diff(losses) < 1e-6).all()
    assert losses[-1] < losses[0] - 0.003
    assert largest(trained) < 1.5 * before

    rng, flat = np.random.RandomState(0), pytree.flatten(params)
    for path, leaf in flat.items():
        if leaf.ndim > 2:  # a convolution's kernel
            flat[path] = (2 / (9 * leaf.shape[-1])) ** 0.5 * rng.randn(*leaf.shape)
    assert largest(pytree.unflatten(flat)) > 1e6 * before


def test_errors():
    with pytest.raises(UserError, match="branches of two convolutions or more, got 1"):
        layers.fixup(CONV, DENSE, branches=4, depth=1)
    with pytest.raises(UserError, match='norm="fixup" needs a shortcut'):
        init_variables(create_model("cifar_plain20", norm="fixup"), jax.random.key(0))
    with pytest.raises(UserError, match="unknown norm 'fixup'"):  # a family without Fixup
        init_variables(create_model("vgg11_bn", norm="fixup"), jax.random.key(0))
