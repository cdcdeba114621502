"""OptRot: rotations learned from the weights alone.

Gadhikar, Grazzi and Hensman 2025, "OptRot: Mitigating Weight Outliers via Data-Free Rotations for
Post-Training Quantization", arXiv:2512.24124. R1 and R2 minimise the sum of fourth powers of the
rotated weights; nothing runs through the model. The optimiser and its defaults are ours: Cayley
steps of a bounded angle on minibatches of rows, R1 and R2 in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.quant.cayley import Angle, Gradient, StepRule, descend
from featherweight.quant.decoder import Decoder, check_finite, read_decoder
from featherweight.quant.objective import Objective, largest, quartic, sources
from featherweight.quant.rotate import Rotation, check_fit, draw_rotation, rotate

_VALUE_RULE = Angle(theta=0.2, momentum=0.9)


@dataclass(frozen=True)
class Progress:
    """Where learning stands.

    Attributes:
        stage: what is being learned: R1, R2, or OptRot+.
        step: steps done in this stage.
        steps: steps of this stage.
        objective: its value before the step, maybe estimated on a sample.
    """

    stage: str
    step: int
    steps: int
    objective: float


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Learned:
    """What :func:`learn_rotation` found.

    Attributes:
        rotation: R1 and R2.
        start, end: the objective over all matrices before and after.
        history: its estimate at each step of R1.
        shares: part of the objective at the start that each kind of matrix makes up.
    """

    rotation: Rotation
    start: float
    end: float
    history: tuple[float, ...]
    shares: dict[str, float]

    def table(self) -> str:
        """Return the share of each kind of matrix as text, largest first."""
        ranked = sorted(self.shares.items(), key=lambda item: -item[1])
        rows = [f"{kind:8}{100 * share:6.1f} %" for kind, share in ranked]
        return "\n".join([f"objective {self.start:.5g} -> {self.end:.5g}", *rows])


def optrot(
    model: nn.Module,
    *,
    steps: int = 300,
    seed: int = 0,
    objective: str = "l4",
    progress: Report | None = None,
) -> nn.Module:
    """Learn R1 and R2 from the weights alone and fuse them, in place.

    Args:
        model: a supported decoder, see :func:`learn_rotation`, which has more options.
        steps: of R1 over all rounds; 0 leaves the random start.
        seed: of the start and the minibatches.
        objective: a name of :data:`OBJECTIVES`.
        progress: called before each step.

    Returns:
        The same model: the same function, to rounding.

    Raises:
        ValueError: an argument is out of range or the model is not supported; nothing was changed.
    """
    learned = learn_rotation(model, steps=steps, seed=seed, objective=objective, progress=progress)
    return rotate(model, learned.rotation)


def learn_rotation(
    model: nn.Module,
    *,
    steps: int = 300,
    seed: int = 0,
    objective: str = "l4",
    group_size: int | None = None,
    matrices: int | None = None,
    rows: int = 8192,
    rounds: int = 2,
    value_steps: int = 100,
    rule: StepRule | None = None,
    start: Rotation | None = None,
    progress: Report | None = None,
) -> Learned:
    """Learn R1 and R2 from the weights alone; the model is not changed.

    Each round learns R2 with R1 fixed, then R1 with R2 fixed. R2 always minimises the elementwise
    objective, for norms over rows the plain one.

    Args:
        model: a supported decoder; gains count as if folded.
        steps: of R1, shared among the rounds.
        seed: of the start and the minibatches.
        objective: a name of :data:`OBJECTIVES`.
        group_size: weights that share a scale, for ``l4_sq``; None for whole rows.
        matrices: keep only so many matrices, those with the largest row maxima; None for all.
        rows: rows of A in a minibatch, out of hidden-sized rows of all matrices.
        rounds: how often R1 and R2 take turns.
        value_steps: steps of R2 in each round.
        rule: step rule of R1; None for ``Angle(0.3, 0.5)``. ``Clipped(1.0)`` is the paper's.
        start: where to begin; None for a random Hadamard, or Haar where the size has none.
        progress: called before each step.

    Returns:
        The rotation, with the objective before and after.

    Raises:
        ValueError: an argument is out of range, or the model is not supported.
    """
    for name, value in (("rows", rows), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("steps", steps), ("value_steps", value_steps)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if matrices is not None and matrices < 1:
        raise ValueError(f"matrices must be at least 1 or None, got {matrices}")
    decoder = read_decoder(model)
    check_finite(decoder)
    task = _Task(decoder, objective, group_size, matrices, rows, as_generator(seed), progress)
    begin = start or draw_rotation(model, "hadamard", generator=task.generator)
    check_fit(decoder, begin)
    return task.learn(begin, steps, rounds, value_steps, rule or Angle())


@dataclass
class _Task:
    """The pieces that all stages of learning share."""

    decoder: Decoder
    name: str
    group_size: int | None
    matrices: int | None
    rows: int
    generator: Generator
    progress: Report | None
    kept: list[int] | None = None  # matrices of the objective, chosen at the start

    @torch.no_grad()
    def learn(
        self, begin: Rotation, steps: int, rounds: int, value_steps: int, rule: StepRule
    ) -> Learned:
        device = self.decoder.head.weight.device
        residual, values = begin.residual.float().to(device), begin.values.float().to(device)
        first = self.objective(residual, values)
        history: list[float] = []
        for turn in range(rounds):
            values = self.learn_values(residual, values, value_steps)
            share = steps // rounds + (turn < steps % rounds)
            objective = self.objective(residual, values)
            residual = self.learn_residual(objective, residual, share, rule, history)
        last = self.objective(residual, values)
        return Learned(
            Rotation(residual.double().cpu(), values.double().cpu()),
            first.value(begin.residual.float().to(device)),
            last.value(residual),
            tuple(history),
            first.shares(begin.residual.float().to(device)),
        )

    def objective(self, residual: Tensor, values: Tensor) -> Objective:
        parts = sources(self.decoder, values)
        if self.kept is None:
            count = self.matrices
            self.kept = [*range(len(parts))] if count is None else largest(parts, count, residual)
        return Objective([parts[i] for i in self.kept], self.name, self.group_size)

    def learn_residual(
        self,
        objective: Objective,
        start: Tensor,
        steps: int,
        rule: StepRule,
        history: list[float],
    ) -> Tensor:
        def gradient(rotation: Tensor) -> tuple[float, Tensor]:
            return objective.sampled(rotation, self.rows, self.generator)

        def on_step(step: int, value: float) -> None:
            history.append(value)
            self.report("R1", step, steps, value)

        return descend(
            gradient, start, steps=steps, rule=rule, generator=self.generator, on_step=on_step
        )

    def learn_values(self, residual: Tensor, start: Tensor, steps: int) -> Tensor:
        gradient = value_gradient(self.decoder, residual, self.name)
        return descend(
            gradient,
            start,
            steps=steps,
            rule=_VALUE_RULE,
            generator=self.generator,
            on_step=lambda step, value: self.report("R2", step, steps, value),
        )

    def report(self, stage: str, step: int, steps: int, value: float) -> None:
        if self.progress is not None:
            self.progress(Progress(stage, step, steps, value))


def value_gradient(decoder: Decoder, residual: Tensor, name: str) -> Gradient:
    """Return value and gradient of the objective in R2, for all layers at once.

    Args:
        decoder: the model.
        residual: R1, which stays fixed.
        name: of the objective; ``l4_matrix`` weighs v and o by their norms, all others equally.

    Returns:
        A function of R2 ``[layers, d_h, d_h]``.
    """
    stacked, weights = zip(
        *(value_rows(decoder, index, residual, name) for index in range(len(decoder.blocks))),
        strict=True,
    )
    rows, scale = torch.stack(stacked), torch.stack(weights)
    return lambda rotation: quartic(rows, rotation, scale)


def value_rows(decoder: Decoder, index: int, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the rows of v and o that R2 of one layer turns, ``[m, d_h]``, and weights ``[m]``."""
    block, size = decoder.blocks[index], decoder.head_dim
    gain = decoder.gain(block.attention_norm).float()
    value = (block.value.view().float() * gain) @ residual
    output = residual.mT @ block.output.view().float()
    heads = value.view(-1, size, value.shape[-1]).mT.reshape(-1, size)
    parts = (heads, output.reshape(-1, size))
    weights = [torch.ones(len(part), device=part.device) for part in parts]
    if name == "l4_matrix":
        for part, weight in zip(parts, weights, strict=True):
            weight.mul_(part.numel() / part.pow(2).sum().clamp_min(1e-30).pow(2))
    return torch.cat(parts), torch.cat(weights)
