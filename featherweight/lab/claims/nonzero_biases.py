"""Claims of Fischer, Gadhikar & Burkholz 2021, "Lottery Tickets with Nonzero Biases"."""

from __future__ import annotations

import math

from featherweight.lab.claims.claim import CLAIMS, Claim, Computed, Tuned, accuracy_gain
from featherweight.lab.shifted_relu import FLOOR, NOISE, ticket_error

PAPER = "Fischer, Gadhikar & Burkholz 2021, arXiv:2110.11150"
SEEDS = (0, 1, 2)


def _floor(seed: int) -> float:
    return ticket_error(bias=False, density=0.5, seed=seed) / (FLOOR + NOISE**2)


def _below(seed: int) -> float:
    without = ticket_error(bias=False, density=0.5, seed=seed)
    return math.log10(without / ticket_error(bias=True, density=0.5, seed=seed))


CLAIMS.add(
    Claim(
        name="zero-bias-tickets-sit-on-their-floor",
        paper=PAPER,
        sentence="Tickets without biases can't do better on a shifted ReLU than theory says, and "
        "reach that (here: within a tenth).",
        measured="test error of edge-popup at density 0.5 without biases over the floor",
        experiment=Computed(_floor, SEEDS),
        region=(0.9, 1.1),
        scale=1.0,
    )
)
CLAIMS.add(
    Claim(
        name="nonzero-bias-tickets-go-far-below",
        paper=PAPER,
        sentence="With random biases to choose from, tickets of the same density go far below "
        "that floor (here: more than tenfold).",
        measured="test error of edge-popup at density 0.5 without biases over that with, as powers "
        "of ten",
        experiment=Computed(_below, SEEDS),
        region=(1.0, float("inf")),
        scale=1.0,
    )
)


RATES = (0.1, 0.3, 1.0, 3.0)


def _popup(arms: dict[str, list[str]], better: str, worse: str) -> Tuned:
    common = ["edge-popup-digits", "model.options.norm=none", "model.options.width=200"]
    return Tuned(
        arms={name: [*common, *changes] for name, changes in arms.items()},
        rates=RATES,
        effect=accuracy_gain(better, worse),
        paper_arms={
            name: ["random-cifar10", "model.name=vgg16", "sparse.method=edge-popup", *changes]
            for name, changes in arms.items()
        },
        seeds=SEEDS,
    )


CLAIMS.add(
    Claim(
        name="looks-linear-helps-edge-popup",
        paper=PAPER,
        sentence="At high sparsity edge-popup finds better tickets in a looks-linear start than in "
        "He's weights, the learning rate tuned for both.",
        measured="test accuracy of edge-popup at density 0.05, looks-linear minus He, points",
        experiment=_popup(
            {
                "looks-linear": ["sparse.density=0.05", "model.init=looks-linear"],
                "he": ["sparse.density=0.05"],
            },
            "looks-linear",
            "he",
        ),
    )
)
CLAIMS.add(
    Claim(
        name="random-masks-hold-strong-tickets",
        paper="Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412",
        sentence="A random sparse network holds strong tickets as good as those of the dense one, "
        "at moderate density (here: within one point).",
        measured="test accuracy of edge-popup at density 0.5 inside a random mask of density 0.8 "
        "minus that in all weights, points",
        experiment=_popup(
            {
                "inside": [
                    *["sparse.density=0.5", "sparse.support.density=0.8"],
                    "sparse.support.allocation=uniform",
                ],
                "free": ["sparse.density=0.5"],
            },
            "inside",
            "free",
        ),
        region=(-0.01, float("inf")),
    )
)
