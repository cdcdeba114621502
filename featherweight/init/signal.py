"""How signals and gradients pass through a network: sizes and likeness, by depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from featherweight.common import Generator, as_generator
from featherweight.init.plan import columns
from featherweight.init.states import check_inputs, places
from featherweight.init.trace import Node, Recorder, output_of, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Signal:
    """What reaches one state; means over the examples.

    Attributes:
        state: its name.
        norm: of the state, over that of the input.
        cosine: of the states of two different inputs, mean over all pairs of inputs; 1 where
            the network tells nothing apart any more.
        pair_cosine: the same of d = first half - second half of the channels, where the state is
            one of pairs (of two partners exactly one is over zero); else None.
        gradient: norm of the gradient, by the state, of a random unit combination of the outputs.
    """

    state: str
    norm: float
    cosine: float
    pair_cosine: float | None
    gradient: float


@dataclass(frozen=True)
class SignalReport:
    """Signals from the input to the output; ``str(report)`` is a table.

    Attributes:
        rows: the input, each state, the output.
    """

    rows: tuple[Signal, ...]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw norms, cosine similarities and gradient norms over depth.

        Args:
            path: where given, the picture is also written there, in the format of its suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from featherweight.init.plots import draw_signal, finish

        return finish(draw_signal(self), path)

    def __str__(self) -> str:
        head = ("state", "norm", "cosine", "of pairs", "gradient")
        rows = [
            (
                row.state,
                f"{row.norm:.4g}",
                f"{row.cosine:.4f}",
                "" if row.pair_cosine is None else f"{row.pair_cosine:.4f}",
                f"{row.gradient:.4g}",
            )
            for row in self.rows
        ]
        return columns(head, rows)


def signal_report(
    model: nn.Module,
    x: Tensor,
    *,
    seed: int | None = 0,
    generator: Generator | None = None,
) -> SignalReport:
    """Measure norms, likeness of inputs, and gradients at every state of a model.

    States are what lies behind each block and plain layer of a residual or plain ReLU network; of
    any other model, what its linear layers and convolutions return. The model runs in evaluation
    mode and is left as it was, gradients included.

    Args:
        model: any module that maps a batch of inputs to a tensor or to an object with ``.logits``.
        x: floats [B, ...] with at least two different examples.
        seed, generator: exactly one of the two; of the combinations of outputs.

    Raises:
        ValueError: a bad argument.
    """
    check_inputs(x, least=2)
    drawn = as_generator(None if generator is not None else seed, generator)
    found = places(model, x)
    names = {0: "input"} | {node.index: name for name, node in found.named}
    measured: dict[int, tuple[float, float, float | None]] = {}
    gradients: dict[int, float] = {}

    def visit(node: Node, tensor: Tensor) -> None:
        if node.index in names:
            measured[node.index] = _sizes(tensor.detach(), x)
            tensor.register_hook(lambda slope: gradients.update({node.index: _mean_norm(slope)}))

    start = x.detach().clone().requires_grad_()
    with torch.enable_grad(), quiet(found.model):
        given = start.clone()
        with Recorder(found.model, given, visit):
            output = output_of(found.model(given))
        direction = torch.randn(output.shape, generator=drawn, dtype=torch.float64).to(output)
        direction = normalize(direction.flatten(1), dim=1).view_as(output)
        torch.autograd.grad((output * direction).sum(), start)
    rows = [
        Signal(name, *measured[index], gradients.get(index, 0.0)) for index, name in names.items()
    ]
    return SignalReport((*rows, Signal("output", *_sizes(output.detach(), x), 1.0)))


def _sizes(state: Tensor, x: Tensor) -> tuple[float, float, float | None]:
    """Return relative norm, mean cosine, and mean cosine of the differences of pairs."""
    flat = state.flatten(1).double()
    ratio = flat.norm(dim=1) / x.flatten(1).double().norm(dim=1)
    difference = _difference(state)
    pairs = None if difference is None else _mean_cosine(difference.flatten(1).double())
    return float(ratio.mean()), _mean_cosine(flat), pairs


def _difference(state: Tensor) -> Tensor | None:
    if state.ndim < 2 or state.shape[1] % 2:
        return None
    plus, minus = state.chunk(2, dim=1)
    nonnegative = bool((state >= 0).all())
    paired = nonnegative and bool(((plus > 0) != (minus > 0)).all())
    return plus - minus if paired else None


def _mean_cosine(rows: Tensor) -> float:
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return float(cosine_similarity(rows[i], rows[j]).mean())


def _mean_norm(slope: Tensor) -> float:
    return float(slope.detach().flatten(1).double().norm(dim=1).mean())
