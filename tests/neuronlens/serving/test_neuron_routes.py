"""GET /v1/neurons/{hook_point}/{layer}/{neuron} over HTTP, held to numpy on the values that the store was made from."""

import contextlib
import itertools
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from neuronlens.query import connect, run_file
from neuronlens.recipe import OverlapSection, RangesSection
from neuronlens.serving import card_blocks, cards
from neuronlens.serving.app import create_app
from neuronlens.serving.auth import Keys
from neuronlens.serving.cards import CardShelf
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Settings
from neuronlens.store import Store
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.statistics import compute_statistics_here
from tests.range_tables import pieces, row, table_of
from tests.report_stores import arrays, write_report_store
from tests.served import served
from tests.synthetic_store import bins_of, moments_of

CONCEPTS = ("it's", "joy", "law & order", "日本")
MODEL = {"id": "tiny", "revision": None, "config_hash": "c" * 16}
WIDTH, N_LAYERS, TOP = 12, 2, 0.3
CONSTANT, EMPTY = 3, 5
"""Neurons: CONSTANT has one value under joy, EMPTY no finite value under law & order."""


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    found = arrays(CONCEPTS, n_layers=N_LAYERS, width=WIDTH)
    found["joy"][:, :, CONSTANT] = 1.5
    found["law & order"][:, :, EMPTY] = np.nan
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory, values) -> Store:
    root = tmp_path_factory.mktemp("cards") / "store"
    store = write_report_store(root, values, hook_points=("mlp_post", "resid_post"), raw=False, model=MODEL)
    emit(store)
    return store


@pytest.fixture(scope="module")
def client(store) -> Iterator[httpx.Client]:
    with asking(store) as client:
        yield client


@pytest.fixture
def copy(store, tmp_path) -> Store:
    """A store that a test may change."""
    return Store(str(shutil.copytree(store.root, tmp_path / "copy")))


@pytest.fixture
def fresh(monkeypatch):
    """Receipts are looked at again at once."""
    monkeypatch.setattr(cards, "FRESH_SECONDS", 0.0)


def emit(store: Store, tau: float = 2.5) -> str:
    return emit_table(store, RangesSection(tau=tau, top_fraction=TOP), Silent()).id


@contextlib.contextmanager
def asking(*stores: Store, tables: tuple[Path, ...] = (), keys: Keys | None = None, **shelf: Any) -> Iterator[Any]:
    """A client of a server over these stores and folders of tables; `client.shelf` is the server's."""
    catalog = Catalog([*(store.root for store in stores), *map(str, tables)])
    service = Service(
        settings=Settings(),
        catalog=catalog,
        cards=CardShelf(catalog.stores, catalog, **shelf),
        keys=keys or Keys(),
        metrics=Metrics(),
    )
    with served(create_app(service)) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.shelf = service.cards  # type: ignore[attr-defined]
        yield client


def card(client: httpx.Client, path: str = "mlp_post/1/4", **query: Any) -> dict[str, Any]:
    answer = client.get(f"/v1/neurons/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refused(client: httpx.Client, path: str = "mlp_post/1/4", **query: Any) -> tuple[int, str]:
    answer = client.get(f"/v1/neurons/{path}", params=query)
    return answer.status_code, answer.json()["error"]["message"]


def of(card: Mapping[str, Any], concept: str) -> dict[str, Any]:
    [found] = [row for row in card["concepts"] if row["concept"] == concept]
    return found


def ovl(x: np.ndarray, y: np.ndarray) -> float | None:
    p, q = bins_of(x), bins_of(y)
    n_p, n_q = sum(p.values()), sum(q.values())
    return None if 0 in (n_p, n_q) else sum(min(p.get(b, 0) / n_p, q.get(b, 0) / n_q) for b in p)


def ranking(x_SN: np.ndarray) -> list[int]:
    """Neurons, most salient first; those without a value last."""
    mean_abs_N = np.abs(x_SN.astype(float)).mean(axis=0)
    return np.argsort(-np.nan_to_num(mean_abs_N, nan=-1), kind="stable").tolist()


# --- what a card says ---


@pytest.mark.parametrize("neuron", range(WIDTH))
def test_card__says_what_the_values_were(client, values, neuron):
    found = card(client, f"mlp_post/1/{neuron}")
    assert [row["concept"] for row in found["concepts"]] == sorted(CONCEPTS)
    for concept in CONCEPTS:
        said, x = of(found, concept), values[concept][1, :, neuron]
        expected = moments_of(x)
        for name in ("n", "mean", "std", "skewness", "kurtosis", "min", "max", "mean_abs"):
            assert said[name] == (expected[name] and pytest.approx(expected[name], rel=1e-6, abs=1e-9)), name
        for name, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            if expected["n"] == 0:
                assert said[name] is None
            else:  # 60 values: a quantile lies between two of them, and is right within a bin
                low, high = (float(np.quantile(x, q, method=m)) for m in ("lower", "higher"))
                slack = 1e-4 + max(abs(low), abs(high)) / 8
                assert low - slack <= said[name] <= high + slack
        assert said["rank"] == ranking(values[concept][1]).index(neuron) + 1


@pytest.mark.parametrize("neuron", range(WIDTH))
def test_card__says_which_concepts_share_the_values(client, values, neuron):
    found = card(client, f"mlp_post/1/{neuron}")
    x = {concept: values[concept][1, :, neuron] for concept in CONCEPTS}
    pairs = {(pair["concept_a"], pair["concept_b"]): pair for pair in found["overlaps"]}
    assert list(pairs) == list(itertools.combinations(sorted(CONCEPTS), 2))
    for (a, b), pair in pairs.items():
        expected = ovl(x[a], x[b])
        assert pair["ovl"] == (expected if expected is None else pytest.approx(expected, abs=1e-6))
        assert pair["bhattacharyya"] == _bhattacharyya(x[a], x[b])
        assert pair["tau"] == 2.5
        if expected is not None:
            low, high = (x[a].mean() + side * 2.5 * x[a].std() for side in (-1, 1))
            assert pair["b_in_a"] == pytest.approx(((x[b] >= low) & (x[b] <= high)).mean(), abs=0.05)
    for concept in CONCEPTS:
        shared = {other: ovl(x[concept], x[other]) for other in CONCEPTS if other != concept}
        there = {other: share for other, share in shared.items() if share is not None}
        said = of(found, concept)
        assert said["nearest_ovl"] == (pytest.approx(max(there.values()), abs=1e-6) if there else None)
        assert said["mean_ovl"] == (pytest.approx(np.mean(list(there.values())), abs=1e-6) if there else None)
        assert said["nearest"] == min(there, key=lambda other: (-round(there[other], 6), other), default=None)


def _bhattacharyya(x: np.ndarray, y: np.ndarray) -> Any:
    if np.isnan(x).any() or np.isnan(y).any():
        return None
    (mean_x, var_x), (mean_y, var_y) = ((v.astype(float).mean(), v.astype(float).var()) for v in (x, y))
    both = var_x + var_y
    overlap = math.sqrt(2 * math.sqrt(var_x * var_y) / both) * math.exp(-((mean_x - mean_y) ** 2) / 4 / both)
    return pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize("neuron", range(WIDTH))
def test_card__holds_the_ranges_of_the_table(client, store, values, neuron):
    found = card(client, f"mlp_post/1/{neuron}")
    assert found["table"] in store.table_ids()
    assert (found["store"], found["unit"], found["tau"]) == ("0" * 64, "last_token", 2.5)
    for concept in CONCEPTS:
        x, said = values[concept][1, :, neuron].astype(float), of(found, concept)
        place = ranking(values[concept][1]).index(neuron) + 1
        if place > math.floor(TOP * WIDTH):
            assert said["range"] == {"salient": False, "rank": None, "lower": None, "upper": None, "pieces": None}
            continue
        ends = (x.mean() - 2.5 * x.std(), x.mean() + 2.5 * x.std())
        assert said["range"]["salient"]
        assert said["range"]["rank"] == place
        assert (said["range"]["lower"], said["range"]["upper"]) == pytest.approx(ends, rel=1e-6)
        assert (said["lower"], said["upper"]) == pytest.approx(ends, rel=1e-6)


def test_card__agrees_with_the_macro_neuron_card_for_every_neuron(client, store):
    with connect(store.file_lists(), threads=1) as con:
        for hook_point, layer, neuron in itertools.product(("mlp_post", "resid_post"), range(N_LAYERS), range(WIDTH)):
            site = {"hook_point": hook_point, "layer": layer, "neuron": neuron}
            expected = run_file(con, "neuron_card", tau=1.5, **site).to_pylist()
            found = card(client, f"{hook_point}/{layer}/{neuron}", tau=1.5)
            assert {key: found[key] for key in site} == site
            for wanted in expected:
                said = of(found, wanted["concept"])
                del wanted["hook_point"], wanted["nearest"]  # the macro takes any of those that share as much
                means = said.pop("mean_ovl"), wanted.pop("mean_ovl")  # of the same numbers in another order
                assert means == (means[1],) * 2 or means[0] == pytest.approx(means[1], rel=1e-12)
                assert {name: said[name] for name in wanted} == wanted


def test_card__takes_another_tau_and_leaves_the_tables_ranges(client, values):
    narrow, wide = card(client, "mlp_post/0/11", tau=0.5), card(client, "mlp_post/0/11")
    x = values["日本"][0, :, 11].astype(float)
    assert narrow["tau"] == 0.5
    assert of(narrow, "日本")["upper"] == pytest.approx(x.mean() + 0.5 * x.std(), rel=1e-6)
    assert of(narrow, "日本")["range"] == of(wide, "日本")["range"]
    assert of(wide, "日本")["range"]["salient"]


def test_card__of_some_concepts_has_these_and_their_pairs(client):
    whole = card(client)
    found = card(client, concept=["joy", "日本"])
    assert found["concepts"] == [of(whole, "joy"), of(whole, "日本")]
    assert found["overlaps"] == [
        pair for pair in whole["overlaps"] if {"joy", "日本"} & {pair["concept_a"], pair["concept_b"]}
    ]
    assert len(card(client, concept="joy")["overlaps"]) == len(CONCEPTS) - 1


@pytest.mark.parametrize(
    ("name", "ours"), [("blocks.1.mlp.hook_post", "mlp_post"), ("blocks.1.hook_resid_post", "resid_post")]
)
def test_card__is_found_by_transformer_lens_names(client, name, ours):
    assert card(client, f"{name}/1/4") == card(client, f"{ours}/1/4")


def test_card__of_another_table_has_its_ranges(copy):
    first = copy.table_ids()[0]
    second = emit(copy, tau=1.0)
    with asking(copy) as client:
        assert card(client)["table"] == second, "the latest"
        wide, narrow = (card(client, "mlp_post/1/11", table=table) for table in (first, second))
        assert (wide["tau"], narrow["tau"]) == (2.5, 1.0)
        for found in (wide, narrow):
            assert of(found, "日本")["range"]["upper"] == of(found, "日本")["upper"]
        assert of(narrow, "日本")["range"]["upper"] < of(wide, "日本")["range"]["upper"]


# --- what it refuses ---


@pytest.mark.parametrize("tau", ["0", "-1", "nan", "inf", "1e9", "wide", ""])
def test_card__refuses_a_tau_that_gives_no_range(client, tau):
    status, message = refused(client, tau=tau)
    assert status == 400
    assert "'tau'" in message


def test_card__refuses_what_it_does_not_know_by_name(client):
    assert refused(client, concept="joi") == (
        400,
        "There is no concept 'joi' here. Concepts: it's, joy, law & order, 日本.",
    )
    status, message = refused(client, layers="1")
    assert (status, "'layers'" in message) == (400, True)
    status, message = refused(client, table="tbl_0123456789abcdef")
    assert (status, "tbl_0123456789abcdef" in message) == (404, True)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("mlp_pots/1/4", 404, "Known: mlp_post, mlp_out"),
        ("attn_out/1/4", 404, "Hook points: mlp_post, resid_post."),
        ("mlp_post/2/4", 404, "Layers: 0, 1."),
        ("mlp_post/1/12", 404, "Neurons: 0 to 11."),
        (f"mlp_post/1/{10**30}", 404, "Neurons: 0 to 11."),
        ("blocks.0.mlp.hook_post/1/4", 404, "in layer 0, and the path asks for layer 1"),
        ("mlp_post/-1/4", 400, "'layer'"),
        ("mlp_post/1/four", 400, "'neuron'"),
    ],
)
def test_card__says_what_there_is(client, path, status, words):
    found = refused(client, path)
    assert found[0] == status
    assert words in found[1]


def test_card__wants_a_key_where_the_server_has_one(store):
    key = "nl-read-0123456789"
    with asking(store, keys=Keys.of([("read", key)])) as client:
        assert client.get("/v1/neurons/mlp_post/1/4").status_code == 401
        assert client.get("/v1/neurons/mlp_post/1/4", headers={"Authorization": f"Bearer {key}"}).status_code == 200


# --- where it comes from ---


def test_card__of_a_table_alone_says_what_its_rows_say(tmp_path):
    rows = [row("joy", 2, 1.0, 0.5, layer=3), row("anger", 2, -1.0, 0.25, layer=3), row("joy", 1, 9.0, 1.0, layer=4)]
    folder = table_of(rows).save(tmp_path)
    with asking(tables=(Path(folder),)) as client:
        found = card(client, "mlp_post/3/2", tau=2)
        assert found["store"] is None
        assert found["overlaps"] == []
        joy, anger = of(found, "joy"), of(found, "anger")
        assert (joy["n"], joy["mean"], joy["std"], joy["mean_abs"]) == (10, 1.0, 0.5, 1.0)
        assert (joy["lower"], joy["upper"]) == (0.0, 2.0)
        assert joy["range"] == {"salient": True, "rank": 1, "lower": -0.25, "upper": 2.25, "pieces": None}
        assert {joy[name] for name in ("min", "p50", "ks", "kurtosis", "nearest", "mean_ovl", "rank")} == {None}
        assert anger["upper"] == -0.5
        nowhere = card(client, "mlp_post/4/2")
        assert {row["mean"] for row in nowhere["concepts"]} == {None}
        assert refused(client, "mlp_post/5/2")[1].endswith("Layers: 3, 4.")


def test_card__of_a_table_with_pieces_has_them_all(tmp_path):
    bounds = [(-math.inf, -1.0, 0.75), (0.5, 1.0, 0.5), (2.0, 3.0, 1.0)]
    rows = [*pieces("joy", 2, bounds, rank=3), *pieces("anger", 2, [(0.0, 1.0, 0.25)]), *pieces("joy", 1, bounds[:2])]
    folder = table_of(rows[::-1], method="hpd").save(tmp_path)
    with asking(tables=(Path(folder),)) as client:
        found = card(client, "mlp_post/0/2", tau=2)
        joy, anger = of(found, "joy"), of(found, "anger")
        expected = [
            {"lower": lower if math.isfinite(lower) else None, "upper": upper, "posterior": posterior}
            for lower, upper, posterior in bounds
        ]
        assert joy["range"] == {"salient": True, "rank": 3, "lower": None, "upper": 3.0, "pieces": expected}
        assert (joy["n"], joy["mean"], joy["lower"], joy["upper"]) == (10, 0.5, -0.5, 1.5)
        assert anger["range"]["pieces"] == [{"lower": 0.0, "upper": 1.0, "posterior": 0.25}]
        assert not of(card(client, "mlp_post/0/1"), "anger")["range"]["salient"]


def test_card__comes_from_the_first_store_of_the_tables_model(copy, tmp_path, values):
    other = {concept: x + 100 for concept, x in values.items()}
    foreign = write_report_store(tmp_path / "foreign", other, raw=False, model=MODEL | {"config_hash": "d" * 16})
    again = write_report_store(tmp_path / "again", other, raw=False, model=MODEL, store_hash="1" * 64)
    shutil.copytree(Path(copy.root) / "ranges", tmp_path / "tables")
    [table] = (tmp_path / "tables").iterdir()
    with asking(foreign, again, tables=(table,)) as client:
        assert card(client)["store"] == again.describe()["store_hash"]
    with asking(foreign, again, copy) as client:
        assert card(client)["store"] == copy.describe()["store_hash"], "the one that the table was made from"


def test_card__of_an_old_store_has_nulls_where_it_knew_less(tmp_path):
    root = shutil.copytree(Path(__file__).parents[2] / "stores" / "version-1", tmp_path / "store")
    with asking(Store(str(root))) as client:
        found = of(card(client, "mlp_post/1/5"), "fear, %s; --")
    assert found["mean"] == pytest.approx(0.3194992591937383, rel=1e-6)
    assert (found["ks"], found["p50"]) == (None, None)
    assert found["nearest"] is not None


# --- a store that changes ---


def test_card__of_a_layer_without_statistics_is_the_tables_until_they_come(copy, fresh):
    receipt = Path(copy.root) / "statistics" / "mlp_post.001.json"
    content = receipt.read_text()
    receipt.unlink()
    with asking(copy) as client:
        found = card(client, "mlp_post/1/11")
        assert found["store"] is None
        assert of(found, "日本")["mean"] is not None
        assert of(found, "日本")["p50"] is None
        receipt.write_text(content)
        assert of(card(client, "mlp_post/1/11"), "日本")["p50"] is not None


def test_card__follows_statistics_that_are_made_again(copy, fresh):
    with asking(copy) as client:
        before = client.get("/v1/neurons/mlp_post/1/4")
        stop, seen = threading.Event(), set[int]()

        def ask() -> None:
            while not stop.is_set():
                seen.add(client.get("/v1/neurons/mlp_post/1/4").status_code)

        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ask) for _ in range(2)]
            compute_statistics_here(
                copy, tau=1.0, memory_limit=10**9, on_done=lambda _: None, overlap=OverlapSection(keep="all")
            )
            stop.set()
            for one in asked:
                one.result()
        after = client.get("/v1/neurons/mlp_post/1/4", headers={"If-None-Match": before.headers["etag"]})
    assert seen == {200}
    assert {pair["tau"] for pair in before.json()["overlaps"]} == {2.5}
    assert after.status_code == 200
    assert {pair["tau"] for pair in after.json()["overlaps"]} == {1.0}


def test_card__looks_for_new_statistics_after_some_seconds(copy, monkeypatch):
    monkeypatch.setattr(cards, "FRESH_SECONDS", 60.0)
    with asking(copy) as client:
        first = card(client)
        receipt = Path(copy.root) / "statistics" / "mlp_post.001.json"
        content = json.loads(receipt.read_text())
        [moments] = [file for file in content["files"] if file["kind"] == "moments"]
        receipt.write_text(json.dumps(content | {"files": [moments]}))
        assert card(client) == first
        monkeypatch.setattr(cards, "FRESH_SECONDS", 0.0)
        assert card(client)["overlaps"] == []


def test_card__of_a_store_that_cannot_be_read_is_no_failure_of_the_server(copy, caplog):
    for path in (Path(copy.root) / "moments").iterdir():
        path.write_bytes(b"damaged")
    with asking(copy) as client:
        answer = client.get("/v1/neurons/mlp_post/1/4")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert copy.root not in answer.text


def test_card__is_not_sent_again_to_who_has_it(client):
    answer = client.get("/v1/neurons/mlp_post/1/4")
    assert answer.headers["cache-control"] == "private, no-cache"
    again = client.get("/v1/neurons/mlp_post/1/4", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]


# --- how it is held ---


@pytest.fixture
def n_read(monkeypatch) -> list[int]:
    """How many blocks were read, each of which takes a fifth of a second."""
    counted, read = [0], card_blocks.StoreBlocks.read

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(0.2)
        block = read(self, *args)
        counted[0] += 1
        return block

    monkeypatch.setattr(card_blocks.StoreBlocks, "read", slow)
    return counted


def test_shelf__reads_a_block_once_even_if_many_ask(store, n_read, monkeypatch):
    monkeypatch.setattr(cards, "WARM_UP_SECONDS", -1)
    with asking(store) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda neuron: card(client, f"mlp_post/1/{neuron % WIDTH}"), range(64)))
    assert n_read == [1]


def test_shelf__reads_ahead_what_fits(store, n_read):
    sites = list(itertools.product(("mlp_post", "resid_post"), range(N_LAYERS)))
    with asking(store) as client:
        deadline = time.monotonic() + 20
        while n_read[0] < len(sites) and time.monotonic() < deadline:
            time.sleep(0.05)
        for hook_point, layer in sites:
            card(client, f"{hook_point}/{layer}/4")
    assert n_read == [len(sites)]


def test_shelf__keeps_to_its_memory(store, monkeypatch):
    monkeypatch.setattr(card_blocks, "ROWS_A_BLOCK", 3 * len(CONCEPTS))
    with asking(store, max_bytes=6_000) as client, asking(store) as roomy:
        for layer, neuron in [*itertools.product(range(N_LAYERS), range(WIDTH))] * 2:
            assert card(client, f"mlp_post/{layer}/{neuron}") == card(roomy, f"mlp_post/{layer}/{neuron}")
            assert 0 < client.shelf.n_bytes <= 6_000
