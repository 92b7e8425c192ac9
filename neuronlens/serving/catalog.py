"""The range tables that a server offers: those of the stores and folders that it was started with, and uploads.

    catalog = Catalog(["s3://bucket/run", "tables/tbl_0123456789abcdef"], uploads="uploads")
    catalog.get("latest").select("joy")

Tables are immutable and named by their content, so one that was read and checked stays in memory. What there is, is
looked up in the folders themselves: replicas that share them see each other's uploads.
"""

import posixpath
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.errors import NeuronLensError, RunFailed, UsageError
from neuronlens.ranges import RangeTable, TableHeader, parse_header
from neuronlens.recent import Recent
from neuronlens.retry import StorageFailed, StoreUnusable, retried
from neuronlens.serving.errors import ApiError
from neuronlens.serving.logs import log
from neuronlens.serving.selection import TableIndex
from neuronlens.store import Store

LATEST = "latest"
CACHE_BYTES = 2 << 30
RESCAN_SECONDS = 1.0
"""How old the listing may be for whoever asks what there is, or for the newest."""
_RESCAN_KNOWN_SECONDS = 10.0
"""And for whoever names a table that is in it: what could have changed is that it was removed."""
_TABLE_ID = re.compile(r"tbl_[0-9a-f]{16}")
_N_NAMED = 20
"""How many tables an error names."""
_RETRY_AFTER_SECONDS = 5
_FOOTER_BYTES = 65_536
"""Enough for the footer of most tables."""
_PASSING = (StorageFailed, StoreUnusable)
"""The storage is at fault, not the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """A table that can be had. `created` is when its table.json was written (UTC); `source` the folder that it lies in,
    which is no client's business."""

    id: str
    header: TableHeader
    created: datetime
    source: str


class Catalog:
    """Which tables there are, and their rows. Any thread may ask.

    `sources` are stores (a local path or an fsspec URL) and folders of one table. Uploads go into the folder
    `uploads`, or without one into the first store. Raises UsageError for a source that is neither.
    """

    def __init__(self, sources: Sequence[str], *, uploads: str | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        if not sources and uploads is None:
            raise UsageError("There is nothing to serve: name a store, the folder of a range table, or --uploads DIR.")
        opened = [_opened(source) for source in sources]
        self._stores = tuple(store for store in opened if store.exists("store.json"))
        self._config_hashes = frozenset(store.describe()["model"]["config_hash"] for store in self._stores)
        self._shelves = [_Shelf(store, one_table=store not in self._stores) for store in opened]
        self._uploads = self._stores[0] if self._stores else None
        if uploads is not None:
            self._uploads = _upload_folder(uploads)
            self._shelves.append(_Shelf(self._uploads, one_table=False))
        self._n_sources = len(opened)
        self._cache: Recent[str, TableIndex] = Recent(cache_bytes, lambda index: index.table.rows.nbytes)
        self._scan_lock, self._add_lock = threading.Lock(), threading.Lock()
        self._load_locks: dict[str, threading.Lock] = {}
        """Of a table, held by the one thread that reads it."""
        self._listing = _Listing((), {}, {})
        self._scan_started = time.monotonic()
        for shelf in self._shelves:
            shelf.scan()
        self._list()
        for shelf in self._shelves:
            for fault in shelf.faults() if shelf.one_table else ():
                raise UsageError(f"The range table at {shelf.store.root} cannot be served: {fault}.")

    @property
    def stores(self) -> tuple[Store, ...]:
        """The stores among the sources, in their order."""
        return self._stores

    def config_hashes(self) -> frozenset[str]:
        """Of the models of the stores and tables that the server was started with, so those for which it takes
        uploads. Empty, and any model will do, where it was started with a folder for uploads alone."""
        tables = (entry for shelf in self._shelves[: self._n_sources] for entry in shelf.entries())
        return self._config_hashes | {entry.header.model.config_hash for entry in tables}

    def entries(self) -> tuple[TableEntry, ...]:
        """Newest first, those of one moment by their ids. Without damaged tables, which the log names."""
        self._rescan(RESCAN_SECONDS, wait=False)
        return self._listing.entries

    def entry(self, table_id: str) -> TableEntry:
        """The table of this id, or the newest by the name `latest`.

        Raises ApiError 404, naming the tables that there are, or 409 where it is there but damaged.
        """
        is_known = table_id in self._listing.by_id
        self._rescan(_RESCAN_KNOWN_SECONDS if is_known else RESCAN_SECONDS, wait=False)
        found = self._listing.find(table_id)
        if found is None and (table_id == LATEST or _TABLE_ID.fullmatch(table_id)):
            # It may have come a moment ago, to another replica.
            self._rescan(0.0, wait=True)
            found = self._listing.find(table_id)
        if found is None:
            raise self._absent(table_id)
        return found

    def get(self, table_id: str) -> RangeTable:
        """The rows of a table, checked against its id; raises ApiError as `entry` does."""
        return self.index(table_id).table

    def index(self, table_id: str) -> TableIndex:
        """As `get`, with the runs of its rows."""
        while True:
            entry = self.entry(table_id)
            index = self._cache.get(entry.id)
            if index is not None:
                return index
            with self._load_locks.setdefault(entry.id, threading.Lock()):
                index = self._cache.get(entry.id) or self._load(entry)
            if index is not None:
                return index
            # It was damaged, and is no longer in the listing: `entry` says so, or has the next newest.

    def upload_store(self) -> Store:
        """Where uploads go. Raises ApiError 403 where there is no such place."""
        if self._uploads is None:
            raise ApiError(
                403,
                "This server has no place for uploads: it serves folders of single tables. Start it with --uploads "
                "DIR.",
                code="uploads_disabled",
            )
        return self._uploads

    def add(self, table: RangeTable) -> tuple[TableEntry, bool]:
        """Save a table, whole or not at all; False where it was there already.

        Raises ApiError 403 where the server has no place for uploads, or may not write there; 503 where the storage
        fails.
        """
        target = self.upload_store()
        with self._add_lock:
            try:
                return self.entry(table.id), False
            except ApiError:
                self._save(table, target)
            index = TableIndex.of(table)
            self._rescan(0.0, wait=True)
            self._cache.put(table.id, index)
            return self.entry(table.id), True

    def _save(self, table: RangeTable, target: Store) -> None:
        try:
            retried(f"write the table {table.id} into {target.root}", lambda: table.save(target.root, target.fs))
        except StoreUnusable as error:
            log.error("upload not saved", reason=str(error))
            raise ApiError(
                403,
                "The server may not write where its uploads go, or has no room there. Start it with --uploads DIR, a "
                "folder that it may write.",
                code="uploads_disabled",
            ) from error
        except StorageFailed as error:
            raise _storage_failed(error, "the table was not saved. Send it again.") from error

    def _load(self, entry: TableEntry) -> TableIndex | None:
        """The rows of a table, now in memory; None where they turn out to be damaged, and the listing goes without."""
        shelf = self._listing.shelf_of.get(entry.id)
        if shelf is None:  # removed since
            return None
        try:
            index = TableIndex.of(RangeTable.load(entry.source, shelf.store.fs))
        except _PASSING as error:
            raise _storage_failed(error, f"{entry.id} cannot be read now. Ask again.") from error
        except (UsageError, RunFailed) as error:
            with self._scan_lock:
                shelf.set_aside(entry.source, str(error))
                self._list()
            return None
        self._cache.put(entry.id, index)
        return index

    def _absent(self, table_id: str) -> ApiError:
        if any(table_id == posixpath.basename(folder) for shelf in self._shelves for folder in shelf.damaged()):
            return ApiError(
                409,
                f"Range table {table_id} is damaged on the server, whose log says how. Upload it again, or ask for "
                "another one.",
                code="table_damaged",
            )
        there = [entry.id for entry in self._listing.entries]
        if not there:
            return ApiError(404, "There is no range table yet. Upload one: POST /v1/tables.", code="table_not_found")
        more = f" and {len(there) - _N_NAMED} more" if len(there) > _N_NAMED else ""
        return ApiError(
            404,
            f"There is no range table {table_id[:80]!r}. Tables, newest first: {', '.join(there[:_N_NAMED])}{more}.",
            code="table_not_found",
        )

    def _rescan(self, max_age: float, *, wait: bool) -> None:
        """Look into the folders, unless somebody began to less than `max_age` seconds ago. Without `wait`, whoever
        finds another thread at it goes on with what was known."""
        asked = time.monotonic()
        if self._scan_started >= asked - max_age or not self._scan_lock.acquire(blocking=wait):
            return
        try:
            if self._scan_started < asked - max_age:
                self._scan()
        finally:
            self._scan_lock.release()

    def _scan(self) -> None:
        self._scan_started = time.monotonic()
        for shelf in self._shelves:
            try:
                shelf.scan()
            except _PASSING as error:
                log.warning("tables not listed again", source=shelf.store.root, reason=str(error))
        self._list()

    def _list(self) -> None:
        found: dict[str, TableEntry] = {}
        shelf_of: dict[str, _Shelf] = {}
        for shelf in self._shelves:
            for entry in shelf.entries():
                found.setdefault(entry.id, entry)
                shelf_of.setdefault(entry.id, shelf)
        newest_first = sorted(found.values(), key=lambda entry: (-entry.created.timestamp(), entry.id))
        self._listing = _Listing(tuple(newest_first), found, shelf_of)
        self._cache.drop(lambda table_id: table_id not in found)


@dataclass(frozen=True, slots=True)
class _Listing:
    """What was found, in one piece: a reader sees all of one scan."""

    entries: tuple[TableEntry, ...]
    by_id: dict[str, TableEntry]
    shelf_of: dict[str, "_Shelf"]

    def find(self, table_id: str) -> TableEntry | None:
        return self.by_id.get(table_id) if table_id != LATEST else next(iter(self.entries), None)


class _Shelf:
    """The tables of one source. A table is read when it is seen first; a damaged one again when its files change."""

    def __init__(self, store: Store, *, one_table: bool) -> None:
        self.store, self.one_table = store, one_table
        self._good: dict[str, TableEntry] = {}
        self._bad: dict[str, tuple[Any, str]] = {}

    def entries(self) -> list[TableEntry]:
        return list(self._good.values())  # a copy: another thread may be scanning

    def damaged(self) -> list[str]:
        """The folders of damaged tables."""
        return list(self._bad)

    def faults(self) -> list[str]:
        return [fault for _, fault in self._bad.values()]

    def set_aside(self, folder: str, fault: str) -> None:
        """Leave a table out until its files change."""
        self._bad[folder] = (self._state(folder), fault)
        self._good.pop(folder, None)
        log.warning("a damaged range table is left out", folder=folder, reason=fault)

    def scan(self) -> None:
        there = set(self._folders())
        for folder in there - self._good.keys():
            try:
                if folder in self._bad and self._bad[folder][0] == self._state(folder):
                    continue
                self._good[folder] = self._read(folder)
                self._bad.pop(folder, None)
            except (FileNotFoundError, NotADirectoryError):
                continue  # table.json is written last: this one is not finished, or was just removed.
            except _PASSING:
                raise
            except (ValueError, NeuronLensError) as error:
                self.set_aside(folder, str(error))
        self._good = {folder: entry for folder, entry in self._good.items() if folder in there}
        self._bad = {folder: bad for folder, bad in self._bad.items() if folder in there}

    def _folders(self) -> Iterator[str]:
        if self.one_table:
            yield self.store.root
        else:
            for name in self.store.names("ranges"):
                yield self.store.path(f"ranges/{name}")

    def _read(self, folder: str) -> TableEntry:
        """table.json, and a look at the end of ranges.parquet: the rows themselves are read when somebody asks."""
        fs = self.store.fs
        header = parse_header(retried(f"read {folder}", lambda: fs.cat_file(f"{folder}/table.json")))
        if not self.one_table and header.id != posixpath.basename(folder):
            raise UsageError(f"table.json says {header.id}, the folder's name is {posixpath.basename(folder)}")
        try:
            path = f"{folder}/ranges.parquet"
            n_rows = retried(f"read {path}", lambda: pq.read_metadata(pa.BufferReader(_footer(fs, path)))).num_rows
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"its ranges.parquet cannot be read ({error})") from error
        if n_rows != header.rows:
            raise UsageError(f"table.json says {header.rows} rows, ranges.parquet has {n_rows}")
        created = retried(f"look at {folder}", lambda: fs.modified(f"{folder}/table.json"))
        created = created.astimezone(UTC) if created.tzinfo else created.replace(tzinfo=UTC)
        return TableEntry(id=header.id, header=header, created=created, source=folder)

    def _state(self, folder: str) -> Any:
        """Another value once one of a table's files was written again."""
        return [self._state_of(f"{folder}/{name}") for name in ("table.json", "ranges.parquet")]

    def _state_of(self, path: str) -> Any:
        fs = self.store.fs
        try:
            return retried(f"look at {path}", lambda: (fs.modified(path), fs.size(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None


def _storage_failed(error: RunFailed, what: str) -> ApiError:
    log.error("storage failed", reason=str(error))
    return ApiError(
        503, f"The server's storage failed; {what}", code="storage_failed", retry_after_seconds=_RETRY_AFTER_SECONDS
    )


def _footer(fs: Any, path: str) -> bytes:
    """The end of a Parquet file: at least its footer, whose length stands before the last four bytes."""
    n_bytes = fs.size(path)
    end: bytes = fs.cat_file(path, start=max(0, n_bytes - _FOOTER_BYTES), end=n_bytes)
    needed = int.from_bytes(end[-8:-4], "little") + 8
    if len(end) < needed <= n_bytes:
        end = fs.cat_file(path, start=n_bytes - needed, end=n_bytes)
    return end


def _opened(source: str) -> Store:
    try:
        store = Store(source)
        is_known = store.exists("store.json") or store.exists("table.json")
    except (ValueError, ImportError) as error:  # of fsspec: an unknown protocol, or one whose package is missing
        raise UsageError(f"{source} cannot be opened: {error}.") from error
    if not is_known:
        raise UsageError(
            f"{source} has neither a store.json nor a table.json; expected a store, as 'neuronlens run' prints it, or "
            "the folder of a range table, STORE/ranges/tbl_..."
        )
    return store


def _upload_folder(uploads: str) -> Store:
    try:
        if "://" not in uploads:
            folder = Path(uploads)
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{threading.get_native_id()}.writable"
            probe.touch()
            probe.unlink()
        return Store(uploads)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"--uploads {uploads} cannot be used ({error}). Expected a folder that the server may write, or a URL."
        ) from error
