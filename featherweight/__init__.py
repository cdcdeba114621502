"""Featherweight makes neural networks light at every stage of their life.

Import the room you need: ``from featherweight import sparse``. Nothing but torch, numpy and
safetensors is needed outside ``featherweight.lab``.
"""

from featherweight.version import __version__

__all__ = ["__version__"]
