"""Decoding from packed weights gives what dense weights give."""

import pytest
import torch

from featherweight.quant.int4 import Int4Linear, int4_decoding
from featherweight.quant.quantize import quantized_layers, rtn
from tests.quant import tiny


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_few_and_many_tokens_agree_with_the_dense_weights(symmetric, group_size):
    model = tiny.build("qwen2", dtype=torch.bfloat16)
    rtn(model, bits=4, group_size=group_size, symmetric=symmetric)
    dense = {name: layer.weight.float() for name, layer in quantized_layers(model).items()}
    int4_decoding(model)
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Int4Linear)
        x = torch.randn(2, 3, weight.shape[1], dtype=torch.bfloat16)
        for rows in (x[:1, :1], x[:, :2], x):  # 1, 4 and 6 tokens
            with torch.no_grad():
                found = layer(rows).float()
            bias = 0 if layer.bias is None else layer.bias.float()
            expected = rows.float() @ weight.T + bias
            assert found.shape == expected.shape
            assert (found - expected).norm() < 0.02 * expected.norm()


def test_packed_weights_are_what_few_tokens_see():
    model = rtn(tiny.build(dtype=torch.bfloat16), bits=4)
    int4_decoding(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data.zero_()
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert layer(x).abs().max() > 0.1
        assert not layer(x.expand(1, 8, 64)).any()


def test_the_model_generates():
    model = int4_decoding(rtn(tiny.build(dtype=torch.bfloat16), bits=4, group_size=32))
    out = model.generate(
        tiny.ids(1, 4), attention_mask=torch.ones(1, 4), max_new_tokens=5, do_sample=False
    )
    assert out.shape[1] > 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.build(), "has no quantised layer"),
        (
            lambda: rtn(tiny.build(), bits=4),
            r"q_proj: need torch.bfloat16 on cpu, got torch.float32",
        ),
        (
            lambda: rtn(tiny.build(dtype=torch.bfloat16), bits=3),
            "need 4 bits and rows in 16s, got 3",
        ),
        (
            lambda: rtn(tiny.build(dtype=torch.bfloat16), bits=4, group_size=16),
            "need groups of a multiple of 32, got 16",
        ),
    ],
)
def test_other_models_are_refused(model, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        int4_decoding(model)
    assert not [m for m in model.modules() if isinstance(m, Int4Linear)]
