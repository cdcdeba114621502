"""Rand-k between the ranks of `torch.nn.parallel.DistributedDataParallel`.

.. code-block:: python

    state = RandKState(0.01, seed=0)
    model.register_comm_hook(state, rand_k_hook)
"""
# No postponed annotations here: torch compares those of hooks with the types themselves.

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from featherweight.federated.codecs import spatial
from featherweight.federated.codecs.count import Count, check_count, count_of
from featherweight.federated.indices import choose, hash64

Gathered = Future[list[Tensor]]
CHOICE = 7  # sub-stream of the seed


@dataclass
class RandKState:
    """What a hook knows between steps; the same on every rank.

    Args:
        k: entries of every bucket that travel: a count (int) or a fraction (float). Buckets can be
            small, so that a fraction is the safer choice.
        seed: of the choice.
        transform: of `rand_k_spatial_hook`: "avg" or "max".
        group: process group; None for the default one.
        step: optimizer steps so far; set it when training resumes.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.
    """

    k: Count
    seed: int = 0
    transform: str = "avg"
    group: dist.ProcessGroup | None = None
    step: int = 0

    def __post_init__(self) -> None:
        check_count(self.k)
        if self.transform not in ("avg", "max"):
            raise ValueError(f"transform must be 'avg' or 'max', got {self.transform!r}")

    def chosen(self, bucket: GradBucket, rank: int) -> Tensor:
        """Return the entries of a bucket that a rank sends in this step, on the bucket's device."""
        flat: Tensor = bucket.buffer()
        seed = hash64(self.seed, CHOICE, self.step, bucket.index(), rank)
        indices = choose(len(flat), count_of(self.k, len(flat)), seed)
        return torch.from_numpy(indices).to(flat.device)

    def after(self, bucket: GradBucket) -> None:
        """Count the step when its last bucket is on its way."""
        self.step += bucket.is_last()


def rand_k_hook(state: RandKState, bucket: GradBucket) -> Future[Tensor]:
    """Average k entries of every bucket, the same on all ranks, and scale them.

    One all-reduce of k values. Unbiased; all other entries of the gradient are 0.

    Source:
        Rand-k with a common seed; Jhunjhunwala et al. 2021, arXiv:2110.07751, as the baseline.
    """
    flat: Tensor = bucket.buffer()
    indices = state.chosen(bucket, 0)
    state.after(bucket)
    values = flat[indices]
    factor = len(flat) / len(indices) / dist.get_world_size(state.group)

    def decode(future: Gathered) -> Tensor:
        (summed,) = future.value()
        return flat.zero_().index_copy_(0, indices, summed * factor)

    work = dist.all_reduce(values, group=state.group, async_op=True)
    return _then(work, decode)


def rand_k_spatial_hook(state: RandKState, bucket: GradBucket) -> Future[Tensor]:
    """Gather k entries of every bucket, other ones from each rank, and decode them together.

    One all-gather of k values a rank; every rank decodes all of them, in the same order, so that
    gradients are equal to the bit.

    Source:
        Rand-k-Spatial; Jhunjhunwala et al. 2021, arXiv:2110.07751.
    """
    flat: Tensor = bucket.buffer()
    ranks = dist.get_world_size(state.group)
    indices = [state.chosen(bucket, rank) for rank in range(ranks)]
    state.after(bucket)
    values = flat[indices[dist.get_rank(state.group)]]
    gathered = [torch.empty_like(values) for _ in range(ranks)]
    table = _table(state.transform, ranks, len(values) / len(flat)).to(flat)

    def decode(future: Gathered) -> Tensor:
        future.value()
        flat.zero_()
        received = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        for own, sent in zip(indices, gathered, strict=True):
            flat[own] += sent
            received[own] += 1
        return flat.mul_(table[received])

    work = dist.all_gather(gathered, values, group=state.group, async_op=True)
    return _then(work, decode)


def _then(work: dist.Work | None, decode: Callable[[Gathered], Tensor]) -> Future[Tensor]:
    assert work is not None  # asynchronous operations return one
    found: Future[Tensor] = work.get_future().then(decode)
    return found


def _table(transform: str, ranks: int, probability: float) -> Tensor:
    """Return beta / (n T(m)) for m = 0, ..., n received values; 0 for none."""
    values = spatial.transform_values(spatial.slope(transform, ranks), ranks)
    scale = spatial.scale(values, probability) / ranks
    return torch.from_numpy(np.concatenate([[0.0], scale / values]))
