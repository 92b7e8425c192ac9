import importlib

from neuronlens.compiled import is_on_disk

_SOURCE = """
from neuronlens.compiled import jit, part

@part
def half(x):
    return x / 2

@jit
def quarter(x):
    return half(half(x))
"""


def test_is_on_disk__says_whether_somebody_has_compiled_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loops_of_a_test.py").write_text(_SOURCE)
    loops = importlib.import_module("loops_of_a_test")
    assert not is_on_disk(loops.quarter)
    assert loops.quarter(8.0) == 2.0
    assert is_on_disk(loops.quarter)
    (tmp_path / "loops_of_a_test.py").write_text("\n" + _SOURCE)
    assert not is_on_disk(importlib.reload(loops).quarter), "its code has moved"
