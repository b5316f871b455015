"""The three primitives give the library's results in each precision, transformation and derivative.

They do so on several devices too, and accelerators run none of the CPU's algorithms.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_cnns.layers import Conv
from flax_cnns.layers.conv import conv2d
from tests.layers.conv.cases import KINDS, Case, exact, kinds, lowered, products, quick_jit, same

# ---------------------------------------------------------------------------- precision


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
                **({} if case.groups > 1 else {"hessian": jax.hessian(loss, (0, 1))(*v)}),
            }
        )

    # The argument of the sine has rounding errors, and so does its slope.
    same(derivatives(case.ours)(x, kernel), derivatives(case.library)(x, kernel), 1e-4)


# ---------------------------------------------------------------------------- vmap and jit

MAPPED = {  # in_axes of (x, kernel), once for each nested vmap
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

    names = MAPPED if case.groups == 1 else ("images", "kernels, third axis", "both of both")
    everything = lambda f: quick_jit(lambda: {name: mapped(f, name) for name in names})()  # noqa: E731
    same(everything(case.ours), everything(case.library))


@kinds
def test_gradients_of_each_example(case):
    x, kernel, _ = case.operands()

    def each(convolve):
        loss = lambda k, x: jnp.sin(convolve(x[None], k)).sum()  # noqa: E731
        return quick_jit(jax.vmap(jax.grad(loss), (None, 0)))(kernel, x)

    same(each(case.ours), each(case.library))


# ---------------------------------------------------------------------------- several devices


@pytest.fixture(scope="module")
def batch():
    """A case with one image for each of four devices, its operands and its products."""
    case = Case((4, 5, 4), 2, 3, groups=2, padding=1)
    operands = case.operands()
    return case, operands, jax.jit(products(case.library))(*operands)


def summed(case, x, kernel, dy):
    """On one device, returns its part of the output and of dx, and the kernel's whole gradient."""
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
    # With check_vma, JAX adds the kernel's gradients of all devices by itself.
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


def operations(text):
    """Returns the operations of a lowered program, without the names of values."""
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


# ---------------------------------------------------------------------------- regressions


@pytest.mark.parametrize("strides", [1, 2])
def test_varying_gradients_of_the_library(strides):
    """With check_vma=True, gradients are not added twice. With these shapes, a CPU uses the library
    too."""
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
