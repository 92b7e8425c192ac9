"""Range-conditional interventions and collection inside vLLM's continuous batching.

vllm serve MODEL --worker-cls neuronlens.vllm.Worker      # a server whose requests may carry `intervention`
neuronlens serve STORE --engine vllm                      # the short form
docs/vllm.md                                              # how it works, what is supported, what is refused and why

Nothing here imports vLLM before it is used: `Worker` is made for whatever platform vLLM finds.
"""

from typing import Any

__all__ = ["Worker"]


def __getattr__(name: str) -> Any:
    if name == "Worker":
        from neuronlens.vllm.worker import worker_class

        return worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
