"""CRC-32 checksums of the blocks of a file, compared when a block is first read.

Blocks are small because rows are shuffled: one row of 1 KB makes its whole block be read. Each
block is compared once per process, so later epochs cost nothing.
"""

from __future__ import annotations

import base64
import mmap
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from config import DataError

BLOCK_BYTES = 1 << 14

Crcs = npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False, slots=True)
class Checksums:
    """The checksum of each block of a file, and which blocks this process has compared."""

    crcs: Crcs
    source: str
    """The file that states them, for messages."""
    compared: bytearray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "compared", bytearray(len(self.crcs)))

    def verify(self, path: str, data: bytes | mmap.mmap, first: int, last: int) -> int:
        """Compares the blocks that hold bytes [first, last) of the file, whose contents are `data`.

        Returns how many bytes were read for it; raises DataError for a damaged block.
        """
        read = 0
        for block in range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)):
            if self.compared[block]:
                continue
            begin = block * BLOCK_BYTES
            part = data[begin : begin + BLOCK_BYTES]
            if zlib.crc32(part) != self.crcs[block]:
                raise DataError(
                    f"{path}: damaged: block {block} (bytes {begin} to {begin + len(part) - 1}) "
                    f"does not match its checksum in {self.source}. Restore the file from a copy, "
                    "or make it again: python prepare.py SOURCE OUT --tokenizer NAME --overwrite"
                )
            self.compared[block] = 1
            read += len(part)
        return read


def file_checksums(path: Path) -> Crcs:
    """Returns the CRC-32 of each block of a file."""
    with path.open("rb") as file:
        return np.array(
            [zlib.crc32(part) for part in iter(lambda: file.read(BLOCK_BYTES), b"")], "<u4"
        )


def to_text(crcs: Crcs) -> str:
    """Returns checksums as base64, for JSON."""
    return base64.b64encode(crcs.astype("<u4").tobytes()).decode()


def from_text(text: str, file_bytes: int) -> Crcs:
    """Returns checksums from base64; raises ValueError unless there is one for each block."""
    crcs = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4")
    if len(crcs) != -(-file_bytes // BLOCK_BYTES):
        raise ValueError(f"{len(crcs)} checksums for {file_bytes} bytes")
    return crcs
