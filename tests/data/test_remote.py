"""Remote text: reads through faults, listings, pins, messages."""

from __future__ import annotations

import logging

import pytest

from data.remote import access
from data.remote import store as store_module
from data.remote.access import access_to
from data.remote.store import RemoteStore
from tests.remote_servers import HubServer, S3Server, WebServer

BODY = bytes(range(256)) * 64


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(store_module, "_retries", store_module._RetryLog())
    access._access.cache_clear()  # it keeps the environment of another test


@pytest.fixture(params=["s3", "http", "hf"])
def remote_file(request: pytest.FixtureRequest) -> tuple[str, S3Server | WebServer]:
    """The address of a file with BODY, and its server."""
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        s3.put("bucket", {"text/a.bin": BODY})
        return "s3://bucket/text/a.bin", s3
    if request.param == "http":
        web: WebServer = request.getfixturevalue("web_server")
        web.files["text/a.bin"] = BODY
        return f"{web.url}/text/a.bin", web
    hub: HubServer = request.getfixturevalue("hub_server")
    sha = hub.commit({"text/a.bin": BODY})
    return f"hf://datasets/owner/name@{sha}/text/a.bin", hub


def tag_of(url: str) -> str:
    (file,) = access_to(url).find(url, (".bin",))
    return file.tag


def test_ranges_come_whole_through_every_fault(
    remote_file: tuple[str, S3Server | WebServer], caplog: pytest.LogCaptureFixture
) -> None:
    url, server = remote_file
    store, tag = RemoteStore(retry_seconds=20.0), tag_of(url)
    assert tag
    server.faults.queue += ["500", "503", "429", "cut", "short"]
    with caplog.at_level(logging.WARNING):
        assert store.read(url, tag, 100, 5000) == BODY[100:5000]
    assert server.faults.queue == []
    assert store.read(url, tag, 0, len(BODY)) == BODY
    assert "trying again" in caplog.text
