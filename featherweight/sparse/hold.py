"""Hold masks in force while the user's own loop trains: masked weights stay exact zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import unwrap
from featherweight.sparse.masks import Masks

# Where weight, gradient and state of an entry are zero, a step of these leaves them zero. So with
# them masking before the step is enough, and what nobody touched since need not be masked again.
KEEPS_ZEROS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)

MEND_EVERY = 4  # steps


class Hold:
    """Masks in force on a model and its optimizer; made by `hold`.

    Usable as a context manager that removes itself on exit.

    Attributes:
        dense_gradients: while true, gradients accumulate unmasked and are masked as the optimizer's
            step begins; a step pre-hook registered before this hold then sees them dense.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, masks: Masks) -> None:
        self._model = unwrap(model)
        self._optimizer = _innermost(optimizer)
        self._weights = masks.weights(self._model)
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(id(weight) in trained for weight in self._weights.values()):
            raise ValueError("the optimizer trains none of the masked weights")
        self._masked: dict[int, tuple[Tensor, int]] = {}  # gradients as masked, with their version
        self._versions: dict[int, int] = {}  # of the weights, when last known to be masked
        self.dense_gradients = False
        self._zeros_stay = False
        self._turn = 0
        self._set(masks)
        self.rezero_()
        self._handles: list[Any] = [
            weight.register_post_accumulate_grad_hook(self._after_accumulation)
            for weight in self._weights.values()
            if weight.requires_grad
        ]
        rezero = lambda *_: self.rezero_()  # noqa: E731
        self._handles += [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(rezero),
            self._model.register_load_state_dict_post_hook(rezero),
        ]

    @property
    def masks(self) -> Masks:
        """The masks in force."""
        return self._masks

    def _set(self, masks: Masks) -> None:
        self._masks = masks
        # Multiplying by a mask of the weight's dtype is several times faster than filling by a
        # bool mask; this is the whole cost of holding.
        self._factors = {
            id(weight): _like(masks[name], weight) for name, weight in self._weights.items()
        }

    def _factor(self, weight: Tensor) -> Tensor:
        factor = self._factors[id(weight)]
        if factor.device != weight.device or factor.dtype != weight.dtype:
            factor = self._factors[id(weight)] = factor.to(weight)  # the model has moved
        return factor

    def _after_accumulation(self, weight: Tensor) -> None:
        if not self.dense_gradients:
            self._mask_gradient(weight)

    @torch.no_grad()
    def _mask_gradient(self, weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is not None:
            gradient.mul_(self._factor(weight).to(gradient.dtype))
            self._masked[id(weight)] = gradient, gradient._version

    def _before_step(self, _: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        closure = has_closure(arguments, named)
        sharded = any(hasattr(weight, "placements") for weight in self._weights.values())
        self._zeros_stay = type(self._optimizer) in KEEPS_ZEROS and not closure and not sharded
        if self._zeros_stay or self.dense_gradients:
            self._mask_what_changed()
        self._masked.clear()

    @torch.no_grad()
    def _mask_what_changed(self) -> None:
        """Mask gradients and weights that others wrote to: clipped, assigned, edited in place."""
        for weight in self._weights.values():
            gradient, version = self._masked.get(id(weight), (None, 0))
            if weight.grad is not gradient or (
                gradient is not None and gradient._version != version
            ):
                self._mask_gradient(weight)
            if weight._version != self._versions[id(weight)]:
                weight.mul_(self._factor(weight))

    def _after_step(self, *_: object) -> None:
        weights = list(self._weights.values())
        if self._zeros_stay:
            # Writes through .data leave no trace; zeroing one weight with its state now and then,
            # in turn, mends them.
            self._turn = (self._turn + 1) % (MEND_EVERY * len(weights))
            weights = [] if self._turn % MEND_EVERY else [weights[self._turn // MEND_EVERY]]
        self._rezero(weights)

    def rezero_(self) -> None:
        """Set masked weights and the optimizer's state of masked weights to zero.

        Runs by itself when the hold begins, after a step of any optimizer that is not known to
        leave zeros alone, and after a state dict is loaded into the model or the optimizer.
        """
        self._rezero(self._weights.values())

    @torch.no_grad()
    def _rezero(self, weights: Iterable[Tensor]) -> None:
        tensors: list[Tensor] = []
        factors: list[Tensor] = []
        for weight in weights:
            factor = self._factor(weight)
            state = self._optimizer.state.get(weight, {})
            for tensor in (weight, *elementwise_state(weight, state).values()):
                tensors.append(tensor)
                factors.append(factor.to(tensor.dtype))
        if tensors:
            torch._foreach_mul_(tensors, factors)
        self._versions = {id(weight): weight._version for weight in self._weights.values()}

    @torch.no_grad()
    def update(self, masks: Masks, grown: Mapping[str, Tensor] | None = None) -> None:
        """Put other masks in force.

        Dropped entries lose their weight and their optimizer state; grown entries start with zero
        optimizer state, as in the field's dynamic methods, and with weight zero or the value
        given. What stays keeps both.

        Args:
            masks: of the same tensors.
            grown: start values of grown entries by parameter name, of the parameters' shapes.

        Raises:
            ValueError: the masks or start values do not fit; nothing is changed then.
        """
        self._masks.check(masks)
        for name, value in (grown or {}).items():
            if name not in self._weights or value.shape != self._weights[name].shape:
                raise ValueError(f"grown: {name!r} of shape {list(value.shape)} is no held weight")
        for name, weight in self._weights.items():
            new = masks[name].to(weight.device) & ~self._masks[name].to(weight.device)
            fresh = _like(new, weight).bool()
            state = self._optimizer.state.get(weight, {})
            for tensor in elementwise_state(weight, state).values():
                tensor.masked_fill_(fresh, 0)
            start = None if grown is None else grown.get(name)
            if start is not None:
                weight.copy_(torch.where(fresh, _like(start, weight), weight))
        self._set(masks)
        self.rezero_()
        for weight in self._weights.values():
            self._mask_gradient(weight)

    def remove(self) -> None:
        """Let go: the weights stay as they are and may move freely from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold(model: nn.Module, optimizer: Optimizer, masks: Masks) -> Hold:
    """Keep the masked weights of a model at exact zero from now on.

    Hooks do it, so that the model's class, parameters and state-dict keys stay as they are:
    gradients are masked as they accumulate (clipping by global norm sees masked gradients), and
    masked weights and their optimizer state are zero after each optimizer step and after a state
    dict is loaded. After a step of an optimizer that leaves zeros alone (SGD, the Adam family)
    nothing need be zeroed; what is changed in place between backward and step is masked again
    before it. Works with any optimizer whose state is elementwise, with gradient accumulation,
    ``GradScaler``, closures, compiled models, data-parallel and sharded training.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer that trains it.
        masks: masks of the model's parameters; the masked weights are zeroed at once.

    Returns:
        The hold, with ``update(masks)``, ``remove()``, and use as a context manager.

    Raises:
        ValueError: the masks do not fit the model, or the optimizer trains none of its masked
            weights; nothing is touched then.
    """
    return Hold(model, optimizer, masks)


def elementwise_state(weight: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return those tensors of a parameter's optimizer state that have one entry a weight."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()
    }


def has_closure(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Tell from what a step pre-hook is given whether the step was called with a closure."""
    # torch passes the optimizer itself as the first argument.
    return any(value is not None for value in (*arguments[1:], *named.values()))


def _like(mask: Tensor, weight: Tensor) -> Tensor:
    """Bring a mask or values to a weight's device, dtype and, for sharded weights, placement."""
    factor = mask.to(device=weight.device, dtype=weight.dtype)
    if hasattr(weight, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # slow, rarely needed

        assert isinstance(weight, DTensor)
        return distribute_tensor(factor, weight.device_mesh, weight.placements)
    return (
        factor.contiguous(memory_format=torch.contiguous_format)
        if weight.is_contiguous()
        else (torch.empty_like(weight).copy_(factor))
    )


def _innermost(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside wrappers such as Accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer
