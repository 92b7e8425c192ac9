"""A range table that a client sends, from the request's body to a table that is known to be right.

    curl -F header=@table.json -F rows=@ranges.parquet http://localhost:8000/v1/tables

Parquet from a stranger is opened by a child process only (`check_upload`), which may run out of memory or time, or
crash, and whose end is then an answer like any other.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

import neuronlens
from neuronlens.ranges import RangeTable, TableHeader
from neuronlens.serving.check_upload import cpu_seconds
from neuronlens.serving.errors import ApiError
from neuronlens.serving.logs import log
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Limits

MAX_HEADER_BYTES = 1_000_000
MAX_AT_ONCE = 4
"""Uploads that are received or checked: 429 beyond. Each may lie on the disk with its whole size."""
MAX_CHECKS = 2
"""Checks at once; the other uploads wait."""
_RETRY_AFTER_SECONDS = 5
_LAST_WORDS_SECONDS = 2.0
"""For a child that sent nonsense to end by itself, so that the log has its exit status."""
_PARTS = ("header", "rows")
_HOW = "Expected multipart/form-data with the parts 'header' (table.json) and 'rows' (ranges.parquet)"

_NO_TRACES = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}

_places = threading.BoundedSemaphore(MAX_AT_ONCE)
_checks = threading.BoundedSemaphore(MAX_CHECKS)


async def receive_table(request: Request, service: Service) -> RangeTable:
    """The table in the body of a request, checked in every way. Raises ApiError for all that may be wrong with it."""
    limits = service.settings.limits
    service.catalog.upload_store()  # before a byte of the body is read
    with _a_place():
        async with _parts_of(request, limits) as (header, rows):
            table = await run_in_threadpool(check, header, rows, limits)
            await run_in_threadpool(check_model, table, service)
            return table


def check(header: IO[bytes], rows: IO[bytes], limits: Limits) -> RangeTable:
    """The table of these two files (with a file descriptor each). Raises ApiError 400 or 413 where it is not right."""
    with _checks, tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-m", "neuronlens.serving.check_upload", str(limits.upload_rows), str(header.fileno())],
            stdin=rows,
            stdout=subprocess.PIPE,
            stderr=complaints,
            pass_fds=[header.fileno()],
            env=_environment(),
            start_new_session=True,
        )
        # A child that hangs takes no CPU time, so its limit on CPU time does not end it.
        watch = threading.Timer(2 * cpu_seconds(limits.upload_rows), child.kill)
        watch.start()
        try:
            return _verdict(cast(IO[bytes], child.stdout))
        except _Silent as silence:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LAST_WORDS_SECONDS)
            complaints.seek(0)
            said = complaints.read()[-2_000:].decode(errors="replace")
            log.warning("an upload's check did not end", exit_status=child.returncode, said=said)
            raise ApiError(
                400,
                "The range table cannot be checked: reading it took too much memory or time, or failed. Write its "
                "Parquet file anew, with pyarrow or neuronlens, and send that.",
                code="bad_table",
            ) from silence
        finally:
            watch.cancel()
            child.kill()
            cast(IO[bytes], child.stdout).close()
            child.wait()


def check_model(table: RangeTable, service: Service) -> None:
    """Raise ApiError 409 where the numbers of a table hold for another model than the server's."""
    header = table.header
    facts = service.engine.facts if service.engine is not None else None
    known = {facts.config_hash} if facts is not None else service.catalog.config_hashes()
    if known and header.model.config_hash not in known:
        raise _wrong_model(
            f"its config_hash is {header.model.config_hash}, this server's {'models have' if facts is None else 'has'} "
            f"{', '.join(sorted(known))}"
        )
    if facts is None:
        return
    for hook_point in table.hook_points:
        width, expected = header.widths[hook_point], facts.widths.get(hook_point)
        if width != expected:
            raise _wrong_model(f"{hook_point} has {width} neurons, in the served model {expected or 'it is not there'}")
    for hook_point, layer in _sites(table):
        if layer not in facts.sites.get(hook_point, ()):
            there = ", ".join(map(str, facts.sites.get(hook_point, ()))) or "none"
            raise _wrong_model(f"it has ranges for {hook_point} in layer {layer}, the served model has layers {there}")


def _wrong_model(found: str) -> ApiError:
    return ApiError(
        409,
        f"The range table was made from another model than this server's: {found}. Send it to a server of its model, "
        "or make it again from this one.",
        code="wrong_model",
    )


def _sites(table: RangeTable) -> list[tuple[str, int]]:
    sites = table.rows.select(["hook_point", "layer"]).group_by(["hook_point", "layer"]).aggregate([])
    return sorted(zip(sites["hook_point"].to_pylist(), sites["layer"].to_pylist(), strict=True))


class _Silent(Exception):
    """The child ended without a verdict, or in the middle of one."""


def _verdict(out: IO[bytes]) -> RangeTable:
    try:
        verdict: dict[str, Any] = json.loads(out.readline())
        if verdict["status"] == 200:
            with pa.ipc.open_stream(out) as stream:
                rows = stream.read_all()
            rows.validate(full=True)
            header = TableHeader.model_validate(verdict["header"])
    except (ValueError, OSError, pa.ArrowException) as error:
        raise _Silent from error
    if verdict["status"] != 200:
        raise ApiError(verdict["status"], verdict["message"], code=verdict["code"])
    if rows.schema != header.schema_of_rows or rows.num_rows != header.rows:
        raise _Silent
    return RangeTable(header=header, rows=rows.combine_chunks())


async def _counted(request: Request, n_bytes: int) -> AsyncGenerator[bytes, None]:
    n_received = 0
    async for piece in request.stream():
        n_received += len(piece)
        if n_received > n_bytes:
            raise ApiError(413, f"The upload is larger than {n_bytes:,} bytes.", code="too_large")
        yield piece


def _as_file(part: UploadFile | str) -> IO[bytes]:
    """A part as a file that a child process can read from its start."""
    if isinstance(part, UploadFile):
        file = cast(IO[bytes], part.file)
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        file.write(part.encode(errors="replace"))
    file.flush()
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return file


def _environment() -> dict[str, str]:
    """What the child knows: no keys, one thread, and an allocator that takes no more addresses than it needs."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")}
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    here = str(Path(neuronlens.__file__).parent.parent)
    return {**kept, **one_thread, "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": here, **_NO_TRACES}


@contextlib.contextmanager
def _a_place() -> Iterator[None]:
    if not _places.acquire(blocking=False):
        raise ApiError(
            429,
            f"{MAX_AT_ONCE} range tables are being uploaded, and more are not taken at once. Send it again in "
            f"{_RETRY_AFTER_SECONDS} s.",
            code="too_many_uploads",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )
    try:
        yield
    finally:
        _places.release()


@contextlib.asynccontextmanager
async def _parts_of(request: Request, limits: Limits) -> AsyncIterator[tuple[IO[bytes], IO[bytes]]]:
    """The header and the rows of a request, as nameless files that are gone afterwards, whatever happens."""
    content_type = request.headers.get("content-type", "missing")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, f"The body's Content-Type is {content_type[:80]}. {_HOW}.", code="unsupported_media_type")
    parser = MultiPartParser(
        request.headers,
        _counted(request, limits.upload_bytes),
        max_files=2,
        max_fields=2,
        max_part_size=MAX_HEADER_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(
            400, f"The body cannot be read ({error.message.rstrip('.')}). {_HOW}.", code="bad_table"
        ) from error
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before all of the body had come.", code="bad_table") from error
    try:
        found = [name for name, _ in form.multi_items()]
        if sorted(found) != sorted(_PARTS):
            raise ApiError(
                400, f"The body has the parts {', '.join(map(repr, found)) or 'none'}. {_HOW}.", code="bad_table"
            )
        with contextlib.ExitStack() as files:
            opened = {name: files.enter_context(await run_in_threadpool(_as_file, form[name])) for name in _PARTS}
            n_header_bytes = os.fstat(opened["header"].fileno()).st_size
            if n_header_bytes > MAX_HEADER_BYTES:
                raise ApiError(
                    413,
                    f"The part 'header' has {n_header_bytes:,} bytes; a table.json may have {MAX_HEADER_BYTES:,}.",
                    code="too_large",
                )
            yield opened["header"], opened["rows"]
    finally:
        await form.close()
