"""Hooks of `schemathesis run` for tests/neuronlens/serving/test_fuzz.py, which starts it on a server of a tiny model.

What a schema allows is mostly names that nobody has, and combinations that mean nothing: the hooks put names in their
place that the server knows, so that the rest of a request is looked at too. They touch only what is of the right type,
so that what shall be wrong stays wrong.
"""

import re
from typing import Any

import schemathesis

MODEL = "tiny"
CONCEPTS = ("joy", "anger", "fear")
N_LAYERS, N_NEURONS = 2, 16
_N_TOKENS, _N_VOCABULARY = 8, 300

NOT_IN_A_SCHEMA = frozenset(
    {
        "bad_rule",
        "bad_table",
        "context_length_exceeded",
        "empty_prompt",
        "non_finite_logits",
        "too_many_sequences",
        "too_many_tokens",
        "unknown_concept",
        "unknown_hook_point",
        "unknown_layer",
        "unknown_neuron",
    }
)
"""Why a request that fits the schema may be refused: what is asked for is not there, or more than the server gives."""

_WRITTEN_AS_FRACTION = re.compile(r" is -?\d+(\.0|(\.\d+)?e\+\d+), expected: [^.]*a valid integer")
"""JSON Schema counts 19.0 among the integers. To the server it is no whole number, as 1 is no true."""


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Every status must be named: `default` would allow all."""
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("default")


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    if isinstance(case.path_parameters, dict):
        case.path_parameters = _known("", case.path_parameters)
    if isinstance(case.query, dict):
        case.query = _known("", case.query)
    if isinstance(case.body, dict) and case.media_type == "application/json":
        case.body = _known_body(case.body)
    return case


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """False where a refusal of what fits the schema is none of the server's faults."""
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 400:
        return True
    error = response.json()["error"]
    return error["code"] not in NOT_IN_A_SCHEMA and not _WRITTEN_AS_FRACTION.search(error["message"])


def _known(name: str, value: Any) -> Any:
    """A value like this one that the server knows; one in five names stays unknown."""
    if isinstance(value, list) and name != "stop":
        return [_known(name, one) for one in value]
    if isinstance(value, dict):
        return {key: _known(key, one) for key, one in value.items()}
    if isinstance(value, str) and len(value) <= 100 and len(value) % 5 != 4:
        return _known_text(name, value)
    if _is_whole(value) and value >= 0:
        return _known_number(name, value)
    return value


def _known_text(name: str, value: str) -> str:
    if name in ("prompt", "content", "text"):
        return value[:20] or "i feel"
    if name == "concept":
        return CONCEPTS[len(value) % len(CONCEPTS)]
    known = {"model": MODEL, "table": "latest", "id": "latest", "hook_point": "mlp_post", "hook_points": "mlp_post"}
    return known.get(name, value)


def _known_number(name: str, value: int) -> int:
    if name in ("max_tokens", "max_completion_tokens", "n") and value > 0:
        return 1 + value % (2 if name == "n" else _N_TOKENS)
    within = {
        "prompt": _N_VOCABULARY,
        "layer": N_LAYERS,
        "layers": N_LAYERS,
        "neuron": N_NEURONS,
        "neurons": N_NEURONS,
    }
    return value % within[name] if name in within else value


def _known_body(given: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = _known("", given)
    if isinstance(body.get("intervention"), dict):
        body["intervention"] = _known_intervention(body["intervention"])
    if body.get("stream_options") is not None and body.get("stream") in (None, False):
        body["stream"] = True
    if body.get("top_logprobs") is not None and body.get("logprobs") in (None, False):
        body["logprobs"] = True
    if _is_whole(body.get("max_tokens")) and _is_whole(body.get("max_completion_tokens")):
        del body["max_completion_tokens"]
    return body


def _known_intervention(intervention: dict[str, Any]) -> dict[str, Any]:
    rules = intervention.get("rules")
    if not isinstance(rules, list):
        return intervention
    return {**intervention, "rules": [_known_rule(rule) if isinstance(rule, dict) else rule for rule in rules]}


def _known_rule(rule: dict[str, Any]) -> dict[str, Any]:
    """Fields that fit the action, as no schema says it."""
    rule = dict(rule)
    action = rule.get("action", "zero")
    if action in ("zero", "mean", "others", "dampen", "adaptive", "soften") and _is_number(rule.get("value")):
        del rule["value"]
    if (
        action in ("zero", "mean", "others", "set", "soften")
        and _is_number(rule.get("factor"))
        and 0 <= rule["factor"] <= 1
    ):
        del rule["factor"]
    if action == "set" and rule.get("value") is None:
        rule["value"] = 1.0
    if action == "dampen" and rule.get("factor") is None:
        rule["factor"] = 0.5
    if action == "soften" and _is_number(rule.get("tau")) and rule["tau"] > 0:
        del rule["tau"]
    if rule.get("neurons") and rule.get("layers") is None:
        rule["layers"] = [0]
    return rule


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
