"""Roles of splits, stratification, statistics, noise, and the errors of the config."""

import numpy as np
import pytest

from flax_cnns.data import decode, load, splits
from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import Raw
from flax_cnns.errors import UserError


def test_split_rows_gives_each_class_its_share():
    labels = np.repeat([0, 1, 2, 3], [600, 300, 99, 1])
    keep, taken = splits.split_rows(labels, 1000, 0.1, seed=0)
    assert sorted([*keep, *taken]) == list(range(1000))
    counts = np.bincount(labels[taken], minlength=4)
    np.testing.assert_allclose(counts, [60, 30, 10, 0], atol=1)
    assert counts.sum() == 100
    assert counts[3] == 0  # the only one of its class stays to be learned

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


def raw(shape=(8, 8, 3), **sizes):
    rng = np.random.default_rng(0)
    return Raw(
        {
            name: ArraySource(
                rng.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n, dtype=np.int32) % 2, name
            )
            for name, n in sizes.items()
        },
        2,
        ("a", "b"),
        shape,
    )


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


def test_memory_limit_and_random_crops_decide_what_streams(monkeypatch, config):
    config.name, config.image_size = "own", 16
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    assert load_dataset(config).in_memory
    config.memory_limit = 60 * 16 * 16 * 3 / 2**30
    assert not load_dataset(config).in_memory

    config.memory_limit = 1.0
    config.augment.random_resized_crop = (0.2, 1.0)
    assert load_dataset(config).in_memory
    # Photographs of all sizes: a crop of a shrunk copy would be enlarged.
    monkeypatch.setattr(load, "_read", lambda config: raw((None, None, 3), train=50, test=10))
    dataset = load_dataset(config)
    assert not dataset.in_memory
    assert dataset.eval_share == 0.875


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_the_colours_covariance_is_made_where_pca_wants_it(monkeypatch, config, in_memory):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.image_size, config.in_memory = "own", 8, in_memory
    assert load_dataset(config).covariance == ()
    config.augment.pca = 0.1
    dataset = load_dataset(config)
    source = dataset.splits["train"].source
    images = dataset.splits["train"].images
    if images is None:
        images = np.stack([decode.read(source, i, 8, 3)[0] for i in range(len(source))])
    expected = np.cov(images.reshape(-1, 3).T / 255, bias=True)
    np.testing.assert_allclose(dataset.covariance, expected, rtol=1e-9)
    config.channels = 1
    assert np.shape(load_dataset(config).covariance) == (1, 1)


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_some_classes_are_a_data_set_of_their_own(monkeypatch, config, in_memory):
    """Of 100 classes, whose names are their numbers' squares, three in an order of our own."""
    labels = np.arange(400, dtype=np.int32) % 100
    images = np.tile(labels.astype(np.uint8)[:, None, None, None], (1, 8, 8, 1))
    source = ArraySource(images, labels, "train")
    names = tuple(str(i**2) for i in range(100))
    monkeypatch.setattr(load, "_read", lambda c: Raw({"train": source}, 100, names, (8, 8, 1)))
    config.name, config.in_memory, config.image_size, config.validation = "own", in_memory, 8, 3
    config.classes = ("2500", "16", 8)
    dataset = load_dataset(config)
    assert (dataset.num_classes, dataset.class_names) == (3, ("2500", "16", "64"))
    counts = {name: len(split) for name, split in dataset.splits.items()}
    assert counts == {"train": 7, "validation": 3, "test": 2}
    for split in dataset.splits.values():
        for i, label in enumerate(split.labels):
            image = split.images[i] if in_memory == "yes" else decode.read(split.source, i, 8, 1)[0]
            assert image[0, 0, 0] == (50, 4, 8)[label]  # as the images of those classes are filled


def test_a_number_that_is_the_name_of_another_class_is_ambiguous(monkeypatch, config):
    named = raw(train=50, test=10)._replace(num_classes=3, class_names=("1", "10", "2"))
    monkeypatch.setattr(load, "_read", lambda config: named)
    config.name, config.image_size, config.classes = "own", 8, (0, 1)
    with pytest.raises(UserError, match=r"1 is ambiguous: .* named '1', and number 1 is '10'"):
        load_dataset(config)
    # A run that is there took numbers, and its config cannot change.
    dataset = load_dataset(config, begun=True)
    assert dataset.class_names == ("1", "10")
    assert "1 is ambiguous" in "".join(dataset.describe())
    config.classes = (0, 10)
    with pytest.raises(UserError, match=r"10 is ambiguous: .* number 10 is none; give names"):
        load_dataset(config, begun=True)
    config.classes = ("1", "10")
    assert load_dataset(config).class_names == ("1", "10")


def test_tasks_without_meaning(monkeypatch, config):
    config.name, config.image_size = "own", 8

    def refused(raw, message):
        monkeypatch.setattr(load, "_read", lambda config: raw)
        with pytest.raises(UserError, match=message):
            load_dataset(config)

    given = raw(train=50, test=10)
    source = given.sources["train"]
    one = np.zeros(50, np.int32)
    same = {"train": ArraySource(source.images, one, "train")}
    refused(given._replace(sources=same), "1 of 2 classes have no training image: b")
    refused(given._replace(sources=same, num_classes=1, class_names=("a",)), "classes or more")
    for label in (-1, 2):
        labels = np.where(np.arange(50) == 7, label, source.labels)
        wrong = {"train": ArraySource(source.images, labels, "train")}
        refused(given._replace(sources=wrong), r"train, image 7: .*expected 0 to 1")
    dots = {"train": ArraySource(source.images[:, :0], source.labels, "train")}
    refused(given._replace(sources=dots), "own, train split: .* of a pixel or more, got 0x8")
    refused(raw(train=50, test=0), "own, test split: expected an example or more, got none")


def test_what_may_be_intended_is_a_note(monkeypatch, config):
    given = raw(train=11, test=5)._replace(num_classes=3, class_names=("a", "b", "c"))
    monkeypatch.setattr(load, "_read", lambda config: given)
    config.name, config.image_size, config.validation, config.batch_size = "own", 8, 0, 64
    batch, missing = load_dataset(config).notes
    assert "data.batch_size=64 is more than the 11 training images" in batch
    assert missing == "1 of 3 classes have no training image: c"
    assert load_dataset(config).describe()[0] == "own: 3 classes; images: train 11, test 5"


def test_a_test_split_that_cannot_be_cut_is_not_blamed_on_validation(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=2))
    config.name = "own"
    with pytest.raises(UserError, match=r"data.name=own has no test split.* takes 0 of 2 training"):
        load_dataset(config)


def test_classes_that_a_split_lacks(monkeypatch, config):
    """Accuracy over no image at all would be no number."""
    of = lambda *labels: ArraySource(  # noqa: E731
        np.zeros((len(labels), 8, 8, 1), np.uint8), np.array(labels, np.int32), "some"
    )
    sources = {"train": of(0, 1, 2, 1, 2), "test": of(0, 0)}
    names = ("cat", "dog", "frog")
    monkeypatch.setattr(load, "_read", lambda c: Raw(sources, 3, names, (8, 8, 1)))
    config.name, config.image_size, config.classes = "own", 8, ("dog", "frog")
    with pytest.raises(UserError, match=r"data.classes: the test split of own .* dog, frog"):
        load_dataset(config)


def test_classes_of_a_source_that_does_not_know_its_labels(config):
    config.image_size = 8
    whole = load_dataset(config)
    config.classes = ("7", 1)
    dataset = load_dataset(config)

    def images(dataset, label):
        splits = dataset.splits.values()
        every = [image for split in splits for image in split.images[split.labels == label]]
        return sorted(image.tobytes() for image in every)

    assert dataset.class_names == ("7", "1")
    assert (images(dataset, 0), images(dataset, 1)) == (images(whole, 7), images(whole, 1))


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
        read = lambda i: decode.read(train.source, i, 8, 3)[0]  # noqa: E731
        images = train.images if in_memory == "yes" else map(read, range(len(train)))
        return {np.asarray(image).tobytes() for image in images}

    config.fraction = 0.02
    fiftieth = seen(load_dataset(config))
    assert len(fiftieth) == 18
    assert fiftieth < seen(tenth) < seen(whole)  # more data is the same data and more
    config.split_seed = 1
    assert seen(load_dataset(config)) != fiftieth


def test_a_fraction_that_loses_a_class(config):
    config.image_size, config.fraction, config.validation = 8, 0.005, 360
    with pytest.raises(UserError, match=r"fraction=0.005 keeps 5 of 1077 .* of 5 classes none"):
        load_dataset(config)
    config.fraction = 0.0001
    with pytest.raises(UserError, match=r"data.fraction=0.0001 takes 0 of"):
        load_dataset(config)


def test_noise_of_some_classes(config):
    config.name, config.mock, config.classes, config.fraction = "cifar10", 40, ("cat", 0), 0.5
    dataset = load_dataset(config)
    assert dataset.class_names == ("cat", "airplane")
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=20, validation=8, test=8)
    assert list(np.bincount(dataset.splits["train"].labels)) == [10, 10]


def test_statistics_of_an_unknown_data_set(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.validation, config.image_size = "own", 0, 8
    dataset = load_dataset(config)
    pixels = dataset.splits["train"].images.reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-9)
    assert dataset.normalized_by == "training images"
    config.in_memory = "no"
    assert load_dataset(config).normalized_by == "ImageNet"


def test_statistics_of_the_config(config):
    config.image_size, config.mean, config.std = 8, (0.25,), (0.5,)
    dataset = load_dataset(config)
    assert (dataset.mean, dataset.std, dataset.normalized_by) == ((0.25,), (0.5,), "config")
    config.mean = (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="expected 1 or 1 numbers each"):
        load_dataset(config)
    config.channels = 3
    dataset = load_dataset(config)
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_channels(config):
    config.image_size, config.channels = 8, 3
    colour = load_dataset(config)
    assert colour.image_shape == (8, 8, 3)
    assert len(colour.mean) == len(colour.std) == 3
    images = colour.splits["test"].images
    np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_grey_is_luma(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.image_size, config.channels = "own", 8, 1
    grey = load_dataset(config).splits["test"].images
    colour = raw(train=50, test=10).sources["test"].images
    np.testing.assert_allclose(grey[..., 0], colour @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize(
    ("name", "labels", "classes", "channels"),
    [
        ("imagenet2012", "", 1000, 3),
        ("cifar10", "", 10, 3),
        ("cifar100", "coarse", 20, 3),
        ("cifar100", "fine", 100, 3),
        ("fashion_mnist", "", 10, 1),
        ("digits", "", 10, 1),
        ("folder", "", 10, 3),
    ],
)
def test_noise_in_place_of_any_data_set(config, tmp_path, name, labels, classes, channels):
    config.name, config.labels, config.mock, config.dir = name, labels, 20, str(tmp_path / "none")
    dataset = load_dataset(config)
    assert dataset.num_classes == len(dataset.class_names) == classes
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=20, validation=4, test=4)
    train = dataset.splits["train"]
    assert train.images.shape == (20, 32, 32, channels)
    assert train.images.dtype == np.uint8
    assert train.labels.max() < classes
    np.testing.assert_array_equal(train.images, load_dataset(config).splits["train"].images)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "tdfs", "data.source is one of"),
        ("in_memory", "maybe", "data.in_memory is one of"),
        ("channels", 2, "data.channels is one of"),
        ("validation", 1.5, "a fraction below 1, a count, or 0; got 1.5"),
        ("validation", -1.0, "a fraction below 1, a count, or 0"),
        ("image_size", 0, "data.image_size"),
        ("fraction", 1.5, "data.fraction is above 0, at most 1; got 1.5"),
        ("classes", (3, 10), r"digits has no class 10; it has 0 to 9"),
        ("classes", (3, "four"), r"digits has no class 'four'; known: 0, 1"),
        ("classes", (3,), "two classes or more"),
        ("classes", (3, 4, "3"), "each once"),
        ("name", "cifra10", "did you mean 'cifar10'"),
        ("labels", "lable", "digits has no labels 'lable'; did you mean 'label'"),
    ],
)
def test_values_that_make_no_sense(config, field, value, message):
    config[field] = value
    with pytest.raises(UserError, match=message):
        load_dataset(config)
