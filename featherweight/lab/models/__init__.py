"""Models of the lab: small classifiers by name, your own by ``package.module:function``.

``build`` makes one from a seed, ``MODELS`` lists what there is.
"""

from featherweight.lab.models import mlp, resnet, residual_mlp, vgg, vit, external  # noqa: F401, I001  (register, in this order)
from featherweight.lab.models.base import MODELS
from featherweight.lab.models.build import build

__all__ = ["MODELS", "build"]
