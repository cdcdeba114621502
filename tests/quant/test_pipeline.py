"""From directory to directory: what is written, what is refused, before anything is read."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from featherweight.quant import pipeline
from featherweight.quant.evaluate import Divergence
from featherweight.quant.export.directory import load
from featherweight.quant.grid import Grid
from featherweight.quant.pipeline import AUTO, Plan, best_rotation, quantize_directory
from featherweight.quant.quantize import gptq, quantized_layers
from featherweight.quant.rotate import Rotation, rotate
from featherweight.quant.rotations import ROTATIONS, haar, hadamard
from featherweight.quant.rtn import round_to_nearest
from featherweight.quant.text import read_tokens
from tests.oracles.gptq_layout import dequantise
from tests.quant import texts, tiny
from tests.quant.tiny import transformers

SMALL = {"group_size": 32, "steps": 10, "tokens": 32, "sequences": 16}


@pytest.fixture
def source(tmp_path):
    tiny.build("llama-tied").save_pretrained(tmp_path / "model")
    texts.save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(texts.text())
    return path


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_every_rotation_gives_a_directory_that_transformers_reads(source, text, rotation):
    pytest.importorskip("compressed_tensors")
    out = source.parent / "out"
    result = quantize_directory(source, out, Plan(rotation=rotation, **SMALL), calibration=text)
    assert result.rotation == rotation
    assert result.bits_per_weight == 4.5
    assert len(result.errors) == 14
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = torch.tensor([tokenizer(texts.text(20))["input_ids"]])
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    original = load(source)
    reference, found = (tiny.logits(m, tokens).log_softmax(-1) for m in (original, read))
    assert (reference.exp() * (reference - found)).sum(-1).mean() < 0.3
    saved = out / "featherweight" / "rotation.safetensors"
    assert saved.is_file() == (rotation != "none")
    report = json.loads((out / "featherweight" / "report.json").read_text())
    assert report["plan"]["rotation"] == rotation
    assert report["errors"] == result.errors


def test_a_directory_is_what_python_makes_of_the_same_steps(source, text):
    out = source.parent / "out"
    plan = Plan(rotation="hadamard", bits=3, **SMALL)
    quantize_directory(source, out, plan, calibration=text, format="plain")
    model = hadamard(load(source))
    ids = read_tokens(source, text, 16, 32)
    assert ids.shape == (16, 32)
    gptq(model, ids, bits=3, group_size=32)
    assert torch.equal(tiny.logits(load(out), tiny.ids()), tiny.logits(model, tiny.ids()))


def test_the_gptq_layout_holds_the_weights_that_were_measured(source, text):
    """Its scales are float16, and weights are rounded with such scales."""
    out = source.parent / "out"
    plan = Plan(rotation="none", method="rtn", group_size=32)
    quantize_directory(source, out, plan, format="gptq")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    grid = Grid(4, 32, scale_dtype=torch.float16)
    expected = round_to_nearest(load(source).get_submodule(name).weight, grid).dequantize()
    assert torch.equal(dequantise(*parts, 4), expected)


def test_candidates_are_calibrated_on_other_text_than_judges_them(monkeypatch):
    seen = {"calibration": [], "judge": []}

    def find(model, seed, steps, ids, report):
        seen["calibration"].append(ids)

    def judge(original, model, ids):
        seen["judge"].append(ids)
        return Divergence(1.0, 1.0, 1.0, 1.0, 1)

    entry = dataclasses.replace(ROTATIONS["none"], method=find)
    monkeypatch.setattr(pipeline, "ROTATIONS", dict.fromkeys(AUTO, entry))
    monkeypatch.setattr(pipeline, "divergence", judge)
    ids = torch.arange(17)[:, None].expand(17, 32)
    best_rotation(tiny.build(), Plan(rotation="none", method="rtn", group_size=32), ids)
    assert [found[:, 0].tolist() for found in seen["judge"]] == [[0, 8, 16]] * 3
    rest = [i for i in range(17) if i % 8]
    assert [found[:, 0].tolist() for found in seen["calibration"]] == [rest] * 3


def test_rounding_needs_no_text(source):
    plan = Plan(rotation="none", method="rtn", group_size=32)
    result = quantize_directory(source, source.parent / "out", plan)
    assert result.candidates == {}


def test_a_saved_rotation_is_used_again(source, text):
    first, second = source.parent / "first", source.parent / "second"
    quantize_directory(source, first, Plan(**SMALL), calibration=text)
    saved = first / "featherweight" / "rotation.safetensors"
    plan = Plan(rotation=str(saved), **SMALL)
    quantize_directory(source, second, plan, calibration=text)
    one, other = ((path / "model.safetensors").read_bytes() for path in (first, second))
    assert one == other


def test_auto_keeps_the_least_divergence(source, text):
    out = source.parent / "out"
    result = quantize_directory(source, out, Plan(rotation="auto", **SMALL), calibration=text)
    assert set(result.candidates) == set(AUTO)
    kl = {name: one.kl for name, one in result.candidates.items()}
    assert result.rotation == min(kl, key=kl.get)


def test_auto_finds_that_weights_on_the_grid_need_no_rotation():
    model, grid = tiny.build(), Grid(4, 32, symmetric=False, clip=False)
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.data = round_to_nearest(parameter.data, grid).dequantize()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = Plan(rotation="auto", method="rtn", symmetric=False, clip=False, **SMALL)
    name, rotation, candidates = best_rotation(model, plan, tiny.ids(8, 32))
    assert name == "none"
    assert rotation is None
    assert candidates["none"].kl < 1e-6 < candidates["hadamard"].kl
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="ids must hold at least 2 sequences"):
        best_rotation(model, plan, tiny.ids(1, 32))


def test_named_rotations_of_a_model():
    for name, function in (("hadamard", hadamard), ("haar", haar)):
        one = function(tiny.build(), seed=3)
        found = ROTATIONS[name].method(tiny.build(), 3, None, None, None)
        other = rotate(tiny.build(), found)
        assert all(
            torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
        )
        assert not quantized_layers(one)


# What is refused


def refused(source, message, plan=None, error=ValueError, **options):
    out = source.parent / "out"
    with pytest.raises(error, match=message) as caught:
        quantize_directory(source, out, plan or Plan(**SMALL), **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]


def test_too_little_text(source, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(texts.text(100))
    message = r"short.txt has 100 tokens, calibration needs at least 256: 8 sequences of 32"
    refused(source, message, calibration=short)
    short.write_bytes(b"\xff\xfe\xfa")
    refused(source, "is not UTF-8 text", calibration=short)
    refused(source, "No such file", calibration=tmp_path / "missing", error=FileNotFoundError)
    refused(source, "needs calibration text")


def test_token_ids_outside_the_vocabulary(source):
    refused(source, "calibration holds ids", calibration=torch.full((8, 32), 500))


def test_unsupported_architectures_are_refused_before_the_weights_are_read(source, text):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    (source / "model.safetensors").write_bytes(b"broken")
    refused(source, "model type 'gemma2' is not supported; it norms", calibration=text)


def test_an_occupied_directory_is_refused_before_the_weights_are_read(source, text):
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_directory(source, source, Plan(**SMALL), calibration=text)


def test_groups_that_do_not_fit(source, text):
    small = {**SMALL, "group_size": 48}
    refused(source, "group_size 48 does not divide 64", Plan(**small), calibration=text)
    small["group_size"] = 64
    message = "the format can be written with one group size, layers need 32 and 64; group_size 32"
    refused(source, message, Plan(**small), calibration=text, format="gptq")
    message = "an asymmetric grid can be written with one group size, layers need 32 and 64"
    refused(source, message, Plan(**small, symmetric=False), calibration=text)


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "model").mkdir()
    refused(tmp_path / "model", "is not a model directory")
    refused(tmp_path / "nothing", "is not a directory")


def test_a_saved_rotation_of_another_model(source, text, tmp_path):
    path = tmp_path / "other.safetensors"
    Rotation(torch.eye(8).double(), torch.eye(4).repeat(2, 1, 1).double()).save(path)
    plan = Plan(**SMALL, rotation=str(path))
    refused(
        source,
        r"rotation is for \(hidden, layers, head_dim\) = \(8, 2, 4\)",
        plan,
        calibration=text,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": "optrod"}, "unknown rotation 'optrod': did you mean 'optrot'"),
        ({"method": "awq"}, "unknown quantiser 'awq'"),
        ({"bits": 9}, "bits must lie"),
        ({"sequences": 1}, "sequences must be at least 2"),
        ({"tokens": 0}, "tokens must be"),
        ({"steps": -1}, "steps must not be negative"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_unknown_formats_are_refused_first(source):
    refused(source, "unknown format 'gguf'", format="gguf")
