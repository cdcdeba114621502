"""Saving, loading, masks, checkpointing and recorded outputs of Hugging Face's encoders."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTForImageClassification

from featherweight import depth
from tests.depth.factories import hugging_deit, hugging_vit, images


def test_saved_read_as_dense_and_converted_again(tmp_path):
    model, x = hugging_vit(), images()
    dense = model(x).logits
    expected = depth.a_mod(model, [0.5, 0.25], policy="carry", rounding="floor")(x).logits
    model.save_pretrained(tmp_path)
    plain = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(x).logits, dense)
    again = depth.a_mod(plain, [0.5, 0.25], policy="carry", rounding="floor")
    assert torch.equal(again(x).logits, expected)
    loaded = depth.load(AutoModelForImageClassification, tmp_path)
    assert torch.equal(loaded(x).logits, expected)
    assert depth.settings_of(loaded).asdict() == depth.settings_of(model).asdict()


def test_learned_routers_are_saved(tmp_path):
    model, x = hugging_vit(), images()
    expected = depth.mod(model, 0.5, auxiliary="predictor", std=1.0)(x).logits
    model.save_pretrained(tmp_path)
    loaded = depth.load(ViTForImageClassification, tmp_path)
    assert torch.equal(loaded(x).logits, expected)
    assert list(loaded.state_dict()) == list(model.state_dict())
    file = tmp_path / "model.safetensors"
    depth.to_dense(model).save_pretrained(tmp_path / "dense")
    file.write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="lacks the router weights"):
        depth.load(ViTForImageClassification, tmp_path)


def test_a_dense_folder_is_no_routed_model(tmp_path):
    depth.to_dense(depth.a_mod(hugging_vit())).save_pretrained(tmp_path)
    assert "featherweight_depth" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no routed model"):
        depth.load(ViTForImageClassification, tmp_path)


def test_settings_repeat_a_conversion():
    model = depth.mod(hugging_vit(), 0.25, gate="tanh", seed=3)
    again = depth.route(hugging_vit(), **depth.settings_of(model).asdict())
    assert depth.settings_of(again) == depth.settings_of(model)
    assert torch.equal(again(images()).logits, model(images()).logits)


def test_recorded_outputs():
    model, x = hugging_vit(), images()
    depth.a_mod(model, 0.5)
    hidden = model(x, output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in hidden] == [(3, 17, 32)] * 5


def test_attention_maps_of_an_eager_model():
    model, x = hugging_vit(attn_implementation="eager"), images()
    fused = depth.a_mod(hugging_vit(), 0.5)
    depth.a_mod(model, 0.5)
    output = model(x, output_attentions=True)
    assert [tuple(a.shape[2:]) for a in output.attentions] == [(17, 17), (9, 9)] * 2
    assert torch.allclose(output.logits, fused(x).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("policy", ["alternate", "carry"])
def test_checkpointing_chooses_the_same_tokens_again(policy):
    layers = [1, 3] if policy == "alternate" else [1, 2, 3]
    grads = []
    for checkpointing in (False, True):
        model = depth.a_mod(hugging_vit(), 0.5, layers=layers, policy=policy).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images()).logits.logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def run_layers(tokens, capacity, valid=None):
    """Run the layers alone on tokens; return the tokens after, and what layer 1 visited."""
    encoder = depth.a_mod(hugging_vit(), capacity).vit
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
    mask = None if valid is None else valid[:, None, None].expand(-1, 1, tokens.shape[1], -1)
    for block in blocks:
        tokens = block(tokens, attention_mask=mask)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    return tokens, blocks[1].depth_ledger.visited[1]


@pytest.mark.parametrize(("count", "capacity"), [(11, 7 / 11), (4, 1.0)])
def test_padded_samples_are_what_they_are_alone(count, capacity):
    """Seven of 17 tokens are processed; with four real ones those four, and padding in vain."""
    tokens = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[0, count:] = False
    padded, visited = run_layers(tokens, 0.4, valid)
    alone, own = run_layers(tokens[:1, :count], capacity)
    assert torch.allclose(padded[0, :count], alone[0], atol=1e-5)
    assert torch.equal(visited[0, :count], own[0])
    assert visited.sum(1).tolist() == [7, 7]
    full, _ = run_layers(tokens[1:], 0.4)
    assert torch.allclose(padded[1], full[0], atol=1e-5)


def test_two_prefix_tokens_of_deit():
    model = depth.a_mod(hugging_deit(), 0.125)
    masks = depth.visited(model, images())
    assert masks[1].sum(-1).tolist() == [3] * 3
    assert masks[1, :, :2].all()
