"""The default data set, digits: its split, and how it is prepared."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flax_cnns.data.load import load_dataset
from flax_cnns.data.statistics import moments
from flax_cnns.errors import UserError

PREPARE = """
import sys
from configs.common import get_config
from flax_cnns.data.load import load_dataset

config = get_config().data
config.dir = sys.argv[1]
print(len(load_dataset(config).splits["train"]), "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def digits(digits_dir):
    from configs.common import get_config

    config = get_config().data
    config.dir, config.image_size = digits_dir, 8
    return load_dataset(config)


def test_the_split_is_fixed_stratified_and_complete(digits):
    sizes = {name: len(split) for name, split in digits.splits.items()}
    assert sizes == {"train": 1077, "validation": 360, "test": 360}
    for split in digits.splits.values():
        share = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(share, np.bincount(load_digits().target) / 1797, atol=2 / 360)

    # Every image of scikit-learn occurs once, with its label; values 0..16 became 0..255.
    ours = np.concatenate([s.images.reshape(len(s), 64) for s in digits.splits.values()])
    labels = np.concatenate([s.labels for s in digits.splits.values()])
    theirs = np.round(load_digits().data * 255 / 16)
    rows = np.column_stack([ours, labels])
    other = np.column_stack([theirs, load_digits().target])
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(other, axis=0))
    assert len(rows) == len(other)


def test_the_recorded_mean_and_std_are_those_of_train(digits):
    mean, std = moments(digits.splits["train"].images)
    np.testing.assert_allclose([digits.mean, digits.std], [mean, std], atol=1e-4)


@pytest.mark.slow  # two processes
def test_two_processes_prepare_at_once_without_tensorflow(tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=60)[0].split() for p in both] == [["1077", "False"]] * 2


def test_killed_half_way_it_is_prepared_anew(tmp_path, config):
    # TFDS leaves a folder of another name behind, with some files.
    left = tmp_path / "digits" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "digits-train.array_record-00000-of-00001").write_bytes(b"half")
    config.dir = str(tmp_path)
    assert len(load_dataset(config).splits["test"]) == 360


def test_a_damaged_copy_is_named(tmp_path, config, digits):
    shutil.copytree(Path(config.dir) / "digits", tmp_path / "digits")
    config.dir = str(tmp_path)
    file = tmp_path / "digits/1.0.0/digits-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"digits.*delete"):
        load_dataset(config)


def test_a_folder_that_cannot_be_written(tmp_path, config):
    (tmp_path / "file").write_text("")
    config.dir = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"cannot prepare digits.*choose another data\.dir"):
        load_dataset(config)
