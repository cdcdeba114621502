"""The page and the table of federated runs."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from featherweight.lab import cli
from featherweight.lab.federated_parse import load, to_yaml
from featherweight.lab.federated_run import run
from featherweight.lab.report.federated import (
    collect,
    cost_to_reach,
    curve,
    targets,
    validation_accuracy,
    write,
)
from featherweight.lab.report.federated_page import page
from featherweight.lab.report.federated_plots import draw
from featherweight.lab.report.federated_table import estimated, table

TINY = [
    "data.limit=200",
    "partition.clients=8",
    "model.options.width=8",
    "sampler.size=4",
    "local.steps=2",
    "rounds=6",
    "evaluate.every=2",
    "evaluate.split=clients",
    "evaluate.fraction=0.25",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two recipes, two seeds each."""
    out = tmp_path_factory.mktemp("runs")
    for recipe in load("federated-digits", [*TINY, "algorithm.name=fedavg,fedadam"]):
        for seed in (0, 1):
            run(recipe, seed, out)
    return out


def line(rounds, accuracy, **changes):
    row = {"rounds": rounds, "bytes_up": 10 * rounds, "bytes_down": 30 * rounds, "steps": 0}
    row |= {"examples": 5 * rounds, "seconds": 60.0 * rounds, "train_loss": 1.0}
    return row | {"validation_accuracy": accuracy} | changes


def fake(folder: Path, name: str, seeds: dict[int, list[float]], complete: bool = False):
    """Write a run whose accuracies are known."""
    (recipe,) = load("federated-digits", [f"name={name}"])
    for seed, accuracies in seeds.items():
        directory = folder / name / f"seed-{seed}"
        directory.mkdir(parents=True)
        (folder / name / "federated.yaml").write_text(to_yaml(recipe))
        rows = [json.dumps(line(10 * (i + 1), a)) for i, a in enumerate(accuracies)]
        (directory / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        if complete:
            result = {"complete": True, "test": {"accuracy": accuracies[-1]}}
            (directory / "result.json").write_text(json.dumps(result))


class Tags(HTMLParser):
    """Collect what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href") and not v.startswith("#")]
        if tag not in ("meta", "br", "use", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.text.append(data)


class TestPage:
    def test_holds_all_and_fetches_nothing(self, runs, tmp_path):
        report = write([runs], tmp_path)
        text = report.html.read_text()
        tags = Tags()
        tags.feed(text)
        assert [url for url in tags.fetched if not url.startswith("data:")] == []
        assert "<script" not in text
        for words in (
            "federated-digits (algorithm.name=fedavg)",
            "federated-digits (algorithm.name=fedadam)",
            "4 runs, 4 complete",
            "Accuracy against four costs",
            "What an accuracy costs",
            "estimated time on devices",
            "cross-device, tuned on validation",
            "of the clients take part in a round",
            "total variation",
            "every setting, defaults included",
        ):
            assert words.lower() in text.lower(), words
        assert [path.name for path in report.pictures] == [
            "federated-accuracy.png",
            "federated-loss.png",
            "federated-clients.png",
        ]
        assert all(path.read_bytes()[:4] == b"\x89PNG" for path in report.pictures)

    def test_the_same_runs_give_the_same_bytes(self, runs, tmp_path):
        one, other = (write([runs], tmp_path / name) for name in ("one", "two"))
        assert one.html.read_bytes() == other.html.read_bytes()
        for a, b in zip(one.pictures, other.pictures, strict=True):
            assert a.read_bytes() == b.read_bytes()

    def test_unfinished_runs_are_shown_as_far_as_they_are(self, tmp_path):
        fake(tmp_path, "half", {0: [0.5, 0.6], 1: [0.4]})
        metrics = tmp_path / "half" / "seed-0" / "metrics.jsonl"
        metrics.write_text(metrics.read_text() + '{"rounds": 3')  # cut short by a kill
        text = page(collect([tmp_path]), ())
        assert "half, seed 0: 20 of 150 rounds" in text
        assert "half, seed 1: 10 of 150 rounds" in text

    def test_a_recipe_without_a_line_yet(self, tmp_path):
        fake(tmp_path, "none", {0: []})
        report = write([tmp_path], tmp_path / "report")
        assert report.pictures == ()
        assert "0 of 150 rounds" in report.html.read_text()

    def test_names_are_escaped(self, tmp_path):
        fake(tmp_path, "a", {0: [0.5]})
        recipe = tmp_path / "a" / "federated.yaml"
        recipe.write_text(recipe.read_text().replace("path: null", "path: <b>&"))
        text = page(collect([tmp_path]), ())
        assert "<b>&" not in text
        assert "&lt;b&gt;&amp;" in text


class TestFigures:
    def test_curves_are_means_over_seeds_at_each_cost(self, tmp_path):
        fake(tmp_path, "x", {0: [0.5, 0.7, 0.9], 1: [0.3, 0.9]})
        (found,) = collect([tmp_path])
        points = curve(found, "bytes", validation_accuracy)
        assert points.x == (400.0, 800.0)
        assert points.mean == pytest.approx((0.4, 0.8))
        assert (points.low, points.high) == ((0.3, 0.7), (0.5, 0.9))
        assert curve(found, "rounds", lambda point: None).x == ()

    def test_cost_to_reach(self, tmp_path):
        fake(tmp_path, "x", {0: [0.5, 0.7, 0.9], 1: [0.3, 0.9]})
        (found,) = collect([tmp_path])
        assert cost_to_reach(found, 0.6, "rounds") == 20
        assert cost_to_reach(found, 0.9, "examples") == pytest.approx((150 + 100) / 2)
        assert cost_to_reach(found, 0.9, "seconds") == pytest.approx((1800 + 1200) / 2)
        assert cost_to_reach(found, 0.95, "rounds") is None
        assert targets([found]) == pytest.approx([0.64, 0.72, 0.76, 0.792])

    def test_a_diverged_model_has_no_loss_and_no_curve_breaks(self, tmp_path):
        (recipe,) = load("federated-digits", [*TINY, "local.learning_rate=1e30"])
        directory = run(recipe, 0, tmp_path)
        rows = (directory / "metrics.jsonl").read_text().splitlines()
        assert all(math.isfinite(json.loads(row)["validation_accuracy"]) for row in rows)
        assert "NaN" not in "".join(rows)
        names = [picture.name for picture in draw(collect([tmp_path]))]
        assert names == ["federated-accuracy", "federated-clients"]

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (None, "–"),
            (0, "0 minutes"),
            (90, "1.50 minutes"),
            (7200, "2.00 hours"),
            (86400, "24.0 hours"),
            (2 * 86400, "2.00 days"),
        ],
    )
    def test_times(self, seconds, text):
        assert estimated(seconds) == text

    def test_table(self, tmp_path):
        fake(tmp_path, "x", {0: [0.5, 0.8], 1: [0.5, 0.9]}, complete=True)
        console = Console(record=True, width=160, quiet=False, file=(tmp_path / "o").open("w"))
        console.print(table(collect([tmp_path])))
        console.file.close()
        text = console.export_text()
        assert re.search(r"x +20 +– +85\.0 ± 7\.1 % \(2\) +– +200 B +600 B +100 ", text)


class TestBadFiles:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="no federated run found"):
            collect([tmp_path])

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("federated.yaml", "["),
            ("federated.yaml", "- 3"),
            ("federated.yaml", "rounds: 3"),
            ("seed-0/metrics.jsonl", '{"rounds": 1}\n{"rounds": 2}\n'),
            ("seed-0/metrics.jsonl", "3\n4\n"),
            ("seed-0/result.json", "{"),
            ("seed-0/partition.json", "[]"),
        ],
    )
    def test_damage_is_one_line_with_the_file(self, name, content, tmp_path):
        fake(tmp_path, "x", {0: [0.5]})
        (tmp_path / "x" / name).write_text(content)
        with pytest.raises(ValueError, match=re.escape(Path(name).name)) as caught:
            collect([tmp_path])
        assert len(str(caught.value).splitlines()) == 1

    def test_a_report_that_cannot_be_written(self, runs, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "report").write_text("in the way")
        with pytest.raises(SystemExit) as stop:
            cli.main(["federate", "federated-digits", *TINY, "seeds=[0]", "--report"])
        assert stop.value.code == 2
        assert "cannot write" in capsys.readouterr().err
