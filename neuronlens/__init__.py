"""NeuronLens: which values of which neurons belong to a concept, and what a model does without them.

Importing this package is light: torch, transformers, ray and duckdb are imported by the name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronlens.client import Client
    from neuronlens.interventions import intervene
    from neuronlens.lens import Lens, open
    from neuronlens.programs import Program, Rule
    from neuronlens.ranges import RangeTable

__all__ = ["Client", "Lens", "Program", "RangeTable", "Rule", "intervene", "open"]

# The module is not called `intervene`: importing it would put itself in the function's place.
_HOME = {
    "Client": "neuronlens.client",
    "Lens": "neuronlens.lens",
    "Program": "neuronlens.programs",
    "RangeTable": "neuronlens.ranges",
    "Rule": "neuronlens.programs",
    "intervene": "neuronlens.interventions",
    "open": "neuronlens.lens",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuronlens' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
