"""The worker class that vLLM is started with: `--worker-cls neuronlens.vllm.Worker`.

It is vLLM's own worker for the platform, with hooks in the model from the moment that its weights are there, and four
remote calls more: admit and hand back tickets, say what is hooked, and collect statistics.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from neuronlens.vllm.board import Board
from neuronlens.vllm.canary import check_hooks
from neuronlens.vllm.collector import Collector, Unit, attach_collecting_hooks, check_eager
from neuronlens.vllm.config import KEY, WorkerConfig
from neuronlens.vllm.features import check_features
from neuronlens.vllm.freed_memory import keep_freed_memory
from neuronlens.vllm.hooks import attach_hooks
from neuronlens.vllm.runner import watch_model_state, watch_runner
from neuronlens.vllm.sites import RankSite, find_rank_sites
from neuronlens.vllm.tables import SlotTables
from neuronlens.vllm.tickets import Tickets

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CANARY_TOKENS = 8


class SteeringWorker:
    """What is put before vLLM's worker class; `worker_class` joins the two."""

    def __init__(self, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        self.lens_config = WorkerConfig.of(vllm_config.additional_config)
        check_features(vllm_config, self.lens_config)
        if self.lens_config.mode == "collect":
            check_eager(vllm_config)
        # Before anything is compiled: a graph is looked up by this too.
        vllm_config.additional_config = {**vllm_config.additional_config, KEY: self.lens_config.stamped()}
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)  # type: ignore[misc]
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if runner.device.type == "cpu":
            keep_freed_memory()
        self.rank_sites = self.find_sites(runner.model)
        self.at_work: Board | Collector
        if self.lens_config.mode == "collect":
            self.hook_collector(runner)
        else:
            self.hook_model(runner)

    def find_sites(self, model: torch.nn.Module) -> tuple[RankSite, ...]:
        hf_config = self.model_config.hf_text_config  # type: ignore[attr-defined]
        return find_rank_sites(model, hf_config.model_type, hf_config.hidden_size, self.lens_config)

    def hook_model(self, runner: Any) -> None:
        """Hooks, tables and tickets, and the seam by which they learn what runs."""
        config, scheduler = self.lens_config, self.scheduler_config  # type: ignore[attr-defined]
        n_counters = 2 * scheduler.max_num_seqs
        tables = SlotTables(self.rank_sites, config, runner.device, self.model_config.dtype)  # type: ignore[attr-defined]
        self.board = Board(
            tables,
            n_tokens=runner.max_num_tokens,
            n_counters=n_counters,
            n_rules=config.rules,
            rank=self.rank,  # type: ignore[attr-defined]
            device=runner.device,
        )
        self.at_work = self.board
        self.tickets = Tickets(self.board, n_slots=config.slots, n_counters=n_counters)
        self.vllm_config.compilation_config.static_forward_context[KEY] = self.board  # type: ignore[attr-defined]
        attach_hooks(runner.model, self.rank_sites)
        if self.use_v2_model_runner:  # type: ignore[attr-defined]
            watch_model_state(runner.model_state, self.tickets)
        else:
            watch_runner(runner, self.tickets)

    def hook_collector(self, runner: Any) -> None:
        """Hooks that collect, and the same seam."""
        self.at_work = self.collector = Collector(
            self.rank_sites,
            rank=self.rank,  # type: ignore[attr-defined]
            device=runner.device,
            n_threads=torch.get_num_threads(),
        )
        attach_collecting_hooks(runner.model, self.collector)
        watch_runner(runner, self.collector)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self.lens_config.mode == "steer":
            self.check()
        return times

    def check(self) -> None:
        """The canary. Raises RunFailed where a hook does not act."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        with torch.inference_mode():
            check_hooks(self.board, lambda: runner._dummy_run(_CANARY_TOKENS, force_attention=True)[0][:_CANARY_TOKENS])

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_model(*args, **kwargs)  # type: ignore[misc]
        finally:
            # What vLLM runs between steps, such as dummy batches, has no program.
            self.at_work.rest()

    # --- what the server calls, on every rank ------------------------------------------------------------------------

    def neuronlens_facts(self) -> dict[str, Any]:
        """What is hooked here, as plain data."""
        return {
            "hook_points": {
                name: [site.layer for site in self.rank_sites if site.hook_point == name]
                for name in dict.fromkeys(site.hook_point for site in self.rank_sites)
            },
            "widths": {site.hook_point: site.full_width for site in self.rank_sites},
            "dtype": str(self.model_config.dtype).removeprefix("torch."),  # type: ignore[attr-defined]
            "device": str(self.model_runner.device),  # type: ignore[attr-defined]
        }

    def neuronlens_admit(self, ticket: str, program: str, phases: list[str], data: bytes | None) -> list[str]:
        """`Tickets.admit`."""
        with torch.inference_mode():
            return list(self.tickets.admit(ticket, program, phases, data))

    def neuronlens_release(self, ticket: str) -> list[int] | None:
        """`Tickets.release`: this rank's part of the counts."""
        with torch.inference_mode():
            return self.tickets.release(ticket)

    # --- what a collecting engine calls, on every rank ---------------------------------------------------------------

    def neuronlens_begin_shard(self, shard: str, unit: Unit, histograms: bool) -> None:
        """`Collector.begin`."""
        self.collector.begin(shard, unit, histograms=histograms)

    def neuronlens_end_shard(self) -> tuple[bytes, bytes]:
        """`Collector.end`: this rank's part of the statistics."""
        with torch.inference_mode():
            return self.collector.end()


@cache
def worker_class() -> type:
    """Our worker for the platform that vLLM finds."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base
    return type("Worker", (SteeringWorker, Base), {"__module__": "neuronlens.vllm", "__qualname__": "Worker"})
