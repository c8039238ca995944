"""Datasets on the Hugging Face Hub, by huggingface_hub; the token as its tools find it (HF_TOKEN).

A read of the Hub is answered by a redirect to a signed address on another host. It is kept in
memory while it holds, so that most reads take one request and few count against the Hub's limits.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, HfFileSystem, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session

from data.remote.access import (
    SILENCE_S,
    Ask,
    Failure,
    RemoteFile,
    check_range,
    failure_of_status,
    failure_without_answer,
    has_magic,
)

_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)"
    r"(@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)
_MISSING: dict[type[Exception], str] = {
    RepositoryNotFoundError: "no such dataset, or a private one",
    RevisionNotFoundError: "no such revision (a '/' in its name is written %2F)",
}


class _StatusError(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class Hub:
    """The Hub, or the one that HF_ENDPOINT names."""

    login = (
        "Check the name; for a private or gated dataset, accept its terms on the Hub and set "
        "HF_TOKEN."
    )

    def __init__(self) -> None:
        # Not huggingface_hub's constant, which keeps the environment of its import.
        self._endpoint = os.environ.get("HF_ENDPOINT")
        self._files = HfFileSystem(endpoint=self._endpoint, skip_instance_cache=True)
        self._signed: dict[str, str] = {}

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file; a commit in the address makes the tag needless."""
        del tag
        parts = _parts(url)
        where = hf_hub_url(
            parts["repo"],
            parts["path"],
            repo_type="dataset",
            revision=parts["revision"],
            endpoint=self._endpoint,
        )
        signed = self._signed.get(url)
        if signed is not None:
            try:
                return _get(signed, {}, start, stop)[0]
            except _StatusError as error:
                if error.failure.status not in (401, 403, 404, 410):
                    raise
            self._signed.pop(url, None)  # it no longer holds
        data, final = _get(where, build_hf_headers(), start, stop)
        if urlsplit(final).netloc != urlsplit(where).netloc:
            self._signed[url] = final
        return data

    def find(self, url: str, endings: tuple[str, ...], ask: Ask) -> list[RemoteFile]:
        """Returns the files that an address means."""
        del endings
        path = url.removeprefix("hf://").rstrip("/")
        find: Any = self._files.glob if has_magic(path) else self._files.find
        return [
            RemoteFile(f"hf://{name}", entry["size"], entry.get("blob_id") or "")
            for name, entry in ask(url, partial(find, path, detail=True)).items()
            if entry["type"] == "file"
        ]

    def explain(self, error: Exception) -> Failure:
        """Returns what an error of huggingface_hub means."""
        if isinstance(error, _StatusError):
            return error.failure
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            failure = failure_of_status(cause.response.status_code, cause.response.headers)
            reason = _MISSING.get(type(cause))
            return failure._replace(reason=reason) if reason else failure
        if isinstance(error, OfflineModeIsEnabled):
            return Failure(400, "HF_HUB_OFFLINE is set")
        if isinstance(error, FileNotFoundError):
            return Failure(404, "no such file or folder")
        return failure_without_answer(error)


def commit_of(url: str) -> str:
    """Returns the commit that the revision of an address means now."""
    parts = _parts(url)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    sha: str = api.dataset_info(parts["repo"], revision=parts["revision"]).sha
    return sha


def at_commit(url: str, commit: str) -> str:
    """Returns an address with its revision replaced."""
    parts = _parts(url)
    path = f"/{parts['path']}" if parts["path"] else ""
    return f"hf://datasets/{parts['repo']}@{commit}{path}"


def _parts(url: str) -> dict[str, Any]:
    match = _ADDRESS.fullmatch(url)
    assert match is not None, "the config's rules refuse other addresses"
    parts = match.groupdict()
    return {**parts, "revision": unquote(parts["revision"] or "main")}


def _get(url: str, headers: dict[str, str], start: int, stop: int) -> tuple[bytes, str]:
    """Returns bytes [start, stop) and the address that gave them in the end."""
    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked, timeout=SILENCE_S) as answer:
        if answer.status_code >= 400:
            raise _StatusError(failure_of_status(answer.status_code, answer.headers))
        check_range(answer.status_code, answer.headers, start, stop)
        return answer.read(), str(answer.url)


def connect() -> Hub:
    """Returns a new access."""
    return Hub()
