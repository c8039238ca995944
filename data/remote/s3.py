"""S3 and what speaks its language (AWS_ENDPOINT_URL), by s3fs; credentials as the AWS tools do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
)
from fsspec.asyn import sync

from data.remote.access import (
    CONNECT_S,
    IN_FLIGHT,
    SILENCE_S,
    Ask,
    Failure,
    RemoteFile,
    failure_of_status,
    failure_without_answer,
    has_magic,
    timeout_s,
)

# Codes that come with status 400.
_STATUS = {"RequestTimeout": 408, "ExpiredToken": 403, "InvalidToken": 403}

_OF_THE_NETWORK = (
    *(ConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError),
    CredentialRetrievalError,  # also from servers
)

T = TypeVar("T")


class S3:
    """Buckets of one endpoint."""

    login = (
        "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of an account that may "
        "read and list the bucket."
    )

    def __init__(self) -> None:
        self._files = _connect(anonymous=False)

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file, if it still has this tag."""
        bucket, key, _ = self._files.split_path(url)
        request = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
        if tag:
            request["IfMatch"] = tag

        async def get() -> bytes:
            answer = await self._files._call_s3("get_object", **request)
            async with answer["Body"] as body:
                data: bytes = await body.read()
                return data

        def read() -> bytes:
            data: bytes = sync(self._files.loop, get, timeout=timeout_s(stop - start))
            return data

        return self._signed_or_not(read)

    def find(self, url: str, endings: tuple[str, ...], ask: Ask) -> list[RemoteFile]:
        """Returns the files that an address means."""
        del endings
        path = self._files._strip_protocol(url)

        def list_all() -> dict[str, Any]:
            find = self._files.glob if has_magic(path) else self._files.find
            found: dict[str, Any] = find(path, detail=True)
            return found

        return [
            RemoteFile(f"s3://{name}", entry["size"], entry.get("ETag", ""))
            for name, entry in ask(url, partial(self._signed_or_not, list_all)).items()
            if entry["type"] == "file"
        ]

    def _signed_or_not(self, work: Callable[[], T]) -> T:
        """Without credentials requests are sent unsigned from then on: public buckets take them."""
        try:
            return work()
        except NoCredentialsError:
            self._files = _connect(anonymous=True)
            return work()

    def explain(self, error: Exception) -> Failure:
        """Returns what an error of botocore or s3fs means."""
        cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
        if isinstance(cause, ClientError):
            answer = cause.response["ResponseMetadata"]
            status = _STATUS.get(cause.response["Error"]["Code"], answer["HTTPStatusCode"])
            failure = failure_of_status(status, answer.get("HTTPHeaders", {}))
            missing = cause.response["Error"]["Code"] == "NoSuchBucket"
            return failure._replace(reason="no such bucket") if missing else failure
        if isinstance(error, FileNotFoundError):
            return Failure(404, "no such key or bucket")
        if isinstance(error, BotoCoreError) and not isinstance(error, _OF_THE_NETWORK):
            # Of names; else of logins: no profile of that name, half a key pair, one expired.
            status = 400 if isinstance(error, ParamValidationError) else 401
            return Failure(status, type(error).__name__)
        return failure_without_answer(error)


def _connect(anonymous: bool) -> Any:
    files = s3fs.S3FileSystem(
        anon=anonymous,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_S,
            "read_timeout": SILENCE_S,
            "max_pool_connections": 2 * IN_FLIGHT,
            "retries": {"total_max_attempts": 1},
        },
    )
    files.retries = 1  # RemoteStore retries, and tells of it
    return files


def connect() -> S3:
    """Returns a new access."""
    return S3()
