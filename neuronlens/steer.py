"""One text, steered and not, side by side: both run in one batch of the same engine that the server has.

compared = compare(loaded, program, "i feel so", Sampling(max_tokens=20, temperature=0))
print(compared.baseline, "|", compared.steered, compared.counts.changed)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from neuronlens.errors import RunFailed, UsageError
from neuronlens.identity import ModelIdentity
from neuronlens.models import LoadedModel
from neuronlens.programs import Program
from neuronlens.ranges import RangeTable
from neuronlens.serving.batcher import Batcher, Row
from neuronlens.serving.engine import Counts, Generation, Phase, Sampling
from neuronlens.serving.transformers_engine import free_bytes, stop_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What the model says without and with the rules, and what these did."""

    baseline: str
    steered: str
    counts: Counts


def check_model(table: RangeTable, found: ModelIdentity) -> None:
    """Raise UsageError where the table was made with another model."""
    expected = table.header.model
    if found.config_hash != expected.config_hash:
        raise UsageError(
            f"Range table {table.id} was made with model {expected.id} (config hash {expected.config_hash}); "
            f"{found.id} has config hash {found.config_hash}. Give --model the table's model."
        )


def compare(
    loaded: LoadedModel,
    program: Program,
    text: str,
    sampling: Sampling,
    *,
    phases: frozenset[Phase] = frozenset({"prompt", "generation"}),
    overrides: Mapping[str, str] | None = None,
    on_token: Callable[[int], None] = lambda n: None,
) -> Compared:
    """Continue the text under the program, and without it from the same random numbers.

    overrides: where the hook points are, for an unknown architecture (the recipe's model.modules).

    Raises UsageError for a text that does not fit the model's window, RunFailed where the model's logits stop being
    numbers.
    """
    prompt_ids = tuple(loaded.tokenizer(text)["input_ids"])
    room = loaded.window - len(prompt_ids)
    if not prompt_ids or sampling.max_tokens > room:
        raise UsageError(
            f"The text has {len(prompt_ids)} tokens and {sampling.max_tokens} are to follow; expected one token at "
            f"least, and {loaded.window} together, the model's window. "
            + (f"Ask for at most {room} with --max-tokens." if prompt_ids and room > 0 else "Give another text.")
        )
    batcher = Batcher(loaded, max_batch=2, max_programs=1, cache_bytes=free_bytes(loaded.device), overrides=overrides)
    rows = [
        Row.of(
            Generation(id=name, prompt_ids=prompt_ids, sampling=sampling, program=chosen, phases=phases),
            loaded.tokenizer,
            stop_ids(loaded),
        )
        for name, chosen in (("baseline", None), ("steered", program))
    ]
    said = dict.fromkeys(rows, "")
    counts = Counts()
    for row in rows:
        batcher.add(row)
    while batcher.has_work:
        for event in batcher.step():
            if event.error is not None:
                raise RunFailed(f"The {event.row.generation.id} text cannot go on: {event.error}.") from event.error
            if event.delta is not None:
                said[event.row] += event.delta.text
                counts = event.delta.counts or counts
                on_token(len(event.delta.token_ids))
    batcher.close()
    baseline, steered = (said[row] for row in rows)
    return Compared(baseline=baseline, steered=steered, counts=counts)
