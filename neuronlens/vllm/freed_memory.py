"""What a step frees on a CPU is kept for the next step, as the tcmalloc does that some builds of vLLM bring along.

Inductor plans its buffers by where memory peaks. Our operation between an activation and the down projection moves the
peak, so that widest buffers are allocated once every other layer, where plain vLLM allocates one for all. glibc maps
buffers of over 32 MB anew each time, page by page: 100 MB of pages, 2 % of a prefill of 1,500 tokens.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of glibc's malloc.h."""
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """From now on this process returns freed memory to the system only where over 1 GiB of it is in one piece.

    Nothing happens without glibc's `mallopt`, and where another allocator has taken malloc's place.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
