"""Claims of Gadhikar & Burkholz 2022, "Dynamical Isometry for Residual Networks"."""

from __future__ import annotations

from featherweight.lab.claims.claim import CLAIMS, Claim, Tuned, accuracy_gain

PAPER = "Gadhikar & Burkholz 2022, arXiv:2210.02411"
SEEDS = (0, 1, 2)
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
SHORT = ["fit.length=5ep", "fit.schedule=cosine", "fit.weight_decay=0"]
DEEP = [
    *["dense-digits", "model.name=residual-mlp", "model.options.blocks=50"],
    *["model.options.width=128", *SHORT],
]
WIDE = ["risotto-resnet18-cifar10", "data.validation=0.1", "fit.clip=null"]

STARTS = {
    "risotto": ["model.init=risotto", "model.options.scale=branch"],
    "fixup": ["model.init=fixup", "model.options.norm=fixup", "fit.scalar_rate=0.1"],
    "skipinit": ["model.init=skipinit", "model.options.scale=branch"],
    "balanced": ["model.init=balanced", "model.options.scale=both"],
}
NAMES = {
    "fixup": "Fixup",
    "skipinit": "SkipInit",
    "balanced": "He's weights, branch and skip in balance",
}


def _against(other: str) -> Tuned:
    options = ["model.options.norm=none", "model.options.scale=none", "model.options.shortcut=C"]
    arms = {name: [*options, *STARTS[name]] for name in ("risotto", other)}
    return Tuned(
        arms={name: [*DEEP, *changes] for name, changes in arms.items()},
        rates=RATES,
        effect=accuracy_gain("risotto", other),
        paper_arms={name: [*WIDE, *changes] for name, changes in arms.items()},
        seeds=SEEDS,
    )


for other, name in NAMES.items():
    CLAIMS.add(
        Claim(
            name=f"risotto-beats-{other}",
            paper=PAPER,
            sentence=f"Without norms RISOTTO trains deep residual networks with projections to a "
            f"higher accuracy than {name}, the learning rate tuned for both.",
            measured=f"test accuracy of RISOTTO minus {other}, 50 blocks of width 128, 5 epochs, "
            "each at its best learning rate, points",
            experiment=_against(other),
        )
    )


def _with_norms() -> Tuned:
    mini = ["dense-digits", "model.name=resnet20", "model.options.shortcut=C", *SHORT]
    paper = [*WIDE, "model.options.norm=batch", "model.options.scale=none"]
    return Tuned(
        arms={"risotto": [*mini, "model.init=risotto"], "he": mini},
        rates=(0.3, *RATES),
        effect=accuracy_gain("risotto", "he"),
        paper_arms={"risotto": paper, "he": [*paper, "model.init=null"]},
        seeds=SEEDS,
    )


CLAIMS.add(
    Claim(
        name="risotto-suits-batch-norm",
        paper=PAPER,
        sentence="With batch norm RISOTTO is at least as good as He's weights (here: at most one "
        "point behind), the learning rate tuned for both.",
        measured="test accuracy of RISOTTO minus He's weights, ResNet-20 with projections, "
        "5 epochs, each at its best learning rate, points",
        experiment=_with_norms(),
        region=(-0.01, float("inf")),
    )
)
