"""Two processes that average gradients by the hooks.

``python -m tests.federated.ddp_ranks FOLDER``: writes ``RANK.pt``.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from featherweight.federated.ddp import RandKState, rand_k_hook, rand_k_spatial_hook

HOOKS = {"shared": rand_k_hook, "spatial": rand_k_spatial_hook}
STEPS = 200


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4)


def inputs(rank):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(rank))


def gradient(model, rank):
    model.zero_grad()
    model(inputs(rank)).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def hooked(hook, k, steps, rank):
    model = DistributedDataParallel(network())
    state = RandKState(k, seed=3)
    model.register_comm_hook(state, hook)
    found = torch.stack([gradient(model, rank) for _ in range(steps)])
    return found, state.step


def main(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    found = {"alone": gradient(network(), rank)}
    for name, hook in HOOKS.items():
        found[name, "all"] = hooked(hook, 1.0, 2, rank)
        found[name, "some"] = hooked(hook, 0.5, STEPS, rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort an interpreter that is being torn down


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
