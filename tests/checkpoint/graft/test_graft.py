import json
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_cnns import FRESH, create_model, graft, init_variables
from flax_cnns.checkpoint import reading
from flax_cnns.checkpoint.graft import sources
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.tree import flatten
from flax_cnns.weights import preprocessing
from tests.checkpoint.test_manager import data_file
from tests.models import cases

ALL = (r"(.*)", r"\1")
NEW_HEAD = (r"params/head/.*", FRESH)


def network(seed: int, classes: int = 3, stem: str = "conv", stages: int = 2) -> dict:
    """The tree of a small network with batch normalization."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    parts = {"stem": {stem: (3, 3, 1, 4)}}
    parts |= {f"stage{i + 1}": {"conv": (3, 3, 4, 4)} for i in range(stages)}
    params = {
        name: {**{k: {"kernel": leaf(*v)} for k, v in convs.items()}, "norm": {"scale": leaf(4)}}
        for name, convs in parts.items()
    }
    params["head"] = {"kernel": leaf(4, classes), "bias": leaf(classes)}
    stats = {name: {"norm": {"mean": leaf(4), "var": leaf(4)}} for name in parts}
    return {"params": params, "batch_stats": stats}


SOURCE, AVERAGED, OLDER = network(1), network(2), network(3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "digits"
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step, variables, accuracy in ((10, OLDER, 0.5), (20, SOURCE, 0.9), (30, OLDER, 0.8)):
            # A large optimizer state, which a graft must not read.
            state = {**variables, "ema": AVERAGED, "step": np.int32(step)}
            state["opt_state"] = ({"mu": np.random.default_rng(step).normal(size=1 << 17)}, ())
            found = {"validation/accuracy": accuracy}
            checkpoints.save(step, state, host={}, metrics=found)
    (run / "summary.json").write_text('{"test/step": 20}')
    return run


def taken(variables, source, paths):
    """Whether exactly these leaves equal those of the source."""
    ours, theirs = flatten(variables), flatten(source)
    same = {p for p in ours if p in theirs and np.array_equal(ours[p], theirs[p])}
    return same == set(paths)


def make_bomb(folder, tree):
    """A checkpoint of a kilobyte whose first array declares 2**40 numbers."""
    ocp.PyTreeCheckpointer().save(folder, tree, force=True)
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    name = next(iter(flatten(tree))).replace("/", ".") + "/.zarray"
    header = json.loads(store[name])
    header["shape"] = header["chunks"] = [1 << 40]
    store[name] = json.dumps(header).encode()


def misuse(source, rules, target=None):
    with pytest.raises(UserError) as raised:
        graft(source, network(0, classes=5) if target is None else target, rules)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- uses


def test_a_head_of_other_classes(run):
    target = network(0, classes=5)
    variables, report = graft(f"{run}@20", target, [NEW_HEAD, ALL])
    body = [p for p in flatten(target) if "head" not in p]
    assert taken(variables, SOURCE, body)
    assert taken(variables, target, ["params/head/kernel", "params/head/bias"])
    assert jax.tree.structure(variables) == jax.tree.structure(target)
    assert report.summary == "grafted 12, fresh 2, left behind 2: head/…"
    saved = json.loads(json.dumps(report.as_dict()))
    assert saved["source"] == f"{run}@20"
    assert saved["folder"] == str(run / "checkpoints/20/state")
    assert saved["mismatched"]["params/head/kernel"] == {"here": [4, 5], "there": [4, 3]}
    assert saved["grafted"]["params/stem/conv/kernel"] == "params/stem/conv/kernel"
    assert saved["fresh"] == ["params/head/bias", "params/head/kernel"]


def test_a_renamed_layer_and_a_fresh_stage(run):
    target = network(0, classes=5, stem="conv_rgb")
    rules = [
        NEW_HEAD,
        (r"(params|batch_stats)/stage2/.*", FRESH),
        (r"(.*)/stem/conv_rgb/(.*)", r"\1/stem/conv/\2"),
        ALL,
    ]
    variables, report = graft(run, target, rules)
    kernel = variables["params"]["stem"]["conv_rgb"]["kernel"]
    assert np.array_equal(kernel, SOURCE["params"]["stem"]["conv"]["kernel"])
    assert report.grafted["params/stem/conv_rgb/kernel"] == "params/stem/conv/kernel"
    table = [re.split(r" *[│┃] *", line)[1:-1] for line in str(report).splitlines()]
    assert [row for row in table if row] == [
        ["part", "leaves", "numbers", "starts from"],
        ["stem/conv_rgb", "1", "36", "stem/conv"],
        ["stem/norm", "3", "12", "stem/norm"],
        ["stage1", "4", "156", "stage1"],
        ["stage2", "4", "156", "fresh"],
        ["head", "2", "25", "fresh: [4, 5], the source has [4, 3]"],
        ["stage2", "4", "", "left behind"],
        ["head", "2", "", "left behind"],
    ]
    assert str(report).startswith(f"grafted from {run}, step 20 (tested for summary.json)\n")
    assert report.summary == "grafted 8, fresh 6, left behind 6: stage2/…, head/…"


def test_averaged_weights(run):
    target = network(0)
    variables, report = graft(run, target, [(r"(.*)", r"ema/\1")])
    assert taken(variables, AVERAGED, flatten(target))
    assert report.summary == "grafted 14, fresh 0, left behind 0"
    _, report = graft(run, network(0, classes=5), [NEW_HEAD, (r"(.*)", r"ema/\1")])
    assert report.left_behind == ("ema/params/head/bias", "ema/params/head/kernel")


def test_averaged_weights_by_an_option(run):
    target = network(0)
    variables, report = graft(run, target, [ALL], averaged=True)
    assert taken(variables, AVERAGED, flatten(target))
    assert report.grafted["params/head/bias"] == "ema/params/head/bias"
    with pytest.raises(UserError, match="averaged=True, but the given tree has no averaged wei"):
        graft(SOURCE, target, [ALL], averaged=True)


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("", SOURCE),
        ("@best", SOURCE),
        ("@latest", OLDER),
        ("@30", OLDER),
        ("/checkpoints/20", SOURCE),
    ],
)
def test_which_checkpoint_of_a_run(run, suffix, expected):
    variables, _ = graft(f"{run}{suffix}", network(0), [ALL])
    assert taken(variables, expected, flatten(expected))


def test_a_relative_path(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    variables, _ = graft("digits@latest", network(0), [ALL])
    assert taken(variables, OLDER, flatten(OLDER))


def test_a_tree_of_arrays():
    source = {**SOURCE, "ema": AVERAGED}
    variables, report = graft(source, network(0), [ALL])
    assert taken(variables, SOURCE, flatten(SOURCE))
    assert report.summary == "grafted 14, fresh 0, left behind 0"
    assert report.source == "the given tree"


def test_checkpoints_made_elsewhere(tmp_path):
    layers = [{"w": np.ones((3, 3, 1, 4), np.float32)}, {"w": np.full((4, 3), 2, np.float32)}]
    ocp.PyTreeCheckpointer().save(tmp_path / "bare", {"model": {"layers": layers}})
    with ocp.CheckpointManager(tmp_path / "managed") as theirs:
        theirs.save(5, args=ocp.args.StandardSave({"model": {"layers": layers}}))
    rules = [
        (r"params/stem/conv/kernel", "model/layers/0/w"),
        (r"params/head/kernel", "model/layers/1/w"),
        (r".*", FRESH),
    ]
    for source in (tmp_path / "bare", tmp_path / "managed", f"{tmp_path}/managed@5"):
        variables, report = graft(source, network(0), rules)
        assert (variables["params"]["stem"]["conv"]["kernel"] == 1).all()
        assert (variables["params"]["head"]["kernel"] == 2).all()
        assert str(report).splitlines()[-3:] == [
            "grafted 2, fresh 12, left behind 0",
            "note: the source has no checksums: a flipped bit would not be noticed",
            "note: fresh layers below loaded layers: stem/norm, stage1/conv, stage1/norm,"
            " stage2/conv, stage2/norm; a loaded layer makes little sense above a fresh one",
        ]


def test_statistics_kept_elsewhere_in_a_foreign_tree():
    layer = {"scale": np.ones(4), "mean": np.zeros(4)}
    source = {
        "weights": {"bn": {"scale": layer["scale"]}},
        "state": {"bn": {"mean": layer["mean"]}},
    }
    target = {
        "params": {"norm": {"scale": jnp.zeros(4)}},
        "batch_stats": {"norm": {"mean": jnp.ones(4)}},
    }
    rules = [(r"params/norm/(.*)", r"weights/bn/\1"), (r"batch_stats/norm/(.*)", r"state/bn/\1")]
    variables, _ = graft(source, target, rules)
    assert (variables["batch_stats"]["norm"]["mean"] == 0).all()
    assert "params from elsewhere, batch_stats from the initialization" in misuse(
        source, [rules[0], (r".*", FRESH)], target
    )


def test_the_target_keeps_its_dtypes_and_shardings(run):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    target = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network(0, classes=5))
    target = jax.device_put(target, NamedSharding(mesh, P()))
    split = target["params"]["stage1"]["conv"]
    split["kernel"] = jax.device_put(split["kernel"], NamedSharding(mesh, P(None, None, "batch")))
    variables, _ = graft(run, target, [NEW_HEAD, ALL])
    for path, leaf in flatten(variables).items():
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == flatten(target)[path].sharding
    whole = SOURCE["params"]["stage1"]["conv"]["kernel"].astype(jnp.bfloat16)
    assert np.array_equal(variables["params"]["stage1"]["conv"]["kernel"], whole)
    kernel = SOURCE["params"]["stem"]["conv"]["kernel"].astype(jnp.bfloat16)
    assert np.array_equal(variables["params"]["stem"]["conv"]["kernel"], kernel)


def test_only_the_wanted_leaves_are_read(run, monkeypatch):
    asked = []
    read = reading.read_leaves
    monkeypatch.setattr(
        reading, "read_leaves", lambda path, paths: asked.append(set(paths)) or read(path, paths)
    )

    def bytes_read():
        found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for metric in found for value in metric["values"])

    before = bytes_read()
    graft(run, network(0), [(r"params/head/.*", r"ema/\g<0>"), (r".*", FRESH)])
    assert asked == [{"ema/params/head/kernel", "ema/params/head/bias"}]
    assert 0 < bytes_read() - before < 100_000  # the checkpoint has a megabyte


def test_a_layer_loaded_above_one_that_was_not(run):
    target = network(0)
    _, report = graft(run, target, [(r"params/stem/conv/kernel", FRESH), ALL])
    assert report.skipped_below == ("stem/conv",)
    assert str(report).splitlines()[-3:] == [
        "grafted 13, fresh 1, left behind 1: stem/…",
        r"note: the source also has averaged weights, which a rule takes by r'ema/\1'",
        "note: fresh layers below loaded layers: stem/conv; a loaded layer makes little sense above"
        " a fresh one",
    ]
    # The last stage and the head lie above all loaded layers, and stage 10 above stage 2.
    target = network(0, classes=5, stages=10)
    rules = [NEW_HEAD, (r".*/stage([3-9]|10)/.*", FRESH), ALL]
    assert graft(run, target, rules)[1].skipped_below == ()


def test_what_lies_below_by_the_order_in_which_images_pass():
    """Names do not show that reduction_a lies below inception_b, or that aux1 is a branch."""
    order = ["stem/conv", "inception_a/conv", "reduction_a/conv", "inception_b/conv", "head"]
    layer = lambda: {"kernel": np.ones(2)}  # noqa: E731
    params = {name.split("/")[0]: {"conv": layer()} for name in order[:-1]}
    tree = {"params": params | {"head": layer(), "aux1": {"head": layer()}}}

    def below(fresh, order):
        return graft(tree, tree, [(rf"params/{fresh}/.*", FRESH), ALL], order)[1].skipped_below

    assert below("(reduction_a|head)", order) == ("reduction_a/conv",)
    assert below("(reduction_a|head)", ()) == ()  # names alone show no more
    for order_of_cost in (order, [*order, "aux1/head"]):
        assert below("head", order_of_cost) == below("aux1", order_of_cost) == ()
    only_stem = [(r"params/stem/.*", r"\g<0>"), (r".*", FRESH)]
    assert graft(tree, tree, only_stem, order)[1].skipped_below == ()


def test_a_network_that_is_all_renamed_has_a_table_that_ends():
    layers = [f"layer{i}" for i in range(60)]
    source = {f"{i}": np.full(2, i) for i in range(60)}
    target = {"params": {layer: {"kernel": np.zeros(2, int)} for layer in layers}}
    rules = [(r"params/layer(\d+)/kernel", r"\1")]
    variables, report = graft(source, target, rules)
    assert variables["params"]["layer7"]["kernel"].tolist() == [7, 7]
    lines = str(report).splitlines()
    assert len(lines) < 50
    assert lines[6] == "│ layer2  │      1 │       2 │ 2             │"  # not layer10
    assert any("20 more parts" in line for line in lines)


# ---- other libraries


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """(file with torchvision's names, layouts and ten classes; its tensors)."""
    file = tmp_path_factory.mktemp("weights") / "squeezenet.npz"
    tensors, _ = cases.load(cases.FOLDER / "squeezenet.npz", "torchvision")
    np.savez(file, **tensors)
    return file, tensors


def test_a_file_of_another_library(squeezenet):
    file, tensors = squeezenet
    model = create_model("squeezenet1_1", num_classes=3)
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    target = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables, report = graft(f"torchvision:squeezenet1_1={file}", target, [NEW_HEAD, ALL])
    kernel = variables["params"]["conv1"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["features.0.weight"].transpose(2, 3, 1, 0))
    assert not variables["params"]["head"]["kernel"].any()
    assert report.summary == "grafted 50, fresh 2, left behind 2: head/…"
    assert report.notes == (
        "torchvision's squeezenet1_1 was trained on RGB images of 224 pixels with"
        " data.mean=(0.485, 0.456, 0.406), data.std=(0.229, 0.224, 0.225)",
    )
    shown = "│ head  │      2 │   1,539 │ fresh: [1, 1, 512, 3], the source has [1, 1, 512, 10] │"
    assert shown in str(report)


def test_a_network_of_bgr_images_is_told_by_the_means_of_rgb():
    """The note has means for data.mean, and the channel order that no field can change."""
    seen = preprocessing("vgg16", "keras")._asdict()
    assert sources._describe_training("vgg16", "keras", seen) == (
        "keras's vgg16 was trained on BGR images of 224 pixels with data.mean=(0.485, 0.458,"
        " 0.4076), data.std=(0.0039, 0.0039, 0.0039); a run gives the network RGB images, so the"
        " first layer has to learn the other order; if that layer is frozen, the network sees red"
        " as blue"
    )


def test_another_library_misspelt(squeezenet):
    file, _ = squeezenet
    assert misuse(f"torchvison:squeezenet1_1={file}", [ALL]) == (
        f"'torchvison:squeezenet1_1={file}' is not a source: expected a run, the path of an"
        " Orbax checkpoint, or LIBRARY:MODEL; did you mean 'torchvision'?"
    )
    assert "did you mean 'squeezenet1_1'" in misuse(f"torchvision:squeezenet11={file}", [ALL])
    assert "expected torchvision as the source" in misuse(f"timm:squeezenet1_1={file}", [ALL])
    assert "nowhere.npz" in misuse("torchvision:squeezenet1_1=nowhere.npz", [ALL])
    text = misuse(file, [ALL])
    assert text.endswith(f"is a file: expected {FILE_HINT}{file}")
    text = misuse(f"torchvision:squeezenet1_1={file}", [(r"params/haed/.*", FRESH), ALL])
    assert "the nearest path is 'params/head/" in text


FILE_HINT = (
    "a run or the folder of an Orbax checkpoint; a file of another library is LIBRARY:MODEL=FILE,"
    " such as timm:resnet50="
)


def test_the_libraries_are_those_whose_tensors_we_take():
    tables = [getattr(family, "SOURCES", {}) for family in registry.FAMILIES]
    assert set(sources.LIBRARIES) == {s for table in tables for of in table.values() for s in of}


# ---- misuse


def test_a_leaf_that_no_rule_decides(run):
    text = misuse(
        run, [(r"params/(stem|stage1)/(.*)", r"params/\1/\2"), (r"batch_stats/(.*)", FRESH)]
    )
    assert text == (
        "graft: no rule decides params/head/bias, params/head/kernel, params/stage2/conv/kernel,"
        " params/stage2/norm/scale; end the rules with ('.*', value)"
    )


def test_a_rule_that_decides_nothing(run):
    text = misuse(run, [(r"params/haed/.*", FRESH), ALL])
    assert "the rule 'params/haed/.*' decides nothing; the nearest path is 'params/head/" in text


def test_a_path_that_the_checkpoint_lacks(run):
    text = misuse(run, [NEW_HEAD, (r"params/stem/(.*)", r"params/stme/\1"), ALL])
    assert "takes params/stem/conv/kernel from 'params/stme/conv/kernel', which " in text
    assert "lacks (2 such paths); the nearest path is 'params/stem/conv/kernel'" in text


def test_shapes_that_differ(run):
    text = misuse(run, [ALL])
    assert text.startswith("graft: ")
    assert (
        " does not fit: params/head/bias is [5] in the network and [3] in the source,"
        " params/head/kernel is [4, 5] in the network and [4, 3] in the source; leave"
    ) in text
    assert "('params/head/.*', None)" in text


def test_kinds_of_numbers_that_differ():
    source = jax.tree.map(lambda x: x.astype(jnp.int32), SOURCE)
    assert "float32 in the network and int32 in the source" in misuse(source, [ALL], network(0))


def test_numbers_that_are_not_finite():
    source = jax.tree.map(np.array, SOURCE)
    source["params"]["stem"]["conv"]["kernel"][0, 0] = 1e5
    assert graft(source, network(0), [ALL])
    target = jax.tree.map(lambda x: x.astype(jnp.float16), network(0))
    text = misuse(source, [ALL], target)
    assert "params/stem/conv/kernel in the given tree has numbers that are not finite as" in text
    source["params"]["stem"]["conv"]["kernel"][0, 0] = np.nan
    assert "not finite as float32" in misuse(source, [ALL], network(0))


def test_nothing_grafted_at_all(run):
    assert "leave all 14 leaves fresh" in misuse(run, [(r".*", FRESH)])


def test_a_layer_parted(run):
    text = misuse(run, [NEW_HEAD, (r"batch_stats/stage2/.*", FRESH), ALL])
    assert (
        "layer stage2/norm come from different layers: params from stage2/norm, batch_stats" in text
    )
    advice = "let one rule decide both: '(params|batch_stats)/stage2/norm/.*'"
    assert f"from the initialization (fresh); {advice}" in text
    text = misuse(run, [NEW_HEAD, (r"params/stem/norm/.*", FRESH), ALL])
    assert "params from the initialization (fresh), batch_stats from stem/norm" in text
    # Averaged weights with the trained statistics, then with those of another layer.
    text = misuse(run, [NEW_HEAD, (r"params/(.*)", r"ema/params/\1"), ALL])
    assert "params from ema/stage1/norm, batch_stats from stage1/norm" in text
    text = misuse(run, [NEW_HEAD, (r"batch_stats/stage1/(.*)", r"batch_stats/stage2/\1"), ALL])
    assert "batch_stats from stage2/norm" in text


def test_a_run_or_step_that_is_not_there(run):
    assert "has no checkpoint '25'; it has best, latest, 20, 30" in misuse(f"{run}@25", [ALL])
    assert "did you mean 'digits'?" in misuse(run.parent / "digit", [ALL])


def test_rules_that_are_none(run):
    assert "'(' is not a regular expression" in misuse(run, [("(", FRESH), ALL])
    text = misuse(run, [NEW_HEAD, (r"(.*)", r"\2")])
    assert "rule 2 has the value '\\\\2', which does not fit its regex '(.*)'" in text
    assert "rule 1 has the value 5, which does not fit" in misuse(run, [(r"(.*)", 5)])
    assert "expected rules (regex, value), got" in misuse(run, ["params"])


def test_a_damaged_checkpoint(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    manifest = copy / "checkpoints/20/manifest/metadata"
    content = json.loads(manifest.read_text())
    content["leaves"]["params/stem/conv/kernel"]["crc32"] ^= 1
    manifest.write_text(json.dumps(content))
    text = misuse(copy, [NEW_HEAD, ALL])
    assert "checkpoints/20/state is damaged: params/stem/conv/kernel has the CRC32" in text
    graft(f"{copy}@latest", network(0), [ALL])
    for file in copy.glob("checkpoints/30/state/**/d/*"):
        file.write_bytes(b"")
    assert "damaged" in misuse(f"{copy}@30", [NEW_HEAD, ALL])
    for item in ("state/_METADATA", "state/manifest.ocdbt", "manifest/metadata"):
        whole = shutil.copytree(run / "checkpoints/20", tmp_path / item.replace("/", "-"))
        (whole / item).write_bytes((whole / item).read_bytes()[:-9])
        assert "damaged" in misuse(whole, [NEW_HEAD, ALL])


def test_a_flipped_bit_is_never_grafted(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, SOURCE, host={})
    rng, noticed = np.random.default_rng(0), 0
    file = data_file(tmp_path / "checkpoints/1")
    good = file.read_bytes()
    for _ in range(10):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        try:
            variables, _ = graft(tmp_path, network(0), [ALL])
        except UserError as error:
            assert "is damaged" in str(error)  # noqa: PT017
            noticed += 1
        else:  # a byte that is not used
            assert taken(variables, SOURCE, flatten(SOURCE))
    assert noticed >= 5


def test_a_small_file_that_declares_huge_arrays(tmp_path):
    make_bomb(tmp_path, {"params": {"head": {"kernel": np.ones(4, np.float32)}}})
    target = {"params": {"head": {"kernel": np.ones(4, np.float32)}}}
    assert "is [4] in the network and [1099511627776] in the source" in misuse(
        tmp_path, [ALL], target
    )
    with pytest.raises(UserError, match=r"declares arrays of 4,398,046,511,104 bytes in files of"):
        reading.read_leaves(tmp_path, ["params/head/kernel"])


def test_a_save_that_was_never_finished(run, tmp_path):
    cut = tmp_path / "checkpoints/40.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints/30", cut)
    for source in (cut, cut / "state"):
        assert "40.orbax-checkpoint-tmp was never finished" in misuse(source, [ALL])
    assert "holds no checkpoint (yet)" in misuse(tmp_path, [ALL])
