"""SIGTERM and SIGINT end a run in order: a pre-empted node, `ray job stop`, Ctrl-C.

The first signal asks: stages that hand out work stop doing so and take in what is nearly done. The second one, or one
that arrives where there is nothing to take in, ends the run at once. Either way what was committed stays.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from neuronlens.errors import NeuronLensError

GRACE_SECONDS = 8.0
"""For what is in hand when the signal comes: a node that is taken away gives 10 s or more."""
FORCE_SECONDS = 15.0
"""After that, for Ray to be taken down."""


class Stopped(NeuronLensError):
    """A signal ended the run. Exit code 128 + the signal's number, as a shell says it."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}. What was committed is kept: the same command goes on from there.")
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int]]:
        return Stopped, (self.exit_code - 128,)


class StopSignals:
    """Listens from `with` to its end; in any thread but the main one it hears nothing.

    With `ends_process`, the process is ended by force where it has not ended in time: Ray may have died first, and does
    not let go of those who wait for it.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self._number: int | None = None
        self._is_gentle = False
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._number is not None

    def raise_if_requested(self) -> None:
        if self._number is not None:
            raise Stopped(self._number)

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """Within, the first signal only sets `requested`, for a loop that looks at it; Stopped is raised at the end."""
        self._is_gentle = True
        try:
            yield
        finally:
            self._is_gentle = False
        self.raise_if_requested()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        is_first, self._number = self._number is None, number
        if is_first and self._ends_process:
            last_resort = threading.Timer(GRACE_SECONDS + FORCE_SECONDS, os._exit, (128 + number,))
            last_resort.daemon = True
            last_resort.start()
        if not (self._is_gentle and is_first):
            raise Stopped(number)
        os.write(2, b"\nneuronlens: finishing what is nearly done; the same signal again stops at once.\n")
