"""Every method of the room loses the same in the sparse form as in the masked one."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from featherweight import sparse
from featherweight.optim import HamAdamW, HamSGD, ham
from featherweight.sparse import DYNAMIC, LOOPS
from featherweight.sparse.execute import (
    SparseLinear,
    footprint,
    load_optimizer_state,
    optimizer_state,
    patterns,
    sparsely,
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov-fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "ham-sgd": lambda p: HamSGD(p, 0.05, alpha=1.0, momentum=0.9),
    "ham-adamw": lambda p: HamAdamW(p, 0.01, alpha=1.0),
    "ham": lambda p: ham(torch.optim.Adam(p, 0.01), alpha=1.0),
}


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def losses(model, optimizer, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        x = torch.randn(24, 12, generator=generator)
        labels = torch.randint(5, (24,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def agree(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["masked", "csr", "bag", "bag-numba", "shrunk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, backend):
    if backend == "bag-numba":
        pytest.importorskip("numba")
    results = []
    for run in ("masked", "sparse"):
        model = network()
        masks = sparse.random(model, 0.2, seed=0)
        optimizer = OPTIMIZERS[name](model.parameters())
        if run == "masked":
            with sparse.hold(model, optimizer, masks):
                results.append(losses(model, optimizer))
        else:
            with sparsely(model, optimizer, masks, backend=backend):
                assert type(model[0]) is SparseLinear
                results.append(losses(model, optimizer))
        assert sparse.Masks.nonzero(model) <= masks
    agree(*results)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("keeps", [False, True])
def test_loops(loop, keeps):
    results = []
    for run in ("masked", "sparse"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        options = {"optimizer": optimizer, "optimizer_state": "carry"} if keeps else {}
        found = []
        for level in LOOPS[loop].method(model, 0.2, 0.5, seed=0, **options):
            if not keeps:
                optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
            if run == "masked":
                with sparse.hold(model, optimizer, level.masks):
                    found.append(losses(model, optimizer, 8, level.index + 1))
            else:
                with sparsely(model, optimizer, level.masks, backend="bag"):
                    assert (type(model[0]) is SparseLinear) == (level.density < 1)
                    found.append(losses(model, optimizer, 8, level.index + 1))
        results.append((torch.cat(found), level.masks))
    agree(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def evolving(name, model, optimizer):
    phases = [(0, 4, "dense"), (4, 15, "sparse"), (15, 16, "dense"), (16, 20, "sparse")]
    options = {"steps": 20, "seed": 0}
    options |= {"phases": phases} if name == "acdc" else {"interval": 4}
    return DYNAMIC[name].method(model, optimizer, 0.3, **options)


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw-fused", "ham-adamw"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_methods(name, optimizer):
    results = []
    sparse_steps = []
    for run in ("masked", "sparse"):
        model = network()
        steps = OPTIMIZERS[optimizer](model.parameters())
        method = evolving(name, model, steps)
        if run == "masked":
            results.append((losses(model, steps), method.masks))
        else:
            model.register_forward_pre_hook(
                lambda m, _: sparse_steps.append(type(m[2]) is SparseLinear)
            )
            with sparsely(model, steps, method, backend="bag") as training:
                results.append((losses(model, steps), training.masks))
        assert sparse.Masks.nonzero(model) <= method.masks
    agree(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert sum(sparse_steps) >= 8


def test_a_run_is_broken_off_and_resumed_in_the_sparse_form():
    expected_model = network()
    optimizer = OPTIMIZERS["adam"](expected_model.parameters())
    evolving("rigl", expected_model, optimizer)
    expected = losses(expected_model, optimizer, 10, 0), losses(expected_model, optimizer, 10, 1)

    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    method = evolving("rigl", model, optimizer)
    with sparsely(model, optimizer, method, backend="bag"):
        agree(losses(model, optimizer, 10, 0), expected[0])
        assert type(model[0]) is SparseLinear
        saved = {
            "model": {n: t.clone() for n, t in model.state_dict().items()},
            "optimizer": optimizer_state(model, optimizer),
            "method": method.state_dict(),
        }

    model = network()
    model.load_state_dict(saved["model"])
    optimizer = OPTIMIZERS["adam"](model.parameters())
    load_optimizer_state(model, optimizer, saved["optimizer"])
    start = sparse.Masks(saved["method"]["masks"])
    method = sparse.rigl(model, optimizer, masks=start, steps=20, interval=4)
    method.load_state_dict(saved["method"])
    with sparsely(model, optimizer, method, backend="bag"):
        agree(losses(model, optimizer, 10, 1), expected[1])


def test_a_dynamic_method_gets_its_own_parameters_back():
    model = network()
    parameters = dict(model.named_parameters())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    method = evolving("set", model, optimizer)
    with sparsely(model, optimizer, method, backend="bag"):
        losses(model, optimizer, 2)
        assert patterns(model) == method.masks
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in parameters)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(
        map(id, now.values())
    )
    losses(model, optimizer, 18)  # it goes on in the masked form
    assert method.step == 20


def test_training_takes_less_memory():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    masks = sparse.random(model, 0.05, seed=0)
    with sparse.hold(model, optimizer, masks):
        losses(model, optimizer, 1)
    dense = footprint(model, optimizer).total
    with sparsely(model, optimizer, masks, backend="bag"):
        losses(model, optimizer, 1)
        assert footprint(model, optimizer).total < dense / 3


def test_single_layers_and_wrapped_models_are_refused():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    masks = sparse.random(layer, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"wrap it in nn\.Sequential"):
        sparsely(layer, optimizer, masks)
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        sparsely(nn.DataParallel(layer), optimizer, masks)
