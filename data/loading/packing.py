"""From units to rows of T + 1 tokens.

The one idea: a lane is one endless stream of tokens, epoch after epoch, and a row is a window of
T + 1 tokens that advances by T. Nothing is dropped and nothing is padded: what is left of a unit
begins the next row, or every unit is whole rows, and none joins two. The state of a lane is
therefore the address of its next token, three integers.
"""

from __future__ import annotations

import bisect
import mmap
from itertools import product
from typing import NoReturn, Protocol, TypeAlias

import numpy as np
import torch

from config import DataError
from data.loading.order import Integers, Tokens

Address: TypeAlias = tuple[int, int, int]
"""(epoch, place in the lane's plan, token of what the lane reads there)"""


_EMPTY_UNITS = 1000  # so many in a row, and a whole epoch of them, mean that there is no text


class TokenSource(Protocol):
    """What a lane reads from."""

    def lane_units(self, epoch: int, lane: int) -> Integers:
        """The units of a lane in one epoch, in reading order."""

    def tokens(self, epoch: int, lane: int, place: int) -> Tokens:
        """What the lane reads of the unit at that place, perhaps as a view of something larger."""


class Trace:
    """Where the tokens of one `fill` came from, T of each row."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.addresses: list[Address] = []

    def add(self, start: int, address: Address) -> None:
        """From token `start` of the rows on, tokens lie one after the other from `address`."""
        self.starts.append(start)
        self.addresses.append(address)

    def address(self, token: int) -> Address:
        """The address of a token of the rows, or of the one that follows them."""
        i = bisect.bisect_right(self.starts, token) - 1
        epoch, place, offset = self.addresses[i]
        return epoch, place, offset + token - self.starts[i]

    def runs(self, first: int, last: int) -> list[tuple[Address, int]]:
        """(address, length) of the pieces of tokens [first, last] of the rows, the last one too."""
        return self._pieces(first, last + 1)

    def _pieces(self, first: int, last: int) -> list[tuple[Address, int]]:
        inner = [start for start in self.starts if first < start < last]
        edges = [first, *inner, last]
        return [
            (self.address(a), b - a) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b
        ]


class RowTrace(Trace):
    """The same where the token after a row is not the first one of the next."""

    def runs(self, first: int, last: int) -> list[tuple[Address, int]]:
        """(address, length) of the pieces of tokens [first, last), each with the one after it."""
        return [(address, length + 1) for address, length in self._pieces(first, last)]


class _Lane:
    """The units of one lane from an address on."""

    def __init__(self, source: TokenSource, lane: int, address: Address = (0, 0, 0)) -> None:
        self._source = source
        self._lane = lane
        self._epoch, self._place, self._offset = address
        self._units = source.lane_units(self._epoch, lane)
        self._tokens: Tokens | None = None
        if self._place >= len(self._units) > 0:
            self._refuse(f"unit {self._place} of {len(self._units)}")

    def _next_epoch(self) -> None:
        self._epoch, self._place = self._epoch + 1, 0
        self._units = self._source.lane_units(self._epoch, self._lane)

    def _refuse(self, address: str) -> NoReturn:
        raise DataError(
            f"lane {self._lane}, epoch {self._epoch}: the data state asks for {address}: it "
            "belongs to other data, or text that was there is now skipped. Restore the data."
        )


class LaneStream(_Lane):
    """The rows of one lane from an address on, across all joins, holding one unit at a time."""

    def fill(self, rows: Tokens) -> Trace:
        """Fill `rows` (..., T + 1) with the next ones; raises DataError for an epoch without text.

        Each begins with the last token of the one before.
        """
        block_size = rows.shape[-1] - 1
        flat = np.empty(rows.size // (block_size + 1) * block_size + 1, dtype=rows.dtype)
        trace = self._read(flat)
        rows[...] = windows(flat, block_size).reshape(rows.shape)
        return trace

    def _read(self, out: Tokens) -> Trace:
        """Fill `out` with the next len(out) tokens; the last one will be read again."""
        trace = Trace()
        filled = 0
        while filled < len(out):
            part = self._load()[self._offset :][: len(out) - filled]
            trace.add(filled, (self._epoch, self._place, self._offset))
            out[filled : filled + len(part)] = part
            filled += len(part)
            self._offset += len(part)
            del part  # the memory of a finished unit goes before the next one is read
        self._offset -= 1
        return trace

    def _load(self) -> Tokens:
        """The unit with the next token; passes over finished and empty ones."""
        empty = 0
        while self._tokens is None or self._offset >= len(self._tokens):
            if self._tokens is not None:
                empty += 1
                self._place, self._offset = self._place + 1, 0
                self._tokens = None
            if self._place >= len(self._units):
                if empty > max(len(self._units), _EMPTY_UNITS) or not len(self._units):
                    raise DataError(
                        f"no text in the {len(self._units)} units of lane {self._lane} "
                        f"(epoch {self._epoch}): every document is null or empty, or was skipped."
                    )
                self._next_epoch()
                continue
            tokens = self._source.tokens(self._epoch, self._lane, self._place)
            self._tokens = _own_memory(tokens)
            del tokens
            if 0 < self._offset >= len(self._tokens):
                self._refuse(f"token {self._offset} of a unit of {len(self._tokens)}")
        return self._tokens


class RowStream(_Lane):
    """The rows of one lane from an address on, where units are whole rows."""

    def fill(self, rows: Tokens) -> Trace:
        """Fill `rows` (..., T + 1) with the next ones, each from one unit."""
        trace, block_size = RowTrace(), rows.shape[-1] - 1
        filled = 0
        for index in product(*map(range, rows.shape[:-1])):
            tokens = self._load(block_size)
            trace.add(filled, (self._epoch, self._place, self._offset))
            rows[index] = tokens[self._offset : self._offset + block_size + 1]
            filled += block_size
            self._offset += block_size
            if self._offset + 1 >= len(tokens):
                self._next_unit()
        trace.add(filled, (self._epoch, self._place, self._offset))
        return trace

    def _load(self, block_size: int) -> Tokens:
        """The unit of the next row."""
        if self._tokens is None:
            self._tokens = self._source.tokens(self._epoch, self._lane, self._place)
            if self._offset % block_size or self._offset + block_size >= len(self._tokens):
                self._refuse(f"token {self._offset} of a unit of {len(self._tokens)}")
        return self._tokens

    def _next_unit(self) -> None:
        self._place, self._offset, self._tokens = self._place + 1, 0, None
        if self._place >= len(self._units):
            self._next_epoch()


def _own_memory(tokens: Tokens) -> Tokens:
    """A copy that goes back to the system when it is dropped.

    Each lane holds a unit for long; in Arrow's or malloc's memory the units would keep whole pools
    from shrinking (130 MB for 16 lanes instead of 98), and a view of a file all its pages.
    """
    if not len(tokens):
        return tokens
    copy = np.frombuffer(mmap.mmap(-1, tokens.nbytes), dtype=tokens.dtype)
    copy[:] = tokens
    return copy


def windows(tokens: Tokens, block_size: int) -> Tokens:
    """View n * T + 1 tokens as n rows of T + 1; each begins with the last one of the row before."""
    rows = (len(tokens) - 1) // block_size
    step = tokens.strides[0]
    return np.lib.stride_tricks.as_strided(
        tokens, (rows, block_size + 1), (block_size * step, step), writeable=False
    )


def document_ids(rows: torch.Tensor, separator: int | None) -> torch.Tensor:
    """The number of the document, counted from 0 in each row, that each token belongs to.

    (B, T) of any integer type -> (B, T) int32, on the device of `rows`. A separator belongs to
    the document that it ends; a tokenizer without one has no documents to tell apart.
    """
    assert separator is not None, "the tokenizer has no separator"
    ids = torch.zeros(rows.shape, dtype=torch.int32, device=rows.device)
    torch.cumsum(rows[..., :-1] == separator, dim=-1, dtype=torch.int32, out=ids[..., 1:])
    return ids


def positions(rows: torch.Tensor, separator: int | None) -> torch.Tensor:
    """The place of each token in its document, or in its row where the document began before it.

    (B, T) of any integer type -> (B, T) int32, on the device of `rows`.
    """
    assert separator is not None, "the tokenizer has no separator"
    place = torch.arange(rows.shape[-1], dtype=torch.int32, device=rows.device).expand(rows.shape)
    starts = torch.zeros_like(place)
    starts[..., 1:] = torch.where(rows[..., :-1] == separator, place[..., 1:], 0)
    return place - torch.cummax(starts, dim=-1).values
