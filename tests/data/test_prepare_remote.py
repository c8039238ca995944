"""`prepare.py` on remote text, and what a run says of remote text that is not parquet."""

from __future__ import annotations

import gzip
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import data
import prepare
from config import DataError, DatasetConfig, TokenizerConfig
from data.preparation import download, source_files
from data.remote import access, copies
from data.remote import store as store_module
from tests.data.parquet_folder import write
from tests.remote_servers import HubServer, S3Server, WebServer


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.001)
    access._access.cache_clear()  # it keeps the environment of another test


def text_files() -> dict[str, bytes]:
    """Text of several kinds, in folders; sorted by path the documents are "one", "two", "three"."""
    parquet = write(Path("local.parquet"), ["three"]).read_bytes()
    return {
        "text/a.jsonl.gz": gzip.compress(b'{"text": "one"}\n'),
        "text/b/c.txt": b"two",
        "text/d.parquet": parquet,
        "text/picture.png": b"\x89PNG\0",
    }


def prepared(source: str, out: str = "out") -> list[str]:
    """The documents that `prepare.py SOURCE OUT` writes."""
    assert prepare.main([source, out, "--overwrite"]) == 0
    texts: list[str] = pq.read_table(out)["text"].to_pylist()
    return texts


@pytest.fixture(params=["s3", "http", "hf"])
def folder(request: pytest.FixtureRequest) -> tuple[str, S3Server | WebServer]:
    """The address of a folder with `text_files`, and its server."""
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        s3.put("to-prepare", text_files())
        return "s3://to-prepare/text/", s3
    if request.param == "http":
        web: WebServer = request.getfixturevalue("web_server")
        web.files |= text_files()
        return f"{web.url}/text/", web
    hub: HubServer = request.getfixturevalue("hub_server")
    hub.commit(text_files())
    return "hf://datasets/owner/name@main/text/", hub


def test_remote_folders_globs_and_files_are_prepared_through_faults_and_copied_once(
    folder: tuple[str, S3Server | WebServer],
) -> None:
    address, server = folder
    server.faults.queue += ["503", "cut", "short"]
    assert prepared(address) == ["one", "two", "three"]
    assert server.faults.queue == []
    reads = len(server.faults.reads)
    assert prepared(address) == ["one", "two", "three"] and len(server.faults.reads) == reads
    assert prepared(f"{address}*.parquet") == ["three"]
    assert prepared(f"{address}b/c.txt") == ["two"]
    Path("list.txt").write_text(f"{address}b/c.txt\n{address}*.gz\n")
    assert prepare.main(["list.txt", "listed", "--urls"]) == 0
    assert pq.read_table("listed")["text"].to_pylist() == ["two", "one"]


def test_an_interrupted_copy_goes_on_unless_the_file_changed(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 1000)
    monkeypatch.setattr(copies, "_AT_ONCE", 1)
    monkeypatch.setattr(source_files, "RETRY_S", 0.0)
    for text in ("one " * 1000, "two " * 1000):
        s3_server.put("to-copy", {"a.txt": text.encode()})
        s3_server.faults.queue += ["", "", "500"]
        assert prepare.main(["s3://to-copy/a.txt", "out", "--overwrite"]) == 3
        assert "s3://to-copy/a.txt: the server does not answer" in capsys.readouterr().err
        s3_server.faults.requests.clear()
        s3_server.faults.queue.clear()
        assert "".join(prepared("s3://to-copy/a.txt")) == text
        assert 2 <= len(s3_server.faults.reads) < 4  # of four pieces


def test_a_commit_of_the_hub_is_prepared_whole(hub_server: HubServer) -> None:
    hub_server.commit({"a.txt": b"old"})
    assert prepared("hf://datasets/owner/name") == ["old"]
    hub_server.commit({"a.txt": b"new"})
    assert prepared("hf://datasets/owner/name") == ["new"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://AKIAKEY:secret@bucket/a.txt", "SOURCE has a user name or password"),
        ("https://me:secret@127.0.0.1/a.txt?x", "SOURCE has a user name or password"),
        ("s3://to-prepare/none/", "'s3://to-prepare/none/' holds no text .found nothing"),
        ("s3://to-prepare/text/*.png", "a.bin|not text in UTF-8"),
    ],
)
def test_addresses_that_give_no_text_are_named_without_secrets(
    s3_server: S3Server, address: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_server.put("to-prepare", text_files())
    assert prepare.main([address, "out"]) == 3
    error = capsys.readouterr().err
    assert re.search(message, error) and "secret" not in error and error.count("\n") == 1


@pytest.mark.parametrize("path", ["text", "text/a.jsonl.gz", "text/*.gz"])
@pytest.mark.parametrize("kind", ["http", "hf"])
def test_remote_text_that_is_not_parquet_is_answered_with_the_command_that_prepares_it(
    kind: str, path: str, web_server: WebServer, hub_server: HubServer
) -> None:
    files = {name: data for name, data in text_files().items() if not name.endswith(".parquet")}
    web_server.files |= files
    hub_server.commit(files)
    root = web_server.url if kind == "http" else "hf://datasets/owner/name"
    with pytest.raises(DataError) as caught:
        data.open_dataset(DatasetConfig(parquet_dir=f"{root}/{path}"), TokenizerConfig())
    said = re.search(
        r"then set dataset.parquet_dir=(\S+): python prepare.py (.*)", str(caught.value)
    )
    assert said is not None
    assert prepare.main(shlex.split(said[2])) == 0
    assert "one" in pq.read_table(said[1])["text"].to_pylist()


@pytest.mark.parametrize("path", ["tokens", "tokens/train.bin"])
def test_token_files_given_as_parquet_are_answered_with_their_option(
    path: str, web_server: WebServer
) -> None:
    web_server.files |= {"tokens/train.bin": b"xy" * 9, "tokens/val.bin": b"xy" * 9}
    Path("tokens").mkdir()
    Path("tokens/text.bin").write_bytes(b"xy")
    local = path.replace("train", "text")
    for place, told in ((f"{web_server.url}/{path}", f"{web_server.url}/tokens"), (local, local)):
        with pytest.raises(DataError, match=f"set dataset.train_data_path={told}"):
            data.open_dataset(DatasetConfig(parquet_dir=place), TokenizerConfig())


def test_signatures_in_addresses_are_never_shown(
    web_server: WebServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.0)
    web_server.files["a b.txt"] = b"one two " * 99
    address = f"{web_server.url}/a b.txt?X-Amz-Signature=SEKRET"
    assert prepare.main(["train-tokenizer", address, "own.json"]) == 0
    said = capsys.readouterr().out
    assert f"Next: python prepare.py '{web_server.url}/a b.txt' data/NAME" in said
    web_server.stop()
    assert prepare.main([address.replace("a b", "c"), "out"]) == 3
    refused = capsys.readouterr().err
    assert "c.txt: Connection refused (5 attempts)" in refused
    assert "SEKRET" not in said + refused


def test_a_list_of_addresses_without_urls_is_warned_of(
    web_server: WebServer, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.files["a.txt"] = b"one"
    Path("list.txt").write_text(f"# two\n{web_server.url}/a.txt\n\ns3://bucket/b.txt\n")
    Path("text.txt").write_text(f"See\n{web_server.url}/a.txt\n")
    prepared("list.txt")
    assert "list.txt: every line is an address; did you mean --urls?" in capsys.readouterr().err
    prepared("text.txt")
    assert capsys.readouterr().err == ""
