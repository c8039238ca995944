"""Web servers, by fsspec and aiohttp. A folder is what its index page links to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem

from config import DataError
from data.remote.access import (
    CONNECT_S,
    IN_FLIGHT,
    SILENCE_S,
    Failure,
    NoRangesError,
    RemoteFile,
    failure_of_status,
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
                if answer.status != 206 and answer.content_length != stop - start:
                    raise NoRangesError  # before all of a large file has come
                body: bytes = await answer.read()
                return body

        data: bytes = sync(self._files.loop, get)
        return data

    def find(self, url: str, endings: tuple[str, ...]) -> list[RemoteFile]:
        """Returns the files that an address means."""
        if has_magic(url):
            names = self._files.glob(url)
        elif url.endswith(endings):
            names = [url]
        else:
            names = self._files.find(f"{url.rstrip('/')}/")
        wanted = [name for name in names if name.endswith(endings)]
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="list") as pool:
            found = list(pool.map(self._file, wanted))
        return [*found, *(RemoteFile(name, 0, "") for name in sorted(set(names) - set(wanted)))]

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
