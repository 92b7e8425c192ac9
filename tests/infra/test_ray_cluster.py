import copy

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.files import load_yaml

CLUSTER = load_yaml("ray/cluster.yaml")


def test_cluster_yaml__is_valid_for_ray():
    """What `ray up` does first: fill in the defaults, then hold all of it against Ray's own schema."""
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))


def test_cluster_yaml__is_refused_by_ray_with_a_misspelt_key():
    """The oracle itself: a check that lets anything pass would not be worth much."""
    wrong = copy.deepcopy(CLUSTER)
    wrong["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(wrong))


def test_cluster_yaml__leaves_the_head_to_the_driver():
    head = CLUSTER["available_node_types"][CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_cluster_yaml__scales_gpu_and_cpu_nodes_within_its_limit():
    workers = {name: node for name, node in CLUSTER["available_node_types"].items() if name != "head"}
    assert {name: node["resources"]["GPU"] > 0 for name, node in workers.items()} == {"gpu": True, "cpu": False}
    assert sum(node["max_workers"] for node in workers.values()) == CLUSTER["max_workers"]
    assert all(node["min_workers"] == 0 for node in workers.values())


def test_cluster_yaml__installs_nothing_at_start():
    """Ray's defaults would: a wheel of Ray's nightly build, and a boto3 that does not fit s3fs."""
    filled = prepare_config(copy.deepcopy(CLUSTER))
    assert filled["setup_commands"] == filled["head_setup_commands"] == filled["worker_setup_commands"] == []
