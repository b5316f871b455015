"""The cells of a space, and which of them are the same network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from flax_cnns.models.nas_bench_201 import EDGES, NODES, OPERATIONS, parse_cell, write_cell

SMALL_SPACE = ("none", "skip_connect", "nor_conv_3x3")  # 3^6 = 729 cells
FULL_SPACE = OPERATIONS  # NAS-Bench-201's: 5^6 = 15,625 cells
OUTPUT = NODES - 1


def list_cells(operations: Sequence[str] = SMALL_SPACE) -> list[str]:
    """Lists all cells of these operations. The last edge changes fastest."""
    return [write_cell(choice) for choice in itertools.product(operations, repeat=len(EDGES))]


def is_connected(cell: str) -> bool:
    """Whether a path leads from the input to the output. Without one, logits ignore the image."""
    reached = {0}
    for (source, target), operation in zip(EDGES, parse_cell(cell)):
        if operation != "none" and source in reached:
            reached.add(target)
    return OUTPUT in reached


def prune_cell(cell: str) -> str:
    """Returns the cell without the edges that cannot change its output.

    These edges lead to a node from which the output is not reached, or they pass zeros. Both cells
    compute the same and train alike, to the bit. A convolution of zeros stays, because it adds the
    shift of its norm.
    """
    operations = list(parse_cell(cell))
    while True:
        used, nonzero = {OUTPUT}, {0}
        for (source, target), operation in reversed(list(zip(EDGES, operations))):
            if operation != "none" and target in used:
                used.add(source)
        for (source, target), operation in zip(EDGES, operations):
            if operation.startswith("nor_conv") or (operation != "none" and source in nonzero):
                nonzero.add(target)
        pruned = [
            "none"
            if target not in used or (source not in nonzero and not name.startswith("nor_conv"))
            else name
            for (source, target), name in zip(EDGES, operations)
        ]
        if pruned == operations:
            return write_cell(pruned)
        operations = pruned


def describe_function(cell: str) -> str:
    """Returns a text that is equal for cells that compute the same function of their weights.

    The text is the output as a formula of the input x. Sums have no order, a skip is its input, and
    a missing edge is left out. A convolution of zeros is the constant "b".
    """
    nodes = ["x"]
    operations = iter(parse_cell(cell))
    for target in range(1, NODES):
        terms: list[str] = []
        for source in range(target):
            operation, value = next(operations), nodes[source]
            if operation.startswith("nor_conv"):
                terms.append(f"{operation[-3:]}({value})" if value else "b")
            elif operation == "avg_pool_3x3" and value:
                terms.append(f"mean({value})")
            elif operation == "skip_connect" and value:
                terms += _split_sum(value)
        nodes.append(" + ".join(sorted(terms)))
    return nodes[-1]


def _split_sum(text: str) -> list[str]:
    """Splits a formula at its outermost plus signs."""
    parts, depth = [""], 0
    for symbol in text:
        depth += (symbol == "(") - (symbol == ")")
        if symbol == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += symbol
    return [part.strip() for part in parts]
