"""A remote filesystem as DuckDB needs it.

DuckDB 2.0 shares one Python file between its threads and calls `seek`, then `read`: while one thread waits for the
network inside `read`, another moves the position, and the first gets bytes from elsewhere. Here every thread has a
position of its own, and a read is one request for just these bytes, beside those of other threads. (A file that s3fs
opens reads 50 MB ahead, one read at a time: of four files of 69 MB, a query of one column of five fetched 390 MB in
place of 61.) A file is looked up once, not nine times: what a receipt names never changes.
"""

import threading
from typing import Any

import fsspec
from fsspec.core import has_magic

from neuronlens.retry import retried

AS_ASKED = {"cache_type": "none"}
"""Opens a file so that a read fetches what was asked for, where s3fs would read 50 MB ahead."""


class SharedFiles(fsspec.AbstractFileSystem):
    """The same filesystem under the same protocol, whose files may be shared between threads. Read only."""

    cachable = False

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs = fs
        self._infos: dict[str, dict[str, Any]] = {}
        self._times: dict[str, Any] = {}

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> "SharedFile":
        return SharedFile(self._fs, path, self.info(path)["size"])

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path not in self._infos:
            self._infos[path] = retried(f"look at {path}", lambda: self._fs.info(path))
        return self._infos[path]

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        listing: list[Any] = retried(f"list {path}", lambda: self._fs.ls(path, detail=detail, **options))
        return listing

    def glob(self, path: str, **options: Any) -> list[str]:
        if not has_magic(path):
            return [path] if self.exists(path) else []
        listing: list[str] = retried(f"list {path}", lambda: self._fs.glob(path, **options))
        return listing

    def modified(self, path: str) -> Any:
        if path not in self._times:
            self._times[path] = retried(f"look at {path}", lambda: self._fs.modified(path))
        return self._times[path]


class SharedFile:
    """A file whose `seek` holds for the next `read` of the same thread. Reads in a row, without a seek between them, go
    on where the last one ended, on whatever thread: that is how DuckDB reads JSON."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, size: int) -> None:
        self._fs, self._path, self.size = fs, path, size
        self._sought = threading.local()
        self._next = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._sought.at = self._next = offset + (0, self.tell(), self.size)[whence]
        return self.tell()

    def tell(self) -> int:
        return int(getattr(self._sought, "at", self._next))

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        self._sought.__dict__.pop("at", None)
        end = self.size if size < 0 else min(self.size, start + size)
        data = b""
        if start < end:
            data = retried(f"read {self._path}", lambda: self._fs.cat_file(self._path, start=start, end=end))
        self._next = start + len(data)
        return data

    def close(self) -> None:
        """Nothing is open between two reads."""
