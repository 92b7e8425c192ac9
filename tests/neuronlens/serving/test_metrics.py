"""What Prometheus is told, read back by Prometheus' own parser."""

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from neuronlens.serving.engine import EngineLoad
from neuronlens.serving.metrics import Metrics
from tests.neuronlens.serving.shells import bare_service, guarded_app


def samples(text):
    if isinstance(text, bytes):
        text = text.decode()
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class LoadedEngine:
    ready = True

    def __init__(self, *loads):
        self.loads = list(loads)

    def load_now(self):
        return self.loads.pop(0)


def test_metrics__count_tokens_and_what_programs_did():
    metrics = Metrics()
    metrics.saw_prompt(12)
    metrics.saw_prompt(3)
    metrics.saw_first_token(0.3)
    metrics.saw_tokens(5, 0.4)
    metrics.saw_program(100, {"zero": 7, "dampen": 0})
    metrics.saw_program(50, {"zero": 1})
    metrics.rejected("queue")
    found = samples(metrics.render(None))
    assert found["neuronlens_prompt_tokens_total",] == 15
    assert found["neuronlens_generated_tokens_total",] == 5
    assert found["neuronlens_time_to_first_token_seconds_sum",] == 0.3
    assert found["neuronlens_time_to_first_token_seconds_bucket", "le=0.25"] == 0
    assert found["neuronlens_time_to_first_token_seconds_bucket", "le=0.5"] == 1
    # Four tokens came after the first.
    assert found["neuronlens_time_per_output_token_seconds_sum",] == pytest.approx(0.1)
    assert found["neuronlens_tested_activations_total",] == 150
    assert found["neuronlens_changed_activations_total", "action=zero"] == 8
    assert found["neuronlens_changed_activations_total", "action=dampen"] == 0
    assert found["neuronlens_rejected_total", "reason=queue"] == 1


def test_metrics__a_single_token_has_no_time_per_token():
    metrics = Metrics()
    metrics.saw_tokens(1, 0.0)
    metrics.saw_tokens(0, 0.0)
    found = samples(metrics.render(None))
    assert found["neuronlens_time_per_output_token_seconds_count",] == 0
    assert found["neuronlens_generated_tokens_total",] == 1


def test_metrics__of_two_servers_are_apart():
    one, two = Metrics(), Metrics()
    one.saw_prompt(5)
    assert samples(two.render(None))["neuronlens_prompt_tokens_total",] == 0


def test_render__takes_in_the_engines_load_and_each_batch_once():
    client = TestClient(
        guarded_app(
            bare_service(
                engine=LoadedEngine(
                    EngineLoad(running=3, waiting=2, programs=1, batch_sizes=[1, 3, 3]),
                    EngineLoad(running=0, waiting=0, programs=0, batch_sizes=[2]),
                )
            )
        )
    )
    busy, idle = (samples(client.get("/metrics").text) for _ in range(2))
    gauges = ("neuronlens_running_sequences", "neuronlens_queue_sequences", "neuronlens_programs")
    assert [busy[gauge,] for gauge in gauges] == [3, 2, 1]
    assert [idle[gauge,] for gauge in gauges] == [0, 0, 0]
    assert [found["neuronlens_batch_size_sum",] for found in (busy, idle)] == [7, 9]
    assert idle["neuronlens_batch_size_bucket", "le=2.0"] == 2


def test_requests__are_counted_by_route_and_not_by_path():
    client = TestClient(guarded_app(bare_service()))
    for path in ("/v1/tables/tbl_1", "/v1/tables/tbl_2", "/v1/nowhere/1", "/v1/nowhere/2"):
        client.get(path)
    client.put("/v1/ask")
    client.request("BREW", "/v1/nowhere/3")
    client.get("/v1/raise/bug")
    found = samples(client.get("/metrics").text)
    counted = {key[1:]: value for key, value in found.items() if key[0] == "neuronlens_requests_total"}
    assert counted == {
        ("method=GET", "route=/v1/tables/{id}", "status=200"): 2,
        ("method=GET", "route=none", "status=404"): 2,
        ("method=PUT", "route=/v1/ask", "status=405"): 1,
        ("method=OTHER", "route=none", "status=404"): 1,
        ("method=GET", "route=/v1/raise/{what}", "status=500"): 1,
    }
    assert found["neuronlens_request_seconds_count", "route=/v1/tables/{id}"] == 2


def test_metrics__say_what_runs_and_how_much_memory_it_has():
    client = TestClient(guarded_app(bare_service()))
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    found = samples(answer.text)
    assert [key for key in found if key[0] == "neuronlens_build_info"]
    assert found["process_resident_memory_bytes",] > 1e6
    # The request that reads it is at work.
    assert found["neuronlens_requests_in_flight",] == 1


@pytest.mark.parametrize(
    ("ready", "draining", "status", "code"),
    [(True, False, 200, None), (False, False, 503, "engine_not_ready"), (True, True, 503, "draining")],
)
def test_ready__follows_the_engine_and_the_drain_and_health_neither(ready, draining, status, code):
    engine = LoadedEngine()
    engine.ready = ready
    service = bare_service(engine=engine)
    service.lifecycle.draining = draining
    client = TestClient(guarded_app(service))
    answer = client.get("/ready")
    assert answer.status_code == status
    if code:
        assert answer.json()["error"]["code"] == code
        assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/health").status_code == 200
