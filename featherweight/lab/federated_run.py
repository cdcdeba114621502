"""A federated run: one recipe, one seed, one directory. Started again, it goes on exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from featherweight.common import atomic_path, cpu_state, write_text
from featherweight.federated.clients_report import evaluate_clients
from featherweight.federated.ledger import Ledger
from featherweight.federated.partition import save_partition
from featherweight.federated.record import RoundRecord
from featherweight.federated.setting import Finding
from featherweight.lab import federated_checkpoint as checkpoint
from featherweight.lab.context import locked
from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.federated_checkpoint import FederatedCheckpoint
from featherweight.lab.federated_data import Clients, make_clients
from featherweight.lab.federated_parse import identity, to_yaml
from featherweight.lab.federated_recipe import FederatedRecipe
from featherweight.lab.federated_setup import findings, make_simulation, time_model
from featherweight.lab.logs import Logs
from featherweight.lab.machine import environment
from featherweight.lab.runs import _TEMPORARY, DISK_TROUBLE, Update, is_complete

RECIPE = "federated.yaml"
"""Name of the resolved recipe; by it reports tell federated runs from others."""

Listener = Callable[[Update], None]


def run_directory(out: Path, recipe: FederatedRecipe, seed: int) -> Path:
    """Return where a run of a recipe lives."""
    return out / identity(recipe) / f"seed-{seed}"


def run(recipe: FederatedRecipe, seed: int, out: Path, listen: Listener = lambda _: None) -> Path:
    """Run a recipe with one seed, or finish an interrupted run of it; a complete one is left alone.

    Args:
        recipe: what to do.
        seed: of weights, division, cohorts, batches, codec and noise.
        out: folder of all runs.
        listen: called after every evaluation, and with what the setting warns of.

    Returns:
        The run's directory.

    Raises:
        BadInput: data, model, division or setting are not as they must be, or the directory is in
            use or not writable.
        RunFailed: the disk is full; the last checkpoint stays usable.
    """
    directory = run_directory(out, recipe, seed)
    if is_complete(directory):
        return directory
    try:
        clients = make_clients(recipe, seed)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory.parent / RECIPE, to_yaml(recipe))
        with locked(directory, main_process=True):
            _Run(recipe, seed, directory, clients, listen).run()
    except OSError as error:
        text = f"{error.filename or directory}: {error.strerror or error}"
        if error.errno in DISK_TROUBLE:
            raise RunFailed(f"{text}; what was saved before is kept") from error
        raise BadInput(f"cannot write {text}") from error
    except SafetensorError as error:  # says so of a full disk too
        raise RunFailed(f"{directory}: {error}; what was saved before is kept") from error
    return directory


class _Run:
    """The state of one run while it is going."""

    def __init__(
        self,
        recipe: FederatedRecipe,
        seed: int,
        directory: Path,
        clients: Clients,
        listen: Listener,
    ) -> None:
        self.recipe, self.seed, self.directory = recipe, seed, directory
        self.clients, self.listen = clients, listen
        self.logs = Logs(directory)
        self.saved = time.monotonic()

    def run(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(self.recipe.execute.threads)
        try:
            self.simulation = make_simulation(self.recipe, self.clients, self.seed)
            self.ledger = Ledger(len(self.clients.train), time_model(self.recipe))
            found = findings(self.recipe, self.clients, self.simulation.model)
            self._resume_or_begin(found)
            self._train()
            self._finish(found)
        finally:
            torch.set_num_threads(threads)

    def _resume_or_begin(self, found: list[Finding]) -> None:
        folder = self.directory / "checkpoints"
        last, refused = checkpoint.newest(folder)
        for line in [*refused.values(), *map(str, found)]:
            self.listen(Update(0, 1, line, warning=True))
        if last is None:
            checkpoint.discard(folder)
        else:
            for path in refused:
                path.unlink()
            self._restore(last)
        for stray in self.directory.rglob(".*"):
            if _TEMPORARY.fullmatch(stray.name):
                stray.unlink()
        try:
            self.logs.cut(last.logs if last else {})
        except ValueError as error:
            raise RunFailed(f"{error}; to start over, remove {self.directory}") from None
        if last is None:
            self._describe()

    def _restore(self, last: FederatedCheckpoint) -> None:
        try:
            self.simulation.load_state_dict(last.state["simulation"])
            self.ledger.load_state_dict(last.state["ledger"])
        except (ValueError, KeyError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise BadInput(
                f"the checkpoint in {self.directory} is of another run: {text}"
            ) from None

    def _describe(self) -> None:
        """Write down what the run is of: machine, division and how it was made."""
        execute, asked = self.recipe.execute, self.recipe.partition
        row = environment(execute.device, "fp32", "highest")
        row["backend"] = f"{self.simulation.backend}: {self.simulation.reason}"
        row["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(self.directory / "environment.json", json.dumps(row, indent=1) + "\n")
        facts: dict[str, Any] = {
            "method": asked.method,
            "twin": asked.twin,
            "data": self.recipe.data.name,
        }
        facts |= {"seed": self.seed if asked.seed is None else asked.seed}
        facts |= {"options": json.dumps(asked.options, sort_keys=True)}
        digest = save_partition(
            self.directory / "partition.safetensors", self.clients.partition, facts
        )
        report = self.clients.report
        held = {
            "hash": digest,
            "summary": str(report),
            "sizes": report.sizes.tolist(),
            "labels": report.labels.tolist(),
            "validation_clients": len(self.clients.validation),
            "test_clients": len(self.clients.test),
        }
        write_text(self.directory / "partition.json", json.dumps(held) + "\n")

    def _train(self) -> None:
        every, total = self.recipe.evaluate.every, self.recipe.rounds
        while self.simulation.round < total:
            count = min(every - self.simulation.round % every, total - self.simulation.round)
            records = list(self.simulation.rounds(count))
            for record in records:
                self.ledger.add(record)
            self._log(records)
            late = time.monotonic() - self.saved >= self.recipe.execute.checkpoint_seconds
            if self.simulation.round < total and late:
                self._save()

    def _log(self, records: list[RoundRecord]) -> None:
        """Write a line about some rounds and the evaluation after them."""
        done = self.simulation.round
        losses = [record.train_loss for record in records if math.isfinite(record.train_loss)]
        report = evaluate_clients(self.simulation.model, self.clients.validation)
        row: dict[str, Any] = asdict(self.ledger.totals)
        row |= {"train_loss": fmean(losses) if losses else None}
        row |= {"cohort": fmean(len(record.cohort) for record in records)}
        row |= {"refused": sum(len(record.refused) for record in records)}
        row |= {"client_rate": records[-1].client_rate, "server_rate": records[-1].server_rate}
        row |= {f"validation_{name}": value for name, value in _finite(report.row()).items()}
        self.logs.append("metrics", row)
        seconds = sum(record.seconds for record in records)
        self.logs.append("timing", {"rounds": done, "seconds": seconds})
        text = f"validation accuracy {report.pooled:.3f}"
        self.listen(Update(done, self.recipe.rounds, text))

    def _save(self) -> None:
        state = {"simulation": self.simulation.state_dict(), "ledger": self.ledger.state_dict()}
        found = FederatedCheckpoint(self.simulation.round, state, self.logs.lengths())
        checkpoint.save(self.directory / "checkpoints", found)
        self.saved = time.monotonic()

    def _finish(self, found: list[Finding]) -> None:
        """Look at the test images, once, and write what came out."""
        report = evaluate_clients(self.simulation.model, self.clients.test)
        last = self.logs.read("metrics")[-1]
        counts = self.ledger.participation
        result = {
            "complete": True,
            "test": _finite(report.row()),
            "validation": {
                name.removeprefix("validation_"): value
                for name, value in last.items()
                if name.startswith("validation_")
            },
            "costs": asdict(self.ledger.totals),
            "refused": sum(row["refused"] for row in self.logs.read("metrics")),
            "participation": counts.tolist(),
            "findings": [asdict(finding) for finding in found],
            "backend": self.simulation.backend,
            "seconds": sum(row["seconds"] for row in self.logs.read("timing")),
        }
        with atomic_path(self.directory / "model.safetensors") as temporary:
            save_file(cpu_state(self.simulation.model.state_dict()), temporary)
        write_text(self.directory / "result.json", json.dumps(result, indent=1) + "\n")
        checkpoint.discard(self.directory / "checkpoints")


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    """Replace what JSON cannot hold; a diverged model has no loss."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
