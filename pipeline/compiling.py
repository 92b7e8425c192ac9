"""Have the compiled code that a run needs on disk before several processes need it at the same moment.

numba compiles a function when it is first called, and keeps it for all processes that come later. On a new machine a
run's collectors would each take 7 s of a core to compile the same pass over activations, its layers' tasks 9 s each.
"""

import numpy as np
import pyarrow as pa
import ray

from neuronlens import kernels
from neuronlens.bumps import Bumps
from neuronlens.distributions import distributions_of
from neuronlens.histograms import N_BINS
from neuronlens.information import information_of
from neuronlens.overlap import pairs_of


def compile_ahead() -> None:
    """Compile in a process of Ray's, while workers import their libraries, and wait for nothing. Needs Ray to be
    running; the process is there for a layer's task later."""
    ray.remote(compile_kernels).options(num_cpus=0, max_retries=0).remote()


def compile_kernels() -> None:
    """Run what collecting and the statistics run, on one neuron."""
    _accumulate()
    _describe()


def _accumulate() -> None:
    """As `neuronlens.accumulate.CpuAccumulator`, without torch, whose import would take as long."""
    counts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    state_SN, counts_NB = np.zeros((kernels.N_STATE, 1)), np.zeros((1, N_BINS), np.int32)
    kernels.accumulate(np.zeros((1, 1), np.float32), np.zeros(1, np.int64), 0, 1, *counts, state_SN, counts_NB)


def _describe() -> None:
    keys = {"neuron": pa.array([0, 0], pa.int32()), "concept": ["a", "b"]}
    moments = pa.table({**keys, **{name: [0.0, 1.0] for name in ("mean", "std", "min", "max")}})
    rows = pa.table({**keys, "bin": pa.array([0, 0], pa.int16()), "n": pa.array([1, 1], pa.int64())})
    bumps = Bumps.of(moments, hook_point="mlp_post", layer=0).with_counts(rows)
    distributions_of(bumps), information_of(bumps), pairs_of(bumps, tau=1.0)
