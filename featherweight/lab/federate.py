"""What `featherweight federate` does: runs of recipes and seeds, a table, a report."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.federated_parse import identity, load
from featherweight.lab.federated_recipe import FederatedRecipe
from featherweight.lab.federated_run import run, run_directory
from featherweight.lab.launch import _end_with_parent
from featherweight.lab.runs import Update, is_complete


@dataclass(frozen=True)
class Task:
    """One run to do."""

    recipe: FederatedRecipe
    seed: int

    @property
    def label(self) -> str:
        """What displays call it."""
        return f"{self.recipe.name} ({self.recipe.algorithm.name}) seed {self.seed}"


def tasks(recipes: Sequence[FederatedRecipe]) -> list[Task]:
    """Return one task for each recipe and seed, each once."""
    found = {(identity(r), seed): Task(r, seed) for r in recipes for seed in r.seeds}
    return list(found.values())


def federate(words: Sequence[str], out: Path, jobs: int, console: Console) -> list[Path]:
    """Do the runs of some recipes, or finish them.

    Args:
        words: shipped names or files, and ``key=value`` overrides for all.
        out: folder of all runs.
        jobs: runs at a time; above 1 in processes of their own.
        console: where progress goes.

    Returns:
        The runs' directories.

    Raises:
        BadInput: a recipe is wrong, or does not fit its data or its setting.
        RunFailed: a run could not go on.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if not names:
        raise BadInput("name at least one federated recipe, such as federated-digits")
    if jobs < 1:
        raise BadInput(f"--jobs must be at least 1, got {jobs}")
    todo = tasks([recipe for name in names for recipe in load(name, overrides)])
    console.print(f"{len(todo)} runs in {out}", highlight=False)
    launch(todo, out, jobs, console)
    return [run_directory(out, task.recipe, task.seed) for task in todo]


def show(runs: Sequence[Path], report: Path | None, console: Console) -> None:
    """Print the table of some runs, and write their report where asked for.

    Args:
        runs: directories of runs.
        report: folder of the report; None: none is written.
        console: to print to.

    Raises:
        BadInput: a file of a run is damaged, or the report cannot be written.
    """
    from featherweight.lab.report.federated import collect, write
    from featherweight.lab.report.federated_table import table

    try:
        console.print(table(collect(runs)))
        if report is not None:
            html = write(runs, report).html
            console.print(f"report: {html}", highlight=False, soft_wrap=True)
    except ValueError as error:
        raise BadInput(str(error)) from None
    except OSError as error:
        raise BadInput(f"cannot write {report}: {error.strerror}") from None


def launch(todo: Sequence[Task], out: Path, jobs: int, console: Console) -> None:
    """Do all tasks that are not complete yet; the first failure ends them."""
    missing = [t for t in todo if not is_complete(run_directory(out, t.recipe, t.seed))]
    if len(missing) < len(todo):
        console.print(f"{len(todo) - len(missing)} of {len(todo)} runs are complete already")
    if jobs == 1 or len(missing) < 2:
        with _bars(console) as show:
            for task in missing:
                run(task.recipe, task.seed, out, lambda update, t=task: show(t, update))  # type: ignore[misc]
                console.print(f"done: {task.label}", highlight=False)
    else:
        _in_parallel(missing, out, min(jobs, len(missing)), console)


def _in_parallel(todo: Sequence[Task], out: Path, jobs: int, console: Console) -> None:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker)
    try:
        futures = {pool.submit(_work, task, out): task for task in todo}
        for future in as_completed(futures):
            for line in future.result():
                console.print(f"{futures[future].label}: {line}", highlight=False, markup=False)
            console.print(f"done: {futures[future].label}", highlight=False)
    except BrokenProcessPool:
        text = "a worker process died; the same command goes on from the checkpoints"
        raise RunFailed(text) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # Whatever is still running can be killed at any moment and resumed.
        for child in multiprocessing.active_children():
            child.terminate()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(task: Task, out: Path) -> list[str]:
    """Do one task in a worker process; return what it warned of."""
    warnings: list[str] = []

    def listen(update: Update) -> None:
        if update.warning:
            warnings.append(update.text)

    try:
        run(task.recipe, task.seed, out, listen)
    except (BadInput, RunFailed) as error:
        raise type(error)(f"{task.label}: {error}") from None
    return warnings


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Task, Update], None]]:
    """Show a bar for the running task, and its warnings as lines."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    warned: set[str] = set()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(task: Task, update: Update) -> None:
            if update.warning:
                if update.text not in warned:  # the same for every seed
                    console.print(f"{task.label}: {update.text}", highlight=False, markup=False)
                warned.add(update.text)
                return
            if task.label not in bars:
                bars[task.label] = progress.add_task(task.label, total=update.total)
            text = f"{task.label}, {update.text}"
            progress.update(bars[task.label], description=text, completed=update.done)
            if update.done == update.total:
                progress.remove_task(bars.pop(task.label))

        yield show
