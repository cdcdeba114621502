"""NanoAdam's compact state: selected indices, their moments, and when each entry was selected.

Entries selected at the same refresh form a *generation*. An entry stores the number of its
generation in a byte or two, and a short table holds the step at which each generation began, so
that the bias correction of every entry is exact at a byte an entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

Entry = dict[str, Tensor]  # the state of one parameter

INT16_CHUNK = 1 << 15  # largest chunk whose indices fit 16 bits


class Corrections(NamedTuple):
    """Per generation: ``step = scale * m / (sqrt(v) + floor)`` is the bias-corrected Adam step.

    Attributes:
        scale: (generations,) learning rate times sqrt(1 - beta2^age) / (1 - beta1^age).
        floor: (generations,) eps times sqrt(1 - beta2^age).
    """

    scale: Tensor
    floor: Tensor


def layout(tensor: Tensor) -> list[int]:
    """Return the dimensions from the slowest to the fastest in memory."""
    order = range(tensor.dim())
    if tensor.is_contiguous():
        return list(order)
    return sorted(order, key=lambda d: (-tensor.stride()[d], d))


def flat(tensor: Tensor, order: list[int]) -> Tensor:
    """Lay a tensor out in one dimension, its dimensions taken in ``order``; a view if possible."""
    return tensor.detach().permute(order).reshape(-1)


def encode(index: Tensor, size: int, chunk: int | None) -> Entry:
    """Store ascending int64 indices in the smallest type.

    Args:
        index: (K,) int64.
        size: number of entries of the tensor.
        chunk: entries a chunk; up to 32768 of them are addressed by 16 bits.

    Returns:
        "index", and for 16-bit indices "chunk" and "offsets": where in it each chunk begins, and
        its end.
    """
    if chunk is None or chunk > INT16_CHUNK:
        return {"index": index.to(torch.int32 if size < 1 << 31 else torch.int64)}
    edges = torch.arange(0, size + chunk, chunk, device=index.device)
    return {
        "index": (index % chunk).to(torch.int16),
        "offsets": torch.searchsorted(index, edges).to("cpu", torch.int32),
        "chunk": torch.tensor(chunk),
    }


def decode(state: Entry) -> Tensor:
    """Return the stored indices, counted from the tensor's beginning; int32 or int64."""
    index = state["index"]
    if "offsets" not in state:
        return index
    lengths, chunk = state["offsets"].diff().to(index.device), int(state["chunk"])
    kind = torch.int32 if len(lengths) * chunk < 1 << 31 else torch.int64
    starts = torch.arange(len(lengths), device=index.device, dtype=kind) * chunk
    return starts.repeat_interleave(lengths, output_size=len(index)).add_(index)


def horizon(betas: tuple[float, float], dtype: torch.dtype) -> int:
    """Return the age from which both bias corrections are exactly 1 in ``dtype``."""
    beta = max(betas)
    return math.ceil(math.log(torch.finfo(dtype).eps / 4) / math.log(beta)) if beta > 0 else 1


def born_at(state: Entry) -> Tensor:
    """Return for each entry the number of updates done when it was selected, (K,) int64."""
    if len(state["born"]) == 0:
        return state["starts"].to(state["index"].device).expand(len(state["index"]))
    return state["starts"].to(state["index"].device)[state["born"].long()]


def fresh(index: Tensor, step: int, dtype: torch.dtype) -> Entry:
    """Return zero moments of one generation that is selected after ``step`` updates."""
    return {
        "exp_avg": torch.zeros(len(index), dtype=dtype, device=index.device),
        "exp_avg_sq": torch.zeros(len(index), dtype=dtype, device=index.device),
        "born": torch.empty(0, dtype=torch.uint8, device=index.device),
        "starts": torch.tensor([step]),
    }


def carry(state: Entry, old: Tensor, new: Tensor, size: int, step: int, oldest: int) -> Entry:
    """Return the moments after a refresh: survivors keep theirs, newcomers begin at zero.

    Args:
        state: the state before.
        old, new: (K,), (K',) indices before and after.
        size: number of entries of the tensor.
        step: number of updates done.
        oldest: from this age on, age makes no difference (see `horizon`).
    """
    place = torch.full((size,), -1, dtype=torch.int32, device=old.device)
    place[old] = torch.arange(len(old), dtype=torch.int32, device=old.device)
    place = place.index_select(0, new)
    stays = place >= 0
    place.clamp_(min=0)
    moments = {
        key: state[key].index_select(0, place).masked_fill_(~stays, 0)
        for key in ("exp_avg", "exp_avg_sq")
    }
    return moments | _generations(state, place, stays, step, oldest)


def _generations(state: Entry, place: Tensor, stays: Tensor, step: int, oldest: int) -> Entry:
    """Add the generation of newcomers, drop those that died out, merge those past ``oldest``."""
    device = place.device
    begun = torch.cat([state["starts"].clamp(min=step - oldest), torch.tensor([step])])
    starts, merged = (t.to(device) for t in begun.unique(return_inverse=True))
    own = state["born"].index_select(0, place).int() if len(state["born"]) else place.mul(0)
    born = merged.index_select(0, torch.where(stays, own, len(begun) - 1))
    alive = born.bincount(minlength=len(starts)) > 0
    starts = starts[alive].cpu()
    if len(starts) == 1:
        return {"born": torch.empty(0, dtype=torch.uint8, device=device), "starts": starts}
    kinds = (torch.uint8, torch.int16, torch.int32)
    kind = next(k for k in kinds if len(starts) - 1 <= torch.iinfo(k).max)
    renumbered = (alive.cumsum(0) - 1).to(kind)
    return {"born": renumbered.index_select(0, born), "starts": starts}


class Job(NamedTuple):
    """One tensor's update.

    Attributes:
        weights, gradient: flat, of one device.
        state: compact state; its moments are updated in place.
        step: number of this update, from 1.
        options: the parameter group: "lr", "betas", "eps", "weight_decay", "bias_correction",
            "maximize".
    """

    weights: Tensor
    gradient: Tensor
    state: Entry
    step: int
    options: Mapping[str, Any]

    @property
    def kind(self) -> torch.dtype:
        """The dtype of the arithmetic: at least single precision."""
        return torch.promote_types(self.weights.dtype, torch.float32)

    @property
    def decay(self) -> float:
        """The factor of the weights before the step."""
        return 1 - float(self.options["lr"]) * float(self.options["weight_decay"])


def corrections(job: Job) -> Corrections:
    """Compute the factors of each generation, in double precision before they are rounded."""
    lr, (beta1, beta2) = float(job.options["lr"]), job.options["betas"]
    ages = (job.step - job.state["starts"]).double()
    first, second = 1 - beta1**ages, (1 - beta2**ages).sqrt()
    if not job.options["bias_correction"]:
        first, second = torch.ones_like(first), torch.ones_like(second)
    factors = Corrections(lr * second / first, job.options["eps"] * second)
    return Corrections(*(f.to(job.kind) for f in factors))


@torch.no_grad()
def update_(job: Job, adamw_options: Mapping[str, Any]) -> None:
    """Step the selected weights in place.

    Where all entries are of one age this is torch's AdamW on the vector of selected entries.

    Args:
        job: the tensor.
        adamw_options: of ``torch.optim.adamw.adamw``.
    """
    state, index = job.state, decode(job.state)
    gradient = job.gradient.index_select(0, index).to(job.kind)
    first, second = (state[key].to(job.kind) for key in ("exp_avg", "exp_avg_sq"))
    if len(state["born"]) or not job.options["bias_correction"]:
        _step_by_age_(job, index, gradient, first, second)
    else:
        age = torch.tensor(float(job.step - 1 - int(state["starts"])))
        ages = [age.to(gradient.device) if adamw_options["fused"] else age]
        weights = job.weights.index_select(0, index).to(job.kind)
        adamw([weights], [gradient], [first], [second], [], ages, **adamw_options)
        job.weights.scatter_(0, index.long(), weights.to(job.weights.dtype))
    for key, moment in (("exp_avg", first), ("exp_avg_sq", second)):
        if state[key] is not moment:
            state[key].copy_(moment)


def _step_by_age_(job: Job, index: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> None:
    beta1, beta2 = job.options["betas"]
    if job.options["maximize"]:
        gradient.neg_()
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale, floor = (factor.to(index.device) for factor in corrections(job))
    if len(job.state["born"]):
        born = job.state["born"].int()
        scale, floor = scale.index_select(0, born), floor.index_select(0, born)
    root = torch.sqrt(second, out=gradient).add_(floor)
    # In place where each entry has its factor already: new memory costs more than the product.
    change = scale.expand_as(first).contiguous().mul_(first).div_(root)
    if job.decay == 1.0 and job.weights.dtype == change.dtype:
        job.weights.index_add_(0, index, change, alpha=-1)
        return
    weights = job.weights.index_select(0, index).to(change.dtype).mul_(job.decay).sub_(change)
    job.weights.scatter_(0, index.long(), weights.to(job.weights.dtype))
