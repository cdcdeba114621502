"""The command `featherweight inspect`."""

import pytest

from featherweight.lab.cli import main

SMALL = ["resnet-deep", "model.options.blocks=1", "model.options.width=4"]


def test_prints_and_draws_an_isometry(tmp_path, capsys):
    main(
        [
            *["inspect", "residual-mlp", "model.options.blocks=4", "model.options.width=128"],
            *["model.init=risotto", "--out", str(tmp_path / "pictures")],
        ]
    )
    printed = capsys.readouterr().out
    assert "smallest 1, largest 1, mean square 1" in printed
    for name in ("signals.png", "spectrum.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 1000


def test_a_recipe_brings_its_model_and_start(tmp_path, capsys):
    main(["inspect", "risotto-resnet-mini", "model.options.blocks=1", "--out", str(tmp_path)])
    assert "layer3.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one model"),
        (["mlp", "vgg16"], "name one model"),
        (["mlpp"], "mlpp"),
        (["mlp", "model.init=risoto"], "did you mean 'risotto'"),
        (["mlp", "model.init=fixup"], "fixup is for residual networks"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
