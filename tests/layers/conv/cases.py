"""Convolutions to test, with reference results of XLA's convolution and of NumPy."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import lax

from flax_cnns.layers import inside_control_flow
from flax_cnns.layers.conv import conv2d
from flax_cnns.layers.conv.geometry import ConvGeometry

# Most of the time of these tests is compile time. Slow tests and tests on devices use `jax.jit`.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """A convolution; `channels` and `features` are the numbers per group."""

    size: tuple[int, int, int]  # images, height, width
    channels: int
    features: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    control_flow: bool = False

    def ours(self, x, kernel):
        fields = {"strides": self.strides, "padding": self.padding, "dilation": self.dilation}
        with inside_control_flow() if self.control_flow else contextlib.nullcontext():
            return conv2d(x, kernel, **fields, groups=self.groups)

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
        """Returns `padding` in the library's form: pairs, or a name."""
        if isinstance(self.padding, str):
            return self.padding
        sides = (self.padding,) * 2 if isinstance(self.padding, int) else self.padding
        return [(p, p) if isinstance(p, int) else p for p in sides]

    def out_shape(self):
        x = jax.ShapeDtypeStruct((*self.size, self.channels * self.groups), np.float32)
        shape = (*self.kernel, self.channels, self.features * self.groups)
        return jax.eval_shape(self.library, x, jax.ShapeDtypeStruct(shape, np.float32)).shape

    def operands(self, seed=0):
        """Returns x, the kernel, and the gradient of the output."""
        draw = np.random.RandomState(seed).randn
        x = draw(*self.size, self.channels * self.groups)
        kernel = draw(*self.kernel, self.channels, self.features * self.groups)
        return tuple(v.astype(np.float32) for v in (x, kernel, draw(*self.out_shape())))

    def geometry(self):
        spread = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation)]
        pads = self.pads()
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(self.size[1:], spread, self.strides, pads)
        return ConvGeometry(
            in_size=self.size[1:],
            kernel_size=self.kernel,
            out_size=self.out_shape()[1:3],
            strides=self.strides,
            padding=tuple(pads),
            dilation=self.dilation,
            groups=self.groups,
            control_flow=self.control_flow,
        )


def products(function):
    """Returns (x, kernel, dy) -> output and gradients in x and kernel of `function(x, kernel)`."""

    def all_three(x, kernel, dy):
        y, transpose = jax.vjp(function, x, kernel)
        return {"y": y, **dict(zip(("dx", "dkernel"), transpose(dy)))}

    return all_three


def exact(case, operands):
    """Computes the products in float64 by NumPy. Returns them and the error allowed for each."""
    x, kernel, dy = (v.astype(np.float64) for v in operands)
    g = case.geometry()
    kernel = kernel.reshape(*g.kernel_size, case.channels, g.groups, case.features)
    dy = dy.reshape(*dy.shape[:3], g.groups, case.features)
    x = x.reshape(*x.shape[:3], g.groups, case.channels)
    crops = [slice(max(0, -a), n - max(0, -b)) for n, (a, b) in zip(g.in_size, g.padding)]
    pads = [(max(0, a), max(0, b)) for a, b in g.padding]
    padded = np.pad(x[:, *crops], [(0, 0), *pads, (0, 0), (0, 0)])
    y, dpadded, dkernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    for tap in np.ndindex(*g.kernel_size):
        starts = [i * d for i, d in zip(tap, g.dilation)]
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, g.out_size, g.strides)]
        seen = (slice(None), *map(slice, starts, ends, g.strides))
        y += np.einsum("nhwgc,cgo->nhwgo", padded[seen], kernel[tap])
        dpadded[seen] += np.einsum("nhwgo,cgo->nhwgc", dy, kernel[tap])
        dkernel[tap] = np.einsum("nhwgc,nhwgo->cgo", padded[seen], dy)
    dx = np.zeros_like(x)
    inner = [slice(a, n - b) for n, (a, b) in zip(padded.shape[1:3], pads)]
    dx[:, *crops] = dpadded[:, *inner]
    results = {"y": y, "dx": dx, "dkernel": dkernel}
    shapes = (operands[2].shape, operands[0].shape, operands[1].shape)
    results = {name: v.reshape(shape) for (name, v), shape in zip(results.items(), shapes)}
    positions = np.prod(y.shape[:3])
    return results, {"y": 1e-5, "dx": 1e-5, "dkernel": 3e-5 if positions > 1e5 else 1e-5}


def error(result, reference):
    assert result.shape == reference.shape
    return np.abs(result - reference).max() / max(np.abs(reference).max(), 1e-30)


def same(ours, theirs, tolerance=1e-5):
    """Checks that two trees are equal up to rounding."""

    def check(a, b):
        assert a.dtype == b.dtype
        assert error(np.asarray(a), np.asarray(b)) < tolerance

    jax.tree.map(check, ours, theirs)


KINDS = {
    "dense": Case((2, 5, 4), 3, 4, strides=(2, 1), padding=1),
    "grouped": Case((2, 5, 4), 3, 2, groups=2, padding=1),
    "depthwise": Case((2, 4, 5), 1, 1, strides=(1, 2), groups=4, padding=1),
}
kinds = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def lowered(function, platform, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
