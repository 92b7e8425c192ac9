"""What passes is waited for, what stays is said at once, what answers comes through."""

import errno

import pytest

from neuronlens import retry
from neuronlens.errors import RunFailed
from neuronlens.retry import MAX_TRIES, StoreUnusable, retried


class EndpointConnectionError(Exception):
    """As botocore's: no OSError."""


EndpointConnectionError.__module__ = "botocore.exceptions"


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """How long was slept before each try."""
    slept = []
    monkeypatch.setattr(retry.tenacity.nap.time, "sleep", slept.append)
    return slept


def failing(*errors):
    """Raises each error once, then gives 'done'."""
    left = list(errors)

    def work():
        if left:
            raise left.pop(0)
        return "done"

    return work


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "bad"), TimeoutError("slow"), ConnectionResetError(), EndpointConnectionError("no")]
)
def test_retried__waits_longer_each_time_for_what_passes(pauses, error):
    assert retried("try", failing(*[error] * (MAX_TRIES - 1))) == "done"
    assert len(pauses) == MAX_TRIES - 1
    assert pauses[-1] > 4 * pauses[0] > 0


def test_retried__says_what_failed_and_how_often_in_the_end():
    with pytest.raises(RunFailed, match=rf"could not write x: .* failed {MAX_TRIES} times.*TimeoutError: slow"):
        retried("write x", failing(*[TimeoutError("slow")] * MAX_TRIES))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no room left"),
        (errno.EDQUOT, "no room left"),
        (errno.EROFS, "does not let us"),
        (errno.EACCES, "does not let us"),
    ],
)
def test_retried__does_not_wait_for_what_stays(pauses, number, said):
    with pytest.raises(StoreUnusable, match=said):
        retried("write x", failing(OSError(number, "no")))
    assert pauses == []


@pytest.mark.parametrize("error", [FileNotFoundError("x"), FileExistsError("x"), ValueError("ours"), KeyError("ours")])
def test_retried__passes_on_answers_and_mistakes(pauses, error):
    with pytest.raises(type(error)):
        retried("try", failing(error))
    assert pauses == []
