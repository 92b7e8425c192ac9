"""How numba compiles our loops. Machine code is kept beside the source, or in NUMBA_CACHE_DIR."""

import numba

jit = numba.njit(nogil=True, cache=True, error_model="numpy")
"""For functions that Python calls: they let go of the interpreter's lock."""

PART = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
part = numba.njit(**PART)
"""For functions that only compiled code calls, and that become part of it. Without a way in from Python, and a file of
their own, a fifth less is to be compiled."""
