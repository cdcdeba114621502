"""Run recipes and seeds, one after the other or in parallel processes, and show progress."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.identity import identity
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import Update, is_complete, run, run_directory


@dataclass(frozen=True)
class Task:
    """One run to do."""

    recipe: Recipe
    seed: int

    @property
    def label(self) -> str:
        """What displays call it."""
        return f"{self.recipe.name} seed {self.seed}"


def tasks(recipes: Sequence[Recipe]) -> list[Task]:
    """Return one task for each recipe and seed, each once, a recipe's seeds side by side."""
    found = {(identity(r), seed): Task(r, seed) for r in recipes for seed in r.seeds}
    return list(found.values())


def launch(todo: Sequence[Task], out: Path, jobs: int, console: Console) -> list[Path]:
    """Do all tasks.

    Args:
        todo: runs to do; those that are complete already are skipped.
        out: folder of all runs.
        jobs: processes at a time; 1 runs everything in this process.
        console: where progress goes.

    Returns:
        The runs' directories, in the order of the tasks.

    Raises:
        BadInput, RunFailed: the first failure; finished runs are kept.
    """
    open_tasks = [t for t in todo if not is_complete(run_directory(out, t.recipe, t.seed))]
    if len(open_tasks) < len(todo):
        console.print(f"{len(todo) - len(open_tasks)} of {len(todo)} runs are complete already")
    # Rounding depends on the threads, so these depend on the command, not on what is left to do.
    jobs = min(jobs, len(todo))
    threads = max(1, (os.cpu_count() or 1) // max(1, jobs))
    with _display(console) as display:
        if jobs <= 1:
            for index, task in enumerate(open_tasks):
                run(task.recipe, task.seed, out, lambda u, i=index, t=task: display(i, t, u))  # type: ignore[misc]
                display(index, task, None)
        else:
            _in_parallel(open_tasks, out, min(jobs, len(open_tasks)), threads, display)
    return [run_directory(out, t.recipe, t.seed) for t in todo]


Display = Callable[[int, Task, Update | None], None]


@contextmanager
def _display(console: Console) -> Iterator[Display]:
    """Show a bar for each running task, and a line for each finished one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[int, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(index: int, task: Task, update: Update | None) -> None:
            if index not in bars:
                bars[index] = progress.add_task(task.label, total=1)
            if update is not None and update.warning:
                console.print(f"{task.label}: {update.text}", highlight=False)
            elif update is None:
                progress.remove_task(bars[index])
                console.print(f"done: {task.label}", highlight=False)
            else:
                text = f"{task.label}, {update.text}"
                progress.update(
                    bars[index], description=text, completed=update.done, total=update.total
                )

        yield show


def _in_parallel(
    todo: Sequence[Task], out: Path, jobs: int, threads: int, display: Display
) -> None:
    context = multiprocessing.get_context("spawn")
    queue, messages = context.Queue(), context.Queue()
    for item in enumerate(todo):
        queue.put(item)
    workers: list[BaseProcess] = [
        context.Process(target=_work, args=(queue, messages, out, threads)) for _ in range(jobs)
    ]
    # The parent decides what Ctrl-C means; workers inherit that they ignore it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for worker in workers:
            worker.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        for _ in todo:
            _until_one_ends(todo, messages, workers, display)
    finally:
        # Whatever is still running can be killed at any moment and resumed.
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _until_one_ends(
    todo: Sequence[Task], messages: Any, workers: list[BaseProcess], display: Display
) -> None:
    while True:
        try:
            index, content = messages.get(timeout=1.0)
        except Empty:
            if dead := [w for w in workers if w.exitcode not in (None, 0)]:
                text = f"a worker process died with exit code {dead[0].exitcode}"
                raise RunFailed(f"{text}; the same command goes on from the checkpoints") from None
            continue
        if isinstance(content, Exception):
            raise content
        display(index, todo[index], content)
        if content is None:
            return


def _end_with_parent() -> None:
    """End this worker when its parent is gone, however it went: the run's directory gets free."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(queue: Any, messages: Any, out: Path, threads: int) -> None:
    """Do tasks until there are none; runs in a worker process."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            index, task = queue.get(timeout=0.5)
        except Empty:
            return
        try:
            run(task.recipe, task.seed, out, lambda update, i=index: messages.put((i, update)))  # type: ignore[misc]
            messages.put((index, None))
        except (BadInput, RunFailed) as error:
            messages.put((index, type(error)(f"{task.label}: {error}")))
