"""What NanoAdam's options may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.common import unknown
from featherweight.optim import compiled

ON_REFRESH = ("carry", "reset")
BACKENDS = ("auto", "torch", "numba")
FUSED = ("cpu", "cuda", "xpu", "mps")  # devices for which torch has fused AdamW


def check(group: Mapping[str, Any]) -> None:
    """Refuse values out of range.

    Args:
        group: all options of a parameter group of `NanoAdam`.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    lr = float(group["lr"])
    _require(lr >= 0 and math.isfinite(lr), "lr", lr, "a finite number >= 0")
    betas = tuple(group["betas"])
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", betas, "two in [0, 1)")
    for name in ("eps", "weight_decay", "min_size"):
        _require(group[name] >= 0, name, group[name], "a number >= 0")
    for name in ("density", "final_density"):
        value = group[name]
        optional = name == "final_density" and value is None
        _require(optional or 0 < value <= 1, name, value, "a number in (0, 1]")
    _check_intervals(group)
    both = group["foreach"] and group["fused"]
    _require(not both, "foreach", True, "None or False with fused=True")
    for name, allowed in (("on_refresh", ON_REFRESH), ("backend", BACKENDS)):
        if group[name] not in allowed:
            raise ValueError(unknown(name, group[name], allowed))
    kind = group["state_dtype"]
    floating = isinstance(kind, torch.dtype) and kind.is_floating_point
    _require(kind is None or floating, "state_dtype", kind, "a floating dtype or None")
    if group["backend"] == "numba" and not compiled.available():
        raise ValueError("backend 'numba' needs numba: pip install numba, or backend='auto'")


def _check_intervals(group: Mapping[str, Any]) -> None:
    scheduled = group["final_density"] is not None
    for name in ("mask_interval", "density_interval", "total_steps", "chunk"):
        value = group[name]
        optional = value is None and (
            name == "chunk" or (not scheduled and name != "mask_interval")
        )
        positive = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        needed = " (needed with final_density)" if scheduled and value is None else ""
        _require(optional or positive, name, value, f"an integer >= 1{needed}")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_gradients(parameters: Iterable[Tensor]) -> None:
    """Refuse sparse and complex gradients.

    Raises:
        ValueError: names the kind.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and (gradient.is_sparse or not parameter.is_floating_point()):
            kind = "sparse" if gradient.is_sparse else str(gradient.dtype)
            raise ValueError(f"NanoAdam takes dense real gradients, got a {kind} one")


def step_device(parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Return where AdamW wants its counter: its fused kernels beside the parameter."""
    fused = adamw_options(group, [parameter])["fused"]
    return parameter.device if fused else torch.device("cpu")


def device_of(
    parameter: Tensor, group: Mapping[str, Any], name: str, selective: bool
) -> torch.device:
    """Return where a tensor of the state lives: what Python reads lives on the CPU."""
    if name == "step" and not selective:
        return step_device(parameter, group)
    on_host = name in ("step", "starts", "offsets", "chunk", "order")
    return torch.device("cpu") if on_host else parameter.device


def adamw_options(group: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of ``torch.optim.adamw.adamw``."""
    fused = group["fused"]
    if fused is None:
        fused = not group["foreach"] and all(p.device.type in FUSED for p in parameters)
    names = ("lr", "weight_decay", "eps", "maximize", "foreach")
    betas = {"beta1": group["betas"][0], "beta2": group["betas"][1]}
    return {name: group[name] for name in names} | betas | {"fused": fused, "amsgrad": False}
