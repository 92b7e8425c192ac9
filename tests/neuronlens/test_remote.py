"""DuckDB reads a store behind a network with several threads, and gets each its own bytes."""

import threading
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from neuronlens.query import connect
from neuronlens.remote import SharedFile, SharedFiles


class _SlowFile(MemoryFile):
    def read(self, size=-1):
        at = self.tell()
        time.sleep(0.001)  # what waits for a network lets other threads run
        if self.tell() != at:
            return super().read(size)[:-1] if size > 1 else b""
        return super().read(size)


class SlowFileSystem(MemoryFileSystem):
    protocol = "slow"
    store, pseudo_dirs, cachable = {}, [""], False
    cat_file = fsspec.AbstractFileSystem.cat_file  # by open, seek and read
    n_looked_up = 0

    def info(self, path, **options):
        type(self).n_looked_up += 1
        return super().info(path, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("slow://").strip("/")

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        return _SlowFile(self, path, file.getvalue()) if mode == "rb" else file


@pytest.fixture
def fs():
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
    yield SlowFileSystem()
    SlowFileSystem.store.clear()
    SlowFileSystem.n_looked_up = 0


def test_connect__reads_what_is_there_with_many_threads_over_a_network(fs):
    with fs.open("slow://bucket/values.parquet", "wb") as file:
        pq.write_table(pa.table({"x": pa.array(range(100_000), pa.int64())}), file, row_group_size=2_500)
    with connect(fs=fs, threads=4) as con:
        for _ in range(3):
            found = con.read_parquet("slow://bucket/values.parquet").sum("x").fetchall()
            assert found == [(sum(range(100_000)),)]


@pytest.fixture
def letters(fs):
    fs.pipe_file("slow://bucket/letters", bytes(range(200)))
    return SharedFile(fs, "slow://bucket/letters", 200)


def test_shared_file__reads_where_its_own_thread_sought(letters):
    found, all_sought = {}, threading.Barrier(10)

    def read(start):
        letters.seek(start)
        all_sought.wait()
        found[start] = letters.read(20)

    readers = [threading.Thread(target=read, args=(start,)) for start in range(0, 200, 20)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == {start: bytes(range(start, start + 20)) for start in range(0, 200, 20)}


def test_shared_file__goes_on_where_another_thread_ended(letters):
    letters.seek(0)
    found = [letters.read(5)]
    other = threading.Thread(target=lambda: found.append(letters.read(5)))
    other.start()
    other.join()
    found.append(letters.read(5))
    assert b"".join(found) == bytes(range(15))


def test_shared_file__seeks_as_a_file_does(letters):
    assert (letters.seek(-3, 2), letters.read()) == (197, bytes([197, 198, 199]))
    assert (letters.seek(-1, 1), letters.read(5), letters.read(5)) == (199, bytes([199]), b"")


def test_connect__tries_reads_again(fs, monkeypatch):
    with fs.open("slow://bucket/values.parquet", "wb") as file:
        pq.write_table(pa.table({"x": pa.array(range(1000), pa.int64())}), file)
    read, n_broken = SlowFileSystem.cat_file, 0

    def broken(self, path, **options):
        nonlocal n_broken
        n_broken += 1
        if n_broken % 2:
            raise ConnectionResetError("in passing")
        return read(self, path, **options)

    monkeypatch.setattr(SlowFileSystem, "cat_file", broken)
    monkeypatch.setattr("neuronlens.retry.FIRST_PAUSE_SECONDS", 0.01)
    with connect(fs=fs, threads=4) as con:
        assert con.read_parquet("slow://bucket/values.parquet").sum("x").fetchall() == [(sum(range(1000)),)]
    assert n_broken >= 4


def test_shared_files__look_a_file_up_once(fs):
    fs.pipe_file("slow://bucket/letters", b"abc")
    shared, before = SharedFiles(fs), SlowFileSystem.n_looked_up
    for _ in range(5):
        assert shared.exists("slow://bucket/letters")
        assert shared.glob("slow://bucket/letters") == ["slow://bucket/letters"]
        assert shared.open("slow://bucket/letters").read() == b"abc"
    assert SlowFileSystem.n_looked_up == before + 1
    assert shared.glob("slow://bucket/none") == []
    assert not shared.exists("slow://bucket/none")
