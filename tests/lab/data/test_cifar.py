"""The three CIFAR layouts, built from random images and read back; hostile and damaged files."""

import codecs
import io
import os
import pickle
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from featherweight.lab.data import DataError, Split, load
from featherweight.lab.data.pickles import read_pickle


def random_split(count: int, classes: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, classes, (count,), generator=generator))


def write_pickle(split: Split, path: Path, key: str, protocol: int = 2) -> None:
    content = {
        b"data": split.images.flatten(1).numpy(),
        key.encode(): split.labels.tolist(),
        b"filenames": [b"a.png"] * len(split),
        b"batch_label": b"training batch",
    }
    path.write_bytes(pickle.dumps(content, protocol))


def write_strips(split: Split, path: Path) -> None:
    strips = split.images.permute(0, 2, 3, 1).reshape(2, -1, 32, 3).numpy()
    with zipfile.ZipFile(path, "w") as archive:
        labels = io.BytesIO()
        np.save(labels, split.labels.numpy().astype(np.uint8))
        archive.writestr("labels.npy", labels.getvalue())
        for number, strip in enumerate(strips):
            picture = io.BytesIO()
            Image.fromarray(strip).save(picture, "webp", lossless=True)
            archive.writestr(f"{number:03}.webp", picture.getvalue())


def png(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


def write_parquet(split: Split, path: Path, image: str, label: str) -> None:
    cells = [{"bytes": png(one), "path": "x.png"} for one in split.images]
    parquet.write_table(pyarrow.table({image: cells, label: split.labels.tolist()}), path)


def write_cifar10_pickles(folder: Path, parts: list[Split]) -> None:
    for number, part in enumerate(parts[:5], 1):
        write_pickle(part, folder / f"data_batch_{number}", "labels")
    write_pickle(parts[5], folder / "test_batch", "labels")


def write_cifar10_strips(folder: Path, parts: list[Split]) -> None:
    for number, part in enumerate(parts[:5], 1):
        write_strips(part, folder / f"train_{number}.zip")
    write_strips(parts[5], folder / "test.zip")


def write_cifar10_parquet(folder: Path, parts: list[Split]) -> None:
    for number, part in enumerate(parts[:5]):
        write_parquet(part, folder / f"train-{number:05}-of-00005.parquet", "img", "label")
    write_parquet(parts[5], folder / "test-00000-of-00001.parquet", "img", "label")


@pytest.fixture(scope="module")
def parts() -> list[Split]:
    return [random_split(4, 10, seed) for seed in range(6)]


@pytest.mark.parametrize(
    ("write", "nested"),
    [
        (write_cifar10_pickles, ""),
        (write_cifar10_pickles, "cifar-10-batches-py"),
        (write_cifar10_pickles, "cifar10/cifar-10-batches-py"),
        (write_cifar10_strips, ""),
        (write_cifar10_strips, "cifar10"),
        (write_cifar10_parquet, ""),
        (write_cifar10_parquet, "plain_text"),
    ],
)
def test_cifar10_is_read_back_in_order(write, nested: str, parts: list[Split], tmp_path):
    folder = tmp_path / nested
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, parts)
    data = load("cifar10", tmp_path, validation=0.0)
    assert torch.equal(data.train.images, torch.cat([part.images for part in parts[:5]]))
    assert torch.equal(data.train.labels, torch.cat([part.labels for part in parts[:5]]))
    assert torch.equal(data.test.images, parts[5].images)
    assert torch.equal(data.test.labels, parts[5].labels)
    assert data.classes == 10


@pytest.mark.parametrize("layout", ["pickle", "parquet"])
def test_cifar100_is_read_with_its_fine_labels(layout: str, tmp_path):
    train, test = random_split(6, 100, 0), random_split(4, 100, 1)
    if layout == "pickle":
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        write_pickle(train, folder / "train", "fine_labels")
        write_pickle(test, folder / "test", "fine_labels")
    else:
        write_parquet(train, tmp_path / "train-00000-of-00001.parquet", "image", "fine_label")
        write_parquet(test, tmp_path / "test-00000-of-00001.parquet", "image", "fine_label")
    data = load("cifar100", tmp_path, validation=0.0)
    assert torch.equal(data.train.images, train.images)
    assert torch.equal(data.train.labels, train.labels)
    assert torch.equal(data.test.labels, test.labels)
    assert data.classes == 100


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_every_old_protocol_are_read(protocol: int, tmp_path):
    split = random_split(3, 10, 0)
    write_pickle(split, tmp_path / "batch", "labels", protocol)
    assert torch.equal(read_pickle(tmp_path / "batch")[b"data"], split.images.flatten(1))


def test_an_array_in_column_order_is_read(tmp_path):
    array = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": array}, 2))
    assert read_pickle(tmp_path / "batch")[b"data"].tolist() == array.tolist()


def test_a_pickle_as_python_2_wrote_it_is_read(tmp_path):
    """The official files: texts are byte strings (opcodes U and T), dtype and all."""
    data = bytes(range(256)) * 24
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2
    content = (
        b"\x80\x02}(U\x04data"
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01K\x02M\x00\x0c\x86" + dtype + b"K\x00tb\x89"
        + b"T" + len(data).to_bytes(4, "little") + data + b"tb"
        + b"U\x06labels](K\x07K\x03eu."
    )  # fmt: skip
    (tmp_path / "batch").write_bytes(content)
    with warnings.catch_warnings():  # numpy.core was renamed; its own reader is the oracle
        warnings.simplefilter("ignore")
        expected = pickle.loads(content, encoding="bytes")
    ours = read_pickle(tmp_path / "batch")
    assert ours[b"data"].tolist() == expected[b"data"].tolist()
    assert ours[b"data"].shape == (2, 3072)
    assert ours[b"labels"] == expected[b"labels"] == [7, 3]


class Call:
    """Pickles as a call of a function, the way an attack does."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("disguise", [lambda call: call, lambda call: {b"data": [call]}])
def test_a_pickle_that_calls_a_program_is_refused_and_does_not_run(
    disguise, protocol: int, tmp_path
):
    marker = tmp_path / "ran"
    evil = disguise(Call(os.system, f"touch {marker}"))
    (tmp_path / "batch").write_bytes(pickle.dumps(evil, protocol))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system, which is refused"):
        read_pickle(tmp_path / "batch")
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call(eval, "1 + 1"),
        Call(getattr, "text", "upper"),
        Call(np.load, "file"),
        Call(np.dtype, "O"),
        Call(torch.zeros, 3),
        np.array([Call(eval, "1")], dtype=object),
        np.zeros(3, np.float32),
    ],
    ids=repr,
)
def test_other_calls_and_arrays_are_refused(call: object, tmp_path):
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": call, b"labels": []}, 2))
    with pytest.raises(DataError, match=r"data_batch_1( is refused|: data is no array)"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3, np.int8), "not of unsigned bytes"),
        (np.zeros(3, np.dtype("V1")), "not of unsigned bytes"),
        (Call(codecs.encode, "text", "rot13"), "text encoded as 'rot13'"),
    ],
)
def test_the_stand_ins_take_bytes_only(value: object, message: str, tmp_path):
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": value}, 2))
    with pytest.raises(DataError, match=rf"batch is refused or damaged: .*{message}"):
        read_pickle(tmp_path / "batch")


def test_an_array_that_lies_about_its_size_is_refused(tmp_path):
    content = pickle.dumps({b"data": np.zeros((2, 3), np.uint8)}, 4)
    (tmp_path / "batch").write_bytes(content.replace(b"K\x02K\x03", b"K\x09K\x03"))
    with pytest.raises(DataError, match="wrong size"):
        read_pickle(tmp_path / "batch")


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused(content: bytes):
    _read_noise(b"\x80\x02" + content)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_pickle_with_a_changed_byte_is_read_or_refused_but_never_crashes(data):
    whole = bytearray(pickle.dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 2]}, 2))
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] = data.draw(st.integers(0, 255))
    _read_noise(bytes(whole))


def _read_noise(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch"
        path.write_bytes(content)
        try:
            assert isinstance(read_pickle(path), dict)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("write", [write_cifar10_pickles, write_cifar10_strips])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_truncated_files_are_refused(write, kept: float, parts: list[Split], tmp_path):
    write(tmp_path, parts)
    victim = sorted(tmp_path.iterdir())[1]
    victim.write_bytes(victim.read_bytes()[: int(kept * victim.stat().st_size)])
    with pytest.raises(DataError, match=victim.name):
        load("cifar10", tmp_path)


def test_a_truncated_parquet_is_refused(parts: list[Split], tmp_path):
    write_cifar10_parquet(tmp_path, parts)
    victim = tmp_path / "train-00002-of-00005.parquet"
    victim.write_bytes(victim.read_bytes()[:-50])
    with pytest.raises(DataError, match=rf"{victim.name} is damaged"):
        load("cifar10", tmp_path)


def test_a_missing_batch_is_named(parts: list[Split], tmp_path):
    write_cifar10_strips(tmp_path, parts)
    (tmp_path / "train_4.zip").unlink()
    with pytest.raises(DataError, match=r"lacks train_4\.zip"):
        load("cifar10", tmp_path)


def test_labels_must_be_as_many_as_images(parts: list[Split], tmp_path):
    write_cifar10_pickles(tmp_path, parts)
    short = Split(parts[2].images, parts[2].labels[:-1])
    write_pickle(short, tmp_path / "data_batch_3", "labels")
    with pytest.raises(DataError, match="data_batch_3: 4 images but 3 labels"):
        load("cifar10", tmp_path)


def test_labels_must_be_classes(parts: list[Split], tmp_path):
    write_cifar10_pickles(tmp_path, parts)
    write_pickle(Split(parts[0].images, torch.full((4,), 10)), tmp_path / "test_batch", "labels")
    with pytest.raises(DataError, match=r"labels lie in 10\.\.10"):
        load("cifar10", tmp_path)
