"""Truly sparse execution in runs: the same results, resumed alike, refused in words, measured."""

import json

import pytest

from featherweight import __main__ as command
from featherweight.lab import cli, execution
from featherweight.lab.errors import BadInput
from featherweight.lab.parse import load
from featherweight.lab.report import collect, executed
from featherweight.lab.runs import run, run_directory
from featherweight.sparse import Masks
from tests.lab.tiny_runs import METHODS, Killed, killer, rows, tiny

SPARSE = {"execute__form": "sparse"}
LRR = METHODS["lrr"] | {"sparse__per_level": 0.7}


def losses(directory):
    return [row["train_loss"] for row in rows(directory, "metrics")]


def result(directory):
    return json.loads((directory / "result.json").read_text())


@pytest.mark.parametrize("name", ["random", "lrr", "cyclic", "rigl", "gmp", "acdc, adamw"])
def test_results_are_those_of_masked_layers(name, tmp_path):
    masked, sparse = (
        run(tiny(**METHODS[name] | {"execute__form": form}), 0, tmp_path)
        for form in ("masked", "sparse")
    )
    assert losses(sparse) == pytest.approx(losses(masked), rel=1e-4)
    for level in sorted(masked.glob("level-*/masks.safetensors")):
        assert Masks.load(sparse / level.relative_to(masked)) == Masks.load(level)


def test_convolutions_and_distillation(tmp_path):
    changes = METHODS["convolutions, channels last, adamw, state rewound"] | {
        "fit__distillation": 0.5,
        "execute__channels_last": False,
    }
    masked, sparse = (
        run(tiny(**changes | {"execute__form": form}), 0, tmp_path) for form in ("masked", "sparse")
    )
    assert losses(sparse) == pytest.approx(losses(masked), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (METHODS["str"], "method or optimizer keeps"),
        (METHODS["lrr, sign-in"], "method or optimizer keeps"),
        (METHODS["nanoadam"], "method or optimizer keeps"),
        ({"execute__precision": "bf16"}, "compute in fp32, not bf16"),
        ({"execute__compile": True}, "compiled model"),
    ],
)
def test_what_cannot_be_sparse_is_refused(changes, words, tmp_path):
    with pytest.raises(BadInput, match=rf"execute\.form: sparse layers .*{words}.*use masked"):
        run(tiny(**changes | SPARSE), 0, tmp_path)


@pytest.mark.parametrize("changes", [METHODS["str"], METHODS["nanoadam"]])
def test_auto_runs_them_masked(changes, tmp_path):
    auto, masked = (
        run(tiny(**changes | {"execute__form": form}), 0, tmp_path) for form in ("auto", "masked")
    )
    assert losses(auto) == losses(masked)


@pytest.mark.parametrize(("backend", "form"), [("masked", "masked"), ("bag", "sparse")])
def test_auto_takes_what_gains_and_holds_masks_where_nothing_does(
    backend, form, tmp_path, monkeypatch
):
    taken, trained = [], execution._trained

    def watched(form, *rest):
        taken.append(form)
        return trained("masked", *rest)

    monkeypatch.setattr(execution, "_backends", lambda *_: {"hidden": backend})
    monkeypatch.setattr(execution, "_trained", watched)
    directory = run(tiny(**LRR | {"execute__form": "auto"}), 0, tmp_path)
    assert taken[-1] == form
    last = sorted(directory.glob("level-*"))[-1]
    assert Masks.load(last / "masks.safetensors").density == pytest.approx(0.09, abs=1e-3)


def test_a_resumed_level_computes_as_it_began(tmp_path, monkeypatch):
    recipe = tiny(**LRR | SPARSE)
    with pytest.raises(Killed):
        run(recipe, 0, tmp_path, killer(4))
    directory = run_directory(tmp_path, recipe, 0)
    recorded = json.loads((directory / "level-01" / "backends.json").read_text())
    assert recorded
    seen = []
    sparsely = execution.sparsely

    def watched(*arguments, backend, **options):
        seen.append(backend)
        return sparsely(*arguments, backend=backend, **options)

    monkeypatch.setattr(execution, "sparsely", watched)
    run(recipe, 0, tmp_path)
    assert seen[0] == recorded


def test_short_for_the_form():
    assert load("lrr-digits", ["execute=sparse"]) == load("lrr-digits", ["execute.form=sparse"])
    forms = [recipe.execute.form for recipe in load("lrr-digits", ["execute=auto,masked"])]
    assert forms == ["auto", "masked"]
    with pytest.raises(BadInput, match="'masked', 'sparse' or 'auto'"):
        load("lrr-digits", ["execute=dense"])


def test_three_numbers_at_the_end(tmp_path):
    sparse, masked = (
        run(tiny(**LRR | {"execute__form": form}), 0, tmp_path) for form in ("sparse", "masked")
    )
    own, other = result(sparse)["execution"], result(masked)["execution"]
    assert (own["form"], other["form"]) == ("sparse", "masked")
    assert own["bytes"] < own["dense_bytes"] < other["bytes"]  # masks beside dense weights
    assert own["seconds"] > 0
    assert own["dense_seconds"] > 0
    found = {line.form: line for line in executed(collect([tmp_path]))}
    assert found["sparse"].step_ratio == own["dense_seconds"] / own["seconds"]
    assert found["sparse"].flops_ratio < 1
    assert "x as fast as the best dense one, measured, sparse" in str(found["sparse"])


def test_nothing_is_measured_of_a_dense_run(tmp_path):
    directory = run(tiny(), 0, tmp_path)
    assert "execution" not in result(directory)
    assert executed(collect([tmp_path])) == ()


@pytest.mark.parametrize(("before", "after"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_the_command_line_lets_idle_threads_sleep(before, after, monkeypatch):
    monkeypatch.setattr(command.os, "environ", dict(before))
    monkeypatch.setattr(cli, "main", lambda: None)
    command.main()
    assert command.os.environ.get("GOMP_SPINCOUNT") == after
