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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from neuronlens.errors import RunFailed, UsageError

FORMAT_VERSION = 1
DIGEST_BYTES = 16


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
        if fs is None:
            fs, root = fsspec.core.url_to_fs(root)
        self.fs = fs
        self.root = str(Path(root).resolve()) if isinstance(fs, LocalFileSystem) else root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}"

    # --- descriptions and receipts -------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """store.json. Raises UsageError where there is no store."""
        if not self.exists("store.json"):
            raise UsageError(
                f"There is no store at {self.root}: store.json is missing. Expected the directory that a run printed; "
                "make one with 'neuronlens run recipe.yaml --store DIR'."
            )
        description = self.read_json("store.json")
        if description.get("format_version") != FORMAT_VERSION:
            raise UsageError(
                f"{self.root} has store format {description.get('format_version')}, this version reads format "
                f"{FORMAT_VERSION}. Read it with the version in its store.json: {description.get('versions')}."
            )
        return description

    def exists(self, relative: str) -> bool:
        return bool(self.fs.exists(self.path(relative)))

    def read_json(self, relative: str) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], json.loads(self.fs.cat_file(self.path(relative))))
        except ValueError as error:
            raise RunFailed(
                f"{self.path(relative)} is not JSON ({error}): it was damaged after it was written. Delete that file; "
                "the same run command then makes it again."
            ) from error

    def create_json(self, relative: str, content: Mapping[str, Any]) -> bool:
        """Write a JSON file if none is there yet; False, and nothing written, where one is."""
        payload = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
        if self.is_local:
            return _create_local(Path(self.path(relative)), payload)
        try:
            self.fs.pipe_file(self.path(relative), payload, mode="create")
        except FileExistsError:
            return False
        return True

    def receipts(self, folder: str) -> list[dict[str, Any]]:
        """Every receipt in `commits` or `statistics`, in the order of their names."""
        names = sorted(name for name in self.names(folder) if name.endswith(".json"))
        return [self.read_json(f"{folder}/{name}") for name in names]

    def names(self, folder: str) -> list[str]:
        """The names within a folder; none where it does not exist."""
        try:
            listing = self.fs.ls(self.path(folder), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in listing]

    def remove(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(relative))

    # --- data files ------------------------------------------------------------------------------------------------

    def write_parquet(
        self, kind: str, relative: str, schema: pa.Schema, tables: Iterable[pa.Table], **options: Any
    ) -> StoredFile:
        """Write each table as one row group, hash the bytes on their way, flush. Memory holds one table at a time.

        `options` go to pyarrow's ParquetWriter.
        """
        n_rows = 0
        with self._created(relative) as raw:
            sink = _HashingSink(raw)
            with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), schema, **options) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=max(1, table.num_rows))
                    n_rows += table.num_rows
        return StoredFile(
            kind=kind, path=relative, n_bytes=sink.n_bytes, n_rows=n_rows, blake2b=sink.digest.hexdigest()
        )

    def adopt(self, kind: str, relative: str) -> StoredFile:
        """Describe a data file that someone else wrote (DuckDB's COPY): size, rows and digest read back from it."""
        n_bytes, digest = self._size_and_digest(relative)
        return StoredFile(kind=kind, path=relative, n_bytes=n_bytes, n_rows=self._n_rows(relative), blake2b=digest)

    def write_through(self, relative: str, write: Callable[[str], object]) -> None:
        """Let `write` fill a local file, which becomes the store's file: for writers that know only local paths."""
        path = self.path(relative)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if self.is_local:
            write(path)
            return
        with tempfile.TemporaryDirectory(prefix="neuronlens-") as folder:
            local = str(Path(folder) / Path(path).name)
            write(local)
            self.fs.put_file(local, path)

    @contextlib.contextmanager
    def _created(self, relative: str) -> Iterator[BinaryIO]:
        path = self.path(relative)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not self.is_local:
            with self.fs.open(path, "wb") as file:
                yield cast(BinaryIO, file)
            return
        with Path(path).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    # --- what counts -----------------------------------------------------------------------------------------------

    def committed_files(self) -> list[StoredFile]:
        """Every file that a receipt of a shard or of a layer's statistics names."""
        return [
            StoredFile(**file)
            for folder in ("commits", "statistics")
            for receipt in self.receipts(folder)
            for file in receipt["files"]
        ]

    def file_lists(self) -> dict[str, list[str]]:
        """Full paths by kind, for queries: data files from receipts only, never from a glob."""
        lists: dict[str, list[str]] = {}
        for file in self.committed_files():
            lists.setdefault(file.kind, []).append(self.path(file.path))
        lists["plan"] = [self.path("plan.parquet")] if self.exists("plan.parquet") else []
        lists["samples"] = [self.path(f"samples/{name}") for name in sorted(self.names("samples"))]
        lists["commits"] = [self.path(f"commits/{name}") for name in sorted(self.names("commits"))]
        lists["ranges"] = [self.path(f"ranges/{name}/ranges.parquet") for name in self.table_ids()]
        return lists

    def table_ids(self) -> list[str]:
        """Ids of the range tables of this store, oldest name first (ids are hashes: the order means nothing)."""
        return sorted(name for name in self.names("ranges") if self.exists(f"ranges/{name}/table.json"))

    def faults(self, on_file: Callable[[StoredFile], None] = lambda _: None) -> list[str]:
        """What is wrong with the files that receipts name: missing, another size or digest, another number of rows."""
        found = []
        for file in self.committed_files():
            fault = self.fault_of(file)
            if fault is not None:
                found.append(fault)
            on_file(file)
        return found

    def fault_of(self, file: StoredFile) -> str | None:
        """The sentence that says what is wrong with one file, None where all is right."""
        if not self.exists(file.path):
            return f"{file.path} is missing; its receipt promises {file.n_rows} rows"
        n_bytes, digest = self._size_and_digest(file.path)
        if n_bytes != file.n_bytes:
            return f"{file.path} has {n_bytes} bytes, its receipt says {file.n_bytes}"
        if digest != file.blake2b:
            return f"{file.path} has BLAKE2b {digest}, its receipt says {file.blake2b}: the bytes were changed"
        n_rows = self._n_rows(file.path)
        if n_rows != file.n_rows:
            return f"{file.path} has {n_rows} rows, its receipt says {file.n_rows}"
        return None

    def _size_and_digest(self, relative: str) -> tuple[int, str]:
        digest, n_bytes = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
        with self.fs.open(self.path(relative), "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                n_bytes += len(chunk)
        return n_bytes, digest.hexdigest()

    def _n_rows(self, relative: str) -> int:
        with self.fs.open(self.path(relative), "rb") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)


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


def _create_local(path: Path, payload: bytes) -> bool:
    """Create-if-absent that survives a crash at any point: a hard link appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True
