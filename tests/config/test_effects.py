"""Fields without effect, and values that make no sense. A new run refuses them; an older run keeps
them."""

from __future__ import annotations

import ast
import json
import re
import shutil

import pytest

from configs import common
from flax_cnns import config as configs
from flax_cnns import run
from flax_cnns.config import effects
from flax_cnns.errors import UserError
from flax_cnns.runs import evaluate, predict, session
from flax_cnns.runs import plan as runs_plan
from flax_cnns.runs.workdir import check_workdir
from flax_cnns.studies.ablation import plan
from tests.config.test_config import changed

pytestmark = pytest.mark.usefixtures("no_pictures")


def make(**fields):
    """Returns the default config with some fields changed. In their names, __ stands for a dot."""
    config = common.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def test_the_rows_are_fields_and_the_defaults_are_without_doubt():
    assert configs.FIELDS.keys() >= effects.EFFECTS.keys() | effects.RUN_EFFECTS.keys()
    assert configs.find_problems(common.get_config()) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            dict(optimizer__b1=0.8),
            "config.optimizer.b1=0.8: only adam, adamw and lamb use it, and optimizer.name is"
            " 'sgd'; leave it at 0.9",
        ),
        (
            dict(optimizer__name="adam", optimizer__momentum=0.95),
            "only sgd, muon and rmsprop use it, and",
        ),
        (dict(optimizer__nesterov=True, optimizer__momentum=0.0), "optimizer.momentum is 0.0;"),
        (dict(optimizer__eps=1e-7), "adam, adamw, lamb and rmsprop use it"),
        (dict(optimizer__decay_rate=0.5), "only rmsprop uses it, and optimizer.name is 'sgd'"),
        (
            dict(optimizer__weight_decay=((".*", 0.0),), optimizer__weight_decay_mode="coupled"),
            "it says how weight decay acts",
        ),
        (dict(optimizer__grad_noise_decay=0.6), "optimizer.grad_noise is 0.0"),
        (dict(schedule__name="constant", schedule__end=0.01), "cosine and exponential use it"),
        (
            dict(schedule__boundaries=("9 epochs",)),
            "only steps uses it, and schedule.name is 'cosine'",
        ),
        (dict(schedule__factor=0.2), "steps and plateau use it"),
        (
            dict(schedule__name="one_cycle", schedule__warmup="2 steps"),
            "one_cycle has its own warm-up",
        ),
        (dict(schedule__pct_start=0.2), "one_cycle uses it"),
        (dict(schedule__patience=3), "plateau uses it"),
        (dict(train__ema_warmup=False), "train.ema is 0.0; leave it at True"),
        (
            dict(train__dropout_mode="channel"),
            "dropout drops, and train.dropout is ()",
        ),
        (
            dict(train__early_stopping=2, train__eval_every="0 epochs"),
            "but train.eval_every is '0 epochs': only the last step validates; set train.eval",
        ),
        (dict(schedule__name="plateau", train__eval_every="0 steps"), "plateau needs valid"),
        (dict(train__test_on="best", train__eval_every="0 steps"), "leave it at 'latest'"),
        (dict(checkpoint__keep_best=3, train__eval_every="0 steps"), "leave it at 1"),
        (dict(data__augment__normalize=False, data__mean=(0.5,), data__std=(0.5,)), "subtracts"),
        (dict(data__in_memory="yes", data__workers=2), "they decode streamed images"),
        (dict(data__in_memory="no", data__memory_limit=2.0), "only auto uses it"),
        (dict(data__name="digits.npz", data__threads=2), "arrays are not decoded"),
        (dict(data__name="folder", data__labels="coarse"), "a folder has one"),
        # ---- values
        (dict(data__mean=(123.675,), data__std=(0.2,)), "data.mean: expected .* images in 0..1"),
        (dict(data__mean=(0.5,), data__std=(58.4,)), "data.std: expected .* images in 0..1"),
        (dict(optimizer__name="adam", optimizer__b1=1.0), "optimizer.b1: .* and below 1, as Adam"),
        (dict(schedule__end=0.2), "schedule.end: expected .*schedule.learning_rate=0.1, got 0.2"),
        (dict(schedule__name="one_cycle", schedule__final_div_factor=0.5), "at least 1: the rate"),
        (dict(train__duration="3000000000 steps"), r"a duration below 2\*\*31"),
        (dict(checkpoint__every=f"{'9' * 400} epochs"), r"a duration below 2\*\*31"),
        (dict(schedule__learning_rate=1e39), "schedule.learning_rate: .* that float32 holds"),
        (dict(optimizer__weight_decay=((".*", 1e-50),)), "a number that float32 holds"),
        (dict(train__ema=1.0, train__ema_warmup=False), "the average never moves"),
        (dict(mix__label_smoothing=1.0), "all labels are equal"),
    ],
)
def test_a_field_that_cannot_act_is_named_with_what_it_belongs_to(fields, said):
    config = make(**fields)
    configs.validate(config)  # an older run continues
    found = configs.find_problems(config)
    assert found
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")) as error:
        raise UserError(found[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(optimizer__name="rmsprop", optimizer__momentum=0.8, optimizer__decay_rate=0.8),
        dict(optimizer__name="lamb", optimizer__b1=0.8, optimizer__b2=0.9, optimizer__eps=1e-6),
        dict(optimizer__nesterov=True, optimizer__momentum=0.95),
        dict(
            optimizer__weight_decay=(("a", 0.0), (".*", 1e-4)), optimizer__weight_decay_mode="auto"
        ),
        dict(schedule__name="plateau", schedule__patience=2, schedule__factor=0.5),
        dict(schedule__name="one_cycle", schedule__warmup="0 epochs", schedule__div_factor=10.0),
        dict(train__early_stopping=3, train__test_on="best"),
        dict(checkpoint__keep_best=0, train__eval_every="0 steps"),
        dict(data__mean=(0.0,), data__std=(1.0,), data__workers=2),
        # 1.0.0 is a version of TFDS: the name is not a reference to an object.
        dict(data__name="digits:1.0.0", data__image_size=16, data__channels=3),
        dict(data__name="mine:tfds_builder", data__workers=2, data__skip_damaged=True),
    ],
)
def test_fields_that_act_are_accepted(fields):
    assert configs.find_problems(make(**fields)) == []


def test_a_whole_number_beyond_floats_is_an_error_of_its_field():
    with pytest.raises(UserError, match=r"schedule\.learning_rate: expected a number above 0"):
        configs.validate(changed("schedule.learning_rate", 10**400))


# ---- effects that depend on the network or the data


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(train__sync_batchnorm=True), "the network 'lenet5' has no BatchNorm; leave it at Fa"),
        (dict(train__precise_bn=2), "train.precise_bn=2: the network 'lenet5' has no BatchNorm"),
        (dict(train__aux_weight=(0.5,)), "'lenet5' has no auxiliary heads"),
        (dict(data__validation=0.2), "'digits' has a validation split of its own"),
        (dict(data__validation=0.0, train__early_stopping=1), "has a validation split of its own"),
        (dict(schedule__warmup="2 epochs"), "the warm-up is longer than the run, train.duration="),
        (
            dict(schedule__name="steps", schedule__boundaries=("12 steps", "9 epochs")),
            r"ends before the first boundary.*schedule\.name='constant'",
        ),
        (
            dict(schedule__name="exponential", schedule__every="12 steps"),
            "ends before the first change",
        ),
        (dict(checkpoint__every="1000000000 epochs"), r"steps; expected fewer than 2\*\*31"),
    ],
)
def test_the_dry_run_says_what_the_network_or_the_data_switch_off(config, fields, said):
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    with pytest.raises(UserError, match=said):
        runs_plan.dry_run(config)
    runs_plan.dry_run(config, begun=True)


@pytest.mark.parametrize(
    "fields",
    [
        dict(schedule__name="steps", schedule__boundaries=("9 steps",), schedule__factor=0.2),
        dict(schedule__name="exponential", schedule__every="9 steps", schedule__rate=0.5),
    ],
)
def test_a_schedule_that_would_never_change_is_cured_by_what_is_said(fields):
    config = make(**fields)
    facts = configs.RunFacts(9, lambda text: int(text.split()[0]), True, False, None, None)
    (said,) = configs.find_problems(config, facts)
    cure = re.findall(r"(schedule\.\w+)=('[^']*'|\(\)|[\d.]+)", said.rpartition("; ")[2])
    config.update_from_flattened_dict({name: ast.literal_eval(value) for name, value in cure})
    assert config.schedule.name == "constant"
    configs.validate(config)
    assert configs.find_problems(config) == configs.find_problems(config, facts) == []


def test_the_dry_run_accepts_what_acts(config):
    config.schedule.update(dict(name="steps", boundaries=("6 steps", "20 steps"), warmup="6 steps"))
    config.train.aux_weight, config.data.validation = (0.0,), 0.0  # both off: not refused
    runs_plan.dry_run(config)
    config.model.name, config.train.aux_weight = "dsn", (0.5,)
    config.data.mock, config.data.validation = 40, 0.2
    runs_plan.dry_run(config)
    config.model.name, config.train.aux_weight = "cifar_resnet20", (0.3,)
    config.train.sync_batchnorm = True
    runs_plan.dry_run(config)


# ---- runs


def test_a_new_run_is_refused_before_anything_is_written(config, tmp_path):
    config.optimizer.update(momentum=0.95, nesterov=True)
    said = r"momentum=0\.95: only sgd, muon and.* \| config\..*nesterov"
    for refused in (lambda: run(config, tmp_path / "run"), lambda: runs_plan.dry_run(config)):
        with pytest.raises(UserError, match=said):
            refused()
    assert not (tmp_path / "run").exists()
    config.optimizer.update(momentum=0.9, nesterov=False)
    config.train.sync_batchnorm = True
    with pytest.raises(UserError, match="has no BatchNorm"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_older_run_goes_on_with_one_note(finished, config, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    config.optimizer.momentum, config.data.validation = 0.95, 0.2
    (workdir / "config.json").write_text(json.dumps(configs.to_plain(config)))

    def notes():
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if "keeps what a new run refuses" in line]

    assert run(config, workdir)["test/accuracy"] == finished[1]["test/accuracy"]
    (note,) = notes()
    assert "config.optimizer.momentum=0.95" in note
    assert "config.data.validation=0.2" in note
    evaluate.evaluate_run(workdir)
    assert len(notes()) == 1
    predict.make_predictor_from_run(workdir)
    assert len(notes()) == 1


def test_a_run_is_the_same_only_if_this_package_reset_the_field(finished, config, tmp_path):
    ours, theirs = configs.to_plain(config), configs.to_plain(config)
    theirs["optimizer"]["momentum"] = 0.95
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "config.json").write_text(json.dumps(theirs))
    check_workdir(workdir, ours)  # without effect there, at its default here
    config.optimizer.momentum = 0.8
    with pytest.raises(UserError, match=r"optimizer\.momentum: 0\.95 there, 0\.8 here"):
        check_workdir(workdir, configs.to_plain(config))


def test_an_absurd_loss_is_a_warning_in_log_and_summary(
    finished, config, tmp_path, monkeypatch, capsys
):
    assert finished[1]["warnings"] == []
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    monkeypatch.setattr(session, "MAX_LOSS_RATIO", 0.1)
    (warning,) = run(config, workdir)["warnings"]
    assert warning.startswith("train/loss is 2.")
    assert "at step 3, but guessing gives 2.3; lower schedule.learning_rate (0.002)" in warning
    # One for the first loss, one for the test loss when it is logged.
    assert capsys.readouterr().out.count("warning: ") == 2


# ---- configs that the package derives


def test_a_row_resets_what_it_switches_off_and_no_more():
    base = make(optimizer__momentum=0.95, optimizer__nesterov=True, schedule__name="steps")
    base.schedule.boundaries, base.train.ema = ("9 epochs",), 0.9
    base.train.ema_warmup = False
    rows = {
        "adam": {"optimizer.name": "adam", "optimizer.b1": 0.8},
        "cosine": {"schedule": {"name": "cosine"}, "train.ema": 0.0},
    }
    adam, cosine = (row.config for row in plan.make_rows(base, rows.items()))
    assert (adam.optimizer.momentum, adam.optimizer.nesterov) == (0.9, False)
    assert (adam.optimizer.b1, adam.schedule.boundaries) == (0.8, ("9 epochs",))
    assert (cosine.schedule.boundaries, cosine.train.ema_warmup) == ((), True)
    assert cosine.optimizer.momentum == 0.95
    rows = {"adam": {"optimizer.name": "adam", "optimizer.momentum": 0.8}}
    with pytest.raises(UserError, match=r"row adam: config\.optimizer\.momentum=0\.8"):
        plan.make_rows(base, rows.items())
    base.optimizer.b1 = 0.8  # the user set this in the base: it is refused, not reset
    with pytest.raises(UserError, match=r"row cosine: config\.optimizer\.b1=0\.8"):
        plan.make_rows(base, [("cosine", {"schedule.name": "cosine"})])


def test_an_older_ablation_goes_on_with_one_note(tmp_path, capsys):
    sweep, base = [("a", {}), ("b", {"mix.mixup": 0.2})], make(optimizer__b1=0.8)
    plain = [{"name": name, "overrides": overrides} for name, overrides in sweep]
    (tmp_path / "ablation.json").write_text(json.dumps({"rows": plain}))
    rows = plan.make_rows(base, sweep, tmp_path)
    assert capsys.readouterr().out.count("keeps what a new run refuses") == 1
    (tmp_path / "a/seed0").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "a/seed0" / name).write_text("{}")
    begun, new = (cell.config for cell in plan.make_cells(rows, tmp_path, 1))
    assert (begun.optimizer.b1, new.optimizer.b1) == (0.8, 0.9)
    with pytest.raises(UserError, match=r"row c: config\.optimizer\.b1=0\.8"):
        plan.make_rows(base, [*sweep, ("c", {"mix.mixup": 0.3})], tmp_path)
