"""`neuronlens submit` to a real cluster: ray start --head, its dashboard and its Jobs API."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from neuronlens.errors import UsageError
from neuronlens.store import Store
from pipeline import submit
from pipeline.frozen import load_shards
from pipeline.metrics import ACTIVITIES, NAMES
from pipeline.submit import client, submit_run
from tests.pipeline.runs import content_of, recipe_file

PYTHON_BIN = str(Path(sys.executable).parent)
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


TOKEN = secrets.token_hex(32)


def environment(token=TOKEN) -> dict[str, str]:
    """Nothing of Ray's but what a person exports; the venv's commands on the path; no proxy for this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PATH": f"{PYTHON_BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "no_proxy": "127.0.0.1",
    }


def run_command(*command, timeout=240, token=TOKEN) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        env=environment(token),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def neuronlens(*arguments, token=TOKEN) -> subprocess.CompletedProcess:
    return run_command(sys.executable, "-m", "neuronlens", *arguments, token=token)


class Cluster:
    """A head node with two CPUs, in a process group of its own."""

    def __init__(self, folder: str) -> None:
        self.gcs_port, self.metrics_port, dashboard_port = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard_port}"
        options = {
            "node-ip-address": "127.0.0.1",
            "port": self.gcs_port,
            "dashboard-port": dashboard_port,
            "dashboard-agent-listen-port": free_port(),
            "metrics-export-port": self.metrics_port,
            "ray-client-server-port": free_port(),
            "num-cpus": 2,
            "include-dashboard": "true",
            "temp-dir": folder,
        }
        command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        self.log = Path(folder) / "start.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"no dashboard within {START_SECONDS} s: {self.log.read_text()}"
            with contextlib.suppress(OSError):
                self.get(f"{self.address}/api/version")
                return
            time.sleep(0.5)

    def get(self, url: str) -> str:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.read().decode()

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """What Prometheus would read now: name -> sorted tags -> value."""
        text = self.get(f"http://127.0.0.1:{self.metrics_port}/metrics")
        found: dict = {}
        for name, tags, value in re.findall(r"^ray_(neuronlens_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', tags)))
            found.setdefault(name, {})[labels] = float(value)
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="nl")  # a socket's path has 107 characters at most
    cluster = Cluster(folder)
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def watched(cluster) -> Iterator[dict[str, dict]]:
    """What Prometheus saw last of each metric: a gauge vanishes 20 to 30 s after it was last set, and on a slow machine
    its test comes later."""
    found: dict[str, dict] = {}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            with contextlib.suppress(OSError):  # a busy node answers late
                found.update(cluster.metrics())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield found
    is_over.set()
    thread.join()


@pytest.fixture(scope="module")
def submitted(cluster, place, tmp_path_factory, watched):
    """A recipe that ran by `submit --wait`: (what the command said, its store)."""
    folder = tmp_path_factory.mktemp("submitted")
    recipe = recipe_file(place, folder, compute={"workers": 1}, test=None)
    store = Store(str(folder / "submitted-store"))
    done = neuronlens("submit", recipe, "--address", cluster.address, "--store", store.root, "--wait", "--json")
    return done, store


@pytest.mark.slow
def test_submit__runs_a_recipe_on_the_cluster(submitted):
    done, store = submitted
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == {"job": said["job"], "store": store.root, "status": "SUCCEEDED"}
    assert said["job"].startswith("raysubmit_")
    assert "range table  tbl_" in done.stderr, "the job's log is shown"
    assert len(store.names("commits")) == len(load_shards(store)) > 0
    assert len(store.table_ids()) == 1
    verified = neuronlens("verify", store.root, "--json")
    assert (verified.returncode, json.loads(verified.stdout)) == (0, {"ok": True, "faults": []})


@pytest.mark.slow
def test_status__finds_the_store_of_a_job(cluster, submitted):
    done, store = submitted
    job = json.loads(done.stdout)["job"]
    asked = neuronlens("status", job, "--address", cluster.address, "--json")
    assert asked.returncode == 0, asked.stderr
    status = json.loads(asked.stdout)
    assert (status["job"]["job"], status["job"]["status"], status["store"]) == (job, "SUCCEEDED", store.root)
    assert status["shards"]["committed"] == status["n_shards"] == len(load_shards(store))
    unknown = neuronlens("status", "raysubmit_none", "--address", cluster.address)
    assert unknown.returncode == 2
    assert "has no job 'raysubmit_none'" in unknown.stderr
    assert "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_metrics__of_a_job_reach_prometheus(submitted, watched):
    """The endpoint that Prometheus reads keeps what a collector counted, for a while after its end."""
    _, store = submitted
    shards, receipts = load_shards(store), store.receipts("commits")
    tag = ("store", Path(store.root).name)
    end = time.monotonic() + 30
    while len(watched) < len(NAMES) and time.monotonic() < end:
        time.sleep(0.5)
    found = dict(watched)

    def by(name, *keys):
        """Summed over processes, by the tags `keys`."""
        sums: dict = {}
        for labels, value in found[name].items():
            if tag in labels:
                key = tuple(dict(labels)[key] for key in keys)
                sums[key] = sums.get(key, 0.0) + value
        return sums

    names = {name.removesuffix("_total") for name in found}
    assert names == set(NAMES)
    found |= {name.removesuffix("_total"): values for name, values in found.items()}
    assert by("neuronlens_tokens") == {(): sum(shard.n_tokens for shard in shards)}
    assert by("neuronlens_samples") == {(): 120}
    files = [file for receipt in receipts for file in receipt["files"]]
    assert by("neuronlens_bytes_written", "kind") == {
        (kind,): sum(file["n_bytes"] for file in files if file["kind"] == kind)
        for kind in {file["kind"] for file in files}
    }
    seconds = by("neuronlens_seconds", "activity")
    assert set(seconds) <= {(activity,) for activity in ACTIVITIES}
    assert seconds["forward",] == pytest.approx(sum(receipt["seconds"]["forward"] for receipt in receipts))
    assert by("neuronlens_shards", "state")["committed",] == len(shards)
    assert set(by("neuronlens_workers", "state")) == {("starting",), ("idle",), ("busy",)}


@pytest.mark.slow
def test_submit__ends_with_1_where_the_job_fails(cluster, place, tmp_path):
    recipe = recipe_file(place, tmp_path, data={"source": str(tmp_path / "nowhere.jsonl")}, test=None)
    store = tmp_path / "store"
    done = neuronlens("submit", recipe, "--address", cluster.address, "--store", store, "--wait", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "FAILED"
    assert "nowhere.jsonl" in done.stderr, "the job's log is shown"
    assert "ended as FAILED; expected SUCCEEDED" in done.stderr
    assert not store.exists()


@pytest.mark.slow
def test_submit__sends_a_folder_with_the_recipe_and_its_data(cluster, place, tmp_path):
    folder = tmp_path / "job"
    (folder / "recipes").mkdir(parents=True)
    shutil.copy(place / "train.jsonl", folder / "texts.jsonl")
    content = content_of(place, data={"source": "texts.jsonl"}, compute={"workers": 1}, test=None)
    recipe = folder / "recipes" / "recipe.yaml"
    recipe.write_text(json.dumps(content))
    store = tmp_path / "store"
    options = ["--address", cluster.address, "--store", store, "--working-dir", folder, "--set", "ranges.tau=1.5"]
    done = neuronlens("submit", recipe, *options, "--wait")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("raysubmit_")
    opened = Store(str(store))
    [table] = opened.table_ids()
    assert opened.read_json(f"ranges/{table}/table.json")["tau"] == 1.5


@pytest.mark.slow
def test_ray_job_submit__runs_the_same_command(cluster, place, tmp_path):
    recipe = recipe_file(place, tmp_path, compute={"workers": 1}, test=None)
    command = ["python", "-m", "neuronlens", "run", recipe, "--store", tmp_path / "store"]
    done = run_command("ray", "job", "submit", "--address", cluster.address, "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(str(tmp_path / "store"))
    assert len(store.names("commits")) == len(load_shards(store)) > 0


@pytest.mark.slow
def test_submit__says_that_it_lacks_the_token(cluster, place, tmp_path):
    recipe = recipe_file(place, tmp_path)
    options = ["--address", cluster.address, "--store", tmp_path / "store"]
    done = neuronlens("submit", recipe, *options, token=secrets.token_hex(32))
    assert done.returncode == 2
    assert re.fullmatch(r"neuronlens: http://\S+ wants another token \(.*RAY_AUTH_TOKEN or .*\n", done.stderr)


@pytest.mark.slow
def test_submit__says_in_a_sentence_that_nobody_answers(place, tmp_path):
    recipe = recipe_file(place, tmp_path)
    started = time.monotonic()
    done = neuronlens("submit", recipe, "--address", f"127.0.0.1:{free_port()}", "--store", "/data/run")
    assert done.returncode == 2
    assert time.monotonic() - started < 30, "Ray alone would look for 45 s"
    assert done.stdout == ""
    assert re.fullmatch(
        r"neuronlens: No Ray dashboard answers at http://127\.0\.0\.1:\d+ \(.*refused\)\. .*\n", done.stderr
    )


@pytest.mark.parametrize("store", ["runs/one", "./store", "~/store"])
def test_submit_run__refuses_a_store_that_only_one_node_would_see(tmp_path, store):
    with pytest.raises(UsageError, match=r"relative path.*Expected a URL such as s3://bucket/run"):
        submit_run("http://127.0.0.1:1", tmp_path / "recipe.yaml", store=store)


def test_submit_run__refuses_a_recipe_that_would_not_travel(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(UsageError, match=r"recipe\.yaml does not lie in --working-dir .*job"):
        submit_run(
            "http://127.0.0.1:1", tmp_path / "recipe.yaml", store="s3://bucket/run", working_dir=tmp_path / "job"
        )


def test_submit_run__refuses_what_a_recipe_extends_where_it_would_not_travel(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "part.yaml").write_text("{}")
    (tmp_path / "job" / "recipe.yaml").write_text("extends: ../part.yaml")
    with pytest.raises(UsageError, match=r"part\.yaml does not lie in --working-dir .*job"):
        submit_run("http://x", tmp_path / "job" / "recipe.yaml", store="s3://b/run", working_dir=tmp_path / "job")


def test_submit_run__sends_a_recipe_with_all_that_it_extends(tmp_path, monkeypatch):
    (tmp_path / "part.yaml").write_text("data: {source: hub/data, text: content}")
    (tmp_path / "recipe.yaml").write_text("{extends: part.yaml, model: {id: hub/model}, data: {text: text}}")
    sent = {}

    class Client:
        def submit_job(self, *, entrypoint, runtime_env, metadata):
            sent.update(yaml.safe_load((Path(runtime_env["working_dir"]) / "recipe.yaml").read_text()))
            return "job-1"

    monkeypatch.setattr("pipeline.submit.client", lambda address: Client())
    assert submit_run("http://x", tmp_path / "recipe.yaml", store="s3://b/run") == "job-1"
    assert sent == {"model": {"id": "hub/model"}, "data": {"source": "hub/data", "text": "text"}}


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "ftp://head"])
def test_client__wants_a_dashboard(address):
    with pytest.raises(UsageError, match=rf"{address} is not a Ray dashboard.*http://head:8265"):
        client(address)


@pytest.mark.parametrize("address", [None, ""])
def test_client__wants_an_address(address):
    with pytest.raises(UsageError, match="No cluster was named"):
        client(address)


def test_client__does_not_wait_for_a_host_that_says_nothing(monkeypatch):
    monkeypatch.setattr(submit, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(UsageError, match=r"No Ray dashboard answers at .*timed out"):
            client(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 5
