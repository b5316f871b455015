"""Loss landscapes against formulas that are written anew here."""

import dataclasses
import json
import types
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, layers
from flax_cnns import tree as pytree
from flax_cnns.analysis.landscape import curvature, directions, grids
from flax_cnns.analysis.landscape.objective import Loss
from flax_cnns.errors import UserError


class Small(nn.Module):
    """Two convolutions with BatchNorm, the second one ours; compiles in a third of the time of the
    smallest registered network with BatchNorm."""

    @nn.compact
    def __call__(self, images, *, train):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="norm1")(nn.Conv(4, (3, 3), name="conv1")(images)))
        x = nn.relu(norm(name="norm2")(layers.Conv(4, (3, 3), name="conv2")(x)))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def small():
    """(loss, variables) of a network with BatchNorm."""
    images = jax.random.normal(jax.random.key(1), (6, 8, 8, 3))
    labels = jnp.arange(6) % 10
    variables = jax.jit(partial(Small().init, train=False))(jax.random.key(0), images)
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    return Loss(Small(), batches), variables


@pytest.fixture(scope="module")
def pair(small):
    return tuple(directions.random_direction(small[1]["params"], jax.random.key(i)) for i in (1, 2))


def cross_entropy(loss, variables):
    """The mean over all images, written anew."""
    images, labels = (jnp.concatenate(parts) for parts in zip(*loss.batches))
    logits = np.asarray(loss.model.apply(variables, images, train=False), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_probabilities[np.arange(len(labels)), labels].mean()


def test_the_loss_is_the_mean_cross_entropy(small):
    loss, variables = small
    assert loss(variables) == pytest.approx(cross_entropy(loss, variables), rel=1e-5)


def test_a_filter_of_a_direction_has_the_norm_of_the_weights(small, pair):
    for path, leaf in pytree.flatten(small[1]["params"]).items():
        drawn = pytree.flatten(pair[0])[path]
        if leaf.ndim < 2:
            assert not drawn.any()
            continue
        for out in range(leaf.shape[-1]):  # a filter is one output
            wanted, found = (np.linalg.norm(np.asarray(a)[..., out]) for a in (leaf, drawn))
            np.testing.assert_allclose(found, wanted, rtol=1e-4)


def accuracy(loss, variables):
    """The share of images whose label has the largest logit, written anew."""
    images, labels = (np.concatenate(parts) for parts in zip(*loss.batches))
    return np.mean(np.argmax(loss.model.apply(variables, images, train=False), 1) == labels)


def test_a_plane_has_the_loss_and_the_accuracy_at_its_points(small, pair):
    loss, variables = small
    found = grids.evaluate_plane(loss, variables, pair, [-0.5, 0.0, 0.5], [0.0, 1.0], say=len)
    assert found.losses.shape == found.accuracies.shape == (2, 3)
    assert found.losses[0, 1] == pytest.approx(loss(variables), rel=1e-5)
    moved = jax.tree.map(lambda w, d, e: w + 0.5 * d + e, variables["params"], *pair)
    moved = {**variables, "params": moved}
    assert found.losses[1, 2] == pytest.approx(cross_entropy(loss, moved), rel=1e-4)
    assert found.accuracies[1, 2] == pytest.approx(accuracy(loss, moved))
    assert found.accuracies[0, 1] == pytest.approx(accuracy(loss, variables))


class Bowl(nn.Module):
    """Two logits that depend on a kernel of two weights."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, images, *, train):
        kernel = self.param("kernel", nn.initializers.ones, (1, 2))
        return self.scale * images.reshape(-1, 1) @ kernel


@pytest.fixture
def bowl():
    """(loss, variables, pair, xs, ys) that compile in no time."""
    batches = [(jnp.array([1.0, -1.0, 2.0]), jnp.array([0, 1, 1]))]
    direction = {"kernel": jnp.array([[1.0, 0.0]])}
    variables = {"params": {"kernel": jnp.ones((1, 2))}}
    return Loss(Bowl(), batches), variables, (direction, direction), [0.0, 1.0], [0.0, 1.0, 2.0]


def test_an_interrupted_plane_goes_on_from_its_rows(bowl, tmp_path, monkeypatch):
    wanted = grids.evaluate_plane(*bowl, say=len)
    computed, real = [], Loss.measure_row

    def measure_row(self, variables, directions, xs, y):
        if y == 1.0 and not computed.count("stop"):
            computed.append("stop")
            raise KeyboardInterrupt
        computed.append(y)
        return real(self, variables, directions, xs, y)

    monkeypatch.setattr(Loss, "measure_row", measure_row)
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 rows are saved in .*plane; run the same"):
        grids.evaluate_plane(*bowl, folder=tmp_path / "plane", say=len)
    said = []
    found = grids.evaluate_plane(*bowl, folder=tmp_path / "plane", say=said.append)
    assert computed == [0.0, "stop", 1.0, 2.0]
    np.testing.assert_array_equal(found.losses, wanted.losses)
    np.testing.assert_array_equal(found.accuracies, wanted.accuracies)
    assert [line.partition(": ")[0] for line in said[1:]] == ["row 2/3", "row 3/3"]
    assert all("ETA 0:00:0" in line for line in said[1:])
    (tmp_path / "plane/row1.npy").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"row1\.npy is damaged .*; remove this file"):
        grids.evaluate_plane(*bowl, folder=tmp_path / "plane", say=len)


def test_rows_of_another_plane_are_refused(bowl, tmp_path):
    loss, variables, *where = bowl
    given = dict(folder=tmp_path / "plane", say=len)
    grids.evaluate_plane(loss, variables, *where, **given)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    images, labels = loss.batches[0]
    changes = {
        # The same weights in another network, or under another loss, are another plane.
        "network": (dataclasses.replace(loss, model=Bowl(2.0)), variables),
        "loss": (dataclasses.replace(loss, each=lambda logits, labels: logits[:, 0]), variables),
        "variables": (loss, doubled),
        "images": (dataclasses.replace(loss, batches=[(images + 1, labels)]), variables),
        "batchnorm": (dataclasses.replace(loss, batchnorm="batch"), variables),
    }
    for differing, (other, weights) in changes.items():
        with pytest.raises(UserError, match=rf"another plane or line \({differing} differ\)"):
            grids.evaluate_plane(other, weights, *where, **given)
    with pytest.raises(UserError, match=r"\(xs differ\)"):
        grids.evaluate_plane(loss, variables, where[0], [0.0, 3.0], where[2], **given)


def test_the_description_of_a_network_has_no_addresses_of_this_process():
    described = json.dumps(grids.describe_network(create_model("tf_efficientnet_lite0")))
    assert "flax_cnns.models" in described
    assert " at 0x" not in described
    plain, residual = (
        grids.describe_network(create_model(f"cifar_{name}20")) for name in ("plain", "resnet")
    )
    assert plain != residual


def test_labels_may_be_soft_and_the_loss_ones_own(bowl):
    loss, variables, *_ = bowl
    images, labels = loss.batches[0]
    soft = dataclasses.replace(loss, batches=[(images, jax.nn.one_hot(labels, 2))])
    np.testing.assert_allclose(soft.measure(variables), loss.measure(variables), rtol=1e-6)
    half = dataclasses.replace(loss, batches=[(images, jnp.full((3, 2), 0.5))])
    assert half(variables) == pytest.approx(np.log(2), rel=1e-5)  # both logits are equal
    own = dataclasses.replace(loss, each=lambda logits, labels: logits[:, 0] ** 2)
    assert own(variables) == pytest.approx(2.0)  # the mean of 1, 1, 4


def test_rescaling_a_filter_in_front_of_a_batchnorm_leaves_the_picture(small):
    """The network is the same function, and its filter-normalized plane too."""
    loss, variables = small
    loss = dataclasses.replace(loss, batchnorm="batch")  # statistics follow the filter
    path = "conv2/kernel"
    flat = pytree.flatten(variables["params"])
    scaled = {**flat, path: flat[path] * jnp.array([16.0, 0.1, 1.0, 4.0])}
    others = {**variables, "params": pytree.unflatten(scaled)}
    planes = []
    for each in (variables, others):
        pair = tuple(directions.random_direction(each["params"], jax.random.key(i)) for i in (1, 2))
        plane = grids.evaluate_plane(loss, each, pair, [-0.5, 0.5], [0.5], say=len)
        planes.append(plane.losses)
    np.testing.assert_allclose(*planes, rtol=1e-3)
    # Without the normalization by filter it is another picture.
    still = {name: jnp.zeros_like(leaf) for name, leaf in flat.items()}
    plain = pytree.unflatten({**still, path: jax.random.normal(jax.random.key(3), (3, 3, 4, 4))})
    rows = [
        loss.measure_row(each, (plain, plain), jnp.array([0.5]), 0.0)[0]
        for each in (variables, others)
    ]
    assert abs(rows[0] - rows[1]) > 1e-2 * abs(rows[0])


def test_stacked_blocks_get_the_direction_that_they_have_one_by_one():
    draw = jax.random.normal
    blocks = {f"block{i}": {"kernel": draw(jax.random.key(i), (3, 4))} for i in (1, 2, 3, 4)}
    params = {"stage1": blocks, "head": {"kernel": draw(jax.random.key(5), (4, 2))}}
    stacked = pytree.stack_blocks(params)
    assert list(stacked["stage1"]) == ["block1", "block2-4"]
    found = directions.random_direction(stacked, jax.random.key(1))
    wanted = pytree.stack_blocks(directions.random_direction(params, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_statistics_of_a_batch_come_without_dropout():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = images.reshape(len(images), -1)
            x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    images = 5 + jax.random.normal(jax.random.key(1), (6, 2, 2, 1))
    variables = Dropping().init(jax.random.key(0), images, train=False)
    labels = jnp.arange(6) % 3
    given = ([(images, labels)], "batch")
    found = Loss(Dropping(), *given)(variables)
    x = images.reshape(6, 4)
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    logits = x @ variables["params"]["Dense_0"]["kernel"]
    wanted = -jax.nn.log_softmax(logits)[jnp.arange(6), labels].mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)


def test_a_line_interpolates_the_running_statistics_too(small, tmp_path):
    loss, variables = small
    end = jax.tree.map(lambda a: 1.5 * a + 0.1, variables)
    given = (loss, variables, end, [0.0, 0.5, 1.0])
    found = grids.evaluate_line(*given, folder=tmp_path / "line").losses
    middle = jax.tree.map(lambda a, b: (a + b) / 2, variables, end)
    wanted = [cross_entropy(loss, each) for each in (variables, middle, end)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    (tmp_path / "line/point1.npy").unlink()
    again = grids.evaluate_line(*given, folder=tmp_path / "line").losses
    np.testing.assert_array_equal(again, found)
    other = {**variables, "params": {**variables["params"], "head": {"kernel": jnp.ones((4, 3))}}}
    with pytest.raises(UserError, match="'params/head/"):
        grids.evaluate_line(loss, variables, other, [0.0])


def test_statistics_beyond_the_ends_and_reestimated_ones(small):
    loss, variables = small
    flat = pytree.flatten(variables)
    path = next(name for name in flat if name.startswith("batch_stats/") and name.endswith("/var"))
    wide = {**variables, **pytree.unflatten({**flat, path: 4 * flat[path]})}
    seen = []

    def reestimate(between):
        seen.append(pytree.flatten(between)[path])
        return variables

    found = grids.evaluate_line(loss, variables, wide, [-0.5, 1.0], reestimate=reestimate).losses
    assert not seen[0].any()  # (1 + 0.5) - 0.5 * 4 < 0: a variance is at least 0
    np.testing.assert_allclose(seen[1], 4 * flat[path])
    np.testing.assert_allclose(found, loss(variables), rtol=1e-6)


def test_a_trajectory_in_a_plane_is_found():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((12, 2)))[0].T
    points = np.array([[5.0, 1.0], [3.0, -1.0], [1.0, 0.5], [0.0, 0.0]])
    end = rng.standard_normal(12)
    checkpoints = [
        {
            "a": jnp.asarray((end + p @ axes)[:8].reshape(4, 2)),
            "b": jnp.asarray((end + p @ axes)[8:]),
        }
        for p in points
    ]
    found = directions.fit_trajectory(checkpoints)
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(found.explained, spread / spread.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.points[-1], 0)
    lengths = lambda p: np.linalg.norm(p[:, None] - p[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(lengths(found.points), lengths(points), atol=1e-4)
    inner = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, found.directions)))
    assert abs(inner) < 1e-5
    with pytest.raises(UserError, match="at least 3 checkpoints, got 2"):
        directions.fit_trajectory(checkpoints[:2])
    line = [{"a": t * jnp.ones(3)} for t in (3.0, 1.0, 0.0)]
    with pytest.raises(UserError, match="on a line"):
        directions.fit_trajectory(line)


def test_eigenvalues_of_a_quadratic():
    """The Hessian of w . A w / 2 is A."""
    values = np.array([9.0, -5.0, 1.0, 0.5, 0.1])
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    matrix = jnp.asarray(axes @ np.diag(values) @ axes.T, jnp.float32)
    quadratic = types.SimpleNamespace(
        hessian_times=lambda variables, direction: {"w": matrix @ direction["w"]}
    )
    found = curvature.find_top_eigenvalues(
        quadratic, {"params": {"w": jnp.ones(5)}}, 2, key=jax.random.key(0), tolerance=1e-6
    )
    np.testing.assert_allclose([pair.value for pair in found], [9.0, -5.0], rtol=1e-3)
    for i, pair in enumerate(found):
        np.testing.assert_allclose(abs(pair.vector["w"] @ axes[:, i]), 1.0, atol=1e-3)
    assert abs(found[0].vector["w"] @ found[1].vector["w"]) < 1e-5


def test_the_hessian_is_that_of_differences(small, pair):
    loss, variables = small
    found = loss.hessian_times(variables, pair[0])
    step = 1e-2
    ends = [
        loss.gradient(
            {
                **variables,
                "params": jax.tree.map(
                    lambda w, d, s=sign: w + s * step * d, variables["params"], pair[0]
                ),
            }
        )
        for sign in (1, -1)
    ]
    wanted = jax.tree.map(lambda a, b: (a - b) / (2 * step), *ends)
    head, by_differences = (np.asarray(t["head"]["kernel"]) for t in (found, wanted))
    assert np.abs(head - by_differences).max() < 0.05 * np.abs(by_differences).max()


def test_sharpness_is_the_rise_along_the_gradient(small):
    loss, variables = small
    found = curvature.measure_sharpness(loss, variables, 0.01)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(loss.gradient(variables))))
    assert found == pytest.approx(0.01 * norm, rel=0.2)
