"""Dynamic methods on two ranks, and what they are worth on real digits."""

import subprocess
import sys
import textwrap

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from featherweight import sparse
from featherweight.sparse import Masks
from featherweight.sparse.dynamic import DYNAMIC

SCRIPT = """
    import os
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from featherweight import sparse
    from featherweight.sparse import Masks
    from featherweight.sparse.dynamic import DYNAMIC

    dist.init_process_group("gloo")
    rank, steps = dist.get_rank(), 21
    inputs = torch.randn(steps, 8, 16, generator=torch.Generator().manual_seed(1)).double()

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).double()

    def attach(name, model, optimizer):
        options = {} if name == "acdc" else {"interval": 3}
        return DYNAMIC[name].method(model, optimizer, 0.2, steps=steps, seed=0, **options)

    def train(name, model, batches, parts=1):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        evolving = attach(name, model, optimizer)
        seen = []
        for batch in batches:
            pieces = batch.chunk(parts)
            for i, piece in enumerate(pieces):
                if parts > 1:
                    model.require_backward_grad_sync = i == parts - 1  # what no_sync() sets
                (model(piece).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(evolving.masks)
        return seen

    mine = inputs[:, rank * 4 : rank * 4 + 4]
    for name in DYNAMIC:
        alone = make()
        expected = train(name, alone, inputs)
        assert expected[0] != expected[-1]
        for parts in (1, 2):
            model = nn.parallel.DistributedDataParallel(make())
            assert train(name, model, mine, parts) == expected, (name, parts)
        whole = list(alone.parameters())
        for a, b in zip(model.module.parameters(), whole):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        sharded = make()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        assert train(name, sharded, mine) == expected, (name, "sharded")
        for a, b in zip(sharded.parameters(), whole):
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-6, atol=1e-8)
    dist.barrier()
    print("rank", rank, "ok", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort an interpreter that is being torn down
"""


def test_two_ranks_make_the_masks_of_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2


DENSITY = 0.02


def digits():
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16
    return images, torch.tensor(bunch.target)[order]


def accuracy(attach, seed, epochs=12):
    """Train a perceptron of 17,400 weights; return its test accuracy and final masks."""
    images, labels = digits()
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 100), nn.BatchNorm1d(100), nn.ReLU()]
    layers += [nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * 15
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, cycle_momentum=False)
    evolving = attach(model, optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(960, generator=generator).split(64):
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    with torch.no_grad():
        found = model.eval()(images[1000:]).argmax(1) == labels[1000:]
    return found.float().mean().item(), evolving.masks


@pytest.fixture(scope="module")
def static():
    """Accuracy of fixed random masks at a density where they starve."""

    def attach(model, optimizer, steps):
        return sparse.hold(model, optimizer, sparse.random(model, DENSITY, seed=0))

    return sum(accuracy(attach, seed)[0] for seed in range(3)) / 3


@pytest.mark.parametrize("name", DYNAMIC)
def test_digits(name, static):
    """Beats a fixed random mask by far where that starves; no method is compared with another."""

    def attach(model, optimizer, steps):
        options = {"scope": "erk"} if name in ("gmp", "gmp-recoverable", "acdc") else {}
        options |= {} if name == "acdc" else {"interval": 10}
        return DYNAMIC[name].method(model, optimizer, DENSITY, steps=steps, seed=0, **options)

    runs = [accuracy(attach, seed) for seed in range(3)]
    assert all(masks.nonzeros == round(DENSITY * masks.numel) for _, masks in runs)
    assert all(isinstance(masks, Masks) for _, masks in runs)
    print("ACC", name, [f"{a:.3f}" for a, _ in runs], f"{static:.3f}")
    assert sum(a for a, _ in runs) / 3 > static + 0.05
