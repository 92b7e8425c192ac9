"""The store: one directory, local or at any fsspec URL, in which only receipts make files count (docs/store-format.md).

A data file is written under a name that no other attempt uses, flushed, and counts from the moment that a receipt
naming it is created. A receipt is created only if it is absent: the first of two racing attempts wins, the other's
files are orphans.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from neuronlens.errors import RunFailed, UsageError
from neuronlens.remote import AS_ASKED
from neuronlens.retry import Incomplete, retried

T = TypeVar("T")

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
"""They have no folders: asked for one, their clients look for the bucket, and make a bucket where they find none."""

FORMAT_VERSION = 1
DIGEST_BYTES = 16
_N_READERS = 16
"""How many files are read side by side from storage behind a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A data file as its receipt names it: path relative to the store, size, rows and BLAKE2b digest (16 bytes,
    hex)."""

    kind: str
    path: str
    n_bytes: int
    n_rows: int
    blake2b: str


class Store:
    """Reads and writes one store. Holds a location, no state: any process may open the same store at the same time."""

    def __init__(self, root: str, fs: fsspec.AbstractFileSystem | None = None) -> None:
        local_root = root
        if fs is None:
            # A listing kept from before would hide what other machines have committed since.
            fs, local_root = fsspec.core.url_to_fs(root, **({"use_listings_cache": False} if "://" in root else {}))
        self.fs = fs
        self.root = str(Path(local_root).resolve()) if isinstance(fs, LocalFileSystem) else root.rstrip("/")
        """A path, or the URL as it was given: what any command takes as --store."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}"

    # --- descriptions and receipts -------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """store.json. Raises UsageError where there is no store, or one of a format that this version does not know."""
        if not self.exists("store.json"):
            raise UsageError(
                f"There is no store at {self.root}: store.json is missing. Expected the directory that a run printed; "
                "make one with 'neuronlens run recipe.yaml --store DIR'."
            )
        description = self.read_json("store.json")
        _check_format(description, self.path("store.json"))
        return description

    def exists(self, relative: str) -> bool:
        return bool(retried(f"look for {self.path(relative)}", lambda: self.fs.exists(self.path(relative))))

    def read_json(self, relative: str) -> dict[str, Any]:
        """Raises FileNotFoundError where there is none, RunFailed where it is not JSON."""
        path = self.path(relative)
        payload = retried(f"read {path}", lambda: self.fs.cat_file(path))
        try:
            return cast(dict[str, Any], json.loads(payload))
        except ValueError as error:
            raise RunFailed(
                f"{path} is not JSON ({error}): it was damaged after it was written. Delete that file; "
                "the same run command then makes it again."
            ) from error

    def create_json(self, relative: str, content: Mapping[str, Any]) -> bool:
        """Write a JSON file if none is there yet; False, and nothing written, where another one is."""
        path, payload = self.path(relative), _json_bytes(content)

        def create() -> bool:
            try:
                if self.is_local:
                    _create_local(Path(path), payload)
                else:
                    self.fs.pipe_file(path, payload, mode="create")
            except OSError as error:
                # Not every S3 names the condition that did not hold, so that s3fs knows FileExistsError from EINVAL.
                # And a write that was reported as failed, or tried again below us, may have arrived all the same.
                found = self._content(path)
                if found is None and not isinstance(error, FileExistsError):
                    raise
                return found == payload
            return True

        self._make_folder(path)
        with self._in_a_bucket(path):
            return retried(f"create {path}", create)

    def replace_json(self, relative: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file over what is there; a reader sees the old one or the new one."""
        path, payload = self.path(relative), _json_bytes(content)

        def replace() -> None:
            if self.is_local:
                _replace_local(Path(path), payload)
            else:
                self.fs.pipe_file(path, payload)

        self._make_folder(path)
        with self._in_a_bucket(path):
            retried(f"write {path}", replace)

    def receipts(self, folder: str) -> list[dict[str, Any]]:
        """Every receipt in `commits` or `statistics`, in the order of their names."""
        names = sorted(name for name in self.names(folder) if name.endswith(".json"))
        return self._each(lambda name: self.read_json(f"{folder}/{name}"), names)

    def names(self, folder: str) -> list[str]:
        """The names within a folder, without unfinished drafts; none where it does not exist."""
        path = self.path(folder)
        try:
            listing = retried(f"list {path}", lambda: self.fs.ls(path, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in listing)
        return [name for name in names if not name.startswith(".")]

    def remove(self, relative: str) -> None:
        path = self.path(relative)
        with contextlib.suppress(FileNotFoundError):
            retried(f"remove {path}", lambda: self.fs.rm_file(path))

    def _each(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """`work` on every name, in their order: side by side where each waits for a network."""
        if self.is_local or len(names) < 2:
            return [work(name) for name in names]
        with ThreadPoolExecutor(_N_READERS) as readers:
            return list(readers.map(work, names))

    # --- data files ------------------------------------------------------------------------------------------------

    def write_parquet(
        self, kind: str, relative: str, schema: pa.Schema, tables: Callable[[], Iterable[pa.Table]], **options: Any
    ) -> StoredFile:
        """Write each of `tables()` as one row group, hash the bytes on their way, flush. Memory holds one at a time.

        Where the storage fails in passing, or holds fewer bytes than were written, `tables` is called again for another
        try. `options` go to pyarrow's ParquetWriter.
        """

        def write() -> StoredFile:
            n_rows = 0
            with self._created(relative) as raw:
                sink = _HashingSink(raw)
                with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), schema, **options) as writer:
                    for table in tables():
                        writer.write_table(table, row_group_size=max(1, table.num_rows))
                        n_rows += table.num_rows
            digest = sink.digest.hexdigest()
            self._check_size(relative, sink.n_bytes)
            return StoredFile(kind=kind, path=relative, n_bytes=sink.n_bytes, n_rows=n_rows, blake2b=digest)

        try:
            with self._in_a_bucket(self.path(relative)):
                return retried(f"write {self.path(relative)}", write)
        except RunFailed:
            with contextlib.suppress(Exception):
                self.fs.rm_file(self.path(relative))
            raise

    def read_parquet(self, relative: str, row_group: int | None = None) -> pa.Table:
        """A small Parquet file, or one row group of a large one."""

        def read() -> pa.Table:
            with self._opened(relative) as file:
                parquet = pq.ParquetFile(file, pre_buffer=not self.is_local)
                return parquet.read() if row_group is None else parquet.read_row_group(row_group)

        return retried(f"read {self.path(relative)}", read)

    def read_whole(self, file: StoredFile) -> bytes:
        """The bytes of a file that counts. Raises RunFailed where they are not those that its receipt promises."""
        path = self.path(file.path)
        try:
            content = cast(bytes, retried(f"read {path}", lambda: self.fs.cat_file(path)))
        except FileNotFoundError as error:
            raise RunFailed(
                f"{path} is missing; its receipt promises {file.n_rows} rows. Restore that file."
            ) from error
        found = hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
        if found != file.blake2b:
            raise RunFailed(
                f"{path} has BLAKE2b {found}, its receipt says {file.blake2b}: the bytes were changed. Restore that "
                f"file; 'neuronlens verify {self.root}' names what else was damaged."
            )
        return content

    def write_whole(self, file: StoredFile, content: bytes) -> None:
        """Write a file that another store holds, under the same path."""

        def write() -> None:
            with self._created(file.path) as raw:
                raw.write(content)
            self._check_size(file.path, file.n_bytes)

        with self._in_a_bucket(self.path(file.path)):
            retried(f"write {self.path(file.path)}", write)

    def adopt(self, kind: str, relative: str) -> StoredFile:
        """Describe a data file that someone else wrote (DuckDB's COPY): size, rows and digest read back from it."""
        n_bytes, digest = self._size_and_digest(relative)
        return StoredFile(kind=kind, path=relative, n_bytes=n_bytes, n_rows=self._n_rows(relative), blake2b=digest)

    def write_through(self, relative: str, write: Callable[[str], object]) -> None:
        """Let `write` fill a local file, which becomes the store's file: for writers that know only local paths."""
        path = self.path(relative)
        self._make_folder(path)
        if self.is_local:
            write(path)
            return
        with tempfile.TemporaryDirectory(prefix="neuronlens-") as folder:
            local = Path(folder) / Path(path).name
            write(str(local))

            def put() -> None:
                self.fs.put_file(str(local), path)
                self._check_size(relative, local.stat().st_size)

            retried(f"write {path}", put)

    @contextlib.contextmanager
    def _created(self, relative: str) -> Iterator[BinaryIO]:
        path = self.path(relative)
        self._make_folder(path)
        with self.fs.open(path, "wb") as file:
            yield cast(BinaryIO, file)
            if self.is_local:
                file.flush()
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _opened(self, relative: str) -> Iterator[BinaryIO]:
        with self.fs.open(self.path(relative), "rb", **({} if self.is_local else AS_ASKED)) as file:
            yield cast(BinaryIO, file)

    def _content(self, path: str) -> bytes | None:
        try:
            return cast(bytes, self.fs.cat_file(path))
        except FileNotFoundError:
            return None

    def _make_folder(self, path: str) -> None:
        if not _OBJECT_STORES.isdisjoint(_protocols(self.fs)):
            return
        folder = path.rsplit("/", 1)[0]
        retried(f"make the folder {folder}", lambda: self.fs.makedirs(folder, exist_ok=True))

    @contextlib.contextmanager
    def _in_a_bucket(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise UsageError(
                f"{path} cannot be written ({error}). Expected a bucket that is there: make it first, or choose "
                "another --store."
            ) from error

    def _check_size(self, relative: str, n_bytes: int) -> None:
        found = self.fs.info(self.path(relative))["size"]
        if found != n_bytes:
            raise Incomplete(f"{n_bytes} bytes were written, {found} are there")

    # --- what counts -----------------------------------------------------------------------------------------------

    def committed_files(self) -> list[StoredFile]:
        """Every file that counts: those of the plan, named by store.json, and those that the receipt of a shard, of a
        layer's statistics or of its probe names."""
        receipts = [self.read_json("store.json")] if self.exists("store.json") else []
        for folder in ("commits", "statistics", "probes"):
            receipts += self.receipts(folder)
        return [file for receipt in receipts for file in files_of(receipt)]

    def file_lists(self) -> dict[str, list[str]]:
        """Full paths by kind, for queries: data files from receipts only, never from a glob.

        `histograms` are the merged files where the statistics of every layer have one, else those of the shards, which
        `shard_histograms` always are.
        """
        lists: dict[str, list[str]] = {}
        for file in self.committed_files():
            lists.setdefault(file.kind, []).append(self.path(file.path))
        merged, lists["shard_histograms"] = lists.pop("merged_histograms", []), lists.pop("histograms", [])
        is_merged = merged and len(merged) == len(self.names("statistics"))
        lists["histograms"] = merged if is_merged else lists["shard_histograms"]
        lists["commits"] = [self.path(f"commits/{name}") for name in sorted(self.names("commits"))]
        for kind in ("evaluations", "generations"):
            lists[kind] = [self.path(f"{kind}/{name}") for name in sorted(self.names(kind))]
        lists["ranges"] = [self.path(f"ranges/{name}/ranges.parquet") for name in self.table_ids()]
        return lists

    def table_ids(self) -> list[str]:
        """Ids of the range tables of this store, oldest name first (ids are hashes: the order means nothing)."""
        return sorted(name for name in self.names("ranges") if self.exists(f"ranges/{name}/table.json"))

    def faults(self, on_file: Callable[[StoredFile], None] = lambda _: None) -> list[str]:
        """What is wrong with the files that count: missing, another size or digest, another number of rows."""
        return [fault for fault in self.faults_of(self.committed_files(), on_file) if fault is not None]

    def faults_of(
        self,
        files: Sequence[StoredFile],
        on_file: Callable[[StoredFile], None] = lambda _: None,
        *,
        digests: bool = True,
    ) -> list[str | None]:
        """For each file the sentence that says what is wrong, or None; looked at side by side. Without `digests`, only
        sizes are compared."""
        found = []
        with ThreadPoolExecutor(os.cpu_count() if self.is_local else _N_READERS) as readers:
            looked = readers.map(lambda file: self.fault_of(file, digest=digests), files)
            for file, fault in zip(files, looked, strict=True):
                found.append(fault)
                on_file(file)
        return found

    def fault_of(self, file: StoredFile, *, digest: bool = True) -> str | None:
        """The sentence that says what is wrong with one file, None where all is right."""
        path = self.path(file.path)
        try:
            n_bytes = retried(f"look at {path}", lambda: self.fs.info(path)["size"])
        except FileNotFoundError:
            return f"{file.path} is missing; its receipt promises {file.n_rows} rows"
        if n_bytes != file.n_bytes:
            return f"{file.path} has {n_bytes} bytes, its receipt says {file.n_bytes}"
        if not digest:
            return None
        _, found = self._size_and_digest(file.path)
        if found != file.blake2b:
            return f"{file.path} has BLAKE2b {found}, its receipt says {file.blake2b}: the bytes were changed"
        n_rows = self._n_rows(file.path)
        if n_rows != file.n_rows:
            return f"{file.path} has {n_rows} rows, its receipt says {file.n_rows}"
        return None

    def _size_and_digest(self, relative: str) -> tuple[int, str]:
        def read() -> tuple[int, str]:
            digest, n_bytes = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
            with self._opened(relative) as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    n_bytes += len(chunk)
            return n_bytes, digest.hexdigest()

        return retried(f"read {self.path(relative)}", read)

    def _n_rows(self, relative: str) -> int:
        def read() -> int:
            with self._opened(relative) as file:
                return int(pq.ParquetFile(file).metadata.num_rows)

        return retried(f"read {self.path(relative)}", read)


class _HashingSink(io.RawIOBase):
    """A file that counts and hashes what is written through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self.n_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self.n_bytes += view.nbytes
        self._file.write(view)
        return view.nbytes


def new_attempt() -> str:
    """A name for one try at a shard that no other try has, on any machine."""
    return uuid.uuid4().hex[:12]


def content_hash(content: Any) -> str:
    """SHA-256, hex, of a JSON value in canonical form."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def receipt_of(files: Sequence[StoredFile], **fields: Any) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **fields, "files": [asdict(file) for file in files]}


def files_of(receipt: Mapping[str, Any]) -> list[StoredFile]:
    """The files that a receipt names."""
    return [StoredFile(**file) for file in receipt.get("files", [])]


def _check_format(description: Any, path: str) -> None:
    """Raise UsageError for a store.json of a format that this version cannot read: every older one can be."""
    found = description.get("format_version") if isinstance(description, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UsageError(
            f"{path} gives {found!r} as its format_version, expected a whole number from 1 to {FORMAT_VERSION}: it was "
            "changed after it was written, or is not a store's. Restore that file, or run again with a new --store."
        )
    if found > FORMAT_VERSION:
        versions = description.get("versions")
        maker = versions.get("neuronlens") if isinstance(versions, dict) else None
        raise UsageError(
            f"{path} has store format {found}, this version reads formats up to {FORMAT_VERSION}. Update neuronlens: "
            f"version {maker or 'unknown'} made the store."
        )


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _create_local(path: Path, payload: bytes) -> None:
    """Create-if-absent that survives a crash at any point: a hard link appears whole or not at all."""
    with _draft(path, payload) as draft:
        os.link(draft, path)


def _replace_local(path: Path, payload: bytes) -> None:
    with _draft(path, payload) as draft:
        draft.rename(path)


@contextlib.contextmanager
def _draft(path: Path, payload: bytes) -> Iterator[Path]:
    """A flushed file beside `path` that is gone afterwards, under a name that listings leave out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)
