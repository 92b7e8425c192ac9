"""Compiled code, compiled by one process for all of a machine.

numba compiles a function when it is first called and keeps the result on disk for whoever comes later. On a new machine
two collectors would each take 7 s of a core for the same pass over activations, and two layers' tasks 9 s each for
their scores; here the second waits for the first, and what the statistics need is compiled while workers start.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import ray
from filelock import FileLock, Timeout

from neuronlens import kernels
from neuronlens.bumps import Bumps
from neuronlens.distributions import distributions_of
from neuronlens.information import information_of
from neuronlens.overlap import is_compiled, pairs_of

_PATIENCE_SECONDS = 60


def compile_ahead() -> None:
    """Begin with what the statistics need, where nobody has compiled it yet, in a process of Ray's in which a layer's
    task may run later. Needs Ray to be running."""
    if not is_compiled():
        ray.remote(have_scores).options(num_cpus=0, max_retries=0).remote()


def have_accumulate() -> None:
    """Have ready what `neuronlens.accumulate.CpuAccumulator` runs."""
    with _one_at_a_time("accumulate"):
        kernels.ACCUMULATE.compile()


def have_scores() -> None:
    """Have ready what `pipeline.statistics` calls."""
    keys = {"neuron": pa.array([0, 0], pa.int32()), "concept": ["a", "b"]}
    moments = pa.table({**keys, **{name: [0.0, 1.0] for name in ("mean", "std", "min", "max")}})
    rows = pa.table({**keys, "bin": pa.array([0, 0], pa.int16()), "n": pa.array([1, 1], pa.int64())})
    with _one_at_a_time("scores"):
        bumps = Bumps.of(moments, hook_point="mlp_post", layer=0).with_counts(rows)
        distributions_of(bumps), information_of(bumps), pairs_of(bumps, tau=1.0)


@contextlib.contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """One process of this user's; but nobody waits for long, or where files cannot be locked: then all compile."""
    lock = FileLock(Path(tempfile.gettempdir()) / f"neuronlens-{os.getuid()}-{name}.lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            held.enter_context(lock.acquire(timeout=_PATIENCE_SECONDS))
        yield
