"""Routers: what a token is worth to a layer.

Each returns scores [B, N]; the layer processes the tokens with the highest. Registered by
``ROUTERS``, whose entries say under ``needs`` what a router asks for: ``attention`` (the map of an
earlier layer), ``weights`` (learned), ``seed``, or ``scores`` (given by the user).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import Registry, as_generator
from featherweight.depth.ledger import Ledger

A_MOD = "Gadhikar et al. 2024, arXiv:2412.20875"
MOD = "Raposo et al. 2024, arXiv:2404.02258"
START_STD = 0.02


@dataclass(frozen=True)
class Sight:
    """What a router sees.

    Attributes:
        x: tokens [B, N, D] that enter the layer.
        layer: number of the layer.
        source: number of the layer whose score it reads; -1 for none.
        seed: of random choices.
        ledger: what earlier layers and the user wrote.
        router: the layer's learned router, or None.
    """

    x: Tensor
    layer: int
    source: int
    seed: int
    ledger: Ledger
    router: nn.Module | None


Router = Callable[[Sight], Tensor]
ROUTERS: Registry[Router] = Registry("router")


@ROUTERS.register("a-mod", "attention a token received in the layer before", A_MOD, ["attention"])
def received_attention(sight: Sight) -> Tensor:
    """Read the column means of an earlier layer's attention map (A-MoD, eq. 4)."""
    return sight.ledger.score(sight.source)


@ROUTERS.register(
    "cls-row",
    "attention the class token paid to it",
    needs=["attention"],
    defaults={"queries": "cls"},
)
def class_row(sight: Sight) -> Tensor:
    """Read how much the class token attended to each token: one row instead of all columns."""
    return sight.ledger.score(sight.source)


@ROUTERS.register(
    "mod", "learned linear score, multiplied into the update", MOD, ["weights"], {"gate": "unit"}
)
def learned(sight: Sight) -> Tensor:
    """Apply the layer's linear router of Mixture-of-Depths."""
    assert sight.router is not None
    scores: Tensor = sight.router(sight.x).squeeze(-1)
    return scores


@ROUTERS.register(
    "random-tokens", "tokens drawn at random, anew in every training step", needs=["seed"]
)
def random_tokens(sight: Sight) -> Tensor:
    """Draw uniform scores on the CPU; in evaluation mode the same for every forward."""
    generator = as_generator(sight.ledger.seed(sight.seed, sight.layer))
    return torch.rand(sight.x.shape[:2], generator=generator).to(sight.x.device)


@ROUTERS.register("first-tokens", "always the first tokens")
def first_tokens(sight: Sight) -> Tensor:
    """Score all tokens alike, which chooses the lowest indices: what routing costs at the least."""
    return torch.zeros(sight.x.shape[:2], device=sight.x.device)


@ROUTERS.register("external", "scores that you give", needs=["scores"])
def external(sight: Sight) -> Tensor:
    """Read the scores given by `featherweight.depth.given_scores`."""
    scores = sight.ledger.external
    if scores is None:
        raise ValueError("this model routes by external scores: call it inside given_scores(...)")
    if scores.shape != sight.x.shape[:2]:
        expected = tuple(sight.x.shape[:2])
        raise ValueError(f"scores must be [B, N] = {expected}, got {tuple(scores.shape)}")
    return scores.to(sight.x.device)


def linear_router(width: int, like: Tensor, std: float, generator: torch.Generator) -> nn.Linear:
    """Return a router of ``width`` weights, N(0, std^2), on the device and in the dtype of like."""
    router = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        router.weight.copy_(torch.randn(1, width, generator=generator) * std)
    return router.to(device=like.device, dtype=like.dtype)


def predictor(width: int, like: Tensor, generator: torch.Generator) -> nn.Sequential:
    """Return a small perceptron, width to 1, that predicts whether top-k would choose a token."""
    hidden = max(1, width // 4)
    down, up = nn.Linear(width, hidden), nn.Linear(hidden, 1)
    with torch.no_grad():
        for layer in (down, up):
            fan_in = layer.weight.shape[1]
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / fan_in**0.5)
            layer.bias.zero_()
    return nn.Sequential(down, nn.SiLU(), up).to(device=like.device, dtype=like.dtype)
