"""Keys and values that were computed under a program belong to it, and to nobody else's prompt that begins alike."""

from typing import Any

import pytest

from neuronlens.vllm.offline import steered
from tests.vllm.tiny import RULES, alone, engine, program_of

pytestmark = pytest.mark.vllm
PROMPT = [int(7 + 5 * i % 290) for i in range(100)]
A, B = RULES[1], RULES[3]


@pytest.fixture(scope="module")
def llm(models):
    with engine(models["llama"], enable_prefix_caching=True) as llm:
        yield llm


def ask(llm: Any, folder: Any, rules: Any, *, salted: bool = True, salt: str | None = None) -> tuple[list[int], int]:
    """What it says to PROMPT, and how many tokens of it came from the cache."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[1])
    prompt: dict[str, Any] = {"prompt_token_ids": PROMPT}
    if rules is None:
        (output,) = llm.generate(prompt | ({"cache_salt": salt} if salt else {}), params, use_tqdm=False)
    else:
        with steered(llm, program_of(folder, rules)) as request:
            salted_prompt = request.prompt(PROMPT, salt)
            (output,) = llm.generate(
                salted_prompt if salted else prompt, request.sampling(params), use_tqdm=False
            )  # fmt: skip
    return list(output.outputs[0].token_ids), int(output.num_cached_tokens or 0)


@pytest.mark.parametrize("order", [(None, A, B, None, A, B), (A, None, B, A, B, None), (B, A, A, None, B, None)])
def test_prefix_cache__is_never_contaminated_whatever_came_before(llm, models, order):
    llm.reset_prefix_cache()
    said = [ask(llm, models["llama"], rules) for rules in order]
    assert len({tuple(alone(models["llama"], PROMPT, 12, rules)[0]) for rules in (None, A, B)}) == 3
    seen: list[Any] = []
    for rules, (ids, n_cached) in zip(order, said, strict=True):
        assert ids == alone(models["llama"], PROMPT, 12, rules)[0]
        assert (n_cached > 0) is (rules in seen), "a program finds its own, and only its own"
        seen.append(rules)


def test_prefix_cache__would_be_contaminated_without_the_salt(llm, models):
    llm.reset_prefix_cache()
    ask(llm, models["llama"], A, salted=False)
    ids, n_cached = ask(llm, models["llama"], None)
    assert n_cached > 0
    assert ids != alone(models["llama"], PROMPT, 12, None)[0]


def test_prefix_cache__keeps_the_clients_own_salt_apart_too(llm, models):
    llm.reset_prefix_cache()
    cached = [ask(llm, models["llama"], A, salt=salt)[1] for salt in ("mine", "yours", "mine", None)]
    assert [n > 0 for n in cached] == [False, False, True, False]
