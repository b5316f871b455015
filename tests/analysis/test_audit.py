"""The audit of programs: steps that are wrong on purpose, and texts written by hand."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from flax_cnns.analysis import audit
from flax_cnns.analysis.audit import Finding
from flax_cnns.layers import Conv
from flax_cnns.train import parallel


class Net(nn.Module):
    """Two blocks of a convolution of ours, the second depthwise, and a synchronized BatchNorm."""

    dtype: type = jnp.bfloat16  # of the second convolution
    calls_host: bool = False
    reduces: bool = False  # has an all-reduce after each block

    @nn.compact
    def __call__(self, x):
        for name, dtype, groups in (("conv1", jnp.bfloat16, 1), ("conv2", self.dtype, 8)):
            conv = Conv(8, (3, 3), padding=1, feature_group_count=groups, dtype=dtype, name=name)
            x = conv(x)
            x = nn.BatchNorm(False, axis_name="batch", dtype=dtype, name=f"norm_{name}")(x)
            if self.reduces:
                x = lax.pmean(x, "batch")
        if self.calls_host:
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            x = x + lax.stop_gradient(jax.pure_callback(np.asarray, shape, lax.stop_gradient(x)))
        return nn.Dense(4, name="head")(x.mean((1, 2)).astype(jnp.float32))


def trace(net=None, *, donate=True, counter=1):
    """Traces a training step of `net` on two devices."""
    net = net or Net()

    def loss(params, stats, images):
        variables = {"params": params, "batch_stats": stats}
        logits, updates = net.apply(variables, images, mutable=["batch_stats"])
        return jnp.square(logits).mean(), updates["batch_stats"]

    def step(state, images):
        count, params, stats = state
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, images)
        grads, stats = lax.pmean((grads, stats), "batch")
        return count + counter, jax.tree.map(lambda p, g: p - g, params, grads), stats

    mesh = parallel.make_mesh(jax.devices()[:2])
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)

    def init(key):
        return net.clone(reduces=False, calls_host=False).init(key, jnp.zeros((2, 8, 8, 3)))

    # BatchNorm's mean over "batch" is left out of the initialization.
    shapes = jax.eval_shape(init, jax.random.key(0))
    state = (jax.ShapeDtypeStruct((), jnp.int32), shapes["params"], shapes["batch_stats"])
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=(0,) if donate else ()).trace(state, images)


def lower(traced, platform="cuda"):
    return traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


@pytest.fixture(scope="module")
def good():
    """(the traced step, its program for a GPU)."""
    traced = trace()
    return traced, lower(traced)


def check(traced, text, norms=2):
    return audit.check_lowered(
        text, norms=norms, convolutions=audit.list_convolutions(traced.jaxpr)
    )


def test_a_good_step_has_no_findings(good):
    traced, text = good
    assert check(traced, text) == []
    assert check(traced, lower(traced, "tpu")) == []
    names = audit.list_convolutions(traced.jaxpr)
    assert [audit.find_module(f"{name}/x") for name in names] == [
        *("conv1", "conv2"),  # forward, then the gradients; the images need none
        *("conv2", "conv2", "conv1"),
    ]
    assert audit.check_types(traced.jaxpr.in_avals, traced.jaxpr.out_avals, ["state[0]"]) == []


def test_a_float32_convolution_is_named():
    traced = trace(Net(dtype=jnp.float32))
    assert set(check(traced, lower(traced))) == {
        Finding("products", "convolution f32 x f32", "conv2")
    }


def test_the_head_may_be_float32_and_nothing_else(good):
    _, text = good
    findings = audit.check_lowered(text, norms=2, float32_modules="nothing")
    assert set(findings) == {Finding("products", "dot_general f32 x f32", "head")}
    assert audit.check_lowered(text, norms=2, float32_modules=None) == []


def test_a_call_of_the_host_is_named(good):
    traced = trace(Net(calls_host=True))
    assert audit.check_callbacks(traced.jaxpr) == [Finding("callbacks", "pure_callback", "")]
    assert audit.check_callbacks(good[0].jaxpr) == []
    text = lower(traced, "cpu")  # a callback for a GPU cannot be lowered without one
    (finding,) = [one for one in check(traced, text) if one.check == "callbacks"]
    assert "callback" in finding.op


def test_a_print_in_a_layer_is_named():
    traced = jax.jit(lambda x: jax.debug.print("{}", x)).trace(1.0)
    (finding,) = audit.check_callbacks(traced.jaxpr)
    assert finding.op.startswith("debug_")


def test_a_state_that_is_not_donated_is_named():
    traced = trace(donate=False)
    findings = check(traced, lower(traced))
    assert {one.check for one in findings} == {"donated"}
    assert len(findings) == 1 + 2 * 4 + 2 + 4  # the counter, parameters and statistics
    assert "conv1" in str(findings)


def test_all_reduces_of_layers_are_counted(good):
    traced, text = good
    assert check(traced, text, norms=1) == [
        Finding("all_reduces", "4 all-reduces, at most 2 expected", "norm_conv1")
    ]
    traced = trace(Net(reduces=True))
    (finding,) = check(traced, lower(traced))
    assert finding.op == "8 all-reduces, at most 4 expected"


def test_convolutions_as_a_cpu_computes_them_are_named(good):
    traced, _ = good
    findings = check(traced, lower(traced, "cpu"))
    assert {one.where for one in findings if one.check == "cpu_lowering"} == {"conv2"}


def test_a_state_of_another_type_is_named():
    traced = trace(counter=1.0)
    (finding,) = audit.check_types(
        traced.jaxpr.in_avals, traced.jaxpr.out_avals, ["state[0]", "state[1]"]
    )
    assert finding == Finding("one_trace", "takes int32[], returns ~float32[]", "state[0]")


def test_a_product_that_rounds_its_inputs_is_no_float32_product():
    """JAX's attention: the gradient of a bfloat16 product with a float32 result."""

    def loss(q):
        return jax.nn.dot_product_attention(q, q, q).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(jax.ShapeDtypeStruct((2, 4, 1, 8), jnp.bfloat16))
    text = lower(traced)
    assert "xf32>, tensor<2x4x1x8xbf16>) ->" in text
    assert audit.check_lowered(text) == []
    compiled = COMPILED.replace("dot(%i, %q)", "dot(%i, %q), algorithm=dot_bf16_bf16_f32")
    (finding,) = [one for one in audit.check_compiled(compiled) if "products" in one.check]
    assert finding.where == "stage1/conv"  # cuDNN's


# ---- compiled programs

COMPILED = """HloModule step, input_output_alias={ {0}: (0, {}, may-alias) }, entry={}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8], q: f32[8,4], i: f32[2,8]) -> (f32[8], f32[2,4]) {
  %p = f32[8]{0} parameter(0), metadata={op_name="state.params['a']"}
  %q = f32[8,4]{1,0} parameter(1), metadata={op_name="state.params['b']"}
  %i = f32[2,8]{1,0} parameter(2), metadata={op_name="batch['image']"}
  %h = f32[2,4]{1,0} dot(%i, %q), metadata={op_name="jit(s)/jvp(Net)/head/dot_general"}
  %m = f32[2,4]{1,0} dot(%i, %q), metadata={op_name="jit(s)/jvp(Net)/stage1/mlp/dot_general"}
  %w = bf16[8,4]{1,0} convert(%q)
  %v = bf16[2,8]{1,0} convert(%i)
  %n = f32[2,4]{1,0} dot(%v, %w), metadata={op_name="jit(s)/jvp(Net)/stage2/mlp/dot_general"}
  %k = (f32[2,4]{1,0}, u8[0]{0}) custom-call(%i, %q), custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(s)/transpose(jvp(Net))/stage1/conv/conv_general_dilated"}
  %o = f32[8]{0} custom-call(%p), custom_call_target="xla_ffi_python_gpu_callback", \
metadata={op_name="jit(s)/jvp(Net)/stage1/pure_callback"}
  %r = f32[8]{0} all-reduce(%p), to_apply=%sum, metadata={op_name="jit(s)/psum"}
  ROOT %t = (f32[8]{0}, f32[2,4]{1,0}) tuple(%r, %h)
}
"""


def test_the_findings_of_a_compiled_program():
    assert audit.check_compiled(COMPILED) == [
        Finding("aliased", "f32[8,4]{1,0} has a copy", "state.params['b']"),
        Finding("compiled_products", "dot f32 x f32", "stage1/mlp"),
        Finding("compiled_products", "__cudnn$convForward f32 x f32", "stage1/conv"),
        Finding("compiled_callbacks", "xla_ffi_python_gpu_callback", "stage1"),
    ]


def test_all_reduces_of_a_compiled_program_are_counted():
    line = next(line for line in COMPILED.splitlines() if "all-reduce(" in line)
    others = [
        line.replace("%r =", f"%r{i} =").replace("psum", f"jvp(Net)/norm{i}/psum")
        for i in range(audit.STEP_ALL_REDUCES + 1)
    ]
    text = COMPILED.replace(line, "\n".join([line, *others]))
    count = partial(audit.check_compiled, text, float32_modules=None)
    assert [one for one in count(norms=1) if one.check == "compiled_all_reduces"] == []
    (finding,) = [one for one in count() if one.check == "compiled_all_reduces"]
    assert finding.op == "6 all-reduces, at most 4 expected"


def test_shapes_of_a_tpu_are_read():
    """Layouts have parentheses there, also in the shapes of tuples."""
    tiled = "(f32[8]{0:T(256)}, f32[8]{0:T(256)})"
    lines = [
        f'  %s{i} = {tiled} all-reduce(%p, %p), to_apply=%sum, metadata={{op_name="jit(s)/psum"}}'
        for i in range(audit.STEP_ALL_REDUCES + 1)
    ]
    sent = "((f32[8]{0:T(256)}, u32[]{:S(2)}), token[]) send(%p, %z), is_host_transfer=true"
    text = COMPILED.replace("  %m =", "\n".join([*lines, f"  %x = {sent}", "  %m ="]))
    findings = audit.check_compiled(text)
    assert Finding("compiled_callbacks", "send", "") in findings
    assert Finding("compiled_all_reduces", "6 all-reduces, at most 4 expected", "jit(s)/psum") in (
        findings
    )


def test_a_real_compiled_program_reuses_the_state():
    """The state has copies unless it is donated."""

    def step(state, batch):
        return jax.tree.map(lambda x: x + batch.sum(), state)

    def compile(donated):
        zeros = jnp.zeros((8, 8))
        return jax.jit(step, donate_argnums=donated).lower({"a": zeros, "b": zeros}, zeros)

    assert audit.check_compiled(compile((0,)).compile().as_text()) == []
    wrong = audit.check_compiled(compile(()).compile().as_text())
    assert [(one.check, one.where) for one in wrong] == [
        *(("aliased", "state['a']"), ("aliased", "state['b']"))
    ]
