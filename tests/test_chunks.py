"""foundation.chunks: the cut, the store, any number of processes, going on after a failure, the lock."""

import pytest

from drift_accel.foundation.chunks import Chunks, ChunkStore, exclusive_lock, run_chunks


def write_items(chunk, items, folder, advance):
    (folder / "items.txt").write_text(" ".join(map(str, items)))
    advance(len(items))


def contents(store):
    return {chunk: (store.path(chunk) / "items.txt").read_text() for chunk in sorted(store.complete())}


def test_every_item_is_in_one_chunk():
    for num_items, size in ((0, 4), (1, 4), (8, 4), (9, 4)):
        chunks = Chunks(num_items, size)
        assert [item for chunk in range(len(chunks)) for item in chunks.span(chunk)] == list(range(num_items))
    with pytest.raises(IndexError):
        Chunks(8, 4).span(2)
    with pytest.raises(ValueError, match="chunks of 0"):
        Chunks(8, 0)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_any_number_of_processes_makes_the_same_chunks(tmp_path, num_processes):
    stores = []
    for name, processes in (("one", 1), ("several", num_processes)):
        store = ChunkStore(tmp_path / name, Chunks(23, 5))
        store.prepare()
        for process in range(processes):
            run_chunks(store, write_items, process_index=process, num_processes=processes, enabled=False)
        stores.append(store)
    assert contents(stores[0]) == contents(stores[1]) and len(contents(stores[0])) == 5


def test_a_failed_chunk_is_absent_and_only_missing_ones_are_computed_again(tmp_path):
    store = ChunkStore(tmp_path / "store", Chunks(20, 5))
    store.prepare()

    def failing(chunk, items, folder, advance):
        write_items(chunk, items, folder, advance)
        if chunk == 2:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        run_chunks(store, failing, enabled=False)
    assert store.complete() == {0, 1}
    assert run_chunks(store, write_items, process_index=0, num_processes=2, enabled=False) == 1
    assert run_chunks(store, write_items, process_index=1, num_processes=2, enabled=False) == 1
    assert store.complete() == {0, 1, 2, 3}


def test_damage_is_named_and_a_cut_file_is_made_again(tmp_path):
    store = ChunkStore(tmp_path / "store", Chunks(10, 5))
    store.prepare()
    run_chunks(store, write_items, enabled=False)
    (store.path(0) / "items.txt").write_text("0 1 2 3 5")
    assert store.problems(0) and "items.txt" in store.problems(0)[0] and not store.problems(1)
    (store.path(1) / "items.txt").write_text("5 6")
    store.prepare()
    assert store.complete() == {0}


def test_the_lock_is_exclusive(tmp_path):
    def hold():
        return exclusive_lock(tmp_path / "lock", "the export")

    with hold(), pytest.raises(ValueError, match="the export is already running"), hold():
        pass
    with hold():
        pass


def test_a_process_outside_the_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="process 2 of 2"):
        run_chunks(ChunkStore(tmp_path, Chunks(4, 2)), write_items, process_index=2, num_processes=2)
