"""Singular values of the Jacobian from the input to a state: is the network an isometry?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unknown
from featherweight.init.lanczos import largest_eigenvalue
from featherweight.init.states import (
    Places,
    State,
    backward_product,
    check_inputs,
    forward_products,
    jacobian,
    place,
    width,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("auto", "exact", "estimate")
MOST_INPUTS = 2048  # of a Jacobian that "auto" decomposes exactly
MOST_ENTRIES = 2**23


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the Jacobian of a state by the input; ``str(spectrum)`` says them.

    Attributes:
        state: name of the place.
        method: "exact" or "estimate".
        inputs, outputs: size of the Jacobian of one example.
        values: all of them [examples, min(inputs, outputs)], falling; None if estimated.
        largest: of all examples.
        smallest: of all examples; None if estimated. With fewer outputs than inputs, the directions
            that are lost anyway don't count.
        mean_square: mean of the squares over all input directions, 1 if norms are kept on average.
        spread: standard deviation of the squares over all input directions, 0 if and only if all
            directions are stretched alike.
    """

    state: str
    method: str
    inputs: int
    outputs: int
    values: Tensor | None
    largest: float
    smallest: float | None
    mean_square: float
    spread: float

    def isometric(self, tolerance: float = 1e-5) -> bool:
        """Tell whether every singular value is within a tolerance of 1.

        Of an estimate: whether the mean square, its spread, and the largest value say so.
        """
        measured = [self.largest - 1, self.mean_square - 1, self.spread]
        if self.smallest is not None:
            measured.append(self.smallest - 1)
        return max(map(abs, measured)) <= 2 * tolerance and abs(self.largest - 1) <= tolerance

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the singular values in falling order, or the largest alone if estimated.

        Args:
            path: where given, the picture is also written there, in the format of its suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from featherweight.init.plots import draw_spectrum, finish

        return finish(draw_spectrum(self), path)

    def __str__(self) -> str:
        smallest = "" if self.smallest is None else f"smallest {self.smallest:.6g}, "
        return (
            f"Jacobian of {self.state} [{self.outputs}] by input [{self.inputs}], {self.method}: "
            f"{smallest}largest {self.largest:.6g}, mean square {self.mean_square:.6g} "
            f"(spread {self.spread:.3g})"
        )


def jacobian_spectrum(
    model: nn.Module,
    x: Tensor,
    *,
    state: State | None = None,
    method: Literal["auto", "exact", "estimate"] = "auto",
    samples: int = 16,
    iterations: int = 30,
    tolerance: float = 1e-6,
    seed: int | None = 0,
    generator: Generator | None = None,
) -> Spectrum:
    """Measure the singular values of the Jacobian from the input to a state.

    The model runs in evaluation mode, an example must not depend on the others of its batch. At an
    input of exact zeros a ReLU has derivative 0: normalise the data, or zeros of the background
    count as lost directions.

    Args:
        model: any module that maps a batch of inputs to a tensor or to an object with ``.logits``.
        x: floats [B, ...], in the model's dtype and on its device; float64 shows exactness.
        state: a submodule or its name: what it returns is the state. None: the last state before
            pooling of a residual or plain ReLU network, the output of any other model.
        method: "exact" builds the Jacobian of each example and decomposes it; "estimate" multiplies
            with vectors; "auto" is exact up to 2048 inputs and 2^23 entries.
        samples: random vectors of an estimate, an example.
        iterations: most steps of an estimate towards the largest value, an example.
        tolerance: relative error of the largest value at which these stop.
        seed, generator: exactly one of the two, for estimates.

    Raises:
        ValueError: a bad argument, or a state that is not there.

    Source: dynamical isometry, Saxe et al. 2014, arXiv:1312.6120. Estimates: Lanczos 1950 for the
        largest, Hutchinson 1989 for the moments.
    """
    check_inputs(x)
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    for name, value in (("samples", samples), ("iterations", iterations)):
        if value < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")
    drawn = as_generator(None if generator is not None else seed, generator)
    found = place(model, x[:1], state)
    size = (width(x.shape), width(found.named[0][1].shape))
    small = size[0] <= MOST_INPUTS and size[0] * size[1] <= MOST_ENTRIES
    if method == "exact" or (method == "auto" and small):
        return _exact(found, x)
    return estimate(found, x, samples, iterations, tolerance, drawn)


def _exact(found: Places, x: Tensor) -> Spectrum:
    jacobians = [jacobian(found, x[i : i + 1])[0] for i in range(len(x))]
    return from_values(found.names[0], jacobians)


def from_values(name: str, jacobians: list[Tensor]) -> Spectrum:
    """Decompose the Jacobians of a state, one an example."""
    values = torch.stack([torch.linalg.svdvals(j.double()) for j in jacobians])
    outputs, inputs = jacobians[0].shape
    lost = torch.zeros(len(values), inputs - values.shape[1], dtype=values.dtype)
    squares = torch.cat([values.square(), lost.to(values.device)], dim=1)
    return Spectrum(
        name,
        "exact",
        inputs,
        outputs,
        values,
        float(values.max()),
        float(values.min()),
        float(squares.mean()),
        float(squares.std(correction=0)),
    )


def estimate(
    found: Places,
    x: Tensor,
    samples: int,
    iterations: int,
    tolerance: float,
    generator: Generator,
) -> Spectrum:
    """Estimate the spectrum of the first place; arguments as of `jacobian_spectrum`."""
    size = width(x.shape)
    images, residues, largest = [], [], []
    for example in x.split(1):
        signs = torch.randint(2, (samples, size), generator=generator).mul(2).sub(1).to(x)
        forward, back = _gram(found, example, signs)
        images.append(forward.double().square().sum(1) / size)
        residues.append((signs, back))
        start = torch.randn(size, generator=generator, dtype=torch.float64).to(x)
        squared = partial(_squared, found, example)
        largest.append(largest_eigenvalue(squared, start, iterations, tolerance))
    mean = float(torch.cat(images).mean())
    # tr (J^T J - mean)^2, which has no cancellation near an isometry.
    spread = torch.stack([(back - mean * signs).double().square() for signs, back in residues])
    outputs = width(found.named[0][1].shape)
    return Spectrum(
        found.names[0],
        "estimate",
        size,
        outputs,
        None,
        math.sqrt(max(largest)),
        None,
        mean,
        math.sqrt(float(spread.mean())),
    )


def _gram(found: Places, example: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply vectors [k, inputs] with J, and the images with its transpose."""
    images = forward_products(found, example, vectors.view(-1, *example.shape[1:]))[0]
    return images, backward_product(found, example, images)


def _squared(found: Places, example: Tensor, vector: Tensor) -> Tensor:
    return _gram(found, example, vector[None])[1][0]
