"""Files of arrays: the names of Keras and MedMNIST, and refusals."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 8, 8), np.uint8)
LABELS = np.arange(30) % 3
KERAS = dict(x_train=IMAGES, y_train=LABELS[:, None], x_test=IMAGES[:9], y_test=LABELS[:9, None])
MEDMNIST = {
    f"{split}_{kind}": array
    for split in ("train", "val", "test")
    for kind, array in dict(images=IMAGES, labels=LABELS[:, None].astype(np.uint8)).items()
}


@pytest.fixture
def save(tmp_path, config):
    """Returns a function that writes arrays to mine.npz in `data.dir`, and sets `data.name`."""

    def write(compressed=False, **arrays):
        (np.savez_compressed if compressed else np.savez)(tmp_path / "mine.npz", **arrays)
        config.name, config.dir, config.validation = "mine.npz", str(tmp_path), 0.0
        return tmp_path / "mine.npz"

    return write


@pytest.mark.parametrize("compressed", [False, True])
def test_keras(config, save, compressed, monkeypatch):
    path = save(compressed, **KERAS, class_names=np.array(["a", "b", "c"]), extra=np.zeros(3))
    dataset = load_dataset(config)
    assert (dataset.name, dataset.class_names) == ("mine.npz", ("a", "b", "c"))
    assert {role: len(split) for role, split in dataset.splits.items()} == dict(train=30, test=9)
    np.testing.assert_array_equal(dataset.splits["train"].images[:][..., 0], IMAGES)
    assert dataset.splits["test"].labels.tolist() == LABELS[:9].tolist()
    assert "not read: extra" in " ".join(dataset.notes)
    stored = read_fingerprint(config)
    assert stored == dataset.fingerprint
    monkeypatch.chdir(path.parent)
    config.dir = ""
    assert read_fingerprint(config) == stored


def test_medmnist(config, save):
    save(**MEDMNIST)
    dataset = load_dataset(config)
    assert dataset.has_own_validation
    assert dataset.num_classes == 3
    several = RNG.integers(0, 2, (30, 4))
    save(**{k: several if "labels" in k else v for k, v in MEDMNIST.items()})
    dataset = load_dataset(config)
    assert (dataset.task, dataset.num_classes) == ("multilabel", 4)
    assert "the task is multilabel" in " ".join(dataset.notes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=IMAGES, labels=LABELS), "expected arrays called x_train, y_train, .*: images"),
        (dict(x_train=IMAGES, y_test=LABELS), "has no y_train; it has: x_train, y_test"),
        (KERAS | dict(x_val=IMAGES), "has no y_val; it has: x_test"),
        (KERAS | dict(y_train=LABELS.astype(object)), "y_train is a pickled array of objects"),
        (KERAS | dict(x_train=IMAGES.astype(int)), "train images are int64"),
    ],
)
def test_what_is_refused(config, save, arrays, message):
    save(**arrays)
    with pytest.raises(UserError, match=message):
        load_dataset(config)


def test_files_that_are_something_else(config, save):
    path = save(**KERAS)
    whole = path.read_bytes()
    for damaged, message in (
        (pickle.dumps(IMAGES), "is not a file written by np.savez"),
        (whole[: len(whole) // 2], "is not a file written by np.savez"),
        (whole.replace(IMAGES.tobytes()[:64], bytes(64), 1), "is damaged: Bad CRC-32"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_dataset(config)
    path.rename(path.parent / "mime.npz")
    with pytest.raises(UserError, match=r"there is no file .*; did you mean 'mime\.npz'"):
        load_dataset(config)


def test_a_file_that_declares_more_than_it_holds(config, save):
    path = save(**KERAS)
    header = io.BytesIO()
    described = dict(descr="|u1", fortran_order=False, shape=(2**40, 8, 8))
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, array in KERAS.items():
            with file.open(f"{key}.npy", "w") as member:
                if key == "x_train":
                    member.write(header.getvalue() + bytes(100))
                else:
                    np.lib.format.write_array(member, array)
    with pytest.raises(UserError, match=r"is damaged: x_train declares \[1099511627776, 8, 8\]"):
        load_dataset(config)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key in KERAS:
            with file.open(f"{key}.npy", "w") as member:
                member.write(header.getvalue())
    whole = bytearray(path.read_bytes())
    for at in range(len(whole)):  # in the directory at the end: the size of a member
        if whole[at : at + 4] == b"PK\x01\x02":
            whole[at + 24 : at + 28] = struct.pack("<I", 2**31)
    path.write_bytes(whole)
    with pytest.raises(
        UserError, match=r"is not read: it has .* bytes, but declares 2,147,483,648"
    ):
        load_dataset(config)
