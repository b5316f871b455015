"""Runs of other classes or other images are refused, with the names of what differs."""

from __future__ import annotations

import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.runs.same_images import SplitFacts, check_same_images

LABELS = np.array([0, 1, 1, 0])
PRINT = {"test": {"images": 4, "digests": ["x"]}, "train": {"images": 9}}
FIRST = SplitFacts("RUN1", "test", "fashion", "classes", ("Shirt", "Coat"), 2, 4, LABELS, PRINT)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"classes": ("Shirt", "Dress")},
            r"RUN2 has the class 'Dress' where RUN1 has 'Coat' \(class 1\)",
        ),
        ({"classes": ("Coat", "Shirt")}, "RUN2 has the class 'Coat' where RUN1 has 'Shirt'"),
        ({"classes": ("Shirt", "Coat", "Bag"), "logits": 3}, "RUN2 has 3 classes and 3 logits"),
        ({"logits": 5}, "RUN2 has 2 classes and 5 logits, RUN1 has 2 classes and 2 logits"),
        ({"task": "multilabel"}, "RUN2 has multilabel data, RUN1 has classes data"),
        ({"images": 3}, "the test split has 3 images for RUN2 and 4 for RUN1; give runs with"),
        ({"images": 3, "dataset": "mnist"}, "3 images for RUN2 .*their data sets are mnist and"),
        ({"labels": LABELS[::-1] * 0}, "RUN2 has other images than RUN1 in the test split"),
        (
            {"fingerprint": {**PRINT, "test": {"images": 4, "digests": ["y"]}}},
            "RUN2 has other images than RUN1: the fingerprints of test differ",
        ),
    ],
)
def test_it_says_what_differs(changed, said):
    with pytest.raises(UserError, match=said):
        check_same_images(FIRST, FIRST._replace(name="RUN2", **changed))


def test_other_training_images_and_unknown_labels_pass():
    check_same_images(FIRST, FIRST._replace(fingerprint={**PRINT, "train": {"images": 5}}))
    check_same_images(FIRST, FIRST._replace(labels=None, fingerprint={}))


def test_a_validation_split_that_was_cut_from_train_needs_the_same_training_images():
    cut = FIRST._replace(split="validation")
    with pytest.raises(UserError, match="the fingerprints of train differ"):
        check_same_images(cut, cut._replace(fingerprint={**PRINT, "train": {"images": 5}}))
