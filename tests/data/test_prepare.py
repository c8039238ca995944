"""`prepare.py --tokenizer`: the same files whatever the processes, interruptions and cuts."""

from __future__ import annotations

import bz2
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
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from config import DataError, TokenizerConfig, UserError, WriteError
from data.preparation import download, progress, raw_text, stdlib_corpus, token_writer
from data.preparation.convert import Job, convert
from data.preparation.next_command import train_on_tokens
from data.preparation.token_writer import TokenOutput
from data.sources.tokens.meta import Meta, read_meta
from data.tokenizers.base import Tokenizer
from data.tokenizers.bpe import train_bpe
from data.tokenizers.build import build_tokenizer
from data.tokenizers.simple import ByteTokenizer
from tests.conftest import TEXT
from tests.data.parquet_folder import write


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several pieces in little text, and a saved state after each."""
    monkeypatch.setattr(raw_text, "PIECE_BYTES", 8192)
    monkeypatch.setattr(token_writer, "SAVE_EVERY_S", 0.0)
    monkeypatch.chdir(tmp_path)


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    blanks = [" ", " ", " ", "\n", "\n\n", "  ", ", ", " \U0001f409 ", "na\u00efve", "\u65e5\u672c"]
    return "".join(draw.choice(TEXT.split()) + draw.choice(blanks) for _ in range(count))


def text_file(name: str = "a.txt", count: int = 6000) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words(count), encoding="utf-8")
    return words(count)


def json_lines(count: int = 900) -> list[str]:
    """Writes a.jsonl; returns its texts without the empty ones."""
    texts = [words(n % 17, seed=n % 800) for n in range(count)]  # some empty, some equal
    lines = [json.dumps({"text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [text for text in texts if text]


@pytest.fixture(scope="session")
def bpe_json() -> str:
    text: str = train_bpe("bpe.json", [words(3000)], 400).to_dict()["json"]
    return text


@pytest.fixture
def bpe(bpe_json: str) -> Tokenizer:
    """The tokenizer in bpe.json."""
    Path("bpe.json").write_text(bpe_json, encoding="utf-8")
    return build_tokenizer(TokenizerConfig(name="bpe.json"))


def run(*arguments: object, code: int = 0) -> None:
    assert prepare.main([*map(str, arguments), "--workers", "1"]) == code


def tokens(path: str | Path, dtype: str = "uint16") -> list[int]:
    ids: list[int] = np.fromfile(path, dtype=dtype).tolist()
    return ids


def documents(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == tokenizer.separator:
            parts.append([])
        else:
            parts[-1].append(i)
    assert parts.pop() == []
    return [tokenizer.decode(part) for part in parts]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


def described(tokens_path: str) -> Meta:
    meta = read_meta(tokens_path)
    assert meta is not None
    return meta


# What is written


def test_characters_are_split_and_numbered_as_nanogpt_does() -> None:
    text = text_file()
    characters = sorted(set(text))
    run("a.txt", "out", "--tokenizer", "char")
    at = int(len(text) * 0.9)
    assert tokens("out/train.bin") == [characters.index(c) for c in text[:at]]
    assert tokens("out/val.bin") == [characters.index(c) for c in text[at:]]
    meta = described("out/train.bin")
    assert (meta.vocab_size, meta.dtype) == (len(characters), "uint16")
    counts = json.loads(Path("out/meta.json").read_text())["tokens"]
    assert counts == {"train": at, "val": len(text) - at}
    assert sorted(os.listdir("out")) == ["meta.json", "train.bin", "val.bin"]


def test_characters_of_many_documents_are_one_text() -> None:
    text = "".join(json_lines())
    run("a.jsonl", "out", "--tokenizer", "char")
    tokenizer = described("out/train.bin").tokenizer
    assert tokenizer is not None
    train, val = tokens("out/train.bin"), tokens("out/val.bin")
    assert tokenizer.decode(train + val) == text
    assert len(train) == int(0.9 * len(text))


def test_a_text_in_pieces_has_the_tokens_of_the_whole(bpe: Tokenizer) -> None:
    text = text_file()
    assert len(raw_text.plan_pieces([Path("a.txt")], "text")) > 4
    for fraction in (0.1, 0.5, 0.001):
        options = ["--val-fraction", fraction, "--overwrite"]
        run("a.txt", "out", "--tokenizer", "bpe.json", *options)
        at = int(len(text) * (1 - fraction))
        assert tokens("out/train.bin") == bpe.encode(text[:at]).tolist()
        assert tokens("out/val.bin") == bpe.encode(text[at:]).tolist()
    text = "\u65e5\u672cnest" * 5000  # without blanks
    Path("a.txt").write_text(text, encoding="utf-8")
    run("a.txt", "all.ids", "--tokenizer", "bpe.json")
    assert bpe.decode(tokens("all.ids")) == text


def test_documents_end_with_the_separator_and_keep_their_order(bpe: Tokenizer) -> None:
    texts = json_lines()
    run("a.jsonl", "out", "--tokenizer", "bpe.json")
    train, val = (documents(bpe, tokens(f"out/{role}.bin")) for role in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert 0.03 < len(val) / len(texts) < 0.2
    assert not set(train) & set(val)  # equal documents are on one side
    assert train == [text for text in texts if text not in set(val)]
    assert val == [text for text in texts if text in set(val)]


def test_every_kind_of_source_gives_the_same_tokens() -> None:
    texts = json_lines()
    write(Path("p/a.parquet"), [None, *texts], row_group_size=300)
    run("a.jsonl", "one.ids", "--tokenizer", "bytes")
    run("p", "two.ids", "--tokenizer", "bytes")
    expected = ByteTokenizer().encode_documents(texts).tolist()
    assert tokens("one.ids") == tokens("two.ids") == expected
    Path("t").mkdir()
    for number, text in enumerate(texts[:10]):
        Path(f"t/{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
    run("t", "three.ids", "--tokenizer", "bytes")
    assert tokens("three.ids") == ByteTokenizer().encode_documents(texts[:10]).tolist()


def test_long_text_files_of_a_folder_are_one_document_each() -> None:
    texts = [text_file(f"in/{n:02d}.txt", 3000 + n) for n in range(12)]
    run("in", "out", "--tokenizer", "bytes", "--val-fraction", 0.4)
    found = [documents(ByteTokenizer(), tokens(f"out/{role}.bin")) for role in ("train", "val")]
    assert all(found)
    assert sorted(found[0] + found[1]) == sorted(texts)


def test_a_large_row_group_is_read_in_parts() -> None:
    texts = [words(40, n) for n in range(300)]
    write(Path("a.parquet"), list(texts), row_group_size=1000)
    pieces = raw_text.plan_pieces([Path("a.parquet")], "text")
    assert len(pieces) > 3
    assert [t for piece in pieces for t in raw_text.read_records(piece, "text")] == texts


def test_arrays_of_numpy_can_be_loaded() -> None:
    text_file()
    for dtype in ("uint8", "uint16", "uint32", "auto"):
        options = ["--format", "npy", "--dtype", dtype, "--val-fraction", 0, "--overwrite"]
        run("a.txt", "out", "--tokenizer", "bytes", *options)
        ids = np.load("out/train.npy", mmap_mode="r")
        assert ids.dtype.name == ("uint16" if dtype == "auto" else dtype)
        assert bytes(ids.astype(np.uint8)) == Path("a.txt").read_bytes()
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


def test_a_text_may_have_any_ending() -> None:
    for name in ("a.log", "README", "a.Md", "a.b.rst"):
        text = text_file(name, 300)
        run(name, f"{name}.ids", "--tokenizer", "bytes")
        assert bytes(tokens(f"{name}.ids")).decode() == text
        assert prepare.main([name, "out", "--overwrite"]) == 0
        assert "".join(pq.read_table("out")["text"].to_pylist()) == text


def test_text_files_are_taken_from_a_folder_and_the_others_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("in/b.md", "in/deep/a.rst", "in/.git/config", "in/.hidden"):
        text_file(name, 20)
    Path("in/c.png").write_bytes(b"\x89PNG\0")
    Path("in/settings.json").write_text("{}")
    run("in", "one.ids", "--tokenizer", "bytes")
    assert tokens("one.ids") == ByteTokenizer().encode_documents([words(20)] * 2).tolist()
    assert re.search(r"Skipped in in: 1 \*\.\w+, 1 \*\.\w+\n", capsys.readouterr().err)
    Path("in/lines.JSONL").write_text('{"text": "wing"}\n')
    run("in", "two.ids", "--tokenizer", "bytes")
    assert tokens("two.ids") == ByteTokenizer().encode_documents(["wing"]).tolist()
    for path in Path("in").rglob("*.*"):
        if path.is_file() and path.suffix != ".png":
            path.unlink()
    run("in", "three.ids", "--tokenizer", "bytes", code=3)
    assert "SOURCE 'in' holds no text (found 1 *.png)" in capsys.readouterr().err


def test_overwriting_leaves_no_other_token_files_and_no_other_files_touched() -> None:
    text_file()
    run("a.txt", "out", "--tokenizer", "bytes")
    Path("out/notes.md").touch()
    options = ["--format", "npy", "--val-fraction", 0, "--overwrite"]
    run("a.txt", "out", "--tokenizer", "char", *options)
    assert sorted(os.listdir("out")) == ["meta.json", "notes.md", "train.npy"]


def test_python_itself_can_be_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> None:
        write(folder / "part_0.parquet", [*["import this\n"] * 3, "x = 1\n"])

    monkeypatch.setattr(stdlib_corpus, "build", build)
    run("python-stdlib", "out.ids", "--tokenizer", "bytes")
    assert ByteTokenizer().decode(tokens("out.ids")).startswith("import this\n" * 3 + "x = 1")
    assert "kept in .out.ids.download" in capsys.readouterr().out
    assert (
        prepare.main(["train-tokenizer", "python-stdlib", "own.json", "--vocab-size", "260"]) == 0
    )


# Processes and interruptions


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "files": (Path("a.jsonl"),),
        "output": TokenOutput(Path("out")),
        "column": "text",
        "tokenizer": ByteTokenizer(),
        "dtype": None,
        "val_fraction": 0.1,
        "workers": 1,
        "restart": False,
    }
    return Job(**(values | changes))


def begin(pieces: int = 2) -> None:
    """Writes a.jsonl and converts its first pieces."""
    json_lines()
    steps = convert(job())
    while next(steps).counts.pieces < pieces:
        pass
    steps.close()


@pytest.mark.slow
def test_two_processes_write_what_one_does(bpe: Tokenizer) -> None:
    json_lines()
    assert bpe.vocab_size == 400
    run("a.jsonl", "one", "--tokenizer", "bpe.json")
    assert prepare.main(["a.jsonl", "two", "--tokenizer", "bpe.json", "--workers", "2"]) == 0
    assert contents("one") == contents("two")


class DyingTokenizer(ByteTokenizer):
    def encode(self, text: str) -> NoReturn:
        os._exit(9)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error() -> None:
    json_lines()
    with pytest.raises(UserError, match="was killed .* continues where it stopped"):
        list(convert(job(tokenizer=DyingTokenizer(), workers=2)))


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "npy", "one file"])
def test_an_interrupted_conversion_continues_and_ends_the_same(kind: str, bpe: Tokenizer) -> None:
    json_lines(count=600)
    kinds: dict[str, dict[str, Any]] = {
        "bytes": {},
        "char": {"tokenizer": None},
        "bpe": {"tokenizer": bpe},
        "npy": {"output": TokenOutput(Path("out"), ".npy")},
        "one file": {"output": TokenOutput(Path("out/all.npy"), ".npy", has_val=False)},
    }
    work = job(**kinds[kind])
    list(convert(work))
    whole = contents("out")
    shutil.rmtree("out")
    stops = resumed = 0
    while not work.output.meta.exists():
        stops += 1
        assert stops < 50
        steps = convert(work)
        for number, step in enumerate(steps):
            resumed = max(resumed, step.resumed_bytes)
            if step.stage == "encoding" and step.counts.pieces and number > stops:
                break
        if stops % 2 and not work.output.meta.exists():
            # As after a crash: what is on the disk now, with more tokens than were saved.
            shutil.copytree("out", "crashed")
            steps.close()
            shutil.rmtree("out")
            Path("crashed").rename("out")
            for path in work.output.workspace.iterdir():
                if path.suffix != ".json":
                    with path.open("ab") as file:
                        file.write(b"torn")
        steps.close()
    assert contents("out") == whole
    assert resumed > 0
    assert not [path for path in Path("out").iterdir() if path.is_dir()]


def test_unfinished_work_is_used_only_for_the_same_job(capsys: pytest.CaptureFixture[str]) -> None:
    begin()
    arguments = ["a.jsonl", "out", "--tokenizer", "bytes", "--val-fraction", "0.2"]
    run(*arguments, code=3)
    assert "unfinished work of another source, tokenizer or options" in capsys.readouterr().err
    assert Path("out/.partial/state.json").exists()
    run(*arguments, "--overwrite")
    assert sorted(os.listdir("out")) == ["meta.json", "train.bin", "val.bin"]
    shutil.rmtree("out")
    begin()
    os.utime("a.jsonl", (1, 1))  # a changed source
    with pytest.raises(DataError, match="another source"):
        next(convert(job()))
    shutil.rmtree("out")
    begin()
    Path("out/.partial/val.bin").write_bytes(b"")  # a file that lost its tokens
    assert next(convert(job())).resumed_bytes == 0


def test_a_full_disk_is_an_error_and_the_work_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    begin()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"\.partial.* cannot be written: No space left"):
            list(convert(job()))
    assert next(convert(job())).resumed_bytes > 0


@pytest.mark.slow
def test_ctrl_c_keeps_the_work_and_says_how_to_continue() -> None:
    Path("a.jsonl").write_text('{"text": "wing"}\n' * 1_500_000)  # takes seconds
    command = [sys.executable, prepare.__file__, "a.jsonl", "out", "--tokenizer", "bytes"]
    state = Path("out/.partial/state.json")
    with subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    expected = f"Stopped. The same command continues from {Path('out/.partial')}\n"
    assert error.decode().endswith(expected)
    assert json.loads(state.read_text())["counts"]["pieces"] > 0
    assert os.listdir("out") == [".partial"]


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "out", "--format", "npy"], "--format is for token files: add --tokenizer NAME"),
        (["a.txt", "out", "--val-fraction", "0"], "--val-fraction is for token files"),
        (["a.txt", "x.ids"], "'x.ids' is a token file: add --tokenizer"),
        (["a.txt", "x.ids", "--tokenizer", "bytes", "--format", "npy"], "there is no --format"),
        (["a.txt", "out", "--val-fraction", "1"], "must be >= 0 and < 1, got 1"),
        (["a.txt", "out", "--val-fraction", "x"], "invalid number value: 'x'"),
        (["a.txt", "out", "--workers", "0"], "must be >= 1, got 0"),
        (["a.txt", "a.txt", "--tokenizer", "bytes"], "'a.txt' is a file; name a folder"),
        (["a.txt", "folder.bin", "--tokenizer", "bytes"], "'folder.bin' is a folder; name a file"),
        (["a.txt", "full", "--tokenizer", "bytes"], "train.npy' exists; name another place or add"),
        (["train-tokenizer", "a.txt", "own.txt"], "'own.txt' does not end in .json"),
        (["train-tokenizer", "a.txt", "full.json"], "'full.json' exists; name another file or add"),
        (["train-tokenizer", "a.txt", "x.json", "--vocab-size", "256"], "must be >= 257, got 256"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text("text")
    for path in ("full", "folder.bin"):
        Path(path).mkdir()
    Path("full/train.npy").touch()
    Path("full.json").touch()
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.replace(os.sep, "/")


@pytest.mark.parametrize(
    ("name", "content", "options", "code", "message"),
    [
        ("a.txt", b"", ["bytes"], 3, "no text found in the source: nothing was written"),
        ("a.txt", b"", ["char"], 3, "no text found"),
        ("a.txt", b"ab\xff", ["bytes"], 3, r"a\.txt: not UTF-8 \(byte 2\)"),
        ("a.txt", b"x" * 9000 + b"\xff" * 6000, ["bytes"], 3, r"a\.txt: not UTF-8 \(byte 9000\)"),
        ("a.txt", b"ab", ["bytes", "--val-fraction", "0.9"], 3, "none of them is in train"),
        ("a.txt", b"text", ["bpe.json", "--dtype", "uint8"], 2, "ids go up to 399; choose a wider"),
        ("a.txt", b"text", ["no/tokenizer.json"], 3, "no such file"),
        ("a.txt", b"text", ["no.meta.json"], 3, "cannot be read"),
        ("a.log", b"\x1f\x8b\x08", ["bytes"], 3, r"a\.log: not text in UTF-8 \(byte 1\)\. Unpack"),
        ("a.bin", b"a\0b\0", ["bytes"], 3, r"not text .*python train\.py train_data_path=FILE"),
        ("a.md", b"x " * 35000 + b"\xff", ["bytes"], 3, r"a\.md: not UTF-8 \(byte 70000\)"),
        ("a.json", b'[\n{"text": "x"}]', ["bytes"], 3, r"a\.json:1: not JSON .*line is one record"),
    ],
)
def test_a_failed_conversion_prints_one_message_and_writes_nothing(
    bpe: Tokenizer,
    name: str,
    content: bytes,
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bpe.vocab_size == 400
    Path(name).write_bytes(content)
    run(name, "out", "--tokenizer", *options, code=code)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    if options == ["bytes"]:
        assert prepare.main([name, "out"]) == prepare.main(["train-tokenizer", name, "x.json"]) == 3
    assert not Path("out").exists()
    assert not Path("x.json").exists()


def test_a_broken_line_far_inside_is_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    json_lines()
    lines = Path("a.jsonl").read_text(encoding="utf-8").split("\n")
    lines[700] = '{"body": 1}'
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run("a.jsonl", "out", "--tokenizer", "bytes", code=3)
    assert "a.jsonl:701: no string 'text'; found: body" in capsys.readouterr().err


def test_a_column_that_holds_no_strings_is_answered_with_a_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases: dict[str, list[Any]] = {
        r"binary, not string; string columns: path\. Name .*str\.decode\('utf-8'\)": [b"text"],
        r"list<\w+: string>, not string; .*df\.explode\('text'\)": [["a", "b"]],
        r"int64, not string; .*Name one of these: --text-column NAME$": [1],
    }
    for remedy, values in cases.items():
        pq.write_table(pa.table({"text": values, "path": ["a"]}), "a.parquet")
        assert prepare.main(["a.parquet", "out"]) == 3
        assert re.search(remedy, capsys.readouterr().err.strip())


def test_the_text_of_records_is_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('\n{"id": "7", "content": "one"}\n{"content": "two"}\n')
    Path("b.jsonl").write_text('{"id": "7", "story": "one"}\n')
    pq.write_table(pa.table({"n": [1], "story": ["three"]}), "c.parquet")
    for name, column, expected in [
        ("a.jsonl", "content", ["one", "two"]),
        ("c.parquet", "story", ["three"]),
    ]:
        run(name, f"{name}.ids", "--tokenizer", "bytes")
        assert f"Text column: {column}\n" in capsys.readouterr().out
        assert documents(ByteTokenizer(), tokens(f"{name}.ids")) == expected
        assert prepare.main([name, f"{name}.out"]) == 0
        assert pq.read_table(f"{name}.out")["text"].to_pylist() == expected
    run("b.jsonl", "out", "--tokenizer", "bytes", code=3)
    assert "Columns of strings: id, story. Name one:" in capsys.readouterr().err


def test_compressed_files_are_unpacked_once_and_again_when_they_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in").mkdir()
    Path("in/README.md").touch()
    Path("in/a.txt.bz2").write_bytes(bz2.compress(b"one ") + bz2.compress(b"two"))
    run("in", "one.ids", "--tokenizer", "bytes", "--overwrite")
    assert bytes(tokens("one.ids")) == b"one two"
    assert "kept in .one.ids.download" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(pa, "CompressedInputStream", None)
        run("in", "one.ids", "--tokenizer", "bytes", "--overwrite")
    Path("in/a.txt.bz2").write_bytes(bz2.compress(b"three"))
    run("in", "one.ids", "--tokenizer", "bytes", "--overwrite")
    assert bytes(tokens("one.ids")) == b"three"
    Path("in/a.txt.bz2").write_bytes(bz2.compress(words(500).encode())[:-9])
    run("in", "one.ids", "--tokenizer", "bytes", "--overwrite", code=3)
    assert "a.txt.bz2: no whole bz2 file (Truncated" in capsys.readouterr().err


def test_too_few_documents_for_a_split_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    run("a.jsonl", "out", "--tokenizer", "bytes", "--val-fraction", 0.0001, code=3)
    assert "2 documents with --val-fraction 0.0001: none of them is in val" in (
        capsys.readouterr().err
    )
    assert not Path("out").exists()
    run("a.jsonl", "out", "--tokenizer", "bytes", "--val-fraction", 0)
    printed = capsys.readouterr().out
    assert "2 documents (1 empty ones skipped), tokenizer bytes, vocabulary 256, uint16" in printed
    assert printed.endswith(f" configs/quickstart.yaml train_data_path={Path('out/train.bin')}\n")


def test_the_proposed_run_fits_the_text() -> None:
    folder = TokenOutput(Path("data/mine"))
    single = TokenOutput(Path("all.ids"), has_val=False)
    for output, n_tokens, expected in [
        (folder, 2_000_000, "configs/quickstart.yaml dataset=mine"),
        (
            single,
            100_000_000,
            "configs/cs336-tinystories.yaml vocab_size=null train_data_path=all.ids "
            "val_data_path=null",
        ),
        (folder, 9_000_000_000, "dataset=mine"),
    ]:
        assert train_on_tokens(output, n_tokens) == f"python train.py {expected}"


def test_progress_is_one_line_on_a_terminal_and_several_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "REDRAW_EVERY_S", 0.0)
    json_lines()
    run("a.jsonl", "out", "--tokenizer", "char")
    lines = capsys.readouterr().err.splitlines()
    pattern = r"encoding \| \d+ % of 0\.\d MB \| [\d,]+ tokens \| [\d.]+ MB/s \| ETA \d+m\d\ds"
    assert len([line for line in lines if re.fullmatch(pattern, line)]) > 3
    assert [line for line in lines if line.startswith("reading | ")]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run("a.jsonl", "out", "--tokenizer", "bytes", "--overwrite")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.count("\rencoding | ") > 3


def test_a_vocabulary_is_trained_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    text_file()
    command = ["train-tokenizer", "a.txt", "new/own.json", "--vocab-size", "300"]
    assert prepare.main(command) == 0
    printed = capsys.readouterr().out
    assert re.match(r"Wrote .*own\.json \(.* s\): 300 tokens; \d\.\d\d bytes per token", printed)
    assert printed.endswith(
        f"Next: python prepare.py a.txt data/NAME --tokenizer {Path('new/own.json')}\n"
    )
    first = Path("new/own.json").read_bytes()
    assert prepare.main([*command, "--overwrite"]) == 0
    assert Path("new/own.json").read_bytes() == first
    run("a.txt", "out", "--tokenizer", "new/own.json")


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
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.0)
    Server.files, Server.failures, Server.ranges = {}, [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_list_of_urls_is_downloaded_through_failures_and_converted(server: str) -> None:
    first, second = words(9000), words(10, 1)
    Server.files = {"/a.txt?x=1": first.encode(), "/deep/b%20c.txt": second.encode()}
    Server.failures = ["short", "503", "short"]
    Path("urls.txt").write_text(f"# two\n{server}/a.txt?x=1\n\n{server}/deep/b%20c.txt\n")
    run("urls.txt", "all.ids", "--urls", "--tokenizer", "bytes")
    assert Server.ranges == [None, "bytes=10000-", "bytes=20000-", None]
    assert documents(ByteTokenizer(), tokens("all.ids")) == [first, second]
    texts = sorted(path.name for path in Path(".all.ids.download").glob("*.txt"))
    assert texts == ["00000-a.txt", "00001-b c.txt"]
    run("urls.txt", "all.ids", "--urls", "--tokenizer", "bytes", "--overwrite")
    assert len(Server.ranges) == 4  # the files that are there are not asked for again


def test_a_part_of_another_version_is_not_continued(server: str) -> None:
    Server.files = {"/a.txt": b"new text " * 3000}
    Path("a.txt.part").write_bytes(b"old")
    version = {"url": download._digest(f"{server}/a.txt"), "version": '"v0"'}
    Path("a.txt.http").write_text(json.dumps(version))
    list(download.download(f"{server}/a.txt", Path("a.txt")))
    assert Path("a.txt").read_bytes() == Server.files["/a.txt"]
    assert Server.ranges == ["bytes=3-"]


def test_a_url_can_become_parquet_or_a_vocabulary(server: str) -> None:
    Server.files = {"/a.txt": words(500).encode()}
    assert prepare.main([f"{server}/a.txt", "out"]) == 0
    assert [path.suffix for path in Path("out").iterdir()] == [".parquet"]
    assert prepare.main(["train-tokenizer", f"{server}/a.txt", "own.json"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("SERVER/none.txt?signature=s", "none.txt: HTTP 404 Not Found"),
        ("SERVER/a.zip", "a.zip: an archive, not text"),
        ("SERVER/a.dat", "00000-a.dat: not text in UTF-8 .byte 1."),
        ("file:///etc/passwd.txt", "urls.txt:1: 'file:///etc/passwd.txt' is not https://, s3"),
        ("# nothing\n", "urls.txt: no URLs; write one per line"),
        ("SERVER/bad.txt", r"bad.txt: .*\(5 attempts\)\. The same command continues"),
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
    assert re.search(message, error) and "signature" not in error
