"""Updates as one pass over memory, where numba is installed.

Four threads or one give the same bits: every entry is computed on its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.optim.compact import Job, corrections

SEGMENT = 1 << 16  # entries a thread takes at a time

DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Tell whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def fits(job: Job) -> bool:
    """Tell whether the compiled pass handles a job: CPU, float32 and bfloat16, contiguous."""
    tensors = (job.weights, job.gradient, job.state["exp_avg"])
    return all(t.device.type == "cpu" and t.dtype in DTYPES and t.is_contiguous() for t in tensors)


def run(jobs: Iterable[Job]) -> None:
    """Do NanoAdam's updates of selected entries."""
    spread([call for job in jobs for call in _calls(job)])


def spread(calls: Sequence[Callable[[], None]]) -> None:
    """Make calls, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(calls))
    if threads <= 1:
        for call in calls:
            call()
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(call) for call in calls]:
                done.result()


def _calls(job: Job) -> Iterable[Callable[[], None]]:
    step: Callable[..., None] = importlib.import_module("featherweight.optim.kernel").step
    index = job.state["index"]
    if "offsets" in job.state:
        edges, stride = job.state["offsets"].numpy(), int(job.state["chunk"])
        piece = max(1, SEGMENT * (len(edges) - 1) // max(1, len(index)))
    else:
        edges = np.append(np.arange(0, len(index), SEGMENT), len(index)).astype(np.int32)
        stride, piece = 0, 1
    betas = job.options["betas"]
    scalars = [np.float32(x) for x in (*betas, *(1 - b for b in betas), job.decay)]
    sign = np.float32(-1.0 if job.options["maximize"] else 1.0)
    arrays = [_array(t) for t in (job.weights, job.gradient, index)]
    arrays += [_array(job.state[key]) for key in ("exp_avg", "exp_avg_sq", "born")]
    arrays += [_array(t) for t in corrections(job)]
    for begin in range(0, len(edges) - 1, piece):
        end = min(begin + piece, len(edges) - 1)
        yield functools.partial(step, *arrays, edges, stride, begin, end, *scalars, sign)


def _array(tensor: Tensor) -> Any:
    bits = tensor.dtype == torch.bfloat16  # numpy has no bfloat16
    return tensor.detach().view(torch.uint16).numpy() if bits else tensor.detach().numpy()
