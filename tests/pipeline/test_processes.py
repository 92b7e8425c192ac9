"""Real drivers, killed, signalled, started twice and robbed of their nodes and their disk: the same command ends what
they began."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from neuronlens.store import Store
from pipeline.status import status_of
from tests.faults import Fault, break_storage
from tests.pipeline.runs import TWO_WORKERS, assert_same_tables, recipe_file
from tests.warm import run_warm

pytestmark = pytest.mark.slow

SLOW = Fault("slow", r"partials/", seconds=0.4)
"""Makes a run long enough to do something to it."""


class Run:
    """`neuronlens run` on a store in `folder`, as a process of its own."""

    def __init__(self, place, folder, *, env=None, within=(), **sections):
        path = recipe_file(place, folder, **{"test": None, "compute": TWO_WORKERS, **sections})
        self.store = Store(f"faulty://{folder}/store")
        command = [sys.executable, "-m", "tests.faulty_cli", "run", str(path), "--store", self.store_url, "--json"]
        self.process = subprocess.Popen(
            [*within, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    @property
    def store_url(self):
        return f"faulty://{self.store.root}"

    def wait_for_commits(self, n):
        end = time.monotonic() + 120
        while len(self.store.names("commits")) < n:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end, "no commits within 120 s"
            time.sleep(0.05)

    def end(self, timeout=240):
        """(exit code, stdout, stderr)"""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = Run(place, folder).end()
    assert code == 0, err
    return folder / "store", json.loads(out.splitlines()[-1])


def assert_ended_well(run, undisturbed):
    code, out, err = run.end()
    assert code == 0, err
    root, summary = undisturbed
    assert_same_tables(run.store_url, root)
    assert json.loads(out.splitlines()[-1])["range_table"] == summary["range_table"]
    assert run.store.faults() == []


def test_driver__killed_in_the_middle_is_followed_by_the_same_command(place, tmp_path, undisturbed):
    break_storage(tmp_path, SLOW)
    first = Run(place, tmp_path)
    first.wait_for_commits(3)
    first.process.kill()
    first.end()
    before = {name: first.store.read_json(f"commits/{name}") for name in first.store.names("commits")}
    assert status_of(first.store)["state"] == "gone"
    break_storage(tmp_path)
    again = Run(place, tmp_path)
    assert_ended_well(again, undisturbed)
    assert {name: again.store.read_json(f"commits/{name}") for name in before} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_driver__ends_in_order_when_it_is_signalled(place, tmp_path, undisturbed, number, code):
    break_storage(tmp_path, SLOW)
    first = Run(place, tmp_path)
    first.wait_for_commits(2)
    started = time.monotonic()
    first.process.send_signal(number)
    found, _, err = first.end()
    assert time.monotonic() - started < 25, "10 s for what is in hand, the rest to take Ray down"
    assert found == code, err
    assert "the same command goes on from there" in err
    assert f"run {tmp_path}/recipe.yaml --store" in err
    assert first.store.names("leases") == []
    assert first.store.faults() == []
    break_storage(tmp_path)
    assert_ended_well(Run(place, tmp_path), undisturbed)


def test_driver__has_nothing_left_to_do_the_second_time(place, tmp_path, undisturbed):
    """With the workers of the default recipe, which hold every core while the plan is made."""
    copy = tmp_path / "store"
    shutil.copytree(undisturbed[0], copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.parquet")}
    assert_ended_well(Run(place, tmp_path, compute={"workers": "auto"}), undisturbed)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.parquet")} == before


def test_driver__that_comes_second_says_who_is_there(place, tmp_path, undisturbed):
    break_storage(tmp_path, Fault("slow", r"partials/shard-0000[1-9]", seconds=10.0))
    first = Run(place, tmp_path)
    first.wait_for_commits(1)
    assert status_of(first.store)["state"] == "running"
    code, out, err = Run(place, tmp_path).end()
    break_storage(tmp_path)
    assert (code, out) == (1, "")
    assert "is held by 'neuronlens run' of" in err
    assert f"process {first.process.pid} on" in err
    assert "Traceback" not in err
    assert_ended_well(first, undisturbed)


@pytest.fixture
def cluster():
    """A head that holds no workers, and nodes that come and go."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield started
    started.shutdown()


def test_run__goes_on_when_a_node_is_killed(place, tmp_path, undisturbed, cluster):
    break_storage(tmp_path, SLOW)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    run = Run(place, tmp_path, env={"RAY_ADDRESS": cluster.address}, compute={"workers": 3})
    run.wait_for_commits(4)
    nodes[0].kill_raylet()
    assert_ended_well(run, undisturbed)


def test_run__takes_nodes_that_join_and_lets_go_of_those_that_leave(place, tmp_path, undisturbed, cluster):
    break_storage(tmp_path, Fault("slow", r"partials/", seconds=1.5))
    first = cluster.add_node(num_cpus=1)
    run = Run(place, tmp_path, env={"RAY_ADDRESS": cluster.address}, compute={"workers": "auto"})
    run.wait_for_commits(1)
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    end = time.monotonic() + 90
    while sum(status_of(run.store)["workers"].values()) < 3:
        assert run.process.poll() is None, run.process.communicate()[1]
        assert time.monotonic() < end, "the run did not take the new nodes"
        time.sleep(0.5)
    cluster.remove_node(first)
    assert_ended_well(run, undisturbed)


_IN_A_SMALL_ROOM = ["unshare", "-rm", "sh", "-ec"]


def _may_mount():
    try:
        tried = subprocess.run(
            [*_IN_A_SMALL_ROOM, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False, timeout=20
        )
    except OSError:
        return False
    return tried.returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="mounting needs user namespaces")
@pytest.mark.parametrize(
    ("mount", "said"),
    [
        (
            'mount -t tmpfs -o size=8m tmpfs "$0"; (while [ ! -f "$0/store/store.json" ]; do sleep 0.05; done; '
            'dd if=/dev/zero of="$0/filler" bs=4k 2>/dev/null || true) & ',
            "no room left",
        ),
        ('mount -t tmpfs -o ro tmpfs "$0"; ', "does not let us"),
    ],
    ids=["full", "readonly"],
)
def test_run__says_what_is_wrong_with_the_disk(place, tmp_path, mount, said):
    room = tmp_path / "room"
    room.mkdir()
    recipe = recipe_file(place, tmp_path, test=None)
    command = [sys.executable, "-m", "tests.faulty_cli", "run", str(recipe), "--store", f"{room}/store"]
    done = subprocess.run(
        [*_IN_A_SMALL_ROOM, f'{mount} exec "$@"', str(room), *command], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def _run_cold(module, *args):
    return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, timeout=240)


def test_stages__run_apart_give_what_the_whole_job_gives(place, tmp_path, undisturbed):
    """python -m jobs.*, each twice: idempotent, and on one store."""
    root, summary = undisturbed
    path, store = recipe_file(place, tmp_path, compute=TWO_WORKERS), tmp_path / "store"
    found = {}
    for job, args in (
        ("collect", [str(path), "--store", str(store)]),
        ("statistics", [str(store)]),
        ("ranges", [str(store)]),
        ("evaluate", [str(store)]),
    ):
        for run in (_run_cold, run_warm):
            done = run("tests.small_job", job, *args, "--json")
            assert done.returncode == 0, done.stderr
            found[job] = json.loads(done.stdout.splitlines()[-1])
    assert found["ranges"]["range_table"] == summary["range_table"]
    assert len(found["evaluate"]["rows"]) == 12
    assert_same_tables(store, root)
