"""The pool hands out every job once, survives workers that die, and gives up on jobs that cannot be done."""

import os
from collections import Counter

import pytest
import ray

from neuronlens.errors import RunFailed, UsageError
from pipeline.pool import Pool

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=0.1, max_restarts=0)
class Worker:
    def ready(self):
        return os.getpid()

    def work(self, job):
        if job == "raise":
            raise ValueError("this job cannot be done")
        if job == "kill":
            os._exit(1)
        return f"{job} done"


@ray.remote(num_cpus=0.1)
class BadWorker:
    def __init__(self, error):
        self.error = error

    def ready(self):
        raise self.error


def run(jobs, size=3):
    done = {}
    with Pool(make_actor=Worker.remote, size=size) as pool:
        failures = pool.run(
            jobs, lambda actor, job: actor.work.remote(job), lambda job, result: done.update({job: result})
        )
    return done, failures


def test_pool__does_every_job_once():
    seen = Counter()
    with Pool(make_actor=Worker.remote, size=3) as pool:
        failures = pool.run(
            list(range(20)), lambda actor, job: actor.work.remote(job), lambda job, _: seen.update([job])
        )
    assert failures == []
    assert seen == Counter(range(20))


@pytest.mark.parametrize(("bad", "reason"), [("raise", "this job cannot be done"), ("kill", "its worker died")])
def test_pool__gives_up_on_a_job_that_fails_every_time_and_does_the_others(bad, reason):
    done, failures = run(["a", bad, "b", "c"], size=2)
    assert sorted(done) == ["a", "b", "c"]
    [failure] = failures
    assert (failure.job, failure.n_tries) == (bad, 3)
    assert reason in failure.reason


def test_pool__ends_when_its_only_worker_dies_of_every_job():
    done, failures = run(["kill", "a"], size=1)
    assert done == {"a": "a done"}
    assert len(failures) == 1


def test_pool__says_why_workers_cannot_start():
    with (
        pytest.raises(RunFailed, match="3 workers could not start"),
        Pool(make_actor=lambda: BadWorker.remote(MemoryError("too big")), size=1) as pool,
    ):
        pool.run(["a"], lambda actor, job: actor.work.remote(job), lambda *_: None)


def test_pool__passes_on_what_the_person_did_wrong():
    with (
        pytest.raises(UsageError, match="no such model"),
        Pool(make_actor=lambda: BadWorker.remote(UsageError("no such model")), size=1) as pool,
    ):
        pool.run(["a"], lambda actor, job: actor.work.remote(job), lambda *_: None)
