"""Throughput of routed vision transformers of ViT-S's size against their ideal FLOP ratio.

Medians of alternating runs; ratios are to the dense model with fused attention, in the same run.
A shallower dense model of about equal count stands beside them. Inference at batches of 8 and 32,
training steps (forward, backward, AdamW) at a batch of 8; 197 and 785 tokens.
"""

import copy
import sys
from typing import NamedTuple

import torch

from benchmarks.timing import alternate, ratios
from featherweight import depth
from featherweight.lab.models.vit import Vit


class Case(NamedTuple):
    """Side of the image, batch, whether it trains, and rounds: fewer where one takes a minute."""

    side: int
    batch: int
    training: bool
    rounds: int


class Size(NamedTuple):
    """The model, and what is measured of it."""

    width: int
    layers: int
    heads: int
    cases: tuple[Case, ...]


FULL = Size(
    384, 12, 6,
    (Case(224, 8, False, 5), Case(224, 32, False, 5), Case(448, 8, False, 3),
     Case(448, 32, False, 2), Case(224, 8, True, 5), Case(448, 8, True, 2)),
)  # fmt: skip
QUICK = Size(96, 4, 3, (Case(64, 2, False, 2), Case(64, 2, True, 2)))
CAPACITIES = (0.5, 0.125)
PATCH = 16
HEAD = "| tokens | batch | mode | model | FLOP ratio | time ratio | ideal / measured |"


def measure(size: Size | None = None) -> str:
    size = size or (QUICK if "--quick" in sys.argv else FULL)
    rows = [HEAD, "|---|---|---|---|---|---|---|"]
    for case in size.cases:
        rows += _case(size, case)
    return "\n".join(rows)


def _case(size: Size, case: Case) -> list[str]:
    side, batch = case.side, case.batch
    torch.manual_seed(0)
    dense = Vit(1000, (3, side, side), PATCH, size.width, size.layers, size.heads)
    tokens = (side // PATCH) ** 2 + 1
    models = {"dense": dense, **_routed(dense, tokens)}
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))
    step = _training if case.training else _inference
    times = alternate({n: step(m, images, labels) for n, m in models.items()}, case.rounds)
    base = depth.flops(dense, tokens).total
    rows = []
    for name, ratio in ratios(times, "dense").items():
        ideal = depth.flops(models[name], tokens).total / base
        mode = "training" if case.training else "inference"
        rows.append(
            f"| {tokens} | {batch} | {mode} | {name} | {ideal:.3f} | {ratio:.3f} "
            f"| {ideal / ratio:.2f} |"
        )
    return rows


def _routed(dense, tokens: int) -> dict[str, torch.nn.Module]:
    models = {}
    for capacity in CAPACITIES:
        label = f"{100 * capacity:g} %"
        models[f"A-MoD {label}"] = depth.a_mod(copy.deepcopy(dense), capacity)
        models[f"MoD {label}"] = depth.mod(copy.deepcopy(dense), capacity)
        same = depth.isoflop(models[f"A-MoD {label}"], tokens)
        models[f"{same.layers} layers"] = depth.fewer_layers(dense, same.layers)
    return models


def _inference(model, images, _labels):
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def _training(model, images, labels):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def run() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    print(measure())
