"""Compiled loops on the threads that run torch's own operations.

After an operation torch's OpenMP threads stay awake for a while, so as to take up the next at once. Threads of ours
would share the cores with them: on two cores a second one gains nothing. OpenMP's own way in, `GOMP_parallel`, which
GNU's library has and Intel's and LLVM's have too, runs a loop of ours on just those threads.

A loop is a compiled function of one address, where its arguments lie (`Task`). In it, `next_items` says what is to be
done, until nothing is left; `vector`, `matrix` and `cube` are its arrays.
"""

import ctypes
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from neuronlens.compiled import part

loop = numba.njit(error_model="numpy", cache=True, no_cpython_wrapper=True)
"""For functions of a task's address, which C calls. Machine code is kept on disk as that of `compiled.jit` is."""

_LAYOUT = 1
"""To be raised when a task's words change: whether kept code is old, numba asks of the loop's own file alone."""
_TAKEN, _STEP, _N_ITEMS, _WHICH_LAYOUT, _N_HEAD = range(5)
_WORDS_AN_ARRAY = 4
"""Its address, and up to three dimensions."""


@dataclass(frozen=True)
class Loop:
    """A `loop` function, and the dtype and number of dimensions of each array that it finds in its task."""

    function: Any
    arrays: tuple[tuple[type[np.generic], int], ...]

    def compile(self) -> None:
        """Compile it where nobody has, and load it."""
        self.function.compile((types.voidptr,))

    @cached_property
    def call(self) -> Any:
        """The machine code, as Python calls it: with a task's address."""
        self.compile()
        made = self.function.overloads[types.voidptr,]
        address = made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name)
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def call_on_team(self, task: int, n_threads: int) -> None:
        """The same by so many threads at once."""
        parallel = _gomp_parallel()
        if parallel is not None:
            parallel(self.call, task, n_threads, 0)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(self.call, [task] * n_threads))


class Task:
    """A loop with its arrays, to be run by one thread at a time, many times over.

    The arrays must stay where they are; those that differ from run to run are None here, and set by `point`.
    """

    def __init__(self, loop: Loop, arrays: Sequence[np.ndarray | None]) -> None:
        self._loop = loop
        self._arrays = arrays  # the loop knows their addresses only
        # Python's own array: its words are set in a fraction of the time that numpy takes.
        self._words = array("q", bytes(8 * (_N_HEAD + _WORDS_AN_ARRAY * len(loop.arrays))))
        self._words[_WHICH_LAYOUT] = _LAYOUT
        self._here, _ = self._words.buffer_info()
        for i, (values, (dtype, n_dimensions)) in enumerate(zip(arrays, loop.arrays, strict=True)):
            if values is not None:
                found = values.dtype, values.ndim, values.flags.c_contiguous
                assert found == (np.dtype(dtype), n_dimensions, True), f"array {i} is {found}, not {loop.arrays[i]}"
                self.point(i, values.ctypes.data, *values.shape)

    def point(self, i: int, address: int, *shape: int) -> None:
        """Array i lies at this address, in C's order, and has this shape. Nobody checks it."""
        at = _N_HEAD + _WORDS_AN_ARRAY * i
        self._words[at] = address
        for dimension, length in enumerate(shape, start=at + 1):
            self._words[dimension] = length

    def run(self, n_items: int, *, n_threads: int = 1, step: int | None = None) -> None:
        """All items, `step` at a time (by default as many as each thread's share), on so many threads of torch's. The
        interpreter's lock is not held."""
        words = self._words
        words[_TAKEN] = 0
        words[_STEP] = step or max(-(-n_items // n_threads), 1)
        words[_N_ITEMS] = n_items
        if n_threads == 1:
            self._loop.call(self._here)
        else:
            self._loop.call_on_team(self._here, n_threads)
        if words[_TAKEN] < n_items:
            raise RuntimeError(
                f"{self._loop.function.py_func.__name__} was compiled for another version of {__name__}: delete the "
                f"compiled code in {self._loop.function.stats.cache_path}."
            )


@cache
def _gomp_parallel() -> Any:
    """OpenMP's entry as torch's own operations find it; None where there is none, or torch has not been loaded."""
    loaded = ctypes.CDLL(None) if os.name == "posix" else None
    found = getattr(loaded, "GOMP_parallel", None)
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.restype = None
    return found


# --- what loops call -------------------------------------------------------------------------------------------------


@part
def next_items(task):  # type: ignore[no-untyped-def]
    """The first of the items that this thread does next, and the one after the last; two of the same when all is done
    or being done."""
    words = carray(task, _N_HEAD, np.int64)
    if words[_WHICH_LAYOUT] != _LAYOUT:
        return 0, 0
    n_items, step = words[_N_ITEMS], words[_STEP]
    first = min(_take(task, step), n_items)
    return first, min(first + step, n_items)


@part
def vector(task, i, dtype):  # type: ignore[no-untyped-def]
    words = _array(task, i)
    return carray(_pointer(words[0]), (words[1],), dtype)


@part
def matrix(task, i, dtype):  # type: ignore[no-untyped-def]
    words = _array(task, i)
    return carray(_pointer(words[0]), (words[1], words[2]), dtype)


@part
def cube(task, i, dtype):  # type: ignore[no-untyped-def]
    words = _array(task, i)
    return carray(_pointer(words[0]), (words[1], words[2], words[3]), dtype)


@part
def _array(task, i):  # type: ignore[no-untyped-def]
    at = _N_HEAD + _WORDS_AN_ARRAY * i
    return carray(task, at + _WORDS_AN_ARRAY, np.int64)[at:]


@intrinsic
def _take(typing_context, task, step):  # type: ignore[no-untyped-def]
    """Add `step` to the task's first word; what it was before."""
    assert _TAKEN == 0

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "monotonic")

    return types.int64(types.voidptr, types.int64), generate


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate
