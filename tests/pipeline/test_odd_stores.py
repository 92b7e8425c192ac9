"""Every command on stores that are not like the demo's: odd names, one concept, 200 concepts."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.tiny_models import SENTENCES, save_tiny
from tests.warm import run_warm

pytestmark = pytest.mark.slow
ODD = ("it's joy", 'fear "x"', "läs/anger 怒り", "a; drop view moments --", "<b>$x^2$ & {text}</b>", "../..", " ")


def run_cold(module: str, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    """`run_warm`, as a person's command starts."""
    return subprocess.run([sys.executable, "-m", module, *args], cwd=cwd, capture_output=True, text=True, timeout=300)


def _said(run: Callable[..., subprocess.CompletedProcess], *args: str, cwd: Path) -> str:
    """What a command prints on stdout; fails where it does."""
    done = run("neuronlens", *args, cwd=cwd)
    assert done.returncode == 0, f"{args}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def _folder(root: Path, concepts: list[str], n_texts: int) -> Path:
    save_tiny(root / "model", "gpt2")
    words = " ".join(SENTENCES).split()
    rows = [
        {"it's a text": " ".join(words[i % 50 : i % 50 + 6]), 'label "x"': concept}
        for i in range(n_texts)
        for concept in concepts
    ]
    (root / "texts, it's.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "texts, it's.jsonl"
    recipe = {
        "model": {"id": "model"},
        "data": {"source": source, "text": "it's a text", "concept": 'label "x"', "prompt": "{text}<sep>"},
        "test": {"source": source, "max_per_concept": 2},
        "ranges": {"salience": "mutual_information" if len(concepts) > 1 else "mean_abs"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def _ask_everything(
    folder: Path, concepts: list[str], run: Callable[..., subprocess.CompletedProcess] = run_warm
) -> None:
    """Every command, on the store itself and on a cut of it."""
    neuronlens = partial(_said, run)
    summary = json.loads(neuronlens("run", "recipe.yaml", "--store", "it's a store", "--json", cwd=folder))
    assert {row["concept"] for row in summary["rows"]} == {*concepts, None}
    neuronlens("recut", "it's a store", "-o", "cut", "--where", f'"row" // {len(concepts)} % 2 = 0', cwd=folder)
    for store in ("it's a store", "cut"):
        neuronlens("verify", store, cwd=folder)
        rows = json.loads(neuronlens("sql", store, "from neuron_card(1, 3)", "--format", "json", cwd=folder))
        assert [row["concept"] for row in rows] == sorted(concepts)
        named = json.dumps(concepts[0])
        query = "select of_concept from capture(1, 3, $c) limit 1"
        [row] = json.loads(neuronlens("sql", store, query, "--param", f"c={named}", "--format", "json", cwd=folder))
        assert row["of_concept"] == concepts[0]
        neuronlens("views", store, cwd=folder)
        neuronlens("show", store, "1", "3", cwd=folder)
        neuronlens("show", store, "1", "3", "-o", "neuron.svg", cwd=folder)
        neuronlens("report", store, "-o", "report.html", cwd=folder)
        page = (folder / "report.html").read_text()
        assert "<b>$x^2$" not in page
    neuronlens("ranges", "it's a store", "--tau", "1.5", cwd=folder)
    neuronlens("diff", "it's a store", "cut", cwd=folder)


def test_commands__take_any_name(tmp_path):
    _ask_everything(_folder(tmp_path, list(ODD), n_texts=12), list(ODD), run_cold)


def test_commands__take_one_concept(tmp_path):
    _ask_everything(_folder(tmp_path, ["only"], n_texts=24), ["only"])


def test_commands__take_200_concepts(tmp_path):
    concepts = [f"concept {number:03d}" for number in range(200)]
    folder = _folder(tmp_path, concepts, n_texts=4)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["test"]["max_per_concept"] = 1
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _ask_everything(folder, concepts)
