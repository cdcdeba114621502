"""Training whose masks change every 100 steps, as a ratio to training with a fixed mask.

SET and RigL at density 0.1 beside the same training with its first masks held; each figure is the
median over rounds of the ratio to the fixed mask of the same round. A round is 100 steps of SGD
with momentum, one of which changes the masks. RigL's round has one step less that moves weights, so
its ratio can lie under 1. The last column is the time of the change alone, as a share of 100 steps.
"""

import copy
import time
from statistics import median

import torch
from torch import nn

from benchmarks.timing import alternate, ratios
from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse.dynamic import DYNAMIC

ROUNDS = 5
INTERVAL = 100


def measure() -> str:
    torch.manual_seed(0)
    mlp = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(1024, 1024), nn.ReLU())])
    resnet = models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0)
    cases = {
        "MLP 4 x (1024, 1024), batch 128": (mlp, torch.randn(128, 1024), 1024),
        "ResNet-20, batch 32": (resnet, torch.randn(32, 3, 32, 32), 10),
    }
    rows = [
        "| network | fixed mask, 100 steps | method | ratio | the change alone |",
        "|---|---|---|---|---|",
    ]
    for name, (model, inputs, classes) in cases.items():
        labels = torch.randint(classes, (len(inputs),))
        rounds, changes = _candidates(model, inputs, labels)
        times = alternate(rounds, ROUNDS)
        fixed, found = median(times["fixed"]), ratios(times, "fixed")
        for method, seconds in changes.items():
            share = f"{100 * median(seconds) / fixed:.2f} %"
            rows.append(f"| {name} | {fixed:.1f} s | {method} | {found[method]:.3f} | {share} |")
    return "\n".join(rows)


def _candidates(model, inputs, labels):
    masks = sparse.random(model, 0.1, seed=0)
    rounds, changes = {}, {}
    for name in ("fixed", "set", "rigl"):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
        if name == "fixed":
            sparse.hold(own, optimizer, masks)
        else:
            attach, steps = DYNAMIC[name].method, 10**6
            evolving = attach(own, optimizer, steps=steps, masks=masks, interval=INTERVAL, seed=0)
            changes[name] = _timed(evolving)
        rounds[name] = _round(own, optimizer, inputs, labels)
    return rounds, changes


def _timed(evolving):
    """Collect the seconds that each change takes."""
    seconds, change = [], evolving._change

    def timed():
        started = time.perf_counter()
        change()
        seconds.append(time.perf_counter() - started)

    evolving._change = timed
    return seconds


def _round(model, optimizer, inputs, labels):
    def steps():
        for _ in range(INTERVAL):
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps
