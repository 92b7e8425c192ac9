"""A recipe as a job of a running Ray cluster, through Ray's Jobs API.

    neuronlens submit recipe.yaml --address http://head:8265 --store s3://bucket/run --wait

The cluster's image must have neuronlens; the recipe travels with the job, and with --working-dir what lies beside it.
"""

import asyncio
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neuronlens.errors import UsageError

FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")


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
            shutil.copy(recipe, folder / recipe.name)
            name = recipe.name
        else:
            folder, name = working_dir, _within(recipe, working_dir)
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
    """Pass on the job's log until it ends; its last status."""
    jobs = client(address)

    async def tail() -> None:
        async for text in jobs.tail_job_logs(job):
            on_text(text)

    asyncio.run(tail())
    return str(jobs.get_job_status(job).value)


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
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"submitting needs Ray's job client, which is not installed here ({error}): pip install "
            "'neuronlens[cluster]'."
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"No Ray dashboard answers at {address or 'RAY_API_SERVER_ADDRESS'} ({_first_line(error)}). Expected the "
            "head's dashboard, such as http://head:8265: start it with 'ray start --head', or forward its port with "
            "'ray dashboard cluster.yaml' or 'kubectl port-forward'."
        ) from error


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
