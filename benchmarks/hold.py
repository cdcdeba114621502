"""A training step held by masks, as a ratio to the dense step and to masked forward passes.

Four Linear(1024, 1024) layers with ReLU (4.2 million weights), cross entropy, density 0.1. Peer:
`torch.nn.utils.prune.custom_from_mask`, which multiplies by the mask in every forward pass. Every
figure is the median over rounds of the ratio to the dense step of the same round. Unfused AdamW is
slow on any sparse network on this CPU: torch's square root takes several times as long on exact
zeros; its fused form is not affected.
"""

import copy
from statistics import median

import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.timing import alternate, ratios
from featherweight import sparse

ROUNDS = 40
OPTIMIZERS = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=1e-4),
    "SGD, momentum, fused": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
}


def measure() -> str:
    torch.manual_seed(0)
    rows = [
        "| optimizer | batch | dense step | held | torch.nn.utils.prune |",
        "|---|---|---|---|---|",
    ]
    for name, make in OPTIMIZERS.items():
        for batch in (128, 256, 512):
            times = alternate(_candidates(make, batch), ROUNDS)
            found = ratios(times, "dense")
            dense = f"{1e3 * median(times['dense']):.1f} ms"
            rows.append(
                f"| {name} | {batch} | {dense} | {found['held']:.3f} | {found['prune']:.3f} |"
            )
    return "\n".join(rows)


def _candidates(make, batch):
    dense = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(1024, 1024), nn.ReLU())])
    held, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = sparse.random(dense, 0.1, "uniform", seed=0)
    optimizers = {"dense": make(dense.parameters()), "held": make(held.parameters())}
    sparse.hold(held, optimizers["held"], masks)
    for name, mask in masks.items():
        prune.custom_from_mask(pruned.get_submodule(name.removesuffix(".weight")), "weight", mask)
    optimizers["prune"] = make(pruned.parameters())
    inputs, labels = torch.randn(batch, 1024), torch.randint(1024, (batch,))
    models = {"dense": dense, "held": held, "prune": pruned}
    return {name: _step(models[name], optimizers[name], inputs, labels) for name in models}


def _step(model, optimizer, inputs, labels):
    def step():
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
