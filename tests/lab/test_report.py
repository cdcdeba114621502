"""The report: what it reads, how it reduces over seeds, and what it writes."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from featherweight.lab import report
from featherweight.lab.report import collect, summarise, table, text, write
from featherweight.lab.report.canvas import Look
from featherweight.lab.report.plots import draw
from featherweight.lab.report.summary import (
    accuracy_against_density,
    layer_densities,
    over_epochs,
    sign_flips,
)

Edit = Callable[[dict[str, Any]], None]
ACCURACIES = {0: [0.9, 0.8, 0.6], 1: [0.94, 0.78, 0.5], 2: [0.98, 0.7, 0.7]}  # seed: per level
PRUNABLE, PARAMETERS = 1000, 1030


def level_line(level: int, density: float, accuracy: float) -> dict[str, Any]:
    kept = round(PRUNABLE * density)
    return {
        "stage": f"level-{level:02d}",
        "level": level,
        "density": density,
        "nonzeros": kept,
        "prunable": PRUNABLE,
        "parameters": PARAMETERS,
        "test_accuracy": accuracy,
        "test_loss": 1 - accuracy,
        "layers": [
            {"name": "fc1", "numel": 800, "nonzeros": kept // 2, "density": density / 2},
            {"name": "fc2", "numel": 200, "nonzeros": kept // 2, "density": min(1.0, density * 2)},
        ],
        "flips_from_start": {"kept": kept, "flipped": kept // 10},
        "flips_from_previous": {"kept": kept, "flipped": kept // 20} if level else None,
        "flops": 2 * kept + 60,
        "dense_flops": 2 * PRUNABLE + 60,
        "bytes": 4 * kept + 125,
        "dense_bytes": 4 * PARAMETERS,
    }


def epoch_line(level: int, epoch: int, seed: int) -> dict[str, Any]:
    loss = 2.0 / (1 + epoch) + 0.1 * seed
    return {
        "stage": f"level-{level:02d}",
        "level": level,
        "epoch": epoch,
        "steps": 16,
        "train_loss": loss,
        "train_accuracy": 0.5,
        "learning_rate": 0.1 / (1 + epoch),
        "validation_loss": loss + 0.2,
        "validation_accuracy": 0.4,
    }


def jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_run(
    root: Path,
    identity: str = "digits-mlp-lrr-3f2a9c1e",
    name: str = "lrr",
    densities: tuple[float, ...] = (1.0, 0.5, 0.25),
    epochs: int = 3,
    seeds: tuple[int, ...] = (0, 1, 2),
    recipe: dict[str, Any] | None = None,
    edit: Edit = lambda line: None,
) -> Path:
    """Write an identity directory as a run leaves it; ``edit`` changes each line of levels."""
    folder = root / identity
    folder.mkdir(parents=True)
    resolved = {"name": name, "data": {"name": "digits"}, "model": {"name": "mlp"}, "seeds": [0]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved | (recipe or {})))
    for seed in seeds:
        make_seed(folder / f"seed-{seed}", seed, densities, epochs, edit)
    return folder


def make_seed(
    folder: Path, seed: int, densities: tuple[float, ...], epochs: int, edit: Edit
) -> None:
    folder.mkdir()
    environment = {"cpu": "a <fast> cpu", "threads": 1, "device": "cpu", "precision": "fp32"}
    (folder / "environment.json").write_text(json.dumps(environment))
    levels = [level_line(i, d, ACCURACIES[seed][i]) for i, d in enumerate(densities)]
    for line in levels:
        edit(line)
    jsonl(folder / "levels.jsonl", levels)
    both = [(level, epoch) for level in range(len(densities)) for epoch in range(epochs)]
    jsonl(folder / "metrics.jsonl", [epoch_line(level, epoch, seed) for level, epoch in both])
    times = [
        {
            "stage": f"level-{level:02d}",
            "epoch": epoch,
            "seconds": 1.0,
            "step_seconds": 0.001 * (1 + epoch + seed),
        }
        for level, epoch in both
    ]
    jsonl(folder / "timing.jsonl", times)
    result = {"complete": True, "test_accuracy": 0.5, "density": densities[-1], "seconds": 61.0}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs")


def test_runs_are_found_by_identity_seed_or_any_folder_above(run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "deeper", "zzz", name="imp")
    assert [found.name for found in collect([run])] == ["lrr"]
    assert [found.name for found in collect([tmp_path])] == ["imp", "lrr"]
    (one,) = collect([run / "seed-1"])
    assert [seed.number for seed in one.seeds] == [1]
    (two,) = collect([run / "seed-2", run / "seed-0"])
    assert [seed.number for seed in two.seeds] == [0, 2]


def test_what_is_named_twice_is_read_once(run: Path, tmp_path: Path) -> None:
    (found,) = collect([run, run / "seed-1", tmp_path])
    assert [seed.number for seed in found.seeds] == [0, 1, 2]


@pytest.mark.parametrize("paths", [[], ["empty"], ["missing"]])
def test_nothing_found_is_one_line(tmp_path: Path, paths: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no run found.*recipe\.yaml") as caught:
        collect([tmp_path / path for path in paths])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json}", "Expecting property name"),
        ("[1, 2]", "must be a JSON object"),
        ('{"stage": "level-00"}', "key 'level' is missing"),
        (json.dumps(level_line(0, 1.0, 0.5) | {"density": "much"}), "could not convert"),
        (json.dumps(level_line(0, 1.0, 0.5) | {"layers": [3]}), "not subscriptable"),
        (json.dumps(level_line(0, 1.0, 0.5) | {"nonzeros": float("inf")}), "infinity"),
    ],
)
def test_a_damaged_line_is_named_with_file_and_line(run: Path, line: str, reason: str) -> None:
    path = run / "seed-1" / "levels.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"levels\.jsonl:2: damaged line: ") as caught:
        collect([run])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@given(junk=st.text(min_size=1).filter(lambda junk: junk.strip() and not set(junk) & set("\r\n")))
def test_any_junk_is_one_line_that_names_the_place(
    junk: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_run(tmp_path_factory.mktemp("junk"), densities=(0.5,), epochs=1, seeds=(0,))
    (folder / "seed-0" / "metrics.jsonl").write_text(junk + "\n", encoding="utf-8", newline="\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: damaged line"):
        collect([folder])


@pytest.mark.parametrize("name", ["recipe.yaml", "seed-0/result.json", "seed-0/environment.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_is_named(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        collect([run])
    assert "\n" not in str(caught.value)


def test_a_line_cut_short_by_a_kill_is_left_out(run: Path) -> None:
    path, result = run / "seed-0" / "metrics.jsonl", run / "seed-0" / "result.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:9"):
        collect([run])  # a complete run can't have been cut short
    result.unlink()
    (found,) = collect([run])
    assert [len(seed.epochs) for seed in found.seeds] == [8, 9, 9]
    assert [seed.complete for seed in found.seeds] == [False, True, True]


def test_a_repeated_epoch_counts_once_and_the_later_one(run: Path) -> None:
    path = run / "seed-0" / "metrics.jsonl"
    again = epoch_line(0, 1, 0) | {"train_loss": 77.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    epochs = collect([run])[0].seeds[0].epochs
    assert len(epochs) == 9
    assert epochs[1].train_loss == 77.0


def test_shared_names_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for number, density in enumerate((0.05, 0.01)):
        recipe = {"sparse": {"density": density, "rule": "erk"}, "note": None}
        make_run(tmp_path, f"run-{number}", densities=(0.5,), recipe=recipe)
    make_run(tmp_path, "run-2", name="other", densities=(0.5,))
    names = [run.name for run in collect([tmp_path])]
    assert names == ["lrr (sparse.density=0.05)", "lrr (sparse.density=0.01)", "other"]


def test_equal_recipes_in_two_places_are_told_apart_by_place(tmp_path: Path) -> None:
    make_run(tmp_path / "a", densities=(0.5,))
    make_run(tmp_path / "b", densities=(0.5,))
    first, second = collect([tmp_path])
    assert first.name != second.name
    assert str(tmp_path / "a") in first.name


def test_rows_are_means_over_seeds(run: Path) -> None:
    rows = summarise(collect([run]))
    assert [row.level for row in rows] == [0, 1, 2]
    assert [row.last for row in rows] == [False, False, True]
    row = rows[1]
    accuracies = [ACCURACIES[seed][1] for seed in (0, 1, 2)]
    assert row.seeds == 3
    assert row.accuracy == pytest.approx(sum(accuracies) / 3)
    assert row.deviation == pytest.approx(statistics.stdev(accuracies))
    assert (row.density, row.nonzeros, row.prunable) == (0.5, 500, 1000)
    assert row.all_nonzeros == 530  # 30 parameters are never pruned
    assert row.flops_ratio == pytest.approx(1060 / 2060)
    assert row.step_seconds == pytest.approx(0.003)  # median of 1 2 3 2 3 4 3 4 5 ms
    assert (row.bytes, row.dense_bytes) == (2125, 4120)


def test_one_seed_has_no_deviation_and_missing_numbers_stay_missing(tmp_path: Path) -> None:
    def bare(line: dict[str, Any]) -> None:
        for key in ("test_accuracy", "flops", "dense_flops", "bytes", "dense_bytes"):
            line[key] = None

    (row,) = summarise(collect([make_run(tmp_path, densities=(0.5,), seeds=(0,), edit=bare)]))
    assert row.accuracy is row.deviation is row.flops_ratio is row.bytes is None
    assert text.accuracy(row.accuracy, row.deviation, row.seeds) == text.MISSING


def test_curves(run: Path) -> None:
    (found,) = collect([run])
    accuracy = accuracy_against_density(found)
    assert accuracy.x == (1.0, 0.5, 0.25)
    assert accuracy.low == (0.9, 0.7, 0.5)
    assert accuracy.high == (0.98, 0.8, 0.7)
    assert sign_flips(found, "start").mean == pytest.approx((0.1, 0.1, 0.1))
    previous = sign_flips(found, "previous")
    assert previous.x == (1, 2)
    assert previous.mean == pytest.approx((0.05, 12 / 250))
    loss = over_epochs(found, lambda epoch: epoch.train_loss)
    assert loss.x == tuple(range(1, 10))
    assert loss.mean[:3] == pytest.approx((2.1, 1.1, 2 / 3 + 0.1))
    assert layer_densities(found) == {"fc1": 0.125, "fc2": 0.5}


def test_seeds_that_are_behind_don_t_bend_the_curves(run: Path) -> None:
    path = run / "seed-2"
    (path / "result.json").unlink()
    (path / "levels.jsonl").unlink()
    path = path / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")
    (found,) = collect([run])
    loss = over_epochs(found, lambda epoch: epoch.train_loss)
    assert loss.mean[3] == pytest.approx(2.1)  # three seeds
    assert loss.mean[6] == pytest.approx(2.05)  # seeds 0 and 1
    assert [row.seeds for row in summarise([found])] == [2, 2, 2]


def test_the_warm_up_is_in_the_table_but_in_no_picture(run: Path) -> None:
    for seed in (0, 1, 2):
        path = run / f"seed-{seed}" / "levels.jsonl"
        warm = level_line(0, 1.0, 0.1) | {"stage": "warmup", "level": -1}
        path.write_text(json.dumps(warm) + "\n" + path.read_text())
    (found,) = collect([run])
    assert summarise([found])[0].stage == "warmup"
    assert accuracy_against_density(found).x == (1.0, 0.5, 0.25)
    assert sign_flips(found, "start").x == (0, 1, 2)

    # --- writing numbers -------------------------------------------------------------------------

    assert [text.duration(s) for s in (42, 185, 7800)] == ["42.0 s", "3 min 05 s", "2 h 10 min"]


class Page(HTMLParser):
    """Collect what a page refers to, its text, its ids, and whether its tags are balanced."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "srcset"):
                self.links.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\xa0", " ").split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[report.Report, Page]:
    root = tmp_path_factory.mktemp("written")
    make_run(root / "runs", "a", name="dense", densities=(1.0,))
    make_run(root / "runs", "b", name="lrr <&> friends")
    make_run(root / "runs", "c", name="random", densities=(0.25,), seeds=(0, 1))
    (root / "runs" / "b" / "seed-2" / "result.json").unlink()
    result = write([root / "runs"], root / "out")
    return result, Page(result.html.read_text(encoding="utf-8"))


def test_the_page_is_self_contained_and_well_formed(written: tuple[report.Report, Page]) -> None:
    result, page = written
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "img", "object"})
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    html = result.html.read_text(encoding="utf-8")
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{name}" for name in page.ids}
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html


def test_the_page_says_everything(written: tuple[report.Report, Page]) -> None:
    _, page = written
    parts = [
        "mlp on digits",
        "3 methods",
        "8 runs, 7 complete",
        "a <fast> cpu, cpu, fp32, 1 thread",
        "lrr <&> friends, seed 2: incomplete; 3 finished stages, 9 epochs",
        "60.0 ± 10.0 % (3)",  # accuracies 0.6 0.5 0.7
        "masked training executes dense kernels",
        "seeds: - 0",
    ]
    for part in parts:
        assert part.casefold() in page.text.casefold()


def test_every_level_of_every_method_is_a_row(written: tuple[report.Report, Page]) -> None:
    result, page = written
    assert [(row.method, row.level) for row in result.rows] == [
        ("dense", 0),
        *[("lrr <&> friends", level) for level in range(3)],
        ("random", 0),
    ]
    assert page.tags.count("tr") == 2 + 3 + 5  # two heads, three last levels, all levels


def test_the_pictures_are_there_and_not_empty(written: tuple[report.Report, Page]) -> None:
    result, page = written
    names = [path.stem for path in result.pictures]
    assert names == ["accuracy", "loss", "learning-rate", "layers", "sign-flips"]
    assert page.tags.count("svg") == 5
    for path in result.pictures:
        with Image.open(path) as image:
            assert image.width == 1280
            colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
            assert colours is not None
            assert len(colours) > 10


def test_no_colour_of_the_pictures_escapes_the_dark_scheme(
    written: tuple[report.Report, Page],
) -> None:
    html = written[0].html.read_text(encoding="utf-8")
    drawn = html[html.index("</style>") :]
    assert re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn) == []
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", drawn))
    css = html[: html.index("</style>")]
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", css))


def test_the_same_runs_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, second = write([run], tmp_path / "one"), write([run], tmp_path / "two" / "deep")
    pairs = zip([first.html, *first.pictures], [second.html, *second.pictures], strict=True)
    for one, two in pairs:
        assert one.read_bytes() == two.read_bytes()


def test_pictures_without_data_are_left_out(tmp_path: Path) -> None:
    def bare(line: dict[str, Any]) -> None:
        line |= {"layers": [], "flips_from_start": None, "flips_from_previous": None}

    folder = make_run(tmp_path, densities=(0.5,), epochs=1, seeds=(0,), edit=bare)
    assert [p.name for p in draw(collect([folder]))] == ["accuracy", "loss", "learning-rate"]
    (folder / "seed-0" / "metrics.jsonl").unlink()
    assert [p.name for p in draw(collect([folder]))] == ["accuracy"]


def test_a_dense_method_has_no_layer_bars(tmp_path: Path) -> None:
    def dense(line: dict[str, Any]) -> None:
        for layer in line["layers"]:
            layer["density"] = 1.0

    folder = make_run(tmp_path, densities=(1.0,), edit=dense)
    assert "layers" not in [picture.name for picture in draw(collect([folder]))]


def test_runs_that_have_not_begun_still_make_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", seeds=())
    result = write([tmp_path / "runs"], tmp_path / "out")
    assert result.rows == result.pictures == ()
    page = Page(result.html.read_text(encoding="utf-8"))
    assert "lrr: no seed has started" in page.text
    assert "No level is finished yet." in page.text


def test_losses_that_are_not_numbers_or_zero_are_drawn_around(run: Path) -> None:
    lines = [epoch_line(0, epoch, 0) for epoch in range(3)]
    lines[0]["train_loss"], lines[1]["train_loss"] = float("nan"), 0.0
    jsonl(run / "seed-0" / "metrics.jsonl", lines)
    (found,) = collect([run])
    loss = over_epochs(found, lambda epoch: epoch.train_loss)
    assert loss.mean[:2] == pytest.approx((2.15, (0.0 + 1.1 + 1.2) / 3))  # seeds 1, 2; all three
    assert "loss" in [picture.name for picture in draw(collect([run]))]


def test_many_methods_get_different_looks(tmp_path: Path) -> None:
    for number in range(7):
        make_run(tmp_path, f"run-{number:02d}", name=f"method {number}", seeds=(0,), epochs=1)
    looks = {Look.of(number) for number in range(18)}
    assert len(looks) == 18
    assert len(draw(collect([tmp_path]))) == 5


def test_a_failed_write_leaves_the_old_report(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = write([run], out).html.read_bytes()
    (run / "seed-0" / "levels.jsonl").write_text("junk\n")
    with pytest.raises(ValueError, match="damaged line"):
        write([run], out)
    assert (out / "report.html").read_bytes() == before
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_a_folder_that_is_a_file_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="out"):
        write([run], tmp_path / "out")


def test_the_console_table(run: Path) -> None:
    make_run(run.parent, "other", name="dense [bold]", densities=(1.0,), seeds=(0,))
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(summarise(collect([run.parent]))))
    shown = captured.get()
    assert "60.0 ± 10.0 % (3)" in shown
    assert "dense [bold]" in shown
    assert shown.count("lrr") == 1  # named at its first level only
    assert "27.2 %" in shown  # (2 * 250 + 60) / 2060 operations
