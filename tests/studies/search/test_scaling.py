"""The compound scaling search: what it plans, chooses and writes, with fake runs."""

from __future__ import annotations

import json

import flax.linen as nn
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.scaling_small import get_config
from flax_cnns import config as configs
from flax_cnns.analysis.cost import cost
from flax_cnns.data.load import read_fingerprint
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model
from flax_cnns.runs.network import get_model_fields
from flax_cnns.studies.search import scaling


class Tiny(nn.Module):
    """A network that is fast to count. Its width changes in small steps, its depth by blocks."""

    width_mult: float
    depth_mult: float
    input_size: tuple[int, int, int]

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(round(40 * self.width_mult), (1, 1))(images)
        for _ in range(round(10 * self.depth_mult)):
            x = nn.Conv(x.shape[-1], (1, 1))(x)
        return x


@pytest.fixture
def config(digits_dir, monkeypatch):
    def tiny(name, *, width_mult, depth_mult, input_size, **fields):
        return Tiny(width_mult, depth_mult, input_size)

    monkeypatch.setattr(scaling, "create_model", tiny)
    config = get_config()
    config.data.dir = digits_dir
    return config


def test_the_grid_keeps_the_constraint():
    points = scaling.make_grid(2.0, 0.05)
    assert (1.2, 1.1, 1.15) in points  # the paper's values, with a product of 1.92
    assert points == sorted(set(points))
    for alpha, beta, gamma in points:
        assert min(alpha, beta, gamma) >= 1
        assert alpha * beta**2 * gamma**2 == pytest.approx(2, rel=0.1)
    assert len(scaling.make_grid(2.0, 0.1)) < len(points)
    for budget, step in ((1.0, 0.1), (2.0, 0.0), (2.0, -1.0)):
        with pytest.raises(UserError, match="expected a budget above 1 and a step above 0"):
            scaling.make_grid(budget, step)
    with pytest.raises(UserError, match="no multiples of 5"):
        scaling.make_grid(2.0, 5.0)


def test_plans_count_the_network_that_the_config_builds(config):
    planner = scaling.Planner(config)
    base = planner.make_trial("base", scaling.ScalingFactors())
    trial = planner.find_at_macs(
        "width", 2 * base.macs, lambda x: scaling.ScalingFactors(width_mult=1 + x)
    )
    assert trial.macs == pytest.approx(2 * base.macs, rel=0.1)
    assert trial.scale.depth_mult == trial.scale.resolution_mult == 1
    built = trial.config(config, 3)
    configs.validate(built)
    assert (built.seed, built.data.image_size) == (3, 16)
    size = (built.data.image_size, built.data.image_size, 1)
    model = Tiny(built.model.width_mult, built.model.depth_mult, size)
    assert (cost(model).params, cost(model).macs) == (trial.params, trial.macs)
    points = [(2.0, 1.0, 1.0), (2.01, 1.0, 1.0), (1.0, 1.0, 1.4), (1.0, 1.0, 3.0)]
    near = planner.select_near(2 * base.macs, points)
    # The second point is the same network as the first; the last is far off.
    assert [(t.scale.depth_mult, t.scale.resolution_mult) for t in near] == [(2.0, 1.0), (1.0, 1.4)]
    with pytest.raises(UserError, match="none of the grid's 1 networks"):
        planner.select_near(2 * base.macs, [(1.0, 1.0, 3.0)])
    with pytest.raises(UserError, match="does not reach"):
        planner.find_at_macs("nothing", 2 * base.macs, lambda x: scaling.ScalingFactors())


def test_a_search_chooses_by_validation_and_reports_the_test(config, tmp_path, monkeypatch):
    seen, points = [], [(1.0, 1.0, 1.4), (1.0, 1.4, 1.0), (1.0, 1.2, 1.2)]

    def run(config, workdir, **data):
        assert data == given
        seen.append((workdir.name, config.seed))
        resolution, width = config.data.image_size / 16, config.model.width_mult / 0.5
        print("what a run prints")
        workdir.mkdir()
        (workdir / "summary.json").write_text("{}")
        accuracy = 0.5 + 0.1 * min(resolution, 1.2) + 0.1 * min(width, 1.2)
        return {
            "validation/best_accuracy": accuracy,
            "test/accuracy": accuracy - 0.1 + 0.01 * config.seed,
        }

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.setattr(scaling, "make_grid", lambda budget, step: points)
    lines = []
    fingerprint = read_fingerprint(config.data)
    given = dict(accept_changed_data=True, fingerprint=fingerprint)
    result = scaling.search(
        config, tmp_path / "all", phi=1.0, seeds=2, accept_changed_data=True, say=lines.append
    )
    assert result.winner == (1.0, 1.2, 1.2)
    assert [r.trial.kind for r in result.scaled] == [*("depth", "width", "resolution", "compound")]
    assert [seed for name, seed in seen if name.startswith("grid")] == [0] * len(result.grid)
    assert {seed for name, seed in seen if not name.startswith("grid")} == {1, 2}
    assert len(seen) == len(set(seen)) == len(result.grid) + 5 * 2
    assert lines[-1].startswith(f"{len(seen)}/{len(seen)} compound-")
    for trained in result.scaled:
        assert trained.trial.macs == pytest.approx(2 * result.base.trial.macs, rel=0.25)
        assert np.ptp(trained.accuracy) == pytest.approx(0.01)
    with pytest.raises(UserError, match="expected phi above 0, got -1"):
        scaling.search(config, tmp_path / "none", phi=-1.0)
    log = next((tmp_path / "all").glob("base*.txt"))
    assert log.read_text() == "what a run prints\n"

    scaling.save(result, tmp_path / "scaling.json", {"phi": 1.0})
    saved = json.loads((tmp_path / "scaling.json").read_text())
    assert saved["winner"] == {"alpha": 1.0, "beta": 1.2, "gamma": 1.2}
    assert saved["scaled"][3]["accuracy"] == result.scaled[3].accuracy
    assert scaling.make_table(result).row_count == len(result.grid) + 5
    scaling.draw(result, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_trials_config_is_the_scaled_network(digits_dir):
    config = get_config()
    config.data.dir = digits_dir
    planner = scaling.Planner(config)
    trial = planner.make_trial("compound", scaling.make_compound_factors((1.2, 1.1, 1.15), 1.0))
    built = trial.config(config, 0)
    fields = {"num_classes": 10, **get_model_fields(built)}
    size = (built.data.image_size, built.data.image_size, 1)
    counted = cost(create_model(**fields, input_size=size))
    assert (counted.params, counted.macs) == (trial.params, trial.macs)


def test_a_network_that_cannot_be_scaled(digits_dir):
    config = get_config()
    config.data.dir = digits_dir
    config.model = ConfigDict({"name": "cifar_resnet20", "num_classes": 0, "dtype": "float32"})
    with pytest.raises(UserError, match="cifar_resnet20 has no field 'width_mult'"):
        scaling.Planner(config).make_trial("base", scaling.ScalingFactors())
