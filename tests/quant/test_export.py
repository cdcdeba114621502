"""Formats: packing against other code, files that stock loaders read, nothing half done."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from featherweight.quant.export import directory
from featherweight.quant.export.directory import load, new_directory, save
from featherweight.quant.export.layouts import FORMATS
from featherweight.quant.export.packing import pack, unpack
from featherweight.quant.quantize import gptq, quantized_layers, rtn
from featherweight.quant.rotate import draw_rotation, rotate
from tests.oracles.gptq_layout import dequantise
from tests.quant import tiny
from tests.quant.tiny import transformers

NOISE = "ignore:You passed `quantization_config`:UserWarning"


def read_back(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


# Packing


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 10**6))
def test_packing_is_undone(bits, count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, count), generator=generator).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, -(-count * bits // 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, count), codes)


def test_first_code_is_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), 4).tolist() == [-2023406815]  # 0x87654321
    assert pack(torch.tensor([1] + [0] * 10 + [1]), 3).tolist() == [1, 2]  # bit 33 is in word 1


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"codes must lie in 0..7"):
        pack(torch.tensor([8]), 3)
    with pytest.raises(ValueError, match="codes must lie in"):
        pack(torch.tensor([-1]), 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packing_is_that_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(2**bits, (6, 64))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))


# Read back by stock transformers


@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize(
    ("kind", "bits", "group_size"),
    [
        ("llama-tied", 4, 32),
        ("llama-biases", 3, None),
        ("qwen3", 8, 16),
        ("phi3", 4, 32),
        ("gemma", 2, None),
        ("mistral", 5, 16),
    ],
)
def test_symmetric_models_are_read_with_equal_logits(tmp_path, kind, bits, group_size):
    pytest.importorskip("compressed_tensors")
    model = tiny.build(kind)
    rotate(model, draw_rotation(model, "hadamard", seed=0))
    gptq(model, tiny.ids(8, 32), bits=bits, group_size=group_size)
    save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].dtype == torch.int32
    read = read_back(tmp_path / "out")
    assert read.config.tie_word_embeddings is False
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))


def test_a_tied_model_that_was_not_rotated_stays_tied(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = rtn(tiny.build("llama-tied"), bits=4)
    save(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    read = read_back(tmp_path / "out")
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))


@pytest.mark.filterwarnings("ignore:group_size 64 does not divide")
def test_layers_with_groups_of_different_sizes_are_read_with_equal_logits(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = rtn(tiny.build("llama-biases"), bits=4, group_size=64)
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    found = {one["weights"]["group_size"]: one["targets"] for one in groups}
    assert found[32] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert len(found[64]) == 12
    read = read_back(tmp_path / "out")
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))
    with pytest.raises(ValueError, match=r"layers need 32 and 64; group_size 32 fits all"):
        save(model, tmp_path / "gptq", format="gptq")


@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize("group_size", [None, 32])
def test_asymmetric_models_are_read_if_dequantised(tmp_path, group_size):
    pytest.importorskip("compressed_tensors")
    model = gptq(tiny.build(), tiny.ids(8, 32), bits=4, group_size=group_size, symmetric=False)
    save(model, tmp_path / "out")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    read = read_back(tmp_path / "out", quantization_config=config)
    torch.testing.assert_close(
        tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()), rtol=0, atol=1e-6
    )


def test_half_precision_models_are_read_with_equal_logits(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = rtn(tiny.build(dtype=torch.bfloat16), bits=4, group_size=32)
    save(model, tmp_path / "out")
    read = read_back(tmp_path / "out")
    assert read.dtype == torch.bfloat16
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "symmetric"), [(None, True), (32, False)])
def test_gptq_layout_holds_the_weights(tmp_path, bits, group_size, symmetric):
    model = rtn(
        tiny.build(),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=torch.float16,
    )
    save(model, tmp_path / "out", format="gptq")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        found = dequantise(*parts, bits)
        torch.testing.assert_close(found, quantized_layers(model)[name].weight, rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    assert config["group_size"] == (group_size or -1)
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    if bits == 4 and symmetric:
        assert set(tensors["model.layers.0.mlp.up_proj.qzeros"].flatten().tolist()) == {-2004318072}


def test_gptq_layout_refuses_what_it_can_not_hold(tmp_path):
    with pytest.raises(ValueError, match="5 bits; the format holds 2, 3, 4 or 8"):
        save(rtn(tiny.build(), bits=5), tmp_path / "out", format="gptq")
    odd = rtn(tiny.build("llama-head-dim", head_dim=10), bits=4)
    with pytest.raises(ValueError, match=r"q_proj is 40 x 64; the format needs multiples of 32"):
        save(odd, tmp_path / "out", format="gptq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma", "qwen2-moe"])
def test_rotated_models_are_written_plain(tmp_path, kind, dtype):
    model = tiny.build(kind, dtype=dtype)
    rotate(model, draw_rotation(model, "haar", seed=0))
    save(model, tmp_path / "out", format="plain")
    options = {"experts_implementation": "eager"} if "moe" in kind else {}
    read = read_back(tmp_path / "out", **options)
    assert read.dtype == dtype
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))


@pytest.mark.parametrize("format", FORMATS)
def test_shards_hold_everything(tmp_path, format):
    model = rtn(tiny.build(), bits=4)
    save(model, tmp_path / "one", format=format)
    save(model, tmp_path / "many", format=format, shard_size="40KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    tensors = {n: t for shard in shards for n, t in load_file(shard).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[n], whole[n]) for n in whole)


# All or nothing


def model_directory(path, kind="llama-tied"):
    tiny.build(kind).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("free")
    return path


def test_companions_are_copied(tmp_path):
    source = model_directory(tmp_path / "source")
    save(rtn(load(source)), tmp_path / "out", source=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "LICENSE").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_an_existing_directory_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        save(rtn(tiny.build()), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]
    (tmp_path / "out" / "notes").unlink()
    save(rtn(tiny.build()), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, format):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"disk is full, .*out was not written") as caught:
        save(rtn(tiny.build()), tmp_path / "out", format=format)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory, "save_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        save(rtn(tiny.build()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def interrupted():
        with new_directory(tmp_path / "out") as temporary:
            (temporary / "half").write_text("...")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_plain_model_has_no_quantised_format(tmp_path):
    with pytest.raises(ValueError, match="'compressed-tensors' needs a quantised model"):
        save(tiny.build(), tmp_path / "out")
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        save(tiny.build(), tmp_path / "out", format="gguf")


# Reading


def test_loading_keeps_dtype_and_ties(tmp_path):
    tiny.build("llama-tied", dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pickled_weights_are_refused_unless_asked_for(tmp_path):
    model = tiny.build()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickled weights only; allow_pickle=True"):
        load(tmp_path)
    read = load(tmp_path, allow_pickle=True)
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))


class Harm:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_run_nothing(tmp_path):
    tiny.build().config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Harm(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, RuntimeError, ValueError, OSError)):
        load(tmp_path, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_other_directories_are_refused_in_one_line(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path / "model")
        assert "\n" not in str(caught.value)

    refused("is not a directory")
    (tmp_path / "model").mkdir()
    refused("is not a model directory: it has no config.json")
    (tmp_path / "model" / "config.json").write_text("{")
    refused("config.json can't be read")
    (tmp_path / "model" / "config.json").write_text("[]")
    refused("must hold an object")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    refused("holds no weights")
    (tmp_path / "model" / "config.json").write_text('{"quantization_config": {}}')
    refused("is quantised already")
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    refused("is quantised already")
