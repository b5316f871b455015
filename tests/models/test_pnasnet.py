"""PNASNet-5: published count and MACs, shapes of stages, its cell (see also test_nasnet.py)."""

from __future__ import annotations

from flax_cnns import tree as pytree
from flax_cnns.models.registry import create_model
from tests.models.shapes import capture_shapes, variable_shapes


def shapes_of(name: str, **fields) -> dict:
    return pytree.flatten(variable_shapes(name, **fields))


def test_output_shape_of_each_stage():
    logits, shapes = capture_shapes("pnasnet5large", 331, depths=(1, 0, 1))
    assert shapes["stem/norm"] == (2, 165, 165, 96)
    sides = {
        "stem/reduction1": (83, 54),
        "stem/reduction2": (42, 108),
        "stage1/normal1": (42, 216),
        "stage2/reduction": (21, 432),
        "stage3/reduction": (11, 864),
        "stage3/normal1": (11, 864),
    }
    for path, (side, width) in sides.items():
        assert shapes[path] == (2, side, side, 5 * width), path
    assert logits.shape == (2, 1000)
    features, _ = capture_shapes("pnasnet5large", 64, depths=(1, 0, 1), num_classes=None)
    assert features.shape == (2, 4320)


def test_the_cells_of_n_4():
    cells = {path.split("/block")[0] for path in shapes_of("pnasnet5large") if "/block" in path}
    normal = {f"stage{i}/normal{j}" for i in (1, 2, 3) for j in range(1, 5 - (i > 1))}
    strided = {"stem/reduction1", "stem/reduction2", "stage2/reduction", "stage3/reduction"}
    params = {cell.removeprefix("params/") for cell in cells if cell.startswith("params/")}
    assert params == normal | strided


def test_where_a_cell_strides_its_identity_is_a_1x1():
    shapes = shapes_of("pnasnet5large", depths=(1, 1, 0), width=8, stem_width=8)
    row = "block5_right/conv/kernel"
    assert shapes[f"params/stage2/reduction/{row}"].shape == (1, 1, 16, 16)
    assert f"params/stage2/normal1/{row}" not in shapes
    # The first cell's p is the stem's output, not squeezed, so a 1x1 follows its pooling.
    assert shapes["params/stem/reduction1/block1_right/conv/kernel"].shape == (1, 1, 8, 2)
    assert "params/stem/reduction2/block1_right/conv/kernel" not in shapes


def test_slims_network_differs_from_timms_in_head_and_training_only():
    """The 5x5/3 mean reduces the second stage's 21 pixels to 6, and the head takes all 6."""
    free = dict(aux=None, momentum=0.9, dropout=0.0, drop_path=0.0)
    assert create_model("pnasnet5_large", **free) == create_model("pnasnet5large")
    assert create_model("pnasnet5_large").aux == 6


def test_training_as_slim_does():
    model = create_model("pnasnet5_large")
    assert (model.dropout, model.drop_path, model.drop_path_mode) == (0.5, 0.4, "sample")
    assert (model.momentum, create_model("pnasnet5large").momentum) == (0.9997, 0.9)
