"""A remote filesystem as DuckDB needs it.

DuckDB 2.0 shares one Python file between its threads and calls `seek`, then `read`: while one thread waits for the
network inside `read`, another moves the position, and the first gets bytes from elsewhere. Here every thread has a
position of its own, and one read is done at a time.
"""

import threading
from typing import Any

import fsspec

_ASKED = ("exists", "glob", "info", "isdir", "isfile", "ls", "modified", "size")


class SharedFiles(fsspec.AbstractFileSystem):
    """The same filesystem under the same protocol, whose files may be shared between threads. Read only."""

    cachable = False

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs = fs
        for name in _ASKED:
            setattr(self, name, getattr(fs, name))

    def open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> "SharedFile":
        return SharedFile(self._fs.open(path, mode, *args, **options))


class SharedFile:
    """An open file with one position a thread."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._position = threading.local()
        self._lock = threading.Lock()

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._position.at = offset
        else:
            with self._lock:
                self._position.at = self._file.seek(
                    offset + (self.tell() if whence == 1 else 0), 2 if whence == 2 else 0
                )
        return int(self._position.at)

    def tell(self) -> int:
        return int(getattr(self._position, "at", 0))

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._file.seek(self.tell())
            data: bytes = self._file.read(size)
        self._position.at = self.tell() + len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
