"""The catalog: which tables there are, from folders that other processes write too."""

import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from neuronlens.errors import UsageError
from neuronlens.ranges import RangeTable, TableModel
from neuronlens.retry import StorageFailed
from neuronlens.serving import catalog as catalog_module
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.errors import ApiError
from neuronlens.store import Store
from tests.range_tables import row, table_of

OLD, NEW = table_of([row("joy", 0, 1.0, 1.0)]), table_of([row("joy", 1, 1.0, 1.0)])
OTHER_MODEL = table_of([row("joy", 2, 1.0, 1.0)], model=TableModel(id="other", config_hash="d" * 16))
ABSENT = "tbl_" + "0" * 16


def saved(table: RangeTable, root: Path, *, created: float | None = None) -> Path:
    folder = Path(table.save(root))
    if created is not None:
        os.utime(folder / "table.json", (created, created))
    return folder


def as_store(root: Path, config_hash: str = "c" * 16) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "store.json").write_text(json.dumps({"format_version": 1, "model": {"config_hash": config_hash}}))
    return root


def ids(catalog: Catalog) -> list[str]:
    return [entry.id for entry in catalog.entries()]


def status_of(call) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value.status, caught.value.code


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two tables."""
    saved(OLD, tmp_path / "store", created=1_000)
    saved(NEW, tmp_path / "store", created=2_000)
    return as_store(tmp_path / "store")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_entries__are_the_tables_of_stores_and_folders_newest_first(store: Path, tmp_path: Path) -> None:
    folder = saved(OTHER_MODEL, tmp_path / "elsewhere", created=1_500).rename(tmp_path / "any name")
    catalog = Catalog([str(store), str(folder)])
    assert ids(catalog) == [NEW.id, OTHER_MODEL.id, OLD.id]
    newest = catalog.entries()[0]
    assert newest.created == datetime.fromtimestamp(2_000, UTC)
    assert newest.header == NEW.header
    assert [found.root for found in catalog.stores] == [str(store)]


def test_entries__of_one_moment_are_sorted_by_id(store: Path) -> None:
    for table in (OLD, NEW):
        os.utime(store / "ranges" / table.id / "table.json", (5, 5))
    assert ids(Catalog([str(store)])) == sorted([OLD.id, NEW.id])


def test_get__gives_the_rows_by_id_and_the_newest_by_latest(store: Path) -> None:
    catalog = Catalog([str(store)])
    assert catalog.get(OLD.id).rows.equals(OLD.rows)
    assert catalog.get("latest").id == NEW.id


def test_get__reads_from_any_fsspec_url() -> None:
    NEW.save("memory://catalog-test")
    catalog = Catalog([f"memory://catalog-test/ranges/{NEW.id}"])
    assert catalog.get("latest").rows.equals(NEW.rows)


def test_get__lists_no_folder_again_for_what_it_holds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([str(store)])
    first = catalog.get("latest")
    monkeypatch.setattr(Store, "names", lambda *_: pytest.fail("listed"))
    monkeypatch.setattr(RangeTable, "load", lambda *_: pytest.fail("read"))
    assert all(catalog.get(name) is first for name in ("latest", NEW.id))


def test_get__reads_a_table_once_for_many_threads(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, read, load = Catalog([str(store)]), [], RangeTable.load

    def slow(*args) -> RangeTable:
        read.append(args)
        time.sleep(0.05)
        return load(*args)

    monkeypatch.setattr(RangeTable, "load", slow)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: catalog.get(NEW.id), range(8)))
    assert len(read) == 1
    assert {id(table) for table in found} == {id(found[0])}


def test_get__sees_at_once_what_another_replica_uploaded(tmp_path: Path) -> None:
    here, there = (Catalog([], uploads=str(tmp_path)) for _ in range(2))
    there.add(NEW)
    assert here.get(NEW.id).id == NEW.id


def test_entries__see_within_a_second_what_came(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([str(store)])
    saved(OTHER_MODEL, store)
    assert OTHER_MODEL.id not in ids(catalog)
    now = time.monotonic()
    monkeypatch.setattr(catalog_module.time, "monotonic", lambda: now + 1.1)
    assert catalog.get("latest").id == OTHER_MODEL.id


def test_entries__are_without_what_was_removed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([str(store)])
    catalog.get(NEW.id)
    for file in (store / "ranges" / NEW.id).iterdir():
        file.unlink()
    (store / "ranges" / NEW.id).rmdir()
    now = time.monotonic()
    monkeypatch.setattr(catalog_module.time, "monotonic", lambda: now + 1.1)
    assert ids(catalog) == [OLD.id]
    assert status_of(lambda: catalog.get(NEW.id)) == (404, "table_not_found")


@pytest.mark.parametrize("table_id", [ABSENT, "", "../secrets", "tbl_0", "LATEST", "tbl_" + "0" * 500])
def test_get__names_the_tables_where_there_is_none_of_the_id(store: Path, table_id: str) -> None:
    with pytest.raises(ApiError, match=f"newest first: {NEW.id}, {OLD.id}") as caught:
        Catalog([str(store)]).get(table_id)
    assert (caught.value.status, caught.value.code) == (404, "table_not_found")
    assert len(str(caught.value)) < 300


def test_get__looks_no_folder_up_for_what_can_be_no_id(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([str(store)])
    monkeypatch.setattr(Store, "names", lambda *_: pytest.fail("listed"))
    assert status_of(lambda: catalog.get("tbl_../../etc")) == (404, "table_not_found")


def test_get__says_how_to_upload_where_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"no range table yet\. Upload one"):
        Catalog([], uploads=str(tmp_path)).get("latest")


def cut(folder: Path, name: str, n_bytes: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


DAMAGE = {
    "half parquet": lambda folder: cut(folder, "ranges.parquet", -20),
    "empty parquet": lambda folder: cut(folder, "ranges.parquet", 0),
    "no parquet": lambda folder: (folder / "ranges.parquet").unlink(),
    "half json": lambda folder: cut(folder, "table.json", 30),
    "empty json": lambda folder: cut(folder, "table.json", 0),
    "another table's parquet": lambda folder: (folder / "ranges.parquet").write_bytes(
        table_of([row("joy", n, 1.0, 1.0, rank=n + 1) for n in range(2)]).rows_parquet()
    ),
    "another table's json": lambda folder: (folder / "table.json").write_bytes(OLD.header_json()),
    "a later format": lambda folder: (folder / "table.json").write_text(
        json.dumps({**NEW.header.model_dump(), "format_version": 3})
    ),
    "not utf-8": lambda folder: (folder / "table.json").write_bytes(b"\xff\xfe{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_entries__leave_out_a_damaged_table_with_one_warning(store: Path, damage, warnings) -> None:
    damage(store / "ranges" / NEW.id)
    catalog = Catalog([str(store)])
    assert ids(catalog) == [OLD.id]
    assert catalog.get("latest").id == OLD.id
    for _ in range(2):
        with pytest.raises(ApiError, match="is damaged on the server") as caught:
            catalog.get(NEW.id)
        assert caught.value.status == 409
        assert str(store) not in caught.value.message
    assert [NEW.id in text for text in warnings()] == [True]


def changed_inside(folder: Path) -> None:
    rows = table_of([row("joy", 1, 1.0, 2.0)]).rows_parquet()
    (folder / "ranges.parquet").write_bytes(rows)


def test_get__leaves_out_what_turns_out_damaged_when_it_is_read(store: Path, warnings) -> None:
    changed_inside(store / "ranges" / NEW.id)
    catalog = Catalog([str(store)])
    assert ids(catalog) == [NEW.id, OLD.id]
    assert catalog.get("latest").id == OLD.id
    assert ids(catalog) == [OLD.id]
    assert status_of(lambda: catalog.get(NEW.id)) == (409, "table_damaged")
    assert len(warnings()) == 1


def test_add__mends_a_damaged_table(store: Path) -> None:
    changed_inside(store / "ranges" / NEW.id)
    catalog = Catalog([str(store)])
    assert catalog.get("latest").id == OLD.id
    assert catalog.add(NEW)[1] is True
    assert catalog.get("latest").id == NEW.id
    assert Catalog([str(store)]).get(NEW.id).rows.equals(NEW.rows)


def test_entries__do_not_show_a_table_that_is_half_written(store: Path, warnings) -> None:
    (store / "ranges" / NEW.id / "table.json").rename(store / "ranges" / NEW.id / "table.json.0123.tmp")
    (store / "ranges" / "a note.txt").write_text("not a table")
    catalog = Catalog([str(store)])
    assert ids(catalog) == [OLD.id]
    assert status_of(lambda: catalog.get(NEW.id)) == (404, "table_not_found")
    assert warnings() == []


def test_cache__forgets_what_was_asked_for_longest_ago(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third = saved(OTHER_MODEL, store) and OTHER_MODEL
    catalog = Catalog([str(store)], cache_bytes=2 * NEW.rows.nbytes)
    read, load = [], RangeTable.load
    monkeypatch.setattr(RangeTable, "load", lambda path, fs: read.append(Path(path).name) or load(path, fs))
    for table in (OLD, NEW, OLD, third, OLD, NEW):
        catalog.get(table.id)
    assert read == [OLD.id, NEW.id, third.id, NEW.id]


def test_cache__keeps_the_last_table_however_large(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([str(store)], cache_bytes=1)
    catalog.get(NEW.id)
    monkeypatch.setattr(RangeTable, "load", lambda *_: pytest.fail("read"))
    assert catalog.get(NEW.id).id == NEW.id


def test_add__saves_once_and_is_seen_at_once(tmp_path: Path) -> None:
    catalog = Catalog([], uploads=str(tmp_path / "new" / "uploads"))
    entry, created = catalog.add(NEW)
    assert (entry.id, created) == (NEW.id, True)
    assert catalog.add(NEW) == (entry, False)
    assert ids(catalog) == [NEW.id]
    assert sorted(path.name for path in (tmp_path / "new" / "uploads" / "ranges" / NEW.id).iterdir()) == [
        "ranges.parquet",
        "table.json",
    ]


def test_add__by_many_threads_makes_one(tmp_path: Path) -> None:
    catalog = Catalog([], uploads=str(tmp_path))
    gate = threading.Barrier(8)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: (gate.wait(), catalog.add(NEW)[1])[1], range(8)))
    assert sorted(made) == [False] * 7 + [True]


def test_add__goes_into_the_first_store_without_a_folder_for_uploads(store: Path, tmp_path: Path) -> None:
    folder = saved(OLD, tmp_path / "single")
    other = as_store(tmp_path / "other")
    Catalog([str(folder), str(other), str(store)]).add(OTHER_MODEL)
    assert (other / "ranges" / OTHER_MODEL.id / "table.json").exists()


def test_add__is_refused_where_there_is_no_place(tmp_path: Path) -> None:
    catalog = Catalog([str(saved(OLD, tmp_path))])
    with pytest.raises(ApiError, match="Start it with --uploads DIR") as caught:
        catalog.add(NEW)
    assert (caught.value.status, caught.value.code) == (403, "uploads_disabled")


def test_add__is_refused_where_the_server_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([], uploads=str(tmp_path))

    def refuse(*_) -> None:
        raise PermissionError(13, "Permission denied", "/secret/path")

    monkeypatch.setattr(RangeTable, "save", refuse)
    with pytest.raises(ApiError, match="may not write where its uploads go") as caught:
        catalog.add(NEW)
    assert caught.value.status == 403
    assert "/secret/path" not in caught.value.message


def failing(*_) -> None:
    raise StorageFailed("could not read s3://secret: the storage failed")


def test_get__is_503_where_the_storage_fails(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog([str(store)])
    monkeypatch.setattr(RangeTable, "load", failing)
    with pytest.raises(ApiError, match="storage failed") as caught:
        catalog.get(NEW.id)
    assert (caught.value.status, caught.value.retry_after_seconds) == (503, 5)
    assert "secret" not in caught.value.message
    monkeypatch.undo()
    assert catalog.get(NEW.id).id == NEW.id


def test_add__goes_on_while_a_source_cannot_be_listed(store: Path, tmp_path: Path, monkeypatch) -> None:
    catalog = Catalog([str(store)], uploads=str(tmp_path / "uploads"))
    names = Store.names
    monkeypatch.setattr(Store, "names", lambda self, path: failing() if "store" in self.root else names(self, path))
    assert catalog.add(OTHER_MODEL)[1] is True
    assert set(ids(catalog)) == {OLD.id, NEW.id, OTHER_MODEL.id}


def test_config_hashes__are_those_of_the_sources_not_of_uploads(store: Path, tmp_path: Path) -> None:
    assert Catalog([str(store)]).config_hashes() == {"c" * 16}
    folder = saved(OTHER_MODEL, tmp_path / "single")
    assert Catalog([str(store), str(folder)]).config_hashes() == {"c" * 16, "d" * 16}
    registry = Catalog([], uploads=str(tmp_path / "uploads"))
    registry.add(NEW)
    assert registry.config_hashes() == frozenset()


def test_catalog__refuses_a_source_that_is_none(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=f"{source} has neither a store.json nor a table.json"):
            Catalog([str(source)])
    with pytest.raises(UsageError, match="nosuchprotocol://x cannot be opened"):
        Catalog(["nosuchprotocol://x"])
    with pytest.raises(UsageError, match="nothing to serve"):
        Catalog([])


def test_catalog__refuses_a_damaged_table_that_was_named(tmp_path: Path) -> None:
    folder = saved(NEW, tmp_path)
    cut(folder, "ranges.parquet", 10)
    with pytest.raises(UsageError, match=r"cannot be served: its ranges\.parquet cannot be read"):
        Catalog([str(folder)])


def test_catalog__refuses_a_folder_for_uploads_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--uploads .*file cannot be used"):
        Catalog([], uploads=str(tmp_path / "file"))
