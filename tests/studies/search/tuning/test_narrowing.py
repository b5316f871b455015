"""The rule from coarse to fine, on cases that are derived by hand."""

from __future__ import annotations

import math

import pytest

from flax_cnns.config.spaces import check_space, choice, integer, log_uniform, uniform
from flax_cnns.errors import UserError
from flax_cnns.recipes import common
from flax_cnns.studies.search.tuning.narrowing import ScoredTrial, narrow_space, select_best


def make_trials(*values, state="complete"):
    return [ScoredTrial(i, {}, state, value) for i, value in enumerate(values)]


def make_drawn(path, *drawn):
    return [ScoredTrial(i, {path: value}, "complete", 1.0) for i, value in enumerate(drawn)]


def test_the_best_tenth_is_at_least_three_trials_and_rounded_up():
    numbers = [t.number for t in select_best(make_trials(*range(20)))]
    assert numbers == [19, 18, 17]  # a tenth of 20 is 2
    assert [t.number for t in select_best(make_trials(*range(31)))] == [30, 29, 28, 27]  # 3.1
    assert [t.number for t in select_best(make_trials(*range(5)), maximize=False)] == [0, 1, 2]


def test_pruned_trials_count_but_are_never_among_the_best():
    pruned = [ScoredTrial(100 + i, {}, "pruned", 99.0) for i in range(35)]
    failed = [ScoredTrial(200 + i, {}, "failed", math.nan) for i in range(50)]
    best = select_best([*make_trials(*range(5)), *pruned, *failed])
    assert [t.number for t in best] == [4, 3, 2, 1]  # a tenth of 40


def test_of_equal_values_the_earlier_trial_is_better():
    assert [t.number for t in select_best(make_trials(1, 2, 2, 2, 2))] == [1, 2, 3]


def test_values_that_are_not_finite_are_not_complete_results():
    with pytest.raises(UserError, match="at least 3 complete trials of the coarser one, got 2"):
        select_best(make_trials(1.0, math.nan, 2.0, math.inf))


def test_a_logarithmic_range_is_widened_in_the_logarithm():
    # Four decades: the margin is 0.4 decades. Values 1e-2 and 1e-1 give 10^-2.4 to 10^-0.6.
    space = {"schedule.learning_rate": log_uniform(1e-4, 1.0)}
    best = make_drawn("schedule.learning_rate", 1e-2, 1e-1, 3e-2)
    narrow = narrow_space(space, best).space["schedule.learning_rate"]
    assert narrow.low == pytest.approx(10**-2.4, rel=1e-12)
    assert narrow.high == pytest.approx(10**-0.6, rel=1e-12)
    assert narrow.log
    assert narrow.kind == "float"


def test_a_range_is_widened_by_a_tenth_and_stays_within_the_old_range():
    # Width 0.4: the margin is 0.04. 0.42 + 0.04 lies beyond the old end, which stays exactly.
    space = {"mix.label_smoothing": uniform(0.03, 0.43)}
    narrow = narrow_space(space, make_drawn("mix.label_smoothing", 0.2, 0.42, 0.3))
    assert narrow.space["mix.label_smoothing"].low == pytest.approx(0.16)
    assert narrow.space["mix.label_smoothing"].high == 0.43
    assert narrow.basis == (0, 1, 2)
    assert narrow.fixed == {}


def test_values_at_both_ends_keep_the_range_exactly():
    space = {"schedule.learning_rate": log_uniform(1e-3, 0.7)}
    narrow = narrow_space(space, make_drawn("schedule.learning_rate", 1e-3, 0.7, 0.1))
    assert narrow.space["schedule.learning_rate"].low == 1e-3
    assert narrow.space["schedule.learning_rate"].high == 0.7


def test_integers_inside_of_the_widened_range_remain():
    # 4 to 64: the margin is 6. 20 - 6 = 14 and 30 + 6 = 36.
    narrow = narrow_space({"model.width": integer(4, 64)}, make_drawn("model.width", 20, 30, 25))
    assert narrow.space["model.width"].ends == (14, 36)
    # Log 1 to 1000: the margin is a factor of 10^0.3 = 1.995. 10 / 1.995 = 5.01, so 6; 10 to 19.
    narrow = narrow_space(
        {"model.width": integer(1, 1000, log=True)}, make_drawn("model.width", 10)
    )
    assert narrow.space["model.width"].ends == (6, 19)


def test_a_field_with_one_value_left_is_fixed_and_no_longer_searched():
    # 1 to 5: the margin is 0.4, so that 3 alone remains.
    space = {"model.depth": integer(1, 5), "optimizer.name": choice("sgd", "adam", "lamb")}
    best = [ScoredTrial(i, {"model.depth": 3, "optimizer.name": n}, "complete", 1.0)
            for i, n in enumerate(("adam", "sgd", "adam"))]  # fmt: skip
    narrow = narrow_space(space, best)
    assert narrow.fixed == {"model.depth": 3}
    assert list(narrow.space) == ["optimizer.name"]
    assert narrow.space["optimizer.name"].values == ("sgd", "adam")  # in the old order


def test_a_choice_of_tuples_keeps_those_that_the_journal_holds_as_lists():
    space = {"model.depths": choice((1, 1), (2, 2), (3, 3))}
    narrow = narrow_space(space, make_drawn("model.depths", [2, 2], [3, 3], [2, 2]))
    assert narrow.space["model.depths"].values == ((2, 2), (3, 3))


def conditional_space():
    return {
        "optimizer.name": choice("sgd", "adam", "lamb"),
        "optimizer.momentum": uniform(0.5, 1.0, when={"optimizer.name": "sgd"}),
        "optimizer.nesterov": choice(False, True, when={"optimizer.name": "sgd"}),
        "optimizer.b2": uniform(0.9, 0.999, when={"optimizer.name": ("adam", "lamb")}),
    }


def test_a_condition_keeps_what_can_be_drawn_and_a_field_without_one_is_left_out():
    drawn = [{"optimizer.name": "adam", "optimizer.b2": 0.95}] * 3
    best = [ScoredTrial(i, each, "complete", 1.0) for i, each in enumerate(drawn)]
    narrow = narrow_space(conditional_space(), best)
    assert narrow.fixed == {"optimizer.name": "adam"}
    assert list(narrow.space) == ["optimizer.b2"]
    assert narrow.space["optimizer.b2"].when == {"optimizer.name": ("adam",)}
    config = common.get_config()
    config.optimizer.name = "adam"
    check_space(config, narrow.space)


def test_a_conditional_field_with_one_value_left_keeps_its_values():
    """It cannot be fixed in the config, because adam has no Nesterov momentum."""
    sgd = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": True}
    adam = {"optimizer.name": "adam", "optimizer.b2": 0.95}
    best = [ScoredTrial(i, each, "complete", 1.0) for i, each in enumerate((sgd, adam, sgd))]
    narrow = narrow_space(conditional_space(), best)
    assert narrow.fixed == {}
    assert narrow.space["optimizer.name"].values == ("sgd", "adam")
    assert narrow.space["optimizer.nesterov"].values == (False, True)
    assert narrow.space["optimizer.momentum"].low == pytest.approx(0.85)
    assert narrow.space["optimizer.b2"].when == {"optimizer.name": ("adam",)}
    check_space(common.get_config(), narrow.space)


def test_made_values_are_kept_and_compared_with_conditions():
    def make_name(strength):
        return "sgd" if strength == "plain" else "adam"

    space = {
        "optimizer.name": choice("plain", "adaptive", to_value=make_name),
        "optimizer.momentum": uniform(0.5, 1.0, when={"optimizer.name": "sgd"}),
    }
    drawn = [{"optimizer.name": "adaptive"}] * 2 + [{"optimizer.name": "plain"}]
    best = [ScoredTrial(i, each, "complete", 1.0) for i, each in enumerate(drawn)]
    narrow = narrow_space(space, best)
    assert narrow.space["optimizer.momentum"].when == {"optimizer.name": ("sgd",)}
    # None of the best drew it, so its range is unchanged.
    assert narrow.space["optimizer.momentum"].ends == (0.5, 1.0)
    with pytest.raises(UserError, match="agree on all fields"):
        narrow_space(space, best[:2])
