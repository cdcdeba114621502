"""Two processes that train with every optimizer, replicated and sharded.

``python -m tests.optim.ranks FOLDER``: writes ``RANK.pt``.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.optim.factories import ROWS, batch, network

STEPS, RESUMED = range(4), range(4, 6)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def half_batches(model, optimizer, rank, steps):
    for step in steps:
        images, labels = (part.chunk(2)[rank] for part in batch(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def whole(model):
    return {
        name.removeprefix("module."): (v.full_tensor() if isinstance(v, DTensor) else v).clone()
        for name, v in model.state_dict().items()
    }


def replicated(name, rank):
    model = DistributedDataParallel(network())
    half_batches(model, ROWS[name].make(model.parameters()), rank, [*STEPS, *RESUMED])
    return whole(model)


def sharded():
    model = network()
    fully_shard(model)
    return model


def sharded_and_resumed(name, rank):
    model = sharded()
    optimizer = ROWS[name].make(model.parameters())
    half_batches(model, optimizer, rank, STEPS)
    weights, state = get_state_dict(model, optimizer, options=FULL)
    saved = [(weights, state)]
    dist.broadcast_object_list(saved)  # full state dicts live on rank 0
    model = sharded()
    optimizer = ROWS[name].make(model.parameters())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved[0][0],
        optim_state_dict=saved[0][1],
        options=StateDictOptions(full_state_dict=True),
    )
    half_batches(model, optimizer, rank, RESUMED)
    return whole(model)


def main(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    found = {
        (name, how.__name__): how(name, rank)
        for name, row in ROWS.items()
        for how in (replicated, sharded_and_resumed)
        if row.dtensor or how is replicated
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort an interpreter that is being torn down


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
