"""Follows the receptive fields of a program's values, by the rules of field_rules.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from flax_cnns.analysis.field_rules import (
    RULES,
    Value,
    collect_names,
    drop_axes,
    fail,
    get_shape,
    join,
    move_axes,
    split,
)

_CALLS = collect_names("""
    jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat
    remat2 checkpoint
""")
_MAX_LENGTH = 1000  # iterations of a scan, whose body is followed once for each


class Step(NamedTuple):
    """An equation of a program, with the fields of its operands and results."""

    equation: core.JaxprEqn
    operands: Sequence[Value]
    results: Sequence[Value]
    scopes: tuple[str, ...]  # names of `jax.named_scope` around it, from outside to inside


class Tracker:
    """Follows the fields of a program's values.

    `see` is called, in order, with each step of the program that depends on the images, also inside
    calls, branches and scans.
    """

    def __init__(self, see: Callable[[Step], None]):
        self._see = see
        self._scopes: tuple[str, ...] = ()

    def run(self, program: core.Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Returns the fields of the program's outputs."""
        values: dict[core.Var, Value] = dict(zip(program.invars, inputs))

        def read(var: core.Var | core.Literal) -> Value:
            return None if isinstance(var, core.Literal) else values.get(var)

        for eqn in program.eqns:
            given = [read(var) for var in eqn.invars]
            if not any(given):
                continue
            outside = self._scopes
            self._scopes = (*outside, *(each.name for each in eqn.source_info.name_stack.stack))
            found = self._apply(eqn, given)
            self._see(Step(eqn, given, found, self._scopes))
            self._scopes = outside
            # An array without values sees nothing.
            values |= {var: f for var, f in zip(eqn.outvars, found) if 0 not in get_shape(var)}
        return [read(var) for var in program.outvars]

    def _apply(self, eqn: core.JaxprEqn, given: Sequence[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in _CALLS and (inner := _get_program(eqn)) is not None:
            return self.run(inner, given[-len(inner.invars) :])
        if name == "cond":
            return self._branch(eqn, given)
        if name == "scan" and eqn.params["length"] <= _MAX_LENGTH:
            return self._scan(eqn, given)
        if name == "optimization_barrier":
            return given
        if name == "split":
            return split(eqn, given)
        rule = RULES.get(name)
        field = rule(eqn, given) if rule else fail(f"no rule for the operation {name}")
        return [field] * len(eqn.outvars)

    def _branch(self, eqn: core.JaxprEqn, given: Sequence[Value]) -> Sequence[Value]:
        branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
        if platforms:  # all compute the same, and the default is the simplest
            return self.run(branches[platforms.index(None)].jaxpr, given[1:])
        index, results = given[0], [self.run(each.jaxpr, given[1:]) for each in branches]
        if index is not None:
            return [fail("a branch is chosen by the image")] * len(eqn.outvars)
        return [join(each) for each in zip(*results)]

    def _scan(self, eqn: core.JaxprEqn, given: Sequence[Value]) -> Sequence[Value]:
        """Follows the body once for each iteration, from the fields that the one before left."""
        body = eqn.params["jaxpr"].jaxpr
        # JAX's versions store these counts under different names, so the axes tell: a carry has as
        # many outside the body as inside, and a scanned or stacked array has one more outside.
        n_carry = sum(_ndim(a) == _ndim(b) for a, b in zip(eqn.outvars, body.outvars))
        n_rows = sum(_ndim(a) > _ndim(b) for a, b in zip(eqn.invars, body.invars))
        n_consts = len(eqn.invars) - n_carry - n_rows
        consts, carry = given[:n_consts], list(given[n_consts : n_consts + n_carry])
        rows = [drop_axes(value, (0,)) for value in given[n_consts + n_carry :]]
        stacked: list[Value] = []
        for _ in range(eqn.params["length"]):
            out = self.run(body, [*consts, *carry, *rows])
            carry = out[:n_carry]
            stacked = [move_axes(value, lambda axis: axis + 1) for value in out[n_carry:]]
            if eqn.params["length"] > 1 and any(stacked):
                stacked = [fail("a scan stacks maps") if value else None for value in stacked]
        return [*carry, *stacked]


def _ndim(var: Any) -> int:
    return var.aval.ndim


def _get_program(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := eqn.params.get(key)) is not None:
            return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    return None
