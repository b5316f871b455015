"""Dropout only at the end, or after every layer as SimpNet's authors recommend.

  python -m experiments.ablate --config=configs/ablations/dropout_everywhere.py --seeds=5 \
      --workdir=runs/dropout --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/dropout_everywhere.py:digits --seeds=5 \
      --workdir=runs/dropout_digits
  python -m experiments.ablate --config=configs/ablations/dropout_everywhere.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

A SimpNet with eight narrow convolutions trains on 1100 images for 400 steps of 64. Rows: "last_0.5"
drops pooled features, as older networks do. "all_0.2" drops activations after norm and ReLU of each
convolution, as SimpNet's authors do (https://arxiv.org/abs/1802.06205). "maps_0.2" drops whole maps
at the same places. "before_norm_0.2" drops activations between convolution and norm. "saf_0.2" is
the authors' SAF pooling.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

LAYERS = r"conv\d+"  # convolution, norm and ReLU together


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    config.model.name = "simpnet_slim_300k"
    del config.model["depths"]
    config.model.widths = ((16, 24, 24), (24, 24, 32), (32, 48))
    with config.unlocked():
        config.model.update(dict(dropout=0.0, saf_rate=0.0, momentum=0.9))
    if mode == "smoke":
        config.model.widths = ((4, 4), (4,), (8,))
    return config


def rules(layers: str, rate: float) -> dict:
    return {"train.dropout": ((layers, rate), (r".*", 0.0))}


def sweep() -> list[tuple[str, dict]]:
    return [
        ("none", {}),
        ("last_0.5", rules("pool3", 0.5)),
        *((f"all_{rate}", rules(LAYERS, rate)) for rate in (0.1, 0.2, 0.3)),
        ("maps_0.2", rules(LAYERS, 0.2) | {"train.dropout_mode": "channel"}),
        ("before_norm_0.2", {"train.dropout": (0.2,)}),
        ("saf_0.2", {"model.saf_rate": 0.2}),
        ("all_and_saf_0.2", rules(LAYERS, 0.2) | {"model.saf_rate": 0.2}),
    ]
