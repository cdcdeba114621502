"""The way into a reparametrisation and the one way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from featherweight.common import prunable_weights, unwrap


class Reparametrization(nn.Module):
    """Base class of this room's parametrizations; `fold` removes these and no others.

    `attach` notes the order of the module's parameters and whether the weight was trained, both of
    which torch forgets.
    """

    order: tuple[str, ...]
    trainable: bool


def attachable_weights(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the prunable weights of a model, see `featherweight.common.prunable_weights`.

    Raises:
        ValueError: there is none, or one is parametrised already or tied to another parameter,
            which a form on one of the two would silently untie.
    """
    weights = prunable_weights(model, include, exclude)
    names: dict[int, list[str]] = {}
    for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, weight in weights.items():
        if "parametrizations" in name.split("."):
            raise ValueError(f"{name!r} is parametrised; fold it first or leave it out by exclude=")
        if len(names[id(weight)]) > 1:
            raise ValueError(
                f"{' and '.join(names[id(weight)])} are tied; leave them out by exclude="
            )
    return weights


def attach(model: nn.Module, name: str, form: Reparametrization) -> None:
    """Put a form on the parameter ``name`` of a model, in place."""
    path, _, attribute = name.rpartition(".")
    module = unwrap(model).get_submodule(path)
    form.order = tuple(module._parameters)
    form.trainable = module.get_parameter(attribute).requires_grad
    parametrize.register_parametrization(module, attribute, form)


def forms(model: nn.Module) -> dict[str, Reparametrization]:
    """Return parameter name -> the form on it, in the model's order."""
    return {name: form for name, (_, form) in _found(model).items()}


def fold(model: nn.Module) -> None:
    """Turn every form of this room into the plain weight it stands for, in place.

    Names, order and ``requires_grad`` of the parameters are what they were before; weights that a
    mask removed are exact zeros. Parametrizations of other origin stay, and a model without any is
    left alone.

    Raises:
        ValueError: a weight also carries a parametrization of other origin; nothing is touched.
    """
    found = _found(model)
    for name, (module, _) in found.items():
        if len(module.parametrizations[name.rpartition(".")[2]]) > 1:
            raise ValueError(f"{name!r} carries several parametrizations; remove the others first")
    for name, (module, form) in found.items():
        attribute = name.rpartition(".")[2]
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        for other in form.order:
            if other in module._parameters:
                module._parameters[other] = module._parameters.pop(other)
        module.get_parameter(attribute).requires_grad_(form.trainable)


def _found(model: nn.Module) -> dict[str, tuple[Any, Reparametrization]]:
    found: dict[str, tuple[Any, Reparametrization]] = {}
    for prefix, module in unwrap(model).named_modules():
        chains: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
        for attribute, chain in chains.items():
            for form in chain:
                if isinstance(form, Reparametrization):
                    found[f"{prefix}.{attribute}" if prefix else attribute] = (module, form)
    return found
