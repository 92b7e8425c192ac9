"""The text routes, driven by the official openai client over a real socket, held to the bare model alone."""

import concurrent.futures
import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from neuronlens import intervene
from neuronlens.ranges import RangeTable
from neuronlens.serving.settings import Limits
from tests.neuronlens.serving.text_server import TextServer, text_server
from tests.neuronlens.serving.tiny_engine import RULES, alone
from tests.range_tables import RULES_ON_PIECES
from tests.tiny_models import D_MLP, SENTENCES, WINDOW

JOY = {"concept": "joy", "hook_points": ["mlp_post"]}
PROMPT = "i feel so happy"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TextServer]:
    with text_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Iterator[TextServer]:
    """Two sequences at a time, 30 ms a step, and limits that are soon reached."""
    limits = Limits(queue=1, programs=2, rules=2, sequences=3, max_tokens=60, prompt_tokens=30)
    with text_server(tmp_path_factory.mktemp("slow"), limits=limits, max_batch=2, seconds_a_step=0.03) as server:
        yield server


@pytest.fixture(scope="module")
def hurried(tmp_path_factory) -> Iterator[TextServer]:
    """30 ms a step, and a second for all of them."""
    folder = tmp_path_factory.mktemp("hurried")
    with text_server(folder, limits=Limits(request_seconds=1), seconds_a_step=0.03) as server:
        yield server


def wire(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules as JSON has them: there is no infinity."""
    return [{key: value for key, value in rule.items() if value != float("inf")} for rule in rules]


def intervention(rules: Any, **fields: Any) -> dict[str, Any]:
    whole = any(rule.get("tau") == float("inf") for rule in rules)
    return {"intervention": {"rules": wire(rules), **({"mode": "neuron"} if whole else {}), **fields}}


def text_of(server: TextServer, ids: list[int]) -> str:
    return str(server.loaded.tokenizer.decode([i for i in ids if i not in (0, 1, 2)]))


def expected(
    server: TextServer, prompt: str, n: int, rules: Any, table: RangeTable | None = None
) -> tuple[str, int, int]:
    """The text of the bare model, and what `neuronlens.intervene` counted."""
    prompt_ids = server.loaded.tokenizer(prompt)["input_ids"]
    if rules is None:
        return text_of(server, alone(server.loaded, prompt_ids, n, None)[0]), 0, 0
    with intervene(server.loaded, table or server.table, rules) as applied:
        ids, _, _ = alone(server.loaded, prompt_ids, n, None)
    return text_of(server, ids), applied.tested, applied.changed


def complete(client: openai.OpenAI, prompt: str = PROMPT, n_tokens: int = 12, **fields: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=n_tokens, temperature=0, **fields)


def refusal(call: Any, **fields: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call(**fields)
    body = caught.value.response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return caught.value


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_completion__says_what_the_bare_model_says_under_intervene(server, rules):
    text, tested, changed = expected(server, PROMPT, 12, rules)
    extra = intervention(rules) if rules else {}
    answer = complete(server.client(), extra_body=extra)
    assert answer.choices[0].text == text
    streamed = list(complete(server.client(), extra_body=extra, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    for said in (answer, streamed[-1]):
        if rules:
            assert (said.intervention["tested"], said.intervention["changed"]) == (tested, changed)
            assert sum(said.intervention["changed_by_rule"]) == changed
            assert said.intervention["table"] == server.table.id
    assert rules or not hasattr(answer, "intervention") or answer.intervention is None


@pytest.mark.parametrize("rules", RULES_ON_PIECES)
def test_completion__of_a_table_with_pieces_says_what_the_bare_model_says(server, rules):
    text, tested, changed = expected(server, PROMPT, 12, rules, server.pieces)
    answer = complete(server.client(), extra_body=intervention(rules, table=server.pieces.id))
    assert answer.choices[0].text == text != expected(server, PROMPT, 12, None)[0]
    said = answer.intervention
    assert (said["tested"], said["changed"]) == (tested, changed)
    assert len(said["changed_by_rule"]) == len(rules)
    assert said["neurons"] == len({tuple(r[name] for name in ("hook_point", "layer", "neuron"))
                                   for r in server.pieces.rows.to_pylist()
                                   if r["concept"] in {rule["concept"] for rule in rules}})  # fmt: skip


def test_soften__is_refused_without_posteriors_and_for_whole_neurons(server):
    soften = [{"concept": "joy", "action": "soften"}]
    said = refusal(complete, client=server.client(), extra_body=intervention(soften))
    assert said.status_code == 400
    assert "Make one that has: neuronlens ranges STORE --method likelihood_ratio" in said.message
    said = refusal(
        complete, client=server.client(), extra_body=intervention(soften, table=server.pieces.id, mode="neuron")
    )
    assert 'Action soften multiplies by 1 - the posterior of a range, and mode "neuron" has none.' in said.message


def test_conflicts__are_between_rules_not_between_pieces(server):
    def asked(*concepts: str) -> dict[str, Any]:
        rules = [{"concept": concept} for concept in concepts]
        return intervention(rules, table=server.pieces.id, conflicts="refuse")

    assert complete(server.client(), extra_body=asked("joy")).intervention["changed"] > 0
    assert (
        "Rules 0 and 1 disagree" in refusal(complete, client=server.client(), extra_body=asked("joy", "fear")).message
    )


def test_many_clients__get_what_each_gets_alone(server):
    """Random prompts, lengths, programs, shapes and times of arrival."""
    rng, client = random.Random(3), server.client()

    def one(i: int) -> bool:
        own = random.Random(i)
        prompt, rules, n = own.choice(SENTENCES)[: own.randrange(4, 40)], own.choice(RULES), own.randrange(1, 30)
        want = expected_of[i]
        time.sleep(own.random() / 5)
        extra = intervention(rules) if rules else {}
        if own.random() < 0.5:
            return (
                "".join(c.choices[0].text for c in complete(client, prompt, n, extra_body=extra, stream=True)) == want
            )
        return complete(client, prompt, n, extra_body=extra).choices[0].text == want

    expected_of = {}
    for i in range(40):
        own = random.Random(i)
        prompt, rules, n = own.choice(SENTENCES)[: own.randrange(4, 40)], own.choice(RULES), own.randrange(1, 30)
        expected_of[i] = expected(server, prompt, n, rules)[0]
    order = list(range(40))
    rng.shuffle(order)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, order))


def test_chat__goes_through_the_template_and_streams_roles_and_text(server):
    messages = [{"role": "system", "content": "i feel "}, {"role": "user", "content": [{"type": "text", "text": "so"}]}]
    text, _, changed = expected(server, "i feel so", 9, [JOY])
    fields = {"model": "tiny", "messages": messages, "temperature": 0, "extra_body": intervention([JOY])}
    client = server.client()
    answer = client.chat.completions.create(max_tokens=9, **fields)
    assert answer.choices[0].message.content == text
    assert answer.intervention["changed"] == changed
    chunks = list(client.chat.completions.create(max_completion_tokens=9, stream=True, **fields))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].intervention["changed"] == changed


def test_completion__takes_texts_and_token_ids_one_or_many(server):
    client, tokenizer = server.client(), server.loaded.tokenizer
    prompts = ["he slammed the door", "the sun was warm"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    want = [expected(server, prompt, 8, None)[0] for prompt in prompts]
    assert [choice.text for choice in complete(client, prompts, 8).choices] == want
    assert [choice.text for choice in complete(client, ids, 8).choices] == want
    assert complete(client, ids[1], 8).choices[0].text == want[1]


# --- OpenAI's fields -------------------------------------------------------------------------------------------------


def test_draws__repeat_with_the_seed_and_differ_between_choices(server):
    def draw(**fields: Any) -> list[str]:
        answer = server.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=15, n=3, **fields)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = draw(seed=11, temperature=0.9, top_p=0.9)
    assert first == draw(seed=11, temperature=0.9, top_p=0.9)
    assert len(set(first)) == 3
    assert first != draw(seed=12, temperature=0.9, top_p=0.9)
    assert draw() != draw(), "without a seed, chance decides"
    chunks = server.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=15, n=3, seed=11, temperature=0.9, top_p=0.9, stream=True
    )
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == first


def test_stop__ends_the_text_and_says_so(server):
    whole = complete(server.client(), n_tokens=20).choices[0].text
    stop = whole[4:7]
    answer = complete(server.client(), n_tokens=20, stop=["never said", stop]).choices[0]
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = list(complete(server.client(), n_tokens=20, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs__come_in_both_shapes(server):
    answer = complete(server.client(), n_tokens=4, logprobs=2).choices[0]
    assert "".join(answer.logprobs.tokens) == answer.text
    assert answer.logprobs.text_offset == [sum(map(len, answer.logprobs.tokens[:i])) for i in range(4)]
    for token, logprob, top in zip(
        answer.logprobs.tokens, answer.logprobs.token_logprobs, answer.logprobs.top_logprobs, strict=True
    ):
        assert logprob == top[token] == max(top.values()), "greedy: the likeliest"
        assert len(top) == 2
    chat = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert [token.logprob for token in content] == answer.logprobs.token_logprobs
    assert [len(token.top_logprobs) for token in content] == [2, 2, 2, 2]
    assert bytes(content[0].bytes).decode() == content[0].token


def test_usage__counts_prompts_and_answers_and_comes_last_in_a_stream(server):
    n_prompt = len(server.loaded.tokenizer(PROMPT)["input_ids"])
    usage = complete(server.client(), n_tokens=5, n=2).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2 * n_prompt, 10, 2 * n_prompt + 10)
    chunks = list(complete(server.client(), n_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 5)


def test_model__is_listed_with_its_hook_points(server):
    client = server.client()
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == ("tiny", WINDOW)
    assert card.hook_points["mlp_post"] == [0, 1]
    assert client.models.retrieve("tiny").id == "tiny"
    assert refusal(client.models.retrieve, model="other").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"50": 3}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "."}, "suffix"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"extra_body": {"intervention": {"rules": [JOY], "strength": 2}}}, "intervention.strength"),
        ({"extra_body": {"intervention": {"rules": [{**JOY, "gain": 2}]}}}, "intervention.rules.0.gain"),
        ({"n": 0}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": 2.1}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"max_tokens": "12"}}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_field__that_is_not_supported_is_refused_by_name(server, fields, param):
    error = refusal(server.client().completions.create, model="tiny", prompt=PROMPT, **fields)
    assert (error.status_code, error.param) == (400, param)
    assert f"'{param}'" in error.message


def test_field__that_asks_for_nothing_is_taken(server):
    nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": False}
    assert complete(server.client(), **nothing).choices[0].text == expected(server, PROMPT, 12, None)[0]


def test_request__beyond_the_window_is_refused_with_what_would_fit(server):
    n_prompt = len(server.loaded.tokenizer(PROMPT)["input_ids"])
    error = refusal(complete, client=server.client(), n_tokens=WINDOW)
    assert (error.status_code, error.code) == (400, "context_length_exceeded")
    assert f"at most {WINDOW - n_prompt}" in error.message
    assert refusal(complete, client=server.client(), prompt=PROMPT * 40).code == "context_length_exceeded"
    assert refusal(complete, client=server.client(), prompt="").code == "empty_prompt"
    assert refusal(complete, client=server.client(), prompt=[5, 10**6]).param == "prompt"


# --- interventions ---------------------------------------------------------------------------------------------------


def test_baseline__stands_beside_the_steered_answer_with_the_same_chances(server):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "n": 2, "seed": 5}
    plain = server.client().completions.create(**fields)
    both = server.client().completions.create(**fields, extra_body=intervention([JOY], compare_baseline=True))
    assert [one["text"] for one in both.intervention["baseline"]] == [choice.text for choice in plain.choices]
    assert [choice.text for choice in both.choices] != [choice.text for choice in plain.choices]
    chunks = list(
        server.client().completions.create(**fields, stream=True, extra_body=intervention([JOY], compare_baseline=True))
    )
    assert chunks[-1].intervention["baseline"] == both.intervention["baseline"]


def test_phases__count_the_positions_of_their_own(server):
    n_prompt = len(server.loaded.tokenizer(PROMPT)["input_ids"])

    def tested(*phases: str) -> int:
        answer = complete(server.client(), n_tokens=7, extra_body=intervention([JOY], phases=list(phases)))
        return int(answer.intervention["tested"])

    assert tested("prompt") == 2 * D_MLP * n_prompt
    assert tested("generation") == 2 * D_MLP * 6, "the last token is never read"
    assert tested("prompt", "generation") == 2 * D_MLP * (n_prompt + 6)


def test_neurons__named_one_by_one_are_the_only_ones_tested(server):
    n_prompt = len(server.loaded.tokenizer(PROMPT)["input_ids"])
    rule = {"concept": "joy", "hook_points": ["mlp_post"], "layers": [1], "neurons": [3, 17, 20]}
    answer = complete(server.client(), n_tokens=1, extra_body=intervention([rule]))
    assert (answer.intervention["neurons"], answer.intervention["tested"]) == (3, 3 * n_prompt)
    assert answer.intervention["layers"] == [1]
    error = refusal(complete, client=server.client(), extra_body=intervention([{"concept": "joy", "neurons": [3]}]))
    assert "layers" in error.message


def test_mode_neuron__takes_every_value(server):
    whole = complete(server.client(), extra_body=intervention([JOY], mode="neuron"))
    assert whole.intervention["changed"] == whole.intervention["tested"]
    assert whole.choices[0].text == expected(server, PROMPT, 12, [{**JOY, "tau": float("inf")}])[0]


def test_conflicts__are_ordered_or_refused_as_the_request_says(server):
    rules = [{"concept": "joy", "action": "set", "value": 2}, {"concept": "fear", "action": "set", "value": -2}]
    forwards = complete(server.client(), extra_body=intervention(rules)).choices[0].text
    assert forwards == expected(server, PROMPT, 12, rules)[0]
    backwards = complete(server.client(), extra_body=intervention(rules[::-1])).choices[0].text
    assert backwards == expected(server, PROMPT, 12, rules[::-1])[0]
    error = refusal(complete, client=server.client(), extra_body=intervention(rules, conflicts="refuse"))
    assert (error.status_code, error.code) == (400, "bad_rule")
    assert "Rules 0 and 1 disagree" in error.message


def test_intervention__that_the_table_cannot_serve_is_refused_with_what_it_has(server):
    def status(rule: dict[str, Any], **fields: Any) -> tuple[int, str]:
        error = refusal(complete, client=server.client(), extra_body=intervention([rule], **fields))
        return error.status_code, error.message

    code, message = status({"concept": "envy"})
    assert code == 400
    assert "anger, fear, joy" in message
    code, message = status({"concept": "joy", "layers": [7]})
    assert code == 400
    assert "0, 1" in message
    code, message = status(JOY, table="tbl_0000000000000000")
    assert code == 404
    assert server.table.id in message
    own = server.table.header.model.config_hash
    other = next(e.id for e in server.service.catalog.entries() if e.header.model.config_hash != own)
    code, message = status(JOY, table=other)
    assert code == 409
    assert status({"concept": "joy", "action": "dampen"})[0] == 400
    assert status({"concept": "joy", "action": "set", "value": 1e39})[0] == 400, "logits that are no numbers"


# --- limits, and clients that behave badly ---------------------------------------------------------------------------


def test_limits__are_named_in_the_refusal(slow):
    create = slow.client().completions.create
    fields = {"model": "tiny", "prompt": PROMPT}
    assert refusal(create, model="tiny", prompt="a b", max_tokens=61).param == "max_tokens"
    assert refusal(create, **fields, n=4).code == "too_many_sequences"
    assert "has 3 rules, at most 2" in refusal(create, **fields, extra_body=intervention([JOY] * 3)).message
    assert refusal(create, model="tiny", prompt="the sun " * 20, max_tokens=2).code == "context_length_exceeded"


def test_queue__that_is_full_answers_429_with_retry_after_and_takes_over_later(slow):
    client = slow.client()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(complete, client, PROMPT, 25) for _ in range(3)]
        time.sleep(0.3)
        error = refusal(complete, client=client, n_tokens=25)
        assert (error.status_code, error.code) == (429, "queue_full")
        assert int(error.response.headers["retry-after"]) >= 1
        assert all(answer.result().choices[0].text for answer in running)
    assert complete(slow.client(max_retries=3), n_tokens=2).choices[0].text is not None


def test_programs__beyond_the_limit_answer_429(slow):
    client = slow.client()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(complete, client, PROMPT, 25, extra_body=intervention(RULES[i])) for i in (1, 2)]
        time.sleep(0.3)
        error = refusal(complete, client=client, extra_body=intervention(RULES[3]))
        assert (error.status_code, error.code) == (429, "too_many_programs")
        assert all(answer.result() for answer in running)


def test_time__that_runs_out_answers_408_or_ends_the_stream_with_an_error(hurried):
    assert refusal(complete, client=hurried.client(), n_tokens=50).status_code == 408
    said = []
    with pytest.raises(openai.APIError, match="not done within 1 s"):
        said.extend(complete(hurried.client(), n_tokens=50, stream=True))
    assert said, "it had begun"
    wait_for_nobody(hurried)


def test_client__that_goes_away_frees_its_place(slow):
    stream = complete(slow.client(), n_tokens=25, stream=True)
    next(stream)
    stream.close()
    wait_for_nobody(slow)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 30}, timeout=0.2)
    wait_for_nobody(slow)


def test_reader__that_is_slow_holds_nobody_up(server):
    """It asks for 32 streams with log probabilities and reads nothing, so that its socket fills."""
    body = json.dumps(
        {"model": "tiny", "prompt": PROMPT, "n": 32, "max_tokens": 50, "stream": True, "logprobs": 20, "temperature": 0}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        lazy.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(0.2)
        assert complete(server.client(timeout=20)).choices[0].text == expected(server, PROMPT, 12, None)[0]
    wait_for_nobody(server)


def wait_for_nobody(server: TextServer) -> None:
    """Until no sequence runs or waits, as /metrics says."""
    deadline = time.monotonic() + 10
    while True:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        numbers = {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#"}
        if not numbers["neuronlens_running_sequences"] and not numbers["neuronlens_queue_sequences"]:
            return
        assert time.monotonic() < deadline, "a sequence stayed in the batch"
        time.sleep(0.02)


def test_metrics__count_tokens_and_changes_by_action(server):
    def counted() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[:1] not in ("#", "")}

    before = counted()
    rules = [{"concept": "joy", "action": "dampen", "factor": 0.5}, {"concept": "fear", "action": "mean"}]
    answer = complete(server.client(), n_tokens=6, extra_body=intervention(rules))
    after = counted()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    changed = answer.intervention["changed_by_rule"]
    assert grown('neuronlens_changed_activations_total{action="dampen"}') == changed[0]
    assert grown('neuronlens_changed_activations_total{action="mean"}') == changed[1]
    assert grown("neuronlens_tested_activations_total") == answer.intervention["tested"]
    assert grown("neuronlens_generated_tokens_total") == answer.usage.completion_tokens
    assert grown("neuronlens_prompt_tokens_total") == answer.usage.prompt_tokens
    assert grown("neuronlens_time_to_first_token_seconds_count") == 1
    assert grown("neuronlens_batch_size_count") == answer.usage.completion_tokens


@pytest.mark.parametrize("log_prompts", [False, True])
def test_log__has_what_was_done_and_the_texts_only_where_asked(tmp_path, caplog, log_prompts):
    with (
        text_server(tmp_path, log_prompts=log_prompts) as server,
        caplog.at_level(logging.INFO, logger="neuronlens.serving"),
    ):
        answer = complete(server.client(), n_tokens=6, user="somebody", extra_body=intervention([JOY]))
        answer_text, changed = answer.choices[0].text, answer.intervention["changed"]
    (line,) = [record.msg for record in caplog.records if "completion_tokens" in str(record.msg)]
    assert (line["path"], line["status"], line["user"]) == ("/v1/completions", 200, "somebody")
    assert (line["completion_tokens"], line["changed"]) == (answer.usage.completion_tokens, changed)
    assert line["table"] == server.table.id
    assert ([PROMPT] in line.values(), [answer_text] in line.values()) == (log_prompts, log_prompts)
    assert log_prompts or (PROMPT not in caplog.text and repr(answer_text) not in caplog.text)
