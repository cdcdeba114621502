"""Sign-In as an optimizer: descent on both factors of each weight, with one copy of the weights.

Under plain descent the factors of ``theta = m w`` enter through two numbers alone, theta and
``beta = m^2 - w^2``. With learning rate h, decay L of both factors, ``a = 1 - h L`` and gradient g
of theta, one step is exactly::

    theta <- (a^2 + h^2 g^2) theta - a h g sqrt(beta^2 + 4 theta^2)
    beta  <- (a^2 - h^2 g^2) beta

so models keep their parameters, and masks, loops and dynamic methods work as with any optimizer.
What is stored is the lost share ``shrinkage = 1 - beta / beta_0``: zero state means freshly
rescaled, which is what `featherweight.sparse.hold` gives to weights that grow.

Source: the method is that of A. Gadhikar, T. Jacobs, C. Zhou and R. Burkholz, NeurIPS 2025,
arXiv:2504.12801; this form is derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from featherweight.common import prunable_weights, unknown, unwrap
from featherweight.sparse.reparam.sign_in import checked_betas

# On the CPU the passes of a step run on parts of this many entries a thread, which stay in cache.
PART = 2**17

Tensors = list[Tensor] | tuple[Tensor, ...]


class SignInSGD(Optimizer):
    """SGD on the factors ``m, w`` of each weight ``m w``, without the factors.

    Without momentum it is the same as `torch.optim.SGD` on the two tensors of
    `featherweight.sparse.reparam.sign_in`, up to rounding. With momentum, the buffer collects the
    gradients of the weight, as in SGD, and the step uses it in place of the gradient; the factors'
    own buffers collect ``w g`` and ``m g``, which is the same where factors change slowly, and need
    not be touched when they are rescaled. So that ``weight_decay`` means what it does there, it
    acts as ``weight_decay / (1 - momentum)``. Rounding is in the weights' dtype: keep them in
    float32. ``torch.compile(optimizer.step)`` fuses a step's passes over memory into one.

    Args:
        params: parameters, or groups; see `sign_in_groups`. In a group with ``beta=None``, for
            biases and norms, a step is that of `torch.optim.SGD`.
        lr: learning rate h, at least 0.
        momentum: in [0, 1); 0 for none.
        weight_decay: L, at least 0, of what ``decay`` says.
        beta: of fresh weights, at least 0; 0 keeps all signs, None is plain SGD.
        nesterov: use Nesterov's momentum.
        decay: "factors" decays m and w, which pulls a weight like an L1 penalty; "product" adds
            ``weight_decay * theta`` to the gradient.
        maximize: go up.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        beta: float | None = 1.0,
        *,
        nesterov: bool = False,
        decay: Literal["factors", "product"] = "factors",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "beta": beta,
            "nesterov": nesterov,
            "decay": decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with any option of its own."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what the closure returned, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients: list[Tensor] = [p.grad for p in weights]
            if any(gradient.is_sparse for gradient in gradients):
                raise ValueError("SignInSGD takes no sparse gradients; use dense embeddings")
            if group["beta"] is None:
                self._plain_step(group, weights, gradients)
            else:
                self._factor_step(group, weights, gradients)
        return loss

    def _plain_step(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]
    ) -> None:
        names = ("weight_decay", "momentum", "lr", "nesterov", "maximize")
        options = {name: group[name] for name in names}
        buffers = [self.state[weight].get("momentum_buffer") for weight in weights]
        sgd(weights, gradients, buffers, dampening=0.0, **options)
        if group["momentum"]:
            for weight, buffer in zip(weights, buffers, strict=True):
                self.state[weight]["momentum_buffer"] = buffer

    def _factor_step(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]
    ) -> None:
        columns = [weights, gradients, self._state("shrinkage", weights)]
        if group["momentum"]:
            columns.append(self._state("momentum_buffer", weights))
        for some, slopes, shrinkages, *buffers in _parts(columns):
            velocities = _velocities(group, some, slopes, *buffers)
            _descend(group, some, shrinkages, velocities)

    def _state(self, key: str, weights: Sequence[Tensor]) -> list[Tensor]:
        for weight in weights:
            if key not in self.state[weight]:
                self.state[weight][key] = torch.zeros_like(weight)
        return [self.state[weight][key] for weight in weights]

    @torch.no_grad()
    def beta_of(self, weight: Tensor) -> Tensor:
        """Return the present beta of each entry of a weight, in its shape.

        Raises:
            ValueError: the weight is not trained here, or in a group of plain SGD.
        """
        for group in self.param_groups:
            if any(weight is parameter for parameter in group["params"]):
                if group["beta"] is None:
                    raise ValueError("this weight is in a group of plain SGD, it has no beta")
                lost: Tensor = self.state[weight].get("shrinkage", torch.zeros_like(weight))
                return (1 - lost) * float(group["beta"])
        raise ValueError("the optimizer does not train this weight")

    @torch.no_grad()
    def rescale(self) -> None:
        """Put beta back to that of its group everywhere; weights and momentum stay.

        A group's ``beta`` may be edited right before.
        """
        for state in self.state.values():
            if "shrinkage" in state:
                state["shrinkage"].zero_()


def _check(group: Mapping[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]:g}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']:g}")
    if group["beta"] is not None:
        checked_betas(["the group"], group["beta"])
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True needs a momentum over 0")
    if group["decay"] not in ("factors", "product"):
        raise ValueError(unknown("decay", group["decay"], ("factors", "product")))


def _parts(columns: Sequence[list[Tensor]]) -> Iterator[Sequence[list[Tensor]]]:
    """Cut columns of equally shaped tensors into parts that stay in a CPU's cache.

    Elsewhere there is one part, for the foreach kernels.
    """
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in columns[0])
    if torch.compiler.is_compiling() or not plain:
        yield columns
        return
    size = PART * torch.get_num_threads()
    for tensors in zip(*columns, strict=True):
        if all(tensor.is_contiguous() for tensor in tensors):
            cut = [tensor.view(-1).split(size) for tensor in tensors]
            yield from ([[part] for part in parts] for parts in zip(*cut, strict=True))
        else:
            yield [[tensor] for tensor in tensors]


def _velocities(
    group: Mapping[str, Any],
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor] | None = None,
) -> Tensors:
    """Return what stands for the gradient: its sign, the product's decay, momentum."""
    velocities: Tensors = gradients
    if group["maximize"]:
        velocities = torch._foreach_neg(velocities)
    if group["decay"] == "product" and group["weight_decay"]:
        velocities = torch._foreach_add(velocities, weights, alpha=group["weight_decay"])
    if buffers is not None:
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, velocities)
        if not group["nesterov"]:
            return buffers
        velocities = torch._foreach_add(velocities, buffers, alpha=group["momentum"])
    return velocities


def _descend(
    group: Mapping[str, Any],
    weights: list[Tensor],
    shrinkages: list[Tensor],
    velocities: Tensors,
) -> None:
    """Step weights and shrinkages, in place; every line is one pass over memory."""
    rate, kept, lag = float(group["lr"]), _kept(group), _lag(group)
    lost = torch._foreach_sub(shrinkages, 1.0)  # -beta / beta_0
    speed = torch._foreach_mul(weights, weights)
    torch._foreach_addcmul_(speed, lost, lost, value=group["beta"] ** 2 / 4)
    torch._foreach_sqrt_(speed)  # sqrt(beta^2 + 4 theta^2) / 2
    torch._foreach_addcmul_(speed, velocities, weights, value=-rate * (1 - 2 * lag) / (2 * kept))
    if kept != 1:
        torch._foreach_mul_(weights, kept**2)
        torch._foreach_add_(shrinkages, lost, alpha=kept**2 - 1)
    torch._foreach_addcmul_(weights, velocities, speed, value=-2 * kept * rate)
    torch._foreach_mul_(lost, velocities)
    torch._foreach_addcmul_(shrinkages, lost, velocities, value=-(rate**2) * (1 + 2 * lag))


def _lag(group: Mapping[str, Any]) -> float:
    """Return by how many steps the gradients in a momentum buffer are old, on average.

    The factors' own buffers hold gradients times the factors of those earlier steps, from which
    the factors have since moved by h v a step. To second order in h that adds ``-2 lag h^2 v^2`` to
    the relative change of theta and of beta; it is what shrinks beta most.
    """
    momentum = float(group["momentum"])
    return momentum ** (2 if group["nesterov"] else 1) / (1 - momentum)


def _kept(group: Mapping[str, Any]) -> float:
    """Return a, the share of both factors that decay leaves in one step."""
    if group["decay"] == "product":
        return 1.0
    kept: float = 1.0 - float(group["lr"]) * float(group["weight_decay"]) / (1 - group["momentum"])
    if kept <= 0:
        raise ValueError(
            "lr * weight_decay / (1 - momentum) must be under 1, got "
            f"{float(group['lr']):g} * {group['weight_decay']:g} / (1 - {group['momentum']:g})"
        )
    return kept


def sign_in_groups(
    model: nn.Module,
    beta: float | Mapping[str, float] = 1.0,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Return the parameter groups of a model for `SignInSGD`: prunable weights, then the rest.

    Args:
        model: any module.
        beta: of the prunable weights; one number or one by name.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns of weights to train by plain SGD.

    Returns:
        One group for each beta, and one with ``beta=None`` for other parameters that are trained.
    """
    weights = prunable_weights(model, include, exclude)
    chosen = checked_betas(weights, beta)
    groups: list[dict[str, Any]] = [
        {"params": [weights[n] for n in weights if chosen[n] == value], "beta": value}
        for value in dict.fromkeys(chosen.values())
    ]
    inside = {id(weight) for weight in weights.values()}
    rest = [p for p in unwrap(model).parameters() if id(p) not in inside and p.requires_grad]
    return groups + ([{"params": rest, "beta": None}] if rest else [])
