"""Run the runnable code blocks of Markdown files: ``python .ci/blocks.py README.md docs/*.md``.

A fenced block runs if its info string is ``python runnable`` or ``bash runnable``. Each file gets
a fresh folder and one Python process, which its blocks share. Warnings in Python blocks are errors;
bash runs with ``set -euo pipefail``. The first block that fails ends its file: its place and its
output are printed, the exit code is 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"(`{3,})(.*)")
SECONDS = 900  # longest that the blocks of one file may take


class Block(NamedTuple):
    """One runnable block: its language, the line its code begins on (from 1), its code."""

    language: str
    line: int
    code: str


def blocks(text: str) -> Iterator[Block]:
    """Find the runnable blocks; ValueError if a fence never closes or a language can't be run."""
    fence, start, language, lines = "", 0, "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not fence and (opening := FENCE.fullmatch(line)):
            language, _, mark = opening[2].strip().partition(" ")
            fence, start, lines = opening[1], number, []
            language = language if mark.strip() == "runnable" else ""
            if language and language not in RUNNERS:
                raise ValueError(f"{number}: {language!r} is not one of {', '.join(RUNNERS)}")
        elif fence and line.rstrip() == fence:
            if language:
                yield Block(language, start + 1, "\n".join(lines) + "\n")
            fence = ""
        else:
            lines.append(line)
    if fence:
        raise ValueError(f"{start}: the code fence is never closed")


def _python(block: Block, file: str, names: dict[str, Any]) -> str | None:
    """Run a block in this process; return its output if it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            # Blank lines in front make tracebacks name the lines of the Markdown file.
            exec(compile("\n" * (block.line - 1) + block.code, file, "exec"), names)
        except (Exception, SystemExit):
            return output.getvalue() + traceback.format_exc()
    return None


def _bash(block: Block, _file: str, _names: dict[str, Any]) -> str | None:
    """Run a block in bash; return its output if it fails."""
    command = ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{block.code}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return f"{done.stdout}exit code {done.returncode}\n" if done.returncode else None


Runner = Callable[[Block, str, dict[str, Any]], str | None]
RUNNERS: dict[str, Runner] = {"python": _python, "bash": _bash}


def run_here(file: str) -> int:
    """Run the blocks of one file in the current folder and process; return the exit code."""
    warnings.simplefilter("error")
    names: dict[str, Any] = {"__name__": "__main__"}
    started, count = time.perf_counter(), 0
    try:
        for block in blocks(Path(file).read_text(encoding="utf-8")):
            failure = RUNNERS[block.language](block, file, names)
            if failure is not None:
                print(f"{file}:{block.line}: this {block.language} block failed\n{failure}", end="")
                return 1
            count += 1
    except ValueError as error:
        print(f"{file}:{error}")
        return 1
    print(f"{file}: {count} blocks, {time.perf_counter() - started:.1f} s")
    return 0


def run_apart(file: Path) -> int:
    """Run the blocks of one file in a fresh folder and process; return the exit code."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, str(Path(__file__).resolve()), "--here", str(file.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = os.environ | {"PATH": path}
            return subprocess.run(command, cwd=folder, env=environment, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            print(f"{file}: still running after {SECONDS} s")
            return 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        sys.exit(run_here(sys.argv[2]))
    sys.exit(max([run_apart(Path(name)) for name in sys.argv[1:]], default=0))
