"""Inception-ResNet-v2: counts and MACs by hand, each stage's size, the scaled residual, Keras."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.models import inception_resnet
from flax_cnns.models.registry import create_model
from tests.models import foreign
from tests.models.published import PUBLISHED
from tests.models.shapes import blank_model, capture_shapes, cost_of

NAMES = ("inception_resnet_v2", "keras_inception_resnet_v2")

# (height, width, in, out) of each convolution with a norm, by the side of its output: figures 7 and
# 16 to 19 with the released widths; the stem and `mixed_5b` as released.
STEM = {
    149: [(3, 3, 3, 32)],
    147: [(3, 3, 32, 32), (3, 3, 32, 64)],
    73: [(1, 1, 64, 80)],
    71: [(3, 3, 80, 192)],
}
MIXED_5B = {
    35: [
        *[(1, 1, 192, 64), (1, 1, 192, 96)],
        *[(1, 1, 192, 48), (5, 5, 48, 64)],
        *[(1, 1, 192, 64), (3, 3, 64, 96), (3, 3, 96, 96)],
    ]
}
A = {
    35: [
        (1, 1, 320, 32),
        *[(1, 1, 320, 32), (3, 3, 32, 32)],
        *[(1, 1, 320, 32), (3, 3, 32, 48), (3, 3, 48, 64)],
    ]
}
REDUCTION_A = {  # table 1: k, l, m, n = 256, 256, 384, 384
    35: [(1, 1, 320, 256), (3, 3, 256, 256)],
    17: [(3, 3, 320, 384), (3, 3, 256, 384)],
}
B = {17: [(1, 1, 1088, 192), (1, 1, 1088, 128), (1, 7, 128, 160), (7, 1, 160, 192)]}
REDUCTION_B = {
    17: [(1, 1, 1088, 256), (1, 1, 1088, 256), (1, 1, 1088, 256), (3, 3, 256, 288)],
    8: [(3, 3, 256, 384), (3, 3, 256, 288), (3, 3, 288, 320)],
}
C = {8: [(1, 1, 2080, 192), (1, 1, 2080, 192), (1, 3, 192, 224), (3, 1, 224, 256)]}
CONV_7B = {8: [(1, 1, 2080, 1536)]}
NETWORK = {  # (repeats, convolutions, (side, in, out) of the 1x1 with a bias)
    "stem": (1, STEM, None),
    "mixed_5b": (1, MIXED_5B, None),
    "inception_resnet_a": (10, A, (35, 128, 320)),
    "reduction_a": (1, REDUCTION_A, None),
    "inception_resnet_b": (20, B, (17, 384, 1088)),
    "reduction_b": (1, REDUCTION_B, None),
    "inception_resnet_c": (9, C, (8, 448, 2080)),
    "last_c": (1, C, (8, 448, 2080)),
    "conv_7b": (1, CONV_7B, None),
}
HEAD = 1536 * 1000


def by_hand(times, part, linear, per_norm):
    """Returns (parameters, MACs); a norm has `per_norm` parameters per channel."""
    rows = [(side, *conv) for side, convs in part.items() for conv in convs]
    params = sum(h * w * i * o + per_norm * o for _, h, w, i, o in rows)
    macs = sum(side**2 * h * w * i * o for side, h, w, i, o in rows)
    if linear:
        side, i, o = linear
        params, macs = params + i * o + o, macs + side**2 * i * o
    return times * params, times * macs


# Parameters of timm 1.0.31's network, and trainable parameters of Keras's.
@pytest.mark.parametrize(
    ("name", "per_norm", "published"), [(NAMES[0], 2, 55_843_464), (NAMES[1], 1, 55_813_192)]
)
def test_cost_of_each_part(name, per_norm, published):
    measured = {}
    for layer in cost_of(name).layers:
        params, macs = measured.get(part := layer.path.partition("/")[0], (0, 0))
        measured[part] = (params + layer.params, macs + layer.macs)
    expected = {part: by_hand(*row, per_norm) for part, row in NETWORK.items()}
    expected["head"] = (HEAD + 1000, HEAD)
    assert measured == expected
    assert PUBLISHED[name].params == published
    assert sum(params for params, _ in expected.values()) == published
    # timm's benchmark tables: 13.18 GMACs.
    assert sum(macs for _, macs in expected.values()) == pytest.approx(13.18e9, rel=3e-3)


captured = partial(capture_shapes, "inception_resnet_v2")


@pytest.mark.parametrize(
    ("size", "sides"), [(299, (35, 17, 8)), (100, (10, 4, 1)), (75, (7, 3, 1))]
)
def test_output_shape_of_each_stage(size, sides):
    logits, shapes = captured(size)
    assert shapes["stem"] == (2, sides[0], sides[0], 192)
    for first, stage, depth, side, width in zip(
        ("mixed_5b", "reduction_a", "reduction_b"),
        ("inception_resnet_a", "inception_resnet_b", "inception_resnet_c"),
        (10, 20, 9),
        sides,
        (320, 1088, 2080),
    ):
        blocks = [f"{stage}/block{i + 1}" for i in range(depth)]
        assert {shapes[path] for path in (first, *blocks, stage)} == {(2, side, side, width)}
    assert shapes["last_c"] == shapes["inception_resnet_c"]
    assert shapes["conv_7b"] == (2, sides[2], sides[2], 1536)
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_other_norms_in_bfloat16(name, norm):
    model = blank_model(name, dtype="bfloat16", norm=norm, depths=(1, 1, 1))
    images = jnp.zeros((1, 75, 75, 3))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "rate", "momentum", "scale"),
    [(NAMES[0], 0.2, 0.9, True), (NAMES[1], 0.0, 0.99, False)],
)
def test_settings_of_norms_and_dropout(name, rate, momentum, scale, train):
    """Dropout of 0.2 before the head in training only, none in Keras's; epsilon 1e-3."""
    model, images = create_model(name, depths=(1, 1, 1)), jnp.zeros((2, 75, 75, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    dropouts, norms = [], set()

    def record(run, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout):
            dropouts.append((module.rate, module.deterministic, args[0].shape))
        if isinstance(module, nn.BatchNorm):
            norms.add((module.epsilon, module.momentum, module.use_scale))
        return run(*args, **kwargs)

    def apply(variables, key):
        rngs = {"dropout": key}
        return model.apply(variables, images, train=train, rngs=rngs, mutable="batch_stats")

    with nn.intercept_methods(record):
        jax.eval_shape(apply, shapes, jax.random.key(0))
    assert dropouts == [(rate, not train, (2, 1536))]
    assert norms == {(1e-3, momentum, scale)}


def test_initial_values():
    """Kernels are Xavier's, as in the release; biases are zero."""
    model = create_model(NAMES[0], init="paper", depths=(1, 1, 1))

    @jax.jit
    def leaves(key):
        block = model.init(key, jnp.zeros((1, 75, 75, 3)))["params"]["inception_resnet_b"]["block1"]
        return block["branch2"]["conv3"]["kernel"], block["linear"]["bias"]

    kernel, bias = leaves(jax.random.key(0))  # 7x1, 160 to 192
    bound = np.sqrt(6 / (7 * 160 + 7 * 192))
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.01)
    assert not bias.any()


def narrow(**fields):
    """Returns a block with two branches for maps of 6 channels."""
    norm = layers.make_norm("batch", train=fields.pop("train", False), epsilon=1e-3)
    block = inception_resnet.ResidualBlock
    return partial(block, (((4, 1),), ((4, 1), (4, (1, 3)))), norm=norm, scale=0.5, **fields)


def test_residual_scaling():
    """Figure 20, and the last block, which is neither scaled nor activated."""
    conv = partial(layers.Conv, use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 6))
    block = narrow()(conv=conv)
    variables = block.init(jax.random.key(1), x)
    branches = narrow(relu=False)(conv=conv).clone(scale=1.0).apply(variables, x) - x
    assert jnp.abs(branches).max() > 0.1
    np.testing.assert_allclose(block.apply(variables, x), nn.relu(x + branches / 2), atol=1e-6)


def test_scanned_blocks_compute_the_same():
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 6)).astype(np.float32)
    stage = layers.Stage(narrow(train=True), partial(layers.Conv, use_bias=False), depth=3)
    shapes = pytree.flatten(jax.eval_shape(stage.init, jax.random.key(0), x))
    values = {path: foreign.redraw(path, a.shape, "keras") for path, a in shapes.items()}
    variables = pytree.unflatten(values)

    def run(**fields):
        apply = partial(stage.clone(**fields).apply, mutable=["batch_stats"])
        options = {"xla_backend_optimization_level": 0}
        y, state = jax.jit(apply, compiler_options=options)(variables, x)
        return pytree.flatten({"output": y, **state})

    got, wanted = run(scan=True, remat=True), run()
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_scan_and_remat_of_the_network():
    images, depths = jnp.zeros((2, 75, 75, 3)), (1, 3, 1)
    plain, scanned = (
        create_model(NAMES[0], scan=on, remat=on, depths=depths) for on in (False, True)
    )
    variables = jax.eval_shape(plain.init, jax.random.key(0), images)

    def shapes(model):
        def loss(params, stats, key):
            out, state = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return out.mean(), state

        grad = jax.grad(loss, has_aux=True)
        args = variables["params"], variables["batch_stats"], jax.random.key(0)
        return jax.eval_shape(grad, *args), str(jax.make_jaxpr(grad)(*args)).count("scan[")

    (outputs, scans), (scanned_outputs, scanned_scans) = shapes(plain), shapes(scanned)
    assert outputs == scanned_outputs
    assert scans == 0
    assert scanned_scans > 0
