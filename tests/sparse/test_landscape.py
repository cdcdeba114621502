"""Barriers against hand-made lines; curvature against the whole Hessian."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from featherweight import sparse
from featherweight.sparse.curvature import Hessian, hessian_trace, lanczos, largest_eigenvalue
from featherweight.sparse.landscape import Barrier, error_barrier
from tests.models import mlp, train_steps
from tests.oracles.landscape import losses_on_a_line, statistics_of, whole_hessian


def state_of(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(t, second[n]) for n, t in first.items())


def loss_on(inputs, targets):
    def evaluate(model):
        with torch.no_grad():
            return cross_entropy(model(inputs), targets).item()

    return evaluate


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 16, generator=generator), torch.arange(40) % 4


class TestBarrier:
    def test_against_a_line_by_hand(self, data):
        evaluate = loss_on(*data)
        first, second = state_of(mlp(norm=False, seed=1)), state_of(mlp(norm=False, seed=2))
        model = mlp(norm=False)
        found = error_barrier(model, first, second, evaluate, points=5)
        alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
        losses = losses_on_a_line(lambda: mlp(norm=False), first, second, alphas, evaluate)
        assert found.alphas == tuple(alphas)
        assert found.losses == pytest.approx(losses, rel=1e-5)
        chord = [(1 - a) * losses[0] + a * losses[-1] for a in alphas]
        highest = max(loss - c for loss, c in zip(losses, chord, strict=True))
        assert found.height == pytest.approx(highest, abs=1e-6)

    def test_ends_are_the_solutions_bitwise(self, data):
        evaluate = loss_on(*data)
        models = [mlp(seed=1), mlp(seed=2)]
        for model in models:
            train_steps(model, torch.optim.SGD(model.parameters(), 0.1))
        found = error_barrier(mlp(), *map(state_of, models), evaluate, points=3)
        ends = [evaluate(model.eval()) for model in models]
        assert [found.losses[0], found.losses[-1]] == ends

    def test_a_known_barrier(self):
        """L = (w^2 - 1)^2 has minima at -1 and 1 and height 1 in between."""
        model = nn.Linear(1, 1, bias=False)
        first, second = ({"weight": torch.tensor([[w]])} for w in (-1.0, 1.0))

        def evaluate(net):
            return (net.weight.item() ** 2 - 1) ** 2

        found = error_barrier(model, first, second, evaluate, points=[0, 0.1, 0.5, 1])
        assert found.height == pytest.approx(1)
        assert error_barrier(model, first, first, evaluate).height == 0

    def test_the_chord_is_taken_off(self):
        assert Barrier((0.0, 0.5, 1.0), (2.0, 3.0, 4.0)).height == 0
        assert Barrier((0.0, 0.25, 1.0), (4.0, 4.5, 0.0)).height == 1.5
        assert Barrier((0.0, 0.5, 1.0), (1.0, 0.0, 1.0)).height == 0

    def test_statistics_are_interpolated_or_estimated(self, data):
        inputs, _ = data
        model = nn.Sequential(nn.Linear(16, 3), nn.BatchNorm1d(3, momentum=0.37))
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model[0].reset_parameters()
            model[1].running_mean.fill_(seed)
            model[1].num_batches_tracked.fill_(seed)
            states.append(state_of(model))
        seen = []

        def evaluate(net):
            seen.append((state_of(net), net.training))
            return 0.0

        error_barrier(model, *states, evaluate, points=3)
        assert [float(s["1.running_mean"][0]) for s, _ in seen] == [1, 1.5, 2]
        assert all(int(s["1.num_batches_tracked"]) == 1 for s, _ in seen)
        seen.clear()
        loader = [(inputs, "targets are not looked at")]
        error_barrier(model, *states, evaluate, points=3, recalibrate=loader)
        assert len(seen) == 3
        for state, training in seen:
            assert not training
            with torch.no_grad():
                hidden = inputs @ state["0.weight"].T + state["0.bias"]
            mean, variance = statistics_of(hidden)
            assert torch.allclose(state["1.running_mean"], mean, atol=1e-5)
            assert torch.allclose(state["1.running_var"], variance, rtol=1e-4)
        seen.clear()
        error_barrier(
            model, *states, evaluate, points=3, recalibrate=lambda m: m[1].running_mean.fill_(7)
        )
        assert all((s["1.running_mean"] == 7).all() for s, _ in seen)

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_the_model_is_as_before(self, data, fails, training):
        model = mlp().train(training)
        model[1].eval()
        before, modes = state_of(model), [m.training for m in model.modules()]
        momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)]

        def evaluate(net):
            net.train()
            net(data[0])  # disturbs running statistics
            return 0.0

        batches = [data[0], torch.ones(3, 3)] if fails else [data[0]]  # the second does not fit
        states = state_of(mlp(seed=1)), state_of(mlp(seed=2))
        if fails:
            with pytest.raises(RuntimeError):
                error_barrier(model, *states, evaluate, recalibrate=batches)
        else:
            error_barrier(model, *states, evaluate, recalibrate=batches)
        assert same(before, model.state_dict())
        assert [m.training for m in model.modules()] == modes
        assert momenta == [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)]

    @pytest.mark.parametrize("points", [1, 0, [0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.5, 1.0]])
    def test_bad_points(self, points):
        state = state_of(mlp())
        with pytest.raises(ValueError, match="points must"):
            error_barrier(mlp(), state, state, lambda _: 0.0, points=points)

    def test_what_does_not_fit_is_refused(self):
        state = state_of(mlp())
        lacking = {n: t for n, t in state.items() if n != "6.bias"}
        with pytest.raises(ValueError, match=r"second does not fit: '6.bias'"):
            error_barrier(mlp(), state, lacking, lambda _: 0.0)
        with pytest.raises(ValueError, match=r"first does not fit: '0.weight' has shape"):
            error_barrier(mlp(), state_of(mlp(8)), state, lambda _: 0.0)
        with pytest.raises(TypeError, match="gone through again"):
            error_barrier(mlp(), state, state, lambda _: 0.0, recalibrate=iter([torch.ones(2, 16)]))


def smooth(seed=0, norm=False):
    """Return a tiny network without kinks, in float64."""
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()


def small_batches(sizes=(6, 3)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3)
        for n in sizes
    ]


def columns(hessian):
    return torch.stack([hessian @ column for column in torch.eye(hessian.size).double()])


class TestHessian:
    def test_products_against_the_whole_matrix(self):
        model, batches = smooth(), small_batches()
        names = [name for name, _ in model.named_parameters()]
        expected = whole_hessian(model, batches, names)
        found = columns(Hessian(model, batches))
        assert expected.shape == (43, 43)
        assert torch.allclose(found, expected, atol=1e-12)

    def test_masked_coordinates(self):
        model, batches = smooth(), small_batches()
        masks = sparse.random(model, 0.4, seed=0)
        masks.apply_(model)
        names = [name for name, _ in model.named_parameters()]
        expected = whole_hessian(model, batches, names, kept=masks)
        hessian = Hessian(model, batches, masks=masks)
        assert hessian.size == masks.nonzeros + 8 == len(expected)
        assert torch.allclose(columns(hessian), expected, atol=1e-12)

    @pytest.mark.parametrize("include", ["2.*", ["0.bias", "2.weight"]])
    def test_chosen_parameters(self, include):
        model, batches = smooth(), small_batches()
        names = ["2.weight", "2.bias"] if include == "2.*" else include
        expected = whole_hessian(model, batches, names)
        assert torch.allclose(columns(Hessian(model, batches, include=include)), expected)

    def test_frozen_parameters_are_no_coordinates(self):
        model, batches = smooth(), small_batches()
        model[0].requires_grad_(False)
        expected = whole_hessian(model, batches, ["2.weight", "2.bias"])
        assert torch.allclose(columns(Hessian(model, batches)), expected)

    @pytest.mark.parametrize("batch_statistics", [False, True])
    def test_norms_in_either_mode(self, batch_statistics):
        model, batches = smooth(norm=True), small_batches()
        model[1].running_var.fill_(3)
        names = [name for name, _ in model.named_parameters()]
        hessian = Hessian(model, batches, batch_statistics=batch_statistics)
        expected = whole_hessian(copy.deepcopy(model).train(batch_statistics), batches, names)
        assert torch.allclose(columns(hessian), expected, atol=1e-10)

    def test_the_model_is_as_before(self):
        model = mlp().train()
        before, random_state = state_of(model), torch.get_rng_state()
        batches = [(torch.randn(6, 16), torch.arange(6) % 4)]
        random_state = torch.get_rng_state()
        largest_eigenvalue(model, batches, batch_statistics=True, seed=0, iterations=3)
        hessian_trace(model, batches, samples=2, seed=0)
        assert same(before, model.state_dict())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert model.training
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_a_linear_loss_has_none(self):
        model = smooth()[2:]
        objective = lambda out, _: out.mean()  # noqa: E731
        batches = [(torch.randn(4, 5).double(), torch.zeros(4))]
        hessian = Hessian(model, batches, objective=objective)
        assert not columns(hessian).any()
        found = largest_eigenvalue(model, batches, objective=objective, seed=0)
        assert (found.value, found.error) == (0, 0)

    def test_bad_arguments(self):
        model, batches = smooth(), small_batches()
        with pytest.raises(ValueError, match="at least one pair"):
            Hessian(model, [])
        with pytest.raises(ValueError, match="masks do not fit"):
            Hessian(model, batches, masks=sparse.random(mlp(8), 0.5, seed=0))
        with pytest.raises(ValueError, match="no parameter to differentiate by"):
            Hessian(model, batches, include=["nothing"])
        empty = sparse.Masks({"0.weight": torch.zeros(5, 4, dtype=torch.bool)})
        with pytest.raises(ValueError, match="keep no coordinate"):
            Hessian(model, batches, masks=empty, include=["0.weight"])
        with pytest.raises(ValueError, match=r"vector must have shape \[43\], got \[3\]"):
            Hessian(model, batches) @ torch.ones(3)
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinity"):
            Hessian(model, batches) @ torch.ones(43).double()


class TestLargestEigenvalue:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_against_the_whole_matrix(self, masked, seed):
        model, batches = smooth(seed), small_batches()
        masks = sparse.random(model, 0.4, seed=0) if masked else None
        names = [name for name, _ in model.named_parameters()]
        expected = torch.linalg.eigvalsh(whole_hessian(model, batches, names, kept=masks))
        found = largest_eigenvalue(model, batches, masks=masks, tolerance=1e-9, seed=seed)
        assert float(found) == pytest.approx(float(expected[-1]), rel=1e-8)
        assert found.error <= 1e-8 * found.value
        assert found.products <= len(expected)

    def test_large_negative_curvature_is_not_taken_for_it(self):
        model, batches = smooth(), small_batches()
        names = [name for name, _ in model.named_parameters()]
        minus = lambda out, y: -mse_loss(out, nn.functional.one_hot(y, 3).double())  # noqa: E731
        matrix = whole_hessian(model, batches, names, objective=minus)
        expected = torch.linalg.eigvalsh(matrix)
        assert -expected[0] > 3 * expected[-1] > 0
        found = largest_eigenvalue(model, batches, objective=minus, tolerance=1e-8, seed=0)
        assert found.value == pytest.approx(float(expected[-1]), rel=1e-6)

    @pytest.mark.parametrize(
        "values", [[3.0], [-2.0, -1.0], [5.0, 5.0, 5.0, -9.0], [0.0, 0.0], list(range(-50, 30))]
    )
    def test_lanczos_on_known_spectra(self, values):
        size = len(values)
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator).double())
        matrix = basis @ torch.diag(torch.tensor(values).double()) @ basis.T
        start = torch.randn(size, generator=generator).double()
        found = lanczos(lambda v: matrix @ v, start, 1e-9, 200)
        assert found.value == pytest.approx(max(values), abs=1e-6)

    def test_an_exhausted_subspace_ends_the_search(self):
        """A largest eigenvalue of zero never meets a relative tolerance."""
        scales = torch.tensor([-9.0] * 3 + [0.0] * 47).double()
        found = lanczos(lambda v: scales * v, torch.linspace(1, 2, 50).double(), 1e-9, 50)
        assert abs(found.value) < 1e-12
        assert found.products <= 4

    def test_error_bounds_the_distance(self):
        model, batches = smooth(), small_batches()
        names = [name for name, _ in model.named_parameters()]
        spectrum = torch.linalg.eigvalsh(whole_hessian(model, batches, names))
        for iterations in (1, 2, 3, 5):
            found = largest_eigenvalue(
                model, batches, seed=0, iterations=iterations, tolerance=1e-12
            )
            assert found.products == iterations
            assert float((spectrum - found.value).abs().min()) <= found.error + 1e-12
            assert found.error > 0

    def test_bad_arguments(self):
        for options, message in (
            ({"seed": 0, "iterations": 0}, "iterations must be at least 1"),
            ({"seed": 0, "tolerance": 0.0}, "tolerance must be over 0"),
            ({}, "exactly one of seed= and generator="),
        ):
            with pytest.raises(ValueError, match=message):
                largest_eigenvalue(smooth(), small_batches(), **options)


class TestTrace:
    def test_against_the_whole_matrix(self):
        model, batches = smooth(), small_batches()
        masks = sparse.random(model, 0.4, seed=0)
        names = [name for name, _ in model.named_parameters()]
        expected = float(whole_hessian(model, batches, names, kept=masks).trace())
        found = hessian_trace(model, batches, masks=masks, samples=400, seed=0)
        assert abs(float(found) - expected) < 4 * found.error
        assert found.error < 0.1 * expected
        assert found.products == 400

    def test_exact_where_the_hessian_is_diagonal(self):
        """L = sum(w_i^2 c_i) / 2 has the diagonal c."""
        model = nn.Linear(3, 1, bias=False).double()
        scales = torch.tensor([1.0, -2.0, 7.0]).double()
        batches = [(torch.eye(3).double(), torch.zeros(3))]  # outputs are the weights
        quadratic = lambda out, _: (out[:, 0] ** 2 * scales).sum() / 2  # noqa: E731
        found = hessian_trace(model, batches, objective=quadratic, samples=2, seed=0)
        assert found.value == pytest.approx(6.0)
        assert found.error == pytest.approx(0, abs=1e-9)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="samples must be at least 2"):
            hessian_trace(smooth(), small_batches(), samples=1, seed=0)
        with pytest.raises(ValueError, match="exactly one of seed= and generator="):
            hessian_trace(smooth(), small_batches())
