from __future__ import annotations

import pytest

from configs.common import get_config
from flax_cnns import config as configs
from flax_cnns.errors import UserError


def test_a_row_of_the_table_is_whole():
    for name, field in configs.FIELDS.items():
        assert field.check(field.default) is None, name
        assert field.check(configs.OLDER_RUN_VALUES.get(name, field.default)) is None, name
        assert field.meaning, name
        assert not (field.regularizer and field.default), f"{name} is off by default"


def test_a_field_that_was_added_since_has_its_default_in_older_runs():
    assert {
        name: configs.DEFAULTS[name] for name in configs.OLDER_RUN_VALUES
    } == configs.OLDER_RUN_VALUES
    assert len(configs.FIELDS) - len(configs.OLDER_RUN_VALUES) == 83, (
        "give the new field older_runs=..."
    )
    older = configs.to_plain(get_config())
    for name in configs.OLDER_RUN_VALUES:
        *parents, field = name.split(".")
        section = older
        for parent in parents:
            section = section[parent]
        del section[field]
    found = configs.add_missing_fields(older)
    assert found == (configs.to_plain(get_config()), list(configs.OLDER_RUN_VALUES))
    assert configs.add_missing_fields(found[0]) == (found[0], [])


def test_the_defaults_are_valid():
    configs.validate(get_config())


def changed(path, value):
    config = get_config().to_dict()
    *parents, name = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("optimizer.nam", "sgd", "unknown field 'optimizer.nam'; did you mean 'optimizer.name'"),
        ("optimizer.name", "sdg", "one of sgd, adam.*did you mean 'sgd'"),
        ("data.batch_size", 0, "a whole number of at least 1, got 0"),
        ("data.batch_size", 12.5, "a whole number"),
        ("seed", 10**20, r"below 2\*\*31"),
        ("data.validation", -0.1, "a number of at least 0, got -0.1"),
        ("mix.cutmix", float("inf"), "a number of at least 0, got inf"),
        ("data.augment.pca", 1.5, "a number from 0 to 1"),
        ("data.validation", 1.5, "a fraction below 1, a count, or 0, got 1.5"),
        ("data.channels", 2, "0 .*1 or 3, got 2"),
        ("data.fraction", 0.0, "a number above 0 and at most 1, got 0"),
        ("data.classes", (0, 1.5), "numbers or names of classes"),
        ("data.mean", (0.5,), "set both, or neither"),
        ("data.std", (0.0,), "a number per channel"),
        ("data.augment.flip", 1, "True or False, got 1"),
        ("data.augment.random_resized_crop", (1.0, 0.1), "smallest, largest"),
        ("data.augment.randaugment", (2, 31), r"magnitude from 0 to 30\) such as \(2, 9\)"),
        ("schedule.learning_rate", 0.0, "a number above 0"),
        ("schedule.warmup", 5, "a duration such as '20 epochs'"),
        ("schedule.boundaries", ("30",), "durations such as"),
        ("optimizer.trainable", ((".*",),), "rules"),
        ("optimizer.trainable", (("(", True),), "is not a regular expression"),
        ("optimizer.weight_decay", ("a", 1), "rules"),
        ("optimizer.bn", ((".*", "freeze"),), "train, frozen_stats or frozen"),
        ("optimizer.weight_decay_mode", "decouple", "did you mean 'decoupled'"),
        ("optimizer.max_norm", ("a", 1), "rules"),
        ("optimizer.sam", -0.1, "a number of at least 0"),
        ("optimizer.layer_decay", 1.5, "a number from 0 to 1"),
        ("graft.rules", (("a", 1),), "path in the source or None"),
        ("graft.rules", (("a", None),), "set config.graft.source"),
        ("train.accumulate", 3, "data.batch_size=64 is not divisible by 3"),
        ("schedule.name", "steps", "'steps' needs boundaries"),
        ("model.dtype", "float31", "did you mean 'float32'"),
        ("model.dtype", "float16", r"expected bfloat16 or float32 \(.*\), got 'float16'"),
    ],
)
def test_a_wrong_field_says_what_was_expected(path, value, said):
    with pytest.raises(UserError, match=said) as error:
        configs.validate(changed(path, value))
    assert "\n" not in str(error.value)


def test_an_odd_batch_leaves_an_image_without_a_neighbor():
    odd = configs.to_plain(changed("data.batch_size", 15))
    configs.validate(odd)
    for name in ("mixup", "cutmix"):
        with pytest.raises(UserError, match=r"data\.batch_size: .* neighbors; .* got 15"):
            configs.validate(odd | {"mix": odd["mix"] | {name: 1.0}})


def test_a_missing_field():
    config = get_config().to_dict()
    del config["train"]["ema"]
    with pytest.raises(UserError, match=r"'train\.ema' is missing"):
        configs.validate(config)


@pytest.mark.parametrize(
    "weights",
    [(), (0.3,), (("head1", 0.3), (".*", (("0 epochs", 1.0), ("100 epochs", 0.0))))],
)
def test_auxiliary_weights(weights):
    configs.validate(changed("train.aux_weight", weights))


def test_differences_are_named():
    ours, theirs = configs.to_plain(get_config()), configs.to_plain(get_config())
    assert configs.list_differences(ours, theirs) == []
    theirs["seed"] = 3
    theirs["model"]["width"] = 8
    found = configs.list_differences(ours, theirs)
    assert found == ["model.width: 8 there, absent here", "seed: 3 there, 0 here"]
