"""Small archives in the official formats, IDX and CIFAR's pickles, and refusals."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest

from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers import archives
from flax_cnns.errors import UserError

RNG = np.random.default_rng(0)


# ---- IDX


def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@pytest.fixture
def mnist(tmp_path, config):
    """Writes the four files, and returns the images and labels of each split."""
    config.name, config.dir, config.image_size = "fashion_mnist", str(tmp_path), 28
    arrays = {}
    for split, n in dict(train=40, test=10).items():
        images, labels = (
            RNG.integers(0, 256, (n, 28, 28), np.uint8),
            np.arange(n, dtype=np.uint8) % 10,
        )
        for stem, array in zip(archives.IDX_FILES[split], (images, labels)):
            (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
        arrays[split] = images, labels
    return arrays


def test_idx(mnist, config):
    dataset = load_dataset(config)
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.class_names[:2] == ("T-shirt/top", "Trouser")
    assert (dataset.mean, dataset.normalized_by) == ((0.2860,), "published")
    images, labels = mnist["test"]
    np.testing.assert_array_equal(dataset.splits["test"].images[..., 0], images)
    np.testing.assert_array_equal(dataset.splits["test"].labels, labels)
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=36, validation=4, test=10)


def test_idx_need_not_be_gzipped_nor_known(mnist, config, tmp_path):
    for file in tmp_path.glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    config.name = "runes"
    assert load_dataset(config).class_names == tuple("0123456789")


def test_idx_damage_is_named(mnist, config, tmp_path):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damage, why in {
        whole[:1000]: "is damaged",  # truncated
        b"<html>not found</html>": "is damaged",
        gzip.compress(gzip.decompress(whole)[:-5]): "declares 31360 bytes, but holds 31355",
        gzip.compress(idx(np.zeros(40, np.uint8))): "not an IDX file of bytes in 3 dimensions",
        gzip.compress(idx(np.zeros((39, 28, 28), np.uint8))): "39 images, but .* 40 labels",
    }.items():
        file.write_bytes(damage)
        with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz.*{why}"):
            load_dataset(config)


def test_idx_takes_no_more_memory_than_its_header_says_and_its_file_can_hold(
    mnist, config, tmp_path, monkeypatch
):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(whole + bytes(1 << 25), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match="declares 31360 bytes, but holds more"):
        load_dataset(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
    monkeypatch.setattr(archives, "_FREE_BYTES", 1000)
    file.write_bytes(gzip.compress(idx(np.zeros((40, 600, 600), np.uint8))))
    with pytest.raises(
        UserError, match=r"is not read: it has [\d,]+ bytes, but declares 14,400,000 bytes"
    ):
        load_dataset(config)


def test_an_archive_that_is_a_pipe_is_not_waited_for(mnist, cifar10, config, tmp_path):
    for file in [*tmp_path.glob("*.gz")]:
        file.unlink()
        os.mkfifo(file)
    for name in ("fashion_mnist", "cifar10"):
        config.name = name
        with pytest.raises(UserError, match=r"gz is a named pipe"):
            load_dataset(config)


def test_idx_files_missing_and_labels_out_of_range(mnist, config, tmp_path):
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(10, 11, np.uint8))))
    with pytest.raises(UserError, match=r"t10k-labels.*holds label 11, but fashion_mnist has 10"):
        load_dataset(config)
    config.name = "runes"  # has the classes of its train split
    with pytest.raises(UserError, match=r"t10k-labels.*holds label 11, but runes has 10"):
        load_dataset(config)
    config.name = "fashion_mnist"
    train = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = train.read_bytes()
    train.write_bytes(gzip.compress(idx(np.full(40, 12, np.uint8))))
    with pytest.raises(UserError, match=r"train-labels.*holds label 12, but fashion_mnist has 10"):
        load_dataset(config)
    train.write_bytes(whole)
    labels.unlink()
    with pytest.raises(UserError, match=r"holds neither t10k-labels-idx1-ubyte\.gz"):
        load_dataset(config)


# ---- CIFAR


def python2_pickle(value):
    """Pickles as Python 2 did for CIFAR's files: byte strings, and arrays of numpy.core."""
    return pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")


def cifar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else python2_pickle(value)
            info = tarfile.TarInfo(f"cifar-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def rows(n):
    return RNG.integers(0, 256, (n, 3072), np.uint8)


@pytest.fixture
def cifar10(tmp_path, config):
    config.name, config.dir = "cifar10", str(tmp_path)
    members = {
        name: {"data": rows(10), "labels": list(range(10))}
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    }
    members["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    members["readme.html"] = b"<html>"
    cifar(tmp_path / "cifar-10-python.tar.gz", members)
    return members


def test_cifar10(cifar10, config):
    dataset = load_dataset(config)
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=45, validation=5, test=10)
    assert dataset.class_names[3] == "class 3"
    # The file holds one channel after the other, each row by row.
    image = dataset.splits["test"].images[4]
    np.testing.assert_array_equal(image[5, 6], cifar10["test_batch"]["data"][4][5 * 32 + 6 :: 1024])


@pytest.mark.parametrize(("labels", "classes"), [("", 100), ("fine", 100), ("coarse", 20)])
def test_cifar100(tmp_path, config, labels, classes):
    config.name, config.dir, config.labels, config.validation = "cifar100", str(tmp_path), labels, 0
    fine, coarse = list(range(100)), [i % 20 for i in range(100)]
    part = {"data": rows(100), "fine_labels": fine, "coarse_labels": coarse}
    names = {
        "fine_label_names": [f"fine {i}" for i in range(100)],
        "coarse_label_names": [f"coarse {i}" for i in range(20)],
    }
    cifar(tmp_path / "cifar-100-python.tar.gz", {"train": part, "test": part, "meta": names})
    dataset = load_dataset(config)
    assert dataset.num_classes == classes
    assert dataset.class_names[19] == f"{labels or 'fine'} 19"
    np.testing.assert_array_equal(
        dataset.splits["train"].labels, coarse if labels == "coarse" else fine
    )
    config.labels = "corse"
    with pytest.raises(UserError, match="did you mean 'coarse'"):
        load_dataset(config)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_is_refused_and_not_run(cifar10, config, tmp_path, protocol):
    trace = tmp_path / "trace"
    cifar10["test_batch"] = pickle.dumps({"data": Evil(trace)}, protocol=protocol)
    cifar(tmp_path / "cifar-10-python.tar.gz", cifar10)
    with pytest.raises(
        UserError, match=r"test_batch is not read: it asks for (_?io|builtins)\.open"
    ):
        load_dataset(config)
    assert not trace.exists()


def test_a_codec_cannot_be_smuggled_in():
    # _codecs.encode is allowed by name, but never called.
    pickled = b"(dVdata\nc_codecs\nencode\n(Vabc\nVrot13\ntRs."
    assert archives._unpickle(pickled, "x")["data"].args == ("abc", "rot13")


def test_a_small_pickle_takes_little_memory(cifar10, config, tmp_path):
    file = tmp_path / "cifar-10-python.tar.gz"
    nested = [0] * 10
    for _ in range(9):
        nested = [nested] * 10  # 10 ** 10 numbers, most of them references
    encoded = b"c_codecs\nencode\n(Vabc\nVlatin1\ntR"
    huge = b"cnumpy\nndarray\n((L8589934592L\nL3072L\ntVu1\ntR"
    array = python2_pickle(rows(10))
    assert array.count(b"K\nM\x00\x0c\x86") == 1  # the shape (10, 3072)
    larger = array.replace(b"K\nM\x00\x0c\x86", b"J\x00\x00\x00\x7fM\x00\x0c\x86")[2:-1]
    tracemalloc.start()
    for change, why in (
        (b"(dVdata\n" + huge + b"s.", r"it lacks|not cifar10's archive"),
        (b"(dVdata\n" + larger + b"s.", "not cifar10's archive: .*reshape"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "test_batch is not read: it has an absurd number"),
        (b"(dVdata\n" + encoded + b"s.", "not cifar10's archive: .*expected an array"),
        ({"data": rows(10), "labels": nested}, "expected a list of integers"),
        ({"data": rows(10), "labels": [1 << 70] * 10}, "not cifar10's archive"),
        ({"data": rows(10).astype(np.float64), "labels": [0] * 10}, "array of integers"),
        ({"data": rows(10).reshape(10, 3, 1024), "labels": [0] * 10}, "expected 2 dimensions"),
    ):
        cifar(file, {**cifar10, "test_batch": change})
        with pytest.raises(UserError, match=why):
            load_dataset(config)
    cifar(file, {**cifar10, "batches.meta": {"label_names": nested}})
    with pytest.raises(UserError, match="expected a list of strings"):
        load_dataset(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_a_member_is_not_taken_for_larger_than_its_archive_can_hold(
    cifar10, config, tmp_path, monkeypatch
):
    file = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        sparse = tarfile.TarInfo("cifar-batches-py/test_batch")  # 4 GiB of nothing
        sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 32)}
        tar.addfile(sparse)
    with pytest.raises(UserError, match="its test_batch is sparse"):
        load_dataset(config)
    cifar(file, cifar10)
    with tarfile.open(file.with_name("twice"), "w:gz") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("cifar-batches-py/readme"), io.BytesIO())
            info = tarfile.TarInfo("cifar-batches-py/batches.meta")
            info.size = len(data := python2_pickle({}))
            tar.addfile(info, io.BytesIO(data))
    file.with_name("twice").rename(file)
    with pytest.raises(UserError, match=r"its batches\.meta occurs twice"):
        load_dataset(config)
    monkeypatch.setattr(archives, "_FREE_BYTES", 1000)
    for name in ("test_batch", "readme.html"):  # also for a member that is skipped
        cifar(file, {name: bytes(1 << 24)})
        with pytest.raises(UserError, match=r"is not read: it has [\d,]+ bytes, but declares"):
            load_dataset(config)


def test_cifar_damage_is_named(cifar10, config, tmp_path):
    file = tmp_path / "cifar-10-python.tar.gz"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in gzip's checksum, after all that tar reads
    for damage in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), b"<html>"):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is damaged"):
            load_dataset(config)

    for change, why in {
        "test_batch": ({"labels": [0]}, "lacks|'data'"),
        "batches.meta": ({"label_names": ["only one"]}, "do not agree"),
        "data_batch_3": ({"data": rows(9), "labels": list(range(10))}, "do not agree"),
        "data_batch_4": (["a", "list"], "not a CIFAR file: expected a dict, got list"),
    }.items():
        value, message = why
        cifar(file, {**cifar10, change: value})
        with pytest.raises(UserError, match=message):
            load_dataset(config)

    cifar(file, {k: v for k, v in cifar10.items() if k != "data_batch_2"})
    with pytest.raises(UserError, match="it lacks data_batch_2"):
        load_dataset(config)


def test_no_archive_where_one_was_promised(config, tmp_path):
    config.name, config.dir, config.source = "cifar10", str(tmp_path), "archive"
    with pytest.raises(UserError, match=r"there is no .*cifar-10-python\.tar\.gz"):
        load_dataset(config)
