"""Conv and conv2d: equal to the library's convolution in every shape, transformation and order of
derivative; nn.Conv's parameters, meaning and errors; nothing of the CPU's ways elsewhere."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_cnns.layers import Conv, cpu_conv
from flax_cnns.layers.conv import conv2d
from flax_cnns.layers.window import Window

# Most of the time here is the compiler's. The longest test and those on devices let it optimise.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """A convolution; `channels` and `features` are those of one group."""

    size: tuple[int, int, int]  # images, height, width
    channels: int
    features: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    control_flow: bool = False

    def ours(self, x, kernel, **more):
        fields = {"strides": self.strides, "padding": self.padding, "dilation": self.dilation}
        more = {"control_flow": self.control_flow, **more}
        return conv2d(x, kernel, **fields, groups=self.groups, **more)

    def library(self, x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.pads(),
            rhs_dilation=self.dilation,
            feature_group_count=self.groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def pads(self):
        """`padding` as the library wants it: pairs, or a name."""
        if isinstance(self.padding, str):
            return self.padding
        sides = (self.padding,) * 2 if isinstance(self.padding, int) else self.padding
        return [(p, p) if isinstance(p, int) else p for p in sides]

    def out_shape(self):
        x = jax.ShapeDtypeStruct((*self.size, self.channels * self.groups), np.float32)
        shape = (*self.kernel, self.channels, self.features * self.groups)
        return jax.eval_shape(self.library, x, jax.ShapeDtypeStruct(shape, np.float32)).shape

    def operands(self, seed=0):
        """x, kernel, the gradient of the output."""
        draw = np.random.RandomState(seed).randn
        x = draw(*self.size, self.channels * self.groups)
        kernel = draw(*self.kernel, self.channels, self.features * self.groups)
        return tuple(v.astype(np.float32) for v in (x, kernel, draw(*self.out_shape())))

    def window(self):
        spread = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation)]
        pads = self.pads()
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(self.size[1:], spread, self.strides, pads)
        return Window(
            in_size=self.size[1:],
            kernel=self.kernel,
            out_size=self.out_shape()[1:3],
            strides=self.strides,
            padding=tuple(pads),
            dilation=self.dilation,
            groups=self.groups,
            control_flow=self.control_flow,
        )


def products(function):
    """Of function(x, kernel): (x, kernel, dy) -> its output and the gradients to x and kernel."""

    def all_three(x, kernel, dy):
        y, transpose = jax.vjp(function, x, kernel)
        return {"y": y, **dict(zip(("dx", "dkernel"), transpose(dy)))}

    return all_three


def exact(case, operands):
    """All three products by the library in float64, and the error allowed to each."""
    with jax.enable_x64(True):
        operands = [jnp.asarray(v, jnp.float64) for v in operands]
        results = jax.device_get(quick_jit(products(case.library))(*operands))
    assert results["y"].dtype == np.float64
    places = np.prod(results["y"].shape[:3])
    return results, {"y": 1e-5, "dx": 1e-5, "dkernel": 3e-5 if places > 1e5 else 1e-5}


def error(result, reference):
    assert result.shape == reference.shape
    return np.abs(result - reference).max() / max(np.abs(reference).max(), 1e-30)


def same(ours, theirs, tolerance=1e-5):
    """Two trees are equal up to rounding."""

    def check(a, b):
        assert a.dtype == b.dtype
        assert error(np.asarray(a), np.asarray(b)) < tolerance

    jax.tree.map(check, ours, theirs)


# ---------------------------------------------------------------------------- equality

# What the random cases below are unlikely to meet.
CHOSEN = [
    Case((2, 11, 11), 264, 264, padding=0),  # many channels, odd maps
    Case((3, 9, 8), 256, 260, padding=((2, 0), (-1, 3))),
    Case((9, 32, 31), 40, 33),
    Case((2, 8, 9), 64, 64, strides=(2, 2), padding=1),
    Case((2, 8, 8), 33, 64, control_flow=True),
    Case((2, 34, 33), 4, 6, (7, 7), (2, 2), padding=3),  # a stem
    Case((2, 9, 9), 5, 4, (2, 5), dilation=(2, 1)),
    Case((2, 9, 9), 8, 8, (1, 1)),
    Case((2, 8, 7), 8, 6, (1, 1), (2, 3), padding=1),  # outputs that see padding alone
    Case((2, 9, 11), 3, 5, (4, 2), (4, 2), padding=0),  # patches, with pixels left over
    Case((2, 9, 8), 3, 5, (4, 3), (4, 3), padding=0),  # patches, with a rest
    Case((3, 1, 1), 16, 8),  # tiny maps: most taps see padding alone
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
    Case((8, 116, 116), 1, 1, groups=2),  # sums over more than 1e5 places
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


def wrong(cases):
    """[(case, error of each product)] where one is larger than allowed."""
    found = []
    for case in cases:
        operands = case.operands()
        references, allowed = exact(case, operands)
        results = jax.device_get(jax.jit(products(case.ours))(*operands))
        errors = {name: error(results[name], references[name]) for name in references}
        if any(errors[name] >= allowed[name] for name in errors):
            found.append((case, errors))
    return found


def test_a_few_shapes_equal_the_library_in_float64():
    """A stem, a pointwise one, patches, a dense one inside control flow, grouped and depthwise."""
    few = [CHOSEN[i] for i in (5, 7, 10, 20, 26)] + [Case((2, 8, 8), 9, 8, control_flow=True)]
    assert not wrong(few)


@pytest.mark.slow
def test_equals_the_library_in_float64_in_every_way(monkeypatch):
    monkeypatch.setattr(cpu_conv, "LEAST_WORK", 0)  # Winograd on tests' small shapes too
    reached = set()
    tables = {t: getattr(cpu_conv, t) for t in ("FORWARD", "INPUT_GRAD", "KERNEL_GRAD")}
    for table, ways in tables.items():
        for name, way in list(ways.items()):

            def seen(*args, way=way, label=(table, name)):
                reached.add(label)
                return way(*args)

            monkeypatch.setitem(ways, name, seen)

    assert not wrong(CASES)
    assert reached == {(table, name) for table, ways in tables.items() for name in ways}


# By name, whatever the choice is today. A way that is missing here fails the test below.
DENSE = Case((2, 7, 6), 5, 4, padding=((1, 0), (2, 1)))
POINTWISE = Case((2, 5, 4), 3, 6, (1, 1), (2, 1), padding=1)
PATCHES = Case((2, 7, 6), 3, 4, (3, 2), (3, 2), padding=0)
STRIDED = Case((2, 7, 8), 3, 4, (3, 4), (2, 3), padding=((1, 2), (-1, 2)), dilation=(2, 1))
GROUPED = Case((2, 6, 5), 3, 3, strides=(2, 1), padding=1, groups=4)
WIDENING = Case((2, 5, 6), 4, 6, (2, 3), padding=1, dilation=(1, 2), groups=3)
DEPTHWISE = Case((2, 6, 7), 1, 1, (5, 3), (2, 2), groups=6)
MULTIPLIED = Case((2, 6, 5), 1, 2, groups=5, padding=((0, 3), (1, -1)))
TINY = Case((2, 1, 2), 4, 3)
PATCHES = Case((2, 7, 6), 3, 4, (3, 2), (3, 2), padding=0)
NAMED = {
    DENSE: {"library", "shifted", "winograd"},
    TINY: {"library", "shifted", "winograd"},
    PATCHES: {"library", "shifted", "patches"},
    POINTWISE: {"library", "shifted", "pointwise"},
    STRIDED: {"library", "shifted"},
    GROUPED: {"library", "batched", "blocks", "rotated"},
    WIDENING: {"library", "batched", "blocks"},
    DEPTHWISE: {"library", "batched", "blocks", "rotated", "depthwise"},
    MULTIPLIED: {"library", "batched", "blocks", "depthwise"},
}


def test_every_way_is_tested_by_name():
    named = {"phases"}.union(*NAMED.values())
    assert named >= {*cpu_conv.FORWARD, *cpu_conv.KERNEL_GRAD, *cpu_conv.INPUT_GRAD}


@pytest.mark.parametrize("case", NAMED, ids=lambda c: f"{c.size[1]}x{c.size[2]}-{c.groups}")
def test_each_way_that_may_serve_a_shape_is_right(case):
    window, names = case.window(), {"phases", *NAMED[case]}
    operands = case.operands()
    references, _ = exact(case, operands)

    def ways(x, kernel, dy):
        turned = cpu_conv.FORWARD if case.groups == 1 else {}
        mirror = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
        return {
            "y": {n: f(x, kernel, window) for n, f in cpu_conv.FORWARD.items() if n in names},
            "turned": {n: f(x, mirror, window, True) for n, f in turned.items() if n in names},
            "dx": {n: f(dy, kernel, window) for n, f in cpu_conv.INPUT_GRAD.items() if n in names},
            "dkernel": {n: f(x, dy, window) for n, f in cpu_conv.KERNEL_GRAD.items() if n in names},
        }

    for product, results in jax.device_get(quick_jit(ways)(*operands)).items():
        for name, result in results.items():
            reference = references["y" if product == "turned" else product]
            assert error(result, reference) < 1e-5, (product, name)


# ---------------------------------------------------------------------------- precision

KINDS = {
    "dense": Case((2, 5, 4), 3, 4, strides=(2, 1), padding=1),
    "grouped": Case((2, 5, 4), 3, 2, groups=2, padding=1),
    "depthwise": Case((2, 4, 5), 1, 1, strides=(1, 2), groups=4, padding=1),
}
kinds = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_float32_rounded(case, dtype):
    operands = [jnp.asarray(v, dtype) for v in case.operands()]
    results = quick_jit(products(case.ours))(*operands)
    wide = quick_jit(products(case.library))(*(v.astype(jnp.float32) for v in operands))
    for name, result in results.items():
        assert result.dtype == dtype
        np.testing.assert_allclose(
            np.float32(result), wide[name], rtol=float(jnp.finfo(dtype).eps), atol=1e-5
        )


@kinds
def test_float64_stays_float64(case):
    operands = case.operands()
    references, _ = exact(case, operands)
    with jax.enable_x64(True):
        operands = [jnp.asarray(v, jnp.float64) for v in operands]
        same(quick_jit(products(case.ours))(*operands), references, 1e-13)


def test_computing_in_bfloat16_leaves_float32_parameters_and_their_gradients():
    conv = Conv(4, (3, 3), dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 2))
    params = conv.init(jax.random.key(0), x)
    grads = jax.eval_shape(jax.grad(lambda p: conv.apply(p, x).astype(jnp.float32).sum()), params)
    assert conv.apply(params, x).dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves([params, grads])} == {jnp.dtype(jnp.float32)}


# ---------------------------------------------------------------------------- derivatives


@kinds
def test_higher_derivatives_are_those_of_the_library(case):
    case = case._replace(size=(1, 3, 4))
    x, kernel, _ = case.operands()
    tangents = case.operands(seed=1)[:2]

    def derivatives(convolve):
        loss = lambda x, kernel: jnp.sin(convolve(x, kernel)).sum()  # noqa: E731
        grad = jax.grad(loss, (0, 1))
        squares = lambda *v: sum((g**2).sum() for g in grad(*v))  # noqa: E731
        return quick_jit(
            lambda *v: {
                "jvp": jax.jvp(convolve, v, tangents),
                "reverse over reverse": jax.grad(squares, (0, 1))(*v),
                "forward over reverse": jax.jvp(grad, v, tangents)[1],
                "reverse over forward": jax.grad(lambda *u: jax.jvp(loss, u, tangents)[1])(*v),
                "hessian": jax.hessian(loss, (0, 1))(*v),
            }
        )

    # The sine's argument is off by rounding, and so is its slope.
    same(derivatives(case.ours)(x, kernel), derivatives(case.library)(x, kernel), 1e-4)


# ---------------------------------------------------------------------------- vmap and jit

MAPPED = {  # in_axes of (x, kernel); the axes of the mapped arrays, two where it is nested
    "images": [(0, None)],
    "images, last axis": [(-1, None)],
    "kernels": [(None, 0)],
    "kernels, third axis": [(None, 2)],
    "both": [(1, 3)],
    "images of images": [(0, None), (2, None)],
    "kernels of images": [(0, None), (None, 1)],
    "both of both": [(0, 0), (1, -1)],
}


@pytest.mark.parametrize("case", [KINDS["dense"], KINDS["grouped"]], ids=["dense", "grouped"])
def test_vmap(case):
    def mapped(convolve, name):
        function, operands = products(convolve), case.operands()
        for size, (x, kernel) in zip((2, 3), MAPPED[name]):
            axes = (x, kernel, 0)  # every output is mapped
            function = jax.vmap(function, axes, out_axes=1)
            operands = [
                v if a is None else np.stack([v * (n - 0.5) for n in range(size)], a)
                for v, a in zip(operands, axes)
            ]
        return function(*operands)

    everything = lambda f: quick_jit(lambda: {name: mapped(f, name) for name in MAPPED})()  # noqa: E731
    same(everything(case.ours), everything(case.library))


@kinds
def test_gradients_of_each_example(case):
    x, kernel, _ = case.operands()

    def each(convolve):
        loss = lambda k, x: jnp.sin(convolve(x[None], k)).sum()  # noqa: E731
        return quick_jit(jax.vmap(jax.grad(loss), (None, 0)))(kernel, x)

    same(each(case.ours), each(case.library))


# ---------------------------------------------------------------------------- inside Flax


class Transformed(nn.Module):
    """Three convolutions: rematerialised, under a branch that runs, and scanned over."""

    conv: Any

    @nn.compact
    def __call__(self, x, kept):
        x = nn.remat(self.conv)(4, (3, 3), name="remat")(x)
        branch = self.conv(4, (3, 3), feature_group_count=2, name="branch")
        branch(x)  # both branches need the parameters
        x = nn.cond(kept, lambda conv, x: conv(x), lambda conv, x: x, branch, x)
        run = nn.scan(
            lambda conv, x, _: (nn.relu(conv(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return run(self.conv(4, (3, 3), name="scanned"), x, None)[0]


@pytest.mark.parametrize("control_flow", [False, True])
def test_under_remat_cond_and_scan(control_flow):
    x = np.random.RandomState(0).randn(2, 4, 4, 4).astype(np.float32)
    theirs, ours = Transformed(nn.Conv), Transformed(partial(Conv, control_flow=control_flow))
    params = theirs.init(jax.random.key(0), x, True)

    def run(model):
        loss = lambda p, x, kept: jnp.sin(model.apply(p, x, kept)).sum()  # noqa: E731
        step = quick_jit(jax.value_and_grad(loss, (0, 1)))
        return [step(params, x, kept) for kept in (True, False)]

    same(run(ours), run(theirs))


def test_equal_fields_make_equal_modules_and_a_copy_may_change_control_flow():
    assert Conv(4, (3, 3)) == Conv(4, (3, 3))
    assert hash(Conv(4, (3, 3))) == hash(Conv(4, (3, 3)))
    copy = Conv(4, (3, 3)).clone(control_flow=True)
    assert copy == Conv(4, (3, 3), control_flow=True)
    assert copy != Conv(4, (3, 3))


# ---------------------------------------------------------------------------- several devices


@pytest.fixture(scope="module")
def batch():
    """A case with an image for each of four devices, its operands and its products."""
    case = Case((4, 5, 4), 2, 3, groups=2, padding=1)
    operands = case.operands()
    return case, operands, jax.jit(products(case.library))(*operands)


def summed(case, x, kernel, dy):
    """On one device: its share of the output and of dx, the kernel's whole gradient."""
    results = products(case.ours)(x, kernel, dy)
    return {**results, "dkernel": lax.psum(results["dkernel"], "batch")}


def test_pmap(batch):
    case, (x, kernel, dy), expected = batch
    step = jax.pmap(partial(summed, case), "batch", in_axes=(0, None, 0))
    results = step(x[:, None], kernel, dy[:, None])
    results["dkernel"] = results["dkernel"][0]
    same({n: v.reshape(expected[n].shape) for n, v in results.items()}, expected)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(batch, check_vma):
    case, operands, expected = batch
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    # Where JAX keeps account of what varies, the gradient of what all share arrives summed.
    step = products(case.ours) if check_vma else partial(summed, case)
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("batch"), P(), P("batch")),
        out_specs={"y": P("batch"), "dx": P("batch"), "dkernel": P()},
        check_vma=check_vma,
    )
    same(jax.jit(step)(*operands), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_jit_on_a_sharded_batch(batch, axis_type):
    case, operands, expected = batch
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(axis_type,))
    specs = (P("batch"), P(), P("batch"))
    operands = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(operands, specs)]
    program = jax.jit(products(case.ours)).lower(*operands).compile()
    results = program(*operands)
    same(results, expected)
    assert results["y"].sharding.shard_shape(results["y"].shape)[0] == 1
    if axis_type == AxisType.Auto:  # each device convolves its own images; the library's gathers
        assert "all-gather" not in program.as_text()


# ---------------------------------------------------------------------------- lowering


def lowered(function, platform, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def operations(text):
    """Every operation of a lowered program that computes, without the names of its values."""
    lines = [re.sub(r"%\w+|^\s*return.*", "", line).strip() for line in text.splitlines()]
    return sorted(line for line in lines if "stablehlo." in line)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("control_flow", [False, True])
@kinds
def test_accelerators_run_the_library_and_nothing_else(case, control_flow, platform):
    case = case._replace(control_flow=control_flow)
    operands = [v.astype(jnp.bfloat16) for v in case.operands()]
    forward = lowered(case.ours, platform, *operands[:2])
    assert operations(forward) == operations(lowered(case.library, platform, *operands[:2]))
    assert [line.split("(")[0] for line in operations(forward)] == ["= stablehlo.convolution"]
    ours = operations(lowered(products(case.ours), platform, *operands))
    assert ours == operations(lowered(products(case.library), platform, *operands))
    assert sum("stablehlo.convolution" in line for line in ours) == 3


def test_one_export_serves_every_platform_and_number_of_images():
    case = KINDS["grouped"]
    x, kernel, dy = case.operands()
    (images,) = jax.export.symbolic_shape("images")
    shapes = [jax.ShapeDtypeStruct((images, *v.shape[1:]), v.dtype) for v in (x, dy)]
    export = jax.export.export(jax.jit(products(case.ours)), platforms=("cpu", "cuda", "tpu"))(
        shapes[0], kernel, shapes[1]
    )
    same(export.call(x, kernel, dy), jax.jit(products(case.library))(x, kernel, dy))


def test_an_export_for_every_size_of_image_is_the_librarys():
    case = KINDS["grouped"]
    x, kernel, _ = case.operands()
    height, width = jax.export.symbolic_shape("height, width")
    shape = jax.ShapeDtypeStruct((len(x), height, width, x.shape[-1]), x.dtype)
    export = jax.export.export(jax.jit(case.ours))(shape, kernel)
    same(export.call(x, kernel), jax.jit(case.library)(x, kernel))


def test_control_flow_leaves_no_convolution_to_a_cpu():
    for case in CASES:
        case = case._replace(control_flow=True)
        text = lowered(products(case.ours), "cpu", *case.operands())
        assert "stablehlo.convolution" not in text, case


# ---------------------------------------------------------------------------- against nn.Conv

SHAPE = (2, 6, 5, 4)
FIELDS = {
    "default": {},
    "no bias": {"use_bias": False},
    "strides": {"strides": 2},
    "two strides": {"strides": (1, 2)},
    "list of strides": {"kernel_size": [3, 2], "strides": [2, 1]},
    "no strides": {"strides": None},
    "VALID": {"padding": "VALID"},
    "CIRCULAR": {"padding": "CIRCULAR"},
    "REFLECT": {"padding": "REFLECT", "kernel_dilation": 2},
    "padding": {"padding": 2, "strides": 2},
    "two paddings": {"padding": (1, 0)},
    "pairs": {"padding": ((0, 2), (1, -1))},
    "dilated kernel": {"kernel_dilation": (2, 1)},
    "dilated input": {"input_dilation": (1, 2), "padding": 1},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4, "features": 8},
    "mask": {"mask": np.tri(4, 6, dtype=np.float32) * np.ones((3, 3, 1, 1), np.float32)},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16, "param_dtype": jnp.float16},
    "precision": {"precision": "highest"},
    "bias": {"bias_init": nn.initializers.normal(1.0)},
    "one dimension": {"kernel_size": (3,), "padding": "CAUSAL"},
    "an int is one dimension": {"kernel_size": 3},
    "three dimensions": {"kernel_size": (1, 2, 3)},
}
SHAPES = {"one dimension": (2, 7, 4), "three dimensions": (1, 3, 4, 5, 4)}


@pytest.mark.parametrize("name", FIELDS)
def test_has_the_parameters_and_results_of_flax(name):
    x = np.random.RandomState(0).randn(*SHAPES.get(name, SHAPE)).astype(np.float32)
    fields = {"features": 6, "kernel_size": (3, 3), **FIELDS[name]}
    run = lambda conv: conv(**fields).init_with_output(jax.random.key(0), x)  # noqa: E731
    (ours, own), (theirs, params) = quick_jit(lambda: (run(Conv), run(nn.Conv)))()
    assert jax.tree.structure(own) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, own, params)
    half = ours.dtype.itemsize == 2  # summed in half precision by the library
    same(np.float32(ours), np.float32(theirs), 2e-2 if half else 1e-5)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("shape", [(6, 5, 4), (2, 1, 3, 6, 5, 4), (2, 0, 6, 5, 4)])
def test_batches_of_any_rank(shape):
    x = np.random.RandomState(0).randn(*shape).astype(np.float32)
    conv = Conv(3, (3, 3), strides=2)
    params = conv.init(jax.random.key(0), np.zeros(SHAPE, np.float32))
    loss = lambda conv: lambda p, x: (lambda y: (jnp.sin(y).sum(), y))(conv.apply(p, x))  # noqa: E731
    ours, theirs = (
        jax.grad(loss(c), (0, 1), has_aux=True)(params, x)
        for c in (conv, nn.Conv(3, (3, 3), strides=2))
    )
    assert ours[1].shape == (*shape[:-3], 3, 3, 3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


WRONG = {
    "groups of channels": {"feature_group_count": 3},
    "groups of features": {"feature_group_count": 4},
    "unknown padding": {"padding": "SAMEE"},
    "three paddings": {"padding": (1, 1, 1)},
    "three strides": {"strides": (1, 1, 1)},
    "no stride": {"strides": 0},
    "stride backwards": {"strides": -1},
    "no dilation": {"kernel_dilation": 0},
    "three dilations": {"kernel_dilation": (1, 1, 1)},
    "cropped to nothing": {"padding": -4},
    "mask": {"mask": np.ones((3, 3))},
    "no features": {"features": -1},
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", WRONG)
def test_bad_fields_get_the_error_of_flax(name):
    def message(conv):
        with pytest.raises((AssertionError, TypeError, ValueError, RuntimeError)) as caught:
            conv(**{"features": 6, "kernel_size": (3, 3), **WRONG[name]}).init(
                jax.random.key(0), jnp.ones(SHAPE)
            )
        return caught.type, re.sub(r"loc\(.*\)", "", str(caught.value))

    assert message(Conv) == message(nn.Conv)


def test_bad_operands_get_the_error_of_the_library():
    x, kernel = jnp.ones(SHAPE), jnp.ones((3, 3, 4, 6))
    for x_, kernel_, fields, type_, text in [
        (x, kernel[:, :, :3], {}, ValueError, "feature dimension size .* 4 // 1 != 3"),
        (x, kernel[0], {}, TypeError, "ndim to be equal, got 4 and 3"),
        (x[0], kernel, {}, TypeError, "ndim to be equal, got 3 and 4"),
        (x, kernel.astype(jnp.bfloat16), {}, TypeError, "same dtypes, got float32, bfloat16"),
        (x, kernel[:, :, :2], {"groups": 4}, ValueError, "4 // 4 != 2"),
        (x, kernel, {"padding": "CIRCULAR"}, RuntimeError, "expected 'VALID', 'SAME'"),
        (x, kernel, {"padding": (1, 2, 3)}, TypeError, "explicit pads .* expected 2, got 3"),
        (x, kernel, {"strides": (1, 1, 1)}, ValueError, "broadcast"),
        (x, kernel, {"dilation": (1,)}, ValueError, "window-dilation .* got: 1"),
    ]:
        with pytest.raises(type_, match=text):
            conv2d(x_, kernel_, **fields)


def test_a_kernel_that_does_not_fit_sees_nothing_as_in_flax():
    x = jnp.ones(SHAPE)
    for conv in (Conv, nn.Conv):
        y, _ = conv(6, (7, 7), padding="VALID").init_with_output(jax.random.key(0), x)
        assert y.shape == (2, 0, 0, 6)


def test_integers_and_complex_numbers_are_the_libraries():
    for dtype in (jnp.int32, jnp.complex64):
        x, kernel = jnp.ones(SHAPE, dtype), jnp.ones((3, 3, 4, 6), dtype)
        same(conv2d(x, kernel), Case(SHAPE[:3], 4, 6).library(x, kernel))


# ---------------------------------------------------------------------------- found in review


@pytest.mark.parametrize("strides", [1, 2])
def test_varying_gradients_of_the_library_s_way(strides):
    """check_vma=True, and shapes that go to the library on a CPU too: nothing is summed twice."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(0), (2, 20, 20, 8))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))
    grads = jax.grad(lambda x, k: jnp.sum(conv2d(x, k, strides=strides) ** 2), (0, 1))
    specs = (P("batch"), P())
    mapped = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=specs)
    for ours, expected in zip(jax.jit(mapped)(x, kernel), jax.jit(grads)(x, kernel)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-3)


def test_without_jit_and_without_examples():
    x, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
    with jax.disable_jit():
        y, grads = jax.value_and_grad(lambda k: conv2d(x, k).sum())(kernel)
    assert y == conv2d(x, kernel).sum()
    assert grads.shape == kernel.shape
    assert jax.vmap(conv2d, (0, None))(jnp.ones((0, *x.shape)), kernel).shape == (0, 2, 5, 5, 4)


@pytest.mark.parametrize(
    ("images", "kernel", "strides", "groups"),
    [
        ((8, 224, 224, 3), (32, 32, 3, 768), 32, 1),  # ViT's patches
        ((8, 14, 14, 1024), (3, 3, 16, 1024), 1, 64),  # ResNeXt-101 64x4d
        ((1, 32, 32, 64), (31, 31, 1, 64), 1, 64),  # RepLKNet
    ],
)
def test_what_is_compiled_stays_small(images, kernel, strides, groups):
    f = jax.grad(lambda x, k: conv2d(x, k, strides=strides, groups=groups).sum(), (0, 1))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (images, kernel)]
    assert len(jax.jit(f).lower(*shapes).as_text().splitlines()) < 1500
