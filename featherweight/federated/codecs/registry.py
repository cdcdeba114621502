"""The codecs by name."""

from __future__ import annotations

from featherweight.common import Registry
from featherweight.federated.codecs.codec import Codec

CODECS: Registry[type[Codec]] = Registry("codec")
