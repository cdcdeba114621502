"""Masks that change between optimizer steps: one driver for all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, unwrap
from featherweight.sparse.hold import Hold, _innermost, has_closure
from featherweight.sparse.masks import Masks


@dataclass(frozen=True)
class Moment:
    """What a rule sees when masks are due to change; all tensors are whole, also of sharded models.

    Attributes:
        step: optimizer steps taken so far.
        masks: in force now, on the weights' devices.
        weights: parameter name to weight; masked entries are zero.
        gradients: parameter name to *dense* gradient of the batch, where the rule asks for them;
            a weight that got none is missing.
        frozen: names of weights that the optimizer does not train.
        memory: what the rule remembers from one change to the next; saved and restored.
        generator: the rule's source of randomness; None where it needs none.
    """

    step: int
    masks: Masks
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    frozen: frozenset[str]
    memory: dict[str, Any]
    generator: Generator | None


@dataclass(frozen=True)
class Rule:
    """A method: when masks change, and to what.

    Attributes:
        name: for messages.
        due: tells from the number of steps taken whether masks change now.
        change: returns the masks to put in force, one after the other. What only a later one of
            them keeps again has lost its weight and its optimizer state on the way.
        gradients: whether the rule needs dense gradients.
        replaces_step: the change takes the place of the optimizer step whose gradients it uses;
            otherwise it comes after a step.
        start_values: values of grown weights by parameter name; None: they start at zero.
    """

    name: str
    due: Callable[[int], bool]
    change: Callable[[Moment], Sequence[Masks]]
    gradients: bool = False
    replaces_step: bool = False
    start_values: Callable[[Moment], Mapping[str, Tensor]] | None = None


class Evolving:
    """Masks in force that change as the optimizer steps; made by a method of ``DYNAMIC``.

    It counts real steps: those that ``GradScaler`` skips, and micro-batches of an accumulated
    gradient, don't count. Usable as a context manager that removes itself on exit.

    To resume in another process, make it as before with the saved masks, ``masks=Masks(
    state["masks"])``, on a model and an optimizer in their saved state, then load its own state.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer that trains it.
        masks: to begin with; the masked weights are zeroed at once.
        rule: the method.
        generator: CPU generator, for rules that need one; advanced.
        memory: what the rule remembers at the beginning.

    Raises:
        ValueError: the masks do not fit the model, or the optimizer trains none of its masked
            weights; nothing is touched then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        masks: Masks,
        rule: Rule,
        generator: Generator | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self._optimizer = _innermost(optimizer)
        self._weights = masks.weights(model)
        self._rule = rule
        self._generator = generator
        self._memory = dict(memory or {})
        self._step = 0
        self._gradients: dict[str, Tensor] = {}  # from just before to just after a step
        self._skipped = False
        self._weights_missing = False
        # The hold masks gradients as the step begins, so it must come second.
        first = self._optimizer.register_step_pre_hook(self._before_step)
        try:
            self._hold = Hold(model, optimizer, masks)
        except ValueError:
            first.remove()
            raise
        self._handles: list[Any] = [
            first,
            self._optimizer.register_step_post_hook(self._after_step),
            unwrap(model).register_load_state_dict_post_hook(self._after_load),
        ]
        self._expect()

    @property
    def masks(self) -> Masks:
        """The masks in force."""
        return self._hold.masks

    @property
    def hold(self) -> Hold:
        """What keeps them in force."""
        return self._hold

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, those included whose place a change took."""
        return self._step

    def _before_step(self, _: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._check_step(closure=has_closure(arguments, named))
        # Under GradScaler fused optimizers are called to skip a step by themselves.
        self._skipped = bool(getattr(self._optimizer, "found_inf", None))
        if self._skipped:
            return
        if self._hold.dense_gradients:
            self._gradients = self._dense_gradients()
        if self._rule.replaces_step and self._rule.due(self._step):
            self._change()
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # so that the optimizer moves nothing

    def _after_step(self, *_: object) -> None:
        if self._skipped:
            return
        self._step += 1
        if not self._rule.replaces_step and self._rule.due(self._step):
            self._change()
        self._gradients = {}
        self._expect()

    def _check_step(self, closure: bool) -> None:
        if self._weights_missing:
            raise RuntimeError(
                f"{self._rule.name} has loaded other masks than it was made with, so weights are "
                "missing: load the state of model and optimizer after it, or pass masks= to it"
            )
        if closure and self._rule.gradients:
            raise ValueError(
                f"{self._rule.name} needs gradients before the step begins: call backward() and "
                "then step() without a closure"
            )

    def _expect(self) -> None:
        """Let gradients accumulate densely if the next step is one whose gradients are needed."""
        change = self._step if self._rule.replaces_step else self._step + 1
        self._hold.dense_gradients = self._rule.gradients and self._rule.due(change)

    def _dense_gradients(self) -> dict[str, Tensor]:
        scale = getattr(self._optimizer, "grad_scale", None)  # of GradScaler, for fused optimizers
        found = {}
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            gradient = _whole(weight.grad)
            # NaN spreads to the extremes, which are found much faster than all is examined.
            if not torch.stack(gradient.aminmax()).isfinite().all():
                raise ValueError(
                    f"{self._rule.name} at step {self._step}: the gradient of {name!r} holds NaN "
                    "or infinity"
                )
            found[name] = gradient.clone() if scale is None else gradient / scale
        return found

    @torch.no_grad()
    def _change(self) -> None:
        now = self._moment()
        changes = list(self._rule.change(now))
        values = self._rule.start_values
        for masks in changes:
            self._hold.update(masks, None if values is None else values(now))

    def _moment(self) -> Moment:
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return Moment(
            step=self._step,
            masks=self._placed(self.masks),
            weights={name: _whole(weight.detach()) for name, weight in self._weights.items()},
            gradients=self._gradients,
            frozen=frozenset(
                name
                for name, weight in self._weights.items()
                if not weight.requires_grad or id(weight) not in trained
            ),
            memory=self._memory,
            generator=self._generator,
        )

    def _placed(self, masks: Mapping[str, Tensor]) -> Masks:
        return Masks({n: masks[n].to(w.device) for n, w in self._weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, as copied tensors and plain values.

        Returns:
            ``step``, ``masks`` (by parameter name), ``memory`` and ``generator`` (its state, or
            None).
        """
        generator = self._generator
        return {
            "step": self._step,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "memory": deepcopy(self._memory),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        If the masks in force are not the saved ones, load this state first and that of model and
        optimizer after it, for weights that only the saved masks keep have been zeroed. A step
        before that is refused.

        Args:
            state: of `state_dict`, of the same method with the same arguments.

        Raises:
            ValueError: the state is incomplete or of another model; nothing is changed then.
        """
        missing = {"step", "masks", "memory", "generator"} - set(state)
        if missing:
            raise ValueError(f"state lacks {sorted(missing)[0]!r}")
        if (state["generator"] is None) != (self._generator is None):
            raise ValueError("state must hold a generator's state exactly if this method has one")
        saved = Masks(state["masks"])
        saved.check(self.masks)
        saved = self._placed(saved)
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())
        self._weights_missing = saved != self._placed(self.masks)
        self._hold.update(saved)
        self._memory = deepcopy(dict(state["memory"]))
        self._step = int(state["step"])
        self._expect()

    def _after_load(self, *_: object) -> None:
        self._weights_missing = False

    def remove(self) -> None:
        """Let go: masks change no more and the weights may move freely from now on."""
        self._hold.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Evolving:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all ranks must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
