"""Curvature: products with the Hessian of the loss, its largest eigenvalue and its trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from featherweight.common import Generator, as_generator, matches, unwrap
from featherweight.sparse.criteria import probe
from featherweight.sparse.criteria.probe import Batch, Objective
from featherweight.sparse.masks import Masks


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: the number; ``float(estimate)`` gives it too.
        error: how far off it may be, as the function that measured it says.
        products: Hessian-vector products spent.
    """

    value: float
    error: float
    products: int

    def __float__(self) -> float:
        return self.value


class Hessian:
    """The matrix of second derivatives of the mean loss, as something that multiplies vectors.

    It is never formed: a product costs about two gradients. The model is left as it is. Dropout is
    off; ReLU networks count as piecewise smooth.

    Args:
        model: any module that maps inputs to outputs or to an object with ``.logits``.
        batches: pairs of inputs [B, ...] and targets; a batch counts by its number of examples.
        objective: from outputs and targets to the mean loss.
        masks: where given, only kept entries of masked weights are coordinates: the Hessian of the
            sparse network, without the directions that training can't take.
        include: shell-style patterns of the parameters that are coordinates; None: all that are
            trained.
        batch_statistics: whether norms use the statistics of the batch: the loss that training
            descends. With the running ones, a unit that is constant on the training data has a
            variance of zero, and what enters it is blown up by ``eps ** -0.5``.

    Raises:
        ValueError: no coordinate, no batch, or masks that do not fit.
        TypeError: batches are no list of pairs.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        objective: Objective = cross_entropy,
        masks: Masks | None = None,
        include: Iterable[str] | None = None,
        batch_statistics: bool = True,
    ) -> None:
        probe.check_batches(batches)
        if masks is not None:
            masks.check(model)
        self._model, self._batches, self._objective = model, batches, objective
        self._batch_statistics = batch_statistics
        self._parameters = _chosen(model, include)
        self._kept = {
            name: None if masks is None or name not in masks else masks[name].to(p.device)
            for name, p in self._parameters.items()
        }
        self.size = sum(
            p.numel() if kept is None else int(kept.sum())
            for p, kept in zip(self._parameters.values(), self._kept.values(), strict=True)
        )
        if not self.size:
            raise ValueError("the masks keep no coordinate of the Hessian")

    @property
    def like(self) -> Tensor:
        """An empty vector [size] of the right dtype and device."""
        first = next(iter(self._parameters.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.empty(self.size, dtype=dtype, device=first.device)

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Multiply: vector [size] to vector [size], coordinates in the model's order.

        Raises:
            ValueError: a vector of another shape, or a product that is not finite.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"vector must have shape [{self.size}], got {list(vector.shape)}")
        direction = self._spread(vector)
        free = probe.leaves(self._parameters)
        examples = sum(len(inputs) for inputs, _ in self._batches)
        total = torch.zeros_like(vector)
        with probe.quiet(self._model, batch_statistics=self._batch_statistics) as forward:
            loss = probe.loss_of(forward, self._objective)
            for batch in self._batches:
                slopes = probe.gradient(loss(free, batch), free, create_graph=True)
                along = sum((slopes[n] * direction[n]).sum() for n in free)
                assert isinstance(along, Tensor)
                if along.requires_grad:  # else the loss is linear: nothing to add
                    curved = self._gather(probe.gradient(along, free))
                    total.add_(curved, alpha=len(batch[0]) / examples)
        if not total.isfinite().all():
            raise ValueError("the product with the Hessian holds NaN or infinity")
        return total

    def _spread(self, vector: Tensor) -> dict[str, Tensor]:
        """Lay a vector out as tensors of the parameters' shapes, zero where masked."""
        result = {}
        for (name, parameter), kept in zip(
            self._parameters.items(), self._kept.values(), strict=True
        ):
            count = parameter.numel() if kept is None else int(kept.sum())
            part, vector = vector[:count], vector[count:]
            full = torch.zeros_like(parameter)
            mask = torch.ones_like(parameter, dtype=torch.bool) if kept is None else kept
            result[name] = full.masked_scatter(mask, part.to(full))
        return result

    def _gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        like = self.like
        parts = [
            (tensors[name].flatten() if kept is None else tensors[name][kept]).detach().to(like)
            for name, kept in self._kept.items()
        ]
        return torch.cat(parts)


def _chosen(model: nn.Module, include: Iterable[str] | None) -> dict[str, nn.Parameter]:
    parameters = dict(unwrap(model).named_parameters())
    if include is None:
        found = {name: p for name, p in parameters.items() if p.requires_grad}
    else:
        patterns = [include] if isinstance(include, str) else list(include)
        found = {name: p for name, p in parameters.items() if matches(name, patterns)}
    if not found:
        raise ValueError(f"no parameter to differentiate by, include={include!r}")
    return found


def largest_eigenvalue(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    objective: Objective = cross_entropy,
    masks: Masks | None = None,
    include: Iterable[str] | None = None,
    batch_statistics: bool = True,
    tolerance: float = 1e-3,
    iterations: int = 100,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Estimate:
    """Find the largest eigenvalue of the Hessian of the loss: the sharpness of a minimum.

    It is the largest by value, not by magnitude, so that one large *negative* curvature is not
    taken for it. Lanczos' recursion with two vectors in memory, until the residual of the largest
    Ritz value falls below ``tolerance`` times its magnitude.

    Args:
        model, batches, objective, masks, include, batch_statistics: see `Hessian`.
        tolerance: relative residual to stop at.
        iterations: most products to spend.
        seed, generator: exactly one of the two; of the first vector.

    Returns:
        The eigenvalue; its ``error`` is the residual: some eigenvalue lies no farther away. Over
        ``tolerance`` times the value, it has not converged.

    Raises:
        ValueError: a bad argument, or curvature that is not finite.

    Source: Lanczos 1950; for loss landscapes as in Gadhikar, Nelaturu & Burkholz 2024,
        arXiv:2406.02773.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be over 0, got {tolerance:g}")
    hessian = Hessian(
        model,
        batches,
        objective=objective,
        masks=masks,
        include=include,
        batch_statistics=batch_statistics,
    )
    start = torch.randn(hessian.size, generator=as_generator(seed, generator))
    return lanczos(lambda v: hessian @ v, start.to(hessian.like), tolerance, iterations)


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, iterations: int
) -> Estimate:
    """Find the largest eigenvalue of a symmetric matrix from its products with vectors.

    Without reorthogonalisation: rounding repeats eigenvalues that were found already, which does
    not disturb the largest one.

    Args:
        product: vector [N] to matrix times vector.
        start: [N], not orthogonal to the eigenvector looked for.
        tolerance: relative residual to stop at.
        iterations: most products to spend; never more than N.
    """
    diagonal: list[float] = []
    beside: list[float] = []
    vector, last = start / start.norm(), torch.zeros_like(start)
    value = error = 0.0
    for _ in range(min(iterations, len(start))):
        image = product(vector)
        diagonal.append(float(image @ vector))
        image = image - diagonal[-1] * vector - (beside[-1] if beside else 0.0) * last
        length = float(image.norm())
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value = float(values[-1])
        error = length * abs(float(vectors[-1, -1]))
        scale = float(values.abs().max())
        # Where the next vector is nothing but rounding, the subspace is exhausted.
        if error <= tolerance * abs(value) or length <= 10 * torch.finfo(start.dtype).eps * scale:
            break
        beside.append(length)
        last, vector = vector, image / length
    return Estimate(value, error, len(diagonal))


def _tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    return matrix + torch.diag(off, 1) + torch.diag(off, -1)


def hessian_trace(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    objective: Objective = cross_entropy,
    masks: Masks | None = None,
    include: Iterable[str] | None = None,
    batch_statistics: bool = True,
    samples: int = 32,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Estimate:
    """Estimate the trace of the Hessian of the loss, the sum of its eigenvalues.

    The mean of ``v^T H v`` over vectors of random signs; exact where H is diagonal.

    Args:
        model, batches, objective, masks, include, batch_statistics: see `Hessian`.
        samples: number of vectors, at least 2, one product each.
        seed, generator: exactly one of the two.

    Returns:
        The trace; its ``error`` is the standard error of the mean.

    Raises:
        ValueError: a bad argument, or curvature that is not finite.

    Source: Hutchinson 1989, *A stochastic estimator of the trace of the influence matrix*.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    hessian = Hessian(
        model,
        batches,
        objective=objective,
        masks=masks,
        include=include,
        batch_statistics=batch_statistics,
    )
    generator = as_generator(seed, generator)
    found = []
    for _ in range(samples):
        signs = torch.randint(2, (hessian.size,), generator=generator).mul_(2).sub_(1)
        vector = signs.to(hessian.like)
        found.append(float(vector @ (hessian @ vector)))
    draws = torch.tensor(found, dtype=torch.float64)
    return Estimate(float(draws.mean()), float(draws.std()) / sqrt(samples), samples)
