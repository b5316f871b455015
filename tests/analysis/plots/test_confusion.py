"""The confusion matrix: counts if there is space, colors as fractions of the true class."""

from __future__ import annotations

import numpy as np
import pytest

from flax_cnns.analysis.plots import confusion
from flax_cnns.analysis.plots.confusion import draw_confusion


@pytest.fixture
def figures(monkeypatch):
    saved = []
    monkeypatch.setattr(confusion, "save_picture", lambda figure, png: saved.append(figure))
    return saved


def test_counts_and_shares_of_the_rows(figures):
    matrix = np.array([[8, 2, 0], [0, 40, 0], [0, 0, 0]])  # one class has no examples
    draw_confusion(matrix, ["cat", "dog", "emu"], "confusion.png")
    axes = figures[0].axes[0]
    counts = {tuple(int(i) for i in t.get_position()[::-1]): t.get_text() for t in axes.texts}
    assert counts == {(0, 0): "8", (0, 1): "2", (1, 1): "40"}
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]])
    assert axes.get_ylabel() == "true class"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog", "emu"]
    assert axes.get_title() == "48 of 50 correct (96.00 %)"


@pytest.mark.parametrize(("classes", "named"), [(21, True), (100, False)])
def test_many_classes_have_no_counts(figures, classes, named):
    draw_confusion(np.eye(classes), [f"class {i}" for i in range(classes)], "c.png", title="test")
    axes = figures[0].axes[0]
    assert len(axes.texts) == 0
    assert (axes.get_yticklabels()[-1].get_text() == f"class {classes - 1}") is named
    assert axes.get_title() == "test"


def test_the_picture_is_written(tmp_path):
    draw_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_names_must_fit_the_matrix():
    with pytest.raises(ValueError, match="expected a matrix of 2 x 2 classes, got"):
        draw_confusion(np.eye(3), ["a", "b"], "confusion.png")
