"""Tickets from the side of the API server: admitted before a request is sent, handed back when it has ended."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from neuronlens.programs import Program
from neuronlens.serving.engine import Counts, EngineFacts
from neuronlens.vllm.offline import check_answers, new_ticket, program_name, sum_counts
from neuronlens.vllm.wire import pack


class Admission:
    """A vLLM engine's slots. `client` is vLLM's EngineClient, whose workers are ours."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def facts(self, *, model_id: str, aliases: Sequence[str], config_hash: str, window: int) -> EngineFacts:
        """What the workers have hooked. Raises whatever vLLM raises where they are not ours."""
        found = (await self._client.collective_rpc("neuronlens_facts"))[0]
        return EngineFacts(
            engine="vllm",
            model_id=model_id,
            aliases=tuple(aliases),
            config_hash=config_hash,
            window=window,
            widths=found["widths"],
            sites={name: tuple(layers) for name, layers in found["hook_points"].items()},
            dtype=found["dtype"],
            device=found["device"],
        )

    @asynccontextmanager
    async def admitted(self, program: Program, phases: Sequence[str]) -> AsyncIterator["Admitted"]:
        """A ticket for one request, which is handed back at the end, whatever happened.

        Raises EngineBusy where no slot is free, UsageError for a program that this engine cannot run.
        """
        ticket = Admitted(self._client, program, new_ticket())
        asked = [ticket.name, program_name(program), list(phases)]
        if not check_answers(await self._client.collective_rpc("neuronlens_admit", args=(*asked, None))):
            data = await asyncio.to_thread(pack, program)
            check_answers(await self._client.collective_rpc("neuronlens_admit", args=(*asked, data)))
        try:
            yield ticket
        finally:
            # A client that leaves cancels this task; the ticket has to go back all the same.
            await asyncio.shield(ticket.counts())


class Admitted:
    """A ticket that is out."""

    def __init__(self, client: Any, program: Program, name: str) -> None:
        self._client = client
        self._program = program
        self.name = name
        self._counts: asyncio.Task[Counts] | None = None

    async def counts(self) -> Counts:
        """Hand the ticket back, once, and say what was counted. To be asked when the request's last token is there."""
        if self._counts is None:
            self._counts = asyncio.ensure_future(self._release())
        return await asyncio.shield(self._counts)

    async def _release(self) -> Counts:
        parts = await self._client.collective_rpc("neuronlens_release", args=(self.name,))
        return sum_counts(parts, len(self._program.rules))
