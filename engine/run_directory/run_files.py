"""The text files of a run directory, written so that damage is noticed by who reads them.

* metrics.jsonl: each line ends with the CRC-32 of its bytes before it, `"crc": "89abcdef"`, so a
  line stands by itself: a flipped bit or two merged lines cost those lines and no others.
* environment.json: a sha256 of its other keys. It tells how long metrics.jsonl was when it was last
  written, since whole lines that are cut off leave no trace there, and holds a copy of the config.
* config.yaml is the user's to copy and edit, so it carries nothing: the copy decides what it was.

Files of earlier versions have none of this and are read as they are. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config import CheckpointError, Config
from engine.run_directory.manifest import CONFIG, ENVIRONMENT, MAX_BYTES
from files.regular import read_regular
from settings.values import to_text

METRICS_BYTES = "metrics_bytes"
"""Key of environment.json: the length of metrics.jsonl at the newest save, resume or end."""
NOT_SAVED = f"not what the run saved; its copy in {ENVIRONMENT} is used"
_CRC = b', "crc": "%08x"}'
_CRC_BYTES = len(_CRC % 0)
_SHOWN = 5  # line numbers in a message


def metrics_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record, of one key at least, as a line with its checksum."""
    return protected(json.dumps(record, allow_nan=False).encode())


def protected(line: bytes) -> bytes:
    """Returns the line of a record with its checksum and line end."""
    body = line.rstrip()[:-1]
    return line + b"\n" if is_protected(line) else body + _CRC % zlib.crc32(body) + b"\n"


def is_protected(line: bytes) -> bool:
    """Whether a line, without its line end, is what `metrics_line` wrote."""
    return line.endswith(_CRC % zlib.crc32(line[:-_CRC_BYTES]))


def parse_line(line: bytes, intact: bool) -> dict[str, Any] | None:
    """Returns the record in a line, without its checksum; None for what is none.

    intact: what `is_protected` says of the line.
    """
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or (record.pop("crc", None) is not None and not intact):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 2**63 else None


class MetricsLine(NamedTuple):
    """A line of metrics.jsonl; `record` is None where it is damaged."""

    number: int
    text: bytes
    record: dict[str, Any] | None


def read_lines(content: bytes) -> tuple[list[MetricsLine], str]:
    """Returns all lines of metrics.jsonl, and one sentence on damaged ones, if any.

    A last line without a line end is being written, or was when the run crashed: unless it is
    whole, it is left out without a word.
    """
    texts = content.split(b"\n")
    intact = [is_protected(text) for text in texts]
    some = any(intact)  # then all are: a resume adds checksums to lines that have none
    lines = [
        MetricsLine(number, text, parse_line(text, whole) if whole or not some else None)
        for number, (text, whole) in enumerate(zip(texts, intact, strict=True), 1)
    ]
    if lines[-1].record is None:
        lines.pop()
    damaged = [line.number for line in lines if line.record is None]
    told = ", ".join(map(str, damaged[:_SHOWN])) + (", ..." if len(damaged) > _SHOWN else "")
    count = f"{len(damaged)} damaged line" + "s" * (len(damaged) > 1)
    return lines, f"left out {count} ({told})" if damaged else ""


def missing_bytes(written: Any, size: int) -> str:
    """Returns a sentence if metrics.jsonl is shorter than environment.json says, else ''."""
    if type(written) is not int or size >= written:
        return ""
    return f"cut short: {size:,} bytes, {written:,} were written; its last records are lost"


def environment_text(values: Mapping[str, Any]) -> str:
    """Returns environment.json with its checksum."""
    return json.dumps({**values, "checksum": _digest(values)}, indent=2) + "\n"


def read_environment(folder: Path) -> dict[str, Any]:
    """Returns environment.json without its checksum; raises OSError, and ValueError for damage."""
    try:
        values = json.loads(read_regular(folder / ENVIRONMENT, MAX_BYTES))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError("damaged, not a JSON object")
    checksum = values.pop("checksum", None)
    if checksum not in (None, _digest(values)):
        raise ValueError("damaged, its checksum does not match")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> tuple[Config, str]:
    """Returns the config that a run saved, and a sentence where its config.yaml is another one.

    Raises OSError and ConfigError.
    """
    place = folder / CONFIG
    data = read_regular(place, MAX_BYTES)
    copy: Mapping[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # then nobody knows better
        copy = read_environment(folder).get("config") or {}
    if not copy or is_saved_config(copy, data):
        return Config.from_yaml(place), ""
    return Config.from_dict(copy["values"], str(place)), NOT_SAVED


def check_config(folder: Path) -> None:
    """Raises CheckpointError where an option of config.yaml is not as the run saved it."""
    saved, told = read_config(folder)
    if not told:
        return
    now = Config.from_yaml(folder / CONFIG).to_dict()
    differing = [
        f"{section}.{name} (saved {to_text(then)}, now {to_text(now[section][name])})"
        for section, options in saved.to_dict().items()
        for name, then in options.items()
        if now[section][name] != then
    ]
    if differing:
        raise CheckpointError(
            f"{folder / CONFIG} is not what this run saved: it was cut short, damaged or edited. "
            f"It differs in {', '.join(differing)}. Put the saved values back, or copy the file "
            "elsewhere and resume with the copy, or change options on the command line."
        )


def is_saved_config(copy: Mapping[str, Any], data: bytes) -> bool:
    """Whether `data` is the config.yaml of which environment.json holds `copy`."""
    return hashlib.sha256(data).hexdigest() in (copy.get("sha256"), copy.get("replaces"))


def config_copy(config: Config, text: str, replaced: str | None) -> dict[str, Any]:
    """Returns what environment.json holds of the config that is saved as `text`.

    replaced: the sha256 of the config.yaml that it replaces. It is written first, so a crash in
    between leaves the older file, which is no damaged one.
    """
    saved = hashlib.sha256(text.encode()).hexdigest()
    return {"sha256": saved, "replaces": replaced, "values": config.to_dict()}
