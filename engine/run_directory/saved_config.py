"""The config that a run saved, also if its config.yaml was damaged or edited. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import CheckpointError, Config, DataError
from engine.run_directory.environment_file import read_environment
from engine.run_directory.manifest import CONFIG, ENVIRONMENT, MAX_BYTES
from files.regular import read_regular
from settings.entries import flat_options
from settings.values import to_text

_BEFORE = re.compile(r"config\.before_(\d+)(?:_\d+)?\.yaml")
NOT_SAVED = f"not what the run saved; its copy in {ENVIRONMENT} is used"


def read_config(folder: Path) -> tuple[Config, str]:
    """Returns the config that a run saved, and a sentence if its config.yaml is another one.

    Raises OSError and ConfigError.
    """
    path = folder / CONFIG
    data = read_regular(path, MAX_BYTES)
    copy: Mapping[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # without a copy, the file is believed
        copy = read_environment(folder).get("config") or {}
    # `replaces`: see `environment_file.config_copy`.
    known = (copy.get("sha256"), copy.get("replaces"))
    if not copy or hashlib.sha256(data).hexdigest() in known:
        return Config.from_yaml(path), ""
    return Config.from_dict(copy["values"], str(path)), NOT_SAVED


def config_of_step(folder: Path, step: int) -> Config:
    """Returns the config that a step, counted from 1, was trained with: a resume that changed
    options kept the one before as `config.before_<step>.yaml`. Raises DataError and ConfigError."""
    found = [(path, _BEFORE.fullmatch(path.name)) for path in folder.glob("config.before_*.yaml")]
    kept = [(path.stat().st_mtime_ns, path, int(match[1])) for path, match in found if match]
    kept.sort()
    # A resume from an earlier step than the last one trained the steps after it again, so what
    # counts is the last resume before `step`, in time. What came after it kept that one's config.
    last = max((i for i, (_, _, resumed) in enumerate(kept) if resumed < step), default=-1)
    later = kept[last + 1 :]
    try:
        return Config.from_yaml(later[0][1]) if later else read_config(folder)[0]
    except OSError as error:
        raise DataError(f"{folder}: its config cannot be read: {error.strerror}.") from error


def check_config(folder: Path) -> None:
    """Raises CheckpointError if an option of config.yaml is not as the run saved it."""
    saved, problem = read_config(folder)
    if not problem:
        return
    then = flat_options(saved.to_dict())
    now = flat_options(Config.from_yaml(folder / CONFIG).to_dict())
    differing = [
        f"{key} (saved {to_text(then.get(key))}, now {to_text(now.get(key))})"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{folder / CONFIG} is not what this run saved: it was cut short, damaged or edited. "
            f"It differs in {', '.join(differing)}. Put the saved values back, or copy the file "
            "elsewhere and use the copy, or change options on the command line."
        )
