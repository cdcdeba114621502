"""Any image classification set of Hugging Face ``datasets``, by its name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.lab.data.base import DATA, DataError, Parts, Split, as_labels
from featherweight.lab.data.images import decode_images

LABEL_NAMES = ("label", "labels", "fine_label")
TEST_NAMES = ("test", "validation", "valid", "val")


@DATA.register(
    "hf",
    "any image set of Hugging Face datasets: path is its name or a folder",
    "Lhoest et al. 2021, arXiv:2109.02846",
    needs=["path"],
)
def load_hub(path: str) -> Parts:
    """Read the splits ``train`` and ``test`` (or ``validation``) of a Hugging Face data set.

    The image column is the one of type Image; the label column is the one of type ClassLabel, or,
    where several or none are, the one named label, labels or fine_label. Images that are all grey
    keep one channel.

    Args:
        path: a folder written by ``save_to_disk``, or whatever ``load_dataset`` takes.

    Raises:
        DataError: ``datasets`` is not installed, the set cannot be read, or a split or a column
            is missing.
    """
    parts = _read(path)
    test = next((name for name in TEST_NAMES if name in parts), None)
    if "train" not in parts or test is None:
        raise DataError(
            f"data set {path!r} has the splits {', '.join(parts)}; needed are train and one of "
            f"{', '.join(TEST_NAMES)}"
        )
    image, label = _columns(parts["train"].features, path)
    train_images, train_grey = _images(parts["train"], image, f"{path} train")
    test_images, test_grey = _images(parts[test], image, f"{path} {test}")
    channels = 1 if train_grey and test_grey else 3
    train_labels = as_labels(list(parts["train"][label]))
    test_labels = as_labels(list(parts[test][label]))
    names = getattr(parts["train"].features[label], "names", None)
    classes = len(names) if names else int(train_labels.max()) + 1
    return Parts(
        Split(train_images[:, :channels].contiguous(), train_labels),
        Split(test_images[:, :channels].contiguous(), test_labels),
        classes,
    )


def _read(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data set 'hf' needs datasets: pip install 'featherweight[lab]'") from error
    saved = (Path(path) / "dataset_dict.json").is_file()
    try:
        return datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # the library raises many kinds, some of many lines
        reason = " ".join(str(error).split())
        raise DataError(f"data set 'hf' cannot read {path!r}: {reason[:300]}") from error


def _columns(features: Any, path: str) -> tuple[str, str]:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(labels) != 1:
        labels = [name for name in LABEL_NAMES if name in features]
    if len(images) != 1 or not labels:
        raise DataError(
            f"data set {path!r} has the columns {', '.join(features)}; needed are one of type "
            f"Image and one of type ClassLabel or named {', '.join(LABEL_NAMES)}"
        )
    return images[0], labels[0]


def _images(part: Any, column: str, name: str) -> tuple[Tensor, bool]:
    import datasets

    cells = list(part.cast_column(column, datasets.Image(decode=False))[column])

    def read(row: int) -> bytes:
        encoded = cells[row]["bytes"]
        return encoded if encoded is not None else Path(cells[row]["path"]).read_bytes()

    return decode_images([f"{name} row {row}" for row in range(len(cells))], read)
