"""A user's own arrays: accepted arrays, refusals, and the data set of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.data import augment, pipeline
from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.data.types import ArrayRows, Dataset, Split
from flax_cnns.errors import UserError

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (60, 8, 6, 3), np.uint8)
FLOATS = (BYTES / 255).astype(np.float32)
LABELS = np.arange(60) % 3
SEVERAL = RNG.integers(0, 2, (60, 4))


@pytest.fixture
def config(config):
    config.batch_size, config.eval_batch_size, config.validation = 12, 8, 0.0
    return config


def take(data, config, count=7, **more):
    batches = pipeline.train_batches(data, config, seed=3, **more)
    return [next(batches) for _ in range(count)]


def soft(labels, share=0.9):
    rows = np.full((len(labels), 3), (1 - share) / 2)
    rows[np.arange(len(labels)), labels] = share
    return rows


# ---- accepted arrays


def test_arrays_are_not_copied():
    floats = FLOATS.copy()
    for images in (BYTES, floats, BYTES[..., 0], BYTES[::2], jnp.asarray(BYTES)):
        given = np.asarray(images)
        dataset = Dataset.from_arrays((images, LABELS[: len(given)]))
        assert np.shares_memory(dataset.splits["train"].images.array, given)


def test_splits_are_cut_without_copies(config):
    dataset = Dataset.from_arrays((BYTES, LABELS))
    config.validation, config.fraction, config.classes = 0.2, 0.5, (2, 0)
    done = load_dataset(config, data=dataset)
    assert {role: len(split) for role, split in done.splits.items()} == dict(
        train=13, validation=6, test=8
    )
    for split in done.splits.values():
        assert split.images.array is BYTES
        rows = split.images.rows
        np.testing.assert_array_equal(split.images[:], BYTES[rows])
        np.testing.assert_array_equal(split.labels, [{2: 0, 0: 1}[i] for i in LABELS[rows]])
    assert "8 images of train serve as test" in " ".join(done.notes)


@pytest.mark.parametrize("labels", [LABELS, soft(LABELS)], ids=["integers", "soft"])
def test_the_order_is_that_of_named_data_sets(config, labels):
    """The order depends on (seed, step), as pipeline.py says, whatever was cut from train
    before."""
    config.validation = 0.1
    dataset = load_dataset(config, data=Dataset.from_arrays((BYTES, labels), (BYTES, labels)))
    strata = np.argmax(labels, -1) if np.ndim(labels) == 2 else labels
    held = Dataset.from_arrays((BYTES, strata), (BYTES, strata)).splits["train"]
    plain = load_dataset(config, data=Dataset.from_arrays((BYTES, strata), (BYTES, strata)))
    assert len(held) == 60
    copied = Split(plain.splits["train"].labels, np.asarray(plain.splits["train"].images))
    registered = Dataset("", 3, ("a", "b", "c"), (8, 6, 3), (), (), "", {"train": copied})
    for mine, theirs in zip(take(dataset, config), take(registered, config), strict=True):
        np.testing.assert_array_equal(mine["image"], theirs["image"])
        np.testing.assert_array_equal(strata_of(mine["label"]), theirs["label"])
    resumed = take(dataset, config, 2, start_step=5)
    for mine, again in zip(take(dataset, config)[5:], resumed, strict=True):
        np.testing.assert_array_equal(mine["image"], again["image"])


def strata_of(labels):
    return labels if labels.ndim == 1 else labels.argmax(-1)


@pytest.mark.parametrize(
    ("labels", "task"), [(LABELS, "classes"), (soft(LABELS), "classes"), (SEVERAL, "multilabel")]
)
@pytest.mark.parametrize("images", [BYTES, FLOATS], ids=["bytes", "floats"])
def test_batches(config, images, labels, task):
    dataset = Dataset.from_arrays((images, labels), (images[:19], labels[:19]), task=task)
    dataset = load_dataset(config, data=dataset)
    batch = take(dataset, config, 1)[0]
    assert batch["image"].dtype == images.dtype
    assert batch["image"].shape == (12, 8, 6, 3)
    kind = np.int32 if labels.ndim == 1 else np.float32
    assert (batch["label"].dtype, batch["label"].shape) == (kind, (12, *labels.shape[1:]))
    parts = [
        list(pipeline.eval_batches(dataset, "test", config, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert [len(part) for part in parts] == [3, 3]
    whole = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts)]
    mask = np.concatenate([batch["mask"] for batch in whole]) > 0
    assert mask.sum() == 19
    for key, given in (("image", images), ("label", labels)):
        got = np.concatenate([batch[key] for batch in whole])
        np.testing.assert_array_equal(got[mask], given[:19].astype(got.dtype))
        assert not got[~mask].any()
        assert got.dtype == (images.dtype if key == "image" else kind)


def test_soft_labels_are_stratified_and_multilabel_is_random(config):
    rare = np.where(np.arange(60) < 5, 1, 0)
    config.validation = 0.2
    rows = np.eye(2)[rare] * 0.8 + 0.1
    dataset = load_dataset(config, data=Dataset.from_arrays((BYTES, rows), (BYTES, rows)))
    assert dataset.splits["validation"].labels.argmax(-1).sum() == 1
    several = Dataset.from_arrays((BYTES, SEVERAL), (BYTES, SEVERAL), task="multilabel")
    dataset = load_dataset(config, data=several)
    assert dataset.task == "multilabel"
    assert len(dataset.splits["validation"]) == 12
    assert "classes" not in dataset.fingerprint["splits"]["train"]


def test_classes_and_their_names():
    assert Dataset.from_arrays((BYTES, LABELS), num_classes=5).class_names == tuple("01234")
    named = Dataset.from_arrays((BYTES, LABELS[:, None]), class_names=["a", "b", "c"])
    assert (named.num_classes, named.class_names, named.notes) == (3, ("a", "b", "c"), ())
    counted = Dataset.from_arrays((BYTES, LABELS), (BYTES, LABELS + 1))
    assert counted.num_classes == 4
    assert counted.notes == (
        "assuming 4 classes, because the largest label is 3; for more, give num_classes=",
    )
    assert Dataset.from_arrays((BYTES, LABELS > 1)).splits["train"].labels.dtype == np.int32


def test_a_validation_split_without_a_test_split_serves_as_test(config):
    given = Dataset.from_arrays((BYTES, LABELS), validation=(BYTES[:9], LABELS[:9]))
    config.validation = 0.1
    dataset = load_dataset(config, data=given)
    assert {role: len(split) for role, split in dataset.splits.items()} == dict(
        train=54, validation=6, test=9
    )
    assert not dataset.has_own_validation
    assert "the validation split serves as test" in dataset.notes[-1]
    both = Dataset.from_arrays((BYTES, LABELS), (BYTES, LABELS), (BYTES[:9], LABELS[:9]))
    both = load_dataset(config, data=both)
    assert both.has_own_validation
    assert len(both.splits["validation"]) == 9


# ---- statistics and augmentation


def test_mean_and_std(config):
    for images in (BYTES, FLOATS, np.asfortranarray(FLOATS)):
        dataset = load_dataset(config, data=Dataset.from_arrays((images, LABELS), (images, LABELS)))
        pixels = FLOATS.reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=1e-7)
        np.testing.assert_allclose(dataset.std, pixels.std(0), atol=1e-6)
        assert dataset.normalized_by == "training images"
    given = dict(mean=0.25, std=(0.5, 0.25, 1.0))
    given = Dataset.from_arrays((BYTES, LABELS), **given)
    dataset = load_dataset(config, data=given)
    assert (dataset.mean, dataset.std) == ((0.25,) * 3, (0.5, 0.25, 1.0))
    assert dataset.normalized_by == "data set"
    config.mean, config.std = (0.1,), (0.2,)
    dataset = load_dataset(config, data=given)
    assert (dataset.mean, dataset.std, dataset.normalized_by) == ((0.1,) * 3, (0.2,) * 3, "config")


def test_sums_of_floats_do_not_depend_on_their_order(config):
    order = np.random.default_rng(1).permutation(60)
    a, b = (
        load_dataset(config, data=Dataset.from_arrays((x, LABELS), (x, LABELS)))
        for x in (FLOATS, FLOATS[order])
    )
    assert (a.mean, a.std) == (b.mean, b.std)
    flat = Dataset.from_arrays((np.full_like(FLOATS, 0.5), LABELS))
    assert load_dataset(config, data=flat).std == (1.0,) * 3


def test_covariance_for_pca(config):
    config.augment.pca = 0.1
    expected = np.cov(FLOATS.reshape(-1, 3).T.astype(float), bias=True)
    for images in (BYTES, FLOATS):
        dataset = load_dataset(config, data=Dataset.from_arrays((images, LABELS), (images, LABELS)))
        np.testing.assert_allclose(dataset.covariance, expected, atol=1e-7)


@pytest.fixture(scope="module")
def augmented():
    """Bytes and equal floats after the same augmentation, without normalization."""
    from configs.common import get_config

    fields = get_config().data.augment
    fields.update(flip=True, pad_crop=2, erase=0.9, randaugment=(1, 9), pca=0.1, normalize=False)
    fields.update(random_resized_crop=(), rotate=0.0)
    covariance = np.eye(3) * 0.05
    make = augment.make_augment(
        fields, image_shape=(8, 6, 3), mean=(0.5,) * 3, std=(0.2,) * 3, covariance=covariance
    )
    quick = jax.jit(make, compiler_options={"xla_backend_optimization_level": 0})
    keys = jax.random.split(jax.random.key(0), 60)
    return np.asarray(quick(BYTES, keys)), np.asarray(quick(FLOATS, keys))


def test_floats_are_augmented_as_bytes_are(augmented):
    np.testing.assert_allclose(*augmented, atol=1e-5)


def test_floats_are_normalized_without_division(config):
    normalize = augment.make_normalize(config.augment, mean=(0.5,) * 3, std=(0.25,) * 3)
    np.testing.assert_allclose(normalize(FLOATS), (FLOATS - 0.5) / 0.25, rtol=1e-6)
    np.testing.assert_allclose(normalize(FLOATS), normalize(BYTES), atol=1e-5)
    config.augment.normalize = False
    normalize = augment.make_normalize(config.augment, mean=(0.5,) * 3, std=(0.25,) * 3)
    np.testing.assert_array_equal(normalize(FLOATS), FLOATS)


def test_floats_of_another_range_are_not_changed(config):
    images = 1000 * FLOATS - 500
    given = Dataset.from_arrays((images, LABELS), normalize=False)
    dataset = load_dataset(config, data=given)
    normalize = augment.make_normalize(config.augment, mean=dataset.mean, std=dataset.std)
    np.testing.assert_array_equal(normalize(images), images)
    assert (dataset.normalize, dataset.normalized_by) == (False, "nothing")
    for name, value in (("randaugment", (2, 9)), ("pca", 0.1), ("erase", 0.2)):
        with config.unlocked():
            config.augment.update(randaugment=(), pca=0.0, erase=0.0)
            config.augment.update({name: value})
        with pytest.raises(UserError, match=rf"data\.augment\.{name} needs colors from 0 to 1"):
            load_dataset(config, data=given)
    config.augment.erase = 0.0
    config.mean, config.std = (0.5,), (0.2,)
    with pytest.raises(UserError, match=r"data\.mean and data\.std have no effect"):
        load_dataset(config, data=given)


# ---- facts and fingerprint


def test_facts_and_fingerprint(config):
    given = Dataset.from_arrays((BYTES, LABELS), task="classes", name="mine")
    dataset = load_dataset(config, data=given)
    facts = json.loads(json.dumps(dataset.as_dict()))
    again = Dataset.from_dict(facts)
    assert (again.name, again.image_shape, again.task) == ("mine", (8, 6, 3), "classes")
    stored = dataset.fingerprint
    assert (stored["reader"], stored["splits"]["train"]["classes"]) == ("arrays", [20, 20, 20])
    assert read_fingerprint(config, given) == stored
    other = BYTES.copy()
    other[59, 7, 5, 2] ^= 1
    changed = [
        Dataset.from_arrays((other, LABELS)),
        Dataset.from_arrays((BYTES, LABELS[::-1])),
        Dataset.from_arrays((FLOATS, LABELS)),
        Dataset.from_arrays((BYTES, soft(LABELS))),
    ]
    assert all(read_fingerprint(config, one) != stored for one in changed)
    scattered = np.concatenate([BYTES, BYTES])[::2]
    np.testing.assert_array_equal(scattered[:30], BYTES[::2])
    assert read_fingerprint(config, Dataset.from_arrays((BYTES[:], LABELS))) == stored


def test_rows_are_an_array():
    rows = ArrayRows(BYTES, np.array([3, 5, 1]))
    assert (rows.shape, rows.dtype, rows.size, len(rows)) == ((3, 8, 6, 3), np.uint8, 432, 3)
    np.testing.assert_array_equal(np.asarray(rows), BYTES[[3, 5, 1]])
    np.testing.assert_array_equal(rows[1:], BYTES[[5, 1]])


# ---- refusals


@pytest.mark.parametrize(
    ("images", "labels", "more", "message"),
    [
        (
            np.moveaxis(BYTES, 3, 1),
            LABELS,
            {},
            r"expected \[N H W C\], got \[60, 3.*transpose them by \(0, 2",
        ),
        (BYTES[0, 0], LABELS, {}, r"expected \[N H W C\] or \[N H W\], got \[6, 3\]"),
        (BYTES[:0], LABELS[:0], {}, "of at least one pixel"),
        (BYTES, LABELS[:-1], {}, "train has 60 images and 59 labels"),
        (BYTES.astype(int), LABELS, {}, r"are int64; expected uint8 .*: give images\.astype"),
        (BYTES > 9, LABELS, {}, r"are bool; .*: give images\.astype\(np\.float32\)"),
        (BYTES * np.uint16(99), LABELS, {}, r"are uint16; .*: give \(images / WHITE\)"),
        (BYTES * 1.0, LABELS, {}, "floats from 0 to 255; expected 0 to 1: divide by 255"),
        (FLOATS * np.nan, LABELS, {}, "not finite"),
        (FLOATS + np.inf, LABELS, dict(normalize=False), "not finite"),
        (BYTES, LABELS, dict(normalize=False), "are uint8, but normalize=False is for floats"),
        ([BYTES[0], BYTES[1, :2]], LABELS, {}, "expected one array, got list"),
        (np.array([None, BYTES], object), LABELS, {}, "of objects"),
        (BYTES, LABELS * 1.0, {}, r"are float64 \[N\]; expected integers: labels.astype\(int\)"),
        (BYTES, LABELS.astype(str), {}, "are strings"),
        (BYTES, LABELS - 1, {}, r"train, image 0: it has no label \(-1\); expected 0 to 1"),
        (BYTES, LABELS, dict(num_classes=2), "train, image 2: its label is 2; expected 0 to 1"),
        (BYTES, LABELS * 2**40, {}, "the largest label is .* fewer images: give num_classes="),
        (BYTES, soft(LABELS) * 1.01, {}, r"row 0 has the sum 1\.01"),
        (BYTES, soft(LABELS, 1.5), {}, r"smallest value -0\.25"),
        (BYTES, SEVERAL, {}, "several classes, give task='multilabel'"),
        (BYTES, soft(LABELS), dict(num_classes=4), "3 columns, but there are 4 classes"),
        (BYTES, LABELS, dict(task="multilabel"), r"0 and 1 \[N K\], got int64 \[60\]"),
        (BYTES, LABELS, dict(task="multi"), "task: expected one of classes, multilabel"),
        (BYTES, LABELS * 0, {}, "two classes or more, got 1"),
        (BYTES, LABELS, dict(class_names="abc"), "a sequence of names"),
        (BYTES, LABELS, dict(class_names=["a", "b", "a"]), "'a' is given more than once"),
        (BYTES, LABELS, dict(class_names=["a", "b", "c"], num_classes=4), "class_names has 3"),
        (BYTES, LABELS, dict(mean=0.5), "give both, or neither"),
        (BYTES, LABELS, dict(mean=127, std=60), r"expected values for images in 0\.\.1"),
        (BYTES, LABELS, dict(mean=(0.5, 0.5), std=0.2), "mean and std: expected 1 or 3 numbers"),
        (BYTES, LABELS, dict(test=(FLOATS, LABELS)), r"test images are float32 \[8, 6, 3\], but"),
        (BYTES, LABELS, dict(test=BYTES), r"test: expected \(images, labels\), got uint8 \[60"),
        (BYTES, LABELS, dict(test=(BYTES, soft(LABELS))), "the same kind in all splits"),
    ],
)
def test_what_is_refused(images, labels, more, message):
    with pytest.raises(UserError, match=message) as error:
        Dataset.from_arrays((images, labels), **more)
    assert "\n" not in str(error.value)


def test_what_a_run_refuses(config):
    given = Dataset.from_arrays((BYTES, LABELS), name="mine")
    rows = Dataset.from_arrays((BYTES, soft(LABELS)))
    config.classes = (0, 7)
    with pytest.raises(UserError, match=r"data\.classes needs integer labels, but arrays has"):
        load_dataset(config, data=rows)
    with pytest.raises(UserError, match="mine has no class 7; it has 0 to 2"):
        load_dataset(config, data=given)
    config.classes, config.mock = (), 10
    with pytest.raises(UserError, match=r"data\.mock does not apply"):
        load_dataset(config, data=given)
