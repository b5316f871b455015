"""Roles of splits, stratified cutting from train, notes and refusals."""

import numpy as np
import pytest

from flax_cnns.data import decode, load, splits
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from tests.data.sources import raw


def test_split_rows_gives_each_class_its_share():
    labels = np.repeat([0, 1, 2, 3], [600, 300, 99, 1])
    keep, taken = splits.split_rows(labels, 1000, 0.1, seed=0)
    assert sorted([*keep, *taken]) == list(range(1000))
    counts = np.bincount(labels[taken], minlength=4)
    np.testing.assert_allclose(counts, [60, 30, 10, 0], atol=1)
    assert counts.sum() == 100
    assert counts[3] == 0  # the only example of its class stays in train

    same = splits.split_rows(labels, 1000, 100, seed=0)[1]  # a count
    np.testing.assert_array_equal(taken, same)
    assert not np.array_equal(taken, splits.split_rows(labels, 1000, 100, seed=1)[1])


def test_split_rows_without_labels_is_random_and_exact():
    keep, taken = splits.split_rows(None, 100, 0.2, seed=0)
    assert len(taken) == 20
    assert sorted([*keep, *taken]) == list(range(100))


@pytest.mark.parametrize("amount", [100, 1000, 0.001])
def test_a_validation_split_that_cannot_be_made(amount):
    with pytest.raises(UserError, match="at least one"):
        splits.split_rows(np.zeros(100, int), 100, amount, seed=0)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"train": 50, "test": 10}, {"train": 45, "validation": 5, "test": 10}),
        (
            {"train": 50, "validation": 20, "test": 10},
            {"train": 50, "validation": 20, "test": 10},
        ),
        ({"train": 50, "validation": 20}, {"train": 45, "validation": 5, "test": 20}),
        ({"train": 50}, {"train": 36, "validation": 4, "test": 10}),
    ],
)
@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_roles(monkeypatch, config, own, expected, in_memory):
    monkeypatch.setattr(load, "_read", lambda config: raw(**own))
    config.name, config.in_memory = "own", in_memory
    dataset = load_dataset(config)
    assert {name: len(split) for name, split in dataset.splits.items()} == expected
    assert dataset.in_memory == (in_memory == "yes")
    assert dataset.image_shape == (32, 32, 3)


def test_no_validation_and_no_train(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.validation = "own", 0
    assert set(load_dataset(config).splits) == {"train", "test"}
    monkeypatch.setattr(load, "_read", lambda config: raw(test=10))
    with pytest.raises(UserError, match="no train split; it has: test"):
        load_dataset(config)


def test_a_test_split_that_cannot_be_cut_is_not_blamed_on_validation(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=2))
    config.name = "own"
    with pytest.raises(UserError, match=r"data.name=own has no test split.* takes 0 of 2 training"):
        load_dataset(config)


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_a_fraction_of_the_training_examples(monkeypatch, config, in_memory):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=1000, test=50))
    config.name, config.in_memory, config.image_size = "own", in_memory, 8
    whole = load_dataset(config)
    config.fraction = 0.1
    tenth = load_dataset(config)
    assert {k: len(v) for k, v in tenth.splits.items()} == dict(train=90, validation=100, test=50)
    assert list(np.bincount(tenth.splits["train"].labels)) == [45, 45]
    for role in ("validation", "test"):
        assert list(tenth.splits[role].labels) == list(whole.splits[role].labels)

    def seen(dataset):
        train = dataset.splits["train"]
        read = lambda i: decode.read_example(train.source, i, 8, 3)[0]  # noqa: E731
        images = train.images if in_memory == "yes" else map(read, range(len(train)))
        return {np.asarray(image).tobytes() for image in images}

    config.fraction = 0.02
    fiftieth = seen(load_dataset(config))
    assert len(fiftieth) == 18
    assert fiftieth < seen(tenth) < seen(whole)  # a larger fraction contains a smaller one
    config.split_seed = 1
    assert seen(load_dataset(config)) != fiftieth


def test_a_fraction_that_loses_a_class(config):
    config.image_size, config.fraction, config.validation = 8, 0.005, 360
    with pytest.raises(UserError, match=r"fraction=0.005 keeps 5 of 1077 .* none of 5 classes"):
        load_dataset(config)
    config.fraction = 0.0001
    with pytest.raises(UserError, match=r"data.fraction=0.0001 takes 0 of"):
        load_dataset(config)


def test_a_large_batch_and_a_class_without_images_are_notes(monkeypatch, config):
    given = raw(train=11, test=5)._replace(num_classes=3, class_names=("a", "b", "c"))
    monkeypatch.setattr(load, "_read", lambda config: given)
    config.name, config.image_size, config.validation, config.batch_size = "own", 8, 0, 64
    batch, missing = load_dataset(config).notes
    assert "data.batch_size=64 is more than the 11 training images" in batch
    assert missing == "1 of 3 classes have no training image: c"
    assert load_dataset(config).describe()[0] == "own: 3 classes; images: train 11, test 5"
