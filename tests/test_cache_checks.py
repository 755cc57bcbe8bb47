"""data.cache_checks and tools/verify_cache.py: every damage is found, in its file, with what to do about it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_caches import (
    reseal,
    rewrite_shard,
    small_header,
    small_pixels,
    small_rows,
    with_column,
    without_rows,
    write_small_cache,
)
from tiny_runs import run_tool

from drift_accel.data.cache_checks import QUICK_ROWS, model_requirements, verify_cache
from drift_accel.data.cache_writing import dataset_schema, record_batch, write_cache
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.row_encoders import weights_hash
from drift_accel.models.autoencoder import load_vae, vae_scaling
from drift_accel.models.bundled import bundled_vae_path

SHARDS = [f"data-{shard:05d}-of-00003.arrow" for shard in range(3)]
COPY, EXPORT, REBUILD = "copy the file again", "export .*again", "remove it: it is built again"


@pytest.fixture(scope="module")
def good_cache(tmp_path_factory) -> Path:
    """12 rows of 3 classes in 3 shards; row r has label r % 3."""
    path = tmp_path_factory.mktemp("good") / "cache"
    write_small_cache(path)
    return path


@pytest.fixture
def cache(tmp_path, good_cache) -> Path:
    """A copy of the good cache, to be damaged."""
    return shutil.copytree(good_cache, tmp_path / "cache")


def flip_bit(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_entry(cache: Path, shard: int, **changes) -> None:
    """Change what the manifest says of one shard."""
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][shard].update(changes)
    (cache / "manifest.json").write_text(json.dumps(manifest))


def edit_values(cache: Path, shard: int, column: str, change) -> None:
    """Change a column's values in one shard and make all hashes fit, so that only looking at the values finds it."""

    def changed(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        change(values)
        return with_column(table, column, values)

    rewrite_shard(cache / SHARDS[shard], changed)
    reseal(cache)


# A good one.


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("kind", ["sample", "mean", "moments", "unflipped", "uint8", "png", "jpeg"])
def test_nothing_is_found_in_a_good_cache(tmp_path, mode, kind):
    path = tmp_path / "cache"
    if kind in ("uint8", "png", "jpeg"):
        small_pixels(path, kind)
        values = LatentCache(path).rows(np.arange(12))
        mean, std = values.mean(), values.std()
    else:
        rows = write_small_cache(path, small_header(flip_stored=False) if kind == "unflipped" else small_header(sampling=kind))
        columns = [values.astype(np.float64) for values in rows.values()]
        if kind == "moments":  # of a draw: the deviation of the means and the deviations together
            mean = np.mean([values[:, 0] for values in columns])
            std = np.sqrt(np.mean([values[:, 0] ** 2 + values[:, 1] ** 2 for values in columns]) - mean**2)
        else:
            mean, std = np.mean(columns), np.std(columns)
    report = verify_cache(path, mode)
    # Moments of these random numbers have a deviation of 1.4 when they are drawn.
    assert [finding.level for finding in report.findings] == (["warning"] if kind == "moments" else []) and report.is_good
    numbers = report.statistics
    assert (numbers["rows"], numbers["classes"], numbers["class_rows"]) == (12, 3, [4, 4, 4])
    assert (numbers["mean"], numbers["std"]) == (pytest.approx(mean, abs=1e-5), pytest.approx(std, rel=1e-5))
    assert numbers["bytes"] == sum(shard.stat().st_size for shard in path.glob("*.arrow"))


# Damage that happens to files: the hashes of the whole file find all of it, its size and tables some of it.


def cut(cache):
    shard = cache / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-64])


def flip_bit_of_a_row(cache):
    row = LatentCache(cache).stored_rows([5]).tobytes()
    flip_bit(cache / SHARDS[1], (cache / SHARDS[1]).read_bytes().index(row))


def take_from_another_export(cache):
    """The same pictures through another VAE: sizes, names and labels are the same."""
    rows = {name: -values for name, values in small_rows(small_header(), 12).items()}
    write_small_cache(cache.parent / "other", rows=rows)
    shutil.copy(cache.parent / "other" / SHARDS[0], cache / SHARDS[0])


FILES = {
    "truncated shard": (cut, SHARDS[1], r"has \d+ bytes instead of \d+", COPY, True),
    "emptied shard": (lambda cache: (cache / SHARDS[0]).write_bytes(b""), SHARDS[0], "has 0 bytes instead of", COPY, True),
    "missing shard": (lambda cache: (cache / SHARDS[2]).unlink(), SHARDS[2], "is missing", COPY, True),
    "flipped byte of a row": (flip_bit_of_a_row, SHARDS[1], "has other content", COPY, False),
    "flipped byte of a table": (lambda cache: flip_bit(cache / SHARDS[1], 8), SHARDS[1], "content|no Arrow file", COPY, True),
    "shard of another export": (take_from_another_export, SHARDS[0], "has other content", COPY, False),
    "header edited": (
        lambda cache: edit(cache / "header.json", seed=5), "header.json", "was changed after the export", COPY, True,
    ),
    "header missing": (lambda cache: (cache / "header.json").unlink(), "header.json", "cannot be read", COPY, True),
    "header cut": (lambda cache: (cache / "header.json").write_text("{"), "header.json", "is no JSON", COPY, True),
    "manifest cut": (lambda cache: (cache / "manifest.json").write_text("{"), "manifest.json", "is no JSON", COPY, True),
    "manifest missing": (
        lambda cache: (cache / "manifest.json").unlink(), "manifest.json", "this folder is no cache", "give the folder", True,
    ),
    "state.json edited": (
        lambda cache: edit(cache / "state.json", _split="x"), "state.json", r"has \d+ bytes instead of", COPY, True,
    ),
    "dataset_info.json flipped": (
        lambda cache: flip_bit(cache / "dataset_info.json", 9), "dataset_info.json", "has other content", COPY, True,
    ),
    "provenance.json missing": (
        lambda cache: (cache / "provenance.json").unlink(), "provenance.json", "is missing", COPY, True,
    ),
    "class index flipped": (
        lambda cache: flip_bit(cache / "class_index.npy", -8), "class_index.npy", "has other content", REBUILD, True,
    ),
    "class index of another head": (
        lambda cache: flip_bit(cache / "class_index.npy", 10), "class_index.npy", "has other content", REBUILD, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_found(cache, damage, mode):
    change, file, problem, advice, is_seen_quickly = FILES[damage]
    change(cache)
    report = verify_cache(cache, mode)
    if mode == "quick" and not is_seen_quickly:
        assert report.findings == []
        return
    assert not report.is_good
    assert_found(report, file, problem, advice)


def assert_found(report, file, problem, advice, level="error"):
    """That one of the findings is this one."""
    fitting = [
        finding
        for finding in report.findings
        if (finding.level, finding.file) == (level, file)
        and re.search(problem, finding.problem)
        and re.search(advice, finding.advice)
    ]
    assert fitting, f"wanted {level} in {file}: {problem}; {advice}. Found:\n" + "\n".join(map(str, report.findings))


def test_a_flipped_byte_anywhere_is_found_and_never_stops_the_verification(cache):
    """Arrow trusts the lengths in its files: read without care, a flipped byte ends the process."""
    for name in (SHARDS[1], "manifest.json", "header.json", "class_index.npy", "state.json"):
        content = (cache / name).read_bytes()
        for place in range(0, len(content), 23):
            flip_bit(cache / name, place, 1 << place % 8)
            report = verify_cache(cache, "full")
            assert not report.is_good, f"{name}: byte {place}"
            if name != "manifest.json":
                assert name in {finding.file for finding in report.findings}
            verify_cache(cache, "quick")
            (cache / name).write_bytes(content)
    assert verify_cache(cache, "full").findings == []


def test_everything_that_is_wrong_is_named(cache):
    cut(cache)
    (cache / SHARDS[2]).unlink()
    edit(cache / "header.json", seed=5)
    flip_bit(cache / "class_index.npy", -8)
    edit_entry(cache, 0, sha256="0" * 64)
    wrong = {finding.file for finding in verify_cache(cache, "full").findings}
    assert wrong == {*SHARDS, "header.json", "class_index.npy"}


def test_a_folder_that_is_no_cache_or_not_yet_one(tmp_path, cache):
    assert_found(verify_cache(tmp_path / "nowhere"), "manifest.json", "this folder is no cache", "give the folder")
    (tmp_path / "unfinished/in_progress").mkdir(parents=True)
    assert_found(verify_cache(tmp_path / "unfinished"), "manifest.json", "is still being written", "it goes on where it was")
    with pytest.raises(ValueError, match="mode is 'fast': choose one of quick, full"):
        verify_cache(cache, "fast")


def test_what_does_no_harm_is_a_warning(cache):
    shutil.copy(cache / SHARDS[0], cache / "data-00007-of-00009.arrow")
    (cache / "class_index.npy").unlink()
    report = verify_cache(cache, "full")
    assert_found(report, "data-00007-of-00009.arrow", "is never read", "remove it", "warning")
    assert_found(report, "class_index.npy", "is missing", "nothing to do", "warning")
    assert report.is_good and len(report.findings) == 2


# Wrong rows in files that are as they were written: the hashes fit, so that the check itself must find them.


def set_row(row, value):
    def change(values):
        values[row] = value

    return change


def set_number(row, place, value):
    def change(values):
        values[row][place] = value

    return change


def drop_row(cache):
    rewrite_shard(cache / SHARDS[1], lambda table: table.slice(0, 3))
    reseal(cache)


def drop_class(cache):
    """Class 2 loses its rows, and the class index knows it."""
    for name in SHARDS:
        rewrite_shard(cache / name, lambda table: with_column(table, "label", [k % 2 for k in table.column("label").to_pylist()]))
    (cache / "class_index.npy").unlink()
    reseal(cache)
    LatentCache(cache)  # builds it again
    reseal(cache)


def edit_classes(cache, **changes):
    header = json.loads((cache / "header.json").read_text())
    header["classes"][1].update(changes)
    reseal(cache, classes=header["classes"])


def other_index(cache):
    index = np.load(cache / "class_index.npy")
    index[[4, -1]] = index[[-1, 4]]
    np.save(cache / "class_index.npy", index)
    reseal(cache)


ROWS = {
    "NaN row": (
        lambda cache: edit_values(cache, 1, "latent", set_number(2, 7, float("nan"))),
        SHARDS[1], r"row 2, column latent: holds values that are not finite \(1 such rows", EXPORT,
    ),
    "infinite row, mirrored": (
        lambda cache: edit_values(cache, 2, "latent_flipped", set_number(3, 0, float("-inf"))),
        SHARDS[2], "row 3, column latent_flipped: holds values that are not finite", EXPORT,
    ),
    "label too large": (
        lambda cache: edit_values(cache, 0, "label", set_row(3, 3)),
        SHARDS[0], "row 3 has label 3, but there are 3 classes", EXPORT,
    ),
    "label below 0": (
        lambda cache: edit_values(cache, 1, "label", set_row(0, -1)),
        SHARDS[1], "row 0 has label -1, but there are 3 classes", EXPORT,
    ),
    "label of another class": (
        lambda cache: edit_values(cache, 1, "label", set_row(0, 2)),
        "header.json", r"counts of 2 classes .* class 1 \(class 1\) has 3 rows, not 4; class 2 \(class 2\) has 5", EXPORT,
    ),
    "rows twice": (
        lambda cache: edit_values(cache, 1, "image_index", set_row(0, 0)),
        "manifest.json", "1 rows come from a picture and view that another row has too", EXPORT,
    ),
    "empty place": (
        lambda cache: edit_values(cache, 1, "label", set_row(1, None)), SHARDS[1], "has empty places in column label", COPY,
    ),
    "empty row": (
        lambda cache: edit_values(cache, 1, "latent", set_row(1, None)), SHARDS[1], "has empty places in column latent", COPY,
    ),
    "empty number": (
        lambda cache: edit_values(cache, 1, "latent", set_number(1, 5, None)), SHARDS[1], "empty places in column latent", COPY,
    ),
    "a row less": (drop_row, SHARDS[1], "has 3 rows, the manifest says 4", COPY),
    "wrong count of a shard": (
        lambda cache: edit_entry(cache, 2, rows=5), SHARDS[2], "has 4 rows, the manifest says 5", COPY,
    ),
    "wrong count of all": (
        lambda cache: edit(cache / "manifest.json", rows=13), "manifest.json", "says 13 rows, its shards have 12", COPY,
    ),
    "wrong count of a class": (
        lambda cache: edit_classes(cache, rows=5), "header.json", r"class 1 \(class 1\) has 4 rows, not 5", EXPORT,
    ),
    "wrong count of classes": (
        lambda cache: edit(cache / "manifest.json", num_classes=4), "manifest.json", "4 classes, the header lists 3", COPY,
    ),
    "a class missing": (drop_class, "header.json", r"1 classes have no rows: 2 \(class 2\)", "export again with pictures of"),
    "a class missing, counted": (drop_class, "header.json", r"class 2 \(class 2\) has 0 rows, not 4", EXPORT),
    "header of other rows": (
        lambda cache: reseal(cache, image_shape=[2, 3, 4]), SHARDS[0], "has the columns .*, not the header's", COPY,
    ),
    "header of nothing": (lambda cache: reseal(cache, kind="sounds"), "header.json", "is no kind of cache", COPY),
    "class index of other rows": (other_index, "class_index.npy", "does not list the rows of the shards by class", REBUILD),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("damage", ROWS)
def test_wrong_rows_are_found_though_the_hashes_fit(cache, damage, mode):
    change, file, problem, advice = ROWS[damage]
    change(cache)
    report = verify_cache(cache, mode)
    assert not report.is_good
    assert_found(report, file, problem, advice)
    assert not any("other content" in finding.problem for finding in report.findings), "the hashes do not fit"


def test_a_class_that_never_had_pictures_is_found(tmp_path):
    write_small_cache(tmp_path / "cache", without_rows(small_header(), 1), labels=[0, 2] * 6)
    report = verify_cache(tmp_path / "cache")
    assert [finding.problem for finding in report.findings] == ["1 classes have no rows: 1 (empty)"]


def test_moments_with_a_negative_deviation_are_found(tmp_path):
    header = small_header(sampling="moments")
    rows = small_rows(header, 12)
    rows["latent"][9, 1, 0, 0, 0] = -1
    write_small_cache(tmp_path / "cache", header, rows=rows)
    assert_found(verify_cache(tmp_path / "cache"), SHARDS[2], "row 1, column latent: holds values that are no moments", EXPORT)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: b"no picture", r"row 7: the picture cannot be decoded \(its bytes are no picture\)"),
        (lambda content: content[: len(content) // 2], "row 7: the picture cannot be decoded"),
        (lambda content: Path(bundled_vae_path("digits") / "config.json").read_bytes(), "row 7: the picture cannot be decoded"),
    ],
)
def test_pictures_that_cannot_be_decoded_are_found(tmp_path, change, problem):
    cache, shard = tmp_path / "cache", "data-00000-of-00001.arrow"
    small_pixels(cache, "png")

    def damaged(table):
        pictures = table.column("image").to_pylist()
        pictures[7]["bytes"] = change(pictures[7]["bytes"])
        return with_column(table, "image", pictures)

    rewrite_shard(cache / shard, damaged)
    reseal(cache)
    report = verify_cache(cache, "full")
    assert_found(report, shard, problem, EXPORT)
    assert "_io.BytesIO" not in str(report)
    with pytest.raises(ValueError, match=rf"row 7 of {cache}: the picture cannot be decoded .*run tools/verify_cache.py"):
        LatentCache(cache).rows([0, 7])


def test_pictures_of_another_size_are_found(tmp_path):
    small_pixels(tmp_path / "cache", "png")
    reseal(tmp_path / "cache", image_shape=[3, 8, 8])
    found = verify_cache(tmp_path / "cache", "full")
    assert_found(found, "data-00000-of-00001.arrow", r"row 0: .* \(it is \(3, 6, 6\), the header says \(3, 8, 8\)\)", EXPORT)


# Quick and full.


def test_quick_looks_at_some_rows_of_every_shard_and_full_at_all(tmp_path):
    header, count = small_header(), 40 * QUICK_ROWS
    rows = small_rows(header, count)
    looked_at = np.linspace(0, count // 2 - 1, QUICK_ROWS).astype(int)  # of each of two shards
    hidden = np.setdiff1d(np.arange(count // 2), looked_at)[100]
    for name, row, quickly in (("seen", looked_at[5], True), ("hidden", hidden, False)):
        damaged = {column: values.copy() for column, values in rows.items()}
        damaged["latent"][count // 2 + row, 0, 0, 0] = np.nan
        write_one_table_a_shard(tmp_path / name, header, damaged, 2)
        assert verify_cache(tmp_path / name, "quick").is_good != quickly
        report = verify_cache(tmp_path / name, "full")
        assert_found(report, "data-00001-of-00002.arrow", f"row {row}, column latent: holds values that are not finite", EXPORT)
        assert report.statistics["mean"] == pytest.approx(np.nanmean(list(damaged.values()), dtype=np.float64), abs=1e-2)


def write_one_table_a_shard(path, header, rows, shards):
    """A cache as an export makes it."""
    schema, places = dataset_schema(header), np.arange(len(rows["latent"]))

    def table(part):
        values = {name: column[part] for name, column in rows.items()}
        return record_batch(schema, values, part % 3, [f"p{place}" for place in part], part, 0 * part)

    write_cache(path, header, ([table(part)] for part in np.array_split(places, shards)), shards)


# Mean and deviation.


@pytest.mark.parametrize(("factor", "is_usual"), [(0.7, False), (0.85, True), (1.0, True), (1.15, True), (1.3, False)])
def test_latents_of_an_unusual_deviation_are_a_warning(tmp_path, factor, is_usual):
    rows = {name: (factor * values).astype(np.float16) for name, values in small_rows(small_header(), 1200).items()}
    write_small_cache(tmp_path / "cache", rows=rows, labels=np.arange(1200) % 3)
    report = verify_cache(tmp_path / "cache", "full")
    assert report.is_good and report.statistics["std"] == pytest.approx(factor, abs=0.03)
    if is_usual:
        assert report.findings == []
    else:
        problem = rf"deviation is {report.statistics['std']:.3f}, usual is 0.8 to 1.2"
        assert_found(report, "header.json", problem, "scale 0.5 or shift 0.1 is not this VAE's", "warning")


# The header against a model and a VAE.


def test_a_model_or_vae_that_does_not_fit_is_found(cache):
    model = {"in_channels": 2, "input_size": 3, "num_classes": 3}
    vae = {"scale": 0.5, "shift": 0.1, "weights_sha256": "aa"}
    assert verify_cache(cache, model=model, vae=vae).findings == []
    for change, problem in (
        ({"in_channels": 4}, "rows have 2 channels, the model 4"),
        ({"input_size": 32}, "rows are 3x3, the model's input 32x32"),
        ({"num_classes": 10}, "the cache has 3 classes, the model 10"),
    ):
        assert_found(verify_cache(cache, model={**model, **change}), "header.json", problem, "the model's own cache")
    for change, problem, advice in (
        ({"scale": 0.18215}, "rows were made with VAE scale 0.5, the model's VAE has 0.18215", "decode with the cache's VAE"),
        ({"shift": 0.0}, "VAE shift 0.1, the model's VAE has 0.0", "decode with the cache's VAE"),
        ({"weights_sha256": "bb"}, r"other VAE weights \(tiny, sha256 aa\.\.\., not bb", "decode with the cache's VAE"),
    ):
        assert_found(verify_cache(cache, vae={**vae, **change}), "header.json", problem, advice)


def test_requirements_are_read_from_a_models_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"in_channels": 4, "input_size": 32, "num_classes": 1000, "depth": 2}')
    assert model_requirements(tmp_path) == {"in_channels": 4, "input_size": 32, "num_classes": 1000}
    for content in ("{", '{"in_channels": 4}', "[]", '{"in_channels": "many", "input_size": 1, "num_classes": 1}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no configuration of an exported model .*: give its folder"):
            model_requirements(tmp_path)


# The command.


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_the_command_says_what_is_good(cache, tmp_path, capsys, mode):
    assert run_tool("verify_cache", cache, "--mode", mode, "--report", tmp_path / "report.json") == 0
    output = capsys.readouterr().out
    for text in ("12 rows of 3 classes in 3 shards", "rows a class: 4 to 4", "mean ", f"{cache}: good ({mode})"):
        assert text in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["is_good"], report["mode"], report["path"], report["findings"]) == (True, mode, str(cache), [])
    assert report["statistics"]["class_rows"] == [4, 4, 4] and report["provenance"]["versions"]


def test_the_command_says_what_is_wrong_where_and_what_to_do(cache, tmp_path, capsys):
    edit_values(cache, 1, "latent", set_number(2, 7, float("nan")))
    (cache / SHARDS[2]).unlink()
    assert run_tool("verify_cache", cache, "--mode", "full", "--report", tmp_path / "new/report.json") == 1
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(f"error: {SHARDS[2]}: is missing")
    assert lines[place + 1].startswith("  what to do: copy the file again")
    assert any(line.startswith(f"error: {SHARDS[1]}: row 2, column latent: holds values that are not finite") for line in lines)
    assert lines[-1] == f"{cache}: NOT good (full)"
    report = json.loads((tmp_path / "new/report.json").read_text())
    assert not report["is_good"]
    assert {(finding["level"], finding["file"]) for finding in report["findings"]} == {("error", SHARDS[1]), ("error", SHARDS[2])}
    assert all(finding["problem"] and finding["advice"] for finding in report["findings"])


def test_warnings_alone_do_not_fail_the_command(tmp_path, capsys):
    rows = {name: (2 * values).astype(np.float16) for name, values in small_rows(small_header(), 12).items()}
    write_small_cache(tmp_path / "cache", rows=rows)
    assert run_tool("verify_cache", tmp_path / "cache") == 0
    assert "warning: header.json: the latents' deviation is" in capsys.readouterr().out


def test_the_command_compares_with_a_model_and_a_vae(tmp_path, capsys):
    vae = load_vae("digits")
    scale, shift = vae_scaling(vae.config)
    record = {"name": "digits", "revision": None, "weights_sha256": weights_hash(vae)}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"in_channels": 2, "input_size": 3, "num_classes": 3}')
    write_small_cache(tmp_path / "cache", small_header(scale=scale, shift=shift, vae=record))
    fitting = ("--model", tmp_path / "model", "--vae", "digits")
    assert run_tool("verify_cache", tmp_path / "cache", *fitting) == 0
    write_small_cache(tmp_path / "other")  # scale 0.5, shift 0.1, other weights
    assert run_tool("verify_cache", tmp_path / "other", *fitting) == 1
    output = capsys.readouterr().out
    assert "rows were made with VAE scale 0.5" in output and "the rows were made with other VAE weights" in output
    (tmp_path / "model/config.json").write_text('{"in_channels": 4, "input_size": 3, "num_classes": 3}')
    assert run_tool("verify_cache", tmp_path / "cache", *fitting) == 1
    assert "rows have 2 channels, the model 4" in capsys.readouterr().out
    assert "is no configuration of an exported model" in run_tool("verify_cache", tmp_path / "cache", "--model", tmp_path)
    assert "is no folder" in run_tool("verify_cache", tmp_path / "cache", "--vae", str(tmp_path / "nowhere"))
