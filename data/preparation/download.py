"""Resumable downloads of files into a folder.

Bytes go to NAME.part, which is renamed when its size is right. NAME.http keeps the version that the
server named, which tells whether the rest of the file can be asked for.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import DataError
from data.preparation.errors import read_error, writing
from data.sources.prepare_command import uncompressed_name
from data.sources.tokens.meta import write_json
from files.atomic import durable_rename
from settings.addresses import is_remote

_ATTEMPTS = 5
FIRST_PAUSE_S = 1.0
"""Before the second attempt; it doubles with each further one."""
_TIMEOUT_S = 30.0
_BLOCK_BYTES = 1 << 18
_ARCHIVES = (".tgz", ".zip", ".xz", ".tar", ".7z", ".rar", ".pdf")
_RETRIED = {408, 416, 425, 429}  # besides 500 and above
_KEPT_IN_URLS = "%/:=&?~#+!$,;'@()*[]"  # other characters are quoted, as browsers do


def is_url(text: str) -> bool:
    """Returns whether this is an address that can be downloaded."""
    return text.startswith(("http://", "https://"))


def without_query(url: str) -> str:
    """Returns an address as it may be shown and kept: its query may be a signature."""
    return url.partition("?")[0]


class _BrokenAnswerError(Exception):
    """An answer that is not whole, or not to what was asked."""


def read_url_list(path: Path) -> list[str]:
    """Returns the URLs in a file, one per line, without blank lines and # comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise read_error(path, error) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}), so not a list of URLs") from None
    urls = []
    for number, line in enumerate(lines, 1):
        url = line.strip()
        if not url or url.startswith("#"):
            continue
        if not is_remote(url):
            raise DataError(
                f"{path}:{number}: {ascii(without_query(url)[:80])} is not https://, s3://, gs://, hf://"
            )
        urls.append(url)
    if not urls:
        raise DataError(f"{path}: no URLs; write one per line")
    return urls


def local_paths(urls: Sequence[str], folder: Path) -> list[Path]:
    """Returns where each URL is downloaded to; raises DataError for archives."""
    paths = []
    for number, url in enumerate(urls):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
        if uncompressed_name(name.lower()).endswith(_ARCHIVES):
            raise DataError(
                f"{without_query(url)}: an archive, not text; download and unpack it, give the file"
            )
        paths.append(folder / f"{number:05d}-{name}")
    return paths


def download(url: str, target: Path) -> Iterator[tuple[int, int]]:
    """Downloads a file, or the rest of it after an interruption.

    Yields (bytes so far, bytes in all or 0 if unknown). Raises DataError if the server does not
    give the file, WriteError if it cannot be saved.
    """
    shown = without_query(url)
    if target.exists() and _saved_version(target).get("url") == _digest(url):
        return
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            yield from _attempt(url, target)
            return
        except urllib.error.HTTPError as error:
            # Not error.reason: of a refused redirect it holds the address, which may be signed.
            reason = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".rstrip()
            error.close()
            if error.code < 500 and error.code not in _RETRIED:
                raise DataError(f"{shown}: {reason}") from None
            if error.code == 416:  # the part is longer than the file, so it is of another version
                _part(target).unlink(missing_ok=True)
        except (http.client.InvalidURL, ValueError):  # of the host name
            raise DataError(f"{shown}: no valid address") from None
        except _BrokenAnswerError as error:
            reason = str(error)
        except (OSError, http.client.HTTPException) as error:
            reason = _reason(error)
    raise DataError(
        f"{shown}: {reason} ({_ATTEMPTS} attempts). The same command continues the download."
    )


def _reason(error: Exception) -> str:
    """Returns what went wrong, without the error's own text: that may hold the whole address."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return type(inner if isinstance(inner, Exception) else error).__name__


def _attempt(url: str, target: Path) -> Iterator[tuple[int, int]]:
    part, saved = _part(target), _saved_version(target)
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "hatchery"}
    if done and saved.get("url") == _digest(url) and saved.get("version"):
        # If-Range: a server whose file has changed since answers with the whole new one (200).
        headers |= {"Range": f"bytes={done}-", "If-Range": saved["version"]}
    address = urllib.parse.quote(url, safe=_KEPT_IN_URLS)
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                raise _BrokenAnswerError("the server sent another range than asked for")
        else:
            done = 0
            _save_version(target, url, response.headers)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        for block in iter(lambda: response.read(_BLOCK_BYTES), b""):
            _write_block(part, block, done)
            done += len(block)
            yield done, total
        if not done:
            _write_block(part, b"", 0)
    if total and done != total:
        raise _BrokenAnswerError(f"the connection ended after {done} of {total} bytes")
    with writing(target):
        durable_rename(part, target)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _version_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.http")


def _saved_version(target: Path) -> dict[str, Any]:
    try:
        values = json.loads(_version_path(target).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _digest(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _save_version(target: Path, url: str, headers: Any) -> None:
    # A weak ETag (W/) may be equal for files of different bytes, so a part cannot rely on it.
    tag = headers.get("ETag") or ""
    version = headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    write_json(_version_path(target), {"url": _digest(url), "version": version})


def _write_block(part: Path, block: bytes, at: int) -> None:
    # Only writing may raise a WriteError; an OSError of the network is another attempt's.
    with writing(part), part.open("r+b" if at else "wb") as file:
        file.seek(at)
        file.write(block)
