"""Magnitude as the network sees it: the weight times the scale of the batch norm behind it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featherweight.common import PRUNABLE_MODULES, unwrap
from featherweight.sparse.criteria.registry import CRITERIA, Scores

PAPER = "Gadhikar & Burkholz 2024, arXiv:2402.19262"
_Norm = nn.modules.batchnorm._BatchNorm


@CRITERIA.register(
    "norm-magnitude", "absolute value times the batch norm's |weight|", PAPER, needs=["model"]
)
def norm_magnitude(weights: Mapping[str, Tensor], model: nn.Module) -> Scores:
    """Score every weight by ``|w * gamma|``, gamma being the weight of the batch norm behind it.

    The batch norm behind a layer is the one that the model registers next, before any other
    prunable layer, if it has as many channels as the layer has outputs. A layer without one is
    scored by ``|w|``.

    Args:
        weights: parameter name to weight, of the model.
        model: holds the batch norms.

    Source: an ablation of Gadhikar & Burkholz 2024, arXiv:2402.19262.
    """
    return _scaled(weights, {name: _gamma(norm) for name, norm in _norms_behind(model).items()})


@CRITERIA.register(
    "folded-magnitude", "absolute value of the weight with batch norm folded in", PAPER, ["model"]
)
def folded_magnitude(weights: Mapping[str, Tensor], model: nn.Module) -> Scores:
    """Score every weight by ``|w * gamma| / sigma``: its size once batch norm is folded into it.

    As `norm_magnitude`, divided by the running standard deviation.

    Args:
        weights: parameter name to weight, of the model.
        model: holds the batch norms; their running variances are used.
    """
    scales = {}
    for name, norm in _norms_behind(model).items():
        variance = norm.running_var
        sigma = 1.0 if variance is None else (variance + norm.eps).sqrt()
        scales[name] = _gamma(norm) / sigma
    return _scaled(weights, scales)


def _scaled(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Scores:
    scores = {}
    for name, weight in weights.items():
        magnitude = weight.detach().abs()
        scale = scales.get(name)
        if scale is not None:
            magnitude = magnitude * scale.view(-1, *[1] * (weight.dim() - 1))
        scores[name] = magnitude
    return scores


def _gamma(norm: _Norm) -> Tensor:
    gamma = norm.weight if norm.affine else torch.ones(norm.num_features)
    return gamma.detach().abs()


def _norms_behind(model: nn.Module) -> dict[str, _Norm]:
    found: dict[str, _Norm] = {}
    before: tuple[str, nn.Module] | None = None
    for prefix, module in unwrap(model).named_modules():
        if isinstance(module, PRUNABLE_MODULES) and not getattr(module, "transposed", False):
            before = f"{prefix}.weight" if prefix else "weight", module
        elif isinstance(module, _Norm) and before is not None:
            name, layer = before
            outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
            if outputs == module.num_features:
                found[name] = module
            before = None
    return found
