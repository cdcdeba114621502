"""OptRot: its objectives, what they leave out, and learning on small decoders."""

import copy

import pytest
import torch

from featherweight.quant.cayley import Angle, Clipped
from featherweight.quant.decoder import read_decoder
from featherweight.quant.gptq import gptq_matrix, ldl_diagonal
from featherweight.quant.grid import Grid
from featherweight.quant.hadamard import random_orthogonal
from featherweight.quant.objective import (
    OBJECTIVES,
    Objective,
    group_norms,
    largest,
    quartic,
    sources,
)
from featherweight.quant.optrot import learn_rotation, optrot, value_gradient
from featherweight.quant.rotate import Rotation, draw_rotation, orthogonality_error, rotate
from tests.quant import tiny


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stored_fourth_power(model):
    """Sum of fourth powers of all block matrices as they are stored."""
    decoder = read_decoder(model)
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    views = (m.view() for b in decoder.blocks for m in b.matrices() if m.kind in kinds)
    return sum(view.double().pow(4).sum().item() for view in views)


# The objective


@pytest.mark.parametrize("kind", ["llama", "llama-head-dim", "phi3", "gemma", "qwen3-moe"])
def test_objective_is_the_fourth_power_of_the_rotated_model(kind):
    model = tiny.build(kind)
    rotation = draw_rotation(model, "haar", seed=1)
    parts = sources(read_decoder(model), rotation.values)
    found = Objective(parts, "l4").value(rotation.residual.float())
    assert found == pytest.approx(stored_fourth_power(rotate(model, rotation)), rel=1e-5)


def test_gradient_of_fourth_powers():
    rows = torch.randn(3, 20, 6, dtype=torch.float64)
    weights = torch.rand(3, 20, dtype=torch.float64)
    rotation = torch.randn(3, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = (weights[..., None] * (rows @ rotation).pow(4)).sum()
    value, gradient = quartic(rows, rotation.detach(), weights)
    assert value == pytest.approx(expected.item())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, rotation)[0])


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gradient_of_group_norms(writes, group_size):
    rows = torch.randn(20, 8, dtype=torch.float64)
    rotation = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    stored = (rows @ rotation).T if writes else rows @ rotation  # rows are quantised rows
    groups = stored.reshape(-1, group_size or stored.shape[1])
    expected = groups.pow(4).sum(1).sqrt().sum()
    value, gradient = group_norms(rows, rotation.detach(), writes, group_size)
    assert value == pytest.approx(expected.item())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, rotation)[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_signed_permutations_change_nothing_between_rows(name):
    model = tiny.build()
    objective = Objective(sources(read_decoder(model)), name)
    rotation = random_orthogonal(64, seed=0).float()
    signed = torch.eye(64)[torch.randperm(64)] * (1 - 2 * torch.randint(0, 2, (64,)))
    assert objective.value(rotation @ signed) == pytest.approx(objective.value(rotation), rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_are_unbiased(name):
    objective = Objective(sources(read_decoder(tiny.build())), name)
    rotation = random_orthogonal(64, seed=0).float()
    whole = [objective.of(source, rotation) for source in objective.parts]
    gradient = torch.stack([one[1] for one in whole]).sum(0)
    draws, source = 300, generator()
    samples = [objective.sampled(rotation, 250, source) for _ in range(draws)]
    mean = sum(value for value, _ in samples) / draws
    assert mean == pytest.approx(objective.value(rotation), rel=0.03)
    found = torch.stack([slope for _, slope in samples]).mean(0)
    assert (found - gradient).norm() < 0.15 * gradient.norm()


def test_row_and_matrix_weights_do_not_see_scale():
    rotation = random_orthogonal(64, seed=0).float()
    for name in ("l4_matrix", "l4_row"):
        model = tiny.build()
        before = Objective(sources(read_decoder(model)), name).value(rotation)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data *= 10
        after = Objective(sources(read_decoder(model)), name).value(rotation)
        assert after == pytest.approx(before, rel=1e-4)


def test_the_largest_matrices_are_those_with_the_largest_rows():
    model = tiny.build()
    model.model.layers[1].self_attn.k_proj.weight.data *= 100
    model.model.layers[0].mlp.down_proj.weight.data *= 50
    parts = sources(read_decoder(model))
    kept = largest(parts, 2, torch.eye(64))
    assert [parts[i].kind for i in kept] == ["down", "k"]
    learned = learn_rotation(model, steps=5, matrices=2)
    assert set(learned.shares) == {"down", "k"}


def test_objective_names():
    with pytest.raises(ValueError, match="unknown rotation objective 'l5'"):
        learn_rotation(tiny.build(), objective="l5")


# Learning


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["llama-biases", "phi3", "mixtral"])
def test_learning_lowers_every_objective(kind, name):
    model = tiny.build(kind)
    before = copy.deepcopy(model.state_dict())
    learned = learn_rotation(model, steps=40, rows=300, objective=name, value_steps=20)
    assert learned.end < 0.95 * learned.start
    assert sum(learned.shares.values()) == pytest.approx(1)
    assert len(learned.history) == 40
    assert orthogonality_error(learned.rotation.residual) < 1e-6
    assert orthogonality_error(learned.rotation.values) < 1e-6
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_groups_count_in_the_group_aware_objective():
    whole = learn_rotation(tiny.build(), steps=0, objective="l4_sq")
    groups = learn_rotation(tiny.build(), steps=0, objective="l4_sq", group_size=32)
    assert groups.start != whole.start


def test_optrot_beats_haar_in_the_stored_weights_and_keeps_the_function():
    model = tiny.exact(tiny.build("qwen3", dtype=torch.float64))
    haar, logits = copy.deepcopy(model), tiny.logits(model, tiny.ids())
    rotate(haar, draw_rotation(haar, "haar", seed=0))
    optrot(model, steps=60)
    assert stored_fourth_power(model) < 0.9 * stored_fourth_power(haar)
    torch.testing.assert_close(tiny.logits(model, tiny.ids()), logits, rtol=0, atol=1e-4)


def test_r2_alone_lowers_its_objective():
    decoder = read_decoder(tiny.build("llama-head-dim"))
    start = draw_rotation(decoder.model, "haar", seed=0)
    learned = learn_rotation(decoder.model, steps=0, rounds=1, start=start)
    gradient = value_gradient(decoder, start.residual.float(), "l4")
    before, after = gradient(start.values.float())[0], gradient(learned.rotation.values.float())[0]
    assert after < 0.95 * before
    torch.testing.assert_close(learned.rotation.residual, start.residual, rtol=0, atol=1e-6)


def test_r2_gradient_by_autograd():
    model = tiny.build("phi3")
    decoder, residual = read_decoder(model), random_orthogonal(64, seed=0).float()
    values = torch.stack([random_orthogonal(16, seed=i) for i in range(2)]).float()
    value, gradient = value_gradient(decoder, residual, "l4")(values)
    parts = sources(decoder, values)
    objective = Objective([part for part in parts if part.kind in "vo"], "l4")
    assert value == pytest.approx(objective.value(residual), rel=1e-4)
    step = 1e-3 * torch.randn_like(values)
    moved = value_gradient(decoder, residual, "l4")(values + step)[0]
    assert moved - value == pytest.approx((gradient * step).sum().item(), rel=0.05)


def test_the_papers_step_rule_also_descends_and_ignores_its_rate():
    model = tiny.build()
    for parameter in model.model.layers.parameters():
        parameter.data *= 10  # gradients grow a thousandfold: the clip always decides
    one, other = (learn_rotation(model, steps=30, rule=Clipped(lr), rows=2000) for lr in (1.0, 0.1))
    assert one.end < 0.95 * one.start
    assert one.history == other.history


def test_learning_is_repeatable_and_begins_at_a_hadamard():
    model = tiny.build()
    one, same = (learn_rotation(model, steps=10, seed=4) for _ in range(2))
    assert torch.equal(one.rotation.residual, same.rotation.residual)
    start = learn_rotation(model, steps=0, value_steps=0, seed=4).rotation.residual
    torch.testing.assert_close(start.abs(), torch.full((64, 64), 1 / 8).double(), rtol=0, atol=1e-6)


def test_progress_tells_every_step():
    seen = []
    learn_rotation(tiny.build(), steps=5, value_steps=3, rounds=2, progress=seen.append)
    assert [p.stage for p in seen] == ["R2"] * 3 + ["R1"] * 3 + ["R2"] * 3 + ["R1"] * 2
    assert [p.step for p in seen[:6]] == [0, 1, 2, 0, 1, 2]
    assert all(p.objective > 0 for p in seen)


def test_table_of_shares():
    table = learn_rotation(tiny.build(), steps=3).table()
    assert "objective" in table.splitlines()[0]
    assert len(table.splitlines()) == 8


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"rows": 0}, {"rounds": 0}, {"value_steps": -1}, {"matrices": 0}],
)
def test_bad_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must"):
        learn_rotation(tiny.build(), **options)


def test_random_rows_have_the_kurtosis_of_the_sphere():
    """Under a Haar rotation row kurtosis is 3 d / (d + 2), from 1 to d without it."""
    rows = torch.randn(2000, 64, dtype=torch.float64) ** 3
    turned = rows @ random_orthogonal(64, seed=0)
    kurtosis = 64 * turned.pow(4).sum(1) / turned.pow(2).sum(1).pow(2)
    assert kurtosis.mean().item() == pytest.approx(3 * 64 / 66, rel=0.02)
    assert kurtosis.min() >= 1


def test_none_haar_optrot_in_gptq_loss():
    """What GPTQ loses, and what tr D and row maxima predict, with planted outlier channels."""
    model = tiny.build()
    for layer in model.model.layers:
        readers = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        for matrix in (*readers, layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight.data[:, 5] *= 12
    mix = torch.randn(256, 64)
    hessian = (mix.T @ mix / 256).double()
    rows = torch.cat([s.take() for s in sources(read_decoder(model)) if not s.writes])

    def losses(rotation):
        turned, weight = rotation.T @ hessian @ rotation, rows @ rotation.float()
        found = gptq_matrix(weight, turned.float(), Grid(4, clip=False)).quantized
        difference = (found.dequantize() - weight).double()
        predicted = ldl_diagonal(turned).sum() * weight.abs().amax(1).pow(2).sum()
        return torch.sum(difference * (difference @ turned)).item(), predicted.item()

    none = losses(torch.eye(64, dtype=torch.float64))
    haar = losses(draw_rotation(model, "haar", seed=0).residual)
    learned = losses(learn_rotation(model, steps=150, rule=Angle()).rotation.residual)
    for one, two, three in zip(none, haar, learned, strict=True):
        assert one > 1.5 * two
        assert two > 1.05 * three


def test_a_given_start_must_fit():
    other = Rotation(torch.eye(32).double(), torch.eye(16).repeat(2, 1, 1).double())
    with pytest.raises(ValueError, match="rotation is for"):
        learn_rotation(tiny.build(), start=other, steps=1)
