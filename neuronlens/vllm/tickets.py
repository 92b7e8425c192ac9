"""Tickets: what a steered request carries through vLLM, and the slots behind them. Every rank keeps the same books.

A ticket is a random name that the API server (or `neuronlens.vllm.offline`) had admitted before its request was sent:
`extra_args["neuronlens"]`. So a program is on every rank, in a slot of its own, before vLLM schedules the first token,
and what comes first over the wire is done first. A ticket that was never admitted is no program: its request runs
plain. A program stays in its slot until another needs it, so that a sequence whose ticket has just been handed back
still cannot run under another's program.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from neuronlens.slot_kernel import AFTER_IT, COUNTED, COUNTER, IN_PROMPT, N_ABOUT, N_PROMPT, N_TOKENS, SPREAD, START
from neuronlens.teams import Task
from neuronlens.vllm.board import Board
from neuronlens.vllm.tables import NoRoom
from neuronlens.vllm.wire import unpack

Answer = Literal["admitted", "unknown_program", "busy", "bad_program"]
_KEPT_TICKETS = 1_000
"""Handed back, and still known, so that a straggler of theirs runs under the right program."""


@dataclass(slots=True)
class Ticket:
    """One request's right to a program, in these phases. row: where it is counted; 0 once it was handed back."""

    program: str
    slot: int
    in_prompt: bool
    in_generation: bool
    row: int
    counted: dict[str, int] = field(default_factory=dict)
    """Sequence -> up to which position it was counted: one that vLLM preempted computes its tokens again."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What stays the same from one forward pass to the next while no sequence comes or goes."""

    sequences: list[str]
    names: list[Any]
    tickets: list[Ticket | None]
    about_RA: np.ndarray
    """int64, columns as `slot_kernel` has them; `COUNTED` grows here, and is a ticket's again by `write_down`."""
    is_idle: bool

    @classmethod
    def of(cls, sequences: Sequence[str], tickets: list[Ticket | None], names: Sequence[Any]) -> "_Batch":
        about_RA = np.zeros((len(tickets), N_ABOUT), np.int64)
        for r, ticket in enumerate(tickets):
            if ticket is not None:
                about_RA[r, IN_PROMPT] = ticket.slot * ticket.in_prompt
                about_RA[r, AFTER_IT] = ticket.slot * ticket.in_generation
                about_RA[r, COUNTER] = ticket.row
                about_RA[r, COUNTED] = ticket.counted.get(sequences[r], 0)
        return cls(list(sequences), list(names), tickets, about_RA, not any(tickets))

    def write_down(self) -> None:
        for sequence, ticket, counted in zip(
            self.sequences, self.tickets, self.about_RA[:, COUNTED].tolist(), strict=True
        ):
            if ticket is not None and ticket.row:
                ticket.counted[sequence] = counted


class Tickets:
    """The programs in their slots, and who uses them. One thread uses it: between or before forward passes."""

    def __init__(self, board: Board, *, n_slots: int, n_counters: int) -> None:
        self._board = board
        self._n_counters = n_counters
        self._slots: dict[str, int] = {}
        """Program -> slot, least recently used first."""
        self._unused_slots = list(range(n_slots, 0, -1))
        self._unused_rows = list(range(n_counters, 0, -1))
        self._tickets: dict[str, Ticket] = {}
        self._old: dict[str, Ticket] = {}
        self._spread = Task(SPREAD, [None, *board.host_2T])
        self._batch, self._is_new = _Batch.of([], [], []), False

    @property
    def n_programs(self) -> int:
        """Distinct programs that somebody uses."""
        return len(self._used_slots())

    def admit(self, name: str, program: str, phases: Sequence[str], data: bytes | None) -> tuple[Answer, str]:
        """Give out a ticket: the answer, and a sentence where it is not "admitted".

        "unknown_program": ask again with its packed data. "busy": ask again when others are done. "bad_program": these
        tables can never hold it.
        """
        slot = self._slots.get(program)
        if slot is None and data is None:
            return "unknown_program", f"Program {program} is not loaded here."
        if not self._unused_rows:
            return "busy", f"{len(self._tickets)} steered requests are at work, of at most {self._n_counters}"
        if slot is None:
            assert data is not None
            sites = unpack(data)
            fault = self._board.tables.fault(sites)
            if fault is not None:
                return "bad_program", fault
            try:
                slot = self._load(program, sites)
            except NoRoom:
                return "busy", f"{self.n_programs} distinct programs are at work, and there is no room for another"
        self._slots[program] = self._slots.pop(program)
        self._is_new = True
        self._tickets[name] = Ticket(
            program=program,
            slot=slot,
            in_prompt="prompt" in phases,
            in_generation="generation" in phases,
            row=self._unused_rows.pop(),
        )
        return "admitted", ""

    def release(self, name: str) -> list[int] | None:
        """Take a ticket back: tested, and changed by each rule. None for one that is not out. Waits for the device."""
        ticket = self._tickets.pop(name, None)
        if ticket is None:
            return None
        self._is_new = True
        counts = self._board.counts(ticket.row)
        self._unused_rows.append(ticket.row)
        ticket.row = 0
        ticket.counted.clear()
        self._old[name] = ticket
        while len(self._old) > _KEPT_TICKETS:
            del self._old[next(iter(self._old))]
        return counts

    def seat(
        self,
        sequences: Sequence[str],
        names: Sequence[Any],
        n_scheduled_R: np.ndarray,
        n_computed_R: np.ndarray,
        n_prompt_R: np.ndarray,
    ) -> None:
        """Seat the tokens of the next forward pass: n_scheduled_R of each sequence, in the batch's order, from position
        n_computed_R on. names: each sequence's ticket, or None. Position, not order of arrival, tells the prompt from
        what was generated."""
        if self._is_new or sequences != self._batch.sequences or names != self._batch.names:
            self._take_in(sequences, names)
        self._board.rest()
        if self._batch.is_idle:
            return
        about_RA = self._batch.about_RA
        self._board.wait_for_copy()
        about_RA[:, N_TOKENS], about_RA[:, START], about_RA[:, N_PROMPT] = n_scheduled_R, n_computed_R, n_prompt_R
        self._spread.run(len(names))
        np.maximum(about_RA[:, COUNTED], n_computed_R + n_scheduled_R, out=about_RA[:, COUNTED])
        self._board.seat(int(n_scheduled_R.sum()))

    def _take_in(self, sequences: Sequence[str], names: Sequence[Any]) -> None:
        """Another batch than the last, or the same after tickets have come or gone."""
        self._batch.write_down()
        self._batch, self._is_new = _Batch.of(sequences, [self._ticket(name) for name in names], names), False
        self._spread.point(0, self._batch.about_RA.ctypes.data, *self._batch.about_RA.shape)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence can have a program."""
        return not self._tickets and not self._old

    def _ticket(self, name: Any) -> Ticket | None:
        return self._tickets.get(name) or self._old.get(name) if name else None

    def _used_slots(self) -> set[int]:
        return {ticket.slot for ticket in self._tickets.values()}

    def _load(self, program: str, sites: Any) -> int:
        """A slot for the program: an unused one, or those that were used least recently until it fits."""
        tables, used = self._board.tables, self._used_slots()
        idle = [(name, slot) for name, slot in self._slots.items() if slot not in used]
        if not (self._unused_slots or idle) or not tables.has_room(sites, [slot for _, slot in idle]):
            raise NoRoom
        while not self._unused_slots or not tables.has_room(sites):
            name, slot = idle.pop(0)
            tables.clear(slot)
            del self._slots[name]
            self._unused_slots.append(slot)
            self._old = {name: ticket for name, ticket in self._old.items() if ticket.slot != slot}
        slot = self._unused_slots.pop()
        tables.put(slot, sites)
        self._slots[program] = slot
        return slot
