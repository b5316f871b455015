"""The space of layers: decisions by hand, counts, random draws."""

from __future__ import annotations

import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model
from flax_cnns.studies.search.nas.controller import list_steps
from flax_cnns.studies.search.nas.layers.space import LayersSpace
from tests.models.counting import count_params

SPACE = LayersSpace(3)
CHOSEN = (1, 3, 0, 0, 2, 1, 0, 3, 3, 3, 1, 1)  # 3x7 24 | 1x5 36, no skip | 7x7 64, both


def test_decisions_by_hand():
    fields = SPACE.make_fields(CHOSEN)
    assert fields == {
        "table": (((3, 7), 24, (0,)), ((1, 5), 36, (0,)), ((7, 7), 64, (1, 2))),
    }
    assert SPACE.name(CHOSEN) == "130-0210-33311"
    model = create_model("nas_v1", **fields, input_size=(8, 8, 1))
    convs = 3 * 7 * 1 * 24 + 1 * 5 * 1 * 36 + 7 * 7 * (24 + 36) * 64
    assert count_params(model) == convs + 2 * (24 + 36 + 64) + 64 * 10 + 10


def test_strides_and_no_skips():
    space = LayersSpace(2, has_skips=False, has_strides=True)
    assert space.make_fields((0, 1, 2, 0, 3, 1, 1, 0, 1, 0)) == {
        "table": (((1, 3), 64, (0,)), ((3, 3), 24, (1,))),
        "strides": ((3, 1), (1, 2)),
    }
    assert space.count_networks() == (4 * 4 * 4 * 3 * 3) ** 2
    with pytest.raises(UserError, match="expected 10 decisions, got 9"):
        space.name((0,) * 9)


def test_the_controllers_steps():
    assert SPACE.count_networks() == 64**3 * 2**3
    steps = list_steps(SPACE.decisions)
    assert steps.size.tolist() == [4, 4, 4, 1] * 3
    assert steps.anchor.tolist() == [-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2]


def test_random_draws_are_uniform_and_seeded():
    drawn = np.array([SPACE.draw_uniformly(0, i) for i in range(2000)])
    for column, size in zip(drawn.T, [4, 4, 4, 4, 4, 4, 2, 4, 4, 4, 2, 2]):
        counts = np.bincount(column, minlength=size)
        assert len(counts) == size
        # Five standard deviations of a binomial.
        np.testing.assert_allclose(counts, 2000 / size, atol=5 * (2000 / size) ** 0.5)
    assert SPACE.draw_uniformly(0, 7) == tuple(drawn[7])
    assert SPACE.draw_uniformly(1, 7) != tuple(drawn[7])
