"""Line-by-line JSON logs that can be cut back to where a checkpoint was made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAMES = ("metrics", "timing", "levels")


class Logs:
    """The logs of one run: metrics and levels (bit-identical after a resume) and timing.

    Args:
        folder: the run's directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Return the file of a log."""
        return self._folder / f"{name}.jsonl"

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a line and see that it is on the disk."""
        with self.path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lengths(self) -> dict[str, int]:
        """Return the length of each log in bytes."""
        paths = {name: self.path(name) for name in NAMES}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def cut(self, lengths: dict[str, int]) -> None:
        """Drop what was written after a checkpoint with these lengths; empty: drop everything.

        Raises:
            ValueError: a log is shorter than the checkpoint says.
        """
        for name, length in self.lengths().items():
            wanted = lengths.get(name, 0)
            if length < wanted:
                raise ValueError(f"{self.path(name)} has {length} bytes, {wanted} were written")
            if length > wanted:
                os.truncate(self.path(name), wanted)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a log."""
        if not self.path(name).exists():
            return []
        return [json.loads(line) for line in self.path(name).read_text("utf-8").splitlines()]


def tensorboard(logs: Logs, folder: Path) -> None:
    """Write the metrics as TensorBoard events, from the log alone: resuming can't double them."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        step, before = 0, {"stage": "", "steps": 0}
        for row in logs.read("metrics"):
            step += row["steps"] - (before["steps"] if before["stage"] == row["stage"] else 0)
            before = row
            for key, value in row.items():
                if isinstance(value, float):
                    writer.add_scalar(key.replace("_", "/", 1), value, step)
        for row in logs.read("levels"):
            writer.add_scalar("test/accuracy", row["test_accuracy"], row["level"])
            writer.add_scalar("level/density", row["density"], row["level"])
