"""HAM's step against a loop over single weights, its symmetries, its limits and its refusals."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight import optim
from featherweight.optim.hyperbolic import CHUNK, hyperbolic_
from featherweight.optim.native import unhooked
from tests.oracles import ham as oracle

SIZE = CHUNK * torch.get_num_threads()
BASES = {
    "sgd": (torch.optim.SGD, oracle.Sgd, {}),
    "momentum": (
        torch.optim.SGD,
        oracle.Sgd,
        {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2},
    ),
    "nesterov": (torch.optim.SGD, oracle.Sgd, {"momentum": 0.8, "nesterov": True}),
    "adamw": (torch.optim.AdamW, oracle.AdamW, {"weight_decay": 0.1}),
}
NATIVE = {torch.optim.SGD: optim.HamSGD, torch.optim.AdamW: optim.HamAdamW}


def wrapped(base, params, lr, alpha, beta=0.0, **options):
    own = {k: options.pop(k) for k in ("direction", "clamp", "weights", "foreach") if k in options}
    return optim.ham(base(params, lr, **options), alpha, beta, **own)


def native(base, params, lr, alpha, beta=0.0, **options):
    return NATIVE[base](params, lr, alpha=alpha, beta=beta, **options)


FORMS = {
    "wrapped": wrapped,
    "wrapped foreach": lambda *a, **o: wrapped(*a, **o, foreach=True),
    "native": native,
    "native unfused": lambda *a, **o: native(*a, **o, fused=False),
    "native foreach": lambda *a, **o: native(*a, **o, foreach=True),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def fed(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def parameter(values):
    return nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("direction", ["gradient", "update"])
def test_every_form_makes_the_steps_of_a_loop_over_single_weights(form, base, direction):
    torch_base, own_base, options = BASES[base]
    start = [0.3, -0.7, 0.0, 2.0, -1e-3, 0.01, -4.0]
    gradients = torch.randn(6, len(start), dtype=torch.float64)
    gradients[:, 6] *= 1e3  # reaches the clamp
    weight = parameter(start)
    ham = form(torch_base, [weight], 0.05, 7.0, 0.3, direction=direction, **options)
    expected = oracle.train(
        own_base(0.05, **options), start, gradients.tolist(), 7.0, 0.3, direction=direction
    )
    assert fed(ham, weight, gradients).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("base", BASES)
def test_without_alpha_and_beta_it_is_the_base_optimizer_to_the_bit(base):
    torch_base, _, options = BASES[base]
    start, gradients = torch.randn(9, 70), torch.randn(5, 9, 70)
    for fused in (False, True):
        plain = nn.Parameter(start.clone())
        expected = fed(torch_base([plain], 0.05, fused=fused, **options), plain, gradients)
        for make in (wrapped, native):
            weight = nn.Parameter(start.clone())
            ham = make(torch_base, [weight], 0.05, 0.0, fused=fused, **options)
            assert torch.equal(fed(ham, weight, gradients), expected)


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)])
def test_without_alpha_the_base_step_is_multiplied_by_one_number(form, lr):
    start, gradient = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    ends = []
    for beta in (0.0, 0.7):
        weight = parameter(start)
        ham = form(torch.optim.SGD, [weight], float(lr), 0.0, beta)
        ham.param_groups[0]["lr"] = lr
        ends.append(fed(ham, weight, [gradient]))
    assert torch.equal(ends[1], ends[0] * math.exp(-0.05 * 0.7))


def test_a_learning_rate_of_zero_changes_nothing(form):
    start = torch.randn(40)
    weight = nn.Parameter(start.clone())
    ham = form(torch.optim.SGD, [weight], 0.0, 200.0, 0.1)
    assert torch.equal(fed(ham, weight, torch.randn(3, 40)), start)


@pytest.mark.parametrize("shape", [(SIZE + 5,), (3, 5, 7, 9), (2 * SIZE,), (), (0,)])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_native_equals_wrapped_fused_for_any_shape_to_the_bit(shape, base):
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    same = {"backend": "torch"} if base is torch.optim.AdamW else {}
    for direction in ("gradient", "update"):
        weights = [nn.Parameter(start.clone()) for _ in range(2)]
        options = {"direction": direction, "fused": True}
        a = wrapped(base, [weights[0]], 0.01, 20.0, 0.1, **options)
        b = native(base, [weights[1]], 0.01, 20.0, 0.1, direction=direction, **same)
        assert torch.equal(fed(a, weights[0], gradients), fed(b, weights[1], gradients))


class Foreign(torch.Tensor):
    """A subclass, as sharded tensors are."""


# The ways through `hyperbolic_`: weight to what it is called with, and foreach.
PATHS = {
    "chunks": lambda weight: (weight, False),
    "foreach": lambda weight: (weight, True),
    "subclass": lambda weight: (weight.as_subclass(Foreign), False),
}


@given(
    st.lists(
        st.tuples(st.floats(-10, 10, width=32), st.floats(width=32, allow_nan=False)),
        min_size=1,
        max_size=20,
    ),
    st.floats(0.0, 1e3),
)
def test_the_factor_keeps_signs_and_zeros_and_is_bounded_by_the_clamp(pairs, alpha):
    weight, gradient = torch.tensor(pairs).T
    for path in PATHS.values():
        moved = weight.clone()
        its, foreach = path(moved)
        hyperbolic_([its], [gradient.clamp(-1e30, 1e30)], -alpha, -0.1, 5.0, foreach)
        assert torch.equal(moved.sign(), weight.sign()) or moved[moved == 0].abs().sum() == 0
        large = weight.abs() > 1e-30
        ratio = (moved.double() / weight.double())[large]
        assert torch.isfinite(moved).all()
        assert ((ratio > math.exp(-5.0) * 0.999) & (ratio < math.exp(5.0) * 1.001)).all()


def test_a_mask_of_exact_zeros_survives_the_hyperbolic_step():
    weight = torch.randn(1000) * (torch.rand(1000) < 0.5)
    moved = weight.clone()
    hyperbolic_([moved], [torch.randn(1000)], -3.0, -0.1, 5.0)
    assert torch.equal(moved == 0, weight == 0)
    assert torch.equal(moved.sign(), weight.sign())


def test_odd_symmetry_permutation_and_concatenation(form):
    start, gradients = torch.randn(60), torch.randn(4, 60)
    order = torch.randperm(60)

    def result(begin, slopes, parts=1):
        weights = [nn.Parameter(piece.clone()) for piece in begin.chunk(parts)]
        ham = form(torch.optim.AdamW, weights, 0.01, 30.0, 0.1)
        for row in slopes:
            for weight, piece in zip(weights, row.chunk(parts), strict=True):
                weight.grad = piece.clone()
            ham.step()
        return torch.cat([weight.detach() for weight in weights])

    once = result(start, gradients)
    close = {"rtol": 3e-6, "atol": 1e-7}
    torch.testing.assert_close(result(-start, -gradients), -once, **close)
    torch.testing.assert_close(result(start[order], gradients[:, order]), once[order], **close)
    torch.testing.assert_close(result(start, gradients, 4), once, **close)


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_scale_covariance(form, c):
    """θ → cθ with η' = c²η, α' = α/c, β' = β/c² maps trajectories onto each other."""
    start = torch.randn(30, dtype=torch.float64)
    target = torch.randn(30, dtype=torch.float64)

    def run(scale):
        weight = parameter(scale * start)
        ham = form(torch.optim.SGD, [weight], 0.05 * scale**2, 4.0 / scale, 0.3 / scale**2)
        for _ in range(20):
            weight.grad = ((weight.detach() / scale - target) / scale).clone()
            ham.step()
        return weight.detach()

    torch.testing.assert_close(run(c) / c, run(1.0), rtol=1e-10, atol=1e-12)


def test_k_hyperbolic_steps_are_one_with_k_times_the_rate():
    weight, gradient = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    many, one = weight.clone(), weight.clone()
    for _ in range(5):
        hyperbolic_([many], [gradient], -0.2, -0.03)
    hyperbolic_([one], [gradient], -1.0, -0.15)
    torch.testing.assert_close(many, one, rtol=1e-14, atol=0)


def test_update_direction_equals_gradient_direction_for_plain_gradient_descent(form):
    start = torch.randn(30, dtype=torch.float64)
    gradients = torch.randn(5, 30, dtype=torch.float64)
    ends = []
    for direction in ("gradient", "update"):
        weight = parameter(start)
        ham = form(torch.optim.SGD, [weight], 0.1, 3.0, 0.2, direction=direction)
        ends.append(fed(ham, weight, gradients))
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-14)


def test_maximize_ascends_where_minimising_the_negative_descends(form):
    start, gradients = torch.randn(30), torch.randn(5, 30)
    for base in (torch.optim.SGD, torch.optim.AdamW):
        up, down = (nn.Parameter(start.clone()) for _ in range(2))
        ascent = form(base, [up], 0.01, 20.0, 0.1, maximize=True)
        descent = form(base, [down], 0.01, 20.0, 0.1)
        assert torch.equal(fed(ascent, up, gradients), fed(descent, down, -gradients))


def test_the_rate_of_the_base_step_counts_not_one_that_a_hook_sets_during_it():
    start, gradient = torch.randn(9), torch.randn(9)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    base = torch.optim.SGD([weights[0]], 0.1)
    base.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=7.0))
    plain = wrapped(torch.optim.SGD, [weights[1]], 0.1, 5.0)
    assert torch.equal(
        fed(optim.ham(base, 5.0), weights[0], [gradient]), fed(plain, weights[1], [gradient])
    )


def test_a_base_that_frees_gradients_in_its_step_is_no_obstacle():
    start, gradient = torch.randn(9), torch.randn(9)
    ends = []
    for frees in (False, True):
        weight = nn.Parameter(start.clone())
        base = torch.optim.SGD([weight], 0.1)
        if frees:
            base.register_step_post_hook(lambda o, *_: o.zero_grad())
        ends.append(fed(optim.ham(base, 5.0), weight, [gradient]))
    assert torch.equal(*ends)


def test_nesterov_of_foreach_writes_to_gradients_and_the_step_uses_them_as_they_were():
    start, gradients = torch.randn(9), torch.randn(4, 9)
    ends = []
    for foreach in (False, True):
        weight = nn.Parameter(start.clone())
        base = torch.optim.SGD([weight], 0.1, momentum=0.9, nesterov=True, foreach=foreach)
        ends.append(fed(optim.ham(base, 5.0), weight, gradients))
    torch.testing.assert_close(*ends)


class Centred(torch.optim.SGD):
    """Changes gradients in place, as some optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.grad.sub_(weight.grad.mean())
        return super().step(closure)


def test_a_base_that_overwrites_gradients_is_refused_unless_updates_are_taken():
    weight = nn.Parameter(torch.randn(9))
    with pytest.raises(RuntimeError, match='direction="update" works'):
        fed(optim.ham(Centred([weight], 0.1), 5.0), weight, torch.randn(1, 9))
    fed(optim.ham(Centred([weight], 0.1), 5.0, direction="update"), weight, torch.randn(1, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_treated_in_float32(dtype):
    weight, gradient = torch.randn(500).to(dtype), torch.randn(500).to(dtype)
    wide = weight.float()
    hyperbolic_([wide], [gradient.float()], -0.3, -0.02, 5.0)
    for path in PATHS.values():
        moved = weight.clone()
        its, foreach = path(moved)
        hyperbolic_([its], [gradient], -0.3, -0.02, 5.0, foreach)
        torch.testing.assert_close(moved, wide.to(dtype), rtol=0, atol=0)


def small_model():
    return nn.Sequential(
        nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)
    )


@pytest.mark.parametrize("make", [wrapped, native])
def test_given_a_model_biases_and_norms_are_left_to_the_base_optimizer(make):
    models = [small_model()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        torch.optim.SGD(models[0].parameters(), 0.1, fused=True),
        make(torch.optim.SGD, models[1].parameters(), 0.1, 5.0, 0.2, weights=models[1], fused=True),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    for (name, plain), moved in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.equal(plain, moved) == (name in {"1.bias", "2.weight", "2.bias"}), name


def test_a_group_with_zeros_is_left_alone_and_names_are_split_along():
    model = small_model()
    base = torch.optim.SGD(list(model.named_parameters()), 0.1)
    ham = optim.ham(base, 5.0, weights=model)
    names = [group["param_names"] for group in ham.param_groups]
    assert names == [["0.weight", "1.weight", "3.weight"], ["1.bias", "2.weight", "2.bias"]]
    assert [group["ham_alpha"] for group in ham.param_groups] == [5.0, 0.0]
    grouped = torch.optim.SGD(
        [{"params": model[1].parameters()}, {"params": model[2].parameters(), "ham_alpha": 0.0}]
    )
    assert [group["ham_alpha"] for group in optim.ham(grouped, 3.0).param_groups] == [3.0, 0.0]


class Values(nn.Module):
    """A layer that keeps its weights as a vector, as truly sparse layers do."""

    parameter_roles = {"values": "weight", "shift": "bias"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.values, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))


def test_weights_are_found_by_type_and_role_never_by_rank():
    model = nn.ModuleDict(
        {
            "sparse": Values(),
            "norm": nn.GroupNorm(2, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "rnn": nn.LSTM(4, 3),
            "conv": nn.Conv2d(1, 2, 3),
        }
    )
    expected = {
        "sparse.values",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "conv.weight",
    }
    assert set(optim.ham_weights(model)) == expected
    assert set(optim.ham_weights(model, include="norm.*", exclude=["rnn.*"])) == {
        "sparse.values",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
        "norm.weight",
        "norm.bias",
    }
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert list(optim.ham_weights(tied)) == ["0.weight"]


def test_parametrised_weights_are_refused_until_the_user_says_what_to_do():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'weight' of a ParametrizedLinear is parametrised"):
        optim.ham_weights(model)
    assert list(optim.ham_weights(model, include="*original1")) == [
        "0.parametrizations.weight.original1",
        "1.weight",
    ]
    with pytest.raises(ValueError, match="'x' fits no parameter"):
        optim.ham_weights(model, include="x")
    with pytest.raises(ValueError, match="no weight that HAM"):
        optim.ham_weights(nn.LayerNorm(3))


def test_alpha_is_suggested_from_the_median_of_what_is_not_zero():
    weights = torch.tensor([0.0, 0.0, -0.1, 0.2, 5.0])
    assert optim.suggest_alpha([weights]) == pytest.approx(15.0)
    assert optim.suggest_alpha([weights * 10]) == pytest.approx(1.5)
    assert optim.suggest_alpha([weights], strength=1.0) == pytest.approx(5.0)
    assert optim.suggest_alpha([weights], strength=0.0) == 0.0
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert optim.suggest_alpha(model) == optim.suggest_alpha([model[0].weight])
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength must be finite"):
            optim.suggest_alpha([weights], strength=bad)
    for nothing in ([], [torch.zeros(3)], [torch.tensor([math.inf])]):
        with pytest.raises(ValueError, match="none is nonzero"):
            optim.suggest_alpha(nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha must be finite"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": 1.0, "beta": math.nan}, "beta must be finite"),
        ({"alpha": 1.0, "clamp": 0.0}, "clamp must be above 0"),
        ({"alpha": 1.0, "direction": "updates"}, "did you mean 'update'"),
        ({"alpha": 1.0, "weights": [torch.zeros(2)]}, "trains none of them"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_touched(options, message):
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    before = copy.deepcopy(base.state_dict())
    for make in (
        lambda: optim.ham(base, **options),
        lambda: optim.HamSGD([nn.Parameter(torch.ones(2))], **options),
        lambda: optim.HamAdamW([nn.Parameter(torch.ones(2))], **options),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert base.state_dict() == before
    assert "ham_alpha" not in base.defaults


def test_what_it_cannot_treat_is_refused():
    weight = nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([weight], 0.1)
    with pytest.raises(TypeError, match="must be a torch optimizer, got Linear"):
        optim.ham(nn.Linear(2, 2), 1.0)
    with pytest.raises(ValueError, match="LBFGS"):
        optim.ham(torch.optim.LBFGS([weight]), 1.0)
    for twice in (optim.ham(sgd, 1.0), optim.HamSGD([weight], alpha=1.0)):
        with pytest.raises(ValueError, match="makes HAM's step already"):
            optim.ham(twice, 1.0)
    with pytest.raises(TypeError, match="complex"):
        optim.ham(torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), 1.0)
    with pytest.raises(TypeError, match="complex"):
        optim.HamSGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], alpha=1.0)
    with pytest.raises(ValueError, match="differentiable"):
        optim.ham(torch.optim.SGD([weight], differentiable=True), 1.0)
    with pytest.raises(ValueError, match="'alpha' is called 'ham_alpha'"):
        optim.ham(torch.optim.SGD([{"params": [weight], "alpha": 0.0}]), 1.0)
    with pytest.raises(ValueError, match="'beta' is called 'ham_beta'"):
        optim.HamAdamW([{"params": [weight], "beta": 0.0}], alpha=1.0)
    with pytest.raises(ValueError, match="alpha must be finite"):
        optim.ham(torch.optim.SGD([{"params": [weight], "ham_alpha": -1.0}]), 1.0)
    scheduled = torch.optim.SGD(small_model().parameters(), 0.1)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda _: 1.0)
    with pytest.raises(ValueError, match="before a scheduler is made"):
        optim.ham(scheduled, 1.0, weights=list(scheduled.param_groups[0]["params"])[:1])


def test_a_step_without_torchs_hooks_runs_none():
    weight, seen = nn.Parameter(torch.ones(2)), []
    base = torch.optim.AdamW([weight], 0.1)  # making one wraps the class's step
    base.register_step_post_hook(lambda *_: seen.append(1))
    weight.grad = torch.ones(2)
    assert hasattr(torch.optim.AdamW.step, "hooked")
    unhooked(torch.optim.AdamW.step)(base)
    assert not seen
    assert (weight < 1).all()
    assert unhooked(unhooked(torch.optim.AdamW.step)) is unhooked(torch.optim.AdamW.step)


def test_an_optimizer_with_an_alpha_of_its_own_keeps_it():
    weight = nn.Parameter(torch.ones(2))
    ham = optim.ham(torch.optim.RMSprop([weight], 0.01, alpha=0.8), 5.0)
    assert ham.param_groups[0]["alpha"] == 0.8
    assert fed(ham, weight, torch.ones(1, 2)).isfinite().all()
