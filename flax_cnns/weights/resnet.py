"""ResNets: torchvision's `layer2.0.conv1` is our `stage2/block1/conv1`."""

from __future__ import annotations

TORCHVISION = [
    (r"conv1", "stem/conv"),
    (r"bn1", "stem/norm"),
    (r"layer(\d+)\.(\d+)\.conv(\d)", lambda m: f"{_block(m)}/conv{m[3]}"),
    (r"layer(\d+)\.(\d+)\.bn(\d)", lambda m: f"{_block(m)}/norm{m[3]}"),
    (r"layer(\d+)\.(\d+)\.downsample\.0", lambda m: f"{_block(m)}/projection"),
    (r"layer(\d+)\.(\d+)\.downsample\.1", lambda m: f"{_block(m)}/projection_norm"),
    (r"fc", "head"),
]
TABLES = {"torchvision": TORCHVISION}


def _block(match) -> str:
    return f"stage{match[1]}/block{int(match[2]) + 1}"
