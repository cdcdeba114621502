"""NanoAdam among others: saved and loaded, scheduled, scaled, compiled."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from featherweight.optim import compact, compiled
from featherweight.optim.analysis import state_bytes
from featherweight.optim.nanoadam import NanoAdam
from tests.optim.test_nanoadam import gradients, nano, train, weight

OPTIONS = {
    "plain": {},
    "16-bit": {"chunk": 256},
    "reset": {"on_refresh": "reset"},
    "bf16 moments": {"state_dtype": torch.bfloat16},
    "schedule": {"final_density": 0.02, "total_steps": 20, "density_interval": 3},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 4))


def loss(model, seed=0):
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    return model(inputs).square().mean()


def steps(model, optimizer, number, first=0):
    for step in range(first, first + number):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def of_network(model, **options):
    return NanoAdam(
        model.named_parameters(), 1e-2, **({"min_size": 200, "mask_interval": 5} | options)
    )


# Saving and loading


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 1, 5, 7])
def test_resuming_at_any_step_changes_no_bit(tmp_path, options, dtype, done):
    parameter = weight(40, 50, dtype=dtype)
    everything = list(gradients(parameter, 14))
    optimizer = nano(parameter, mask_interval=5, weight_decay=0.1, **options)
    for step, gradient in enumerate(everything):
        if step == done:
            torch.save({"o": optimizer.state_dict(), "p": parameter.detach()}, tmp_path / "x.pt")
        parameter.grad = gradient
        optimizer.step()
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    twin = nn.Parameter(saved["p"])
    resumed = nano(twin)
    resumed.load_state_dict(saved["o"])
    for gradient in everything[done:]:
        twin.grad = gradient
        resumed.step()
    assert torch.equal(parameter, twin)
    state, other = optimizer.state[parameter], resumed.state[twin]
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def test_a_fresh_process_resumes_to_the_bit(tmp_path):
    script = """
        import sys, torch
        from tests.optim.test_nanoadam_state import network, of_network, steps
        assert not {"numba", "llvmlite"} & set(sys.modules)  # they are imported when used
        model = network()
        optimizer = of_network(model, chunk=100)
        saved = torch.load(sys.argv[1], weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.save(steps(model, optimizer, 9, first=8), sys.argv[1])
    """
    model = network()
    optimizer = of_network(model, chunk=100)
    steps(model, optimizer, 8)
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(path, weights_only=True), steps(model, optimizer, 9, first=8))


def test_indices_past_what_float32_can_hold_survive():
    """Torch casts loaded state to the parameter's dtype, which corrupts large indices."""
    parameter = nn.Parameter(torch.ones(1 << 20, dtype=torch.bfloat16))
    optimizer = nano(parameter, density=0.001)
    train(parameter, optimizer, 1)
    state = optimizer.state[parameter]
    state["index"] += (1 << 24) + 1
    expected = state["index"].clone()
    twin = nano(parameter)
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(twin.state[parameter]["index"], expected)
    assert twin.state[parameter]["exp_avg"].dtype == torch.float32
    assert torch.equal(twin.state[parameter]["exp_avg"], state["exp_avg"])


def test_loaded_state_is_a_copy():
    parameter, twin = weight(40, 50), weight(40, 50)
    optimizer, other = nano(parameter), nano(twin)
    train(parameter, optimizer, 3)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"][0])
    train(twin, other, 3)
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, before[key])


def test_hooks_of_loading_are_obeyed_and_see_the_state_as_saved():
    parameter, twin = weight(40, 50), weight(40, 50)
    optimizer, other = nano(parameter), nano(twin)
    train(parameter, optimizer, 3)
    seen = []

    def doubled(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"] *= 2
        return state_dict

    other.register_load_state_dict_pre_hook(doubled)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[twin]["index"].dtype))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [torch.int32]
    expected = 2 * optimizer.state[parameter]["exp_avg"]
    assert torch.equal(other.state[twin]["exp_avg"], expected)
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_loading_other_groups_is_refused():
    with pytest.raises(ValueError, match="parameter group"):
        nano(weight(3)).load_state_dict(NanoAdam([weight(3), weight(3)]).state_dict())


def test_copies_and_pickles_go_on_alike():
    model = network()
    optimizer = of_network(model)
    steps(model, optimizer, 7)
    other, twin = copy.deepcopy((model, optimizer))
    third, triplet = pickle.loads(pickle.dumps((model, optimizer)))
    expected = steps(model, optimizer, 5, first=7)
    assert torch.equal(expected, steps(other, twin, 5, first=7))
    assert torch.equal(expected, steps(third, triplet, 5, first=7))
    assert "density: 0.1" in repr(optimizer)


def test_the_step_that_sets_up_distributed_state_does_no_harm():
    """torch.distributed.checkpoint takes a step of zero gradients and rate before it loads."""
    parameter, twin = weight(40, 50), weight(40, 50)
    optimizer, other = nano(parameter, mask_interval=3), nano(twin, mask_interval=3)
    train(parameter, optimizer, 4)
    with torch.no_grad():
        twin.copy_(parameter)
    other.param_groups[0]["lr"] = 0.0
    twin.grad = torch.zeros_like(twin)
    other.step()
    assert torch.equal(twin, parameter)
    assert other.state[twin].keys() == optimizer.state[parameter].keys()
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(parameter, optimizer, 5, seed=8), train(twin, other, 5, seed=8))


# Bytes


@pytest.mark.parametrize(("options", "bytes_an_entry"), [
    ({"mask_interval": 100}, 4 + 4 + 4),
    ({"mask_interval": 2}, 4 + 4 + 4 + 1),
    ({"mask_interval": 2, "on_refresh": "reset"}, 4 + 4 + 4),
    ({"mask_interval": 2, "chunk": 1024}, 2 + 4 + 4 + 1),
    ({"mask_interval": 2, "chunk": 1024, "state_dtype": torch.bfloat16}, 2 + 2 + 2 + 1),
])  # fmt: skip
def test_bytes_of_the_state_are_the_formula(options, bytes_an_entry):
    parameter = weight(128, 128, dtype=torch.float32)
    optimizer = nano(parameter, density=0.1, **options)
    train(parameter, optimizer, 7)
    state = optimizer.state[parameter]
    chunks = 16 if "chunk" in options else 0
    entries = chunks * 103 if chunks else 1639
    small = 4 + 8 * len(state["starts"]) + 8 * parameter.dim()  # step, generations, layout
    small += 4 * (chunks + 1) + 8 if chunks else 0
    assert state_bytes(optimizer) == bytes_an_entry * entries + small


@pytest.mark.parametrize(("density", "share"), [(0.1, 0.175), (0.01, 0.02)])
def test_the_share_of_adamw(density, share):
    parameter, peer = weight(1024, 512, dtype=torch.float32), weight(1024, 512, dtype=torch.float32)
    optimizer, adamw = nano(parameter, density=density, mask_interval=2), torch.optim.AdamW([peer])
    train(parameter, optimizer, 7)
    train(peer, adamw, 1)
    assert len(optimizer.state[parameter]["born"])
    assert state_bytes(optimizer) <= share * state_bytes(adamw)


def test_sixteen_bits_reach_the_last_entry_of_a_chunk():
    index = torch.tensor([0, 32767, 32768, 65535, 65536, 98303])
    stored = compact.encode(index, 100_000, 32768)
    assert stored["index"].dtype == torch.int16
    assert torch.equal(compact.decode(stored).long(), index)
    assert compact.encode(index, 100_000, 32769)["index"].dtype == torch.int32
    assert compact.encode(index, 1 << 31, None)["index"].dtype == torch.int64


# Groups, schedulers, hooks, closures, scalers


def test_groups_are_separate_optimizers():
    settings = (
        {"lr": 1e-2, "density": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-3},
        {"lr": 2e-3, "density": 0.3, "mask_interval": 3, "maximize": True, "chunk": 100,
         "on_refresh": "reset", "bias_correction": False},
    )  # fmt: skip
    together, apart = (
        [weight(30, 30, seed=s) for s in (0, 1)],
        [weight(30, 30, seed=s) for s in (0, 1)],
    )
    one = NanoAdam([{"params": [together[0]]} | settings[0]], min_size=0)
    alone = [nano(p, **s) for p, s in zip(apart, settings, strict=True)]
    for step, gradient in enumerate(gradients(apart[0], 12)):
        if step == 4:
            one.add_param_group({"params": [together[1]]} | settings[1])
        for number in (0, 1) if step >= 4 else (0,):
            together[number].grad = gradient.clone()
            apart[number].grad = gradient.clone()
            alone[number].step()
        one.step()
    for ours, theirs in zip(together, apart, strict=True):
        assert torch.equal(ours, theirs)


def test_groups_know_names():
    model = network()
    assert of_network(model).param_groups[0]["param_names"][0] == "0.weight"


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_set_the_rate(tensor):
    parameter, peer = weight(30, 30), weight(30, 30)
    rate = torch.tensor(1e-2, dtype=torch.float64) if tensor else 1e-2
    optimizer = nano(parameter, lr=rate, density=0.9999, backend="torch", fused=False)
    reference = torch.optim.AdamW([peer], 1e-2, weight_decay=0.0)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (optimizer, reference)]
    for gradient in gradients(parameter, 10):
        parameter.grad, peer.grad = gradient, gradient.clone()
        for o, scheduler in zip((optimizer, reference), schedulers, strict=True):
            o.step()
            scheduler.step()
    torch.testing.assert_close(parameter, peer, rtol=1e-12, atol=1e-14)


def test_parameters_without_gradient_stand_still():
    one, other = weight(30, 30), weight(30, 30)
    optimizer = NanoAdam([one, other], min_size=0)
    before = other.detach().clone()
    one.grad = torch.ones_like(one)
    optimizer.step()
    assert torch.equal(other, before)
    assert other not in optimizer.state


def test_closures_hooks_and_returned_losses():
    model = network()
    optimizer = of_network(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    twin = network()
    reference = of_network(twin)
    first = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert torch.equal(first, loss(twin))
    expected = steps(twin, reference, 1)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


def test_accumulated_gradients_are_one_step():
    model, twin = network(), network()
    optimizer, reference = of_network(model), of_network(twin)
    for step in range(4):
        for part in range(3):
            (loss(model, 3 * step + part) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        sum(loss(twin, 3 * step + part) / 3 for part in range(3)).backward()
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert int(optimizer.state[model[0].weight]["step"]) == 4


def test_grad_scaler_unscales_once_and_skips_what_overflowed():
    model, twin = network(), network()
    optimizer, reference = of_network(model), of_network(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss(model, step)).backward()
        if step == 3:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 3:
            steps(twin, reference, 1, first=step)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_autograd_notices_that_weights_changed():
    parameter = weight(30, 30, dtype=torch.float32)
    value = parameter.square().sum()
    parameter.grad = torch.ones_like(parameter)
    nano(parameter).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_compiled_step_neither_differs_nor_recompiles():
    model, twin = network(), network()
    optimizer, reference = of_network(model), of_network(twin)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    step = torch.compile(lambda: optimizer.step())
    other = torch.optim.lr_scheduler.LinearLR(reference)
    torch._dynamo.utils.counters.clear()
    for number in range(12):
        for m, o, call, s in (
            (model, optimizer, step, scheduler),
            (twin, reference, reference.step, other),
        ):
            o.zero_grad()
            loss(m, number).backward()
            call()
            s.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


@pytest.mark.skipif(not compiled.available(), reason="numba is not installed")
def test_compiled_and_other_dtypes_side_by_side():
    parameters = [weight(30, 30, dtype=d) for d in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = NanoAdam(parameters, 1e-2, min_size=0)
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for old, parameter in zip(before, parameters, strict=True):
        assert (old != parameter).sum() == 90
