"""The command line as a person and a script meet it: exit codes, streams, JSON."""

import json
import subprocess
import sys

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml

import neuronlens as library
from tests.tiny_models import SENTENCES, save_tiny
from tests.warm import run_warm

ANSWERS = {"joy": "<joy>", "anger": "<anger>"}


def neuronlens(*args: str, cwd=None, binary: bool = False) -> subprocess.CompletedProcess:
    """From a cold start, as a person's. Where that imports torch, only the first test of a command makes one."""
    return subprocess.run(
        [sys.executable, "-m", "neuronlens", *args], cwd=cwd, capture_output=True, text=not binary, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model", "gpt2")
    words = " ".join(SENTENCES).split()
    rows = [{"text": " ".join(words[i : i + 6]), "label": ("joy", "anger")[i % 2]} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"id": "model"},
        "data": {"source": "texts.jsonl", "prompt": "{text}<sep>", "answers": ANSWERS},
        "test": {"source": "texts.jsonl"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    done = neuronlens("run", "recipe.yaml", "--store", "store", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_run__prints_one_json_object_last_and_the_rest_on_stderr(finished, folder):
    summary = json.loads(finished.stdout)
    assert summary["store"] == str(folder / "store")
    assert (summary["n_samples"], summary["range_table"][:4]) == (40, "tbl_")
    assert set(summary["stages"]) == {"plan", "collect", "statistics", "ranges", "evaluate"}
    assert summary["seconds"] > 0
    for word in ("collect", "range table", "neuron"):
        assert word in finished.stderr


def test_plan__runs_nothing(folder):
    done = neuronlens("plan", "recipe.yaml", "--json", cwd=folder)
    numbers = json.loads(done.stdout)
    assert (numbers["shards"], numbers["samples"], numbers["neurons"]) == (2, 40, 80)
    assert numbers["disk_bytes"]["total"] == sum(v for k, v in numbers["disk_bytes"].items() if k != "total")
    assert not (folder / "neuronlens-runs").exists()


@pytest.mark.usefixtures("finished")
class TestStore:
    def test_sql__answers_in_every_format(self, folder):
        query = "select concept, count(*) as n from moments group by concept order by concept"
        table = neuronlens("sql", "store", query, cwd=folder)
        assert "anger" in table.stdout
        csv = neuronlens("sql", "store", query, "--format", "csv", cwd=folder)
        assert csv.stdout.splitlines() == ["concept,n", "anger,80", "joy,80"]
        rows = json.loads(neuronlens("sql", "store", query, "--format", "json", cwd=folder).stdout)
        assert rows == [{"concept": "anger", "n": 80}, {"concept": "joy", "n": 80}]
        parquet = neuronlens("sql", "store", query, "--format", "parquet", cwd=folder, binary=True)
        (folder / "answer.parquet").write_bytes(parquet.stdout)
        assert pq.read_table(folder / "answer.parquet").to_pylist() == rows

    def test_sql__lists_the_ready_questions_and_runs_one_by_name(self, folder):
        listed = neuronlens("views", "store", "--list", cwd=folder)
        for name in ("gaussianity_by_layer", "neuron_card", "overlap_by_layer"):
            assert name in listed.stdout
        answered = neuronlens("sql", "store", "gaussianity_by_layer", "--format", "csv", cwd=folder)
        assert answered.returncode == 0, answered.stderr
        assert len(answered.stdout.splitlines()) > 1

    def test_sql__says_what_duckdb_says_in_a_sentence(self, folder):
        done = neuronlens("sql", "store", "select nonsense from moments", cwd=folder)
        assert done.returncode == 2
        assert "nonsense" in done.stderr
        assert "Traceback" not in done.stderr

    def test_sql__takes_a_query_from_a_pipe_and_asks_for_one_where_there_is_none(self, folder):
        command = [sys.executable, "-m", "neuronlens", "sql", "store", "--format", "csv"]
        piped = subprocess.run(
            command, cwd=folder, input="select 0.1::float as x;\n", capture_output=True, text=True, timeout=100
        )
        assert piped.stdout.splitlines() == ["x", "0.1"]
        empty = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
        )
        assert empty.returncode == 2
        assert "There is no query" in empty.stderr

    def test_sql__shows_few_wide_rows_on_their_side(self, folder):
        shown = neuronlens("sql", "store", "from neuron_card(0, 1)", cwd=folder).stdout
        assert "nearest_ovl" in shown
        assert max(map(len, shown.splitlines())) <= 80

    def test_sql__writes_infinities_into_json_as_words(self, folder):
        done = neuronlens(
            "sql", "store", "select 'inf'::double as x, ['nan'::float] as y", "--format", "json", cwd=folder
        )
        assert json.loads(done.stdout) == [{"x": "inf", "y": ["nan"]}]

    def test_views__make_the_same_views_in_plain_duckdb(self, folder):
        con = duckdb.connect()
        con.execute(neuronlens("views", "store", cwd=folder).stdout)
        assert con.execute("select count(*) from moments").fetchone() == (160,)

    def test_ranges__makes_another_table(self, folder):
        done = neuronlens("ranges", "store", "--tau", "1", "--top-fraction", "0.5", "--json", cwd=folder)
        made = json.loads(done.stdout)
        assert made["rows"] == 2 * 2 * 20
        again = run_warm("neuronlens", "ranges", "store", "--tau", "1", "--top-fraction", "0.5", "--json", cwd=folder)
        assert json.loads(again.stdout) == made

    def test_evaluate__asks_which_table_where_there_are_several(self, folder):
        made = json.loads(run_warm("neuronlens", "ranges", "store", "--tau", "3", "--json", cwd=folder).stdout)
        asked = run_warm("neuronlens", "evaluate", "store", "--json", cwd=folder)
        assert asked.returncode == 2
        assert made["range_table"] in asked.stderr
        done = neuronlens("evaluate", "store", "--table", made["range_table"], "--json", cwd=folder)
        rows = json.loads(done.stdout)["rows"]
        assert [row["condition"] for row in rows] == ["base", "neuron", "range"] * 3  # two concepts and their mean
        wanted = {"target_accuracy", "target_confidence", "complement_accuracy", "complement_confidence", "perplexity"}
        assert wanted | {"concept", "n_target", "n_complement", "tested", "changed"} <= set(rows[0])

    def test_verify__exits_with_1_where_a_byte_was_changed(self, folder, tmp_path):
        assert json.loads(neuronlens("verify", "store", "--json", cwd=folder).stdout) == {"ok": True, "faults": []}
        subprocess.run(["cp", "-r", str(folder / "store"), str(tmp_path / "copy")], check=True)
        victim = next((tmp_path / "copy" / "partials").iterdir())
        damaged = bytearray(victim.read_bytes())
        damaged[50] ^= 1
        victim.write_bytes(damaged)
        done = neuronlens("verify", str(tmp_path / "copy"), "--json")
        assert done.returncode == 1
        assert victim.name in json.loads(done.stdout.splitlines()[-1])["faults"][0]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("run", "absent.yaml"), "There is no recipe at absent.yaml"),
        (("run", "recipe.yaml", "--set", "ranges.tua=1"), "Did you mean tau?"),
        (("run", "recipe.yaml", "--set", "collect.layers=[9]"), "9"),
        (("plan", "recipe.yaml", "--set", "data.concept=emotion"), "does not have. It has: text, label"),
        (("verify", "nowhere"), "There is no store"),
        (("ranges", "nowhere", "--tau", "1"), "There is no store"),
    ],
)
def test_cli__gives_a_mistake_one_sentence_and_exit_code_2(folder, args, expected):
    done = run_warm("neuronlens", *args, cwd=folder)
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_ranges__refuses_a_tau_that_cannot_be(finished, folder):
    done = run_warm("neuronlens", "ranges", "store", "--tau", "-1", cwd=folder)
    assert done.returncode == 2
    assert "tau is -1" in done.stderr


@pytest.mark.parametrize("command", ["demo", "run", "plan", "sql", "ranges", "evaluate", "generate", "verify"])
def test_cli__every_command_has_help_with_an_example(command):
    done = neuronlens(command, "--help")
    assert done.returncode == 0
    assert f"neuronlens {command}" in done.stdout


def test_status__says_what_is_done(finished, folder):
    done = neuronlens("status", "store", "--json", cwd=folder)
    status = json.loads(done.stdout)
    assert status["state"] == "idle"
    assert status["shards"] == {"waiting": 0, "running": 0, "committed": 2, "retrying": 0, "quarantined": 0}
    assert status["n_tokens_committed"] == status["n_tokens"] == json.loads(finished.stdout)["n_tokens"]
    assert json.loads(finished.stdout)["range_table"] in status["range_tables"]
    assert "2: 2 committed" in done.stderr


def test_clean__removes_what_no_receipt_names(finished, folder):
    orphan = folder / "store" / "partials" / "shard-00000.0123456789ab.parquet"
    orphan.write_bytes(b"half a fi")
    dry = neuronlens("clean", "store", "--dry-run", "--json", cwd=folder)
    assert json.loads(dry.stdout) == {"files": [f"partials/{orphan.name}"], "bytes": 9, "removed": False}
    assert orphan.exists()
    done = neuronlens("clean", "store", "--json", cwd=folder)
    assert json.loads(done.stdout)["removed"]
    assert not orphan.exists()
    assert neuronlens("verify", "store", cwd=folder).returncode == 0


@pytest.mark.parametrize("job", ["collect", "statistics", "ranges", "evaluate"])
def test_job__says_how_it_is_used(job):
    done = run_warm(f"jobs.{job}", "--help")
    assert done.returncode == 0
    assert f"Example: python -m jobs.{job}" in done.stdout


def test_job__ends_a_mistake_in_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.statistics", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "There is no store at" in done.stderr
    assert "Traceback" not in done.stderr


def test_steer__says_what_the_bare_model_says_with_and_without_the_ranges(finished, folder):
    """The expected text is transformers' own generate on the bare model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table_id = json.loads(finished.stdout)["range_table"]
    done = neuronlens(
        *("steer", "store", "i hate the way", "--concept", "joy", "--action", "set", "--value", "2.5", "--tau", "inf"),
        *("--max-tokens", "9", "--json", "--table", table_id),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("i hate the way", return_tensors="pt")["input_ids"]

    def said() -> str:
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
        return tokenizer.decode([i for i in out[ids.shape[1] :].tolist() if i > 2])

    assert found["baseline"] == said()
    table = library.RangeTable.load(folder / "store" / "ranges" / table_id)
    rule = {"concept": "joy", "action": "set", "value": 2.5, "tau": float("inf")}
    with library.intervene(model, table, [rule]) as applied:
        assert found["steered"] == said() != found["baseline"]
    assert found["intervention"]["changed"] == found["intervention"]["tested"] == applied.changed
    assert found["intervention"]["table"] == table_id


def test_steer__refuses_what_cannot_be_steered(finished, folder):
    table_id = json.loads(finished.stdout)["range_table"]
    for args, words in (
        (["--concept", "envy"], ["anger, joy"]),
        (["--concept", "joy", "--phase", "later"], ["prompt or generation"]),
        (["--concept", "joy", "--max-tokens", "500"], ["64", "at most"]),
        (["--concept", "joy", "--neuron", "3"], ["layer"]),
    ):
        done = run_warm("neuronlens", "steer", "store", "i hate", *args, "--table", table_id, cwd=folder)
        assert done.returncode == 2, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
