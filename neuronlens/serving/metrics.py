"""What Prometheus reads at GET /metrics. Every server has a registry of its own, so that tests and replicas do too."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from neuronlens.serving.engine import EngineLoad

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)


class Metrics:
    """Counters of one server. Any thread may count."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("neuronlens_build", "What runs here.", registry=registry).info(
            {"version": version("neuronlens"), "python": platform.python_version()}
        )
        self._requests = Counter(
            "neuronlens_requests_total",
            "Requests that were answered. Status 499: the client left first.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "neuronlens_request_seconds",
            "From a request's first byte to its answer's last.",
            ["route"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("neuronlens_requests_in_flight", "Requests at work.", registry=registry)
        self._prompt_tokens = Counter("neuronlens_prompt_tokens_total", "Tokens of prompts.", registry=registry)
        self._generated_tokens = Counter("neuronlens_generated_tokens_total", "Tokens generated.", registry=registry)
        self._first_token_seconds = Histogram(
            "neuronlens_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._token_seconds = Histogram(
            "neuronlens_time_per_output_token_seconds",
            "Mean of a sequence's tokens after its first.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._batch_size = Histogram(
            "neuronlens_batch_size", "Sequences in a forward pass.", buckets=_BATCH_SIZES, registry=registry
        )
        self._queued = Gauge("neuronlens_queue_sequences", "Sequences that wait for a place.", registry=registry)
        self._running = Gauge("neuronlens_running_sequences", "Sequences in the batch.", registry=registry)
        self._programs = Gauge("neuronlens_programs", "Distinct programs at work.", registry=registry)
        self._tested = Counter(
            "neuronlens_tested_activations_total", "Activations that programs looked at.", registry=registry
        )
        self._changed = Counter(
            "neuronlens_changed_activations_total",
            "Activations that programs changed.",
            ["action"],
            registry=registry,
        )
        self._rejected = Counter(
            "neuronlens_rejected_total", "Requests turned away for want of room.", ["reason"], registry=registry
        )

    def saw_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is a template such as /v1/tables/{id}: paths would make a series each."""
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def saw_prompt(self, n_tokens: int) -> None:
        self._prompt_tokens.inc(n_tokens)

    def saw_first_token(self, seconds: float) -> None:
        """Since the request arrived."""
        self._first_token_seconds.observe(seconds)

    def saw_tokens(self, n: int, seconds: float) -> None:
        """A sequence ended with `n` output tokens, `seconds` after the first of them."""
        self._generated_tokens.inc(n)
        if n > 1:
            self._token_seconds.observe(seconds / (n - 1))

    def saw_program(self, tested: int, changed: Mapping[str, int]) -> None:
        """What a program did to one sequence; `changed` is by action."""
        self._tested.inc(tested)
        for action, n in changed.items():
            self._changed.labels(action).inc(n)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def render(self, load: "EngineLoad | None") -> bytes:
        """The text that Prometheus reads. Takes in how busy the engine is, and the batches since the last look."""
        if load is not None:
            self._queued.set(load.waiting)
            self._running.set(load.running)
            self._programs.set(load.programs)
            for size in load.batch_sizes:
                self._batch_size.observe(size)
        return generate_latest(self.registry)
