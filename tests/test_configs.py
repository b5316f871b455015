from __future__ import annotations

import ast
import importlib
import inspect
import json
import pathlib

import pytest

from configs import common
from flax_cnns import config as configs
from flax_cnns import create_model
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
