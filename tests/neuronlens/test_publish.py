"""From a store or a folder to a running server, by the command line, and by the emit stage."""

import json
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.ranges import app as ranges_job
from neuronlens.cli import app, main
from neuronlens.errors import NeuronLensError, RunFailed, UsageError
from neuronlens.recipe import RangesSection
from neuronlens.store import Store
from pipeline.driver import Silent
from pipeline.emit import emit_table, publish_table
from tests.synthetic_store import Shard, add_statistics, write_store
from tests.table_servers import READ_KEY, WRITE_KEY, table_server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("publish") / "store"
    rng = np.random.default_rng(3)
    shards = [Shard(concept=name, x_LSN=rng.normal(size=(2, 30, 8)).astype(np.float32)) for name in ("joy", "anger")]
    write_store(root, shards)
    add_statistics(root)
    return str(root)


@pytest.fixture(scope="module")
def table(store: str):
    return emit_table(Store(store), RangesSection(top_fraction=0.5), Silent())


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEURONLENS_API_KEY", READ_KEY)
    monkeypatch.setenv("NEURONLENS_WRITE_KEY", WRITE_KEY)
    with table_server(uploads=tmp_path / "uploads") as url:
        yield url


def served_ids(url: str) -> list[str]:
    answer = httpx.get(f"{url}/v1/tables", headers={"Authorization": f"Bearer {READ_KEY}"}).json()
    return [found["id"] for found in answer["data"]]


def run(*args: str, command=app) -> dict:
    """The JSON object that a command prints; our errors come through."""
    done = CliRunner().invoke(command, [*args, "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_publish__sends_the_table_of_a_folder(url: str, store: str, table) -> None:
    said = run("publish", f"{store}/ranges/{table.id}", "--to", url)
    assert said == {"range_table": table.id, "rows": table.rows.num_rows, "url": url}
    assert served_ids(url) == [table.id]
    assert run("publish", f"{store}/ranges/{table.id}", "--to", url) == said


def test_publish__sends_a_table_of_a_store_by_its_id(url: str, store: str, table) -> None:
    other = run("ranges", store, "--tau", "1.0")["range_table"]
    with pytest.raises(UsageError, match="has 2 tables"):
        run("publish", store, "--to", url)
    assert run("publish", store, "--table", other, "--to", url)["range_table"] == other
    assert served_ids(url) == [other]


def test_publish__takes_the_key_from_a_file(url: str, store: str, table, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("NEURONLENS_WRITE_KEY")
    folder = f"{store}/ranges/{table.id}"
    with pytest.raises(UsageError, match="This key may read only"):
        run("publish", folder, "--to", url)
    (tmp_path / "keys").write_text(f"read {READ_KEY}\nwrite {WRITE_KEY}\n")
    run("publish", folder, "--to", url, "--api-key-file", str(tmp_path / "keys"))
    assert served_ids(url) == [table.id]


def test_publish__says_what_it_cannot_send(url: str, store: str, table, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a table\.json nor a store\.json"):
        run("publish", str(tmp_path), "--to", url)
    with pytest.raises(UsageError, match="--table chooses from a store"):
        run("publish", f"{store}/ranges/{table.id}", "--table", table.id, "--to", url)
    with pytest.raises(UsageError, match="has no table tbl_0"):
        run("publish", store, "--table", "tbl_0", "--to", url)


def test_ranges__publishes_what_it_made(url: str, store: str) -> None:
    made = run("ranges", store, "--tau", "3.0", "--publish", url)["range_table"]
    assert served_ids(url) == [made]


def test_ranges_job__publishes_what_it_made(url: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"model": {"id": "tiny"}, "data": {"source": "texts.jsonl"}}
    describe = Store.describe
    monkeypatch.setattr(Store, "describe", lambda self: {**describe(self), "recipe": recipe})
    made = run(store, "--set", "ranges.tau=0.5", "--publish", url, command=ranges_job)["range_table"]
    assert served_ids(url) == [made]


@pytest.mark.parametrize("kind", [UsageError, RunFailed])
def test_publish_table__says_where_the_table_is_kept(table, monkeypatch: pytest.MonkeyPatch, kind) -> None:
    def fail(*_) -> None:
        raise kind("It did not work.")

    monkeypatch.setattr("neuronlens.client.Client.publish", fail)
    with pytest.raises(kind, match=f"did not work. {table.id} is kept; send it later: neuronlens publish S --table"):
        publish_table(table, to="http://x:1", kept_in="S")
    with pytest.raises(NeuronLensError, match=r"did not work\.$"):
        publish_table(table, to="http://x:1")


def test_publish__ends_with_a_sentence_and_an_exit_code(store: str, table, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["neuronlens", "publish", f"{store}/ranges/{table.id}", "--to", "localhost:1"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("neuronlens: 'localhost:1' is not the address of a server")
