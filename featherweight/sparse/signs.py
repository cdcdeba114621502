"""Experiments with signs: disturb them, freeze them, or train normalisation layers alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from featherweight.common import Generator, as_generator
from featherweight.sparse.hold import _innermost
from featherweight.sparse.masks import Masks


@torch.no_grad()
def perturb_signs_(
    model: nn.Module,
    masks: Masks,
    ratio: float = 0.3,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
) -> None:
    """Flip the sign of each kept weight on its own with probability ``ratio``, in place.

    Magnitudes stay, masked weights are zeroed.

    Args:
        model: changed in place.
        masks: masks of the model.
        ratio: probability, in [0, 1]; 0 changes nothing. The paper flips 0.3 every 30 epochs.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: ratio outside [0, 1], or masks that do not fit.

    Source: Gadhikar & Burkholz 2024, arXiv:2402.19262.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio:g}")
    generator = as_generator(seed, generator)
    for name, weight in masks.weights(model).items():
        draw = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        flip = (draw < ratio).to(weight.device) & masks[name].to(weight.device)
        weight.copy_(torch.where(flip, -weight, weight))
    masks.apply_(model)


def hold_signs(
    model: nn.Module, optimizer: Optimizer, masks: Masks, signs: Mapping[str, Tensor] | None = None
) -> RemovableHandle:
    """Keep the signs of the kept weights from now on: after each step ``w <- |w| * sign``.

    Args:
        model: the model under training.
        optimizer: its optimizer.
        masks: the weights whose signs are held.
        signs: weights whose signs are used; None: the model's own at this moment.

    Returns:
        A handle whose ``remove()`` lets go.

    Source: Gadhikar & Burkholz 2024, arXiv:2402.19262.
    """
    weights = masks.weights(model)
    source = weights if signs is None else signs
    held = {
        n: source[n].detach().sign().to(w.device, w.dtype, copy=True) for n, w in weights.items()
    }

    @torch.no_grad()
    def project(*_: object) -> None:
        for name, weight in weights.items():
            weight.abs_().mul_(held[name])

    return _innermost(optimizer).register_step_post_hook(project)


def train_only_norms_(model: nn.Module, *, linear: bool = False) -> None:
    """Freeze everything but the normalisation layers, in place.

    Args:
        model: parameters of other layers get ``requires_grad=False``.
        linear: train the linear layers too.

    Source: Gadhikar & Burkholz 2024, arXiv:2402.19262.
    """
    trained: tuple[type[nn.Module], ...] = (
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
    )
    trained += (nn.Linear,) if linear else ()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(isinstance(module, trained))
