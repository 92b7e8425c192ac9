"""Two stores beside each other: how far every neuron's values drifted, in units of what chance moves them, and whether
the same neurons stay salient.

    neuronlens diff STORE_A STORE_B

Halves of one data set, other data, another checkpoint: what kind of comparison it is, and what stands in its way, is
read from the two store.json. The numbers are sql/diff/*.sql.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import pyarrow as pa

from neuronlens.errors import UsageError
from neuronlens.query import connect, read_query, run_file, url_of
from neuronlens.remote import SharedFiles
from neuronlens.store import Store

BEYOND_2, BEYOND_3, MEDIAN_Z = 0.0455003, 0.0026998, 0.6744898
"""Of |z|, where nothing drifted: the shares above 2 and 3, and the median."""
FEW_VALUES = 100
"""Below so many values, a z is not yet normal: of skewed values, up to 7 % pass 1.96 by chance, more where one store
has ten times the other's (tests/neuronlens/test_diff.py)."""

_SHOWN = 12
_ABSOLUTE_METHODS = ("mean_abs", "mean")
"""Salience that looks at one concept alone; all other methods look at those beside it."""
_SAID_OTHERWISE = {
    *(
        "store_hash",
        "recipe",
        "versions",
        "created_at",
        "files",
        "format_version",
        "raw",
    ),  # decide nothing compared here
    *(
        "model",
        "tokenizer_hash",
        "dataset",
        "hook_points",
        "layers",
        "widths",
        "concepts",
    ),  # have sentences of their own
}
"""Keys of store.json whose difference needs no sentence of the form 'KEY differs'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two stores, read once: what store.json says, the receipts of its statistics, its files by kind."""

    name: Literal["A", "B"]
    store: Store
    description: Mapping[str, Any]
    receipts: Sequence[Mapping[str, Any]]
    files: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, name: Literal["A", "B"], store: Store) -> "Side":
        """Raises UsageError where there is no store, or one without statistics."""
        description, files = store.describe(), store.file_lists()
        if not files.get("moments") or not files.get("salience"):
            raise UsageError(
                f"{store.root} holds no statistics yet; expected moments and salience. Make them with "
                f"'python -m jobs.statistics {store.root}', or let its run go on."
            )
        return cls(name=name, store=store, description=description, receipts=store.receipts("statistics"), files=files)

    def get(self, section: str, key: str) -> Any:
        """An entry of a section of store.json, such as model.dtype."""
        return (self.description.get(section) or {}).get(key)

    def as_dict(self) -> dict[str, Any]:
        return {
            "store": self.store.root,
            "store_hash": self.description.get("store_hash"),
            "model": self.get("model", "id"),
            "dataset": self.get("dataset", "source"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On what terms two stores are compared: the kind of comparison, what weakens it, what stands in one store only."""

    kind: str
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two stores on one connection, found fit to be compared: use `compared` to get one.

    `con` has the views of A, moments_b, salience_b and samples_b of B, and `drift` (sql/diff/drift.sql).
    """

    a: Side
    b: Side
    con: duckdb.DuckDBPyConnection
    terms: Terms

    def drift(self, batch_rows: int = 65_536) -> pa.RecordBatchReader:
        """A row per hook point, layer, neuron and concept, streamed, in no order."""
        return self.con.view("drift").to_arrow_reader(batch_rows)

    def drift_groups(self) -> pa.Table:
        """A row per hook point, layer and concept, before them one of all, whose keys are NULL."""
        return run_file(self.con, "diff/drift_summary")

    def summary(self, *, top: int, salience: str, top_fraction: float) -> dict[str, Any]:
        """What `diff` returns, and how it raises."""
        overall, *groups = self.drift_groups().to_pylist()
        agreement = run_file(self.con, "diff/salience_agreement", top_fraction=top_fraction).to_pylist()
        _check_method(salience, agreement)
        changes = run_file(self.con, "diff/rank_changes", method=salience, top_fraction=top_fraction, top=top)
        return {
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
            "comparison": self.terms.kind,
            "warnings": [*self.terms.warnings, *_small_samples(overall)],
            "left_out": list(self.terms.left_out),
            "verdict": verdict(overall),
            "overall": {key: value for key, value in overall.items() if key not in ("hook_point", "layer", "concept")},
            "drift": groups,
            "largest": run_file(self.con, "diff/drift_largest", top=top).to_pylist(),
            "salience": agreement,
            "rank_changes": changes.to_pylist(),
        }


def diff(a: Store, b: Store, *, top: int = 20, salience: str = "mean_abs", top_fraction: float = 0.3) -> dict[str, Any]:
    """Everything that `neuronlens diff` says, as plain data: terms, verdict, drift by hook point, layer and concept,
    the `top` neurons, agreement of salience by every method, the `top` changes of rank by the method `salience`.

    Raises UsageError where the two cannot be compared: no statistics, nothing in common, other widths.
    """
    with compared(a, b) as comparison:
        return comparison.summary(top=top, salience=salience, top_fraction=top_fraction)


@contextlib.contextmanager
def compared(a: Store, b: Store) -> Iterator[Comparison]:
    """The comparison of two stores, open for questions. Raises UsageError as `diff` does."""
    first, second = Side.of("A", a), Side.of("B", b)
    with connect(first.files, fs=a.fs) as con:
        _attach(con, first, second)
        yield Comparison(a=first, b=second, con=con, terms=terms_of(con, first, second))


def _attach(con: duckdb.DuckDBPyConnection, a: Side, b: Side) -> None:
    """The views of B beside those of A, and `drift`."""
    _register(con, a.store, b.store)
    for kind in ("moments", "salience", "samples"):
        urls = [url_of(path, b.store.fs) for path in b.files.get(kind, [])]
        rows = con.read_parquet(urls) if urls else con.view(f"{kind}_files").limit(0)
        rows.create_view(f"{kind}_b")
    con.sql(read_query("diff/drift")).create_view("drift")


def _register(con: duckdb.DuckDBPyConnection, a: Store, b: Store) -> None:
    """Let DuckDB reach B's filesystem. It knows one for each protocol."""
    if b.is_local or b.fs is a.fs:
        return
    shared = _protocols(a) & _protocols(b)
    if shared:
        raise UsageError(
            f"{a.root} and {b.root} lie on two servers, both reached by {'/'.join(sorted(shared))}; expected one "
            "server, or two protocols. Copy one of the stores beside the other."
        )
    con.register_filesystem(SharedFiles(b.fs))


def _protocols(store: Store) -> set[str]:
    return {store.fs.protocol} if isinstance(store.fs.protocol, str) else set(store.fs.protocol)


# --- on what terms ---------------------------------------------------------------------------------------------------


def terms_of(con: duckdb.DuckDBPyConnection, a: Side, b: Side) -> Terms:
    """On what terms A and B are compared. Raises UsageError where they cannot be."""
    sites = run_file(con, "diff/sites").to_pylist()
    _check_common(sites, a, b)
    [texts] = run_file(con, "diff/shared_texts").to_pylist()
    warnings = [
        *_model_warnings(a, b),
        *_data_warnings(a, b, texts),
        *_setting_warnings(a, b),
        *_statistics_warnings(a, b),
        *_concept_warnings(sites),
    ]
    return Terms(kind=_kind(a, b, texts), warnings=tuple(warnings), left_out=tuple(_left_out(sites)))


def _check_common(sites: Sequence[Mapping[str, Any]], a: Side, b: Side) -> None:
    common = [site for site in sites if site["width_a"] and site["width_b"]]
    for site in common:
        if site["width_a"] != site["width_b"]:
            raise UsageError(
                f"{site['hook_point']} of layer {site['layer']} is {site['width_a']:,} neurons wide in {a.store.root} "
                f"and {site['width_b']:,} in {b.store.root}; expected one width: neurons of two such models have "
                "nothing in common but their numbers. Compare stores of one architecture."
            )
    if not common:
        raise UsageError(
            f"{a.store.root} and {b.store.root} have no hook point, layer and concept in common.\n"
            f"  A has {_contents(sites, 'a')}.\n  B has {_contents(sites, 'b')}.\n"
            "  Compare stores that share one of each at least."
        )


def _contents(sites: Sequence[Mapping[str, Any]], side: str) -> str:
    held = [site for site in sites if site[f"width_{side}"]]
    words = {"hook_point": "hook points", "layer": "layers", "concept": "concepts"}
    return "; ".join(f"{word} {_listed({site[key] for site in held})}" for key, word in words.items())


def _left_out(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each kind of thing that stands in one store only."""
    said = []
    held = {side: [site for site in sites if site[f"width_{side}"]] for side in "ab"}
    for key, word in (("hook_point", "hook point"), ("layer", "layer"), ("concept", "concept")):
        for side, other in ("ab", "ba"):
            only = {site[key] for site in held[side]} - {site[key] for site in held[other]}
            if only:
                said.append(f"{word}{'s' if len(only) > 1 else ''} {_listed(only)}: in {side.upper()} only")
    return said


def _kind(a: Side, b: Side, texts: Mapping[str, int]) -> str:
    if _same_run(a, b):
        return "The same run: A and B have one store hash. What differs comes from coverage or rounding."
    on = "on other texts" if texts["n_shared"] else "on other texts, none of which stands in both"
    if _alike(a, b, "dataset", "fingerprint"):
        on = "on the same texts"
    if _alike(a, b, "model", "weights_fingerprint"):
        return f"One model {on}."
    if _alike(a, b, "model", "config_hash"):
        return f"Two checkpoints of one architecture {on}."
    return f"Two models {on}."


def _same_run(a: Side, b: Side) -> bool:
    return bool(a.description.get("store_hash") == b.description.get("store_hash"))


def _alike(a: Side, b: Side, section: str, key: str) -> bool:
    return bool(a.get(section, key) == b.get(section, key))


def _model_warnings(a: Side, b: Side) -> list[str]:
    said = []
    if not _alike(a, b, "model", "config_hash"):
        said.append(
            f"the models' configs differ ({a.get('model', 'architecture')}, {b.get('model', 'architecture')}): neuron "
            "numbers name the same neuron only where one model was made from the other"
        )
    elif not _alike(a, b, "model", "weights_fingerprint"):
        said.append("the weights differ: these are two checkpoints, whose neurons are paired by their numbers")
    if a.description.get("tokenizer_hash") != b.description.get("tokenizer_hash"):
        said.append("the tokenizers differ: one text is other tokens in A than in B, and ends in another one")
    for key in ("dtype", "modules"):
        said += _differences(f"model.{key}", a.get("model", key), b.get("model", key))
    return said


def _data_warnings(a: Side, b: Side, texts: Mapping[str, int]) -> list[str]:
    said = []
    if not _alike(a, b, "dataset", "prompt"):
        prompts = f"{_short(a.get('dataset', 'prompt'))} in A, {_short(b.get('dataset', 'prompt'))} in B"
        said.append(f"the prompts differ: {prompts}; what drifts may be the prompt's")
    if texts["n_shared"] and not _same_run(a, b):
        said.append(
            f"{texts['n_shared']:,} of A's {texts['n_a']:,} texts stand in B too: z takes all as independent, and "
            "comes out too small"
        )
    if not _alike(a, b, "model", "weights_fingerprint") and texts["n_shared"] < texts["n_a"]:
        said.append("both weights and texts differ: what either of them moved cannot be told apart")
    return said


def _setting_warnings(a: Side, b: Side) -> list[str]:
    """Whatever else decides a store's content, also keys of a later format that only one of the two has."""
    keys = sorted({*a.description, *b.description} - _SAID_OTHERWISE)
    said = [line for key in keys for line in _differences(key, a.description.get(key), b.description.get(key))]
    said += [
        f"{side.name} holds a value for each token: those of one text depend on each other, the standard errors are "
        "too small and z too large"
        for side in (a, b)
        if side.description.get("unit") == "token"
    ]
    return said


def _differences(key: str, a: Any, b: Any) -> list[str]:
    """A line for each value that differs; of two sections, only for those of their keys that do."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for name in sorted({*a, *b}) for line in _differences(f"{key}.{name}", a.get(name), b.get(name))]
    return [] if a == b else [f"{key} differs: {_short(a)} in A, {_short(b)} in B"]


def _statistics_warnings(a: Side, b: Side) -> list[str]:
    said = []
    for side in (a, b):
        coverage = next((found for receipt in side.receipts if _is_partial(found := receipt.get("coverage", {}))), None)
        if coverage:
            said.append(
                f"{side.name} is partial: {coverage['n_shards']:,} of {coverage['n_planned_shards']:,} shards, "
                f"{coverage['n_samples']:,} of {coverage['n_planned_samples']:,} samples"
            )
    taus = [{receipt["tau"] for receipt in side.receipts if "tau" in receipt} for side in (a, b)]
    if taus[0] != taus[1]:
        said.append(
            f"tau differs: {_listed(taus[0])} in A, {_listed(taus[1])} in B; it decides ranges, nothing that is "
            "compared here"
        )
    return said


def _is_partial(coverage: Mapping[str, int]) -> bool:
    return coverage.get("n_shards") != coverage.get("n_planned_shards")


def _concept_warnings(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    concepts = {side: {site["concept"] for site in sites if site[f"width_{side}"]} for side in "ab"}
    if concepts["a"] == concepts["b"]:
        return []
    return [
        f"only {len(concepts['a'] & concepts['b'])} of {len(concepts['a'] | concepts['b'])} concepts stand in both: "
        f"all salience but {' and '.join(_ABSOLUTE_METHODS)} measures a concept against others in A than in B"
    ]


def _check_method(method: str, agreement: Sequence[Mapping[str, Any]]) -> None:
    held = sorted({row["method"] for row in agreement})
    if method not in held:
        raise UsageError(
            f"The two stores have no salience by {method!r} in common; they share {', '.join(held) or 'none'}. Choose "
            "another, or make the statistics of the older store again: python -m jobs.statistics STORE"
        )


def _small_samples(overall: Mapping[str, Any]) -> list[str]:
    if overall["min_n"] is None or overall["min_n"] >= FEW_VALUES:
        return []
    return [
        f"a concept has as few as {overall['min_n']:,} values: below {FEW_VALUES}, more than chance's {BEYOND_2:.2%} "
        "of |z| pass 2 though nothing moved"
    ]


# --- what came out ---------------------------------------------------------------------------------------------------


def verdict(overall: Mapping[str, Any]) -> list[str]:
    """What the summary of all neurons comes to: a sentence on means, a sentence on standard deviations.

    Neurons depend on each other, so that the share beyond 2 scatters around chance's more than a binomial would: up to
    twice of it counts as chance.
    """
    if not overall["n_compared"]:
        return ["Nothing is known: every neuron has fewer than two values in a store."]
    size = f"the median move is {overall['median_shift']:.2g} standard deviations"
    factor = f"the median change is by a factor of {overall['median_factor']:.3g}"
    return [
        _sentence("means", overall["mean_share_beyond_2"], overall["mean_median_z"], size),
        _sentence("standard deviations", overall["std_share_beyond_2"], overall["std_median_z"], factor),
    ]


def _sentence(what: str, share: float, median_z: float, size: str) -> str:
    moved = "drift no more than chance moves them" if share <= 2 * BEYOND_2 else "drift"
    return (
        f"The {what} {moved}: {share:.2%} have |z| > 2 (chance {BEYOND_2:.2%}), median |z| {median_z:.2f} (chance "
        f"{MEDIAN_Z:.2f}); {size}."
    )


def _listed(names: Any) -> str:
    shown = [str(name) for name in sorted(names)]
    more = f" and {len(shown) - _SHOWN:,} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more if shown else "none"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
