"""One driver a store, whatever the clocks say, and none for ever."""

import contextlib
import multiprocessing
import os
import signal
import time

import psutil
import pytest

from neuronlens.store import Store
from pipeline import lease as lease_module
from pipeline.lease import Lease, StoreHeld, current, identity_of_this_process


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 1.0)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    opened = Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")
    yield opened
    for name in opened.names("leases"):
        opened.remove(f"leases/{name}")


def elsewhere(**changes):
    """The lease of a process on another machine."""
    return {
        "token": "a",
        "purpose": "neuronlens run",
        "beat": 3,
        **identity_of_this_process(),
        "machine": "another",
        "host": "node-7",
        **changes,
    }


def test_lease__is_given_back(store):
    for _ in range(2):
        with Lease(store, "test"):
            number, holder = current(store)
            assert (number, holder["pid"]) == (1, os.getpid())
    assert current(store) == (0, None)
    assert store.names("leases") == []


def test_lease__names_the_holder_and_stops_at_once_on_the_same_machine(store, monkeypatch):
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 600.0)
    started = time.monotonic()
    with (
        Lease(store, "neuronlens run"),
        pytest.raises(StoreHeld, match=rf"held by 'neuronlens run' of .*process {os.getpid()} on "),
        Lease(store, "another"),
    ):
        pass
    assert time.monotonic() - started < 60


def _hold(root, ready):
    with Lease(Store(root), "to be killed"):
        ready.set()
        time.sleep(60)


def test_lease__of_a_killed_process_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 600.0)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    started = time.monotonic()
    with Lease(Store(str(tmp_path)), "next"):
        assert current(Store(str(tmp_path)))[0] == 2
    assert time.monotonic() - started < 60


def test_lease__of_a_reused_process_number_is_not_taken_for_alive(store):
    reused = {**identity_of_this_process(), "process_started": psutil.Process().create_time() - 1000}
    store.create_json("leases/00001.json", elsewhere() | reused)
    with Lease(store, "next"):
        assert current(store)[0] == 2


def test_lease__of_a_silent_machine_is_taken_after_watching_it(store):
    store.create_json("leases/00004.json", elsewhere())
    lines, started = [], time.monotonic()
    with Lease(store, "next", lines.append):
        assert current(store)[0] == 5
    assert time.monotonic() - started >= 1.0
    assert "process" in lines[0]
    assert "node-7" in lines[0]


def test_lease__of_a_machine_that_gives_signs_of_life_is_not_taken(store):
    store.create_json("leases/00001.json", elsewhere())
    seen = []

    def beat(line):
        seen.append(line)
        store.replace_json("leases/00001.json", elsewhere(beat=4))

    with pytest.raises(StoreHeld, match="node-7"), Lease(store, "next", beat):
        pass
    assert seen


def test_lease__tells_a_driver_that_was_frozen_that_it_lost_the_store(store):
    with Lease(store, "frozen") as lease:
        lease.check()
        store.create_json("leases/00002.json", elsewhere(purpose="the next run"))
        time.sleep(0.5)
        with pytest.raises(StoreHeld, match="taken over by 'the next run'"):
            lease.check()
    assert store.names("leases") == ["00002.json"], "what the other holds is left alone"


def dead_here(**changes):
    return elsewhere(pid=2**22 - 1) | {"machine": lease_module._machine()} | changes


class Late(Store):
    """Sees the leases as they were: right after the first list, another driver goes on by `then`."""

    def names(self, folder):
        names = super().names(folder)
        if then := self.__dict__.pop("then", None):
            then()
        return names


def test_lease__is_not_taken_by_one_that_saw_a_dead_holder_before_another_took_over(tmp_path):
    """The dead holder's file goes away between being listed and being read: the store is held, not free."""
    Store(str(tmp_path)).create_json("leases/00001.json", dead_here())
    late = Late(str(tmp_path))
    with contextlib.ExitStack() as held:
        late.__dict__["then"] = lambda: held.enter_context(Lease(Store(str(tmp_path)), "first"))
        with pytest.raises(StoreHeld, match="first"), Lease(late, "late"):
            pass
        assert late.names("leases") == ["00002.json"]


def test_lease__is_not_taken_under_a_lower_number_than_the_holder_has(tmp_path, monkeypatch):
    """Whoever was slow to create its number finds the store two numbers on."""
    store = Store(str(tmp_path))
    store.create_json("leases/00001.json", dead_here())
    with contextlib.ExitStack() as held:

        def while_looking(holder):
            if not store.exists("leases/00003.json"):
                store.remove("leases/00001.json")
                store.create_json("leases/00003.json", elsewhere(purpose="two numbers on"))
                return False
            return True

        monkeypatch.setattr(lease_module, "is_alive_here", while_looking)
        with pytest.raises(StoreHeld, match="two numbers on"):
            held.enter_context(Lease(store, "slow"))
    assert store.names("leases") == ["00003.json"]


def _take(root, start, winners):
    start.wait()
    try:
        with Lease(Store(root), "racer"):
            winners.put(True)
            time.sleep(3)
    except StoreHeld:
        winners.put(False)


def test_lease__of_a_dead_driver_goes_to_one_of_those_that_race_for_it(tmp_path):
    Store(str(tmp_path)).create_json("leases/00001.json", dead_here())
    context = multiprocessing.get_context("fork")
    start, winners = context.Event(), context.Queue()
    racers = [context.Process(target=_take, args=(str(tmp_path), start, winners)) for _ in range(5)]
    for racer in racers:
        racer.start()
    start.set()
    assert sorted(winners.get(timeout=30) for _ in racers) == [False] * 4 + [True]
    for racer in racers:
        racer.join()
