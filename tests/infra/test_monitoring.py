import json
import re
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge

from pipeline.metrics import NAMES, CollectorMetrics, RunMetrics
from tests.infra.files import INFRA, load_yaml
from tests.infra.test_kuberay import SPECS

DASHBOARD = json.loads((INFRA / "monitoring/grafana/neuronlens.json").read_text())
RULES = [rule for group in load_yaml("monitoring/alerts.yml")["groups"] for rule in group["rules"]]


def _exported() -> dict[str, set[str]]:
    """The tags of each metric by the name under which Ray exports it, as seen on Ray 2.60's endpoint: ray_ before every
    name, _total after a counter's."""
    metrics = [*vars(CollectorMetrics("x")).values(), *vars(RunMetrics("x")).values()]
    return {
        f"ray_{metric.info['name']}" + ("_total" if isinstance(metric, Counter) else ""): set(metric.info["tag_keys"])
        for metric in metrics
        if isinstance(metric, Counter | Gauge)
    }


def _expressions() -> dict[str, str]:
    shown = {
        f"{panel['title']} {panel['id']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }
    return shown | {rule["alert"]: rule["expr"] for rule in RULES}


def _metrics_in(expression: str) -> list[tuple[str, str]]:
    """Name and matchers of every selector: a word before { that is not a function or a keyword."""
    return re.findall(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", expression)


def test_metrics__are_those_of_the_list():
    named = {name.removeprefix("ray_").removesuffix("_total") for name in _exported()}
    assert named == set(NAMES)


@pytest.mark.parametrize("where", _expressions())
def test_expression__asks_only_for_metrics_and_tags_that_exist(where):
    expression, exported = _expressions()[where], _exported()
    selectors = _metrics_in(expression)
    assert selectors or "ray_neuronlens" in expression
    assert set(re.findall(r"\w*neuronlens\w*", expression)) <= set(exported)
    tags: set[str] = set()
    for name, matchers in selectors:
        tags |= exported[name]
        assert set(re.findall(r"(\w+)\s*=~?", matchers)) <= exported[name]
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        assert set(re.split(r",\s*", grouped)) <= (tags or {"store"})
    assert all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]"))


def test_dashboard__shows_every_metric():
    asked = {name for expression in _expressions().values() for name, _ in _metrics_in(expression)}
    assert asked == set(_exported())


def test_dashboard__has_panels_of_their_own_number_and_place():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken
        assert box["x"] + box["w"] <= 24
        taken |= cells


def test_alerts__say_what_to_do():
    assert {rule["alert"] for rule in RULES} == {"NeuronlensShardsQuarantined", "NeuronlensNoTokens"}
    assert all("neuronlens status STORE" in rule["annotations"]["description"] for rule in RULES)


def test_prometheus_yml__reads_rays_list_of_nodes_the_server_and_the_alerts():
    config = load_yaml("monitoring/prometheus.yml")
    ray, server = config["scrape_configs"]
    assert server["static_configs"] == [{"targets": ["127.0.0.1:8000"]}], "where neuronlens serve listens by default"
    (discovery,) = ray["file_sd_configs"]
    assert discovery["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert all((INFRA / "monitoring" / path).exists() for path in config["rule_files"])


def test_pod_monitor__finds_the_pods_of_kuberay():
    monitor: dict[str, Any] = load_yaml("monitoring/podmonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for spec in SPECS.values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert wanted <= group["template"]["metadata"]["labels"].items()
            ports = group["template"]["spec"]["containers"][0]["ports"]
            assert {"name": endpoint["port"], "containerPort": 8080} in ports


@pytest.mark.parametrize(("path", "kind"), [("datasource.yaml", "datasources"), ("dashboards.yaml", "providers")])
def test_provisioning__has_the_one_entry_that_grafana_wants(path, kind):
    content = load_yaml(f"monitoring/grafana/{path}")
    assert content["apiVersion"] == 1
    assert len(content[kind]) == 1
