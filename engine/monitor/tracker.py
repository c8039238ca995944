"""What Weights & Biases and TensorBoard have in common.

A tracker is optional. Whatever is missing or fails (the package, a key, the network, the disk)
costs one warning line, and the run goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from engine.monitor import console


class Tracker(ABC):
    """Where records go besides metrics.jsonl; its methods never raise."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._failed = False

    @abstractmethod
    def log(self, record: dict[str, Any]) -> None:
        """Sends one record."""

    @abstractmethod
    def close(self, exit_code: int = 0) -> None:
        """Sends what is left."""

    def _attempt(self, work: Callable[[], object]) -> None:
        """Calls `work`, unless an earlier attempt failed."""
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # of a library or the network: anything, and never fatal
            self._failed = True
            warn_of_failure(self.name, error)


def warn_of_failure(name: str, error: Exception) -> None:
    """Prints that a tracker failed."""
    console.warning(f"{name}: {reason_of(error)}; training goes on without it.")


def warn_not_installed(name: str) -> None:
    """Prints how a missing package is installed."""
    console.warning(
        f"{name} is not installed; training goes on without it. Install: pip install {name}"
    )


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
