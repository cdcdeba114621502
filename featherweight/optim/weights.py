"""Which parameters are weights in the sense of HAM, and how strong a step they bear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from featherweight.common import matches, unwrap

WEIGHT_NAMES: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.Embedding: ("weight",),
    nn.EmbeddingBag: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.RNNBase: ("weight_*",),
    nn.RNNCellBase: ("weight_*",),
}
"""Type of a module to shell-style patterns of the names of its weights."""


def ham_weights(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Find the parameters that HAM acts on, by the type of the module that holds them.

    Weights of linear, convolutional, recurrent, attention and embedding modules of torch; no
    biases, no norms, whatever their rank. A module of another kind says which of its parameters
    are weights by an attribute ``parameter_roles``, such as ``{"values": "weight"}`` for the
    one-dimensional values of a truly sparse layer.

    Args:
        model: any module, also compiled or wrapped for data-parallel training.
        include: shell-style patterns of parameter names to add.
        exclude: shell-style patterns of names to leave out.

    Returns:
        Parameter name (of the unwrapped model) to parameter; tied ones once.

    Raises:
        ValueError: nothing is left, a pattern fits no parameter, or a weight is parametrised.
    """
    model = unwrap(model)
    named = dict(model.named_parameters())
    wanted, unwanted = _patterns(include), _patterns(exclude)
    for pattern in [*wanted, *unwanted]:
        if not any(matches(name, [pattern]) for name in named):
            raise ValueError(f"pattern {pattern!r} fits no parameter of {type(model).__name__}")
    roles = {id(p) for module in model.modules() for p in _weights_of(module, wanted + unwanted)}
    found = {
        name: parameter
        for name, parameter in named.items()
        if (id(parameter) in roles or matches(name, wanted)) and not matches(name, unwanted)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no weight that HAM could act on")
    return found


def _patterns(patterns: Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _weights_of(module: nn.Module, mentioned: list[str]) -> list[nn.Parameter]:
    names = [p for kind, ps in WEIGHT_NAMES.items() if isinstance(module, kind) for p in ps]
    hidden = [n for n in getattr(module, "parametrizations", {}) if matches(n, names)]
    if hidden and not mentioned:
        raise ValueError(
            f"{hidden[0]!r} of a {type(module).__name__} is parametrised; fold it first, or say "
            "by include= or exclude= what to do with its parts"
        )
    roles = getattr(module, "parameter_roles", {})
    names += [name for name, role in roles.items() if role == "weight"]
    own = module.named_parameters(recurse=False)
    return [parameter for name, parameter in own if matches(name, names)]


def suggest_alpha(weights: nn.Module | Iterable[Tensor], strength: float = 3.0) -> float:
    """Suggest HAM's alpha from the scale of the weights.

    A plain gradient step under HAM is ``1 + alpha |θ|`` times as long for a weight θ. The
    suggestion makes that ``1 + strength`` for the weight of median size. It is a place to start
    a search, not an optimum; it has no source but this reasoning. The step stays stable while
    ``lr (1 + alpha max|θ|)`` times the curvature is below 2, so a weight far above the median
    asks for less. Momentum mu dilutes alpha to ``alpha (1 - mu)`` in its effect, but does not make
    larger ones any safer: it is left out of the suggestion.

    Args:
        weights: tensors, or a model, of which `ham_weights` takes the weights. Exact zeros, as of
            pruned weights, do not count.
        strength: 2 to 4 are usual; 0 gives an alpha of 0.

    Returns:
        alpha, in units of one over a weight.

    Raises:
        ValueError: an argument is out of range, or no weight is nonzero and finite.
    """
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and at least 0, got {strength}")
    tensors = ham_weights(weights).values() if isinstance(weights, nn.Module) else weights
    sizes = [tensor.detach().flatten().abs().float() for tensor in tensors]
    size = torch.cat([s[s > 0] for s in sizes]) if sizes else torch.empty(0)
    if not len(size) or not size.isfinite().all():
        raise ValueError("weights: none is nonzero, or some are not finite")
    return strength / size.median().item()
