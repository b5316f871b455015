"""Vision Transformers: published counts and MACs, shapes, positions, and what each field does."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import vit
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.models.vit import resize_positions
from flax_cnns.weights import convert
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes


def of_table_1(patch: int, width: int, depth: int) -> int:
    """Counts parameters: patches, class token, positions, blocks, the last norm, 1000 classes."""
    patches = patch * patch * 3 * width + width
    attention = (3 * width * width + 3 * width) + (width * width + width)
    dense = (4 * width * width + 4 * width) + (4 * width * width + width)
    positions = width + (1 + (224 // patch) ** 2) * width
    block = attention + dense + 2 * 2 * width
    return patches + positions + depth * block + 2 * width + 1000 * width + 1000


def test_small_32_by_hand():
    assert of_table_1(16, 768, 12) == PUBLISHED["vit_b_16"].params  # the formula is right
    assert of_table_1(32, 1024, 24) == PUBLISHED["vit_l_32"].params
    assert PUBLISHED["vit_small_patch32_224"].params == of_table_1(32, 384, 12)


def test_aliases():
    for alias, name in vit.ALIASES.items():
        assert vit.VARIANTS[alias] is vit.VARIANTS[name]


@pytest.mark.parametrize(
    ("name", "side", "width", "depth"),
    [("vit_b_16", 14, 768, 12), ("vit_b_32", 7, 768, 12), ("vit_small_patch16_224", 14, 384, 12)],
)
def test_shapes(name, side, width, depth):
    logits, shapes = capture_shapes(name, 224)
    tokens = 1 + side * side
    assert shapes["patches"] == (2, side, side, width)
    for i in range(depth):
        assert shapes[f"encoder/block{i + 1}"] == (2, tokens, width)
    assert f"encoder/block{depth + 1}" not in shapes
    assert shapes["encoder/block1/attention/qkv"] == (2, tokens, 3 * width)
    assert shapes["encoder/block1/attention/products"] == (2, tokens, width // 64, 64)
    assert shapes["encoder/block1/expand"] == (2, tokens, 4 * width)
    assert shapes["norm"] == (2, width)
    assert logits.shape == (2, 1000)


TINY = dict(patch=4, width=12, depth=3, heads=3, num_classes=5, input_size=(8, 12, 3))
NO_OPTIMIZATION = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def tiny():
    """Returns (variables of TINY with random values everywhere, images)."""
    model = create_model("vit_b_16", **TINY)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    random = np.random.RandomState(0)
    variables = jax.tree.map(lambda s: (0.3 * random.randn(*s.shape)).astype(np.float32), shapes)
    return variables, jax.random.normal(jax.random.key(1), (4, 8, 12, 3))


@cache
def program(train, **fields):
    model = create_model("vit_b_16", **TINY | fields)

    def apply(variables, images, key):
        rngs = {name: key for name in ("dropout", "shared")} if train else None
        return model.apply(variables, images, train=train, rngs=rngs)

    return jax.jit(apply, compiler_options=NO_OPTIMIZATION)


def logits(variables, images, train=False, key=2, **fields):
    return program(train, **fields)(variables, images, jax.random.key(key))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(dict(scan=True), marks=pytest.mark.slow),
        pytest.param(dict(scan=True, remat=True, drop_path_mode="batch"), marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_no_result(tiny, fields):
    given = dict(train=True, dropout=0.3, drop_path=0.5) | fields
    unrolled = given | dict(scan=False, remat=False)
    np.testing.assert_allclose(logits(*tiny, **given), logits(*tiny, **unrolled), atol=1e-4)


def test_dropout_and_drop_path_leave_evaluation_and_names_alone(tiny):
    variables, _ = tiny
    model = create_model("vit_b_16", **TINY, dropout=0.5, drop_path=0.5)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    plain = logits(*tiny)
    np.testing.assert_array_equal(logits(*tiny, dropout=0.5, drop_path=0.5), plain)
    for field in ("dropout", "drop_path"):
        trained = [logits(*tiny, train=True, key=key, **{field: 0.5}) for key in (2, 2, 3)]
        np.testing.assert_array_equal(trained[0], trained[1])
        assert np.abs(trained[0] - plain).max() > 1e-2
        assert np.abs(trained[0] - trained[2]).max() > 1e-2


@pytest.mark.parametrize("field", ["dropout", "drop_path"])
def test_training_needs_its_stream(tiny, field):
    variables, images = tiny
    model = create_model("vit_b_16", **TINY, **{field: 0.5})
    with pytest.raises(UserError, match="dropout"):
        jax.eval_shape(partial(model.apply, train=True), variables, images)


def test_only_positions_tell_one_place_from_another(tiny):
    """Reordered patches give the same logits if their positions are reordered, too."""
    variables, images = tiny
    swapped = jnp.concatenate([images[:, :, 4:], images[:, :, :4]], axis=2)  # columns of 0 1 2
    assert np.abs(logits(variables, swapped) - logits(*tiny)).max() > 1e-3
    order = [0, 2, 3, 1, 5, 6, 4]  # the class token, then rows of 1 2 0
    moved = {**variables["params"]}
    moved["position_embedding"] = moved["position_embedding"][:, order]
    got = logits({**variables, "params": moved}, swapped)
    np.testing.assert_allclose(got, logits(*tiny), atol=1e-5)


def test_first_values_are_torchvisions():
    variables = init_variables(create_model("vit_b_16", **TINY | dict(width=96)), jax.random.key(0))
    flat = pytree.flatten(variables["params"])
    assert (flat["head/kernel"] == 0).all()
    assert (flat["class_token"] == 0).all()
    assert float(flat["position_embedding"].std()) == pytest.approx(0.02, rel=0.1)
    for name, variance in [
        ("patches", 1 / 48),
        ("encoder/block1/attention/qkv", 2 / (4 * 96)),
        ("encoder/block2/project", 2 / (5 * 96)),
    ]:
        assert float(flat[f"{name}/kernel"].var()) == pytest.approx(variance, rel=0.1)


def test_without_classes_it_gives_the_normed_class_token(tiny):
    variables, images = tiny
    features, shapes = capture_shapes("vit_b_32", 224, num_classes=None)
    assert (features.shape, features.dtype) == ((2, 768), jnp.float32)
    assert "head" not in shapes
    head = variables["params"]["head"]
    bare = {name: p for name, p in variables["params"].items() if name != "head"}
    features = logits({**variables, "params": bare}, images, num_classes=None)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits(*tiny), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        (
            {},
            (8, 8),
            r"expected images of 8x12, the size of the position grid, got 8x8; .*resize_pos",
        ),
        (dict(input_size=(9, 12, 3)), (9, 12), "multiples of the patch, 4, got 9x12"),
        (dict(heads=5), (8, 12), "a number of heads that divides 12 channels, got 5"),
    ],
)
def test_sizes_that_do_not_fit(fields, size, message):
    model = create_model("vit_b_16", **TINY | fields)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (1, *size, 3)))


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resized_positions_serve_another_resolution(tiny, method):
    """A ramp along H stays a ramp. The class token's position and all other parameters stay."""
    params = tiny[0]["params"]
    old, new = (32, 12), (48, 24, 3)
    ramp = np.zeros((1, 1 + 8 * 3, 12), np.float32)
    ramp[0, 0] = 7.0
    ramp[0, 1:] = np.repeat(np.arange(8.0) + 0.5, 3)[:, None]  # centers of rows, in rows
    given = {**params, "position_embedding": ramp}
    resized = resize_positions(given, old, new, method)
    positions = np.asarray(resized["position_embedding"])
    assert positions.shape == (1, 1 + 12 * 6, 12)
    np.testing.assert_array_equal(positions[0, 0], 7.0)
    grid = positions[0, 1:].reshape(12, 6, 12)
    centers = (np.arange(12) + 0.5) * 8 / 12
    inner = slice(3, -3)  # away from the border
    expected = np.broadcast_to(centers[inner, None, None], (6, 6, 12))
    np.testing.assert_allclose(grid[inner], expected, atol=1e-4)
    assert all(resized[name] is params[name] for name in params if name != "position_embedding")
    model = create_model("vit_b_16", **TINY | dict(input_size=new))
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_positions_of_the_same_size_are_the_same(tiny):
    params = tiny[0]["params"]
    resized = resize_positions(params, (8, 12), (8, 12))
    np.testing.assert_allclose(
        resized["position_embedding"], params["position_embedding"], atol=1e-6
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (((8, 12), (16, 24), "nearest"), "unknown method 'nearest'"),
        (((8, 12), (16, 25)), "multiples of the patch, 4, got 16x25"),
        (((12, 12), (16, 24)), r"3x3 patches of 4x4 and the class token, got 7: .* 12x12"),
    ],
)
def test_what_cannot_be_resized(tiny, given, message):
    with pytest.raises(UserError, match=message):
        resize_positions(tiny[0]["params"], *given)


@pytest.mark.oracle
@pytest.mark.parametrize("new", [(24, 20), (8, 12)])
def test_resized_positions_beside_timms(new):
    torch = pytest.importorskip("torch")
    from tests.models import foreign

    foreign.torchvision()
    from timm.layers.pos_embed import resample_abs_pos_embed

    grid = np.random.RandomState(0).randn(1, 1 + 4 * 5, 6).astype(np.float32)
    params = {"position_embedding": grid, "patches": {"kernel": np.zeros((4, 4, 3, 6))}}
    got = resize_positions(params, (16, 20), new)["position_embedding"]
    theirs = resample_abs_pos_embed(torch.from_numpy(grid), [n // 4 for n in new], [4, 5])
    np.testing.assert_allclose(got, theirs.numpy(), atol=1e-4)


def test_timms_names():
    """Checks a tensor of each kind by its values."""
    fields = TINY | dict(depth=1)
    model = create_model("vit_base_patch16_224", **fields)
    shapes = pytree.flatten(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    names = {"patches": "patch_embed.proj", "norm": "norm", "head": "head"}
    for ours, theirs in [
        *(("norm1", "norm1"), ("norm2", "norm2"), ("attention/qkv", "attn.qkv")),
        *(("attention/out", "attn.proj"), ("expand", "mlp.fc1"), ("project", "mlp.fc2")),
    ]:
        names[f"encoder/block1/{ours}"] = f"blocks.0.{theirs}"
    bare = {"class_token": "cls_token", "position_embedding": "pos_embed"}
    random, tensors, expected = np.random.RandomState(0), {}, {}
    for path, leaf in shapes.items():
        module, _, kind = path.removeprefix("params/").rpartition("/")
        value = expected[path] = random.randn(*leaf.shape).astype(np.float32)
        if kind in bare:
            tensors[bare[kind]] = value
        elif kind == "kernel":
            axes = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
            tensors[f"{names[module]}.weight"] = value.transpose(axes)
        else:
            tensors[f"{names[module]}.{'weight' if kind == 'scale' else kind}"] = value
    got = pytree.flatten(convert("vit_base_patch16_224", tensors, "timm", **fields))
    assert set(got) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
