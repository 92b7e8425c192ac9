"""A pool of Ray actors that hold a model each, and the loop that hands jobs out to them and survives their death.

A job that fails is tried again on another actor, then quarantined: the others finish, and the caller learns what
failed and why. (An actor that dies is replaced by a new one; each death uses up one try of the job that it held, so
the loop always ends.)
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray

from neuronlens.errors import NeuronLensError, RunFailed

Job = TypeVar("Job")
Result = TypeVar("Result")

MAX_TRIES = 3
MAX_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(Generic[Job]):
    """A job that was given up after `n_tries`, and the last reason."""

    job: Job
    n_tries: int
    reason: str


@dataclass(slots=True)
class _Try(Generic[Job]):
    job: Job
    n_failed: int = 0
    last_actor: Any = None


@dataclass(slots=True)
class Pool:
    """`size` actors made by `make_actor`, each with a method `ready` for its heavy start, which may fail."""

    make_actor: Callable[[], Any]
    size: int
    _idle: list[Any] = field(default_factory=list)
    _starting: dict[Any, Any] = field(default_factory=dict)
    _n_failed_starts: int = 0

    def __enter__(self) -> "Pool":
        for _ in range(self.size):
            self._start_actor()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in [*self._idle, *self._starting.values()]:
            ray.kill(actor)
        self._idle.clear()
        self._starting.clear()

    def run(
        self,
        jobs: Sequence[Job],
        submit: Callable[[Any, Job], Any],
        on_done: Callable[[Job, Any], None],
        *,
        max_tries: int = MAX_TRIES,
    ) -> list[Failure[Job]]:
        """Hand out the jobs in the order given, one a time to each actor; `submit(actor, job)` gives the object ref.

        Returns the jobs that failed `max_tries` times. Raises RunFailed where actors cannot even start.
        """
        waiting: deque[_Try[Job]] = deque(_Try(job) for job in jobs)
        busy: dict[Any, tuple[Any, _Try[Job]]] = {}
        failures: list[Failure[Job]] = []
        while waiting or busy:
            while waiting and self._idle:
                attempt = waiting.popleft()
                actor = self._take_idle(other_than=attempt.last_actor)
                busy[submit(actor, attempt.job)] = (actor, attempt)
            done, _ = ray.wait([*busy, *self._starting], num_returns=1)
            for ref in done:
                if ref in self._starting:
                    self._finish_start(ref)
                    continue
                actor, attempt = busy.pop(ref)
                reason = self._finish(ref, actor, attempt.job, on_done)
                if reason is None:
                    continue
                attempt.n_failed, attempt.last_actor = attempt.n_failed + 1, actor
                if attempt.n_failed < max_tries:
                    waiting.append(attempt)
                else:
                    failures.append(Failure(job=attempt.job, n_tries=attempt.n_failed, reason=reason))
        return failures

    def _take_idle(self, *, other_than: Any) -> Any:
        others = [index for index, actor in enumerate(self._idle) if actor is not other_than]
        return self._idle.pop(others[0] if others else 0)

    def _finish(self, ref: Any, actor: Any, job: Job, on_done: Callable[[Job, Any], None]) -> str | None:
        """The reason of a failure, None where the job is done."""
        try:
            result = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            self._start_actor()
            return f"its worker died: {_first_line(error)}"
        except ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            return _first_line(error.cause or error)
        self._idle.append(actor)
        on_done(job, result)
        return None

    def _start_actor(self) -> None:
        actor = self.make_actor()
        self._starting[actor.ready.remote()] = actor

    def _finish_start(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            self._n_failed_starts += 1
            cause = getattr(error, "cause", None)
            if isinstance(cause, NeuronLensError):
                raise cause from error
            if self._n_failed_starts >= MAX_FAILED_STARTS:
                raise RunFailed(
                    f"{self._n_failed_starts} workers could not start; the last said: {_first_line(cause or error)}. "
                    "Look at the worker logs under /tmp/ray/session_latest/logs; too little memory for the model is "
                    "the usual reason."
                ) from error
            self._start_actor()
            return
        self._n_failed_starts = 0
        self._idle.append(actor)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
