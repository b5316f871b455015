"""What the sanity checks say of numbers: alarms and their limits."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from flax_cnns import files
from flax_cnns.studies.search.sanity import check, page
from flax_cnns.studies.search.sanity.findings import SanityFinding
from flax_cnns.studies.search.sanity.judge_trainings import read_rates
from flax_cnns.studies.search.sanity.verdict import judge

RATES = np.geomspace(1e-6, 10, 100)
NEIGHBORS = {"right": 0.6, "chance": 0.1, "p": 0.001, "images": 200}


def make_curve(best=0.1, limit=1.0, start=2.3, lowest=1.0):
    """A loss that falls from a thousandth of `best` to `best`, and is at `start` again at
    `limit`."""
    x = np.log10(RATES)
    down = np.clip((x - np.log10(best) + 3) / 3, 0, 1)
    up = np.maximum(x - np.log10(best), 0) / (np.log10(limit) - np.log10(best))
    return (start - (start - lowest) * down + (start - lowest) * up).tolist()


def make_row(width=1.0, train=0.95, validation=0.9, loss=0.3):
    measured = {"loss": loss, "guessing": 2.3, "count": 200}
    return {
        "width": width,
        "params": 100,
        "train": measured | {"accuracy": train},
        "validation": measured | {"accuracy": validation},
    }


def make_parts():
    layer = {"mean": 0.0, "std": 1.0, "dead": 0.1, "gradient": 0.1, "update": 0.01}
    return {
        "inputs": {
            "images": 800,
            "classes": 10,
            "task": "classes",
            "mock": False,
            "normalize": True,
            "normalized_by": "training images",
            "grafted": False,
            "finite": True,
            "mean": [0.0],
            "std": [1.0],
            "pixel_range": [0, 255],
            "counts": [80.0] * 10,
            "order": {"batch_size": 40, "classes": 9.8, "expected": 9.85},
            "compared": [800, 200],
            "in_both": 0,
            "contradicting": 0,
            "train_neighbors": dict(NEIGHBORS),
            "validation_neighbors": dict(NEIGHBORS),
            "renumbered": 0.6,
        },
        "loss": {
            "loss": 2.4,
            "guessing": 2.303,
            "spread": 0.3,
            "logits": 10,
            "task": "classes",
            "own_loss": False,
            "grafted": False,
            "training_loss": 2.5,
            "terms": [["L2 (optimizer.l2)", 0.4, True]],
        },
        "layers": {
            "batchnorm": "batch",
            "images": 64,
            "norms": 2,
            "frozen": 0,
            "unmoved": 0,
            "layers": [{"path": name} | layer for name in ("conv1", "norm1", "head")],
        },
        "overfit": {
            "images": 20,
            "attempts": [{"rate": 0.1, "steps": 12, "best": 1.0, "losses": [2.3, 0.1]}],
            "moved": {"conv1": 0.1, "head": 0.2},
        },
        "rate": {"own": 0.02, "steps": 100, "rates": RATES.tolist(), "losses": make_curve()},
        "capacity": {
            "field": "width",
            "grafted": False,
            "steps": 100,
            "epochs": 5.0,
            "rate": 0.02,
            "trial": None,
            "widths": [make_row(0.5), make_row(), make_row(2.0)],
        },
    }


FAILED = [{"rate": 0.1, "steps": None, "best": 0.3, "losses": [2.3]}]


def change(path, value):
    parts = copy.deepcopy(make_parts())
    *sections, last = path.split(".")
    at = parts
    for name in sections:
        at = at[int(name) if isinstance(at, list) else name]
    at[last] = value
    return parts


def test_sound_numbers_are_fine():
    findings = judge(make_parts())
    assert {f.level for f in findings} == {"fine"}, findings
    assert {f.check for f in findings} == set(make_parts())
    assert all(any(c.isdigit() for c in f.text) for f in findings), "each has its number"


@pytest.mark.parametrize(
    ("path", "value", "level", "text"),
    [
        ("inputs.finite", False, "wrong", "not finite"),
        ("inputs.std", [80.0], "wrong", "not scaled"),
        ("inputs.std", [0.01], "wrong", "almost constant"),
        ("inputs.mean", [-0.9], "look", "of other data"),
        ("inputs.counts", [80.0] * 9 + [0.0], "look", "class 9 has no image"),
        ("inputs.counts", [800.0] + [0.0] * 9, "wrong", "one class"),
        ("inputs.counts", [800.0] + [20.0] * 9, "look", "unbalanced"),
        ("inputs.order", {"batch_size": 40, "classes": 1, "expected": 9}, "wrong", "in order"),
        ("inputs.in_both", 3, "look", "3 of 200"),
        ("inputs.in_both", 5, "wrong", "5 of 200"),
        ("inputs.contradicting", 40, "wrong", "another label"),
        ("inputs.renumbered", 0.9, "wrong", "another order"),
        ("loss.loss", 30.0, "wrong", "sure of wrong answers"),
        ("loss.loss", float("nan"), "wrong", "is nan"),
        ("loss.loss", 0.5, "wrong", "knows something"),
        ("loss.loss", 3.3, "look", "spread by 0.3"),
        ("loss.terms", [["L2", 50.0, True]], "look", "52.4 together"),
        ("layers.frozen", 2, "wrong", "2 of 2 BatchNorm layers are frozen"),
        ("layers.unmoved", 2, "wrong", "2 of 2 BatchNorm layers at mean 0"),
        ("layers.error", "the output of 'conv1' is not finite", "wrong", "not finite"),
        ("layers.layers.0.dead", 1.0, "look", "100.0 %"),
        ("layers.layers.0.gradient", 1e-9, "look", "very unequal"),
        ("overfit.attempts", FAILED, "wrong", "at most 30.0 %, at 0.1"),
        ("overfit.moved", {"conv1": 0.0, "head": 0.1}, "look", "1 of 2 layers"),
        ("rate.own", 5.0, "wrong", "too high"),
        ("rate.own", 0.3, "look", "near the edge"),
        ("rate.own", 1.5, "look", "near the edge"),
        ("rate.own", 1e-5, "look", "low"),
        ("rate.losses", [2.3] * 100, "look", "falls at no rate"),
        ("capacity.widths", [make_row(train=1.0, validation=0.7)], "look", "+30.0 points"),
    ],
)
def test_each_number_has_its_limit(path, value, level, text):
    findings = judge(change(path, value))
    hits = [f for f in findings if f.level == level and text in f.text]
    assert len(hits) == 1, findings
    others = [f for f in findings if f.level in ("wrong", "look") and f not in hits]
    assert not others
    assert hits[0].remedy or "points" in hits[0].text


def test_a_rate_that_the_short_training_cannot_take_is_too_high():
    """The range test alone passes it quickly."""
    parts = change("rate.own", 0.3)
    trial = make_row(loss=4.0, train=0.2)
    parts["capacity"]["trial"] = {"rate": 0.3, "losses": [4.0], "train": trial["train"]}
    (wrong,) = [f for f in judge(parts) if f.level == "wrong"]
    assert "reaches 20.0 % of training images (95.0 % at 0.02): too high" in wrong.text
    parts["capacity"]["trial"]["train"]["loss"] = 1.0  # also far behind a lower rate's
    assert [f.level for f in judge(parts) if "too high" in f.text] == ["wrong"]
    parts["capacity"]["trial"]["train"]["accuracy"] = 0.8
    assert [f.level for f in judge(parts) if "near the edge" in f.text] == ["look"]


def test_what_a_design_may_intend_is_wrong_only_if_nothing_is_learned():
    parts = change("layers.layers.0.std", 1e5)
    assert [f.level for f in judge(parts) if "explode" in f.text] == ["look"]
    parts["overfit"]["attempts"] = FAILED
    assert [f.level for f in judge(parts) if "explode" in f.text] == ["wrong"]


def test_labels_are_shuffled_only_if_neither_finds_anything():
    chance = {"right": 0.1, "chance": 0.1, "p": 0.5, "images": 200}
    parts = change("inputs.validation_neighbors", chance)
    parts["inputs"]["train_neighbors"] = chance
    assert [f.level for f in judge(parts) if "network finds more" in f.text] == ["look"]
    for row in parts["capacity"]["widths"]:
        row["validation"]["accuracy"] = 0.12
    (wrong,) = [f for f in judge(parts) if f.level == "wrong"]
    assert "are they shuffled?" in wrong.text
    parts["inputs"]["mock"] = True
    assert not [f for f in judge(parts) if f.level == "wrong"]


def test_an_own_loss_may_be_low_at_other_logits_than_zeros():
    parts = change("loss.loss", 30.0)
    parts["loss"]["own_loss"] = True
    assert {f.level for f in judge(parts)} == {"fine", "look"}
    parts["loss"]["loss"] = 0.1
    assert {f.level for f in judge(parts)} == {"fine"}


def test_numbers_that_are_not_finite_survive_the_file():
    parts = change("loss.loss", float("nan"))
    parts["inputs"] |= {"finite": False, "mean": [float("nan")]}
    parts["rate"]["losses"][-1] = float("inf")
    parts["capacity"]["widths"][1]["train"]["loss"] = float("nan")
    text = json.dumps(files.replace_nonfinite(parts), allow_nan=False)
    assert judge(check.restore_nonfinite(json.loads(text))) == judge(parts)
    assert check.restore_nonfinite(json.loads(text))["rate"]["losses"][-1] == float("inf")


def test_the_range_test_is_read_as_it_was_made():
    reading = read_rates({"rates": RATES.tolist(), "losses": make_curve(best=0.1, limit=1.0)})
    assert reading.best == pytest.approx(0.1, rel=0.3)
    assert reading.suggested == reading.best / 10
    assert reading.limit == pytest.approx(1.0, rel=0.2)
    assert reading.start == pytest.approx(2.3, rel=0.01)


def test_the_page_says_what_is_wrong_first():
    findings = [
        SanityFinding("fine", "loss", "the loss is 2.3"),
        SanityFinding("wrong", "rate", "the rate is 5: too high", "try 0.1"),
    ]
    text = page.format_page("x", findings, {"loss": {}, "rate": {}}, ["sanity_rate.png"])
    assert text.index("1 is wrong, 0 to look at, 1 fine") < text.index("## What is wrong")
    assert "- The rate is 5: too high. Try: try 0.1. (the learning rate)" in text
    assert "![The learning rate](sanity_rate.png)" in text
    assert "sanity_images.png" not in text
    assert page.format_terminal(findings).splitlines()[1].split() == [
        "fine",
        "The",
        "loss",
        "is",
        "2.3.",
    ]
