"""Range tables of a running server, from Python.

    client = neuronlens.Client("http://localhost:8000", api_key="...")
    client.table("latest").to_arrow(concept="joy", layers=[4, 5])
    client.publish("STORE/ranges/tbl_0123456789abcdef")

What did not change since it was last asked for comes from memory: the server answers 304. A server that is busy or
cannot be reached is asked again for a while.
"""

import json
import os
import random
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from neuronlens.errors import NeuronLensError, RunFailed, UsageError
from neuronlens.recent import Recent

if TYPE_CHECKING:
    import httpx
    import pyarrow as pa

    from neuronlens.ranges import RangeTable

KEY_VARIABLE, WRITE_KEY_VARIABLE = "NEURONLENS_API_KEY", "NEURONLENS_WRITE_KEY"
TIMEOUT_SECONDS = 60.0
MAX_TRIES = 5
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0
_PASSING_STATUSES = (429, 502, 503, 504)
_KEPT_BYTES = 256 << 20
_JSON, _ARROW = "application/json", "application/vnd.apache.arrow.stream"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_Params = tuple[tuple[str, str], ...]


class Client:
    """A connection to one server; threads may share it. Without `api_key`, the key is what NEURONLENS_API_KEY holds.

    Everything raises UsageError, with the server's own sentence, where the server says that the request is wrong (a
    table or concept that is not there, a key that may not), and RunFailed where it fails or cannot be reached.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        import httpx

        self.base_url, host = _checked_url(base_url)
        self._key = _checked_key(api_key or os.environ.get(KEY_VARIABLE))
        self._write_key = _checked_key(api_key or os.environ.get(WRITE_KEY_VARIABLE)) or self._key
        # zstd halves what has to travel, which pays wherever something travels. Arrow undoes it: httpx may not.
        coding = "identity" if host in _LOOPBACK else "zstd"
        self._http = httpx.Client(headers={"Accept-Encoding": coding}, timeout=timeout)
        self._kept: Recent[Hashable, _Answer] = Recent(_KEPT_BYTES, lambda answer: len(answer.body), keeps_newest=False)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def tables(self) -> list["RemoteTable"]:
        """All tables, newest first."""
        return [RemoteTable(self, facts) for facts in self._json("/v1/tables")["data"]]

    def table(self, id: str = "latest") -> "RemoteTable":
        """One table by its id; or the newest of now, which it stays when a newer one comes."""
        return RemoteTable(self, self._json(f"/v1/tables/{quote(id, safe='')}"))

    def neuron(self, hook_point: str, layer: int, neuron: int, tau: float | None = None) -> dict[str, Any]:
        """The card of a neuron: its moments, ranges and overlaps under every concept."""
        path = f"/v1/neurons/{quote(hook_point, safe='')}/{int(layer)}/{int(neuron)}"
        card: dict[str, Any] = self._json(path, () if tau is None else (("tau", repr(float(tau))),))
        return card

    def publish(self, table: "RangeTable | str | os.PathLike[str]") -> str:
        """Upload a range table, or the one in a folder; its id. A table that is there already is no error.

        Needs a key with the write scope. Without `api_key`, it is what NEURONLENS_WRITE_KEY holds, or else
        NEURONLENS_API_KEY.
        """
        from neuronlens.ranges import RangeTable

        if not isinstance(table, RangeTable):
            table = RangeTable.load(table)
        files = {
            "header": ("table.json", table.header_json(), _JSON),
            "rows": ("ranges.parquet", table.rows_parquet(), "application/vnd.apache.parquet"),
        }
        answer = self._ask("POST", "/v1/tables", key=self._write_key, files=files)
        return str(self._parsed(answer)["id"])

    # --- how ---------------------------------------------------------------------------------------------------------

    def _json(self, path: str, params: _Params = ()) -> Any:
        return self._parsed(self._content(path, params, _JSON))

    def _parsed(self, content: "bytes | _Answer") -> Any:
        try:
            return json.loads(content.body if isinstance(content, _Answer) else content)
        except ValueError as error:
            raise RunFailed(f"{self.base_url} answered with something that is not JSON: is it NeuronLens?") from error

    def _content(self, path: str, params: _Params, accept: str) -> bytes:
        """A body, from memory where the server says that it is still the same."""
        name = (path, params, accept)
        kept = self._kept.get(name)
        headers = {"Accept": accept, **({"If-None-Match": str(kept.etag)} if kept else {})}
        answer = self._ask("GET", path, key=self._key, params=params, headers=headers)
        if answer.status == 304 and kept is not None:
            return kept.body
        if answer.etag:
            self._kept.put(name, answer)
        return answer.body

    def _ask(
        self, method: str, path: str, *, key: str | None, headers: Mapping[str, str] | None = None, **options: Any
    ) -> "_Answer":
        """A success or a 304, whole. Tried again where the server is busy or out of reach: all requests may be sent
        twice."""
        headers = {**(headers or {}), **({"Authorization": f"Bearer {key}"} if key else {})}
        request = self._http.build_request(method, self.base_url + path, headers=headers, **options)
        n_tries, pause = 0, _FIRST_PAUSE_SECONDS
        while True:
            n_tries += 1
            outcome = self._try(request)
            if isinstance(outcome, _Answer) and (outcome.status < 300 or outcome.status == 304):
                return outcome
            if isinstance(outcome, _Answer) and outcome.status not in _PASSING_STATUSES:
                raise _refusal(self.base_url, outcome)
            if n_tries == MAX_TRIES:
                raise _failure(self.base_url, outcome)
            asked_for = outcome.retry_after_seconds if isinstance(outcome, _Answer) else 0.0
            time.sleep(min(_LONGEST_PAUSE_SECONDS, max(asked_for, pause * random.uniform(0.5, 1.0))))
            pause *= 2

    def _try(self, request: "httpx.Request") -> "_Answer | httpx.TransportError":
        """One exchange: what was answered, or what kept it from being answered in passing."""
        import httpx

        try:
            response = self._http.send(request, stream=True)
            try:
                body = b"".join(response.iter_raw())
            finally:
                response.close()
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise RunFailed(
                f"{self.base_url} did not answer within {self._http.timeout.read:g} s. Ask for less, or give "
                "Client a longer timeout."
            ) from error
        except httpx.TransportError as error:
            return error
        return _Answer.of(response, body)


class RemoteTable:
    """A range table on a server. Its rows come when they are asked for."""

    def __init__(self, client: Client, facts: Mapping[str, Any]) -> None:
        from pydantic import ValidationError

        from neuronlens.ranges import TableHeader

        self._client, self._facts = client, facts
        try:
            self.header = TableHeader.model_validate(facts["header"])
        except (ValidationError, KeyError) as error:
            raise RunFailed(
                f"{client.base_url} has a range table that this neuronlens cannot read ({error}). Update neuronlens."
            ) from error

    def __repr__(self) -> str:
        return f"<RemoteTable {self.id} of {self._client.base_url}>"

    @property
    def id(self) -> str:
        return self.header.id

    @property
    def concepts(self) -> tuple[str, ...]:
        """Sorted by name."""
        return tuple(self._detail["concepts"])

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Sorted by name."""
        return tuple(self._detail["hook_points"])

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending, over all hook points."""
        return tuple(self._detail["layers"])

    def to_arrow(
        self,
        concept: str | Iterable[str] | None = None,
        *,
        layers: Iterable[int] | None = None,
        hook_points: Iterable[str] | None = None,
        neurons: Iterable[int] | None = None,
        top_fraction: float | None = None,
    ) -> "pa.Table":
        """The rows of these concepts, layers, hook points and neurons (None: of all), of the most salient neurons, in
        the table's order: the columns of `neuronlens.ranges.SCHEMA`, or of PIECES_SCHEMA where the table's method is
        another than paper."""
        import pyarrow as pa

        asked: dict[str, list[Any] | None] = {
            "concept": [concept] if isinstance(concept, str) else _listed(concept),
            "layer": _listed(layers),
            "hook_point": _listed(hook_points),
            "neuron": _listed(neurons),
        }
        if any(values == [] for values in asked.values()):
            return self.header.schema_of_rows.empty_table()  # Over HTTP, no layer would be every layer.
        params = [(name, str(value)) for name, values in asked.items() for value in values or ()]
        if top_fraction is not None:
            params.append(("top_fraction", repr(float(top_fraction))))
        content = self._client._content(f"/v1/tables/{self.id}/data", tuple(params), _ARROW)
        try:
            with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
                return stream.read_all()
        except pa.ArrowInvalid as error:
            raise RunFailed(f"{self._client.base_url} sent rows that are no Arrow stream ({error}).") from error

    def to_pandas(self, concept: str | Iterable[str] | None = None, **filters: Any) -> Any:
        """As `to_arrow`, as a pandas DataFrame."""
        return self.to_arrow(concept, **filters).to_pandas()

    def download(self) -> "RangeTable":
        """The whole table, checked against its id: what `neuronlens.intervene` takes."""
        from neuronlens.ranges import RangeTable

        try:
            return RangeTable.of(self.header, self.to_arrow())
        except UsageError as error:
            raise RunFailed(f"What {self._client.base_url} sent is not range table {self.id}: {error}.") from error

    @cached_property
    def _detail(self) -> Mapping[str, Any]:
        if "concepts" in self._facts:
            return self._facts
        detail: Mapping[str, Any] = self._client._json(f"/v1/tables/{self.id}")
        return detail


def read_key(file: str | os.PathLike[str], *, scope: str = "read") -> str:
    """The key in a file: its only line, or the first of this scope in a file of `neuronlens serve`, where write
    includes read."""
    try:
        lines = [line.split() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The key in {file} cannot be read ({error}). Expected a text file with one key.") from error
    keys = list(_keys([words for words in lines if words and not words[0].startswith("#")], scope))
    if not keys:
        raise UsageError(
            f"{file} holds no key with the {scope} scope; expected one line with the key, or lines 'read KEY' and "
            "'write KEY'."
        )
    return keys[0]


def _keys(lines: Sequence[Sequence[str]], scope: str) -> Iterator[str]:
    if len(lines) == 1 and len(lines[0]) == 1:
        yield lines[0][0]
    for words in lines:
        if len(words) == 2 and words[0] in (scope, "write"):
            yield words[1]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server answered, without its content coding."""

    status: int
    body: bytes
    etag: str | None
    retry_after_seconds: float

    @classmethod
    def of(cls, response: "httpx.Response", body: bytes) -> "_Answer":
        retry_after = response.headers.get("Retry-After", "")
        return cls(
            response.status_code,
            _unpacked(body) if response.headers.get("Content-Encoding") == "zstd" else body,
            response.headers.get("ETag"),
            float(retry_after) if retry_after.isdecimal() else 0.0,
        )

    def sentence(self) -> str:
        """What the server says is wrong."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            text = self.body[:200].decode(errors="replace").strip()
            return f"it answered with status {self.status}{': ' if text else ''}{text}"


def _checked_url(url: str) -> tuple[str, str]:
    """The address without /v1 or a slash at its end, and the host in it."""
    parts = urlsplit(url)
    try:
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        is_right = False
    if not is_right or parts.query or parts.fragment:
        raise UsageError(f"{url!r} is not the address of a server; expected one such as http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/"), str(parts.hostname)


def _checked_key(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError("The API key cannot travel in a header; expected ASCII characters without spaces.")
    return key


def _refusal(base_url: str, answer: _Answer) -> NeuronLensError:
    said = f"{base_url}: {answer.sentence()}"
    if answer.status >= 500:
        return RunFailed(said)
    if answer.status == 401:
        said += f" Give one (api_key, --api-key-file), or set {KEY_VARIABLE}."
    if answer.status == 403:
        said += f" Give one that may (api_key, --api-key-file), or set {WRITE_KEY_VARIABLE}."
    return UsageError(said)


def _failure(base_url: str, outcome: "_Answer | httpx.TransportError") -> RunFailed:
    if isinstance(outcome, _Answer):
        return RunFailed(f"{base_url}: {outcome.sentence()} (It was asked {MAX_TRIES} times.)")
    return RunFailed(
        f"{base_url} cannot be reached ({outcome or type(outcome).__name__}); it was tried {MAX_TRIES} times. Does the "
        "server run there? 'neuronlens serve STORE' starts one."
    )


def _listed(values: Iterable[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _unpacked(content: bytes) -> bytes:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
        return bytes(stream.read())
