"""One row a codec: how tests make it, and the message it has always written."""

from dataclasses import dataclass

import torch

from featherweight.federated.codecs import (
    QSGD,
    AdaQuantFL,
    DAdaQuant,
    ErrorFeedback,
    Identity,
    Induced,
    RandK,
    RandKSpatial,
    RandKSpatioTemporal,
    RandKTemporal,
    RTopK,
    TopK,
    TopKFeedback,
    Wangni,
)

VECTOR = torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, -0.25, 8.0, 3.0])
RAND = "465701010000000008000000020000000300000009000000000000405ac389a3000000410000003f"
QUANTISED = "465701060100030008000000000000000300000009000000000000400000000027621b4110022c"
TOP = "4657010201000000080000000200000003000000090000000000004000000000000080400000004133"


@dataclass(frozen=True)
class Row:
    """How a codec is made, and its golden message for ``VECTOR``, round 3, client 9, weight 2."""

    make: object
    golden: str


ROWS = {
    "identity": Row(
        lambda: Identity(seed=5),
        "46570100000000000800000008000000030000000900000000000040000000000000803f"
        "000000c00000003f0000804000000000000080be0000004100004040",
    ),
    "rand-k": Row(lambda: RandK(2, seed=5), RAND),
    "rand-k-spatial": Row(lambda: RandKSpatial(2, "adaptive", seed=5), RAND),
    "rand-k-temporal": Row(lambda: RandKTemporal(2, seed=5), RAND),
    "rand-k-spatio-temporal": Row(lambda: RandKSpatioTemporal(2, seed=5), RAND),
    "top-k": Row(lambda: TopK(2), TOP),
    "top-k-feedback": Row(lambda: TopKFeedback(2), TOP),
    "r-top-k": Row(
        lambda: RTopK(2, seed=5),
        "46570103010000000800000002000000030000000900000000000040000000000000803f0000003f10",
    ),
    "wangni": Row(
        lambda: Wangni(2, seed=5),
        "4657010401000000080000000400000003000000090000000000004000000000000016c1"
        "000016410000164100001641990f",
    ),
    "induced": Row(
        lambda: Induced(4, seed=5),
        "465701050100000008000000040000000300000009000000000000405ac389a3"
        "0000804000000041000080be0000000033",
    ),
    "qsgd": Row(lambda: QSGD(3, seed=5), QUANTISED),
    "adaquantfl": Row(lambda: AdaQuantFL(seed=5), QUANTISED),
    "dadaquant": Row(lambda: DAdaQuant(3, seed=5), QUANTISED),
}


def error_feedback():
    """A codec that is not registered, with state on the clients."""
    return ErrorFeedback(RandK(2, seed=5))
