"""Storage that fails now and then is asked again, with back-off; storage that cannot work says so at once.

    size = retried("look at partials/x.parquet", lambda: fs.info(path)["size"])

Object stores answer with time-outs, throttling and broken connections as a matter of course: one such answer must not
cost a shard. A full disk or a missing permission stays as it is, so waiting for it would only hide it.
"""

import errno
from collections.abc import Callable
from typing import TypeVar

import tenacity

from neuronlens.errors import NeuronLensError, RunFailed

T = TypeVar("T")

MAX_TRIES = 6
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 8.0

_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, NeuronLensError)
"""Errors that say what is there, or what we have said already: the caller asked for them."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_NETWORK_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "urllib3", "requests", "google", "gcsfs", "azure", "adlfs")
"""Clients of object stores whose own errors are not OSErrors."""


class StoreUnusable(RunFailed):
    """The storage cannot be written at all: no room, no permission. Another worker would meet the same."""


class StorageFailed(RunFailed):
    """The storage did not answer in all tries. It may for another worker, or later."""


class Incomplete(OSError):
    """The storage took a write without an error, but holds another number of bytes."""


def retried(what: str, work: Callable[[], T]) -> T:
    """The result of `work`, tried up to MAX_TRIES times with growing pauses where storage fails in passing.

    `work` must be safe to repeat. `what` completes "could not ..." in the error's sentence.

    Raises StoreUnusable where there is no room or no permission, StorageFailed after the last try; errors that answer
    the question (FileNotFoundError, FileExistsError) and errors that are not the storage's come through as they are.
    """
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(MAX_TRIES),
        wait=tenacity.wait_exponential_jitter(
            initial=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS, jitter=FIRST_PAUSE_SECONDS
        ),
        retry=tenacity.retry_if_exception(_passes),
        reraise=True,
    )
    try:
        return attempts(work)
    except Exception as error:
        hopeless = _hopeless(what, error)
        if hopeless is not None:
            raise StoreUnusable(hopeless) from error
        if _passes(error):
            seconds = attempts.statistics.get("delay_since_first_attempt", 0.0)
            raise StorageFailed(
                f"could not {what}: the storage failed {MAX_TRIES} times within {seconds:.0f} s, last with "
                f"{type(error).__name__}: {error}. Nothing half-written counts; run the same command again once the "
                "storage answers."
            ) from error
        raise


def _passes(error: BaseException) -> bool:
    if isinstance(error, _ANSWERS) or _is_refused(error) or _number(error) in _NO_ROOM:
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


def _hopeless(what: str, error: Exception) -> str | None:
    if _number(error) in _NO_ROOM:
        return (
            f"could not {what}: there is no room left ({error}). What was committed is kept: make room, or set "
            "collect.raw to none in a new store, and run the same command again."
        )
    if _is_refused(error):
        return (
            f"could not {what}: the storage does not let us ({error}). Expected a store that this user may use so: "
            "mount it read-write, mend its permissions or the credentials, or choose another --store."
        )
    return None


def _is_refused(error: BaseException) -> bool:
    """No permission, a disk mounted read-only, or no credentials at all (botocore's own error, which is no OSError)."""
    return (
        isinstance(error, PermissionError)
        or _number(error) in _FORBIDDEN
        or type(error).__name__ == "NoCredentialsError"
    )


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None
