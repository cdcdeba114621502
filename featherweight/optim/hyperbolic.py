"""The hyperbolic step of HAM: a factor on the weights, after the step of any optimizer.

Tom Jacobs, Advait Gadhikar, Celia Rubio-Madrigal, Rebekka Burkholz 2025, arXiv:2506.02630,
Algorithm 1 (HYP*)::

    θ ← θ · exp(-η (α sign(θ) ∇f + β))

with the θ that the base step has left, the gradient it consumed and its learning rate η.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featherweight.optim.ham_groups import Group, acts

Rate = float | Tensor

CHUNK = 262_144  # entries a thread: few enough to stay in the cache, enough to be worth a start
UNIT = math.log2(math.e)  # 2^(x UNIT): on CPUs torch's exp2 takes a third of the time of its exp
LOW = (torch.bfloat16, torch.float16)


class Pending(NamedTuple):
    """A hyperbolic step that waits for the base step to be made.

    The learning rate is read beforehand: a scheduler in a hook may change it during the step.
    """

    group: Group
    rates: tuple[Rate, Rate]
    weights: list[Tensor]
    gradients: list[
        Tensor
    ]  # none if a closure makes them; references; some optimizers free .grad during their step
    versions: list[int]  # of the gradients, to notice what is overwritten
    old: list[Tensor]  # copies, for direction="update"


def prepare(groups: Iterable[Group], closure: bool = False) -> list[Pending]:
    """Note what the hyperbolic step needs from before the base step.

    Args:
        groups: all groups of the optimizer.
        closure: gradients do not exist yet, they are made during the step.
    """
    return [_pending(group, closure) for group in groups if acts(group)]


def _pending(group: Group, closure: bool) -> Pending:
    weights = [p for p in group["params"] if closure or p.grad is not None]
    gradients = [] if closure else [p.grad for p in weights if p.grad is not None]
    if group["ham_direction"] == "update":
        return Pending(group, rates(group), weights, gradients, [], [p.clone() for p in weights])
    if _overwrites(group):
        gradients = [gradient.clone() for gradient in gradients]
    versions = [] if torch.compiler.is_compiling() else [g._version for g in gradients]
    return Pending(group, rates(group), weights, gradients, versions, [])


def _overwrites(group: Group) -> bool:
    """Tell whether the step of torch's SGD adds momentum to ``.grad`` in place, as foreach does."""
    if not group.get("nesterov") or group.get("fused") or group.get("foreach") is False:
        return False
    return bool(group["foreach"]) or any(p.device.type != "cpu" for p in group["params"])


def rates(group: Mapping[str, Any]) -> tuple[Rate, Rate]:
    """Return what sign(θ)·direction is multiplied by, and what is added, in the exponent."""
    lr = group["lr"]
    if group["ham_direction"] == "update":
        return group["ham_alpha"], -lr * group["ham_beta"]
    ascent = -1.0 if group.get("maximize") else 1.0
    return -ascent * lr * group["ham_alpha"], -lr * group["ham_beta"]


def finish(pending: Iterable[Pending], foreach: bool | None = None) -> None:
    """Make the hyperbolic steps, after the base step.

    Raises:
        RuntimeError: the base step has written to gradients that HAM needs.
    """
    for group, (alpha, beta), weights, gradients, versions, old in pending:
        if versions != [g._version for g in gradients[: len(versions)]]:
            raise RuntimeError(
                "the optimizer's step changed gradients in place, and HAM needs them as they were: "
                'direction="update" works without'
            )
        clamp = group["ham_clamp"]
        slopes: list[Tensor | None] = [*gradients] or [p.grad for p in weights]
        rows = [
            (weight, slope if not old else weight - old[i])
            for i, (weight, slope) in enumerate(zip(weights, slopes, strict=True))
            if slope is not None
        ]
        hyperbolic_([w for w, _ in rows], [d for _, d in rows], alpha, beta, clamp, foreach)


def hyperbolic_(
    weights: list[Tensor],
    directions: list[Tensor],
    alpha: Rate,
    beta: Rate,
    clamp: float | None = None,
    foreach: bool | None = None,
) -> None:
    """Multiply weights by ``exp(alpha · sign(weight) · direction + beta)``, in place.

    An exact zero stays; no sign changes. Weights of 16 bits are treated in float32.

    Args:
        weights: any shapes.
        directions: of the same shapes: gradients, or updates.
        alpha: for gradients ``-η α``; 0 multiplies by one number. A float or a 0-d tensor.
        beta: for gradients ``-η β``.
        clamp: bound on the size of the exponent.
        foreach: all tensors at a time, with temporaries as large as all weights; None does so
            on accelerators.
    """
    if not weights:
        return
    if foreach is None:
        foreach = weights[0].device.type == "cuda" and not torch.compiler.is_compiling()
    if isinstance(alpha, float | int) and alpha == 0:
        _decay_(weights, beta, clamp)
    elif foreach:
        _foreach_(weights, directions, alpha, beta, clamp)
    else:
        for weight, direction in zip(weights, directions, strict=True):
            if chunkable(weight):
                for part, its in chunks([weight, direction]) or [(weight, direction)]:
                    chunk_(part, its, float(alpha), float(beta), clamp)
            else:
                weight.mul_(_factor(weight, direction, alpha, beta, clamp))


def _decay_(weights: list[Tensor], beta: Rate, clamp: float | None) -> None:
    if isinstance(beta, Tensor):
        factor: Rate = (beta if clamp is None else beta.clamp(-clamp, clamp)).exp()
    else:
        factor = math.exp(beta if clamp is None else max(beta, -clamp))
    for weight in weights:
        weight.mul_(factor)


def _factor(
    weight: Tensor, direction: Tensor, alpha: Rate, beta: Rate, clamp: float | None
) -> Tensor:
    exponent = torch.where(weight < 0, -direction, direction)  # compiles to less than sign() does
    if exponent.dtype in LOW:
        exponent = exponent.float()
    exponent = exponent * (alpha * UNIT) + beta * UNIT
    if clamp is not None:
        exponent = exponent.clamp(-clamp * UNIT, clamp * UNIT)
    return exponent.exp2()


def _foreach_(
    weights: list[Tensor], directions: list[Tensor], alpha: Rate, beta: Rate, clamp: float | None
) -> None:
    exponents = list(torch._foreach_sign(weights))
    torch._foreach_mul_(exponents, directions)
    exponents = [e.float() if e.dtype in LOW else e for e in exponents]
    torch._foreach_mul_(exponents, alpha)
    torch._foreach_add_(exponents, beta)
    if clamp is not None:
        torch._foreach_clamp_min_(exponents, -clamp)
        torch._foreach_clamp_max_(exponents, clamp)
    torch._foreach_exp_(exponents)
    torch._foreach_mul_(weights, exponents)


def chunkable(tensor: Tensor) -> bool:
    """Tell whether a tensor may be treated chunk by chunk: a plain one, on a CPU, not traced."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def chunks(tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Cut tensors of one shape and one memory layout into flat pieces that share their memory.

    Returns:
        Rows of pieces; none if the layouts differ or have holes.
    """
    order, size = tensors[0].dim_order(), CHUNK * torch.get_num_threads()
    turned = [tensor.detach().permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in turned):
        return []
    return list(zip(*(tensor.view(-1).split(size) for tensor in turned), strict=True))


def chunk_(
    weight: Tensor, direction: Tensor, alpha: float, beta: float, clamp: float | None
) -> None:
    """Do what `hyperbolic_` does to one chunk, in five passes over what is in the cache."""
    if alpha == 0:
        _decay_([weight], beta, clamp)
        return
    if weight.dtype in LOW:
        wide = weight.float()
        chunk_(wide, direction.float(), alpha, beta, clamp)
        weight.copy_(wide)
        return
    shift = torch.tensor(beta * UNIT, dtype=weight.dtype)
    exponent = weight.sign()
    torch.addcmul(shift, exponent, direction, value=alpha * UNIT, out=exponent)
    if clamp is not None:
        exponent.clamp_(-clamp * UNIT, clamp * UNIT)
    weight.mul_(exponent.exp2_())
