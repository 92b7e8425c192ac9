"""docs/sql.md: every question of the cookbook is asked as printed, and its whole answer compared with one worked out
here in numpy and scipy from the values that the store was made of. The reference is what an open store says of itself.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

import neuronlens
from neuronlens.lens import Lens, view_script
from neuronlens.ranges import PIECES_SCHEMA, SCHEMA
from neuronlens.store import Store
from tests.range_tables import pieces
from tests.synthetic_store import Shard, add_statistics, bin_span, bins_of, moments_of, write, write_store

PAGE = Path(__file__).parents[2] / "docs" / "sql.md"
CONCEPTS = ("anger", "fear", "joy", "love")
PLANNED_ONLY = "surprise"
"""A concept of which no shard was committed."""
N_LAYERS, WIDTH = 3, 21
TEXTS_OF_SHARD = (78, 77, 80)
"""Of each concept; sums are odd, so that no quantile falls between two values."""
UNCOMMITTED = 11
"""The last shard of love: planned and collected, but without a receipt."""
UNANSWERED = 8
"""The last shard of joy: nobody recorded what the model answered."""
DRIFTING = 5
"""The last shard of fear: all its values lie higher."""
RAISED_BY_LENGTH, RAISED_BY_ERRORS, WITH_NONFINITE = 8, 9, 10
TWO_BUMPS, HEAVY_TAILS = (3, 14, 16), (4, 15, 17)
STRANGERS = ((7, "love", 25), (12, "anger", 6), (13, "fear", 12), (13, "anger", 20), (13, "love", 25))
"""In layer 2, neuron by neuron: every so many texts of another concept have a value from the midst of joy's."""
TAU = 2.5

Rows = list[tuple[Any, ...]]


# --- the page ---


def _section(title: str) -> str:
    return re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[_titles().index(title) + 1]


def _titles() -> list[str]:
    return re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


@cache
def _questions() -> dict[str, str]:
    """The one query under each heading of the cookbook."""
    parts = re.split(r"^#### (.*)$", _section("Cookbook"), flags=re.MULTILINE)[1:]
    queries = [re.findall(r"```sql\n(.*?)```", text, flags=re.DOTALL) for text in parts[1::2]]
    assert [len(found) for found in queries] == [1] * len(queries)
    return {question: query for question, [query] in zip(parts[::2], queries, strict=True)}


# --- the data ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """All texts of the run, S of them, in the order of their numbers; x_LSN holds their values."""

    x_LSN: np.ndarray
    concept_S: np.ndarray
    shard_S: np.ndarray
    n_tokens_S: np.ndarray
    answer_S: list[tuple[str | None, bool, float | None] | None]

    @property
    def counts_S(self) -> np.ndarray:
        return self.shard_S != UNCOMMITTED


@cache
def _texts() -> Texts:
    rng = np.random.default_rng(20)
    shard_S = np.repeat(np.arange(len(CONCEPTS) * 3), TEXTS_OF_SHARD * len(CONCEPTS))
    concept_S = np.array(CONCEPTS)[shard_S // 3]
    n_texts = len(shard_S)
    n_tokens_S = rng.integers(6, 40, n_texts)
    answer_S = [_answer(rng, concept, shard) for concept, shard in zip(concept_S, shard_S, strict=True)]

    centre_CLN = rng.normal(size=(len(CONCEPTS), N_LAYERS, WIDTH)) * np.array([0.3, 1.5, 0.8])[:, None]
    centre_CLN[:, :, 3:5] = 0.4
    centre_CLN[:, 2, 5:8] = [[-3, 4, 0.1], [-1, 4.5, -0.1], [1, 5, 5], [3, 0.2, 0]]
    centre_CLN[:, 2, 12:14] = [[0, 0], [0, 0], [-5, -6], [0, 0]]
    noise_LSN = rng.normal(size=(N_LAYERS, n_texts, WIDTH))
    noise_LSN[:, :, 5:8] *= 0.5
    noise_LSN[..., 11] = rng.exponential(size=(N_LAYERS, n_texts))
    for neuron in TWO_BUMPS:
        noise_LSN[..., neuron] = rng.choice([-1, 1], (N_LAYERS, n_texts)) + 0.2 * noise_LSN[..., neuron]
    for neuron in HEAVY_TAILS:
        noise_LSN[..., neuron] = rng.standard_t(3, (N_LAYERS, n_texts))
    noise_LSN[..., 18] = 4 * rng.beta(0.8, 0.8, (N_LAYERS, n_texts))  # two bumps, barely
    x_LSN = centre_CLN[shard_S // 3].transpose(1, 0, 2) + noise_LSN
    x_LSN[..., RAISED_BY_LENGTH] += 0.1 * n_tokens_S
    x_LSN[..., RAISED_BY_ERRORS] += [1.5 * (answer is not None and not answer[1]) for answer in answer_S]
    for neuron, stranger, every in STRANGERS:
        x_LSN[2, np.flatnonzero(concept_S == stranger)[::every], neuron] = centre_CLN[2, 2, neuron]
    x_LSN[:, shard_S == DRIFTING] += 0.8
    x_LSN[..., :3] = [0.0, 0.25, 1e-6]
    x_LSN[..., 2] *= noise_LSN[..., 2]
    x_LSN[1, ::40, WITH_NONFINITE] = np.nan
    x_LSN[2, 7::50, WITH_NONFINITE] = np.inf
    x_LSN[2, 7, 5:10] = np.nan  # a text of which little is known
    x_LSN[2, shard_S == 3, WITH_NONFINITE] = np.inf  # a shard of which nothing is known
    return Texts(
        x_LSN=x_LSN.astype(np.float32), concept_S=concept_S, shard_S=shard_S, n_tokens_S=n_tokens_S, answer_S=answer_S
    )


def _answer(rng: np.random.Generator, concept: str, shard: int) -> tuple[str | None, bool, float | None] | None:
    """What the model answers: now and then another concept, a token that is no concept's, or nothing that is finite."""
    if shard == UNANSWERED:
        return None
    chance = rng.random()
    if chance < 0.02:
        return None, False, None
    if chance < 0.25:
        return str(rng.choice([other for other in CONCEPTS if other != concept])), False, float(0.4 * rng.random())
    return concept, bool(chance > 0.32), float(0.4 + 0.6 * rng.random())


def _shards(texts: Texts) -> list[Shard]:
    found = []
    for number in range(texts.shard_S.max() + 1):
        here_S = texts.shard_S == number
        answers = [answer for answer, here in zip(texts.answer_S, here_S, strict=True) if here]
        found.append(
            Shard(
                concept=str(texts.concept_S[here_S][0]),
                x_LSN=texts.x_LSN[:, here_S],
                n_tokens_S=texts.n_tokens_S[here_S],
                answers=None if number == UNANSWERED else [answer for answer in answers if answer is not None],
            )
        )
    nothing = Shard(concept=PLANNED_ONLY, x_LSN=np.zeros((N_LAYERS, 5, WIDTH), np.float32))
    return [*found, nothing]


PIECES = [
    # neuron of layer 0, pieces for joy, pieces for love
    (8, [(-3.0, -1.0, 0.5), (1.0, 3.0, 0.5)], [(-0.75, 0.5, 0.75), (3.25, 4.0, 0.5)]),
    (9, [(-3.0, -1.0, 0.5), (1.0, 3.0, 0.5)], [(-0.5, 0.5, 0.75), (2.0, 4.0, 0.5)]),
]
"""A third table's, of another method than paper: those of neuron 9 touch."""
RANGES = [
    # table, layer, neuron, concept, mean, std
    ("tbl_00000000000000aa", 1, 12, "joy", 2.0, 0.25),
    ("tbl_00000000000000aa", 1, 12, "love", 0.5, 0.25),
    ("tbl_00000000000000aa", 2, 5, "joy", 1.0, 0.25),
    ("tbl_00000000000000aa", 2, 5, "love", 3.0, 0.25),
    ("tbl_00000000000000aa", 2, 5, "fear", -9.0, 0.25),
    ("tbl_00000000000000aa", 2, 6, "joy", 5.0, 0.5),
    ("tbl_00000000000000aa", 2, 6, "love", 4.0, 0.5),
    ("tbl_00000000000000aa", 2, 7, "joy", 5.0, 0.5),
    ("tbl_00000000000000bb", 2, 5, "joy", 1.0, 0.25),
    ("tbl_00000000000000bb", 2, 5, "love", 2.0, 0.125),
    ("tbl_00000000000000bb", 2, 7, "love", 0.0, 0.5),
]

EVALUATIONS: list[dict[str, Any]] = [
    # a file each: the edit, and per concept and condition target accuracy, complement accuracy, perplexity
    {
        "table": "tbl_00000000000000aa",
        "edit": {"action": "zero"},
        "rows": {
            ("joy", "base"): (0.9, 0.95, 2.5),
            ("joy", "neuron"): (0.5, 0.6, 3.5),
            ("joy", "range"): (0.45, 0.93, 2.75),
            ("love", "base"): (0.8, 0.97, 2.6),
            ("love", "neuron"): (0.3, 0.5, 3.9),
            ("love", "range"): (0.35, 0.9, 2.8),
        },
    },
    {
        "table": "tbl_00000000000000aa",
        "edit": {"action": "dampen", "factor": 0.2, "layers": [1, 2]},
        "rows": {
            ("joy", "base"): (0.9, 0.95, None),
            ("joy", "neuron"): (0.7, 0.8, None),
            ("joy", "range"): (0.8, 0.95, None),
        },
    },
    {
        "table": "tbl_00000000000000aa",
        "edit": {"action": "dampen", "factor": 0.2, "layers": [2]},
        "rows": {("joy", "base"): (0.9, 0.95, 2.5), ("joy", "range"): (0.6, 0.85, 2.6)},
    },
]


def _add_tables(root: Path) -> None:
    for table_id in sorted({row[0] for row in RANGES}):
        rows = [
            {"hook_point": "mlp_post", "layer": layer, "neuron": neuron, "concept": concept, "n": 100}
            | {"mean": mean, "std": std, "mean_abs": abs(mean), "salience": abs(mean), "rank": 1}
            | {"lower": mean - TAU * std, "upper": mean + TAU * std}
            for table, layer, neuron, concept, mean, std in RANGES
            if table == table_id
        ]
        _write_table(root, table_id, pa.Table.from_pylist(rows, schema=SCHEMA))
    rows = [r for neuron, joy, love in PIECES for r in (*pieces("joy", neuron, joy), *pieces("love", neuron, love))]
    _write_table(root, "tbl_00000000000000cc", pa.Table.from_pylist(rows, schema=PIECES_SCHEMA))


def _write_table(root: Path, table_id: str, rows: pa.Table) -> None:
    write(root / "ranges" / table_id / "ranges.parquet", [rows])
    (root / "ranges" / table_id / "table.json").write_text(json.dumps({"id": table_id}))


def _add_evaluations(root: Path) -> None:
    (root / "evaluations").mkdir()
    for number, evaluation in enumerate(EVALUATIONS):
        rows = [
            {"concept": concept, "condition": condition}
            | {"target_accuracy": target, "complement_accuracy": complement, "perplexity": perplexity}
            for (concept, condition), (target, complement, perplexity) in evaluation["rows"].items()
        ]
        content = {"table": evaluation["table"], "n_texts": 900, "edit": evaluation["edit"], "rows": rows}
        (root / "evaluations" / f"{evaluation['table']}.{number}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("cookbook") / "store"
    write_store(root, _shards(_texts()))
    for shard in (UNCOMMITTED, UNCOMMITTED + 1):
        (root / "commits" / f"shard-{shard:05d}.json").unlink()
    _add_tables(root)
    _add_evaluations(root)
    return add_statistics(root)


@pytest.fixture(scope="module")
def lens(store: Store) -> Iterable[Lens]:
    with neuronlens.open(store) as lens:
        yield lens


@pytest.fixture(scope="module")
def plain(store: Store) -> Iterable[duckdb.DuckDBPyConnection]:
    """A session that knows nothing of this package but its script."""
    with duckdb.connect() as con:
        con.execute(view_script(store))
        yield con


# --- arithmetic of its own ---


def _values(concept: str, layer: int, neuron: int, where_S: np.ndarray | None = None) -> np.ndarray:
    """The finite values that count, float32."""
    texts = _texts()
    kept_S = texts.counts_S & (texts.concept_S == concept)
    x = texts.x_LSN[layer, kept_S if where_S is None else kept_S & where_S, neuron]
    return x[np.isfinite(x)]


@cache
def _moments(concept: str, layer: int, neuron: int) -> dict[str, Any]:
    return moments_of(_values(concept, layer, neuron))


def _sites() -> Iterable[tuple[int, int]]:
    return ((layer, neuron) for layer in range(N_LAYERS) for neuron in range(WIDTH))


def _ovl(a: np.ndarray, b: np.ndarray) -> np.float32:
    bins_a, bins_b = bins_of(a), bins_of(b)
    return np.float32(sum(min(n / len(a), bins_b.get(k, 0) / len(b)) for k, n in bins_a.items()))


@cache
def _pair_ovl(a: str, b: str, layer: int, neuron: int) -> np.float32:
    return _ovl(_values(a, layer, neuron), _values(b, layer, neuron))


def _range(concept: str, layer: int, neuron: int, tau: float = TAU) -> tuple[float, float]:
    moments = _moments(concept, layer, neuron)
    return moments["mean"] - tau * moments["std"], moments["mean"] + tau * moments["std"]


def _spans(x: np.ndarray) -> list[tuple[float, float, int]]:
    """The used bins of a histogram, cut off at its smallest and largest value, ascending: bottom, top, values."""
    low, high = float(x.min()), float(x.max())
    spans = [(bin_span(k), n) for k, n in sorted(bins_of(x).items())]
    return [(max(bottom, low), min(top, high), n) for (bottom, top), n in spans]


def _share_inside(x: np.ndarray, lower: float, upper: float) -> float:
    """Straight-line within a bin."""
    inside = 0.0
    for bottom, top, n in _spans(x):
        if top > bottom:
            inside += n * max(0.0, min(top, upper) - max(bottom, lower)) / (top - bottom)
        else:
            inside += n * (lower <= bottom <= upper)
    return inside / len(x)


def _gaussian_inside(moments: dict[str, Any], lower: float, upper: float) -> float:
    if moments["std"] == 0:
        return float(lower <= moments["mean"] <= upper)
    fitted = stats.norm(moments["mean"], moments["std"])
    return float(fitted.cdf(upper) - fitted.cdf(lower))


def _ks_of_histogram(x: np.ndarray, moments: dict[str, Any]) -> tuple[np.float32, np.float32]:
    """The distance at the edges, where both are known; and the most that it can be between them."""
    bottom_E, top_E, n_E = np.array(_spans(x)).T
    fitted = stats.norm(moments["mean"], moments["std"])
    after_E = n_E.cumsum() / len(x)
    before_E, at_bottom_E, at_top_E = after_E - n_E / len(x), fitted.cdf(bottom_E), fitted.cdf(top_E)
    at_edges = np.abs([before_E - at_bottom_E, after_E - at_top_E]).max()
    at_most = max((after_E - at_bottom_E).max(), (at_top_E - before_E).max())
    return np.float32(at_edges), np.float32(at_most)


def _quantile_of_histogram(x: np.ndarray, q: float) -> np.float32:
    wanted, seen = q * len(x), 0
    for bottom, top, n in _spans(x):
        if seen + n > wanted:
            return np.float32(bottom + (top - bottom) * (wanted - seen) / n)
        seen += n
    return np.float32(x.max())


@cache
def _score(method: str, concept: str, layer: int, neuron: int) -> float:
    x = _values(concept, layer, neuron).astype(np.longdouble)
    if method == "mean_abs":
        return float(np.abs(x).mean())
    assert method == "cohens_d"
    rest = np.concatenate([_values(other, layer, neuron) for other in CONCEPTS if other != concept])
    rest = rest.astype(np.longdouble)
    distance = abs(x.mean() - rest.mean())
    squares = ((x - x.mean()) ** 2).sum() + ((rest - rest.mean()) ** 2).sum()
    return float(distance / np.sqrt(squares / (len(x) + len(rest) - 2))) if distance > 0 else 0.0


@cache
def _ranked(method: str, concept: str, layer: int) -> list[int]:
    """The neurons of a layer, the most salient first."""
    return sorted(range(WIDTH), key=lambda neuron: (-_score(method, concept, layer, neuron), neuron))


def _salient(concept: str, layer: int) -> set[int]:
    return set(_ranked("mean_abs", concept, layer)[: int(0.3 * WIDTH)])


def _z_of(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Differences of mean and std in standard errors."""
    (mean_a, std_a, se_a), (mean_b, std_b, se_b) = _with_errors(a), _with_errors(b)
    z_mean = (mean_b - mean_a) / np.sqrt(std_a**2 / len(a) + std_b**2 / len(b))
    return float(z_mean), float((std_b - std_a) / np.hypot(se_a, se_b))


def _with_errors(x: np.ndarray) -> tuple[float, float, float]:
    """Mean, std, and the standard error of the std: sqrt((kurtosis - 1) / 4n) of it."""
    moments = moments_of(x)
    return moments["mean"], moments["std"], moments["std"] * np.sqrt((moments["kurtosis"] - 1) / (4 * len(x)))


# --- the answers ---

ORACLES: dict[str, tuple[Callable[[], Rows], float]] = {}


def answers(question: str, *, rel: float = 1e-9) -> Callable[[Callable[[], Rows]], Callable[[], Rows]]:
    """The function works out the rows that the question's query must give, in order, up to a relative error of `rel`:
    1e-9 for DOUBLE, 1e-6 where a FLOAT column had a hand in it."""

    def register(oracle: Callable[[], Rows]) -> Callable[[], Rows]:
        ORACLES[question] = cache(oracle), rel
        return oracle

    return register


@answers("Which neurons separate joy from love best?", rel=1e-6)
def _separating_neurons() -> Rows:
    best = sorted((_pair_ovl("joy", "love", layer, neuron), layer, neuron) for layer, neuron in _sites())[:10]
    rows = []
    for ovl, layer, neuron in best:
        joy, love = _moments("joy", layer, neuron), _moments("love", layer, neuron)
        rows.append(("mlp_post", layer, neuron, ovl, joy["mean"], joy["std"], love["mean"], love["std"]))
    return rows


@answers("Which layer has the least overlap?", rel=1e-6)
def _layers_by_overlap() -> Rows:
    rows = []
    for layer in range(N_LAYERS):
        ovl_PN = np.array(
            [[_pair_ovl(a, b, layer, neuron) for neuron in range(WIDTH)] for a, b in combinations(CONCEPTS, 2)], float
        )
        median_P = np.median(ovl_PN, axis=1)
        easiest = list(combinations(CONCEPTS, 2))[median_P.argmin()]
        rows.append(("mlp_post", layer, median_P.mean(), (ovl_PN < 0.5).mean(), " and ".join(easiest), 0))
    return sorted(rows, key=lambda row: row[2])


@answers("Which neurons tell any concepts apart?", rel=1e-8)
def _telling_neurons() -> Rows:
    rows = []
    for layer, neuron in _sites():
        if neuron > 1:  # the first two do not vary
            groups = [_values(concept, layer, neuron).astype(np.float64) for concept in CONCEPTS]
            means = [_moments(concept, layer, neuron)["mean"] for concept in CONCEPTS]
            strongest = CONCEPTS[int(np.argmax(means))]
            moments = _moments(strongest, layer, neuron)
            f_ratio = stats.f_oneway(*groups).statistic
            rows.append(("mlp_post", layer, neuron, f_ratio, strongest, moments["mean"], moments["std"]))
    return sorted(rows, key=lambda row: -row[3])[:10]


@answers("Which ranges catch at least 90 % of joy and at most 10 % of any other concept?", rel=1e-6)
def _selective_ranges() -> Rows:
    rows = []
    for neuron in range(WIDTH):
        lower, upper = _range("joy", 2, neuron)
        own = _share_inside(_values("joy", 2, neuron), lower, upper)
        most, nearest = max(
            (_share_inside(_values(other, 2, neuron), lower, upper), other) for other in CONCEPTS if other != "joy"
        )
        if own >= 0.9 and most <= 0.1:
            rows.append(("mlp_post", neuron, lower, upper, most, nearest, 3, own))
    return sorted(rows, key=lambda row: (row[4], -row[7]))


@answers("Is neuron (2, 5) Gaussian under every concept?", rel=1e-6)
def _gaussian_neuron() -> Rows:
    rows = []
    for concept in CONCEPTS:
        x, moments = _values(concept, 2, 5), _moments(concept, 2, 5)
        skewness, excess = moments["skewness"], moments["kurtosis"] - 3
        jarque_bera = stats.jarque_bera(x.astype(np.float64)).statistic
        ks = (
            *_ks_of_histogram(x, moments),
            stats.kstest(x.astype(np.float64), "norm", (moments["mean"], moments["std"])).statistic,
        )
        near = abs(skewness) < 1 and -1 <= excess <= 2
        rows.append(("mlp_post", concept, len(x), skewness, excess, jarque_bera, *ks, 0.886 / np.sqrt(len(x)), near))
    return rows


@answers("What share of a layer's neurons is near enough to a Gaussian?", rel=1e-6)
def _gaussian_share() -> Rows:
    rows = []
    for layer in range(N_LAYERS):
        bumps = [(concept, neuron) for concept in CONCEPTS for neuron in range(2, WIDTH)]
        moments = [_moments(concept, layer, neuron) for concept, neuron in bumps]
        bounds = [
            _ks_of_histogram(_values(concept, layer, neuron), some)[1]
            for (concept, neuron), some in zip(bumps, moments, strict=True)
        ]
        near = [abs(some["skewness"]) < 1 and 2 <= some["kurtosis"] <= 5 for some in moments]
        shares = np.mean(near), np.mean(np.array(bounds) < 0.1)
        skewness = np.median([abs(some["skewness"]) for some in moments])
        excess = np.median([some["kurtosis"] for some in moments]) - 3
        rows.append(("mlp_post", layer, len(bumps), *shares, skewness, excess))
    return rows


@answers("Which neurons have two bumps, or a heavy tail?")
def _odd_shapes() -> Rows:
    found: dict[str, list[tuple[float, int, str, tuple[float, float, float]]]] = {"heavy tail": [], "two bumps": []}
    for concept in CONCEPTS:
        for neuron in range(2, WIDTH):
            x = _values(concept, 2, neuron).astype(np.longdouble)
            skewness, excess = stats.skew(x), stats.kurtosis(x)
            bimodality = (skewness**2 + 1) / (excess + 3)
            numbers = float(skewness), float(excess), float(bimodality)
            if excess > 3:
                found["heavy tail"].append((-numbers[1], neuron, concept, numbers))
            elif bimodality > 5 / 9:
                found["two bumps"].append((-numbers[2], neuron, concept, numbers))
    return [
        ("mlp_post", neuron, concept, len(_values(concept, 2, neuron)), *numbers, shape)
        for shape, some in found.items()
        for _, neuron, concept, numbers in sorted(some)[:10]
    ]


@answers("Which neurons are dead or constant?")
def _silent_neurons() -> Rows:
    rows = []
    for layer in range(N_LAYERS):
        loudest_N = [
            max(_moments(concept, layer, neuron)["mean_abs"] for concept in CONCEPTS) for neuron in range(WIDTH)
        ]
        for neuron in range(WIDTH):
            x = np.concatenate([_values(concept, layer, neuron) for concept in CONCEPTS])
            low, high, loudest = x.min(), x.max(), loudest_N[neuron]
            kind = "dead" if not x.any() else "constant" if low == high else "faint"
            if kind != "faint" or loudest < 0.01 * np.median(loudest_N):
                rows.append(("mlp_post", layer, neuron, low, high, loudest, kind))
    return rows


@answers("Where is the mass of neuron (2, 5)?", rel=1e-5)
def _mass() -> Rows:
    rows = []
    for concept in CONCEPTS:
        x, moments = _values(concept, 2, 5), _moments(concept, 2, 5)
        quantiles = [float(_quantile_of_histogram(x, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        stds = moments["std"], (quantiles[3] - quantiles[1]) / 1.349
        rows.append(("mlp_post", concept, len(x), x.min(), *quantiles, x.max(), moments["mean"], *stds))
    return rows


@answers("In which percentile of each concept does the value 0.8 lie?")
def _percentile() -> Rows:
    return [
        ("mlp_post", concept, len(x), (x.astype(np.float64) <= 0.8).mean(), stats.norm(m["mean"], m["std"]).cdf(0.8))
        for concept in CONCEPTS
        for x, m in [(_values(concept, 2, 5), _moments(concept, 2, 5))]
    ]


@answers("How much data stands behind the numbers?")
def _coverage() -> Rows:
    texts, rows = _texts(), []
    for concept in CONCEPTS:
        own_S = texts.concept_S == concept
        x_LKN = texts.x_LSN[:, own_S & texts.counts_S]
        n_texts = own_S.sum(), x_LKN.shape[1]
        n_finite_LN = np.isfinite(x_LKN).sum(axis=1)
        n_lost_LN = x_LKN.shape[1] - n_finite_LN
        n_values = n_finite_LN.min(), n_finite_LN.max(), n_lost_LN.sum(), (n_lost_LN > 0).sum()
        rows.append((concept, 3, 2 if concept == "love" else 3, *n_texts, *n_values))
    return [*rows, (PLANNED_ONLY, 1, 0, 5, 0, None, None, None, None)]


@answers("How stable are mu and sigma between two halves of the shards?")
def _stable_over_shards() -> Rows:
    rows = []
    for concept in CONCEPTS:
        even_S = _texts().shard_S % 2 == 0
        z_N2 = np.abs([_z_of(_values(concept, 2, j, even_S), _values(concept, 2, j, ~even_S)) for j in range(2, WIDTH)])
        median_2, share_2 = np.median(z_N2, axis=0), (z_N2 > 2).mean(axis=0)
        rows.append(("mlp_post", concept, len(z_N2), median_2[0], share_2[0], median_2[1], share_2[1]))
    return rows


@answers("How stable are mu and sigma between two random halves of the texts?")
def _stable_over_texts() -> Rows:
    rows = []
    for concept in CONCEPTS:
        even_S = np.arange(len(_texts().shard_S)) % 2 == 0
        a, b = _values(concept, 2, 5, even_S), _values(concept, 2, 5, ~even_S)
        (mean_a, std_a, _), (mean_b, std_b, _) = _with_errors(a), _with_errors(b)
        rows.append(("mlp_post", concept, len(a), len(b), mean_a, mean_b, std_a, std_b, *_z_of(a, b)))
    return rows


@answers("Which shard is an outlier?")
def _outlying_shards() -> Rows:
    rows, texts = [], _texts()
    for shard in range(UNCOMMITTED):
        concept, z = CONCEPTS[shard // 3], {}
        for neuron in range(2, WIDTH):
            x = _values(concept, 2, neuron, texts.shard_S == shard).astype(np.longdouble)
            every = _values(concept, 2, neuron).astype(np.longdouble)
            if len(x):
                z[neuron] = (x.mean() - every.mean()) / (every.std() * np.sqrt(1 / len(x) - 1 / len(every)))
        size = np.abs([float(value) for value in z.values()])
        worst = max(z, key=lambda neuron: abs(z[neuron]))
        rows.append(
            ("mlp_post", shard, concept, len(z), float(np.sqrt((size**2).mean())), float((size > 3).mean()), worst)
        )
    return sorted(rows, key=lambda row: (-round(row[4], 3), row[1]))


@answers("Which texts drive neuron (2, 5)?")
def _driving_texts() -> Rows:
    texts = _texts()
    x_S = np.where(texts.counts_S & np.isfinite(texts.x_LSN[2, :, 5]), texts.x_LSN[2, :, 5], -np.inf)
    shown = np.argsort(-x_S, kind="stable")[:10]
    first_of_shard = np.searchsorted(texts.shard_S, texts.shard_S)
    return [
        ("mlp_post", x_S[s], texts.concept_S[s], s, (s - first_of_shard[s]) % 7, f"text {s}")  # as write_store has them
        for s in shown
    ]


@answers("Do longer texts drive neuron (2, 8) higher?")
def _effect_of_length() -> Rows:
    texts, rows = _texts(), []
    for concept in CONCEPTS:
        x_S = texts.x_LSN[2, :, RAISED_BY_LENGTH].astype(np.float64)
        kept_S = texts.counts_S & (texts.concept_S == concept) & np.isfinite(x_S)
        fit = stats.linregress(texts.n_tokens_S[kept_S], x_S[kept_S])
        rows.append(("mlp_post", concept, kept_S.sum(), fit.slope, fit.rvalue, fit.slope / fit.stderr))
    return rows


@answers("Is neuron (2, 9) different where the model answers wrongly?")
def _effect_of_errors() -> Rows:
    rows, answer_S = [], _texts().answer_S
    right_S = np.array([answer is not None and answer[1] for answer in answer_S])
    wrong_S = np.array([answer is not None and not answer[1] for answer in answer_S])
    for concept in CONCEPTS:
        right, wrong = (
            _values(concept, 2, RAISED_BY_ERRORS, chosen_S).astype(np.longdouble) for chosen_S in (right_S, wrong_S)
        )
        squares = ((right - right.mean()) ** 2).sum() + ((wrong - wrong.mean()) ** 2).sum()
        pooled = np.sqrt(squares / (len(right) + len(wrong) - 2))
        numbers = right.mean(), wrong.mean(), pooled, (wrong.mean() - right.mean()) / pooled
        rows.append(("mlp_post", concept, len(right), len(wrong), *map(float, numbers)))
    return rows


@answers("What does the model take for what?", rel=1e-6)
def _confusion() -> Rows:
    texts, rows = _texts(), []
    for concept in CONCEPTS:
        given = [
            answer
            for answer, own, counts in zip(texts.answer_S, texts.concept_S == concept, texts.counts_S, strict=True)
            if own and counts and answer is not None
        ]
        counts = Counter(predicted for predicted, _, _ in given)
        for predicted in sorted(counts, key=lambda name: (-counts[name], name is None, name)):
            of_it = [answer for answer in given if answer[0] == predicted]
            n_correct = sum(correct for _, correct, _ in of_it)
            confidence = [some for _, _, some in of_it if some is not None]
            mean_confidence = np.mean(confidence) if confidence else None
            rows.append((concept, predicted, len(of_it), len(of_it) / len(given), n_correct, mean_confidence))
    return rows


def _moment_rows(layer: int, where_S: np.ndarray) -> Rows:
    names = ("n", "mean", "std", "skewness", "kurtosis", "min", "max", "mean_abs")
    rows = []
    for neuron in range(WIDTH):
        for concept in CONCEPTS:
            x = _values(concept, layer, neuron, where_S)
            if len(x):
                rows.append(("mlp_post", neuron, concept, *(moments_of(x)[name] for name in names)))
    return rows


@answers("What are the moments of short texts alone?")
def _short_texts() -> Rows:
    return _moment_rows(2, _texts().n_tokens_S < 20)


@answers("What are the moments of some shards alone?")
def _some_shards() -> Rows:
    return _moment_rows(2, _texts().shard_S % 2 == 0)


@answers("Which concepts does neuron (2, 6) serve, and how far do their ranges overlap?", rel=1e-6)
def _served_concepts() -> Rows:
    served, rows = [concept for concept in CONCEPTS if 6 in _salient(concept, 2)], []
    assert len(served) == 3
    for a, b in combinations(served, 2):
        (low_a, high_a), (low_b, high_b) = _range(a, 2, 6), _range(b, 2, 6)
        jaccard = max(0.0, min(high_a, high_b) - max(low_a, low_b)) / (max(high_a, high_b) - min(low_a, low_b))
        b_in_a = _share_inside(_values(b, 2, 6), low_a, high_a)
        a_in_b = _share_inside(_values(a, 2, 6), low_b, high_b)
        rows.append(("mlp_post", 3, served, a, b, jaccard, _pair_ovl(a, b, 2, 6), b_in_a, a_in_b))
    return sorted(rows, key=lambda row: -row[5])


@answers("How many salient neurons do joy and love share, layer by layer?")
def _shared_salience() -> Rows:
    rows = []
    for layer in range(N_LAYERS):
        joy, love = _salient("joy", layer), _salient("love", layer)
        n_both, n_chance = len(joy & love), len(joy) * len(love) / WIDTH
        rows.append(("mlp_post", layer, 6, 6, n_both, n_both / len(joy | love), n_both / n_chance))
    return rows


@answers("Do the salience methods agree?")
def _agreement() -> Rows:
    rows = []
    for layer in range(N_LAYERS):
        for concept in CONCEPTS:
            by_mean, by_effect = _ranked("mean_abs", concept, layer), _ranked("cohens_d", concept, layer)
            places = [(by_mean.index(neuron), by_effect.index(neuron)) for neuron in range(WIDTH)]
            agreement = stats.spearmanr(*zip(*places, strict=True)).statistic
            n_top = len(set(by_mean[:5]) & set(by_effect[:5]))
            rows.append(("mlp_post", layer, concept, WIDTH, agreement, n_top))
    return rows


def _captured(tau: float) -> dict[str, float]:
    lower, upper = _range("joy", 2, 6, tau)
    return {concept: _share_inside(_values(concept, 2, 6), lower, upper) for concept in CONCEPTS}


@answers("What does the range of joy at neuron (2, 6) capture of the others?")
def _capture() -> Rows:
    lower, upper = _range("joy", 2, 6)
    rows = []
    for concept, share in _captured(TAU).items():
        x = _values(concept, 2, 6).astype(np.float64)
        gaussian = _gaussian_inside(_moments(concept, 2, 6), lower, upper)
        rows.append(("mlp_post", concept, len(x), share, gaussian, ((x >= lower) & (x <= upper)).mean()))
    return sorted(rows, key=lambda row: (row[1] != "joy", -row[3], row[1]))


@answers("How far would another tau change what is captured?")
def _capture_by_tau() -> Rows:
    rows = []
    for tau in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        shares = _captured(tau)
        own = shares.pop("joy")
        rows.append(
            (tau, "mlp_post", own, max(shares.values()), np.mean(list(shares.values())), max(shares, key=shares.get))
        )
    return rows


@answers("Which neurons does a range table hold for joy and for love, in ranges that do not touch?")
def _disjoint_ranges() -> Rows:
    return [
        ("tbl_00000000000000aa", "mlp_post", 2, 5, 0.375, 1.625, 2.375, 3.625, 0.75),
        ("tbl_00000000000000aa", "mlp_post", 1, 12, 1.375, 2.625, -0.125, 1.125, 0.25),
        ("tbl_00000000000000bb", "mlp_post", 2, 5, 0.375, 1.625, 1.6875, 2.3125, 0.0625),
        ("tbl_00000000000000cc", "mlp_post", 0, 8, -3.0, 3.0, -0.75, 4.0, 0.25),
    ]


@answers("What did the erasure cost?")
def _cost_of_erasure() -> Rows:
    table = "tbl_00000000000000aa"
    return [
        (table, "dampen", 0.2, [1, 2], "joy", "range", 0.1, 0.0, 0.1, None),
        (table, "dampen", 0.2, [1, 2], "joy", "neuron", 0.2, 0.15, 0.05, None),
        (table, "dampen", 0.2, [2], "joy", "range", 0.3, 0.1, 0.2, 2.6 / 2.5),
        (table, "zero", None, None, "joy", "range", 0.45, 0.02, 0.43, 2.75 / 2.5),
        (table, "zero", None, None, "joy", "neuron", 0.4, 0.35, 0.05, 3.5 / 2.5),
        (table, "zero", None, None, "love", "range", 0.45, 0.07, 0.38, 2.8 / 2.6),
        (table, "zero", None, None, "love", "neuron", 0.5, 0.47, 0.03, 3.9 / 2.6),
    ]


# --- the tests ---


def _assert_same(rows: Sequence[Sequence[Any]], expected: Rows, rel: float) -> None:
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert len(row) == len(wanted)
        for cell, value in zip(row, wanted, strict=True):
            if isinstance(value, float | np.floating):
                value = pytest.approx(float(value), rel=rel, abs=1e-12 if rel < 1e-6 else 1e-7)
            assert cell == value, f"{row} is not {wanted}"


def test_sql_page__has_an_oracle_for_every_question_and_a_question_for_every_query():
    assert len(_questions()) >= 20
    assert set(ORACLES) == set(_questions())
    assert PAGE.read_text(encoding="utf-8").count("```sql") == len(_questions())


@pytest.mark.parametrize("question", _questions())
def test_cookbook__is_answered_right(lens, question):
    oracle, rel = ORACLES[question]
    _assert_same(lens.sql(_questions()[question]).fetchall(), oracle(), rel)


@pytest.mark.parametrize("question", _questions())
def test_cookbook__has_the_same_answers_in_plain_duckdb(plain, question):
    oracle, rel = ORACLES[question]
    _assert_same(plain.execute(_questions()[question]).fetchall(), oracle(), rel)


def test_sql_page__shows_python_that_runs(store):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {"frame": pa.table({"neuron": [5], "note": ["seen"]})}
    exec(code.replace('"STORE"', repr(store.root)) + '    seen = lens.sql("from notes").fetchall()\n', names)
    assert names["seen"] == [(5, "seen")]


def test_sql_page__says_what_an_open_store_says(lens):
    found, expected = _section("Reference").strip(), _reference(lens)
    assert found == expected, f"Put this under '## Reference' in {PAGE}:\n\n{expected}\n"


def _reference(lens: Lens) -> str:
    """The whole section: views with their columns, then the table macros."""
    parts = ["Reference", "### Views"]
    for view, meaning in lens.views().items():
        rows = lens.sql(f"describe {view}").fetchall()
        table = ["| column | type | meaning |", "|---|---|---|"] + [
            f"| {name} | {kind} | {_cell(comment)} |" for name, kind, comment in rows
        ]
        parts += [f"#### {view}", f"{meaning}.".replace("?.", "?"), "\n".join(table)]
    macros = ["| macro | what it answers | columns |", "|---|---|---|"]
    for name, comment in lens.macros().items():
        meaning, _, call = comment.rpartition(": ")
        required = [part for part in re.findall(r"[(,]([^(,)]*)", call) if ":=" not in part]
        columns = lens.sql(f"from {name}({', '.join('null' for _ in required)})").columns
        macros.append(f"| `{call}` | {_cell(meaning)} | {', '.join(columns)} |")
    return "\n\n".join([*parts, "### Table macros", "\n".join(macros)])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
