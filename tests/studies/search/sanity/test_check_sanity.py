"""The whole check: configs that are broken on purpose, and one that is not."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from flax_cnns import config as configs
from flax_cnns.cli import search_sanity
from flax_cnns.errors import UserError
from flax_cnns.studies.search import sanity
from flax_cnns.studies.search.sanity import bench, check, initial, trainings
from flax_cnns.studies.search.sanity.verdict import judge
from tests.studies.search.sanity.test_measures import make_config

ALL = ("inputs", "loss", "layers", "overfit", "rate", "capacity")


def run(checks, tmp_path=None, *, own=None, steps=30, **changes):
    """Returns {(check, level): texts} of the findings."""
    config = make_config(**{"model__width": 4, "optimizer__momentum": 0.9} | changes)
    for field, value in (own or {}).items():
        configs.set_config_field(config, f"own.digits.{field}", value)
    said = []
    report = sanity.check_sanity(config, tmp_path, checks=checks, steps=steps, say=said.append)
    found = {}
    for finding in report.findings:
        found.setdefault((finding.check, finding.level), []).append(finding.text)
    return report, found, said


@pytest.mark.slow
def test_a_sound_config_raises_no_alarm_and_its_numbers_are_kept(tmp_path, monkeypatch):
    """With synchronized BatchNorm, whose axis exists only inside a step."""
    monkeypatch.setattr(trainings, "WIDTHS", (1.0, 2.0))
    sound = dict(steps=40, train__sync_batchnorm=True)
    report, found, said = run(ALL, tmp_path, **sound)
    assert report.is_sane, report.findings
    assert not [key for key in found if key[1] == "look"], found
    page = (tmp_path / "sanity.md").read_text()
    assert page.startswith("# Sanity of tests.studies.search.sanity.parts:Net on arrays, seed 0\n")
    assert "Nothing is wrong, 0 to look at" in page
    record = json.loads((tmp_path / "sanity.json").read_text())
    assert list(record["parts"]) == list(ALL)
    pictures = sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".png")
    assert pictures == sorted(f"sanity_{n}.png" for n in ("images", "layers", "rate", "trainings"))
    assert all(f"({name})" in page for name in pictures)
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.iterdir())) == 6  # nothing else is left
    # The same command makes nothing anew, not even after a kill between two checks.
    del record["parts"]["inputs"], record["findings"]
    (tmp_path / "sanity.json").write_text(json.dumps(record))
    monkeypatch.setattr(bench, "make_initial_variables", lambda plan: (VARIABLES, None))
    monkeypatch.setattr(check.initial, "measure_loss", None)
    monkeypatch.setattr(check.trainings, "measure_rates", None)
    again, _, said = run(ALL, tmp_path, **sound)
    assert again == report
    assert [line.partition(":")[0] for line in said[:1]] == ["inputs"]
    assert (tmp_path / "sanity.md").read_text() == page
    # Fewer checks: the report has those, and the folder keeps all.
    fewer, _, _ = run(("loss",), tmp_path, **sound)
    assert {finding.check for finding in fewer.findings} == set(fewer.parts) == {"loss"}
    assert (tmp_path / "sanity.md").read_text() == page
    assert list(json.loads((tmp_path / "sanity.json").read_text())["parts"]) == list(ALL)
    # Another config is another matter.
    _, _, said = run(("inputs",), tmp_path, **sound, schedule__learning_rate=0.1)
    assert "of another config" in said[0]
    assert list(json.loads((tmp_path / "sanity.json").read_text())["parts"]) == ["inputs"]


@pytest.mark.parametrize(
    ("own", "changes", "text"),
    [
        ({"scale": 255.0}, {}, "the images are not scaled"),
        ({}, {"data__mean": (0.0,), "data__std": (0.00392,)}, "the images are not scaled"),
        ({}, {"data__mean": (0.485,), "data__std": (0.229,)}, "mean and std are of other data"),
        ({"numbered": True}, {}, "its labels are in another order"),
        ({"copies": 20}, {}, "20 of 200 validation images are training images too"),
        ({"sort": True}, {}, "the examples come in order of class"),
    ],
)
def test_broken_inputs(own, changes, text, monkeypatch):
    monkeypatch.setattr(bench, "make_initial_variables", lambda plan: (VARIABLES, None))
    report, found, _ = run(("inputs",), own=own, **changes)
    assert not report.is_sane
    (wrong,) = found["inputs", "wrong"]
    assert text in wrong


VARIABLES = {  # of `parts.Net` with four channels; the inputs do not depend on them
    "params": {
        "conv": {"kernel": np.ones((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)},
        "norm": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)},
        "head": {"kernel": np.ones((64, 10), np.float32), "bias": np.zeros(10, np.float32)},
    },
    "batch_stats": {"norm": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}},
}


def test_shuffled_labels(monkeypatch):
    """It takes two numbers to say so: the nearest neighbor's, and the short training's."""
    monkeypatch.setattr(trainings, "WIDTHS", (1.0,))
    report, found, _ = run(("inputs", "capacity"), own={"shuffled": "all"})
    (wrong,) = found["inputs", "wrong"]
    assert "are they shuffled?" in wrong
    assert "the short training reaches" in wrong
    alone = {"inputs": report.parts["inputs"]}
    assert {f.level for f in judge(alone) if "are they shuffled?" in f.text} == {"look"}


def test_frozen_batchnorm():
    made = bench.SanityBench(make_config(optimizer__bn=((".*", "frozen_stats"),)))
    numbers = initial.measure_batchnorm(made, None)
    assert numbers == {"norms": 1, "frozen": 1, "unmoved": 0}
    # Statistics that come from somewhere, such as a graft, may be frozen.
    made.variables["batch_stats"]["norm"]["mean"] = np.ones(8, np.float32)
    assert initial.measure_batchnorm(made, None)["frozen"] == 0


def test_dead_weights():
    _, found, _ = run(("layers", "overfit"), model__std=0.0, model__norm=False)
    assert "cannot learn 20 images by heart" in found["overfit", "wrong"][0]
    wrong = " ".join(found["layers", "wrong"])
    assert "2 of 2 layers with kernels have no gradient" in wrong
    assert "they vanish" in wrong


def test_weights_that_are_too_large():
    _, found, _ = run(("loss",), model__std=3.0, model__norm=False)
    (wrong,) = found["loss", "wrong"]
    assert "sure of wrong answers" in wrong


def test_a_rate_that_is_too_high():
    _, found, _ = run(("rate",), schedule__learning_rate=30.0, steps=60)
    (wrong,) = found["rate", "wrong"]
    assert wrong.endswith("The config's rate is 30: too high")


@pytest.mark.slow
def test_pmap_and_weights_that_are_too_small():
    """One convolution recovers from them, so they are no alarm."""
    small = dict(model__std=1e-6, model__norm=False, train__parallel="pmap")
    _, found, _ = run(("layers", "overfit"), **small)
    assert "they vanish" in found["layers", "look"][0]
    assert "learns 20 images by heart" in found["overfit", "fine"][0]


def test_unknown_checks_are_refused():
    with pytest.raises(UserError, match="did you mean 'rate'"):
        sanity.check_sanity(make_config(), checks=["rates"])


@pytest.mark.parametrize(("level", "code"), [("wrong", 1), ("look", 0), ("fine", 0)])
def test_the_exit_code_says_whether_something_is_wrong(level, code, monkeypatch, capsys):
    findings = [sanity.SanityFinding(level, "rate", "the rate is 5", "try 0.1")]
    given = []

    def check_sanity(config, folder, **options):
        given.append((config, folder, options))
        return sanity.SanityReport({}, findings)

    monkeypatch.setattr(sanity, "check_sanity", check_sanity)
    flags = types.SimpleNamespace(checks=[], workdir="", steps=7)
    monkeypatch.setattr(search_sanity, "FLAGS", flags)
    assert search_sanity.check_sanity("config") == code
    assert given == [("config", None, {"checks": sanity.CHECKS, "steps": 7})]
    assert "The rate is 5. Try: try 0.1." in capsys.readouterr().out
