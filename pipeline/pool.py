"""A pool of Ray actors that hold a model each, and the loop that hands jobs out to them and survives their death.

A job that fails is tried again, on another actor where there is one, then given up: the others finish, and the caller
learns what failed and why. Workers may die, leave with their node, and join while the loop runs. A death costs each job
that the worker held a try, and such a job is then tried alone, so that a job that kills its worker takes no other with
it in the end; a lost node costs no try, since it says nothing about the job. All are counted, so the loop ends.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import ray

from neuronlens.errors import NeuronLensError, RunFailed
from neuronlens.retry import StorageFailed, StoreUnusable

Job = TypeVar("Job")

MAX_TRIES = 3
MAX_LOST_NODES = 10
"""How many nodes one job may lose before it counts as the reason."""
MAX_FAILED_STARTS = 3
TICK_SECONDS = 0.5
RESIZE_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""After so long without any worker, the watcher hears that there is none."""
NODE_DEATH_SECONDS = 3.0
"""A worker's death may be known before the death of its node; so long is waited for the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(Generic[Job]):
    """A job that was given up, with the reason of each try."""

    job: Job
    reasons: tuple[str, ...]

    @property
    def n_tries(self) -> int:
        return len(self.reasons)

    @property
    def reason(self) -> str:
        return self.reasons[-1]


class Started(NamedTuple):
    """A new actor and the object ref of its heavy start, which gives its Place and may fail.

    `end` ends the actor, and gives back what was reserved for it. `rest` is for an actor that is whole and has nothing
    in hand when the pool ends; by default it is ended too.
    """

    actor: Any
    ready: Any
    end: Callable[[Any], None] = ray.kill
    rest: Callable[[Any], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker runs."""

    node_id: str
    address: str
    pid: int

    def __str__(self) -> str:
        return f"{self.address}, process {self.pid}"


class Watcher(Generic[Job]):
    """Hears what happens to the jobs. Override what is of interest."""

    def started(self, job: Job, place: Place) -> None: ...

    def done(self, job: Job, result: Any) -> None: ...

    def failed(self, job: Job, reason: str) -> None:
        """One try failed; another will follow."""

    def gave_up(self, failure: Failure[Job]) -> None: ...

    def tick(self, workers: dict[str, int]) -> None:
        """Called about twice a second, with the number of workers that are starting, idle and busy."""

    def stop_requested(self) -> bool:
        """True to hand out no more jobs."""
        return False

    def grace_seconds(self) -> float:
        """How long the jobs in hand may still take once a stop was requested."""
        return 0.0

    def no_workers(self, seconds: float) -> None:
        """No worker has been there for so long; jobs wait."""


@dataclass(slots=True, eq=False)
class _Try(Generic[Job]):
    job: Job
    reasons: list[str] = field(default_factory=list)
    n_lost: int = 0
    last_worker: "_Worker | None" = None
    alone: bool = False


@dataclass(slots=True, eq=False)
class _Worker:
    actor: Any
    end: Callable[[Any], None]
    rest: Callable[[Any], None]
    place: Place
    n_jobs: int = 0
    is_alone: bool = False
    is_lost: bool = False
    """It died because its node did."""


@dataclass(slots=True)
class Pool(Generic[Job]):
    """Workers made by `start`, as many as `size()` says at any time, each with up to `depth` jobs in hand."""

    start: Callable[[], Started]
    size: Callable[[], int]
    depth: int = 1
    _workers: list[_Worker] = field(default_factory=list)
    _starting: dict[Any, Started] = field(default_factory=dict)
    _n_failed_starts: int = 0
    _n_storage_failures: int = 0
    """Since the last job that was done: storage that fails for everybody ends the run, not each job in its turn."""
    _resize_at: float = 0.0
    _waiting: deque[_Try[Job]] = field(default_factory=deque)
    _busy: dict[Any, tuple[_Worker, _Try[Job]]] = field(default_factory=dict)
    _failures: list[Failure[Job]] = field(default_factory=list)

    def __enter__(self) -> "Pool[Job]":
        self._resize()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            leave = worker.end if worker.n_jobs else worker.rest
            leave(worker.actor)
        for started in self._starting.values():
            started.end(started.actor)
        self._workers.clear()
        self._starting.clear()

    def run(
        self,
        jobs: Sequence[Job],
        submit: Callable[[Any, Job], Any],
        watcher: Watcher[Job],
        *,
        max_tries: int = MAX_TRIES,
    ) -> list[Failure[Job]]:
        """Hand out the jobs in the order given; `submit(actor, job)` gives the object ref of the job's result.

        Returns the jobs that failed `max_tries` times. Where the watcher asks for a stop, returns once the jobs in hand
        are done or their grace is over. Raises RunFailed where actors cannot even start, StoreUnusable at once where a
        worker met storage that no worker can write, StorageFailed where none gets an answer.
        """
        self._waiting.extend(_Try(job) for job in jobs)
        alive_at = time.monotonic()
        while self._waiting or self._busy:
            if watcher.stop_requested():
                self._drain(watcher, max_tries)
                break
            self._hand_out(submit, watcher)
            for ref in _finished([*self._busy, *self._starting]):
                if ref in self._starting:
                    self._finish_start(ref)
                else:
                    self._finish(ref, watcher, max_tries)
            now = time.monotonic()
            if now > self._resize_at and self._waiting:
                self._resize()
            watcher.tick(self._states())
            alive_at = now if self._workers else alive_at
            if now - alive_at > PATIENCE_SECONDS:
                watcher.no_workers(now - alive_at)
                alive_at = now
        failures, self._failures = self._failures, []
        return failures

    def _hand_out(self, submit: Callable[[Any, Job], Any], watcher: Watcher[Job]) -> None:
        passed_over = []
        while self._waiting:
            attempt = self._waiting.popleft()
            worker = self._worker_for(attempt)
            if worker is None:
                passed_over.append(attempt)
                if attempt.alone:
                    continue
                break
            worker.n_jobs += 1
            worker.is_alone = attempt.alone
            attempt.last_worker = worker
            self._busy[submit(worker.actor, attempt.job)] = (worker, attempt)
            watcher.started(attempt.job, worker.place)
        self._waiting.extendleft(reversed(passed_over))

    def _worker_for(self, attempt: _Try[Job]) -> _Worker | None:
        """The least busy worker with room, rather another than the one where the job has failed.

        The last jobs go out one a worker, so that none waits behind another while a worker stands idle.
        """
        room = 1 if attempt.alone or len(self._waiting) < len(self._workers) else self.depth
        free = [worker for worker in self._workers if worker.n_jobs < room and not worker.is_alone]
        return min(free, key=lambda worker: (worker is attempt.last_worker, worker.n_jobs), default=None)

    def _finish(self, ref: Any, watcher: Watcher[Job], max_tries: int) -> None:
        worker, attempt = self._busy.pop(ref)
        worker.n_jobs -= 1
        worker.is_alone = False
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            self._n_storage_failures += isinstance(error.cause, StorageFailed)
            limit = 2 * max(MAX_TRIES, len(self._workers))
            if isinstance(error.cause, StoreUnusable) or self._n_storage_failures > limit:
                raise error.cause from error
            self._failed(attempt, _first_line(error.cause or error), watcher, max_tries)
        except ray.exceptions.RayError as error:
            self._bury(worker, error)
            if worker.is_lost and attempt.n_lost < MAX_LOST_NODES:
                attempt.n_lost += 1
                self._waiting.appendleft(attempt)
                watcher.failed(attempt.job, f"its node {worker.place.address} was lost")
            else:
                attempt.alone = True
                self._failed(attempt, f"its worker died ({worker.place}): {_death(error)}", watcher, max_tries)
        else:
            self._n_storage_failures = 0
            watcher.done(attempt.job, result)

    def _failed(self, attempt: _Try[Job], reason: str, watcher: Watcher[Job], max_tries: int) -> None:
        attempt.reasons.append(reason)
        if len(attempt.reasons) < max_tries:
            self._waiting.append(attempt)
            watcher.failed(attempt.job, reason)
        else:
            failure = Failure(job=attempt.job, reasons=tuple(attempt.reasons))
            self._failures.append(failure)
            watcher.gave_up(failure)

    def _drain(self, watcher: Watcher[Job], max_tries: int) -> None:
        """Take what still comes in within the grace; the rest is dropped."""
        end = time.monotonic() + watcher.grace_seconds()
        while self._busy and time.monotonic() < end:
            for ref in _finished(list(self._busy)):
                self._finish(ref, watcher, max_tries)
            watcher.tick(self._states())

    def _bury(self, worker: _Worker, error: Exception) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            worker.is_lost = _is_lost(worker.place, error)
            worker.end(worker.actor)
            self._resize_at = 0.0

    def _resize(self) -> None:
        """Start workers where there are fewer than wanted; those that are too many are left to finish."""
        self._resize_at = time.monotonic() + RESIZE_SECONDS
        if self._n_failed_starts >= MAX_FAILED_STARTS:
            return
        n_wanted = min(self.size(), len(self._waiting) + len(self._busy)) if self._waiting else self.size()
        for _ in range(n_wanted - len(self._workers) - len(self._starting)):
            started = self.start()
            self._starting[started.ready] = started

    def _finish_start(self, ref: Any) -> None:
        started = self._starting.pop(ref)
        try:
            place = ray.get(ref)
        except ray.exceptions.RayError as error:
            started.end(started.actor)
            self._n_failed_starts += 1
            cause = getattr(error, "cause", None)
            if isinstance(cause, NeuronLensError):
                raise cause from error
            self._resize_at = 0.0
            if self._n_failed_starts >= MAX_FAILED_STARTS and not self._workers:
                raise RunFailed(
                    f"{self._n_failed_starts} workers could not start; the last said: {_first_line(cause or error)}. "
                    "Look at the worker logs under /tmp/ray/session_latest/logs; too little memory for the model is "
                    "the usual reason."
                ) from error
            return
        self._n_failed_starts = 0
        self._workers.append(_Worker(started.actor, started.end, started.rest or started.end, place))

    def _states(self) -> dict[str, int]:
        n_busy = sum(worker.n_jobs > 0 for worker in self._workers)
        return {"starting": len(self._starting), "idle": len(self._workers) - n_busy, "busy": n_busy}


def here() -> Place:
    """The place of the process that asks: a worker's answer when its start is done."""
    node_id = ray.get_runtime_context().get_node_id()
    return Place(node_id=node_id, address=ray.util.get_node_ip_address(), pid=os.getpid())


def _finished(refs: list[Any]) -> list[Any]:
    """All that is done, after waiting for the first for a tick at most."""
    if not refs:
        time.sleep(TICK_SECONDS)
        return []
    done, _ = ray.wait(refs, num_returns=1, timeout=TICK_SECONDS, fetch_local=False)
    if not done:
        return []
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
    return done


def _is_lost(place: Place, error: BaseException) -> bool:
    """Is the worker's node gone? Asked after a death, for a moment: the cluster may learn of it a little later."""
    if "node has died" in str(error) or getattr(error, "preempted", False):
        return True
    end = time.monotonic() + NODE_DEATH_SECONDS
    while time.monotonic() < end:
        if not any(node["Alive"] and node["NodeID"] == place.node_id for node in ray.nodes()):
            return True
        time.sleep(0.2)
    return False


def _death(error: BaseException) -> str:
    """Ray's own words on why a process died, without the ids of its actors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ids = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")
    told = [line for line in lines[1:] if not line.startswith(ids)]
    return " ".join([*told, *lines][:1]).partition(" Worker exit detail")[0] or type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
