"""NASNet-A. timm and Keras number the normal cells across stages, from 0; Keras skips one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from flax_cnns.models.nasnet import NASNet
from flax_cnns.weights import name_maps

LEAVES = {"conv": "conv", "bn": "norm"}


def list_cells(model: NASNet) -> Iterator[tuple[int, str]]:
    """Yields (stage, name) of each cell after the stem: (1, "normal1"), ..., (2, "reduction")."""
    for stage, depth in enumerate(model.depths, 1):
        if stage > 1:
            yield stage, "reduction"
        yield from ((stage, f"normal{i}") for i in range(1, depth + 1))


def timm_cell_rules(cell: str, path: Callable[[re.Match], str]) -> name_maps.Rules:
    """Rules for timm's cells whose names match the regex `cell`; `path(match)` is our cell."""

    def to(ours: Callable[[re.Match], str]) -> Callable[[re.Match], str]:
        return lambda m: f"{path(m)}/{ours(m)}"

    def block(m: re.Match) -> str:
        return f"block{int(m['row']) + 1}_{m['side']}"

    row = rf"{cell}\.comb_iter_(?P<row>\d)_(?P<side>left|right)"
    leaf = r"\.(?P<leaf>conv|bn)"
    previous = rf"{cell}(?:\.conv_prev_1x1)?"
    return [
        (rf"{cell}\.conv_1x1{leaf}", to(lambda m: f"squeeze/{LEAVES[m['leaf']]}")),
        (rf"{cell}\.conv_prev_1x1{leaf}", to(lambda m: f"squeeze_previous/{LEAVES[m['leaf']]}")),
        (rf"{previous}\.path_(?P<n>\d)\.conv", to(lambda m: f"squeeze_previous/conv{m['n']}")),
        (rf"{previous}\.final_path_bn", to(lambda m: "squeeze_previous/norm")),
        (
            rf"{row}\.separable_(?P<n>\d)\.(?P<kind>depthwise|pointwise)_conv2d",
            to(lambda m: f"{block(m)}/conv{m['n']}/{m['kind']}"),
        ),
        (rf"{row}\.bn_sep_(?P<n>\d)", to(lambda m: f"{block(m)}/norm{m['n']}")),
        (rf"{row}{leaf}", to(lambda m: f"{block(m)}/{LEAVES[m['leaf']]}")),
    ]


def _timm_rules(model: NASNet) -> name_maps.Rules:
    normal = [f"stage{stage}/{name}" for stage, name in list_cells(model) if name != "reduction"]
    return [
        (r"conv0\.(conv|bn)", lambda m: f"stem/{LEAVES[m[1]]}"),
        *timm_cell_rules(
            r"cell_stem_(?P<cell>\d)", lambda m: f"stem/reduction{int(m['cell']) + 1}"
        ),
        *timm_cell_rules(r"cell_(?P<cell>\d+)", lambda m: normal[int(m["cell"])]),
        *timm_cell_rules(
            r"reduction_cell_(?P<cell>\d)", lambda m: f"stage{int(m['cell']) + 2}/reduction"
        ),
        ("last_linear", "head"),
    ]


def _keras_rules(model: NASNet) -> name_maps.Rules:
    # Keras's cells, with four normal ones per stage: stem_1, stem_2, 0, 1, 2, 3, reduce_4, 5, 6, 7,
    # 8, reduce_8, 9, 10, 11, 12. No normal cell has the number 4.
    ours = {f"stem_{i}": f"stem/reduction{i}" for i in (1, 2)}
    for stage, depth in enumerate(model.depths, 1):
        before = sum(model.depths[: stage - 1])
        ours[f"reduce_{before}"] = f"stage{stage}/reduction"
        first = before if stage == 1 else before + 1
        ours |= {f"{first + i}": f"stage{stage}/normal{i + 1}" for i in range(depth)}

    def to(path: str) -> Callable[[re.Match], str]:
        return lambda m: f"{ours[m['cell']]}/{m.expand(path)}"

    def separable(m: re.Match) -> str:
        # In Keras the separable convolution in row 5 of a reduction has the name of row 4.
        row = "5" if (m["kind"], m["side"], m["row"]) == ("reduction", "left", "4") else m["row"]
        leaf = "norm" if m["bn"] else "conv"
        return f"{ours[m['cell']]}/block{row}_{m['side']}/{leaf}{m['n']}"

    cell = r"_(?P<cell>(?:stem_|reduce_)?\d+)"
    kind = r"(?P<kind>normal|reduction)"
    return [
        ("stem_conv1", "stem/conv"),
        ("stem_bn1", "stem/norm"),
        (rf".*/{kind}_conv_1{cell}", to("squeeze/conv")),
        (rf".*/{kind}_bn_1{cell}", to("squeeze/norm")),
        (rf".*/adjust_conv_(?P<n>\d){cell}", to(r"squeeze_previous/conv\g<n>")),
        (rf".*/adjust_conv_projection{cell}", to("squeeze_previous/conv")),
        (rf".*/adjust_bn{cell}", to("squeeze_previous/norm")),
        (
            rf".*/separable_conv_(?P<n>\d)_(?P<bn>bn_)?{kind}"
            rf"_(?P<side>left|right)(?P<row>\d){cell}",
            separable,
        ),
        ("predictions", "head"),
    ]


TABLES = {"timm": _timm_rules, "keras": _keras_rules}
