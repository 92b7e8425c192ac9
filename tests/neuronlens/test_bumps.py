"""Moments and merged histograms as arrays: what is read of a file, what is refused, what threads do not change."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuronlens.bumps import Bumps, in_threads, open_counts, read_counts
from neuronlens.errors import RunFailed
from neuronlens.overlap import pairs_of

COUNTS = pa.schema(
    [
        ("neuron", pa.int32()),
        ("concept", pa.dictionary(pa.int32(), pa.string())),
        ("bin", pa.int16()),
        ("n", pa.int64()),
    ]
)


def _moments(*keys: tuple[int, str]) -> pa.Table:
    rows = [
        {"neuron": neuron, "concept": concept, "mean": float(neuron), "std": 1.0, "min": -9.0, "max": 9.0}
        for neuron, concept in keys
    ]
    return pa.Table.from_pylist(rows)


def _counts(*rows: tuple[int, str, int, int]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(COUNTS.names, row, strict=True)) for row in rows], COUNTS)


def _of(*keys: tuple[int, str]) -> Bumps:
    return Bumps.of(_moments(*keys), hook_point="mlp_post", layer=0)


def _histogram(bumps: Bumps, i: int, c: int) -> dict[int, int]:
    rows = slice(bumps.start_NC[i, c], bumps.stop_NC[i, c])
    return dict(zip(bumps.bin_X[rows].tolist(), bumps.n_X[rows].tolist(), strict=True))


def test_bumps__sort_neurons_and_concepts():
    bumps = _of((9, "b"), (3, "a"), (9, "Ä"), (3, "b"))
    assert bumps.concepts == ("a", "b", "Ä")
    assert bumps.neuron_N.tolist() == [3, 9]
    assert bumps.is_known_NC.tolist() == [[True, True, False], [False, True, True]]
    assert np.isnan(bumps.mean_NC).tolist() == (~bumps.is_known_NC).tolist()
    assert bumps.mean_NC[1, 2] == 9


def test_bumps__of_nothing_give_nothing():
    bumps = Bumps.of(_moments((0, "a")).slice(0, 0), hook_point="mlp_post", layer=0)
    assert list(bumps.blocks(10)) == []
    assert pairs_of(bumps, tau=2.5).num_rows == 0


def test_bumps__find_each_histogram_and_leave_out_strangers():
    rows = [(1, "a", -3, 5), (1, "a", 4, 6), (1, "zebra", 0, 1), (2, "b", 7, 8), (5, "b", 7, 9), (8, "a", 1, 2)]
    bumps = _of((1, "a"), (1, "b"), (5, "a"), (5, "b")).with_counts(_counts(*rows))
    found = [[_histogram(bumps, i, c) for c in range(2)] for i in range(2)]
    assert found == [[{-3: 5, 4: 6}, {}], [{}, {7: 9}]]


@pytest.mark.parametrize(
    "rows",
    [
        [(0, "a", 4, 1), (0, "a", 3, 1)],
        [(0, "a", 4, 1), (0, "a", 4, 1)],
        [(0, "a", 4, 1), (0, "b", 4, 1), (0, "a", 5, 1)],
    ],
)
def test_bumps__refuse_histograms_that_are_not_merged(rows):
    with pytest.raises(RunFailed, match=r"mlp_post, layer 0, are not in order.*one row a bin"):
        _of((0, "a"), (0, "b")).with_counts(_counts(*rows))


def _layer(n_neurons: int, concepts: str = "abc") -> tuple[Bumps, pa.Table]:
    rng = np.random.default_rng(0)
    rows = [
        (neuron, concept, b, int(rng.integers(1, 50)))
        for neuron in range(n_neurons)
        for concept in concepts
        for b in sorted(rng.choice(60, 9, replace=False).tolist())
    ]
    return _of(*((neuron, concept) for neuron in range(n_neurons) for concept in concepts)), _counts(*rows)


@pytest.mark.parametrize("n_threads", [2, 3, 50])
def test_pairs_of__are_the_same_on_any_number_of_threads(n_threads):
    bumps, counts = _layer(13)
    expected = pairs_of(bumps.with_counts(counts), tau=2.5)
    assert expected["ovl"].null_count == 0
    assert pairs_of(bumps.with_counts(counts, n_threads=n_threads), tau=2.5, n_threads=n_threads).equals(expected)


def test_pairs_of__has_no_row_without_the_moments_of_both():
    rows = pairs_of(_of((0, "a"), (0, "c"), (1, "a"), (1, "b"), (1, "c"), (2, "b")), tau=2.5).to_pylist()
    keys = [(row["neuron"], row["concept_a"], row["concept_b"]) for row in rows]
    assert keys == [(0, "a", "c"), (1, "a", "b"), (1, "a", "c"), (1, "b", "c")]


def test_blocks__give_the_rows_of_the_layer_reading_few_row_groups(tmp_path):
    """Row groups of 40 rows, which cut a neuron's 27 rows anywhere."""
    bumps, counts = _layer(13)
    pq.write_table(counts, tmp_path / "counts.parquet", row_group_size=40)
    file = open_counts(tmp_path / "counts.parquet")
    parts = []
    for block in bumps.blocks(4):
        rows = read_counts(file, block.first, block.last)
        assert rows.num_rows <= 4 * 27 + 2 * 40
        parts.append(pairs_of(block.with_counts(rows), tau=2.5))
    assert pa.concat_tables(parts).equals(pairs_of(bumps.with_counts(counts), tau=2.5))


def test_bumps__read_concepts_that_each_row_group_numbers_anew(tmp_path):
    bumps, counts = _layer(5, "xyz")
    with pq.ParquetWriter(tmp_path / "counts.parquet", COUNTS) as writer:
        for first in range(0, counts.num_rows, 20):
            part = counts.slice(first, 20)
            plain = part["concept"].cast(pa.string()).combine_chunks().dictionary_encode()
            writer.write_table(part.set_column(1, "concept", plain))
    rows = read_counts(open_counts(tmp_path / "counts.parquet"), 0, 4)
    assert pairs_of(bumps.with_counts(rows), tau=1.0).equals(pairs_of(bumps.with_counts(counts), tau=1.0))


def test_in_threads__covers_the_range_once_and_hands_on_errors():
    for n, n_threads in ((10, 3), (2, 5), (0, 2), (7, 1)):
        spans = in_threads(lambda first, last: range(first, last), n, n_threads)
        assert [i for span in spans for i in span] == list(range(n))

    def fails(first: int, last: int) -> None:
        raise ValueError(f"{first} to {last}")

    with pytest.raises(ValueError, match="0 to 2"):
        in_threads(fails, 4, 2)
