"""Grafting in a run: a ResNet into one with other classes, a renamed stem and a fresh stage.

Also the messages for mistakes.
"""

from __future__ import annotations

import json
import re
from functools import partial

import jax
import numpy as np
import pytest

from flax_cnns import create_model, init_variables, run
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.errors import UserError
from flax_cnns.tree import flatten, unflatten
from tests.test_scripts import finish
from tests.tiny_runs import arrays

RULES = (
    (r"params/head/.*", None),
    (r"(params|batch_stats)/stage2/.*", None),
    (r"(.*)/stem/conv/(.*)", r"ema/\1/stem/conv_gray/\2"),
    (r"(.*)", r"ema/\1"),
)

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def resnet(config):
    """One step of a ResNet of two stages, at a learning rate that changes nothing."""
    config.model.name = "cifar_resnet20"
    with config.unlocked():
        config.model.update(dict(depths=(1, 1), widths=(4, 8)))
    config.data.image_size = 8
    config.data.augment.update(dict(pad_crop=0, rotate=0.0, scale=0.0))
    config.optimizer.name = "sgd"
    config.schedule.learning_rate = 1e-20
    config.train.duration = "1 steps"
    return config


@pytest.fixture
def source(resnet, tmp_path):
    """A checkpoint of this ResNet for ten classes, with another name for the stem."""
    fields = dict(depths=(1, 1), widths=(4, 8), num_classes=10, input_size=(8, 8, 1))
    model = create_model("cifar_resnet20", **fields)
    shapes = flatten(jax.eval_shape(partial(init_variables, model), jax.random.key(0)))
    rng, state = np.random.default_rng(0), {}
    for path, like in shapes.items():
        then = path.replace("stem/conv/", "stem/conv_gray/")
        for tree in ("", "ema/"):
            state[f"{tree}{then}"] = rng.uniform(0.5, 1, like.shape).astype(np.float32)
    with Checkpoints(tmp_path / "old/checkpoints") as checkpoints:
        checkpoints.save(1, unflatten(state), host={})
    return tmp_path / "old"


def test_an_own_resnet_for_other_classes(resnet, source, tmp_path, capsys):
    resnet.data.classes = (5, 6, 7)
    resnet.graft.source, resnet.graft.rules = str(source), RULES
    run(resnet, tmp_path / "new")
    shown = capsys.readouterr().out
    rows = [re.split(r" *│ *", line)[1:-1] for line in shown.splitlines()]
    assert [[row[0], row[3]] for row in rows if len(row) == 4] == [
        ["stem/conv", "ema/stem/conv_gray"],
        ["stem/norm", "ema/stem/norm"],
        ["stage1", "ema/stage1"],
        ["stage2", "fresh"],
        ["head", "fresh: [8, 3], the source has [8, 10]"],
        ["ema/stage2", "left behind"],
        ["ema/head", "left behind"],
    ]
    assert "grafted 15, fresh 12, left behind 12: stage2/…, head/…" in shown
    report = json.loads((tmp_path / "new/graft.json").read_text())
    assert report["grafted"]["params/stem/conv/kernel"] == "ema/params/stem/conv_gray/kernel"
    assert report["folder"] == str(source / "checkpoints/1/state")
    old, new = arrays(source), arrays(tmp_path / "new")
    assert new["params/head/kernel"].shape == (8, 3)
    for path, there in report["grafted"].items():
        if path.startswith("params/"):  # the step has changed the statistics
            np.testing.assert_allclose(new[path], old[there], atol=1e-15, err_msg=path)
            # The average starts from the grafted weights.
            np.testing.assert_allclose(new[f"ema/{path}"], old[there], rtol=1e-6, atol=1e-15)


def test_a_mistyped_rule_is_one_line_that_names_the_nearest_path(config, tmp_path):
    config.graft.source = "torchvision:resnet50"  # must not be fetched
    config.graft.rules = ((r"params/haed/.*", None), (r"(.*)", r"\1"))
    with pytest.raises(UserError) as raised:
        run(config, tmp_path / "run")
    said = str(raised.value)
    assert "\n" not in said
    assert "the rule 'params/haed/.*' decides nothing; the nearest path is 'params/head/" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_is_inspected(tmp_path):
    tree = {"params": {"head": {"kernel": np.ones((4, 3), np.float32)}}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, tree, host={})
    code, out, err = finish("inspect", str(tmp_path), "--depth=1", "--verify")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[1] == "step 3 (latest)"
    assert lines[3].split() == ["params/", "12", "48", "bytes"]
    assert lines[-1] == "CRC32s: compared, all equal"


def test_rules_for_what_the_source_lacks(resnet, source, tmp_path):
    resnet.graft.source = str(source)
    with pytest.raises(UserError) as raised:
        run(resnet, tmp_path / "new")
    assert "the nearest path is 'params/stem/conv_gray/kernel'" in str(raised.value)
    assert not (tmp_path / "new").exists()
