"""The table of forms: ways to train a weight as something else."""

from collections.abc import Callable

from featherweight.common import Registry

Form = Callable[..., None]
"""``form(model, *, support=None, include=None, exclude=(), ...)``: put a form on the prunable
weights of a model, in place; ``support`` are masks outside which the weights are zero.

A row may need ``density`` and ``generator``. Its default ``follow``, where it has one, is a
function ``(model, optimizer, steps, *, start=0) -> handle`` that accompanies the training.
"""

FORMS: Registry[Form] = Registry("form")
