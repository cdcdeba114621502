"""IDX files: round trips in every compression, and refusals of anything else."""

import gzip
import lzma
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.lab.data import DataError, load
from featherweight.lab.data.idx import read_idx

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def idx_bytes(data: Tensor) -> bytes:
    shape = struct.pack(f">{data.ndim}I", *data.shape)
    return bytes([0, 0, 8, data.ndim]) + shape + data.numpy().tobytes()


def write_set(folder: Path, ending: str) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train-images-idx3-ubyte": torch.randint(0, 256, (20, 4, 3), dtype=torch.uint8),
        "train-labels-idx1-ubyte": torch.arange(20, dtype=torch.uint8) % 10,
        "t10k-images-idx3-ubyte": torch.randint(0, 256, (6, 4, 3), dtype=torch.uint8),
        "t10k-labels-idx1-ubyte": torch.arange(6, dtype=torch.uint8),
    }
    for name, data in files.items():
        (folder / (name + ending)).write_bytes(COMPRESS[ending](idx_bytes(data)))
    return files


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("name", "nested"), [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion-mnist", "fashion-mnist")]
)
def test_what_was_written_is_read(name: str, nested: str, ending: str, tmp_path):
    files = write_set(tmp_path / nested, ending)
    data = load(name, tmp_path, validation=0.0)
    assert torch.equal(data.train.images[:, 0], files["train-images-idx3-ubyte"])
    assert torch.equal(data.train.labels, files["train-labels-idx1-ubyte"].long())
    assert torch.equal(data.test.images[:, 0], files["t10k-images-idx3-ubyte"])
    assert torch.equal(data.test.labels, files["t10k-labels-idx1-ubyte"].long())
    assert data.shape == (1, 4, 3)


@given(data=st.data(), ending=st.sampled_from(list(COMPRESS)))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_refused(data, ending: str, tmp_path_factory):
    whole = COMPRESS[ending](idx_bytes(torch.arange(60, dtype=torch.uint8).view(5, 4, 3)))
    path = tmp_path_factory.mktemp("cut") / f"file{ending}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError, match="file") as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(torch.zeros(3, 2, dtype=torch.uint8)) + b"x", "longer than its header says"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0" * 4, "no IDX file of bytes"),
        (b"\x89PNG and so on", "starts with 89 50 4e 47"),
        (idx_bytes(torch.zeros(0, 2, dtype=torch.uint8)), "empty"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_a_changed_byte_in_a_gzip_is_noticed(tmp_path):
    content = bytearray(gzip.compress(idx_bytes(torch.zeros(50, 2, dtype=torch.uint8))))
    content[-6] ^= 1  # the checksum
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_idx(path)


def test_a_missing_file_is_named(tmp_path):
    write_set(tmp_path, ".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        load("mnist", tmp_path)


def test_unequal_counts_are_refused(tmp_path):
    write_set(tmp_path, "")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        idx_bytes(torch.zeros(19, dtype=torch.uint8))
    )
    with pytest.raises(DataError, match=r"\(20, 4, 3\) do not fit labels \(19,\)"):
        load("mnist", tmp_path)
