"""The way into a reparametrisation and the one way out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from featherweight.common import prunable_weights, unwrap
from featherweight.sparse.hold import _innermost
from featherweight.sparse.masks import Masks


class Reparametrization(nn.Module):
    """Base class of this room's parametrizations; `fold` removes these and no others.

    `attach` notes the order of the module's parameters and whether the weight was trained, both of
    which torch forgets.

    Attributes:
        decays_originals: whether weight decay acts on the tensors that replace the weight.
        decays_own: whether it acts on the form's own parameters.
        trains_alone: whether only the form's own parameters are trained, nothing else of the model.
    """

    order: tuple[str, ...]
    trainable: bool
    decays_originals = True
    decays_own = True
    trains_alone = False

    def final(self, *originals: Tensor) -> Tensor:
        """Return the weight that `fold` leaves: what is computed with, unless a form differs."""
        value: Tensor = self(*originals)
        return value


class Site(NamedTuple):
    """Where a form is: the module, the attribute that was a plain parameter, and the form."""

    module: Any
    attribute: str
    form: Reparametrization

    @property
    def chain(self) -> Any:
        """Torch's list of all parametrizations on the attribute."""
        return self.module.parametrizations[self.attribute]

    @property
    def originals(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is computed from, in the order of ``form.forward``."""
        count = 0 if self.chain.is_tensor else self.chain.ntensors
        names = [f"original{i}" for i in range(count)] or ["original"]
        return tuple(getattr(self.chain, name) for name in names)

    @torch.no_grad()
    def final(self) -> Tensor:
        """Return the weight that `fold` would leave here."""
        return self.form.final(*self.originals)


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


def supports_of(
    weights: Mapping[str, Tensor], support: Mapping[str, Tensor] | None
) -> dict[str, Tensor | None]:
    """Return a copy of each weight's support on the weight's device, None where all may live.

    Raises:
        ValueError: the support is not for just these weights.
        TypeError: it isn't bool.
    """
    if support is None:
        return dict.fromkeys(weights)
    Masks(support).check(weights)
    return {name: support[name].to(w.device, copy=True) for name, w in weights.items()}


def inside(values: Tensor, support: Tensor | None) -> Tensor:
    """Return values with exact zeros outside a support; their gradient is exactly zero there."""
    return values if support is None else torch.where(support, values, 0)


def attach(model: nn.Module, name: str, form: Reparametrization) -> None:
    """Put a form on the parameter ``name`` of a model, in place."""
    path, _, attribute = name.rpartition(".")
    module = unwrap(model).get_submodule(path)
    # A module that carries a form already lacks that parameter; its form knows the full order.
    known = [s.form.order for s in attached(model).values() if s.module is module]
    form.order = known[0] if known else tuple(module._parameters)
    form.trainable = module.get_parameter(attribute).requires_grad
    parametrize.register_parametrization(module, attribute, form)


def attached(model: nn.Module) -> dict[str, Site]:
    """Return parameter name -> where a form is on it, in the model's order."""
    found: dict[str, Site] = {}
    for prefix, module in unwrap(model).named_modules():
        chains: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
        for attribute, chain in chains.items():
            for form in chain:
                if isinstance(form, Reparametrization):
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    found[name] = Site(module, attribute, form)
    return found


def forms(model: nn.Module) -> dict[str, Reparametrization]:
    """Return parameter name -> the form on it, in the model's order."""
    return {name: site.form for name, site in attached(model).items()}


def nonzero(model: nn.Module) -> Masks:
    """Return which weights under a form are not zero now, by the weights' own names.

    It is what ``Masks.nonzero`` would find after `fold`, and may be read at any time.

    Raises:
        ValueError: no weight of the model is under a form.
    """
    return Masks({name: site.final() != 0 for name, site in _sites(model).items()})


def density(model: nn.Module) -> float:
    """Return the fraction of the weights under a form that are not zero now, in [0, 1]."""
    return nonzero(model).density


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return what an optimizer is to train of a model under a form, and with which weight decay.

    Sign-In decays its factors or nothing, soft thresholds decay with the weights, the scores of
    continuous sparsification never do; under edge-popup the scores alone are trained. Biases and
    norms are trained and decay, as in ``torch.optim``, and frozen parameters are left out.

    Args:
        model: a model under one or more forms.
        weight_decay: of what decays; the rest has 0.

    Returns:
        One or two parameter groups.

    Raises:
        ValueError: no weight of the model is under a form.
    """
    sites = list(_sites(model).values())
    spared: set[int] = set()
    for site in sites:
        spared |= {id(p) for p in site.originals if not site.form.decays_originals}
        spared |= {id(p) for p in site.form.parameters() if not site.form.decays_own}
    alone = any(site.form.trains_alone for site in sites)
    own = [parameter for site in sites for parameter in site.form.parameters()]
    trained = [p for p in (own if alone else unwrap(model).parameters()) if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def after_each_step(
    optimizer: Optimizer, action: Callable[[int], None], taken: int = 0
) -> RemovableHandle:
    """Call ``action(steps taken so far)`` after each step of an optimizer, wrapped or not."""
    counter = itertools.count(taken + 1)
    return _innermost(optimizer).register_step_post_hook(lambda *_: action(next(counter)))


def fold(model: nn.Module) -> None:
    """Turn every form of this room into the plain weight it stands for, in place.

    Names, order and ``requires_grad`` of the parameters are what they were before; weights that a
    mask removed are exact zeros. Parametrizations of other origin stay, and a model without any is
    left alone. A weight that was split in two is a new parameter, so make a new optimizer.

    Raises:
        ValueError: a weight also carries a parametrization of other origin; nothing is touched.
    """
    found = attached(model)
    for name, site in found.items():
        if len(site.chain) > 1:
            raise ValueError(f"{name!r} carries several parametrizations; remove the others first")
    for site in found.values():
        _fold(site)


@torch.no_grad()
def _fold(site: Site) -> None:
    module, attribute, form = site
    value = site.final()
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    if attribute in module._buffers:  # what torch makes of several originals without a gradient
        module.register_parameter(attribute, nn.Parameter(module._buffers.pop(attribute)))
    for other in form.order:
        if other in module._parameters:
            module._parameters[other] = module._parameters.pop(other)
    module.get_parameter(attribute).copy_(value).requires_grad_(form.trainable)


def _sites(model: nn.Module) -> dict[str, Site]:
    sites = attached(model)
    if not sites:
        raise ValueError(f"no weight of {type(unwrap(model)).__name__} is under a form")
    return sites
