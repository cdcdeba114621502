"""The command `featherweight quantize`: what it writes, and what it says of mistakes."""

import json

import pytest

from featherweight.lab.cli import main

pytest.importorskip("compressed_tensors")
tiny = pytest.importorskip("tests.quant.tiny")
texts = pytest.importorskip("tests.quant.texts")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny.build("llama").save_pretrained(folder)
    texts.save_tokenizer(folder)
    (tmp_path / "text.txt").write_text(texts.text(4000))
    return folder


def quantize(model, *more):
    main(["quantize", str(model), "--out", str(model.parent / "out"), *more])


SMALL = ["--sequences", "8", "--tokens", "32", "--group-size", "16", "--steps", "4"]


def test_writes_a_model_and_says_what_it_did(model, capsys):
    quantize(model, *SMALL, "--calibration", str(model.parent / "text.txt"))
    out = model.parent / "out"
    printed = capsys.readouterr().out
    assert "rotation optrot" in printed
    assert f"written: {out}" in printed
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    report = json.loads((out / "featherweight" / "report.json").read_text())
    assert report["plan"]["group_size"] == 16
    assert len(report["errors"]) == 14


def test_whole_rows_by_group_size_0_without_text(model):
    quantize(model, "--rotation", "none", "--method", "rtn", "--group-size", "0")
    report = json.loads((model.parent / "out" / "featherweight" / "report.json").read_text())
    assert report["plan"]["group_size"] is None


def test_smaller_groups_are_said_in_one_line(model, capsys):
    quantize(model, "--rotation", "none", "--method", "rtn", "--group-size", "64")
    printed = capsys.readouterr().out
    notes = [line for line in printed.splitlines() if line.startswith("note: ")]
    assert notes == ["note: group_size 64 does not divide all rows; groups are of 32 in 2 layers"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rotation", "optrott"], "did you mean 'optrot'"),
        (["--bits", "9"], "bits"),
        (["--rotation", "none", "--method", "rtn", "--group-size", "48"], "48"),
        ([], "needs calibration"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(model, arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        quantize(model, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (model.parent / "out").exists()


def test_no_model_directory(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        quantize(tmp_path / "nowhere")
    assert stop.value.code == 2
    assert "nowhere" in capsys.readouterr().err
