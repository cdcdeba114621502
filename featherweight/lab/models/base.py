"""What the model files share: the table of models, initialisation, and checks of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from featherweight.common import Registry, unknown

Shape = tuple[int, int, int]
"""Channels, height and width of one image."""

Builder = Callable[..., nn.Module]
"""Called as ``builder(classes, shape, **options)``."""

MODELS: Registry[Builder] = Registry("model")


def he_(model: nn.Module) -> None:
    """Draw every convolution and linear weight from N(0, 2 / fan_in), and zero their biases.

    Normalisation layers keep torch's start (weight 1, bias 0). He et al. 2015, arXiv:1502.01852,
    equation 10. Draws from the global generator, which ``build`` seeds.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_positive(**options: int) -> None:
    """Refuse options that are not whole numbers above zero.

    Raises:
        ValueError: names the option and its value.
    """
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an option that is none of the allowed words.

    Raises:
        ValueError: names the option, its value, and the allowed ones.
    """
    if value not in allowed:
        raise ValueError(unknown(name, value, allowed))
