"""What a client can read and what it has: Accept, Accept-Encoding and If-None-Match (RFC 9110, 12.5 and 13.1.2).

A header that cannot be read asks for nothing in particular: it is no reason to refuse an answer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

_ETAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def best_media_type(accept: str | None, offered: Sequence[str]) -> str | None:
    """The offered type that the client likes best, the first offered of equals; None where it takes none of them.

    The most specific range that fits a type decides how much it is liked; parameters other than q are ignored.
    """
    asked = dict(_weighted(accept or ""))
    if not asked:
        return offered[0]
    liked = {media_type: _quality(media_type, asked) for media_type in offered}
    best = max(offered, key=lambda media_type: liked[media_type])
    return best if liked[best] > 0 else None


def best_coding(accept_encoding: str | None, offered: Sequence[str], last_resort: Sequence[str]) -> str | None:
    """One of `offered`, best first, that the client names; else "identity"; None where it takes neither.

    `last_resort` are codings for the client that refuses identity. A coding is used only for a client that names it
    (or takes `*`), and does not like identity better.
    """
    asked = dict(_weighted(accept_encoding or ""))
    plain = asked.get("identity", 1.0 if asked.get("*", 1.0) > 0 else 0.0)
    wanted = offered if plain > 0 else (*offered, *(coding for coding in last_resort if coding not in offered))
    liked = {coding: asked.get(coding, asked.get("*", 0.0)) for coding in wanted}
    best = max(wanted, key=lambda coding: liked[coding], default=None)
    # Without a word on identity it is what remains when nothing better was named, not a wish of weight 1.
    if best is not None and liked[best] > 0 and liked[best] >= asked.get("identity", 0.0):
        return best
    return "identity" if plain > 0 else None


def has_already(if_none_match: str | None, etag: str) -> bool:
    """Does the client hold the representation of this strong ETag? Compared weakly, as a GET is. `*` is not looked
    at: see `has_any`."""
    return etag in _ETAG.findall(if_none_match or "")


def has_any(if_none_match: str | None) -> bool:
    """Does the client want nothing if there is any representation at all?"""
    return (if_none_match or "").strip() == "*"


def _quality(media_type: str, asked: Mapping[str, float]) -> float:
    for media_range in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
        if media_range in asked:
            return asked[media_range]
    return 0.0


def _weighted(header: str) -> Iterator[tuple[str, float]]:
    """The items of a list header with their q, without those that cannot be read."""
    for item in header.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        weights = [value.strip() for key, _, value in (p.partition("=") for p in parameters) if key.strip() == "q"]
        weight = _weight(weights[0]) if weights else 1.0
        if name and weight is not None:
            yield name, weight


def _weight(text: str) -> float | None:
    return float(text) if re.fullmatch(r"0(\.\d{0,3})?|1(\.0{0,3})?", text) else None
