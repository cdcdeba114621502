"""Claims of Gadhikar, Mukherjee & Burkholz 2023, "Why Random Pruning Is All We Need"."""

from __future__ import annotations

from featherweight.lab.claims.claim import CLAIMS, Claim, Trained, accuracy_gain

PAPER = "Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412"
WHOLE = "data.validation=0"  # nothing is chosen on validation images, so all are trained on


def _random(base: str, allocation: str, density: float, *more: str) -> list[str]:
    changes = [f"sparse.allocation={allocation}", f"sparse.density={density}", *more]
    return [base, "sparse.sampling=bernoulli", *changes]


def _ratios(better: str, worse: str) -> Trained:
    return Trained(
        arms={
            a: _random("random-digits", a, 0.01, WHOLE, "fit.length=20ep") for a in (better, worse)
        },
        effect=accuracy_gain(better, worse),
        paper_arms={a: _random("random-cifar10", a, 0.01) for a in (better, worse)},
    )


def _sparse_to_sparse(density: float) -> Trained:
    final = f"sparse.density={density}"
    support = "sparse.support.density=0.3"
    return Trained(
        arms={
            "lrr-in-random": ["lrr-digits", WHOLE, final, support],
            "lrr-from-dense": ["lrr-digits", WHOLE, final],
        },
        effect=accuracy_gain("lrr-in-random", "lrr-from-dense"),
        paper_arms={
            "lrr-in-random": ["lrr-cifar10", "sparse.levels=null", final, support],
            "lrr-from-dense": ["lrr-cifar10", "sparse.levels=null", final],
        },
    )


CLAIMS.add(
    Claim(
        name="layer-ratios-matter",
        paper=PAPER,
        sentence="At extreme sparsity the layers' densities decide how good a random mask is.",
        measured="test accuracy of ERK minus uniform random masks at density 0.01, points",
        experiment=_ratios("erk", "uniform"),
    )
)
CLAIMS.add(
    Claim(
        name="balanced-is-as-good-as-erk",
        paper=PAPER,
        sentence="Keeping the same number of weights in every layer is as good as Erdos-Renyi "
        "densities (here: within two points).",
        measured="test accuracy of balanced minus ERK random masks at density 0.01, points",
        experiment=_ratios("balanced", "erk"),
        region=(-0.02, 0.02),
    )
)
CLAIMS.add(
    Claim(
        name="balanced-beats-erk",
        paper=PAPER,
        sentence="At extreme sparsity balanced densities are better than Erdos-Renyi ones.",
        measured="test accuracy of balanced minus ERK random masks at density 0.01, points",
        experiment=_ratios("balanced", "erk"),
    )
)
for density in (0.0625, 0.03125):
    CLAIMS.add(
        Claim(
            name=f"sparse-to-sparse-costs-little-{density:g}",
            paper=PAPER,
            sentence="Pruning that starts inside a random mask of density 0.3 ends about as "
            "accurate as pruning from the dense network (here: within a point).",
            measured=f"test accuracy of LRR inside it minus LRR at density {density:g}, points",
            experiment=_sparse_to_sparse(density),
            region=(-0.01, 0.01),
        )
    )
