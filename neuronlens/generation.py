"""Continuations of prompts under an intervention: what does a model still write without a concept's neurons?

    prompts = prompts_of(loaded.tokenizer, texts, n_tokens=8)
    writer = Writer(loaded, Sampling(max_tokens=32, temperature=0, seed=0))
    written = writer.write(prompts, range(len(prompts)), program)       # None: the bare model
    written.texts, written.changed

A prompt is the beginning of a text, without the recipe's `data.prompt` around it. A continuation ends before the first
special token: those that end texts, and those that a fine-tuned model writes after a text, which would tell a
classifier its answer. It does not depend on the batch, but for rounding.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from neuronlens.batches import TokenBatch, pad
from neuronlens.errors import RunFailed, UsageError
from neuronlens.interventions import Applied, apply
from neuronlens.models import LOGITS_AT_ONCE, LoadedModel
from neuronlens.programs import Program
from neuronlens.serving.engine import Sampling
from neuronlens.serving.sampling import Sampler, choose
from neuronlens.serving.transformers_engine import stop_ids
from neuronlens.sources import LabelledText


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The first tokens of a text, and the concept that the text is labelled with."""

    token_ids: tuple[int, ...]
    concept: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The continuations of B prompts: their text, without the prompt and without spaces around it, and their tokens.

    nll_B (float64, nats) is the surprise of the unmodified model at a continuation's tokens, summed; 0 where it has
    none. `tested` and `changed` count activations at the prompts' tokens and at all that the model was then given; pads
    and texts that had ended are left out.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    nll_B: np.ndarray
    tested: int
    changed: int


def prompts_of(tokenizer: Any, texts: Sequence[LabelledText], *, n_tokens: int) -> list[Prompt]:
    """The first so many tokens of each text, or all of a shorter one, after the special tokens that the tokenizer puts
    before every text (such as one that begins it). Raises UsageError for a text of no token."""
    encoded = tokenizer([text.text for text in texts], return_special_tokens_mask=True)
    prompts = []
    for text, token_ids, special in zip(texts, encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        n_before = special.index(0) if 0 in special else len(special)
        n_kept = n_before + [*special[n_before:], 1].index(1)
        if n_before == n_kept:
            raise UsageError(
                f"The text {text.text[:40]!r} (row {text.row}) has no token that could be continued. Mend or drop it."
            )
        prompts.append(Prompt(token_ids=tuple(token_ids[: min(n_kept, n_before + n_tokens)]), concept=text.concept))
    return prompts


def evenly(prompts: Sequence[Prompt], at_most: int | None) -> list[Prompt]:
    """The first so many prompts of every concept in turn, in their own order."""
    if at_most is None:
        return list(prompts)
    rank: dict[str, int] = {}
    ranked = []
    for i, prompt in enumerate(prompts):
        rank[prompt.concept] = rank.get(prompt.concept, -1) + 1
        ranked.append((rank[prompt.concept], i))
    return [prompts[i] for i in sorted(i for _, i in sorted(ranked)[:at_most])]


def end_ids(loaded: LoadedModel, answers: Collection[str] = ()) -> frozenset[int]:
    """The tokens that end a continuation: special ones, and answers that were added to the vocabulary. An answer that
    is a word of the vocabulary is text like any other."""
    tokenizer = loaded.tokenizer
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or token.content in answers}
    return stop_ids(loaded) | frozenset(tokenizer.all_special_ids) | added


def distinct_2(token_ids: Sequence[int]) -> float:
    """The share of a continuation's bigrams that are different ones (Li et al. 2016): 1 where none comes twice, near 0
    for a model that says the same again and again; NaN for fewer than two tokens."""
    bigrams = list(pairwise(token_ids))
    return len(set(bigrams)) / len(bigrams) if bigrams else float("nan")


class Writer:
    """Holds a decoder, and how its next token is chosen.

    sampling: max_tokens, temperature and seed count. Every prompt has random numbers of its own, by the seed and its
    number, which are the same under every program. answers: see `end_ids`. overrides: as in `find_sites`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        *,
        answers: Collection[str] = (),
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self._loaded, self._sampling, self._overrides = loaded, sampling, overrides
        self._end_ids = end_ids(loaded, answers)

    def write(self, prompts: Sequence[Prompt], numbers: Sequence[int], program: Program | None) -> Written:
        """One batch. Raises UsageError where the model lacks the program's layers or widths, RunFailed where its logits
        are not finite."""
        rows = [prompt.token_ids for prompt in prompts]
        with contextlib.ExitStack() as stack:
            applied = None
            if program is not None:
                applied = stack.enter_context(apply(self._loaded.module, program, overrides=self._overrides))
            token_ids = self._continue(rows, numbers, applied)
            tested, changed = (applied.tested, applied.changed) if applied is not None else (0, 0)
        texts = self._loaded.tokenizer.batch_decode(token_ids, clean_up_tokenization_spaces=False)
        return Written(
            texts=tuple(text.strip() for text in texts),
            token_ids=tuple(token_ids),
            nll_B=self._surprise(rows, token_ids),
            tested=tested,
            changed=changed,
        )

    def _continue(
        self, rows: Sequence[tuple[int, ...]], numbers: Sequence[int], applied: Applied | None
    ) -> list[tuple[int, ...]]:
        from transformers import GenerationConfig, LogitsProcessorList

        loaded, ends = self._loaded, self._end_ids
        batch = pad(rows, pad_id=loaded.pad_id, side="left").to(loaded.device)
        chooser = _Chooser([Sampler(self._sampling, number) for number in numbers], ends, applied)
        chooser.before(batch)
        with _own_settings_only(loaded.module):
            found_BT = cast(Any, loaded.module).generate(
                batch.ids_BT,
                attention_mask=batch.mask_BT.long(),  # generate counts positions from it
                generation_config=GenerationConfig(
                    max_new_tokens=self._sampling.max_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=loaded.pad_id,
                    eos_token_id=sorted(ends),
                ),
                logits_processor=LogitsProcessorList([cast(Any, chooser)]),
            )
        said = found_BT[:, batch.ids_BT.shape[1] :].tolist()
        return [tuple(ids[: next((t for t, i in enumerate(ids) if i in ends), len(ids))]) for ids in said]

    @torch.inference_mode()
    def _surprise(self, rows: Sequence[tuple[int, ...]], said: Sequence[tuple[int, ...]]) -> np.ndarray:
        """float64 [B]."""
        loaded = self._loaded
        batch = pad([row + more for row, more in zip(rows, said, strict=True)], pad_id=loaded.pad_id).to(loaded.device)
        column_BT = torch.arange(batch.ids_BT.shape[1], device=loaded.device)
        n_prompt_B = torch.tensor([len(row) for row in rows], device=loaded.device)
        text_K, column_K = (batch.mask_BT & (column_BT >= n_prompt_B[:, None])).nonzero(as_tuple=True)
        nll_B = torch.zeros(len(rows), dtype=torch.float64, device=loaded.device)
        hidden_BTD = loaded.hidden(batch)
        n_logits = cast(Any, loaded.module).get_output_embeddings().weight.shape[0]
        at_once = max(1, LOGITS_AT_ONCE // n_logits)
        for text_S, column_S in zip(text_K.split(at_once), column_K.split(at_once), strict=True):
            logits_SV = loaded.logits(hidden_BTD[text_S, column_S - 1]).float()
            nll_S = functional.cross_entropy(logits_SV, batch.ids_BT[text_S, column_S], reduction="none")
            nll_B.index_add_(0, text_S, nll_S.double())
        return nll_B.cpu().numpy()


class _Chooser:
    """Chooses the next tokens for `generate`, each row by its own sampler, and tells the program at work which rows the
    next forward pass still counts."""

    def __init__(self, samplers: Sequence[Sampler], ends: frozenset[int], applied: Applied | None) -> None:
        self._samplers, self._ends, self._applied = samplers, torch.tensor(sorted(ends)), applied
        self._is_open_B = torch.ones(len(samplers), dtype=torch.bool)

    def before(self, batch: TokenBatch) -> None:
        """The prompts come next."""
        if self._applied is not None:
            self._applied.set_mask(batch.mask_BT)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        choices = choose(scores, self._samplers)
        token_ids = [choice.token_id for choice in choices if choice is not None]
        if len(token_ids) < len(choices):
            rules = self._applied.program.rules if self._applied is not None else ()
            what = f"erasing {', '.join(dict.fromkeys(rule.concept for rule in rules))}" if rules else "unmodified"
            raise RunFailed(
                f"The model's logits are not finite for {len(choices) - len(token_ids)} of {len(choices)} prompts of a "
                f"batch ({what}, {scores.dtype}). Run in bfloat16 or float32: see model.dtype in the recipe."
            )
        token_B = torch.tensor(token_ids)
        self._is_open_B &= ~torch.isin(token_B, self._ends)
        if self._applied is not None:
            self._applied.set_mask(self._is_open_B[:, None])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None].to(scores.device), 0.0)


@contextlib.contextmanager
def _own_settings_only(module: Any) -> Iterator[None]:
    """`generate` takes what it is not told from the checkpoint's generation_config.json, such as a penalty for
    repetitions."""
    from transformers import GenerationConfig

    theirs, module.generation_config = module.generation_config, GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = theirs
