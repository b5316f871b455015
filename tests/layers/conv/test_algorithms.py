"""The CPU's algorithms: each is correct, the tables select each, and programs are small."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.layers.conv import choose, conv2d, cpu
from flax_cnns.layers.conv.geometry import ConvGeometry
from tests.layers.conv.cases import KINDS, Case, error, exact, lowered, products, quick_jit

# ---------------------------------------------------------------------------- by name

# The tests call algorithms by name, whatever the tables select. The next test covers all names.
DENSE = Case((2, 7, 6), 5, 4, padding=((1, 0), (2, 1)))
POINTWISE = Case((2, 5, 4), 3, 6, (1, 1), (2, 1), padding=1)
PATCHES = Case((2, 7, 6), 3, 4, (3, 2), (3, 2), padding=0)
STRIDED = Case((2, 7, 8), 3, 4, (3, 4), (2, 3), padding=((1, 2), (-1, 2)), dilation=(2, 1))
GROUPED = Case((2, 6, 5), 3, 3, strides=(2, 1), padding=1, groups=4)
WIDENING = Case((2, 5, 6), 4, 6, (2, 3), padding=1, dilation=(1, 2), groups=3)
DEPTHWISE = Case((2, 6, 7), 1, 1, (5, 3), (2, 2), groups=6)
MULTIPLIED = Case((2, 6, 5), 1, 2, groups=5, padding=((0, 3), (1, -1)))
TINY = Case((2, 1, 2), 4, 3)
NAMED = {
    DENSE: {"library", "pieces", "shifted", "winograd"},
    TINY: {"library", "pieces", "shifted", "winograd"},
    PATCHES: {"library", "pieces", "shifted", "patches"},
    POINTWISE: {"library", "pieces", "shifted", "pointwise"},
    STRIDED: {"library", "pieces", "shifted"},
    GROUPED: {"library", "batched", "blocks", "rotated"},
    WIDENING: {"library", "batched", "blocks"},
    DEPTHWISE: {"library", "batched", "blocks", "rotated", "depthwise"},
    MULTIPLIED: {"library", "batched", "blocks", "depthwise"},
}


def test_every_algorithm_is_tested_by_name():
    named = {"phases"}.union(*NAMED.values())
    assert named >= {*cpu.FORWARD, *cpu.KERNEL_GRAD, *cpu.INPUT_GRAD}


@pytest.mark.parametrize("case", NAMED, ids=lambda c: f"{c.size[1]}x{c.size[2]}-{c.groups}")
def test_each_algorithm_for_a_shape_is_correct(case, monkeypatch):
    monkeypatch.setattr(choose, "PIECE_BYTES", 0)  # one image a piece
    geometry, names = case.geometry(), {"phases", *NAMED[case]}
    operands = case.operands()
    references, _ = exact(case, operands)

    def run(table, *args):
        return {name: f(*args, geometry) for name, f in table.items() if name in names}

    def algorithms(x, kernel, dy):
        mirror = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
        dense = cpu.FORWARD if case.groups == 1 else {}
        transposed = {name: partial(f, transposed=True) for name, f in dense.items()}
        return {
            "y": run(cpu.FORWARD, x, kernel),
            "transposed": run(transposed, x, mirror),
            "dx": run(cpu.INPUT_GRAD, dy, kernel),
            "dkernel": run(cpu.KERNEL_GRAD, x, dy),
        }

    for product, results in jax.device_get(quick_jit(algorithms)(*operands)).items():
        for name, result in results.items():
            reference = references["y" if product == "transposed" else product]
            assert error(result, reference) < 1e-5, (product, name)


# ---------------------------------------------------------------------------- by the tables

TABLES = ("FORWARD", "INPUT_GRAD", "KERNEL_GRAD")
# Small cases that together reach every algorithm.
REACHING = [
    Case((1, 9, 7), 2, 3, strides=(2, 2), padding=1),  # library
    Case((3, 9, 7), 2, 3, strides=(2, 2), padding=1),  # pieces
    Case((2, 4, 3), 3, 5, (1, 1), (1, 2), padding=0),
    Case((2, 5, 6), 2, 3, (2, 3), (2, 3), padding=0),
    Case((2, 5, 4), 64, 64, padding=((1, 0), (2, 1))),  # winograd
    Case((2, 2, 3), 33, 32),  # shifted
    Case(
        (1, 7, 8),
        3,
        4,
        strides=(3, 2),
        padding=((0, 4), (2, 1)),
        dilation=(2, 3),
        control_flow=True,
    ),
    Case((2, 5, 4), 1, 2, groups=3, strides=(2, 1)),  # depthwise
    Case((2, 4, 5), 2, 2, groups=4, padding=1),  # rotated, batched
    Case((1, 8, 7), 3, 5, groups=2, padding=2),  # blocks
]


@pytest.fixture
def reached(monkeypatch):
    """The algorithms that have run. Winograd and pieces are allowed for small shapes too."""
    monkeypatch.setattr(choose, "MIN_WINOGRAD_MULTIPLICATIONS", 0)
    monkeypatch.setattr(choose, "PIECE_BYTES", 0)
    monkeypatch.setattr(choose, "MIN_BYTES_OF_PIECES", 0)
    names = set()
    for table in TABLES:
        for name, algorithm in list(getattr(cpu, table).items()):

            def seen(*args, algorithm=algorithm, label=(table, name)):
                names.add(label)
                return algorithm(*args)

            monkeypatch.setitem(getattr(cpu, table), name, seen)
    return names


def check(cases, jit):
    wrong = []
    for case in cases:
        operands = case.operands()
        references, allowed = exact(case, operands)
        results = jax.device_get(jit(products(case.ours))(*operands))
        errors = {name: error(results[name], references[name]) for name in references}
        if any(errors[name] >= allowed[name] for name in errors):
            wrong.append((case, errors))
    assert not wrong


def test_every_algorithm_is_chosen_and_exact(reached):
    check(REACHING, quick_jit)
    assert reached == {(table, name) for table in TABLES for name in getattr(cpu, table)}


def test_the_tables_name_every_algorithm_and_every_row_decides():
    draw = np.random.RandomState(0)
    draw_one = lambda *values: int(draw.choice(values))  # noqa: E731
    deciding = {table: set() for table in TABLES}
    for _ in range(3000):
        groups = draw_one(1, 1, 2, 8, 64)
        channels, features = draw_one(1, 2, 8, 64), draw_one(1, 2, 8, 64)
        kernel, size = draw_one(1, 2, 3, 3, 11), draw_one(1, 7, 14, 56)
        geometry = ConvGeometry(
            in_size=(size, size),
            kernel_size=(kernel, kernel),
            out_size=(size, size),
            strides=(draw_one(1, 1, 2),) * 2,
            padding=((draw_one(0, 1),) * 2,) * 2,
            dilation=(1, 1),
            groups=groups,
            control_flow=draw_one(0, 0, 1) == 1,
        )
        of_group = choose.Product(1, channels, features * groups, geometry)
        whole = choose.Product(draw_one(1, 64), channels * groups, features * groups, geometry)
        for table in TABLES:
            product = of_group if table == "INPUT_GRAD" else whole
            rows = getattr(choose, table)
            deciding[table].add(next(i for i, row in enumerate(rows) if row.condition(product)))
    for table in TABLES:
        rows = getattr(choose, table)
        assert deciding[table] == set(range(len(rows))), table
        assert {row.algorithm for row in rows} == set(getattr(cpu, table)), table
        assert all(row.why for row in rows)


# Cases that random ones are unlikely to contain.
CHOSEN = [
    Case((1, 8, 9), 3, 2, padding=1),  # one image: no pieces
    Case((2, 11, 11), 264, 264, padding=0),  # many channels, odd maps
    Case((3, 9, 8), 256, 260, padding=((2, 0), (-1, 3))),
    Case((9, 32, 31), 40, 33),
    Case((2, 8, 9), 64, 64, strides=(2, 2), padding=1),
    Case((2, 8, 8), 33, 64, control_flow=True),
    Case((2, 34, 33), 4, 6, (7, 7), (2, 2), padding=3),  # a stem
    Case((2, 9, 9), 5, 4, (2, 5), dilation=(2, 1)),
    Case((2, 9, 9), 8, 8, (1, 1)),
    Case((2, 8, 7), 8, 6, (1, 1), (2, 3), padding=1),  # outputs that see only padding
    Case((2, 9, 11), 3, 5, (4, 2), (4, 2), padding=0),  # patches, with pixels left over
    Case((2, 9, 8), 3, 5, (4, 3), (4, 3), padding=0),  # patches, with rows left over
    Case((3, 1, 1), 16, 8),  # tiny maps: most taps see only padding
    Case((3, 2, 2), 8, 16, strides=(2, 2), padding=1),
    Case((2, 3, 3), 8, 8),
    Case((2, 3, 2), 4, 4, (7, 5), padding=3),  # the kernel is larger than the map
    Case((2, 10, 11), 4, 4, (2, 2), (3, 4), padding=0),  # pixels that no output reads
    Case((2, 9, 9), 6, 6, strides=(3, 3), padding=((0, 4), (5, 1)), dilation=(2, 3)),
    Case((2, 11, 10), 2, 2, strides=(2, 1), groups=16),
    Case((2, 9, 10), 4, 4, groups=8, padding=1),
    Case((2, 8, 8), 16, 8, groups=4, padding=1),
    Case((2, 14, 14), 8, 8, groups=8, padding=1),  # ResNeXt
    Case((2, 14, 14), 8, 8, strides=(2, 2), groups=8, padding=1),
    Case((2, 4, 3), 5, 5, groups=3),
    Case((2, 8, 9), 8, 12, groups=3, control_flow=True),
    Case((2, 6, 6), 8, 4, (1, 1), groups=4),
    Case((2, 9, 9), 1, 1, groups=12),  # depthwise
    Case((2, 9, 8), 1, 1, (5, 5), (2, 2), padding=((2, 1), (1, 2)), groups=7),
    Case((2, 7, 7), 1, 3, strides=(2, 2), dilation=(2, 2), groups=5),
    Case((8, 116, 116), 1, 1, groups=2),  # sums over more than 1e5 positions
    Case((26, 64, 64), 2, 3),
]


def random_cases(count, seed=3):
    draw = np.random.RandomState(seed)
    pair = lambda low, high: tuple(int(n) for n in draw.randint(low, high, 2))  # noqa: E731
    while count:
        groups, channels, features = [
            (1, draw.randint(1, 9), draw.randint(1, 9)),
            (draw.randint(2, 5), draw.randint(2, 6), draw.randint(1, 6)),
            (draw.randint(2, 9), 1, draw.randint(1, 4)),
        ][draw.randint(3)]
        paddings = ["SAME", "VALID", "SAME_LOWER", int(draw.randint(4)), pair(0, 4)]
        paddings.append((pair(-2, 5), pair(-2, 5)))
        case = Case(
            size=(int(draw.randint(1, 4)), *pair(1, 12)),
            channels=int(channels),
            features=int(features),
            kernel=pair(1, 6),
            strides=pair(1, 5),
            padding=paddings[draw.randint(len(paddings))],
            dilation=pair(1, 4),
            groups=int(groups),
            control_flow=bool(draw.randint(2)),
        )
        if fits(case):
            count -= 1
            yield case


def fits(case):
    try:
        return 0 not in case.out_shape()
    except ValueError:  # cropped to nothing
        return False


CASES = [*CHOSEN, *random_cases(8)]


@pytest.mark.slow
def test_many_shapes_are_exact(reached):
    """Uses the default compiler options, and random cases in addition to the chosen ones."""
    check([*CHOSEN, *random_cases(4)], jax.jit)
    assert reached == {(table, name) for table in TABLES for name in getattr(cpu, table)}


@pytest.mark.slow
def test_control_flow_leaves_no_convolution_of_many_shapes_to_a_cpu():
    leaves_no_convolution([*CHOSEN, *random_cases(8)])


# ---------------------------------------------------------------------------- compiled programs


def leaves_no_convolution(cases):
    for case in cases:
        case = case._replace(control_flow=True)
        text = lowered(products(case.ours), "cpu", *case.operands())
        assert "stablehlo.convolution" not in text, case


def test_control_flow_leaves_no_convolution_to_a_cpu():
    leaves_no_convolution([*REACHING, *KINDS.values()])


@pytest.mark.parametrize(
    ("images", "kernel", "strides", "groups"),
    [
        ((8, 224, 224, 3), (32, 32, 3, 768), 32, 1),  # ViT's patches
        ((8, 14, 14, 1024), (3, 3, 16, 1024), 1, 64),  # ResNeXt-101 64x4d
        ((1, 32, 32, 64), (31, 31, 1, 64), 1, 64),  # RepLKNet
    ],
)
def test_programs_are_small(images, kernel, strides, groups):
    f = jax.grad(lambda x, k: conv2d(x, k, strides=strides, groups=groups).sum(), (0, 1))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (images, kernel)]
    assert len(jax.jit(f).lower(*shapes).as_text().splitlines()) < 1500
