"""Fused rotations keep the function exactly, for every kind of decoder; others are refused."""

import copy

import pytest
import torch

from featherweight.quant.architecture import MODEL_TYPES
from featherweight.quant.decoder import read_decoder
from featherweight.quant.hadamard import random_orthogonal
from featherweight.quant.rotate import Rotation, draw_rotation, fold, orthogonality_error, rotate
from tests.quant import tiny
from tests.quant.tiny import transformers


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_rotation_keeps_the_function_in_float64(kind):
    model = tiny.exact(tiny.build(kind, dtype=torch.float64))
    tokens = tiny.ids()
    before = tiny.logits(model, tokens)
    weight = model.model.embed_tokens.weight.clone()
    rotate(model, draw_rotation(model, "haar", seed=3))
    assert relative(tiny.logits(model, tokens), before) < 1e-10
    assert (weight - model.model.embed_tokens.weight).abs().max() > 0.1
    assert not read_decoder(model).tied()
    assert model.config.tie_word_embeddings is False
    gains = torch.stack([read_decoder(model).gain(n) for n in read_decoder(model).norms()])
    assert torch.equal(gains, torch.ones_like(gains))


def test_every_supported_type_is_tested():
    assert {tiny.build(kind).config.model_type for kind in tiny.KINDS} == set(MODEL_TYPES)


@pytest.mark.parametrize("kind", ["llama-tied", "phi3", "gemma", "qwen2"])
def test_folding_alone_keeps_the_function(kind):
    model = tiny.exact(tiny.build(kind, dtype=torch.float64))
    before = tiny.logits(model, tiny.ids())
    fold(model)
    assert relative(tiny.logits(model, tiny.ids()), before) < 1e-12


def test_hadamard_rotation_keeps_the_function_in_float32():
    model = tiny.build("llama-tied")
    before = tiny.logits(model, tiny.ids()).log_softmax(-1)
    rotate(model, draw_rotation(model, "hadamard", seed=0))
    after = tiny.logits(model, tiny.ids()).log_softmax(-1)
    assert (before.exp() * (before - after)).sum(-1).mean() < 1e-6


def test_each_r2_may_differ_and_grouped_heads_share_it():
    model = tiny.exact(tiny.build("llama-biases", dtype=torch.float64))
    decoder = read_decoder(model)
    assert decoder.heads == 2 * decoder.kv_heads
    before = tiny.logits(model, tiny.ids())
    eye = torch.eye(decoder.hidden, dtype=torch.float64)
    values = torch.stack([random_orthogonal(decoder.head_dim, seed=i) for i in range(2)])
    rotate(model, Rotation(eye, values))
    assert relative(tiny.logits(model, tiny.ids()), before) < 1e-12


def test_r2_turns_rows_of_v_and_columns_of_o_head_by_head():
    """W_v <- B^T W_v R1 with R2 once a key-value head, W_o <- R1^T W_o B once a query head."""
    model = fold(tiny.build("phi3", dtype=torch.float64))
    rotation, old = draw_rotation(model, "haar", seed=1), copy.deepcopy(model)
    rotate(model, rotation)
    for layer, before, turn in zip(
        model.model.layers, old.model.layers, rotation.values, strict=True
    ):
        value = before.self_attn.qkv_proj.weight[-32:]
        expected = torch.block_diag(turn, turn).T @ value @ rotation.residual
        torch.testing.assert_close(layer.self_attn.qkv_proj.weight[-32:], expected)
        output = before.self_attn.o_proj.weight
        expected = rotation.residual.T @ output @ torch.block_diag(turn, turn, turn, turn)
        torch.testing.assert_close(layer.self_attn.o_proj.weight, expected)


@pytest.mark.parametrize("kind", ["llama-biases", "phi3", "mixtral"])
def test_rotating_back_restores_the_weights(kind):
    model = fold(tiny.build(kind))
    before = copy.deepcopy(model.state_dict())
    rotation = draw_rotation(model, "haar", seed=1)
    rotate(rotate(model, rotation), rotation.inverse)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_a_rotated_model_is_saved_and_read_by_transformers(tmp_path):
    model = tiny.build("gemma")
    rotate(model, draw_rotation(model, "hadamard", seed=0))
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))
    assert read.config.tie_word_embeddings is False


def test_rotations_are_saved_and_loaded(tmp_path):
    rotation = draw_rotation(tiny.build(), "haar", seed=0)
    rotation.save(tmp_path / "rotation.safetensors")
    read = Rotation.load(tmp_path / "rotation.safetensors")
    assert torch.equal(read.residual, rotation.residual)
    assert torch.equal(read.values, rotation.values)
    assert orthogonality_error(read.residual) < 1e-12


def test_draws_depend_on_the_seed_and_on_the_kind():
    model = tiny.build()
    one, same = (draw_rotation(model, "haar", seed=1) for _ in range(2))
    other = draw_rotation(model, "haar", seed=2)
    assert torch.equal(one.residual, same.residual)
    assert not torch.equal(one.residual, other.residual)
    hadamard = draw_rotation(model, "hadamard", seed=1)
    torch.testing.assert_close(hadamard.residual.abs(), torch.full((64, 64), 1 / 8).double())
    assert torch.equal(draw_rotation(model, "identity", seed=0).residual, torch.eye(64).double())


# What is refused, before anything is touched


OUTPUT_NORMS = "it norms what a block writes"
LAYER_NORM = "it uses LayerNorm"
REFUSED = {
    "Gemma2": OUTPUT_NORMS,
    "Gemma3": OUTPUT_NORMS,
    "Olmo2": OUTPUT_NORMS,
    "GPTNeoX": LAYER_NORM,
    "Phi": LAYER_NORM,
    "Cohere": LAYER_NORM,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_with_the_reason(name):
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**tiny.SIZES))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[name]):
        rotate(model, Rotation(torch.eye(64), torch.eye(16).repeat(2, 1, 1)))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_layer_norm_inside_a_supported_type_is_refused():
    model = tiny.build()
    model.model.layers[1].input_layernorm = torch.nn.LayerNorm(64)
    with pytest.raises(ValueError, match=r"layers.1.input_layernorm is a LayerNorm"):
        fold(model)


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="causal language model of transformers, got Linear"):
        fold(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("residual", "layers", "head", "message"),
    [(32, 2, 16, "rotation is for"), (64, 3, 16, "rotation is for"), (64, 2, 8, "rotation is for")],
)
def test_a_rotation_of_other_sizes_changes_nothing(residual, layers, head, message):
    model = tiny.build("llama-tied")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rotate(model, Rotation(torch.eye(residual), torch.eye(head).repeat(layers, 1, 1)))
    assert read_decoder(model).tied()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_weights_that_are_not_finite_change_nothing():
    model = tiny.build("llama-tied")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj.weight holds values that are not"
    ):
        rotate(model, draw_rotation(model, "haar", seed=0))
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert read_decoder(model).tied()


def test_matrices_that_are_no_rotation_are_refused():
    with pytest.raises(ValueError, match="residual must be orthogonal"):
        Rotation(2 * torch.eye(4), torch.eye(2)[None])
    with pytest.raises(ValueError, match="values must be orthogonal"):
        Rotation(torch.eye(4), torch.full((1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="values must hold square"):
        Rotation(torch.eye(4), torch.eye(2))


def test_adapters_and_parametrised_weights_are_refused():
    model = tiny.build()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match="not a plain Linear"):
        fold(model)
