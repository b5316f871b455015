"""torchvision's GoogLeNet with fewer modules."""

from __future__ import annotations

from flax_cnns.models import googlenet
from tests.models.foreign.builders import Case, of_torchvision

TORCHVISION = {"googlenet_tv_aux": "googlenet"}
TORCHVISION_FIELDS = {"init_weights": False}  # initializing takes long
_SHORT = dict(aux_logits=True, init_weights=False)
_REPEATED = ("mixed4b", "mixed4c", "mixed5a")


CASE = Case(
    "googlenet_tv_aux",
    "torchvision",
    33,
    dict(table=[row for row in googlenet.TABLE if row[0] not in _REPEATED]),
    of_torchvision("googlenet", "inception4b", "inception4c", "inception5a", **_SHORT),
    train=True,
)
