"""The command line. One dataclass a command: its fields are the arguments, its text the help."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from featherweight.lab.errors import BadInput, RunFailed

Names = Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...")]
Jobs = Annotated[int, arg(metavar="N")]


@dataclass(frozen=True)
class Ls:
    """List what there is: methods, recipes, data sets, models, claims.

    Example: featherweight ls methods
    """

    kind: Positional[Literal["all", "methods", "recipes", "data", "models", "claims"]] = "all"
    """Which list."""

    def execute(self) -> None:
        """Print the lists."""
        from featherweight.lab.listing import print_lists

        print_lists(self.kind)


@dataclass(frozen=True)
class Show:
    """Show a recipe, a method, a model, a data set, or (fields) every key that a recipe can have.

    Example: featherweight show lrr-digits
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """What to show; `fields` for the keys of recipes."""

    def execute(self) -> None:
        """Print the thing."""
        from featherweight.lab.listing import print_one

        print_one(self.name)


@dataclass(frozen=True)
class Cp:
    """Copy a shipped recipe into a file of your own.

    Example: featherweight cp lrr-digits my-recipe.yaml
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of a shipped recipe."""
    destination: Annotated[Positional[Path | None], arg(metavar="FILE")] = None
    """File or folder to write; by default NAME.yaml here. A file that exists is not overwritten."""

    def execute(self) -> None:
        """Write the file."""
        from featherweight.common import write_text
        from featherweight.lab.parse import read_text

        name, text = read_text(self.recipe)
        path = self.destination or Path(f"{name}.yaml")
        path = path / f"{name}.yaml" if path.is_dir() else path
        if path.exists():
            raise BadInput(f"{path} exists already")
        try:
            write_text(path, text)
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror}") from None
        print(path)


@dataclass(frozen=True)
class Run:
    """Train recipes, every seed of each; after any interruption the same command goes on.

    Example: featherweight run lrr-digits sparse.per_level=0.2 seeds=[0,1] --jobs 2 --report

    A value with commas is a sweep: sparse.density=0.1,0.05,0.02 makes three recipes.
    """

    recipes: Annotated[Positional[tuple[str, ...]], arg(metavar="RECIPE ... [KEY=VALUE ...]")]
    """Shipped names or YAML files, and overrides for all (see `featherweight show fields`)."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs")
    """Folder of all runs."""
    jobs: Jobs = 1
    """Runs at a time, in processes of their own."""
    report: Annotated[bool, arg(name="report")] = False
    """Write a report of these runs to FOLDER/report when all are done."""
    controls: bool = True
    """Run each cyclic method's control too: one long schedule of the same epochs."""

    def execute(self) -> None:
        """Do the runs and print their table."""
        from rich.console import Console

        from featherweight.lab.control import with_controls
        from featherweight.lab.launch import launch, tasks
        from featherweight.lab.parse import load

        overrides = [word for word in self.recipes if "=" in word]
        names = [word for word in self.recipes if "=" not in word]
        if not names:
            raise BadInput("name at least one recipe; `featherweight ls recipes` lists them")
        if self.jobs < 1:
            raise BadInput(f"--jobs must be at least 1, got {self.jobs}")
        if self.jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput("--jobs is for one process; several ranks do one run at a time")
        recipes = [recipe for name in names for recipe in load(name, overrides)]
        todo = tasks(with_controls(recipes) if self.controls else recipes)
        main = os.environ.get("RANK", "0") == "0"
        # Where the output is no terminal, rich would fold tables at 80 columns.
        console = Console(quiet=not main, width=None if sys.stdout.isatty() else 100)
        console.print(f"{len(todo)} runs in {self.out}", highlight=False)
        done = launch(todo, self.out, self.jobs, console)
        if main:
            _show_report(done, self.out / "report", console, write=self.report)


@dataclass(frozen=True)
class Report:
    """Draw finished and unfinished runs: one HTML file and its pictures, and a table here.

    Example: featherweight report runs/demo
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER ...")]
    """Folders of runs, searched at any depth."""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Where to write; by default `report` inside the first folder."""

    def execute(self) -> None:
        """Write the report."""
        from rich.console import Console

        if not self.runs:
            raise BadInput("name at least one folder of runs")
        _show_report(list(self.runs), self.out or self.runs[0] / "report", Console(), write=True)


@dataclass(frozen=True)
class Claims:
    """List the papers' claims, or run some and print the verdicts.

    Example: featherweight claims run lrr-beats-imp --jobs 2
    """

    action: Positional[Literal["list", "run"]] = "list"
    """What to do."""
    names: Names = ()
    """Claims or papers to run; `all` for all."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/claims")
    """Folder of the runs."""
    jobs: Jobs = 1
    """Runs at a time."""
    scale: Literal["mini", "paper"] = "mini"
    """mini: sizes for a laptop; paper: the paper's own, for a GPU."""
    data: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder of CIFAR-10, for the paper's scale."""

    def execute(self) -> None:
        """Print claims or verdicts."""
        from featherweight.lab.claims.command import list_claims, run_claims

        if self.action == "list":
            list_claims()
        else:
            if self.jobs < 1:
                raise BadInput(f"--jobs must be at least 1, got {self.jobs}")
            run_claims(self.names, self.out, self.jobs, self.scale, self.data)


@dataclass(frozen=True)
class Quantize:
    """Make a language model's weights smaller: rotate, quantise, write what stock loaders read.

    Example: featherweight quantize MODEL_DIR --calibration text.txt --out MODEL_DIR-w4
    """

    model: Annotated[Positional[Path], arg(metavar="MODEL_DIR")]
    """A model directory of transformers."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """Folder to make; must not exist, or be empty."""
    rotation: Annotated[str, arg(metavar="NAME")] = "optrot"
    """A rotation (see `featherweight ls methods`), auto (try some, keep the best), or a
    rotation.safetensors."""
    method: Annotated[str, arg(metavar="NAME")] = "gptq"
    """A quantiser."""
    bits: Annotated[int, arg(metavar="N")] = 4
    """Of a weight, 2 to 8."""
    group_size: Annotated[int, arg(metavar="N")] = 128
    """Weights that share a scale; 0: whole rows."""
    symmetric: bool = True
    """Without a zero point."""
    calibration: Annotated[Path | None, arg(metavar="FILE")] = None
    """Text to calibrate on, for all but rtn without a learned-from-data rotation."""
    sequences: Annotated[int, arg(metavar="N")] = 128
    """Calibration sequences."""
    tokens: Annotated[int, arg(metavar="N")] = 512
    """Of a calibration sequence."""
    format: Annotated[str, arg(metavar="NAME")] = "compressed-tensors"
    """compressed-tensors, gptq, or plain."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """Of learning the rotation; by default the method's own."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the rotation."""
    allow_pickle: bool = False
    """Read pickled weights (tensors alone)."""

    def execute(self) -> None:
        """Quantise and print what came out."""
        from rich.console import Console

        from featherweight.lab.quantize import quantize

        plan = {
            "rotation": self.rotation,
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size or None,
            "symmetric": self.symmetric,
            "steps": self.steps,
            "seed": self.seed,
            "sequences": self.sequences,
            "tokens": self.tokens,
        }
        quantize(
            self.model,
            self.out,
            plan,
            calibration=self.calibration,
            format=self.format,
            allow_pickle=self.allow_pickle,
            console=Console(),
        )


@dataclass(frozen=True)
class Federate:
    """Simulate federated training of recipes; after any interruption the same command goes on.

    Example: featherweight federate federated-digits algorithm.name=fedavg,fedadam --report
    """

    recipes: Annotated[Positional[tuple[str, ...]], arg(metavar="RECIPE ... [KEY=VALUE ...]")]
    """Shipped names or YAML files, and overrides for all; a value with commas is a sweep."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs")
    """Folder of all runs."""
    jobs: Jobs = 1
    """Runs at a time, in processes of their own."""
    report: Annotated[bool, arg(name="report")] = False
    """Write a report of these runs to FOLDER/report."""

    def execute(self) -> None:
        """Do the runs and print their table."""
        from rich.console import Console

        from featherweight.lab.federate import federate, show

        console = Console(width=None if sys.stdout.isatty() else 120)
        done = federate(self.recipes, self.out, self.jobs, console)
        show(done, self.out / "report" if self.report else None, console)


@dataclass(frozen=True)
class Doctor:
    """Examine this machine: torch build, threads, devices, and which speed-ups to expect, measured.

    Example: featherweight doctor
    """

    thorough: bool = False
    """Measure larger shapes, for longer."""

    def execute(self) -> None:
        """Measure and print."""
        from rich.console import Console

        from featherweight.lab.doctor import examine, render

        Console().print(render(examine(quick=not self.thorough)))


@dataclass(frozen=True)
class Inspect:
    """Measure how signals pass through a fresh model: norms, similarities, gradients, Jacobian.

    Example: featherweight inspect resnet-deep model.init=risotto
    """

    model: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL [KEY=VALUE ...]")]
    """A model (on digits, unless data.name says otherwise) or a recipe, and overrides."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the weights."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("inspect")
    """Where the pictures go."""

    def execute(self) -> None:
        """Print and draw."""
        from featherweight.lab.inspection import inspect

        overrides = [word for word in self.model if "=" in word]
        names = [word for word in self.model if "=" not in word]
        if len(names) != 1:
            raise BadInput("name one model or recipe; `featherweight ls models` lists models")
        print("\n\n".join(inspect(names[0], overrides, self.seed, self.out)))


Command = (
    Annotated[Ls, subcommand("ls")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Cp, subcommand("cp")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Claims, subcommand("claims")]
    | Annotated[Quantize, subcommand("quantize")]
    | Annotated[Federate, subcommand("federate")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Doctor, subcommand("doctor")]
)


def _show_report(runs: list[Path], out: Path, console: object, *, write: bool) -> None:
    from rich.console import Console

    from featherweight.lab import report

    assert isinstance(console, Console)
    try:
        if write:
            written = report.write(runs, out)
            console.print(report.table(written.rows))
            _print_lines([*written.matched, *written.executed], console)
            console.print(f"report: {written.html}", highlight=False, soft_wrap=True)
        else:
            found = report.collect(runs)
            console.print(report.table(report.summarise(found)))
            _print_lines([*report.matched(found), *report.executed(found)], console)
    except ValueError as error:
        raise BadInput(str(error)) from None
    except OSError as error:
        raise BadInput(f"cannot write {out}: {error.strerror}") from None


def _print_lines(lines: Sequence[object], console: object) -> None:
    from rich.console import Console

    assert isinstance(console, Console)
    for line in lines:
        console.print(f"{line}\n", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0 (done), 1 (failed) or 2 (bad input)."""
    words = sys.argv[1:] if arguments is None else arguments
    words = _positionals_first(words)
    command = tyro.cli(
        Command,
        prog="featherweight",
        description="Light neural networks: train, prune, compare. Start with: featherweight ls",
        args=words,
    )
    try:
        command.execute()
    except BadInput as error:
        _stop(f"error: {error}", 2)
    except RunFailed as error:
        _stop(f"failed: {error}", 1)
    except KeyboardInterrupt:
        again = shlex.join(["featherweight", *words])
        _stop(f"interrupted; what was done is saved, go on with:\n  {again}", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave_ranks()


def _leave_ranks() -> None:
    """End this rank once all are done, without tearing the interpreter down.

    Threads of gloo abort it now and then, and torchrun takes that for a failed run.
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _positionals_first(words: list[str]) -> list[str]:
    """Let overrides stand anywhere: ``run RECIPE --jobs 2 key=value`` is no mistake."""
    if words[:1] not in (["run"], ["inspect"], ["federate"]):
        return words
    positionals: list[str] = []
    options: list[str] = []
    for word in words[1:]:
        takes_value = options[-1:] in (["--out"], ["--jobs"], ["--seed"])
        (options if word.startswith("-") or takes_value else positionals).append(word)
    return [words[0], *positionals, *options]


def _stop(message: str, code: int) -> None:
    print(f"featherweight: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
