"""A filesystem that breaks on demand, in every process that opens it.

    break_storage(folder, Fault("kill", r"partials/shard-00002", times=1))
    Store(f"faulty://{folder}/store")

The faults of a folder stand in its faults.json, so that Ray's workers meet them too. It is a local filesystem below.
"""

import errno
import json
import os
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

FILE = "faults.json"


@dataclass(frozen=True)
class Fault:
    """What happens when a file whose path matches is opened to be written: `raise`, `half` (half of the bytes arrive,
    no error), `kill` (SIGKILL to the process), `full` (no space left), `readonly`, `slow` (it takes so many
    seconds)."""

    action: str
    pattern: str
    times: int = 10**9
    seconds: float = 0.0


def break_storage(folder, *faults: Fault) -> None:
    """From now on, in place of what was said before."""
    draft = Path(folder) / f"{FILE}.draft"
    draft.write_text(json.dumps([asdict(fault) for fault in faults]))
    draft.rename(Path(folder) / FILE)


def n_times(folder) -> int:
    """How often anything broke there."""
    return len(list(Path(folder).glob("fault.*")))


class FaultyFileSystem(LocalFileSystem):
    protocol = "faulty"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("faulty://"))

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if "w" not in mode:
            return file
        for fault in _faults(path):
            file = self._meet(fault, path, file)
        return file

    def _meet(self, fault: Fault, path: str, file):
        if fault.action == "slow":
            time.sleep(fault.seconds)
        elif fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "half":
            return _Half(file)
        else:
            number = {"raise": errno.EIO, "full": errno.ENOSPC, "readonly": errno.EROFS}[fault.action]
            raise OSError(number, os.strerror(number), path)
        return file


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


class _Half:
    """Loses what comes after the first hundred bytes, and says nothing."""

    def __init__(self, file):
        self._file = file
        self._room = 100

    def write(self, data):
        view = memoryview(data).cast("B")
        self._file.write(view[: self._room])
        self._room = max(0, self._room - len(view))
        return len(view)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def _faults(path: str):
    """Those that are due for this path; each is counted, across processes, by a file that only one can create."""
    folder = next((parent for parent in Path(path).parents if (parent / FILE).exists()), None)
    if folder is None:
        return
    for index, content in enumerate(json.loads((folder / FILE).read_text())):
        fault = Fault(**content)
        if re.search(fault.pattern, path) and _count(folder, index, fault.times):
            yield fault


def _count(folder: Path, index: int, times: int) -> bool:
    for number in range(times):
        try:
            (folder / f"fault.{index}.{number}").touch(exist_ok=False)
            return True
        except FileExistsError:
            continue
    return False
