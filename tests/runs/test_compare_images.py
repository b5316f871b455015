"""Runs on the same images: two checkpoints of the shared run, and runs that may not be compared."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from rich.console import Console

from flax_cnns.data.types import Dataset, Split
from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.runs import compare_images
from flax_cnns.runs.classifier import make_classifier_from_run, predict_split


def render(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_two_checkpoints_on_the_same_images(finished):
    folder = finished[0]
    names = [f"{folder}@latest", f"{folder}@10"]
    first, second = compare_images.compare_on_images(names, margin=99.0)
    right = [
        predict_split(make_classifier_from_run(name)).is_correct() for name in names
    ]  # by another way
    assert [first.accuracy, second.accuracy] == [each.mean() for each in right]
    assert first.accuracy == finished[1]["test/accuracy"]
    assert first.interval == uncertainty.wilson_interval(right[0].sum(), 360)
    assert second.pairs.only_second == (right[1] & ~right[0]).sum()
    assert second.pairs.only_first == (right[0] & ~right[1]).sum()
    assert second.p == second.p_holm == uncertainty.mcnemar(second.pairs)
    low, high = second.difference
    assert low <= second.accuracy - first.accuracy <= high
    assert (first.verdict, second.verdict) == ("", "equivalent")
    assert [first.name, second.name] == ["whole@12", "whole@10"]
    text = render(compare_images.make_image_table([first, second], "test", 99.0))
    assert "test: 360 images" in text
    assert f"{100 * first.accuracy:.2f} [" in text
    assert "p Holm" not in text
    assert "within ±99 points" in compare_images.explain_image_table([first, second], 99.0)


LABELS = np.arange(4000) % 2


def fake_runs(monkeypatch, **predictions):
    """Makes {name: predictions} the runs of these names."""
    data = Dataset(
        *("digits", 2, ("a", "b"), (8, 8, 1), (0.5,), (0.5,), "nothing"),
        splits={"test": Split(LABELS[:4], count=4)},
        fingerprint={"splits": {"test": {"images": 4, "digests": ["x"]}}},
    )

    def make(name, **_):
        folder = types.SimpleNamespace(resolve=lambda: compare_images.workdirs.pathlib.Path(name))
        config = types.SimpleNamespace(model=types.SimpleNamespace(name="net"))
        run = types.SimpleNamespace(
            folder=folder, step=1, components=types.SimpleNamespace(config=config)
        )
        changed = predictions[name.rpartition("/")[2]][1]
        return types.SimpleNamespace(
            name=name, run=run, model=None, dataset=dataclasses.replace(data, **changed)
        )

    monkeypatch.setattr(compare_images, "make_classifier_from_run", make)
    monkeypatch.setattr(
        compare_images,
        "predict_split",
        lambda classifier, split: predictions[classifier.name.rpartition("/")[2]][0],
    )
    return [f"/r/{name}" for name in predictions]


RIGHT = np.eye(2, dtype=np.float32)[LABELS]


def with_wrong(rows):
    logits = RIGHT.copy()
    logits[rows] = 1 - logits[rows]
    return Predictions(logits, LABELS)


def test_several_runs_are_compared_with_the_first_and_corrected(monkeypatch):
    runs = fake_runs(
        monkeypatch,
        base=(with_wrong(np.r_[0:100]), {}),
        same=(with_wrong(np.r_[2:102]), {}),
        better=(with_wrong(np.r_[0:60]), {}),
        worse=(with_wrong(np.r_[0:120]), {}),
    )
    base, same, better, worse = compare_images.compare_on_images(runs, margin=0.3)
    assert same.pairs == (3898, 2, 2, 98)
    assert same.difference[0] == -same.difference[1] < 0
    assert [row.verdict for row in (same, better, worse)] == ["equivalent", "not worse", "worse"]
    # 0 : 40 and 20 : 0 by hand: (40 - 1)^2 / 40, and 2 / 2^20.
    assert better.p == pytest.approx(7.0e-10, rel=0.01)
    assert worse.p == pytest.approx(2 / 2**20)
    assert [row.p_holm for row in (same, better)] == [1.0, pytest.approx(3 * better.p)]
    assert worse.p_holm == pytest.approx(2 * worse.p)
    text = render(compare_images.make_image_table([base, same, better, worse], "test", 0.3))
    line = next(line for line in text.splitlines() if "better" in line)
    assert [cell.strip() for cell in line.split("│")[5:9]] == [
        "40 : 0",
        "<0.001",
        "<0.001",
        "not worse",
    ]
    assert "+1.00 [+0.7" in line


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "mnist"}, "/r/two has the data set mnist, /r/one has digits"),
        ({"class_names": ("a", "c")}, "/r/two has the class 'c' where /r/one has 'b'"),
        ({"class_names": ("a", "b", "c")}, "/r/two has 3 classes .* /r/one has 2 classes"),
        ({"task": "multilabel"}, "/r/two has multilabel data, /r/one has classes data"),
        ({"splits": {"test": Split(LABELS[:5], count=5)}}, "5 images for /r/two and 4 for /r/one"),
        (
            {"fingerprint": {"splits": {"test": {"images": 4, "digests": ["y"]}}}},
            "/r/two has other images than /r/one: the fingerprints of test differ",
        ),
    ],
)
def test_runs_on_other_data_are_refused(changed, said, monkeypatch):
    right = Predictions(RIGHT, LABELS)
    runs = fake_runs(monkeypatch, one=(right, {}), two=(right, changed))
    with pytest.raises(UserError, match=said):
        compare_images.compare_on_images(runs)


def test_other_labels_and_one_run_are_refused_but_not_another_size(monkeypatch):
    right, other = Predictions(RIGHT, LABELS), Predictions(RIGHT, 1 - LABELS)
    larger = {
        "image_shape": (32, 32, 3),
        "fingerprint": {
            "splits": {"test": {"images": 4, "digests": ["x"]}, "train": {"images": 9}}
        },
    }
    runs = fake_runs(monkeypatch, one=(right, {}), two=(right, larger), three=(other, {}))
    assert compare_images.compare_on_images(runs[:2])[1].p == 1.0
    with pytest.raises(UserError, match="one and three have other labels on the test split"):
        compare_images.compare_on_images(runs)
    with pytest.raises(UserError, match="expected two or more runs"):
        compare_images.compare_on_images(runs[:1])
    with pytest.raises(UserError, match="margin: expected a number above 0"):
        compare_images.compare_on_images(runs, margin=0.0)


def test_of_multilabel_data_all_labels_must_be_right():
    labels = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    logits = np.array([[3, -1], [3, -1], [-2, -1]], np.float32)
    found = uncertainty.find_correct(Predictions(logits, labels, "multilabel"))
    assert found.tolist() == [True, False, True]
