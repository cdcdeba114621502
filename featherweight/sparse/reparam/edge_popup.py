"""Edge-popup: a random network is trained by choosing which of its edges exist.

The weights W stay as drawn. Each has a score c, and the layer computes with ``W * M`` where M marks
the k largest ``|c|`` of the layer. The gradient passes M as if ``dM / d|c| = 1``::

    dL/dc = sign(c) * W * dL/d(W * M)        on the support, 0 elsewhere

A random mask ``support`` restricts the choice to its edges: strong tickets in a sparse network.

Sources: V. Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020,
arXiv:1911.13299, section 3; A. Gadhikar, S. Mukherjee and R. Burkholz, ICML 2023, arXiv:2210.02412,
for the support.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unknown
from featherweight.sparse.masks import Masks
from featherweight.sparse.reparam.fold import Reparametrization, attach, attachable_weights, forms
from featherweight.sparse.reparam.registry import FORMS
from featherweight.sparse.select import top_k

Scores = Literal["kaiming", "constant"]
CONSTANT = 0.5


class EdgePopup(Reparametrization):
    """Keeps the ``kept`` best scored edges of a support; scores and support have W's shape."""

    trains_alone = True
    support: Tensor

    def __init__(self, scores: Tensor, support: Tensor, kept: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.register_buffer("support", support)
        self.kept = kept

    def mask(self) -> Tensor:
        """Return the edges kept now, bool of the weight's shape; ties go to the lowest index."""
        return top_k(self.scores.detach().abs(), self.kept, self.support)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with exact zeros outside the mask."""
        inputs = (weight, self.scores, self.support, self.mask())
        return _StraightThrough.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, scores: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scores, support = ctx.saved_tensors
        return None, (scores.sign() * weight * gradient).masked_fill(~support, 0), None, None


@FORMS.register(
    "edge-popup",
    "random weights stay as drawn, trained scores choose which of them exist",
    "Ramanujan et al. 2020, arXiv:1911.13299",
    needs=("density", "generator"),
)
def edge_popup(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    support: Mapping[str, Tensor] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    scores: Scores = "kaiming",
    seed: int | None = None,
    generator: Generator | None = None,
) -> None:
    """Freeze the prunable weights of a model and give each a trainable score, in place.

    Other parameters, such as biases and norms, are left as they are: for a strong lottery ticket
    give the optimizer `score_parameters` alone. `featherweight.sparse.reparam.fold` ends it. The
    state dict holds weights, scores and supports; it loads into a model under the same call.

    Args:
        model: any module.
        density: kept fraction of each whole layer, in (0, 1], rounded to a count; or one by name.
        support: weight name to bool mask, for just the weights chosen; None allows all edges.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns to leave out.
        scores: "kaiming" draws from U(-b, b), b = 1 / sqrt(fan in); "constant" is 0.5, so that the
            first mask is the first edges in memory order.
        seed: of the scores; or give ``generator``. "constant" needs neither.
        generator: on the CPU.

    Raises:
        ValueError: a bad argument, a weight that can't be treated, a support that does not fit or
            holds fewer edges than are to be kept. Nothing is touched then.
    """
    if scores not in ("kaiming", "constant"):
        raise ValueError(unknown("scores", scores, ("kaiming", "constant")))
    weights = attachable_weights(model, include, exclude)
    supports = _supports(weights, support)
    kept = {name: _count(name, density, supports[name]) for name in weights}
    draws = None if scores == "constant" else as_generator(seed, generator)
    planned = {name: _initial_scores(weight, draws) for name, weight in weights.items()}
    for name, weight in weights.items():
        attach(model, name, EdgePopup(planned[name], supports[name], kept[name]))
        weight.requires_grad_(False)


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scores of a model under edge-popup, for the optimizer."""
    return [form.scores for form in _popups(model).values()]


def masks(model: nn.Module) -> Masks:
    """Return the masks that a model under edge-popup uses now, by the weights' own names."""
    return Masks({name: form.mask() for name, form in _popups(model).items()})


def _popups(model: nn.Module) -> dict[str, EdgePopup]:
    popups = {name: f for name, f in forms(model).items() if isinstance(f, EdgePopup)}
    if not popups:
        raise ValueError(f"{type(model).__name__} is not under edge_popup")
    return popups


def _supports(
    weights: Mapping[str, Tensor], support: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if support is None:
        return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    Masks(support).check(weights)
    return {name: support[name].to(w.device).clone() for name, w in weights.items()}


def _count(name: str, density: float | Mapping[str, float], support: Tensor) -> int:
    if isinstance(density, Mapping) and name not in density:
        raise ValueError(f"density lacks {name!r}")
    fraction = density[name] if isinstance(density, Mapping) else density
    kept = round(fraction * support.numel()) if 0 < fraction <= 1 else 0
    room = int(support.sum())
    if not 1 <= kept <= room:
        raise ValueError(
            f"density {fraction:g} keeps {kept} of {support.numel()} weights of {name!r}: "
            f"it must lie in (0, 1] and keep from 1 to the {room} that the support holds"
        )
    return kept


def _initial_scores(weight: Tensor, generator: Generator | None) -> Tensor:
    if generator is None:
        return torch.full_like(weight, CONSTANT)
    bound = 1 / math.sqrt(weight[0].numel())
    draws = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
    return (bound * draws).to(weight.device, weight.dtype)
