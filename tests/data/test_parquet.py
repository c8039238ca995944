"""Every way to store text is read, every bad file is named, and memory and files stay bounded."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import os
import random
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from config import DataError
from data.sources import cache as cache_module
from data.sources.parquet import counting
from data.sources.parquet import dataset as parquet_dataset
from data.sources.parquet import index as parquet_index
from data.sources.parquet import reader as parquet_reader
from data.sources.parquet import segments as parquet_segments
from data.sources.parquet.index import Footer, Index
from tests.data.parquet_folder import (
    marked,
    opened,
    segment_count,
    segment_tokens,
    small_bpe,
    split,
    texts_of,
    write,
)


def refused(message: str, folder: Path, **options: Any) -> None:
    """A folder cannot be opened, and the error says why."""
    with pytest.raises(DataError, match=message):
        opened(folder, **options)


def test_all_string_types_and_codecs(tmp_path: Path) -> None:
    texts = ["one", "two", "zw\u00f6lf", "two"] * 5
    dictionary = pa.dictionary(pa.int32(), pa.string())
    for kind in (pa.string(), pa.large_string(), pa.string_view(), dictionary):
        for codec in ("snappy", "zstd", "none"):
            write(tmp_path / "a.parquet", list(texts), kind=kind, compression=codec)
            assert texts_of(opened(tmp_path)) == texts, (kind, codec)


def test_folders_are_searched_in_bytewise_order_and_hidden_names_passed_over(
    tmp_path: Path,
) -> None:
    for name in ("b", "B", "a/z", "a.b", "_x", ".y", "_d/c", "a/.h"):
        write(tmp_path / f"{name}.parquet", [name])
    (tmp_path / "loop").symlink_to(tmp_path)
    assert texts_of(opened(tmp_path)) == ["B", "a.b", "a/z", "b"]


def test_nulls_empty_documents_empty_files_and_nul_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.parquet", ["x", None, "", "y\0z", "w", "\0"])
    write(tmp_path / "b.parquet", [])
    dataset = opened(tmp_path)
    assert texts_of(dataset) == ["x", "y z", "w", " "]
    reader = dataset.segments(1).open_reader()
    for segment in range(segment_count(dataset)):
        reader.tokens(segment, 1, 0, True)
    expected = {"null documents": 1, "empty documents": 1, "NUL bytes replaced": 2}
    assert reader.skipped_counts == expected
    assert "1 of 6 rows are null" in caplog.text
    assert (dataset.stats.files, dataset.stats.rows) == (2, 6)


def made_up_index(rows: list[int], sizes: list[int]) -> Index:
    """One file with these row groups."""
    groups = np.array([(r, s, s, 0) for r, s in zip(rows, sizes, strict=True)], dtype=np.int64)
    one = np.ones(1, dtype=np.int64)
    return Index("root", "text", ("a",), one, one, one * len(rows), groups, one == 0, one)


def test_row_groups_are_cut_as_the_example_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_segments, "MIN_SEGMENTS", 4)
    index = made_up_index([100, 100, 2, 0], [3 << 20, 10 << 20, 20 << 20, 0])
    table = parquet_segments.cut_segments(index, 4 << 20)
    assert table.group.tolist() == [0, 1, 1, 1, 2, 2]
    assert table.rows.tolist() == [100, 34, 34, 32, 1, 1]
    assert table.first.tolist() == [0, 0, 34, 68, 0, 1]
    keys = table.shuffle_key
    assert (keys[1:] == keys[:-1]).tolist() == [False, True, False, False, False]
    assert len(set(table.key.tolist())) == 6


def test_segments_cover_every_row_once_and_are_permuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = marked(tmp_path, files=2, rows=30)
    dataset = opened(tmp_path)
    assert segment_count(dataset) == 60  # small data is cut finely
    assert texts_of(dataset) == texts
    monkeypatch.setattr(parquet_segments, "MIN_SEGMENTS", 2)
    monkeypatch.setattr(parquet_segments, "SEGMENT_ROWS", 4)
    dataset = opened(tmp_path)
    assert dataset.segments(1).table.rows.tolist() == [4, 4, 2] * 6
    assert texts_of(dataset) == texts
    shuffled = texts_of(dataset, shuffle=True)
    assert shuffled != texts
    assert sorted(shuffled) == sorted(texts)


@pytest.mark.parametrize("whole", [0, 1 << 20])
def test_large_row_groups_are_read_in_parts_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(parquet_reader, "WHOLE_GROUP_BYTES", whole)
    texts = [f"{i} " * (i % 9 + 1) for i in range(500)]
    write(tmp_path / "a.parquet", list(texts), row_group_size=250)
    dataset = opened(tmp_path)
    assert segment_count(dataset) > 100
    expected = segment_tokens(dataset)
    assert texts_of(dataset) == texts
    reader, every = dataset.segments(1).open_reader(), range(segment_count(dataset))
    for order in (reversed(every), random.Random(0).sample(every, len(every))):
        for segment in order:
            assert np.array_equal(reader.tokens(segment, 1, 0, False), expected[segment])


def test_a_segment_is_larger_than_planned_only_by_a_long_document(tmp_path: Path) -> None:
    long = "x" * (3 * parquet_segments.SEGMENT_BYTES)
    texts = ["short"] * 500 + [long] + ["short"] * 499
    write(tmp_path / "a.parquet", list(texts), row_group_size=1000, use_dictionary=False)
    sizes = sorted(len(tokens) for tokens in segment_tokens(opened(tmp_path)))
    assert sum(sizes) == sum(len(text) + 1 for text in texts)
    assert len(long) < sizes[-1] < len(long) + 1000
    assert sizes[-2] < 1000


def test_large_row_groups_are_warned_of_once_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, length in (("a", 6_000), ("b", 9_000), ("c", 4)):
        write(tmp_path / f"{name}.parquet", [f"{i}" * length for i in range(10)])
    write(tmp_path / "one.parquet", ["z" * 200_000])  # cannot be smaller
    opened(tmp_path)
    assert not caplog.records
    monkeypatch.setattr(parquet_dataset, "LARGE_GROUP_BYTES", 1 << 15)
    opened(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 of 4 row groups hold more than 0 MB, the largest 0 MB")
    assert "b.parquet row group 0): reading is slow" in line
    assert line.endswith(f"python prepare.py {tmp_path} OUT")


def test_open_files_stay_within_the_limit(tmp_path: Path) -> None:
    marked(tmp_path, files=12, rows=5)
    dataset = opened(tmp_path, max_cached_files=3)
    before = len(os.listdir("/proc/self/fd"))
    reader = dataset.segments(1).open_reader()
    for segment in random.Random(0).sample(range(segment_count(dataset)), 40):
        reader.tokens(segment, 1, 0, True)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_returns_to_what_the_segments_hold(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["x" * 50_000] * 100, row_group_size=20, use_dictionary=False)
    dataset = opened(tmp_path)
    reader = dataset.segments(1).open_reader()
    before = pa.total_allocated_bytes()
    for _ in range(3):
        for segment in range(segment_count(dataset)):
            tokens = reader.tokens(segment, 1, 0, True)
        held = pa.total_allocated_bytes() - before
        assert held <= parquet_reader.KEPT_BYTES + 2 * len(tokens) + (1 << 20)


# Errors: what, where, found value, remedy.

BROKEN: list[tuple[bytes | slice, str]] = [
    (b"", r"b\.parquet: empty \(interrupted download\?\)"),
    (b"<!DOCTYPE html><html>404</html>", r"b\.parquet starts with '<!DOCTYPE html>.*error page"),
    (b'{"error": 404}', r"starts with '\{\"error\": 404\}'"),
    (
        b"version https://git-lfs.github.com/spec/v1\n",
        r"b\.parquet is a Git LFS pointer.*git lfs pull",
    ),
    (slice(0, -9), r"b\.parquet: no footer; 0\.0 MB present"),
    (b"some text", r"b\.parquet: not a parquet file"),
    (b"PAR1" + b"\xff" * 99 + b"PAR1", r"its footer is damaged"),
]


def test_a_file_that_is_not_parquet_is_named_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.parquet", ["good"])
    good = write(tmp_path / "b.parquet", ["bad"]).read_bytes()
    for content, message in BROKEN:
        broken = good[content] if isinstance(content, slice) else content
        (tmp_path / "b.parquet").write_bytes(broken)
        refused(message, tmp_path)
        caplog.clear()
        assert texts_of(opened(tmp_path, on_bad_shard="skip")) == ["good"]
        assert re.search(message, caplog.text)


def test_all_files_bad_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    refused("none of its 1 parquet files can be read: .*empty", tmp_path, on_bad_shard="skip")


def test_a_missing_or_wrong_folder_is_explained(tmp_path: Path) -> None:
    refused(r"'nowhere': not found \(working directory: .*prepare", Path("nowhere"))
    refused(r"holds no \*\.parquet \(found nothing\)\. Correct the path", tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c.tmp"):
        (tmp_path / name).touch()
    refused(r"holds no \*\.parquet \(found 2 \*\.jsonl, 1 \*\.tmp\)", tmp_path)
    refused("is a file; give its folder", write(tmp_path / "a.parquet", ["x"]))


@pytest.mark.parametrize("name", ["my text/a.jsonl.gz", "it's.txt", "c4/x.json.zst", "b/c.json"])
def test_text_that_is_not_parquet_is_answered_with_the_command_that_prepares_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "text" if name.endswith(".txt") else '{"id": "1", "content": "text"}\n'
    packed = {".gz": gzip.compress, ".zst": lambda data: bytes(pa.compress(data, "zstd"))}
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(packed.get(path.suffix, bytes)(text.encode()))
    given = path if path.suffix == ".txt" else path.parent
    Path(given.parent, "README").touch()
    for _ in range(2):  # the second command must not name the folder that the first one wrote
        with pytest.raises(DataError) as caught:
            opened(given)
        said = re.search(r"then set (.*)=(.*): python prepare.py (.*)$", str(caught.value))
        assert said is not None and said[1] == "dataset.parquet_dir"
        assert prepare.main(shlex.split(said[3])) == 0
        assert texts_of(opened(Path(said[2]))) == ["text"]


def test_the_command_that_prepares_text_keeps_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    then = r"then set dataset.parquet_dir=(\S*) dataset.text_column=auto"
    refused(rf"{then}: python prepare.py \S* \1 --text-column body$", tmp_path, text_column="body")


def test_the_text_column_must_be_there_and_hold_strings(tmp_path: Path) -> None:
    table = pa.table({"content": ["x"], "id": [1], "tags": [["y"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused("no column 'text'; columns: content, id, tags", tmp_path, text_column="text")
    refused("'id' is int64, not string; string columns: content", tmp_path, text_column="id")
    refused("'tags' is list<.*>, not string", tmp_path, text_column="tags")
    assert texts_of(opened(tmp_path, text_column="content")) == ["x"]
    pq.write_table(pa.table({"id": ["s"], "content": ["y"]}), tmp_path / "b.parquet")
    assert texts_of(opened(tmp_path, text_column="content")) == ["x", "y"]  # others may differ
    pq.write_table(pa.table({"content": [1]}), tmp_path / "c.parquet")
    refused(r"c\.parquet: column 'content' is int64", tmp_path, text_column="content")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"url": "s", "body": "s", "content": "s"}, "content"),
        ({"id": 1, "story": "s"}, "story"),
        ({"title": "s", "story": "s"}, "Columns of strings: title, story. Name one: dataset.text_"),
        ({"id": 1}, "which one holds the text. Columns of strings: none"),
        ({"id": "s", "text": b"s"}, "column 'text' is binary, not string; string columns: id"),
        ({"id": "s", "text": ["s"]}, "column 'text' is list"),
        ({"id": 1, "nested": {"text": "s"}, "story": "s"}, "story"),
    ],
)
def test_the_text_column_is_the_only_one_of_strings_or_has_a_usual_name(
    columns: dict[str, Any], found: str, tmp_path: Path
) -> None:
    table = pa.table({name: [value] for name, value in columns.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    if found not in columns:
        refused(found, tmp_path)
        return
    dataset, named = opened(tmp_path), opened(tmp_path, text_column=found)
    assert texts_of(dataset) == ["s"] and dataset.fingerprint == named.fingerprint
    (tmp_path / "0.parquet").write_bytes(b"")
    refused("empty", tmp_path)
    assert texts_of(opened(tmp_path, on_bad_shard="skip")) == ["s"]


def test_mostly_null_or_no_rows_or_one_row(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.parquet", ["x", None, None])
    refused("'text' is null in 2 of 3 rows", tmp_path / "a")
    write(tmp_path / "b" / "a.parquet", [])
    refused("1 parquet files hold no rows", tmp_path / "b")
    write(tmp_path / "c" / "a.parquet", ["x"])
    refused("1 row cannot be split.*test_fraction: 0", tmp_path / "c", test_fraction=0.1)


def test_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    bad = pa.array([b"ok"] * 12 + [b"\xff\xfe"] + [b"ok"] * 7, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(DataError, match=r"a\.parquet row group 1: the text of row 2 is not UTF-8"):
        texts_of(opened(tmp_path))
    assert len(texts_of(opened(tmp_path, on_bad_shard="skip"))) == 19


@pytest.mark.slow
def test_every_flipped_bit_in_a_page_is_found(tmp_path: Path) -> None:
    texts = [f"document {i} " * 9 for i in range(40)]
    draw = random.Random(1)
    for compression in ("zstd", "snappy", "none"):
        path = tmp_path / "a.parquet"
        write(path, list(texts), row_group_size=40, compression=compression)
        clean = path.read_bytes()
        chunk = pq.read_metadata(path).row_group(0).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        for _ in range(60):
            place = draw.randrange(start, start + chunk.total_compressed_size)
            flipped = bytearray(clean)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            try:
                assert texts_of(opened(tmp_path)) == texts  # a header bit that says nothing
            except DataError as error:
                assert "a.parquet row group 0: " in str(error)  # noqa: PT017


def test_a_damaged_page_is_skipped_aloud_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path / "a.parquet",
        ["first " * 40, "second " * 40],
        row_group_size=1,
        use_dictionary=False,
        write_statistics=False,  # the page header would hold the text once more
    )
    chunk = pq.read_metadata(path).row_group(0).column(0)
    raw = bytearray(path.read_bytes())
    raw[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(raw)
    reader = opened(tmp_path, on_bad_shard="skip").segments(1).open_reader()
    for epoch in range(2):
        assert [len(reader.tokens(i, 1, epoch, True)) for i in (0, 1)] == [0, 281]
    (line,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "row group 0" in line


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_file_that_vanishes_or_changes_stops_the_run(tmp_path: Path, policy: str) -> None:
    path = write(tmp_path / "a.parquet", ["x"])
    dataset = opened(tmp_path, on_bad_shard=policy)
    write(path, ["xyz" * 50])
    with pytest.raises(DataError, match=r"a\.parquet: changed during the run"):
        segment_tokens(dataset)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet: there at the start of the run, now No such"):
        segment_tokens(dataset)


# The cache and the fingerprint.


def test_the_index_is_cached_and_a_changed_file_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened(tmp_path / "data")
    read: list[str] = []
    real = parquet_index.read_footer

    def noted(path: str, column: str) -> Footer:
        read.append(path)
        return real(path, column)

    monkeypatch.setattr(parquet_index, "read_footer", noted)
    opened(tmp_path / "data")
    assert read == []
    changed = write(tmp_path / "data" / "part_1.parquet", ["new"])
    assert opened(tmp_path / "data").stats.rows == 81
    assert read == [str(changed)]


@pytest.mark.slow
def test_whatever_the_cache_holds_it_is_made_again_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = marked(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    summary = opened(tmp_path / "data").summary()
    (cache,) = (tmp_path / "cache" / "hatchery").iterdir()
    clean, draw = cache.read_bytes(), random.Random(4)
    archive = io.BytesIO()
    np.savez(archive, names=np.zeros(3), stats=np.full(9, -1), groups=np.array("x"))
    damages = [b"", b"junk", b"PK\x03\x04 junk", archive.getvalue(), clean[16:], clean + b"\0"]
    damages += [clean[: draw.randrange(len(clean))] for _ in range(16)]
    for _ in range(28):
        damaged = bytearray(clean)
        damaged[draw.randrange(len(clean))] ^= 1 << draw.randrange(8)
        damages.append(bytes(damaged))
    assert not caplog.records
    for damage in damages:
        cache.write_bytes(damage)
        caplog.clear()
        assert opened(tmp_path / "data").summary() == summary
        (line,) = caplog.messages
        assert line == f"Cache {cache}: not as it was written; it is made again from the data"
        assert cache.read_bytes() == clean
    other = cache.with_name("index-0.npz")
    cache_module.save_arrays(other, {"names": np.zeros(3)})
    other.replace(cache)  # whole, and of something else
    assert texts_of(opened(tmp_path / "data")) == texts
    cache.unlink()
    for kind in ("folder", "FIFO"):
        cache.mkdir() if kind == "folder" else os.mkfifo(cache)
        caplog.clear()
        assert texts_of(opened(tmp_path / "data")) == texts
        assert "made again from the data" in caplog.text
        cache.rmdir() if kind == "folder" else cache.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data" / "part_0.parquet"))
    assert texts_of(opened(tmp_path / "data")) == texts


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_files_without_page_checksums_are_counted_at_the_start(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    for name, protected in (("a", True), ("b", False), ("c", False)):
        path = tmp_path / "it's" / f"{name}.parquet"
        write(path, ["text " * 9] * 30, write_page_checksum=protected, **options)
    (line,) = opened(path.parent).lines()[1:]
    assert line == (
        f"Page checksums: none in 2 of 3 files ({path.with_name('b.parquet')}): damage to their "
        f"text may go unnoticed. To add them: python prepare.py "
        f"{shlex.quote(str(path.parent))} OUT"
    )
    assert opened(path.parent).lines()[1:] == [line]  # from the cache
    assert prepare.main([str(path.parent), str(tmp_path / "new")]) == 0
    assert len(opened(tmp_path / "new").lines()) == 1


def test_the_fingerprint_names_the_first_difference(tmp_path: Path) -> None:
    marked(tmp_path)
    saved = opened(tmp_path).summary()
    opened(tmp_path).check_unchanged(saved)
    with pytest.raises(DataError, match=r"test_fraction was 0\.0, is 0\.1"):
        opened(tmp_path, test_fraction=0.1).check_unchanged(saved)
    write(tmp_path / "z.parquet", ["new"])
    with pytest.raises(DataError, match=r"z\.parquet is new"):
        opened(tmp_path).check_unchanged(saved)
    (tmp_path / "z.parquet").unlink()
    write(tmp_path / "part_1.parquet", ["other"])
    with pytest.raises(DataError, match=r"part_1\.parquet had \d+ bytes, has \d+"):
        opened(tmp_path).check_unchanged(saved)
    (tmp_path / "part_1.parquet").unlink()
    with pytest.raises(DataError, match=r"part_1\.parquet is gone"):
        opened(tmp_path).check_unchanged(saved)


def test_the_split_is_disjoint_and_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    marked(tmp_path / "a")
    marked(tmp_path / "b")
    first, second = (opened(tmp_path / name, test_fraction=0.1) for name in "ab")
    train, test = split(first, "train"), split(first, "test")
    assert not set(train) & set(test)
    assert sorted([*train, *test]) == list(range(segment_count(first)))
    assert np.array_equal(test, split(second, "test"))
    assert first.summary()["fingerprint"] == second.summary()["fingerprint"]
    share = first.stats.test_tokens / first.stats.tokens
    assert 0.05 < share < 0.15


# Tokens that are not bytes.


TEXT = "the egg hatches when warm and its wings grow with neurons that fire \u00e4\u4e2d"


def sentences(count: int = 300) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(TEXT.split(), k=draw.randint(1, 40))) for _ in range(count)]


def test_any_tokenizer_reads_the_documents_in_the_same_order(tmp_path: Path) -> None:
    texts = sentences()
    write(tmp_path / "a.parquet", list(texts), row_group_size=50)
    dataset = opened(tmp_path, small_bpe(tmp_path, texts))
    end = dataset.tokenizer.separator
    assert end is not None
    stream = np.concatenate(segment_tokens(dataset, shuffle=True))
    assert stream.dtype == np.uint16
    documents = np.split(stream, np.flatnonzero(stream == end) + 1)[:-1]
    assert [dataset.tokenizer.decode(each) for each in documents] == texts_of(
        opened(tmp_path), shuffle=True
    )


@pytest.mark.slow
def test_tokens_are_counted_or_said_to_be_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*sentences(2000), *sentences(300) * 5]
    write(tmp_path / "a.parquet", [*texts, None, ""], row_group_size=100)
    names = ["bytes", small_bpe(tmp_path, texts[:300])]
    limits = {"READ_BYTES": 1, "ENCODE_BYTES": 20_000, "SAMPLE_SEGMENTS": 40}
    for name, limit in itertools.product(names, [None, "ENCODE_BYTES", "READ_BYTES"]):
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {limit}"))
        for key in limits if limit == "READ_BYTES" else filter(None, [limit]):
            monkeypatch.setattr(counting, key, limits[key])
        dataset = opened(tmp_path, name, test_fraction=0.1)
        stats = dataset.stats
        exact = sum(map(len, segment_tokens(dataset)))
        line = dataset.lines()[0]
        if limit is None or (name, limit) == ("bytes", "ENCODE_BYTES"):
            assert (stats.tokens, stats.error) == (exact, 0)
            assert "about" not in line
        else:
            assert 0 < stats.error < 0.2
            assert stats.tokens == pytest.approx(exact, rel=max(2 * stats.error, 0.02))
            assert f"tokens (estimated, to within {stats.error:.1%})" in line
        monkeypatch.setattr(
            parquet_reader.DocumentReader, "measure", None
        )  # may not be called again
        assert opened(tmp_path, name, test_fraction=0.1).stats == stats


def test_text_that_cannot_be_read_is_no_text_and_counted_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = pa.array([b"ok"] * 4 + [b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet", row_group_size=1)
    with pytest.raises(DataError, match="row group 4: the text of row 0 is not UTF-8"):
        opened(tmp_path).lines()
    for _ in range(2):
        caplog.clear()
        assert opened(tmp_path, on_bad_shard="skip").stats.tokens == 12
        assert "row group 4: the text of row 0 is not UTF-8" in caplog.text


def test_characters_are_those_of_the_whole_text_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "data" / "a.parquet", ["abc", None, "", "z\u00e9"] * 20)
    write(tmp_path / "data" / "b.parquet", ["\U0001f409\n"])
    dataset = opened(tmp_path / "data", "char", test_fraction=0.3)
    assert dataset.tokenizer.decode(range(dataset.vocab_size)) == "\nabcz\u00e9\U0001f409"
    tokens = np.concatenate(segment_tokens(dataset))
    assert dataset.tokenizer.decode(tokens) == "abcz\u00e9" * 20 + "\U0001f409\n"
    saved = dataset.summary()
    monkeypatch.setattr(parquet_reader.DocumentReader, "read", None)  # not needed again
    opened(tmp_path / "data", "char", test_fraction=0.3).check_unchanged(saved)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "data" / "b.parquet", ["\U0001f40a\n"])
    changed = opened(tmp_path / "data", "char", test_fraction=0.3)
    assert "\U0001f40a" in changed.tokenizer.decode(range(changed.vocab_size))
    with pytest.raises(DataError, match=r"tokenizer was char-\w+, is char-\w+"):
        changed.check_unchanged(saved)


def test_the_line_of_the_data_says_what_there_is_and_auto_means_bytes(tmp_path: Path) -> None:
    plain = {"use_dictionary": False, "write_statistics": False}
    write(tmp_path / "a.parquet", ["x" * 999] * 100, **plain)
    (line,) = opened(tmp_path, test_fraction=0.1).lines()
    sizes = "100 k tokens: 90 k to train on, 10 k held out"
    assert re.fullmatch(rf"Data: {tmp_path}: 1 file, 100 rows, {sizes}", line)
    assert opened(tmp_path, "auto").summary() == opened(tmp_path, "bytes").summary()


def test_a_batch_of_other_tokens_names_its_documents(tmp_path: Path) -> None:
    texts = sentences(60)
    write(tmp_path / "a.parquet", list(texts))
    dataset = opened(tmp_path, small_bpe(tmp_path, texts))
    reader, end = dataset.segments(1).open_reader(), dataset.tokenizer.separator
    for segment, tokens in enumerate(segment_tokens(dataset, shuffle=True)):
        parts = reader.locate(segment, 1, 0, True, range(len(tokens)))
        assert len(parts) == (tokens == end).sum()
        for part in parts:
            found = re.fullmatch(r".*a\.parquet row group (\d) rows", part.place)
            assert found
            text = dataset.tokenizer.decode(tokens[part.tokens.start : part.tokens.stop])
            assert texts[10 * int(found[1]) + part.numbers.start] == text
