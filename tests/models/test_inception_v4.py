"""Inception-v4: counts and MACs from the figures, figure 9's sizes, dropout, initial values."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.models import inception_v4
from flax_cnns.models.registry import create_model
from tests.models import foreign
from tests.models.published import PUBLISHED
from tests.models.shapes import blank_model, capture_shapes, cost_of

# Figures 3 to 8: (height, width, in, out) of each convolution, by the side of its output.
STEM = {
    149: [(3, 3, 3, 32)],
    147: [(3, 3, 32, 32), (3, 3, 32, 64)],
    73: [(3, 3, 64, 96), (1, 1, 160, 64), (1, 1, 160, 64), (7, 1, 64, 64), (1, 7, 64, 64)],
    71: [(3, 3, 64, 96), (3, 3, 64, 96)],
    35: [(3, 3, 192, 192)],
}
A = {
    35: [
        *[(1, 1, 384, 96), (1, 1, 384, 96)],
        *[(1, 1, 384, 64), (3, 3, 64, 96)],
        *[(1, 1, 384, 64), (3, 3, 64, 96), (3, 3, 96, 96)],
    ]
}
REDUCTION_A = {  # table 1: k, l, m, n = 192, 224, 256, 384
    35: [(1, 1, 384, 192), (3, 3, 192, 224)],
    17: [(3, 3, 384, 384), (3, 3, 224, 256)],
}
B = {
    17: [
        *[(1, 1, 1024, 128), (1, 1, 1024, 384)],
        *[(1, 1, 1024, 192), (1, 7, 192, 224), (7, 1, 224, 256)],
        *[(1, 1, 1024, 192), (1, 7, 192, 192), (7, 1, 192, 224), (1, 7, 224, 224)],
        (7, 1, 224, 256),
    ]
}
REDUCTION_B = {
    17: [(1, 1, 1024, 192), (1, 1, 1024, 256), (1, 7, 256, 256), (7, 1, 256, 320)],
    8: [(3, 3, 192, 192), (3, 3, 320, 320)],
}
C = {
    8: [
        *[(1, 1, 1536, 256), (1, 1, 1536, 256)],
        *[(1, 1, 1536, 384), (1, 3, 384, 256), (3, 1, 384, 256)],
        *[(1, 1, 1536, 384), (1, 3, 384, 448), (3, 1, 448, 512)],
        *[(3, 1, 512, 256), (1, 3, 512, 256)],
    ]
}
NETWORK = {  # figure 9: (repeats, convolutions)
    "stem": (1, STEM),
    "inception_a": (4, A),
    "reduction_a": (1, REDUCTION_A),
    "inception_b": (7, B),
    "reduction_b": (1, REDUCTION_B),
    "inception_c": (3, C),
}
HEAD = 1536 * 1000


def by_hand(part):
    """Returns (parameters, MACs); a norm has a scale and a bias per channel."""
    rows = [(side, *conv) for side, convs in part.items() for conv in convs]
    params = sum(h * w * i * o + 2 * o for _, h, w, i, o in rows)
    return params, sum(side**2 * h * w * i * o for side, h, w, i, o in rows)


def test_count():
    counted = sum(times * by_hand(part)[0] for times, part in NETWORK.values()) + HEAD + 1000
    assert PUBLISHED["inception_v4"].params == counted
    # timm's benchmark tables: 42.68 M and 12.28 GMACs.
    macs = sum(times * by_hand(part)[1] for times, part in NETWORK.values()) + HEAD
    assert macs == pytest.approx(12.28e9, rel=3e-3)


def test_cost_of_each_part():
    measured = {}
    for layer in cost_of("inception_v4").layers:
        params, macs = measured.get(part := layer.path.partition("/")[0], (0, 0))
        measured[part] = (params + layer.params, macs + layer.macs)
    expected = {}
    for name, (times, part) in NETWORK.items():
        expected[name] = tuple(times * n for n in by_hand(part))
    assert measured == expected | {"head": (HEAD + 1000, HEAD)}


captured = partial(capture_shapes, "inception_v4")


@pytest.mark.parametrize(
    ("size", "sides"), [(299, (35, 17, 8)), (100, (10, 4, 1)), (75, (7, 3, 1))]
)
def test_output_shape_of_each_stage(size, sides):
    logits, shapes = captured(size)
    for stages, side, width in zip(
        (
            ("stem", *(f"inception_a/block{i}" for i in range(1, 5)), "inception_a"),
            ("reduction_a", *(f"inception_b/block{i}" for i in range(1, 8)), "inception_b"),
            ("reduction_b", *(f"inception_c/block{i}" for i in range(1, 4)), "inception_c"),
        ),
        sides,
        (384, 1024, 1536),
    ):
        assert {shapes[stage] for stage in stages} == {(2, side, side, width)}
    assert logits.shape == (2, 1000)


def test_sizes_inside_the_stem():
    _, shapes = captured(299)
    assert shapes["stem/entry/conv1"] == (2, 149, 149, 32)
    assert shapes["stem/entry"] == (2, 147, 147, 64)
    assert shapes["stem/mixed_3a"] == (2, 73, 73, 96)
    assert shapes["stem/mixed_4a_branch2"] == (2, 71, 71, 96)
    assert shapes["stem/mixed_5a"] == (2, 35, 35, 192)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_other_norms_in_bfloat16(norm):
    model = blank_model("inception_v4", dtype="bfloat16", norm=norm, depths=(1, 1, 1))
    images = jnp.zeros((1, 75, 75, 3))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("train", [False, True])
def test_dropout_of_a_fifth_before_the_head_in_training_only(train):
    model, images = create_model("inception_v4"), jnp.zeros((2, 75, 75, 3))
    seen = []

    def record(run, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            seen.append((context.module.rate, context.module.deterministic, args[0].shape))
        return run(*args, **kwargs)

    def apply(key):
        return model.apply(
            model.init(key, images), images, train=train, rngs={"dropout": key}, mutable=True
        )

    with nn.intercept_methods(record):
        jax.eval_shape(apply, jax.random.key(0))
    assert seen == [(0.2, True, (2, 1536)), (0.2, not train, (2, 1536))]


def initial_values(*paths, **fields):
    """Returns the initial values at `paths`; the other parameters are not compiled."""
    model = create_model("inception_v4", **fields)

    @jax.jit
    def leaves(key):
        flat = pytree.flatten(model.init(key, jnp.zeros((1, 75, 75, 3)))["params"])
        return [flat[path] for path in paths]

    return map(np.asarray, leaves(jax.random.key(0)))


def test_initial_values():
    paths = "reduction_a/branch2/conv2/kernel", "head/kernel"  # 3x3, 192 to 224
    paper, head = initial_values(*paths, init="paper")
    assert paper.shape == (3, 3, 192, 224)
    std = np.sqrt(2 / (9 * 192))
    np.testing.assert_allclose(paper.std(), std, rtol=0.01)
    assert np.abs(paper).max() <= 2 * std / 0.8796  # truncated, then scaled to the deviation std
    np.testing.assert_allclose(head.std(), np.sqrt(2 / (1536 + 1000)), rtol=0.01)
    he, head = initial_values(*paths)
    np.testing.assert_allclose(he.std(), np.sqrt(2 / (9 * 224)), rtol=0.01)
    np.testing.assert_allclose(head.std(), 1536**-0.5, rtol=0.01)


def test_the_mean_excludes_the_padding():
    """Identical pixels have the same 3x3 mean everywhere, also at the border."""
    conv = partial(layers.Conv, use_bias=False, kernel_init=nn.initializers.ones)
    norm = layers.make_norm("none", train=False)
    block = inception_v4.Mixed(branches=(), pooled=((3, 1),), conv=conv, norm=norm)
    y, _ = block.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    np.testing.assert_allclose(y, np.full((1, 4, 4, 3), 2.0), rtol=1e-6)


NARROW = partial(  # as wide as its input
    inception_v4.Mixed, (((4, 1),), ((4, 1), (4, (1, 3)))), pooled=((4, 1),)
)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "width"), [(NARROW, 12), (inception_v4.InceptionC, 1536)])
def test_scanned_blocks_compute_the_same(block, width):
    norm = layers.make_norm("batch", train=True, epsilon=1e-3)
    conv = partial(layers.Conv, use_bias=False)
    x = np.random.default_rng(0).standard_normal((2, 3, 3, width)).astype(np.float32)
    stage = layers.Stage(partial(block, norm=norm), conv, depth=3)
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
