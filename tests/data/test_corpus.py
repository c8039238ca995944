"""The embedded corpus and parquet folders of `prepare.py`: complete or absent, and reproducible."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from config import WriteError
from data.preparation import parquet_writer, stdlib_corpus
from tests.data.parquet_folder import opened, write


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data" / "python-stdlib"
    stdlib_corpus.build(folder)
    return folder


def texts_in(folder: Path) -> list[str]:
    texts: list[str] = pq.read_table(folder).column("text").to_pylist()
    return texts


def test_the_library_is_more_than_5_mb_of_code(built: Path) -> None:
    paths, texts = pq.read_table(built).column("path").to_pylist(), texts_in(built)
    assert 4 <= len(list(built.iterdir())) <= 8
    assert sum(map(len, texts)) > 5_000_000
    assert paths == sorted(paths)
    assert "json/decoder.py" in paths
    assert not [path for path in paths if "/test" in path or "site-packages" in path]
    source = Path(sys.modules["argparse"].__file__ or "").read_text()
    assert texts[paths.index("argparse.py")] == source


def test_two_builds_are_the_same_bytes(built: Path, tmp_path: Path) -> None:
    written = stdlib_corpus.build(tmp_path / "again")
    again = {path.name: path.read_bytes() for path in written.path.iterdir()}
    assert again == {path.name: path.read_bytes() for path in built.iterdir()}
    assert written.files == len(again)
    assert written.documents == pq.read_table(built).num_rows


def test_the_corpus_trains_with_many_segments_and_a_split(built: Path) -> None:
    dataset = opened(built, test_fraction=0.05)
    assert len(dataset.segments(64).sizes) > 100
    assert 0.04 < dataset.stats.test_tokens / dataset.stats.tokens < 0.08
    assert pq.read_metadata(built / "part_000.parquet").num_row_groups > 1


def test_the_name_tells_the_embedded_corpus() -> None:
    assert stdlib_corpus.is_embedded("data/python-stdlib/")
    assert not stdlib_corpus.is_embedded("data/python")


@pytest.mark.slow
def test_several_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    target = stdlib_corpus.build
    builders = [context.Process(target=target, args=(tmp_path / "out",)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert pq.read_table(tmp_path / "out").num_rows > 100


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", full)
    with pytest.raises(WriteError, match="out: cannot be written: No space left"):
        stdlib_corpus.build(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_long_document_has_a_row_group_of_its_own(tmp_path: Path) -> None:
    texts = ["short", "x" * parquet_writer.GROUP_BYTES, "short"]
    parquet_writer.write_folder([(text, "path") for text in texts], tmp_path / "out", 1 << 30)
    (file,) = (tmp_path / "out").iterdir()
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1, 1, 1]


# prepare.py


def test_text_files_are_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(9000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(text)
    (tmp_path / "in" / os.fsdecode(b"\xff.txt")).write_text("short")  # a name that is not UTF-8
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    *pieces, last = texts_in(tmp_path / "out")
    assert ("".join(pieces), last) == (text, "short")
    assert len(pieces) > 4
    assert all(piece.endswith("\n") for piece in pieces)


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    lines = [{"body": "one"}, {"body": ""}, {"body": "zw\u00f6lf \U0001f600"}]
    source = tmp_path / "a.jsonl"
    source.write_text("\n\n".join(json.dumps(line) for line in lines))
    arguments = ["--text-column", "body"]
    assert prepare.main([str(source), str(tmp_path / "out"), *arguments]) == 0
    assert texts_in(tmp_path / "out") == ["one", "zw\u00f6lf \U0001f600"]
    write(tmp_path / "p.parquet", ["x", None, "y"], kind=pa.large_string())
    assert prepare.main([str(tmp_path / "p.parquet"), str(tmp_path / "out2")]) == 0
    assert texts_in(tmp_path / "out2") == ["x", "y"]


def test_the_result_carries_page_checksums(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * 500)
    assert prepare.main([str(tmp_path / "a.txt"), str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    raw = bytearray(file.read_bytes())
    chunk = pq.read_metadata(file).row_group(0).column(0)
    raw[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 4
    file.write_bytes(raw)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(file, page_checksum_verification=True).read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "SOURCE '.*missing': not found"),
        ("a.jsonl", b'{"text": "x"}\n{', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": 1, "id": "x"}', r"a\.jsonl:1: no string 'text'; found: text, id"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y\\ud800"}', r"2: 'text' holds \\ud800 \(c"),
        ("a.parquet", b"<html>", r"starts with '<html>'"),
    ],
)
def test_a_bad_source_is_named_and_nothing_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert prepare.main([str(tmp_path / name), str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert {path.name for path in tmp_path.iterdir()} <= {name}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_source_that_cannot_be_read_is_not_taken_for_the_output(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    source = tmp_path / name
    source.mkdir()  # opening a folder fails for every user
    monkeypatch.setattr(prepare, "local_files", lambda *_: [source])
    assert prepare.main([str(source), str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert str(source) in error
    assert "written" not in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_nothing_and_no_traceback(
    tmp_path: Path, number: signal.Signals
) -> None:
    source, folder = tmp_path / "a.jsonl", tmp_path / "folder"
    source.write_text('{"text": "x"}\n' * 1_000_000)  # takes seconds
    folder.mkdir()
    command = [sys.executable, prepare.__file__, str(source), str(folder / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not list(folder.iterdir()) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == 128 + number
    assert error == b""
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    command = [sys.executable, prepare.__file__, str(tmp_path / "a.txt"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert texts_in(tmp_path / "out") == ["text"]


def test_a_full_folder_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("new")
    write(tmp_path / "out" / "old.parquet", ["old"])
    arguments = [str(tmp_path / "a.txt"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(arguments)
    assert exit_info.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    assert prepare.main([*arguments, "--overwrite"]) == 0
    assert texts_in(tmp_path / "out") == ["new"]
    (tmp_path / "out" / "thesis.doc").touch()
    with pytest.raises(SystemExit):
        prepare.main([*arguments, "--overwrite"])
    assert "holds 'thesis.doc'" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]


def test_the_command_builds_the_corpus_and_says_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["python-stdlib", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Next: python train.py configs/quickstart.yaml" in printed
    assert f"parquet_dir={tmp_path / 'out'}" in printed
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    assert stdlib_corpus.NAME in capsys.readouterr().out
