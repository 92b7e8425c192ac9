"""The pool hands out every job once, survives workers that die, and gives up on jobs that cannot be done."""

import errno
import os
import time
from collections import Counter

import pytest
import ray

from neuronlens.errors import RunFailed, UsageError
from neuronlens.retry import StoreUnusable
from pipeline.pool import Pool, Started, Watcher, here

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=0.1, max_restarts=0, max_concurrency=2)
class Worker:
    def ready(self):
        return here()

    def work(self, job):
        if job == "raise":
            raise ValueError("this job cannot be done")
        if job == "kill":
            os._exit(1)
        if job == "full":
            raise StoreUnusable(f"no room left ({errno.ENOSPC})")
        if isinstance(job, str) and job.startswith("slow"):
            time.sleep(1.0)
        return f"{job} done"


@ray.remote(num_cpus=0.1)
class BadWorker:
    def __init__(self, error):
        self.error = error

    def ready(self):
        raise self.error


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch):
    monkeypatch.setattr("pipeline.pool.NODE_DEATH_SECONDS", 0.3)


class Notes(Watcher):
    def __init__(self, stop_after=None):
        self.results, self.starts, self.tries, self.most_workers = {}, Counter(), [], 0
        self.stop_after = stop_after

    def started(self, job, place):
        self.starts[job] += 1

    def done(self, job, result):
        self.results[job] = result

    def failed(self, job, reason):
        self.tries.append((job, reason))

    def tick(self, workers):
        self.most_workers = max(self.most_workers, sum(workers.values()))

    def stop_requested(self):
        return self.stop_after is not None and len(self.results) >= self.stop_after

    def grace_seconds(self):
        return 5.0


def start():
    actor = Worker.remote()
    return Started(actor, actor.ready.remote())


def bad_start(error):
    actor = BadWorker.remote(error)
    return Started(actor, actor.ready.remote())


def run(jobs, *, size=3, depth=1, stop_after=None, starter=start):
    notes = Notes(stop_after)
    with Pool(start=starter, size=size if callable(size) else lambda: size, depth=depth) as pool:
        failures = pool.run(jobs, lambda actor, job: actor.work.remote(job), notes)
    return notes, failures


@pytest.mark.parametrize("depth", [1, 2])
def test_pool__does_every_job_once(depth):
    notes, failures = run(list(range(20)), depth=depth)
    assert failures == []
    assert notes.starts == Counter(range(20))
    assert notes.results == {job: f"{job} done" for job in range(20)}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("bad", "reason"), [("raise", "this job cannot be done"), ("kill", "its worker died")])
def test_pool__gives_up_on_a_job_that_fails_every_time_and_does_the_others(bad, reason, depth):
    notes, failures = run(["a", bad, *"bcdefgh"], size=2, depth=depth)
    assert sorted(notes.results) == list("abcdefgh")
    [failure] = failures
    assert (failure.job, failure.n_tries) == (bad, 3)
    assert reason in failure.reason
    assert len(notes.tries) >= 2, "each try is told"


def test_pool__ends_when_its_only_worker_dies_of_every_job():
    notes, failures = run(["kill", "a"], size=1, depth=2)
    assert notes.results == {"a": "a done"}
    assert [failure.job for failure in failures] == ["kill"]


def test_pool__says_why_workers_cannot_start():
    with pytest.raises(RunFailed, match="3 workers could not start"):
        run(["a"], size=1, starter=lambda: bad_start(MemoryError("too big")))


def test_pool__goes_on_with_the_workers_that_could_start():
    starts = iter(range(100))
    notes, failures = run(
        list(range(12)), size=3, starter=lambda: start() if next(starts) == 0 else bad_start(MemoryError("too big"))
    )
    assert failures == []
    assert len(notes.results) == 12


def test_pool__passes_on_what_the_person_did_wrong():
    with pytest.raises(UsageError, match="no such model"):
        run(["a"], size=1, starter=lambda: bad_start(UsageError("no such model")))


def test_pool__stops_at_once_where_no_worker_could_write():
    with pytest.raises(StoreUnusable, match="no room left"):
        run(["full", *range(50)], size=1)


def test_pool__takes_in_what_is_in_hand_when_it_is_asked_to_stop():
    notes, failures = run([f"slow {n}" for n in range(9)], size=3, stop_after=1)
    assert failures == []
    assert 3 <= len(notes.results) <= 4, "those in hand were taken in, no others were handed out"


def test_pool__grows_while_it_runs(monkeypatch):
    monkeypatch.setattr("pipeline.pool.RESIZE_SECONDS", 0.5)
    began = time.monotonic()
    notes, _ = run([f"slow {n}" for n in range(12)], size=lambda: 1 if time.monotonic() - began < 2 else 4)
    assert len(notes.results) == 12
    assert notes.most_workers == 4
