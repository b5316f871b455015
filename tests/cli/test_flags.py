"""Fields without `config.`, and values of --config. tests/test_scripts.py has other mistakes."""

from __future__ import annotations

import re

import pytest
from absl import flags

from flax_cnns.cli import flags as ours
from flax_cnns.errors import UserError
from tests.tiny_runs import ROOT


@pytest.fixture
def with_config(monkeypatch):
    def define(runs=""):
        values = flags.FlagValues()
        for name in ("config", "budget"):
            flags.DEFINE_string(name, "", "", flag_values=values)
        monkeypatch.setattr(ours.flags, "FLAGS", values)
        monkeypatch.setattr(ours, "_RUNS", [re.compile(rf"({runs})\." if runs else "")])

    return define


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--optimizer.name=adam", "write --config.optimizer.name=adam"),
        ("--learning-rate=1", "write --config.schedule.learning_rate=1"),
        ("--seed", "write --config.seed"),
        ("-model.depth=3", "write --config.model.depth=3"),
        ("--optimizer.nam=adam", "did you mean '--config.optimizer.name'"),
    ],
)
def test_a_field_without_config_in_front_is_told_with_it(with_config, given, said):
    with_config()
    with pytest.raises(UserError, match=re.escape(said)):
        ours._check_fields_are_of_the_config(["--budget=1", given])
    ours._check_fields_are_of_the_config(["--config.seed=1", "--sed=1", "seed=1", "--", given])


def test_a_field_of_one_of_several_runs_has_its_run_in_front(with_config):
    with_config(runs=r"pretrain|targets\.\w+")
    with pytest.raises(UserError, match=r"write --config\.targets\.own\.seed=1$"):
        ours._check_fields_are_of_the_config(["--targets.own.seed=1"])
    said = r"write --config\.pretrain\.seed=1 or --config\.targets\.NAME\.seed=1$"
    with pytest.raises(UserError, match=said):
        ours._check_fields_are_of_the_config(["--seed=1"])


def test_config_names_a_file_or_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "configs/digits_lenet5.py")
    for given in (["--config=digits_lenet5:smoke"], ["--config", "configs/digits_lenet5.py:smoke"]):
        found = ours._find_config(["train", *given, "--config.seed=1"])
        assert found == (["train", f"--config={file}:smoke", "--config.seed=1"], file)
    assert ours._find_config(["train", "--workdir=x"]) == (["train", "--workdir=x"], "")
    for given in (["--config="], ["--config"], ["--config=nowhere.py:smoke"]):
        with pytest.raises(UserError, match=r"^--config: there is no file or recipe '"):
            ours._find_config(["train", *given])


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("def get_config(mode='none'): return dict(mode=mode)", None, ""),
        ("x = 1", UserError, r"c\.py has no function get_config\(\)"),
        ("def get_config(): raise ValueError('what it says')", ValueError, "what it says\n$"),
        ("import no_such_module", ModuleNotFoundError, "no_such_module"),
    ],
)
def test_what_a_config_file_holds(tmp_path, text, error, said):
    (tmp_path / "c.py").write_text(text)
    parse = ours._ConfigParser().parse
    if error:
        with pytest.raises(error, match=said):
            parse(f"{tmp_path}/c.py")
    else:
        assert parse(f"{tmp_path}/c.py") == {"mode": "none"}
        assert parse(f"{tmp_path}/c.py:a:b") == {"mode": "a:b"}
