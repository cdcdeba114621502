"""OptRot+: rotations learned from the weights and the covariance of their inputs.

Gadhikar et al. 2025, arXiv:2512.24124, say that OptRot+ adds the activation covariance to OptRot;
its objective here is our derivation, not theirs. GPTQ without clamping loses, on average,
``(1/12) tr D(H') sum_r s_r^2`` on a matrix with row scales ``s_r`` and ``H' = R^T H R = V D V^T``.
With the range of a row bounded by its 4-norm:

    f+ = sum over matrices of tr D(H') sum_r ||w'_r||_4^2

The loss is absolute, so a matrix counts by what it does to its outputs. With H = c I the trace is
constant and f+ is the objective ``l4_sq``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.quant.calibrate import SITES, collect, turn_heads
from featherweight.quant.cayley import Angle, StepRule, descend
from featherweight.quant.decoder import Decoder, check_finite, read_decoder
from featherweight.quant.gptq import ldl_diagonal
from featherweight.quant.objective import Source, grouped, sources
from featherweight.quant.optrot import Learned, Progress, Report, learn_rotation
from featherweight.quant.rotate import Rotation, check_fit, rotate

_SITE = {"q": "attention", "k": "attention", "v": "attention", "o": "output"} | {
    "gate": "mlp",
    "up": "mlp",
    "down": "down",
}
_PER_LAYER = 7  # matrices of a layer without experts


def optrot_plus(
    model: nn.Module,
    calibration: Tensor,
    *,
    steps: int = 150,
    seed: int = 0,
    start: Rotation | None = None,
    progress: Report | None = None,
) -> nn.Module:
    """Learn R1 from weights and inputs, beginning with OptRot's solution, and fuse it, in place.

    Args:
        model: a supported decoder without experts, see :func:`learn_rotation_plus`.
        calibration: token ids, ``[sequences, tokens]``.
        steps: beyond those of OptRot.
        seed: of OptRot's start and of all minibatches.
        start: R1 and R2 to begin with; None to learn them by OptRot.
        progress: called before each step.

    Returns:
        The same model: the same function, to rounding.

    Raises:
        ValueError: an argument is out of range or the model is not supported; nothing was changed.
    """
    learned = learn_rotation_plus(
        model, calibration, steps=steps, seed=seed, start=start, progress=progress
    )
    return rotate(model, learned.rotation)


def learn_rotation_plus(
    model: nn.Module,
    calibration: Tensor | Sequence[dict[str, Tensor]],
    *,
    steps: int = 150,
    seed: int = 0,
    group_size: int | None = None,
    layers: int = 8,
    damping: float = 0.01,
    static: bool = False,
    rule: StepRule | None = None,
    start: Rotation | None = None,
    progress: Report | None = None,
) -> Learned:
    """Learn R1 from weights and inputs; R2 stays that of the start, the model is not changed.

    Args:
        model: a supported decoder without experts.
        calibration: token ids, ``[sequences, tokens]``, or what :func:`collect` found.
        steps: how many.
        seed: of OptRot's start, and of the layers that a step sees.
        group_size: weights that share a scale; None for whole rows.
        layers: seen by a step, drawn in proportion to their losses at the start.
        damping: of the Hessians, as in GPTQ.
        static: keep ``tr D`` as it was at the start: Hessians are then weights of matrices alone.
        rule: step rule; None for ``Angle(0.1, 0.5)``.
        start: R1 and R2 to begin with; None to learn them by OptRot.
        progress: called before each step.

    Returns:
        The rotation, with the objective before and after.

    Raises:
        ValueError: an argument is out of range, or the model is not supported.
    """
    for name, value, least in (("steps", steps, 0), ("layers", layers, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {damping}")
    decoder = read_decoder(model)
    check_finite(decoder)
    hessians = collect(model, calibration) if isinstance(calibration, Tensor) else calibration
    if len(hessians) != len(decoder.blocks):
        raise ValueError(f"calibration has {len(hessians)} layers, model {len(decoder.blocks)}")
    begin = start or learn_rotation(model, seed=seed, progress=progress).rotation
    check_fit(decoder, begin)
    task = _Plus(decoder, hessians, begin, group_size, damping, as_generator(seed))
    if static:
        task.freeze()
    return task.learn(steps, layers, rule or Angle(theta=0.1, momentum=0.5), progress)


@dataclass
class _LayerLoss:
    """The objective of one layer; ``traces`` holds ``tr D`` of sites whose inputs don't turn."""

    parts: list[Source]
    hessians: dict[str, Tensor]
    traces: dict[str, Tensor]
    damping: float
    group_size: int | None

    def terms(self, rotation: Tensor) -> dict[str, Tensor]:
        """Return the loss of each kind of matrix at R1."""
        traces = {site: self.trace(site, rotation) for site in SITES}
        found: dict[str, Tensor] = {}
        for part in self.parts:
            norms = grouped(part.take() @ rotation, part.writes, self.group_size).sqrt().sum()
            found[part.kind] = found.get(part.kind, 0) + traces[_SITE[part.kind]] * norms
        return found

    def trace(self, site: str, rotation: Tensor) -> Tensor:
        if site in self.traces:
            return self.traces[site]
        return damped_trace(rotation.mT @ self.hessians[site] @ rotation, self.damping)


def damped_trace(hessian: Tensor, damping: float) -> Tensor:
    """Return ``tr D`` of ``H + damping mean(diag H) I``, by a Cholesky in float64."""
    damped = hessian.double()
    ridge = damping * damped.diagonal().mean()
    damped = damped + ridge * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    return ldl_diagonal(damped).sum().to(hessian.dtype)


class _Plus:
    def __init__(
        self,
        decoder: Decoder,
        hessians: Sequence[dict[str, Tensor]],
        start: Rotation,
        group_size: int | None,
        damping: float,
        generator: Generator,
    ) -> None:
        device = decoder.head.weight.device
        self.start, self.generator = start, generator
        self.residual = start.residual.float().to(device)
        values = start.values.float().to(device)
        parts = sources(decoder, values)
        self.layers = []
        for index, found in enumerate(hessians):
            turned = {**found, "output": turn_heads(found["output"], values[index])}
            turned = {site: hessian.to(device) for site, hessian in turned.items()}
            traces = {site: damped_trace(turned[site], damping) for site in ("output", "down")}
            own = parts[_PER_LAYER * index : _PER_LAYER * (index + 1)]
            self.layers.append(_LayerLoss(own, turned, traces, damping, group_size))

    def freeze(self) -> None:
        """Fix the traces of all sites at the start."""
        for layer in self.layers:
            layer.traces = {site: layer.trace(site, self.residual) for site in SITES}

    def learn(self, steps: int, layers: int, rule: StepRule, progress: Report | None) -> Learned:
        first = self.losses(self.residual)
        chances = torch.tensor([sum(layer.values()) for layer in first], dtype=torch.float64)
        history: list[float] = []

        def gradient(rotation: Tensor) -> tuple[float, Tensor]:
            return self.sampled(rotation, chances / chances.sum(), layers)

        def on_step(step: int, value: float) -> None:
            history.append(value)
            if progress is not None:
                progress(Progress("OptRot+", step, steps, value))

        found = descend(
            gradient,
            self.residual,
            steps=steps,
            rule=rule,
            generator=self.generator,
            on_step=on_step,
        )
        rotation = Rotation(found.double().cpu(), self.start.values.double().cpu())
        start, end = _total(first), _total(self.losses(found))
        kinds = first[0]
        shares = {kind: sum(layer[kind] for layer in first) / start for kind in kinds}
        return Learned(rotation, start, end, tuple(history), shares)

    @torch.no_grad()
    def losses(self, rotation: Tensor) -> list[dict[str, float]]:
        return [
            {kind: term.item() for kind, term in layer.terms(rotation).items()}
            for layer in self.layers
        ]

    def sampled(self, rotation: Tensor, chances: Tensor, count: int) -> tuple[float, Tensor]:
        """Return unbiased estimates of value and gradient: layers drawn by chance, weighted."""
        variable = rotation.detach().requires_grad_()
        chosen = range(len(self.layers))
        weights = [1.0] * len(chosen)
        if count < len(chosen):
            drawn = torch.multinomial(chances, count, replacement=True, generator=self.generator)
            chosen = drawn.tolist()  # type: ignore[assignment]
            weights = [1 / (count * chances[i].item()) for i in chosen]
        value, gradient = 0.0, torch.zeros_like(rotation)
        for index, weight in zip(chosen, weights, strict=True):
            loss = weight * torch.stack([*self.layers[index].terms(variable).values()]).sum()
            (slope,) = torch.autograd.grad(loss, variable)
            value, gradient = value + loss.item(), gradient + slope
        return value, gradient


def _total(losses: Sequence[dict[str, float]]) -> float:
    return sum(sum(layer.values()) for layer in losses)
