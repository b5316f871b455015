"""Whole runs: LeNet-5 for a dozen steps on the real digits, over four devices."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from flax_cnns import config as configs
from flax_cnns import run
from flax_cnns import tree as pytree
from flax_cnns.checkpoint import finding, lock, reading
from flax_cnns.data import pipeline
from flax_cnns.data.types import DamagedImage
from flax_cnns.errors import ProcessLost, UserError
from flax_cnns.evaluation.uncertainty import wilson_interval
from flax_cnns.models.registry import create_model
from flax_cnns.runs import plan, session
from flax_cnns.runs.build import RunComponents, build_components, train_batches
from flax_cnns.runs.evaluate import evaluate_run
from flax_cnns.runs.network import get_model_fields
from flax_cnns.runs.plan import dry_run
from flax_cnns.runs.workdir import check_workdir, read_config
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.train import loop, memory
from flax_cnns.train.losses import make_aux_weights
from flax_cnns.train.progress import Progress
from tests.tiny_runs import arrays, records

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_writes_what_it_returns(finished, config, capsys):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in ("config.json", "metrics.jsonl", "curves.png"):
        assert (workdir / name).stat().st_size > 0
    assert summary["params"] == 61706
    assert summary["step"] == 12
    assert summary["test/examples"] == 360
    assert 0 < summary["test/accuracy"] < 1
    assert summary["test/top5"] > summary["test/accuracy"]
    logged = records(workdir)
    assert [r["step"] for r in logged if "train/loss" in r] == [3, 6, 9, 12]
    assert [r["step"] for r in logged if "validation/loss" in r] == [5, 10, 12]
    assert sum("test/loss" in r for r in logged) == 1
    assert finding.all_steps(workdir)[-1] == 12
    raw = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = [(r["step"], r["time/first_step"]) for r in raw if "time/first_step" in r]
    assert first == [(1, summary["seconds_to_first_step"])]
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run(config, workdir) == summary
    assert "is complete" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_loader_may_augment_and_the_run_is_the_same_to_the_bit(finished, config, tmp_path):
    theirs, _ = finished
    config.data.augment.where = "loader"
    run(config, tmp_path)
    chex.assert_trees_all_equal(arrays(tmp_path), arrays(theirs))
    assert records(tmp_path) == records(theirs)


def test_batches_that_the_loader_augments_start_anywhere(config):
    config.data.augment.where = "loader"
    components = build_components(config)
    with contextlib.closing(train_batches(components)) as stream:
        third = list(itertools.islice(stream, 3))[-1]
    with contextlib.closing(train_batches(components, 2)) as stream:
        chex.assert_trees_all_equal(next(stream), third)
    assert third["image"].dtype == np.float32


def test_a_logged_window_is_the_mean_of_its_own_steps(finished, config, tmp_path):
    config.log.every = "1 steps"
    run(config, tmp_path / "run")
    for name in ("train/loss", "train/accuracy", "norm/grads"):
        each = [r[name] for r in records(tmp_path / "run") if name in r]
        threes = [r[name] for r in records(finished[0]) if name in r]
        np.testing.assert_allclose(threes, np.reshape(each, (4, 3)).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [
        (4, signal.SIGINT, 130),
        pytest.param(5, signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param(12, signal.SIGTERM, 75, marks=pytest.mark.slow),
    ],
)
def test_after_a_signal_the_same_command_resumes_bit_for_bit(
    finished, config, tmp_path, monkeypatch, step, number, code
):
    """Step 4 is inside a logging window, step 5 has a validation and a save, and 12 is the last."""
    workdir, tick = tmp_path / "run", Progress.update

    def update(self, at, metrics):
        if at == step and not metrics:
            os.kill(os.getpid(), number)
        return tick(self, at, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", update)
        with pytest.raises(Preempted) as left:
            run(config, workdir)
        assert left.value.code == code
        assert finding.latest_step(workdir) == step
        assert not (workdir / "summary.json").exists()
    summary = run(config, workdir)
    chex.assert_trees_all_equal(arrays(workdir), arrays(finished[0]))
    assert records(workdir) == records(finished[0])
    for name in ("test/loss", "test/accuracy", "validation/best_accuracy"):
        assert summary[name] == finished[1][name]
    assert finding.best_step(workdir) == finding.best_step(finished[0])


def test_ctrl_c_before_the_first_step_promises_no_checkpoint(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.TrainLoop, "run", lambda *_: os.kill(os.getpid(), 2))
    with pytest.raises(
        KeyboardInterrupt, match="nothing of this run was saved; run the same command"
    ):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lost_process_is_reported_with_how_to_resume(config, tmp_path, monkeypatch):
    def lose(*_):
        raise ProcessLost("a worker process was killed")

    monkeypatch.setattr(loop.TrainLoop, "run", lose)
    with pytest.raises(ProcessLost, match="killed; nothing of this run was saved"):
        run(config, tmp_path / "run")


def test_missing_wandb_is_reported_before_the_data_are_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("flax_cnns.runs.train.build_components", lambda _: pytest.fail("loaded"))
    config.log.wandb = "project"
    fails(config, tmp_path / "run", "wandb is not installed")


@pytest.mark.slow
def test_an_interrupted_last_validation_under_a_plateau_schedule(config, tmp_path, monkeypatch):
    """The validation changes the optimizer's state, which must be saved even without a new best
    value."""
    config.schedule.name, config.schedule.patience = "plateau", 1
    config.schedule.learning_rate = 1e-9
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("flax_cnns.runtime.preemption.Signals.should_stop", lambda self, step: False)
        evaluate = RunComponents.evaluate
        patch.setattr(
            RunComponents,
            "evaluate",
            lambda self, v, split, stop: evaluate(
                self, v, split, lambda: len(records(tmp_path / "cut")) > 5
            ),
        )
        with pytest.raises(Preempted):
            run(config, tmp_path / "cut")
    assert finding.latest_step(tmp_path / "cut") == 12
    run(config, tmp_path / "cut")
    chex.assert_trees_all_equal(arrays(tmp_path / "cut"), arrays(tmp_path / "whole"))
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert finding.all_steps(tmp_path / "cut") == finding.all_steps(tmp_path / "whole")


def test_a_run_directory_with_a_damaged_file_or_a_half_written_one(config, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text('{"seed": ')
    fails(config, tmp_path / "a", r"config\.json is damaged")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json.tmp").touch()  # as left by a full disk or kill -9
    config.train.duration = "1 steps"
    assert run(config.to_dict(), tmp_path / "b")["step"] == 1
    (tmp_path / "b/summary.json").write_text('{"step": 1}')
    fails(config, tmp_path / "b", r"summary\.json is damaged: KeyError: 'model'; remove the file")
    fails(config, "", "--workdir: expected the name of a directory")
    fails(config, tmp_path / "b@best", "b@best is a checkpoint of the run")


@pytest.mark.slow
def test_a_run_of_an_older_version_resumes_bit_for_bit(
    finished, config, tmp_path, monkeypatch, capsys
):
    """The older config lacks newer fields, whose defaults must have been in effect."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_cnns.runtime.preemption.Signals.should_stop", lambda self, step: step == 7
        )
        with pytest.raises(Preempted):
            run(config, workdir)
    older = json.loads((workdir / "config.json").read_text())
    del older["mix"]["cutmix"], older["optimizer"]["sam"]
    (workdir / "config.json").write_text(json.dumps(older))
    config.mix.cutmix = 1.0
    fails(config, workdir, r"another config \(mix.cutmix: 0.0 there, 1.0 here\)")
    config.mix.cutmix = 0.0
    assert read_config(workdir).optimizer.sam == 0.0
    capsys.readouterr()
    run(config, workdir)
    message = (
        "was made by an older version that lacks the fields mix.cutmix, optimizer.sam: it resumes"
    )
    assert message in capsys.readouterr().out
    chex.assert_trees_all_equal(arrays(workdir), arrays(finished[0]))
    assert records(workdir) == records(finished[0])
    assert json.loads((workdir / "config.json").read_text())["mix"]["cutmix"] == 0.0


def test_a_run_with_an_older_grouping_of_layers_gets_a_note(config, tmp_path, capsys):
    config.optimizer.layer_decay = 0.5
    today = configs.to_plain(config)
    (tmp_path / "metrics.jsonl").touch()
    for older in (False, True):
        there = configs.to_plain(config)
        if older:
            del there["graft"]["adapt_stem"]
        (tmp_path / "config.json").write_text(json.dumps(there))
        check_workdir(tmp_path, today)
        assert ("grouped as in BEiT and timm" in capsys.readouterr().out) == older


@pytest.mark.slow
def test_a_best_step_that_is_validated_after_a_resume_can_be_resumed_itself(
    finished, config, tmp_path, monkeypatch
):
    """First stopped with the validation of step 5 due, then again right after that validation."""
    workdir = tmp_path / "run"
    for asked, step in [(True, 5), (False, 6)]:
        with monkeypatch.context() as patch:
            stop = lambda self, at, step=step: at == step  # noqa: E731
            patch.setattr("flax_cnns.runtime.preemption.Signals.should_stop", stop)
            patch.setattr(
                "flax_cnns.runtime.preemption.Signals.is_asked_to_stop", lambda self, a=asked: a
            )
            with pytest.raises(Preempted):
                run(config, workdir)
    shutil.rmtree(workdir / "checkpoints/6")  # as if the process was killed before saving it
    run(config, workdir)
    chex.assert_trees_all_equal(arrays(workdir), arrays(finished[0]))
    assert records(workdir) == records(finished[0])


def test_a_signal_during_the_test_leaves_and_the_same_command_makes_up_for_it(
    finished, config, tmp_path, monkeypatch
):
    wanted, evaluate = [True], RunComponents.evaluate

    def interrupted(self, variables, split, should_stop=None):
        return evaluate(self, variables, split, lambda: split == "test" and wanted[0])

    monkeypatch.setattr(RunComponents, "evaluate", interrupted)
    with pytest.raises(Preempted):
        run(config, tmp_path / "run")
    wanted[0] = False
    run(config, tmp_path / "run")
    assert records(tmp_path / "run") == records(finished[0])


def test_a_damaged_newest_step_is_passed_over_and_made_again(
    finished, config, tmp_path, monkeypatch, capfd
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_cnns.runtime.preemption.Signals.should_stop", lambda self, step: step == 11
        )
        with pytest.raises(Preempted):
            run(config, workdir)
    data = max((workdir / "checkpoints/11/state").rglob("d/*"), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    run(config, workdir)
    assert "skipping checkpoint 11" in capfd.readouterr().err
    assert (workdir / "checkpoints.damaged/11").is_dir()
    chex.assert_trees_all_equal(arrays(workdir), arrays(finished[0]))
    assert records(workdir) == records(finished[0])


def test_each_step_is_compiled_once_a_session(config, tmp_path, monkeypatch, caplog):
    """Covers validations, saves, an epoch that ends inside a batch, the test, and a resume."""
    config.data.batch_size = 360  # of 1293 images
    config.train.duration = "7 steps"
    config.train.eval_every = "3 steps"

    def compiled(step):
        stop = lambda self, at: at == step  # noqa: E731
        monkeypatch.setattr("flax_cnns.runtime.preemption.Signals.should_stop", stop)
        caplog.clear()
        with jax.log_compiles(), contextlib.suppress(Preempted):
            run(config, tmp_path / "run")
        compiled = re.findall(r"Compiling jit\((\w+_step)\)", caplog.text)
        return sorted(compiled)

    assert compiled(4) == ["eval_step", "train_step"]
    assert compiled(None) == ["eval_step", "train_step"]
    assert finding.latest_step(tmp_path / "run") == 7


@pytest.fixture
def photographs(tmp_path):
    """Makes root/class/*.png: two classes of 24 pictures in different sizes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for i in range(24):
            size = (40 + i, 50 - i // 2)
            pixels = rng.integers(100 * label, 100 * label + 120, size).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / name / f"{i}.png")
    return tmp_path / "photographs"


@pytest.mark.slow
def test_a_streamed_folder_resumes_to_the_bit_and_counts_what_it_skips(
    config, photographs, tmp_path, monkeypatch
):
    whole = (photographs / "light/3.png").read_bytes()
    (photographs / "light/3.png").write_bytes(whole[: len(whole) // 2])
    config.data.update(
        dict(name="folder", dir=str(photographs), in_memory="no", channels=1, threads=2)
    )
    config.data.augment.random_resized_crop = (0.5, 1.0)
    fails(config, tmp_path / "refused", r"light/3\.png")
    assert not (tmp_path / "refused").exists()
    config.data.skip_damaged = True
    summary = run(config, tmp_path / "whole")
    assert [name[-11:] for name in summary["damaged_images"]] == ["light/3.png"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_cnns.runtime.preemption.Signals.should_stop", lambda self, step: step == 7
        )
        with pytest.raises(Preempted):
            run(config, tmp_path / "cut")
    run(config, tmp_path / "cut")
    chex.assert_trees_all_equal(arrays(tmp_path / "cut"), arrays(tmp_path / "whole"))
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_an_image_damaged_during_the_run_is_reported_with_a_remedy(config, tmp_path, monkeypatch):
    def go(self):
        (self.workdir / "metrics.jsonl").touch()
        raise DamagedImage("a.png", OSError("gone"))

    monkeypatch.setattr(session.Session, "run", go)
    fails(
        config, tmp_path / "run", r"a\.png: gone; repair .*--accept-changed-data; nothing of this"
    )


@pytest.mark.slow
def test_a_run_whose_test_met_no_image_is_finished_by_the_same_command(
    config, tmp_path, monkeypatch
):
    config.train.duration, config.train.ema = "2 steps", 0.0
    batches = pipeline.eval_batches
    monkeypatch.setattr(
        pipeline,
        "eval_batches",
        lambda data, split, *args, **more: iter(
            () if split == "test" else batches(data, split, *args, **more)
        ),
    )
    with pytest.raises(UserError, match="digits: no image of the test split could be decoded"):
        run(config, tmp_path)
    assert finding.all_steps(tmp_path)[-1] == 2
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    summarize = session.summarize
    monkeypatch.setattr(session, "summarize", lambda sums: summarize(sums) | {"loss": math.nan})
    summary = run(config, tmp_path)
    assert summary["test/examples"] == 360
    assert summary["images"] == {"train": 1077, "test": 360, "validation": 360}
    assert summary["test/loss"] is None  # JSON has no NaN
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_split_without_images_is_refused_before_anything_is_written(config, tmp_path, capsys):
    for i in range(12):
        for split, one in itertools.product(("train", "val", "test"), ("dark", "light")):
            (tmp_path / "data" / split / one).mkdir(parents=True, exist_ok=True)
            file = tmp_path / "data" / split / one / f"{i}.png"
            Image.new("L", (8, 8), i).save(file)
            if split == "test":
                file.write_text("version https://git-lfs.github.com/spec/v1\n")
    config.data.name, config.data.dir, config.data.skip_damaged = "folder", f"{tmp_path}/data", True
    for config.data.in_memory, go in itertools.product(("yes", "no"), (run, None)):
        with pytest.raises(UserError, match="none of the 24 test images can be decoded"):
            run(config, tmp_path / "run") if go else plan.dry_run(config)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_memory_cannot_hold_is_one_line(config, tmp_path, monkeypatch):
    config.data.eval_batch_size, free = 16, {}
    monkeypatch.setattr(memory, "available", lambda: free["bytes"])
    for name in ("batch_size", "eval_batch_size"):  # memory for reading the images
        free["bytes"] = 2 * 16 * 1024 - 1
        with pytest.raises(UserError, match=rf"data.{name}=16: .* are free; choose a smaller"):
            run(config, tmp_path / "run")
        config.data.batch_size = 4
    config.data.batch_size, free["bytes"] = 16, 200_000  # memory for the step
    with pytest.raises(UserError, match=r"data.batch_size=16: .* are free; choose a smaller"):
        run(config, tmp_path / "run")
    config.data.eval_batch_size, free["bytes"] = 8192, 20_000_000
    with pytest.raises(
        UserError, match=r"data.eval_batch_size=8192: .* are free; choose a smaller"
    ):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluate_gives_the_numbers_of_the_run(finished, capsys):
    workdir, summary = finished
    results = evaluate_run(workdir)
    assert results["accuracy"] == summary["test/accuracy"]
    np.testing.assert_allclose(results["loss"], summary["test/loss"], rtol=1e-6)
    counts = np.array(results["confusion"])
    assert counts.sum() == results["examples"] == 360
    assert np.trace(counts) == round(results["accuracy"] * 360)
    assert [c["examples"] for c in results["classes"]] == counts.sum(1).tolist()
    right = int(np.trace(counts))
    assert results["intervals"]["accuracy"] == list(wilson_interval(right, 360))
    assert results["intervals"].keys() == {"loss", "accuracy", "top5"}
    for k, one in enumerate(results["classes"]):
        assert one["accuracy_interval"] == list(wilson_interval(counts[k, k], counts[k].sum()))
        if seen := counts[:, k].sum():
            assert one["precision_interval"] == list(wilson_interval(counts[k, k], seen))
    assert (results["step"], results["checkpoint"]) == (12, "tested for summary.json")
    assert (workdir / "evaluation_test_12.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "most often taken for" in shown
    low, high = (100 * end for end in results["intervals"]["accuracy"])
    assert f"accuracy {results['accuracy']:.2%} [{low:.2f}, {high:.2f}]\n" in shown
    best = evaluate_run(f"{workdir}@best", split="validation")
    assert best["accuracy"] == summary["validation/best_accuracy"]
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        evaluate_run(workdir, split="tset")
    with pytest.raises(UserError, match=r"it has best, latest, .*12"):
        evaluate_run(workdir, checkpoint="7000")


def test_training_examples_are_evaluated_without_augmentation(finished, config, tmp_path):
    """The run itself does not change, and the numbers equal those of `evaluate` on that split."""
    config.train.evaluate_train = True
    summary = run(config, tmp_path / "run")
    chex.assert_trees_all_equal(arrays(tmp_path / "run"), arrays(finished[0]))
    results = evaluate_run(tmp_path / "run", split="train")
    assert summary["fit/examples"] == results["examples"]
    assert summary["fit/accuracy"] == results["accuracy"]
    last = records(tmp_path / "run")[-1]
    fit = {name for name in last if name.startswith("fit/")}
    assert fit == {"fit/loss", "fit/accuracy", "fit/top5"}
    assert {name: last[name] for name in last if name not in fit} == records(finished[0])[-1]


@pytest.mark.slow
def test_a_head_wider_than_the_data_set_is_evaluated(config, tmp_path):
    config.model.num_classes = 12
    config.train.duration = "1 steps"
    run(config, tmp_path / "run")
    results = evaluate_run(tmp_path / "run")
    assert [c["class"] for c in results["classes"]][8:] == ["8", "9", "10", "11"]


def test_initial_values_are_the_papers_if_the_config_says_so(config):
    assert "init" not in get_model_fields(config)  # the network's default
    config.model.init = "paper"
    model = create_model(**get_model_fields(config))
    assert model.kernel_init == "paper"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ((), {"a": (0, 0), "b": (0, 0)}),
        ((0.3,), {"a": (0.3, 0.3), "b": (0.3, 0.3)}),
        ((("a", 0.5), (".*", 0.1)), {"a": (0.5, 0.5), "b": (0.1, 0.1)}),
        (((("0 epochs", 1.0), ("10 epochs", 0.0)),), {"a": (1.0, 0.5), "b": (1.0, 0.5)}),
        ((("a", (("0 steps", 1.0), ("100 steps", 0.0))), ("b", 1)), {"a": (1, 0.5), "b": (1, 1)}),
    ],
)
def test_auxiliary_weights_by_head_and_step(config, spec, expected):
    config.train.aux_weight = spec
    configs.validate(config)
    rules = make_aux_weights(config.train, steps_per_epoch=10.0)
    chosen = pytree.match(rules, ["a", "b"], what="aux")
    for name, weights in expected.items():
        values = [float(chosen[name](step)) for step in (0, 50)]
        np.testing.assert_allclose(values, weights, rtol=1e-6)


@pytest.mark.slow
def test_early_stopping_and_the_best_checkpoint(config, tmp_path):
    config.train.early_stopping = 2
    config.train.test_on = "best"
    config.train.eval_every = "1 steps"
    config.train.duration = "200 steps"
    config.train.ema = 0.0
    config.schedule.name = "plateau"
    config.schedule.learning_rate = 1e-9  # nothing improves
    config.schedule.patience = 1
    summary = run(config, tmp_path / "run")
    assert summary["stopped_early"]
    assert summary["step"] < 50
    assert summary["test/step"] == finding.best_step(tmp_path / "run")
    rates = [r["learning_rate"] for r in records(tmp_path / "run") if "learning_rate" in r]
    assert rates[-1] < 1e-9
    # A run that stopped early stays stopped when it is started again.
    (tmp_path / "run/summary.json").unlink()
    assert run(config, tmp_path / "run")["step"] == summary["step"]


def test_steps_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(config, tmp_path):
    config.optimizer.name = "sgd"
    config.schedule.learning_rate = 1e38
    config.schedule.warmup = "0 steps"
    config.train.max_bad_steps = 3
    config.train.duration = "40 steps"
    config.checkpoint.every = "1 steps"
    with pytest.raises(UserError, match=r"3 steps in a row were not finite.*learning_rate"):
        run(config, tmp_path / "run")
    for name, value in arrays(tmp_path / "run").items():
        if not name.startswith("opt_state/") or "/trace/" in name:
            assert np.all(np.isfinite(value)), name


def test_graft_starts_from_a_run(finished, config, tmp_path):
    config.graft.source = str(finished[0])
    config.graft.rules = ((r"params/head/.*", None), (r"(.*)", r"ema/\1"))
    config.optimizer.trainable = ((r"params/head/.*", True), (r".*", False))
    config.train.duration = "2 steps"
    run(config, tmp_path / "run")
    source, grafted = arrays(finished[0], "best"), arrays(tmp_path / "run")
    kept = [path for path in source if path.startswith("ema/") and "/head/" not in path]
    assert kept
    for path in kept:
        np.testing.assert_array_equal(grafted[path.removeprefix("ema/")], source[path])
    report = json.loads((tmp_path / "run/graft.json").read_text())
    assert any("head" in path for path in report["fresh"])


@pytest.fixture
def scanning(config):
    """A residual network with one stage of repeated blocks, stochastic depth, and rules that split
    the stack."""
    config.model.update(dict(name="cifar_resnet20", scan=True))
    with config.unlocked():
        config.model.update(dict(depths=(3,), widths=(4,), drop_path=0.5))
    config.data.image_size = 8
    config.optimizer.name = "sgd"
    config.optimizer.weight_decay = ((r"params/stage1/block2/.*", 0.1), (r".*", 1e-3))
    return config


@pytest.mark.slow
def test_a_run_that_scans_is_the_run_that_does_not(scanning, tmp_path, monkeypatch):
    """Numbers, checkpoints (name by name) and drops are equal, and the run resumes bit for bit."""
    config, scan, plain, cut = scanning, *(tmp_path / name for name in ("scan", "plain", "cut"))
    summary = run(config, scan)
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_cnns.runtime.preemption.Signals.should_stop", lambda self, step: step == 7
        )
        with pytest.raises(Preempted):
            run(config, cut)
    run(config, cut)
    chex.assert_trees_all_equal(arrays(cut), arrays(scan))
    assert records(cut) == records(scan)
    config.model.scan = False
    expected = run(config, plain)
    assert summary["params"] == expected["params"]
    assert reading.read_metadata(f"{scan}@12") == reading.read_metadata(f"{plain}@12")
    np.testing.assert_allclose(
        [r["train/loss"] for r in records(scan) if "train/loss" in r],
        [r["train/loss"] for r in records(plain) if "train/loss" in r],
        rtol=1e-4,
    )
    chex.assert_trees_all_close(arrays(scan), arrays(plain), rtol=1e-3, atol=1e-4)
    assert evaluate_run(scan)["loss"] == pytest.approx(expected["test/loss"], rel=1e-3)
    config.model.scan, config.graft.source = True, f"{plain}@12"
    run(config, tmp_path / "grafted")
    report = json.loads((tmp_path / "grafted/graft.json").read_text())
    assert "params/stage1/block3/conv1/kernel" in report["grafted"]
    assert not report["fresh"]


@pytest.mark.slow
def test_frozen_layers_and_precise_statistics_are_saved_as_evaluated(
    scanning, tmp_path, monkeypatch
):
    config, whole, cut = scanning, tmp_path / "whole", tmp_path / "cut"
    config.model.update(dict(scan=False, depths=(1,), drop_path=0.0))
    config.optimizer.weight_decay = (1e-3,)
    config.optimizer.trainable = ((r"params/stem/.*", False), (r".*", True))
    config.optimizer.layer_decay = 0.8
    config.train.precise_bn = 3
    summary = run(config, whole)
    saved = arrays(whole)
    for tree in ("", "ema/"):
        mean = saved[f"{tree}batch_stats/stem/norm/mean"]
        np.testing.assert_array_equal(mean, np.zeros(4))  # its initial value
        assert np.any(saved[f"{tree}batch_stats/stage1/block1/norm1/mean"] != 0)
    assert evaluate_run(whole)["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)
    # Recomputed statistics do not depend on the moving ones.
    name = "ema/batch_stats/stage1/block1/norm1/var"
    assert np.all(np.abs(saved[name] - saved[name.removeprefix("ema/")]) > 1e-7)
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_cnns.runtime.preemption.Signals.should_stop", lambda self, step: step == 5
        )
        with pytest.raises(Preempted):
            run(config, cut)
    run(config, cut)
    chex.assert_trees_all_equal(arrays(cut), saved)
    assert records(cut) == records(whole)


def test_an_impossible_scan_is_refused(scanning, tmp_path):
    scanning.optimizer.trainable = ((r"params/stage1/block2/.*", False), (r".*", True))
    fails(scanning, tmp_path / "run", r"stack 'stage1/block2-3/conv1/kernel'.*model\.scan=False")
    scanning.model.name = "lenet5"
    fails(scanning, tmp_path / "run", "lenet5 has no field '(depths|scan)'")


def fails(config, workdir, message):
    with pytest.raises(UserError, match=message) as error:
        run(config, workdir)
    assert "\n" not in str(error.value)


def test_a_batch_norm_that_would_see_one_value_is_refused_before_the_first_step(config, tmp_path):
    """The last stage has maps of one pixel, on four devices."""
    config.model.name = "cifar_resnet20"
    with config.unlocked():
        config.model.update(dict(depths=(1, 1), widths=(4, 4)))
    config.data.image_size, config.data.batch_size, config.data.augment.pad_crop = 2, 4, 0
    config.data.mock = 40
    message = (
        r"batch_size=4 \(devices: 4, train.accumulate: 1\) .* stage2/block1/\w+ gets "
        r"\[1, 1, 1, 4\].* set data\.batch_size=8,"
    )
    with pytest.raises(UserError, match=message):
        dry_run(config)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.batch_size = 8
    dry_run(config)
    config.train.accumulate = 2  # the pieces run one after the other
    with pytest.raises(UserError, match=r"train\.accumulate: 2\).* set data\.batch_size=16,"):
        dry_run(config)
    config.train.sync_batchnorm = True  # over the devices that share a piece
    dry_run(config)
    config.train.sync_batchnorm = False
    config.optimizer.bn = (("stage2/.*", "frozen_stats"), (".*", "train"))
    dry_run(config)


def test_a_run_under_another_config_names_the_fields(finished, config):
    config.seed = 7
    config.data.augment.rotate = 3.0
    message = r"data\.augment\.rotate: 10\.0 there, 3\.0 here; seed: 0 there, 7 here"
    fails(config, finished[0], message)


def test_a_directory_in_use_or_of_something_else(config, tmp_path):
    with lock.DirectoryLock(tmp_path / "a"):
        fails(config, tmp_path / "a", rf"in use by pid {os.getpid()} on host")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    fails(config, tmp_path / "b", r"is not empty and holds no run \(thesis\.tex\)")
    (tmp_path / "file").touch()
    fails(config, tmp_path / "file" / "run", "cannot write")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.name", "lenet6", "unknown model 'lenet6'; did you mean 'lenet5'"),
        ("data.name", "digitz", "unknown data set 'digitz'.*did you mean 'digits'"),
        (
            "data.batch_size",
            18,
            "18 examples cannot be split evenly over 4 devices; choose 16 or 20",
        ),
        ("model.num_classes", 5, "5 classes are too few for digits, which has 10"),
        ("data.image_size", 8, r"8x8.*smallest|smallest.*32"),
        ("schedule.name", "sine", "did you mean 'cosine'"),
        ("optimizer.trainable", ((r"params/haed/.*", True), (".*", False)), "params/head"),
        ("graft.source", "nowhere/run", "no checkpoint or run 'nowhere/run'"),
        (
            "optimizer.nesterov",
            True,
            "only sgd and muon with momentum use it, and optimizer.name is .adam.",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(config, tmp_path, path, value, message):
    config.update_from_flattened_dict({path: value})
    fails(config, tmp_path / "new" / "run", message)
    assert not (tmp_path / "new").exists()
