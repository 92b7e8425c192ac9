"""Steering without a server: one request of vLLM's Python API.

    llm = LLM(model=..., worker_cls="neuronlens.vllm.Worker")
    with steered(llm, program) as request:
        outputs = llm.generate(request.prompt([5, 6, 7]), request.sampling(SamplingParams(max_tokens=20)))
    print(request.counts)                                       # tested, and changed by each rule

The prompt and the parameters belong together: one has the salt that keeps the prefix cache apart, the other the ticket.
"""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from neuronlens.errors import RunFailed, UsageError
from neuronlens.programs import Program
from neuronlens.serving.engine import Counts, EngineBusy, Phase
from neuronlens.vllm.config import KEY
from neuronlens.vllm.wire import pack

PHASES: tuple[Phase, ...] = ("prompt", "generation")
_RETRY_SECONDS = 1


def new_ticket() -> str:
    return secrets.token_hex(16)


def program_name(program: Program) -> str:
    """Equal for programs that may share a slot: the same arrays, which also belong to the same rules."""
    rules = ";".join(" ".join(map(str, site.rule_R.tolist())) for site in program.sites)
    return f"{program.id}-{hashlib.sha256(rules.encode()).hexdigest()[:8]}"


def salt_of(program: Program, phases: Sequence[str], salt: str | None = None) -> str:
    """What keeps keys and values that were computed under this program apart from all others in the prefix cache; the
    client's own salt counts too."""
    parts = "\x00".join([KEY, program.id, *sorted(phases), salt or ""])
    return f"{KEY}-{hashlib.sha256(parts.encode()).hexdigest()}"


def check_answers(answers: Sequence[Sequence[str]]) -> bool:
    """Whether the ranks admitted a ticket; False where they want the program's data.

    Raises EngineBusy, UsageError for a program that cannot run here, RunFailed where ranks disagree.
    """
    if len({answer[0] for answer in answers}) != 1:
        raise RunFailed(f"The ranks of the engine disagree about a program: {answers}. Restart the engine.")
    answer, sentence = answers[0]
    if answer == "busy":
        reason = "too_many_programs" if "programs" in sentence else "queue_full"
        raise EngineBusy(sentence, reason=reason, seconds=_RETRY_SECONDS)
    if answer == "bad_program":
        raise UsageError(sentence)
    return answer == "admitted"


def sum_counts(parts: Sequence[Sequence[int] | None], n_rules: int) -> Counts:
    """The counts of all ranks together."""
    found = [part for part in parts if part is not None]
    tested, *changed = [sum(column) for column in zip(*found, strict=True)] if found else [0] * (1 + n_rules)
    return Counts(tested=tested, changed_by_rule=tuple(changed[:n_rules]))


@dataclass(slots=True)
class SteeredRequest:
    """A ticket at work. `counts` is there once the context has closed."""

    program: Program
    phases: tuple[Phase, ...]
    ticket: str = field(default_factory=new_ticket)
    counts: Counts = field(default_factory=Counts)

    def prompt(self, prompt: Any, salt: str | None = None) -> dict[str, Any]:
        """vLLM's prompt, from a text, token ids or one of its mappings, apart from others in the prefix cache."""
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif not isinstance(prompt, dict):
            prompt = {"prompt_token_ids": list(prompt)}
        return {**prompt, "cache_salt": salt_of(self.program, self.phases, salt or prompt.get("cache_salt"))}

    def sampling(self, params: Any) -> Any:
        """The sampling parameters, with the ticket."""
        params = params.clone()
        params.extra_args = {**(params.extra_args or {}), KEY: self.ticket}
        return params


@contextmanager
def steered(llm: Any, program: Program, phases: Sequence[Phase] = PHASES) -> Iterator[SteeredRequest]:
    """A ticket for the sequences of one request, held while the context is open.

    Raises EngineBusy where no slot is free, UsageError for a program that this engine's tables cannot hold.
    """
    request = SteeredRequest(program, tuple(phases))
    asked = [request.ticket, program_name(program), list(phases)]
    if not check_answers(llm.collective_rpc("neuronlens_admit", args=(*asked, None))):
        check_answers(llm.collective_rpc("neuronlens_admit", args=(*asked, pack(program))))
    try:
        yield request
    finally:
        parts = llm.collective_rpc("neuronlens_release", args=(request.ticket,))
        request.counts = sum_counts(parts, len(program.rules))
