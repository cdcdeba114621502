"""The table of initialisations that recipes, the command line, docs and tests read."""

from __future__ import annotations

from collections.abc import Callable

from featherweight.common import Registry
from featherweight.init.plan import Report

INITS: Registry[Callable[..., Report]] = Registry("initialisation")
"""Where weights start: functions of a model that work in place and return a `Report`."""
