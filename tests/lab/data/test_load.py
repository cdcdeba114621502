"""Splitting, limiting, statistics and refusals of `load`, on the embedded digits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.lab.data import DATA, Data, DataError, Split, load
from featherweight.lab.data.base import check
from featherweight.lab.data.load import channel_statistics


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_whole_and_in_the_unit_interval():
    data = load("digits", validation=0.0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1000, 0, 797)
    assert data.shape == (1, 8, 8)
    assert data.classes == 10
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.min() == 0
    assert data.train.images.max() == 1


def test_digits_hold_every_image_of_scikit_learn_once():
    from sklearn.datasets import load_digits

    data = load("digits", validation=0.0)
    ours = torch.cat([data.train.images, data.test.images]).flatten(1) * 16
    theirs = torch.as_tensor(load_digits().data, dtype=torch.float32)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_test_part_is_the_same_for_every_seed_limit_and_validation():
    first = load("digits", seed=0)
    second = load("digits", seed=1, limit=50, validation=0.5)
    assert torch.equal(first.test.images, second.test.images)


def test_validation_is_disjoint_and_complete():
    whole = load("digits", validation=0.0)
    data = load("digits", validation=0.25)
    assert len(data.train) == 750
    assert len(data.validation) == 250
    assert not rows(data.train) & rows(data.validation)
    assert rows(data.train) | rows(data.validation) == rows(whole.train)


@given(validation=st.floats(0.01, 0.9), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_validation_gives_every_class_its_share(validation: float, seed: int):
    whole = load("digits", validation=0.0).train
    held_out = load("digits", validation=validation, seed=seed).validation
    sizes = torch.bincount(whole.labels, minlength=10).double()
    counts = torch.bincount(held_out.labels, minlength=10).double()
    assert len(held_out) == round(validation * 1000)
    assert ((counts - validation * sizes).abs() <= 1.01).all()


@given(limit=st.integers(2, 900))
@settings(max_examples=15, deadline=None)
def test_limit_is_balanced_and_nested(limit: int):
    small = load("digits", limit=limit, validation=0.0).train
    larger = load("digits", limit=limit + 10, validation=0.0).train
    counts = torch.bincount(small.labels, minlength=10)
    assert len(small) == limit
    assert rows(small) < rows(larger)
    smallest_class = 93  # of the digits' training part
    if limit <= 10 * smallest_class:
        assert int(counts.max() - counts.min()) <= 1


def test_seed_chooses_the_validation_images():
    first, again, other = (load("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.validation.images, again.validation.images)
    assert rows(first.validation) != rows(other.validation)


def test_statistics_are_those_of_the_training_images_alone():
    data = load("digits", validation=0.5)
    pixels = [float(value) for value in data.train.images.flatten()]
    mean = sum(pixels) / len(pixels)
    std = math.sqrt(sum((value - mean) ** 2 for value in pixels) / len(pixels))
    assert data.mean.tolist() == pytest.approx([mean], rel=1e-6)
    assert data.std.tolist() == pytest.approx([std], rel=1e-6)
    assert data.mean.dtype == data.std.dtype == torch.float32


def test_statistics_of_bytes_equal_those_of_floats():
    images = torch.randint(0, 200, (7, 3, 5, 4), dtype=torch.uint8)
    images[:, 2] = 51
    mean, std = channel_statistics(images)
    expected = (images.double() / 255).transpose(0, 1).flatten(1)
    assert torch.allclose(mean.double(), expected.mean(1), rtol=1e-6)
    assert torch.allclose(std[:2].double(), expected[:2].std(1, correction=0), rtol=1e-6)
    assert std[2] == 1.0  # a constant channel is not scaled


@pytest.mark.parametrize(
    "arguments",
    [
        {"validation": -0.1},
        {"validation": 1.0},
        {"validation": math.nan},
        {"validation": 0.0001},  # would hold out no image
        {"validation": 0.9999},  # would leave none
        {"limit": 0},
        {"limit": -3},
        {"limit": 1001},
        {"limit": 2.5},
        {"limit": True},
    ],
)
def test_out_of_range_arguments_are_one_line(arguments: dict):
    name, value = next(iter(arguments.items()))
    with pytest.raises(DataError, match=name) as caught:
        load("digits", **arguments)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'cifra10': did you mean 'cifar10'"):
        load("cifra10")


WITH_PATH = [name for name, entry in DATA.items() if "path" in entry.needs]
WITH_FILES = [name for name in WITH_PATH if name != "hf"]  # its path may be a name on the Hub


@pytest.mark.parametrize("name", WITH_PATH)
def test_a_path_is_asked_for(name: str):
    with pytest.raises(DataError, match=rf"{name}.*needs path="):
        load(name)


@pytest.mark.parametrize("name", WITH_FILES)
def test_a_missing_path_is_named(name: str, tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder .*nothing; wanted") as caught:
        load(name, tmp_path / "nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WITH_FILES)
def test_an_empty_folder_is_told_what_it_lacks(name: str, tmp_path):
    with pytest.raises(DataError, match=r"train") as caught:
        load(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_digits_take_no_path(tmp_path):
    with pytest.raises(DataError, match="leave out path"):
        load("digits", tmp_path)


def test_labels_out_of_range_are_refused():
    split = Split(torch.zeros(2, 1, 2, 2), torch.tensor([0, 10]))
    with pytest.raises(DataError, match=r"labels lie in 0\.\.10, allowed are 0\.\.9"):
        check(split, 10, "here")


def test_data_is_frozen():
    data = load("digits")
    assert isinstance(data, Data)
    with pytest.raises(AttributeError):
        data.classes = 3
