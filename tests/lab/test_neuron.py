"""The single hidden neuron: closed forms, the conserved quantity, and who finds the target."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from featherweight.lab import neuron as lab
from featherweight.lab.neuron import Data, Neuron


def one_input_data(count=50, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    data = lab.sample(1, count, 1, noise=noise, generator=generator)
    return Data(data.x[0], data.y[0])


def one_neuron(a, w):
    tensor = torch.tensor(w, dtype=torch.float64)
    return Neuron(torch.tensor([a], dtype=torch.float64), tensor.view(1, -1))


def random_problem(inputs=4, starts=3, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    data = lab.sample(2, 20, inputs, noise=noise, generator=generator)
    w = torch.randn(2, starts, inputs, generator=generator).double()
    return Neuron(torch.randn(2, starts, generator=generator).double(), w), data


def loss(a, w, x, y):
    """Oracle: the loss of one neuron as the paper writes it."""
    return (a * torch.relu(x @ w) - y).square().sum() / (2 * len(y))


def slow_descent(a, w, x, y, mask, learning_rate, steps):
    """Oracle: autograd and plain loops, one neuron at a time."""
    for _ in range(steps):
        a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
        g_a, g_w = torch.autograd.grad(loss(a, w, x, y), (a, w))
        a, w = a - learning_rate * g_a, w - learning_rate * g_w * mask
    return a.detach(), w.detach()


def slow_quadrant(data, start, seed, quadrant, kept, learning_rate, steps):
    """Oracle: dense training, IMP and LRR of one start, pruned by Python sorting."""
    x, y = data.x[seed], data.y[seed]
    a0, w0 = start.a[seed, quadrant], start.w[seed, quadrant]
    dense = slow_descent(a0, w0, x, y, torch.ones_like(w0), learning_rate, steps)
    ends = [dense]
    for method in ("imp", "lrr"):
        a, w = dense
        for count in kept:
            best = sorted(range(len(w)), key=lambda i: (-abs(float(w[i])), i))[:count]
            mask = torch.tensor([float(i in best) for i in range(len(w))])
            a, w = (a0, w0) if method == "imp" else (a, w)
            a, w = slow_descent(a, w * mask, x, y, mask, learning_rate, steps)
        ends.append((a, w))
    target = torch.eye(len(w0))[0]
    return [bool(a > 0 and (a * w - target).abs().max() <= 0.1) for a, w in ends]


def test_the_sample_is_what_it_says():
    data = lab.sample(3, 4000, 2, noise=0.5, generator=torch.Generator().manual_seed(0))
    assert data.x.shape == (3, 4000, 2)
    assert data.x.dtype == data.y.dtype == torch.float64
    assert data.x.abs().max() <= 1
    assert data.x.mean().abs() < 5 / math.sqrt(3 * data.x.numel())
    errors = data.y - data.x[..., 0].clamp_min(0)
    assert errors.std().item() == pytest.approx(0.5, abs=0.02)


def test_starts_are_balanced_and_differ_in_two_signs_only():
    start = lab.balanced_starts(50, 6, generator=torch.Generator().manual_seed(0))
    assert lab.conserved(start).abs().max() < 1e-12
    signs = torch.stack([start.a.sign(), start.w[..., 0].sign()], -1)
    assert torch.equal(signs, torch.tensor(lab.QUADRANTS).double().expand(50, 4, 2))
    assert torch.equal(start.w.abs(), start.w[:, :1].abs().expand_as(start.w))
    assert torch.equal(start.w[..., 1:], start.w[:, :1, 1:].expand(50, 4, 5))
    assert start.w.var().item() == pytest.approx(1 / 6, rel=0.3)


def test_batched_descent_equals_autograd_one_at_a_time():
    start, data = random_problem()
    mask = torch.rand(start.w.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    start = Neuron(start.a, start.w * mask)
    end = lab.descend(start, data, mask, learning_rate=0.1, steps=25)
    for seed in range(2):
        for index in range(3):
            a, w = slow_descent(
                *(start.a[seed, index], start.w[seed, index], data.x[seed], data.y[seed]),
                *(mask[seed, index], 0.1, 25),
            )
            torch.testing.assert_close(end.a[seed, index], a, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(end.w[seed, index], w, rtol=1e-12, atol=1e-12)
    assert not end.w[~mask].any()


def test_batched_table_equals_the_slow_oracle():
    options = {"inputs": 3, "samples": 20, "learning_rate": 0.3, "steps": 80, "noise": 0.05}
    table = lab.quadrant_table(seed=5, seeds=2, kept=(2, 1), **options)
    generator = torch.Generator().manual_seed(5)
    data = lab.sample(2, 20, 3, noise=0.05, generator=generator)
    start = lab.balanced_starts(2, 3, generator=generator)
    found = np.array(
        [[slow_quadrant(data, start, s, q, (2, 1), 0.3, 80) for q in range(4)] for s in range(2)]
    )
    assert table.successes == tuple(map(tuple, found.sum(0).tolist()))
    assert 0 < found.sum() < found.size


def test_gradient_descent_changes_the_conserved_quantity_by_the_known_amount():
    start, data = random_problem()
    eta, before = 0.2, lab.conserved(start)
    v = lab.pull(start, data)
    g_a, g_w = (start.w * v).sum(-1), start.a[..., None] * v
    end = lab.descend(start, data, learning_rate=eta, steps=1)
    expected = before + eta**2 * (g_a.square() - g_w.square().sum(-1))
    torch.testing.assert_close(lab.conserved(end), expected, rtol=1e-13, atol=1e-13)
    assert (lab.conserved(end) - before).abs().min() > 1e-6


def test_flow_conserves_at_any_step():
    start, data = random_problem()
    for step in (0.5, 0.05):
        end = lab.flow(start, data, step=step, steps=round(5 / step))
        assert (end.a - start.a).abs().min() > 1e-3
        torch.testing.assert_close(lab.conserved(end), lab.conserved(start), rtol=0, atol=1e-11)


def test_flow_and_euler_have_second_and_first_order():
    data, start = one_input_data(), one_neuron(0.5, [0.5])
    square, cross = (float(m) for m in lab.half_line_moments(data, 1))
    exact = lab.balanced_product(0.25, torch.tensor(3.0), square, cross)
    flow, euler = [], []
    for steps in (200, 400):
        smooth = lab.flow(start, data, step=3 / steps, steps=steps)
        flow.append(abs(float(smooth.a * smooth.w[:, 0] - exact)))
        rough = lab.descend(start, data, learning_rate=3 / steps, steps=steps)
        euler.append(abs(float(rough.a * rough.w[:, 0] - exact)))
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.05)
    assert flow[0] / flow[1] == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize(("sign_a", "sign_w"), lab.QUADRANTS)
def test_closed_form_against_an_ode_solver(sign_a, sign_w, noise):
    data = one_input_data(noise=noise)
    x, y = data.x[:, 0].numpy(), data.y.numpy()

    def slope(_, state):
        a, w = state
        residual = a * np.maximum(w * x, 0) - y
        active = w * x > 0
        return [-(residual * np.maximum(w * x, 0)).mean(), -(a * residual * active * x).mean()]

    times = np.array([0.0, 0.9, 7.3])
    solution = solve_ivp(
        slope, (0, 7.3), (0.5 * sign_a, 0.5 * sign_w), t_eval=times, rtol=1e-11, atol=1e-13
    )
    square, cross = (float(m) for m in lab.half_line_moments(data, sign_w))
    product = lab.balanced_product(0.25 * sign_a * sign_w, torch.tensor(times), square, cross)
    np.testing.assert_allclose(product.numpy(), solution.y[0] * solution.y[1], rtol=0, atol=1e-8)


def test_closed_form_limits():
    data = one_input_data(noise=0.1)
    square, cross = (float(m) for m in lab.half_line_moments(data, 1))
    right = data.x[:, 0] > 0
    x, y = data.x[right, 0], data.y[right]
    assert cross / square == pytest.approx(float((x @ y) / (x @ x)), abs=1e-14)
    late = torch.tensor([1e3, 1e6], dtype=torch.float64)
    grown = lab.balanced_product(0.25, late, square, cross)
    torch.testing.assert_close(grown, torch.full_like(late, cross / square))
    assert lab.balanced_product(-0.25, late, square, cross).abs().max() < 1e-60
    # Noise-free on the left half line: p0 / (1 + 2 D1 p0 t), in the sign of the start.
    clean_square, clean_cross = (float(m) for m in lab.half_line_moments(one_input_data(), -1))
    assert clean_cross == 0
    for start in (0.25, -0.25):
        decayed = lab.balanced_product(start, late, clean_square, clean_cross)
        torch.testing.assert_close(decayed, start / (1 + 2 * clean_square * 0.25 * late))
    # A vanishing slope joins both laws.
    joined = lab.balanced_product(0.25, torch.tensor(5.0).double(), 0.2, 1e-12)
    assert float(joined) == pytest.approx(0.25 / (1 + 2 * 0.2 * 0.25 * 5), rel=1e-9)


SIZES = [(0.3, 0.7), (0.7, 0.3), (0.49, 0.51), (0.51, 0.49)]


@pytest.mark.parametrize(("size_a", "size_w"), SIZES)
def test_one_input_success_rule_off_balance(size_a, size_w):
    signs = torch.tensor(lab.QUADRANTS).double()
    start = Neuron(size_a * signs[:, 0], size_w * signs[:, 1:])
    end = lab.flow(start, one_input_data(), step=0.1, steps=4000)
    predicted = lab.one_input_success(start.a, start.w[:, 0])
    assert lab.recovered(end).tolist() == predicted.tolist()
    assert predicted.tolist() == [True, False, size_w > size_a, False]


def test_balanced_start_with_negative_a_ends_on_the_saddle():
    start = one_neuron(-0.5, [0.5])
    end = lab.flow(start, one_input_data(), step=0.1, steps=4000)
    assert end.a.abs() < 1e-9
    assert end.w.abs().max() < 1e-9
    assert not lab.one_input_success(start.a, start.w[:, 0]).any()


def test_recovered_judges_the_function():
    neurons = Neuron(
        torch.tensor([2.0, 0.5, -1.0, 1.0, 1.0]),
        torch.tensor([[0.5, 0.0], [2.0, 0.1], [-1.0, 0.0], [0.85, 0.0], [1.0, -0.2]]),
    )
    assert lab.recovered(neurons).tolist() == [True, True, False, False, False]


def test_magnitude_mask_keeps_the_largest_and_the_first_of_ties():
    w = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    assert lab.magnitude_mask(w, 2).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_quadrant_table_of_the_theory():
    table = lab.quadrant_table(seed=0, seeds=60)
    expected = {(1, 1): (1, 1, 1), (1, -1): (1, 0, 1), (-1, 1): (0, 0, 0), (-1, -1): (0, 0, 0)}
    for signs, rates in expected.items():
        assert tuple(table.rate(*signs, column) for column in lab.COLUMNS) == rates
    assert table.overall("imp") == 0.25
    assert table.overall("lrr") == 0.5
    lines = str(table).splitlines()
    assert lines[0].split()[-3:] == ["dense", "imp", "lrr"]
    assert lines[2].split() == ["+1,", "-1", "1.00", "0.00", "1.00"]
    assert "60 seeds" in lines[-1]


def test_label_noise_lets_imp_escape():
    table = lab.quadrant_table(seed=0, seeds=60, noise=0.05, inputs=5)
    assert 0.2 < table.rate(1, -1, "imp") < 0.8
    assert table.rate(1, -1, "lrr") > 0.95


def test_table_repeats_by_seed():
    options = {"seeds": 10, "steps": 60, "inputs": 4, "noise": 0.1}
    tables = [lab.quadrant_table(seed=seed, **options) for seed in (0, 0, 1)]
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


@pytest.mark.parametrize("kept", [(1, 3), (3, 3), (4,), (0,), (2.5,), (-1,)])
def test_bad_levels_are_refused(kept):
    with pytest.raises(ValueError, match="kept"):
        lab.quadrant_table(seed=0, inputs=3, steps=1, seeds=1, kept=kept)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="seeds=0"):
        lab.quadrant_table(seed=0, seeds=0)
    start, _ = random_problem()
    with pytest.raises(ValueError, match="unknown method 'wr'"):
        lab.prune_iteratively(start, start, method="wr", kept=(1,), train=lambda n, m: n)
    table = lab.QuadrantTable(((1, 1, 1),) * 4, 1)
    for cell in ((1, 1, "wr"), (0, 1, "imp")):
        with pytest.raises(ValueError, match="no cell"):
            table.rate(*cell)
