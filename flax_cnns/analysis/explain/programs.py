"""Traced programs (jaxprs): their calls, their unused equations, and evaluating one equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core

CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "remat2", "checkpoint"}


def is_call(eqn: core.JaxprEqn) -> bool:
    """Whether an equation runs one program once, with its own inputs."""
    return eqn.primitive.name in CALLS and get_called(eqn) is not None


def get_called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the program of an equation that is a call."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return None if inner is None else close(inner)


def drop_unused(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Returns the program without the equations that its outputs do not need."""
    needed = {atom for atom in program.jaxpr.outvars if isinstance(atom, core.Var)}
    kept = []
    for eqn in reversed(program.jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed |= {atom for atom in eqn.invars if isinstance(atom, core.Var)}
    return core.ClosedJaxpr(program.jaxpr.replace(eqns=kept[::-1]), program.consts)


def close(program: core.ClosedJaxpr | core.Jaxpr) -> core.ClosedJaxpr:
    """Returns a program without constants as a closed one."""
    return program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, ())


def evaluate_equation(eqn: core.JaxprEqn, given: Sequence[Any]) -> list[Any]:
    """Returns the outputs of one equation for its inputs, with its own derivative."""
    variables = [(var, x) for var, x in zip(eqn.invars, given) if isinstance(var, core.Var)]
    unique = dict(variables)
    program = core.Jaxpr((), list(unique), eqn.outvars, [eqn], eqn.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*unique.values())
