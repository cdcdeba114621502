"""Singular values of every state of a network, by depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.init.plan import columns
from featherweight.init.spectrum import MOST_ENTRIES, MOST_INPUTS, Spectrum, estimate, from_values
from featherweight.init.states import Places, check_inputs, jacobian, places, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class IsometryReport:
    """Spectra of the states of a network; ``str(report)`` is a table.

    Attributes:
        spectra: one a state, in the order the network reaches them.
    """

    spectra: tuple[Spectrum, ...]

    def __iter__(self) -> Iterator[Spectrum]:
        return iter(self.spectra)

    def __len__(self) -> int:
        return len(self.spectra)

    def isometric(self, tolerance: float = 1e-5) -> bool:
        """Tell whether all singular values of all states are within a tolerance of 1."""
        return all(spectrum.isometric(tolerance) for spectrum in self.spectra)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the singular values over depth.

        Args:
            path: where given, the picture is also written there, in the format of its suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from featherweight.init.plots import draw_isometry, finish

        return finish(draw_isometry(self), path)

    def __str__(self) -> str:
        head = ("state", "size", "smallest", "largest", "mean square", "spread")
        rows = [
            (
                spectrum.state,
                str(spectrum.outputs),
                "" if spectrum.smallest is None else f"{spectrum.smallest:.6g}",
                f"{spectrum.largest:.6g}",
                f"{spectrum.mean_square:.6g}",
                f"{spectrum.spread:.3g}",
            )
            for spectrum in self.spectra
        ]
        return columns(head, rows)


def isometry_report(
    model: nn.Module,
    x: Tensor,
    *,
    samples: int = 16,
    iterations: int = 30,
    tolerance: float = 1e-6,
    seed: int | None = 0,
    generator: Generator | None = None,
) -> IsometryReport:
    """Measure the Jacobian from the input to every state of a model.

    States are what lies behind each block and plain layer of a residual or plain ReLU network; of
    any other model, what its linear layers and convolutions return. Exact for small networks.

    Args:
        model: any module that maps a batch of inputs to a tensor or to an object with ``.logits``.
        x: floats [B, ...], of which the first example is taken.
        samples, iterations, tolerance, seed, generator: of estimates, as in `jacobian_spectrum`.

    Raises:
        ValueError: a bad argument.
    """
    check_inputs(x)
    drawn = as_generator(None if generator is not None else seed, generator)
    x = x[:1]
    found = places(model, x)
    size = width(x.shape)
    if size <= MOST_INPUTS and size * sum(width(n.shape) for _, n in found.named) <= MOST_ENTRIES:
        jacobians = zip(found.names, jacobian(found, x), strict=True)
        return IsometryReport(tuple(from_values(name, [matrix]) for name, matrix in jacobians))
    single = [Places(found.model, (named,), found.recognised) for named in found.named]
    return IsometryReport(
        tuple(estimate(one, x, samples, iterations, tolerance, drawn) for one in single)
    )
