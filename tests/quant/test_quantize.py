"""Quantising whole decoders: which layers, in which order, all or nothing."""

import copy

import pytest
import torch

from featherweight.quant.calibrate import collect
from featherweight.quant.decoder import read_decoder
from featherweight.quant.evaluate import layer_errors
from featherweight.quant.gptq import Gptq, gptq_matrix
from featherweight.quant.grid import Grid
from featherweight.quant.quantize import QUANTIZERS, QuantizedLinear, gptq, quantized_layers, rtn
from featherweight.quant.rotate import draw_rotation, rotate
from featherweight.quant.rtn import round_to_nearest
from tests.quant import tiny


def ids(seed=1):
    return tiny.ids(24, 32, seed)


def quantised(method, model, **options):
    options = {"calibration": ids()} | options if method == "gptq" else options
    return QUANTIZERS[method].method(model, **options)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("kind", tiny.DENSE)
def test_every_linear_layer_of_the_blocks_and_nothing_else(kind, method):
    model = tiny.build(kind)
    kept = {
        n: p.clone()
        for n, p in model.named_parameters()
        if "layers" not in n or "norm" in n or n.endswith("bias")
    }
    linears = {n for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert quantised(method, model, bits=4) is model
    layers = quantized_layers(model)
    assert {n.removeprefix("model.layers.") for n in layers} == linears
    for layer in layers.values():
        assert torch.equal(layer.weight, layer.quantized.dequantize())
        assert len(layer.weight[0].unique()) <= 16
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in kept.items())


@pytest.mark.parametrize("kind", tiny.DENSE)
def test_gptq_loses_less_than_rounding(kind):
    model, tokens = tiny.build(kind), ids(2)
    reference = tiny.logits(model, tokens)

    def loss(method):
        found = quantised(method, copy.deepcopy(model), bits=3, clip=False)
        return (tiny.logits(found, tokens) - reference).pow(2).mean().item()

    assert loss("gptq") < loss("rtn")


def test_rtn_rounds_each_matrix():
    model = tiny.build()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    rtn(model, bits=3, group_size=32, symmetric=False)
    found = model.model.layers[1].mlp.up_proj
    expected = round_to_nearest(weight, Grid(3, 32, False))
    assert torch.equal(found.quantized.codes, expected.codes)
    relative = (expected.dequantize() - weight).pow(2).sum() / weight.pow(2).sum()
    assert found.error == pytest.approx(relative.item(), rel=1e-5)


def test_first_stage_is_gptq_on_the_inputs_of_the_original_model():
    model = tiny.build("llama-head-dim")
    decoder = read_decoder(model)
    gain = decoder.gain(decoder.blocks[0].attention_norm).float()
    hessian = collect(model, ids())[0]["attention"] * gain * gain[:, None]
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    expected = gptq_matrix(weight, hessian, Grid(4)).quantized
    gptq(model, ids(), bits=4)
    found = model.model.layers[0].self_attn.k_proj
    assert (found.quantized.codes != expected.codes).float().mean() < 0.01
    difference = found.weight.detach() - weight
    relative = torch.trace(difference @ hessian @ difference.T) / torch.trace(
        weight @ hessian @ weight.T
    )
    assert found.error == pytest.approx(relative.item(), rel=1e-3)
    assert found.damping == 0.01


def test_later_stages_see_what_quantised_ones_make():
    """down of layer 1 is quantised on inputs of a model whose other layers are quantised."""
    model = tiny.build("llama-biases")
    done = gptq(copy.deepcopy(model), ids(), bits=2)
    partly, last = copy.deepcopy(done), "layers.1.mlp.down_proj"
    plain = torch.nn.Linear(96, 64)
    original = model.model.get_submodule(last)
    plain.weight, plain.bias = original.weight, original.bias
    partly.model.set_submodule(last, plain)
    inputs = []
    handle = plain.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tiny.logits(partly, ids())
    handle.remove()
    rows = torch.cat([x.reshape(-1, 96) for x in inputs])
    hessian = rows.T @ rows / len(rows)
    expected = gptq_matrix(plain.weight.detach(), hessian, Grid(2)).quantized
    found = done.model.get_submodule(last).quantized
    assert (found.codes != expected.codes).float().mean() < 0.01


def test_batches_do_not_change_the_result(monkeypatch):
    whole = gptq(tiny.build("qwen3"), ids(), bits=4)
    monkeypatch.setattr("featherweight.quant.calibrate._TOKENS", 5 * 32)  # 24 sequences: 5 5 5 5 4
    parts = gptq(tiny.build("qwen3"), ids(), bits=4)
    for one, other in zip(
        quantized_layers(whole).values(), quantized_layers(parts).values(), strict=True
    ):
        assert (one.quantized.codes != other.quantized.codes).float().mean() < 0.01


def test_sliding_windows_reach_the_layers():
    """The layers are called as the model calls them: with Mistral's mask of 8 tokens."""
    model = tiny.build("mistral")
    assert model.config.sliding_window == 8
    stored = collect(model, ids())
    inputs = []
    module = model.model.layers[1].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tiny.logits(model, ids())
    handle.remove()
    rows = inputs[0].reshape(-1, inputs[0].shape[-1])
    torch.testing.assert_close(stored[1]["output"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_pruned_decoders_keep_their_masks(method):
    model = tiny.build()
    masks = {}
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() == 2:
            masks[name] = torch.rand(parameter.shape) < 0.5
            parameter.data[masks[name]] = 0.0
    own = {"options": Gptq(keep_zeros=True)} if method == "gptq" else {}
    quantised(method, model, bits=3, group_size=16, symmetric=False, **own)
    for name, parameter in model.model.layers.named_parameters():
        assert name not in masks or not parameter[masks[name]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_get_scales_of_their_dtype(dtype):
    model = gptq(tiny.build(dtype=dtype), ids(), bits=4, group_size=32)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.quantized.scale, layer.quantized.scale.to(dtype).float())
    assert torch.isfinite(tiny.logits(model, ids())).all()


def test_training_mode_hooks_and_copies_stay():
    model = tiny.build("llama-biases").train()
    gptq(model, ids(), bits=4)
    assert model.training
    assert all(layer.training for layer in quantized_layers(model).values())
    assert all(not m._forward_pre_hooks for m in model.modules())
    copied = copy.deepcopy(model)
    layer = quantized_layers(copied)["model.layers.0.mlp.up_proj"]
    assert torch.equal(layer.quantized.dequantize(), layer.weight)


def test_watchers_hear_of_each_layer():
    for method in QUANTIZERS:
        heard = []
        model = quantised(method, tiny.build(), watch=heard.append)
        assert [(one.index, one.layers) for one in heard] == [(1, 2), (2, 2)]
        errors = {name: error for one in heard for name, error in one.errors.items()}
        assert errors == layer_errors(model)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_groups_are_halved_where_they_do_not_divide_a_row(method):
    model = tiny.build()  # rows of 64, of down 96
    with pytest.warns(
        UserWarning, match=r"^group_size 64 does not divide all rows; groups are"
    ) as w:
        quantised(method, model, bits=4, group_size=64)
    assert str(w[0].message).endswith("of 32 in 2 layers")
    for name, layer in quantized_layers(model).items():
        expected = 32 if name.endswith("down_proj") else 64
        assert layer.quantized.grid.group_size == expected
        assert layer.quantized.scale.shape[1] * expected == layer.in_features


# What is refused, and leaves the model as it was


def unchanged(model, message, action, error=ValueError):
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(error, match=message):
        action(model)
    assert not quantized_layers(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must lie in 2..8, got 1"),
        ({"group_size": 48}, r"model.layers.0.self_attn.q_proj: group_size 48 does not divide 64"),
        ({"group_size": 60}, r"model.layers.0.self_attn.q_proj: group_size 60 does not divide 64"),
    ],
)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_grids_that_do_not_fit(method, options, message):
    unchanged(tiny.build(), message, lambda m: quantised(method, m, **options))


@pytest.mark.parametrize(
    ("tokens", "message", "error"),
    [
        (torch.zeros(4), "must be a tensor of token ids", TypeError),
        ("text", "must be a tensor of token ids", TypeError),
        (torch.zeros(4, dtype=torch.long), r"must be \[sequences, tokens >= 2\]", ValueError),
        (torch.zeros(4, 1, dtype=torch.long), r"must be \[sequences", ValueError),
        (torch.full((1, 4), 128), r"ids 128..128, the vocabulary is 0..127", ValueError),
        (torch.full((1, 4), -1), "ids -1..-1", ValueError),
    ],
)
def test_bad_calibration(tokens, message, error):
    unchanged(tiny.build(), message, lambda m: gptq(m, tokens), error)


def test_inputs_that_are_not_finite_leave_the_model_unchanged():
    model = tiny.build()
    module = model.model.layers[1].self_attn.o_proj
    module.weight.data *= 1e30
    module.weight.data[0] *= 1e8
    unchanged(model, "layers.1.mlp.gate_proj are not finite on the cal", lambda m: gptq(m, ids()))


def test_a_quantised_model_is_not_quantised_or_rotated_again():
    model = rtn(tiny.build())
    for action in (rtn, lambda m: rotate(m, draw_rotation(tiny.build(), "haar", seed=0))):
        with pytest.raises(ValueError, match="is a QuantizedLinear, not a plain Linear"):
            action(model)
    with pytest.raises(ValueError, match="has no quantised layer"):
        layer_errors(tiny.build())
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
