"""The model belongs to one shard at a time, and its idle time to the right reason."""

import threading
import time

import pytest

from pipeline.turns import Turns


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_turns__tell_storage_that_is_behind_from_shards_that_are_missing():
    clock = Clock()
    turns = Turns(2, clock)
    clock.now += 3  # nobody came
    with turns.forward() as waited:
        assert waited == {"storage_wait": 0.0, "work_wait": 3.0}
        clock.now += 5
    with turns.writing():
        clock.now += 1  # one is being written, there is room for another, none comes
        with turns.forward() as waited:
            assert waited == {"storage_wait": 0.0, "work_wait": 1.0}
            clock.now += 2
        with turns.writing():
            clock.now += 7  # both places are taken by storage
        clock.now += 0.5
        with turns.forward() as waited:
            assert waited == {"storage_wait": 7.0, "work_wait": 0.5}


def test_turns__count_nothing_as_idle_while_the_model_runs():
    clock = Clock()
    turns = Turns(2, clock)
    with turns.writing(), turns.writing(), turns.forward():
        clock.now += 9
    with turns.forward() as waited:
        assert waited["storage_wait"] == pytest.approx(0.0)


def test_turns__give_the_model_to_one_thread_while_others_write():
    turns, at_once, most, beside = Turns(2), 0, 0, 0
    is_writing = threading.Event()

    def shard():
        nonlocal at_once, most, beside
        with turns.forward():
            at_once += 1
            most = max(most, at_once)
            beside += is_writing.is_set()
            time.sleep(0.02)
            at_once -= 1
        with turns.writing():
            is_writing.set()
            time.sleep(0.03)

    def work():
        for _ in range(5):
            shard()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert beside >= 5, "the model ran while a shard was being written"
