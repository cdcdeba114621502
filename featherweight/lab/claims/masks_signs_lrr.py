"""Claims of Gadhikar & Burkholz 2024, "Masks, Signs, And Learning Rate Rewinding"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from featherweight.lab.claims.claim import CLAIMS, Claim, Computed, Trained, accuracy_gain, levels
from featherweight.lab.neuron import quadrant_table

PAPER = "Gadhikar & Burkholz 2024, arXiv:2402.19262"
WHOLE = "data.validation=0"  # nothing is chosen on validation images, so all are trained on


def _flip_gain(runs: Mapping[str, Path]) -> float:
    flips = {arm: levels(run)[-1]["flips_from_start"] for arm, run in runs.items()}
    lrr, imp = (float(flips[arm]["flipped"] / flips[arm]["kept"]) for arm in ("lrr", "imp"))
    return lrr - imp


def _neuron_gain(seed: int) -> float:
    table = quadrant_table(seed=seed)
    return table.rate(1, -1, "lrr") - table.rate(1, -1, "imp")


CLAIMS.add(
    Claim(
        name="lrr-beats-imp",
        paper=PAPER,
        sentence="At high sparsity learning rate rewinding is more accurate than iterative "
        "magnitude pruning.",
        measured="test accuracy of LRR minus IMP at density 1/64, points",
        experiment=Trained(
            arms={"lrr": ["lrr-digits", WHOLE], "imp": ["imp-digits", WHOLE]},
            effect=accuracy_gain("lrr", "imp"),
            paper_arms={"lrr": ["lrr-cifar10"], "imp": ["imp-cifar10"]},
        ),
    )
)
CLAIMS.add(
    Claim(
        name="lrr-trains-imp-masks-better",
        paper=PAPER,
        sentence="Learning rate rewinding trains the masks that IMP found to a higher accuracy "
        "than IMP does.",
        measured="test accuracy of LRR on IMP's masks minus IMP at density 1/64, points",
        experiment=Trained(
            arms={
                "imp": ["imp-digits", WHOLE],
                "lrr-imp-masks": ["lrr-digits", WHOLE, "sparse.masks_from={imp}"],
            },
            effect=accuracy_gain("lrr-imp-masks", "imp"),
            paper_arms={
                "imp": ["imp-cifar10"],
                "lrr-imp-masks": ["lrr-cifar10", "sparse.masks_from={imp}"],
            },
        ),
    )
)
CLAIMS.add(
    Claim(
        name="lrr-trains-random-masks-better",
        paper=PAPER,
        sentence="On masks pruned at random level by level, training on (LRR) is more accurate "
        "than going back to the start (IMP).",
        measured="test accuracy of LRR minus IMP on the same random balanced masks at density "
        "1/64, points",
        experiment=Trained(
            arms={
                f"{loop}-random-masks": [
                    f"{loop}-digits",
                    WHOLE,
                    "sparse.criterion=random",
                    "sparse.allocation=balanced",
                ]
                for loop in ("lrr", "imp")
            },
            effect=accuracy_gain("lrr-random-masks", "imp-random-masks"),
            paper_arms={
                f"{loop}-random-masks": [
                    f"{loop}-cifar10",
                    "sparse.criterion=random",
                    "sparse.allocation=balanced",
                ]
                for loop in ("lrr", "imp")
            },
        ),
    )
)
CLAIMS.add(
    Claim(
        name="lrr-flips-more-signs",
        paper=PAPER,
        sentence="LRR flips the signs of weights in early levels and carries the flips on; IMP "
        "undoes them by rewinding.",
        measured="kept weights whose sign differs from the start, LRR minus IMP at density 1/64, "
        "percentage points",
        experiment=Trained(
            arms={"lrr": ["lrr-digits", WHOLE], "imp": ["imp-digits", WHOLE]},
            effect=_flip_gain,
            paper_arms={"lrr": ["lrr-cifar10"], "imp": ["imp-cifar10"]},
        ),
    )
)
CLAIMS.add(
    Claim(
        name="lrr-neuron-needs-one-sign",
        paper=PAPER,
        sentence="For one hidden neuron with a positive outer weight, LRR succeeds whatever the "
        "sign of the inner weight; IMP needs it positive too.",
        measured="success rate of LRR minus IMP where a(0) > 0 and w1(0) < 0, percentage points",
        experiment=Computed(_neuron_gain, seeds=(0, 1, 2)),
    )
)
