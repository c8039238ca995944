"""CS336's training script: its flags are aliases; two .ids files on the command line choose its
defaults."""

from __future__ import annotations

import os

from settings.command_line import Arguments

_PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEFAULTS = os.path.join(_PROJECT, "configs", "cs336-tinystories.yaml")


def is_meant(arguments: Arguments) -> bool:
    """Returns whether a command line names the two token files that the script requires."""
    given = dict(arguments.overrides)
    return all(given.get(f"{part}_data_path", "").endswith(".ids") for part in ("train", "val"))
