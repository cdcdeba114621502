"""Codecs at ten million floats: speed against a copy of the memory, and bytes.

Gaussian entries, one client, k one per cent, one thread. GB/s count the 40 MB of the vector;
"copies" is the median ratio to `numpy.copy` of the same round. Decoding is that of a server: all
checks, and the mean as a new vector. Rand-k with few entries and the identity stay near a copy;
whatever looks at every entry several times (selection, rounding, entropy coding) does not.
"""

from statistics import median

import torch

from benchmarks.timing import alternate, ratios
from featherweight.federated import codecs

LENGTH = 10**7
ROUNDS = 3
CODECS = {
    "identity": lambda: codecs.Identity(),
    "identity, bfloat16": lambda: codecs.Identity(values="bfloat16"),
    "rand-k": lambda: codecs.RandK(0.01),
    "rand-k, k = 0.1": lambda: codecs.RandK(0.1),
    "rand-k-spatial": lambda: codecs.RandKSpatial(0.01),
    "rand-k-temporal": lambda: codecs.RandKTemporal(0.01),
    "top-k": lambda: codecs.TopK(0.01),
    "top-k-feedback": lambda: codecs.TopKFeedback(0.01),
    "r-top-k": lambda: codecs.RTopK(0.01),
    "wangni": lambda: codecs.Wangni(0.01),
    "induced": lambda: codecs.Induced(0.01),
    "qsgd, s = 1": lambda: codecs.QSGD(1),
    "qsgd, s = 7": lambda: codecs.QSGD(7),
    "qsgd, s = 7, bucket 512, max": lambda: codecs.QSGD(7, bucket=512, norm="max"),
    "qsgd, s = 255": lambda: codecs.QSGD(255),
}


def measure() -> str:
    torch.set_num_threads(1)
    vector = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0))
    rows = [
        "| codec | bytes an entry | encode GB/s | copies | decode GB/s | copies |",
        "|---|---|---|---|---|---|",
    ]
    for name, make in CODECS.items():
        rows.append(_row(name, make, vector))
    return "\n".join(rows)


def _row(name, make, vector):
    codec = make()
    message = codec.encode(vector, round=0, client=0)
    candidates = {
        "copy": vector.numpy().copy,
        "encode": lambda: codec.encode(vector, round=0, client=0),
        "decode": lambda: codec.decode_mean([message]),
    }
    times = alternate(candidates, ROUNDS)
    found = ratios(times, "copy")
    cells = [name, f"{len(message) / LENGTH:.4f}"]
    for what in ("encode", "decode"):
        cells += [f"{4e-9 * LENGTH / median(times[what]):.2f}", f"{found[what]:.1f}"]
    return f"| {' | '.join(cells)} |"
