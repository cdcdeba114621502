"""Update each parameter as soon as its gradient is there, and free the gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from featherweight.optim.nanoadam import NanoAdam
from featherweight.optim.release import Release

REFRESH = 4  # a refresh of the mask frees about so many times the gradient's memory


class DuringBackward:
    """Updates in force; made by `update_during_backward`; a context manager that removes itself."""

    def __init__(self, optimizer: NanoAdam) -> None:
        release = Release()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(optimizer, number, release))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    @staticmethod
    def _hook(optimizer: NanoAdam, number: int, release: Release) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            before = optimizer.state[parameter].get("index")
            # by number, since loading a state dict replaces the groups
            optimizer.update(optimizer.param_groups[number], [parameter])
            parameter.grad = None
            if parameter.device.type == "cpu":
                refreshed = optimizer.state[parameter].get("index") is not before
                release.freed(parameter.nbytes * (1 + REFRESH * refreshed))

        return update

    def remove(self) -> None:
        """End it: from now on ``optimizer.step()`` updates."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def update_during_backward(optimizer: NanoAdam) -> DuringBackward:
    """Let ``loss.backward()`` update each parameter and free its gradient at once.

    The gradients of all parameters then never exist together, which lowers peak memory by about
    their size. The result is that of ``optimizer.step()`` after the backward pass, bit for bit.
    ``step()`` may still be called, for the sake of schedulers; it finds nothing to do.

    What needs all gradients before the step is impossible: accumulation over several backward
    passes, clipping by the norm over all parameters, ``GradScaler``, closures, and PyTorch's
    ``DistributedDataParallel``, which averages gradients later. FSDP2 (``fully_shard``) works.

    Args:
        optimizer: its parameters, as they are now; call again after ``add_param_group``.

    Returns:
        What ends it, by ``remove()`` or as a context manager.

    Raises:
        ValueError: gradients are pending, or several processes train unsharded parameters.

    Source: Lv et al. 2023, arXiv:2306.09782, who fuse the update of SGD into the backward pass.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        unsharded = sum(not hasattr(p, "placements") for p in parameters)
        if unsharded:
            raise ValueError(
                f"optimizer: {unsharded} parameters are not sharded; DistributedDataParallel "
                "averages gradients after the update would have happened, FSDP2 before"
            )
    if any(p.grad is not None for p in parameters):
        raise ValueError("optimizer: gradients are pending; step and zero them first")
    return DuringBackward(optimizer)
