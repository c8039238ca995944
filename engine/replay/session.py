"""What a session of a run computes with: versions, device, threads, revision of the code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compare.reading.json_values import as_dict, as_str
from engine.run_directory.environment_file import session_of_step

NAMES = {
    "torch": "torch",
    "cuda": "CUDA",
    "numpy": "numpy",
    "python": "python",
    "device": "device",
    "cpu": "cpu",
    "threads": "threads",
    "processes": "processes",
    "git": "code revision",
}
_INDIRECT = ("numpy", "python")
"""Told, and never called the cause of a difference: no step computes with them."""
_THREADS = re.compile(r" \((\d+) threads\)")


@dataclass(frozen=True)
class Fact:
    """Something that a computation may depend on, in two sessions; empty: unknown."""

    name: str
    then: str
    now: str

    @property
    def differs(self) -> bool:
        """Whether it is known to be another one."""
        return bool(self.then and self.now) and self.then != self.now

    @property
    def may_cause(self) -> bool:
        """Whether it differs and steps compute with it."""
        return self.differs and self.name not in _INDIRECT

    def __str__(self) -> str:
        then = f"then {self.then}" if self.then else "unknown of then"
        return f"{self.name:<14} {self.now}, {then if self.differs or not self.then else 'as then'}"


def session_facts(environment: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns what the session that trained a step computed with, under the keys of `NAMES`.

    Earlier versions wrote some of it elsewhere: threads with the device, processes with the run.
    """
    session = session_of_step(environment, step)
    device, git = as_str(session.get("device")), as_str(session.get("git"))
    threads = _THREADS.search(device)
    revision, *dirty = git.split("-")
    return {
        "processes": as_dict(environment.get("run")).get("processes"),
        **({"threads": int(threads[1])} if threads else {}),
        **session,
        "device": re.sub(r" x \d+ processes$", "", _THREADS.sub("", device)),
        "git": "-".join([revision[:12], *dirty]),  # shortened by git to various lengths
    }


def compare_facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Fact]:
    """Returns what two sessions computed with."""
    facts = [Fact(name, _text(then.get(key)), _text(now.get(key))) for key, name in NAMES.items()]
    return [fact for fact in facts if fact.then or fact.now]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return "" if value is None else as_str(str(value))
