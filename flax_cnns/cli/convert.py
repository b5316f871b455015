r"""Converts weights of other libraries to a checkpoint of flax_cnns.

flax-cnns convert --model=resnet50 --source=torchvision --out=weights/resnet50
flax-cnns convert --model=resnet50d --source=timm --path=model.safetensors --out=FOLDER
flax-cnns convert --model=vit_tiny_patch16_224 --source=timm --path=model.pth \
    --averaged --image-size=96 --resize-positions --channels=1 --adapt-stem --out=FOLDER
flax-cnns inspect weights/resnet50
flax-cnns train --config.graft.source=weights/resnet50 ...

Without --path, the source's published ImageNet weights are downloaded once. FOLDER/about.json
records where the weights come from, the SHA-256 of their file, how images must be prepared, and
what was selected, renamed or adapted (flax_cnns/weights/adapt.py).
"""

from __future__ import annotations

import re

from absl import flags

from flax_cnns.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "Name of the network in flax_cnns.", required=True)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Where the weights are from: torchvision, timm, keras or efficientnet_lite.",
    required=True,
)
_PATH = flags.DEFINE_string(
    "path",
    "",
    "A .safetensors, .pth, .npz, .h5 or .keras file. Without --path, published weights are"
    " downloaded.",
)
_AVERAGED = flags.DEFINE_bool(
    "averaged", False, "Take the averaged weights from a training script's file."
)
_CHANNELS = flags.DEFINE_integer("channels", 0, "Channels of the images; 0: as in the file.")
_STEM = flags.DEFINE_bool("adapt-stem", False, "Adapt the first kernels to --channels.")
_SIZE = flags.DEFINE_integer("image-size", 0, "Side of the images; 0: as in the file.")
_POSITIONS = flags.DEFINE_bool(
    "resize-positions", False, "Resize a ViT's position embeddings to --image-size."
)
_HEAD = flags.DEFINE_bool("head", True, "Leave out the head.")
_OUT = flags.DEFINE_string("out", None, "The folder to write. It must be new.", required=True)


def convert(argv: list[str]) -> None:
    from flax_cnns.interop import convert as foreign

    del argv
    try:
        about = foreign.convert(
            _MODEL.value,
            _SOURCE.value,
            _OUT.value,
            _PATH.value or None,
            image_size=_SIZE.value,
            channels=_CHANNELS.value,
            head=_HEAD.value,
            averaged=_AVERAGED.value,
            adapt_stem=_STEM.value,
            resize_positions=_POSITIONS.value,
        )
    except UserError as error:  # name options of the library as flags
        option = r"\b(adapt_stem|resize_positions|averaged)=True"
        flagged = re.sub(option, lambda match: f"--{match[1].replace('_', '-')}", str(error))
        raise UserError(flagged) from None
    for note in about["notes"]:
        print(f"note: {note}")
    print(
        f"{_OUT.value}: {about['model']} from {about['source']}, {about['params']:,} parameters in"
        f" {about['leaves']} leaves, from {about['file']} (SHA-256 {about['sha256'][:12]}…)"
    )
