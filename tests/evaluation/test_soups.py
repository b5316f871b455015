"""Soups: means of weights, the order of the greedy recipe, and what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.evaluation import soups

rng = np.random.default_rng(0)


def linear(*rows):
    return {"params": {"head": {"kernel": np.float32(rows)}}}


def kernel(variables):
    return variables["params"]["head"]["kernel"]


def greedy(ingredients, scores, measure, **kwargs):
    return soups.make_greedy_soup(lambda i: (f"run{i}", ingredients[i]), scores, measure, **kwargs)


def test_a_uniform_soup_of_linear_networks_gives_the_mean_of_their_logits():
    """For a linear network W, (mean of the W) x = mean of the (W x): a soup is an ensemble of
    logits."""
    members = [linear(*rng.normal(size=(4, 3))) for _ in range(5)]
    soup = soups.make_uniform_soup([(f"run{i}", each) for i, each in enumerate(members)])
    images = rng.normal(size=(7, 4))
    wanted = np.mean([images @ kernel(each) for each in members], 0)
    np.testing.assert_allclose(images @ kernel(soup.variables), wanted, rtol=1e-5, atol=1e-6)
    assert soup.kept == (0, 1, 2, 3, 4)


def test_the_mean_is_taken_in_float64_and_has_the_dtype_of_the_first():
    """In float32, 1e8 + 1 is 1e8, and the mean of the three numbers would be 0."""
    members = [("a", linear([1e8])), ("b", linear([1.0])), ("c", linear([-1e8]))]
    assert kernel(soups.make_uniform_soup(members).variables) == np.float32(1 / 3)
    half = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    mean = soups.make_uniform_soup([("a", half), ("b", half)]).variables["w"]
    assert mean.dtype == jnp.bfloat16
    assert mean.tolist() == [1.0, 2.0]


def test_the_greedy_recipe_goes_from_the_best_on_and_keeps_what_is_not_worse():
    """By hand: the score of a weight w is -|w - 3|. Ingredients 2, 5, 4, 9 score -1, -2, -1, -6.

    Order: 2 (first of two equals), 4, 5, 9. Soup {2}: -1. With 4: w = 3, score 0, kept. With 5:
    w = 11/3, score -2/3, not kept. With 9: w = 5, score -2, not kept.
    """
    ingredients = [linear([w]) for w in (2.0, 5.0, 4.0, 9.0)]

    def measure(variables):
        return -abs(float(kernel(variables)[0, 0]) - 3)

    said = []
    soup = greedy(ingredients, [-1, -2, -1, -6], measure, say=said.append)
    assert [taste.ingredient for taste in soup.tastes] == [0, 2, 1, 3]
    assert [taste.kept for taste in soup.tastes] == [True, True, False, False]
    assert [taste.score for taste in soup.tastes] == pytest.approx([-1, 0, -2 / 3, -2])
    assert soup.kept == (0, 2)
    assert kernel(soup.variables).tolist() == [[3.0]]
    assert said == list(soup.tastes)


def test_an_equal_score_is_kept():
    soup = greedy([linear([1.0]), linear([2.0])], [0.5, 0.5], lambda variables: 0.5)
    assert soup.kept == (0, 1)
    assert kernel(soup.variables).tolist() == [[1.5]]


def test_statistics_are_refreshed_before_each_taste_and_not_of_one_network():
    seen = []

    def refresh(variables):
        seen.append(float(kernel(variables)[0, 0]))
        return {**variables, "batch_stats": {"refreshed": np.float32(len(seen))}}

    def measure(variables):
        assert "batch_stats" in variables
        return 1.0 if len(seen) == 1 else 0.0

    soup = greedy(
        [linear([1.0]), linear([3.0]), linear([9.0])], [0.9, 0.8, 0.7], measure, refresh=refresh
    )
    assert seen == pytest.approx([2.0, 13 / 3])  # the second taste is of all three
    assert soup.kept == (0, 1)
    assert soup.variables["batch_stats"]["refreshed"] == 1  # those of the soup that was kept
    for alone in (
        soups.make_uniform_soup([("a", linear([7.0]))], refresh=refresh),
        greedy([linear([7.0])], [0.1], measure, refresh=refresh),
    ):
        assert alone.variables == linear([7.0])


def test_other_paths_and_shapes_are_refused_by_name():
    with pytest.raises(UserError, match=r"params/head/kernel is \[1, 2\] in a and \[1, 3\] in b"):
        soups.make_uniform_soup([("a", linear([1, 2])), ("b", linear([1, 2, 3]))])
    more = {"params": {**linear([1])["params"], "bias": np.zeros(1)}}
    with pytest.raises(UserError, match="b has params/bias, a does not"):
        soups.make_uniform_soup([("a", linear([1])), ("b", more)])
    with pytest.raises(UserError, match="run0 has params/bias, run1 does not"):
        greedy([more, linear([1])], [1.0, 0.5], lambda variables: 0.0)
    with pytest.raises(UserError, match="at least one ingredient"):
        soups.make_uniform_soup([])
    with pytest.raises(UserError, match="at least one ingredient"):
        greedy([], [], lambda variables: 0.0)
