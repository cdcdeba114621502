"""Clients that differ in which labels they hold."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from featherweight.federated.partition.base import (
    PARTITIONS,
    Partition,
    check,
    check_alpha,
    draws,
    even,
    partition_of,
    pools,
)

TRIES = 10


@PARTITIONS.register(
    "dirichlet",
    "client-first: each client draws its own label mix; equal numbers",
    "Hsu, Qi and Brown 2019, arXiv:1909.06335",
)
def dirichlet(targets: Tensor, *, clients: int, seed: int, alpha: float) -> Partition:
    """Give each client a label mix q ~ Dir(alpha, ..., alpha) and fill it from that mix.

    Clients are served in random order. A label that is used up is left out and the mix is
    renormalised.
    Sizes differ by one at most. The scheme is not that of `label_dirichlet`: at equal ``alpha``
    the two make clients differ to different degrees.

    Args:
        targets: int64 [N], labels.
        clients: number of clients, at most N.
        seed: of mixes, order and choice of examples.
        alpha: concentration, above 0. Large: uniform mixes; towards 0: one label a client. It is
            that of each label; papers that write Dir(a p), p label frequencies, mean alpha = a p.

    Raises:
        ValueError: ``alpha`` is not positive, or there are more clients than examples.
    """
    check(targets, clients)
    check_alpha(alpha)
    rng = draws("dirichlet", seed)
    by_label = pools(targets, rng)
    left = np.array([len(pool) for pool in by_label])
    order, sizes = rng.permutation(clients), even(len(targets), clients)
    parts: list[np.ndarray] = [np.empty(0, int)] * clients
    for client in order:
        mix = rng.dirichlet(np.full(len(left), alpha))
        counts = _fill(mix, left, sizes[client], alpha, rng)
        parts[client] = np.concatenate(
            [pool[n - count : n] for pool, n, count in zip(by_label, left, counts, strict=True)]
        )
        left -= counts
    return partition_of(parts)


def _fill(
    mix: np.ndarray, left: np.ndarray, size: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw how many examples of each label a client gets.

    Draws of a label beyond what is left are drawn again among the others: by the exchangeability
    of the draws this is the distribution of drawing one example after the other. Where the mix has
    no mass left (at small alpha it is 0 to rounding on most labels), a mix of the open labels is
    drawn: that of a Dirichlet's coordinates among themselves does not depend on the others.
    """
    counts = np.zeros_like(left)
    while missing := size - counts.sum():
        open_labels = counts < left
        if not mix[open_labels].sum() > 0:
            mix = np.zeros(len(left))
            mix[open_labels] = rng.dirichlet(np.full(open_labels.sum(), alpha))
        mass = np.where(open_labels, mix, 0.0)
        counts = np.minimum(counts + rng.multinomial(missing, mass / mass.sum()), left)
    return counts


@PARTITIONS.register(
    "label-dirichlet",
    "label-first: each label is divided among the clients; unequal numbers",
    "Yurochkin et al. 2019, arXiv:1905.12022",
)
def label_dirichlet(
    targets: Tensor,
    *,
    clients: int,
    seed: int,
    alpha: float,
    least: int = 1,
    balanced: bool = False,
) -> Partition:
    """Divide each label's examples in proportions ~ Dir(alpha, ..., alpha) over the clients.

    Args:
        targets: int64 [N], labels.
        clients: number of clients, at most N.
        seed: of proportions and choice of examples.
        alpha: concentration, above 0; large: equal shares, towards 0: one client a label.
        least: examples that each client must get; ten draws are tried. 0: any number.
        balanced: a client that holds N / clients examples gets none of the following labels.

    Raises:
        ValueError: ``alpha`` is not positive, there are more clients than examples, or no draw
            gave each client ``least``.
    """
    check(targets, clients)
    check_alpha(alpha)
    if not 0 <= least * clients <= len(targets):
        raise ValueError(
            f"least must lie in [0, examples / clients = {len(targets) // clients}], got {least}"
        )
    rng = draws("label-dirichlet", seed)
    for _ in range(TRIES):
        parts = _split_labels(pools(targets, rng), clients, alpha, balanced, rng)
        if min(len(part) for part in parts) >= least:
            return partition_of(parts)
    raise ValueError(
        f"no draw of {TRIES} gave each of {clients} clients {least} examples at alpha={alpha:g}; "
        "raise alpha, or lower clients or least"
    )


def _split_labels(
    by_label: list[np.ndarray], clients: int, alpha: float, balanced: bool, rng: np.random.Generator
) -> list[np.ndarray]:
    fair = sum(map(len, by_label)) / clients
    pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
    held = np.zeros(clients)
    for pool in by_label:
        shares = rng.dirichlet(np.full(clients, alpha))
        if balanced:
            shares = np.where(held < fair, shares, 0.0)
            if shares.sum() <= 0:
                shares = (held < fair).astype(float)
            shares /= shares.sum()
        cuts = np.round(np.cumsum(shares)[:-1] * len(pool)).astype(int)
        for client, piece in enumerate(np.split(pool, np.minimum(cuts, len(pool)))):
            pieces[client].append(piece)
            held[client] += len(piece)
    return [np.concatenate(piece) for piece in pieces]


@PARTITIONS.register(
    "shards",
    "sorted by label, cut into shards, some for each client",
    "McMahan et al. 2017, arXiv:1602.05629",
)
def shards(targets: Tensor, *, clients: int, seed: int, per_client: int = 2) -> Partition:
    """Sort by label, cut into ``clients * per_client`` shards, and deal these at random.

    Args:
        targets: int64 [N], labels.
        clients: number of clients.
        seed: of the order within a label and of the deal.
        per_client: shards a client gets, at least 1; it sees about as many labels.

    Raises:
        ValueError: there are more shards than examples.
    """
    count = clients * per_client
    check(targets, clients)
    if not clients <= count <= len(targets):
        raise ValueError(
            f"per_client must lie in [1, examples / clients = {len(targets) // clients}], "
            f"got {per_client}"
        )
    rng = draws("shards", seed)
    pieces = np.array_split(np.concatenate(pools(targets, rng)), count)
    dealt = rng.permutation(count).reshape(clients, per_client)
    return partition_of([np.concatenate([pieces[i] for i in row]) for row in dealt])


@PARTITIONS.register("labels-per-client", "exactly so many labels for each client")
def labels_per_client(targets: Tensor, *, clients: int, seed: int, labels: int = 2) -> Partition:
    """Give each client exactly ``labels`` different labels; a label's owners share it equally.

    How many clients own a label differs by one at most between labels.

    Args:
        targets: int64 [N], labels.
        clients: number of clients.
        seed: of the labels' owners and the choice of examples.
        labels: different labels a client gets, at least 1.

    Raises:
        ValueError: more labels are asked for than there are, some label would have no owner, or
            fewer examples than owners.
    """
    check(targets, clients)
    rng = draws("labels-per-client", seed)
    by_label = pools(targets, rng)
    if not 1 <= labels <= len(by_label):
        raise ValueError(f"labels must lie in [1, {len(by_label)}], got {labels}")
    if clients * labels < len(by_label):
        raise ValueError(
            f"{clients} clients of {labels} labels cannot hold {len(by_label)} labels; raise either"
        )
    owners: list[list[int]] = [[] for _ in by_label]
    for client in rng.permutation(clients):
        owned = np.array([len(owner) for owner in owners])
        for label in np.lexsort((rng.random(len(by_label)), owned))[:labels]:
            owners[label].append(int(client))
    pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for pool, owner in zip(by_label, owners, strict=True):
        if len(pool) < len(owner):
            raise ValueError(f"a label has {len(pool)} examples for {len(owner)} clients")
        for client, piece in zip(owner, np.array_split(pool, len(owner)), strict=True):
            pieces[client].append(piece)
    return partition_of([np.concatenate(piece) for piece in pieces])
