"""Alternating flips: each image is mirrored in every second epoch."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from configs import common
from flax_cnns.data import load, pipeline
from flax_cnns.data.augment import make_augment
from flax_cnns.data.streams import is_mirrored
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.train import mirror, steps
from tests.train import tiny


@pytest.fixture
def config():
    config = common.get_config().data
    config.batch_size = 12
    config.augment.flip = config.augment.alternate_flip = True
    return config


def numbered(count=20):
    """Images that hold their number on the left and 0 on the right."""
    images = np.zeros((count, 2, 2, 1), np.uint8)
    images[:, :, 0, 0] = np.arange(1, count + 1)[:, None]
    return Dataset.from_arrays((images, np.arange(count) % 2), (images, np.arange(count) % 2))


def take(batches, number):
    return list(itertools.islice(batches, number))


def test_each_image_is_seen_both_ways_in_two_epochs(config):
    config.validation = 0
    data = load.load_dataset(config, data=numbered())
    batches = take(pipeline.train_batches(data, config, seed=3), 5)  # 60 images: three epochs
    images = np.concatenate([mirror.mirror_images(batch) for batch in batches])
    numbers, mirrored = images[:, 0, :, 0].max(1), images[:, 0, 1, 0] > 0
    epochs = [dict(zip(numbers[i : i + 20], mirrored[i : i + 20])) for i in (0, 20, 40)]
    assert len(epochs[0]) == 20
    assert epochs[1] == {number: not turned for number, turned in epochs[0].items()}
    assert epochs[2] == epochs[0]
    assert 4 < sum(epochs[0].values()) < 16  # drawn, not all or none
    other = np.concatenate(
        [b["mirror"] for b in take(pipeline.train_batches(data, config, seed=4), 5)]
    )
    assert (other != np.concatenate([b["mirror"] for b in batches])).any()


def test_batches_do_not_depend_on_where_a_run_starts_or_on_processes(config):
    config.validation = 0
    data = load.load_dataset(config, data=numbered())
    whole = take(pipeline.train_batches(data, config, seed=3), 4)
    (later,) = take(pipeline.train_batches(data, config, seed=3, start_step=3), 1)
    np.testing.assert_array_equal(later["mirror"], whole[3]["mirror"])
    parts = [
        take(pipeline.train_batches(data, config, seed=3, process_index=i, process_count=2), 1)[0]
        for i in range(2)
    ]
    joined = np.concatenate([part["mirror"] for part in parts])
    np.testing.assert_array_equal(joined, whole[0]["mirror"])
    rows = take(pipeline.train_rows(20, config, seed=3), 4)
    for call, batch in zip(rows, whole):
        np.testing.assert_array_equal(call["mirror"], batch["mirror"])


def test_streamed_files_are_mirrored_in_the_same_epochs(config, tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(10):
            image = np.full((4, 4, 3), i, np.uint8)
            Image.fromarray(image).save(tmp_path / "train" / label / f"{i}.png")
    config.update(name="folder", dir=str(tmp_path), image_size=4, validation=4)
    batches = {}
    for where in ("yes", "no"):
        config.in_memory = where
        data = load.load_dataset(config)
        batches[where] = take(pipeline.train_batches(data, config, seed=0), 3)
    for kept, streamed in zip(*batches.values()):
        np.testing.assert_array_equal(kept["mirror"], streamed["mirror"])
        np.testing.assert_array_equal(kept["image"], streamed["image"])


def test_the_step_and_the_loader_mirror_and_flip_no_more():
    fields = {"data.augment.flip": True, "data.augment.alternate_flip": True}
    settings = tiny.config(**fields).data.augment
    augment = make_augment(settings, image_shape=tiny.SHAPE, mean=(0.0,), std=(1.0,))
    batch = tiny.examples(8)
    turned = batch | {"mirror": np.arange(8) % 2 == 0}
    loader = steps.make_loader_augment(augment, lambda: jax.random.key(5), first=0)
    expected = np.where(
        turned["mirror"][:, None, None, None], batch["image"][:, :, ::-1], batch["image"]
    )
    seen = loader(turned, 3)
    assert seen.keys() == batch.keys()  # the step must not mirror again
    np.testing.assert_allclose(seen["image"], expected / 255, rtol=1e-6)


def test_a_users_batches_are_refused(config):
    def factory(split, start, index, count):
        return iter(())

    data = Dataset.from_batches(factory, {"train": 24, "test": 12}, (2, 2, 1), num_classes=2)
    with pytest.raises(UserError, match=r"data\.augment\.alternate_flip .*from_batches"):
        load.load_dataset(config, data=data)


def test_positions_alternate():
    first = [is_mirrored(i, 0, 8) for i in range(16)]
    assert first[:8] != first[8:]
