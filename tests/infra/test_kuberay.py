"""The manifests against what KubeRay's CRDs demand, written down here since no cluster and no CRD is at hand: the
required fields of the v1 API, the fields that exist (a misspelt one is dropped in silence), and the types that differ
from what YAML makes of a plain value."""

import importlib
import inspect
import shlex
from typing import Any

import pytest
import typer.main
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.serve.schema import ServeDeploySchema

from neuronlens.cli import app
from neuronlens.serving.auth import READ_VARIABLE
from neuronlens.serving.ray_serve import DeployArgs
from tests.infra.files import INFRA, docker_value, load_yaml

RAY_JOB_FIELDS = {
    "backoffLimit",
    "submissionMode",
    "entrypoint",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
RAY_SERVICE_FIELDS = {"serveConfigV2", "rayClusterConfig"}
RAY_CLUSTER_FIELDS = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
WORKER_GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
POD_FIELDS = {"terminationGracePeriodSeconds", "securityContext", "tolerations", "containers", "volumes"}
CONTAINER_FIELDS = {"name", "image", "ports", "envFrom", "resources", "volumeMounts"}

RAY_CLUSTER = load_yaml("kuberay/raycluster.yaml")
RAY_JOB = load_yaml("kuberay/rayjob.yaml")
RAY_SERVICE = load_yaml("kuberay/rayservice.yaml")
SPECS = {
    "RayCluster": RAY_CLUSTER["spec"],
    "RayJob": RAY_JOB["spec"]["rayClusterSpec"],
    "RayService": RAY_SERVICE["spec"]["rayClusterConfig"],
}
SECRETS = {kind: ["neuronlens-store"] for kind in SPECS} | {"RayService": ["neuronlens-store", "neuronlens-keys"]}


def _groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_manifests__name_the_v1_api():
    assert (RAY_CLUSTER["apiVersion"], RAY_CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert (RAY_SERVICE["apiVersion"], RAY_SERVICE["kind"]) == ("ray.io/v1", "RayService")


@pytest.mark.parametrize("kind", SPECS)
def test_cluster_spec__has_the_fields_of_the_api(kind):
    spec = SPECS[kind]
    assert set(spec) == RAY_CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) == WORKER_GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    for group in _groups(spec):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "the CRD takes strings only"


@pytest.mark.parametrize("kind", SPECS)
def test_pods__are_complete(kind):
    for group in _groups(SPECS[kind]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert set(pod) <= POD_FIELDS
        assert set(container) <= CONTAINER_FIELDS
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts the limits"
        assert container["envFrom"] == [{"secretRef": {"name": name}} for name in SECRETS[kind]]
        assert pod["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("kind", SPECS)
def test_pods__live_long_enough_for_collectors_to_finish(kind):
    drain_seconds = int(docker_value("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"))
    assert drain_seconds >= 10
    for group in _groups(SPECS[kind]):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= max(30, drain_seconds + 15)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_cluster_spec__scales_gpu_and_cpu_pods_and_spares_the_head(kind):
    spec = SPECS[kind]
    n_gpus = {
        group["groupName"]: int(
            group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        )
        for group in spec["workerGroupSpecs"]
    }
    assert n_gpus == {"gpu": 1, "cpu": 0}
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("kind", SPECS)
def test_cluster_spec__names_the_ray_of_the_image(kind):
    assert SPECS[kind]["rayVersion"] == docker_value("RAY_VERSION")


def test_ray_job__has_the_fields_of_the_api_and_goes_away():
    spec = RAY_JOB["spec"]
    assert set(spec) == RAY_JOB_FIELDS
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0


def test_ray_job__runs_a_command_that_exists_on_a_recipe_that_is_mounted():
    program, name, *arguments = shlex.split(RAY_JOB["spec"]["entrypoint"])
    command = typer.main.get_command(app).commands[name]
    params = command.make_context(name, arguments).params
    pod = SPECS["RayJob"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert program == "neuronlens"
    assert params["store"].startswith("s3://")
    assert mounts[str(params["recipe"].parent)] == "recipe"


def test_ray_job__is_the_cluster_of_raycluster_yaml_and_the_recipe():
    pod = SPECS["RayJob"]["headGroupSpec"]["template"]["spec"]
    without_recipe = pod | {
        "containers": [
            container | {"volumeMounts": [mount for mount in container["volumeMounts"] if mount["name"] != "recipe"]}
            for container in pod["containers"]
        ],
        "volumes": [volume for volume in pod["volumes"] if volume["name"] != "recipe"],
    }
    head = SPECS["RayJob"]["headGroupSpec"]
    bare = SPECS["RayJob"] | {"headGroupSpec": head | {"template": head["template"] | {"spec": without_recipe}}}
    assert bare == SPECS["RayCluster"]


@pytest.mark.parametrize("kind", SPECS)
def test_cluster_spec__is_read_by_rays_autoscaler_as_it_is_meant(kind):
    """The autoscaler beside the head makes its configuration from the manifest by this function of Ray's."""
    resource = {"metadata": {"name": "neuronlens", "namespace": "default"}, "spec": SPECS[kind]}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    read = {
        name: {amount: node["resources"].get(amount, 0) for amount in ("CPU", "GPU")} | {"at most": node["max_workers"]}
        for name, node in config["available_node_types"].items()
    }
    groups = {
        "headgroup": {"CPU": 0, "GPU": 0, "at most": 0},
        "gpu": {"CPU": 8, "GPU": 1, "at most": 8},
        "cpu": {"CPU": 16, "GPU": 0, "at most": 8},
    }
    assert read == {name: groups[name] for name in ("headgroup", *_worker_groups(kind))}


def _worker_groups(kind: str) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in SPECS[kind]["workerGroupSpecs"]}


# --- the server ---


def _serve_config() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]))


def _serve_args() -> DeployArgs:
    [application] = _serve_config().applications
    return DeployArgs.model_validate(application.args)


def test_ray_service__has_the_fields_of_the_api():
    assert set(RAY_SERVICE["spec"]) == RAY_SERVICE_FIELDS
    assert isinstance(RAY_SERVICE["spec"]["serveConfigV2"], str), "the CRD takes the configuration as one string"


def test_ray_service__names_an_application_that_our_code_builds():
    [application] = _serve_config().applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    [parameter] = inspect.signature(build).parameters.values()
    assert parameter.annotation is DeployArgs
    assert build(_serve_args())._bound_deployment.name == "neuronlens"


def test_ray_service__starts_no_replica_without_keys_and_holds_none():
    assert not _serve_args().no_auth
    assert _serve_config().http_options.host == "0.0.0.0"
    text = (INFRA / "kuberay/rayservice.yaml").read_text()
    assert "secretRef: {name: neuronlens-keys}" in text
    assert READ_VARIABLE in text
    assert READ_VARIABLE not in RAY_SERVICE["spec"]["serveConfigV2"]


def test_ray_service__has_a_pod_for_each_replica_and_time_to_drain():
    args, [group] = _serve_args(), _worker_groups("RayService").values()
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["minReplicas"], group["maxReplicas"]) == (args.replicas, args.max_replicas)
    assert (args.cpus_per_replica, args.gpus_per_replica) == (int(limits["cpu"]), int(limits["nvidia.com/gpu"]))
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= args.drain_seconds + 10


def test_ray_service__listens_where_the_pods_say():
    for group in _groups(SPECS["RayService"]):
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == _serve_config().http_options.port
