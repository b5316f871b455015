"""torchvision's Inception v3 with fewer modules; timm's and Keras's names."""

from __future__ import annotations

from tests.models.foreign.builders import Case, of_torchvision

TIMM = {"inception_v3_noaux": "inception_v3"}
TORCHVISION = {"inception_v3_noaux": "inception_v3"}
TORCHVISION_FIELDS = {"init_weights": False}  # initializing takes long
KERAS = {"keras_inception_v3": "InceptionV3"}
KERAS_SHAPES = ("keras_inception_v3",)
_SHORT = dict(aux_logits=True, init_weights=False)


CASE = Case(
    "inception_v3",
    "torchvision",
    75,
    dict(pool_projs=(32, 64), widths=(128,)),
    of_torchvision("inception_v3", "Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", **_SHORT),
)
