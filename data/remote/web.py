"""Web servers, by fsspec and aiohttp. A folder is what its index page links to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from fsspec.utils import glob_translate

from config import DataError
from data.remote.access import (
    CONNECT_S,
    IN_FLIGHT,
    SILENCE_S,
    Ask,
    Failure,
    NoRangesError,
    RemoteFile,
    failure_of_status,
    glob_root,
    has_magic,
    timeout_s,
)


class Web:
    """All web servers."""

    login = "Web addresses are read without a login: make it public, or copy it to a bucket."

    def __init__(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        self._files = HTTPFileSystem(
            simple_links=False,
            skip_instance_cache=True,
            client_kwargs={"timeout": timeout, "trust_env": True},  # HTTPS_PROXY
        )

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file, if it still has this tag."""
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if tag:
            headers["If-Match" if tag.startswith('"') else "If-Unmodified-Since"] = tag
        timeout = aiohttp.ClientTimeout(timeout_s(stop - start), sock_read=SILENCE_S)

        async def get() -> bytes:
            session = await self._files.set_session()
            address = self._files.encode_url(url)
            async with session.get(address, headers=headers, timeout=timeout) as answer:
                answer.raise_for_status()
                name = "ETag" if tag.startswith('"') else "Last-Modified"
                if tag and answer.headers.get(name, tag) != tag:  # some servers ignore If-Match
                    raise aiohttp.ClientResponseError(
                        answer.request_info, answer.history, status=412, headers=answer.headers
                    )
                if answer.status != 206 and answer.content_length != stop - start:
                    raise NoRangesError  # before all of a large file has come
                body: bytes = await answer.read()
                return body

        data: bytes = sync(self._files.loop, get)
        return data

    def find(self, url: str, endings: tuple[str, ...], ask: Ask) -> list[RemoteFile]:
        """Returns the files that an address means."""
        if has_magic(url):
            fixed, pattern = glob_root(url), re.compile(glob_translate(url))
            depth = None if "**" in url else url[len(fixed) + 1 :].count("/")
            names = [name for name in self._below(fixed, depth, ask) if pattern.match(name)]
        elif url.endswith(endings):
            names = [url]
        else:
            names = list(self._below(url.rstrip("/"), None, ask))
        wanted = [name for name in names if name.endswith(endings)]
        # One question for each file, so that a bad moment does not begin the listing anew.
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="list") as pool:
            found = list(pool.map(lambda name: ask(partial(self._file, name)), wanted))
        return [*found, *(RemoteFile(name, 0, "") for name in sorted(set(names) - set(wanted)))]

    def _below(self, folder: str, depth: int | None, ask: Ask) -> Iterator[str]:
        """Yields the files that index pages link to, from that of a folder on."""
        # Not `find` of fsspec: it takes a folder that it cannot list for an empty one.
        for name in ask(partial(self._files.ls, f"{folder}/", detail=False)):
            if "?" in name:  # sorts the page
                continue
            if not name.endswith("/"):
                yield name
            elif depth != 0 and name.startswith(f"{folder}/") and name != f"{folder}/":
                yield from self._below(name.rstrip("/"), depth and depth - 1, ask)

    def _file(self, url: str) -> RemoteFile:
        entry = self._files.info(url)
        if entry["size"] is None:
            raise DataError(f"{url}: the server does not tell its size. Copy it to this machine.")
        tag = entry.get("ETag", "")
        if not tag.startswith('"'):  # a weak one (W/) may be equal for files of different bytes
            tag = entry.get("Last-Modified", "")
        return RemoteFile(url, entry["size"], tag)

    def explain(self, error: Exception) -> Failure:
        """Returns what an error of aiohttp or fsspec means."""
        # fsspec hides what went wrong with a HEAD request behind "not found".
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
        if isinstance(cause or error, aiohttp.ClientResponseError):
            answer: Any = cause or error
            return failure_of_status(answer.status, answer.headers or {})
        if cause is None and isinstance(error, FileNotFoundError):
            return Failure(404, "HTTP 404")
        return Failure(None, type(cause or error).__name__)


def connect() -> Web:
    """Returns a new access."""
    return Web()
