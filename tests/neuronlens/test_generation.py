"""Continuations against text written token by token through hand-written passes, without a cache and without pads."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from neuronlens.batches import TokenBatch
from neuronlens.errors import RunFailed, UsageError
from neuronlens.generation import Prompt, Writer, distinct_2, end_ids, evenly, prompts_of
from neuronlens.models import LoadedModel
from neuronlens.programs import Program
from neuronlens.serving.engine import Sampling
from neuronlens.sources import LabelledText
from tests.by_hand import HIDDEN, ZeroInside
from tests.range_tables import row, table_of
from tests.tiny_models import D_MLP, DECODERS, SENTENCES, tiny_model, tiny_tokenizer

PAD, EOS, SEP, JOY = 0, 1, 2, 3
N_TOKENS = 12
JOY_ROWS = [row("joy", n, 0.1, 0.1, layer=layer, rank=n + 1) for layer in (0, 1) for n in range(0, D_MLP, 2)]
NOTHING_INSIDE = [row("fear", n, 1e6, 0.1, rank=n + 1) for n in range(D_MLP)]
TABLE = table_of([*JOY_ROWS, *NOTHING_INSIDE], widths={"mlp_post": D_MLP})
GREEDY = Sampling(max_tokens=N_TOKENS, temperature=0, seed=0)


def loaded_model(architecture: str = "gpt2") -> LoadedModel:
    return LoadedModel.of(tiny_model(architecture), tiny_tokenizer())


def program(concept: str) -> Program:
    return Program.compile(TABLE, [{"concept": concept}])


def made_prompts(n: int = 9) -> list[Prompt]:
    """Prompts of 1 to 6 tokens."""
    rng = np.random.default_rng(2)
    rows = [tuple(int(i) for i in rng.integers(6, 300, size=1 + k % 6)) for k in range(n)]
    return [Prompt(token_ids=ids, concept=("joy", "anger")[k % 2]) for k, ids in enumerate(rows)]


PROMPTS = made_prompts()


def written_by_hand(loaded: LoadedModel, prompt: Prompt, edit: ZeroInside) -> list[int]:
    """The likeliest token each time, until a special one."""
    said: list[int] = []
    while len(said) < N_TOKENS:
        edit.tested = edit.changed = 0
        hidden_TD = HIDDEN[loaded.module.config.model_type](loaded.module, [*prompt.token_ids, *said], edit)
        token = int(loaded.module.lm_head(hidden_TD[-1]).argmax())
        if token < 6:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("case", ["base", "range", "neuron"])
def test_write__gives_what_each_prompt_gives_alone_by_hand(architecture, case):
    loaded = loaded_model(architecture)
    rules = {"range": [{"concept": "joy"}], "neuron": [{"concept": "joy", "tau": float("inf")}]}
    chosen = None if case == "base" else Program.compile(TABLE, rules[case])
    written = Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), chosen)
    tested = changed = 0
    for b, prompt in enumerate(PROMPTS):
        edit = ZeroInside([] if case == "base" else JOY_ROWS, whole=case == "neuron")
        said = written_by_hand(loaded, prompt, edit)
        assert list(written.token_ids[b]) == said
        assert written.texts[b] == loaded.tokenizer.decode(said).strip()
        assert written.nll_B[b] == pytest.approx(surprise_by_hand(loaded, prompt, said), rel=1e-4, abs=1e-6)
        tested, changed = tested + edit.tested, changed + edit.changed
    assert (written.tested, written.changed) == (tested, changed)


def surprise_by_hand(loaded: LoadedModel, prompt: Prompt, said: list[int]) -> float:
    hidden_TD = HIDDEN[loaded.module.config.model_type](loaded.module, [*prompt.token_ids, *said])
    log_p_TV = loaded.module.lm_head(hidden_TD).double().log_softmax(dim=1)
    n = len(prompt.token_ids)
    return -sum(float(log_p_TV[n + k - 1, token]) for k, token in enumerate(said))


@pytest.mark.parametrize("architecture", DECODERS)
def test_write__gives_what_each_prompt_gives_alone_without_a_cache(architecture):
    loaded = loaded_model(architecture)
    written = Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), None)
    for prompt, said in zip(PROMPTS, written.token_ids, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *said]])
        hidden_TD = loaded.hidden(TokenBatch(ids_BT=ids, mask_BT=torch.ones_like(ids, dtype=torch.bool)))[0]
        likeliest = loaded.logits(hidden_TD).argmax(dim=1).tolist()[len(prompt.token_ids) - 1 :]
        assert list(said) == likeliest[: len(said)]
        assert len(said) == N_TOKENS or likeliest[len(said)] < 6


def test_write__takes_the_same_draws_under_every_program_and_in_every_batch():
    loaded = loaded_model()
    writer = Writer(loaded, Sampling(max_tokens=N_TOKENS, temperature=1.0, seed=3))
    numbers = list(range(len(PROMPTS)))
    base = writer.write(PROMPTS, numbers, None)
    assert writer.write(PROMPTS, numbers, program("fear")).token_ids == base.token_ids
    alone = [writer.write([PROMPTS[i]], [i], None).token_ids[0] for i in reversed(numbers)]
    assert tuple(reversed(alone)) == base.token_ids
    again = [PROMPTS[0]] * 8
    assert len(set(writer.write(again, range(8), None).token_ids)) == 8  # prompts have random numbers of their own
    assert Writer(loaded, Sampling(max_tokens=N_TOKENS, temperature=1.0, seed=4)).write(PROMPTS, numbers, None) != base


def test_write__draws_from_the_models_distribution_at_the_temperature():
    loaded, n, temperature = loaded_model(), 4_000, 0.7
    writer = Writer(loaded, Sampling(max_tokens=1, temperature=temperature, seed=0))
    prompt = PROMPTS[4]
    drawn = Counter(writer.write([prompt] * n, range(n), None).token_ids)
    logits_V = loaded.module.lm_head(HIDDEN["gpt2"](loaded.module, prompt.token_ids)[-1]).double() / temperature
    p_V = logits_V.softmax(dim=0).numpy()
    for token in np.argsort(-p_V)[:5].tolist():
        share = drawn[() if token < 6 else (token,)] / n
        assert share == pytest.approx(p_V[token], abs=4 * np.sqrt(p_V[token] / n))


def test_write__ends_before_a_special_token_that_the_model_says():
    loaded = loaded_model()
    plain = Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), None)
    longest = max(range(len(PROMPTS)), key=lambda b: len(plain.token_ids[b]))
    said = plain.token_ids[longest]
    end = said[len(said) // 2]
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": [loaded.tokenizer.convert_ids_to_tokens(end)]})
    cut = Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), program("fear"))
    assert cut.token_ids[longest] == said[: said.index(end)]
    # Every token that the model was given counts: the prompts' and the continuations', but for a last one at the limit.
    n_given = sum(len(p.token_ids) + min(len(ids), N_TOKENS - 1) for p, ids in zip(PROMPTS, cut.token_ids, strict=True))
    assert cut.tested == n_given * D_MLP


def test_write__is_not_swayed_by_the_checkpoints_generation_config():
    loaded = loaded_model()
    plain = Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), None)
    theirs = GenerationConfig(repetition_penalty=9.0, suppress_tokens=list(plain.token_ids[0][:1]), do_sample=True)
    loaded.module.generation_config = theirs
    assert Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), None).token_ids == plain.token_ids
    assert loaded.module.generation_config is theirs


def test_write__refuses_logits_that_are_not_finite():
    loaded = loaded_model()
    with torch.no_grad():
        loaded.module.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(RunFailed, match=r"not finite for 9 of 9 prompts.*erasing joy"):
        Writer(loaded, GREEDY).write(PROMPTS, range(len(PROMPTS)), program("joy"))


def test_end_ids__are_special_tokens_and_answers_that_were_added():
    loaded = loaded_model()
    loaded.tokenizer.add_tokens(["<mine>", "<theirs>"])
    mine, theirs = loaded.tokenizer.convert_tokens_to_ids(["<mine>", "<theirs>"])
    ends = end_ids(loaded, ["<mine>", "happy"])
    assert {PAD, EOS, SEP, JOY, mine} <= ends
    assert theirs not in ends
    assert not {i for i in ends if i not in loaded.tokenizer.added_tokens_decoder}


def test_prompts_of__are_the_first_tokens_after_what_begins_every_text():
    tokenizer = tiny_tokenizer()
    texts = [LabelledText(row=i, text=text, concept="joy") for i, text in enumerate([SENTENCES[0], "i"])]
    whole = [tokenizer(text.text)["input_ids"] for text in texts]
    plain = prompts_of(tokenizer, texts, n_tokens=4)
    assert [list(prompt.token_ids) for prompt in plain] == [whole[0][:4], whole[1]]
    tokenizer.backend_tokenizer.post_processor = _surrounding()
    surrounded = prompts_of(tokenizer, texts, n_tokens=4)
    assert [list(prompt.token_ids) for prompt in surrounded] == [[EOS, *whole[0][:4]], [EOS, *whole[1]]]


def _surrounding():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<eos> $A <sep>", special_tokens=[("<eos>", EOS), ("<sep>", SEP)])


def test_prompts_of__refuses_a_text_of_no_token():
    with pytest.raises(UsageError, match="no token that could be continued"):
        prompts_of(tiny_tokenizer(), [LabelledText(row=7, text="", concept="joy")], n_tokens=3)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 40))
def test_evenly__takes_the_first_of_each_concept_in_turn(concepts, at_most):
    prompts = [Prompt(token_ids=(i,), concept=concept) for i, concept in enumerate(concepts)]
    taken = evenly(prompts, at_most)
    assert len(taken) == min(at_most, len(prompts))
    assert [p.token_ids for p in taken] == sorted(p.token_ids for p in taken)
    counts, there = Counter(p.concept for p in taken), Counter(concepts)
    for concept in there:
        assert [p for p in taken if p.concept == concept] == [p for p in prompts if p.concept == concept][
            : counts[concept]
        ]
        # None has fewer than another by more than one, unless it has no more.
        assert counts[concept] == there[concept] or counts[concept] >= max(counts.values()) - 1
    assert evenly(prompts, None) == prompts


def test_distinct_2__is_the_share_of_different_bigrams():
    assert distinct_2([5, 6, 7, 8]) == 1.0
    assert distinct_2([5, 5, 5, 5, 5]) == 0.25
    assert distinct_2([5, 6, 5, 6]) == pytest.approx(2 / 3)
    assert np.isnan(distinct_2([5]))
