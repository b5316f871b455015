"""Checks the text of a program for what makes a training step slow or wrong on an accelerator.

`check_lowered` reads StableHLO (`lowered.as_text(debug_info=True)`), which is the program that JAX
asks for; `check_compiled` reads HLO (`compiled.as_text()`), which is what the compiler made of it.
Both return findings, each with the operation and the module that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flax_cnns.analysis.hlo import read_traffic

# All-reduces of a compiled step that are not of a norm: gradients, statistics and sums together.
STEP_ALL_REDUCES = 4
# The checks, and what they demand.
CHECKS = {
    "products": "no convolution or matrix product in float32, except in the head",
    "callbacks": "no call of the host",
    "cpu_lowering": "every convolution of `layers.Conv` is XLA's convolution",
    "donated": "every array of the training state is donated",
    "one_trace": "the step returns a state of the types that it takes",
    "all_reduces": "in the network: none, or at most two per synchronized norm",
    "compiled_products": "as products, in the compiled program",
    "compiled_callbacks": "as callbacks, in the compiled program",
    "aliased": "the results of the compiled program reuse the memory of the state",
    "compiled_all_reduces": f"at most two per synchronized norm, and {STEP_ALL_REDUCES} in all",
}
OF_TRACE = ("callbacks", "one_trace")  # these checks need no lowered program
# Modules that compute in float32 on purpose: the classifier head and auxiliary heads.
# MobileNetV3's hidden layer comes after the pooling, and is part of its head.
FLOAT32_MODULES = r"(?:.*/)?(?:aux\w*/.*|(?:head|logits|classifier|hidden_layer)\w*(?:/.*)?)"
_OUR_CONVOLUTIONS = ("conv2d", "conv2d_input_grad", "conv2d_kernel_grad")
_WIDE = ("f32", "f64")
_PRODUCTS = ("convolution", "dot_general", "dot")
_LIBRARY_PRODUCTS = r"__cudnn\$conv|__cublas|__triton_gemm|__onednn"
_HOST = ("infeed", "outfeed", "send", "recv")
_CALLBACKS = ("pure_callback", "io_callback", "debug_callback", "debug_print")


class Finding(NamedTuple):
    """An operation that fails a check."""

    check: str  # a key of `CHECKS`
    op: str  # such as "convolution f32 x f32"
    where: str  # the path of its module, such as "stage1/block1/conv1"; "" if it has none

    def __str__(self) -> str:
        return f"{self.check}: {self.op}" + (f" in {self.where}" if self.where else "")


def find_module(name: str) -> str:
    """Returns the path of the module in the name of an operation.

    JAX's name `jit(step)/shard_map/transpose(jvp(ResNet))/stem/conv/conv_general_dilated` is of
    the module "stem/conv". A name without the derivative of a network, such as that of the
    optimizer, gives "".
    """
    found = re.search(r"\w*jvp\((?!\))[^/]*\)+/(.*)", name)
    return found[1].rpartition("/")[0] if found else ""


def is_in_network(name: str) -> bool:
    """Whether an operation of this name belongs to the differentiated network."""
    return "jvp(" in name


# ---------------------------------------------------------------------------- StableHLO


class _Operation(NamedTuple):
    kind: str  # such as "convolution", without the dialect
    text: str  # its first line
    inputs: tuple[str, ...]  # element types
    name: str  # JAX's


_LINE = re.compile(r'^(\s*)(?:%[\w:#]+(?:, %\w+)* = )?"?(?:stablehlo|chlo|mhlo)\.(\w+)"?')
_LOCATION = re.compile(r"loc\((.*)\)\s*$")
_TYPES = re.compile(r": \(([^()]*)\) -> [^:]*$")
_ALGORITHM = re.compile(r"lhs_precision_type = (\w+), rhs_precision_type = (\w+)")
_TENSOR = re.compile(r"tensor<(?:[\d?]+x)*(\w+)")


def _read_operations(text: str) -> Iterator[_Operation]:
    """Yields the operations of a StableHLO program in order."""
    names = _read_locations(text)
    open_ops: list[tuple[str, str, str]] = []  # indentation, kind, first line
    for line in text.splitlines():
        if found := _LINE.match(line):
            if line.rstrip().endswith("({"):  # a region follows; types and name come after it
                open_ops.append((found[1], found[2], line))
                continue
            kind, first = found[2], line
        elif open_ops and line.startswith(f"{open_ops[-1][0]}}})"):
            _, kind, first = open_ops.pop()
        else:
            continue
        place = _LOCATION.search(line)
        types = _TYPES.search(line.partition(" loc(")[0])
        inputs = tuple(_TENSOR.findall(types[1])) if types else ()
        if algorithm := _ALGORITHM.search(first):  # which rounds the inputs first
            inputs = algorithm.groups()
        yield _Operation(kind, first, inputs, _find_name(place[1], names) if place else "")


def _read_locations(text: str) -> dict[str, str]:
    """Returns {alias: its text} of the locations, such as {"#loc7": '"a/b"(#loc2)'}."""
    return dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))


def _find_name(place: str, names: dict[str, str]) -> str:
    """Returns JAX's name in a location: the first quoted text that is not a file's."""
    place = names.get(place, place)
    found = re.match(r'"([^"]*)"(?!:\d)', place)
    return found[1] if found else ""


def check_lowered(
    text: str,
    *,
    state: str = "state",
    norms: int = 0,
    convolutions: Sequence[str] = (),
    float32_modules: str | None = FLOAT32_MODULES,
) -> list[Finding]:
    """Returns the findings of a lowered training step.

    Args:
        text: StableHLO with locations, `lowered.as_text(debug_info=True)`.
        state: the name of the step's argument that must be donated.
        norms: number of synchronized norms; 0: the network may not contain any all-reduce.
        convolutions: what `list_convolutions` returns for the traced step.
        float32_modules: a pattern that the path of a module matches in full if its products may be
            in float32; None: all may.
    """
    operations = list(_read_operations(text))
    findings = []
    for one in operations:
        wide = [kind for kind in one.inputs if kind in _WIDE]
        if one.kind in _PRODUCTS and wide:
            findings += _judge_product("products", one.kind, one.inputs, one.name, float32_modules)
        target = re.search(r"custom_call @([\w$.]+)", one.text)
        if one.kind in _HOST or (target and "callback" in target[1]):
            op = target[1] if target else one.kind
            findings.append(Finding("callbacks", op, find_module(one.name)))
    # A function that was inlined has its own name before that of the operation.
    there = [f"/{one.name.rpartition('/')[0]}" for one in operations if one.kind == "convolution"]
    for name in dict.fromkeys(convolutions):
        if not any(one.endswith(f"/{name}") for one in there):
            findings.append(
                Finding(
                    "cpu_lowering",
                    "a convolution is computed by other operations",
                    find_module(f"{name}/conv"),
                )
            )
    for name, attributes in _read_arguments(text):
        if re.match(rf"{state}\b", name) and not re.search(
            r"jax\.buffer_donor = true|tf\.aliasing_output", attributes
        ):
            findings.append(Finding("donated", "an argument is not donated", name))
    reduced = [one.name for one in operations if one.kind == "all_reduce"]
    return findings + _judge_all_reduces(
        "all_reduces", [name for name in reduced if is_in_network(name)], 2 * norms
    )


def _judge_product(
    check: str, kind: str, inputs: Sequence[str], name: str, float32_modules: str | None
) -> list[Finding]:
    where = find_module(name)
    if float32_modules is None or re.fullmatch(float32_modules, where):
        return []
    return [Finding(check, f"{kind} {' x '.join(inputs)}", where or name)]


def _judge_all_reduces(check: str, names: Sequence[str], limit: int) -> list[Finding]:
    """Returns a finding if there are too many all-reduces, in the module that has most of them."""
    if len(names) <= limit:
        return []
    modules = [find_module(name) or name for name in names]
    worst = max(modules, key=modules.count)
    return [Finding(check, f"{len(names)} all-reduces, at most {limit} expected", worst)]


def _read_arguments(text: str) -> Iterator[tuple[str, str]]:
    """Yields (name, attributes) of the arguments of the program's function @main."""
    found = re.search(r"func\.func public @main\((.*)$", text, re.M)
    if not found:
        raise ValueError("the text has no function @main")
    for part in re.split(r"(?<=\)), (?=%arg\d+: )", found[1]):
        if name := re.search(r'%arg\d+: .*? loc\("([^"]*)"\)', part):
            yield name[1], part


def list_convolutions(jaxpr: Any) -> list[str]:
    """Returns the names that the convolutions of `layers.Conv` have in a traced program.

    There is a name for each place in the program, without the operation at its end, such as
    "jvp(ResNet)/stem/conv". Convolutions inside of a branch for one platform do not count.
    """
    equations = _list_equations(jaxpr)
    return [name for kind, name in equations if kind in _OUR_CONVOLUTIONS]


def check_callbacks(jaxpr: Any) -> list[Finding]:
    """Returns a finding for each call of the host in a traced program.

    JAX does not lower such a program for a device that is not there.
    """
    findings = [
        Finding("callbacks", kind, find_module(f"{name}/{kind}"))
        for kind, name in _list_equations(jaxpr)
        if kind in _CALLBACKS
    ]
    return list(dict.fromkeys(findings))


def _list_equations(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Yields (primitive, name) of a traced program, without the branches for one platform."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation.primitive.name, str(equation.source_info.name_stack)
        if equation.primitive.name in _OUR_CONVOLUTIONS:
            continue  # its parts are the convolution's
        if equation.params.get("branches_platforms"):
            continue
        for field in equation.params.values():
            for value in field if isinstance(field, tuple | list) else (field,):
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    yield from _list_equations(value)


def check_types(
    inputs: Sequence[Any], results: Sequence[Any], names: Sequence[str]
) -> list[Finding]:
    """Returns a finding for each array of the state that a step returns with another type.

    The step would then be traced and compiled again when it gets its own result. `inputs` and
    `results` are abstract values (`traced.jaxpr.in_avals`), those of the state first.
    """
    findings = []
    for before, after, name in zip(inputs, results, names):
        if any(getattr(before, f) != getattr(after, f) for f in ("shape", "dtype", "weak_type")):
            findings.append(Finding("one_trace", f"takes {before}, returns {after}", name))
    return findings


# ---------------------------------------------------------------------------- HLO

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def check_compiled(
    text: str,
    *,
    state: str = "state",
    norms: int = 0,
    float32_modules: str | None = FLOAT32_MODULES,
) -> list[Finding]:
    """Returns the findings of a compiled training step; the arguments are as in `check_lowered`.

    An all-reduce in a loop counts as often as it runs.
    """
    findings, shapes, reduced = [], {}, []
    aliased = _read_aliases(text)
    entry = False
    for line in text.splitlines():
        entry = line.startswith("ENTRY") or (entry and not line.startswith("}"))
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, opcode = found.groups()
        shapes[name] = shape
        op_name = _OP_NAME.search(line)
        label = op_name[1].replace("\\'", "'") if op_name else ""
        operands = line[found.end() :].partition(")")[0]
        target = re.search(r'custom_call_target="([^"]*)"', line)
        is_product = opcode in _PRODUCTS or (target and re.match(_LIBRARY_PRODUCTS, target[1]))
        if is_product:
            kinds = [_find_type(operand, shapes) for operand in operands.split(", ")][:2]
            if algorithm := re.search(r"algorithm=dot_([a-z]+\d+)_([a-z]+\d+)_", line):
                kinds = list(algorithm.groups())
            if any(kind in _WIDE for kind in kinds):
                kind = target[1] if target else opcode
                findings += _judge_product("compiled_products", kind, kinds, label, float32_modules)
        if opcode in _HOST or (target and "callback" in target[1]):
            op = target[1] if target else opcode
            findings.append(Finding("compiled_callbacks", op, find_module(label)))
        if opcode in ("all-reduce", "all-reduce-start"):
            reduced.append(label)
        is_state = entry and opcode == "parameter" and re.match(rf"{state}\b", label)
        if is_state and int(operands) not in aliased:
            findings.append(Finding("aliased", f"{shape} has a copy", label))
    total = read_traffic(text).collectives.get("all-reduce")
    limit = 2 * norms + STEP_ALL_REDUCES
    if total and total.calls > limit:
        op = f"{total.calls} all-reduces, at most {limit} expected"
        modules = [find_module(label) or label for label in reduced]
        worst = max(modules, key=modules.count, default="")
        findings.append(Finding("compiled_all_reduces", op, worst))
    return findings


def _find_type(operand: str, shapes: dict[str, str]) -> str:
    """Returns the element type of an operand such as `%a.1` or `f32[8]{0} %a.1`."""
    shape = operand if "[" in operand else shapes.get(operand.strip().lstrip("%"), "")
    return shape.partition("[")[0].strip("( ")


def _read_aliases(text: str) -> set[int]:
    """Returns the numbers of the parameters whose memory a result reuses."""
    header = text.partition("\n")[0].partition("input_output_alias={")[2]
    return {int(number) for number in re.findall(r": \((\d+), \{\}", header)}
