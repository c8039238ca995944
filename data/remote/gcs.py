"""Google Cloud Storage, by gcsfs; credentials as Google's tools find them, else none."""

from __future__ import annotations

from functools import partial
from typing import Any

from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError

from data.remote.access import (
    Ask,
    Failure,
    RemoteFile,
    failure_of_status,
    failure_without_answer,
    has_magic,
    timeout_s,
)


class _Files(GCSFileSystem):  # type: ignore[misc]  # gcsfs has no types
    """Without the retries of gcsfs, half a minute of silence: RemoteStore has its own."""

    _request = GCSFileSystem._request.__wrapped__


class Gcs:
    """All buckets."""

    login = (
        "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run gcloud auth "
        "application-default login, for an account that may read and list the bucket."
    )

    def __init__(self) -> None:
        self._files = _Files(
            skip_instance_cache=True, use_listings_cache=False, requests_timeout=timeout_s(0)
        )

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file of this generation."""
        data: bytes = self._files.cat_file(url, start=start, end=stop, generation=tag or None)
        return data

    def find(self, url: str, endings: tuple[str, ...], ask: Ask) -> list[RemoteFile]:
        """Returns the files that an address means."""
        del endings
        find: Any = self._files.glob if has_magic(url) else self._files.find
        return [
            RemoteFile(f"gs://{name}", entry["size"], str(entry.get("generation", "")))
            for name, entry in ask(url, partial(find, url, detail=True)).items()
            if entry["type"] == "file"
        ]

    def explain(self, error: Exception) -> Failure:
        """Returns what an error of gcsfs means."""
        if isinstance(error, HttpError) and error.code:
            return failure_of_status(int(error.code), {})
        if isinstance(error, FileNotFoundError):
            # Also for a generation that was overwritten.
            return Failure(404, "no such object or bucket, or another one by now")
        if isinstance(error, OSError) and str(error).startswith("Forbidden"):
            return Failure(403, "HTTP 403")
        return failure_without_answer(error)


def connect() -> Gcs:
    """Returns a new access."""
    return Gcs()
