"""HAM's options in parameter groups: checked, split between weights and the rest, kept on load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import unknown
from featherweight.optim.weights import ham_weights

Group = dict[str, Any]

DIRECTIONS = ("gradient", "update")


def hyperbolic_options(
    alpha: float, beta: float, direction: str, clamp: float | None
) -> dict[str, Any]:
    """Return the keys that HAM adds to each parameter group, checked.

    Raises:
        ValueError: a value is out of range.
    """
    options = {
        "ham_alpha": alpha,
        "ham_beta": beta,
        "ham_direction": direction,
        "ham_clamp": clamp,
    }
    check_group(options)
    return options


def check_group(group: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Refuse a parameter group that HAM can't treat.

    Args:
        group: options and, under ``params``, parameters; either may be missing.
        known: the base optimizer's own options, which may be called ``alpha`` or ``beta``.

    Raises:
        ValueError: an option is out of range or misspelt.
        TypeError: a parameter is complex.
    """
    for name in ("alpha", "beta"):
        if name in group and name not in known:
            raise ValueError(f"parameter group: {name!r} is called 'ham_{name}' in groups")
        value = group.get(f"ham_{name}", 0.0)
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if group.get("ham_direction", "gradient") not in DIRECTIONS:
        raise ValueError(unknown("direction", group["ham_direction"], DIRECTIONS))
    clamp = group.get("ham_clamp")
    if clamp is not None and not clamp > 0.0:
        raise ValueError(f"clamp must be above 0 or None, got {clamp}")
    if group.get("differentiable"):
        raise ValueError("HAM steps in place: differentiable=True is not supported")
    params = group.get("params", ())
    for parameter in [params] if isinstance(params, Tensor) else list(params):
        tensor = parameter[1] if isinstance(parameter, tuple) else parameter
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise TypeError("HAM needs real parameters: a complex one has no sign")


def acts(group: Mapping[str, Any]) -> bool:
    """Tell whether the hyperbolic step changes anything in a group."""
    return bool(group["ham_alpha"] or group["ham_beta"])


def split_groups(groups: list[Group], weights: nn.Module | Iterable[Tensor] | None) -> list[Group]:
    """Part each group into what the hyperbolic step acts on and what it leaves alone.

    Args:
        groups: parameter groups of an optimizer.
        weights: the parameters it acts on, or the model, of which `ham_weights` takes the weights;
            None keeps the groups as they are.

    Returns:
        The groups in their order, those of which a part is left alone in two: the rest has
        ``ham_alpha`` and ``ham_beta`` 0.

    Raises:
        ValueError: none of the weights is in any group.
    """
    if weights is None:
        return groups
    chosen = ham_weights(weights).values() if isinstance(weights, nn.Module) else weights
    wanted = {id(weight) for weight in chosen}
    if not any(id(p) in wanted for group in groups for p in group["params"]):
        raise ValueError("weights: the optimizer trains none of them")
    return [part for group in groups for part in _parts(group, wanted)]


def _parts(group: Group, wanted: set[int]) -> Iterator[Group]:
    for inside in (True, False):
        at = [i for i, p in enumerate(group["params"]) if (id(p) in wanted) is inside]
        part = {**group, "params": [group["params"][i] for i in at]}
        if "param_names" in group:
            part["param_names"] = [group["param_names"][i] for i in at]
        if at:
            yield part if inside else part | {"ham_alpha": 0.0, "ham_beta": 0.0}


def keep_options(load: Callable[[], None], groups: Callable[[], list[Group]]) -> None:
    """Load a state dict; where it is one of an optimizer without HAM, HAM's options stay."""
    before = [{key: g[key] for key in g if key.startswith("ham_")} for g in groups()]
    load()
    for options, group in zip(before, groups(), strict=True):
        for key, value in options.items():
            group.setdefault(key, value)


def refuse_sparse(groups: Iterable[Group]) -> None:
    """Stop before a step that would meet a sparse gradient.

    Raises:
        RuntimeError: one is there.
    """
    for group in groups:
        if any(p.grad is not None and p.grad.layout != torch.strided for p in group["params"]):
            raise RuntimeError("HAM does not support sparse gradients")
