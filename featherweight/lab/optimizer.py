"""From a recipe's fit to the optimizer that trains the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import FitRecipe
from featherweight.optim import OPTIMIZERS, groups, ham_weights
from featherweight.sparse.reparam import SignInSGD, parameter_groups, sign_in_groups


def make_optimizer(model: nn.Module, fit: FitRecipe, formed: bool = False) -> Optimizer:
    """Build the recipe's optimizer over all parameters, fused where torch has it.

    Args:
        model: what is trained.
        fit: the recipe's part.
        formed: whether the model is under a form, which decides what is trained and decays.

    Raises:
        BadInput: the optimizer can't train this model, or an option of it is out of range.
    """
    if fit.optimizer in ("sgd", "adamw"):
        return _plain(model, fit, formed)
    if formed:
        raise BadInput(f"fit.optimizer: {fit.optimizer} does not train a form of the weights")
    try:
        return _sign_in(model, fit) if fit.optimizer == "sign-in" else _own(model, fit)
    except (TypeError, ValueError) as error:
        raise BadInput(f"fit.optimizer: {error}") from error


def _plain(model: nn.Module, fit: FitRecipe, formed: bool) -> Optimizer:
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    if formed:
        parameters = parameter_groups(model, fit.weight_decay)
    elif fit.scalar_rate != 1:
        scalars = [p for p in parameters if p.numel() == 1]
        others = [p for p in parameters if p.numel() > 1]
        parameters = [{"params": others}, {"params": scalars, "rate_factor": fit.scalar_rate}]
    common: dict[str, Any] = {
        "lr": fit.learning_rate,
        "weight_decay": fit.weight_decay,
        "fused": fused,
    }
    optimizer: Optimizer
    if fit.optimizer == "adamw":
        optimizer = AdamW(parameters, **common)
    else:
        optimizer = SGD(parameters, momentum=fit.momentum, nesterov=fit.nesterov, **common)
    optimizer.register_load_state_dict_post_hook(_lay_out_as_weights)
    return optimizer


def _sign_in(model: nn.Module, fit: FitRecipe) -> Optimizer:
    return SignInSGD(
        sign_in_groups(model, fit.beta),
        lr=fit.learning_rate,
        momentum=fit.momentum,
        nesterov=fit.nesterov,
        weight_decay=fit.weight_decay,
    )


def _own(model: nn.Module, fit: FitRecipe) -> Optimizer:
    """Build one of the library's optimizers, each on the parameters that it is for."""
    make = OPTIMIZERS[fit.optimizer].method
    common = {"lr": fit.learning_rate, "weight_decay": fit.weight_decay, **fit.options}
    if fit.optimizer == "nanoadam":
        size = {"min_size": fit.options["min_size"]} if "min_size" in fit.options else {}
        return make(groups(model, **size), **common)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in ham_weights(model).values() if p.requires_grad]
    if fit.optimizer == "ham-sgd":
        common |= {"momentum": fit.momentum, "nesterov": fit.nesterov}
    return make(trained, weights=weights, **common)


@torch.no_grad()
def _lay_out_as_weights(optimizer: Optimizer) -> None:
    """Give loaded state the memory format of its weights.

    Fused steps go through memory in order: state in another format would meet other weights.
    """
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
