"""What a person sees while work goes on: progress bars and lines, all on stderr."""

import contextlib
from collections.abc import Callable, Iterator

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

_LOGGED_SHARE = 0.25
"""Where stderr is no terminal, a line is printed each time that this share of a stage is done."""


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
