"""OptRot+: its loss against the theory, and what it learns on small decoders."""

import copy

import pytest
import torch

from featherweight.quant.calibrate import SITES, collect, transport
from featherweight.quant.decoder import read_decoder
from featherweight.quant.objective import Objective, sources
from featherweight.quant.optrot import learn_rotation
from featherweight.quant.optrot_plus import damped_trace, learn_rotation_plus, optrot_plus
from featherweight.quant.rotate import draw_rotation, orthogonality_error, rotate
from tests.quant import tiny


@pytest.fixture(scope="module")
def calibrated():
    model = tiny.build("llama-biases")
    return model, collect(model, tiny.ids(16, 32, seed=1))


def plus(model, hessians, start, **options):
    return learn_rotation_plus(model, hessians, start=start, **options)


def isotropic(hessians):
    return [{site: 2.0 * torch.eye(len(layer[site])) for site in SITES} for layer in hessians]


def test_with_independent_inputs_the_loss_is_the_norm_of_rows(calibrated):
    """H = c I: tr D is the same number everywhere, up to the width of each site."""
    model, hessians = calibrated
    start = draw_rotation(model, "haar", seed=0)
    learned = plus(model, isotropic(hessians), start, steps=0)
    parts = sources(read_decoder(model), start.values.float())
    objective, expected = Objective(parts, "l4_sq"), 0.0
    for part in parts:
        width = part.weight.shape[1]
        expected += 2.0 * 1.01 * width * objective.of(part, start.residual.float())[0]
    assert learned.start == pytest.approx(expected, rel=1e-4)


def test_the_trace_is_bounded_and_invariant_for_scaled_identities():
    hessian = torch.randn(100, 12, dtype=torch.float64)
    hessian = hessian.T @ hessian
    ridge = 0.01 * hessian.diagonal().mean()
    damped = hessian + ridge * torch.eye(12, dtype=torch.float64)
    trace = damped_trace(hessian, 0.01).item()
    assert 12 * torch.exp(torch.logdet(damped) / 12).item() <= trace <= damped.trace().item()
    assert damped_trace(3.0 * torch.eye(5), 0.01).item() == pytest.approx(5 * 3.03)


@pytest.mark.parametrize("static", [False, True])
def test_learning_lowers_the_loss_and_leaves_the_model(calibrated, static):
    model, hessians = calibrated
    before = copy.deepcopy(model.state_dict())
    start = learn_rotation(model, steps=30).rotation
    learned = plus(model, hessians, start, steps=40, static=static)
    assert learned.end < 0.99 * learned.start
    assert orthogonality_error(learned.rotation.residual) < 1e-6
    assert torch.allclose(learned.rotation.values, start.values)
    assert sum(learned.shares.values()) == pytest.approx(1)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_only_the_full_loss_lowers_the_trace(calibrated):
    model, hessians = calibrated
    start = draw_rotation(model, "hadamard", seed=0)

    def trace(rotation):
        turned = transport(hessians, rotation.residual.float(), rotation.values.float())
        return sum(damped_trace(layer[site], 0.01).item() for layer in turned for site in ("mlp",))

    full, static = (plus(model, hessians, start, steps=60, static=s) for s in (False, True))
    assert trace(full.rotation) < 0.98 * trace(start)
    assert trace(full.rotation) < trace(static.rotation)


def test_sampled_layers_are_unbiased(calibrated):
    """With all layers a step's value is exact; with one, right on average."""
    model, hessians = calibrated
    start = draw_rotation(model, "haar", seed=0)
    values = []
    for seed in range(60):
        learned = plus(model, hessians, start, steps=1, layers=1, seed=seed)
        values.append(learned.history[0])
    assert sum(values) / 60 == pytest.approx(learned.start, rel=1e-3)  # drawn by loss: no variance
    assert plus(model, hessians, start, steps=1).history[0] == pytest.approx(
        learned.start, rel=1e-5
    )


def test_groups_and_damping_count(calibrated):
    model, hessians = calibrated
    start = draw_rotation(model, "haar", seed=0)
    plain = plus(model, hessians, start, steps=0).start
    assert plus(model, hessians, start, steps=0, group_size=32).start != plain
    assert plus(model, hessians, start, steps=0, damping=0.5).start > plain


def test_fused_from_token_ids_it_keeps_the_function():
    model = tiny.exact(tiny.build("gemma", dtype=torch.float64))
    before = tiny.logits(model, tiny.ids())
    seen = []
    start = draw_rotation(model, "hadamard", seed=0)
    optrot_plus(model, tiny.ids(8, 32), steps=3, start=start, progress=seen.append)
    torch.testing.assert_close(tiny.logits(model, tiny.ids()), before, rtol=0, atol=1e-4)
    assert [p.stage for p in seen] == ["OptRot+"] * 3


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"layers": 0}, {"damping": 0.0}, {"damping": 1.5}]
)
def test_bad_options(calibrated, options):
    model, hessians = calibrated
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must"):
        learn_rotation_plus(model, hessians, **options)


def test_hessians_of_another_model_are_refused(calibrated):
    model, hessians = calibrated
    with pytest.raises(ValueError, match="calibration has 1 layers, model 2"):
        learn_rotation_plus(model, hessians[:1])


def test_experts_are_refused():
    with pytest.raises(ValueError, match="has experts, each with inputs of its own"):
        optrot_plus(tiny.build("mixtral"), tiny.ids())


# Statistics under a rotation


@pytest.mark.parametrize("kind", ["llama-biases", "phi3", "gemma", "qwen3"])
def test_statistics_turn_with_the_model(kind):
    model, ids = tiny.build(kind), tiny.ids(8, 32)
    rotation = draw_rotation(model, "haar", seed=0)
    expected = transport(collect(model, ids), rotation.residual, rotation.values)
    found = collect(rotate(model, rotation), ids)
    for one, other in zip(expected, found, strict=True):
        for site in SITES:
            assert (one[site] - other[site]).norm() < 1e-4 * other[site].norm(), site
