"""Which segments each lane reads, epoch by epoch (see data/loading/order.py for the words).

Segments are shuffled and dealt to the lanes in turn. Documents differ in length, so the lanes would
end an epoch at different steps; balancing moves the surplus of long lanes to short ones, so that
all lanes have the same number of tokens in an epoch, to within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.loading.order import Integers, Keys, segment_order


def assign_lanes(keys: Keys, lanes: int) -> Integers:
    """Returns the lane of each segment, given the shuffle keys in the order of the epoch.

    Neighbours with equal keys are a group; groups go to the lanes in turn.
    """
    # Groups, not segments: a row group whose segments are in two lanes would be decoded twice.
    begins_group = np.ones(len(keys), dtype=np.int64)
    begins_group[1:] = keys[1:] != keys[:-1]
    return (np.cumsum(begins_group) - 1) % lanes


def tokens_per_lane(tokens: int, lanes: int, epoch: int) -> list[int]:
    """Returns how many of an epoch's tokens each lane reads.

    Where `tokens` is no multiple of `lanes`, other lanes get the remainder in each epoch. So over
    n epochs no lane reads more than ceil(n * tokens / lanes), and none falls behind by more than
    one token, however many epochs a run has. For 10 tokens and 4 lanes, epoch 0 has [2, 2, 3, 3]
    and epoch 1 has [3, 3, 2, 2].
    """
    # Differences of cumulative counts, so that roundings cannot add up over epochs.
    before, after = epoch * tokens, (epoch + 1) * tokens
    return [(after + lane) // lanes - (before + lane) // lanes for lane in range(lanes)]


@dataclass(frozen=True, slots=True)
class Spans:
    """Ranges of tokens, read one after the other: [begin[i], end[i]) of segment[i]."""

    segment: Integers
    begin: Integers
    end: Integers

    @classmethod
    def whole(cls, segments: Integers, tokens: Integers) -> Spans:
        """Returns all tokens of some segments; `tokens` has the size of every segment."""
        sizes = tokens[segments]
        return cls(segments, np.zeros_like(sizes), sizes)

    @classmethod
    def joined(cls, parts: Sequence[Spans]) -> Spans:
        """Returns several lists of spans as one."""
        return cls(
            np.concatenate([part.segment for part in parts]),
            np.concatenate([part.begin for part in parts]),
            np.concatenate([part.end for part in parts]),
        )

    @property
    def tokens(self) -> int:
        """The number of tokens in all spans."""
        return int((self.end - self.begin).sum())

    def part(self, start: int, stop: int) -> Spans:
        """Returns tokens [start, stop) of the joined spans, cutting at most the outer two.

        With `start` above 0 and not below the number of tokens there are none: a lane at or below
        its target has no surplus. In all other cases start < stop, or both are 0.
        """
        # Of the joined tokens, span i has [left[i], right[i]).
        edges = np.concatenate(([0], np.cumsum(self.end - self.begin)))
        left, right = edges[:-1], edges[1:]
        # From the first span that ends after `start` to the last one that begins before `stop`, or
        # that is empty at `stop`: a segment may have no tokens, by count or by estimate. Its span
        # is in the part that has the token before it, or in one that starts at 0. Positions in
        # checkpoints count spans, so another choice would resume them elsewhere.
        chosen = slice(
            np.searchsorted(right, start, "right") if start > 0 else 0,
            max(np.searchsorted(left, stop, "left"), np.searchsorted(right, stop, "right")),
        )
        left, right, begin = left[chosen], right[chosen], self.begin[chosen]
        return Spans(
            self.segment[chosen],
            begin + np.maximum(start - left, 0),
            begin + np.minimum(stop, right) - left,
        )


def balance_lanes(lanes: list[Integers], tokens: Integers, targets: list[int]) -> list[Spans]:
    """Returns the spans that each lane reads, so that lane i has targets[i] tokens.

    A lane keeps its own segments from the front, up to its target. The tokens beyond it, of all
    lanes in order, are the surplus; it fills the lanes that are short, in order. Two lanes with
    targets 5 and 5, and segments A of 4 tokens, B of 4 and C of 2:

        dealt      lane 0: A A A A B B B B     lane 1: C C
        balanced   lane 0: A A A A B           lane 1: C C B B B

    Args:
        lanes: the segments dealt to each lane.
        tokens: the size of every segment, by its number.
        targets: tokens of each lane; their sum is that of all dealt segments.
    """
    dealt = [Spans.whole(segments, tokens) for segments in lanes]
    # In the order of the lanes, so that every process computes the same surplus.
    surplus = Spans.joined(
        [spans.part(target, spans.tokens) for spans, target in zip(dealt, targets, strict=True)]
    )
    balanced, used = [], 0
    for spans, target in zip(dealt, targets, strict=True):
        missing = target - spans.tokens
        own = spans.part(0, target)
        if missing > 0:
            own = Spans.joined([own, surplus.part(used, used + missing)])
            used += missing
        balanced.append(own)
    return balanced


class Share(NamedTuple):
    """Tokens [begin, end) of a segment that is planned to have `planned` tokens."""

    begin: int
    end: int
    planned: int

    def of(self, count: int) -> slice:
        """Returns this share of the `count` tokens that the segment turned out to have.

        Where the plan only had estimates, all lanes that share the segment scale their bounds by
        the same factor, so each token still belongs to exactly one of them.
        """
        return slice(self.begin * count // self.planned, self.end * count // self.planned)


WHOLE_SEGMENT = Share(0, 1, 1)  # of(count) is slice(0, count)


@dataclass(frozen=True, slots=True)
class _LaneEpoch:
    """The segments of one lane in one epoch, in reading order, and those it shares with others."""

    segments: Integers
    shares: dict[int, Share]
    """By index in `segments`. Most segments are read whole and not listed, which saves memory."""


class LanePlan:
    """The segments of all lanes in every epoch; a pure function of its arguments.

    Args:
        keys: the shuffle key of every segment.
        segments: the numbers of the segments to read, such as those of the training split.
        lanes: the number of lanes.
        seed: the seed of the shuffle.
        shuffle: whether segments and documents are shuffled; if not, they keep their stored order.
        tokens: the tokens of every segment, by which lanes are balanced; estimates will do, since
            each lane then reads its share of what the segment has. None deals segments in turn
            without balancing: token files, whose segments are equal, and plans of version 1.
    """

    def __init__(
        self,
        keys: Keys,
        segments: Integers,
        *,
        lanes: int,
        seed: int,
        shuffle: bool,
        tokens: Integers | None = None,
    ) -> None:
        self.lanes, self.seed, self.shuffle = lanes, seed, shuffle
        # _keys goes by index in `segments`, _tokens by segment number.
        self._segments, self._keys, self._tokens = segments, keys[segments], tokens
        self.epoch_tokens = None if tokens is None else int(tokens[segments].sum())
        """The sum by which lanes are balanced; a checkpoint keeps it to notice another count."""
        self._epochs: dict[int, list[_LaneEpoch]] = {}

    def lane_segments(self, epoch: int, lane: int) -> Integers:
        """Returns the segments of a lane in one epoch, in reading order."""
        return self._lane(epoch, lane).segments

    def share(self, epoch: int, lane: int, index: int) -> Share:
        """Returns which tokens of its index-th segment the lane reads."""
        return self._lane(epoch, lane).shares.get(index, WHOLE_SEGMENT)

    def tokens_read(self, epoch: int, lane: int, tokens: Integers) -> Integers:
        """Returns how many tokens the lane reads of each of its segments.

        tokens: what every segment was found to have, by its number.
        """
        own = self._lane(epoch, lane)
        read = tokens[own.segments]
        for index, share in own.shares.items():
            part = share.of(int(read[index]))
            read[index] = part.stop - part.start
        return read

    def _lane(self, epoch: int, lane: int) -> _LaneEpoch:
        if epoch not in self._epochs:
            # Lanes pass from one epoch to the next at different rows, so two plans are alive.
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._plan_epoch(epoch)
        return self._epochs[epoch][lane]

    def _plan_epoch(self, epoch: int) -> list[_LaneEpoch]:
        order = segment_order(self._keys, self.seed, epoch, self.shuffle)
        lane = assign_lanes(self._keys[order], self.lanes)
        # All lanes are planned, also those of other processes: balancing needs their sizes.
        dealt = [self._segments[order[lane == v]] for v in range(self.lanes)]
        if self._tokens is None or self.epoch_tokens is None:
            return [_LaneEpoch(segments, {}) for segments in dealt]
        targets = tokens_per_lane(self.epoch_tokens, self.lanes, epoch)
        result = []
        for spans in balance_lanes(dealt, self._tokens, targets):
            # Only shared segments are listed: a few per lane, of possibly 100,000.
            planned = self._tokens[spans.segment]
            shared = np.flatnonzero((spans.begin > 0) | (spans.end < planned)).tolist()
            shares = {
                i: Share(int(spans.begin[i]), int(spans.end[i]), int(planned[i])) for i in shared
            }
            result.append(_LaneEpoch(spans.segment, shares))
        return result
