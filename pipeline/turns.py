"""One forward pass at a time on a collector's model, while the shard before it is being written.

A collector holds at most `depth` shards: one in the model, the others on their way to storage. Storage that keeps up is
never waited for; storage that does not holds the collector back instead of filling its memory.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class Turns:
    """Gives the model to one thread at a time and says how long it stood idle, and why."""

    def __init__(self, depth: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._depth = depth
        self._clock = clock
        self._model = threading.Lock()
        self._state = threading.Lock()
        self._is_running = False
        self._n_writing = 0
        self._since = clock()
        self._idle = {"storage_wait": 0.0, "work_wait": 0.0}

    @contextlib.contextmanager
    def forward(self) -> Iterator[dict[str, float]]:
        """Hold the model. Gives the seconds that it stood idle since the turn before: `storage_wait` while all shards
        that the collector may hold were being written, `work_wait` otherwise."""
        with self._model:
            with self._changed():
                self._is_running = True
                waited, self._idle = self._idle, dict.fromkeys(self._idle, 0.0)
            try:
                yield waited
            finally:
                with self._changed():
                    self._is_running = False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold one of the places for shards that are being written."""
        with self._changed():
            self._n_writing += 1
        try:
            yield
        finally:
            with self._changed():
                self._n_writing -= 1

    @contextlib.contextmanager
    def _changed(self) -> Iterator[None]:
        """The time since the last change belongs to the state before this one."""
        with self._state:
            now = self._clock()
            if not self._is_running:
                reason = "storage_wait" if self._n_writing >= self._depth else "work_wait"
                self._idle[reason] += now - self._since
            self._since = now
            yield
