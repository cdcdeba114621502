"""From a federated recipe to clients: data, division, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.heterogeneity import PartitionReport, partition_report
from featherweight.federated.partition import (
    PARTITIONS,
    Partition,
    check_partition,
    load_partition,
    shuffled,
)
from featherweight.federated.population import Population
from featherweight.lab.data import Data, Split
from featherweight.lab.data import load as load_data
from featherweight.lab.data.seeding import derive_generator
from featherweight.lab.errors import BadInput
from featherweight.lab.federated_recipe import FederatedRecipe


@dataclass(frozen=True, eq=False)
class Clients:
    """Who trains, and on whom the model is judged.

    Attributes:
        train: the clients of training.
        validation: what choices are made on: a pool (one client), clients that never train, or
            images kept back from each client.
        test: looked at once, at the end; by writer where the division is natural, else a pool.
        partition: indices into the training images, of all clients, before clients or images were
            held out.
        report: what the training clients hold.
        data: as loaded.
    """

    train: Population
    validation: Population
    test: Population
    partition: Partition
    report: PartitionReport
    data: Data


def make_clients(recipe: FederatedRecipe, seed: int) -> Clients:
    """Load the recipe's data and divide it.

    Args:
        recipe: what to do.
        seed: of the run.

    Raises:
        BadInput: the data are missing or damaged, or cannot be divided as asked.
    """
    data = _read(recipe)
    writers = _writers(recipe) if recipe.partition.method == "natural" else None
    if writers is not None and len(writers["train"]) != len(data.train):
        raise BadInput(f"partition: writers.npz names {len(writers['train'])} training images")
    pool, held_out = _pooled(recipe, len(data.train))
    try:
        partition = _divide(recipe, data.train.labels, writers, pool, seed)
        train, validation = _hold_out(recipe, partition, held_out, seed)
        check_partition((*train, *validation), len(data.train))
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(f"partition: {' '.join(str(error).split())}") from None
    device = recipe.execute.device
    images, labels = _normalised(data, data.train).to(device), data.train.labels.to(device)
    people = None if writers is None else writers["test"]
    return Clients(
        train=Population(images, labels, train),
        validation=Population(images, labels, validation),
        test=_test(data, people, device),
        partition=partition,
        report=partition_report(data.train.labels, train),
        data=data,
    )


def _read(recipe: FederatedRecipe) -> Data:
    if recipe.partition.method == "natural" and recipe.data.limit is not None:
        raise BadInput("data.limit: a natural partition takes partition.clients instead")
    asked = recipe.data
    try:
        return load_data(
            asked.name, asked.path, validation=0, limit=asked.limit, seed=asked.split_seed
        )
    except (ValueError, OSError) as error:
        raise BadInput(f"data: {error}") from error


def _writers(recipe: FederatedRecipe) -> dict[str, Tensor]:
    if recipe.data.name != "mnist" or recipe.data.path is None:
        raise BadInput(
            "partition.method: natural knows the writers of mnist alone: data.name=mnist "
            "data.path=FOLDER"
        )
    folder = Path(recipe.data.path).expanduser()
    for path in (folder / "writers.npz", folder / "mnist" / "writers.npz"):
        if path.is_file():
            return _read_writers(path)
    raise BadInput(f"partition.method: natural wants writers.npz in {folder}")


def _read_writers(path: Path) -> dict[str, Tensor]:
    """Read the writer of each training and test image; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {part: torch.from_numpy(file[part].astype(np.int64)) for part in _PARTS}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BadInput(f"{path} holds no writers: {' '.join(str(error).split())}") from None


_PARTS = ("train", "test")


def _pooled(recipe: FederatedRecipe, images: int) -> tuple[Tensor, Tensor]:
    """Take a pool off for validation, the same for all seeds of a run; none for other splits."""
    order = torch.randperm(images, generator=derive_generator(recipe.data.split_seed, "pool"))
    pooled = recipe.evaluate.split == "pooled"
    count = max(1, round(recipe.evaluate.fraction * images)) if pooled else 0
    return order[count:].sort().values, order[:count].sort().values


def _divide(
    recipe: FederatedRecipe,
    labels: Tensor,
    writers: dict[str, Tensor] | None,
    pool: Tensor,
    seed: int,
) -> Partition:
    asked = recipe.partition
    if asked.file is not None:
        return load_partition(asked.file, len(labels))[0]
    drawn = seed if asked.seed is None else asked.seed
    given: dict[str, Any] = dict(asked.options)
    if writers is not None:
        given["groups"] = writers["train"][pool]
    method = PARTITIONS[asked.method].method
    found = method(labels[pool], clients=asked.clients, seed=drawn, **given)
    twin = shuffled(found, seed=drawn, fraction=asked.twin) if asked.twin else found
    return tuple(pool[part] for part in twin)


def _hold_out(
    recipe: FederatedRecipe, partition: Partition, pool: Tensor, seed: int
) -> tuple[Partition, Partition]:
    """Return the training clients, and what validates."""
    asked = recipe.evaluate
    if asked.split == "pooled":
        return partition, (pool,)
    drawn = seed if recipe.partition.seed is None else recipe.partition.seed
    generator = derive_generator(drawn, "held out")
    if asked.split == "examples":
        return _hold_out_examples(partition, asked.fraction, generator)
    count = max(1, round(asked.fraction * len(partition)))
    if count >= len(partition):
        raise ValueError(f"none of {len(partition)} clients would be left to train")
    order = torch.randperm(len(partition), generator=generator).tolist()
    parts = [[partition[i] for i in sorted(some)] for some in (order[count:], order[:count])]
    return tuple(parts[0]), tuple(parts[1])


def _hold_out_examples(
    partition: Partition, fraction: float, generator: torch.Generator
) -> tuple[Partition, Partition]:
    """Keep back part of each client's images, one at least; a client of one image trains on it."""
    train, validation = [], []
    for part in partition:
        order = part[torch.randperm(len(part), generator=generator)]
        count = min(max(1, round(fraction * len(part))), len(part) - 1)
        train.append(order[count:].sort().values)
        validation += [order[:count].sort().values] if count else []
    return tuple(train), tuple(validation)


def _test(data: Data, writers: Tensor | None, device: str) -> Population:
    if writers is None:
        clients: Partition = (torch.arange(len(data.test)),)
    elif len(writers) == len(data.test):
        clients = PARTITIONS["natural"].method(data.test.labels, groups=writers)
    else:
        raise BadInput(f"partition: writers.npz names {len(writers)} test images")
    images = _normalised(data, data.test)
    return Population(images.to(device), data.test.labels.to(device), clients)


def _normalised(data: Data, split: Split) -> Tensor:
    """Return images as the other runs of the lab see them: standardised by channel."""
    scale = 255 if split.images.dtype == torch.uint8 else 1
    mean, std = (values.view(1, -1, 1, 1) for values in (data.mean, data.std))
    return (split.images.float() / scale - mean) / std
