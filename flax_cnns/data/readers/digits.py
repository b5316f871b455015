"""The default data set: scikit-learn's handwritten digits as a TFDS data set, prepared in seconds
without network or TensorFlow.

1797 images of 8x8 pixels with values 0 to 16 (E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0; scikit-learn's copy is
the test part of the original). The split is ours, stratified and fixed: 1077 for training, 360 for
validation, 360 for test.

This module imports tensorflow_datasets: import it inside functions, not at the top of a module.
"""

from __future__ import annotations

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SPLIT_SEED = 0  # not chosen by a score
VALIDATION_SIZE = TEST_SIZE = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` u8 [8 8 1] with values 0 to 255, `label` 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Stratified split 1077 / 360 / 360, seed 0."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
        )

    def _split_generators(self, dl_manager):
        # Imported here because scikit-learn takes a second, and is not needed once the data set is
        # prepared.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

        def cut(rows: np.ndarray, count: int):
            return train_test_split(
                rows, test_size=count, stratify=labels[rows], random_state=SPLIT_SEED
            )

        rest, test = cut(np.arange(len(labels)), TEST_SIZE)
        train, validation = cut(rest, VALIDATION_SIZE)
        return {
            name: self._generate_examples(images, labels, rows)
            for name, rows in dict(train=train, validation=validation, test=test).items()
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            # Encoded here, because TFDS needs TensorFlow to encode an array.
            png = io.BytesIO()
            Image.fromarray(images[row]).save(png, format="PNG")
            png.seek(0)
            yield int(row), {"image": png, "label": int(labels[row])}
