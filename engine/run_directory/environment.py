"""The machine, versions and command line of a session, for environment.json.

Reads no environment variable but SLURM's job number: others hold keys and tokens.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from settings.addresses import shareable
from settings.slurm import slurm_job

_PACKAGES = ("torch", "numpy", "pyarrow", "tokenizers", "tiktoken")
_PROJECT = Path(__file__).resolve().parents[2]


def describe_session(device: str) -> dict[str, Any]:
    """Returns one session of a run: time, command line, working directory, versions, machine and
    revision of this project."""
    return {
        "time": now(),
        "command": command_words(),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "git": _git_revision(),
        "host": socket.gethostname(),
        "slurm_job": slurm_job(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "device": device,
    }


def command_words() -> list[str]:
    """Returns the command line as files may keep it."""
    return [shareable(word) for word in sys.argv]


def now() -> str:
    """Returns the local time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Returns the commit, with `-dirty` if tracked files differ; None outside a git checkout."""
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return None
    return f"{revision}-dirty" if _git("status", "--porcelain", "-uno") else revision


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PROJECT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
