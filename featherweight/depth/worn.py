"""Lay a class over a module's own: other behaviour, the same parameters under the same names.

As `torch.nn.utils.parametrize` does. A deep copy keeps the class, ``isinstance`` still sees the
module's own, and taking it off leaves no trace.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

STATE = "depth_"  # prefix of every attribute that is put on a module


def put_on(module: nn.Module, mixin: Any, **state: Any) -> None:
    """Give a module the class ``mixin`` over its own, and the attributes ``depth_NAME``."""
    base: Any = type(module)
    module.__class__ = _worn_class(base, mixin)
    for name, value in state.items():
        setattr(module, STATE + name, value)


def take_off(module: nn.Module) -> None:
    """Undo `put_on` on one module; a module that wears nothing only loses its attributes."""
    if getattr(type(module), "depth_worn", False):
        module.__class__ = type(module).__bases__[1]
    for name in [name for name in vars(module) if name.startswith(STATE)]:
        delattr(module, name)


@functools.cache
def _worn_class(base: Any, mixin: Any) -> Any:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"depth_worn": True})
