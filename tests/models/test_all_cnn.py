"""All-CNN: counts by hand from tables 1 and 2, shapes and costs of all forms, dropout."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.models import all_cnn
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

# Kernel size, input and output channels, and the output's side for 32x32; all have biases.
LAST = [(3, 192, 192, 6), (1, 192, 192, 6)]
ALL_C = [
    *((3, 3, 96, 32), (3, 96, 96, 32), (3, 96, 96, 16)),
    *((3, 96, 192, 16), (3, 192, 192, 16), (3, 192, 192, 8)),
    *LAST,
]
TABLE = {
    ("all_cnn_a", "base"): [(5, 3, 96, 32), (5, 96, 192, 16), *LAST],
    ("all_cnn_a", "strided"): [(5, 3, 96, 16), (5, 96, 192, 8), *LAST],
    ("all_cnn_a", "convpool"): [
        *((5, 3, 96, 32), (3, 96, 96, 32), (5, 96, 192, 16), (3, 192, 192, 16)),
        *LAST,
    ],
    ("all_cnn_a", "all"): [
        *((5, 3, 96, 32), (3, 96, 96, 16), (5, 96, 192, 16), (3, 192, 192, 8)),
        *LAST,
    ],
    ("all_cnn_b", "strided"): [
        *((5, 3, 96, 32), (1, 96, 96, 16), (5, 96, 192, 16), (1, 192, 192, 8)),
        *LAST,
    ],
    ("all_cnn_b", "all"): [
        *((5, 3, 96, 32), (1, 96, 96, 32), (3, 96, 96, 16)),
        *((5, 96, 192, 16), (1, 192, 192, 16), (3, 192, 192, 8)),
        *LAST,
    ],
    ("all_cnn_c", "base"): [
        *((3, 3, 96, 32), (3, 96, 96, 32), (3, 96, 192, 16), (3, 192, 192, 16)),
        *LAST,
    ],
    ("all_cnn_c", "strided"): [
        *((3, 3, 96, 32), (3, 96, 96, 16), (3, 96, 192, 16), (3, 192, 192, 8)),
        *LAST,
    ],
    ("all_cnn_c", "convpool"): [
        *((3, 3, 96, 32), (3, 96, 96, 32), (3, 96, 96, 32)),
        *((3, 96, 192, 16), (3, 192, 192, 16), (3, 192, 192, 16)),
        *LAST,
    ],
    ("all_cnn_c", "all"): ALL_C,
    ("all_cnn_c_c100", "all"): ALL_C,
}
TINY = dict(widths=(6, 8, 8), num_classes=3, input_size=(12, 12, 3))


@pytest.mark.parametrize(("name", "form"), TABLE)
def test_count_and_cost_of_every_layer_by_hand(name, form):
    classes = create_model(name).num_classes
    expected = [
        ((1, side, side, out), window**2 * width * out + out, side**2 * window**2 * width * out)
        for window, width, out, side in [*TABLE[name, form], (1, 192, classes, 6)]
    ]
    whole = cost_of(name, form=form)
    assert [(row.output_shape, row.params, row.macs) for row in whole.layers] == expected
    if form == "all":
        assert sum(params for _, params, _ in expected) == PUBLISHED[name].params


def test_padded_everywhere_it_averages_over_8x8():
    model = create_model("all_cnn_c", last_padding=1)
    whole = cost(model)
    assert whole.layers[-1].output_shape == (1, 8, 8, 10)
    assert round(whole.macs / 1e9, 4) == 0.2812
    assert whole.params == PUBLISHED["all_cnn_c"].params
    assert cost(model, (1, 1, 1, 3)).layers[-1].output_shape == (1, 1, 1, 10)


@pytest.mark.parametrize("form", all_cnn.FORMS)
@pytest.mark.parametrize(("size", "sides"), [(32, (16, 8, 6)), (33, (17, 9, 7)), (9, (5, 3, 1))])
def test_stages_have_one_shape_in_all_forms(form, size, sides):
    logits, shapes = capture_shapes("all_cnn_c", size, form=form)
    for i, (side, width) in enumerate(zip(sides, (96, 192, 192)), 1):
        assert shapes[f"stage{i}"] == (2, side, side, width)
    assert logits.shape == (2, 10)


def test_errors():
    with pytest.raises(UserError, match="unknown form 'stride'; did you mean 'strided'"):
        capture_shapes("all_cnn_c", 32, form="stride")


def test_dropout_is_where_the_paper_has_it():
    _, shapes = capture_shapes("all_cnn_c", 32)
    assert {path: shape for path, shape in shapes.items() if path.startswith("dropout")} == {
        "dropout0": (2, 32, 32, 3),
        "dropout1": (2, 16, 16, 96),
        "dropout2": (2, 8, 8, 192),
    }
    model = create_model("all_cnn_c")
    assert (model.input_dropout, model.dropout) == (0.2, 0.5)


@pytest.mark.parametrize("rates", [dict(input_dropout=0.0), dict(dropout=0.0)])
def test_training_is_random_and_evaluation_is_not(rates):
    model = create_model("all_cnn_c", **TINY, **rates)
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    variables = init_variables(model, jax.random.key(0))

    def logits(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply(variables, images, train=train, rngs=rngs))

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    assert (logits(0, True) != logits(1, True)).any()
    assert (logits(0, False) >= 0).all()  # ReLU before the mean


def test_initial_values_are_uniform_where_the_paper_is_silent():
    variables = init_variables(create_model("all_cnn_a", init="paper"), jax.random.key(0))
    for path, leaf in pytree.flatten(variables["params"]).items():
        if path.endswith("bias"):
            assert not leaf.any()
            continue
        window, inputs, outputs = leaf.shape[0] ** 2, *leaf.shape[2:]
        bound = np.sqrt(6 / (window * (inputs + outputs)))
        assert np.abs(leaf).max() == pytest.approx(bound, rel=0.01), path
        assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.05), path
