"""The fixed rows of a split that a run is evaluated on: the same on every machine, for any seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.loading.order import Integers, Tokens, segment_order
from data.loading.packing import windows
from data.sources.dataset import Dataset, Reader, Segments, segments_of_split
from data.tokenizers.base import row_dtype

_SEED = 0
_MIN_SEGMENTS = 16


def evaluation_rows(dataset: Dataset, split: str, block_size: int, rows: int) -> Tensor:
    """Returns rows spread evenly over the "train" or "test" text.

    Of a long text of documents only the first segments of a fixed order are read: as many as the
    rows need, and at least 16.

    Returns:
        (n, block_size + 1) uint8 or int32; n is `rows`, or less if the text is short.

    Raises:
        DataError: the split has not one row.
    """
    assert rows > 0
    segments = dataset.segments(block_size)
    chosen = segments_of_split(segments, split)
    empty = np.zeros((0, block_size + 1), dtype=row_dtype(dataset.vocab_size))
    pick = _pick_whole_rows if segments.whole_rows else _pick_packed_rows
    sample = pick(segments, chosen, empty, rows)
    if not len(sample):
        raise dataset.too_short(split, block_size)
    return torch.from_numpy(sample)


def _pick_whole_rows(segments: Segments, chosen: Integers, empty: Tokens, rows: int) -> Tokens:
    """Picks rows from segments that are whole rows; `empty` is (0, T + 1), of the result's type."""
    width = empty.shape[1]
    block_size = width - 1
    # rows_until[i]: the rows in the chosen segments up to and including the i-th.
    rows_until = np.cumsum((segments.sizes[chosen] - 1) // block_size)
    total = int(rows_until[-1]) if len(rows_until) else 0
    count = min(rows, total)
    sample = np.empty((count, width), dtype=empty.dtype)
    reader = segments.open_reader()
    for row, number in zip(sample, np.arange(count) * total // max(1, count), strict=True):
        i = int(np.searchsorted(rows_until, number, side="right"))
        # Without shuffling the first row begins at the begin of its span, whatever the epoch.
        tokens = reader.tokens(int(chosen[i]), _SEED, 0, shuffle=False)
        rows_to_end = int(rows_until[i] - number)
        start = len(tokens) - 1 - rows_to_end * block_size
        row[:] = tokens[start : start + width]
    reader.close()
    return sample


def _pick_packed_rows(segments: Segments, chosen: Integers, empty: Tokens, rows: int) -> Tokens:
    """Picks rows from segments of documents, joined in a fixed order."""
    chosen = chosen[segment_order(segments.shuffle_keys[chosen], _SEED, 0)]
    tokens_until = np.cumsum(segments.sizes[chosen])
    # Sizes are estimates, so twice the text that the rows need is read.
    enough = 1 + int(np.searchsorted(tokens_until, 2 * rows * (empty.shape[1] - 1)))
    chosen = chosen[: max(_MIN_SEGMENTS, enough)]
    reader = segments.open_reader()
    sample = _spread_rows(_read_in_order(reader, chosen), empty, rows)
    reader.close()
    return sample


def _read_in_order(reader: Reader, chosen: Integers) -> Iterator[Tokens]:
    """Yields the tokens of segments; remote ones are asked for in advance."""
    for i, segment in enumerate(chosen.tolist()):
        reader.prefetch(0, map(int, chosen[i:]))
        yield reader.tokens(segment, _SEED, 0, True)


def _spread_rows(parts: Iterator[Tokens], kept: Tokens, rows: int) -> Tokens:
    """Picks rows spread evenly over a text whose length is known only at its end.

    Every stride-th row is kept. Whenever twice the rows are there, every other one is dropped and
    the stride doubled, so at the end the kept rows are evenly spread and at least `rows`.

    Args:
        parts: the tokens of the text, part by part.
        kept: (0, T + 1), of the type of the result.
        rows: how many to return, or fewer if the text is short.
    """
    block_size = kept.shape[1] - 1
    rest = np.zeros(0, dtype=kept.dtype)
    seen, stride = 0, 1
    for part in parts:
        # What is left of a segment begins the next row, as in training.
        rest = np.concatenate((rest, part), dtype=kept.dtype, casting="unsafe")
        if len(rest) <= block_size:
            continue
        complete = windows(rest, block_size)
        next_kept = -seen % stride  # the first of these rows whose number is a multiple of stride
        kept = np.concatenate((kept, complete[next_kept::stride]))
        while len(kept) >= 2 * rows:
            kept, stride = kept[::2], 2 * stride
        seen += len(complete)
        rest = rest[len(complete) * block_size :].copy()  # a view would keep the whole part
    count = min(rows, len(kept))
    return kept[np.arange(count) * len(kept) // max(1, count)]
