"""Random: every weight is worth the same, chance decides."""

from collections.abc import Mapping

import torch
from torch import Tensor

from featherweight.common import Generator
from featherweight.sparse.criteria.registry import CRITERIA, Scores

PAPER = "Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412"


@CRITERIA.register("random", "independent uniform numbers", PAPER, needs=["generator"])
def random(weights: Mapping[str, Tensor], generator: Generator) -> Scores:
    """Score every weight by an independent uniform number.

    Drawn on the CPU, so that a seed gives the same masks on every device and for every dtype; in
    float64, so that ties are rare enough not to bias the choice in models of any size.

    Args:
        weights: parameter name to weight; only shapes and devices matter.
        generator: CPU generator, advanced by one draw an entry.
    """
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in weights.items()
    }
