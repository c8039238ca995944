"""`runs.py seen`: at which steps a run read a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import DataError
from data.loading.find_readings import Reading, ReadingSearch, find_matches
from data.sources.dataset import Passage, Stored
from engine.replay.course import Course, Progress, course_of, newest_content, open_text

_LISTED = 20


@dataclass(frozen=True)
class Seen:
    """Where a run read a text."""

    text: str
    readings: list[Reading]
    """By step."""
    held_out: list[Stored]
    """Where the text stands in text that is not trained on."""
    in_training: bool
    """Whether it may stand in text that is trained on, whether the run came to it or not."""
    course: Course
    by_tokens: bool
    """Whether some of the text is in token files, in which tokens are looked for."""

    def lines(self, full: bool) -> list[str]:
        """Returns what was found, in words. full: all readings, not the first ones."""
        shown = self.readings if full else self.readings[:_LISTED]
        lines = [
            f"step {each.step}, sequence {each.sequence}, epoch {each.epoch + 1}: "
            f"{_where(each.source, each.stored)}"
            for each in shown
        ]
        if len(shown) < len(self.readings):
            more = len(self.readings) - len(shown)
            lines.append(f"... and {more:,} times more (--full shows all)")
        steps = len({each.step for each in self.readings})
        looked = ", ".join(f"{s.first} to {s.last}" for s in self.course.stretches) or "none"
        lines.append(f"Read {len(self.readings):,} times in {steps:,} steps (looked at: {looked}).")
        return [*lines, *self.notes()]

    def notes(self) -> list[str]:
        """Returns what else is to be said of the answer."""
        notes = list(self.course.notes)
        if self.held_out:
            first = _where("", self.held_out[0])
            notes.append(f"Held out, not trained on: {len(self.held_out):,} times, first {first}.")
        elif not self.readings and not self.in_training:
            notes.append("It is not in the data.")
        elif not self.readings and not self.by_tokens:
            notes.append("It is in the training text, and these steps did not come to it.")
        if self.by_tokens:
            notes.append(
                "In token files the tokens of the text are looked for, row by row: not found is "
                "what crosses the end of a row, or was encoded together with its neighbours."
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Returns the same as plain values."""
        return {
            "text": self.text,
            "steps": [[each.first, each.last] for each in self.course.stretches],
            "readings": [
                {
                    "step": each.step,
                    "sequence": each.sequence,
                    "epoch": each.epoch + 1,
                    "source": each.source,
                    **_place(each.stored),
                }
                for each in self.readings
            ],
            "held_out": [_place(part) for part in self.held_out],
            "notes": self.notes(),
        }


def _where(source: str, part: Stored) -> str:
    return f"{source}: {part}" if source else str(part)


def _place(part: Stored) -> dict[str, Any]:
    return {"place": part.place, "first": part.numbers.start, "last": part.numbers.stop - 1}


def seen(run: Path, text: str, last: int) -> Seen:
    """Returns where a run read a text in its steps up to `last`.

    Reads the data once, and no step of it again: their order follows from the plan. Raises
    DataError where the data is not what the run read, and for a text without tokens.
    """
    course, progress = course_of(run, last), Progress()
    if not course.stretches:
        raise DataError(f"{run}: no step of it can be followed. {' '.join(course.notes)}")
    saved = newest_content(run)
    dataset = open_text(course.stretches[-1].config, saved)
    ids = dataset.tokenizer.encode(text)
    if not len(ids):
        raise DataError(f"{text!r} has no tokens to look for.")
    passage, block_size = Passage(text, ids), course.stretches[-1].config.training.block_size
    sources = dataset.sources
    matches = [find_matches(source, block_size, passage, progress) for source in sources]
    readings = list[Reading]()
    for stretch in course.stretches:
        if stretch.config.training.use_oracle:
            raise DataError(
                f"{run}: with training.use_oracle its steps repeat one batch: "
                f"runs.py batch {run} {stretch.first} shows it."
            )
        plan = stretch.plan(open_text(stretch.config, saved))
        steps = stretch.last - stretch.first + 1
        readings += ReadingSearch(plan, stretch.first, steps, matches, passage).readings()
    readings.sort(key=lambda reading: (reading.step, reading.sequence))
    by_tokens = any(source.dataset.segments(block_size).whole_rows for source in sources)
    held_out = [part for each in matches for part in each.held_out]
    in_training = any(len(each.training) for each in matches)
    return Seen(text, readings, held_out, in_training, course, by_tokens)
