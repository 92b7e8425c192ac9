"""Buffers that every step frees and asks for again."""

import platform
import subprocess
import sys

import pytest

_STEPS = """
import resource
import numpy as np
from neuronlens.vllm.freed_memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.empty(50 << 20, np.uint8)[:] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
print(new_pages())
keep_freed_memory()
new_pages()
print(new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator keeps what is freed by its own rules")
def test_keep_freed_memory__spares_wide_buffers_their_pages():
    done = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True)
    without, with_it = map(int, done.stdout.split())
    assert without >= 4 * 25, "a page is at most 2 MB: this glibc keeps such buffers anyway, and the module can go"
    assert with_it <= 2
