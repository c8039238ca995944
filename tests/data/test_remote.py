"""Remote text: reads through faults, listings, indexes, copies, pins, messages."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import yarl
from multidict import CIMultiDict, CIMultiDictProxy

import data
from config import Config, ConfigError, DataError, DatasetConfig, TokenizerConfig
from data.remote import access, copies
from data.remote import store as store_module
from data.remote.copies import copy_file
from data.remote.listing import Listing, list_files
from data.remote.store import RemoteError, RemoteStore
from data.sources.parquet.index import Index
from data.sources.parquet.remote_index import build_remote_index
from data.sources.tokens.meta import write_meta
from data.tokenizers.simple import ByteTokenizer
from tests.conftest import TINY
from tests.data.parquet_folder import marked, write
from tests.remote_servers import SECRETS, SIGNATURE, GcsServer, HubServer, S3Server, WebServer
from tests.runs import run_here

BODY = bytes(range(256)) * 64
Server = S3Server | WebServer
Place = tuple[str, Server, Callable[[dict[str, bytes]], object]]


@pytest.fixture(autouse=True)
def quick_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    monkeypatch.setattr(copies, "_in_use", {})
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(store_module, "_retries", store_module._RetryLog())
    access._access.cache_clear()  # it keeps the environment of another test


@pytest.fixture(params=["s3", "gs", "http", "hf"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An address, its server, and a function that puts files below the address."""
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        bucket = tmp_path.name.replace("_", "-").strip("-").lower()[-40:]
        return f"s3://{bucket}", s3, lambda files: s3.put(bucket, files)
    if request.param == "gs":
        gcs: GcsServer = request.getfixturevalue("gcs_server")
        return "gs://bucket", gcs, gcs.files.update
    if request.param == "http":
        web: WebServer = request.getfixturevalue("web_server")
        return web.url, web, web.files.update
    hub: HubServer = request.getfixturevalue("hub_server")
    return "hf://datasets/owner/name", hub, hub.commit


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder as "text/NAME"."""
    return {f"text/{path.name}": path.read_bytes() for path in folder.iterdir()}


def one_file(url: str) -> tuple[str, str]:
    """The address and the tag of the only .bin file there."""
    listing = list_files(RemoteStore(0.0), url, (".bin",))
    (file,) = listing.files
    return listing.url(file), file.tag


def test_ranges_come_whole_through_every_fault(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    root, server, put = place
    put({"text/a.bin": BODY})
    url, tag = one_file(f"{root}/text")
    assert tag
    server.faults.queue += ["500", "503", "429", "cut", "short"]
    with caplog.at_level(logging.WARNING):
        assert RemoteStore(20.0).read(url, tag, 100, 5000) == BODY[100:5000]
    assert server.faults.queue == []
    assert RemoteStore(0.0).read(url, tag, 0, len(BODY)) == BODY
    assert caplog.text.count("trying again") == 1
    assert SIGNATURE not in caplog.text


def test_a_server_that_stays_away_a_refusal_and_a_missing_file_are_told_apart(
    place: Place,
) -> None:
    root, server, put = place
    put({"text/a.bin": BODY})
    url, tag = one_file(f"{root}/text")
    server.faults.queue += ["503"] * 100
    with pytest.raises(RemoteError, match=r"does not answer \(HTTP 503; \d+ attempts .* Check the"):
        RemoteStore(0.05).read(url, tag, 0, 10)
    for fault, words in {"403": "no permission", "404": "not found"}.items():
        server.faults.queue[:] = [fault]
        with pytest.raises(RemoteError, match=words):
            RemoteStore(5.0).read(url, tag, 0, 10)
    if not isinstance(server, HubServer):  # a commit of the Hub never changes
        put({"text/a.bin": BODY[::-1]})
        with pytest.raises(RemoteError, match="has changed since it was listed|another one by now"):
            RemoteStore(5.0).read(url, tag, 0, 10)
    with pytest.raises(RemoteError, match="not found"):
        RemoteStore(5.0).read(f"{url}.no", "", 0, 10)


def test_an_address_means_a_file_a_folder_or_a_glob(place: Place) -> None:
    root, _, put = place
    names = ["a.bin", "b.txt", "deep/é c.bin", "_hidden.bin", ".git/d.bin", "Z.bin"]
    put({f"text/{name}": name.encode() for name in names})

    def found(address: str) -> list[str]:
        listing = list_files(RemoteStore(0.0), f"{root}/{address}", (".bin",))
        assert all(file.size and file.tag for file in listing.files)
        return [listing.url(file).split("/text/")[1] for file in listing.files]

    assert [name.replace("%C3%A9%20", "é ") for name in found("text/")] == [
        *("Z.bin", "a.bin", "deep/é c.bin")
    ]
    assert found("text/a.bin") == ["a.bin"]
    assert found("text/[aZ]*.bin") == ["Z.bin", "a.bin"]
    assert len(found("text/**/*.bin")) >= 1
    assert list_files(RemoteStore(0.0), f"{root}/text", (".bin",)).others == "1 *.txt"


def opened(address: str, **options: Any) -> data.Dataset:
    options = {"text_column": "text", "test_fraction": 0.0, "retry_seconds": 5.0, **options}
    config = DatasetConfig(parquet_dir=address, **options)
    return data.open_dataset(config, TokenizerConfig())


def test_a_remote_folder_has_the_index_and_the_fingerprint_of_its_copy(
    place: Place, tmp_path: Path
) -> None:
    root, server, put = place
    marked(tmp_path / "here")
    put(content(tmp_path / "here"))
    server.faults.rate, server.faults.kinds = 0.3, ("429", "500", "cut", "short")
    here, there = opened(str(tmp_path / "here")), opened(f"{root}/text")
    assert there.fingerprint == here.fingerprint
    assert there.stats.rows == here.stats.rows == 120
    reads = len(server.faults.reads)
    assert opened(f"{root}/text").fingerprint == here.fingerprint
    assert len(server.faults.reads) == reads, "footers come from the cache"


def test_damaged_files_can_be_left_out_but_not_those_the_server_does_not_give(
    web_server: WebServer, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet", ["x"] * 30)
    good = (tmp_path / "a.parquet").read_bytes()
    web_server.files |= {"text/a.parquet": good, "text/b.parquet": good[:-9] + b"\0" * 9}
    address = f"{web_server.url}/text"
    with pytest.raises(DataError, match=r"b.parquet: no footer"):
        opened(address)
    assert opened(address, on_bad_shard="skip").stats.files == 1
    web_server.files["text/b.parquet"] = good + b"PAR1"
    web_server.faults.queue += ["404", "404"]
    with pytest.raises(RemoteError, match="not found"):
        opened(address, on_bad_shard="skip")


def test_footers_longer_than_the_first_read_are_read_whole(
    web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.parquet.remote_index._TAIL_BYTES", 64)
    marked(tmp_path / "here")
    web_server.files |= content(tmp_path / "here")
    assert opened(f"{web_server.url}/text").fingerprint == opened(f"{tmp_path}/here").fingerprint


def test_a_run_stays_at_the_commit_it_began_with(hub_server: HubServer, tmp_path: Path) -> None:
    marked(tmp_path / "here")
    first = hub_server.commit(content(tmp_path / "here"))
    config = DatasetConfig(parquet_dir="hf://datasets/owner/name@main/text", retry_seconds=5.0)
    saved = data.open_dataset(config, TokenizerConfig()).summary()
    write(tmp_path / "here" / "new.parquet", ["new"] * 30)
    hub_server.commit(content(tmp_path / "here"))

    indexes = data.index_sources(config, saved)
    resumed = data.open_dataset(config, TokenizerConfig(), indexes=indexes)
    resumed.check_unchanged(saved)
    assert isinstance(indexes[""], Index) and first in indexes[""].root
    with pytest.raises(DataError, match="not what the checkpoint was trained on"):
        data.open_dataset(config, TokenizerConfig()).check_unchanged(saved)


def test_a_missing_dataset_and_a_missing_revision_are_told_apart(hub_server: HubServer) -> None:
    hub_server.commit({"a.bin": BODY})
    hub_server.commit({"a.bin": BODY[::-1]}, branch="feature/x")
    for name, words in {
        "other/name": "no such dataset, or a private one: not found",
        "owner/name@feature/x": r"no such revision \(a '/' in its name is written %2F\)",
    }.items():
        with pytest.raises(RemoteError, match=words):
            list_files(RemoteStore(0.0), f"hf://datasets/{name}", (".bin",))
    url, tag = one_file("hf://datasets/owner/name@feature%2Fx")
    assert RemoteStore(0.0).read(url, tag, 0, 9) == BODY[::-1][:9]


def test_files_that_changed_at_their_address_are_refused_and_moved_ones_are_not(
    web_server: WebServer, tmp_path: Path
) -> None:
    texts = ["one text"] * 30
    write(tmp_path / "a.parquet", list(texts), compression="none")
    original = (tmp_path / "a.parquet").read_bytes()
    web_server.files |= {"text/a.parquet": original, "moved/a.parquet": original}
    saved = opened(f"{web_server.url}/text").summary()
    opened(f"{web_server.url}/moved").check_unchanged(saved)
    web_server.files["text/a.parquet"] = original.replace(b"one text", b"two text")
    with pytest.raises(DataError, match=r"text/a.parquet changed on the server"):
        opened(f"{web_server.url}/text").check_unchanged(saved)
    web_server.files["text/a.parquet"] = original + b"more"  # its footer is not at its end
    config, size = DatasetConfig(parquet_dir=f"{web_server.url}/text"), len(original)
    with pytest.raises(DataError, match=f"text/a.parquet had {size} bytes, has {size + 4}"):
        data.index_sources(config, saved)


def test_messages_about_addresses_name_the_remedy(
    web_server: WebServer, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    web_server.files["text/a.jsonl"] = b"{}"
    with pytest.raises(DataError, match=r"holds no \*.parquet \(found 1 \*.jsonl\).*prepare.py"):
        opened(f"{web_server.url}/text")
    with pytest.raises(DataError, match="not found.*index page"):
        opened(f"{web_server.url}/nothing/")
    with pytest.raises(DataError, match="no such bucket: not found. Correct the address"):
        opened("s3://no-such-bucket/text")
    with pytest.raises(DataError, match="does not answer .host name not found"):
        opened("http://nosuchhost.invalid/a.parquet", retry_seconds=0.0)
    web_server.files["text/a.parquet"], web_server.has_ranges = BODY * 9, False
    with pytest.raises(DataError, match="no HTTP ranges"):
        opened(f"{web_server.url}/text/a.parquet")
    web_server.forbidden = True
    with pytest.raises(DataError, match="no permission"):
        opened(f"{web_server.url}/text/a.parquet")
    access._access.cache_clear()
    monkeypatch.delitem(sys.modules, "data.remote.s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"needs s3fs.*pip install -r requirements-remote.txt"):
        opened("s3://bucket/text")


def test_index_pages_may_spell_links_in_any_way(web_server: WebServer) -> None:
    links = ("./p&amp;0.bin#top", "/my%20dir/b%20c.bin", "deep/", "../", "./", "/other/d.bin")
    page = "".join(f'<a class="x" href="{link}">' for link in links).encode()
    web_server.files |= {f"my dir/{name}": BODY for name in ("p&0.bin", "b c.bin", "deep/e.bin")}
    web_server.files |= {"my dir/": page, "other/d.bin": BODY}
    store = RemoteStore(0.0)
    for address in ("my dir", "my%20dir/"):
        listing = list_files(store, f"{web_server.url}/{address}", (".bin",))
        assert [each.path for each in listing.files] == ["b%20c.bin", "deep/e.bin", "p&0.bin"]
        for each in listing.files:
            assert store.read(listing.url(each), each.tag, 0, 9) == BODY[:9]
    web_server.files |= {"loop/" + "in/" * n: b'<a href="in/">' for n in range(40)}
    with pytest.raises(DataError, match="too deep"):
        list_files(store, f"{web_server.url}/loop", (".bin",))
    web_server.files["gone/"] = b'<a href="a.bin">'
    with pytest.raises(RemoteError, match="/gone/a.bin: HTTP 404: not found"):
        list_files(store, f"{web_server.url}/gone", (".bin",))


@pytest.mark.parametrize(
    ("setting", "address", "words"),
    [
        ({"AWS_PROFILE": "nope"}, "s3://bucket/a", "ProfileNotFound: no permission"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "s3://bucket/a", "PartialCredentialsError: no permission"),
        ({}, "s3://Bad_Bucket!!/a", "the request is refused. Check the address"),
        ({}, "http://[::1/a", "the request is refused. Check the address"),
    ],
)
def test_mistakes_of_this_machine_are_not_tried_again(
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, str],
    address: str,
    words: str,
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RemoteError, match=words):
        RemoteStore(1.0).read(address, "", 0, 9)
    if address.startswith("s3"):
        with pytest.raises(RemoteError, match=words):
            list_files(RemoteStore(1.0), address, (".bin",))


def test_a_long_wait_that_a_server_asks_for_ends_with_the_time_for_retries() -> None:
    attempts = iter(range(9))

    def question() -> str:
        if next(attempts) == 0:
            info = aiohttp.RequestInfo(
                yarl.URL("http://h/"), "GET", CIMultiDictProxy(CIMultiDict())
            )
            wait = CIMultiDict({"Retry-After": "60"})
            raise aiohttp.ClientResponseError(info, (), status=503, headers=wait)
        return "answer"

    assert RemoteStore(0.1).ask("http://h/", question) == "answer"


def test_other_bytes_than_were_asked_for_are_not_taken(
    web_server: WebServer, hub_server: HubServer
) -> None:
    web_server.files["a.bin"] = BODY
    hub_server.commit({"a.bin": BODY})
    for server, address in ((web_server, web_server.url), (hub_server, "hf://datasets/owner/name")):
        url, tag = one_file(address)
        server.faults.queue += ["moved"]
        assert RemoteStore(5.0).read(url, tag, 7, 90) == BODY[7:90]
        assert server.faults.queue == []


def test_public_buckets_are_read_without_credentials(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.put("public", {"a.bin": BODY}, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    url, tag = one_file("s3://public")
    assert RemoteStore(0.0).read(url, tag, 1, 9) == BODY[1:9]


def test_a_web_server_without_if_match_cannot_pass_off_another_file(
    web_server: WebServer,
) -> None:
    web_server.files["a.bin"], web_server.has_if_match = BODY, False
    url, tag = one_file(web_server.url)
    web_server.files["a.bin"] = BODY[::-1]
    with pytest.raises(RemoteError, match="has changed since it was listed"):
        RemoteStore(5.0).read(url, tag, 1, 9)


def token_config(address: str, **options: Any) -> Config:
    dataset = DatasetConfig(train_data_path=address, retry_seconds=5.0, **options)
    return Config(dataset=dataset, tokenizer=TokenizerConfig(name="bytes"))


def test_token_files_are_copied_once_with_their_description(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 1 << 10)
    root, server, put = place
    tokens = (np.arange(20_000) % 251).astype(np.uint8)
    write_meta(tmp_path / "meta.json", ByteTokenizer(), np.dtype(np.uint8), {}, {})
    meta = (tmp_path / "meta.json").read_bytes()
    put({"text/train.bin": tokens.tobytes(), "text/meta.json": meta})
    server.faults.rate = 0.2
    config = token_config(f"{root}/text/train.bin", token_dtype="uint8")
    first = data.open_dataset(config.dataset, config.tokenizer)
    reads = len(server.faults.reads)
    assert first.stats.tokens == 20_000 and reads >= 20
    assert f"Copying {root}/text/train.bin to {tmp_path}" in caplog.text
    assert first.lines()[3].startswith(f"Copy of {root}/text/train.bin: {tmp_path}")
    again = data.open_dataset(config.dataset, config.tokenizer)
    assert again.fingerprint == first.fingerprint
    copies._in_use.clear()  # as in another process, while this one keeps its lock
    again = data.open_dataset(config.dataset, config.tokenizer)
    assert len(server.faults.reads) == reads, "the copy is there"
    again.check_unchanged(first.summary())
    with pytest.raises(DataError, match=r"whole: 20\.\d kB, .*cache_bytes is 100. Set it to 40"):
        other = token_config(f"{root}/text/", token_dtype="uint8", cache_bytes=100)
        data.open_dataset(other.dataset, other.tokenizer)


def test_an_interrupted_copy_goes_on_where_it_was(
    web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(copies, "_AT_ONCE", 1)  # so that none is on its way at the interruption
    web_server.files["a.bin"] = BODY
    url, tag = one_file(f"{web_server.url}/a.bin")

    class StopError(Exception):
        pass

    def stop(done: int) -> None:
        if done >= len(BODY) // 2:
            raise StopError

    target = tmp_path / "a.bin"
    with pytest.raises(StopError):
        copy_file(RemoteStore(5.0), url, tag, len(BODY), target, stop)
    assert not target.exists()
    web_server.faults.requests.clear()
    copy_file(RemoteStore(5.0), url, tag, len(BODY), target)
    assert target.read_bytes() == BODY
    assert len(web_server.faults.reads) == len(BODY) // 2048 + 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.bin"]


@pytest.mark.parametrize("what", ["listing", "copy", "footers"])
def test_an_interrupted_start_does_not_wait_for_a_server_that_stays_away(
    what: str, web_server: WebServer, tmp_path: Path
) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    web_server.files |= {"a.bin": BODY, "b/c.parquet": b"PAR1" * 9, "b/d.parquet": b"PAR1" * 9}
    url, tag = one_file(f"{web_server.url}/a.bin")
    web_server.faults.rate, web_server.faults.kinds = 1.0, ("503",)
    store = RemoteStore(20.0)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        if what == "listing":
            web_server.faults.all_requests = True
            list_files(store, url, (".bin",))
        elif what == "copy":
            copy_file(store, url, tag, len(BODY), tmp_path / "a.bin")
        else:
            build_remote_index(store, f"{web_server.url}/b", "text", False, {})
    assert time.monotonic() - began < 5
    store.closed.set()


def test_two_processes_do_not_fill_the_same_room(
    web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    web_server.files |= {"a.bin": BODY, "b.bin": BODY}
    first, second = (
        list_files(RemoteStore(0.0), f"{web_server.url}/{name}", (".bin",))
        for name in ("a.bin", "b.bin")
    )

    def copy_meanwhile(*_: object) -> None:  # of the first nothing is on disk yet
        copies.local_copies(RemoteStore(5.0), second, len(BODY))

    monkeypatch.setattr(copies, "copy_file", copy_meanwhile)
    with pytest.raises(DataError, match=r"b\.bin: .* other copies in use take 16\.4 kB"):
        copies.local_copies(RemoteStore(5.0), first, len(BODY))


def test_unused_copies_make_room_and_used_ones_do_not(
    web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(name: str) -> Listing:
        web_server.files[name] = BODY
        return list_files(RemoteStore(0.0), f"{web_server.url}/{name}", (".bin",))

    limit = 2 * len(BODY)
    first, second = (
        copies.local_copies(RemoteStore(5.0), listing(name), limit) for name in ("a.bin", "b.bin")
    )
    with pytest.raises(DataError, match="other copies in use take"):
        copies.local_copies(RemoteStore(5.0), listing("c.bin"), limit)
    os.close(copies._in_use.pop(first))
    third = copies.local_copies(RemoteStore(5.0), listing("c.bin"), limit)
    assert not (first / "a.bin").exists()
    assert (second / "b.bin").exists() and (third / "c.bin").exists()


@pytest.mark.slow
def test_no_credential_and_no_signed_address_is_in_any_file_or_message(
    s3_server: S3Server,
    hub_server: HubServer,
    web_server: WebServer,
    corpus_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = {f"text/{path.name}": path.read_bytes() for path in corpus_dir.iterdir()}
    tokens = bytes(range(1, 120)) * 40
    s3_server.put("secrets", files)
    hub_server.commit(files)
    web_server.files["train.bin"] = tokens
    sources = [
        {"name": "bucket", "weight": 1, "parquet_dir": "s3://secrets/text/*.parquet"},
        {"name": "hub", "weight": 1, "parquet_dir": "hf://datasets/owner/name@main/text"},
        {"name": "web", "weight": 1, "train_data_path": f"{web_server.url}/train.bin"},
    ]
    for server in (s3_server, hub_server, web_server):
        server.faults.rate = 0.2
    dataset = {"mixture": sources, "token_dtype": "uint8"}
    (tmp_path / "tiny.yaml").write_text(f"{TINY}dataset: {json.dumps(dataset)}")
    words = [str(tmp_path / "tiny.yaml"), "test_freq=null", "tokenizer.name=bytes"]
    words += [f"checkpoint_dir={tmp_path}"]
    assert run_here([*words, "max_iters=4"]) == 0
    hub_server.commit({"text/other.parquet": files["text/part_0.parquet"]})  # main moves on
    hub_server.faults.queue, hub_server.faults.kinds = ["403"] * 9, ("403",)
    debug = ["training.debug=true", "cache_bytes=0", "resume_from_checkpoint=auto", "max_iters=9"]
    assert run_here([*words, *debug]) == 3
    said = "".join((*capfd.readouterr(), caplog.text))
    assert "trying again" in said and "no permission" in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pt" for path in written)
    assert any(path.parent.name == "copies" or path.suffix == ".npz" for path in written)
    for secret in (*SECRETS.values(), SIGNATURE):
        assert secret not in said
        assert [path for path in written if secret.encode() in path.read_bytes()] == []
