"""Loss landscapes of runs: their images, their loss, their checkpoints, and the command."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from flax_cnns import run
from flax_cnns.analysis.landscape.objective import Levels
from flax_cnns.analysis.plots import landscapes as plots
from flax_cnns.errors import UserError
from flax_cnns.runs.evaluate import evaluate_run
from flax_cnns.runs.visualize import landscape, loss
from tests.test_scripts import finish

HERE = "tests.runs.own_parts"


def quiet(**fields):
    return loss.Settings(**{"grid": 3, "say": len, **fields})


@pytest.fixture(scope="module")
def checkpoint(finished):
    return loss.load_checkpoint(finished[0])


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the functions that draw."""
    calls = []
    for name in ("draw_planes", "draw_line", "draw_trajectory"):
        monkeypatch.setattr(plots, name, lambda *a, n=name, **k: calls.append((n, a, k)))
    return calls


def test_the_loss_is_that_of_the_runs_own_test(finished, checkpoint):
    made = loss.make_loss(checkpoint, quiet(split="test"))
    summary = finished[1]
    assert made.count == summary["test/examples"]
    found = made.measure(checkpoint.variables)
    assert float(found.losses) == pytest.approx(summary["test/loss"], rel=1e-4)
    assert float(found.accuracies) == pytest.approx(summary["test/accuracy"], abs=1e-6)
    assert len({len(labels) for _, labels in made.batches}) == 1  # one compilation


def test_fewer_images_are_drawn_at_random_by_seed(checkpoint):
    first, again, other = (
        loss.make_loss(checkpoint, quiet(images=20, seed=seed)) for seed in (0, 0, 1)
    )
    labels = [np.concatenate([y for _, y in made.batches]) for made in (first, again, other)]
    assert labels[0].shape == (20, 10)
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()
    with pytest.raises(UserError, match="--split: digits has no split 'tests'; did you mean"):
        loss.make_loss(checkpoint, quiet(split="tests"))


def test_a_landscape_has_the_runs_loss_in_its_middle(
    finished, checkpoint, drawn, tmp_path, monkeypatch
):
    monkeypatch.setattr(landscape, "load_checkpoint", lambda run, **_: checkpoint)
    settings = quiet(split="test")
    (levels,) = landscape.draw_landscape([finished[0]], tmp_path / "a.png", settings, span=0.5)
    wanted = loss.make_loss(checkpoint, settings).measure(checkpoint.variables)
    np.testing.assert_allclose(levels.losses[1, 1], wanted.losses, rtol=1e-5)
    ((_, (planes, _), how),) = drawn
    np.testing.assert_allclose(planes[0].xs, [-0.5, 0, 0.5])
    assert "cross-entropy without L2 penalty, test split, 360 images" in how["note"]
    assert "BatchNorm" not in how["note"]  # LeNet has none
    with open(tmp_path / "a.rows/levels.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    np.testing.assert_allclose(float(rows[4]["loss"]), wanted.losses, rtol=1e-4)
    with pytest.raises(UserError, match="--batchnorm: expected running or batch here"):
        landscape.draw_landscape([finished[0]], tmp_path / "b.png", quiet(batchnorm="reestimate"))


def test_a_line_needs_one_network(checkpoint):
    other = checkpoint.components.model.clone(num_classes=11)
    second = checkpoint._replace(components=checkpoint.components._replace(model=other))
    with pytest.raises(UserError, match="different networks: num_classes is 10 and 11"):
        landscape._check_same_network(checkpoint, second)


def test_positions_on_a_line_have_both_ends():
    for count in (2, 7, 25):
        alphas = landscape.list_alphas(count)
        assert {0.0, 1.0} <= set(alphas)
        assert (np.diff(alphas) > 0).all()
        assert alphas[0] == -0.5
        assert alphas[-1] == 1.5


def test_a_path_of_too_few_checkpoints(finished, tmp_path):
    with pytest.raises(UserError, match=r"keeps \d checkpoints up to step 10; .*keep_latest=20"):
        landscape.draw_trajectory(f"{finished[0]}@10", tmp_path / "a.png", quiet())


def test_levels_are_even_on_a_logarithmic_scale():
    levels = plots.find_levels([np.array([[0.01, 1.0], [np.nan, np.inf]]), np.array([[0.1]])])
    np.testing.assert_allclose(levels[[0, -1]], [0.01, 1.0])
    np.testing.assert_allclose(np.diff(np.log(levels)), np.log(100) / (plots.LINES - 1))
    assert plots.find_levels([np.array([1e-3, 1e9])])[-1] == pytest.approx(1e3)


def test_pictures_are_written(tmp_path):
    xs = np.linspace(-1, 1, 5)
    losses = 0.1 + xs**2 + xs[:, None] ** 2
    losses[0, 0] = np.nan
    plane = plots.Plane("a network", xs, xs, losses, losses)
    plots.draw_planes([plane, plane], tmp_path / "a.png", note="a note", surface=True)
    path = np.array([[0.8, 0.7], [0.2, -0.3], [0.0, 0.0]])
    shares = np.array([0.9, 0.05])
    plots.draw_trajectory(plane, path, [10, 20, 30], shares, tmp_path / "b.png")
    curve = Levels(losses[2], losses[2] / 3)
    plots.draw_line(xs, {"train": curve, "test": curve}, ("a", "b"), tmp_path / "c.png")
    for name in "abc":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300


@pytest.mark.slow
def test_own_networks_own_data_and_own_losses(drawn, no_pictures, tmp_path):
    config = {
        "model": {"name": f"{HERE}:Net", "width": 2},
        "data": {"name": f"{HERE}:digits", "batch_size": 16, "eval_batch_size": 64},
        "train": {"duration": "12 steps", "eval_every": "4 steps", "loss": f"{HERE}:focal"},
        "checkpoint": {"every": "3 steps", "keep_latest": 4},
        "log": {"tensorboard": False},
    }
    workdir = tmp_path / "own"
    run(config, workdir)
    with pytest.raises(UserError, match="--trust"):
        landscape.draw_landscape([workdir], tmp_path / "a.png", quiet())
    settings = quiet(trust=True, images=30)
    landscape.draw_landscape([workdir], tmp_path / "a.png", settings)
    checkpoint = loss.load_checkpoint(workdir, trust=True)
    test = loss.make_loss(checkpoint, quiet(), "test").measure(checkpoint.variables)
    wanted = evaluate_run(workdir, trust=True)  # by the focal loss
    np.testing.assert_allclose(test.losses, wanted["loss"], rtol=1e-4)
    assert "focal without L2" in drawn[0][2]["note"]
    about = json.loads((tmp_path / "a.rows/1-own/plane.json").read_text())
    assert {"model", "loss"} <= set(about["own"])

    path = landscape.draw_trajectory(workdir, tmp_path / "t.png", settings)
    assert path.points.shape == (4, 2)
    given = (f"{workdir}@6", f"{workdir}@12", tmp_path / "l.png")
    found = landscape.draw_line(*given, quiet(trust=True))["test"]
    wanted = [evaluate_run(f"{workdir}@{step}", trust=True)["loss"] for step in (6, 12)]
    ends = [int(np.flatnonzero(landscape.list_alphas(3) == end)[0]) for end in (0, 1)]
    np.testing.assert_allclose(found.losses[ends], wanted, rtol=1e-4)
    with pytest.raises(UserError, match=r"rows of another plane or line \(reestimated"):
        landscape.draw_line(*given, quiet(trust=True, batchnorm="reestimate"))

    reestimate = loss.make_reestimation(checkpoint, 32)
    stats = reestimate(checkpoint.variables)["batch_stats"]["norm"]
    far = reestimate(
        {
            **checkpoint.variables,
            "batch_stats": {
                "norm": {
                    name: 100 * leaf + 1
                    for name, leaf in checkpoint.variables["batch_stats"]["norm"].items()
                }
            },
        }
    )["batch_stats"]["norm"]
    jax.tree.map(np.testing.assert_array_equal, stats, far)  # the old ones have no influence

    (row,) = landscape.tabulate_curvature([workdir], tmp_path / "c.csv", settings, count=2)
    assert abs(row.eigenvalues[0]) >= 0.9 * abs(row.eigenvalues[1])
    assert row.sharpness == pytest.approx(0.05 * row.gradient_norm, rel=0.5)
    with open(tmp_path / "c.csv") as file:
        (written,) = csv.DictReader(file)
    assert float(written["eigenvalue 1"]) == pytest.approx(row.eigenvalues[0], rel=1e-4)


@pytest.mark.slow
def test_the_command(finished, tmp_path):
    out = tmp_path / "line.png"
    flags = [f"--workdir={finished[0]}@10", f"--to={finished[0]}@latest", f"--out={out}"]
    code, text, err = finish("visualize", "line", *flags, "--grid=5", "--images=20")
    assert code == 0, err
    assert f"written to {out}" in text
    assert out.is_file()
    code, _, err = finish("visualize", "curvature", f"--workdir={finished[0]}", "--grid=3")
    assert code == 2
    assert "curvature takes no --grid; landscape, line, trajectory would" in err
