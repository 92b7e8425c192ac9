"""A real S3 API on loopback (moto's) that counts what it serves and fails on demand, for processes that know only its
URL.

    with S3Server() as s3:
        s3.make_bucket("bucket")
        s3.fail(3, status=503, method="PUT", pattern=r"/commits/")
        subprocess.run([...], env=os.environ | s3.environment)
"""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import WSGIRequestHandler, make_server

REASONS = {500: "500 Internal Server Error", 503: "503 Service Unavailable", 403: "403 Forbidden"}
CODES = {500: "InternalError", 503: "ServiceUnavailable", 403: "AccessDenied"}


@dataclass(frozen=True)
class Request:
    """One request as it was answered."""

    method: str
    path: str
    status: int
    n_bytes: int


@dataclass
class Failure:
    """The next `times` requests that match are answered by `status`; with `after`, they are done all the same."""

    times: int
    status: int
    method: str
    pattern: str
    after: bool


@dataclass
class S3Server:
    """moto's S3 in a thread of this process. With `terse`, it does not say which condition failed, as others' do
    not."""

    terse: bool = False
    requests: list[Request] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "S3Server":
        S3FileSystem.clear_instance_cache()  # fsspec would go on asking a server of this process that is gone
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """What a person exports to work with it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )

    def copy(self, old: str, new: str) -> None:
        """Every object below s3://bucket/`old`/ also below s3://bucket/`new`/."""
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"{old}/"):
            for entry in page["Contents"]:
                target = new + entry["Key"].removeprefix(old)
                client.copy_object(Bucket="bucket", Key=target, CopySource={"Bucket": "bucket", "Key": entry["Key"]})

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def fail(self, times: int, *, status: int, method: str = "", pattern: str = "", after: bool = False) -> Failure:
        """Returned, so that a test can ask how many `times` are left."""
        failure = Failure(times, status, method, pattern, after)
        self.failures.append(failure)
        return failure

    def forget(self) -> None:
        """No failures, no requests, from now on."""
        with self._lock:
            self.requests.clear()
            self.failures.clear()

    def n_bytes_read(self, pattern: str = "") -> int:
        return sum(one.n_bytes for one in self.requests if one.method == "GET" and re.search(pattern, one.path))

    def _answer(self, environ, start_response) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        failure = self._due(method, path)
        if failure is not None and not failure.after:
            return self._refuse(environ, start_response, failure)
        answer: list[Any] = []
        body = b"".join(self._app(environ, lambda *given: answer.extend(given)))
        if failure is not None:
            return self._refuse(environ, start_response, failure)
        status, headers = answer[:2]
        if self.terse and status.startswith("412"):
            body = body.replace(b"<Condition>If-None-Match</Condition>", b"")
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        self._note(method, path, int(status.partition(" ")[0]), len(body))
        start_response(status, headers)
        return [body]

    def _refuse(self, environ, start_response, failure: Failure) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length and not failure.after:
            environ["wsgi.input"].read(length)
        self._note(environ["REQUEST_METHOD"], environ["PATH_INFO"], failure.status, 0)
        error = f"<?xml version='1.0'?><Error><Code>{CODES[failure.status]}</Code><Message>on demand</Message></Error>"
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else error.encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(REASONS[failure.status], headers)
        return [body]

    def _due(self, method: str, path: str) -> Failure | None:
        with self._lock:
            for failure in self.failures:
                if failure.times > 0 and failure.method in ("", method) and re.search(failure.pattern, path):
                    failure.times -= 1
                    return failure
        return None

    def _note(self, method: str, path: str, status: int, n_bytes: int) -> None:
        with self._lock:
            self.requests.append(Request(method, path, status, n_bytes))


class _Handler(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass
