"""Own parts in `run`: by name and as objects; resuming, evaluating, and mistakes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_cnns
from flax_cnns import run
from flax_cnns.cli import flags as script
from flax_cnns.config import complete, default_config
from flax_cnns.errors import UserError
from flax_cnns.runs import child, plan, references
from flax_cnns.runs import own_parts as resolving
from flax_cnns.runs.build import make_train_step
from flax_cnns.runs.evaluate import evaluate_run
from flax_cnns.runs.plan import dry_run
from flax_cnns.runs.session import Session
from flax_cnns.runs.train import check_complete_run
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.train import dropout
from flax_cnns.train.progress import Progress
from tests.runs import own_parts
from tests.tiny_runs import arrays, records

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).parents[2]
HERE = "tests.runs.own_parts"
CONFIG = {
    "model": {"name": f"{HERE}:Net", "width": 2, "dropout": 0.1},
    "data": {"name": f"{HERE}:digits", "batch_size": 16, "eval_batch_size": 64},
    "optimizer": {"name": f"{HERE}:momentum", "lr_mult": (("params/head/.*", 2.0), (".*", 1.0))},
    "schedule": {"learning_rate": 0.05},
    "train": {
        "duration": "10 steps",
        "eval_every": "4 steps",
        "loss": f"{HERE}:focal",
        "metrics": (f"{HERE}:recall", f"apart={HERE}:margin"),
        "regularizers": (f"{HERE}:Shrink",),
        "best_by": "validation/recall",
        "best_mode": "max",
        "ema": 0.9,
    },
    "own": {
        "digits": {"examples": 120},
        "momentum": {"beta": 0.9},
        "focal": {"gamma": 1.0},
        "Shrink": {"rate": 0.01},
    },
    "checkpoint": {"every": "4 steps"},
    "log": {"every": "5 steps", "tensorboard": False},
}
OBJECTS = dict(
    model=own_parts.Net,
    data=own_parts.digits,
    optimizer=own_parts.momentum,
    loss=own_parts.focal,
    metrics={"recall": own_parts.recall, "apart": own_parts.margin},
    regularizers=[own_parts.Shrink],
)


def changed(**sections):
    """CONFIG with some fields of its sections changed."""
    config = json.loads(json.dumps(CONFIG))
    for section, fields in sections.items():
        config[section] = {**config.get(section, {}), **fields}
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("own") / "run"
    return workdir, run(CONFIG, workdir)


def test_objects_are_recorded_by_their_names(finished, tmp_path):
    config = {k: v for k, v in CONFIG.items() if k not in ("optimizer", "train")}
    config["model"] = {"width": 2, "dropout": 0.1}
    config["data"] = {"batch_size": 16, "eval_batch_size": 64}
    config["optimizer"] = {"lr_mult": CONFIG["optimizer"]["lr_mult"]}
    names = ("loss", "metrics", "regularizers")
    config["train"] = {k: v for k, v in CONFIG["train"].items() if k not in names}
    run(config, tmp_path / "run", **OBJECTS)
    theirs = finished[0]
    for name in ("config.json", "own.json"):
        assert json.loads((tmp_path / "run" / name).read_text()) == json.loads(
            (theirs / name).read_text()
        )
    chex.assert_trees_all_equal(arrays(tmp_path / "run"), arrays(theirs))


def test_everything_own_is_logged_and_summarized(finished):
    workdir, summary = finished
    logged = records(workdir)
    train = [r for r in logged if "train/loss" in r]
    assert [r["step"] for r in train] == [5, 10]
    assert all({"train/recall", "train/apart", "train/Shrink"} <= r.keys() for r in train)
    validated = [r["validation/recall"] for r in logged if "validation/recall" in r]
    assert len(validated) == 3
    assert summary["validation/best_recall"] == pytest.approx(max(validated))
    assert summary["validation/best_accuracy"] is None
    assert {"test/recall", "test/apart", "test/accuracy"} <= summary.keys()
    assert summary["own"]["model"][0]["name"] == f"{HERE}:Net"
    assert summary["own"]["loss"][0]["fields"] == {"gamma": 1.0}


def test_a_stopped_run_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    workdir, tick = tmp_path / "run", Progress.update

    def update(self, at, metrics):
        if at == 6 and not metrics:
            os.kill(os.getpid(), signal.SIGTERM)
        return tick(self, at, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", update)
        with pytest.raises(Preempted):
            run(CONFIG, workdir)
    run(CONFIG, workdir)
    chex.assert_trees_all_equal(arrays(workdir), arrays(finished[0]))
    assert records(workdir) == records(finished[0])


@pytest.mark.slow
def test_pmap_trains_the_same(finished, tmp_path):
    run(changed(train={"parallel": "pmap"}), tmp_path / "run")
    ours, theirs = records(tmp_path / "run"), records(finished[0])
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_regularizer_that_is_off_is_the_plain_run_to_the_bit(tmp_path):
    run(changed(own={"Shrink": {"rate": 0.0}}), tmp_path / "off")
    config = changed(train={"regularizers": ()})
    del config["own"]["Shrink"]
    run(config, tmp_path / "plain")
    chex.assert_trees_all_equal(arrays(tmp_path / "off"), arrays(tmp_path / "plain"))


def test_evaluating_imports_only_what_is_trusted(finished, capsys):
    workdir, summary = finished
    with pytest.raises(UserError, match=rf"imports {HERE}:Net.*--trust"):
        evaluate_run(workdir)
    results = evaluate_run(workdir, trust=True)
    assert results["recall"] == pytest.approx(summary["test/recall"])
    assert "recall" in capsys.readouterr().out
    with pytest.raises(UserError, match="--trust"):
        flax_cnns.load_run(workdir)


def test_a_run_loads_as_objects(finished):
    loaded = flax_cnns.load_run(f"{finished[0]}@latest", trust=True)
    assert isinstance(loaded.network, own_parts.Net)
    assert loaded.class_names == list("0123456789")
    images = np.zeros((2, 8, 8, 1), np.uint8)
    logits = loaded.network.apply(loaded.variables, loaded.preprocessing(images), train=False)
    assert logits.shape == (2, 10)
    chex.assert_trees_all_equal(
        loaded.variables["params"]["head"]["bias"],
        arrays(finished[0])["ema/params/head/bias"],
    )


def test_another_source_is_a_note_and_another_field_is_refused(finished, tmp_path, capsys):
    workdir = finished[0]
    record = json.loads((workdir / "own.json").read_text())
    was = json.loads(json.dumps(record))
    was["loss"][0]["digest"] = "0" * 16
    assert resolving.compare_records(was, record) == [
        f"the source of {HERE}:focal changed since this run began"
    ]
    with pytest.raises(UserError, match=r"another config \(own\.focal\.gamma: 1\.0 there, 3"):
        run(changed(own={"focal": {"gamma": 3.0}}), workdir)
    config = changed(train={"loss": ""})
    del config["own"]["focal"]
    with pytest.raises(UserError, match=r"another config \(.*train\.loss: .*there, '' here"):
        run(config, workdir)


def test_objects_without_a_name_work_in_this_process(tmp_path, capsys):
    config = {
        "data": {"batch_size": 16, "validation": 0.0},
        "train": {"duration": "2 steps", "eval_every": "0 steps"},
        "log": {"tensorboard": False},
    }
    seen, loss = own_parts.Recorder(), functools.partial(own_parts.focal, gamma=1.0)
    given = dict(
        model=own_parts.Bare(),
        data=own_parts.digits(40),
        loss=loss,
        metrics=[lambda logits, labels, mask: (jnp.sum(mask), jnp.sum(mask))],
        callbacks=[seen],
    )
    with pytest.raises(UserError, match="metrics: expected a list"):
        run(config, tmp_path / "run", **{**given, "metrics": given["metrics"][0]})
    given["metrics"] = {"one": given["metrics"][0]}
    summary = run(config, tmp_path / "run", **given)
    assert (
        "objects that only this process can use: Bare, arrays, focal, one, Recorder"
        in capsys.readouterr().out
    )
    assert summary["test/one"] == 1.0
    assert [step for step, _ in seen.steps] == [1, 2]
    assert all(isinstance(v, float) for _, numbers in seen.steps for v in numbers.values())
    assert seen.saves == [2]
    (part,) = summary["own"]["model"]
    assert part["opaque"]
    assert part["params"] == {"Dense_0/bias": [10], "Dense_0/kernel": [64, 10]}
    assert run(config, tmp_path / "run", **given) == summary
    with pytest.raises(UserError, match="an object that existed only"):
        evaluate_run(tmp_path / "run", trust=True)
    with pytest.raises(UserError, match=r"Bare.* was an object of another process"):
        dry_run(flax_cnns.runs.workdir.read_config(tmp_path / "run"))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (dict(model={"name": "no_such_package:Net"}), "no module 'no_such_package'"),
        (dict(model={"name": f"{HERE}:Nat"}), "has no 'Nat'; did you mean 'Net'"),
        (dict(model={"widht": 3}), "has no field 'widht'; did you mean 'width'"),
        (dict(model={"width": "wide"}), "width must be a whole number, got 'wide'"),
        (dict(model={"scan": True}), "model.scan needs a field 'scan' of the network"),
        (dict(train={"sync_batchnorm": True}), "sync_batchnorm needs a field 'axis_name'"),
        (
            dict(model={"name": f"{HERE}:focal"}),
            "focal has no field",
        ),
        (dict(own={"focal": {"gama": 1.0}}), "own.focal.gama: .*did you mean 'gamma'"),
        (dict(own={"Shrink": {"rat": 1.0, "rate": 0.0}}), "own.Shrink.rat: .*mean 'rate'"),
        (
            dict(own={"Shrnk": {"rate": 1.0}}),
            "no own part is called 'Shrnk'; did you mean",
        ),
        (
            dict(train={"best_by": "validation/recal"}),
            "has no metric 'recal'; did you mean 'recall'",
        ),
        (dict(train={"best_mode": "auto"}), "is the highest or the lowest 'recall' the best"),
        (dict(data={"image_size": 16}), "data.image_size=16: your own data are used as they are"),
        (dict(data={"workers": 2}), "data.workers=2: your own arrays and batches are not"),
        (
            dict(optimizer={"momentum": 0.5}),
            "config.optimizer.momentum=0.5: only sgd, muon and rmsprop",
        ),
        (dict(data={"name": f"{HERE}:no_data"}, own={"digits": 3}), "own.digits"),
        (dict(train={"callbacks": (f"{HERE}:Shrink",)}), "Shrink"),
        (dict(train={"callbacks": (f"{HERE}:scalar_loss",)}), "expected a class or a factory"),
        (dict(own={"Net": {"width": 1}}), "a network's fields are config.model.FIELD"),
        (dict(model={"name": f"{HERE}.Net"}), "network of your own as 'package.module:Name'"),
    ],
)
def test_mistakes_are_reported_before_the_first_step(sections, words):
    with pytest.raises(UserError, match=words):
        dry_run(complete(changed(**sections)))


def test_dropout_by_rules_in_a_network_whose_train_has_no_default():
    net = own_parts.Net(num_classes=10)
    rates = dropout.decide_rates((0.1,), net, params={}, images_shape=(1, 8, 8, 1))
    assert rates == {"conv1": 0.1, "conv2": 0.1}
    with pytest.raises(UserError, match=r"dropout: nothing would be dropped in Bare"):
        dropout.decide_rates((0.1,), own_parts.Bare(), params={}, images_shape=(1, 8, 8, 1))


def test_a_partial_makes_a_regularizer_and_a_pair_is_no_data():
    config = complete({})
    given = {"regularizers": [functools.partial(own_parts.Shrink, rate=0.5)]}
    active = resolving.resolve(config, resolving.write_to_config(config, given)).regularizers
    assert active["Shrink"].penalty({"head": {"kernel": jnp.ones(2)}}, 0) == 1.0
    objects = resolving.write_to_config(config, {"data": (1, 2)})
    with pytest.raises(UserError, match=r"expected a flax_cnns\.Dataset, .* got a tuple"):
        resolving.make_data(config, objects)


def test_an_optimizer_is_given_as_a_factory():
    config = complete({})
    objects = resolving.write_to_config(config, {"optimizer": optax.sgd(0.1)})
    with pytest.raises(UserError, match="got an optimizer that already exists"):
        resolving.resolve(config, objects)


def test_an_object_without_a_name_is_called_by_its_kind():
    config = complete({})
    given = dict(model=lambda: own_parts.Bare(), loss=lambda logits, labels: logits[:, 0])
    objects = resolving.write_to_config(
        config, {**given, "optimizer": lambda rate: optax.sgd(rate)}
    )
    assert list(objects) == ["<opaque>:model", "<opaque>:loss", "<opaque>:optimizer"]
    assert resolving.resolve(config, objects).loss is given["loss"]

    class Net(own_parts.Net):
        pass

    twice = resolving.write_to_config(complete({}), {"model": Net, "data": type("Net", (), {})()})
    assert list(twice) == ["<opaque>:Net", "<opaque>:Net_data"]


def test_a_partial_of_a_class_makes_the_part():
    config = complete({"own": {"Shrink": {"bound": 2.0}}})
    given = dict(
        regularizers=[functools.partial(own_parts.Shrink, rate=0.1)],
        callbacks=[functools.partial(own_parts.Recorder)],
    )
    resolved = resolving.resolve(config, resolving.write_to_config(config, given))
    assert isinstance(resolved.callbacks[0], own_parts.Recorder)
    kernel = resolved.regularizers["Shrink"].constrain({"head": {"kernel": jnp.full((2, 2), 5.0)}})
    assert float(kernel["head"]["kernel"].max()) == 2.0


def test_a_compiled_function_is_importable():
    assert references.make_reference(own_parts.compiled) == f"{HERE}:compiled"
    assert resolving.compute_digest(own_parts.compiled)


def test_a_mistake_inside_a_constructor_keeps_its_traceback():
    class Faulty:
        def __init__(self, rate=1.0):
            self.rate = rate + "text"

    config = complete({})
    objects = resolving.write_to_config(config, {"regularizers": [Faulty]})
    with pytest.raises(TypeError, match="unsupported operand"):
        resolving.resolve(config, objects)


def test_a_regularizer_that_is_off_gets_a_note():
    config = complete({"train": {"regularizers": (f"{HERE}:Shrink",)}})
    (note,) = resolving.resolve(config).notes
    assert note == "the regularizer Shrink is off: rate, its first field, is 0.0"


class Short:
    def on_validation(self, numbers):
        pass


class Mistyped:
    def on_save(self, step):
        pass

    def on_validate(self, step, numbers):
        pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Short(), r"on_validation: it is called with \(step, numbers\) but takes \(numbers\)"),
        (Mistyped(), "has 'on_validate', which is never called; did you mean 'on_validation'"),
    ],
)
def test_a_callback_that_would_fail_or_never_be_called(given, words):
    config = complete({})
    objects = resolving.write_to_config(config, {"callbacks": [given]})
    with pytest.raises(UserError, match=words):
        resolving.resolve(config, objects)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Wrong", r"expected logits \[N K\].*it gives \[2 8 8 3\]"),
        ("NoTrain", "got no train argument"),
        ("Keeps", "keeps variables of cache"),
        ("NeedsKey", r"expected __call__\(self, images, \*, train\): missing .*'key'"),
        ("Streams", "in training: .*noise.; a run has only the random streams dropout and shared"),
        ("LateHead", "in training: .*create all parameters also with train=False"),
        ("TwoHeads", "in training: expected logits .*it gives tuple"),
        ("OfNNX", r"got a Flax NNX module; pass flax\.nnx\.bridge\.to_linen"),
        ("NUMBER", "a function that returns it; got a int"),
    ],
)
def test_invalid_networks_are_refused(name, words):
    config = changed()
    config["model"] = {"name": f"{HERE}:{name}"}
    with pytest.raises(UserError, match=words):
        dry_run(complete(config))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"loss": f"{HERE}:scalar_loss"}, r"returned float32 \[\], expected float32 \[4\]"),
        ({"metrics": (f"{HERE}:count_less",), "best_by": "auto", "best_mode": "auto"}, "count"),
    ],
)
def test_invalid_losses_and_metrics_are_refused(train, words):
    config = changed(train=train)
    config["own"].pop("focal")
    if "loss" not in train:
        config["train"]["loss"] = ""
    with pytest.raises(UserError, match=words):
        dry_run(complete(config))


STREAM = {
    "model": {"name": f"{HERE}:Bare"},
    "data": {"name": f"{HERE}:batches", "batch_size": 16, "eval_batch_size": 64, "validation": 0.0},
    "train": {"duration": "6 steps", "eval_every": "0 steps"},
    "checkpoint": {"every": "3 steps"},
    "log": {"tensorboard": False},
}


def test_batches_of_a_factory_resume_bit_for_bit_or_not_at_all(tmp_path, capsys):
    summary = run(STREAM, tmp_path / "whole")
    assert summary["test/examples"] == 120

    def cut(name):
        """Restores the run as it was at step 3."""
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "summary.json").unlink()
        shutil.rmtree(tmp_path / name / "checkpoints" / "6")
        return tmp_path / name

    run(STREAM, cut("again"))
    chex.assert_trees_all_equal(arrays(tmp_path / "again"), arrays(tmp_path / "whole"))
    drifting = {"own": {"batches": {"drifts": True}}, **STREAM}
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["own"] = drifting["own"]
    workdir = cut("drifts")
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the factory's batch of step 3 is not the same as before"):
        run(drifting, workdir)
    run(drifting, workdir, accept_changed_data=True)
    assert "accepted: batches: the factory's batch of step 3" in capsys.readouterr().out


def test_an_evaluation_makes_no_callbacks():
    config = complete({"train": {"callbacks": (f"{HERE}:Recorder",)}})
    assert len(resolving.resolve(config).callbacks) == 1
    assert resolving.resolve(config, callbacks=False).callbacks == ()


def test_a_callback_gets_its_own_copy_of_the_numbers():
    session = types.SimpleNamespace(
        writer=types.SimpleNamespace(write=lambda *_: None),
        progress=types.SimpleNamespace(update=lambda *_: None),
        warned=True,
        stop_when=None,
        _call_back=lambda hook, step, numbers: numbers.clear(),
    )
    Session._write(session, 3, record := {"validation/accuracy": 0.5})
    assert record == {"validation/accuracy": 0.5}


def test_a_missing_batch_is_not_compared():
    lines = []
    session = types.SimpleNamespace(
        progress=types.SimpleNamespace(print=lines.append), _digests=lambda step: ["0123"]
    )
    Session._check_batch(session, 3, [""])
    assert "the factory had no batch of step 3" in lines[0]


def test_a_complete_run_needs_no_data(tmp_path, monkeypatch, capsys):
    def gone(config, objects):
        raise FileNotFoundError("no such file: images.npy")

    monkeypatch.setattr(resolving, "make_data", gone)
    check_complete_run(complete({}), tmp_path, None, False)
    assert "were not compared: no such file: images.npy" in capsys.readouterr().out


def test_a_child_process_looks_for_modules_where_its_parent_does(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/here", "/lib"])
    child.set_import_path(["/script", "/lib", "/here"])
    assert sys.path == ["/script", "/lib", "/here"]


def test_a_stream_has_no_training_split_to_evaluate():
    with pytest.raises(UserError, match=r"train\.evaluate_train: batches gives"):
        dry_run(complete({**STREAM, "train": {**STREAM["train"], "evaluate_train": True}}))


def test_an_own_network_is_as_fast_as_a_registered_one():
    """The training steps of both compile to the same program."""
    config = {"data": {"name": f"{HERE}:digits", "batch_size": 8}, "own": {"digits": {}}}
    config["train"] = {"duration": "2 steps", "eval_every": "0 steps"}
    programs = []
    for name in ("cifar_resnet20", "flax_cnns.models.cifar_resnet:CifarResNet"):
        model = {"name": name, "depths": (1,), "widths": (4,)}
        components, _ = dry_run(complete({**config, "model": model}))
        made = plan.RunPlan(components)
        state = made.make_abstract_state()
        optimizer = made.make_optimizer({"params": state.params, "batch_stats": state.batch_stats})
        step = make_train_step(components, optimizer, 1.0)
        batch = {
            "image": jax.ShapeDtypeStruct((8, 8, 8, 1), np.uint8),
            "label": jax.ShapeDtypeStruct((8,), np.int32),
        }
        programs.append(step.lower(state, batch, jax.random.key(0)).as_text())
    assert programs[0] == programs[1]


def test_partial_dicts_and_unknown_fields():
    config = complete({"seed": 3, "model": {"name": "resnet18"}, "own": {"a": {"b": 1}}})
    assert (config.seed, config.model.name, config.own.a.b) == (3, "resnet18", 1)
    assert config.data == default_config().data
    with pytest.raises(UserError, match=r"unknown field 'modle\.name'; did you mean 'model\.name'"):
        complete({"modle": {"name": "resnet18"}})


def test_a_data_set_version_is_not_a_reference_to_code():
    config = complete({"data": {"name": "cifar10:3.0.2"}})
    assert references.find_references(config) == {}
    references.check_trust(config, False, "runs/old")
    config.data.name = "<opaque>:3d_shapes"
    assert references.find_references(config) == {"data": ["<opaque>:3d_shapes"]}


def test_modules_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_losses.py").write_text("def mine(logits, labels):\n    return 1\n")
    (tmp_path / "broken_losses.py").write_text("1 / 0\n")
    function = references.import_reference("my_losses:mine", "train.loss")
    assert function(1, 2) == 1
    assert references.make_reference(function) == "my_losses:mine"
    with pytest.raises(UserError, match="no module 'my_loses'; did you mean 'my_losses'"):
        references.import_reference("my_loses:mine", "train.loss")
    message = (
        r"importing broken_losses fails: ZeroDivisionError: .* \(.*broken_losses\.py, line 1\)$"
    )
    with pytest.raises(UserError, match=message):
        references.import_reference("broken_losses:mine", "train.loss")
    assert references.make_reference(lambda: 1) is None


def test_fields_that_a_config_file_lacks_come_from_the_shell(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config():\n    return {'model': {'name': 'a:B', 'depth': 3}}\n")
    argv = ["x", f"--config={file}", "--config.model.depth=4", "--config.model.width=(8, 16)"]
    argv += ["--config.own.focal.gamma=2.5", "--config.model.kind=wide", "--config.seed=1"]
    rest, added = script._take_new_fields(argv, str(file))
    assert rest == ["x", f"--config={file}", "--config.model.depth=4", "--config.seed=1"]
    assert added == {"model.width": (8, 16), "own.focal.gamma": 2.5, "model.kind": "wide"}


def test_the_shell_gives_fields_to_own_parts(tmp_path):
    """Runs the whole parser in its own process, because flags can be defined only once."""
    (tmp_path / "c.py").write_text(
        "from flax_cnns.config import default_config\n"
        "def get_config():\n"
        f"    config = default_config()\n    config.model.name = '{HERE}:Net'\n    return config\n"
    )
    code = """
        from absl import flags
        from flax_cnns.cli import flags as script
        config = script.define_config("digits_lenet5")
        script._parse(["x", "--config=c.py", "--config.model.width=3", "--config.own.a.b=1e-3"])
        print(config.value.model.width, config.value.own.a.b)
    """
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, "--config=c.py", "--config.model.width=3"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "3 0.001\n"
