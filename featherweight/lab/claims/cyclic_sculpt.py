"""Claims of Gadhikar, Nelaturu & Burkholz 2024, "Cyclic Sparse Training: Is it Enough?"."""

from __future__ import annotations

from featherweight.lab.claims.claim import CLAIMS, Claim, Trained, accuracy_gain

PAPER = "Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773"
WHOLE = "data.validation=0"  # nothing is chosen on validation images, so all are trained on
CYCLES = 8
RANDOM = [WHOLE, "sparse.density=0.01", "sparse.allocation=erk"]
PAPER_RANDOM = ["sparse.density=0.02", "sparse.allocation=erk"]


def _one_schedule(base: str, changes: list[str], epochs: int) -> list[str]:
    return [base, *changes, f"fit.length={epochs}ep"]


def _cycles(base: str, changes: list[str]) -> list[str]:
    return [base, *changes, "sparse.method=cyclic", f"sparse.options.cycles={CYCLES}"]


CLAIMS.add(
    Claim(
        name="cycles-help-random-masks",
        paper=PAPER,
        sentence="Training a random mask in repeated learning-rate cycles is more accurate than "
        "training it in one cycle.",
        measured=f"test accuracy of {CYCLES} cycles minus 1 cycle at density 0.01, points",
        experiment=Trained(
            arms={
                "cyclic": _cycles("random-digits", RANDOM),
                "one-cycle": ["random-digits", *RANDOM],
            },
            effect=accuracy_gain("cyclic", "one-cycle"),
            paper_arms={
                "cyclic": _cycles("random-cifar10", PAPER_RANDOM),
                "one-cycle": ["random-cifar10", *PAPER_RANDOM],
            },
        ),
    )
)
CLAIMS.add(
    Claim(
        name="cycles-beat-one-long-schedule",
        paper=PAPER,
        sentence="Repeated cycles are more accurate than a single learning-rate schedule of the "
        "same number of epochs.",
        measured=f"test accuracy of {CYCLES} cycles minus one schedule {CYCLES} times as long, on "
        "the same random mask at density 0.01, points",
        experiment=Trained(
            arms={
                "cyclic": _cycles("random-digits", RANDOM),
                "one-schedule": _one_schedule("random-digits", RANDOM, CYCLES * 15),
            },
            effect=accuracy_gain("cyclic", "one-schedule"),
            paper_arms={
                "cyclic": _cycles("random-cifar10", PAPER_RANDOM),
                "one-schedule": _one_schedule("random-cifar10", PAPER_RANDOM, CYCLES * 160),
            },
        ),
    )
)


def _sculpt(base: str, start: float, density: float, cycles: int) -> list[str]:
    return [
        base,
        f"sparse.support.density={start}",
        f"sparse.density={density}",
        f"sparse.options.cycles={cycles}",
    ]


CLAIMS.add(
    Claim(
        name="sculpt-matches-lrr",
        paper=PAPER,
        sentence="SCULPT-ing is as accurate as learning rate rewinding in half of the epochs "
        "(here: within one point).",
        measured="test accuracy of SCULPT from density 0.1 (2 cycles, a pruning, 1 cycle) minus "
        "LRR (6 trainings), both at density 1/32, points",
        experiment=Trained(
            arms={
                "sculpt": [*_sculpt("sculpt-digits", 0.1, 0.03125, 2), WHOLE],
                "lrr": ["lrr-digits", "sparse.density=0.03125", WHOLE],
            },
            effect=accuracy_gain("sculpt", "lrr"),
            paper_arms={
                "sculpt": _sculpt("sculpt-cifar10", 0.2, 0.1, 5),
                "lrr": ["lrr-cifar10", "sparse.levels=null", "sparse.density=0.1"],
            },
        ),
        region=(-0.01, float("inf")),
    )
)
CLAIMS.add(
    Claim(
        name="sculpt-beats-cycles-at-the-target",
        paper=PAPER,
        sentence="Cycles on a denser mask and one pruning are more accurate than as many cycles on "
        "a mask of the target density.",
        measured="test accuracy of SCULPT from 0.1 (4 + 1 cycles) minus 5 cycles of a random mask, "
        "both at density 0.03, points",
        experiment=Trained(
            arms={
                "sculpt": [*_sculpt("sculpt-digits", 0.1, 0.03, 4), WHOLE],
                "cyclic": [
                    "cyclic-digits",
                    "sparse.density=0.03",
                    "sparse.options.cycles=5",
                    WHOLE,
                ],
            },
            effect=accuracy_gain("sculpt", "cyclic"),
            paper_arms={
                "sculpt": _sculpt("sculpt-cifar10", 0.2, 0.1, 4),
                "cyclic": ["cyclic-cifar10", "sparse.density=0.1", "sparse.options.cycles=5"],
            },
        ),
    )
)
