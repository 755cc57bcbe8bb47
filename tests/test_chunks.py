"""foundation.chunks: fixed cuts, resume with any number of processes, whole results whatever is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks

ROOT = Path(__file__).resolve().parents[1]


def write_squares(chunk: int, items: range, folder: Path, advance) -> None:
    (folder / "squares.txt").write_text(" ".join(str(item**2) for item in items))
    advance(len(items))


def squares(store: ChunkStore) -> list[int]:
    texts = [(store.path(chunk) / "squares.txt").read_text() for chunk in range(len(store.chunks))]
    return [int(number) for text in texts for number in text.split()]


@pytest.mark.parametrize(("num_items", "chunk_size", "lengths"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 5, [3]), (0, 5, [])])
def test_chunks_cut_the_range_by_index(num_items, chunk_size, lengths):
    chunks = Chunks(num_items, chunk_size)
    spans = [chunks.span(chunk) for chunk in range(len(chunks))]
    assert [len(span) for span in spans] == lengths
    assert [item for span in spans for item in span] == list(range(num_items))
    for outside in (-1, len(chunks)):
        with pytest.raises(IndexError, match="does not exist"):
            chunks.span(outside)


@pytest.mark.parametrize(("num_items", "chunk_size"), [(-1, 4), (4, 0)])
def test_impossible_cuts_are_refused(num_items, chunk_size):
    with pytest.raises(ValueError, match=f"{num_items} items in chunks of {chunk_size}"):
        Chunks(num_items, chunk_size)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_any_number_of_processes_makes_the_same_chunks(tmp_path, num_processes):
    store = ChunkStore(tmp_path / "store", Chunks(23, 4))
    counts = [run_chunks(store, write_squares, process_index=p, num_processes=num_processes) for p in range(num_processes)]
    assert sum(counts) == 6 and max(counts) - min(counts) <= 1
    assert squares(store) == [item**2 for item in range(23)]
    assert all(store.problems(chunk) == [] for chunk in range(6))
    assert run_chunks(store, write_squares) == 0


def test_only_missing_chunks_are_computed_and_finished_ones_count(tmp_path):
    store, seen = ChunkStore(tmp_path / "store", Chunks(20, 4)), []

    def noted(chunk, items, folder, advance):
        seen.append(chunk)
        write_squares(chunk, items, folder, advance)

    run_chunks(store, noted, num_processes=2)
    assert seen == [0, 2, 4] and store.complete() == {0, 2, 4}
    committed = []
    run_chunks(store, noted, finished={1}, committed=lambda chunk: committed.append((chunk, store.is_complete(chunk))))
    assert seen == [0, 2, 4, 3] and committed == [(3, True)]


def test_a_failed_chunk_leaves_nothing(tmp_path):
    store = ChunkStore(tmp_path / "store", Chunks(8, 4))

    def failing(chunk, items, folder, advance):
        (folder / "squares.txt").write_text("half")
        if chunk == 1:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run_chunks(store, failing)
    assert store.complete() == {0} and os.listdir(store.folder) == ["00000000"]


def test_prepare_removes_leftovers_and_cut_chunks(tmp_path):
    store = ChunkStore(tmp_path / "store", Chunks(12, 4))
    run_chunks(store, write_squares)
    (store.path(1) / "squares.txt").write_text("1")
    leftover = store.folder / f".00000002.partial-{2**22 + 7}-{os.uname().nodename}"
    leftover.mkdir()
    (store.folder / "99999999").mkdir()  # of another cut
    store.prepare()
    assert store.complete() == {0, 2} and not leftover.exists()
    (store.path(2) / "squares.txt").write_text("9" * len((store.path(2) / "squares.txt").read_text()))
    assert "content changed" in store.problems(2)[0]


def test_wrong_process_numbers_are_refused(tmp_path):
    store = ChunkStore(tmp_path, Chunks(4, 4))
    for index, count in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"process {index} of {count}"):
            run_chunks(store, write_squares, process_index=index, num_processes=count)


def test_progress_counts_the_items_of_all_processes(tmp_path, capsys):
    store = ChunkStore(tmp_path / "store", Chunks(20, 4))
    run_chunks(store, write_squares, process_index=1, num_processes=2)
    assert capsys.readouterr().err == ""
    run_chunks(store, write_squares, num_processes=2, description="squares", seconds_between_lines=0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("squares: step 12/20") and "left" in lines[0] and "items_per_second" in lines[0]
    assert lines[-1].startswith("squares: step 20/20")


def test_killed_at_random_instants_with_changing_numbers_of_processes(tmp_path):
    script = """
import sys, time
from pathlib import Path
from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks
def compute(chunk, items, folder, advance):
    for item in items:
        (folder / str(item)).write_text(str(item ** 2)); time.sleep(0.002)
store = ChunkStore(Path(sys.argv[1]), Chunks(60, 4))
print("started", flush=True)
run_chunks(store, compute, process_index=int(sys.argv[2]), num_processes=int(sys.argv[3]))
"""
    store = ChunkStore(tmp_path / "store", Chunks(60, 4))
    for turn, num_processes in enumerate((1, 2, 3)):
        command = [sys.executable, "-c", script, str(store.folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        workers = [
            subprocess.Popen([*command, str(index), str(num_processes)], stdout=subprocess.PIPE, env=environment)
            for index in range(num_processes)
        ]
        for worker in workers:
            worker.stdout.readline()
        time.sleep(0.05 + 0.03 * turn)
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()
        store.prepare()
        assert all(store.problems(chunk) == [] for chunk in store.complete())
    for index in range(2):
        run_chunks(store, lambda c, items, folder, a: [(folder / str(i)).write_text(str(i**2)) for i in items],
                   process_index=index, num_processes=2)  # fmt: skip
    contents = {int(path.name): path.read_text() for path in store.folder.glob("0*/[0-9]*")}
    assert contents == {item: str(item**2) for item in range(60)}
