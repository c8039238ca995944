"""At which steps of a run a text was read, found from the plan: no step is loaded.

The rows of a lane are cut from one stream of tokens, and the plan says which segments it is made of
in each epoch. So the place of a text in its segment gives its place in the stream, that the row,
and the row the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.loading.load_plan import LoadPlan, as_numbers
from data.loading.loader import close_readers, open_readers
from data.loading.order import Integers
from data.loading.packing import LaneReader
from data.sources.dataset import Passage, Source, Stored, errors_of_source

Progress = Callable[[str, int, int], None]
"""Is told the source, how many of its segments were read, and of how many."""


class Reading(NamedTuple):
    """A text in the batch of a step."""

    step: int
    sequence: int
    """The row of the batch that holds the begin of the text."""
    epoch: int
    """Of its source, counted from 1."""
    source: str
    stored: Stored
    """Where the text is stored."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Which segments of a source hold a text."""

    training: Integers
    """Of token files all, since other rows are cut from them in each epoch."""
    held_out: list[Stored]
    tokens: Integers
    """The tokens that every segment has; of those held out, any number."""


def find_matches(source: Source, block_size: int, passage: Passage, progress: Progress) -> Matches:
    """Looks for a text in all segments of a source; reads the whole of it, once."""
    segments = source.dataset.segments(block_size)
    counted = segments.whole_rows or not source.dataset.stats.error
    known = segments.sizes if segments.tokens is None else segments.tokens
    tokens, found, held_out = known.copy(), list[int](), list[Stored]()
    reader = segments.open_reader()
    with errors_of_source(source.name):
        for segment, is_held_out in enumerate(segments.held_out.tolist()):
            progress(source.name, segment, len(tokens))
            if segments.whole_rows and not is_held_out:
                continue
            parts = reader.find(segment, 0, 0, False, passage)
            if is_held_out:
                held_out += parts
                continue
            found += [segment] if parts else []
            if not counted:  # large text, of which the plan has estimates
                tokens[segment] = len(reader.tokens(segment, 0, 0, False))
    reader.close()
    every = np.flatnonzero(~segments.held_out)
    training = every if segments.whole_rows else np.array(found, dtype=np.int64)
    # In a lane, the last token of whole rows is a target only.
    return Matches(training, held_out, tokens - 1 if segments.whole_rows else tokens)


@dataclass(frozen=True, eq=False)
class ReadingSearch:
    """Looks for the readings of a text in some steps of a run."""

    plan: LoadPlan
    """Of the batches of all processes, from the first of these steps on."""
    first_step: int
    steps: int
    matches: list[Matches]
    """Of each source."""
    passage: Passage

    def readings(self) -> Iterator[Reading]:
        """Yields where the steps read the text, lane by lane."""
        plan, block_size = self.plan, self.plan.spec.block_size
        given = plan.shares.after_steps(plan.given, plan.spec.sequences_per_step, self.steps)
        rows, _ = plan.lane_rows(given)
        readers = open_readers(plan, range(len(plan.lanes)))
        for index, reader in readers.items():
            name = plan.sources[index].source.name
            for column, epoch, token, part in self._in_streams(
                index, rows[-1] * block_size, reader
            ):
                row = token // block_size
                step = int(np.searchsorted(rows[:, column], row, side="right")) - 1
                places = as_numbers(plan.layout(given[step : step + 2]).places[column])
                number = int(places[row - rows[step, column]])
                yield Reading(self.first_step + step, number, epoch + 1, name, part)
        close_readers(readers)

    def _in_streams(
        self, source: int, ends: Integers, reader: LaneReader
    ) -> Iterator[tuple[int, int, int, Stored]]:
        """Yields lane, epoch, token of the lane's stream, and where the text is stored.

        ends: the tokens that each lane reads. Its stream begins with the first token that it reads.
        """
        plan, matches = self.plan.sources[source].lane_plan, self.matches[source]
        lanes = {
            column: lane
            for column, lane in enumerate(self.plan.lanes)
            if lane.source == source and ends[column]
        }
        # The part of the first segment that was read before lies before the stream.
        at = {column: -lane.start.token for column, lane in lanes.items()}
        epoch = min((lane.start.epoch for lane in lanes.values()), default=0)
        while unfinished := [column for column in lanes if at[column] < ends[column]]:
            for column in unfinished:
                _, lane, start = lanes[column]
                if start.epoch > epoch:
                    continue
                first = start.segment_index if start.epoch == epoch else 0
                segments = plan.lane_segments(epoch, lane)[first:]
                read = plan.tokens_read(epoch, lane, matches.tokens)[first:]
                begins = at[column] + np.cumsum(read) - read
                inside = np.isin(segments, matches.training) & (begins < ends[column])
                for i in np.flatnonzero(inside).tolist():
                    for token, part in reader.find(epoch, lane, first + i, self.passage):
                        # Beyond `read` is the target that ends whole rows: no row begins there.
                        if token < read[i] and 0 <= begins[i] + token < ends[column]:
                            yield column, epoch, int(begins[i]) + token, part
                at[column] += int(read.sum())
            epoch += 1
