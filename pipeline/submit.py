"""A recipe as a job of a running Ray cluster, through Ray's Jobs API.

    neuronlens submit recipe.yaml --address http://head:8265 --store s3://bucket/run --wait

The cluster's image must have neuronlens; the recipe travels with the job, with all that it extends, and with
--working-dir what lies beside it.
"""

import asyncio
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml

from neuronlens.errors import RunFailed, UsageError
from neuronlens.recipe_files import read_recipe, recipe_files

FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")
ANSWER_SECONDS = 10.0
PATIENCE_SECONDS = 60.0

_RAYS_VARIABLE = "RAY_API_SERVER_ADDRESS"


def submit_run(
    address: str,
    recipe: Path,
    *,
    store: str,
    changes: Sequence[str] = (),
    working_dir: Path | None = None,
    flags: Sequence[str] = (),
) -> str:
    """Start `neuronlens run` on the cluster's head and return the job's id.

    Raises UsageError where the store could not be found again, the recipe lies outside of `working_dir`, or nobody
    answers at `address`.
    """
    _check_store(store)
    with ExitStack() as stack:
        if working_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neuronlens-job-")))
            whole = yaml.safe_dump(read_recipe(recipe), sort_keys=False, allow_unicode=True)
            (folder / recipe.name).write_text(whole, encoding="utf-8")
            name = recipe.name
        else:
            folder, name = working_dir, [_within(file, working_dir) for file in recipe_files(recipe)][-1]
        command = ["python", "-m", "neuronlens", "run", name, "--store", store, *flags, "--json"]
        for change in changes:
            command += ["--set", change]
        return str(
            client(address).submit_job(
                entrypoint=shlex.join(command),
                runtime_env={"working_dir": str(folder)},
                metadata={"store": store, "recipe": recipe.name},
            )
        )


def follow(address: str, job: str, on_text: Callable[[str], None]) -> str:
    """Pass on the job's log until it ends, and why it failed if it did; its last status.

    A connection that breaks meanwhile (a proxy's time limit, a busy head) is made anew. Raises RunFailed where the
    cluster does not answer for PATIENCE_SECONDS.
    """
    jobs = client(address)
    from aiohttp import ClientError  # comes with Ray's client

    n_shown, answered = 0, time.monotonic()

    async def tail() -> None:
        nonlocal n_shown
        n_seen = 0
        async for text in jobs.tail_job_logs(job):  # from the first line on, each time
            new = text[max(0, n_shown - n_seen) :]
            n_seen += len(text)
            n_shown = max(n_shown, n_seen)
            on_text(new)

    while True:
        try:
            asyncio.run(tail())
            info = jobs.get_job_info(job)
            answered = time.monotonic()
        except (OSError, RuntimeError, ClientError) as error:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise RunFailed(
                    f"{address} has not answered for {PATIENCE_SECONDS:.0f} s ({_first_line(error)}). Expected to "
                    f"follow {job} to its end; it may go on without us. Look with 'neuronlens status {job} --address "
                    f"{address}'."
                ) from error
        else:
            if info.status.value in FINISHED:
                break
        time.sleep(1)
    if info.status.value != "SUCCEEDED" and info.message:
        on_text(f"{_first_line(info.message)}\n")
    return str(info.status.value)


def job_of(address: str | None, job: str) -> dict[str, Any]:
    """What the cluster knows of a job: status, message, store, entrypoint. Raises UsageError where it knows none."""
    try:
        info = client(address).get_job_info(job)
    except RuntimeError as error:
        raise UsageError(f"{address or 'The cluster'} has no job {job!r} ({_first_line(error)}).") from error
    return {
        "job": job,
        "status": str(info.status.value),
        "message": info.message,
        "entrypoint": info.entrypoint,
        "store": (info.metadata or {}).get("store"),
    }


def client(address: str | None) -> Any:
    """Ray's own client of the Jobs API. Raises UsageError where nobody answers."""
    url = _dashboard(address)
    os.environ[_RAYS_VARIABLE] = url  # Ray believes this, then RAY_ADDRESS, before the address that it is given
    try:
        urlopen(f"{url}/api/version", timeout=ANSWER_SECONDS).close()
    except HTTPError:
        pass  # an answer too: Ray's client knows what it means
    except (OSError, HTTPException, ValueError) as error:
        raise _nobody(url, getattr(error, "reason", error)) from error
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(url)
        except AuthenticationError as error:
            raise UsageError(
                f"{url} wants another token ({_first_line(error)}). Expected RAY_AUTH_MODE=token in the environment, "
                "and the cluster's token in RAY_AUTH_TOKEN or in ~/.ray/auth_token."
            ) from error
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"submitting needs Ray's job client, which is not installed here ({error}): pip install "
            "'neuronlens[cluster]'."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _nobody(url, error) from error


def _nobody(url: str, reason: object) -> UsageError:
    return UsageError(
        f"No Ray dashboard answers at {url} ({_first_line(reason)}). Expected the head's dashboard, such as "
        "http://head:8265: start it with 'ray start --head', or forward its port with 'ray dashboard cluster.yaml' or "
        "'kubectl port-forward'."
    )


def _dashboard(address: str | None) -> str:
    """The URL that --address means. (Ray would take one without http:// for its GCS, and look for that for 45 s.)"""
    if not address:
        raise UsageError(f"No cluster was named. Give --address http://head:8265, or set {_RAYS_VARIABLE}.")
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")) or address == "auto":
        raise UsageError(
            f"--address {address} is not a Ray dashboard. Expected the URL of the head's dashboard, such as "
            "http://head:8265."
        )
    return url.rstrip("/")


def _check_store(store: str) -> None:
    if "://" not in store and not Path(store).is_absolute():
        raise UsageError(
            f"--store {store} is a relative path: on the cluster it would lie in the job's temporary folder. Expected "
            "a URL such as s3://bucket/run, or the absolute path of a folder on a disk that all nodes share."
        )


def _within(recipe: Path, folder: Path) -> str:
    if not recipe.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{recipe} does not lie in --working-dir {folder}: only that folder travels with the job.")
    return str(recipe.resolve().relative_to(folder.resolve()))


def _first_line(text: object) -> str:
    return str(text).strip().splitlines()[0] if str(text).strip() else type(text).__name__
