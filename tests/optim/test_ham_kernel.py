"""HamAdamW's compiled pass against torch's own AdamW followed by HAM, and against float64."""

import numpy as np
import pytest
import torch

from featherweight import optim

numba = pytest.importorskip("numba")

from featherweight.optim import ham_kernel  # noqa: E402  (needs numba)


def weights(seed=0, scale=0.02, shape=(37, 211), memory_format=None):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=generator) * scale for size in (shape, (64, 3, 5, 5))]
    if memory_format is not None:
        drawn[1] = drawn[1].to(memory_format=memory_format)
    return [torch.nn.Parameter(tensor) for tensor in drawn]


def train(parameters, optimizer, steps=6, size=1e-2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            drawn = size * torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(drawn)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


# Small, mixed, clamped exponents; the last are stable for one step alone.
@pytest.mark.parametrize(("alpha", "steps"), [(20.0, 6), (2e3, 6), (2e6, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 3.0, "weight_decay": 0.1},
        {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-4},
        {"clamp": 0.5},
    ],
)
def test_equals_torch_to_rounding(alpha, steps, options):
    found, expected = weights(), weights()
    kept = {"lr": 1e-3, "alpha": alpha, **options}
    train(found, optim.HamAdamW(found, **kept), steps)
    train(expected, optim.HamAdamW(expected, backend="torch", **kept), steps)
    for ours, its in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=2e-5, atol=2e-8)


@pytest.mark.parametrize("exponent", [0.0, 1e-7, 1e-3, 1 / 33, 1 / 31, 0.2, 0.5, 4.9, 100.0])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_factor_is_exact_to_rounding(exponent, side):
    w = np.linspace(-2, 2, 1000, dtype=np.float32)
    gradient = np.full(1000, side * exponent, dtype=np.float32)
    moments = [np.zeros(1000, np.float32) for _ in range(2)]
    # Without a learning rate the step is the factor alone.
    scalars = (0.1, 0.9, 0.1, 0.0, 1.0, 1e-8, 1.0, 1.0, 1.0, 0.0, 5.0)
    found = w.copy()
    ham_kernel.step(found, gradient, *moments, *map(np.float32, scalars))
    exponents = np.clip(np.sign(w.astype(np.float64)) * gradient.astype(np.float64), -5, 5)
    expected = w.astype(np.float64) * np.exp(exponents)
    exact = 1.2e-7 if exponent < 1 / 32 else 1.2e-6
    np.testing.assert_allclose(found, expected, rtol=exact, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (513,), (3, 5, 7, 9)])
def test_any_shape(shape):
    start = torch.randn(shape)
    found, expected = (torch.nn.Parameter(start.clone()) for _ in range(2))
    train([found], optim.HamAdamW([found], alpha=20.0, beta=0.1))
    train([expected], optim.HamAdamW([expected], alpha=20.0, beta=0.1, backend="torch"))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-8)


def test_threads_change_no_bit():
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        own = weights(shape=(700, 900))
        found.append(train(own, optim.HamAdamW(own, lr=1e-3, alpha=2e3), steps=2))
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_layout_of_memory_changes_nothing():
    plain, turned = weights(), weights(memory_format=torch.channels_last)
    train(plain, optim.HamAdamW(plain, lr=1e-3, alpha=50.0))
    train(turned, optim.HamAdamW(turned, lr=1e-3, alpha=50.0))
    assert torch.equal(plain[1], turned[1])


def test_zero_weights_that_do_not_move_stay_zero():
    own = weights()
    optimizer = optim.HamAdamW(own, lr=1e-3, alpha=50.0)
    with torch.no_grad():
        own[0][::2] = 0
    for parameter in own:
        parameter.grad = torch.ones_like(parameter)
    own[0].grad[::2] = 0
    optimizer.step()
    assert not own[0][::2].any()
    assert own[0][1::2].all()


def test_nan_gradients_are_not_hidden():
    own = weights()
    optimizer = optim.HamAdamW(own, lr=1e-3, alpha=50.0)
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    own[0].grad[3, 3] = torch.nan
    optimizer.step()
    assert own[0][3, 3].isnan()
    assert int(own[0].isnan().sum()) == 1


def test_in_place_writes_are_noticed_by_autograd():
    own = weights()
    before = [parameter._version for parameter in own]
    train(own, optim.HamAdamW(own, lr=1e-3, alpha=50.0), steps=1)
    assert all(p._version > version for p, version in zip(own, before, strict=True))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        optim.HamAdamW(weights(), alpha=1.0, backend="fast")
