"""Claims of Gadhikar, Jacobs, Zhou & Burkholz 2025, "Sign-In to the Lottery"."""

from __future__ import annotations

from featherweight.lab.claims.claim import CLAIMS, Claim, Computed, Trained, Tuned, accuracy_gain
from featherweight.lab.sign_toy import Betas, sign_table

PAPER = "Gadhikar, Jacobs, Zhou & Burkholz 2025, arXiv:2504.12801"
WHOLE = "data.validation=0"  # nothing is chosen on validation images, so all are trained on
LRR = {"mini": ["lrr-digits", WHOLE], "paper": ["lrr-cifar10"]}
RETRAIN = {
    "mini": ["dense-digits", WHOLE],
    "paper": ["lrr-cifar10", "sparse.method=dense", "sparse.levels=null"],
}


def _coupled(scale: str, signs: str, magnitudes: str) -> list[str]:
    """Train inside LRR's last mask, with weights that take something from LRR or nothing."""
    coupling = [f"sparse.couple.signs={signs}", f"sparse.couple.magnitudes={magnitudes}"]
    return [*RETRAIN[scale], "sparse.masks_from={lrr}", "sparse.couple.run={lrr}", *coupling]


def _transfer(better: str, worse: str) -> Trained:
    def arms(scale: str) -> dict[str, list[str]]:
        every = {
            "lrr": LRR[scale],
            "learned-signs": _coupled(scale, "learned", "random"),
            "learned-magnitudes": _coupled(scale, "random", "learned"),
            "fresh-weights": _coupled(scale, "random", "random"),
        }
        return {arm: every[arm] for arm in ("lrr", *dict.fromkeys((better, worse))) if arm in every}

    return Trained(arms("mini"), accuracy_gain(better, worse), arms("paper"))


CLAIMS.add(
    Claim(
        name="learned-signs-transfer",
        paper=PAPER,
        sentence="A mask trained from its learned signs and fresh magnitudes reaches the method "
        "that learned them (here: within one point).",
        measured="test accuracy of LRR's mask and signs with fresh magnitudes minus LRR at density "
        "1/64, points",
        experiment=_transfer("learned-signs", "lrr"),
        region=(-0.01, float("inf")),
    )
)
CLAIMS.add(
    Claim(
        name="signs-matter-more-than-magnitudes",
        paper=PAPER,
        sentence="Learned signs with fresh magnitudes are more accurate than learned magnitudes "
        "with random signs.",
        measured="test accuracy of learned signs minus learned magnitudes in LRR's mask at density "
        "1/64, points",
        experiment=_transfer("learned-signs", "learned-magnitudes"),
    )
)
CLAIMS.add(
    Claim(
        name="learned-magnitudes-do-not-transfer",
        paper=PAPER,
        sentence="Learned magnitudes with random signs are no better than fresh weights (here: by "
        "less than one point).",
        measured="test accuracy of learned magnitudes with random signs minus fresh weights, in "
        "LRR's mask at density 1/64, points",
        experiment=_transfer("learned-magnitudes", "fresh-weights"),
        region=(float("-inf"), 0.01),
    )
)


RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)


def _tuned(density: float, paper_density: float) -> Tuned:
    common = [f"sparse.density={density}", "sparse.allocation=erk", "fit.length=30ep"]
    paper = [f"sparse.density={paper_density}", "sparse.allocation=erk", "model.name=resnet20"]
    return Tuned(
        arms={
            "sign-in": ["random-digits", *common, "fit.optimizer=sign-in"],
            "plain": ["random-digits", *common],
        },
        rates=RATES,
        effect=accuracy_gain("sign-in", "plain"),
        paper_arms={
            "sign-in": ["random-cifar10", *paper, "fit.optimizer=sign-in", "data.validation=0.1"],
            "plain": ["random-cifar10", *paper, "data.validation=0.1"],
        },
    )


CLAIMS.add(
    Claim(
        name="sign-in-beats-plain-training",
        paper=PAPER,
        sentence="Random masks train to a higher accuracy with Sign-In than with plain gradient "
        "descent, the learning rate tuned for both.",
        measured="test accuracy of Sign-In minus SGD on random ERK masks at density 0.01, each at "
        "its best learning rate, points",
        experiment=_tuned(0.01, 0.1),
    )
)


def _neuron_gain(seed: int, betas: Betas) -> float:
    table = sign_table(seed=seed, pairs=[betas])
    return table.rate(-1, 1, betas) - table.rate(-1, 1, None)


def _outer(seed: int) -> float:
    return _neuron_gain(seed, (1.0, 0.5))


def _equal(seed: int) -> float:
    return _neuron_gain(seed, (1.0, 1.0))


CLAIMS.add(
    Claim(
        name="sign-in-neuron-flips-the-outer-sign",
        paper=PAPER,
        sentence="From a(0) < 0 < w(0) in balance, one hidden neuron learns its target with "
        "Sign-In if the outer weight has the larger beta, and never with plain gradient descent.",
        measured="success rate of Sign-In with betas 1 and 0.5 minus plain descent, percentage "
        "points",
        experiment=Computed(_outer, seeds=(0, 1, 2)),
    )
)
CLAIMS.add(
    Claim(
        name="sign-in-neuron-needs-unequal-betas",
        paper=PAPER,
        sentence="With equal betas Sign-In gains nothing on the balanced neuron (here: less than "
        "one point).",
        measured="success rate of Sign-In with betas 1 and 1 minus plain descent, percentage "
        "points",
        experiment=Computed(_equal, seeds=(0, 1, 2)),
        region=(-0.01, 0.01),
    )
)
