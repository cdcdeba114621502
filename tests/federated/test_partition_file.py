"""Partitions on disk: whole or refused."""

import pytest
import torch
from safetensors.torch import save_file

from featherweight.federated.partition import (
    check_partition,
    dirichlet,
    load_partition,
    partition_hash,
    save_partition,
)

PARTITION = dirichlet(torch.arange(300) % 10, clients=7, seed=0, alpha=0.5)


def test_round_trip(tmp_path):
    facts = {"method": "dirichlet", "alpha": 0.5, "seed": 0, "twin": False, "path": None}
    digest = save_partition(tmp_path / "p.safetensors", PARTITION, facts)
    found, kept = load_partition(tmp_path / "p.safetensors", 300)
    assert all(map(torch.equal, found, PARTITION))
    assert kept == facts
    assert digest == partition_hash(found)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    first = (tmp_path / "p.safetensors").read_bytes()
    save_partition(tmp_path / "p.safetensors", PARTITION, facts)
    assert (tmp_path / "p.safetensors").read_bytes() == first


def test_the_hash_is_pinned():
    # Of format version 1: it must not change with torch, numpy or the platform.
    parts = (torch.tensor([0, 2]), torch.tensor([1]))
    assert partition_hash(parts) == (
        "8f2d9aec3b50edffa36cd5edf800236abc1ff2e2eee9b0c1edb201f71a00c135"
    )


def test_the_hash_tells_who_holds_what():
    hashes = {
        partition_hash(parts)
        for parts in (
            (torch.tensor([0, 1]), torch.tensor([2])),
            (torch.tensor([0]), torch.tensor([1, 2])),
            (torch.tensor([2]), torch.tensor([0, 1])),
            (torch.tensor([0, 1, 2]),),
        )
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("place", [-1, -8, -100, 200])
def test_damage_is_refused(tmp_path, place):
    path = tmp_path / "p.safetensors"
    save_partition(path, PARTITION)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.safetensors"):
        load_partition(path)


@pytest.mark.parametrize(
    "header", ["[]", "{}", "3", '{"hash": 3}', "{", '{"facts": 1, "hash": ""}']
)
def test_other_headers_are_refused(tmp_path, header):
    path = tmp_path / "p.safetensors"
    tensors = {"indices": torch.arange(3), "sizes": torch.tensor([3])}
    save_file(tensors, path, metadata={"partition": header})
    with pytest.raises(ValueError, match="holds no partition"):
        load_partition(path)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\0" * 100])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no partition"):
        load_partition(path)


def test_other_tensors_are_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "p.safetensors"
    save_file({"indices": torch.arange(3)}, path)
    with pytest.raises(ValueError, match="holds no partition"):
        load_partition(path)
    save_file(
        {"indices": torch.arange(3), "sizes": torch.tensor([5])},
        path,
        metadata={"partition": '{"facts": {}, "hash": ""}'},
    )
    with pytest.raises(ValueError, match="holds no partition"):
        load_partition(path)
    with pytest.raises(OSError, match="nowhere"):
        load_partition(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ((), "every client must have an example"),
        ((torch.tensor([0]), torch.tensor([], dtype=torch.int64)), "must have an example"),
        ((torch.tensor([0]), torch.tensor([3])), r"indices must lie in 0\.\.2"),
        ((torch.tensor([-1]),), r"indices must lie in 0\.\.2"),
        ((torch.tensor([0, 1]), torch.tensor([1])), "belongs to two clients"),
    ],
)
def test_what_is_no_partition(partition, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_partition(partition, 3)
    if partition:
        save_partition(tmp_path / "p.safetensors", partition)
        with pytest.raises(ValueError, match=words):
            load_partition(tmp_path / "p.safetensors", 3)
