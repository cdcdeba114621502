"""Edge-popup: a random network is trained by choosing which of its edges exist.

The weights W stay as drawn. Each has a score c, and the layer computes with ``W * M`` where M marks
the k largest ``|c|`` of the layer. The gradient passes M as if ``dM / d|c| = 1``::

    dL/dc = sign(c) * W * dL/d(W * M)        on the support, 0 elsewhere

Biases can be part of the choice: then a layer's weights and biases compete in one ranking. A random
mask ``support`` restricts the choice to its edges: strong tickets in a sparse network.

Sources: V. Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020,
arXiv:1911.13299, section 3; J. Fischer, A. Gadhikar and R. Burkholz, arXiv:2110.11150, for the
biases; A. Gadhikar, S. Mukherjee and R. Burkholz, ICML 2023, arXiv:2210.02412, for the support.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unknown, unwrap
from featherweight.sparse.masks import Masks
from featherweight.sparse.reparam.fold import Reparametrization, attach, attachable_weights, forms
from featherweight.sparse.reparam.registry import FORMS
from featherweight.sparse.select import top_k

Scores = Literal["kaiming", "constant", "near-constant"]
SCORES = ("kaiming", "constant", "near-constant")
CONSTANT = 0.5
NOISE = 1e-3


class EdgePopup(Reparametrization):
    """Keeps the ``kept`` best scored entries of a layer; scores and support have W's shape.

    Attributes:
        kept: how many entries, of this parameter and its rivals together.
        rivals: the forms that share one ranking, this one among them: a layer's weight and bias.
    """

    trains_alone = True
    support: Tensor

    def __init__(self, scores: Tensor, support: Tensor, kept: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.register_buffer("support", support)
        self.kept = kept
        # In a tuple, so that torch does not make a rival's parameters this module's own.
        self.rivals: tuple[EdgePopup, ...] = (self,)

    def mask(self) -> Tensor:
        """Return the entries kept now, bool of the parameter's shape.

        Of ties the lowest index stays, weights before biases.
        """
        if len(self.rivals) == 1:
            return top_k(self.scores.detach().abs(), self.kept, self.support)
        ranked = torch.cat([form.scores.detach().abs().flatten() for form in self.rivals])
        allowed = torch.cat([form.support.flatten() for form in self.rivals])
        chosen = top_k(ranked, self.kept, allowed)
        parts = chosen.split([form.scores.numel() for form in self.rivals])
        own: Tensor = parts[self.rivals.index(self)]
        return own.view(self.scores.shape)

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
    biases: bool = False,
    seed: int | None = None,
    generator: Generator | None = None,
) -> None:
    """Freeze the prunable weights of a model and give each a trainable score, in place.

    Other parameters, such as norms, are left as they are: for a strong lottery ticket give the
    optimizer `score_parameters` alone. `featherweight.sparse.reparam.fold` ends it. The state dict
    holds weights, scores and supports; it loads into a model under the same call.

    Args:
        model: any module.
        density: kept fraction of each whole layer, in (0, 1], rounded to a count; or one by name.
        support: weight name to bool mask, for just the weights chosen; None allows all edges.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns to leave out.
        scores: "kaiming" draws from U(-b, b), b = 1 / sqrt(fan in), for biases sqrt(6) times that;
            "constant" is 0.5, so that the first mask is the first edges in memory order;
            "near-constant" is 0.5 and up to a thousandth more, so that the first mask is random.
        biases: whether the biases of these layers are frozen and scored too. Then weights and
            biases of a layer are ranked together, and the density is that of both. Where biases
            are zero this does nothing good: draw them, with a suitable scale.
        seed: of the scores; or give ``generator``. "constant" needs neither.
        generator: on the CPU.

    Raises:
        ValueError: a bad argument, a weight that can't be treated, a support that does not fit or
            holds fewer edges than are to be kept. Nothing is touched then.
    """
    if scores not in SCORES:
        raise ValueError(unknown("scores", scores, SCORES))
    weights = attachable_weights(model, include, exclude)
    ranked = {w: [w, *_bias_of(model, w)] if biases else [w] for w in weights}
    parameters = attachable_weights(model, [n for names in ranked.values() for n in names])
    supports = _supports(weights, support)
    supports |= {n: torch.ones_like(p).bool() for n, p in parameters.items() if n not in weights}
    kept = {w: count(w, density, [supports[n] for n in names]) for w, names in ranked.items()}
    draws = None if scores == "constant" else as_generator(seed, generator)
    planned = {
        n: EdgePopup(
            _initial_scores(parameters[n], weights[w], scores, draws), supports[n], kept[w]
        )
        for w, names in ranked.items()
        for n in names
    }
    for names in ranked.values():
        for name in names:
            planned[name].rivals = tuple(planned[n] for n in names)
            attach(model, name, planned[name])
            parameters[name].requires_grad_(False)


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scores of a model under edge-popup, for the optimizer."""
    return [form.scores for form in popups(model).values()]


def masks(model: nn.Module) -> Masks:
    """Return the masks that a model under edge-popup uses now, by the parameters' own names."""
    return Masks({name: form.mask() for name, form in popups(model).items()})


def popups(model: nn.Module) -> dict[str, EdgePopup]:
    """Return parameter name -> form of a model under edge-popup.

    Raises:
        ValueError: it isn't.
    """
    found = {name: f for name, f in forms(model).items() if isinstance(f, EdgePopup)}
    if not found:
        raise ValueError(f"{type(model).__name__} is not under edge_popup")
    return found


def count(name: str, density: float | Mapping[str, float], supports: Sequence[Tensor]) -> int:
    """Return how many entries of a layer a density keeps, of its weight and perhaps its bias.

    Raises:
        ValueError: none, or more than the supports hold.
    """
    if isinstance(density, Mapping) and name not in density:
        raise ValueError(f"density lacks {name!r}")
    fraction = density[name] if isinstance(density, Mapping) else density
    size = sum(support.numel() for support in supports)
    kept = round(fraction * size) if 0 < fraction <= 1 else 0
    room = int(sum(support.sum() for support in supports))
    if not 1 <= kept <= room:
        raise ValueError(
            f"density {fraction:g} keeps {kept} of {size} weights of {name!r}: "
            f"it must lie in (0, 1] and keep from 1 to the {room} that the support holds"
        )
    return kept


def _bias_of(model: nn.Module, weight: str) -> list[str]:
    """Return the name of the bias beside a weight, if there is one; of a tied one, the first."""
    path, _, attribute = weight.rpartition(".")
    bias = f"{path}.bias" if path else "bias"
    names = [name for name, _ in unwrap(model).named_parameters()]
    return [bias] if attribute == "weight" and bias in names else []


def _supports(
    weights: Mapping[str, Tensor], support: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if support is None:
        return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    Masks(support).check(weights)
    return {name: support[name].to(w.device).clone() for name, w in weights.items()}


def _initial_scores(
    parameter: Tensor, weight: Tensor, scores: Scores, generator: Generator | None
) -> Tensor:
    """Draw scores of a weight, or of the bias beside it."""
    if generator is None:
        return torch.full_like(parameter, CONSTANT)
    draws = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    if scores == "near-constant":
        values = CONSTANT * (1 + NOISE * draws)
    else:
        bound = math.sqrt((1 if parameter is weight else 6) / weight[0].numel())
        values = bound * (2 * draws - 1)
    return values.to(parameter.device, parameter.dtype)
