"""DenseNets: published counts, table 1's shapes, B and C separately, dropout, savings of remat."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import densenet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

FAST = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time
TINY = dict(depth=10, growth_rate=4, input_size=(8, 8, 3), num_classes=3)  # 2 layers per block
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


def by_hand(depths, k, stem, *, bottleneck, theta, classes, window, channels=3):
    """Counts table 1 and section 3: convolutions, two per channel of each norm, the head."""
    count = window * window * channels * stem
    c = stem
    for i, depth in enumerate(depths):
        for _ in range(depth):
            inner = 4 * k if bottleneck else c
            count += 2 * c + 9 * inner * k
            count += c * inner + 2 * inner if bottleneck else 0
            c += k
        if i < len(depths) - 1:
            count += 2 * c + c * int(theta * c)
            c = int(theta * c)
    return count + 2 * c + (c + 1) * classes


def shapes_of(model):
    return jax.eval_shape(partial(init_variables, model), jax.random.key(0))


def test_count_of_264_by_hand():
    hand = (
        by_hand((6, 12, 64, 48), 32, 64, bottleneck=True, theta=0.5, classes=1000, window=7)
        + 2 * 64
    )  # the stem's norm
    assert PUBLISHED["densenet264"].params == hand


@pytest.mark.parametrize(
    ("depth", "k", "bc", "rounded"),
    [
        (40, 12, False, 1.0e6),  # table 2, in millions
        (100, 12, False, 7.0e6),
        (100, 24, False, 27.2e6),
        (100, 12, True, 0.8e6),
        (250, 24, True, 15.3e6),
        (190, 40, True, 25.6e6),
    ],
)
def test_count_on_cifar_by_hand(depth, k, bc, rounded):
    n = (depth - 4) // (6 if bc else 3)
    hand = by_hand(
        (n,) * 3,
        k,
        2 * k if bc else 16,
        bottleneck=bc,
        theta=0.5 if bc else 1.0,
        classes=10,
        window=3,
    )
    name = f"densenet_bc_{depth}_{k}" if bc else f"densenet_{depth}_{k}"
    assert PUBLISHED[name].params == hand
    assert hand == pytest.approx(
        rounded, rel=0.02 if rounded > 0.9e6 else 0.05
    )  # 0.8 has one digit


@pytest.mark.parametrize("n", [121, 169, 201])
def test_keras_differs_in_its_norms_only(n):
    theirs, ours = (densenet.VARIANTS[f"{kind}densenet{n}"].keywords for kind in ("keras_", ""))
    assert theirs == ours | dict(epsilon=1.001e-5, momentum=0.99)


@pytest.mark.parametrize(
    ("bottleneck", "theta", "stem"), [(False, 0.5, 16), (True, 1.0, 16), (True, 0.3, 24)]
)
def test_b_and_c_separately(bottleneck, theta, stem):
    depth = 16 if bottleneck else 10
    model = create_model(
        "densenet_40_12", depth=depth, bottleneck=bottleneck, compression=theta, num_classes=10
    )
    got = pytree.count(shapes_of(model)["params"])
    assert got == by_hand(
        (2, 2, 2), 12, stem, bottleneck=bottleneck, theta=theta, classes=10, window=3
    )


def test_output_shape_of_each_stage_and_macs():
    """Table 1."""
    logits, shapes = capture_shapes("densenet121", 224)
    assert logits.shape == (2, 1000)
    for name, expected in {
        "stem/conv": (112, 112, 64),
        "stem": (56, 56, 64),
        "block1/layer1/conv1": (56, 56, 128),
        "block1/layer1": (56, 56, 32),
        "block1": (56, 56, 256),
        "transition1": (28, 28, 128),
        "block2": (28, 28, 512),
        "transition2": (14, 14, 256),
        "block3": (14, 14, 1024),
        "transition3": (7, 7, 512),
        "block4": (7, 7, 1024),
        "norm": (7, 7, 1024),
    }.items():
        assert shapes[name] == (2, *expected), name
    macs = cost_of("densenet121").macs
    assert macs == pytest.approx(2.834e9, rel=5e-4)  # torchvision's _ops


def test_shapes_on_cifar():
    _, shapes = capture_shapes("densenet_40_12", 32, **(TINY | dict(growth_rate=12)))
    assert shapes["stem"] == (2, 32, 32, 16)
    assert shapes["block1"] == shapes["transition1/conv"] == (2, 32, 32, 40)
    assert shapes["block3/layer2"] == (2, 8, 8, 12)
    assert shapes["block3"] == (2, 8, 8, 88)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=41), "3n . 4 without bottlenecks, such as 40 or 43, got 41"),
        (dict(depth=5), "such as 7 or 10, got 5"),
        (dict(bottleneck=True, depth=39), "6n . 4 with bottlenecks, such as 34 or 40, got 39"),
        (dict(depths=(2, 2)), r"expected either depth or depths, got 40 and \(2, 2\)"),
        (dict(growth_rate=(12, 24)), r"a growth rate for each of the 3 blocks, got \(12, 24\)"),
    ],
)
def test_invalid_depths_and_growth_rates(fields, message):
    with pytest.raises(UserError, match=message):
        capture_shapes("densenet_40_12", 32, **fields)


def test_group_norm_where_the_widths_allow_it():
    assert (
        shapes_of(create_model("densenet_40_12", **(TINY | dict(growth_rate=16)), norm="group"))[
            "batch_stats"
        ]
        == {}
    )
    with pytest.raises(UserError, match="16 channels, got 28 in block1/layer2/norm1"):
        shapes_of(create_model("densenet_40_12", norm="group"))


def test_dropout_after_every_convolution_but_the_first():
    """Section 4.2, here with a rate of 0.5."""
    fields = TINY | dict(depth=None, depths=(2, 1))
    model = create_model("densenet_bc_100_12", **fields, dropout=0.5)
    variables = init_variables(model, jax.random.key(0))

    @partial(jax.jit, static_argnames="train", compiler_options=FAST)
    def run(train):
        return model.apply(
            variables,
            IMAGES,
            train=train,
            rngs={"dropout": jax.random.key(1)},
            capture_intermediates=True,
            mutable=["intermediates", "batch_stats"],
        )

    seen = pytree.flatten(run(True)[1]["intermediates"])
    seen = {path.removesuffix("/__call__/0"): np.asarray(leaf) for path, leaf in seen.items()}
    convs = {path for path in seen if path.rpartition("/")[2].startswith("conv")} - {"stem/conv"}
    assert len(convs) == 3 * 2 + 1
    for path in convs:
        before, after = seen[path], seen[path.replace("conv", "dropout")]
        kept = after != 0
        np.testing.assert_allclose(after[kept], 2 * before[kept], rtol=1e-6)
        assert 0.2 < kept.mean() < 0.8, path
    without_dropout = jax.jit(model.clone(dropout=0.0).apply, compiler_options=FAST)
    np.testing.assert_allclose(run(False)[0], without_dropout(variables, IMAGES), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"),
    [("densenet_40_12", 0.25), ("densenet_bc_100_12", 0.55)],
)
def test_remat_changes_no_result_and_keeps_less(name, share):
    """Compares the values that the forward pass keeps for the backward pass.

    Without remat these include each layer's input, concatenated and then again normalized. With
    remat, only each map once and the bottlenecks' outputs are kept.
    """

    def build(depth, remat):
        fields = TINY | dict(depth=None, depths=(depth,), remat=remat)
        model = create_model(name, **fields)

        def loss(params, batch_stats):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, state = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
            return jnp.sum(logits**2), state

        return model, loss

    def kept(remat):
        model, loss = build(12, remat)
        shapes = shapes_of(model)
        backward = partial(jax.vjp, loss, has_aux=True)
        kept = jax.eval_shape(lambda *v: backward(*v)[1], shapes["params"], shapes["batch_stats"])
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    assert kept(remat=True) < share * kept(remat=False)

    (model, plain), (same, saving) = build(3, False), build(3, True)
    assert shapes_of(same) == shapes_of(model)
    variables = init_variables(model, jax.random.key(0))
    results = [
        jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(
            variables["params"], variables["batch_stats"]
        )
        for loss in (plain, saving)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *results)
