"""NanoAdam: Adam on the smallest weights alone, with state for them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from featherweight.optim import compact, compiled
from featherweight.optim.compact import Job
from featherweight.optim.options import (
    adamw_options,
    check,
    check_gradients,
    device_of,
    step_device,
)
from featherweight.optim.refresh import follow_layout, is_due, refresh
from featherweight.optim.registry import OPTIMIZERS

Group: TypeAlias = dict[str, Any]


@OPTIMIZERS.register(
    "nanoadam",
    "AdamW on the smallest weights of each tensor, with state for them alone",
    "Zhou et al. 2025, arXiv:2506.21374",
)
class NanoAdam(Optimizer):
    """AdamW on the smallest weights of each tensor, chosen anew every ``mask_interval`` steps.

    The state of a tensor is compact: index and moments of the selected entries. Everything else
    stays as it is, bit for bit, until it is selected. Every argument but ``params`` may be set by
    parameter group; groups of density 1 and tensors under ``min_size`` entries are trained whole,
    by torch's AdamW. `featherweight.optim.groups` makes groups by module type.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or 0-d tensor; 1.5 to 20 times that of AdamW, larger for a
            smaller density.
        betas: decay of the moments, each in [0, 1).
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled, of the selected entries alone.
        density: selected fraction of each tensor, in (0, 1].
        final_density: density after ``total_steps`` updates, reached on a line that is evaluated
            every ``density_interval`` updates; None: constant.
        total_steps: updates of the whole training; needed with ``final_density``.
        density_interval: needed with ``final_density``; each evaluation refreshes the mask.
        mask_interval: updates between two refreshes; larger than the training: a static mask.
        on_refresh: moments at a refresh. "carry": survivors keep theirs, newcomers begin at zero
            with their own bias correction. "reset": all begin at zero.
        bias_correction: False: the printed Algorithm 1, whose first steps are 3 to 7 times as long.
        chunk: entries that compete with each other, at most 32768 for indices of 16 bits; None:
            the whole tensor (of a sharded tensor: the local shard), with indices of 32 bits.
        skip_zeros: never select exact zeros, so that a pruned model keeps its masks.
        min_size: tensors with fewer entries are trained whole.
        state_dtype: of the moments of selected entries; None: at least float32.
        maximize: ascend.
        foreach, fused: of torch's AdamW, for what is trained whole. fused None: where it exists.
        backend: of the update of selected entries. "auto": numba where it is installed and handles
            the tensors (CPU, float32 and bfloat16), torch elsewhere. Equal to rounding.

    Raises:
        ValueError: a value is out of range, in a message that names it.

    Source: Zhou, Jacobs, Gadhikar & Burkholz 2025, arXiv:2506.21374, Algorithm 1. It does not say
    what happens to the moments at a refresh; "carry" is the choice that is AdamW at density 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.1,
        final_density: float | None = None,
        total_steps: int | None = None,
        density_interval: int | None = None,
        mask_interval: int = 100,
        on_refresh: str = "carry",
        bias_correction: bool = True,
        chunk: int | None = None,
        skip_zeros: bool = False,
        min_size: int = 4096,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        backend: str = "auto",
    ) -> None:
        given = dict(locals())
        for name in ("self", "params", "__class__"):
            del given[name]
        super().__init__(params, given)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; what it does not set is as given to the constructor.

        Args:
            param_group: "params", and any argument of the class.

        Raises:
            ValueError: a value is out of range.
        """
        check(self.defaults | param_group)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse or complex; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        for _, parameters in due:
            check_gradients(parameters)
        for group, parameters in due:
            self.update(group, parameters)
        return loss

    # The schedule is Python's: a compiled step calls this as it is.
    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def update(self, group: Group, parameters: list[Tensor]) -> None:
        """Update some parameters of a group by their gradients: a part of a step.

        Args:
            group: one of ``param_groups``.
            parameters: of that group, with gradients.
        """
        for parameter in parameters:
            if not self.state[parameter]:
                self._begin(parameter, group)
        whole = [p for p in parameters if "index" not in self.state[p]]
        if whole:
            self._update_whole(group, whole)
        jobs = [self._job(group, p) for p in parameters if "index" in self.state[p]]
        backend = group["backend"]
        if backend == "numba" or (backend == "auto" and compiled.available()):
            compiled.run([job for job in jobs if compiled.fits(job)])
            jobs = [job for job in jobs if not compiled.fits(job)]
        for job in jobs:
            compact.update_(job, adamw_options(group, [job.weights]))

    def _begin(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        if not is_selective(parameter, group):
            state["step"] = torch.zeros((), device=step_device(parameter, group))
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            return
        state["step"] = torch.zeros(())
        refresh(state, *_flat(parameter), group, 0)

    def _update_whole(self, group: Group, parameters: list[Tensor]) -> None:
        keys = ("exp_avg", "exp_avg_sq", "step")
        lists = [[_local(self.state[p][key]) for p in parameters] for key in keys]
        weights = [_local(p) for p in parameters]
        gradients = [_local(p.grad) for p in parameters if p.grad is not None]
        options = adamw_options(group, parameters)
        adamw(weights, gradients, lists[0], lists[1], [], lists[2], **options)

    def _job(self, group: Group, parameter: Tensor) -> Job:
        """Bring a tensor's mask up to date and say what its update is."""
        state, step = self.state[parameter], int(self.state[parameter]["step"])
        weights, order = _flat(parameter)
        if state["order"].tolist() != order:
            follow_layout(state, _local(parameter).shape, order)
        if step > 0 and is_due(group, step):
            refresh(state, weights, order, group, step)
        state["step"] += 1
        if parameter.grad is None:
            raise ValueError("update() takes parameters that have a gradient")
        gradient = compact.flat(_local(parameter.grad), order)
        torch.autograd.graph.increment_version(parameter)
        return Job(weights, gradient, state, step + 1, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; compact state keeps its dtypes.

        Args:
            state_dict: of a NanoAdam with the same groups.

        Raises:
            ValueError: the groups are others.
        """
        saved: dict[str, Any] = {}

        def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
            saved.update(state_dict)

        # Optimizer casts all state to the parameter's dtype, indices too; that is undone after it,
        # yet before any hook of the user's sees the state.
        handles = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(lambda _: self._restore(saved), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            for parameter, key in zip(group["params"], old["params"], strict=True):
                for name, value in saved["state"].get(key, {}).items():
                    device = device_of(parameter, group, name, "index" in saved["state"][key])
                    if "index" in saved["state"][key] or name == "step":
                        self.state[parameter][name] = value.to(device, copy=True)

    @torch.no_grad()
    def expand(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state in the parameter's shape, to look at.

        Args:
            parameter: one that has been updated; of a sharded one, the local shard is shown.

        Returns:
            "selected" (bool); "exp_avg" and "exp_avg_sq", zero where not selected; "age" (int64):
            updates since the entry was selected.

        Raises:
            ValueError: the parameter has no state.
        """
        state, local = self.state.get(parameter, {}), _local(parameter)
        if not state:
            raise ValueError("parameter has no state: it was not updated yet")
        step = int(state["step"])
        if "index" not in state:
            everything = torch.ones_like(local, dtype=torch.bool)
            moments = {key: _local(state[key]).clone() for key in ("exp_avg", "exp_avg_sq")}
            return {"selected": everything, **moments, "age": everything.long() * step}
        entries = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
        entries["selected"] = torch.ones_like(state["exp_avg"], dtype=torch.bool)
        entries["age"] = step - compact.born_at(state)
        order = state["order"].tolist()
        shape = [local.shape[d] for d in order]
        back = [order.index(d) for d in range(local.dim())]
        return {
            key: value.new_zeros(local.numel())
            .index_put_((compact.decode(state).long(),), value)
            .view(shape)
            .permute(back)
            for key, value in entries.items()
        }


def is_selective(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Tell whether a parameter is trained by its smallest entries; its size counts, not its rank.

    Args:
        parameter: of a sharded one the whole size counts, so that sharding changes nothing.
        group: the options.
    """
    always_whole = group["density"] == 1.0 and group["final_density"] in (None, 1.0)
    return not always_whole and parameter.numel() >= group["min_size"]


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor; DTensor is not everywhere, so it is not named."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast(Tensor, to_local())


def _flat(parameter: Tensor) -> tuple[Tensor, list[int]]:
    """Return a flat view of a parameter and the order its dimensions are taken in."""
    local = _local(parameter)
    order = compact.layout(local)
    weights = compact.flat(local, order)
    if weights.data_ptr() != local.data_ptr():
        raise ValueError(f"a parameter of shape {tuple(local.shape)} has gaps in memory")
    return weights, order
