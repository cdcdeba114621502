"""Updates during the backward pass equal those after it, and free gradients at once."""

import pytest
import torch
from torch import nn

from featherweight.optim import release
from featherweight.optim.during_backward import REFRESH, update_during_backward
from featherweight.optim.nanoadam import NanoAdam


def network(tied=False):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    if tied:
        model[3].weight = model[1].weight
    return model


def nano(model, **options):
    return NanoAdam(model.parameters(), 1e-2, min_size=100, mask_interval=3, **options)


def loss(model, seed):
    return model(torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))).square().mean()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunk": 100, "weight_decay": 0.1}])
def test_equal_to_steps_after_it(tied, options):
    model, twin = network(tied), network(tied)
    early, late = nano(model, **options), nano(twin, **options)
    update_during_backward(early)
    for step in range(10):
        loss(model, step).backward()
        early.step()  # finds nothing to do
        loss(twin, step).backward()
        late.step()
        late.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert early.state[ours].keys() == late.state[theirs].keys()
        for key, value in early.state[ours].items():
            assert torch.equal(value, late.state[theirs][key])


def test_few_gradients_exist_at_a_time():
    model = network()
    optimizer = nano(model)
    most = 0

    def watch(_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(watch)
    loss(model, 0).backward()
    assert most == 8
    optimizer.zero_grad()
    most = 0
    handles = update_during_backward(optimizer)
    loss(model, 0).backward()
    assert most == 1
    assert all(p.grad is None for p in model.parameters())
    handles.remove()


def test_leaving_the_context_ends_it():
    model = network()
    optimizer = nano(model)
    with update_during_backward(optimizer):
        loss(model, 0).backward()
    before = [p.detach().clone() for p in model.parameters()]
    loss(model, 1).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is not None for p in model.parameters())


def test_rates_set_by_a_scheduler_and_loaded_state_are_used():
    model, twin = network(), network()
    early, late = nano(model), nano(twin)
    update_during_backward(early)
    for optimizer in (early, late):
        optimizer.load_state_dict(optimizer.state_dict())  # replaces the groups
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (early, late)]
    for step in range(4):
        loss(model, step).backward()
        early.step()
        loss(twin, step).backward()
        late.step()
        late.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_pending_gradients_are_refused():
    model = network()
    optimizer = nano(model)
    loss(model, 0).backward()
    with pytest.raises(ValueError, match="gradients are pending"):
        update_during_backward(optimizer)
    optimizer.zero_grad()
    update_during_backward(optimizer)


def test_frozen_parameters_are_left_alone():
    model = network()
    model[0].requires_grad_(False)
    update_during_backward(nano(model))
    loss(model, 0).backward()


def test_freed_memory_is_given_back_whenever_there_is_much(monkeypatch):
    calls = []
    monkeypatch.setattr(release, "_trim", lambda: calls.append)
    counter = release.Release(limit=100)
    counter.freed(60)
    assert calls == []
    counter.freed(40)
    assert calls == [0]
    counter.freed(99)
    assert calls == [0]


def test_a_refresh_counts_its_temporaries(monkeypatch):
    sizes = []
    monkeypatch.setattr(release.Release, "freed", lambda self, size: sizes.append(size))
    layer = nn.Linear(128, 128, bias=False)
    optimizer = NanoAdam(layer.parameters(), 1e-3, density=0.1, mask_interval=2)
    update_during_backward(optimizer)
    for _ in range(3):
        layer(torch.ones(2, 128)).sum().backward()
    gradient = 4 * 128 * 128
    assert sizes == [gradient * (1 + REFRESH), gradient, gradient * (1 + REFRESH)]
