"""What can be read again, kept in memory up to a number of bytes: the values that were used last.

    tables = Recent(2 << 30, lambda table: table.rows.nbytes)
    tables.put("tbl_0123456789abcdef", table)
    tables.get("tbl_0123456789abcdef")

A value says the same size each time that it is asked.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by their keys, of which those go first that were used longest ago. Any thread may use it.

    `n_bytes_of` says what a value takes. The newest one stays whatever its size, unless `keeps_newest` is false.
    """

    def __init__(self, max_bytes: int, n_bytes_of: Callable[[V], int], *, keeps_newest: bool = True) -> None:
        self.max_bytes = max_bytes
        self._n_bytes_of = n_bytes_of
        self._n_spared = 1 if keeps_newest else 0
        self._values: OrderedDict[K, V] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """What is kept now."""
        return self._n_bytes

    def get(self, key: K) -> V | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value, in place of the one that had this key."""
        with self._lock:
            self._forget(key)
            self._values[key] = value
            self._n_bytes += self._n_bytes_of(value)
            while self._n_bytes > self.max_bytes and len(self._values) > self._n_spared:
                self._forget(next(iter(self._values)))

    def drop(self, is_old: Callable[[K], bool]) -> None:
        """Forget the keys of which that is true."""
        with self._lock:
            for key in [key for key in self._values if is_old(key)]:
                self._forget(key)

    def _forget(self, key: K) -> None:
        if key in self._values:
            self._n_bytes -= self._n_bytes_of(self._values.pop(key))
