"""`prepare.py --tokenizer`: the same files whatever the processes, stops and cuts on the way."""

from __future__ import annotations

import collections
import concurrent.futures
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from config import DataError, TokenizerConfig, UserError, WriteError
from data.preparation import convert, corpus, download
from data.preparation import raw_text as sources
from data.preparation import token_writer as writer
from data.sources.meta import read_meta
from data.tokenizers.base import Tokenizer
from data.tokenizers.bpe import train_bpe
from data.tokenizers.build import build_tokenizer
from data.tokenizers.simple import ByteTokenizer
from tests.conftest import TEXT
from tests.data.parquet_folder import write

_PIECE = 8192


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several pieces in little text, and a note after each."""
    monkeypatch.setattr(sources, "PIECE_BYTES", _PIECE)
    monkeypatch.setattr(writer, "_NOTE_EVERY_S", 0.0)
    monkeypatch.chdir(tmp_path)


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    blanks = [" ", " ", " ", "\n", "\n\n", "  ", ", ", " \U0001f409 ", "na\u00efve", "\u65e5\u672c"]
    return "".join(draw.choice(TEXT.split()) + draw.choice(blanks) for _ in range(count))


def text_file(name: str = "a.txt", count: int = 6000) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words(count), encoding="utf-8")
    return path


def json_lines(name: str = "a.jsonl", count: int = 900) -> list[str]:
    texts = [words(n % 17, seed=n % 800) for n in range(count)]  # some empty, some equal
    lines = [json.dumps({"text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    Path(name).write_text("\n".join(lines), encoding="utf-8")
    return [text for text in texts if text]


@pytest.fixture
def bpe() -> Tokenizer:
    """In bpe.json."""
    tokenizer = train_bpe("bpe.json", [words(3000)], 400)
    Path("bpe.json").write_text(tokenizer.to_dict()["json"], encoding="utf-8")
    return build_tokenizer(TokenizerConfig(name="bpe.json"))


def run(*arguments: object, code: int = 0) -> None:
    assert prepare.main([*map(str, arguments), "--workers", "1"]) == code


def tokens(path: str | Path, dtype: str = "uint16") -> list[int]:
    ids: list[int] = np.fromfile(path, dtype=dtype).tolist()
    return ids


def contents(folder: str | Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


# What is written


def test_characters_are_split_and_numbered_as_nanogpt_does() -> None:
    text = text_file().read_text(encoding="utf-8")
    characters = sorted(set(text))
    run("a.txt", "out", "--tokenizer", "char")
    at = int(len(text) * 0.9)
    assert tokens("out/train.bin") == [characters.index(c) for c in text[:at]]
    assert tokens("out/val.bin") == [characters.index(c) for c in text[at:]]
    meta = read_meta("out/train.bin")
    assert meta is not None
    assert (meta.vocab_size, meta.dtype) == (len(characters), "uint16")
    assert json.loads(Path("out/meta.json").read_text())["tokens"] == {
        "train": at,
        "val": len(text) - at,
    }
    assert sorted(os.listdir("out")) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.001])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(bpe: Tokenizer, fraction: float) -> None:
    text = text_file().read_text(encoding="utf-8")
    run("a.txt", "out", "--tokenizer", "bpe.json", "--val-fraction", fraction)
    at = int(len(text) * (1 - fraction))
    assert len(sources.plan_pieces([Path("a.txt")], "text")) > 4
    assert tokens("out/train.bin") == bpe.encode(text[:at]).tolist()
    assert tokens("out/val.bin") == bpe.encode(text[at:]).tolist()


def test_text_without_blanks_is_cut_between_tokens(bpe: Tokenizer) -> None:
    text = "\u65e5\u672cnest" * 5000
    Path("a.txt").write_text(text, encoding="utf-8")
    run("a.txt", "all.ids", "--tokenizer", "bpe.json")
    assert bpe.decode(tokens("all.ids")) == text


def test_documents_end_with_the_separator_and_keep_their_order(bpe: Tokenizer) -> None:
    texts = json_lines()
    run("a.jsonl", "out", "--tokenizer", "bpe.json")
    ids = {name: tokens(f"out/{name}.bin") for name in ("train", "val")}
    sides = {name: documents(bpe, ids[name]) for name in ids}
    assert sorted(sides["train"] + sides["val"]) == sorted(texts)
    assert 0.03 < len(sides["val"]) / len(texts) < 0.2
    assert not set(sides["train"]) & set(sides["val"])  # equal documents are on one side
    held_out = set(sides["val"])
    assert sides["train"] == [text for text in texts if text not in held_out]
    assert sides["val"] == [text for text in texts if text in held_out]


def documents(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == tokenizer.separator:
            parts.append([])
        else:
            parts[-1].append(i)
    assert parts.pop() == []
    return [tokenizer.decode(part) for part in parts]


def test_every_kind_of_source_gives_the_same_tokens() -> None:
    texts = json_lines()
    write(Path("p/a.parquet"), [None, *texts], row_group_size=300)
    run("a.jsonl", "one.ids", "--tokenizer", "bytes")
    run("p", "two.ids", "--tokenizer", "bytes")
    expected = ByteTokenizer().encode_documents(texts).tolist()
    assert tokens("one.ids") == tokens("two.ids") == expected
    for number, text in enumerate(texts[:50]):
        Path(f"t{number // 10}").mkdir(exist_ok=True)
        Path(f"t{number // 10}/{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
    run("t2", "three.ids", "--tokenizer", "bytes")
    assert tokens("three.ids") == ByteTokenizer().encode_documents(texts[20:30]).tolist()


def test_long_text_files_of_a_folder_are_one_document_each() -> None:
    names = [f"in/{n:02d}.txt" for n in range(12)]
    texts = [text_file(name, 3000 + n).read_text(encoding="utf-8") for n, name in enumerate(names)]
    run("in", "out", "--tokenizer", "bytes", "--val-fraction", 0.4)
    found = {n: documents(ByteTokenizer(), tokens(f"out/{n}.bin")) for n in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(texts)


def test_a_large_row_group_is_read_in_parts() -> None:
    texts = [words(40, n) for n in range(300)]
    write(Path("a.parquet"), list(texts), row_group_size=1000)
    pieces = sources.plan_pieces([Path("a.parquet")], "text")
    assert len(pieces) > 3
    assert [t for piece in pieces for t in sources.read_piece(piece, "text")] == texts


def test_characters_of_many_documents_are_one_text() -> None:
    texts = json_lines()
    run("a.jsonl", "out", "--tokenizer", "char")
    meta = read_meta("out/train.bin")
    assert meta is not None
    assert meta.tokenizer is not None
    parts = [tokens(f"out/{name}.bin") for name in ("train", "val")]
    assert meta.tokenizer.decode(parts[0] + parts[1]) == "".join(texts)
    assert len(parts[0]) == int(0.9 * len("".join(texts)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "auto"])
def test_arrays_of_numpy_can_be_loaded(dtype: str) -> None:
    text = text_file().read_bytes()
    options = ["--format", "npy", "--dtype", dtype, "--val-fraction", 0]
    run("a.txt", "out", "--tokenizer", "bytes", *options)
    ids = np.load("out/train.npy", mmap_mode="r")
    assert ids.dtype.name == ("uint16" if dtype == "auto" else dtype)
    assert bytes(ids.astype(np.uint8)) == text
    assert sorted(os.listdir("out")) == ["meta.json", "train.npy"]


def test_one_tokenizer_serves_two_texts(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("abcdef")
    Path("b.txt").write_text("fade")
    run("a.txt", "train.ids", "--tokenizer", "char")
    run("b.txt", "valid.ids", "--tokenizer", "train.meta.json")
    assert tokens("valid.ids") == [5, 0, 3, 4]
    assert capsys.readouterr().out.endswith(
        "Next: python train.py configs/quickstart.yaml "
        "train_data_path=train.ids val_data_path=valid.ids\n"
    )
    Path("c.txt").write_text("fa\nxe")
    run("c.txt", "other.ids", "--tokenizer", "train.meta.json", code=3)
    error = capsys.readouterr().err
    assert error.startswith("c.txt: the character '\\n' (number 3, in line 1) is not among the 6")
    assert not Path(".other.ids.partial").exists()


def test_two_processes_write_what_one_does(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_PIECES_PER_PROCESS", 1)
    json_lines()
    assert bpe.vocab_size == 400
    run("a.jsonl", "one", "--tokenizer", "bpe.json")
    assert prepare.main(["a.jsonl", "two", "--tokenizer", "bpe.json", "--workers", "2"]) == 0
    assert contents("one") == contents("two")


def test_a_worker_that_dies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: concurrent.futures.Future[Any] = concurrent.futures.Future()
    broken.set_exception(BrokenProcessPool())
    any_value: Any = None
    with pytest.raises(UserError, match="ended from outside .* goes on where it stopped"):
        list(convert._results(any_value, any_value, collections.deque([broken]), []))


@pytest.mark.parametrize("name", ["a.log", "README", "a.Md", "a.b.rst"])
def test_a_text_may_have_any_ending(name: str) -> None:
    text = text_file(name).read_text(encoding="utf-8")
    run(name, "out.ids", "--tokenizer", "bytes")
    assert bytes(tokens("out.ids")).decode() == text
    assert prepare.main([name, "out"]) == 0
    assert "".join(pq.read_table("out")["text"].to_pylist()) == text
    assert prepare.main(["train-tokenizer", name, "own.json", "--vocab-size", "300"]) == 0


def test_of_a_folder_the_files_that_are_meant_are_taken_and_the_others_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("in/b.md", "in/deep/a.rst", "in/.git/config", "in/.hidden"):
        text_file(name, 20)
    Path("in/c.png").write_bytes(b"\x89PNG\0")
    Path("in/settings.json").write_text("{}")
    run("in", "one.ids", "--tokenizer", "bytes")
    texts = [Path(name).read_text(encoding="utf-8") for name in ("in/b.md", "in/deep/a.rst")]
    assert tokens("one.ids") == ByteTokenizer().encode_documents(texts).tolist()
    assert re.search(r"Left out of in: 1 \*\.\w+, 1 \*\.\w+\n", capsys.readouterr().err)
    Path("in/lines.JSONL").write_text('{"text": "wing"}\n')
    run("in", "two.ids", "--tokenizer", "bytes")
    assert tokens("two.ids") == ByteTokenizer().encode_documents(["wing"]).tolist()
    for path in (*Path("in").rglob("*.*"), Path("in/deep")):
        if path.is_file() and path.suffix != ".png":
            path.unlink()
    run("in", "three.ids", "--tokenizer", "bytes", code=3)
    assert "SOURCE 'in' holds no text (found 1 *.png)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.log", b"\x1f\x8b\x08", r"a\.log: not text in UTF-8 \(byte 1\)\. Unpack archives"),
        ("train.bin", b"a\0b\0", r"train\.bin: not text .*python train\.py train_data_path=FILE"),
        ("a.md", b"x " * 35000 + b"\xff", r"a\.md: not UTF-8 \(byte 70000\)"),
        ("a.json", b'[\n{"text": "x"}]', r"a\.json:1: not JSON .*every line is one record"),
    ],
)
def test_what_is_not_text_is_refused_whatever_its_name(
    name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    for arguments in ([name, "out", "--tokenizer", "bytes", "--workers", "1"], [name, "out"]):
        assert prepare.main(arguments) == 3
        assert re.search(message, capsys.readouterr().err)
    assert prepare.main(["train-tokenizer", name, "own.json"]) == 3
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ([b"text"], r"binary, not string; string columns: path\. Name .*str\.decode\('utf-8'\)"),
        ([["a", "b"]], r"list<\w+: string>, not string; .*df\.explode\('text'\)"),
        (
            [1],
            r"int64, not string; .*dataset\.text_column=NAME, with prepare\.py --text-column NAME$",
        ),
    ],
)
def test_a_column_that_prepare_cannot_read_is_not_sent_to_it(
    values: list[Any], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"text": values, "path": ["a"]}), "a.parquet")
    assert prepare.main(["a.parquet", "out"]) == 3
    assert re.search(remedy, capsys.readouterr().err.strip())


def test_the_recipe_that_is_proposed_fits_the_text() -> None:
    folder, file = job(out=Path("data/mine")), job(out=Path("all.ids"))
    assert prepare._next_arguments(folder, 2_000_000).startswith("configs/quickstart.yaml ")
    middle = prepare._next_arguments(file, 100_000_000)
    paths = "train_data_path=all.ids val_data_path=null"
    assert middle == f"configs/cs336-tinystories.yaml vocab_size=null {paths}"
    assert prepare._next_arguments(folder, 9_000_000_000) == "dataset=mine"


# Stops


def job(**changes: Any) -> convert.Job:
    values: dict[str, Any] = {
        "files": (Path("a.jsonl"),),
        "out": Path("out"),
        "column": "text",
        "tokenizer": ByteTokenizer(),
        "ending": ".bin",
        "dtype": None,
        "val_fraction": 0.1,
        "workers": 1,
        "restart": False,
    }
    return convert.Job(**(values | changes))


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "npy", "one file"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_stopped_conversion_goes_on_and_ends_the_same(
    kind: str, killed: bool, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    json_lines(count=600)
    kinds: dict[str, dict[str, Any]] = {
        "bytes": {},
        "char": {"tokenizer": None},
        "bpe": {"tokenizer": bpe},
        "npy": {"ending": ".npy"},
        "one file": {"out": Path("out/all.npy"), "ending": ".npy"},
    }
    changes = kinds[kind]
    for _ in convert.convert(job(**changes)):
        pass
    whole = contents("out")
    shutil.rmtree("out")
    if killed:  # nothing is said at the end, and more was written than was noted
        note = writer.TokenWriter._note

        def rarely(self: writer.TokenWriter) -> None:
            if self.counts.pieces % 2 == 0:
                note(self)

        def die(self: writer.TokenWriter) -> None:
            for file in self._files.values():
                file.close()

        monkeypatch.setattr(writer.TokenWriter, "_note", rarely)
        monkeypatch.setattr(writer.TokenWriter, "close", die)
    stops = kept = 0
    while not existing_meta(changes):
        stops += 1
        assert stops < 50
        for step, progress in enumerate(convert.convert(job(**changes))):
            kept = max(kept, progress.kept)
            if progress.stage == "encoding" and progress.counts.pieces and step > stops:
                break
        if killed and not existing_meta(changes):
            for path in Path("out").rglob("*.bin"):
                with path.open("ab") as file:
                    file.write(b"torn")
    assert contents("out") == whole
    assert kept > 0
    assert not [path for path in Path("out").iterdir() if path.is_dir()]


def existing_meta(changes: dict[str, Any]) -> bool:
    return job(**changes).meta.exists()


def test_work_that_lost_a_file_begins_again() -> None:
    json_lines()
    steps = convert.convert(job())
    while next(steps).counts.pieces < 2:
        pass
    steps.close()
    Path("out/.partial/val.bin").write_bytes(b"")
    assert next(convert.convert(job())).kept == 0


def test_unfinished_work_of_another_kind_is_kept_until_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    json_lines()
    steps = convert.convert(job())
    while next(steps).counts.pieces < 2:
        pass
    steps.close()
    arguments = ["a.jsonl", "out", "--tokenizer", "bytes", "--val-fraction", "0.2"]
    run(*arguments, code=3)
    assert "unfinished work of another source, tokenizer or options" in capsys.readouterr().err
    assert Path("out/.partial/state.json").exists()
    run(*arguments, "--overwrite")
    assert sorted(os.listdir("out")) == ["meta.json", "train.bin", "val.bin"]


def test_a_changed_source_is_not_gone_on_with() -> None:
    json_lines()
    steps = convert.convert(job())
    while next(steps).counts.pieces < 2:
        pass
    steps.close()
    os.utime("a.jsonl", (1, 1))
    with pytest.raises(DataError, match="another source"):
        next(convert.convert(job()))


def test_ctrl_c_keeps_the_work_and_says_how_to_go_on() -> None:
    Path("a.jsonl").write_text('{"text": "wing"}\n' * 1_500_000)  # takes seconds
    command = [sys.executable, prepare.__file__, "a.jsonl", "out", "--tokenizer", "bytes"]
    note = Path("out/.partial/state.json")
    with subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE) as process:
        while not note.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    assert error.decode().endswith(
        f"Stopped. The same command goes on from {Path('out/.partial')}\n"
    )
    assert json.loads(note.read_text())["counts"]["pieces"] > 0
    assert os.listdir("out") == [".partial"]


def test_a_full_disk_is_said_and_the_work_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    json_lines()
    steps = convert.convert(job())
    while next(steps).counts.pieces < 2:
        pass

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"\.partial.* cannot be written: No space left"):
            list(steps)
    assert next(convert.convert(job())).kept > 0


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--format", "npy"], "--format is for token files: add --tokenizer NAME"),
        (["out", "--val-fraction", "0"], "--val-fraction is for token files"),
        (["x.ids"], "'x.ids' is a token file: add --tokenizer"),
        (["x.ids", "--tokenizer", "bytes", "--format", "npy"], "one file, so there is no --format"),
        (["out", "--tokenizer", "bytes", "--val-fraction", "1"], "must be >= 0 and < 1, got 1"),
        (["out", "--tokenizer", "bytes", "--val-fraction", "x"], "invalid number value: 'x'"),
        (["out", "--tokenizer", "bytes", "--workers", "0"], "must be >= 1, got 0"),
        (["a.txt", "--tokenizer", "bytes"], "'a.txt' is a file; name a folder"),
        (["folder.bin", "--tokenizer", "bytes"], "'folder.bin' is a folder; name a file"),
        (["full", "--tokenizer", "bytes"], "train.npy' exists; name another place or add --over"),
    ],
)
def test_a_wrong_command_line_is_answered_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text("text")
    for path in ("full", "folder.bin"):
        Path(path).mkdir()
    Path("full/train.npy").touch()
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(["a.txt", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.replace(os.sep, "/")


@pytest.mark.parametrize(
    ("content", "options", "code", "message"),
    [
        (b"", ["bytes"], 3, "no text found in the source: nothing was written"),
        (b"", ["char"], 3, "no text found"),
        (b"ab\xff", ["bytes"], 3, r"a\.txt: not UTF-8 \(byte 2\)"),
        (b"x" * 9000 + b"\xff" * 6000, ["bytes"], 3, r"a\.txt: not UTF-8 \(byte 9000\)"),
        (b"ab", ["bytes", "--val-fraction", "0.9"], 3, "none of them is in train"),
        (b"text", ["bpe.json", "--dtype", "uint8"], 2, "ids go up to 399; choose a wider one"),
        (b"text", ["no/tokenizer.json"], 3, "no such file"),
        (b"text", ["no.meta.json"], 3, "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_nothing_written(
    bpe: Tokenizer,
    content: bytes,
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bpe.vocab_size == 400
    Path("a.txt").write_bytes(content)
    run("a.txt", "out", "--tokenizer", *options, code=code)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not Path("out").exists()


def test_a_broken_line_far_inside_is_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    json_lines()
    lines = Path("a.jsonl").read_text(encoding="utf-8").split("\n")
    lines[700] = '{"body": 1}'
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run("a.jsonl", "out", "--tokenizer", "bytes", code=3)
    assert "a.jsonl:701: no string 'text'; found: body" in capsys.readouterr().err


def test_too_few_documents_for_a_split_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    run("a.jsonl", "out", "--tokenizer", "bytes", "--val-fraction", 0.0001, code=3)
    assert "2 documents with --val-fraction 0.0001: none of them is in val" in (
        capsys.readouterr().err
    )
    assert not Path("out").exists()
    run("a.jsonl", "out", "--tokenizer", "bytes", "--val-fraction", 0)
    said = capsys.readouterr().out
    assert "2 documents (1 empty ones left out), tokenizer bytes, vocabulary 256, uint16" in said
    assert said.endswith(f" configs/quickstart.yaml train_data_path={Path('out/train.bin')}\n")


def test_a_folder_in_data_is_named_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    text_file()
    run("a.txt", "data/wings", "--tokenizer", "bytes")
    said = capsys.readouterr().out
    assert "(6 documents" not in said
    assert said.endswith("train.py configs/quickstart.yaml dataset=wings\n")
    assert "train.bin (" in said


def test_overwriting_leaves_no_other_token_files_and_no_other_files_touched() -> None:
    text_file()
    run("a.txt", "out", "--tokenizer", "bytes")
    Path("out/notes.md").touch()
    options = ["--format", "npy", "--val-fraction", 0, "--overwrite"]
    run("a.txt", "out", "--tokenizer", "char", *options)
    assert sorted(os.listdir("out")) == ["meta.json", "notes.md", "train.npy"]


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_LINE_EVERY_S", 0.0)
    json_lines()
    run("a.jsonl", "out", "--tokenizer", "char")
    lines = capsys.readouterr().err.splitlines()
    pattern = r"encoding \| \d+ % of 0\.\d MB \| [\d,]+ tokens \| [\d.]+ MB/s \| ETA \d+m\d\ds"
    assert len([line for line in lines if re.fullmatch(pattern, line)]) > 3
    assert [line for line in lines if line.startswith("reading | ")]


def test_progress_is_one_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_REDRAW_EVERY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    json_lines()
    run("a.jsonl", "out", "--tokenizer", "bytes")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.count("\rencoding | ") > 3


def test_python_itself_can_be_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> None:
        write(folder / "part_0.parquet", [*["import this\n"] * 3, "x = 1\n"])

    monkeypatch.setattr(corpus, "build", build)
    run("python-stdlib", "out.ids", "--tokenizer", "bytes")
    assert ByteTokenizer().decode(tokens("out.ids")).startswith("import this\n" * 3 + "x = 1")
    assert "kept in .out.ids.download" in capsys.readouterr().out


# A vocabulary of one's own


def test_a_vocabulary_is_trained_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    text_file()
    command = ["train-tokenizer", "a.txt", "new/own.json", "--vocab-size", "300"]
    assert prepare.main(command) == 0
    said = capsys.readouterr().out
    assert re.match(r"Wrote .*own\.json \(.* s\): 300 tokens; \d\.\d\d bytes per token", said)
    assert said.endswith(
        f"Next: python prepare.py a.txt data/NAME --tokenizer {Path('new/own.json')}\n"
    )
    first = Path("new/own.json").read_bytes()
    with pytest.raises(SystemExit):
        prepare.main(command)
    assert "own.json' exists" in capsys.readouterr().err
    assert prepare.main([*command, "--overwrite"]) == 0
    assert Path("new/own.json").read_bytes() == first
    run("a.txt", "out", "--tokenizer", "new/own.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own.txt"], "'own.txt' does not end in .json"),
        (["own.json", "--vocab-size", "256"], "must be >= 257, got 256"),
    ],
)
def test_a_wrong_order_for_a_vocabulary_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(["train-tokenizer", "a.txt", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_no_vocabulary_comes_of_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").touch()
    assert prepare.main(["train-tokenizer", "a.txt", "own.json"]) == 3
    assert "no text found" in capsys.readouterr().err
    assert not Path("own.json").exists()


# Downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; ends the first answers early, as a bad network does."""

    files: ClassVar[dict[str, bytes]] = {}
    failures: ClassVar[list[str]] = []
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:  # noqa: N802
        data = self.files.get(self.path)
        failure = self.failures.pop(0) if self.failures else ""
        if data is None or failure == "503":
            self.send_error(404 if data is None else 503)
            return
        wanted = self.headers["Range"]
        self.ranges.append(wanted)
        begin = int(wanted[6:-1]) if wanted and self.headers["If-Range"] == '"v1"' else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin : begin + 10_000] if failure == "short" else data[begin:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    Server.files, Server.failures, Server.ranges = {}, [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_list_of_urls_is_downloaded_through_failures_and_converted(server: str) -> None:
    first, second = words(9000), words(10, 1)
    Server.files = {"/a.txt": first.encode(), "/deep/b%20c.txt": second.encode()}
    Server.failures = ["short", "503", "short"]
    Path("urls.txt").write_text(f"# two\n{server}/a.txt?x=1\n\n{server}/deep/b%20c.txt\n")
    Server.files["/a.txt?x=1"] = Server.files.pop("/a.txt")
    run("urls.txt", "all.ids", "--urls", "--tokenizer", "bytes")
    assert Server.ranges == [None, "bytes=10000-", "bytes=20000-", None]
    assert documents(ByteTokenizer(), tokens("all.ids")) == [first, second]
    folder = Path(".all.ids.download")
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".txt") == [
        "00000-a.txt",
        "00001-b c.txt",
    ]
    run("urls.txt", "all.ids", "--urls", "--tokenizer", "bytes", "--overwrite")
    assert len(Server.ranges) == 4  # what is there is not asked for again


def test_a_part_of_another_version_is_not_continued(server: str) -> None:
    Server.files = {"/a.txt": b"new text " * 3000}
    target = Path("a.txt")
    Path("a.txt.part").write_bytes(b"old")
    Path("a.txt.http").write_text(json.dumps({"url": f"{server}/a.txt", "version": '"v0"'}))
    list(download.download(f"{server}/a.txt", target))
    assert target.read_bytes() == Server.files["/a.txt"]
    assert Server.ranges == ["bytes=3-"]


def test_a_url_can_become_parquet_or_a_vocabulary(server: str) -> None:
    Server.files = {"/a.txt": words(500).encode()}
    assert prepare.main([f"{server}/a.txt", "out"]) == 0
    assert [path.suffix for path in Path("out").iterdir()] == [".parquet"]
    assert prepare.main(["train-tokenizer", f"{server}/a.txt", "own.json"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("SERVER/none.txt", "none.txt: HTTP 404 Not Found"),
        ("SERVER/a.zip", "a.zip: not text but packed"),
        ("SERVER/a.dat", "00000-a.dat: not text in UTF-8 .byte 1."),
        ("file:///etc/passwd.txt", "urls.txt:1: 'file:///etc/passwd.txt' is not http:// or"),
        ("# nothing\n", "urls.txt: no URLs; write one per line"),
        ("SERVER/bad.txt", "bad.txt: .*(5 attempts).* goes on where it stopped"),
    ],
)
def test_urls_that_give_nothing_are_named(
    server: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Server.files = {"/bad.txt": b"x", "/a.dat": b"x\0"}
    Server.failures = ["503"] * 5 if "bad" in content else []
    Path("urls.txt").write_text(content.replace("SERVER", server))
    run("urls.txt", "all.ids", "--urls", "--tokenizer", "bytes", code=3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message.replace("(5 attempts)", r"\(5 attempts\)"), error)
