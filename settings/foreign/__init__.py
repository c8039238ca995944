"""Configs of other trainers that need more than other names: native values and notes, one file per
dialect, before layers are merged.

Names that only differ are in `settings.dialects`; what is here knows what a value counts there, and
what that trainer does without a word in its file.
"""

from __future__ import annotations

from collections.abc import Sequence

from settings.foreign import fivezeroes_bdh, tmrc
from settings.foreign.draft import Draft
from settings.reader import Entry
from settings.schema import Schema


def to_native(schema: Schema, source: str, entries: Sequence[Entry]) -> Draft:
    """Returns the entries of a file in our names and units, with what to tell of it."""
    draft = Draft(schema, entries)
    for dialect in (tmrc, fivezeroes_bdh):
        if dialect.recognises(draft):
            draft.notes.append(f"{source} is read as a config of {dialect.TRAINER}")
            dialect.translate(draft)
            break
    return draft
