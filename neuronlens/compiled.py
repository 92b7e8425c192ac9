"""How numba compiles our loops. Machine code is kept beside the source, or in NUMBA_CACHE_DIR."""

from pathlib import Path
from typing import Any

import numba

jit = numba.njit(nogil=True, cache=True, error_model="numpy")
"""For functions that Python calls: they let go of the interpreter's lock."""

PART = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
part = numba.njit(**PART)
"""For functions that only compiled code calls, and that become part of it. Without a way in from Python, and a file of
their own, there is up to a fifth less to compile."""


def is_on_disk(function: Any) -> bool:
    """Whether some process has compiled this `jit` function and kept it; for this very source and CPU, most likely."""
    code = function.py_func.__code__
    kept = f"{Path(code.co_filename).stem}.{function.__qualname__}-{code.co_firstlineno}.*.nbi"
    return any(Path(function.stats.cache_path).glob(kept))
