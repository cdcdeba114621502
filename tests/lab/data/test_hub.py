"""Hugging Face data sets, built in memory and saved to the disk."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from featherweight.lab.data import DataError, load

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = GENERATOR.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def part(images: np.ndarray, label: str = "label", named: bool = True) -> datasets.Dataset:
    kind = datasets.ClassLabel(names=["a", "b", "c"]) if named else datasets.Value("int64")
    features = datasets.Features({"picture": datasets.Image(), label: kind})
    return datasets.Dataset.from_dict({"picture": list(images), label: LABELS}, features=features)


def save(folder: Path, **parts: datasets.Dataset) -> Path:
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(folder / "set"))
    return folder / "set"


@pytest.mark.parametrize("test_name", ["test", "validation"])
@pytest.mark.parametrize(("label", "named"), [("target", True), ("fine_label", False)])
def test_colour_images_are_read_back(test_name: str, label: str, named: bool, tmp_path):
    train, test = part(COLOUR, label, named), part(COLOUR[::-1], label, named)
    data = load("hf", save(tmp_path, train=train, **{test_name: test}), validation=0.0)
    assert torch.equal(data.train.images, torch.from_numpy(COLOUR).permute(0, 3, 1, 2))
    assert torch.equal(data.test.images, data.train.images.flip(0))
    assert data.train.labels.tolist() == LABELS
    assert data.classes == 3


def test_grey_images_keep_one_channel(tmp_path):
    data = load("hf", save(tmp_path, train=part(GREY), test=part(GREY)), validation=0.0)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(GREY))
    assert data.shape == (1, 5, 4)


def test_one_colour_image_makes_the_set_colour(tmp_path):
    data = load("hf", save(tmp_path, train=part(GREY), test=part(COLOUR)), validation=0.0)
    assert torch.equal(data.train.images, torch.from_numpy(GREY)[:, None].expand(-1, 3, -1, -1))


def test_missing_splits_are_named(tmp_path):
    with pytest.raises(DataError, match="has the splits train; needed are"):
        load("hf", save(tmp_path, train=part(GREY)))


def test_missing_columns_are_named(tmp_path):
    odd = part(GREY, "kind", named=False)
    with pytest.raises(DataError, match="has the columns picture, kind; needed are"):
        load("hf", save(tmp_path, train=odd, test=odd))


def test_a_folder_that_is_no_data_set_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot read") as caught:
        load("hf", tmp_path)
    assert "\n" not in str(caught.value)
