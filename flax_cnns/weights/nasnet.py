"""NASNet-A: timm counts the normal cells through all stages from 0, Keras all cells together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from flax_cnns.models.nasnet import NASNet
from flax_cnns.weights import name_maps

LEAVES = {"conv": "conv", "bn": "norm"}


def cells(model: NASNet) -> Iterator[tuple[int, str]]:
    """(stage from 1, "reduction" or "normal1"...) of all cells behind the stem."""
    for stage, depth in enumerate(model.depths, 1):
        if stage > 1:
            yield stage, "reduction"
        yield from ((stage, f"normal{i}") for i in range(1, depth + 1))


def torch_cell(cell: str, path: Callable[[re.Match], str]) -> name_maps.Rules:
    """timm's, of the cells whose names the regex `cell` matches; ours are at `path(match)`."""

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


def _timm(model: NASNet) -> name_maps.Rules:
    normal = [f"stage{stage}/{name}" for stage, name in cells(model) if name != "reduction"]
    return [
        (r"conv0\.(conv|bn)", lambda m: f"stem/{LEAVES[m[1]]}"),
        *torch_cell(r"cell_stem_(?P<cell>\d)", lambda m: f"stem/reduction{int(m['cell']) + 1}"),
        *torch_cell(r"cell_(?P<cell>\d+)", lambda m: normal[int(m["cell"])]),
        *torch_cell(
            r"reduction_cell_(?P<cell>\d)", lambda m: f"stage{int(m['cell']) + 2}/reduction"
        ),
        ("last_linear", "head"),
    ]


def _keras(model: NASNet) -> name_maps.Rules:
    # Its cells: stem_1, stem_2, 0, 1, 2, 3, reduce_4, 5, 6, 7, 8, reduce_8, 9, ...
    ours = {f"stem_{i}": f"stem/reduction{i}" for i in (1, 2)}
    for stage, depth in enumerate(model.depths, 1):
        before = sum(model.depths[: stage - 1])
        ours[f"reduce_{before}"] = f"stage{stage}/reduction"
        first = before if stage == 1 else before + 1
        ours |= {f"{first + i}": f"stage{stage}/normal{i + 1}" for i in range(depth)}

    def to(path: str) -> Callable[[re.Match], str]:
        return lambda m: f"{ours[m['cell']]}/{m.expand(path)}"

    def separable(m: re.Match) -> str:
        # The separable convolution in a reduction's fifth row has the fourth's name.
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


TABLES = {"timm": _timm, "keras": _keras}
