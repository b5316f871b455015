"""Augmentation in the loader's thread gives the same images as in the step."""

import chex
import jax
import numpy as np
import pytest

from flax_cnns.data.augment import make_augment
from flax_cnns.errors import UserError
from flax_cnns.train import steps
from tests.train import tiny

MOVED = {"data.augment.pad_crop": 2}
# This would show operations that the compiler fuses in only one of the programs.
ALL = {
    "data.augment.pad_crop": 1,
    "data.augment.rotate": 20.0,
    "data.augment.scale": 0.2,
    "data.augment.randaugment": (1, 9),
    "data.augment.pca": 0.5,
    "data.augment.erase": 0.5,
}
STATISTICS = dict(image_shape=tiny.SHAPE, mean=(0.5,), std=(0.25,), covariance=((0.06,),))


def make(fields):
    return make_augment(tiny.config(**fields).data.augment, **STATISTICS)


def loader(augment, first=0):
    return steps.make_loader_augment(augment, lambda: jax.random.key(5), first=first)


# Slow: compiles with the optimizations that users' runs have.
@pytest.mark.parametrize("fields", [MOVED, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_run_is_the_same_to_the_bit(monkeypatch, fields):
    augment, config, plain = make(fields), tiny.config(**fields), tiny.examples
    augmented = loader(augment)
    theirs = tiny.train(config, augment=augment, devices=4)
    monkeypatch.setattr(tiny, "examples", lambda n, i: augmented(plain(n, i), i))
    ours = tiny.train(config, augment=lambda images, keys: images, devices=4)
    chex.assert_trees_all_equal(ours, theirs)


def test_each_process_augments_its_own_rows():
    batch = tiny.examples(8)
    moved = make(MOVED)
    augmented = loader(moved)
    whole = augmented(batch, 3)
    assert whole["image"].dtype == np.float32
    assert (whole["label"] == batch["label"]).all()
    half = loader(moved, first=4)({k: v[4:] for k, v in batch.items()}, 3)
    np.testing.assert_array_equal(half["image"], whole["image"][4:])
    assert (augmented(batch, 4)["image"] != whole["image"]).any()


def test_without_a_cpu(monkeypatch):
    def none(backend):
        raise RuntimeError

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda,cpu"):
        loader(make(MOVED))
