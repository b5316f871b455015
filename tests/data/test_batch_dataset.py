"""A user's own batches: divided over steps and processes, checked, and compared by digests."""

import threading

import numpy as np
import pytest

from flax_cnns.data import pipeline
from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.train.loop import prefetch

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 8, 6, 3), np.uint8)
LABELS = np.arange(60) % 3
SIZES = {"train": 40, "test": 19}
SHAPE = (8, 6, 3)
B, E = 12, 8  # batch_size, eval_batch_size


@pytest.fixture
def config(config):
    config.batch_size, config.eval_batch_size, config.validation = B, E, 0.0
    return config


def rows_of(split, start, index, count):
    """Yields the rows of `IMAGES` in each of this process's batches."""
    if split == "train":
        n = B // count
        while True:
            yield (start * B + index * n + np.arange(n)) % 40
            start += 1
    n = E // count
    for first in range(0, 19, E):
        yield 40 + np.arange(first + index * n, min(first + (index + 1) * n, 19))


def factory(split, start_step, process_index, process_count):
    for rows in rows_of(split, start_step, process_index, process_count):
        yield {"image": IMAGES[rows], "label": LABELS[rows]}


def make(factory=factory, **more):
    fields = dict(sizes=SIZES, image_shape=SHAPE, num_classes=3) | more
    return Dataset.from_batches(factory, **fields)


def loaded(config, factory=factory, **more):
    return load_dataset(config, data=make(factory, **more))


def take(data, config, count=5, **more):
    batches = pipeline.train_batches(data, config, seed=0, **more)
    return [next(batches) for _ in range(count)]


# ---- batches of a run


def test_steps_and_processes(config):
    data = loaded(config)
    alone = take(data, config, start_step=2)
    np.testing.assert_array_equal(alone[0]["image"], IMAGES[np.arange(24, 36)])
    assert (alone[0]["label"].dtype, alone[0]["image"].dtype) == (np.int32, np.uint8)
    parts = [take(data, config, start_step=2, process_index=i, process_count=3) for i in range(3)]
    for whole, cut in zip(alone, zip(*parts), strict=True):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([one[key] for one in cut]))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_evaluation_is_padded_and_masked(config, processes):
    data = loaded(config)
    parts = [
        list(pipeline.eval_batches(data, "test", config, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert {len(part) for part in parts} == {3}
    whole = [{k: np.concatenate([one[k] for one in cut]) for k in cut[0]} for cut in zip(*parts)]
    assert all(batch["image"].shape == (E, *SHAPE) for batch in whole)
    images, mask = (np.concatenate([batch[k] for batch in whole]) for k in ("image", "mask"))
    assert (mask.sum(), mask.dtype, images.dtype) == (19, np.float32, np.uint8)
    np.testing.assert_array_equal(images[mask > 0], IMAGES[40:59])
    assert not images[mask == 0].any()


def test_a_process_without_rows_has_the_dtypes_of_the_others(config):
    """One example over two processes: the second process has no rows, and yields no batch."""
    soft = np.eye(3, dtype=np.float32)[LABELS]

    def scarce(split, start_step, process_index, process_count):
        for rows in rows_of("train", start_step, process_index, process_count):
            if split == "train" or process_index == 0:
                rows = rows if split == "train" else rows[:1]
                yield (IMAGES[rows] / 255, soft[rows])
            if split == "test":
                return

    data = loaded(config, scarce, sizes={"train": 40, "test": 1})
    first, second = (
        list(pipeline.eval_batches(data, "test", config, process_index=i, process_count=2))
        for i in range(2)
    )
    assert len(first) == len(second) == 1
    for key in first[0]:
        assert (first[0][key].dtype, first[0][key].shape) == (
            second[0][key].dtype,
            second[0][key].shape,
        )
    assert (first[0]["mask"].sum(), second[0]["mask"].sum()) == (1, 0)


@pytest.mark.parametrize("task", ["classes", "multilabel"])
def test_tuples_floats_and_rows_of_labels(config, task):
    labels = np.eye(3)[LABELS] if task == "classes" else RNG.integers(0, 2, (60, 3))

    def other(*where):
        for rows in rows_of(*where):
            yield (IMAGES[rows] / 255, labels[rows])

    data = loaded(config, other, task=task)
    assert data.task == task
    batch = take(data, config, 1)[0]
    assert {key: array.dtype.str for key, array in batch.items()} == dict(image="<f4", label="<f4")
    np.testing.assert_allclose(batch["label"], labels[:12])


def test_gray_and_raw(config):
    def gray(*where):
        for rows in rows_of(*where):
            yield (IMAGES[rows, :, :, 0] * 4.0 - 500, LABELS[rows, None])

    data = loaded(config, gray, image_shape=(8, 6, 1), normalize=False)
    batch = take(data, config, 1)[0]
    assert batch["image"].shape == (12, 8, 6, 1)
    assert batch["label"].shape == (12,)
    assert (data.mean, data.std, data.normalized_by) == ((0.0,), (1.0,), "nothing")


def test_arrays_that_are_filled_again(config):
    """A factory may reuse its arrays: batches that were pulled before keep their values."""

    def reuse(*where):
        images, labels = np.empty((12, *SHAPE), np.uint8), np.empty(12, int)
        for rows in rows_of(*where):
            images[:], labels[:] = IMAGES[rows], LABELS[rows]
            yield images, labels

    mine, plain = (take(loaded(config, one), config) for one in (reuse, factory))
    for a, b in zip(mine, plain, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


# ---- facts


def test_facts(config):
    data = loaded(config, sizes={**SIZES, "validation": 5})
    assert (data.is_stream, data.in_memory, data.has_own_validation) == (True, True, True)
    assert {role: len(split) for role, split in data.splits.items()} == {**SIZES, "validation": 5}
    assert "factory" not in data.as_dict()
    assert data.fingerprint == read_fingerprint(config, make(sizes={**SIZES, "validation": 5}))
    assert data.fingerprint["splits"]["train"] == {"images": 40}
    assert data.describe()[0] == "batches: 3 classes; images: train 40, test 19, validation 5"


def test_mean_and_std(config):
    data = loaded(config)
    assert (data.mean[0], data.normalized_by) == (0.485, "ImageNet")
    assert "normalized by ImageNet's mean and std" in data.notes[-1]
    data = loaded(config, mean=0.5, std=0.25)
    assert (data.mean, data.std, data.normalized_by) == ((0.5,) * 3, (0.25,) * 3, "data set")
    with pytest.raises(UserError, match="has 13 channels: give from_batches mean= and std="):
        loaded(config, image_shape=(8, 6, 13))
    config.mean, config.std = (0.1,), (0.2,)
    assert loaded(config, mean=0.5, std=0.25).normalized_by == "config"


# ---- digests


def test_digests_follow_steps_through_a_thread_that_prefetches(config):
    data = loaded(config)
    stream = pipeline.train_batches(data, config, seed=0)
    expected = {}
    for step in range(8):
        other = pipeline.train_batches(data, config, seed=0, start_step=step)
        expected[step] = other.digest(step)
        np.testing.assert_array_equal(next(other)["image"], take(data, config, 8)[step]["image"])
    assert len(set(expected.values())) == 8
    batches = prefetch(stream)
    for step in range(7):
        assert stream.digest(step) == expected[step]
        np.testing.assert_array_equal(next(batches)["image"], take(data, config, 7)[step]["image"])
        assert stream.digest(step + 1) == expected[step + 1]
    batches.close()
    with pytest.raises(ValueError, match="step 0 is no longer kept"):
        stream.digest(0)


def test_a_digest_waits_for_the_batch_that_is_being_pulled(config):
    going, pulled = threading.Event(), threading.Event()

    def slow(*where):
        for batch in factory(*where):
            pulled.set()
            assert going.wait(10)
            yield batch

    stream = pipeline.train_batches(loaded(config, slow), config, seed=0)
    thread = threading.Thread(target=next, args=(stream,))
    thread.start()
    assert pulled.wait(10)
    threading.Timer(0.05, going.set).start()
    digest = stream.digest(0)
    thread.join()
    assert digest == pipeline.train_batches(loaded(config), config, seed=0).digest(0)


def test_a_digest_of_a_batch_that_never_comes(config):
    def three(*where):
        for batch, _ in zip(factory(*where), range(3)):
            yield batch

    stream = pipeline.train_batches(loaded(config, three), config, seed=0)
    for _ in range(3):
        next(stream)
    assert stream.digest(3) == ""
    with pytest.raises(UserError, match=r"'train', 0, 0, 1\) ended before step 3, after 3 batches"):
        next(stream)


def test_the_iterator_is_closed(config):
    ended = []

    def closing(*where):
        try:
            yield from factory(*where)
        finally:
            ended.append(where[0])

    data = loaded(config, closing)
    stream = pipeline.train_batches(data, config, seed=0)
    next(stream)
    stream.close()
    assert list(stream) == []
    evaluation = pipeline.eval_batches(data, "test", config)
    next(evaluation)
    evaluation.close()
    assert ended == ["train", "test"]


# ---- refusals


def changed(at, change):
    """Returns the factory with batch number `at` of each split changed."""

    def other(split, start_step, process_index, process_count):
        batches = factory(split, start_step, process_index, process_count)
        for number, batch in enumerate(batches, start_step):
            yield change(batch) if number == at else batch

    return other


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda b: b | {"mask": 1}, "train, step 0: expected the keys image and label, got"),
        (0, lambda b: b["image"], r"step 0: expected \{'image'.*\(images, labels\), got uint8"),
        (
            0,
            lambda b: (np.moveaxis(b["image"], 3, 1), b["label"]),
            r"transpose them by \(0, 2, 3, 1",
        ),
        (0, lambda b: (b["image"][:, 1:], b["label"]), r"expected \[n 8 6 3\], got \[12, 7, 6, 3"),
        (0, lambda b: (b["image"] * 1.0, b["label"]), "step 0: images are floats from 0 to 25"),
        (0, lambda b: (b["image"], b["label"] * 2), "train, step 0, image 2: its label is 4; exp"),
        (3, lambda b: (b["image"], b["label"] - 1), r"step 3, image 0: it has no label \(-1\)"),
        (0, lambda b: (b["image"], b["label"] * 1.0), "step 0: labels are float64 .* integers"),
        (
            0,
            lambda b: (b["image"], np.eye(4)[b["label"]]),
            "have 4 columns, but there are 3 classes",
        ),
        (0, lambda b: (b["image"], b["label"][1:]), "labels: expected 12, as many as images"),
        (2, lambda b: (b["image"][1:], b["label"][1:]), r"train, step 2: images: expected 12 \(d"),
        (2, lambda b: (b["image"] / 255, b["label"]), "step 2: images are float32 .* were uint8"),
        (2, lambda b: (b["image"] + 1, b["label"].astype("U1")), "step 2: labels are strings"),
        (2, lambda b: (b["image"].astype(int), b["label"]), "step 2: images are int64; expected"),
    ],
)
def test_batches_that_are_refused(config, at, change, message):
    with pytest.raises(UserError, match=message) as error:
        take(loaded(config, changed(at, change)), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(SIZES, test=30), r"test, batch 2: images: expected 8 .*sizes\['test'\]=30\), got 3"),
        (dict(SIZES, test=20), r"test, batch 2: images: expected 4 .*sizes\['test'\]=20\), got 3"),
        (dict(SIZES, test=16), r"goes on after 2 batches; sizes\['test'\]=16"),
    ],
)
def test_sizes_that_do_not_fit(config, sizes, message):
    with pytest.raises(UserError, match=message):
        list(pipeline.eval_batches(loaded(config, sizes=sizes), "test", config))


def test_an_evaluation_that_ends_early(config):
    def two(*where):
        for batch, _ in zip(factory(*where), range(2)):
            yield batch

    with pytest.raises(UserError, match=r"1\) ended after 2 batches; sizes\['test'\]=19 .* 3"):
        list(pipeline.eval_batches(loaded(config, two), "test", config))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(factory=3), r"factory: expected a function of \(split, .*, got int"),
        (dict(factory=lambda split: []), "but it takes other arguments: too many positional"),
        (dict(sizes={"train": 40}), "'test' is missing"),
        (dict(sizes={"train": 40, "tset": 3}), "no split 'tset'; did you mean 'test'"),
        (dict(sizes={"train": 40, "test": 0}), r"sizes\['test'\]: expected a whole number above 0"),
        (dict(sizes=[40, 10]), r"expected \{'train': N, 'test': M\}, got \[40, 10\]"),
        (dict(image_shape=(8, 6)), r"expected \(height, width, channels\), got \(8, 6\)"),
        (dict(num_classes=None), "give num_classes= or class_names="),
        (dict(num_classes=1), "two classes or more; got 1"),
        (dict(normalize=False, mean=0.5, std=0.5), "have no effect with normalize=False"),
    ],
)
def test_what_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        make(**more)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("validation", 0.2, r"give sizes\['validation'\], or set data.validation=0"),
        ("fraction", 0.5, "choose the examples in the factory"),
        ("classes", (0, 1), "choose the examples in the factory"),
        ("mock", 10, r"set data\.mock=0"),
    ],
)
def test_what_needs_another_order_is_refused(config, field, value, message):
    config[field] = value
    with pytest.raises(
        UserError, match=rf"data\.{field}=.* does not apply to your own batches .*{message}"
    ):
        loaded(config)
    config.update(validation=0.0, fraction=1.0, classes=(), mock=0)
    config.augment.pca = 0.1
    with pytest.raises(UserError, match=r"data\.augment\.pca needs the colors of all"):
        loaded(config)
    config.augment.pca = 0.0
    with pytest.raises(UserError, match="never end, and the factory may augment"):
        pipeline.eval_batches(loaded(config), "train", config)


def test_there_may_be_no_validation_split(config):
    config.validation = 0.1
    data = loaded(config)
    assert "validation" not in data.splits
    assert "note: there is no validation split; pass sizes['validation']" in "\n".join(
        data.describe()
    )


def test_a_factory_that_returns_nothing(config):
    with pytest.raises(UserError, match=r"factory\('train', 0, 0, 1\) returned NoneType"):
        take(loaded(config, lambda *where: None), config)
