"""In which world a training is meant to work, and what of it could not work there.

A simulation can do what no deployment could: keep state for a phone that is met once, ask all
clients for their loss, weight by private counts. Say what the setting is, and `check` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from featherweight.common import unknown

Kind = Literal["cross-device", "cross-silo"]
Weighting = Literal["examples", "uniform", "unbiased"]
Split = Literal["pooled", "clients", "examples"]
Part = Literal["train", "validation", "test"]
Level = Literal["refused", "warning", "note"]

REACHABLE = 0.1
"""Part of the population in one cohort above which a cross-device simulation is unlike a fleet."""


@dataclass(frozen=True)
class Setting:
    """What matters of a training for whether its setting allows it.

    Attributes:
        kind: "cross-device" (many, met once, without state) or "cross-silo" (few, known, there).
        clients: of the population.
        cohort: clients of a round, expected.
        sampler: name in `SAMPLERS`.
        weighting: of updates: "examples", "uniform" or "unbiased", as of `simulate`.
        algorithm: name, for messages.
        client_state: the algorithm keeps something for each client between rounds.
        corrects_steps: the algorithm allows for unequal numbers of local steps (FedNova).
        codec: name, for messages.
        codec_memory: the codec keeps something for each client between rounds: what was left out
            (error feedback) or sent last (Rand-k-Temporal).
        unbiased: the codec is right on average.
        asks_loss: the codec's levels follow the clients' losses (AdaQuantFL).
        separable: messages are decoded one by one; False: all together, as Rand-k-Spatial.
        robust: aggregation looks at each client's vector: median, Krum and the like.
        privacy: updates are clipped and noise is added.
        unequal_steps: clients take different numbers of local steps.
        unequal_sizes: clients hold different numbers of examples.
        batch_norm: the model has batch normalisation.
        split: what it is judged on: a pooled test set, held-out clients, or held-out examples of
            each client.
        tuned_on: what choices are made on.
    """

    kind: Kind
    clients: int
    cohort: float
    sampler: str = "uniform"
    weighting: Weighting = "examples"
    algorithm: str = "fedavg"
    client_state: bool = False
    corrects_steps: bool = False
    codec: str = "identity"
    codec_memory: bool = False
    unbiased: bool = True
    asks_loss: bool = False
    separable: bool = True
    robust: bool = False
    privacy: bool = False
    unequal_steps: bool = False
    unequal_sizes: bool = False
    batch_norm: bool = False
    split: Split = "pooled"
    tuned_on: Part = "validation"

    def __post_init__(self) -> None:
        choices = {"kind": Kind, "weighting": Weighting, "split": Split, "tuned_on": Part}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(unknown(name, getattr(self, name), get_args(allowed)))


@dataclass(frozen=True)
class Finding:
    """One thing to know about a setting.

    Attributes:
        level: "refused" (cannot work there), "warning" (works differently than it looks), or
            "note" (how to read the result).
        rule: short name.
        text: one line.
    """

    level: Level
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text} [{self.rule}]"


def check(setting: Setting) -> list[Finding]:
    """Return all findings, the refusals first.

    Source: Wang et al. 2021, arXiv:2107.06917, sections 3 and 4; the rule on sampling and weights
        follows from unequal probability sampling.
    """
    found = [finding for rule in RULES for finding in rule(setting)]
    order = get_args(Level)
    return sorted(found, key=lambda finding: order.index(finding.level))


def require(setting: Setting) -> list[Finding]:
    """Return the findings that are no refusals.

    Raises:
        ValueError: something is refused; the line names the first.
    """
    found = check(setting)
    if found and found[0].level == "refused":
        raise ValueError(f"setting: {found[0].text}")
    return found


def _state(setting: Setting) -> Iterator[Finding]:
    if setting.kind != "cross-device":
        return
    if setting.client_state:
        yield Finding(
            "refused",
            "client-state",
            f"{setting.algorithm} keeps state for each client, and cross-device clients are met "
            "once; take a stateless algorithm, or cross-silo",
        )
    if setting.codec_memory:
        yield Finding(
            "refused",
            "codec-memory",
            f"codec {setting.codec} keeps something for each client, and cross-device clients "
            "are met once; take a stateless codec, or cross-silo",
        )


def _privacy(setting: Setting) -> Iterator[Finding]:
    if not setting.privacy:
        return
    if setting.weighting != "uniform":
        yield Finding(
            "refused",
            "private-weights",
            f"privacy with weighting {setting.weighting}: a client's weight tells its size and "
            "breaks the bound on its influence; take uniform weights",
        )
    if setting.sampler != "poisson":
        yield Finding(
            "refused",
            "private-sampling",
            "privacy accountants assume that each client is drawn by itself: the sampler must be "
            f"poisson, got {setting.sampler}",
        )


def _weights(setting: Setting) -> Iterator[Finding]:
    if setting.sampler == "by-size" and setting.weighting != "uniform":
        yield Finding(
            "warning",
            "double-weights",
            "clients are drawn by size and weighted by size: sizes count twice; take uniform "
            "weights",
        )
    partial = setting.sampler in ("uniform", "with-replacement", "diurnal", "markov")
    unequal = setting.unequal_sizes and setting.cohort < setting.clients
    if partial and unequal and setting.weighting == "examples":
        yield Finding(
            "note",
            "ratio-estimator",
            "a cohort's mean with normalised example weights is a ratio estimator: biased for the "
            "mean over all examples; weighting unbiased, or sampler by-size with uniform weights, "
            "is not",
        )


def _steps(setting: Setting) -> Iterator[Finding]:
    if setting.unequal_steps and not setting.corrects_steps:
        yield Finding(
            "warning",
            "unequal-steps",
            "clients take different numbers of local steps, which weights their objectives by "
            "these numbers; take equal steps, or fednova",
        )


def _codec(setting: Setting) -> Iterator[Finding]:
    if not setting.unbiased and not setting.codec_memory:
        yield Finding(
            "warning",
            "biased-codec",
            f"codec {setting.codec} is biased and has no error feedback; it need not converge",
        )
    if setting.robust and not setting.separable:
        yield Finding(
            "refused",
            "joint-decoder",
            f"codec {setting.codec} decodes all messages to one mean, and the aggregator needs "
            "each client's vector",
        )
    if setting.asks_loss and setting.kind == "cross-device":
        yield Finding(
            "warning",
            "global-loss",
            f"codec {setting.codec} follows the loss of all clients; across devices it is "
            "estimated from the cohort",
        )


def _participation(setting: Setting) -> Iterator[Finding]:
    part = setting.cohort / setting.clients
    if setting.kind == "cross-device" and part > REACHABLE:
        yield Finding(
            "note",
            "participation",
            f"{100 * part:.3g} % of the clients take part in a round; across devices it is below "
            "1 %",
        )
    if setting.kind == "cross-silo" and part < 0.5:
        yield Finding(
            "note",
            "participation",
            f"{100 * part:.3g} % of the silos take part in a round; usually nearly all do",
        )
    if setting.sampler == "over-selection":
        yield Finding(
            "warning",
            "stragglers",
            "the first to finish count: fast clients weigh more, slow ones may never count",
        )


def _model(setting: Setting) -> Iterator[Finding]:
    if setting.batch_norm:
        yield Finding(
            "refused",
            "batch-norm",
            "batch normalisation mixes clients' statistics, which their data do not share; take "
            "group normalisation, or none",
        )


def _evaluation(setting: Setting) -> Iterator[Finding]:
    if setting.tuned_on == "test":
        yield Finding(
            "warning",
            "tuned-on-test",
            "choices are made on test data: results say what the best choice could bring, not what "
            "to expect",
        )
    if setting.kind == "cross-device" and setting.split == "examples":
        yield Finding(
            "note",
            "held-out",
            "judged on held-out examples of training clients; across devices what counts is "
            "clients never met: split clients",
        )
    if setting.kind == "cross-silo" and setting.split == "clients":
        yield Finding(
            "note",
            "held-out",
            "judged on silos never met; what usually counts is held-out examples of each silo",
        )


RULES: tuple[Callable[[Setting], Iterator[Finding]], ...] = (
    _state,
    _privacy,
    _weights,
    _steps,
    _codec,
    _participation,
    _model,
    _evaluation,
)
