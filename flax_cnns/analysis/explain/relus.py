"""Finds the ReLUs of a traced program, also those written without `nn.relu`.

A ReLU is a call named relu or relu6, max(x, 0), min(max(x, 0), c), where(x > 0, x, 0) or
x * (x > 0). max(x, 0) under a root or in a divisor is not an activation: norms keep their variance
above 0 with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from flax_cnns.analysis.explain import programs

HIGHEST = {"relu": np.inf, "relu6": 6.0}  # the value above which the activation is flat
# Calls and primitives that are activations or gates of another kind.
_OTHERS = {
    *("silu", "swish", "gelu", "sigmoid", "hard_silu", "hard_swish", "hard_sigmoid", "elu", "selu"),
    *("celu", "softplus", "leaky_relu", "mish", "softmax", "log_softmax", "hard_tanh"),
    *("squareplus", "soft_sign", "log_sigmoid", "glu", "tanh", "logistic", "erf", "exp"),
    *("sin", "cos", "atan"),
}
# Equations with one input, whose output has the input's values.
_COPIES = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "copy"}
_COMPARISONS = {"gt": True, "ge": True, "lt": False, "le": False}  # whether x > c, for (x, c)


class Activation(NamedTuple):
    """What an equation computes: the activation `name` of its operand number `read`."""

    name: str  # "relu", or another activation's name
    read: int = 0
    lowest: float = 0.0  # a ReLU is flat below this value, and above `highest`
    highest: float = np.inf


class Program:
    """A traced program, and what is known about its values.

    `constants`: for each input, the value that all its elements are known to have, or None.
    """

    def __init__(self, program: core.ClosedJaxpr, constants: Sequence[float | None] = ()):
        self.program = program
        self._constants: dict[core.Var, float] = {}
        self._made: dict[core.Var, core.JaxprEqn] = {}
        self._used: dict[core.Var, list[core.JaxprEqn]] = {}
        jaxpr = program.jaxpr
        known = [*zip(jaxpr.invars, constants)]
        known += [
            (var, _get_single_value(value)) for var, value in zip(jaxpr.constvars, program.consts)
        ]
        self._constants = {var: value for var, value in known if value is not None}
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                self._made[var] = eqn
            for atom in eqn.invars:
                if isinstance(atom, core.Var):
                    self._used.setdefault(atom, []).append(eqn)
            if eqn.primitive.name in _COPIES:
                value = self.get_constant(eqn.invars[0])
                if value is not None:
                    self._constants[eqn.outvars[0]] = value

    def get_constant(self, atom: core.Var | core.Literal) -> float | None:
        """Returns the value that all elements of an array have, None if it is not known."""
        if isinstance(atom, core.Literal):
            return _get_single_value(atom.val)
        return self._constants.get(atom)

    def find_activation(self, eqn: core.JaxprEqn) -> Activation | None:
        """Returns the activation that an equation is, or None."""
        name = eqn.params.get("name")
        if name in HIGHEST and len(eqn.invars) == 1:
            return Activation("relu", highest=HIGHEST[name])
        for other in (name, eqn.primitive.name):
            if other in _OTHERS:
                return Activation(other)
        if eqn.primitive.name == "max":
            return self._find_max(eqn)
        if eqn.primitive.name == "min":
            return self._find_bound(eqn)
        if eqn.primitive.name == "mul":
            return self._find_masked(eqn)
        if eqn.primitive.name == "select_n" or name == "_where":
            return self._find_choice(eqn)
        return None

    def list_activations(self) -> Iterator[str]:
        """Yields the names of all activations, also in the programs that this one calls."""
        for eqn in self.program.jaxpr.eqns:
            if found := self.find_activation(eqn):
                yield found.name
            else:
                for inner in self.list_programs(eqn):
                    yield from inner.list_activations()

    def list_programs(self, eqn: core.JaxprEqn) -> Iterator[Program]:
        """Yields the programs among an equation's parameters: of calls, branches and loops."""
        constants = [self.get_constant(atom) for atom in eqn.invars]
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                    yield Program(programs.close(inner), constants if programs.is_call(eqn) else ())

    def _find_max(self, eqn: core.JaxprEqn) -> Activation | None:
        for read, other in ((0, 1), (1, 0)):
            value = self.get_constant(eqn.invars[other])
            if value is not None and np.isfinite(value) and not self._is_guard(eqn):
                return Activation("relu" if value == 0 else f"max(x, {value:g})", read)
            made = self._get_maker(eqn.invars[other])
            if (
                made is not None
                and made.primitive.name == "mul"
                and eqn.invars[read] in made.invars
            ):
                factors = [self.get_constant(atom) for atom in made.invars]
                if any(factor is not None for factor in factors):
                    return Activation("leaky_relu")
        return None

    def _find_bound(self, eqn: core.JaxprEqn) -> Activation | None:
        """Returns the upper bound of a ReLU, as in min(max(x, 0), 6)."""
        for read, other in ((0, 1), (1, 0)):
            value, made = self.get_constant(eqn.invars[other]), self._get_maker(eqn.invars[read])
            below = self.find_activation(made) if made is not None and value is not None else None
            if below is not None and below.name == "relu":
                assert value is not None
                return Activation("relu", read, lowest=-np.inf, highest=value)
        return None

    def _find_masked(self, eqn: core.JaxprEqn) -> Activation | None:
        for read, other in ((0, 1), (1, 0)):
            made = self._get_maker(eqn.invars[other])
            if made is not None and made.primitive.name == "convert_element_type":
                compared = self._find_comparison(made.invars[0])
                if compared is not None and compared[0] is eqn.invars[read]:
                    exact = compared[1:] == (0, True)
                    return Activation("relu" if exact else "x * (x > c)", read)
        return None

    def _find_choice(self, eqn: core.JaxprEqn) -> Activation | None:
        if len(eqn.invars) != 3 or self._is_guard(eqn):
            return None
        compared = self._find_comparison(eqn.invars[0])
        if compared is None:
            return None
        x, value, above = compared
        upper = 2 if above == (eqn.primitive.name == "select_n") else 1
        lower = 3 - upper
        if value == 0 and eqn.invars[upper] is x and self.get_constant(eqn.invars[lower]) == 0:
            return Activation("relu", upper)
        return (
            Activation("where(x > c, ...)") if any(x is atom for atom in eqn.invars[1:]) else None
        )

    def _get_maker(self, atom: core.Var | core.Literal) -> core.JaxprEqn | None:
        """Returns the equation that made a value; None for inputs and constants."""
        return None if isinstance(atom, core.Literal) else self._made.get(atom)

    def _find_comparison(self, atom: Any) -> tuple[Any, float, bool] | None:
        """Returns (x, c, whether x is above) of a comparison of x with the constant c."""
        eqn = self._get_maker(atom)
        if eqn is None or eqn.primitive.name not in _COMPARISONS:
            return None
        above = _COMPARISONS[eqn.primitive.name]
        first, second = map(self.get_constant, eqn.invars)
        if second is not None:
            return eqn.invars[0], second, above
        return None if first is None else (eqn.invars[1], first, not above)

    def _is_guard(self, eqn: core.JaxprEqn) -> bool:
        """Whether all that reads the output is a root, a logarithm or a quotient."""
        readers = self._used.get(eqn.outvars[0], [])
        for reader in readers:
            name = reader.primitive.name
            if name in _COPIES or name == "add":
                if not self._is_guard(reader):
                    return False
            elif name == "div":
                if reader.invars[1] is not eqn.outvars[0]:
                    return False
            elif name not in ("rsqrt", "sqrt", "log", "pow"):
                return False
        return bool(readers)


def _get_single_value(array: Any) -> float | None:
    """Returns the value of a number, or of an array with one value everywhere."""
    if isinstance(array, jax.core.Tracer) or not hasattr(array, "dtype"):
        return float(array) if isinstance(array, bool | int | float) else None
    if not jnp.issubdtype(array.dtype, jnp.number) or not np.size(array):
        return None
    values = np.asarray(array).astype(np.float64).ravel()
    return float(values[0]) if (values == values[0]).all() else None
