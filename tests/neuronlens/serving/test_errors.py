"""Whatever goes wrong is answered with OpenAI's envelope: a sentence, the field at fault, and nothing from within."""

import io
import json
import logging

import pytest
from fastapi.testclient import TestClient

from neuronlens.serving import logs
from tests.neuronlens.serving.shells import bare_service, guarded_app

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client():
    return TestClient(guarded_app(bare_service()))


@pytest.fixture
def log():
    """What the server would have written to stderr."""
    root = logging.getLogger()
    before = root.handlers, root.level, logging.getLogger("neuronlens.serving").level
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    root.handlers, root.level = before[:2]
    logging.getLogger("neuronlens.serving").setLevel(before[2])
    logging.captureWarnings(False)


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        ({"temperature": 1}, "prompt", "missing_field", "The field 'prompt' is missing."),
        (
            {"prompt": "a", "logit_bias": {}},
            "logit_bias",
            "unsupported_field",
            "The field 'logit_bias' is not supported by POST /v1/ask. Leave it out.",
        ),
        (
            {"prompt": "a", "rules": [{"concept": "joy"}, {"concept": "joy", "tua": 2}]},
            "rules.1.tua",
            "unsupported_field",
            "The field 'rules.1.tua' is not supported by POST /v1/ask. Leave it out.",
        ),
        (
            {"prompt": "a", "temperature": 3},
            "temperature",
            "invalid_field",
            "The field 'temperature' is 3, expected: less than or equal to 2.",
        ),
        (
            {"prompt": {"text": 1}},
            "prompt",
            "invalid_field",
            "The field 'prompt' is an object, expected: a valid string, or a valid list.",
        ),
        (
            {"prompt": ["a", 7]},
            "prompt",
            "invalid_field",
            "The field 'prompt' is a list of 2, expected: a valid string. The field 'prompt.1' is 7, expected: a valid "
            "string.",
        ),
        (
            {"prompt": "a", "n": True, "temperature": None},
            "temperature",
            "invalid_field",
            "The field 'temperature' is null, expected: a valid number.",
        ),
    ],
)
def test_validation__is_400_and_names_the_field(client, body, param, code, message):
    error = error_of(client.post("/v1/ask", json=body), 400)
    assert error == {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def test_validation__names_query_parameters_too(client):
    error = error_of(client.get("/v1/tables/tbl_1?layer=last"), 400)
    assert error["param"] == "layer"
    assert error["message"].startswith("The query parameter 'layer' is 'last', expected: a valid integer")


def test_validation__repeats_little_of_what_was_sent(client):
    error = error_of(client.post("/v1/ask", json={"prompt": "a", "n": "9" * 10_000, "x" * 10_000: 1}), 400)
    assert len(error["message"]) < 500
    error = error_of(client.post("/v1/ask", json={"prompt": "a", **{f"field{i}": i for i in range(900)}}), 400)
    assert "And 895 more." in error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "The body is not JSON"),
        (b"{'prompt': 'a'}", "The body is not JSON"),
        (b'{"prompt": "a"} trailing', "The body is not JSON"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "The body is not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "holds NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "holds -Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "holds the number 1e999"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "4,300 digits"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_body__that_is_no_json_is_400(client, body, message):
    error = error_of(client.post("/v1/ask", content=body, headers=JSON), 400)
    assert error["code"] == "invalid_json"
    assert message in error["message"]
    assert "could not be read" not in error["message"]


@pytest.mark.parametrize("body", [b'"a"', b"[]", b"17", b"null", b"true"])
def test_body__that_is_no_object_is_400(client, body):
    assert error_of(client.post("/v1/ask", content=body, headers=JSON), 400)["param"] is None


def test_body__that_is_missing_is_asked_for(client):
    error = error_of(client.post("/v1/ask"), 400)
    assert error["message"] == "POST /v1/ask needs a body. Expected a JSON object, sent as application/json."


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "json", "\u00fcber/json", ""]
)
def test_body__of_another_content_type_is_415(client, content_type):
    headers = {"Content-Type": content_type.encode("latin-1")}
    error = error_of(client.post("/v1/ask", content=b'{"prompt": "a"}', headers=headers), 415)
    assert error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "application/ld+json"])
def test_body__of_json_is_taken(client, content_type):
    answer = client.post("/v1/ask", content=b'{"prompt": "a"}', headers={"Content-Type": content_type})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\\ud800"}', b'{"prompt": "a", "\\uDFFF": 1}', b'{"prompt": ["a", "\\ude00\\ud83d"]}']
)
def test_body__with_half_a_surrogate_pair_is_400(client, body):
    error = error_of(client.post("/v1/ask", content=body, headers=JSON), 400)
    assert "surrogate" in error["message"]


def test_body__with_whole_surrogate_pairs_is_taken(client):
    answer = client.post("/v1/ask", content=b'{"prompt": "\\ud83d\\ude00"}', headers=JSON)
    assert answer.json()["prompt"] == "\N{GRINNING FACE}"


def test_envelope__is_utf8_whatever_it_says(client):
    answer = client.get("/v1/raise/surrogate")
    assert error_of(answer, 400)["message"] == "There is no concept '?'."


def test_no_route__is_404_and_another_method_405_with_allow(client):
    error = error_of(client.get("/v1/nowhere"), 404)
    assert (error["type"], error["code"]) == ("not_found_error", "not_found")
    assert error["message"].startswith("There is no GET /v1/nowhere.")
    answer = client.get("/v1/ask")
    error = error_of(answer, 405)
    assert answer.headers["Allow"] == "POST"
    assert error["message"] == "GET /v1/ask is not offered. Offered: POST."
    assert client.get("/health/").status_code == 404


def test_api_error__carries_retry_after(client):
    answer = client.get("/v1/raise/api")
    assert error_of(answer, 429) == {
        "message": "The queue is full.",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    assert answer.headers["Retry-After"] == "7"


def test_api_error__may_be_raised_many_times(client):
    for _ in range(3):
        error_of(client.get("/v1/raise/api"), 429)


def test_usage_error__is_a_400_with_its_own_sentence(client):
    error = error_of(client.get("/v1/raise/usage"), 400)
    assert error["code"] == "bad_request"
    assert error["message"] == "There is no concept 'joi'. Did you mean joy?"


@pytest.mark.parametrize(
    ("what", "status", "code", "secret"),
    [
        ("run", 500, "internal_error", "/srv/store/ranges/tbl_1"),
        ("storage", 503, "storage_failed", "s3://bucket"),
        ("bug", 500, "internal_error", "secret 42"),
    ],
)
def test_failure__is_told_to_the_log_and_not_to_the_client(client, log, what, status, code, secret):
    answer = client.get(f"/v1/raise/{what}", headers={"X-Request-Id": "req-7"})
    error = error_of(answer, status)
    assert (error["type"], error["code"]) == ("server_error", code)
    assert secret not in answer.text
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    told = [line for line in lines if secret in json.dumps(line)]
    assert [line["request_id"] for line in told] == ["req-7"]
    if what == "bug":
        assert "req-7" in error["message"]
        assert "ZeroDivisionError" in told[0]["exception"]


def test_openapi__has_the_envelope_and_no_422(client):
    spec = client.get("/openapi.json").json()
    answers = [operation["responses"] for path in spec["paths"].values() for operation in path.values()]
    assert answers
    for responses in answers:
        assert "422" not in responses
        schema = responses["default"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert "HTTPValidationError" not in spec["components"]["schemas"]
