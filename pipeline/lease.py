"""One driver a store: who starts later hears who is there, and a driver that is gone is followed at once.

The files leases/<number>.json are created only if absent, and the highest number holds the store. The holder writes its
file anew every few seconds. Whoever finds a holder of another machine watches that file for STALE_SECONDS by its own
clock, and takes the next number if nothing changes: no two machines' clocks are ever compared. A holder that finds a
higher number than its own (it was frozen, or cut off) stops. What such a driver may still commit meanwhile does no
harm, since the first receipt of a shard counts.
"""

import contextlib
import getpass
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from neuronlens.errors import NeuronLensError, RunFailed
from neuronlens.store import Store, new_attempt

BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0

FOLDER = "leases"


class StoreHeld(RunFailed):
    """Another driver works on the store."""


@dataclass(slots=True)
class Lease:
    """Holds the store from `with` to its end. `purpose` is what the next one is told.

    Raises StoreHeld where another live driver holds it. `say` hears why it takes long.
    """

    store: Store
    purpose: str
    say: Callable[[str], None] = lambda line: None
    _number: int = 0
    _content: dict[str, Any] = field(default_factory=dict)
    _lost_to: str | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _heart: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        self._content = {"token": new_attempt(), "purpose": self.purpose, "beat": 0, **identity_of_this_process()}
        while True:
            number, holder = current(self.store)
            if holder is not None:
                self._expect_dead(number, holder)
            if self.store.create_json(_path(number + 1), self._content):
                # What was read before may be old by now: where others went on to higher numbers meanwhile, those hold.
                if max(_numbers(self.store)) == number + 1:
                    break
                self.store.remove(_path(number + 1))
        self._number = number + 1
        for lower in _numbers(self.store):
            if lower < self._number:
                self.store.remove(_path(lower))
        self._heart = threading.Thread(target=self._beat, daemon=True, name="neuronlens-lease")
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._heart is not None
        self._heart.join()
        with contextlib.suppress(NeuronLensError):
            self.store.remove(_path(self._number))

    def check(self) -> None:
        """Raises StoreHeld where another driver has taken the store meanwhile."""
        if self._lost_to is not None:
            raise StoreHeld(
                f"{self.store.root} was taken over by {self._lost_to}, because this driver gave no sign of life for "
                f"{STALE_SECONDS:.0f} s. Expected to hold it to the end; the other goes on from what was committed."
            )

    def _expect_dead(self, number: int, holder: dict[str, Any]) -> None:
        """Returns once the holder is known to be gone."""
        alive = is_alive_here(holder)
        if alive is None:
            self.say(f"{self.store.root} is held by {told(holder)}; looking for {STALE_SECONDS:.0f} s if it lives.")
            alive = self._changes(number, holder)
        if alive:
            raise StoreHeld(
                f"{self.store.root} is held by {told(holder)}. Expected no other driver on it: wait until that one "
                "ends, stop it, or give another --store."
            )

    def _changes(self, number: int, holder: dict[str, Any]) -> bool:
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            seen = current(self.store)
            if seen[0] != number or seen[1] is None:
                return seen[1] is not None
            if (seen[1]["token"], seen[1]["beat"]) != (holder["token"], holder["beat"]):
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # Storage that fails for a while is no reason to end: whoever needs the store waits far longer.
            with contextlib.suppress(NeuronLensError):
                number, holder = current(self.store)
                if number > self._number:
                    self._lost_to = told(holder) if holder else "another driver"
                    return
                self._content["beat"] += 1
                self.store.replace_json(_path(self._number), self._content)


def current(store: Store) -> tuple[int, dict[str, Any] | None]:
    """The highest lease of a store and what its holder says, (0, None) where nobody holds it."""
    while numbers := _numbers(store):
        # A file that went away since it was listed: its holder ended, or a higher number has taken over. Look again.
        with contextlib.suppress(FileNotFoundError):
            return max(numbers), store.read_json(_path(max(numbers)))
    return 0, None


def identity_of_this_process() -> dict[str, Any]:
    """What tells this process from all others, on this machine and elsewhere."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "user": _user(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }


def is_alive_here(holder: dict[str, Any]) -> bool | None:
    """Does the holder's process run on this machine? None where it belongs to another machine."""
    if holder.get("machine") != _machine():
        return None
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    return bool(abs(started - holder["process_started"]) < 1.0)


def told(holder: dict[str, Any]) -> str:
    return f"{holder['purpose']!r} of {holder['user']} (process {holder['pid']} on {holder['host']})"


def _machine() -> str:
    """One boot of one kernel and one namespace of process numbers: containers and reboots get names of their own."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return f"{socket.gethostname()}-{psutil.boot_time():.0f}"
    return f"{boot.read_text().strip()}-{namespace.readlink()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"user {os.getuid()}"


def _path(number: int) -> str:
    return f"{FOLDER}/{number:05d}.json"


def _numbers(store: Store) -> list[int]:
    return [int(name.removesuffix(".json")) for name in store.names(FOLDER)]
