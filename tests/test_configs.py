from __future__ import annotations

import ast
import importlib
import inspect
import json
import pathlib

import pytest

from configs import ablations, common
from flax_cnns import ablation_plan, create_model
from flax_cnns import config as configs
from flax_cnns.experiment import model_fields

FILES = sorted(p.stem for p in pathlib.Path(common.__file__).parent.glob("*_*.py"))
FILES = [name for name in FILES if not name.startswith("__")]


def modes(name):
    """The modes that a file names in its call of `check_mode`."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"configs.{name}")))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "check_mode"
    ]
    return ["", *(argument.value for argument in call.args[1:])]


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_valid_and_its_network_exists(name):
    module = importlib.import_module(f"configs.{name}")
    assert "smoke" in modes(name)
    for mode in modes(name):
        config = module.get_config(mode) if mode else module.get_config()
        config.lock()
        configs.validate(config)
        assert json.loads(json.dumps(configs.plain(config))) == configs.plain(config)
        create_model(**model_fields(config))
        command = f"--config=configs/{name}.py" + (f":{mode}" if mode not in ("", "paper") else "")
        assert command in module.__doc__
    with pytest.raises(ValueError, match=r"unknown mode 'smok' of this config; it has .*smoke"):
        module.get_config("smok")


@pytest.mark.parametrize("name", FILES)
def test_smoke_is_small(name):
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    assert config.data.mock or config.data.name == "digits"
    number, unit = config.train.duration.split()
    assert float(number) <= (3 if unit == "epochs" else 20)


# ---- configs of ablations: a run, and the rows that vary it

ABLATIONS = [p.stem for p in pathlib.Path(ablations.__file__).parent.glob("[a-z]*.py")]


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_every_row_of_an_ablation_is_a_run_that_is_valid(name):
    module = importlib.import_module(f"configs.ablations.{name}")
    for mode in modes(f"ablations.{name}"):
        config = module.get_config(mode).lock()
        first, *rows = ablation_plan.make_rows(config, module.sweep())
        assert first.config.to_dict() == config.to_dict()  # the baseline
        assert len({str(row.config) for row in rows} - {str(first.config)}) == len(rows)
        for row in rows:
            create_model(**model_fields(row.config))
        path = f"configs/ablations/{name}.py" + (f":{mode}" if mode else "")
        assert f"experiments.ablate --config={path}" in module.__doc__
    assert config.data.name == "digits"  # smoke: without a file
