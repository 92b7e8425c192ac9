"""Reading labelled texts, and the sentence for each way in which they can be wrong."""

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from neuronlens.errors import UsageError
from neuronlens.sources import load_labelled, load_texts

ROWS = [{"text": "so glad", "label": "joy"}, {"text": "so mad", "label": "anger"}, {"text": "yes!", "label": "joy"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def load(source, **kwargs):
    return load_labelled(source, **{"split": "train", "text": "text", "concept": "label", **kwargs})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_load_labelled__reads_every_format_the_same(tmp_path, suffix):
    rows = load(write(tmp_path / f"d{suffix}", ROWS))
    assert [(row.row, row.text, row.concept) for row in rows] == [
        (0, "so glad", "joy"),
        (1, "so mad", "anger"),
        (2, "yes!", "joy"),
    ]


def test_load_labelled__takes_the_split_of_a_folder_by_file_name(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:1])
    assert len(load(str(folder))) == 3
    assert len(load(str(folder), split="test")) == 1
    with pytest.raises(UsageError, match="split 'dev'"):
        load(str(folder), split="dev")


def test_load_labelled__keeps_the_first_rows_of_each_concept(tmp_path):
    rows = load(write(tmp_path / "d.jsonl", ROWS), max_per_concept=1)
    assert [row.row for row in rows] == [0, 1]


def test_load_labelled__names_numbered_labels_by_their_number(tmp_path):
    rows = load(write(tmp_path / "d.jsonl", [{"text": "a", "label": 3}, {"text": "b", "label": 0}]))
    assert [row.concept for row in rows] == ["3", "0"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], r"label is null in 1 of 2 rows \(row 1"),
        ([{"text": "  ", "label": "x"}, {"text": "b", "label": "x"}], r"text is empty .* in 1 of 2 rows \(row 0"),
        ([{"text": "a", "label": 0.5}], "label holds 0.5, a float"),
        ([{"text": "a", "emotion": "x"}], "data.concept names the column 'label'.* It has: text, emotion"),
        ([{"tweet": "a", "label": "x"}], "data.text names the column 'text'"),
    ],
)
def test_load_labelled__says_what_is_wrong_with_the_rows(tmp_path, rows, expected):
    with pytest.raises(UsageError, match=expected):
        load(write(tmp_path / "d.jsonl", rows))


def test_load_labelled__says_what_is_wrong_with_the_place(tmp_path):
    with pytest.raises(UsageError, match="There is no file or folder"):
        load(str(tmp_path / "absent.jsonl"))
    (tmp_path / "d.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"ends in '.txt'; expected"):
        load(str(tmp_path / "d.txt"))
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(UsageError, match="cannot be read"):
        load(str(tmp_path / "broken.jsonl"))


def test_load_texts__takes_the_first_that_say_something(tmp_path):
    path = tmp_path / "plain.jsonl"
    rows = [{"text": text, "body": f"body of {text}"} for text in ("", "one", "  ", "two", "three")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_texts(str(path), split="train", text="text", at_most=2) == ["one", "two"]
    assert load_texts(str(path), split="train", text="body", at_most=1) == ["body of "]
    assert load_texts(str(path), split="train", text="tweet", at_most=9) == ["one", "two", "three"]


def test_load_texts__says_what_is_missing(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"body": "one"}) + "\n")
    with pytest.raises(UsageError, match=r"has no column 'tweet' and none called 'text'. It has: body"):
        load_texts(str(path), split="train", text="tweet", at_most=2)
    path.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(UsageError, match=r"has no text in its column 'text'"):
        load_texts(str(path), split="train", text="text", at_most=2)
