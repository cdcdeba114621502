"""Perplexity, divergence, errors and tails against closed forms; plots; simulated activations."""

import copy
import math

import pytest
import torch

from featherweight.quant.calibrate import collect
from featherweight.quant.evaluate import (
    divergence,
    layer_errors,
    outliers,
    perplexity,
    trace_ratio,
)
from featherweight.quant.plots import plot_errors, plot_outliers
from featherweight.quant.quantize import rtn
from featherweight.quant.rotate import draw_rotation, rotate
from featherweight.quant.simulate import (
    in_hadamard_basis,
    quantized_activations,
    quantized_cache,
    round_tokens,
)
from tests.quant import tiny


def test_perplexity_is_that_of_each_window():
    model, tokens = tiny.build(), tiny.ids(40, 33)
    logits = tiny.logits(model, tokens)[:, :-1].double().log_softmax(-1)
    chosen = logits.gather(-1, tokens[:, 1:, None])
    assert perplexity(model, tokens) == pytest.approx(math.exp(-chosen.mean().item()), rel=1e-5)
    loss = model(tokens, labels=tokens).loss.item()
    assert perplexity(model, tokens) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny.build()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tiny.ids()) == pytest.approx(128)


def test_divergence_from_itself_is_nothing():
    model = tiny.build()
    found = divergence(model, model, tiny.ids(40, 33))
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.agreement == 1
    assert found.perplexity == found.reference == pytest.approx(perplexity(model, tiny.ids(40, 33)))
    assert found.tokens == 40 * 32


def test_divergence_is_the_mean_kl_of_next_tokens():
    model, tokens = tiny.build(), tiny.ids(3, 20)
    other = rtn(copy.deepcopy(model), bits=2)
    p, q = (tiny.logits(m, tokens)[:, :-1].double().log_softmax(-1) for m in (model, other))
    found = divergence(model, other, tokens)
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert found.kl == pytest.approx(expected.item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert found.agreement == pytest.approx(same)
    assert found.perplexity == pytest.approx(perplexity(other, tokens), rel=1e-5)


def test_training_mode_stays():
    model = tiny.build().train()
    perplexity(model, tiny.ids())
    assert model.training


def test_bad_ids_are_named():
    with pytest.raises(ValueError, match="ids holds ids"):
        perplexity(tiny.build(), torch.full((1, 4), 500))


def test_tails_of_known_matrices():
    model = tiny.build("phi3")
    names = [one.name for one in outliers(model)]
    assert names == [
        f"{i}.{k}" for i in range(2) for k in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    model = tiny.build()
    model.model.layers[0].input_layernorm.weight.data.fill_(1.0)
    query = model.model.layers[0].self_attn.q_proj.weight.data
    query.copy_(torch.where(torch.rand(64, 64) < 0.5, 1.0, -1.0))
    first = outliers(model)[0]
    assert first.incoherence == first.kurtosis == first.peak == pytest.approx(1)
    query.zero_().fill_diagonal_(1.0)
    first = outliers(model)[0]
    assert first.incoherence == first.peak == pytest.approx(8)
    assert first.kurtosis == pytest.approx(64)


def test_rotation_flattens_tails():
    model = tiny.build()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, 3] *= 30
    before = outliers(model)
    after = outliers(rotate(copy.deepcopy(model), draw_rotation(model, "hadamard", seed=0)))
    for one, other in zip(before, after, strict=True):
        if one.name.endswith("up"):
            assert other.kurtosis < 0.3 * one.kurtosis
            assert other.peak < 0.6 * one.peak


def test_trace_ratio_is_one_for_independent_inputs_and_less_for_others():
    assert trace_ratio(torch.eye(8)) == pytest.approx(1)
    for layer in collect(tiny.build(), tiny.ids(16, 32)):
        assert 0 < trace_ratio(layer["mlp"]) < 0.9


def test_plots_are_written_whole(tmp_path):
    pytest.importorskip("matplotlib")
    model = tiny.build()
    plot_outliers({"before": outliers(model)}, tmp_path / "tails.png", of="peak")
    plot_errors({"rtn": layer_errors(rtn(model))}, tmp_path / "errors.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="of must be one of"):
        plot_outliers({}, tmp_path / "no.png", of="size")
    with pytest.raises(ValueError, match="measured must hold"):
        plot_outliers({}, tmp_path / "no.png")


# Simulated activations


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_have_their_own_grids(bits, symmetric):
    x = torch.randn(3, 5, 40) * torch.logspace(-3, 3, 5)[:, None]
    found = round_tokens(x, bits, symmetric=symmetric)
    span = 2 * x.abs().amax(-1) if symmetric else x.amax(-1) - x.amin(-1)
    steps = span / (2**bits - (2 if symmetric else 1))
    assert ((found - x).abs() <= steps[..., None] * 0.5001).all() or not symmetric
    assert ((found - x).abs() <= steps[..., None] * 1.001).all()
    assert max(len(row.unique()) for row in found.reshape(-1, 40)) <= 2**bits


def test_clipping_shrinks_the_range():
    x = torch.tensor([[-1.0, 0.5, 1.0]])
    assert round_tokens(x, 4, clip_ratio=0.5).abs().max() == pytest.approx(0.5 * 8 / 7)


def logits_error(context, model, tokens):
    reference = tiny.logits(model, tokens)
    with context:
        found = tiny.logits(model, tokens)
    assert torch.equal(tiny.logits(model, tokens), reference)  # all hooks are gone
    return ((found - reference).norm() / reference.norm()).item()


def test_more_bits_of_activations_cost_less():
    model, tokens = tiny.build("qwen3"), tiny.ids(4, 16)
    errors = [
        logits_error(quantized_activations(model, bits), model, tokens) for bits in (4, 8, 16)
    ]
    assert errors[0] > 5 * errors[1] > 50 * errors[2] > 0
    kept = logits_error(quantized_activations(model, 4, down=False), model, tokens)
    assert 0 < kept < errors[0]


def test_quantised_models_are_simulated_too():
    model = rtn(tiny.build(), bits=8)
    assert logits_error(quantized_activations(model, 8), model, tiny.ids()) > 0


def test_online_rotation_helps_activations_with_outliers():
    x = torch.randn(50, 64)
    x[:, 7] *= 100
    plain, online = (
        in_hadamard_basis(lambda t: round_tokens(t, 4), 64, online)(x) for online in (False, True)
    )
    assert (online - x)[:, :7].norm() < 0.8 * (plain - x)[:, :7].norm()
    for size in (12, 20, 64):  # of the first two the matrix is not symmetric
        part = x[:, :size]
        exact = in_hadamard_basis(lambda t: t, size)(part)
        torch.testing.assert_close(exact, part, rtol=1e-4, atol=1e-4)


def test_more_bits_of_the_cache_cost_less():
    model, tokens = tiny.build("llama"), tiny.ids(4, 16)
    errors = [logits_error(quantized_cache(model, bits), model, tokens) for bits in (3, 6, 16)]
    assert errors[0] > 4 * errors[1] > 50 * errors[2] > 0
    assert logits_error(quantized_cache(model, 16, online=True), model, tokens) < 1e-3


def test_simulation_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"bits must lie in 2..16"), quantized_activations(None, 1):
        pass
    with (
        pytest.raises(ValueError, match=r"Linear has no model.layers"),
        quantized_activations(torch.nn.Linear(2, 2), 8),
    ):
        pass
    model = tiny.build(intermediate_size=90)
    with (
        pytest.raises(ValueError, match="no Hadamard matrix of order 90"),
        quantized_activations(model, 8, online=True),
    ):
        pass


def test_rotations_help_four_bit_activations_with_an_outlier_channel():
    model = tiny.build()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] = 40.0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data[:, 5] /= 40.0
    turned = copy.deepcopy(model)
    rotate(turned, draw_rotation(turned, "hadamard", seed=0))
    tokens = tiny.ids(4, 16)
    plain = logits_error(quantized_activations(model, 4, down=False), model, tokens)
    rotated = logits_error(quantized_activations(turned, 4, down=False), turned, tokens)
    assert rotated < plain
