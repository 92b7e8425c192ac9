"""Content negotiation, against the examples and the words of RFC 9110."""

import pytest

from neuronlens.serving.negotiation import best_coding, best_media_type, has_already, has_any

JSON, ARROW, PARQUET = "application/json", "application/vnd.apache.arrow.stream", "application/vnd.apache.parquet"
OFFERED = (JSON, ARROW, PARQUET)


@pytest.mark.parametrize(
    ("accept", "best"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (ARROW, ARROW),
        (ARROW.upper(), ARROW),
        (f"{ARROW};q=0.5, {PARQUET}", PARQUET),
        (f"{PARQUET};q=0.5,{ARROW};q=0.5", ARROW),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),
        (f"{JSON};q=0, */*;q=0.1", ARROW),
        (f"application/*;q=0.2, {PARQUET};q=0.3, */*", PARQUET),
        (f"{JSON};charset=utf-8", JSON),
        (f"{JSON}; q=0.001 , {ARROW} ; q = 0.002", ARROW),
        ("text/csv", None),
        ("text/*;q=1", None),
        ("*/*;q=0", None),
        (f"{ARROW};q=2, {PARQUET}", PARQUET),
        (f"{ARROW};q=nan, {PARQUET};q=1e9", JSON),
        (",,;;,", JSON),
    ],
)
def test_best_media_type__is_what_the_client_likes_best(accept: str | None, best: str | None) -> None:
    assert best_media_type(accept, OFFERED) == best


@pytest.mark.parametrize(
    ("accept_encoding", "offered", "best"),
    [
        (None, ["zstd", "gzip"], "identity"),
        ("", ["zstd", "gzip"], "identity"),
        ("gzip, deflate, br, zstd", ["zstd", "gzip"], "zstd"),
        ("gzip, deflate", ["zstd", "gzip"], "gzip"),
        ("gzip;q=1.0, zstd;q=0.5", ["zstd", "gzip"], "gzip"),
        ("gzip", ["zstd"], "identity"),
        ("*", ["zstd"], "zstd"),
        ("*;q=0.5, zstd;q=0", ["zstd"], "identity"),
        ("identity, gzip;q=0.5", ["gzip"], "identity"),
        ("gzip", [], "identity"),
        ("gzip, identity;q=0", [], "gzip"),
        ("zstd;q=0.1, *;q=0", ["zstd"], "zstd"),
        ("br, identity;q=0", ["zstd"], None),
        ("*;q=0", ["zstd"], None),
    ],
)
def test_best_coding__is_one_that_the_client_names(accept_encoding: str | None, offered: list[str], best) -> None:
    assert best_coding(accept_encoding, offered, last_resort=("zstd", "gzip")) == best


@pytest.mark.parametrize(
    ("header", "holds"),
    [
        (None, False),
        ('"a"', True),
        ('W/"a"', True),
        ('"b", W/"a" ,"c"', True),
        ('"b","a,c"', False),
        ("a", False),
        ('"A"', False),
        ("*", False),
    ],
)
def test_has_already__compares_weakly(header: str | None, holds: bool) -> None:
    assert has_already(header, '"a"') is holds


def test_has_any__is_the_star_alone() -> None:
    assert [has_any(header) for header in ("*", " * ", '"*"', "*, *", None)] == [True, True, False, False, False]
