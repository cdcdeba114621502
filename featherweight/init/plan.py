"""A plan of new values for a model, and the report of what was done: all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import unwrap

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Row:
    """What was done to one layer.

    Attributes:
        name: of the module or parameter.
        shape: of its weight.
        what: was done.
        remark: what to know about it; often empty.
    """

    name: str
    shape: tuple[int, ...]
    what: str
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """What an initialisation did, one row a layer; ``str(report)`` is a table.

    Attributes:
        method: name of the initialisation.
        rows: in the order in which the model registers its modules.
    """

    method: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """Return the row of a layer.

        Raises:
            KeyError: no row has this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        cells = [(r.name, "x".join(map(str, r.shape)), r.what, r.remark) for r in self.rows]
        return f"{self.method}\n" + columns(("layer", "shape", "what", "remark"), cells)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay text out in columns, two spaces apart."""
    table = [tuple(head), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


class Plan:
    """New values for the tensors of a model, which stays as it is until `apply_`.

    Args:
        model: wrapped or not.
        method: name of the initialisation, for the report.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self.model = unwrap(model)
        self.method = method
        self._edits: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: list[Row] = []
        self._order = _registered(self.model)
        self._parameters = dict(self.model.named_parameters())

    def module(self, name: str) -> nn.Module:
        """Return the submodule of this name."""
        return self.model.get_submodule(name)

    def weight(self, name: str) -> Tensor:
        """Return the weight of a layer."""
        weight = self.module(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def set(self, tensor: Tensor, value: Tensor | float) -> None:
        """Plan a value: one of the tensor's shape, or one number for all its entries."""
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        filled = value.to(tensor.device, tensor.dtype).expand_as(tensor)
        self._edits[id(tensor)] = (tensor, filled)

    def set_parameter(self, name: str, value: Tensor | float) -> None:
        """Plan a value of the parameter of this name."""
        self.set(self.model.get_parameter(name), value)

    def set_bias(self, name: str, value: Tensor | float = 0.0) -> None:
        """Plan a value of a layer's bias, if it has one."""
        bias = self.module(name).bias
        if isinstance(bias, Tensor):
            self.set(bias, value)

    def row(self, name: str, what: str, remark: str = "") -> None:
        """Note what is done to a layer or a parameter."""
        owner = self._parameters.get(name)
        tensor = self.module(name).weight if owner is None else owner
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        self._rows.append(Row(name, shape, what, remark))

    def note(self, name: str, what: str, remark: str) -> None:
        """Note something about a place that has no weight."""
        self._rows.append(Row(name, (), what, remark))

    def reset_norm(self, name: str) -> None:
        """Plan the start of a norm: weight 1, bias 0, running mean 0, running variance 1."""
        module = self.module(name)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            ones = any(tensor is getattr(module, n, None) for n in ("weight", "running_var"))
            self.set(tensor, 1.0 if ones else 0.0)
        self.row(name, "norm: weight 1, bias 0, statistics 0 and 1")

    def reset_norms(self) -> None:
        """Plan the start of every norm of the model that is not planned yet."""
        for name, module in self.model.named_modules():
            if isinstance(module, NORMS) and not any(row.name == name for row in self._rows):
                self.reset_norm(name)

    @torch.no_grad()
    def apply_(self) -> Report:
        """Write the planned values into the model; parameters without one are reported as left."""
        for tensor, value in self._edits.values():
            tensor.copy_(value)
        left = [
            Row(name, tuple(parameter.shape), "left as it was")
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in self._edits
        ]
        return Report(self.method, tuple(sorted((*self._rows, *left), key=self._place)))

    def _place(self, row: Row) -> int:
        return self._order.get(row.name, len(self._order))


def _registered(model: nn.Module) -> dict[str, int]:
    """Number modules and parameters, each module before what it holds."""
    names: dict[str, int] = {}
    for name, module in model.named_modules():
        names.setdefault(name, len(names))
        for own in module._parameters:
            names.setdefault(f"{name}.{own}" if name else own, len(names))
    return names
