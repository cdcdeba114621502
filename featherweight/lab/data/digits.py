"""The handwritten digits embedded in scikit-learn: 1797 images of 8x8, no file needed."""

import torch

from featherweight.lab.data.base import DATA, DataError, Parts, Split, as_labels
from featherweight.lab.data.seeding import derive_generator

TRAIN_IMAGES = 1000


@DATA.register(
    "digits",
    "scikit-learn's handwritten digits: 1000 + 797 images of 1x8x8, embedded",
    "Alpaydin and Kaynak 1998 (UCI optdigits)",
)
def load_digits() -> Parts:
    """Return the digits as float32 images in [0, 1] (their 17 grey levels divided by 16).

    The set has no official split: a fixed shuffle puts 1000 images into the training part and the
    other 797 into the test part, the same for every seed.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as embedded
    except ImportError as error:
        raise DataError(
            "data set 'digits' needs scikit-learn: pip install 'featherweight[lab]'"
        ) from error
    raw = embedded()
    images = torch.as_tensor(raw.images, dtype=torch.float32).div(16).unsqueeze(1)
    whole = Split(images, as_labels(raw.target))
    order = torch.randperm(len(whole), generator=derive_generator("digits"))
    return Parts(whole.take(order[:TRAIN_IMAGES]), whole.take(order[TRAIN_IMAGES:]), 10)
