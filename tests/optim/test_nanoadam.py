"""NanoAdam's arithmetic and schedule against AdamW and against entry-wise loops."""

import copy
import math

import pytest
import torch
from torch import nn

from featherweight.optim import compact, compiled
from featherweight.optim.nanoadam import NanoAdam
from featherweight.optim.refresh import density_at, is_due
from tests.oracles.nanoadam import Entries
from tests.oracles.nanoadam import smallest as smallest_oracle

NEEDS_NUMBA = pytest.mark.skipif(not compiled.available(), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=NEEDS_NUMBA)]
ALL = 0.9999  # selects every entry of a small tensor, by the path of compact state


def weight(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.05 * torch.randn(*shape, generator=generator)).to(dtype))


def gradients(parameter, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(parameter, optimizer, steps, seed=1):
    for gradient in gradients(parameter, steps, seed):
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach().clone()


def nano(parameter, **options):
    return NanoAdam([parameter], **({"lr": 1e-2, "min_size": 0} | options))


# All entries selected: AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("interval", [7, 1000])
def test_selecting_everything_is_adamw_to_the_bit(dtype, fused, decay, interval):
    options = {"lr": 1e-2, "weight_decay": decay, "betas": (0.8, 0.99), "fused": fused}
    parameter, peer = weight(33, 40, dtype=dtype), weight(33, 40, dtype=dtype)
    optimizer = nano(parameter, density=ALL, mask_interval=interval, backend="torch", **options)
    ours = train(parameter, optimizer, 40)
    assert len(optimizer.state[parameter]["index"]) == parameter.numel()
    assert torch.equal(ours, train(peer, torch.optim.AdamW([peer], **options), 40))


@pytest.mark.parametrize("chunk", [None, 256])
@NEEDS_NUMBA
def test_compiled_selecting_everything_is_adamw_to_rounding(chunk):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    parameter, peer = weight(33, 40, dtype=torch.float32), weight(33, 40, dtype=torch.float32)
    optimizer = nano(parameter, density=ALL, mask_interval=7, chunk=chunk, backend="numba")
    optimizer.param_groups[0].update(options)
    ours = train(parameter, optimizer, 200)
    theirs = train(peer, torch.optim.AdamW([peer], **options, fused=True), 200)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 0.1, "min_size": 4096}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [{"fused": True}, {"foreach": True}, {"fused": False}])
def test_what_is_trained_whole_is_adamw_to_the_bit(options, dtype, mode):
    common = {"lr": 1e-2, "weight_decay": 0.1, "maximize": True} | mode
    parameter, peer = weight(20, 30, dtype=dtype), weight(20, 30, dtype=dtype)
    optimizer = nano(parameter, **options | common)
    ours = train(parameter, optimizer, 20)
    reference = torch.optim.AdamW([peer], **common)
    assert torch.equal(ours, train(peer, reference, 20))
    for key, value in reference.state[peer].items():
        assert torch.equal(optimizer.state[parameter][key], value)
        assert optimizer.state[parameter][key].dtype == value.dtype


def test_a_static_mask_is_adamw_on_the_selected_entries():
    parameter = weight(30, 30)
    start = parameter.detach().clone().flatten()
    chosen = start.abs().sort(stable=True).indices[:90].sort().values
    peer = nn.Parameter(start[chosen].clone())
    reference = torch.optim.AdamW([peer], 1e-2, weight_decay=0.3, fused=True)
    for gradient in gradients(parameter, 50):
        peer.grad = gradient.flatten()[chosen]
        reference.step()
    optimizer = nano(parameter, density=0.1, mask_interval=51, weight_decay=0.3, backend="torch")
    ours = train(parameter, optimizer, 50).flatten()
    assert torch.equal(ours[chosen], peer.detach())
    others = torch.ones(900, dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(ours[others], start[others])


# Against the loops


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_refresh", ["carry", "reset"])
@pytest.mark.parametrize("chunk", [None, 500, 40_000])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_trajectory_over_refreshes_and_densities(backend, on_refresh, chunk, bias_correction):
    dtype = torch.float32 if backend == "numba" else torch.float64
    steps, shape = 120, (40, 31)
    parameter = weight(*shape, dtype=dtype)
    optimizer = nano(
        parameter, density=0.2, final_density=0.05, total_steps=steps, density_interval=29,
        mask_interval=13, weight_decay=0.1, on_refresh=on_refresh, chunk=chunk, backend=backend,
        bias_correction=bias_correction,
    )  # fmt: skip
    oracle = Entries(
        parameter.detach().flatten().tolist(), 1e-2, weight_decay=0.1,
        carry=on_refresh == "carry", bias_correction=bias_correction,
    )  # fmt: skip
    moved = 0
    for step, gradient in enumerate(gradients(parameter, steps)):
        if step % 13 == 0 or step % 29 == 0:
            density = 0.2 - 0.15 * (step // 29 * 29) / steps
            before = set(oracle.selected)
            oracle.refresh(f"{density:.12f}", chunk)
            moved += len(oracle.selected - before) if step else 0
        oracle.step(gradient.flatten().tolist())
        parameter.grad = gradient
        optimizer.step()
        if backend == "numba":  # selections may differ where two weights differ by rounding
            oracle.weights = parameter.detach().double().flatten().tolist()
    assert moved > 100
    state = optimizer.expand(parameter)
    assert state["selected"].flatten().nonzero().flatten().tolist() == sorted(oracle.selected)
    chosen = state["selected"].flatten()
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-6} if backend == "numba" else {"rtol": 1e-9, "atol": 1e-12}
    )
    for ours, theirs in (
        (parameter.detach().flatten(), oracle.weights),
        (state["exp_avg"].flatten(), oracle.first),
        (state["exp_avg_sq"].flatten(), oracle.second),
    ):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=dtype), **tolerance)
    assert state["age"].flatten()[chosen].tolist() == [
        oracle.age[i] for i in sorted(oracle.selected)
    ]


@NEEDS_NUMBA
@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_both_backends_take_the_same_step(chunk, dtype, state_dtype, maximize):
    """One step after a refresh that mixes ages, from the same state: equal to rounding."""
    parameter = weight(40, 50, dtype=dtype)
    options = {"density": 0.2, "mask_interval": 3, "state_dtype": state_dtype, "chunk": chunk}
    first = nano(parameter, backend="torch", maximize=maximize, weight_decay=0.1, **options)
    train(parameter, first, 10)
    assert len(first.state[parameter]["born"])
    twin = nn.Parameter(parameter.detach().clone())
    second = nano(twin)
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["backend"] = "numba"
    before = parameter.detach().clone()
    ours, theirs = train(twin, second, 1, seed=5), train(parameter, first, 1, seed=5)
    assert not torch.equal(before, ours)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=2 * eps * 1e-2)
    for key in ("exp_avg", "exp_avg_sq"):
        a, b = second.state[twin][key], first.state[parameter][key]
        assert a.dtype == b.dtype == state_dtype
        tolerance = 2 * torch.finfo(state_dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0.1 * tolerance)


@NEEDS_NUMBA
@pytest.mark.parametrize("chunk", [None, 1000])
def test_threads_do_not_change_the_result(chunk, monkeypatch):
    monkeypatch.setattr(compiled, "SEGMENT", 300)
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        parameter = weight(200, 101, dtype=torch.float32)
        optimizer = nano(parameter, density=0.1, mask_interval=4, chunk=chunk, backend="numba")
        results.append(train(parameter, optimizer, 12))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@NEEDS_NUMBA
def test_bfloat16_is_rounded_to_the_nearest_even_and_nan_stays_nan():
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # all bits set
    special = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, math.inf, math.nan, 3.4e38, -1e-40])
    parameter = weight(4007, dtype=torch.float32)
    parameter.grad = torch.cat([next(gradients(parameter, 1))[:4000], special, nan])
    optimizer = nano(
        parameter, density=ALL + 9.9e-5, betas=(0.0, 0.0), backend="numba",
        state_dtype=torch.bfloat16,
    )  # fmt: skip
    optimizer.step()
    assert len(optimizer.state[parameter]["index"]) == 4007
    for key, expected in (("exp_avg", parameter.grad), ("exp_avg_sq", parameter.grad.square())):
        found = optimizer.state[parameter][key]
        assert torch.equal(found.nan_to_num(7.0), expected.to(torch.bfloat16).nan_to_num(7.0))


# Entries that are not selected, first steps, symmetries


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_selected_stays_to_the_bit(backend):
    parameter = weight(40, 50, dtype=torch.float32)
    optimizer = nano(parameter, density=0.1, mask_interval=5, weight_decay=0.5, backend=backend)
    start, ever = parameter.detach().clone(), torch.zeros(40, 50, dtype=torch.bool)
    for gradient in gradients(parameter, 22):
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
        selected = optimizer.expand(parameter)["selected"]
        ever |= selected
        assert torch.equal(before[~selected], parameter[~selected])
    assert torch.equal(start[~ever], parameter[~ever])
    assert 200 < ever.sum() <= 5 * 200


@pytest.mark.parametrize(("corrected", "expected"), [(True, 1.0), (False, 0.1 / math.sqrt(0.001))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_of_every_newcomer(corrected, expected, backend):
    parameter = weight(40, 50, dtype=torch.float32)
    optimizer = nano(
        parameter, density=0.1, mask_interval=10, bias_correction=corrected, backend=backend
    )
    newcomers = 0
    for gradient in gradients(parameter, 31):
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
        fresh = optimizer.expand(parameter)["age"] == 1
        fresh &= optimizer.expand(parameter)["selected"]
        steps = (parameter.detach() - before).abs()[fresh] / 1e-2
        torch.testing.assert_close(steps, torch.full_like(steps, expected), rtol=1e-3, atol=1e-4)
        newcomers += int(fresh.sum())
    assert newcomers > 250


def test_survivors_keep_everything_and_newcomers_begin_at_zero():
    parameter = weight(40, 50)
    optimizer = nano(parameter, density=0.1, mask_interval=10)
    train(parameter, optimizer, 20)
    before = optimizer.expand(parameter)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0].update(betas=(1 - 1e-12, 1 - 1e-12), lr=0.0)
    optimizer.step()  # a refresh and a step that moves nothing
    after = optimizer.expand(parameter)
    stay = before["selected"] & after["selected"]
    new = after["selected"] & ~before["selected"]
    assert stay.any()
    assert new.any()
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(after[key][stay], before[key][stay], rtol=1e-9, atol=0)
        assert (after[key][new] == 0).all()
    assert torch.equal(after["age"][stay], before["age"][stay] + 1)
    assert (after["age"][new] == 1).all()


def test_moments_that_are_not_finite_do_not_spread_to_newcomers():
    parameter = weight(40, 50)
    optimizer = nano(parameter, density=0.1, mask_interval=1)
    train(parameter, optimizer, 1)
    optimizer.state[parameter]["exp_avg"].fill_(math.nan)
    with torch.no_grad():
        parameter.copy_(weight(40, 50, seed=9))
    train(parameter, optimizer, 1)
    assert optimizer.state[parameter]["exp_avg"].isfinite().sum() > 150


def test_mirrored_weights_and_gradients_give_a_mirrored_result():
    one, other = weight(30, 30), nn.Parameter(-weight(30, 30).detach())
    optimizers = nano(one, mask_interval=3), nano(other, mask_interval=3)
    for gradient in gradients(one, 12):
        one.grad, other.grad = gradient, -gradient
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(one, -other)


def test_scaled_gradients_give_the_same_result():
    one, other = weight(30, 30), weight(30, 30)
    optimizers = nano(one, eps=0.0, mask_interval=3), nano(other, eps=0.0, mask_interval=3)
    for gradient in gradients(one, 12):
        one.grad, other.grad = gradient, 1024 * gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_decay_reaches_selected_entries_alone():
    parameter = weight(30, 30)
    start = parameter.detach().clone()
    optimizer = nano(parameter, weight_decay=2.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    selected = optimizer.expand(parameter)["selected"]
    torch.testing.assert_close(parameter[selected], start[selected] * (1 - 0.02))
    assert torch.equal(parameter[~selected], start[~selected])


def test_pruned_weights_stay_zero_with_skip_zeros():
    parameter = weight(40, 50)
    pruned = torch.rand(40, 50, generator=torch.Generator().manual_seed(3)) < 0.8
    with torch.no_grad():
        parameter[pruned] = 0
    plain = copy.deepcopy(parameter)
    optimizer = nano(parameter, density=0.25, mask_interval=5, skip_zeros=True)
    train(parameter, optimizer, 20)
    assert (parameter[pruned] == 0).all()
    kept = int((~pruned).sum())
    assert len(optimizer.state[parameter]["index"]) == math.ceil(0.25 * kept)
    train(plain, nano(plain, density=0.25), 1)
    assert (plain[pruned] != 0).sum() == 500  # without it zeros are what is selected


# Schedules


def test_density_is_a_line_evaluated_now_and_then():
    group = {"density": 0.2, "final_density": 0.04, "total_steps": 100, "density_interval": 30,
             "mask_interval": 1000}  # fmt: skip
    found = [density_at(group, step) for step in (0, 29, 30, 59, 60, 99, 120, 500)]
    expected = [0.2, 0.2, 0.152, 0.152, 0.104, 0.056, 0.04, 0.04]
    assert found == pytest.approx(expected)
    assert [s for s in range(1, 100) if is_due(group, s)] == [30, 60, 90]
    constant = group | {"final_density": None, "density_interval": None, "mask_interval": 40}
    assert density_at(constant, 70) == 0.2
    assert [s for s in range(1, 100) if is_due(constant, s)] == [40, 80]


def test_the_state_shrinks_with_the_density():
    parameter = weight(40, 50)
    optimizer = nano(parameter, density=0.2, final_density=0.1, total_steps=40, density_interval=20)
    sizes = []
    for gradient in gradients(parameter, 41):
        parameter.grad = gradient
        optimizer.step()
        sizes.append(len(optimizer.state[parameter]["exp_avg"]))
    assert sizes == [400] * 20 + [300] * 20 + [200]


# Generations


def test_generations_past_the_horizon_share_one_and_are_exactly_corrected():
    betas = (0.5, 0.6)
    oldest = compact.horizon(betas, torch.float64)
    assert 1 - 0.6**oldest == 1.0
    assert 1 - 0.6 ** (oldest // 2) < 1.0
    parameter = weight(20, 25)
    optimizer = nano(parameter, density=0.2, mask_interval=1, betas=betas, lr=1e-3)
    oracle = Entries(parameter.detach().flatten().tolist(), 1e-3, betas)
    for gradient in gradients(parameter, oldest + 60):
        oracle.refresh("0.2")
        oracle.step(gradient.flatten().tolist())
        parameter.grad = gradient
        optimizer.step()
    expected = torch.tensor(oracle.weights, dtype=torch.float64).view(20, 25)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)
    starts = optimizer.state[parameter]["starts"]
    assert len(starts) <= oldest + 1
    assert starts.diff().gt(0).all()


def test_only_generations_that_matter_are_kept():
    old = torch.arange(6)
    moments = torch.arange(1.0, 7.0)
    state = {
        "index": old.int(), "exp_avg": moments, "exp_avg_sq": moments + 10,
        "born": torch.tensor([0, 1, 2, 2, 3, 3], dtype=torch.uint8),
        "starts": torch.tensor([0, 50, 960, 990]),
    }  # fmt: skip
    new = torch.tensor([0, 1, 4, 7])  # the generation of 960 dies out, that of 1000 begins
    found = compact.carry(state, old.int(), new, size=9, step=1000, oldest=100)
    assert found["starts"].tolist() == [900, 990, 1000]  # the first two are past what matters
    assert found["born"].tolist() == [0, 0, 1, 2]
    assert found["exp_avg"].tolist() == [1.0, 2.0, 5.0, 0.0]
    assert found["exp_avg_sq"].tolist() == [11.0, 12.0, 15.0, 0.0]


def test_more_generations_than_a_byte_can_number():
    parameter = weight(100, 100)
    optimizer = nano(parameter, density=0.1, mask_interval=1, lr=2e-3)
    train(parameter, optimizer, 500)
    state = optimizer.state[parameter]
    assert len(state["starts"]) > 256
    assert state["born"].dtype == torch.int16
    age = optimizer.expand(parameter)["age"]
    assert age.max() <= 500
    assert age[optimizer.expand(parameter)["selected"]].min() >= 1


# Layouts


def test_memory_format_makes_no_difference():
    plain = nn.Parameter(weight(8, 6, 3, 3).detach())
    other = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizers = nano(plain, mask_interval=4), nano(other, mask_interval=4)
    for step, gradient in enumerate(gradients(plain, 14)):
        plain.grad = gradient
        other.grad = gradient.clone(memory_format=torch.channels_last)
        if step == 6:  # in the middle of an interval
            other.data = other.data.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, other)
    for key, value in optimizers[0].expand(plain).items():
        assert torch.equal(value, optimizers[1].expand(other)[key])


def test_a_format_that_changes_with_16_bit_indices():
    parameter = nn.Parameter(weight(8, 6, 3, 3).detach())
    optimizer = nano(parameter, chunk=100, mask_interval=100)
    train(parameter, optimizer, 5)
    before = optimizer.expand(parameter)
    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    train(parameter, optimizer, 1)
    assert torch.equal(optimizer.expand(parameter)["selected"], before["selected"])
    assert not torch.equal(optimizer.expand(parameter)["exp_avg"], before["exp_avg"])


def test_chunks_may_change_while_training():
    parameter = weight(40, 50)
    optimizer = nano(parameter, chunk=100, mask_interval=5)
    train(parameter, optimizer, 3)
    optimizer.param_groups[0]["chunk"] = None  # from the next refresh on
    train(parameter, optimizer, 1)
    assert optimizer.state[parameter]["index"].dtype == torch.int16
    optimizer.param_groups[0]["lr"] = 0.0
    train(parameter, optimizer, 2)
    assert optimizer.state[parameter]["index"].dtype == torch.int32
    selected = optimizer.expand(parameter)["selected"].flatten()
    expected = smallest_oracle(parameter.flatten().tolist(), "0.1")
    assert selected.nonzero().flatten().tolist() == sorted(expected)


def test_transposed_gradients_of_linear_layers_are_read_rightly():
    one, other = weight(20, 30), weight(20, 30)
    optimizers = nano(one), nano(other)
    for gradient in gradients(one, 3):
        one.grad, other.grad = gradient, gradient.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(one, other)


def test_a_weight_with_gaps_is_refused():
    parameter = nn.Parameter(torch.randn(20, 30)[:, :15])
    parameter.grad = torch.randn(20, 15)
    with pytest.raises(ValueError, match="has gaps in memory"):
        nano(parameter).step()
