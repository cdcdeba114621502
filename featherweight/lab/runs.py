"""A run: one recipe, one seed, one directory. Started again after an interruption, it goes on."""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from featherweight.common import cpu_state, write_text
from featherweight.lab import checkpoint
from featherweight.lab.checkpoint import Checkpoint, Position
from featherweight.lab.context import accelerator, locked
from featherweight.lab.cost import measure
from featherweight.lab.depth import restart_choices, with_auxiliary
from featherweight.lab.duration import Duration
from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.execution import executed, measured, refuse
from featherweight.lab.fit import Diverged, Epoch, Loss, evaluate, train
from featherweight.lab.identity import identity
from featherweight.lab.keep import Formed, Resting, accompany, keep, put_form
from featherweight.lab.logs import Logs, tensorboard
from featherweight.lab.machine import environment
from featherweight.lab.optimizer import make_optimizer
from featherweight.lab.parse import to_yaml
from featherweight.lab.recipe import Recipe
from featherweight.lab.schedule import schedule
from featherweight.lab.setup import make_batches, make_model, read_data
from featherweight.lab.stages import plan
from featherweight.lab.start import ScoringBatches, couple, scoring_batches, start_masks
from featherweight.sparse import FORMS, Evolving, Hold, Level, Masks, Resume
from featherweight.sparse.execute import optimizer_state
from featherweight.sparse.hold import _innermost


@dataclass(frozen=True)
class Update:
    """Progress of a run, for displays.

    Attributes:
        done, total: epochs over all levels.
        text: where it stands, in words.
        warning: whether the text says that something was wrong.
    """

    done: int
    total: int
    text: str
    warning: bool = False


Listener = Callable[[Update], None]


def run_directory(out: Path, recipe: Recipe, seed: int) -> Path:
    """Return where a run of a recipe lives."""
    return out / identity(recipe) / f"seed-{seed}"


def is_complete(directory: Path) -> bool:
    """Tell whether the run in a directory has nothing left to do."""
    try:
        return (directory / "result.json").is_file()
    except OSError:  # such as a name that is too long
        return False


def run(recipe: Recipe, seed: int, out: Path, listen: Listener = lambda _: None) -> Path:
    """Run a recipe with one seed, or finish an interrupted run of it; a complete one is left alone.

    Args:
        recipe: what to do.
        seed: initialisation, order of images, augmentation, random masks.
        out: folder of all runs.
        listen: called after every epoch.

    Returns:
        The run's directory.

    Raises:
        BadInput: the data or the model is not as the recipe says, or the directory is in use or
            not writable.
        RunFailed: training diverged, or the disk is full; the last checkpoint stays usable.
    """
    directory = run_directory(out, recipe, seed)
    if is_complete(directory):
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory.parent / "recipe.yaml", to_yaml(recipe))
        with accelerator(recipe.execute) as acc, locked(directory, acc.is_main_process):
            _Run(recipe, seed, directory, acc, listen).run()
    except OSError as error:
        text = f"{error.filename or directory}: {error.strerror or error}"
        if error.errno in DISK_TROUBLE:
            raise RunFailed(f"{text}; what was saved before is kept") from error
        raise BadInput(f"cannot write {text}") from error
    except SafetensorError as error:  # says so of a full disk too
        raise RunFailed(f"{directory}: {error}; what was saved before is kept") from error
    return directory


DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Run:
    """The state of one run while it is going."""

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        directory: Path,
        accelerator: Accelerator,
        listen: Listener,
    ) -> None:
        self.recipe, self.seed, self.directory = recipe, seed, directory
        self.accelerator, self.listen = accelerator, listen
        self.logs = Logs(directory)
        self.saved = time.monotonic()

    def run(self) -> None:
        refuse(self.recipe, self.accelerator)
        self.data = read_data(self.recipe)
        self.batches = make_batches(self.recipe, self.data, self.seed, self.accelerator)
        start = self._make_model()
        found, refused = checkpoint.newest(self.directory / "checkpoints")
        for line in refused.values():
            self.listen(Update(0, 1, line, warning=True))
        if found is not None:
            self._check_model(found)
        levels, level, optimizer = self._begin_method(start, found)
        if found is not None:
            self._restore(found, optimizer)
        if self.accelerator.is_main_process:
            self._begin(found, refused)
        self.accelerator.wait_for_everyone()
        self.net, self.optimizer = self._prepare(optimizer)
        while True:
            if isinstance(self.kept, (Hold, Resting)):
                self.kept.update(level.masks)
            self._train(level, found.position if found else None)
            found = None
            following = _next(levels)
            if following is None:
                break
            level = following
        self.kept.remove()
        self._finish()

    def _make_model(self) -> Masks:
        """Build the model on its device; return the masks that training never leaves."""
        self.model = make_model(self.recipe, self.data, self.seed)
        self.model.to(self.accelerator.device)
        if self.recipe.execute.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        masks = start_masks(self.recipe, self.model, self.seed, self._scoring_batches)
        couple(self.recipe, self.model, masks, self.seed)
        self.start = cpu_state(self.model.state_dict())
        return masks

    def _scoring_batches(self) -> ScoringBatches:
        return scoring_batches(self.data, self.seed, self.accelerator.device)

    def _check_model(self, found: Checkpoint) -> None:
        try:
            found.masks.check(self.model)
        except ValueError as error:
            raise self._other_model(error) from None

    def _other_model(self, error: Exception) -> BadInput:
        text = " ".join(str(error).split())
        return BadInput(f"the checkpoint in {self.directory} is of another model: {text}")

    def _begin_method(
        self, start: Masks, found: Checkpoint | None
    ) -> tuple[Iterator[Level], Level, Optimizer]:
        """Make the optimizer, and the first level or the one to go on with."""
        recipe = self.recipe
        formed = recipe.sparse.method in FORMS and not (found and found.position.finished)
        if formed:
            put_form(recipe, self.model, start, self.seed)
        optimizer = make_optimizer(self.model, recipe.fit, formed)
        if formed:
            levels = iter([Level(0, 0, start, Resume(0, start))])
        else:
            levels = plan(
                recipe,
                self.model,
                optimizer,
                self.seed,
                start,
                self._scoring_batches,
                _resume(found),
            )
        level = _next(levels)
        assert level is not None  # a loop has a level at least
        steps = recipe.fit.length.steps(len(self.batches["train"]))
        self.kept = (
            Formed(self.model)
            if formed
            else keep(recipe, self.model, optimizer, level.masks, start, self.seed, steps)
        )
        return levels, level, optimizer

    def _restore(self, found: Checkpoint, optimizer: Optimizer) -> None:
        """Load model and optimizer, and set the number of threads, on which rounding depends."""
        if found.dynamic is not None and isinstance(self.kept, Evolving):
            self.kept.load_state_dict(found.dynamic)
        try:
            self.model.load_state_dict(dict(found.model))
        except RuntimeError as error:
            raise self._other_model(error) from None
        checkpoint.restore_optimizer(optimizer, found.optimizer)
        threads = self._recorded().get("threads")
        if self.recipe.execute.threads is None and isinstance(threads, int):
            torch.set_num_threads(threads)

    def _recorded(self) -> dict[str, Any]:
        """Return what an earlier process wrote down about itself; nothing if it is unreadable."""
        try:
            recorded = json.loads((self.directory / "environment.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return recorded if isinstance(recorded, dict) else {}

    def _prepare(self, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        net = torch.compile(self.model) if self.recipe.execute.compile else self.model
        prepared: tuple[nn.Module, Optimizer] = self.accelerator.prepare(net, optimizer)
        return prepared

    def _begin(self, found: Checkpoint | None, refused: Iterable[int]) -> None:
        if found is None:
            checkpoint.discard(self.directory / "checkpoints")
        else:
            checkpoint.tidy(self.directory / "checkpoints", refused)
        for stray in self.directory.rglob(".*"):
            if _TEMPORARY.fullmatch(stray.name):
                stray.unlink()
        try:
            self.logs.cut(found.logs if found else {})
        except ValueError as error:
            raise RunFailed(f"{error}; to start over, remove {self.directory}") from None
        execute = self.recipe.execute
        row = environment(self.accelerator.device, execute.precision, execute.matmul_precision)
        row["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        if found is not None:
            row["started"] = self._recorded().get("started", row["started"])
        write_text(self.directory / "environment.json", json.dumps(row, indent=1) + "\n")

    def _train(self, level: Level, position: Position | None) -> None:
        if position is not None and position.finished:
            return
        fit = self.recipe.fit
        per_epoch = len(self.batches["train"])
        plan = schedule(fit, self._length(level).steps(per_epoch), per_epoch)
        taken = position.steps if position else 0
        restart_choices(self.model, taken)
        loss = Loss(fit.label_smoothing, fit.distillation, fit.temperature, self._teacher(level))
        epochs = train(
            self.net,
            self.optimizer,
            self.batches["train"],
            with_auxiliary(loss, self.recipe, self.model),
            plan,
            self.accelerator,
            clip=fit.clip,
            level=level.index,
            seed=self.seed,
            epochs_done=position.epochs if position else 0,
        )
        done = Position(level.index, 0, taken)
        batch = torch.zeros(fit.batch_size, *self.data.shape)
        record = self.directory / _stage(level) / "backends.json"
        try:
            with (
                accompany(self.recipe, self.model, self.optimizer, plan.steps, taken, per_epoch),
                executed(self.recipe, self.model, self.optimizer, self.kept, batch, record),
            ):
                for epoch in epochs:
                    done = Position(level.index, epoch.epoch + 1, epoch.steps)
                    self._after_epoch(level, epoch, -(-plan.steps // per_epoch))
            self._after_level(level, done)
        except Diverged as error:
            raise RunFailed(f"{error}; {self._last_good()}") from None

    def _length(self, level: Level) -> Duration:
        """Return how long a level trains."""
        length = self.recipe.fit.length
        if level.warmup:
            assert self.recipe.sparse.rewind is not None
            return self.recipe.sparse.rewind
        return length if level.length is None else Duration(level.length, length.unit)

    def _teacher(self, level: Level) -> nn.Module | None:
        """Return the dense network of level 0, which sparser levels learn from if asked to."""
        if self.recipe.fit.distillation == 0.0 or level.index < 1:
            return None
        teacher = make_model(self.recipe, self.data, self.seed)
        teacher.load_state_dict(load_file(self.directory / "level-00" / "model.safetensors"))
        teacher.to(self.accelerator.device)
        return teacher.eval()

    def _after_epoch(self, level: Level, epoch: Epoch, epochs: int) -> None:
        validation: tuple[float | None, float | None] = (None, None)
        if "validation" in self.batches:
            validation = evaluate(self.net, self.batches["validation"], self.accelerator)
        if not self.accelerator.is_main_process:
            return
        stage = _stage(level)
        row = {"stage": stage, "level": level.index, "epoch": epoch.epoch, "steps": epoch.steps}
        row |= {"train_loss": epoch.loss, "train_accuracy": epoch.accuracy}
        row |= {"learning_rate": epoch.learning_rate}
        row |= {"validation_loss": validation[0], "validation_accuracy": validation[1]}
        self.logs.append("metrics", row)
        timing = {"seconds": epoch.seconds, "step_seconds": epoch.step_seconds}
        self.logs.append("timing", {"stage": stage, "epoch": epoch.epoch, **timing})
        done = (level.index * epochs if level.index > 0 else 0) + epoch.epoch + 1
        text = f"{level}: loss {epoch.loss:.3f}"
        self.listen(Update(done, (level.last + 1) * epochs, text))
        last = epoch.epoch + 1 == epochs
        if not last and time.monotonic() - self.saved >= self.recipe.execute.checkpoint_seconds:
            self._save(level, Position(level.index, epoch.epoch + 1, epoch.steps))

    def _after_level(self, level: Level, done: Position) -> None:
        """Measure the level's final model on the test set, once, and write it."""
        if isinstance(self.kept, Formed):
            self.kept.remove()  # what is measured and saved is the plain model
        loss, accuracy = evaluate(self.net, self.batches["test"], self.accelerator)
        self._check_ranks(self.kept.masks)
        if self.accelerator.is_main_process:
            image = torch.zeros(1, *self.data.shape, device=self.accelerator.device)
            before = self.directory / f"level-{level.index - 1:02d}" / "model.safetensors"
            folder = self.directory / _stage(level)
            row = {"stage": _stage(level), "level": level.index}
            row |= measure(folder, self.model, self.kept.masks, self.start, before, image)
            self.logs.append("levels", row | {"test_accuracy": accuracy, "test_loss": loss})
            self._save(level, Position(level.index, done.epochs, done.steps, finished=True))
        self.accelerator.wait_for_everyone()

    def _check_ranks(self, masks: Masks) -> None:
        """Refuse to go on if ranks have come to different masks."""
        if self.accelerator.num_processes == 1:
            return
        packed = torch.cat([m.flatten() for m in masks.values()]).to(self.accelerator.device)
        kept = self.accelerator.reduce(packed.int(), "sum")
        if not bool(((kept == 0) | (kept == self.accelerator.num_processes)).all()):
            raise RunFailed("the masks differ between ranks")

    def _save(self, level: Level, position: Position) -> None:
        resume = level.resume
        checkpoint.save(
            self.directory / "checkpoints",
            Checkpoint(
                position,
                self.model.state_dict(),
                optimizer_state(self.model, _innermost(self.optimizer)),
                self.kept.masks,
                resume.rewind,
                resume.generator_state,
                resume.optimizer,
                self.kept.state_dict() if isinstance(self.kept, Evolving) else None,
                self.logs.lengths(),
            ),
        )
        self.saved = time.monotonic()

    def _last_good(self) -> str:
        found, _ = checkpoint.newest(self.directory / "checkpoints")
        if found is None:
            return "no checkpoint was made before"
        p = found.position
        return f"the last good checkpoint is level {p.level}, epoch {p.epochs}, in {self.directory}"

    def _finish(self) -> None:
        if not self.accelerator.is_main_process:
            return
        last = self.logs.read("levels")[-1]
        result = {
            "complete": True,
            "test_accuracy": last["test_accuracy"],
            "density": last["density"],
            "seconds": sum(row["seconds"] for row in self.logs.read("timing")),
        }
        found = measured(
            self.recipe, self.accelerator, self.model, self.kept.masks, self.batches["train"]
        )
        if found is not None:
            result["execution"] = found.row()
        tensorboard(self.logs, self.directory / "tensorboard")
        write_text(self.directory / "result.json", json.dumps(result, indent=1) + "\n")
        checkpoint.discard(self.directory / "checkpoints")


# What a killed process leaves: names of atomic_path, and of safetensors.
_TEMPORARY = re.compile(r"\.(.+\.(safetensors|json)\.\w{8}|tmp\w{6})")


def _next(levels: Iterator[Level]) -> Level | None:
    """Prune and go to the next level; None after the last."""
    try:
        return next(levels, None)
    except (ValueError, FileNotFoundError) as error:  # masks of another run that do not fit
        raise BadInput(f"sparse: {error}") from error


def _stage(level: Level) -> str:
    return "warmup" if level.warmup else f"level-{level.index:02d}"


def _resume(found: Checkpoint | None) -> Resume | None:
    if found is None:
        return None
    return Resume(
        found.position.level,
        found.masks,
        found.rewind,
        found.generator_state,
        found.optimizer_rewind,
    )
