"""Range tables over HTTP: which there are, what is in them, their rows, and new ones.

    GET  /v1/tables                      the tables, newest first
    GET  /v1/tables/{id}                 one of them; its id may be `latest`
    GET  /v1/tables/{id}/concepts        how much of it belongs to each concept
    GET  /v1/tables/{id}/data            its rows, filtered, as JSON, Arrow or Parquet
    POST /v1/tables                      a new one

A table never changes, so all that is said of a named one may be kept for good; each answer has a strong ETag.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from neuronlens.serving.auth import may_read, may_write
from neuronlens.serving.catalog import LATEST, TableEntry
from neuronlens.serving.errors import ApiError, responses
from neuronlens.serving.logs import note
from neuronlens.serving.negotiation import best_coding, best_media_type, has_already, has_any
from neuronlens.serving.representations import CODINGS, FORMATS, ROWS_PER_PIECE, VERSIONS, Format, encoded
from neuronlens.serving.selection import Filters, TableIndex
from neuronlens.serving.service import service_of
from neuronlens.serving.table_models import (
    ConceptList,
    ConceptSummary,
    RangeList,
    TableDetail,
    TableList,
    TableSummary,
)
from neuronlens.serving.uploads import MAX_HEADER_BYTES, receive_table

router = APIRouter(tags=["tables"])

_FOR_GOOD = "private, max-age=31536000, immutable"
_ASK_AGAIN = "private, no-cache"
_MAX_LAYER = 2**15 - 1
_MAX_NEURON = 2**31 - 1


# --- which parameters there are --------------------------------------------------------------------------------------


def _only(*known: str, repeatable: tuple[str, ...] = ()) -> Callable[[Request], Awaitable[None]]:
    """A dependency that refuses query parameters that the route does not know, and those that came too often."""

    async def refuse(request: Request) -> None:
        given = [name for name, _ in request.query_params.multi_items()]
        expected = ", ".join((*repeatable, *known)) or "none"
        for name in given:
            if name not in (*known, *repeatable):
                raise ApiError(
                    400,
                    f"The query parameter {name[:80]!r} is not known. Expected: {expected}.",
                    code="unsupported_field",
                    param=name[:80],
                )
            if name in known and given.count(name) > 1:
                raise ApiError(
                    400,
                    f"The query parameter {name!r} came {given.count(name)} times; expected once.",
                    code="invalid_field",
                    param=name,
                )

    return refuse


async def _filters(
    hook_point: Annotated[list[str] | None, Query(description="Only at this hook point. Repeatable.")] = None,
    layer: Annotated[
        list[Annotated[int, Field(ge=0, le=_MAX_LAYER)]] | None, Query(description="Only in this layer. Repeatable.")
    ] = None,
    concept: Annotated[list[str] | None, Query(description="Only of this concept. Repeatable.")] = None,
    neuron: Annotated[
        list[Annotated[int, Field(ge=0, le=_MAX_NEURON)]] | None, Query(description="Only this neuron. Repeatable.")
    ] = None,
    top_fraction: Annotated[
        float | None,
        Query(gt=0, le=1, description="Only the most salient neurons: this share, at most the table's own."),
    ] = None,
    limit: Annotated[int | None, Query(ge=1, description="Only the first rows, in the table's order.")] = None,
) -> Filters:
    return Filters(
        hook_points=None if hook_point is None else tuple(hook_point),
        layers=None if layer is None else tuple(layer),
        concepts=None if concept is None else tuple(concept),
        neurons=None if neuron is None else tuple(neuron),
        top_fraction=top_fraction,
        limit=limit,
    )


_NOTHING = Depends(_only())
_DATA_PARAMETERS = Depends(
    _only("top_fraction", "limit", "format", repeatable=("hook_point", "layer", "concept", "neuron"))
)
_READ, _WRITE = Depends(may_read), Depends(may_write)

_HEADERS: dict[str, Any] = {
    "ETag": {"description": "Send it back as If-None-Match: 304 where nothing changed.", "schema": {"type": "string"}},
    "Cache-Control": {"description": "immutable for a named table.", "schema": {"type": "string"}},
}
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "What you have (If-None-Match) is still right.", "headers": _HEADERS}
}
_ROWS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The rows, in the format that Accept or `format` asks for.",
        "model": RangeList,
        "headers": _HEADERS,
        "content": {
            each.media_type: {"schema": {"type": "string", "format": "binary"}}
            for each in FORMATS
            if each.name != "json"
        },
    }
}
_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["header", "rows"],
                    "additionalProperties": False,
                    "properties": {
                        "header": {
                            "type": "string",
                            "format": "binary",
                            "description": f"table.json, at most {MAX_HEADER_BYTES:,} bytes",
                        },
                        "rows": {"type": "string", "format": "binary", "description": "ranges.parquet"},
                    },
                },
                "encoding": {
                    "header": {"contentType": "application/json"},
                    "rows": {"contentType": "application/vnd.apache.parquet"},
                },
            }
        },
    }
}


# --- routes ----------------------------------------------------------------------------------------------------------


@router.head("/v1/tables", dependencies=[_READ, _NOTHING], include_in_schema=False)
@router.get(
    "/v1/tables",
    summary="Which range tables are there?",
    dependencies=[_READ, _NOTHING],
    response_model=TableList,
    responses={200: {"headers": _HEADERS}, **_NOT_MODIFIED, **responses(400, 401)},
)
def list_tables(request: Request) -> Response:
    """All of them, newest first."""
    entries = service_of(request).catalog.entries()
    return _kept(request, TableList(data=[_summary(entry) for entry in entries]), _ASK_AGAIN)


@router.head("/v1/tables/{id}", dependencies=[_READ, _NOTHING], include_in_schema=False)
@router.get(
    "/v1/tables/{id}",
    summary="What does a range table hold?",
    dependencies=[_READ, _NOTHING],
    response_model=TableDetail,
    responses={200: {"headers": _HEADERS}, **_NOT_MODIFIED, **responses(400, 401, 404, 409, 503)},
)
def table(request: Request, id: str) -> Response:
    """Its header, and its concepts, layers and hook points. The id `latest` is the newest table's."""
    entry, index = _found(request, id)
    return _kept(request, _detail(entry, index), *_freshness(request, id, entry))


@router.head("/v1/tables/{id}/concepts", dependencies=[_READ, _NOTHING], include_in_schema=False)
@router.get(
    "/v1/tables/{id}/concepts",
    summary="Which concepts does it hold?",
    dependencies=[_READ, _NOTHING],
    response_model=ConceptList,
    responses={200: {"headers": _HEADERS}, **_NOT_MODIFIED, **responses(400, 401, 404, 409, 503)},
)
def concepts(request: Request, id: str) -> Response:
    """How many ranges it has of each concept, and in which layers."""
    entry, index = _found(request, id)
    found = [
        ConceptSummary(
            concept=each.concept, ranges=each.ranges, layers=list(each.layers), hook_points=list(each.hook_points)
        )
        for each in index.by_concept()
    ]
    return _kept(request, ConceptList(table=entry.id, data=found), *_freshness(request, id, entry))


@router.head("/v1/tables/{id}/data", dependencies=[_READ, _DATA_PARAMETERS], include_in_schema=False)
@router.get(
    "/v1/tables/{id}/data",
    summary="Its rows.",
    dependencies=[_READ, _DATA_PARAMETERS],
    response_model=None,
    responses={**_ROWS_ANSWER, **_NOT_MODIFIED, **responses(400, 401, 404, 406, 409, 503)},
)
def data(
    request: Request,
    id: str,
    filters: Annotated[Filters, Depends(_filters)],
    format: Annotated[
        Literal["json", "arrow", "parquet"] | None, Query(description="In place of an Accept header.")
    ] = None,
) -> Response:
    """The rows that fit every filter: as JSON, as an Arrow IPC stream (`application/vnd.apache.arrow.stream`) or as
    Parquet (`application/vnd.apache.parquet`), by Accept or `format`; streamed, and compressed with zstd or gzip where
    the client takes it and it pays. None may fit: a neuron that is salient for nothing has no range."""
    written = _format(request, format)
    coding = _coding(request, written)
    catalog = service_of(request).catalog
    # The newest must be whole before its name stands for it; a named one that the client has need not be read.
    entry = _found(request, id)[0] if id == LATEST else catalog.entry(id)
    note(request, table=entry.id)
    cache_control, location = _freshness(request, id, entry)
    etag = _etag(f"{entry.id} {filters.digest()} {written.name} {coding} {VERSIONS}")
    headers = {
        "ETag": etag,
        "Cache-Control": cache_control,
        "Vary": "Accept, Accept-Encoding",
        **({"Content-Location": location} if location else {}),
    }
    if has_already(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    rows = catalog.index(entry.id).select(filters)
    if has_any(request.headers.get("if-none-match")):
        return Response(status_code=304, headers=headers)
    if coding != "identity":
        headers["Content-Encoding"] = coding
    pieces = encoded(written.write(rows, entry.id), coding) if request.method == "GET" else iter(())
    if request.method == "GET" and rows.num_rows <= ROWS_PER_PIECE:
        return Response(b"".join(pieces), headers=headers, media_type=written.media_type)
    return StreamingResponse(pieces, headers=headers, media_type=written.media_type)


@router.post(
    "/v1/tables",
    summary="Upload a range table.",
    dependencies=[_WRITE, _NOTHING],
    status_code=201,
    response_model=TableDetail,
    responses={
        200: {"model": TableDetail, "description": "It was there already."},
        201: {"headers": {"Location": {"description": "Where it is now.", "schema": {"type": "string"}}}},
        **responses(400, 401, 403, 408, 409, 413, 415, 429, 503),
    },
    openapi_extra=_UPLOAD_BODY,
)
async def upload(request: Request) -> Response:
    """Two parts, `header` and `rows`: the files of the table's folder, as in
    `curl -F header=@table.json -F rows=@ranges.parquet`. Checked against the format, the served model and its own id,
    which is a hash of its content, before it is kept: whole, or not at all. The same table again is no error."""
    service = service_of(request)
    table = await receive_table(request, service)
    note(request, table=table.id)
    entry, created = await run_in_threadpool(service.catalog.add, table)
    index = await run_in_threadpool(service.catalog.index, entry.id)
    body = _detail(entry, index).model_dump_json()
    location = f"{request.scope.get('root_path', '')}/v1/tables/{entry.id}"
    return Response(body, 201 if created else 200, {"Location": location}, "application/json")


# --- how -------------------------------------------------------------------------------------------------------------


def _found(request: Request, table_id: str) -> tuple[TableEntry, TableIndex]:
    catalog = service_of(request).catalog
    index = catalog.index(table_id)
    note(request, table=index.table.id)
    return catalog.entry(index.table.id), index


def _summary(entry: TableEntry) -> TableSummary:
    return TableSummary(id=entry.id, created=int(entry.created.timestamp()), header=entry.header)


def _detail(entry: TableEntry, index: TableIndex) -> TableDetail:
    return TableDetail(
        id=entry.id,
        created=int(entry.created.timestamp()),
        header=entry.header,
        concepts=list(index.concepts),
        layers=list(index.layers),
        hook_points=list(index.hook_points),
    )


def _freshness(request: Request, asked: str, entry: TableEntry) -> tuple[str, str | None]:
    """Cache-Control and Content-Location: what is said of a named table holds for good, the newest is another one
    tomorrow."""
    if asked != LATEST:
        return _FOR_GOOD, None
    root = request.scope.get("root_path", "")
    rest = request.url.path.removeprefix(root).removeprefix(f"/v1/tables/{LATEST}")
    query = f"?{request.url.query}" if request.url.query else ""
    return _ASK_AGAIN, f"{quote(root)}/v1/tables/{entry.id}{rest}{query}"


def _kept(request: Request, content: BaseModel, cache_control: str, location: str | None = None) -> Response:
    """A small JSON answer with an ETag; 304 where the client has it."""
    body = content.model_dump_json()
    headers = {"ETag": _etag(body), "Cache-Control": cache_control}
    if location:
        headers["Content-Location"] = location
    if_none_match = request.headers.get("if-none-match")
    if has_already(if_none_match, headers["ETag"]) or has_any(if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def _etag(content: str) -> str:
    return f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'


def _format(request: Request, asked: str | None) -> Format:
    if asked is not None:
        return next(each for each in FORMATS if each.name == asked)
    accept = ", ".join(request.headers.getlist("accept"))
    offered = [each.media_type for each in FORMATS]
    best = best_media_type(accept, offered)
    if best is None:
        raise ApiError(
            406,
            f"None of {accept[:200]!r} is offered. Offered: {', '.join(offered)}; or say ?format= "
            f"{', '.join(each.name for each in FORMATS)}.",
            code="not_acceptable",
            param="Accept",
        )
    return next(each for each in FORMATS if each.media_type == best)


def _coding(request: Request, written: Format) -> str:
    accept_encoding = ", ".join(request.headers.getlist("accept-encoding"))
    best = best_coding(accept_encoding, written.codings, last_resort=CODINGS)
    if best is None:
        raise ApiError(
            406,
            f"No content coding of {accept_encoding[:200]!r} is offered. Offered: {', '.join(CODINGS)}, identity.",
            code="not_acceptable",
            param="Accept-Encoding",
        )
    return best
