"""Weight files, made here byte by byte: what is read, and what is refused."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.weights import files, pickles

A = np.arange(6, dtype=np.float32).reshape(2, 3)
HALF = np.array([1, 2, 3], np.float16)


# ---- PyTorch's pickles, written without PyTorch by objects that stand for globals and storages


class Global:
    """Stands for a name that is imported, such as torch.FloatStorage."""

    def __init__(self, name):
        self.name = name


class Storage:
    def __init__(self, kind, key, size):
        self.reference = ("storage", Global(f"torch {kind}"), key, "cpu", size)


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())


class Called:
    """Stands for an object that a pickle makes by a call."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None

    def save_by_name(self, value):
        module, name = value.name.split()
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def save_tensor(self, value):
        self.save_call(Called("torch._utils _rebuild_tensor_v2", *value.arguments))

    def save_call(self, value):
        self.save(Global(value.name))
        self.save(value.arguments)
        self.write(pickle.REDUCE)

    dispatch = pickle._Pickler.dispatch | {
        Global: save_by_name,
        Tensor: save_tensor,
        Called: save_call,
    }


def pickled(value) -> bytes:
    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


def tensors():
    """The transpose of A, a part of A, and float16 numbers; with the bytes of their storages."""
    a, half = Storage("FloatStorage", "0", 6), Storage("HalfStorage", "1", 3)
    tree = collections.OrderedDict(
        {
            "a.weight": Tensor(a, 0, (3, 2), (1, 3)),
            "a.bias": Tensor(a, 4, (2,), (1,)),
            "half": Tensor(half, 0, (3,), (1,)),
            "number": Tensor(half, 1, (), ()),
        }
    )
    return tree, {"0": A.tobytes(), "1": HALF.tobytes()}


def torch_zip(path, tree, storages, **others):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled(tree))
        for key, data in (storages | others).items():
            archive.writestr(f"x/{key}" if key in others else f"x/data/{key}", data)
    return path


def torch_stream(path, tree, storages, widths=(4, 2)):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tree, sorted(storages)]
    data = b"".join(map(pickled, parts))
    for width, key in zip(widths, sorted(storages)):
        data += struct.pack("<q", len(storages[key]) // width) + storages[key]
    path.write_bytes(data)
    return path


WRITERS = {"zip": torch_zip, "stream": torch_stream}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("around", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_pytorch_saved(tmp_path, write, around, prefix):
    tree, storages = tensors()
    tree = collections.OrderedDict({prefix + name: tensor for name, tensor in tree.items()})
    if around:
        tree = {"epoch": 3, around: tree, "optimizer": {"param_groups": [{"lr": 0.1}]}}
        tree["args"] = Called("argparse Namespace")
        tree["lr_scheduler"] = {"milestones": Called("collections Counter", {30: 1})}
    found = files.read(write(tmp_path / "x.pth", tree, storages))
    assert list(found) == ["a.weight", "a.bias", "half", "number"]
    np.testing.assert_array_equal(found["a.weight"], A.T)
    np.testing.assert_array_equal(found["a.bias"], [4, 5])
    np.testing.assert_array_equal(found["half"], HALF)
    assert found["half"].dtype == np.float16
    assert found["number"] == 2
    assert found["number"].shape == ()


def test_averaged_weights_beside_the_others(tmp_path):
    tree, storages = tensors()
    other = {name: tree["a.bias"] for name in tree}
    both = {"epoch": 5, "state_dict": tree, "state_dict_ema": other}
    path = torch_zip(tmp_path / "timm.pth", both, storages)
    found, notes = files.read_contents(path)
    assert found["a.weight"].shape == (3, 2)
    assert "took 'state_dict'; the file also has the averaged weights 'state_dict_ema'" in notes[0]
    found, notes = files.read_contents(path, averaged=True)
    assert found["a.weight"].shape == (2,)
    assert notes == ("took the averaged weights 'state_dict_ema'; the file also has 'state_dict'",)


def test_a_networks_options_are_not_its_weights(tmp_path):
    tree, storages = tensors()
    both = {"model": {"name": "resnet18"}, "model_state_dict": tree}
    found = files.read(torch_zip(tmp_path / "x.pth", both, storages))
    assert list(found) == list(tree)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema_state_dict"])
def test_averaged_weights_alone(tmp_path, name):
    tree, storages = tensors()
    path = torch_zip(tmp_path / "x.pth", {"epoch": 5, name: tree}, storages)
    found, notes = files.read_contents(path)
    assert list(found) == list(tree)
    assert notes == (f"took the averaged weights '{name}'; the file has no others",)


def test_averaged_weights_that_are_not_there(tmp_path):
    tree, storages = tensors()
    path = torch_zip(tmp_path / "x.pth", {"model": tree}, storages)
    for file in (path, npz(tmp_path / "x.npz")):
        with pytest.raises(UserError, match=r"the file has no averaged weights .*, only") as said:
            files.read(file, averaged=True)
        assert str(file) in str(said.value)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.model."]
)
def test_prefixes_of_wrappers_are_taken_away_and_told(tmp_path, prefix):
    arrays = {f"{prefix}{name}": A for name in ("fc.weight", "conv.weight")}
    np.savez(tmp_path / "x.npz", **arrays)
    found, notes = files.read_contents(tmp_path / "x.npz")
    assert set(found) == {"fc.weight", "conv.weight"}
    assert notes == (f"removed the wrapper's prefix '{prefix}' from the names",)


def test_heads_losses_and_counters_may_stand_outside_a_wrapper(tmp_path):
    """Names keep their prefix if any other part of a network lacks the prefix."""
    unwrap = lambda *names: list(files.wrappers.remove_prefixes(dict.fromkeys(names, A), []))  # noqa: E731
    assert unwrap("backbone.a.weight", "head.fc.weight") == ["a.weight", "head.fc.weight"]
    assert unwrap("n_averaged", "module.a.weight") == ["a.weight"]
    assert unwrap("module.criterion.weight", "module.model.a.weight") == ["a.weight"]
    assert unwrap("criterion.weight", "a.weight") == ["criterion.weight", "a.weight"]
    for names in (("backbone.a", "neck.b"), ("model.a", "module.b"), ("a.b",), ("model.fc", "fc")):
        assert unwrap(*names) == list(names)


def test_a_tensor_of_the_first_versions(tmp_path):
    storage = Storage("FloatStorage", "0", 6)
    tree = {"a": Called("torch._utils _rebuild_tensor", storage, 1, (2, 2), (3, 1))}
    found = files.read(torch_stream(tmp_path / "x.pth", tree, {"0": A.tobytes()}))
    np.testing.assert_array_equal(found["a"], A[:, 1:])


def test_numbers_of_a_big_endian_machine(tmp_path):
    tree, _ = tensors()
    swapped = {"0": A.byteswap().tobytes(), "1": HALF.byteswap().tobytes()}
    found = files.read(torch_zip(tmp_path / "x.pth", tree, swapped, byteorder=b"big"))
    np.testing.assert_array_equal(found["a.weight"], A.T)


def test_a_tensor_that_says_its_dtype_itself(tmp_path):
    """Such tensors have dtypes for which PyTorch has no storage class."""
    storage, hooks = Storage("x", "0", 2), collections.OrderedDict()
    storage.reference = ("storage", Global("torch.storage UntypedStorage"), "0", "cpu", 2)
    arguments = (storage, 0, (2,), (1,), False, hooks, Global("torch float8_e4m3fn"))
    tree = {"a": Called("torch._utils _rebuild_tensor_v3", *arguments)}
    found = files.read(torch_zip(tmp_path / "x.pth", tree, {"0": b"\x38\x40"}))
    np.testing.assert_array_equal(found["a"].astype(np.float32), [1, 2])


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "torchvision.models.resnet ResNet", "torch load"]
)
def test_code_is_never_run(tmp_path, monkeypatch, write, name):
    ran = []
    monkeypatch.setattr("os.system", ran.append)
    tree = {"a": Called(name, "echo oh")}
    asked = name.replace(" ", r"\.")
    with pytest.raises(
        UserError, match=f"refused: it needs {asked}, and code in files is never run"
    ):
        files.read(write(tmp_path / "x.pth", tree, {}))
    assert not ran


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda s: Tensor(s, 0, (7,), (1,)), "declares"),
        (lambda s: Tensor(s, 5, (2,), (1,)), "declares"),
        (lambda s: Tensor(s, 0, (2, 3), (9, 1)), "declares"),
        (lambda s: Tensor(s, 0, (10**12,), (0,)), "declares"),  # 4 TB of one number
        (lambda s: Tensor(s, -1, (2,), (1,)), "no valid shape"),
        (lambda s: Tensor(s, 0, (2,), (-1,)), "no valid shape"),
        (lambda s: Tensor("0", 0, (2,), (1,)), "no valid shape"),
        (lambda s: Tensor(s, 0, (1,) * 65, (1,) * 65), "no valid shape"),
        (lambda s: Tensor(s, 0, (1 << 63,), (0,)), "no valid shape"),
    ],
)
def test_a_tensor_that_leaves_its_storage(tmp_path, write, tensor, said):
    tree = {"a": tensor(Storage("FloatStorage", "0", 6))}
    with pytest.raises(UserError, match=f"is damaged: .*{said}"):
        files.read(write(tmp_path / "x.pth", tree, {"0": A.tobytes()}))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_storage_that_declares_more_than_there_is(tmp_path, write):
    tree = {"a": Tensor(Storage("FloatStorage", "0", 10**12), 0, (10**12,), (1,))}
    with pytest.raises(UserError, match="is damaged: a has 24 bytes, expected 4,000,000,000,000"):
        files.read(write(tmp_path / "x.pth", tree, {"0": A.tobytes()}))


@pytest.mark.parametrize(
    "pickled",
    [
        b"}r\xff\xff\xff\x7f.",  # one dict, put at index 2**31
        b"}q\0"
        + b"N0" * 100_000
        + b"r\x40\x0d\x03\x00.",  # put at index 200,000, as the second entry
    ],
)
def test_a_pickle_that_asks_for_all_memory(tmp_path, pickled):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + pickled)
    with pytest.raises(UserError, match="declares far too many entries"):
        files.read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("given", "each"),
    [
        (b"ctorch\nSize\n", b"(h\0tR"),  # copies a list into tuples
        (b"ccollections\nOrderedDict\n", b"(h\2tR"),  # copies a dict
    ],
)
def test_a_pickle_that_copies_what_it_holds(tmp_path, given, each):
    """Otherwise a hundred kilobytes would fill gigabytes."""
    held = b"](" + b"N" * 10_000 + b"eq\0" + given + b"q\1" + b"}(" + b"I0\nN" * 0
    held += b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10_000)) + b"uq\2"
    calls = b"".join(b"h\1" + each for _ in range(10_000))
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\2" + held + calls + b".")
    with pytest.raises(UserError, match="copies its content over and over"):
        files.read(tmp_path / "x.pth")


def test_attributes_are_not_kept(tmp_path):
    """A state dict has attributes; a malicious pickle may give many of them to many objects."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        made = b"ccollections\nOrderedDict\n)R}X\1\0\0\0aK\1sb."
        archive.writestr("x/data.pkl", b"\x80\2" + made)
    tree, _ = pickles._unpickle(io.BytesIO(b"\x80\2" + made), tmp_path)
    assert not vars(tree)


def laughs(levels: int) -> bytes:
    """A pickle of ten tuples of ten tuples ...: about 30 bytes per level, 10**levels as text."""
    opcodes = b")q\0"
    for level in range(levels):
        opcodes += b"0(" + (b"h" + bytes([level])) * 10 + b"tq" + bytes([level + 1])
    return opcodes


@pytest.mark.parametrize(
    "end",
    [
        b".",
        b"Q.",
        b"0(X\7\0\0\0storageX\x0c\0\0\0FloatStorageX\1\0\0\0aNh\x0ctQ.",
    ],
    ids=["tree", "reference", "size"],
)
def test_what_a_pickle_holds_is_not_written_out(tmp_path, end):
    """Printing the content would need more memory than there is."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\2" + laughs(12) + end)
    with pytest.raises(UserError, match=r"holds a tuple; expected|is damaged") as said:
        files.read(tmp_path / "x.pth")
    assert len(str(said.value)) < 500


def test_a_pickle_changes_nothing_for_later_ones(tmp_path):
    """A pickle may set attributes of each object that it gets, such as a function's defaults."""
    for name in sorted(" ".join(name) for name in pickles._TensorsOnly.ALLOWED):
        module, name = name.encode().split()
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            given = b"c" + module + b"\n" + name + b"\n"
            changed = given + b"N}X\x0c\0\0\0__defaults__K\7\x85s\x86b."
            archive.writestr("x/data.pkl", b"\x80\2" + changed)
        with pytest.raises(UserError):
            files.read(tmp_path / "x.pth")
    for found in pickles._TensorsOnly.ALLOWED.values():
        assert getattr(found, "__defaults__", None) is None


def test_what_is_no_state_dict(tmp_path):
    with pytest.raises(UserError, match="holds epoch, rate; expected tensors by name"):
        files.read(torch_zip(tmp_path / "x.pth", {"epoch": 1, "rate": 0.1}, {}))
    (tmp_path / "p.pth").write_bytes(pickled({"a": 1}))
    with pytest.raises(UserError, match="is a pickle, but not one of PyTorch"):
        files.read(tmp_path / "p.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        files.read(torch_zip(tmp_path / "e.pth", {}, {}))


# ---- the other formats


def safetensors(path, arrays, extra=b""):
    header, data = {}, b""
    for name, (kind, array) in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": kind,
            "shape": array.shape,
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data + extra)
    return path


def npz(path):
    np.savez_compressed(path, **{"a.weight": A.T, "a.bias": HALF})
    return path


def test_safetensors(tmp_path):
    raw = np.array([0x3F80, 0x4000], np.uint16)  # 1 and 2 in bfloat16
    path = safetensors(
        tmp_path / "x.any", {"b": ("F16", HALF), "a": ("F32", A), "c": ("BF16", raw)}
    )
    found = files.read(path)
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"], HALF)
    np.testing.assert_array_equal(found["c"].astype(np.float32), [1, 2])
    with pytest.raises(UserError, match="is damaged"):
        files.read(safetensors(tmp_path / "y", {"a": ("F32", A)}, extra=b"more"))


def test_float8_is_converted_and_unknown_kinds_are_named(tmp_path):
    kinds = {"F8_E4M3": b"\x38\x40", "F8_E5M2": b"\x3c\x40"}
    arrays = {kind: (kind, np.frombuffer(raw, np.uint8)) for kind, raw in kinds.items()}
    found = files.read(safetensors(tmp_path / "x", arrays))
    for array in found.values():
        np.testing.assert_array_equal(array.astype(np.float32), [1, 2])
    with pytest.raises(
        UserError, match="a has the type F4, which is not supported; convert it to flo"
    ):
        files.read(safetensors(tmp_path / "y", {"a": ("F4", HALF)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["a"].update(data_offsets=[0, 1 << 40]), "declares 1,099,511,627,776 bytes"),
        (lambda h: h["a"].update(shape=[1 << 40]), "declares 24 bytes"),
        (lambda h: h["a"].update(shape=[-2, -3]), "no valid shape"),
        (lambda h: h["a"].update(data_offsets=[4, 28]), "declares bytes 4 to 28"),
        (lambda h: h.update(b=h["a"]), "declares bytes 0 to 24; expected to begin at 24"),
        (lambda h: h.clear(), "declares 0 bytes of arrays"),
    ],
)
def test_a_header_of_safetensors_that_lies(tmp_path, change, said):
    path = safetensors(tmp_path / "x", {"a": ("F32", A)})
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + A.tobytes())
    with pytest.raises(UserError, match=f"is damaged: .*{said}"):
        files.read(path)
    path.write_bytes(struct.pack("<Q", 1 << 50) + text + A.tobytes())
    with pytest.raises(UserError, match="its header declares 1,125,899,906,842,624 bytes"):
        files.read(path)


def test_npz(tmp_path):
    found = files.read(npz(tmp_path / "x.npz"))
    assert list(found) == ["a.weight", "a.bias"]
    np.testing.assert_array_equal(found["a.weight"], A.T)


def npy(shape, dtype="<f4", data=b"\0" * 24):
    out = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy((10**12,)), r"is damaged: float32\[1000000000000\] does not fit 24 bytes"),
        (npy((1,), "|O", pickle.dumps([print])), "refused: it holds Python objects"),
        (npy((2, 3)) + bytes(1 << 28), "is refused: it declares 268,.* bytes"),
    ],
)
def test_arrays_that_are_refused(tmp_path, content, said):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(UserError, match=said):
        files.read(tmp_path / "x.npz")


def test_a_directory_of_an_archive_that_lies(tmp_path):
    """The directory declares 200 bytes for 64 MiB; only about 200 bytes are decompressed."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy((1 << 24,), data=bytes(1 << 26)))
    size = archive.getinfo("a.npy").file_size
    whole = path.read_bytes()
    assert whole.count(struct.pack("<I", size)) == 2
    path.write_bytes(whole.replace(struct.pack("<I", size), struct.pack("<I", 200)))
    tracemalloc.start()
    with pytest.raises(UserError, match="is damaged"):
        files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_member_compressed_as_no_library_does(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", npy((2, 3)))
    with pytest.raises(UserError, match=r"a\.npy has the unknown compression method 12"):
        files.read(tmp_path / "x.npz")


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(UserError, match="is a pipe or a device; expected a weight file"):
        files.read(tmp_path / "x.pth")
    with pytest.raises(UserError, match="is a pipe or a device"):
        files.read("/dev/zero")


def test_a_file_full_of_holes_is_refused(tmp_path):
    with open(tmp_path / "x.pth", "wb") as file:
        file.write(b"\x80\2")
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="declares 1,099,511,627,776 bytes of arrays"):
        files.read(tmp_path / "x.pth")


def test_memory_that_runs_out_is_one_line(tmp_path, monkeypatch):
    def run_out(*_):
        raise MemoryError

    monkeypatch.setattr(files, "_read_npy", run_out)
    with pytest.raises(UserError, match=r"bytes, needs more memory than there is") as said:
        files.read(npz(tmp_path / "x.npz"))
    assert "damaged" not in str(said.value)


# ---- damage


def every_format(tmp_path):
    tree, storages = tensors()
    made = {
        "zip": torch_zip(tmp_path / "zip.pth", tree, storages),
        "stream": torch_stream(tmp_path / "stream.pth", tree, storages),
        "npz": npz(tmp_path / "x.npz"),
    }
    made["safetensors"] = safetensors(tmp_path / "x.safetensors", {"a": ("F32", A)})
    made["h5"] = keras2(tmp_path / "x.h5", {"conv": {"conv/kernel:0": A, "conv/bias:0": HALF}})
    return made


def test_a_file_cut_anywhere_is_damaged(tmp_path):
    for kind, path in every_format(tmp_path).items():
        files.read(path)
        whole = path.read_bytes()
        for length in {0, 1, 7, 9, 30, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"damaged|expected|refused") as said:
                files.read(path)
            assert "\n" not in str(said.value), kind


def test_any_byte_changed_gives_tensors_or_a_user_error(tmp_path):
    random = np.random.RandomState(0)
    made = every_format(tmp_path)
    del made["h5"]  # damaged strings can keep the HDF5 library busy forever
    for path in made.values():
        whole = path.read_bytes()
        for place in random.randint(0, len(whole), 60):
            changed = bytearray(whole)
            changed[place] ^= 1 << random.randint(8)
            path.write_bytes(changed)
            with contextlib.suppress(UserError):
                files.read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"hello, hello", "is not a weight file; expected .safetensors"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, content, said):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=said):
        files.read(tmp_path / "x.pth")


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        files.read(tmp_path / "x.pth")
    with pytest.raises(UserError, match="is a folder"):
        files.read(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"is a zip file with readme.txt in it; expected"):
        files.read(tmp_path / "x.zip")


# ---- Keras


def keras2(path, layers, prefix=""):
    """Writes {layer: {name of a weight: array}} as Keras 1 and 2 did."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        group = file.create_group(prefix) if prefix else file
        group.attrs["layer_names"] = [name.encode() for name in layers]
        for layer, arrays in layers.items():
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [name.encode() for name in arrays]
            for name, array in arrays.items():
                inner[name] = array
    return path


@pytest.mark.parametrize("prefix", ["", "model_weights"])
@pytest.mark.parametrize(
    ("layer", "weight", "ours"),
    [
        ("conv1_conv", "conv1_conv/kernel:0", "conv1_conv/kernel"),
        ("conv1/conv", "conv1/conv/kernel:0", "conv1_conv/kernel"),  # DenseNet
        ("Conv/BatchNorm", "Conv/BatchNorm/gamma:0", "Conv_bn/gamma"),  # MobileNet v3
        ("block1_conv1", "block1_conv1_W_1:0", "block1_conv1/kernel"),  # VGG, from Keras 1
        (
            "batchnormalization_2",
            "batchnormalization_2_running_std:0",
            "batch_normalization_2/moving_variance",
        ),
        ("stem", "stem_conv/kernel:0", "stem_conv/kernel"),  # a network inside the network
        ("conv1", "conv1/kernel", "conv1/kernel"),  # Keras 3
        ("a_layer_scale", "Variable:0", "a_layer_scale/variable"),
    ],
)
def test_names_of_keras(tmp_path, prefix, layer, weight, ours):
    found = files.read(keras2(tmp_path / "x.h5", {layer: {weight: A}, "relu": {}}, prefix))
    assert list(found) == [ours]
    np.testing.assert_array_equal(found[ours], A)


def keras3(path, layers):
    """Writes {(class, own name): arrays} as a .weights.h5 of Keras 3."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for (kind, name), arrays in layers.items():
            group = file.create_group(f"layers/{kind}/vars")
            group.attrs["name"] = name
            for i, array in enumerate(arrays):
                group[str(i)] = array
    return path


def test_keras_3_numbers_its_leaves(tmp_path):
    layers = {
        ("conv2d", "stem_conv"): (A,),
        ("batch_normalization", "stem_bn"): [np.full(3, i) for i in range(4)],
        ("batch_normalization_1", "batch_normalization_94"): [np.full(3, i) for i in range(3)],
        ("separable_conv2d_10", "sepconv"): (A, A + 1, HALF),
    }
    path = keras3(tmp_path / "x.weights.h5", layers)
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.write(path, "model.weights.h5")
        archive.writestr("config.json", "{}")
    for file in (path, tmp_path / "x.keras"):
        found = files.read(file)
        np.testing.assert_array_equal(found["stem_conv/kernel"], A)
        assert [
            int(found[f"stem_bn/{leaf}"][0])
            for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
        ] == [0, 1, 2, 3]
        assert int(found["batch_normalization_94/beta"][0]) == 0  # this norm has no scale
        assert int(found["batch_normalization_94/moving_variance"][0]) == 2
        np.testing.assert_array_equal(found["sepconv/pointwise_kernel"], A + 1)
        np.testing.assert_array_equal(found["sepconv/bias"], HALF)
        assert len(found) == 11


def test_hdf5_that_lies_elsewhere_or_nowhere(tmp_path):
    h5py = pytest.importorskip("h5py")
    keras2(tmp_path / "other.h5", {"a": {"a/kernel:0": A}})
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["layer_names"] = [b"a"]
        file["a"] = h5py.ExternalLink("other.h5", "/a")
    with pytest.raises(UserError, match="damaged"):
        files.read(tmp_path / "x.h5")
    with h5py.File(tmp_path / "y.h5", "w") as file:  # 4 TB declared, nothing written
        file.attrs["layer_names"] = [b"a"]
        file.create_dataset("a/kernel:0", (10**12,), "f4", chunks=(10**6,))
        file["a"].attrs["weight_names"] = [b"kernel:0"]
    with pytest.raises(UserError, match=r"declares 4,000,000,000,000 bytes of arrays"):
        files.read(tmp_path / "y.h5")
