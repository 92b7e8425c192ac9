"""Who may ask: bearer keys, of which some may also upload.

    # keys.txt, for --api-key-file: a scope and a key on each line; write includes read
    read  nl-3f9a6c01b7d24e58
    write nl-b80c5512e4a94f7d

A route declares what it needs with `Depends(may_read)` or `Depends(may_write)`. Without any key everyone may read and
nobody may write.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Scope

from neuronlens.errors import UsageError
from neuronlens.serving.errors import ApiError
from neuronlens.serving.logs import note
from neuronlens.serving.service import service_of

KeyScope = Literal["read", "write"]

MIN_KEY_CHARACTERS = 16
READ_VARIABLE, WRITE_VARIABLE = "NEURONLENS_API_KEY", "NEURONLENS_WRITE_KEY"
_MAX_HEADER_BYTES = 1024
_OTHERS_MAY_READ = 0o004
_A_GOOD_KEY = "A good one: openssl rand -hex 24"
_BEARER = HTTPBearer(
    auto_error=False, scheme_name="key", description="A key of the server. Uploads need one with the write scope."
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `name` is safe to log: the first digits of the key's SHA-256, or anonymous."""

    name: str
    may_write: bool


_ANYONE = Caller("anonymous", may_write=False)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a server, as SHA-256 digests with their scopes. Empty: no key is asked for."""

    scopes: tuple[tuple[bytes, KeyScope], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.scopes)

    @classmethod
    def of(cls, keys: Iterable[tuple[KeyScope, str]]) -> "Keys":
        """From scopes and keys. Raises UsageError where a key cannot be one, or comes twice."""
        found: dict[bytes, KeyScope] = {}
        for scope, key in keys:
            _check_key(key, "A key")
            digest = _digest(key.encode())
            if digest in found:
                raise UsageError("A key comes twice; expected each key once: write includes read.")
            found[digest] = scope
        return cls(tuple(found.items()))

    @classmethod
    def load(cls, file: Path | None, environ: Mapping[str, str], warn: Callable[[str], None]) -> "Keys":
        """From a file, if one is given, and from the environment. `warn` gets a sentence where others may read it."""
        keys = list(_read(file, warn)) if file is not None else []
        variables: tuple[tuple[KeyScope, str], ...] = (("read", READ_VARIABLE), ("write", WRITE_VARIABLE))
        for scope, variable in variables:
            if key := environ.get(variable):
                _check_key(key, f"The key in {variable}")
                keys.append((scope, key))
        return cls.of(dict.fromkeys(keys))

    def caller(self, authorization: bytes | None) -> Caller:
        """Who sent this Authorization header. Raises ApiError 401 where there are keys and it holds none of them.

        Every key is compared, in constant time: how long it takes says nothing about the keys.
        """
        if not self.scopes:
            return _ANYONE
        scheme, _, key = (authorization or b"")[: _MAX_HEADER_BYTES + 1].partition(b" ")
        if scheme.lower() != b"bearer":
            raise ApiError(
                401, "This server asks for a key. Send it as 'Authorization: Bearer KEY'.", code="missing_api_key"
            )
        digest, scope = _digest(key.strip()), None
        for known, granted in self.scopes:
            if hmac.compare_digest(known, digest):
                scope = granted
        if scope is None:
            raise ApiError(401, "The key is none of this server's.", code="invalid_api_key")
        return Caller(digest.hex()[:8], may_write=scope == "write")


def authorization_of(scope: Scope) -> bytes | None:
    """The Authorization header of an ASGI request, as it came."""
    headers = cast(list[tuple[bytes, bytes]], scope["headers"])
    return next((value for name, value in headers if name == b"authorization"), None)


async def may_read(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None
) -> Caller:
    """The dependency of a route that reads, or generates. 401 without a key of this server, where it has any."""
    caller = service_of(request).keys.caller(authorization_of(request.scope))
    note(request, caller=caller.name)
    return caller


async def may_write(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None
) -> Caller:
    """The dependency of a route that writes: 401 without a key, 403 with one that only reads."""
    caller = await may_read(request)
    if caller.may_write:
        return caller
    if caller is _ANYONE:
        message = "Uploads need a key with the write scope, and this server has no keys; start it with --api-key-file."
    else:
        message = "This key may read only. Uploads need a key with the write scope."
    raise ApiError(403, message, code="write_scope_needed")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(file: Path, warn: Callable[[str], None]) -> Iterable[tuple[KeyScope, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.stat().st_mode & _OTHERS_MAY_READ:
            warn(f"Everyone on this machine may read the keys in {file}; expected only its owner: chmod 600 {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The keys in {file} cannot be read ({getattr(error, 'strerror', None) or error}). Expected a text file "
            "with a line 'read KEY' or 'write KEY' for each key."
        ) from error
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # The line itself is not shown: it may hold a key.
        if len(words) != 2 or words[0] not in ("read", "write"):
            raise UsageError(
                f"Line {number} of {file} is not of the form 'read KEY' or 'write KEY'. Start comments with #."
            )
        scope, key = words
        _check_key(key, f"The key in line {number} of {file}")
        if key in line_of:
            raise UsageError(
                f"Line {number} of {file} repeats the key of line {line_of[key]}; expected each key once: write "
                "includes read."
            )
        line_of[key] = number
        yield cast(KeyScope, scope), key
    if not line_of:
        raise UsageError(f"{file} holds no key. Expected a line 'read KEY' or 'write KEY' for each key.")


def _check_key(key: str, what: str) -> None:
    if len(key) < MIN_KEY_CHARACTERS:
        raise UsageError(f"{what} has {len(key)} characters, expected at least {MIN_KEY_CHARACTERS}. {_A_GOOD_KEY}")
    if not (key.isascii() and key.isprintable()) or " " in key or len(key) > _MAX_HEADER_BYTES // 2:
        raise UsageError(
            f"{what} cannot travel in a header; expected at most {_MAX_HEADER_BYTES // 2} ASCII characters without "
            f"spaces. {_A_GOOD_KEY}"
        )
