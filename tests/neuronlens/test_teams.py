"""Compiled loops on torch's own threads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neuronlens import teams
from neuronlens.teams import Loop, Task, loop, matrix, next_items, vector


@loop
def _add_row_numbers(task):
    """Each item is a row: its number is added to its values, and one to how often it was done."""
    x_RN, n_done_R = matrix(task, 0, np.float32), vector(task, 1, np.int64)
    first, last = next_items(task)
    while first < last:
        for r in range(first, last):
            for j in range(x_RN.shape[1]):
                x_RN[r, j] += r
            n_done_R[r] += 1
        first, last = next_items(task)


ADD_ROW_NUMBERS = Loop(_add_row_numbers, ((np.float32, 2), (np.int64, 1)))


@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize(("n_rows", "step"), [(1, None), (7, None), (1_000, 3), (1_000, None)])
def test_task__does_every_item_once_however_many_share_it(n_rows, step, n_threads, has_openmp, monkeypatch):
    if not has_openmp:
        monkeypatch.setattr(teams, "_gomp_parallel", lambda: None)
    x_RN, n_done_R = np.zeros((n_rows, 3), np.float32), np.zeros(n_rows, np.int64)
    task = Task(ADD_ROW_NUMBERS, [None, n_done_R])
    task.point(0, x_RN.ctypes.data, *x_RN.shape)
    for _ in range(3):
        task.run(n_rows, n_threads=n_threads, step=step)
    assert (n_done_R == 3).all()
    np.testing.assert_array_equal(x_RN, 3 * np.arange(n_rows, dtype=np.float32)[:, None].repeat(3, axis=1))


def test_task__of_nothing_does_nothing():
    x_RN, n_done_R = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
    Task(ADD_ROW_NUMBERS, [x_RN, n_done_R]).run(0, n_threads=2)
    assert not n_done_R.any()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 3)), np.zeros(12, np.float32), np.zeros((3, 4), np.float32).T, np.zeros((4, 6), "f4")[:, 3:]],
)
def test_task__refuses_an_array_that_the_loop_would_read_as_something_else(wrong):
    with pytest.raises(AssertionError, match="array 0 is"):
        Task(ADD_ROW_NUMBERS, [wrong, np.zeros(4, np.int64)])


def test_task__touches_nothing_where_the_loop_was_compiled_for_another_layout():
    """Such as one that an older version of this module left on disk."""
    x_RN, n_done_R = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
    task = Task(ADD_ROW_NUMBERS, [x_RN, n_done_R])
    task._words[teams._WHICH_LAYOUT] += 1
    with pytest.raises(RuntimeError, match="_add_row_numbers was compiled for another version"):
        task.run(4)
    assert not n_done_R.any()


_THREADS = """
import torch
from tests.neuronlens.test_teams import ADD_ROW_NUMBERS
import numpy as np
from neuronlens.teams import Task

def n_threads():
    return int(next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1])

torch.set_num_threads(3)
x_RN, n_done_R = np.zeros((4_000, 3), np.float32), np.zeros(4_000, np.int64)
task = Task(ADD_ROW_NUMBERS, [x_RN, n_done_R])
task.run(4_000)
before = n_threads()
torch.randn(1_000, 1_000).exp_()
with_torch = n_threads()
task.run(4_000, n_threads=3)
print(before, with_torch, n_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the number of threads")
def test_task__is_shared_out_over_the_threads_that_torch_has_already():
    done = subprocess.run([sys.executable, "-c", _THREADS], capture_output=True, text=True, check=True)
    before, with_torch, after = map(int, done.stdout.split())
    assert with_torch >= before + 2, "torch made no threads, so this shows nothing"
    assert after == with_torch
