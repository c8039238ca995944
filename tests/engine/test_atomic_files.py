"""Durable writes: whole or absent, and every OSError becomes a message with a remedy."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from config import WriteError
from files.atomic import (
    HashedFile,
    atomic_folder,
    atomic_write,
    atomic_write_text,
    durable_rename,
    remove_temporaries,
)
from files.regular import open_regular, read_regular
from files.write_errors import as_write_error, check_space, check_writable
from tests.engine.faults import failing, raise_error, stand_in


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    data = os.urandom((1 << 24) * 2 + 12345)  # more than two chunks, so that the thread hashes
    written = atomic_write(tmp_path / "a", lambda out: [out.write(data), out.write(b"end")])
    assert (tmp_path / "a").read_bytes() == data + b"end"
    assert written.size == len(data) + 3
    assert written.sha256 == hashlib.sha256(data + b"end").hexdigest()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
    written = atomic_write_text(tmp_path / "a", "x" * 100)
    assert (tmp_path / "a").read_text() == "x" * 100
    assert written.size == 100


def test_a_failure_at_any_call_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    for at in range(1, 100):
        atomic_write_text(tmp_path / "a", "old")
        with failing(at) as faults:
            try:
                atomic_write_text(tmp_path / "a", "new")
            except OSError as error:
                assert error.errno == errno.EIO
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a").read_text() in ("old", "new")
        if not faults.reached:
            assert at > 5
            return
    pytest.fail("the sweep did not end")


def test_an_error_hidden_by_the_caller_of_write_comes_out(tmp_path: Path) -> None:
    def fill(out: HashedFile) -> None:
        with failing(1, raise_error(errno.ENOSPC)):
            try:
                out.write(b"data")
            except OSError:
                raise RuntimeError("unexpected pos 64 vs 0") from None

    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a", fill)
    assert os.listdir(tmp_path) == []


def test_errors_become_messages_with_numbers_and_a_remedy(tmp_path: Path) -> None:
    for code, text in (
        (errno.EACCES, "cannot write x: Permission denied; kept y. Check the owner"),
        (errno.EROFS, "Read-only file system; kept y. The file system is read-only: point"),
        (errno.EFBIG, "File too large; kept y. Raise the file size limit"),
        (errno.EIO, "Input/output error; kept y. The disk reports"),
        (errno.ENAMETOOLONG, "cannot write x: File name too long; kept y."),
        (errno.ENOSPC, "checkpoint needs 1.2 GB, "),
        (errno.EDQUOT, f" free on {tmp_path}; kept y. Free space there"),
    ):
        with pytest.raises(WriteError) as caught:  # noqa: SIM117
            with as_write_error("write x", tmp_path, 1_200_000_000, "y"):
                raise_error(code)()
        assert text in str(caught.value)
        assert caught.value.exit_code == 5
    with pytest.raises(WriteError, match=r"^cannot write x: .*, .* free on "):  # noqa: SIM117
        with as_write_error("write x", tmp_path):
            raise_error(errno.ENOSPC)()


def test_space_is_checked_with_five_percent_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1050}))
    check_space(tmp_path, 1000)
    with pytest.raises(OSError, match="No space"):
        check_space(tmp_path, 1001)


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="is a file.*Part of that path"):
        check_writable(tmp_path / "file" / "checkpoints")
    check_writable(tmp_path / "new" / "checkpoints")
    with pytest.raises(WriteError, match=r"File name too long. Shorten training.checkpoint_dir"):
        check_writable(tmp_path / ("a" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WriteError, match="no permission"):
        check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_there_with_all_files_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a" / "b") as folder:  # noqa: PT012
        (folder / "file").write_text("")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == []
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("")
        assert not (tmp_path / "a" / "b").exists()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a" / "b"):
        pass
    (tmp_path / "part").write_text("new")
    durable_rename(tmp_path / "part", tmp_path / "a" / "b" / "file")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"


def test_temporaries_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-123-checkpoint_5.pt").write_text("half")
    (tmp_path / "kept").write_text("")
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


def test_an_error_of_an_early_sync_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports a failed write-back once, so the last fsync alone would succeed."""
    real, results = os.fsync, iter([OSError(errno.EIO, "Input/output error")])

    def failing_once(descriptor: int) -> None:
        error = next(results, None)
        if error is not None:
            raise error
        real(descriptor)

    monkeypatch.setattr("files.atomic.SYNC_EVERY_BYTES", 1)
    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(OSError, match="Input/output error"):
        atomic_write(tmp_path / "file", lambda out: out.write(b"data"))
    assert list(tmp_path.iterdir()) == []


# ---- what is no regular file


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path) -> None:
    for number, (kind, reason) in enumerate(
        (
            ("fifo", "is not a regular file"),
            ("/dev/zero", "is not a regular file"),
            ("folder", "Is a directory"),
        )
    ):
        path = tmp_path / str(number)
        stand_in(path, kind)
        with pytest.raises(OSError) as caught:
            read_regular(path, 100)
        assert (caught.value.strerror, caught.value.filename) == (reason, os.fspath(path))
        with pytest.raises(OSError):
            open_regular(path, os.O_WRONLY | os.O_CREAT)
    (tmp_path / "a").write_bytes(bytes(11))
    with pytest.raises(OSError, match="is larger than"):
        read_regular(tmp_path / "a", 10)


def test_a_link_is_followed_to_be_read_and_not_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("text")
    stand_in(tmp_path / "link", "target")
    assert read_regular(tmp_path / "link", 4) == b"text"
    with pytest.raises(OSError, match="is a symbolic link"):
        open_regular(tmp_path / "link", os.O_WRONLY | os.O_TRUNC)
    assert (tmp_path / "target").read_text() == "text"
