"""What was run, from the receipts alone."""

import json

import pytest

from neuronlens.page.facts import Facts
from neuronlens.store import Store
from tests.report_stores import arrays, put_quarantine, write_report_store


def facts_of(root, *concepts: str, n_samples: int = 40, **options) -> Facts:
    write_report_store(root / "store", arrays(concepts, n_samples=n_samples), with_statistics=False, **options)
    return Facts.of(Store(str(root / "store")))


def edit(root, name: str, **changes) -> None:
    path = root / "store" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def again(root) -> Facts:
    return Facts.of(Store(str(root / "store")))


def test_facts__of_a_whole_store_give_no_warning_but_for_the_layers(tmp_path):
    facts = facts_of(tmp_path, "joy", "law")
    assert facts.warnings() == ["Only 0 of 2 layers have statistics: the others are not shown."]
    assert facts.notes() == []
    assert facts.concepts == ("joy", "law")
    assert facts.n_counted() == {"joy": 40, "law": 40}


def test_facts__say_what_is_missing(tmp_path):
    write_report_store(tmp_path / "store", arrays(["a", "b", "c"], n_samples=40), n_lost=1)
    put_quarantine(tmp_path / "store", 2, "c", "killed by signal 9")
    put_quarantine(tmp_path / "store", 0, "a", "came through later")
    facts = again(tmp_path)
    partial, quarantined = facts.warnings()
    assert partial.startswith("Partial: 2 of 3 shards, 80 of 120 texts.")
    assert (
        quarantined
        == "Shard 2 was given up after 3 tries, with 1 of the texts of c. The last reason: killed by signal 9"
    )


def test_facts__say_that_the_statistics_are_older_than_the_shards(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_samples=40))
    for name in store.names("statistics"):
        edit(tmp_path, f"statistics/{name}", coverage={"n_shards": 1, "n_planned_shards": 2})
    [warning] = again(tmp_path).warnings()
    assert "made from 1 shards; 2 are committed now" in warning


def test_facts__say_that_values_were_not_finite_and_texts_few(tmp_path):
    facts_of(tmp_path, "a", "b", n_samples=29)
    edit(tmp_path, "commits/shard-00000.json", n_nonfinite=7)
    _, nonfinite, few = again(tmp_path).warnings()
    assert nonfinite.startswith("7 values were not finite")
    assert few.startswith("a, b: fewer than 30 texts")


def test_facts__count_the_kept_texts_where_only_right_answers_count(tmp_path):
    facts_of(tmp_path, "a", "b", only_correct=True)
    for number, n_kept in ((0, 31), (1, 12)):
        edit(tmp_path, f"commits/shard-{number:05d}.json", n_kept=n_kept, n_truncated=2)
    facts = again(tmp_path)
    assert facts.n_counted() == {"a": 31, "b": 12}
    assert any("b: fewer than 30" in warning for warning in facts.warnings())
    assert "Only texts that the model answered right counted: 43 of 80." in facts.notes()
    assert "4 of 80 texts were cut to the model's window." in facts.notes()


def test_facts__note_what_was_not_kept(tmp_path):
    notes = facts_of(tmp_path, "a", histograms=False, raw=False).notes()
    assert any("no histograms" in note for note in notes)
    assert any("no raw values" in note for note in notes)


def test_facts__note_pairs_that_were_dropped(tmp_path):
    write_report_store(tmp_path / "store", arrays(["a", "b", "c"], n_samples=40), keep="top")
    [note] = again(tmp_path).notes()
    assert "Of 72 overlaps (of two concepts at a neuron) the store keeps 24" in note


def test_facts__sum_seconds_and_bytes(tmp_path):
    facts = facts_of(tmp_path, "a", "b", raw=False)
    assert facts.collector_seconds()["forward"] == 1.0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "store" / "partials").iterdir()}
    assert facts.bytes_by_kind()["partials"] == sum(sizes.values())


@pytest.mark.parametrize(
    ("model", "expected"),
    [("gpt2", "gpt2"), ("org/model", "org/model"), ("/home/me/models/tiny", "models/tiny"), ("C:\\a\\b\\c", "b/c")],
)
def test_facts__name_the_model_briefly(tmp_path, model, expected):
    assert facts_of(tmp_path, "a", model={"id": model}).model_name == expected
