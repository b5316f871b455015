"""Corrupted evaluation of a run: its cells, its means and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import flags

from flax_cnns.cli import evaluate as cli
from flax_cnns.data.types import Dataset, Split, Subset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.corruptions import table
from flax_cnns.evaluation.predictions import predict_batches
from flax_cnns.runs import corruption_cells, evaluate_corruptions
from flax_cnns.runs.classifier import make_classifier_from_run

NAMES = ("brightness", "contrast", "procedural_frost")


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    copy = tmp_path_factory.mktemp("corruptions") / "run"
    shutil.copytree(finished[0], copy)
    return copy


@pytest.fixture(scope="module")
def results(run):
    return evaluate_corruptions.evaluate_corruptions(
        run, corruptions=NAMES[:2], severities=[5, 1], images=40, baseline=str(run), sheet=3
    )


def test_cells_are_predictions_of_corrupted_images(run, results):
    """On four devices, against one call for all images; the mean and mCE by hand."""
    classifier = make_classifier_from_run(run)
    test = classifier.dataset.splits["test"]
    rows = np.arange(40) * len(test) // 40
    images, labels = np.asarray(test.images[rows]), test.labels[rows]
    errors = {
        (cell["corruption"], cell["severity"]): 1 - cell["accuracy"] for cell in results["cells"]
    }
    assert list(errors) == [("clean", 0), *((n, s) for n in NAMES[:2] for s in (1, 5))]
    for name, severity in list(errors)[1:]:
        constants = table.prepare_constants(table.CORRUPTIONS[name], images.shape[1:])
        constants = table.pick_severity(constants, severity)
        corrupted = np.asarray(table.make_corrupt(name)(images, np.arange(40), constants))
        assert (corrupted != images).any()
        found = predict_batches(
            classifier.model,
            classifier.variables,
            [{"image": corrupted, "label": labels}],
            normalize=classifier.normalize,
        )
        assert errors[name, severity] == pytest.approx(1 - found.is_correct().mean())
    assert 1 - results["accuracy"] == pytest.approx(np.mean(list(errors.values())[1:]))
    low, high = results["intervals"]["accuracy"]
    assert low < results["accuracy"] < high
    assert results["mce"] == pytest.approx(1)
    assert results["protocol"]["constants"] == "cifar"


def test_files(run, results):
    names = "corruptions_images40_brightness,contrast_severities1,5"
    (stem,) = {path.stem for path in run.glob(f"evaluation_test_*_{names}.*")}
    assert json.loads((run / f"{stem}.json").read_text())["mce"] == results["mce"]
    with (run / f"{stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(results["cells"])  # the run and the baseline
    assert float(rows[1]["error"]) == pytest.approx(1 - results["cells"][1]["accuracy"], abs=1e-5)
    assert "| brightness |" in (run / f"{stem}.md").read_text()
    assert (run / f"{stem}.png").stat().st_size > 5000
    assert (run / "corruptions_test_3.png").stat().st_size > 5000


def test_known_cells_are_read_and_others_evaluated(run, results, monkeypatch, capsys):
    folder = next(run.glob("evaluation_test_*_corruptions_images40"))
    (folder / "contrast_5.json").unlink()
    calls = []
    predict = corruption_cells.predict_split

    def count(*given, **options):
        calls.append(given)
        return predict(*given, **options)

    monkeypatch.setattr(corruption_cells, "predict_split", count)
    again = evaluate_corruptions.evaluate_corruptions(
        run, corruptions=NAMES[:2], severities=[1, 5], images=40
    )
    assert len(calls) == 1
    assert "4 of 5 cells" in capsys.readouterr().out
    assert again["cells"] == results["cells"]
    # Other random numbers are other cells. No report replaces another.
    reports = {path: path.read_bytes() for path in run.glob("*_corruptions_*.json")}
    evaluate_corruptions.evaluate_corruptions(
        run, corruptions=["contrast"], severities=[1], images=40, seed=1
    )
    assert len(calls) == 3
    assert all(path.read_bytes() == before for path, before in reports.items())
    (other,) = set(run.glob("*_corruptions_*.json")) - set(reports)
    assert other.stem.endswith("_corruptions_images40_seed1_contrast_severities1")
    assert (folder / "contrast_5.json").is_file()


def test_the_selection_in_names():
    severities = table.SEVERITIES
    for names, wanted in {
        "all": "",
        "noise,blur,weather,digital": "",
        "extra,all": "_all,extra",
        "snow,noise,gaussian_blur": "_noise,snow,gaussian_blur",
    }.items():
        rows = table.select_corruptions(names.split(","))
        assert corruption_cells.name_selection(rows, severities) == wanted
        assert table.select_corruptions(table.name_selection(rows).split(",")) == rows
    rows = [row for name, row in table.CORRUPTIONS.items() if name not in ("snow", "contrast")]
    long = corruption_cells.name_selection(rows[1:], [2])
    assert len(long) < 40
    assert long != corruption_cells.name_selection(rows[:-1], [2])


def test_means_leave_out_frost_extra_corruptions_and_what_does_nothing(run):
    classifier = make_classifier_from_run(run)
    rows = table.select_corruptions(["fog", "procedural_frost", "saturate", "gaussian_blur"])
    reasons = evaluate_corruptions._explain_left_out(rows, classifier)
    assert set(reasons) == {"procedural_frost", "saturate", "gaussian_blur"}
    assert reasons["saturate"] == "does nothing to gray images"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(severities=[0, 1]), "expected some of 1,2,3,4,5; got"),
        (dict(baseline="alexnet"), "1000 classes"),
        (dict(split="tst"), "no split 'tst'; did you mean 'test'"),
        (dict(corruptions=["fogg"]), "unknown 'fogg'"),
    ],
)
def test_what_is_refused(run, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_corruptions.evaluate_corruptions(run, **options)


def test_a_baseline_of_other_images_is_refused(run):
    classifier = make_classifier_from_run(run)
    dataset = classifier.dataset
    test = dataset.splits["test"]
    turned = Split(test.labels[::-1], images=test.images[::-1])
    other = dataclasses.replace(dataset, splits={**dataset.splits, "test": turned}, fingerprint={})
    given = (classifier, classifier._replace(dataset=other), "runs/other", "test")
    with pytest.raises(UserError, match=r"other images than .* their labels differ"):
        evaluate_corruptions._check_baseline(*given)


def test_a_sheet_of_an_unknown_image(run):
    classifier = make_classifier_from_run(run)
    with pytest.raises(UserError, match="--sheet: expected an image from 0 to"):
        evaluate_corruptions.draw_sheet(classifier, [], [1], "test", 10**6, "x.png")
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match="--sheet: expected an image from 0 to"):
        evaluate_corruptions.evaluate_corruptions(
            run, corruptions=["fog"], severities=[1], images=7, sheet=10**6
        )
    assert sorted(run.iterdir()) == before  # told before the evaluation


def test_float_images_are_refused(run):
    classifier = make_classifier_from_run(run)
    images = np.zeros((4, 32, 32, 1), np.float32)
    split = Split(np.zeros(4, np.int32), images=images)
    dataset = Dataset(
        "floats", 10, tuple("0123456789"), (32, 32, 1), (0.0,), (1.0,), "", {"test": split}
    )
    with pytest.raises(UserError, match=r"8 bits.*these are floats"):
        corruption_cells.evaluate_cells(
            classifier, run / "floats", table.select_corruptions(["fog"]), [1], split="test",
            dataset=dataset,
        )  # fmt: skip


def test_take_images_are_evenly_spaced():
    labels, images = np.arange(10), np.zeros((10, 8, 8, 1), np.uint8)

    def take(split, count):
        dataset = Dataset("d", 10, (), (8, 8, 1), (0.0,), (1.0,), "", {"test": split})
        return corruption_cells.take_images(dataset, "test", count).splits["test"]

    assert take(Split(labels, images=images), 4).labels.tolist() == [0, 2, 5, 7]
    assert len(take(Split(labels, images=images), 0)) == 10
    source = Subset(None, np.arange(10), "files")
    assert take(Split(labels, source=source), 2).source.rows.tolist() == [0, 5]
    with pytest.raises(UserError, match="stream of batches"):
        take(Split(labels, count=10), 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--images=5"], "--images has an effect only with --corruptions"),
        (["--corruptions="], "--corruptions: expected a value after --corruptions=, got none"),
        (["--corruptions=all", "--calibrate"], "--calibrate and --corruptions: give one of them"),
        (["--corruptions=all", "--severities=a"], "expected some of 1,2,3,4,5; got a"),
    ],
)
def test_flags_that_do_nothing(given, message):
    before = flags.FLAGS.flag_values_dict()
    try:
        flags.FLAGS(["evaluate", "--workdir=x", *given])
        with pytest.raises(UserError, match=message):
            cli.evaluate([])
    finally:
        flags.FLAGS.unparse_flags()
        for name, value in before.items():
            if flags.FLAGS[name].value != value:
                flags.FLAGS[name].value = value
                flags.FLAGS[name].present = 0
