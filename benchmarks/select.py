"""Scores and exact selection on a network of the size of ResNet-50 (25.5 million weights).

Peer: the threshold of torch's own `torch.nn.utils.prune.global_unstructured` (L1), which prunes the
same weights but keeps its masks in the model.
"""

import copy
from statistics import median

from torch.nn.utils import prune

from benchmarks.timing import alternate
from featherweight import sparse
from featherweight.lab import models

ROUNDS = 5


def measure() -> str:
    model = models.build("resnet50", classes=1000, shape=(3, 224, 224), seed=0, stem="imagenet")
    candidates = {
        "magnitude, global": lambda: sparse.magnitude(model, 0.1),
        "magnitude, erk": lambda: sparse.magnitude(model, 0.1, "erk"),
        "random, erk": lambda: sparse.random(model, 0.1, "erk", seed=0),
        "torch.nn.utils.prune global L1": lambda: _peer(copy.deepcopy(model)),
    }
    times = alternate(candidates, ROUNDS)
    rows = ["| call | seconds |", "|---|---|"]
    rows += [f"| {name} | {median(own):.2f} |" for name, own in times.items()]
    return "\n".join(rows)


def _peer(model):
    modules = dict(model.named_modules())
    names = [n.removesuffix(".weight") for n in sparse.Masks.dense(model)]
    pairs = [(modules[name], "weight") for name in names]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.9)
