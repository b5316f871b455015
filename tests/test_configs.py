from __future__ import annotations

import ast
import importlib
import inspect
import json
import pathlib

import jax
import pytest

from configs import ablations, common
from flax_cnns import config as configs
from flax_cnns import create_model, init_variables
from flax_cnns.runs.network import get_model_fields
from flax_cnns.studies.ablation import plan
from flax_cnns.train import schedules

FILES = sorted(p.stem for p in pathlib.Path(common.__file__).parent.glob("*_*.py"))
FILES = [name for name in FILES if not name.startswith("__")]


def modes(name):
    """Returns the modes that a file passes to `check_mode`."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"configs.{name}")))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "check_mode"
    ]
    return ["", *(argument.value for argument in call.args[1:])]


# Numbers of training images of the data sets in the configs.
IMAGES = {"digits": 1077, "cifar10": 50_000, "cifar100": 50_000, "fashion_mnist": 60_000}
IMAGES |= {"imagenet2012": 1_281_167, "folder": 100}


def doubts(config):
    """Returns the problems for which a new run of `config` would be refused. Reads no data."""
    images = config.data.mock or IMAGES[config.data.name]
    taken = 0 if config.data.mock or config.data.name == "digits" else config.data.validation
    images = (images * (1 - taken) if taken < 1 else images - taken) * config.data.fraction
    per_epoch = images / config.data.batch_size

    def count(duration):
        return schedules.parse_duration(duration, per_epoch)

    model = create_model(**get_model_fields(config))

    def has_batchnorm():
        shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
        return bool(shapes["batch_stats"])

    facts = configs.RunFacts(
        total_steps=count(config.train.duration),
        count_steps=count,
        has_validation=bool(config.data.validation),
        has_own_validation=config.data.name == "digits",
        has_batchnorm=has_batchnorm,
        has_aux_heads=lambda: config.model.name == "dsn",
    )
    return [*configs.find_problems(config), *configs.find_problems(config, facts)]


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_valid_and_its_network_exists(name):
    module = importlib.import_module(f"configs.{name}")
    assert "smoke" in modes(name)
    for mode in modes(name):
        config = module.get_config(mode) if mode else module.get_config()
        config.lock()
        configs.validate(config)
        assert doubts(config) == []
        assert json.loads(json.dumps(configs.to_plain(config))) == configs.to_plain(config)
        create_model(**get_model_fields(config))
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
        first, *rows = plan.make_rows(config, module.sweep())
        assert first.config.to_dict() == config.to_dict()  # the baseline
        assert len({str(row.config) for row in rows} - {str(first.config)}) == len(rows)
        for row in (first, *rows):
            assert doubts(row.config) == []
        path = f"configs/ablations/{name}.py" + (f":{mode}" if mode else "")
        assert f"experiments.ablate --config={path}" in module.__doc__
    assert config.data.name == "digits"  # the smoke mode needs no files


# ---- configs of fine-tuning: a source's run, and a run for each target


@pytest.mark.parametrize("name", ["fashion_digits", "folder"])
def test_every_run_of_fine_tuning_is_one_that_is_new(name):
    module = importlib.import_module(f"configs.finetune.{name}")
    for mode in modes(f"finetune.{name}"):
        config = module.get_config(mode)
        for one in (config.pretrain, *config.targets.values()):
            assert doubts(one) == []
