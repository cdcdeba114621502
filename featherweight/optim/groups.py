"""Parameter groups by the type of the module that holds a parameter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from featherweight.common import matches, unwrap

NORMS: tuple[type[nn.Module], ...] = (
    _NormBase,  # batch and instance norms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)

NORM_NAME = re.compile(r"Norm(?![a-z])")  # LlamaRMSNorm, FrozenBatchNorm2d; not NormalizedLinear


def groups(
    model: nn.Module,
    *,
    head: str | Iterable[str] | None = "auto",
    exclude: Iterable[str] = (),
    min_size: int = 4096,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Divide a model's parameters into those NanoAdam selects from and those it trains whole.

    Trained whole are norms (by the type of their module), biases, the head, and what has fewer
    than ``min_size`` entries. A module says of its own parameters what they are by an attribute
    ``parameter_roles``, such as ``{"values": "weight"}`` for the one-dimensional values of a truly
    sparse layer; the rank of a tensor is never asked.

    Args:
        model: any module, also compiled, wrapped for data-parallel training, or sharded.
        head: the module whose parameters are trained whole since it starts from nothing. "auto":
            what the model itself names as its output layer, or else the linear or convolutional
            layer registered last. Otherwise names of modules (shell-style patterns); None: no head.
        exclude: patterns of further parameter names that are trained whole.
        min_size: entries.
        weight_decay: of both groups, but none for norms and biases, which get a group of their
            own; None: as the optimizer says, for all.

    Returns:
        Groups with named parameters, for ``NanoAdam(groups(model), lr=...)``. The groups trained
        whole have density 1. Parameters without ``requires_grad`` are left out, tied ones are in
        once.

    Raises:
        ValueError: a pattern fits nothing, or the model has no parameter to train.
    """
    model = unwrap(model)
    heads = _heads(model, head)
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in excluded:
        if not any(matches(name, [pattern]) for name, _ in model.named_parameters()):
            raise ValueError(f"pattern {pattern!r} fits no parameter of {type(model).__name__}")
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter to train")
    roles = _roles(model, heads)
    found: dict[str, list[tuple[str, nn.Parameter]]] = {"selected": [], "whole": [], "plain": []}
    for name, parameter in named.items():
        role = roles[id(parameter)]
        if role in ("norm", "bias"):
            kind = "plain"
        elif role == "head" or parameter.numel() < min_size or matches(name, excluded):
            kind = "whole"
        else:
            kind = "selected"
        found[kind].append((name, parameter))
    return _as_groups(found, min_size, weight_decay)


def _as_groups(
    found: dict[str, list[tuple[str, nn.Parameter]]], min_size: int, weight_decay: float | None
) -> list[dict[str, Any]]:
    if weight_decay is None:
        found = {"selected": found["selected"], "whole": found["whole"] + found["plain"]}
    options: dict[str, dict[str, Any]] = {
        "selected": {"min_size": min_size},
        "whole": {"density": 1.0, "final_density": None},
        "plain": {"density": 1.0, "final_density": None},
    }
    if weight_decay is not None:
        for kind, group in options.items():
            group["weight_decay"] = 0.0 if kind == "plain" else weight_decay
    return [{"params": ps, **options[kind]} for kind, ps in found.items() if ps]


def _roles(model: nn.Module, heads: list[nn.Module]) -> dict[int, str]:
    """Return "weight", "bias", "norm" or "head" by the id of the parameter; tied: the last two."""
    rank = {"weight": 0, "bias": 1, "norm": 2, "head": 3}
    inside = {id(module) for head in heads for module in head.modules()}
    roles: dict[int, str] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = "head" if id(module) in inside else _role(module, name)
            roles[id(parameter)] = max(role, roles.get(id(parameter), role), key=rank.__getitem__)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for head in heads:
        for name, parameter in head.named_parameters():
            if id(parameter) in embeddings:
                warnings.warn(
                    f"the head's {name} is tied to an embedding: both are trained whole, with all "
                    "their state; head=None selects from them",
                    stacklevel=3,
                )
    return roles


def _role(module: nn.Module, name: str) -> str:
    told = getattr(module, "parameter_roles", {}).get(name)
    if told is not None:
        if told not in ("weight", "bias", "norm"):
            raise ValueError(
                f"parameter_roles of {type(module).__name__} must say weight, bias or norm, "
                f"got {told!r}"
            )
        return str(told)
    if isinstance(module, NORMS) or NORM_NAME.search(type(module).__name__):
        return "norm"
    return "bias" if "bias" in name else "weight"


def _heads(model: nn.Module, head: str | Iterable[str] | None) -> list[nn.Module]:
    if head is None:
        return []
    if head == "auto":
        return list(_own_heads(model)) or _last_layer(model)
    patterns = [head] if isinstance(head, str) else list(head)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            raise ValueError(f"head={pattern!r} fits no module of {type(model).__name__}")
    return [module for name, module in model.named_modules() if matches(name, patterns)]


def _own_heads(model: nn.Module) -> Iterator[nn.Module]:
    """Ask a transformers model or a timm model for its output layer."""
    for method in ("get_output_embeddings", "get_classifier"):
        found = getattr(model, method, lambda: None)()
        if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
            yield found


def _last_layer(model: nn.Module) -> list[nn.Module]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, kinds)]
    return layers[-1:]
