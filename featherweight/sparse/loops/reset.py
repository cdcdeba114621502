"""What is reset after a pruning step: the algebra that tells IMP, WR, LRR and ablations apart.

A reset is a function ``(model, rewind) -> None`` that works in place; ``rewind`` is the state at
the rewinding point. The loop applies the masks afterwards. Resets can be listed in a row.

Source: Gadhikar & Burkholz 2024, arXiv:2402.19262, and its ablations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from featherweight.common import Generator, Registry, cpu_state, prunable_weights, unwrap

Rewind = Mapping[str, Tensor]
"""State dict at the rewinding point."""

Reset = Callable[..., None]

RESETS: Registry[Reset] = Registry("reset")
"""What goes back to the rewinding point after a pruning: functions in place, by name."""


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters and buffers, to rewind to later."""
    return cpu_state(unwrap(model).state_dict())


@RESETS.register("nothing", "keep everything: learning rate rewinding")
def nothing(model: nn.Module, rewind: Rewind) -> None:
    """Leave the model as trained."""


@RESETS.register("weights", "all parameters and buffers: IMP and WR")
@torch.no_grad()
def weights(model: nn.Module, rewind: Rewind) -> None:
    """Rewind every parameter and every buffer, batch-norm statistics included."""
    for name, tensor in unwrap(model).state_dict().items():
        tensor.copy_(rewind[name])


@RESETS.register("parameters", "all parameters, not the batch-norm statistics: the papers' code")
@torch.no_grad()
def parameters(model: nn.Module, rewind: Rewind) -> None:
    """Rewind every parameter, batch-norm weights and biases included, but no running statistics."""
    for name, parameter in unwrap(model).named_parameters():
        parameter.copy_(rewind[name])


@RESETS.register("weights-not-norms", "everything but the normalisation layers")
@torch.no_grad()
def weights_not_norms(model: nn.Module, rewind: Rewind) -> None:
    """Rewind everything outside normalisation layers, which stay as trained."""
    norms = dict(_norm_state(model))
    for name, tensor in unwrap(model).state_dict().items():
        if name not in norms:
            tensor.copy_(rewind[name])


@RESETS.register("norms", "the normalisation layers alone: LRR with BN rewinding")
@torch.no_grad()
def norms(model: nn.Module, rewind: Rewind) -> None:
    """Rewind weight, bias and running statistics of the normalisation layers, nothing else."""
    for name, tensor in _norm_state(model):
        tensor.copy_(rewind[name])


@RESETS.register("norm-magnitudes", "magnitudes of norm weights and biases; their signs are kept")
@torch.no_grad()
def norm_magnitudes(model: nn.Module, rewind: Rewind) -> None:
    """Rewind the magnitudes of the norms' weights and biases, keeping their signs."""
    trainable = dict(unwrap(model).named_parameters())
    for name, tensor in _norm_state(model):
        if name in trainable:
            tensor.copy_(rewind[name].abs().to(tensor.device).copysign(tensor))


@RESETS.register("magnitudes", "magnitudes of the prunable weights; the trained signs are kept")
@torch.no_grad()
def magnitudes(model: nn.Module, rewind: Rewind) -> None:
    """Rewind the magnitudes of the prunable weights, keeping the trained signs."""
    for name, weight in prunable_weights(model).items():
        weight.copy_(rewind[name].abs().to(weight.device).copysign(weight))


@RESETS.register(
    "shuffled-magnitudes", "as magnitudes, permuted within each layer", needs=["generator"]
)
@torch.no_grad()
def shuffled_magnitudes(model: nn.Module, rewind: Rewind, generator: Generator) -> None:
    """Rewind magnitudes, permuted over all entries of a layer; trained signs are kept."""
    for name, weight in prunable_weights(model).items():
        stored = rewind[name].abs().flatten()
        order = torch.randperm(len(stored), generator=generator)
        weight.copy_(stored[order].view(weight.shape).to(weight.device).copysign(weight))


@RESETS.register("signs", "signs of the prunable weights; the trained magnitudes are kept")
@torch.no_grad()
def signs(model: nn.Module, rewind: Rewind) -> None:
    """Rewind the signs of the prunable weights, keeping the trained magnitudes."""
    for name, weight in prunable_weights(model).items():
        weight.copy_(weight.abs().copysign(rewind[name].to(weight.device)))


def signs_from(source: Mapping[str, Tensor]) -> Reset:
    """Make a reset that takes all from the rewinding point but the prunable weights' signs.

    Args:
        source: weights of another run, such as LRR's at the same level, whose signs are used.

    Returns:
        A reset: ``|rewind| * sign(source)``; everything else is rewound.
    """

    @torch.no_grad()
    def reset(model: nn.Module, rewind: Rewind) -> None:
        weights(model, rewind)
        for name, weight in prunable_weights(model).items():
            weight.copy_(weight.abs().copysign(source[name].to(weight.device)))

    return reset


def _norm_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walk parameters and buffers of normalisation layers with their state-dict names."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    for prefix, module in unwrap(model).named_modules():
        if isinstance(module, kinds):
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield (f"{prefix}.{name}" if prefix else name), tensor.detach()
