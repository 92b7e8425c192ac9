"""What a person sees while work goes on, and how a command ends: progress bars, lines and errors, all on stderr."""

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from neuronlens.errors import NeuronLensError

_LOGGED_SHARE = 0.25
"""Where stderr is no terminal, a line is printed each time that this share of a stage is done."""


def command_line(app: typer.Typer) -> None:
    """Run a command: our own errors become one sentence on stderr and their exit code, a stop says how to go on."""
    try:
        app()
    except NeuronLensError as error:
        stderr().print(f"neuronlens: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        if error.exit_code > 128:
            _say_how_to_resume()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stderr().print("neuronlens: stopped. What was committed is kept: the same command goes on from there.")
        _say_how_to_resume()
        sys.exit(130)


def print_json(content: Mapping[str, Any]) -> None:
    """What a script reads: one JSON object as the last line on stdout."""
    typer.echo(json.dumps(content))


def stderr() -> Console:
    """Where everything that a person reads goes."""
    return Console(stderr=True)


def _say_how_to_resume() -> None:
    program = sys.argv[0]
    module = Path(program).with_suffix("").name
    is_job = Path(program).parent.name == "jobs"
    command = ["python", "-m", f"jobs.{module}"] if is_job else [Path(program).name]
    if module == "__main__":
        command = ["python", "-m", "neuronlens"]
    stderr().print(f"  {shlex.join([*command, *sys.argv[1:]])}", highlight=False, markup=False, soft_wrap=True)


class ConsoleReporter:
    """Progress bars on a terminal; where stderr is a file, a few plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", highlight=False)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if self.console.is_terminal:
            with self._bar() as progress:
                task = progress.add_task(name, total=total, unit=unit)
                yield lambda n: progress.advance(task, n)
        else:
            yield self._lines(name, total, unit)

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def _lines(self, name: str, total: int, unit: str) -> Callable[[int], None]:
        done, logged = 0, 0.0
        self.console.print(f"{name}: 0 of {total:,} {unit}", highlight=False)

        def advance(n: int) -> None:
            nonlocal done, logged
            done += n
            if done / max(1, total) >= min(logged + _LOGGED_SHARE, 1.0):
                logged = done / max(1, total)
                self.console.print(f"{name}: {done:,} of {total:,} {unit}", highlight=False)

        return advance
